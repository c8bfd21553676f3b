"""An OpenAI-compatible server for one hybrid model: one decision on thinking, bounded, and drained on SIGTERM."""
