"""FP4 weights as DeepSeek-V4 stores its routed experts: E2M1 codes, two in a byte, a power of two for each 1x32.

Every value an FP4 checkpoint can hold is a value of BF16, and most blocks are blocks of UE8M0-FP8 too:
a model published in FP4 can be moved to chips without it, and nothing is rounded. `fits_fp8` says
which blocks. DeepSeek's own conversion takes the largest group scale of a block over 2**6 and does
not check that the smallest group survives it.

The lower four bits of byte j are element 2j, the upper four element 2j + 1 (DeepSeek-V4's
inference/convert.py, and transformers' integrations/finegrained_fp8.py, agree on it).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ottava.errors import FormatError
from ottava.fp8.spec import BIAS, BLOCK, BYTE_MAX, BYTE_MIN, E2M1, EXACT_FP4, MX_BLOCK, grid

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_VALUES = torch.tensor([sign * value for sign in (1.0, -1.0) for value in E2M1])
_PAIRS = torch.stack([_VALUES.repeat(16), _VALUES.repeat_interleave(16)], 1)  # by byte: lower four bits, upper four

_POWERS = torch.tensor([2.0 ** (byte - BIAS) for byte in range(255)])

# The exponents of the lowest and of the highest set bit of each magnitude. A zero narrows nothing.
_NOTHING = 1 << 14
_LOWEST = (_NOTHING, -1, 0, -1, 1, 0, 2, 1)
_HIGHEST = (-_NOTHING, -1, 0, 0, 1, 1, 2, 2)

# E4M3 with scale 2**k holds every value whose bits lie from 2**(k-9) to 2**(k+8), as far as an E2M1
# significand (one or two bits) goes: 1.5 * 2**(k+8) is the code 384, and 2**(k-9) is the smallest.
_BELOW, _ABOVE = 9, 8


@torch.no_grad()
def dequantise(packed: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The exact values, [M, N] in `dtype` (float32, bfloat16 or float16). -0 stays -0.

    packed: bytes (uint8 or int8) [M, N/2]; scales: E8M0 bytes (uint8 or float8_e8m0fnu) [M, ceil(N/32)].
    Raises FormatError where the shapes do not fit, or where a scale lies outside the window in which
    every code is exact in `dtype` (`spec.EXACT_FP4`).
    """
    packed, scales = _checked(packed, scales)
    name = _NAMES[dtype]
    lowest, highest = EXACT_FP4[name]
    least, most = (int(bound) - BIAS for bound in torch.aminmax(scales))
    if least < lowest or most > highest:
        raise FormatError(
            f"scales from 2**{least} to 2**{most}: in {name} FP4 values are exact from 2**{lowest} to 2**{highest}"
        )
    values = _PAIRS.to(packed.device)[packed.int()].flatten(1)
    powers = _POWERS.to(scales.device)[scales.int()]
    spread = powers.repeat_interleave(MX_BLOCK[1], 1)[:, : values.shape[1]]
    return values.mul_(spread).to(dtype)


@torch.no_grad()
def fits_fp8(packed: Tensor, scales: Tensor) -> Tensor:
    """Which 128x128 blocks are exact in FP8 with one scale: bool [ceil(M/128), ceil(N/128)].

    packed and scales as in `dequantise`. A block fits exactly where the highest set bit of its values is at most
    2**17 times the lowest, and a scale byte in [BYTE_MIN, BYTE_MAX] reaches both. Groups whose scales' exponents
    span at most `spec.FP4_SPAN` always do; groups of zeros count for nothing, whatever their scale. Where a block
    fits, the 464 rule finds a scale that is exact: it takes the smallest scale that holds the block's maximum.
    """
    packed, scales = _checked(packed, scales)
    lowest, highest = _by_byte(_LOWEST, min), _by_byte(_HIGHEST, max)
    low, high = (table.to(packed.device)[packed.int()] for table in (lowest, highest))
    exponents = scales.short() - BIAS
    blocks = grid(packed.shape[0], 2 * packed.shape[1])
    low = _reduce(_reduce(low, (1, MX_BLOCK[1] // 2), _NOTHING).amin(-1) + exponents, (BLOCK, 4), _NOTHING).amin(-1)
    high = _reduce(_reduce(high, (1, MX_BLOCK[1] // 2), -_NOTHING).amax(-1) + exponents, (BLOCK, 4), -_NOTHING).amax(-1)
    assert low.shape == blocks
    smallest = (high - _ABOVE).clamp(min=BYTE_MIN - BIAS)
    largest = (low + _BELOW).clamp(max=BYTE_MAX - BIAS)
    return smallest <= largest


def _checked(packed: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Both as uint8; FormatError where their shapes do not fit, or a scale is NaN."""
    if packed.dim() != 2 or packed.numel() == 0 or packed.dtype not in (torch.uint8, torch.int8):
        raise FormatError(f"{packed.dtype} of shape {tuple(packed.shape)} is no matrix of packed FP4")
    if scales.dtype != torch.uint8:
        scales = scales.view(torch.uint8)
    expected = grid(packed.shape[0], 2 * packed.shape[1], MX_BLOCK)
    if tuple(scales.shape) != expected:
        raise FormatError(f"scales of shape {tuple(scales.shape)} where {tuple(packed.shape)} bytes need {expected}")
    if bool((scales == 255).any()):
        raise FormatError("a scale byte of 255 is NaN")
    return packed.view(torch.uint8), scales


def _by_byte(of_magnitude: tuple[int, ...], combine: Callable[[int, int], int]) -> Tensor:
    """For every byte of two codes, the combination of what the table says of each."""
    return torch.tensor([combine(of_magnitude[b & 7], of_magnitude[b >> 4 & 7]) for b in range(256)], dtype=torch.int16)


def _reduce(t: Tensor, block: tuple[int, int], filler: int) -> Tensor:
    """[M, N] to [ceil(M/block), ceil(N/block), elements of a block], ragged edges filled."""
    height, width = t.shape
    rows, columns = grid(height, width, block)
    missing = (0, columns * block[1] - width, 0, rows * block[0] - height)
    padded = torch.nn.functional.pad(t, missing, value=filler)
    return padded.view(rows, block[0], columns, block[1]).transpose(1, 2).flatten(2)
