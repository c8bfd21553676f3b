"""Which published tensors the master holds in FP8: one rule, by name."""

from __future__ import annotations

from typing import Literal

Storage = Literal["fp8", "bf16", "f32"]


KEPT = ("mlp.gate.weight", "weights_proj.weight", "eh_proj.weight")


def storage_of(name: str, dims: int) -> Storage:
    """How the master stores a published tensor, as in DeepSeek-V3's checkpoints.

    Linear weights inside layers are FP8; embeddings, head, norms, the router, the indexer's
    `weights_proj` and multi-token prediction's `eh_proj` stay BF16; the router's correction bias stays F32.
    """
    if name.endswith("e_score_correction_bias"):
        return "f32"
    if dims != 2 or not name.startswith("model.layers.") or name.endswith(KEPT):
        return "bf16"
    return "fp8" if name.endswith(("_proj.weight", "_proj_with_mqa.weight")) else "bf16"
