"""Tiny random models of three architectures, in shapes that do and do not fill their 128x128 blocks.

The weights lie on the grid, so that every layout of a model holds the same values and what differs
between two layouts on one engine is the engine's doing alone. Magnitudes differ from one 64x64 tile to the
next by powers of two: neighbouring blocks have different scales, and a scale applied to a wrong row shows.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig, PretrainedConfig, Qwen3Config

from ottava.fp8.codec import project

VOCABULARY = 384
DENSE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 256,
    "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
DEEPSEEK: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "max_position_embeddings": 256, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
ARCHITECTURES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, DENSE),
    "qwen3": (Qwen3Config, DENSE),
    "deepseek_v3": (DeepseekV3Config, DEEPSEEK),
}


def build(folder: Path, architecture: str, seed: int = 0, **changes: Any) -> Path:
    """Save a random BF16 model on the grid, its shapes those of ARCHITECTURES but for `changes`; return `folder`."""
    cls, shape = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(cls(**{**shape, **changes}), dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.2 * torch.randn(parameter.shape))
            elif parameter.ndim == 2:
                parameter.copy_(_weight(name, *parameter.shape))
            else:
                for expert in parameter:
                    expert.copy_(_weight(name + "_proj.weight", *expert.shape))
    model.save_pretrained(folder)
    return folder


def prompts(count: int = 8, tokens: int = 48, seed: int = 1) -> list[list[int]]:
    """Random token IDs, [count, tokens], beginning and end marks not among them."""
    drawn = torch.randint(2, VOCABULARY, (count, tokens), generator=torch.Generator().manual_seed(seed))
    return [list(map(int, row)) for row in drawn]


def without_activations(folder: Path) -> None:
    """Take the rounding of activations out of an `mxfp8` folder's configuration."""
    config = config_of(folder)
    for group in config["quantization_config"]["config_groups"].values():
        group["input_activations"] = None
    (folder / "config.json").write_text(json.dumps(config))


def double_a_scale(folder: Path, out: Path) -> None:
    """Copy a `deepseek` folder, the scale of the first block of the first layer's `down_proj` doubled."""
    shutil.copytree(folder, out)
    name = "model.layers.0.mlp.down_proj.weight_scale_inv"
    for path in out.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name][0, 0] *= 2
            save_file(tensors, path, metadata={"format": "pt"})


def config_of(folder: Path) -> dict[str, Any]:
    """A folder's config.json."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def _weight(name: str, rows: int, columns: int) -> Tensor:
    gain = {"embed_tokens": columns**0.5, "lm_head": 2.0, "q_proj": 1.5, "k_proj": 1.5}
    size = next((value for part, value in gain.items() if part in name), 1.0) / columns**0.5
    value = size * torch.randn(rows, columns)
    if not (name.endswith("_proj.weight") or "_proj_with_mqa" in name):
        return value
    tiles = torch.randint(-1, 2, (-(-rows // 64), -(-columns // 64))).float().exp2()
    value *= tiles.repeat_interleave(64, 0)[:rows].repeat_interleave(64, 1)[:, :columns]
    return project(value.bfloat16())
