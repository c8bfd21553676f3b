"""From a BF16, FP16 or FP32 model to the UE8M0-FP8 master, saying what it cost.

Weights that were trained on the grid lie there already: conversion only writes them down, and the
result is labelled `on-grid`. Any other model is rounded once, here, and labelled `rounded` with the
number of tensors that changed and the signal-to-noise ratio. FP8 checkpoints whose scales are not
powers of two are refused: rounding them a second time loses 3 dB that a BF16 source would keep.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ottava.artifact import write_json
from ottava.checkpoint.digest import values_digest
from ottava.checkpoint.layouts import (
    MASTER_CONFIG,
    NEEDS_MASTER,
    Weight,
    exact,
    finish,
    read_config,
    weights,
    whole_folder,
)
from ottava.checkpoint.names import storage_of
from ottava.checkpoint.safetensors import write_folder
from ottava.errors import CheckpointError, FormatError
from ottava.fp8.codec import dequantise, quantise
from ottava.fp8.spec import grid

FLOATS = ("BF16", "F16", "F32", "F8_E4M3")


@dataclass
class Tally:
    """What a conversion did. signal, noise: sums of squares over the quantised weights and over their errors."""

    tensors: int = 0
    quantised: int = 0
    rounded: int = 0
    signal: float = 0.0
    noise: float = 0.0

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantisation noise over all quantised weights, in dB; None where there is no noise."""
        return 10 * math.log10(self.signal / self.noise) if self.noise else None


def convert(args: Mapping[str, Any]) -> dict[str, Any]:
    """Write the master of the model folder args["source"] to the new folder args["out"]; return its conversion.json.

    {"on_grid", "label": "on-grid" | "rounded", "digest", "tensors", "quantised", "rounded", "sqnr_db", "bytes"}:
    tensors, quantised and rounded are counts of published weights, bytes the size of the folder's tensor files.
    Memory: one tensor at a time. Raises CheckpointError or FormatError, naming file and tensor.
    """
    source, out = Path(args["source"]), Path(args["out"])
    config, found = read_config(source), weights(source)
    plan = _plan(source, found)
    tally = Tally()
    with whole_folder(out) as part:
        write_folder(part, plan, _stream(found, tally))
        finish(part, source, _engine_needs(config), MASTER_CONFIG)
        report = {
            "on_grid": tally.rounded == 0,
            "label": "rounded" if tally.rounded else "on-grid",
            "digest": values_digest(part),
            "tensors": tally.tensors,
            "quantised": tally.quantised,
            "rounded": tally.rounded,
            "sqnr_db": None if tally.sqnr_db is None else round(tally.sqnr_db, 3),
            "bytes": sum(path.stat().st_size for path in part.glob("*.safetensors")),
        }
        write_json(part / "conversion.json", report)
    return report


def _plan(source: Path, found: Mapping[str, Weight]) -> dict[str, tuple[str, tuple[int, ...]]]:
    plan: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, weight in found.items():
        shape, dtype = weight.data.shape, weight.data.dtype
        storage = storage_of(name, len(shape))
        if storage == "fp8":
            if dtype not in FLOATS:
                raise CheckpointError(f"a linear weight of type {dtype}", where=weight.data.where, fix=NEEDS_MASTER)
            plan[name] = "F8_E4M3", shape
            plan[name + "_scale_inv"] = "F8_E8M0", grid(shape[0], shape[1])
        elif len(shape) > 2 and ".experts." in name:
            raise CheckpointError(
                f"experts fused into one tensor of shape {list(shape)}: a master holds one matrix an expert",
                where=weight.data.where,
                fix="save the model under its published names (save_pretrained does)",
            )
        elif dtype in FLOATS:
            plan[name] = storage.upper(), shape
        else:
            plan[name] = dtype, shape
    if not any(dtype == "F8_E4M3" for dtype, _ in plan.values()):
        raise CheckpointError(
            "no linear weights under published names (model.layers.0.mlp.up_proj.weight, one matrix an expert)",
            where=source,
            fix="save the model with save_pretrained, or name another folder",
        )
    return plan


def _stream(found: Mapping[str, Weight], tally: Tally) -> Iterator[tuple[str, Tensor]]:
    for name, weight in found.items():
        tally.tensors += 1
        storage = storage_of(name, len(weight.data.shape))
        if storage == "fp8":
            tally.quantised += 1
            codes, scales = _quantise(weight, tally)
            yield name, codes
            yield name + "_scale_inv", scales
        elif weight.data.dtype in FLOATS:
            yield name, _keep(weight, torch.float32 if storage == "f32" else torch.bfloat16, tally)
        else:
            yield name, exact(weight)


def _quantise(weight: Weight, tally: Tally) -> tuple[Tensor, Tensor]:
    value = exact(weight).float()
    try:
        codes, scales = quantise(value)
    except FormatError as error:
        raise FormatError(error.what, where=weight.data.where, fix=error.fix) from None
    again = dequantise(codes, scales)
    tally.rounded += not _equal_bits(again, value)
    tally.signal += float(torch.linalg.vector_norm(value, dtype=torch.float64)) ** 2
    tally.noise += float(torch.linalg.vector_norm(again.sub_(value), dtype=torch.float64)) ** 2
    return codes, scales


def _keep(weight: Weight, dtype: torch.dtype, tally: Tally) -> Tensor:
    value = exact(weight)
    kept = value.to(dtype)
    if not bool(kept.isfinite().all()):
        raise FormatError("infinity or NaN, or too large for BF16", where=weight.data.where)
    tally.rounded += not _equal_bits(kept.float(), value.float())
    return kept


def _equal_bits(a: Tensor, b: Tensor) -> bool:
    """Equal as float32 bit patterns: zeros of different sign are different."""
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def _engine_needs(config: dict[str, Any]) -> dict[str, Any]:
    """Keys that Transformers leaves out of a saved DeepSeek-V3 config and serving engines need."""
    if config.get("model_type") == "deepseek_v3":
        return {**config, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    return config
