"""Tensors to UE8M0-FP8 and back, exactly: the reference in plain torch.

Scales are found and applied as bit patterns of powers of two. Logarithms are never taken (they
round near powers of two) and torch's cast to float8_e8m0fnu is never used (it rounds, and turns -1
into 1): scale bytes are made as integers and reinterpreted.

`quantise` and `dequantise` say what the format means. `project` gives the same bits as one after
the other, by float32 arithmetic alone: it is called on every weight in every training step, and
not every chip that trains has an FP8 type.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ottava.errors import FormatError
from ottava.fp8.spec import BIAS, BLOCK, BYTE_MAX, BYTE_MIN, BYTE_ZERO, CODE_MAX, EXACT, grid

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_POWERS = torch.tensor([2.0 ** (byte - BIAS) for byte in range(255)] + [torch.nan], dtype=torch.float32)

# Bit patterns of float32: 23 bits of fraction below 8 bits of exponent.
_ONE = 1 << 23
_EXPONENT = 0x7F800000  # the exponent's bits, and the pattern of infinity
_ROUND_464 = 0x7FFFFF - 0x680000  # carries into the exponent where the fraction is above that of 464 = 1.8125 * 2**8
_VANISHES = 0x00400000  # 2**-127: at the smallest scale this and everything below rounds to zero
_MAGIC = 20 * _ONE  # times 2**20: adding 2**(e+20) to x in [0, 2**(e+1)) leaves no bit below 2**(e-3), rounded to even
_MAGIC_SAFE = (108 + BIAS) * _ONE  # below 2**108 the sum with the magic number is finite


@torch.no_grad()
def quantise(w: Tensor) -> tuple[Tensor, Tensor]:
    """Round to the nearest codes under the 464 rule (`spec.scale_byte`), ties to even, -0 kept.

    w: float32, bfloat16 or float16 [..., M, N]; leading dimensions are a batch of matrices.
    Returns codes, float8_e4m3fn [..., M, N], and scales, uint8 [..., ceil(M/128), ceil(N/128)]: E8M0
    bytes in [10, 246]. Magnitudes above 464 * 2**119 become 448 * 2**119.
    Raises FormatError where w holds infinity or NaN, or is no matrix.
    """
    rows, columns = _matrix(w)
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

    codes: float8_e4m3fn [..., M, N]; scales: E8M0 bytes (uint8 or float8_e8m0fnu), one for each block.
    Raises FormatError where the shapes do not fit, or where a scale lies outside the window in which
    every code is exact in `dtype`. NaN codes stay NaN.
    """
    rows, columns = _matrix(codes)
    if scales.dtype != torch.uint8:
        scales = scales.view(torch.uint8)
    expected = (*codes.shape[:-2], *grid(rows, columns, block))
    if tuple(scales.shape) != expected:
        raise FormatError(f"scales of shape {tuple(scales.shape)} where blocks of {block} need {expected}")
    lowest, highest = EXACT[_NAMES[dtype]]
    least, most = (int(bound) - BIAS for bound in torch.aminmax(scales))
    if least < lowest or most > highest:
        raise FormatError(
            f"scales from 2**{least} to 2**{most}: in {_NAMES[dtype]} values are exact from 2**{lowest} to 2**{highest}"
        )
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
    rows, columns = _matrix(w)
    x = w.abs().float()
    amax = _block_amax(x)
    if _finite(amax) >= _MAGIC_SAFE:
        exact = dequantise(*quantise(w), w.dtype)
        return exact if out is None else out.copy_(exact)
    least = _spread(_power_below(amax, 6), (BLOCK, BLOCK), rows, columns)  # below 2**-6 * scale codes are evenly spaced
    magic = torch.maximum(x.view(torch.int32) & _EXPONENT, least).add_(_MAGIC).view(torch.float32)
    return torch.copysign(x.add_(magic).sub_(magic).to(w.dtype), w, out=out)


def _matrix(t: Tensor) -> tuple[int, int]:
    if t.dim() < 2 or t.numel() == 0:
        raise FormatError(f"a tensor of shape {tuple(t.shape)} has no matrix to quantise")
    return t.shape[-2], t.shape[-1]


def _block_amax(magnitudes: Tensor) -> Tensor:
    """The largest value in each block: [..., M, N] to [..., ceil(M/128), ceil(N/128)]."""
    rows, columns = magnitudes.shape[-2:]
    if rows <= BLOCK and columns <= BLOCK:
        return magnitudes.amax((-2, -1), keepdim=True)
    blocks = grid(rows, columns)
    height, width = min(rows, BLOCK), min(columns, BLOCK)
    missing = (0, blocks[1] * width - columns, 0, blocks[0] * height - rows)
    if any(missing):
        magnitudes = torch.nn.functional.pad(magnitudes, missing)
    return magnitudes.reshape(*magnitudes.shape[:-2], blocks[0], height, blocks[1], width).amax((-3, -1))


def _finite(amax: Tensor) -> int:
    """The bit pattern of the largest magnitude; FormatError where it is infinity or NaN."""
    top = int(amax.view(torch.int32).max())
    if top >= _EXPONENT:
        raise FormatError("infinity or NaN has no UE8M0-FP8 form", fix="find the step or the tensor it came from")
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
