"""One digest for one set of exact values, whatever the layout.

Two folders hold the same model when every published weight has the same values. BF16 tensors, FP8
codes with power-of-two scales in 128x128 or 1x32 blocks, and scales stored as F8_E8M0, as bytes or
as F32 are only spellings: each weight is reduced to its exact BF16 bytes (F32 tensors keep their F32
bytes, others their own), and those are digested. What is not exact in BF16 is refused, never rounded.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from ottava.artifact import canonical
from ottava.checkpoint.layouts import exact, weights
from ottava.checkpoint.safetensors import plan_of, raw


def tensor_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each published weight by name, sorted: over the canonical JSON [name, type, shape], then the bytes.

    Memory: one tensor at a time. Raises CheckpointError where a weight's values are not exact in BF16.
    """
    digests: dict[str, str] = {}
    for name, weight in weights(folder).items():
        value = exact(weight)
        dtype, shape = plan_of({name: value})[name]
        hasher = hashlib.sha256(canonical([name, dtype, list(shape)]))
        hasher.update(raw(value))
        digests[name] = hasher.hexdigest()
    return digests


def combine(digests: dict[str, str]) -> str:
    """The digest of a model from its tensors' digests: SHA-256 over them, in order of name."""
    return hashlib.sha256("".join(digests[name] for name in sorted(digests)).encode()).hexdigest()


def values_digest(folder: Path) -> str:
    """The digest of a model's exact values. Raises as `tensor_digests` does."""
    return combine(tensor_digests(folder))
