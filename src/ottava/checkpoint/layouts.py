"""The layouts of one model: ways of writing down the same values.

    master   128x128 FP8 blocks, F8_E8M0 `X.weight_scale_inv`          what Ottava keeps
    mxfp8    1x32 FP8 blocks, U8 `X.weight_scale`                      Blackwell, Ascend 950
    bf16     the exact values                                          chips without FP8

A 128x128 block already is four MXFP8 blocks in each of its rows: the codes stay as they are and the
scale byte is repeated. Nothing here rounds: a folder whose values have no form in the layout asked
for is refused. Rounding is the converter's task, which says that it did.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ottava.artifact import write_json
from ottava.checkpoint.names import storage_of
from ottava.checkpoint.safetensors import Entry, entries, load, write_folder
from ottava.errors import CheckpointError, OttavaError, from_os_error
from ottava.fp8.codec import dequantise, quantise
from ottava.fp8.spec import BIAS, BLOCK, EXACT, MX_BLOCK, grid

SCALES = {"_scale_inv": (BLOCK, BLOCK), "_scale": MX_BLOCK}
"""What is added to a weight's name to name its scales, and the block each of them covers."""

COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "LICENSE",
)  # fmt: skip
"""Files that go with the weights whatever their layout."""

MASTER_CONFIG = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "scale_fmt": "ue8m0",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}
NEEDS_MASTER = "quantise from the BF16/FP32 master"


@dataclass(frozen=True)
class Weight:
    """A published weight: its tensor and, for FP8, its scales and the block that each of them covers."""

    data: Entry
    scale: Entry | None = None
    block: tuple[int, int] = (BLOCK, BLOCK)


def weights(folder: Path) -> dict[str, Weight]:
    """The published weights of a model folder or file, sorted by name; scales belong to their weight.

    Raises CheckpointError where FP8 codes have no scales, scales have no codes, or shapes do not fit.
    """
    found = entries(folder)
    scales: dict[str, tuple[Entry, tuple[int, int]]] = {}
    for name, entry in found.items():
        for suffix, block in SCALES.items():
            if name.endswith(".weight" + suffix):
                owner = name.removesuffix(suffix)
                if owner not in found or found[owner].dtype != "F8_E4M3" or owner in scales:
                    raise CheckpointError("scales of no FP8 weight, or of one that has others", where=entry.where)
                scales[owner] = entry, block
    out: dict[str, Weight] = {}
    for name in sorted(set(found) - {entry.name for entry, _ in scales.values()}):
        entry = found[name]
        if name in scales:
            out[name] = Weight(entry, *scales[name])
            _check_shapes(out[name])
        elif entry.dtype.startswith("F8_"):
            raise CheckpointError(f"{entry.dtype} without scales", where=entry.where, fix=NEEDS_MASTER)
        else:
            out[name] = Weight(entry)
    return out


def exact(weight: Weight) -> Tensor:
    """A weight's exact values: BF16 for FP8 with its scales, else the tensor as it is stored.

    Raises CheckpointError where a code is NaN, or a scale is no power of two or lies outside the
    window in which every code is exact in BF16. Every scale is read; config.json is not believed.
    """
    if weight.scale is None:
        return load(weight.data)
    scales = scale_bytes(weight)
    codes = load(weight.data)
    if bool(((codes.view(torch.uint8) & 0x7F) == 0x7F).any()):
        raise CheckpointError("a code of this weight is NaN", where=weight.data.where, fix=NEEDS_MASTER)
    return dequantise(codes, scales, torch.bfloat16, block=weight.block)


def scale_bytes(weight: Weight) -> Tensor:
    """The E8M0 bytes (uint8) of an FP8 weight's scales, stored as F8_E8M0, U8, or F32 powers of two.

    Raises CheckpointError where a scale is no power of two from 2**-124 to 2**119.
    """
    assert weight.scale is not None
    scales = load(weight.scale)
    lowest, highest = (bound + BIAS for bound in EXACT["BF16"])
    if scales.dtype == torch.float32:
        bits = scales.view(torch.int32)
        good = (bits & 0x7FFFFF) == 0
        exponents = bits >> 23
    elif weight.scale.dtype in ("F8_E8M0", "U8"):
        exponents = scales.view(torch.uint8).int()
        good = torch.ones_like(exponents, dtype=torch.bool)
    else:
        raise CheckpointError(f"scales of type {weight.scale.dtype}", where=weight.scale.where, fix=NEEDS_MASTER)
    good &= (exponents >= lowest) & (exponents <= highest)
    if not bool(good.all()):
        worst = tuple((~good).nonzero()[0].tolist())
        value = float(scales[worst]) if scales.dtype == torch.float32 else f"byte {int(exponents[worst])}"
        raise CheckpointError(
            f"the scale of block {worst} is {value}, which is no power of two from 2**{lowest - BIAS} to "
            f"2**{highest - BIAS}: its weights are not exact in BF16",
            where=weight.scale.where,
            fix=NEEDS_MASTER,
        )
    return exponents.to(torch.uint8)


def to_master(source: Path, out: Path) -> None:
    """Write the master layout of a folder that lies on the grid. Codes in 128x128 blocks stay as they are."""
    _relayout(source, out, "master")


def to_mxfp8(source: Path, out: Path) -> None:
    """Write the MXFP8 layout: the master's codes, each scale byte repeated for its 1x32 blocks."""
    _relayout(source, out, "mxfp8")


def to_bf16(source: Path, out: Path) -> None:
    """Write the exact values in BF16 (F32 tensors that the master keeps in F32 stay so)."""
    _relayout(source, out, "bf16")


def read_config(folder: Path) -> dict[str, Any]:
    """A model folder's config.json. Raises CheckpointError where it is missing or no JSON mapping."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise CheckpointError(
            "a model folder needs a config.json that can be read", where=path, fix="name a Hugging Face model folder"
        )
    return config


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to fill that becomes `out` by a rename when the block ends, or vanishes when it fails."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError("the output folder is not empty", where=out, fix="delete it or name another")
    part = out.with_name(out.name + ".part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        os.replace(part, out)
    except OSError as error:
        raise from_os_error(error, f"writing {out.name}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def finish(part: Path, source: Path, config: dict[str, Any], quantisation: dict[str, Any] | None) -> None:
    """Put config.json (with `quantisation`) and the tokenizer, template and generation files beside the weights."""
    config = {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = "bfloat16"
    if quantisation is not None:
        config["quantization_config"] = quantisation
    write_json(part / "config.json", config)
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, part / name)


def mx_config(found: dict[str, Weight], quantised: set[str]) -> dict[str, Any]:
    """The quantization_config of the mxfp8 layout, as compressed-tensors writes it for its MXFP8 scheme."""
    group = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": MX_BLOCK[1], "symmetric": True}
    group |= {"scale_dtype": "torch.uint8"}
    plain = {n.removesuffix(".weight") for n, w in found.items() if n not in quantised and len(w.data.shape) == 2}
    return {
        "quant_method": "compressed-tensors",
        "format": "mxfp8-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**group, "dynamic": False},
                "input_activations": {**group, "dynamic": True},
            }
        },
        "ignore": sorted(plain | {"lm_head"}),
    }


def _relayout(source: Path, out: Path, layout: str) -> None:
    found, config = weights(source), read_config(source)
    quantised = {n for n, w in found.items() if w.scale is not None or storage_of(n, len(w.data.shape)) == "fp8"}
    plan: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, weight in found.items():
        shape = weight.data.shape
        if name not in quantised:
            plan[name] = weight.data.dtype, shape
        elif layout == "bf16":
            plan[name] = "BF16", shape
        else:
            suffix, dtype = ("_scale_inv", "F8_E8M0") if layout == "master" else ("_scale", "U8")
            plan[name] = "F8_E4M3", shape
            plan[name + suffix] = dtype, grid(shape[0], shape[1], SCALES[suffix])
    quantisation = {"master": MASTER_CONFIG, "mxfp8": mx_config(found, quantised), "bf16": None}[layout]
    with whole_folder(out) as part:
        stream = (pair for name, weight in found.items() for pair in _spell(name, weight, layout, name in quantised))
        write_folder(part, plan, stream)
        finish(part, source, config, quantisation)


def _spell(name: str, weight: Weight, layout: str, quantised: bool) -> Iterator[tuple[str, Tensor]]:
    """The tensors by which `layout` writes one weight."""
    if not quantised:
        yield name, exact(weight)
    elif layout == "bf16":
        value = exact(weight)
        _same(weight, value.float(), value.bfloat16().float())
        yield name, value.bfloat16()
    else:
        codes, scales = _master_form(weight)
        yield name, codes
        if layout == "master":
            yield name + "_scale_inv", scales
        else:
            rows, columns = codes.shape
            across = scales.repeat_interleave(BLOCK // MX_BLOCK[1], 1)[:, : grid(rows, columns, MX_BLOCK)[1]]
            yield name + "_scale", across.repeat_interleave(BLOCK, 0)[:rows]


def _master_form(weight: Weight) -> tuple[Tensor, Tensor]:
    if weight.scale is not None and weight.block == (BLOCK, BLOCK):
        return load(weight.data), scale_bytes(weight)
    value = exact(weight).float()
    try:
        codes, scales = quantise(value)
    except OttavaError as error:
        raise CheckpointError(error.what, where=weight.data.where, fix=error.fix) from None
    _same(weight, value, dequantise(codes, scales))
    return codes, scales


def _same(weight: Weight, value: Tensor, again: Tensor) -> None:
    if not torch.equal(value.view(torch.int32), again.view(torch.int32)):
        raise CheckpointError(
            "this weight does not lie on the grid", where=weight.data.where, fix="convert it: that rounds and says so"
        )


def _check_shapes(weight: Weight) -> None:
    assert weight.scale is not None
    shape = weight.data.shape
    if len(shape) != 2 or 0 in shape or weight.scale.shape != grid(shape[0], shape[1], weight.block):
        blocks = "x".join(map(str, weight.block))
        raise CheckpointError(
            f"scales of shape {list(weight.scale.shape)} do not fit {blocks} blocks of a weight of shape {list(shape)}",
            where=weight.scale.where,
            fix=NEEDS_MASTER,
        )
