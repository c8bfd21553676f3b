"""The codec as Triton kernels, so that weights on a GPU are quantised where they are, to the reference's bits.

Codes and values are made with integer arithmetic on bit patterns alone. No FP8 conversion of the
hardware is used: chips without one (Ampere) give the same bytes as chips whose conversion differs in
what it does with ties, saturation or subnormal numbers, and a compiler that contracts or reorders
floating-point arithmetic finds none to work on.

Nothing imports this module unless a tensor on a GPU asks for it. Level of evidence: Triton's
interpreter runs these kernels on a CPU, and Triton's compiler turns them into machine code for
Ampere, Hopper, Blackwell and CDNA 3 chips, on Nvidia's without one floating-point instruction. No
chip has run that code yet; the same tests do it where a GPU is present.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import math
from typing import Any

import torch
import triton  # type: ignore[import-untyped,import-not-found]
import triton.language as tl  # type: ignore[import-untyped,import-not-found]
from torch import Tensor

from ottava.errors import FormatError
from ottava.fp8 import reference
from ottava.fp8.reference import TYPE_NAMES
from ottava.fp8.spec import BLOCK, BYTE_MAX, BYTE_MIN, BYTE_ZERO, grid

_WORD = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
_FORM = {torch.float32: (23, 0), torch.bfloat16: (7, 0), torch.float16: (10, 112)}
"""Bits of fraction, and how far the exponent's bias lies below float32's."""
_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
STRIP = BLOCK
"""Rows of a block that a program holds at once; a divisor of BLOCK. GPUs hold all of it; Ascend's vector buffers 16."""

_SIDE = tl.constexpr(BLOCK)
_LOWEST = tl.constexpr(BYTE_MIN)
_HIGHEST = tl.constexpr(BYTE_MAX)
_ZERO = tl.constexpr(BYTE_ZERO)
_BAD = tl.constexpr(255)  # E8M0's NaN: what a block with infinity or NaN is marked with
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_INFINITY = tl.constexpr(0x7F800000)
_HIDDEN = tl.constexpr(1 << 23)  # the bit above float32's 23 bits of fraction
_ROUND_464 = tl.constexpr(0x7FFFFF - 0x680000 - (8 << 23))  # carries where the fraction exceeds 464's, then / 2**8
_VANISHES = tl.constexpr(0x00400000)  # 2**-127: at the smallest scale this and everything below rounds to zero
_LARGEST = tl.constexpr(0x7E)  # the code of 448


def supports(tensor: Tensor) -> bool:
    """True where `tensor` has a type that these kernels read, and is on a device that Triton compiles for.

    Under Triton's interpreter (TRITON_INTERPRET=1 before triton is first imported) that device is the CPU.
    """
    device = "cpu" if triton.knobs.runtime.interpret else "cuda"
    return tensor.device.type == device and (tensor.dtype in TYPE_NAMES or tensor.dtype == torch.float8_e4m3fn)


@torch.no_grad()
def quantise(w: Tensor) -> tuple[Tensor, Tensor]:
    """The codes and scales of `reference.quantise`, whose shapes, types and errors these are; in one pass."""
    rows, columns = reference.matrix(w)
    w = w.float() if w.dtype == torch.float16 else w
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    scales = _launch(_quantise_kernel, w, codes, rows, columns)
    return codes.view(torch.float8_e4m3fn), scales


@torch.no_grad()
def project(w: Tensor, out: Tensor | None = None) -> Tensor:
    """The bits of `reference.project`, whose arguments and errors these are; in one pass, and a copy to `out`."""
    if w.dtype not in (torch.float32, torch.bfloat16):
        raise FormatError(f"{w.dtype} cannot hold the grid", fix="convert to float32 or bfloat16 first")
    rows, columns = reference.matrix(w)
    words = torch.empty(w.shape, dtype=_WORD[w.dtype], device=w.device)
    _launch(_project_kernel, w, words, rows, columns)
    result = words.view(w.dtype)
    return result if out is None else out.copy_(result)


@torch.no_grad()
def dequantise(
    codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32, *, block: tuple[int, int] = (BLOCK, BLOCK)
) -> Tensor:
    """The values of `reference.dequantise`, whose arguments and errors these are.

    NaN codes give NaN, whose payload is not part of the format.
    """
    rows, columns = reference.matrix(codes)
    scales = scales if scales.dtype == torch.uint8 else scales.view(torch.uint8)
    reference.check_grid(codes, scales, block)
    least, most = torch.aminmax(scales)
    reference.check_window(int(least), int(most), dtype)
    words = torch.empty(codes.shape, dtype=_WORD[dtype], device=codes.device)
    tiles = grid(rows, columns)
    _dequantise_kernel[(math.prod(codes.shape[:-2]) * tiles[0] * tiles[1],)](
        codes.contiguous().view(torch.uint8), scales.contiguous(), words, rows, columns, *tiles, *scales.shape[-2:],
        *block, *_FORM[dtype], STRIP, **_OPTIONS,
    )  # fmt: skip
    return words.view(dtype)


def _launch(kernel: Any, w: Tensor, out: Tensor, rows: int, columns: int) -> Tensor:
    """Run a kernel with one program for each block, w to `out`; the scales, or FormatError where w is not finite."""
    tiles = grid(rows, columns)
    scales = torch.empty((*w.shape[:-2], *tiles), dtype=torch.uint8, device=w.device)
    words = w.contiguous().view(_WORD[w.dtype])
    kernel[(scales.numel(),)](words, out, scales, rows, columns, *tiles, _FORM[w.dtype][0], STRIP, **_OPTIONS)
    if bool((scales == _BAD.value).any()):
        raise reference.not_finite()
    return scales


@triton.jit
def _strip(rows, columns, down, across, first, ROWS: tl.constexpr):
    """ROWS rows of this program's block, from `first` on: matrix, rows and columns in it, offsets in memory, a mask."""
    program = tl.program_id(0)
    matrix = program // (down * across)
    row = program // across % down * _SIDE + first + tl.arange(0, ROWS)[:, None]
    column = program % across * _SIDE + tl.arange(0, _SIDE)[None, :]
    offset = (matrix.to(tl.int64) * rows + row) * columns + column
    return matrix, row, column, offset, (row < rows) & (column < columns)


@triton.jit
def _bits(w, offset, inside, FRACTION: tl.constexpr):
    """The values there as float32's bit patterns (int32); zeros outside of the matrix."""
    return tl.load(w + offset, mask=inside, other=0).to(tl.int32) << (23 - FRACTION)


@triton.jit
def _top(w, rows, columns, down, across, ROWS: tl.constexpr, FRACTION: tl.constexpr):
    """The bit pattern of the block's largest magnitude. As integers these are ordered as the values, NaN at the end."""
    top = 0
    for first in range(0, _SIDE, ROWS):
        _, _, _, offset, inside = _strip(rows, columns, down, across, first, ROWS)
        top = tl.maximum(top, tl.max(_bits(w, offset, inside, FRACTION) & _MAGNITUDE))
    return top


@triton.jit
def _scale(top):
    """The E8M0 byte by which a block is divided, from the bit pattern of its largest magnitude: the 464 rule."""
    return tl.minimum(tl.maximum((top + _ROUND_464) >> 23, _LOWEST), _HIGHEST)


@triton.jit
def _stored(top, byte):
    """The byte that is stored: 127 where all codes are zeros, NaN's where the block is not finite."""
    return tl.where(top >= _INFINITY, _BAD, tl.where(top <= _VANISHES, _ZERO, byte))


@triton.jit
def _encode(bits, byte):
    """Codes (int32) of float32 bit patterns divided by 2**(byte - 127): nearest, ties to even, saturating."""
    size = bits & _MAGNITUDE
    exponent = tl.maximum(size >> 23, 1)
    significand = (size & (_HIDDEN - 1)) | tl.where(size >= _HIDDEN, _HIDDEN, 0)
    octave = exponent - byte  # the quotient lies in [2**octave, 2**(octave + 1)); codes are evenly spaced below 2**-6
    shift = tl.minimum(20 + tl.maximum(-6 - octave, 0), 25)  # 24 bits moved by 25 are less than half
    kept = significand >> shift
    rounded = (significand + ((1 << (shift - 1)) - 1) + (kept & 1)) >> shift
    code = tl.minimum(((tl.maximum(octave, -6) + 6) << 3) + rounded, _LARGEST)
    return code | ((bits >> 24) & 0x80)


@triton.jit
def _decode(code, byte, FRACTION: tl.constexpr, OFFSET: tl.constexpr):
    """Bit patterns (int32) of code x 2**(byte - 127) in the type with so many bits of fraction; exact in its window."""
    exponent = (code >> 3) & 15
    low = code & 7
    highest = (low >= 2).to(tl.int32) + (low >= 4).to(tl.int32)  # place of a subnormal code's highest bit
    place = tl.where(exponent > 0, exponent - 7, highest - 9) + byte - OFFSET
    one: tl.constexpr = 1 << FRACTION
    significand = tl.where(exponent > 0, (8 + low) << (FRACTION - 3), (low << FRACTION) >> highest)
    subnormal = significand >> tl.minimum(tl.maximum(1 - place, 0), FRACTION + 1)
    size = tl.where(place > 0, (tl.maximum(place, 0) << FRACTION) + (significand - one), subnormal)
    nan: tl.constexpr = ((255 - 2 * OFFSET) << FRACTION) | (one >> 1)  # 255 or 31: all bits of the exponent
    size = tl.where((code & 0x7F) == 0x7F, nan, tl.where((code & 0x7F) == 0, 0, size))
    sign_place: tl.constexpr = FRACTION + (8 if OFFSET == 0 else 5)
    return size | (((code >> 7) & 1) << sign_place)


@triton.jit
def _quantise_kernel(
    w, codes, scales, rows, columns, down, across, FRACTION: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    top = _top(w, rows, columns, down, across, ROWS, FRACTION)
    byte = _scale(top)
    for first in range(0, _SIDE, ROWS):
        _, _, _, offset, inside = _strip(rows, columns, down, across, first, ROWS)
        code = _encode(_bits(w, offset, inside, FRACTION), byte)
        tl.store(codes + offset, code.to(tl.uint8), mask=inside)
    tl.store(scales + tl.program_id(0), _stored(top, byte).to(tl.uint8))


@triton.jit
def _project_kernel(
    w, out, scales, rows, columns, down, across, FRACTION: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    top = _top(w, rows, columns, down, across, ROWS, FRACTION)
    byte = _scale(top)
    for first in range(0, _SIDE, ROWS):
        _, _, _, offset, inside = _strip(rows, columns, down, across, first, ROWS)
        word = _decode(_encode(_bits(w, offset, inside, FRACTION), byte), byte, FRACTION, 0)
        tl.store(out + offset, word.to(out.dtype.element_ty), mask=inside)
    tl.store(scales + tl.program_id(0), _stored(top, byte).to(tl.uint8))


@triton.jit
def _dequantise_kernel(
    codes, scales, out, rows, columns, down, across,
    scales_down, scales_across, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    FRACTION: tl.constexpr, OFFSET: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    for first in range(0, _SIDE, ROWS):
        matrix, row, column, offset, inside = _strip(rows, columns, down, across, first, ROWS)
        code = tl.load(codes + offset, mask=inside, other=0).to(tl.int32)
        place = (matrix.to(tl.int64) * scales_down + row // HEIGHT) * scales_across + column // WIDTH
        byte = tl.load(scales + place, mask=inside, other=0).to(tl.int32)
        word = _decode(code, byte, FRACTION, OFFSET)
        tl.store(out + offset, word.to(out.dtype.element_ty), mask=inside)
