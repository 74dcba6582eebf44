"""Adapter methods, and what holds for all of them: hooks, files, merging, export."""
