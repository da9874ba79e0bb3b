"""Tests that need a CUDA device; a package, so that a file may have the name of one in tests/."""
