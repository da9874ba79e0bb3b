"""Environments: cpu.lock and gpu.lock (what is pinned and why) and setup_cpu.py (what `make setup` runs)."""
