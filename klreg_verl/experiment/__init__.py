"""Recipes, the runs they expand to, run folders and provenance. Standard library and PyYAML only."""
