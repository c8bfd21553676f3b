"""Small model folders in every layout, written by hand, and their exact values, read by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]

LAYOUTS = ("e8m0", "deepseek", "mxfp8", "bf16")
KINDS: dict[str, Any] = {
    "F8_E4M3": np.uint8, "F8_E8M0": np.uint8, "F8_E5M2": np.uint8, "U8": np.uint8, "I8": np.int8, "BF16": np.uint16,
    "F16": np.float16, "F32": np.float32, "F64": np.float64, "I64": np.int64,
}  # fmt: skip
E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)


@dataclass
class Stored:
    """A tensor as a file holds it: BF16 as uint16 patterns, 8-bit floats as uint8."""

    dtype: str
    data: Array


@dataclass
class Coded:
    """A linear weight of the master: codes uint8 [M, N], factors float64, one for each block of 128x128."""

    codes: Array
    factors: Array

    @property
    def values(self) -> Array:
        return E4M3[self.codes] * self.spread(128, 128)

    def spread(self, height: int, width: int) -> Array:
        rows, columns = self.codes.shape
        return self.factors.repeat(height, 0)[:rows].repeat(width, 1)[:, :columns]


@dataclass
class Plain:
    """Any other tensor: float64 values that BF16 (or F32) holds."""

    values: Array
    dtype: str = "BF16"


Model = dict[str, Coded | Plain]


@dataclass
class Written:
    """What a folder is written from: its stored tensors, and which file each stands in."""

    stored: dict[str, Stored]
    shards: int = 1
    extra: dict[str, Any] = field(default_factory=dict)


LINEAR = {
    "llama": {
        "self_attn.q_proj": (576, 192), "self_attn.k_proj": (192, 192), "self_attn.v_proj": (192, 192),
        "self_attn.o_proj": (192, 576), "mlp.gate_proj": (320, 192), "mlp.up_proj": (320, 192),
        "mlp.down_proj": (192, 448),
    },
    "qwen3_moe": {
        "self_attn.q_proj": (160, 192), "self_attn.k_proj": (160, 192), "self_attn.o_proj": (192, 160),
        **{f"mlp.experts.{i}.{p}_proj": (160, 192) for i in range(3) for p in ("gate", "up")},
        **{f"mlp.experts.{i}.down_proj": (192, 160) for i in range(3)},
    },
    "deepseek_v3": {
        "self_attn.q_a_proj": (160, 192), "self_attn.kv_a_proj_with_mqa": (576, 192), "self_attn.kv_b_proj": (320, 160),
        "self_attn.o_proj": (192, 160), "mlp.shared_experts.up_proj": (160, 192),
        **{f"mlp.experts.{i}.{p}_proj": (160, 192) for i in range(2) for p in ("gate", "up")},
    },
}  # fmt: skip


def bf16(values: Array) -> Array:
    """BF16 patterns (uint16) of the nearest values, through float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)


def from_bf16(patterns: Array) -> Array:
    return patterns.view(ml_dtypes.bfloat16).astype(np.float64)


def coded(rng: np.random.Generator, rows: int, columns: int) -> Coded:
    """A weight on the grid; every block has a scale of its own and, as the 464 rule leaves it, a code above 232."""
    blocks = -(-rows // 128), -(-columns // 128)
    with np.errstate(invalid="ignore"):
        codes = (rng.normal(size=(rows, columns)) * 60).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    for i in range(blocks[0]):
        for j in range(blocks[1]):
            codes[i * 128 + 3, j * 128 + 5] = 0x7D if (i + j) % 2 else 0xFE  # 416 and -448
    codes[0, 0], codes[0, 1], codes[1, 0] = 0x03, 0x85, 0x00  # subnormal codes, and a zero
    codes[1, 1] = 0x80  # -0
    exponents = rng.permutation(blocks[0] * blocks[1]).reshape(blocks) - 16
    return Coded(codes, np.exp2(exponents.astype(np.float64)))


def model(kind: str, seed: int = 0) -> Model:
    """A model on the grid with the names of an architecture, two layers, and ragged shapes."""
    rng = np.random.default_rng([seed, *kind.encode()])
    out: Model = {}

    def plain(name: str, *shape: int, dtype: str = "BF16") -> None:
        values = rng.normal(size=shape)
        out[name] = Plain(
            from_bf16(bf16(values)) if dtype == "BF16" else values.astype(np.float32).astype(float), dtype
        )

    plain("model.embed_tokens.weight", 200, 192)
    plain("lm_head.weight", 200, 192)
    plain("model.norm.weight", 192)
    for layer in range(2):
        base = f"model.layers.{layer}."
        plain(base + "input_layernorm.weight", 192)
        for name, shape in LINEAR[kind].items():
            out[f"{base}{name}.weight"] = coded(rng, *shape)
        if kind != "llama":
            plain(base + "mlp.gate.weight", 4, 192)
        if kind == "deepseek_v3":
            plain(base + "mlp.gate.e_score_correction_bias", 4, dtype="F32")
    return out


def e8m0(factors: Array) -> Array:
    """Scale bytes; ValueError where a factor is no power of two that a byte can stand for."""
    if bool((factors <= 0).any()) or not np.isfinite(factors).all():
        raise ValueError("no byte")
    mantissa, exponent = np.frexp(factors)
    byte = exponent - 1 + 127
    if bool((mantissa != 0.5).any()) or byte.min() < 0 or byte.max() > 254:
        raise ValueError("no byte")
    return byte.astype(np.uint8)


def spell(name: str, weight: Coded | Plain, layout: str) -> dict[str, Stored]:
    """One weight as a layout stores it; ValueError where the layout cannot hold it."""
    if isinstance(weight, Plain):
        return {name: Stored(weight.dtype, bf16(weight.values) if weight.dtype == "BF16" else cast(weight))}
    if layout == "bf16":
        return {name: Stored("BF16", bf16(weight.values))}
    codes = {name: Stored("F8_E4M3", weight.codes)}
    if layout == "deepseek":
        return codes | {name + "_scale_inv": Stored("F32", weight.factors.astype(np.float32))}
    scales = e8m0(weight.factors)
    if layout == "e8m0":
        return codes | {name + "_scale_inv": Stored("F8_E8M0", scales)}
    rows, columns = weight.codes.shape
    return codes | {name + "_scale": Stored("U8", scales.repeat(128, 0)[:rows].repeat(4, 1)[:, : -(-columns // 32)])}


def cast(weight: Plain) -> Array:
    return weight.values.astype(KINDS[weight.dtype])


def written(weights: Model, layout: str, shards: int = 1) -> Written:
    stored = {name: item for key, weight in weights.items() for name, item in spell(key, weight, layout).items()}
    return Written(stored, shards)


def file_bytes(stored: Mapping[str, Stored], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    reached, parts = 0, []
    for name, item in stored.items():
        data = np.ascontiguousarray(item.data).astype(KINDS[item.dtype], copy=False).tobytes()
        shape = list(item.data.shape)
        header[name] = {"dtype": item.dtype, "shape": shape, "data_offsets": [reached, reached + len(data)]}
        reached += len(data)
        parts.append(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(parts)


def shard_of(name: str, shards: int) -> int:
    """Layers go to files of their own, scales with their weights."""
    if shards == 1:
        return 0
    return 1 + int(name.split(".")[2]) % (shards - 1) if name.startswith("model.layers.") else 0


def save(folder: Path, what: Written, *, stem: str = "model", metadata: Mapping[str, str] | None = None) -> Path:
    """Write a folder: one file, or shards and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    if what.shards == 1:
        (folder / "model.safetensors").write_bytes(file_bytes(what.stored, metadata))
        return folder
    weight_map = {}
    for number in range(what.shards):
        file = f"{stem}-{number + 1:05d}-of-{what.shards:05d}.safetensors"
        mine = {name: item for name, item in what.stored.items() if shard_of(name, what.shards) == number}
        (folder / file).write_bytes(file_bytes(mine, metadata))
        weight_map |= dict.fromkeys(mine, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def dense(stored: Mapping[str, Stored]) -> dict[str, Array]:
    """The exact values of every weight, float64, by name."""
    out = {}
    for name, item in stored.items():
        if name.endswith(("_scale_inv", "_scale")):
            continue
        scale = next((stored[name + suffix] for suffix in ("_scale_inv", "_scale") if name + suffix in stored), None)
        if scale is None:
            out[name] = from_bf16(item.data) if item.dtype == "BF16" else item.data.astype(np.float64)
            continue
        if scale.dtype == "F32":
            factors = scale.data.astype(np.float64)
        else:
            factors = np.array([math.ldexp(1, b - 127) if b < 255 else math.nan for b in range(256)])[scale.data]
        tall, wide = (1, 32) if scale.dtype == "U8" else (128, 128)
        rows, columns = item.data.shape
        with np.errstate(invalid="ignore"):
            out[name] = E4M3[item.data] * factors.repeat(tall, 0)[:rows].repeat(wide, 1)[:, :columns]
    return out


def first_difference(a: Mapping[str, Array], b: Mapping[str, Array]) -> tuple[str, list[int] | None] | None:
    """The first weight by name that differs, and its first 128x128 block that does, in bits (every NaN is one)."""
    for name in sorted(a.keys() | b.keys()):
        if name not in a or name not in b or a[name].shape != b[name].shape:
            return name, None
        x, y = (np.where(np.isnan(v), np.nan, v).view(np.uint64) for v in (a[name], b[name]))
        places = np.argwhere(x != y)
        if len(places):
            return name, None if a[name].ndim < 2 else list(min(map(tuple, (places // 128).tolist())))
    return None
