"""A model's tensors under the names in which checkpoints are published, as views of its parameters.

Hugging Face fuses the experts of a layer into one tensor; published checkpoints, and so the UE8M0
master, hold every expert's gate, up and down matrix by itself with its own scales. Views let
the loader, the saver and the grid all speak of the published tensors without a copy or a second
naming scheme.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ottava.checkpoint.names import Storage, storage_of


@dataclass(frozen=True)
class Published:
    """One published tensor. tensor: a view that aliases the parameter; storage: how the master holds it."""

    tensor: Tensor
    storage: Storage


def published(model: nn.Module) -> dict[str, Published]:
    """Every tensor that a checkpoint of `model` holds, by published name, in a fixed order."""
    out: dict[str, Published] = {}
    for name, parameter in model.named_parameters():
        for published_name, view in _split(name, parameter.data):
            out[published_name] = Published(view, storage_of(published_name, view.dim()))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            out[name] = Published(buffer, "f32")
    return out


def matrices(name: str, tensor: Tensor) -> tuple[Tensor, Storage]:
    """A parameter seen as [..., M, N] with one published matrix in the last two axes, and its storage."""
    if name.endswith("experts.gate_up_proj"):
        experts, rows, columns = tensor.shape
        return tensor.view(experts, 2, rows // 2, columns), "fp8"
    if name.endswith("experts.down_proj"):
        return tensor, "fp8"
    return tensor, storage_of(name, tensor.dim())


def _split(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if name.endswith("experts.gate_up_proj"):
        stem, half = name.removesuffix("gate_up_proj"), tensor.shape[1] // 2
        for expert in range(tensor.shape[0]):
            yield f"{stem}{expert}.gate_proj.weight", tensor[expert, :half]
            yield f"{stem}{expert}.up_proj.weight", tensor[expert, half:]
    elif name.endswith("experts.down_proj"):
        stem = name.removesuffix("down_proj")
        for expert in range(tensor.shape[0]):
            yield f"{stem}{expert}.down_proj.weight", tensor[expert]
    else:
        yield name, tensor


def unrounded(item: Published) -> Tensor:
    """The tensor in BF16 where that holds every value of it, else in F32: a contiguous copy."""
    values = item.tensor.detach().float()
    short = values.to(torch.bfloat16)
    return (short if item.storage != "f32" and torch.equal(short.float(), values) else values).contiguous()


def stored(item: Published) -> Tensor:
    """The tensor as a BF16 or F32 checkpoint holds it: a contiguous copy."""
    dtype = torch.float32 if item.storage == "f32" else torch.bfloat16
    return item.tensor.detach().to(dtype).contiguous()
