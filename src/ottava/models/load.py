"""Read a Hugging Face folder into a model exactly, whatever layout it is in.

Loaders that skip a missing expert or copy a scale byte as a number still generate text. This one
checks that every published tensor is there once, in its shape, and that nothing is left over.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ottava.checkpoint import layouts, safetensors
from ottava.checkpoint.layouts import Weight
from ottava.errors import CheckpointError, FormatError
from ottava.fp8.linear import Fp8Linear, replace
from ottava.fp8.matmul import Order, orders
from ottava.fp8.spec import BYTE_MAX, BYTE_MIN
from ottava.models.build import from_config
from ottava.models.published import published


def load(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    weights: Literal["exact", "fp8"] = "exact",
    *,
    order: Order | None = None,
) -> nn.Module:
    """The model of a BF16, UE8M0-FP8 or MXFP8 folder, with exactly the folder's values, in eval mode.

    dtype: float32 or bfloat16, the type computed in; both hold every value of a folder exactly,
    except F32 tensors (the router's bias), which stay float32.
    weights: with "fp8" linear layers whose values the folder holds in FP8, one power of two for each 128x128
    block, stay so (`Fp8Linear`, in `order`); they have no gradient, nor has the rest of the model. The routed
    experts, which Transformers fuses into tensors of its own, are dequantised all the same.
    Raises CheckpointError; FormatError where "fp8" has no kernels here.
    """
    if weights == "fp8" and not orders():
        raise FormatError(
            "the kernels for FP8 weights were not built", fix="reinstall with a C compiler, or load exact"
        )
    with _Undrawn():
        model = from_config(layouts.read_config(folder), folder / "config.json")
    found = layouts.weights(folder)
    held: set[str] = set()
    if weights == "fp8":
        model.requires_grad_(False)
        held = {f"{name}.weight" for name in replace(model, _held_in_fp8(found, folder, order))}
    if dtype != torch.float32:
        model = model.to(dtype)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.data = buffer.data.float()
    _fill(model, {name: weight for name, weight in found.items() if name not in held}, folder)
    return model.eval()


def _fill(model: nn.Module, found: dict[str, Weight], folder: Path) -> None:
    """Copy the exact values of `found` into the model, which must publish them all and no others."""
    tensors = published(model)
    missing = set(tensors)
    with torch.no_grad():
        for name, weight in found.items():
            if name == "lm_head.weight" and name not in tensors:
                continue  # tied to the embeddings
            values = layouts.exact(weight)
            if name not in missing:
                raise CheckpointError(f"unexpected tensor {name!r}", where=folder)
            target = tensors[name].tensor
            _same_shape(name, tuple(values.shape), tuple(target.shape), folder)
            target.copy_(values)
            missing.discard(name)
    if missing:
        raise CheckpointError(f"{len(missing)} tensors are missing, first {min(missing)!r}", where=folder)


def _same_shape(name: str, stored: tuple[int, ...], needed: tuple[int, ...], folder: Path) -> None:
    if stored != needed:
        raise CheckpointError(f"{name!r} has shape {stored}, the model needs {needed}", where=folder)


def _held_in_fp8(
    found: dict[str, Weight], folder: Path, order: Order | None
) -> Callable[[str, nn.Linear], Fp8Linear | None]:
    """Chooses for `replace` the layers that the folder holds in FP8, and reads them."""

    def choose(name: str, linear: nn.Linear) -> Fp8Linear | None:
        weight = found.get(f"{name}.weight")
        if weight is None or weight.scale is None or weight.packed:
            return None
        _same_shape(weight.data.name, weight.shape, tuple(linear.weight.shape), folder)
        scales = _block_scales(weight)
        if scales is None:
            return None
        codes = safetensors.load(weight.data)
        if layouts.has_nan(codes):
            raise layouts.nan_code(weight)
        return Fp8Linear(codes, scales, linear.bias, order=order)

    return choose


def _block_scales(weight: Weight) -> Tensor | None:
    """The scale bytes of 128x128 blocks; None where the values have none that the kernels take."""
    scales = layouts.collapsed(layouts.scale_bytes(weight), weight.block, *weight.shape)
    if scales is None or int(scales.min()) < BYTE_MIN or int(scales.max()) > BYTE_MAX:
        return None
    return scales


class _Undrawn(TorchFunctionMode):
    """Leaves new parameters as they were allocated: every value will be read, and pages never written cost nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("kaiming_uniform_", "normal_", "trunc_normal_", "uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))
