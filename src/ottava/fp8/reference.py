"""What the format means, in plain torch: the reference that every kernel must equal bit for bit.

Scales are found and applied as bit patterns of powers of two. Logarithms are never taken (they
round near powers of two) and torch's cast to float8_e8m0fnu is never used (it rounds, and turns -1
into 1): scale bytes are made as integers and reinterpreted.

`quantise` and `dequantise` say what the format means. `project` gives the same bits as one after
the other, by float32 arithmetic alone: it is called on every weight in every training step, and
not every chip that trains has an FP8 type.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ottava.errors import FormatError
from ottava.fp8.spec import BIAS, BLOCK, BYTE_MAX, BYTE_MIN, BYTE_ZERO, CODE_MAX, EXACT, MX_BLOCK, grid

TYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
BLOCKS = ((BLOCK, BLOCK), MX_BLOCK, (32, 32))  # rows and columns that may share a scale
LANES = 32  # sums of squares run in this many columns side by side; see `measure`
_POWERS = torch.tensor([2.0 ** (byte - BIAS) for byte in range(255)] + [torch.nan], dtype=torch.float32)

# Bit patterns of float32: 23 bits of fraction below 8 bits of exponent.
_ONE = 1 << 23
_EXPONENT = 0x7F800000  # the exponent's bits, and the pattern of infinity
_ROUND_464 = 0x7FFFFF - 0x680000  # carries into the exponent where the fraction is above that of 464 = 1.8125 * 2**8
_VANISHES = 0x00400000  # 2**-127: at the smallest scale this and everything below rounds to zero
_MAGIC = 20 * _ONE  # times 2**20: adding 2**(e+20) to x in [0, 2**(e+1)) leaves no bit below 2**(e-3), rounded to even
_MAGIC_SAFE = (108 + BIAS) * _ONE  # below 2**108 the sum with the magic number is finite


class Errors(NamedTuple):
    """How a tensor differs from its quantised self.

    changed: elements whose value, as float32 bits, is another; signal, noise: the sums of squares of the
    elements and of their differences, in float64. Signal to quantisation noise in dB is 10 log10(signal / noise).
    """

    changed: int
    signal: float
    noise: float


@torch.no_grad()
def quantise(w: Tensor) -> tuple[Tensor, Tensor]:
    """Round to the nearest codes under the 464 rule (`spec.scale_byte`), ties to even, -0 kept.

    w: float32, bfloat16 or float16 [..., M, N]; leading dimensions are a batch of matrices.
    Returns codes, float8_e4m3fn [..., M, N], and scales, uint8 [..., ceil(M/128), ceil(N/128)]: E8M0
    bytes in [10, 246]. Magnitudes above 464 * 2**119 become 448 * 2**119.
    Raises FormatError where w holds infinity or NaN, or is no matrix.
    """
    rows, columns = matrix(w)
    amax = _block_amax(w.abs().float())
    _finite(amax)
    bits = _power_below(amax, 0)
    x = w.float() / _spread(bits.view(torch.float32), (BLOCK, BLOCK), rows, columns)
    codes = x.clamp_(-CODE_MAX, CODE_MAX).to(torch.float8_e4m3fn)
    scales = (bits >> 23).masked_fill_(amax.view(torch.int32) <= _VANISHES, BYTE_ZERO)
    return codes, scales.to(torch.uint8)


@torch.no_grad()
def dequantise(
    codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32, *, block: tuple[int, int] = (BLOCK, BLOCK)
) -> Tensor:
    """The exact values, [..., M, N] in `dtype` (float32, bfloat16 or float16).

    codes: float8_e4m3fn [..., M, N]; scales: E8M0 bytes (uint8 or float8_e8m0fnu), one for each block,
    which is one of BLOCKS.
    Raises FormatError where the shapes do not fit, or where a scale lies outside the window in which
    every code is exact in `dtype`. NaN codes stay NaN.
    """
    rows, columns = matrix(codes)
    if scales.dtype != torch.uint8:
        scales = scales.view(torch.uint8)
    check_grid(codes, scales, block)
    least, most = torch.aminmax(scales)
    check_window(int(least), int(most), dtype)
    powers = _POWERS.to(scales.device)[scales.int()]
    return codes.float().mul_(_spread(powers, block, rows, columns)).to(dtype)


@torch.no_grad()
def project(w: Tensor, out: Tensor | None = None) -> Tensor:
    """w on the grid: the bits of dequantise(*quantise(w)), in w's own type.

    w: float32 or bfloat16 [..., M, N]. out: where to put the result; `out=w` rounds in place.
    Makes no autograd graph. Raises FormatError where w holds infinity or NaN, or is no matrix.
    """
    if w.dtype not in (torch.float32, torch.bfloat16):
        raise FormatError(f"{w.dtype} cannot hold the grid", fix="convert to float32 or bfloat16 first")
    rows, columns = matrix(w)
    x = w.abs().float()
    amax = _block_amax(x)
    if _finite(amax) >= _MAGIC_SAFE:
        exact = dequantise(*quantise(w), w.dtype)
        return exact if out is None else out.copy_(exact)
    least = _spread(_power_below(amax, 6), (BLOCK, BLOCK), rows, columns)  # below 2**-6 * scale codes are evenly spaced
    magic = torch.maximum(x.view(torch.int32) & _EXPONENT, least).add_(_MAGIC).view(torch.float32)
    return torch.copysign(x.add_(magic).sub_(magic).to(w.dtype), w, out=out)


@torch.no_grad()
def measure(w: Tensor, codes: Tensor, scales: Tensor) -> Errors:
    """Compare w, finite, with the values of codes and scales (128x128 blocks).

    w: float32, bfloat16 or float16 [..., M, N]. The order of the sums is part of the definition, so that
    they are the same on every machine that keeps subnormal numbers: inside a block, in units of its scale and in
    float32, column c adds to lane c % 32 from top left to bottom right, and lanes are folded in halves; blocks are
    added in order in float64. The sums are good to 1e-5 where no element is beyond 2**60 scales. Where subnormal
    numbers are flushed to zero (`torch.set_flush_denormal`), so are subnormal elements and squares in these sums.
    Raises FormatError as `dequantise` does.
    """
    matrix(w)
    if codes.shape != w.shape:
        raise FormatError(f"codes of shape {tuple(codes.shape)} for a tensor of shape {tuple(w.shape)}")
    values = dequantise(codes, scales)
    changed = int((w.float().resolve_neg().view(torch.int32) != values.view(torch.int32)).sum())
    x, exponents = w.float(), (scales if scales.dtype == torch.uint8 else scales.view(torch.uint8)).double() - BIAS
    unit = _spread(torch.exp2(-exponents).float(), (BLOCK, BLOCK), *matrix(w))
    square = torch.exp2(2 * exponents)
    return Errors(changed, _sum_of_squares(x * unit, square), _sum_of_squares((x - values) * unit, square))


def check_grid(codes: Tensor, scales: Tensor, block: tuple[int, int]) -> None:
    """FormatError unless `block` is one of BLOCKS and there is one scale for each block of the codes [..., M, N]."""
    if tuple(block) not in BLOCKS:
        raise FormatError(f"no form of FP8 has a scale for each block of {block}", fix=f"give one of {BLOCKS}")
    expected = (*codes.shape[:-2], *grid(*matrix(codes), block))
    if tuple(scales.shape) != expected:
        raise FormatError(f"scales of shape {tuple(scales.shape)} where blocks of {block} need {expected}")


def check_window(least: int, most: int, dtype: torch.dtype) -> None:
    """FormatError unless all scale bytes from `least` to `most` give exact values in `dtype`."""
    if dtype not in TYPE_NAMES:
        raise FormatError(f"{dtype} is none of bfloat16, float16 and float32")
    name = TYPE_NAMES[dtype]
    lowest, highest = EXACT[name]
    if least - BIAS < lowest or most - BIAS > highest:
        raise FormatError(
            f"scales from 2**{least - BIAS} to 2**{most - BIAS}: "
            f"in {name} values are exact from 2**{lowest} to 2**{highest}"
        )


def not_finite() -> FormatError:
    """What is raised where a tensor holds infinity or NaN."""
    return FormatError("infinity or NaN has no UE8M0-FP8 form", fix="find the step or the tensor it came from")


def matrix(t: Tensor) -> tuple[int, int]:
    """Rows and columns of the matrices in t [..., M, N]; FormatError where there is none."""
    if t.dim() < 2 or t.numel() == 0:
        raise FormatError(f"a tensor of shape {tuple(t.shape)} has no matrix to quantise")
    return t.shape[-2], t.shape[-1]


def _block_amax(magnitudes: Tensor) -> Tensor:
    """The largest value in each block: [..., M, N] to [..., ceil(M/128), ceil(N/128)]."""
    rows, columns = magnitudes.shape[-2:]
    if rows <= BLOCK and columns <= BLOCK:
        return magnitudes.amax((-2, -1), keepdim=True)
    height, width = min(rows, BLOCK), min(columns, BLOCK)
    return _blocks(magnitudes, height, width).amax((-3, -1))


def _blocks(t: Tensor, height: int, width: int) -> Tensor:
    """[..., M, N] with zeros below and to the right, as [..., ceil(M/height), height, ceil(N/width), width]."""
    rows, columns = t.shape[-2:]
    down, right = grid(rows, columns, (height, width))
    missing = (0, right * width - columns, 0, down * height - rows)
    if any(missing):
        t = torch.nn.functional.pad(t, missing)
    return t.reshape(*t.shape[:-2], down, height, right, width)


def _finite(amax: Tensor) -> int:
    """The bit pattern of the largest magnitude; FormatError where it is infinity or NaN."""
    top = int(amax.view(torch.int32).max())
    if top >= _EXPONENT:
        raise not_finite()
    return top


def _power_below(amax: Tensor, octaves: int) -> Tensor:
    """Bit patterns (int32) of each block's scale, divided by 2**octaves."""
    bits = amax.view(torch.int32) + (_ROUND_464 - (8 + octaves) * _ONE)
    return bits.clamp_((BYTE_MIN - octaves) * _ONE, (BYTE_MAX - octaves) * _ONE).bitwise_and_(_EXPONENT)


def _spread(per_block: Tensor, block: tuple[int, int], rows: int, columns: int) -> Tensor:
    """One value a block to one value an element; a direction with one block is left to broadcasting."""
    if per_block.shape[-2] > 1:
        per_block = per_block.repeat_interleave(block[0], -2)[..., :rows, :]
    if per_block.shape[-1] > 1:
        per_block = per_block.repeat_interleave(block[1], -1)[..., :columns]
    return per_block


def _sum_of_squares(t: Tensor, unit: Tensor) -> float:
    rows, columns = t.shape[-2:]
    height, width = min(rows, BLOCK), min(-(-columns // LANES) * LANES, BLOCK)
    blocks = _blocks(t.square(), height, width).transpose(-3, -2).reshape(-1, height * width // LANES, LANES)
    lanes = torch.zeros_like(blocks[:, 0])
    for step in blocks.unbind(1):  # sum() would choose its own order
        lanes += step
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return float((lanes.flatten().double() * unit.flatten()).cumsum(0)[-1])
