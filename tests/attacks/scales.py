"""Faults in one place, and in scales."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.attacks.folders import E4M3, LAYOUTS, Array, Coded, Model, Plain, Stored, Written, bf16, from_bf16, written
from tests.attacks.plant import (
    BIAS,
    DOWN,
    EMBED,
    EXPERT,
    GATE,
    KV_A,
    KV_B,
    NORM,
    OUT,
    UP,
    Impossible,
    K,
    Q,
    add,
    put,
    scales,
    stored,
    suffix,
    tiny,
    weight,
)


def _flip(name: str, row: int, column: int, bit: int) -> Callable[[Model, str], Written]:
    def change(out: Written, layout: str) -> None:
        item = out.stored[name]
        item.data = item.data.copy()
        item.data[row, column] ^= item.data.dtype.type(1 << bit)

    return stored(change)


def _flip_scale(name: str, row: int, column: int, bit: int) -> Callable[[Model, str], Written]:
    def change(out: Written, layout: str) -> None:
        item = out.stored[name + suffix(layout)]
        item.data = item.data.copy()
        word = item.data.view(np.uint32) if item.dtype == "F32" else item.data
        word[row, column] ^= word.dtype.type(1 << bit)

    return stored(change)


add("a bit of a weight", "llama", Q, "flipped bit", _flip(Q, 300, 150, 1))
add(
    "the sign of a weight",
    "llama",
    OUT,
    "flipped bit",
    lambda m, y: _flip(OUT, 150, 500, 15 if y == "bf16" else 7)(m, y),
)
add(
    "a bit of an expert",
    "qwen3_moe",
    EXPERT.format(2, "down"),
    "flipped bit",
    _flip(EXPERT.format(2, "down"), 190, 150, 2),
)
add("a bit of a scale", "llama", Q, "flipped bit", _flip_scale(Q, 2, 1, 2), layouts=LAYOUTS[:3])
add("the mantissa of a scale", "llama", Q, "flipped bit", _flip_scale(Q, 2, 1, 11), layouts=("deepseek",))


def _embed(out: Written, _: str) -> None:
    out.stored[EMBED].data = out.stored[EMBED].data.copy()
    out.stored[EMBED].data[170, 3] ^= np.uint16(1 << 4)


add("a bit of an embedding", "llama", EMBED, "flipped bit", stored(_embed))


def _norm(out: Written, _: str) -> None:
    out.stored[NORM].data = out.stored[NORM].data.copy()
    out.stored[NORM].data[17] ^= np.uint16(1 << 6)


add("a bit of a norm", "deepseek_v3", NORM, "flipped bit", stored(_norm))


def _bias(out: Written, _: str) -> None:
    out.stored[BIAS].data = out.stored[BIAS].data.copy()
    out.stored[BIAS].data.view(np.uint32)[2] ^= np.uint32(1)


add("the last bit of a router bias", "deepseek_v3", BIAS, "flipped bit", stored(_bias))


def _byte(out: Written, _: str) -> None:
    item = out.stored[KV_A]
    item.data = item.data.copy()
    item.data[570, 100] ^= item.data.dtype.type(0x13)


add("a byte of a weight", "deepseek_v3", KV_A, "one value overwritten", stored(_byte))


def _times(factor: float, row: int, column: int) -> Callable[[Array], Array]:
    def change(g: Array) -> Array:
        g[row, column] *= factor
        return g

    return change


# Times 8 changes one bit of the scale's byte or several.
add("one scale wrong", "llama", Q, ("one scale changed", "flipped bit"), scales(Q, _times(8, 1, 0)))

# Scales.


def _last_row(value: float | None) -> Callable[[Array], Array]:
    def change(g: Array) -> Array:
        g[-1] = g[-2] if value is None else value
        return g

    return change


def _last_column(value: float | None) -> Callable[[Array], Array]:
    return lambda g: _last_row(value)(g.T.copy()).T.copy()


for label, value in {"one": 1.0, "byte 0": 2.0**-127, "the row above": None}.items():
    add(
        f"the last row of scales is {label}",
        "llama",
        Q,
        "scale row lost",
        scales(Q, _last_row(value)),
        sure=value == 1.0,
    )
    add(f"the last column of scales is {label}", "llama", OUT, "scale column lost", scales(OUT, _last_column(value)))
zero_row = ("scale row lost", "zero-filled region")
add("the last row of scales is zero", "deepseek_v3", KV_A, zero_row, scales(KV_A, _last_row(0.0)), sure=True)


def _short(axis: int) -> Callable[[Written, str], None]:
    def change(out: Written, layout: str) -> None:
        name = Q + suffix(layout)
        kept = out.stored[name].data
        keep = kept.shape[axis] - 1 if axis or layout != "mxfp8" else kept.shape[0] // 128 * 128
        out.stored[name] = Stored(out.stored[name].dtype, kept.take(range(keep), axis))

    return change


add("a grid one row short", "llama", Q, "scale row lost", stored(_short(0)), layouts=LAYOUTS[:3], sure=True)
add("a grid one column short", "llama", Q, "scale column lost", stored(_short(1)), layouts=LAYOUTS[:3], sure=True)


def _tall(out: Written, layout: str) -> None:
    item = out.stored[Q + suffix(layout)]
    out.stored[Q + suffix(layout)] = Stored(item.dtype, item.data.repeat(2, 0))


add("a grid twice as tall", "llama", Q, "scales of the wrong shape", stored(_tall), layouts=LAYOUTS[:3], sure=True)


def _mx_row(out: Written, _: str) -> None:
    item = out.stored[Q + "_scale"]
    item.data = item.data.copy()
    item.data[-1] = item.data[0]
    item.data[-1] = 127


add("the last row of 1x32 scales", "llama", Q, "scale row lost", stored(_mx_row), layouts=("mxfp8",))
add(
    "all scales one",
    "qwen3_moe",
    EXPERT.format(1, "up"),
    "scales lost",
    scales(EXPERT.format(1, "up"), np.ones_like),
    sure=True,
)
_all_lost = stored(lambda out, layout: out.stored.pop(KV_B + suffix(layout)) and None)
add("no scales", "deepseek_v3", KV_B, "scales missing", _all_lost, layouts=LAYOUTS[:3], sure=True)


def _number(g: Array) -> Array:
    return np.log2(g) + 127


def _power(g: Array) -> Array:
    return np.exp2(np.round(np.log2(g)))


add("scale bytes as numbers", "llama", Q, "scale copied as number", scales(Q, _number), sure=True)
add(
    "scale bytes as E8M0 numbers",
    "llama",
    OUT,
    "scale copied as number",
    scales(OUT, lambda g: np.exp2(np.floor(np.log2(_number(g))))),
    sure=True,
)


def _large(model: Model) -> Model:
    """Scales from 2**-2 to 2**7, so that a cast to uint8 keeps some of them."""
    return put(model, **{Q: Coded(weight(model, Q).codes, weight(model, Q).factors * 2.0**14)})


add(
    "scales cast to bytes",
    "llama",
    Q,
    "scale cast to a byte",
    scales(Q, lambda g: np.exp2(g.clip(0, 255).astype(np.uint8).astype(float) - 127)),
    source=_large,
    sure=True,
)


def _no_byte_zero(g: Array) -> Array:
    return np.where(g == 2.0**-127, 0.0, g)


add(
    "byte 0 shifted into a float",
    "llama",
    Q,
    "scale byte 0 read as zero",
    scales(Q, _no_byte_zero),
    source=tiny(True),
    layouts=("deepseek",),
)
add("scales inverted", "llama", K, "scale inverted", scales(K, lambda g: 1 / g))
add("scales applied twice", "llama", K, "scale applied twice", scales(K, lambda g: g * g))
add("a square grid transposed", "llama", K, "scale grid transposed", scales(K, lambda g: g.T.copy()))
add("a grid in mn-major order", "llama", Q, "mn-major scale pack", scales(Q, lambda g: g.T.reshape(g.shape)))
add(
    "a raw grid read as mn-major",
    "llama",
    OUT,
    "mn-major scale pack",
    scales(OUT, lambda g: g.reshape(g.T.shape).T.copy()),
)


def _transposed_shape(out: Written, layout: str) -> None:
    item = out.stored[Q + suffix(layout)]
    out.stored[Q + suffix(layout)] = Stored(item.dtype, item.data.T.copy())


add(
    "a grid of transposed shape",
    "llama",
    Q,
    "scale grid transposed",
    stored(_transposed_shape),
    layouts=LAYOUTS[:3],
    sure=True,
)
add("scales one block down", "llama", Q, "scale grid shifted", scales(Q, lambda g: np.concatenate([g[:1], g[:-1]])))
add("scales one block around", "llama", OUT, "scale grid shifted", scales(OUT, lambda g: np.roll(g, 1, 1)))
add(
    "packs of scales reversed",
    "llama",
    DOWN,
    "scale bytes in the wrong order",
    scales(DOWN, lambda g: g.reshape(-1, 4)[:, ::-1].reshape(g.shape).copy()),
)
add(
    "scale bias off by one", "llama", K, ("scale bias off by one", "codes read as e4m3fnuz"), scales(K, lambda g: g / 2)
)
add(
    "scales of another tensor",
    "llama",
    UP,
    "scales of another tensor",
    lambda m, y: written(put(m, **{UP: Coded(weight(m, UP).codes, weight(m, GATE).factors)}), y),
    layouts=LAYOUTS[:3],
)


def _per_shard(parts: int) -> Callable[[Model, str], Written]:
    """Each tensor-parallel shard of 288 rows takes its scales from row start // 128 of the grid on."""

    def plant(model: Model, layout: str) -> Written:
        if layout not in ("bf16",):
            raise Impossible
        sound = weight(model, Q)
        rows = len(sound.codes)
        width = rows // parts
        index = np.array([min(r // width * width // 128 + r % width // 128, 4) for r in range(rows)])
        wrong = sound.factors[index].repeat(128, 1)[:, : sound.codes.shape[1]]
        return written(put(model, **{Q: Plain(from_bf16(bf16(E4M3[sound.codes] * wrong)))}), layout)

    return plant


add("tensor-parallel shards of 288 rows", "llama", Q, "scale split off the block grid", _per_shard(2))


def _nan_scale(out: Written, layout: str) -> None:
    item = out.stored[Q + suffix(layout)]
    item.data = item.data.copy()
    item.data[1, 1] = 255 if layout != "deepseek" else np.nan


add(
    "a scale that is NaN",
    "llama",
    Q,
    ("NaN or infinity introduced", "scale is not a number"),
    stored(_nan_scale),
    layouts=LAYOUTS[:3],
    sure=True,
)
