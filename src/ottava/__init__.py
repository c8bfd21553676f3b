"""Ottava: train where it is stable, serve where you must: one model, two chip families, the same bits."""

__version__ = "0.1.0"
