"""Generation, once: for evaluation and rollouts in batches, and for serving one request beside another."""
