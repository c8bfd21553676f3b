"""Faults of rounding."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

from tests.attacks.folders import E4M3, Array, Coded, Model, Plain, Stored, Written, bf16, from_bf16, written
from tests.attacks.plant import (
    BIAS,
    DOWN,
    EMBED,
    Q,
    add,
    put,
    quantise,
    requantised,
    stored,
    tiny,
    values,
    weight,
)

add(
    "floor",
    "llama",
    Q,
    "re-quantised by floor",
    requantised(Q, "floor"),
    source=lambda m: put(m, **{Q: _lower(weight(m, Q))}),
)
add("groups of 32", "llama", Q, "re-quantised in groups of 32", requantised(Q, "floor", 32), sure=True)
add(
    "F32 scales",
    "llama",
    Q,
    "re-quantised through F32 scales",
    requantised(Q, "f32"),
    layouts=("deepseek", "bf16"),
    sure=True,
)
add("a scale rounded late", "llama", Q, "scale rounded after quantising", requantised(Q, "late"), sure=True)
add(
    "the clamp",
    "llama",
    Q,
    "re-quantised with amax clamped to 1e-4",
    requantised(Q, "clamp"),
    source=tiny(False),
    sure=True,
)


def _lower(sound: Coded) -> Coded:
    """A grid whose largest codes are 240, which the floor rule saturates."""
    return Coded(
        np.where((sound.codes & 0x7F) > 0x77, sound.codes & 0x80 | 0x77, sound.codes).astype(np.uint8), sound.factors
    )


def _off_grid(model: Model) -> Model:
    rng = np.random.default_rng(3)
    return put(model, **{Q: Plain(from_bf16(bf16(rng.normal(size=(576, 192)) * np.exp(rng.normal(size=(576, 1))))))})


add("the 464 rule", "llama", Q, "rounded onto the grid", requantised(Q, "464"), source=_off_grid, sure=True)
add("ceil-448", "llama", Q, "re-quantised by ceil-448", requantised(Q, "ceil"), source=_off_grid, sure=True)
add(
    "floor, from the original",
    "llama",
    Q,
    "re-quantised by floor",
    requantised(Q, "floor"),
    source=_off_grid,
    sure=True,
)
add(
    "F32 scales, from the original",
    "llama",
    Q,
    "re-quantised through F32 scales",
    requantised(Q, "f32"),
    source=_off_grid,
    layouts=("deepseek", "bf16"),
    sure=True,
)


def _half(v: Array) -> Array:
    with np.errstate(over="ignore"):
        return v.astype(np.float16).astype(float)


def _wide(model: Model) -> Model:
    sound = weight(model, Q)
    return put(model, **{Q: Coded(sound.codes, sound.factors * np.exp2(np.linspace(-6, 22, 10).round().reshape(5, 2)))})


add(
    "cast to FP16",
    "llama",
    Q,
    ("cast to FP16", "subnormals flushed to zero", "NaN or infinity introduced"),
    values(Q, _half),
    source=_wide,
    sure=True,
)


def _as_half(v: Array) -> Array:
    return v.astype(np.float32).astype(ml_dtypes.bfloat16).view(np.float16).astype(float)


add(
    "BF16 bytes as FP16",
    "llama",
    EMBED,
    ("bytes reinterpreted as another type", "NaN or infinity introduced"),
    lambda m, y: written(put(m, **{EMBED: Plain(from_bf16(bf16(_as_half(m[EMBED].values))))}), y),
)
add(
    "FP16 bytes as BF16",
    "llama",
    EMBED,
    "bytes reinterpreted as another type",
    lambda m, y: written(put(m, **{EMBED: Plain(from_bf16(m[EMBED].values.astype(np.float16).view(np.uint16)))}), y),
)


def _bias_as(dtype: str, cut: bool) -> Callable[[Written, str], None]:
    def change(out: Written, _: str) -> None:
        sound = out.stored[BIAS].data
        patterns = (sound.view(np.uint32) >> 16).astype(np.uint16) if cut else bf16(sound)
        out.stored[BIAS] = Stored(dtype, patterns if dtype == "BF16" else from_bf16(patterns).astype(np.float32))

    return change


add("a bias rounded to BF16", "deepseek_v3", BIAS, "rounded to BF16", stored(_bias_as("BF16", False)), sure=True)
add("a bias truncated to BF16", "deepseek_v3", BIAS, "truncated to BF16", stored(_bias_as("F32", True)), sure=True)


# One source, rounded in two ways: every linear weight differs by a step here and there, and nothing else does.


def _originals(model: Model) -> dict[str, Array]:
    """The linear weights before they were rounded, as BF16 has them."""
    rng = np.random.default_rng(17)
    shapes = {name: found.values.shape for name, found in model.items() if name.endswith("_proj.weight")}
    return {name: from_bf16(bf16(rng.normal(size=shape) / 50)) for name, shape in shapes.items()}


def _unrounded(model: Model) -> Model:
    return {**model, **{name: Plain(values) for name, values in _originals(model).items()}}


def _to_nearest(model: Model) -> Model:
    return {**model, **{name: Coded(*quantise(values, "464")) for name, values in _originals(model).items()}}


def _otherwise(rounding: Callable[[Array], Array]) -> Callable[[Model, str], Written]:
    """rounding: values in units of their scales -> values of codes."""

    def plant(model: Model, layout: str) -> Written:
        out = dict(model)
        for name, original in _originals(model).items():
            near = Coded(*quantise(original, "464"))
            out[name] = Coded(_codes(rounding(original / near.spread(128, 128))), near.factors)
        return written(out, layout)

    return plant


def _codes(values: Array) -> Array:
    return values.clip(-448, 448).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def _fed_forward(values: Array) -> Array:
    """GPTQ in small: each column takes part of the error that was made in the one before it."""
    out, error = np.zeros_like(values), np.zeros(len(values))
    for column in range(values.shape[1]):
        wanted = values[:, column] + 0.4 * error
        out[:, column] = E4M3[_codes(wanted)]
        error = wanted - out[:, column]
    return out


def _toward_zero(values: Array) -> Array:
    codes = _codes(np.abs(values))
    return np.copysign(E4M3[np.where(E4M3[codes] > np.abs(values), codes - 1, codes)], values)


FED, CUT = _otherwise(_fed_forward), _otherwise(_toward_zero)
add("errors fed forward", "llama", DOWN, "rounded otherwise", FED, source=_to_nearest)
add("rounded toward zero", "llama", DOWN, "rounded otherwise", CUT, source=_to_nearest)
add("errors fed forward, from the original", "llama", DOWN, "rounded otherwise", FED, source=_unrounded)
