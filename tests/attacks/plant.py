"""How a fault is planted: in the master and spelled in a layout, or in the stored tensors themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from tests.attacks.folders import (
    E4M3,
    LAYOUTS,
    Array,
    Coded,
    Model,
    Plain,
    Stored,
    Written,
    bf16,
    from_bf16,
    written,
)

Q = "model.layers.0.self_attn.q_proj.weight"  # 576 x 192: five rows of blocks, the last half empty
K = "model.layers.0.self_attn.k_proj.weight"  # 192 x 192 in llama: a square grid
V = "model.layers.0.self_attn.v_proj.weight"
OUT = "model.layers.1.self_attn.o_proj.weight"  # 192 x 576
GATE, UP = "model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"  # 192 x 448: four columns of blocks
KV_A = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"  # 576 x 192 in deepseek_v3
KV_B = "model.layers.0.self_attn.kv_b_proj.weight"
EXPERT = "model.layers.0.mlp.experts.{}.{}_proj.weight"
NORM, EMBED, HEAD = "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


class Impossible(ValueError):
    """A layout cannot hold this fault."""


@dataclass
class Fault:
    """One kind of fault, planted in one tensor of one model.

    plant: the sound model and a layout -> what is written; raises ValueError where the layout cannot hold it.
    causes: what may be named; damage: what is done to the folder afterwards; sure: the faulty side must be named;
    source: makes the sound model from the standard one.
    """

    name: str
    model: str
    tensor: str
    causes: tuple[str, ...]
    plant: Callable[[Model, str], Written]
    layouts: tuple[str, ...] = LAYOUTS
    damage: Callable[[Path], None] | None = None
    sure: bool = False
    source: Callable[[Model], Model] = lambda model: model
    shards: int = 1


FAULTS: list[Fault] = []


def add(
    name: str,
    model: str,
    tensor: str,
    cause: str | tuple[str, ...],
    plant: Callable[[Model, str], Written],
    **more: object,
) -> None:
    FAULTS.append(Fault(name, model, tensor, (cause,) if isinstance(cause, str) else cause, plant, **more))  # type: ignore[arg-type]


def put(model: Model, **changed: Coded | Plain) -> Model:
    return {**model, **changed}


def weight(model: Model, name: str) -> Coded:
    found = model[name]
    assert isinstance(found, Coded)
    return found


def scales(name: str, change: Callable[[Array], Array]) -> Callable[[Model, str], Written]:
    """A fault that leaves the codes and changes the grid of scales."""

    def plant(model: Model, layout: str) -> Written:
        sound = weight(model, name)
        return written(put(model, **{name: Coded(sound.codes, change(sound.factors.copy()))}), layout)

    return plant


def codes(name: str, change: Callable[[Array], Array]) -> Callable[[Model, str], Written]:
    """A fault that leaves the scales and changes the codes."""

    def plant(model: Model, layout: str) -> Written:
        sound = weight(model, name)
        changed = np.ascontiguousarray(change(sound.codes.copy())).view(np.uint8)
        return written(put(model, **{name: Coded(changed, sound.factors)}), layout)

    return plant


def values(name: str, change: Callable[[Array], Array], *, rounds: bool = False) -> Callable[[Model, str], Written]:
    """A fault in multiplied-out values; in FP8 layouts it exists where they lie on the grid (or `rounds` again)."""

    def plant(model: Model, layout: str) -> Written:
        return written(put(model, **{name: on_grid(change(model[name].values.copy()), layout, rounds)}), layout)

    return plant


def read_as(name: str, decode: Callable[[Array], Array], *, rounds: bool = False) -> Callable[[Model, str], Written]:
    """Codes that a loader decoded as another type, and wrote down again."""

    def plant(model: Model, layout: str) -> Written:
        sound = weight(model, name)
        changed = decode(sound.codes) * sound.spread(128, 128)
        return written(put(model, **{name: on_grid(changed, layout, rounds)}), layout)

    return plant


def on_grid(changed: Array, layout: str, rounds: bool = False) -> Coded | Plain:
    """Values as a layout holds them."""
    if layout == "bf16":
        return Plain(from_bf16(bf16(changed)))
    if not np.isfinite(changed).all():
        raise Impossible
    out = Coded(*quantise(changed, "464"))
    if not rounds and not np.array_equal(out.values.view(np.uint64), changed.view(np.uint64)):
        raise Impossible
    return out


def quantise(v: Array, rule: str, tall: int = 128, wide: int = 128) -> tuple[Array, Array]:
    """Codes and factors by a rule, block by block, in plain loops."""
    rows, columns = v.shape
    out = np.zeros(v.shape, np.uint8)
    factors = np.ones((-(-rows // tall), -(-columns // wide)))
    for i in range(factors.shape[0]):
        for j in range(factors.shape[1]):
            place = slice(i * tall, (i + 1) * tall), slice(j * wide, (j + 1) * wide)
            amax = float(np.abs(v[place]).max())
            if rule == "clamp":
                amax = max(amax, 1e-4)
            if amax == 0:
                continue
            used = kept = {
                "464": 2.0 ** np.ceil(np.log2(amax / 464)),
                "floor": 2.0 ** (np.floor(np.log2(amax)) - 8),
            }.get(rule, 2.0 ** np.ceil(np.log2(amax / 448)))
            if rule in ("f32", "late"):
                used = kept = float(np.float32(amax) / np.float32(448))
                if rule == "late":
                    kept = 2.0 ** np.ceil(np.log2(used))
            scaled = (v[place].astype(np.float32) / np.float32(used)).clip(-448, 448)
            out[place] = scaled.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
            factors[i, j] = kept
    return out, factors


def requantised(name: str, rule: str, wide: int = 128) -> Callable[[Model, str], Written]:
    def plant(model: Model, layout: str) -> Written:
        if wide == 128:
            changed = Coded(*quantise(model[name].values, rule))
            return written(put(model, **{name: changed}), layout)
        found, factors = quantise(model[name].values, rule, 1, wide)
        out = written(model, layout)
        if layout == "bf16":
            exact = E4M3[found] * factors.repeat(wide, 1)[:, : found.shape[1]]
            out.stored[name] = Stored("BF16", bf16(exact))
        elif layout == "mxfp8":
            out.stored[name] = Stored("F8_E4M3", found)
            out.stored[name + "_scale"] = Stored("U8", (np.log2(factors) + 127).astype(np.uint8))
        else:
            raise Impossible
        return out

    return plant


def stored(change: Callable[[Written, str], None], shards: int = 1) -> Callable[[Model, str], Written]:
    """A fault in the stored tensors themselves."""

    def plant(model: Model, layout: str) -> Written:
        out = written(model, layout, shards)
        change(out, layout)
        return out

    return plant


def swap(*pairs: tuple[str, str], copy: bool = False) -> Callable[[Model, str], Written]:
    """Tensors under each other's names; copy: the first of each pair is overwritten by the second."""

    def plant(model: Model, layout: str) -> Written:
        out = dict(model)
        for one, other in pairs:
            out[one] = model[other]
            if not copy:
                out[other] = model[one]
        return written(out, layout)

    return plant


def sound(model: Model, layout: str) -> Written:
    return written(model, layout)


def suffix(layout: str) -> str:
    if layout == "bf16":
        raise Impossible
    return "_scale" if layout == "mxfp8" else "_scale_inv"


def tiny(byte_zero: bool) -> Callable[[Model], Model]:
    """A sound model of which two blocks have tiny scales, or the smallest."""

    def source(model: Model) -> Model:
        sound = weight(model, Q)
        factors = sound.factors.copy()
        factors[1:3, 1] = 2.0 ** (-127 if byte_zero else -30)
        return put(model, **{Q: Coded(sound.codes, factors)})

    return source


def gone(*names: str) -> Callable[[Model, str], Written]:
    return lambda model, layout: written({n: w for n, w in model.items() if n not in names}, layout)
