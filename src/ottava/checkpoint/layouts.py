"""The layouts of one model: ways of writing down the same values.

    e8m0       128x128 FP8 blocks, F8_E8M0 `X.weight_scale_inv`       the master: what Ottava keeps
    deepseek   128x128 FP8 blocks, F32 `X.weight_scale_inv`           as DeepSeek-V3.1 is published
    mxfp8      1x32 FP8 blocks, U8 `X.weight_scale`                   Blackwell, Ascend 950
    bf16       the exact values                                       chips without FP8

A 128x128 block already is four MXFP8 blocks in each of its rows: the codes stay as they are and the
scale byte is repeated; the last of them has the columns that are left. Read are, besides these, FP8 with
scales of other values, FP8 in 32x32 blocks and packed FP4 with a scale for each 1x32, as DeepSeek publishes them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ottava.artifact import write_json
from ottava.checkpoint.names import COMPANIONS
from ottava.checkpoint.safetensors import Entry, check_regular, entries, load
from ottava.errors import CheckpointError, check_folder
from ottava.fp8 import fp4
from ottava.fp8.codec import dequantise
from ottava.fp8.spec import BIAS, BLOCK, EXACT, MX_BLOCK, grid

PACKED = ("I8", "U8")
"""Types under which DeepSeek-V4 and others store a pair of E2M1 codes."""

LAYOUTS = ("e8m0", "deepseek", "mxfp8", "bf16")

SMALL_BLOCK = (32, 32)
"""The blocks of DeepSeek-V4.1, told by the shape of the scales. They are read, not written."""

SCALES = {"_scale_inv": (BLOCK, BLOCK), "_scale": MX_BLOCK}
"""What is added to a weight's name to name its scales, and the block each of them covers."""

MASTER_CONFIG = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "scale_fmt": "ue8m0",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}
"""The quantization_config of e8m0 and deepseek: the keys that DeepSeek-V3.1 has."""

QUANTISED_KEYS = ("quantization_config", "compression_config", "expert_dtype")
"""What a configuration says of how its weights are stored. expert_dtype: DeepSeek-V4's FP4 experts."""

NEEDS_MASTER = "quantise from the BF16/FP32 master"
OR_AGAIN = f"{NEEDS_MASTER}, or round a second time with ottava convert --allow-lossy"


@dataclass(frozen=True)
class Weight:
    """A published weight: its tensor and, for FP8 and FP4, its scales and the block that each of them covers.

    packed: two E2M1 codes in a byte, so that the stored tensor has half the columns.
    """

    data: Entry
    scale: Entry | None = None
    block: tuple[int, int] = (BLOCK, BLOCK)
    packed: bool = False

    @property
    def name(self) -> str:
        """The canonical name: the one under which the values are published, whatever holds their scales."""
        return self.data.name

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the values."""
        shape = self.data.shape
        return (*shape[:-1], 2 * shape[-1]) if self.packed else shape


def weights(folder: Path) -> dict[str, Weight]:
    """The published weights of a model folder or file, sorted by name; scales belong to their weight.

    Raises CheckpointError, naming the weight, where FP8 codes have no scales, scales have no codes, or shapes do
    not fit.
    """
    found = entries(folder)
    scales: dict[str, Entry] = {}
    for name, entry in found.items():
        owner = _owner(name, found)
        if owner is None:
            continue
        if owner in scales or owner not in found or not _scaled(found[owner], name):
            what = "scales of no FP8 weight, or of one that has others"
            raise CheckpointError(what, where=entry.where, tensor=owner, cause="scales without codes")
        scales[owner] = entry
    out: dict[str, Weight] = {}
    for name in sorted(set(found) - {entry.name for entry in scales.values()}):
        entry = found[name]
        if name in scales:
            out[name] = _weight(entry, scales[name])
        elif entry.dtype.startswith("F8_"):
            what = f"{entry.dtype} without scales"
            raise CheckpointError(what, where=entry.where, fix=NEEDS_MASTER, tensor=name, cause="scales missing")
        else:
            out[name] = Weight(entry)
    return out


def _owner(name: str, found: Mapping[str, Entry]) -> str | None:
    """The weight whose scales `name` would hold, judged by its name; None where it holds none."""
    for suffix in SCALES:
        if name.endswith(".weight" + suffix):
            return name.removesuffix(suffix)
    owner = name.removesuffix("scale") + "weight"  # DeepSeek-V4; elsewhere a norm may have a `scale` of its own
    return owner if name.endswith(".scale") and owner in found and _scaled(found[owner], name) else None


def _scaled(entry: Entry, scales: str) -> bool:
    packed = entry.dtype in PACKED and len(entry.shape) == 2 and scales.endswith(".scale")
    return packed or entry.dtype == "F8_E4M3"


def _weight(data: Entry, scale: Entry) -> Weight:
    packed = data.dtype in PACKED
    block = MX_BLOCK if packed or scale.name.endswith("_scale") else (BLOCK, BLOCK)
    if len(data.shape) == 2 and block != MX_BLOCK and scale.shape != grid(*data.shape):
        block = SMALL_BLOCK if scale.shape == grid(*data.shape, SMALL_BLOCK) else block
    weight = Weight(data, scale, block, packed)
    if len(weight.shape) != 2 or 0 in weight.shape or scale.shape != grid(*weight.shape, block):
        raise CheckpointError(
            f"scales of shape {list(scale.shape)} do not fit {'x'.join(map(str, block))} blocks of a weight of shape "
            f"{list(weight.shape)}",
            where=scale.where,
            fix=NEEDS_MASTER,
            tensor=weight.name,
            cause="scales of the wrong shape",
        )
    if scale.dtype not in ("F8_E8M0", "U8", "F32", "BF16"):
        what = f"scales of type {scale.dtype}"
        raise CheckpointError(what, where=scale.where, fix=NEEDS_MASTER, tensor=weight.name, cause="scales of no type")
    return weight


def powers(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Scales as E8M0 bytes (uint8), and where they are what those bytes say: powers of two inside the BF16 window."""
    lowest, highest = (bound + BIAS for bound in EXACT["BF16"])
    if scales.dtype in (torch.float32, torch.bfloat16):
        bits = scales.float().view(torch.int32)
        exponents = bits >> 23
        good = ((bits & 0x7FFFFF) == 0) & (exponents >= lowest) & (exponents <= highest)
        return exponents.to(torch.uint8), good
    stored = scales.view(torch.uint8)
    return stored, (stored >= lowest) & (stored <= highest)


def scale_bytes(weight: Weight) -> Tensor:
    """The E8M0 bytes (uint8) of an FP8 weight's scales, stored as F8_E8M0, U8, or F32 powers of two.

    Raises CheckpointError where a scale is no power of two from 2**-124 to 2**119.
    """
    assert weight.scale is not None
    scales = load(weight.scale)
    exponents, good = powers(scales)
    if not bool(good.all()):
        raise not_exact(weight, scales, good)
    return exponents


def not_exact(weight: Weight, scales: Tensor, good: Tensor, first_row: int = 0) -> CheckpointError:
    """The error that points at the first scale that is no power of two inside the BF16 window."""
    assert weight.scale is not None
    row, column = (~good).nonzero()[0].tolist()
    value = scales[row, column]
    shown = float(value) if scales.dtype in (torch.float32, torch.bfloat16) else f"byte {int(value.view(torch.uint8))}"
    lowest, highest = EXACT["BF16"]
    return CheckpointError(
        f"the scale of block {(first_row + row, column)} is {shown}, which is no power of two from 2**{lowest} to "
        f"2**{highest}: its weights are not exact in BF16",
        where=weight.scale.where,
        fix=OR_AGAIN,
        tensor=weight.name,
        cause="scales that are no powers of two",
    )


def exact(weight: Weight) -> Tensor:
    """A weight's exact values: BF16 for FP8 and FP4 with their scales, else the tensor as it is stored.

    Raises CheckpointError where a code is NaN, or a scale is no power of two or lies outside the
    window in which every code is exact in BF16. Every scale is read; config.json is not believed.
    """
    if weight.scale is None:
        return load(weight.data)
    scales = scale_bytes(weight)
    codes = load(weight.data)
    if weight.packed:
        return fp4.dequantise(codes.view(torch.uint8), scales, torch.bfloat16)
    if has_nan(codes):
        raise nan_code(weight)
    return dequantise(codes, **in_known_blocks(scales, weight.block, len(codes)), dtype=torch.bfloat16)


def in_known_blocks(scales: Tensor, block: tuple[int, int], rows: int) -> dict[str, Any]:
    """Scales and block of `rows` rows as `dequantise` takes them: 32x32 blocks are written as 1x32."""
    if block == SMALL_BLOCK:
        return {"scales": scales.repeat_interleave(block[0], 0)[:rows], "block": MX_BLOCK}
    return {"scales": scales, "block": block}


def has_nan(codes: Tensor) -> bool:
    """Whether E4M3 codes hold a NaN: 0x7F or 0xFF."""
    return bool(((codes.view(torch.uint8).numpy() & 0x7F) == 0x7F).any())


def nan_code(weight: Weight) -> CheckpointError:
    """The error of a NaN among a weight's codes."""
    what = "a code of this weight is NaN"
    return CheckpointError(what, where=weight.data.where, fix=NEEDS_MASTER, tensor=weight.name, cause="a NaN code")


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A model folder's config.json. Raises CheckpointError where it is missing, no regular file or no JSON mapping."""
    check_folder(folder)
    path = folder / name
    try:
        check_regular(path)
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        what, where = f"a model folder needs a {name} that can be read", path
        if not os.path.lexists(path) and not any(folder.glob("*.safetensors")):
            what, where = f"there is no model in this folder: neither {name} nor safetensors", folder
        raise CheckpointError(what, where=where, fix="name a Hugging Face model folder")
    return config


def finish(part: Path, source: Path, config: dict[str, Any], quantisation: dict[str, Any] | None) -> None:
    """Put config.json (with `quantisation`) and the tokenizer, template and generation files beside the weights."""
    config = {key: value for key, value in config.items() if key not in QUANTISED_KEYS}
    if config.get("model_type") == "deepseek_v3":  # Transformers leaves them out, serving engines need them
        config = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"} | config
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = "bfloat16"
    if quantisation is not None:
        config["quantization_config"] = quantisation
    write_json(part / "config.json", config)
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, part / name)


def tensors_of(layout: str, name: str, shape: tuple[int, int]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors (type, shape) by which a layout writes one quantised weight: its codes or values, its scales."""
    if layout == "bf16":
        return {name: ("BF16", shape)}
    suffix, dtype = {"e8m0": ("_scale_inv", "F8_E8M0"), "deepseek": ("_scale_inv", "F32"), "mxfp8": ("_scale", "U8")}[
        layout
    ]
    return {name: ("F8_E4M3", shape), name + suffix: (dtype, grid(*shape, SCALES[suffix]))}


def repeated(scales: Tensor, rows: int, columns: int) -> Tensor:
    """The bytes of 128x128 blocks, once for each of their 1x32 blocks."""
    across = scales.repeat_interleave(BLOCK // MX_BLOCK[1], 1)[:, : grid(rows, columns, MX_BLOCK)[1]]
    return across.repeat_interleave(BLOCK, 0)[:rows]


def collapsed(scales: Tensor, block: tuple[int, int], rows: int, columns: int) -> Tensor | None:
    """The bytes of 128x128 blocks from those of smaller ones; None where a block has more than one."""
    if block == (BLOCK, BLOCK):
        return scales
    found = scales[:: BLOCK // block[0], :: BLOCK // block[1]].contiguous()
    again = found.repeat_interleave(BLOCK // block[0], 0).repeat_interleave(BLOCK // block[1], 1)
    return found if torch.equal(again[: scales.shape[0], : scales.shape[1]], scales) else None


def quantisation_of(layout: str, found: Mapping[str, Weight], quantised: set[str]) -> dict[str, Any] | None:
    """The quantization_config of a layout."""
    if layout == "mxfp8":
        return mx_config(found, quantised)
    return None if layout == "bf16" else MASTER_CONFIG


def mx_config(found: Mapping[str, Weight], quantised: set[str]) -> dict[str, Any]:
    """The quantization_config of the mxfp8 layout, as compressed-tensors writes it for its MXFP8 scheme."""
    group = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": MX_BLOCK[1], "symmetric": True}
    group |= {"scale_dtype": "torch.uint8"}
    plain = {n.removesuffix(".weight") for n, w in found.items() if n not in quantised and len(w.shape) == 2}
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
