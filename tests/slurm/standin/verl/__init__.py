"""Stands in verl's place where a test is about jobs and nodes: see trainer/main_ppo.py."""
