"""The format against independent oracles: the exactness theorem enumerated, the rule written twice, the fixpoint."""

from __future__ import annotations

import bisect
import math
from fractions import Fraction
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ottava.errors import FormatError
from ottava.fp8 import spec
from ottava.fp8.codec import dequantise, project, quantise

F8 = torch.float8_e4m3fn
CODES = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)  # all finite codes
TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.int32 if t.dtype == torch.float32 else torch.int16)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


# A second implementation of the format: rational numbers, one element at a time, nothing shared with the first.


def value_of(code: int) -> Fraction:
    exponent, fraction = (code >> 3) & 15, code & 7
    size = Fraction(8 + fraction, 8) * Fraction(2) ** (exponent - 7) if exponent else Fraction(fraction, 8 * 64)
    return -size if code & 0x80 else size


MAGNITUDES = [value_of(code) for code in range(0x7F)]
LIMITS = [464 * Fraction(2) ** k for k in range(-117, 120)]


def nearest_code(x: Fraction, negative: bool) -> int:
    if x >= MAGNITUDES[-1]:
        code = 0x7E
    else:
        above = bisect.bisect_right(MAGNITUDES, x)
        low, high = x - MAGNITUDES[above - 1], MAGNITUDES[above] - x
        code = above - 1 if low < high or (low == high and above % 2 == 1) else above
    return code | (0x80 if negative else 0)


def slow_quantise_block(values: list[float]) -> tuple[list[int], int]:
    amax = max(abs(Fraction(v)) for v in values)
    k = min(bisect.bisect_left(LIMITS, amax) - 117, 119)  # the smallest k with amax <= 464 * 2**k
    codes = [nearest_code(abs(Fraction(v)) / Fraction(2) ** k, math.copysign(1, v) < 0) for v in values]
    return codes, (127 if all(code & 0x7F == 0 for code in codes) else k + 127)


def slow_quantise(w: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = w.shape
    codes = torch.zeros(rows, columns, dtype=torch.uint8)
    scales = torch.zeros(-(-rows // 128), -(-columns // 128), dtype=torch.uint8)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = w[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
            found, scales[i, j] = slow_quantise_block(part.double().flatten().tolist())
            codes[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128] = torch.tensor(found).reshape(part.shape)
    return codes, scales


def assert_as_slow(w: Tensor) -> None:
    codes, scales = quantise(w)
    slow_codes, slow_scales = slow_quantise(w)
    assert torch.equal(scales, slow_scales)
    assert torch.equal(codes.view(torch.uint8), slow_codes)


# The exactness theorem: 254 finite codes x 255 scales = 64,770 products, each exact in float64.


def products() -> Tensor:
    scales = torch.tensor([2.0**k for k in range(-127, 128)], dtype=torch.float64)
    out = CODES.view(F8).double()[None, :] * scales[:, None]
    assert out.shape == (255, 254)
    return out


def exact_in(dtype: str) -> Tensor:
    return products().to(TYPES[dtype]).double() == products()


def exact_in_numpy(dtype: str) -> Tensor:
    """The same question asked of ml_dtypes and NumPy, from bytes and powers made without torch."""
    codes = np.frombuffer(bytes(CODES.tolist()), dtype=ml_dtypes.float8_e4m3fn).astype(np.float64)
    values = codes[None, :] * np.ldexp(1.0, np.arange(-127, 128))[:, None]
    target = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}[dtype]
    with np.errstate(over="ignore"):
        return torch.from_numpy(values.astype(target).astype(np.float64) == values)


def window(good: Tensor) -> tuple[int, int]:
    """Lowest and highest k for which every code is good; they must be contiguous."""
    ks = (good.all(1).nonzero().flatten() - 127).tolist()
    assert ks == list(range(ks[0], ks[-1] + 1))
    return ks[0], ks[-1]


def test_codes_mean_what_the_formula_says() -> None:
    values = torch.tensor([float(value_of(code)) for code in CODES.tolist()], dtype=torch.float64)
    assert torch.equal(values, CODES.view(F8).double())
    numpy = np.frombuffer(bytes(CODES.tolist()), dtype=ml_dtypes.float8_e4m3fn).astype(np.float64)
    assert values.tolist() == numpy.tolist()
    assert max(MAGNITUDES) == spec.CODE_MAX


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_theorem_over_all_64770_pairs(dtype: str) -> None:
    good = exact_in(dtype)
    assert good.numel() == 64_770
    assert torch.equal(good, exact_in_numpy(dtype))
    assert window(good) == spec.EXACT[dtype]


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_theorem_where_subnormals_are_flushed(dtype: str) -> None:
    smallest = {"BF16": 2.0**-126, "F16": 2.0**-14, "F32": 2.0**-126}[dtype]
    kept = (products() == 0) | (products().abs() >= smallest)
    assert window(exact_in(dtype) & kept) == spec.EXACT_FLUSHED[dtype]


def test_bytes_of_a_master_are_exact_and_normal_in_bf16() -> None:
    assert spec.EXACT_FLUSHED["BF16"] == (spec.BYTE_MIN - 127, spec.BYTE_MAX - 127)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_dequantise_gives_every_exact_product_and_refuses_the_rest(dtype: str) -> None:
    low, high = spec.EXACT[dtype]
    for k in range(-127, 129):
        scale = torch.full((254, 1, 1), k + 127, dtype=torch.uint8)
        codes = CODES.view(F8).reshape(254, 1, 1)
        if low <= k <= high:
            expected = products()[k + 127].to(TYPES[dtype])
            assert same_bits(dequantise(codes, scale, TYPES[dtype]).flatten(), expected)
            assert same_bits(dequantise(codes, scale.view(torch.float8_e8m0fnu), TYPES[dtype]).flatten(), expected)
        else:
            with pytest.raises(FormatError, match="values are exact from"):
                dequantise(codes, scale, TYPES[dtype])


# The rule.


def test_every_bf16_maximum_gets_the_scale_of_the_rule() -> None:
    amax = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16)  # 0 and all positive finite values
    _, scales = quantise(amax.reshape(-1, 1, 1))
    expected = [slow_quantise_block([value])[1] for value in amax.double().tolist()]
    assert scales.flatten().tolist() == expected
    assert [spec.scale_byte(value) for value in amax.double().tolist()] == expected
    assert {min(expected), max(expected)} == {spec.BYTE_MIN, spec.BYTE_MAX}


@given(st.floats(min_value=0, width=32, allow_infinity=False))
def test_every_float32_maximum_gets_the_scale_of_the_rule(amax: float) -> None:
    _, scales = quantise(torch.tensor([[amax]]))
    assert scales.item() == spec.scale_byte(amax) == slow_quantise_block([amax])[1]


def test_maxima_next_to_464() -> None:
    for k in (-120, -117, -20, 0, 7, 118, 119):
        edge = torch.tensor(464.0 * 2.0**k)
        for amax in (edge.nextafter(torch.tensor(0.0)), edge, edge.nextafter(torch.tensor(torch.inf))):
            assert_as_slow(amax.reshape(1, 1))


def test_every_bf16_value_rounds_to_the_nearest_code() -> None:
    values = torch.arange(0x43E1, dtype=torch.int16).view(torch.bfloat16).float()  # 0 to 448
    assert values[-1] == 448
    for start in range(0, len(values), 100 * 128):
        part = values[start : start + 100 * 128]
        block = torch.full((128, 128), 448.0)  # which makes the block's scale 1
        block.view(-1)[: len(part)] = part
        assert_as_slow(block)
        assert_as_slow(-block)


def test_ties_and_their_neighbours() -> None:
    between = torch.tensor([float(a + b) / 2 for a, b in pairwise(MAGNITUDES)])
    near = [between, between.nextafter(torch.tensor(0.0)), between.nextafter(torch.tensor(1e9))]
    block = torch.cat([torch.stack(near), torch.full((3, 1), 448.0)], 1)  # the 448 makes the scale 1
    assert_as_slow(block)
    assert_as_slow(-block)


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=200)
@given(st.lists(floats, min_size=1, max_size=12), st.integers(-140, 120))
def test_quantise_is_the_rule_written_in_fractions(values: list[float], shift: int) -> None:
    assert_as_slow(torch.tensor([values]))
    shifted = torch.tensor([values], dtype=torch.float64).clamp(-2, 2).ldexp(torch.tensor(shift)).float()
    assert_as_slow(shifted)


@pytest.mark.parametrize("shape", [(1, 1), (129, 3), (3, 257), (128, 128), (130, 131)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ragged_shapes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    w = (torch.randn(shape) * torch.exp(2 * torch.randn(shape))).to(dtype)
    codes, scales = quantise(w)
    assert codes.shape == shape
    assert tuple(scales.shape) == spec.grid(*shape)
    assert_as_slow(w)


def test_a_batch_is_its_matrices_one_by_one() -> None:
    torch.manual_seed(2)
    w = torch.randn(2, 3, 130, 70) * torch.exp(torch.randn(2, 3, 1, 1) * 5)
    codes, scales = quantise(w)
    assert scales.shape == (2, 3, 2, 1)
    for i in range(2):
        for j in range(3):
            one_codes, one_scales = quantise(w[i, j])
            assert torch.equal(codes[i, j].view(torch.uint8), one_codes.view(torch.uint8))
            assert torch.equal(scales[i, j], one_scales)
            assert same_bits(project(w)[i, j], project(w[i, j]))


# The fixpoint, and the grid in one step.


def assert_fixpoint(w: Tensor) -> None:
    codes, scales = quantise(w)
    value = dequantise(codes, scales, w.dtype)
    again_codes, again_scales = quantise(value)
    assert torch.equal(again_codes.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(again_scales, scales)
    assert same_bits(project(w), value)
    assert same_bits(project(value), value)


def test_every_code_at_every_scale_is_quantised_to_its_value() -> None:
    """A foreign master (any scale, any code as the maximum) keeps its values, and its second master is a fixpoint."""
    for byte in range(spec.BYTE_MIN, spec.BYTE_MAX + 1):
        value = dequantise(CODES.view(F8).reshape(254, 1, 1), torch.full((254, 1, 1), byte, dtype=torch.uint8))
        assert same_bits(dequantise(*quantise(value)), value)
        assert_fixpoint(value)


@settings(max_examples=200)
@given(st.lists(floats, min_size=1, max_size=12), st.integers(-149, 127), st.sampled_from(["F32", "BF16"]))
def test_fixpoint(values: list[float], shift: int, dtype: str) -> None:
    w = torch.tensor([values], dtype=torch.float64).clamp(-1, 1).ldexp(torch.tensor(shift)).to(TYPES[dtype])
    assert_fixpoint(w)
    assert_fixpoint(torch.tensor([values]).clamp(-3e38, 3e38).to(TYPES[dtype]))


def test_fixpoint_of_all_small_bf16_maxima() -> None:
    """Down to the smallest subnormal, where the scale is held at 2**-117 and codes vanish."""
    small = torch.arange(20 << 7, dtype=torch.int16).view(torch.bfloat16).reshape(-1, 1, 1)
    assert_fixpoint(small)
    assert_fixpoint(torch.cat([small, -small / 16], -1).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64), (8, 32, 64), (128, 256), (1, 1), (200, 300), (2, 130, 129)])
def test_project_is_quantise_then_dequantise(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    for spread in (0.5, 4.0, 12.0):
        w = (torch.randn(shape) * torch.exp(spread * torch.randn(shape))).to(dtype)
        expected = dequantise(*quantise(w), dtype)
        assert same_bits(project(w), expected)
        strided = w.mT.contiguous().mT
        assert same_bits(project(strided), expected)
        assert same_bits(project(strided, out=torch.empty_like(w)), expected)
        assert project(strided, out=strided) is strided
        assert same_bits(strided, expected)


@pytest.mark.parametrize("exponent", [100, 106, 107, 108, 109, 118, 126, 127])
def test_project_of_huge_values(exponent: int) -> None:
    torch.manual_seed(4)
    w = (torch.rand(40, 40, dtype=torch.float64) * 2 - 1).ldexp(torch.tensor(exponent)).float()
    assert same_bits(project(w), dequantise(*quantise(w)))
    assert same_bits(project(w, out=w.clone()), dequantise(*quantise(w)))


def test_project_makes_no_graph_and_can_write_into_a_parameter() -> None:
    w = torch.nn.Parameter(torch.randn(5, 7))
    expected = dequantise(*quantise(w.detach()))
    assert not project(w).requires_grad
    assert not quantise(w)[0].requires_grad
    assert project(w, out=w) is w
    assert w.requires_grad
    assert same_bits(w.detach(), expected)


# The edges.


def test_zero_blocks() -> None:
    w = torch.zeros(129, 129)
    w[128, 128] = 3.0
    codes, scales = quantise(w)
    assert scales.tolist() == [[127, 127], [127, spec.scale_byte(3.0)]]
    assert not codes[:128].view(torch.uint8).any()
    negative = torch.full((2, 2), -0.0)
    codes, scales = quantise(negative)
    assert scales.item() == 127
    assert torch.equal(codes.view(torch.uint8), torch.full((2, 2), 0x80, dtype=torch.uint8))
    assert same_bits(project(negative), negative)


@pytest.mark.parametrize(
    ("amax", "byte", "code"),
    [
        (2.0**-127, 127, 0),  # half of the smallest code at the smallest scale: the tie goes to zero
        (2.0**-127 + 2.0**-149, 10, 1),
        (2.0**-126, 10, 1),
        (2.0**-149, 127, 0),
        (464 * 2.0**-117, 10, 0x7E),
        (464.0, 127, 0x7E),
        (3.4e38, 246, 0x7E),  # above 464 * 2**119: the largest value of the format
    ],
)
def test_edges_of_the_scale(amax: float, byte: int, code: int) -> None:
    for sign in (1, -1):
        codes, scales = quantise(torch.tensor([[sign * amax]]))
        assert (scales.item(), codes.view(torch.uint8).item()) == (byte, code | (0x80 if sign < 0 else 0))


def test_one_large_value_in_a_block_of_small_ones() -> None:
    w = torch.full((128, 128), 1e-6)
    w[0, 0] = 400.0
    assert_as_slow(w)
    assert project(w).count_nonzero() == 1
    w[0, 0] = 1e-6
    assert project(w).count_nonzero() == w.numel()


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("function", [quantise, project])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinity_and_nan_are_refused(bad: float, function: object, dtype: torch.dtype) -> None:
    for place in ((0, 0), (129, 199), (64, 150)):
        w = torch.randn(130, 200).to(dtype)
        w[place] = bad
        with pytest.raises(FormatError, match="infinity or NaN"):
            function(w)  # type: ignore[operator]


def test_what_is_no_matrix_is_refused() -> None:
    for shape in ((3,), (), (0, 4), (4, 0), (0, 3, 3)):
        with pytest.raises(FormatError, match="no matrix"):
            quantise(torch.ones(shape))
    with pytest.raises(FormatError, match="cannot hold the grid"):
        project(torch.ones(2, 2, dtype=torch.float16))


def test_scales_that_do_not_fit_are_refused() -> None:
    codes = torch.zeros(576, 130).to(F8)
    for shape in ((4, 2), (5, 1), (2, 5), (1, 5, 2)):
        with pytest.raises(FormatError, match="scales of shape"):
            dequantise(codes, torch.full(shape, 127, dtype=torch.uint8))
    assert dequantise(codes, torch.full((5, 2), 127, dtype=torch.uint8)).shape == (576, 130)
    with pytest.raises(FormatError, match="exact from"):
        dequantise(codes, torch.full((5, 2), 255, dtype=torch.uint8))


def test_mx_blocks() -> None:
    torch.manual_seed(5)
    codes = torch.randint(0, 0x7F, (3, 70), dtype=torch.uint8).view(F8)
    scales = torch.randint(100, 140, (3, 3), dtype=torch.uint8)
    out = dequantise(codes, scales, block=spec.MX_BLOCK)
    for i in range(3):
        for j in range(70):
            expected = value_of(int(codes.view(torch.uint8)[i, j])) * Fraction(2) ** (int(scales[i, j // 32]) - 127)
            assert Fraction(out[i, j].item()) == expected
