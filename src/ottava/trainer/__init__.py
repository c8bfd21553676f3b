"""The training loop of one worker: data, losses, virtual shards, exact state. Knows nothing of pools or faults."""
