"""The exactness theorem over all 254 finite codes x 255 scales = 64,770 products, by oracles that share no code.

`torch` casts from float64, `ml_dtypes` with NumPy does the same from bytes of its own types, `rational` never rounds
at all: it asks whether a number lies among a type's values by their definition. Hardware that flushes is asked as well.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from ottava.fp8 import spec
from ottava.fp8.codec import dequantise

CODES = np.array([code for code in range(256) if code & 0x7F != 0x7F], dtype=np.uint8)
BYTES = np.arange(255, dtype=np.uint8)


class Type(NamedTuple):
    """A binary floating-point type: bits of significand, exponents of the smallest and the largest normal number."""

    torch: torch.dtype
    numpy: Any
    precision: int
    least: int
    most: int


TYPES = {
    "BF16": Type(torch.bfloat16, ml_dtypes.bfloat16, 8, -126, 127),
    "F16": Type(torch.float16, np.float16, 11, -14, 15),
    "F32": Type(torch.float32, np.float32, 24, -126, 127),
}
NAMES = list(TYPES)


def products() -> np.ndarray:
    """[255, 254] in float64, where every product is exact: codes and scales as ml_dtypes reads their bytes."""
    codes = CODES.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return BYTES.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)[:, None] * codes[None, :]


def products_by_torch() -> np.ndarray:
    codes = torch.from_numpy(CODES).view(torch.float8_e4m3fn).double()
    scales = torch.from_numpy(BYTES).view(torch.float8_e8m0fnu).double()
    return (scales[:, None] * codes[None, :]).numpy()


def by_torch(dtype: str) -> np.ndarray:
    values = torch.from_numpy(products_by_torch())
    return (values.to(TYPES[dtype].torch).double() == values).numpy()


def by_numpy(dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        return products().astype(TYPES[dtype].numpy).astype(np.float64) == products()


def by_definition(dtype: str, *, flushed: bool = False) -> np.ndarray:
    """code = odd * 2**e: it is in the type where its bits lie between the lowest that counts and the highest."""
    kind = TYPES[dtype]
    out = np.zeros((255, 254), dtype=bool)
    for column, code in enumerate(CODES.tolist()):
        exponent, fraction = code >> 3 & 15, code & 7
        significand, power = (8 + fraction, exponent - 10) if exponent else (fraction, -9)
        if not significand:
            out[:, column] = True
            continue
        while significand % 2 == 0:
            significand, power = significand // 2, power + 1
        width = significand.bit_length()
        for row in range(255):
            lowest = power + row - 127
            highest = lowest + width - 1
            fits = width <= kind.precision and highest <= kind.most and lowest >= kind.least - kind.precision + 1
            out[row, column] = fits and not (flushed and highest < kind.least)
    return out


def window(good: np.ndarray) -> tuple[int, int]:
    """The lowest and the highest k for which every code is good; between them none may be missing."""
    ks = good.all(1).nonzero()[0] - 127
    assert len(ks) == ks[-1] - ks[0] + 1
    return int(ks[0]), int(ks[-1])


def test_both_libraries_read_every_byte_as_defined() -> None:
    assert products().size == 64_770
    np.testing.assert_array_equal(products(), products_by_torch())
    for row, column in ((0, 1), (127, 126), (254, 253), (10, 7), (246, 130)):
        code, scale = int(CODES[column]), Fraction(2) ** (row - 127)
        exponent, fraction = code >> 3 & 15, code & 7
        size = Fraction(8 + fraction, 8) * Fraction(2) ** (exponent - 7) if exponent else Fraction(fraction, 512)
        assert Fraction(products()[row, column]) == (-size if code & 0x80 else size) * scale
    for oracle in (np.uint8(255).view(ml_dtypes.float8_e8m0fnu), torch.tensor(255, dtype=torch.uint8)):
        scale = oracle.view(torch.float8_e8m0fnu).float() if isinstance(oracle, Tensor) else np.float32(oracle)
        assert bool(scale != scale), "byte 255 is NaN"


@pytest.mark.parametrize("dtype", NAMES)
def test_all_pairs_by_three_oracles(dtype: str) -> None:
    """Not only the windows: each of the 64,770 products is judged alike, and the windows follow."""
    np.testing.assert_array_equal(by_torch(dtype), by_numpy(dtype))
    np.testing.assert_array_equal(by_torch(dtype), by_definition(dtype))
    assert window(by_torch(dtype)) == spec.EXACT[dtype]


@pytest.mark.parametrize("dtype", NAMES)
def test_all_pairs_where_subnormals_are_flushed(dtype: str) -> None:
    smallest = torch.finfo(TYPES[dtype].torch).smallest_normal
    assert smallest == ml_dtypes.finfo(TYPES[dtype].numpy).smallest_normal == 2.0 ** TYPES[dtype].least
    kept = by_numpy(dtype) & ((products() == 0) | (abs(products()) >= smallest))
    np.testing.assert_array_equal(kept, by_definition(dtype, flushed=True))
    assert window(kept) == spec.EXACT_FLUSHED[dtype]


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_a_processor_that_flushes_agrees(dtype: str) -> None:
    """The processor itself, told to flush: what arithmetic in float32 leaves of each value, BF16's among them."""
    low, high = spec.EXACT_FLUSHED[dtype]
    reach = by_definition(dtype) & ~by_definition(dtype, flushed=True)
    values = torch.from_numpy(products()).to(TYPES[dtype].torch)
    nonzero = (products() != 0) & by_definition(dtype)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot be told to flush")
    try:
        left = values.float() * torch.ones(254)
    finally:
        torch.set_flush_denormal(False)
    lost = (left == 0).numpy() & nonzero
    np.testing.assert_array_equal(lost, reach)
    assert not lost[low + 127 : high + 128].any()
    assert lost[low + 126].any()


@pytest.mark.parametrize("dtype", NAMES)
def test_outside_the_window_some_code_is_lost_and_inside_none(dtype: str) -> None:
    """The window is a statement about all codes; which codes survive below it is a matter of their lowest bit."""
    low, high = spec.EXACT[dtype]
    good = by_numpy(dtype)
    assert good[low + 127 : high + 128].all()
    assert low == -127 or not good[low + 126].all()
    assert not good[high + 128].all()
    assert good.any(1).all(), "zero is exact at every scale"


def replicated(scales: Tensor, rows: int, columns: int) -> Tensor:
    """The MXFP8 scales of a UE8M0-FP8 matrix, element by element as the specification's formula says."""
    out = torch.empty(rows, -(-columns // 32), dtype=torch.uint8)
    for i in range(rows):
        for j in range(out.shape[1]):
            out[i, j] = scales[i // 128, 32 * j // 128]
    return out


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 127, 128, 129, 160, 191, 256, 260])
@pytest.mark.parametrize("rows", [1, 128, 130])
def test_mxfp8_is_the_same_codes_with_the_scale_repeated(rows: int, columns: int) -> None:
    """Bit for bit, with a last group of any width: 1x32 groups never straddle a 128x128 block."""
    torch.manual_seed(rows * 1000 + columns)
    codes = torch.from_numpy(CODES)[torch.randint(0, 254, (rows, columns))].view(torch.float8_e4m3fn)
    scales = torch.randint(3, 247, spec.grid(rows, columns), dtype=torch.uint8)
    mx = replicated(scales, rows, columns)
    assert tuple(mx.shape) == spec.grid(rows, columns, spec.MX_BLOCK)
    for dtype, as_bits in ((torch.bfloat16, torch.int16), (torch.float32, torch.int32)):
        ours = dequantise(codes, scales, dtype)
        assert torch.equal(dequantise(codes, mx, dtype, block=spec.MX_BLOCK).view(as_bits), ours.view(as_bits))
    wide = codes.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    powers = mx.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float64).repeat(32, 1)[:, :columns]
    np.testing.assert_array_equal(ours.double().numpy(), wide * powers)


def test_every_pair_survives_as_mxfp8() -> None:
    """All codes at every scale that is exact in BF16, as a block of 128 columns and as four groups of 32."""
    low, high = spec.EXACT["BF16"]
    row = torch.from_numpy(CODES).repeat(2)[:384].view(1, 384).view(torch.float8_e4m3fn)
    for byte in range(low + 127, high + 128):
        block, groups = (torch.full((1, n), byte, dtype=torch.uint8) for n in (3, 12))
        ours = dequantise(row, block, torch.bfloat16).view(torch.int16)
        assert torch.equal(dequantise(row, groups, torch.bfloat16, block=spec.MX_BLOCK).view(torch.int16), ours)
        np.testing.assert_array_equal(ours.view(torch.bfloat16).double().numpy()[0, :254], products()[byte])
