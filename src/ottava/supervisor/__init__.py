"""Keeps a run alive: starts workers by name, watches them, decides, and moves a run between pools."""
