"""Which job on which chips, when, and at what cost: figures with sources, pure arithmetic, and a schedule."""
