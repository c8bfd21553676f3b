"""FP4 against two oracles (rational numbers written here, and ml_dtypes), and which of its blocks are FP8 blocks."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ottava.errors import FormatError
from ottava.fp8 import codec, spec
from ottava.fp8.fp4 import dequantise, fits_fp8

TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
HALF = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}


def fp4_value(code: int) -> Fraction:
    """One bit of sign, two of exponent (bias 1), one of fraction; exponent 0 is subnormal."""
    exponent, fraction = code >> 1 & 3, code & 1
    size = Fraction(2 + fraction, 2) * 2 ** (exponent - 1) if exponent else Fraction(fraction, 2)
    return -size if code & 8 else size


E4M3 = {  # all finite magnitudes, from the definition
    Fraction(8 + f, 8) * Fraction(2) ** (e - 7) if e else Fraction(f, 512)
    for e, f in product(range(16), range(8))
    if (e, f) != (15, 7)
}


def pack(codes: Tensor) -> Tensor:
    """Element 2j into the lower four bits of byte j, as DeepSeek-V4 does."""
    return codes[:, 0::2] | codes[:, 1::2] << 4


def power(k: int) -> Fraction:
    return Fraction(2) ** k


def test_codes_mean_what_both_oracles_say() -> None:
    numpy = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    assert [Fraction(x) for x in numpy] == [fp4_value(code) for code in range(16)]
    assert [Fraction(x) for x in spec.E2M1] == [fp4_value(code) for code in range(8)]
    codes = torch.arange(16, dtype=torch.uint8).reshape(1, 16)
    ours = dequantise(pack(codes), torch.full((1, 1), 127, dtype=torch.uint8))
    assert ours.view(torch.int32).tolist() == torch.from_numpy(numpy).float().view(1, 16).view(torch.int32).tolist()


@pytest.mark.parametrize("dtype", list(TYPES))
def test_windows_over_all_codes_and_scales(dtype: str) -> None:
    """16 codes x 255 scales, exact or not by each oracle; dequantise gives what is exact and refuses the rest."""
    codes = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    scales = np.arange(255, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    products = scales[:, None] * codes[None, :]
    with np.errstate(over="ignore"):
        numpy = products.astype(HALF[dtype]).astype(np.float64) == products
    exact = torch.from_numpy(products)
    assert torch.equal(torch.from_numpy(numpy), exact.to(TYPES[dtype]).double() == exact)
    good = numpy.all(1).nonzero()[0] - 127
    assert (good[0], good[-1], len(good)) == (*spec.EXACT_FP4[dtype], good[-1] - good[0] + 1)
    smallest = torch.finfo(TYPES[dtype]).smallest_normal
    kept = (numpy & ((products == 0) | (abs(products) >= smallest))).all(1).nonzero()[0] - 127
    assert (kept[0], kept[-1], len(kept)) == (*spec.EXACT_FP4_FLUSHED[dtype], kept[-1] - kept[0] + 1)

    packed = pack(torch.arange(16, dtype=torch.uint8).reshape(1, 16))
    for byte in range(256):
        scale = torch.full((1, 1), byte, dtype=torch.uint8)
        if good[0] <= byte - 127 <= good[-1]:
            for given_scale, given_bytes in (
                (scale, packed),
                (scale.view(torch.float8_e8m0fnu), packed.view(torch.int8)),
            ):
                got = dequantise(given_bytes, given_scale, TYPES[dtype])
                assert torch.equal(got.double()[0], exact[byte])
                assert torch.equal(torch.signbit(got)[0], torch.arange(16) >= 8)
        else:
            with pytest.raises(FormatError, match="NaN" if byte == 255 else "exact from"):
                dequantise(packed, scale, TYPES[dtype])


@pytest.mark.parametrize("shape", [(1, 2), (3, 32), (5, 70), (130, 200)])
def test_every_element_has_its_own_place_and_scale(shape: tuple[int, int]) -> None:
    torch.manual_seed(sum(shape))
    codes = torch.randint(0, 16, shape, dtype=torch.uint8)
    scales = torch.randint(0, 253, spec.grid(*shape, spec.MX_BLOCK), dtype=torch.uint8)
    values = dequantise(pack(codes), scales)
    assert values.shape == shape
    for i, j in product(range(0, shape[0], 7), range(shape[1])):
        assert Fraction(values[i, j].item()) == fp4_value(int(codes[i, j])) * power(int(scales[i, j // 32]) - 127)


def test_shapes_that_do_not_fit_are_refused() -> None:
    packed, scales = torch.zeros(4, 32, dtype=torch.uint8), torch.full((4, 2), 127, dtype=torch.uint8)
    assert dequantise(packed, scales).shape == (4, 64)
    for bad in (scales[:3], scales[:, :1], scales.reshape(2, 4), scales.flatten()):
        for function in (dequantise, fits_fp8):
            with pytest.raises(FormatError, match="scales of shape"):
                function(packed, bad)
    for bad in (packed.flatten(), packed.float(), packed[:0]):
        with pytest.raises(FormatError, match="no matrix of packed FP4"):
            dequantise(bad, scales)


# One scale for a whole block.


def one_scale(values: set[Fraction]) -> set[int]:
    """By exhaustion: every k for which every magnitude is an E4M3 code times 2**k, k among a master's scales."""
    return {
        k for k in range(spec.BYTE_MIN - 127, spec.BYTE_MAX - 126) if all(v / power(k) in E4M3 for v in values if v)
    }


def block_of(magnitudes: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """A 128x128 block whose group i holds code c_i and is scaled by byte b_i; all other groups are zeros at 2**-127."""
    codes = torch.zeros(128, 128, dtype=torch.uint8)
    scales = torch.zeros(128, 4, dtype=torch.uint8)
    for number, (code, byte) in enumerate(magnitudes):
        row, group = 17 * number % 128, number % 4
        codes[row, 32 * group + 5 + number % 8] = code | (number % 2) << 3
        scales[row, group] = byte
    return pack(codes), scales


def assert_fits_as_enumerated(packed: Tensor, scales: Tensor, values: set[Fraction]) -> None:
    possible = one_scale(values)
    assert fits_fp8(packed, scales).tolist() == [[bool(possible)]]
    value = dequantise(packed, scales) if int(scales.max()) <= 252 else None
    if value is not None:
        codes, found = codec.quantise(value)
        again = codec.dequantise(codes, found)
        assert torch.equal(again.view(torch.int32), value.view(torch.int32)) == bool(possible)
        assert not possible or all(v == 0 for v in values) or int(found) - 127 == min(possible)


def test_every_pair_of_codes_at_every_distance_of_scales() -> None:
    """Two values decide: 7 x 7 nonzero codes, scales up to 24 apart, in the middle of the range and at both ends."""
    for low, high, distance in product(range(1, 8), range(1, 8), (0, 5, *range(11, 20), 24)):
        edges = (0, 1, 7, 8, 9, 226, 254 - distance) if (low, high) in {(1, 7), (4, 5)} else ()
        for base in (100, *edges):
            values = {fp4_value(low) * power(base - 127), fp4_value(high) * power(base + distance - 127)}
            packed, scales = block_of([(low, base), (high, base + distance)])
            assert_fits_as_enumerated(packed, scales, values)


def test_the_span_that_always_fits() -> None:
    """All seven magnitudes at both ends of a span: it fits up to FP4_SPAN and not beyond."""
    for span in range(20):
        everything = [(code, 100 + end) for code in range(1, 8) for end in (0, span)]
        packed, scales = block_of(everything)
        assert_fits_as_enumerated(packed, scales, {fp4_value(c) * power(b - 127) for c, b in everything})
        assert bool(fits_fp8(packed, scales)) == (span <= spec.FP4_SPAN)


@settings(max_examples=150)
@given(
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 22)), min_size=1, max_size=12), st.sampled_from([3, 100, 225])
)
def test_random_blocks_fit_as_enumerated(groups: list[tuple[int, int]], base: int) -> None:
    groups = [(code, base + offset) for code, offset in groups]
    packed, scales = block_of(groups)
    assert_fits_as_enumerated(packed, scales, {fp4_value(c) * power(b - 127) for c, b in groups})


def test_a_zero_group_counts_for_nothing() -> None:
    packed, scales = block_of([(7, 200), (1, 190)])
    assert int(scales.min()) == 0
    assert bool(fits_fp8(packed, scales))
    assert bool(fits_fp8(torch.full_like(packed, 0x80), scales)), "-0 is a zero"


@pytest.mark.parametrize("shape", [(1, 2), (129, 130), (300, 450)])
def test_blocks_of_ragged_matrices_are_judged_one_by_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(3)
    codes = torch.randint(0, 16, shape, dtype=torch.uint8)
    scales = torch.randint(90, 126, spec.grid(*shape, spec.MX_BLOCK), dtype=torch.uint8)
    scales[:128, :4] = 120
    values = dequantise(pack(codes), scales)
    exact = codec.dequantise(*codec.quantise(values)) == values
    fits = fits_fp8(pack(codes), scales)
    assert fits.shape == spec.grid(*shape)
    for i, j in product(range(fits.shape[0]), range(fits.shape[1])):
        block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
        assert bool(fits[i, j]) == bool(exact[block].all())
    assert bool(fits[0, 0])
    assert fits.numel() == 1 or not bool(fits.all())
