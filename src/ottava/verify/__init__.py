"""Proofs about what is served: that the bytes, the prompts and the numbers are those that were evaluated."""
