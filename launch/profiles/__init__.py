"""Cluster profiles that come with the project."""
