"""The C kernels: the codec's functions on CPU tensors, at the instruction set that this machine has.

The extension is optional and takes addresses, so everything is checked here: a wrong shape must be a
clear error and never a read outside a tensor. `fits` says whether the kernels can take a tensor at all;
what they cannot take (another device, a subclass, a lazy negation) is the reference's.
"""

from __future__ import annotations

import math
import os
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ottava.errors import FormatError, PlatformError
from ottava.fp8.reference import Errors, check_grid, check_window, matrix, not_finite
from ottava.fp8.spec import BLOCK, grid

extension: ModuleType | None
try:
    from ottava.fp8 import _kernels as extension  # type: ignore[attr-defined,no-redef,unused-ignore]
except ImportError:
    extension = None

LEVELS = ("portable", "avx2", "avx512")  # in the order of `enum isa`
_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_F8 = torch.float8_e4m3fn
_LARGE = 1 << 19  # elements from which more than one thread is worth waking

_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True  # the threads of the parent's OpenMP pool are not here, and libgomp would wait for them


os.register_at_fork(after_in_child=_after_fork)


def levels() -> tuple[str, ...]:
    """The instruction sets that can be asked for here, best first; () without the extension."""
    if extension is None or not hasattr(extension, "quantise"):
        return ()
    return LEVELS[extension.best() :: -1]


def threads_for(elements: int, least: int) -> int:
    """How many threads share work on so many elements: torch's, but one for fewer than `least` or in a forked child."""
    return 1 if _forked or elements < least else torch.get_num_threads()


def fits(*tensors: Tensor) -> bool:
    """Whether these are tensors whose bytes the kernels may read: plain, dense, on the CPU."""
    return all(
        type(t) in (Tensor, torch.nn.Parameter)
        and t.device.type == "cpu"
        and t.layout is torch.strided
        and not t.is_neg()
        for t in tensors
    )


class Rows(NamedTuple):
    """How C sees a tensor [..., M, N]: an address, and bytes from one matrix and one row to the next."""

    address: int
    matrix: int
    row: int


def rows_of(t: Tensor) -> Rows | None:
    """t as a batch of matrices whose rows are contiguous, or None where its strides do not allow that."""
    rows, columns = t.shape[-2:]
    try:
        t = t.view(-1, rows, columns)
    except RuntimeError:
        return None
    matrix, row, element = t.stride()
    if columns > 1 and element != 1:
        return None
    size = t.element_size()
    return Rows(t.data_ptr(), matrix * size, row * size)


def quantise(w: Tensor, codes: Tensor, scales: Tensor, *, level: str | None = None) -> None:
    """`reference.quantise` into codes and scales (uint8), which must not overlap w; the fastest level by default.

    One pass: each block is read once, from memory into cache. So an infinity or NaN may be found after
    other blocks were written; then FormatError is raised and codes and scales are NaN throughout.
    """
    kind = _kind(w)
    _check(codes, "codes", w.shape, (_F8,), writable=True)
    check_grid(codes, scales, (BLOCK, BLOCK))
    _contiguous_bytes(scales)
    size = _sizes(w)
    if not _call("quantise", level, size, kind, _rows(w), _rows(codes), scales.data_ptr()):
        raise _nothing_in(codes, scales)


def quantise_measured(
    w: Tensor, codes: Tensor, scales: Tensor, out: Tensor | None = None, *, level: str | None = None
) -> Errors:
    """`quantise` and then `measure` of the result, block by block while it is in the cache. Nothing may overlap."""
    kind = _kind(w)
    _check(codes, "codes", w.shape, (_F8,), writable=True)
    if out is not None:
        _check(out, "out", w.shape, (torch.bfloat16,), writable=True)
    check_grid(codes, scales, (BLOCK, BLOCK))
    _contiguous_bytes(scales)
    sums = torch.empty((scales.numel(), 3), dtype=torch.float64)
    target = Rows(0, 0, 0) if out is None else _rows(out)
    places = _rows(w), _rows(codes), scales.data_ptr(), target, sums.data_ptr()
    found = _call("quantise_measured", level, _sizes(w), kind, *places)
    if found is None:
        raise _nothing_in(codes, scales)
    return Errors(*found)


def dequantise(
    codes: Tensor, scales: Tensor, out: Tensor, *, block: tuple[int, int] = (BLOCK, BLOCK), level: str | None = None
) -> None:
    """`reference.dequantise` into out, whose type says which; nothing is written where FormatError is raised."""
    kind = _kind(out)
    _check(codes, "codes", codes.shape, (_F8,))
    _check(out, "out", codes.shape, tuple(_TYPES), writable=True)
    check_grid(codes, scales, block)
    _contiguous_bytes(scales)
    check_window(*_byte_range(scales), out.dtype)
    _call("dequantise", level, _sizes(codes), kind, _rows(codes), scales.data_ptr(), _rows(out), *block)


def project(w: Tensor, out: Tensor, *, level: str | None = None) -> None:
    """`reference.project` into out, which may be w itself (or not overlap it).

    Two passes, the first of which only reads: nothing is written where FormatError is raised.
    """
    kind = _kind(w)
    _check(out, "out", w.shape, (w.dtype,), writable=True)
    size = _sizes(w)
    scales = torch.empty((size[0], *grid(*size[1:])), dtype=torch.uint8)
    if kind == _TYPES[torch.float16]:
        raise FormatError(f"{w.dtype} cannot hold the grid", fix="convert to float32 or bfloat16 first")
    if not _call("project", level, size, kind, _rows(w), _rows(out), scales.data_ptr()):
        raise not_finite()


def measure(w: Tensor, codes: Tensor, scales: Tensor, out: Tensor | None = None, *, level: str | None = None) -> Errors:
    """`reference.measure`; the exact values go to out (bfloat16) in the same pass. Nothing may overlap out."""
    kind = _kind(w)
    _check(codes, "codes", w.shape, (_F8,))
    if out is not None:
        _check(out, "out", w.shape, (torch.bfloat16,), writable=True)
    check_grid(codes, scales, (BLOCK, BLOCK))
    _contiguous_bytes(scales)
    check_window(*_byte_range(scales), torch.float32 if out is None else torch.bfloat16)
    size = _sizes(w)
    sums = torch.empty((scales.numel(), 3), dtype=torch.float64)
    target = Rows(0, 0, 0) if out is None else _rows(out)
    found = _call("measure", level, size, kind, _rows(w), _rows(codes), scales.data_ptr(), target, sums.data_ptr())
    return Errors(*found)


def _call(name: str, level: str | None, size: tuple[int, int, int], *arguments: Any) -> Any:
    known = levels()
    level = level or (known[0] if known else "any instruction set")
    if level not in known:
        raise _no_level(level)
    threads = threads_for(math.prod(size), _LARGE)
    return getattr(extension, name)(LEVELS.index(level), threads, size, *arguments)


def _nothing_in(codes: Tensor, scales: Tensor) -> FormatError:
    """The error of an infinity or NaN; what was written before it was found is made NaN."""
    codes.view(torch.uint8).fill_(0x7F)
    scales.fill_(0xFF)
    return not_finite()


def _no_level(level: str) -> PlatformError:
    return PlatformError(f"no kernels for {level} here", fix=f"levels here: {', '.join(levels()) or 'none'}")


def _kind(t: Tensor) -> int:
    if t.dtype not in _TYPES:
        raise FormatError(f"{t.dtype} is none of bfloat16, float16 and float32")
    return _TYPES[t.dtype]


def _sizes(t: Tensor) -> tuple[int, int, int]:
    rows, columns = matrix(t)
    return t.numel() // (rows * columns), rows, columns


def _check(t: Tensor, name: str, shape: torch.Size, types: tuple[torch.dtype, ...], *, writable: bool = False) -> None:
    if t.shape != shape or t.dtype not in types:
        raise FormatError(f"{name} of shape {tuple(t.shape)} and {t.dtype} where {tuple(shape)} and {types} are wanted")
    if writable and any(stride == 0 and length > 1 for length, stride in zip(t.shape, t.stride(), strict=True)):
        raise FormatError(f"{name} has elements that share memory", fix="give a tensor of its own")


def _rows(t: Tensor) -> Rows:
    found = rows_of(t) if fits(t) else None
    if found is None:
        raise FormatError(
            f"kernels want plain CPU tensors with contiguous rows, not strides {t.stride()} on {t.device}",
            fix="use ottava.fp8.codec, which copies where it must",
        )
    return found


def _contiguous_bytes(scales: Tensor) -> None:
    if scales.dtype != torch.uint8 or not scales.is_contiguous() or not fits(scales):
        raise FormatError(
            f"scales of {scales.dtype}, strides {scales.stride()}: contiguous bytes on the CPU are wanted"
        )


def _byte_range(scales: Tensor) -> tuple[int, int]:
    if extension is None:
        raise _no_level("any instruction set")
    least, most = extension.byte_range(scales.data_ptr(), scales.numel())
    return least, most
