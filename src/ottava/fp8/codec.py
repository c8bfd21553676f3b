"""Tensors to UE8M0-FP8 and back, exactly: by the C or Triton kernels where they fit, else by the torch reference.

All give the same bits, so nobody needs to know which one ran. `quantise` and `dequantise` are the
format; `project` is one after the other in w's own type, called on every weight in every training
step; `measure` says what quantising changed. Leading dimensions are always a batch of matrices.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ottava.errors import FormatError
from ottava.fp8 import kernels, reference
from ottava.fp8.reference import TYPE_NAMES, Errors
from ottava.fp8.spec import BLOCK, grid

__all__ = ["Errors", "dequantise", "measure", "project", "quantise", "quantise_measured"]


@torch.no_grad()
def quantise(w: Tensor, *, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Round to the nearest codes under the 464 rule (`spec.scale_byte`), ties to even, -0 kept.

    w: float32, bfloat16 or float16 [..., M, N]. Returns codes, float8_e4m3fn [..., M, N], and scales, uint8
    [..., ceil(M/128), ceil(N/128)]: E8M0 bytes in [10, 246]; both are `out` where it is given. Magnitudes
    above 464 * 2**119 become 448 * 2**119.
    Raises FormatError where w holds infinity or NaN (what `out` then holds is no result), or is no matrix.
    """
    rows, columns = reference.matrix(w)
    if w.dtype not in TYPE_NAMES:
        raise FormatError(f"{w.dtype} is none of bfloat16, float16 and float32")
    blocks = (*w.shape[:-2], *grid(rows, columns))
    if out is None:
        codes = torch.empty(w.shape, dtype=torch.float8_e4m3fn, device=w.device)
        scales = torch.empty(blocks, dtype=torch.uint8, device=w.device)
    else:
        codes, scales = out
        _expect("codes", codes, w.shape, torch.float8_e4m3fn)
        _expect("scales", scales, torch.Size(blocks), torch.uint8)
    if _by_kernel(codes) and kernels.fits(w, scales) and scales.is_contiguous() and not _shared(w, codes, scales):
        kernels.quantise(w if kernels.rows_of(w) else w.contiguous(), codes, scales)
        _written(codes, scales)
    else:
        for target, source in zip((codes, scales), _elsewhere(w).quantise(w), strict=True):
            target.copy_(source)
    return codes, scales


@torch.no_grad()
def quantise_measured(w: Tensor, *, out: tuple[Tensor, Tensor], values: Tensor) -> Errors:
    """`quantise` into out, and what `measure` says of it with the exact values (bfloat16) in `values`; one pass.

    Arguments, errors and bits are those of the two; none of the tensors may overlap another.
    """
    codes, scales = out
    plain = w.dtype in TYPE_NAMES and kernels.fits(w, codes, scales, values) and scales.is_contiguous()
    if kernels.levels() and plain and all(map(kernels.rows_of, (w, codes, values))):
        reference.matrix(w)
        errors = kernels.quantise_measured(w, codes, scales, values)
        _written(codes, scales, values)
        return errors
    quantise(w, out=out)
    return measure(w, codes, scales, out=values)


@torch.no_grad()
def dequantise(
    codes: Tensor,
    scales: Tensor,
    dtype: torch.dtype = torch.float32,
    *,
    block: tuple[int, int] = (BLOCK, BLOCK),
    out: Tensor | None = None,
) -> Tensor:
    """The exact values, [..., M, N] in `dtype` (float32, bfloat16 or float16), in `out` where it is given.

    codes: float8_e4m3fn [..., M, N]; scales: E8M0 bytes (uint8 or float8_e8m0fnu), one for each block of
    `block` rows and columns: (128, 128), (1, 32) or (32, 32).
    Raises FormatError where the shapes do not fit, for any other block, or where a scale lies outside the
    window in which every code is exact in `dtype`. NaN codes stay NaN.
    """
    reference.matrix(codes)
    reference.check_grid(codes, scales, block)
    if dtype not in TYPE_NAMES:
        raise FormatError(f"{dtype} is none of bfloat16, float16 and float32")
    if out is None:
        out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    _expect("out", out, codes.shape, dtype)
    if _by_kernel(out) and _readable(codes, scales) and not _shared(out, codes, scales):
        kernels.dequantise(_plain(codes), _bytes(scales), out, block=block)
        _written(out)
        return out
    return out.copy_(_elsewhere(codes).dequantise(codes, scales, dtype, block=block))


@torch.no_grad()
def project(w: Tensor, out: Tensor | None = None) -> Tensor:
    """w on the grid: the bits of dequantise(*quantise(w)), in w's own type.

    w: float32 or bfloat16 [..., M, N]. out: where to put the result; `out=w` rounds in place.
    Makes no autograd graph. Raises FormatError where w holds infinity or NaN (then nothing was written),
    or is no matrix.
    """
    if w.dtype not in (torch.float32, torch.bfloat16):
        raise FormatError(f"{w.dtype} cannot hold the grid", fix="convert to float32 or bfloat16 first")
    reference.matrix(w)
    if out is None:
        out = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    _expect("out", out, w.shape, w.dtype)
    if _shared(w, out) and not _same_place(w, out):
        return out.copy_(reference.project(w))
    if kernels.levels() and kernels.fits(w, out):
        for a, b in ((w, out), (w.mT, out.mT)):  # a block's transpose has the block's scale
            if kernels.rows_of(a) and kernels.rows_of(b):
                kernels.project(a.detach(), b.detach())
                _written(out)
                return out
    result: Tensor = _elsewhere(w).project(w, out)
    return result


@torch.no_grad()
def measure(w: Tensor, codes: Tensor, scales: Tensor, *, out: Tensor | None = None) -> Errors:
    """What was lost between w, finite, and the values of codes and scales (128x128 blocks).

    w: float32, bfloat16 or float16 [..., M, N]. out: a bfloat16 tensor of w's shape that receives the exact
    values. The sums have one order, so they are the same on every machine that keeps subnormal numbers; see
    `reference.measure`.
    Raises FormatError as `dequantise` does.
    """
    reference.matrix(w)
    if w.dtype not in TYPE_NAMES:
        raise FormatError(f"{w.dtype} is none of bfloat16, float16 and float32")
    if out is not None:
        _expect("out", out, w.shape, torch.bfloat16)
    written = () if out is None else (out,)
    if (
        (_by_kernel(out) if out is not None else bool(kernels.levels()))
        and kernels.fits(w)
        and _readable(codes, scales)
        and not any(_shared(out, w, codes, scales) for out in written)
    ):
        errors = kernels.measure(_plain(w), _plain(codes), _bytes(scales), out)
        _written(*written)
        return errors
    errors = reference.measure(w, codes, scales)
    if out is not None:
        out.copy_(reference.dequantise(codes, scales, torch.bfloat16))
    return errors


def _elsewhere(t: Tensor) -> ModuleType:
    """What does the work where the C kernels do not fit."""
    if t.device.type == "cpu":
        return reference
    triton = _triton()
    return triton if triton is not None and triton.supports(t) else reference


@cache
def _triton() -> ModuleType | None:
    try:
        from ottava.fp8 import triton
    except ImportError:
        return None
    return triton


def _expect(name: str, t: Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
    if t.shape != shape or t.dtype != dtype:
        raise FormatError(
            f"{name} of shape {tuple(t.shape)} and {t.dtype} where {tuple(shape)} and {dtype} are wanted",
            fix="give an `out` of that shape and type, or none",
        )


def _by_kernel(out: Tensor) -> bool:
    """Whether kernels can write into this tensor."""
    return bool(kernels.levels()) and kernels.fits(out) and kernels.rows_of(out) is not None


def _readable(codes: Tensor, scales: Tensor) -> bool:
    return kernels.fits(codes, scales) and scales.dtype in (torch.uint8, torch.float8_e8m0fnu)


def _plain(t: Tensor) -> Tensor:
    return t if kernels.rows_of(t) else t.contiguous()


def _bytes(scales: Tensor) -> Tensor:
    return scales.view(torch.uint8).contiguous()


def _shared(t: Tensor, *others: Tensor) -> bool:
    """Whether t may overlap another of these tensors: then the reference is right whatever the order of writes."""
    first, last = _span(t)
    return any(first < end and start < last for start, end in map(_span, others))


def _span(t: Tensor) -> tuple[int, int]:
    length = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + length * t.element_size()


def _same_place(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride()


def _written(*tensors: Tensor) -> None:
    """Tell autograd, which cannot see what C writes: a tensor saved for a backward pass must not change unnoticed."""
    for t in tensors:
        if not t.is_inference():
            torch.autograd.graph.increment_version(t)
