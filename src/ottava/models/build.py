"""Model classes by `config.json`, and an initialisation that is the same on every chip.

Weights are drawn by numpy from a host counter, not by torch: torch's normal_ differs between
instruction sets, and a run that starts from other bits can never be compared with another.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ottava.errors import CheckpointError

FAMILIES = ("deepseek_v3", "llama", "qwen3", "qwen3_moe")


def from_config(config: dict[str, Any], where: Path | str = "config.json") -> nn.Module:
    """A Hugging Face causal LM in float32 on the CPU; its parameters hold no meaningful values yet.

    config: the content of `config.json`; where: that file, for messages. Attention is `eager` and
    experts `grouped_mm`: both are plain matrix products, so the numerics class has few members.
    Raises CheckpointError.
    """
    family = config.get("model_type")
    settings = {k: v for k, v in config.items() if k not in ("model_type", "quantization_config", "architectures")}
    if family == "deepseek_v3":
        from transformers.models.deepseek_v3 import DeepseekV3Config as Config
        from transformers.models.deepseek_v3 import DeepseekV3ForCausalLM as Model
    elif family == "llama":
        from transformers.models.llama import LlamaConfig as Config
        from transformers.models.llama import LlamaForCausalLM as Model
    elif family == "qwen3":
        from transformers.models.qwen3 import Qwen3Config as Config
        from transformers.models.qwen3 import Qwen3ForCausalLM as Model
    elif family == "qwen3_moe":
        from transformers.models.qwen3_moe import Qwen3MoeConfig as Config
        from transformers.models.qwen3_moe import Qwen3MoeForCausalLM as Model
    else:
        raise CheckpointError(
            f"the model type {family!r} is not supported", where=where, fix=f"known: {', '.join(FAMILIES)}"
        )
    settings.pop("dtype", None)
    settings.pop("torch_dtype", None)
    try:
        model: nn.Module = Model(Config(**settings, attn_implementation="eager", dtype="float32"))
        if family in ("deepseek_v3", "qwen3_moe"):
            model.set_experts_implementation("grouped_mm")  # type: ignore[operator]
    except Exception as error:  # transformers checks fields here and there, with many kinds of exceptions
        said = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"config.json describes no {family} model: {said}", where=where, fix="correct that field of config.json"
        ) from error
    return model.float()


def fresh(config: dict[str, Any], seed: int) -> nn.Module:
    """A model of a config with initial weights."""
    model = from_config(config)
    initialise(model, seed)
    return model


def initialise(model: nn.Module, seed: int) -> None:
    """Draw initial weights: embeddings N(0, 0.5), matrices N(0, 1/fan_in), output projections and head zero.

    Zero output projections make every block start as the identity, which lets a tiny model train
    at high rates. Norm weights stay 1. The bits depend on `seed` and the parameter's order only.
    """
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if parameter.dim() < 2:
                continue
            if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj", "lm_head.weight")):
                parameter.zero_()
                continue
            scale = 0.5 if "embed" in name else 1.0 / math.sqrt(parameter.shape[-1])
            draw = np.random.Generator(np.random.Philox(key=[seed, index])).standard_normal(tuple(parameter.shape))
            parameter.copy_(torch.from_numpy((draw * scale).astype(np.float32)))
