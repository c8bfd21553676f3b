"""Faults in codes."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

from tests.attacks.folders import Array, Coded, Model, Stored, Written
from tests.attacks.plant import (
    EMBED,
    OUT,
    K,
    Q,
    add,
    codes,
    put,
    read_as,
    stored,
    values,
    weight,
)


def _type(dtype: object) -> Callable[[Array], Array]:
    return lambda c: c.view(dtype).astype(np.float64)  # type: ignore[arg-type]


add(
    "codes as e5m2",
    "llama",
    K,
    ("codes read as e5m2", "NaN or infinity introduced"),
    read_as(K, _type(ml_dtypes.float8_e5m2)),
)


def _without_negative_zero(model: Model) -> Model:
    sound = weight(model, K)
    return put(model, **{K: Coded(np.where(sound.codes == 0x80, 0, sound.codes).astype(np.uint8), sound.factors)})


add(
    "codes as e4m3fnuz",
    "llama",
    K,
    ("codes read as e4m3fnuz", "scale bias off by one"),
    read_as(K, _type(ml_dtypes.float8_e4m3fnuz)),
    source=_without_negative_zero,
)
add(
    "codes as e4m3fnuz, with NaN",
    "llama",
    K,
    "codes read as e4m3fnuz",
    read_as(K, _type(ml_dtypes.float8_e4m3fnuz)),
    layouts=("bf16",),
)
add("codes as int8", "llama", K, "codes read as int8", read_as(K, _type(np.int8), rounds=True), sure=True)
add(
    "nibbles",
    "llama",
    Q,
    "nibbles swapped",
    codes(Q, lambda c: c << 4 | c >> 4),
    source=lambda m: put(
        m,
        **{
            Q: Coded(
                np.where((weight(m, Q).codes & 0xF7) == 0xF7, 1, weight(m, Q).codes).astype(np.uint8),
                weight(m, Q).factors,
            )
        },
    ),
)
add(
    "16-bit words of codes",
    "llama",
    Q,
    "byte order swapped",
    codes(Q, lambda c: c.reshape(-1, 2)[:, ::-1].reshape(c.shape)),
)
add(
    "32-bit words of codes",
    "llama",
    OUT,
    "byte order swapped",
    codes(OUT, lambda c: c.reshape(-1, 4)[:, ::-1].reshape(c.shape)),
)


def _big_endian(out: Written, layout: str) -> None:
    out.stored[EMBED] = Stored("BF16", out.stored[EMBED].data.byteswap())


add("big-endian embeddings", "llama", EMBED, ("byte order swapped", "NaN or infinity introduced"), stored(_big_endian))
add(
    "halves of each row",
    "llama",
    Q,
    "shards in the wrong order",
    codes(Q, lambda c: np.concatenate([c[:, 96:], c[:, :96]], 1)),
)
add("absolute values", "llama", Q, "sign lost", codes(Q, lambda c: c & 0x7F))
add(
    "-0",
    "llama",
    Q,
    ("-0 lost", "flipped bit"),
    codes(Q, lambda c: np.where(c == 0x80, 0, c).astype(np.uint8)),
    source=lambda m: put(
        m,
        **{
            Q: Coded(np.where(weight(m, Q).codes == 3, 0x80, weight(m, Q).codes).astype(np.uint8), weight(m, Q).factors)
        },
    ),
)
add(
    "E4M3 subnormals flushed",
    "llama",
    Q,
    "subnormals flushed to zero",
    codes(Q, lambda c: np.where((c & 0x7F) < 8, c & 0x80, c).astype(np.uint8)),
)
add(
    "saturated at 240",
    "llama",
    Q,
    "saturated",
    values(Q, lambda v: v) and codes(Q, lambda c: np.where((c & 0x7F) > 0x77, c & 0x80 | 0x77, c).astype(np.uint8)),
)
add(
    "448 became NaN",
    "llama",
    Q,
    "NaN or infinity introduced",
    codes(Q, lambda c: np.where((c & 0x7F) == 0x7E, c | 0x7F, c).astype(np.uint8)),
)
add(
    "quantised without a scale",
    "llama",
    Q,
    "quantised without a scale",
    values(Q, lambda v: v.clip(-448, 448).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(float)),
    sure=True,
)
