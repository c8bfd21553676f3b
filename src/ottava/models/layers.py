"""On which linear layers of a model adapters can be put: by its config.json alone, before it is loaded."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


def linear(config: Mapping[str, Any]) -> frozenset[str] | None:
    """The last parts of the names of the linear layers that can have adapters; None of an unknown family.

    A head that is the embeddings cannot. Nor can feed-forward layers of a model with routed experts: these are fused
    into one tensor, and peft takes the names of the dense ones for theirs.
    """
    family, deep = config.get("model_type"), int(config.get("num_hidden_layers") or 0)
    head = () if config.get("tie_word_embeddings") else ("lm_head",)
    if family in ("llama", "qwen3"):
        return frozenset((*ATTENTION, *FEED_FORWARD, *head))
    if family == "qwen3_moe":
        sparse, skipped = int(config.get("decoder_sparse_step") or 1), config.get("mlp_only_layers") or ()
        dense = all(layer in skipped or (layer + 1) % sparse for layer in range(deep))
        return frozenset((*ATTENTION, *(FEED_FORWARD if dense else ()), *head))
    if family == "deepseek_v3":
        query = ("q_proj",) if config.get("q_lora_rank") is None else ("q_a_proj", "q_b_proj")
        dense = int(config.get("first_k_dense_replace") or 0) >= deep
        latent = ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
        return frozenset((*query, *latent, *(FEED_FORWARD if dense else ()), *head))
    return None


def missing(targets: Iterable[str], known: Collection[str]) -> tuple[str, str] | None:
    """(what is wrong, how to mend it) where a target's last part is none of the layers that are known; or None."""
    for target in targets:
        if target.rpartition(".")[2] not in known:
            return (
                f"the model has no linear layer called {target!r} for adapters",
                f"it has: {', '.join(sorted(known))}",
            )
    return None
