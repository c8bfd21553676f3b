"""The format in numbers and its one rule, free of any tensor library.

Everything that reads or writes UE8M0-FP8 takes its constants from here, so that there is one place
to check against the sources: E4M3 "fn" from arXiv 2209.05433, E8M0, E2M1 and blocks of 32 from the
OCP Microscaling Formats specification v1.0, 128x128 weight blocks from DeepSeek-V3 (arXiv 2412.19437).
"""

from __future__ import annotations

import math

BLOCK = 128
"""Rows and columns that share one scale; blocks at the right and bottom edge may be smaller."""

MX_BLOCK = (1, 32)
"""Rows and columns that share one scale in MXFP8 and MXFP4; the last block of a row may be narrower."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of an FP4 code by its lower three bits; the fourth is the sign. Infinity and NaN have no code."""

CODE_MAX = 448.0
"""The largest finite E4M3 value."""

LIMIT = 464.0
"""The largest magnitude that rounds to 448: half way to 480, which is not finite; the tie goes to the even code."""

BIAS = 127
"""An E8M0 byte b stands for 2 ** (b - BIAS)."""

BYTE_MIN, BYTE_MAX = 10, 246
"""The scale bytes a master may hold: there every value is a normal BF16 number, or zero."""

BYTE_ZERO = 127
"""The scale byte of a block in which every code is a zero."""

EXACT = {"BF16": (-124, 119), "F16": (-15, 7), "F32": (-127, 119)}
"""Lowest and highest k for which every finite code times 2**k is exact in the type (tests enumerate them all)."""

EXACT_FLUSHED = {"BF16": (-117, 119), "F16": (-5, 7), "F32": (-117, 119)}
"""The same on hardware that flushes subnormal numbers to zero."""

EXACT_FP4 = {"BF16": (-127, 125), "F16": (-23, 13), "F32": (-127, 125)}
"""Lowest and highest k for which every E2M1 code times 2**k is exact in the type."""

EXACT_FP4_FLUSHED = {"BF16": (-125, 125), "F16": (-13, 13), "F32": (-125, 125)}
"""The same on hardware that flushes subnormal numbers to zero."""

FP4_SPAN = 14
"""E2M1 groups whose scales' exponents differ by at most this fit one FP8 block, whatever their codes."""

_LIMIT_FRACTION, _LIMIT_EXPONENT = math.frexp(LIMIT)
_VANISHES = math.ldexp(1.0, BYTE_MIN - BIAS - 10)  # half the smallest code at the smallest scale; the tie goes to zero


def grid(rows: int, columns: int, block: tuple[int, int] = (BLOCK, BLOCK)) -> tuple[int, int]:
    """How many blocks, hence scales, a matrix of rows x columns has in each direction."""
    return -(-rows // block[0]), -(-columns // block[1])


def scale_byte(amax: float) -> int:
    """The E8M0 byte for a block whose largest magnitude is `amax` (finite, not negative).

    The smallest power of two s with amax / s <= 464, its byte held inside [BYTE_MIN, BYTE_MAX]; a
    block whose values would all round to zero gets BYTE_ZERO. With nearest rounding the rule is a
    fixpoint: a block's largest code stands for more than 232 times its scale (unless the byte was
    held up), so quantising the result again finds the same scale and the same codes.
    """
    if amax <= _VANISHES:
        return BYTE_ZERO
    fraction, exponent = math.frexp(amax)
    k = exponent - _LIMIT_EXPONENT + (fraction > _LIMIT_FRACTION)
    return min(max(k + BIAS, BYTE_MIN), BYTE_MAX)
