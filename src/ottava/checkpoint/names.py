"""Names of tensors, by which the master holds them in FP8 or not; of files that go with weights; of computing types."""

from __future__ import annotations

import re
from typing import Literal

Storage = Literal["fp8", "bf16", "f32"]
"""What a published tensor is stored in."""

Precision = Literal["float32", "bf16", "fp8"]
"""What a model computes in while it trains: `models.precision`."""

COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "LICENSE",
)  # fmt: skip
"""Files that go with the weights whatever their layout."""

_IN_A_LAYER = re.compile(r"(?:language_model\.)?(?:model\.)?(?:language_model\.)?(?:layers|mtp)\.\d+\.")

_LINEAR = re.compile(
    r"(?:_proj(?:_with_mqa)?"  # Llama, Qwen, DeepSeek-V2 and V3
    r"|\.indexer\.(?:wq_b|wk)"  # DeepSeek-V3.2's sparse attention
    r"|\.(?:experts\.\d+|shared_experts)\.w[123]"  # Mixtral, DeepSeek-V4
    r"|\.attn\.(?:wq_a|wq_b|wkv|wo_a|wo_b)"  # DeepSeek-V4
    r")\.weight$"
)

KEPT = re.compile(r"(?:\.gate|weights_proj|eh_proj|shared_expert_gate)\.weight$|\.compressor\.")
"""Linear weights inside layers that stay as they are: routers, the indexer's weights, what joins predicted tokens."""

_SINGLE = re.compile(
    r"(?:e_score_correction_bias|\.ffn\.gate\.bias|\.attn_sink|\.compressor\.ape|\.indexer\.k_norm\.(?:weight|bias))$"
    r"|(?:^|\.)hc_(?:attn|ffn|head)_\w+$"
)


def storage_of(name: str, dims: int) -> Storage:
    """How the master stores a published tensor, as in DeepSeek's checkpoints.

    Linear weights inside layers are FP8, also where names are bare as in DeepSeek-V4; embeddings, head, norms,
    routers, the indexer's `weights_proj`, the compressor and multi-token prediction's `eh_proj` stay BF16; the
    router's correction bias and what else DeepSeek publishes in F32 stays F32.
    """
    if _SINGLE.search(name):
        return "f32"
    if dims == 2 and _IN_A_LAYER.match(name) and _LINEAR.search(name) and not KEPT.search(name):
        return "fp8"
    return "bf16"
