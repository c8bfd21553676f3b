"""Tensors read in pieces: bands of 128 rows, their exact values, and workers that share them out.

A tensor is seen as a matrix: its last dimension gives the columns, all others the rows. A band is 128
rows, the height of a scale's block, so that it has a meaning of its own in every layout. Reads go into
buffers that each worker keeps: memory does not grow with the model, and no page is touched first
twice. What is slow (reading, arithmetic, hashing) runs without the interpreter's lock.
"""

from __future__ import annotations

import math
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ottava.checkpoint.layouts import SMALL_BLOCK, Weight, has_nan, in_known_blocks, powers
from ottava.checkpoint.safetensors import DTYPES, Entry, cut_short
from ottava.errors import CheckpointError, from_os_error
from ottava.fp8 import fp4
from ottava.fp8.codec import dequantise
from ottava.fp8.spec import BIAS, BLOCK

UNIT = 4 << 20
"""Bytes of source that a worker takes at once. Measured: smaller units cost calls, larger ones leave the caches."""

LARGEST = 32 << 20
"""Bytes of source that are ever read at once. A band beyond that is read in pieces."""

FLOATS = (torch.bfloat16, torch.float32, torch.float64)
"""The types in which exact values are spelled, narrow to wide. Other types are left as they are."""

T = TypeVar("T")


@dataclass(frozen=True)
class Band:
    """Rows first..last (at most 128) of a weight seen as a matrix."""

    weight: Weight
    index: int
    first: int
    last: int


@dataclass(frozen=True)
class Unit:
    """Whole bands of one weight, rows first..last: about UNIT bytes, or one band that is larger."""

    weight: Weight
    first: int
    last: int

    @property
    def nbytes(self) -> int:
        """Bytes of source that hold the codes or values (scales come on top)."""
        return (self.last - self.first) * row_bytes(self.weight.data)

    def complete(self, count: int) -> bool:
        """Whether `count` units are all that the weight has."""
        return count == max(-(-matrix(self.weight.shape)[0] // unit_rows(self.weight)), 1)


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of a tensor seen as a matrix: all dimensions but the last, and the last."""
    return (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)


def row_bytes(entry: Entry) -> int:
    """The size of one row."""
    return matrix(entry.shape)[1] * DTYPES[entry.dtype].itemsize


def bands(weight: Weight) -> Iterator[Band]:
    """A weight's bands in order; none where it has no elements."""
    rows, columns = matrix(weight.shape)
    for index, first in enumerate(range(0, rows if columns else 0, BLOCK)):
        yield Band(weight, index, first, min(first + BLOCK, rows))


def units(weight: Weight) -> Iterator[Unit]:
    """A weight's units in order; one that is empty where the weight has no elements."""
    rows, columns = matrix(weight.shape)
    if rows * columns == 0:
        yield Unit(weight, 0, 0)
        return
    step = unit_rows(weight)
    for first in range(0, rows, step):
        yield Unit(weight, first, min(first + step, rows))


def unit_rows(weight: Weight) -> int:
    """Rows of a unit, whole bands."""
    return max(UNIT // max(row_bytes(weight.data) * BLOCK, 1), 1) * BLOCK


def values(band: Band) -> Tensor:
    """The exact values of a band, [rows, columns], in the narrowest of BF16, F32 and F64 that holds them all.

    Integers and booleans come as they are. Never refuses a well-formed weight (see `digest`). Memory: the band.
    """
    with Reader() as reader:
        return narrow(exact_rows(reader, band.weight, band.first, band.last)).clone()


class Reader:
    """One worker's open files and reused buffers. Not shared between threads."""

    OPEN = 8
    SHAPES = 64

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}
        self._memory: dict[str, Tensor] = {}
        self._views: dict[str, dict[tuple[torch.dtype, int, int], tuple[Tensor, memoryview]]] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def buffer(self, slot: str, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
        """Memory for a [rows, columns] tensor; what the slot held before is lost."""
        return self._view(slot, dtype, rows, columns)[0]

    def rows(self, entry: Entry, first: int, last: int, slot: str, part: slice | None = None) -> Tensor:
        """Rows first..last of a tensor in its own type. part: of a single row, only these columns."""
        columns, dtype = matrix(entry.shape)[1], DTYPES[entry.dtype]
        offset = first * columns
        if part is not None:
            offset, columns = offset + part.start, part.stop - part.start
        found, view = self._view(slot, dtype, last - first, columns)
        self._fill(entry, entry.start + offset * dtype.itemsize, view)
        return found

    def _view(self, slot: str, dtype: torch.dtype, rows: int, columns: int) -> tuple[Tensor, memoryview]:
        """A slot's memory as a tensor and as bytes. Most units of a model have one of a few shapes: views are kept."""
        known = self._views.setdefault(slot, {})
        key = dtype, rows, columns
        if key not in known:
            size = rows * columns * dtype.itemsize
            if len(known) >= self.SHAPES or (slot in self._memory and self._memory[slot].numel() < size):
                known.clear()
            if slot not in self._memory or self._memory[slot].numel() < size:
                self._memory[slot] = torch.empty(size, dtype=torch.uint8)
            memory = self._memory[slot][:size]
            known[key] = memory.view(dtype).view(rows, columns), memory.numpy().data
        return known[key]

    def _fill(self, entry: Entry, offset: int, view: memoryview) -> None:
        try:
            done = os.preadv(self._open(entry.path), [view], offset)
            while done < len(view):
                count = os.preadv(self._open(entry.path), [view[done:]], offset + done)
                if not count:
                    cut_short(entry)
                done += count
        except OSError as error:
            raise from_os_error(error, "reading a checkpoint") from error

    def _open(self, path: Path) -> int:
        if path not in self._files:
            if len(self._files) >= self.OPEN:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[path] = os.open(path, os.O_RDONLY)
        return self._files[path]


def exact_rows(reader: Reader, weight: Weight, first: int, last: int, part: slice | None = None) -> Tensor:
    """The exact values of rows first..last, [rows, columns], in a type that holds them.

    BF16, F32, F64, integers and booleans as they are stored, F16 as F32; FP8 and FP4 as BF16 where every scale is a
    power of two inside the BF16 window, else as F64. A NaN that arises is the positive quiet one. first is a multiple
    of 128 where there are scales, or of 32 in the band of `last`. part: see `Reader.rows`. The result lies in the
    reader's buffers.
    """
    if weight.scale is None:
        stored = reader.rows(weight.data, first, last, "data", part)
        if stored.dtype != torch.float16:
            return stored
        wide = stored.float()
        return wide.masked_fill_(wide.isnan(), math.nan)
    return scaled_rows(reader, weight, reader.rows(weight.data, first, last, "data"), first)


def read_scales(reader: Reader, weight: Weight, first: int, last: int) -> Tensor:
    """The scales of rows first..last as they are stored."""
    assert weight.scale is not None
    height = weight.block[0]
    return reader.rows(weight.scale, first // height, -(-last // height), "scales")


def scaled_rows(reader: Reader, weight: Weight, codes: Tensor, first: int) -> Tensor:
    """The exact values of codes that stand in rows from `first` on: BF16 where it holds all of them, else F64."""
    rows, columns = len(codes), weight.shape[-1]
    scales = read_scales(reader, weight, first, first + rows)
    stored, good = powers(scales)
    if bool(good.all()) and (weight.packed or not has_nan(codes)):
        if weight.packed:
            return fp4.dequantise(codes.view(torch.uint8), stored, torch.bfloat16)
        out = reader.buffer("values", torch.bfloat16, rows, columns)
        return dequantise(codes, **in_known_blocks(stored, weight.block, rows), dtype=torch.bfloat16, out=out)
    return _in_float64(weight, codes, scales)


def _in_float64(weight: Weight, codes: Tensor, scales: Tensor) -> Tensor:
    """Codes times any scales: 4 bits times at most 24, so the product is exact."""
    if scales.dtype in (torch.float32, torch.bfloat16):
        factors = scales.double()
    else:
        stored = scales.view(torch.uint8)
        factors = (stored.long() + (1023 - BIAS) << 52).view(torch.float64)
        factors[stored == 255] = math.nan
    if weight.packed:
        neutral = torch.full(scales.shape, BIAS, dtype=torch.uint8)
        plain = fp4.dequantise(codes.view(torch.uint8), neutral, torch.float32).double()
    else:
        plain = codes.double()
    height, width = weight.block
    spread = factors.repeat_interleave(height, 0)[: len(plain)].repeat_interleave(width, 1)[:, : plain.shape[1]]
    out = plain.mul_(spread)
    return out.masked_fill_(out.isnan(), math.nan)


def narrow(t: Tensor) -> Tensor:
    """The same values in the narrowest of BF16, F32 and F64 that holds them all; other types as they are."""
    return t.to(narrowest(t))


def narrowest(t: Tensor) -> torch.dtype:
    """The narrowest of BF16, F32 and F64 that holds all of t, bit for bit. With a NaN in it, t stays in its type."""
    if t.dtype not in FLOATS or t.dtype == torch.bfloat16 or bool(t.isnan().any()):
        return t.dtype
    if t.dtype == torch.float64:
        single = t.float()
        if not torch.equal(single.double().view(torch.int64), t.contiguous().view(torch.int64)):
            return torch.float64
        t = single
    return torch.float32 if bool((t.contiguous().view(torch.int32) & 0xFFFF).any()) else torch.bfloat16


def pieces(weight: Weight, first: int, last: int) -> list[tuple[int, int, slice | None]]:
    """Rows first..last, at most a band, as parts of at most LARGEST bytes for `exact_rows`, in order."""
    size = max(row_bytes(weight.data), 1)
    if weight.scale is not None and size > LARGEST // SMALL_BLOCK[0]:
        what = f"a quantised row of {size} bytes; at most {LARGEST // SMALL_BLOCK[0]} are read"
        raise CheckpointError(what, where=weight.data.where, tensor=weight.name)
    if size <= LARGEST:
        step = LARGEST // size
        if weight.scale is not None:
            step = step // SMALL_BLOCK[0] * SMALL_BLOCK[0]  # whole blocks, however small they are
        return [(row, min(row + step, last), None) for row in range(first, last, step)]
    columns, width = matrix(weight.shape)[1], LARGEST // DTYPES[weight.data.dtype].itemsize
    cuts = [slice(start, min(start + width, columns)) for start in range(0, columns, width)]
    return [(row, row + 1, cut) for row in range(first, last) for cut in cuts]


def shared_out(work: Callable[[Reader, Any], T], items: Iterable[Any], workers: int) -> Iterator[tuple[int, T]]:
    """(index, work(reader, item)) for every item, as they are done, by `workers` threads of one core each.

    Items are taken in order. The error raised is that of the first item that failed, whoever met one first.
    """
    source, taking, done = enumerate(items), threading.Lock(), queue.SimpleQueue[Any]()
    stop = threading.Event()

    def worker() -> None:
        torch.set_num_threads(1)
        index = -1
        try:
            with Reader() as reader:
                while not stop.is_set():
                    with taking:
                        index, item = next(source, (-1, None))
                    if index < 0:
                        break
                    done.put((index, work(reader, item), None))
            done.put(None)
        except BaseException as error:
            stop.set()
            done.put((index, None, error))
            done.put(None)

    before = torch.get_num_threads()
    threads = [threading.Thread(target=worker, daemon=True) for _ in range(max(workers, 1))]
    failures: dict[int, BaseException] = {}
    try:
        for thread in threads:
            thread.start()
        left = len(threads)
        while left:
            result = done.get()
            if result is None:
                left -= 1
            elif result[2] is not None:
                failures[result[0]] = result[2]
            else:
                yield result[0], result[1]
    finally:
        stop.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        torch.set_num_threads(before)
    if failures:
        raise failures[min(failures)]


def default_workers() -> int:
    """Threads that share the work: the cores that this process may use, from two to four."""
    return min(max(len(os.sched_getaffinity(0)), 2), 4)
