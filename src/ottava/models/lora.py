"""Low-rank adapters (LoRA, arXiv 2106.09685) on a model that is there: peft's layers, our draws, exact merging.

A frozen matrix W is used as W + alpha / rank * B A. Two things are done here and not by peft: A is drawn from a host
counter, because torch's draws differ between instruction sets; and merging keeps W as it was aside, because adding
a product and subtracting it again does not give the old bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ottava.errors import PlatformError, RecipeError

STREAM = 1 << 32  # apart from the draws of `build.initialise`, which count parameters from 0
NAME = "default"  # peft's own name of a model's only adapter


def adapt(model: nn.Module, rank: int, alpha: float, targets: Sequence[str], seed: int) -> nn.Module:
    """The model with adapters on the linear layers that these names end; they alone have a gradient from now on.

    B is zero, so that nothing changes yet; A is uniform within 1 / sqrt(inputs), peft's own range, and its bits depend
    on the seed and the layers' order only. Raises PlatformError without peft, RecipeError for a name that is none.
    """
    if find_spec("peft") is None:
        raise PlatformError(
            "adapters (lora) need the package peft, which is not installed",
            where="import peft",
            fix="pip install -e '.[reason]'",
        )
    _check(model, targets)
    from peft import LoraConfig, inject_adapter_in_model

    model.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=0.0, bias="none")
    adapted: nn.Module = inject_adapter_in_model(config, model, NAME)
    with torch.no_grad():
        for index, (_, _, layer) in enumerate(_layers(adapted)):
            a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
            draw = np.random.Generator(np.random.Philox(key=[seed, STREAM + index])).random(tuple(a.shape))
            a.copy_(torch.from_numpy(((2 * draw - 1) / math.sqrt(a.shape[1])).astype(np.float32)))
            b.zero_()
    return adapted


@contextmanager
def merged(model: nn.Module) -> Iterator[nn.Module]:
    """The same model without adapters, its matrices being W + alpha / rank * B A; to be run without gradients.

    Inside the block the model has its own layers and names, as it is exported and served; afterwards the adapters
    and every bit of W are back. A model without adapters stays as it is.
    """
    kept: list[tuple[nn.Module, str, Any, Tensor]] = []
    try:
        with torch.no_grad():
            for parent, name, layer in _layers(model):
                base = layer.base_layer
                kept.append((parent, name, layer, base.weight.data))
                base.weight.data = base.weight.data + layer.get_delta_weight(NAME)
                setattr(parent, name, base)
        yield model
    finally:
        for parent, name, layer, weight in kept:
            layer.base_layer.weight.data = weight
            setattr(parent, name, layer)


def _layers(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Every adapted layer with the module that holds it, and its name there."""
    return [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if hasattr(layer, "lora_A") and hasattr(layer, "base_layer")
    ]


def _check(model: nn.Module, targets: Sequence[str]) -> None:
    """Each target must name layers that an adapter can be put on."""
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    tied = model.get_input_embeddings().weight  # type: ignore[operator]
    for target in targets:
        found = [layer for name, layer in linear.items() if name == target or name.endswith(f".{target}")]
        if not found:
            known = sorted({name.rpartition(".")[2] for name in linear})
            what = f"the model has no linear layer called {target!r}"
            raise RecipeError(what, where="lora.targets", fix=f"it has: {', '.join(known)}")
        if any(layer.weight is tied for layer in found):
            what = f"{target!r} shares its matrix with the embeddings: an adapter on it would change both"
            raise RecipeError(what, where="lora.targets", fix="leave it out")
