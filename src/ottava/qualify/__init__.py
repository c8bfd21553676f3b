"""A gate before a run: which workers of a pool may carry it, what they reach, and whether the run will get through."""
