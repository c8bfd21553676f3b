"""How one unit of a source becomes bytes of the new folder: a converter's inner loop, for one worker.

Weights that are already codes with powers of two keep their codes wherever the layout can hold them; all
other linear weights go through the one rule. Whatever was done, the values that were written are
known exactly, and are hashed while they are still in the cache.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import NamedTuple

import torch
from blake3 import blake3
from torch import Tensor

from ottava.checkpoint.digest import band_hashes, unit_hashes
from ottava.checkpoint.layouts import (
    NEEDS_MASTER,
    Weight,
    collapsed,
    in_known_blocks,
    nan_code,
    not_exact,
    powers,
    repeated,
)
from ottava.checkpoint.names import Storage
from ottava.checkpoint.safetensors import DTYPES, NAMES, raw
from ottava.checkpoint.stream import FLOATS, LARGEST, Reader, Unit, narrow, pieces, read_scales, scaled_rows
from ottava.errors import CheckpointError, FormatError, from_os_error
from ottava.fp8 import fp4
from ottava.fp8.codec import measure, quantise_measured
from ottava.fp8.spec import BIAS, BLOCK, grid

WIDEST = 1 << 17
"""Columns of a linear weight: a band of 128 rows is in memory whole."""

SMALL = 2.0**-40
"""Above this norm, values whose squares are no normal float32 (2**-63 and less) do not count."""


class Place(NamedTuple):
    """Where a tensor of the new folder lies."""

    file: int
    offset: int


@dataclass(frozen=True)
class Task:
    """One weight to write. places: of the tensors that spell it, the codes or values first, then their scales."""

    weight: Weight
    storage: Storage
    layout: str
    places: tuple[Place, ...]
    dtype: str
    overlay: Weight | None = None
    may_round: bool = True
    allow_lossy: bool = False


class Done(NamedTuple):
    """What came of a unit. changed: elements that are not the source's; hashes: of its bands, joined."""

    changed: int
    signal: float
    noise: float
    hashes: bytes


class _Spelled(NamedTuple):
    """A linear weight's rows: codes and bytes of 128x128 (or 1x32) blocks, or none; exact values; errors."""

    codes: Tensor | None
    scales: Tensor | None
    values: Tensor
    changed: int = 0
    signal: float = 0.0
    noise: float = 0.0


def convert_unit(reader: Reader, task: Task, unit: Unit) -> Done:
    """Read a unit, spell it as the task's layout does, write it in place. Raises CheckpointError, FormatError."""
    try:
        if task.storage != "fp8":
            return _keep(reader, task, unit)
        if task.weight.scale is None:
            return _write(task, unit, _round(reader, task, unit, _source_rows(reader, task.weight, unit)))
        whole = _as_it_is(reader, task, unit)
        if whole is not None:
            return _write(task, unit, whole)
        done = [_band(reader, task, band) for band in _bands(unit)]
        signal, noise = sum(item.signal for item in done), sum(item.noise for item in done)
        return Done(sum(item.changed for item in done), signal, noise, b"".join(item.hashes for item in done))
    except FormatError as error:
        if error.where is not None:
            raise
        raise FormatError(error.what, where=task.weight.data.where, fix=error.fix) from None


def _bands(unit: Unit) -> list[Unit]:
    rows = range(unit.first, unit.last, BLOCK)
    return [Unit(unit.weight, first, min(first + BLOCK, unit.last)) for first in rows]


def _source_rows(reader: Reader, weight: Weight, unit: Unit) -> Tensor:
    return reader.rows(weight.data, unit.first, unit.last, "data")


def _band(reader: Reader, task: Task, unit: Unit) -> Done:
    """A band of a weight that has scales: its codes where the layout can hold them, else its values rounded."""
    spelled = _as_it_is(reader, task, unit)
    if spelled is None:
        exact = narrow(scaled_rows(reader, task.weight, _source_rows(reader, task.weight, unit), unit.first))
        if task.layout == "bf16" and exact.dtype == torch.bfloat16 and task.overlay is None:
            spelled = _Spelled(None, None, exact, *_no_error(exact))
        else:
            spelled = _round(reader, task, unit, exact)
    return _write(task, unit, spelled)


def _as_it_is(reader: Reader, task: Task, unit: Unit) -> _Spelled | None:
    """A unit of codes with powers of two, where the layout can say the same; None where it cannot, or may not."""
    weight = task.weight
    if task.overlay is not None:
        return None
    stored, good = powers(read_scales(reader, weight, unit.first, unit.last))
    if not bool(good.all()):
        return None
    rows, columns = unit.last - unit.first, weight.shape[1]
    groups = in_known_blocks(stored, weight.block, rows)["scales"] if weight.block != (BLOCK, BLOCK) else None
    blocks = None if weight.packed else collapsed(stored, weight.block, rows, columns)
    if task.layout == "mxfp8":
        scales = groups if blocks is None or groups is not None else repeated(blocks, rows, columns)
    else:
        scales = blocks
    if scales is None and task.layout != "bf16":
        return None
    codes = _source_rows(reader, weight, unit)
    values = scaled_rows(reader, weight, codes, unit.first)
    if values.dtype != torch.bfloat16:
        raise nan_code(weight)  # every scale is a power of two
    if weight.packed:
        codes = fp4.dequantise(codes, torch.full_like(stored, BIAS), torch.float32).to(torch.float8_e4m3fn)
    return _Spelled(codes, scales, values, *_no_error(values))


def _no_error(values: Tensor) -> tuple[int, float, float]:
    """Nothing changed; what is written is all signal."""
    norm = float(torch.linalg.vector_norm(values, dtype=torch.float32))
    if not SMALL < norm < math.inf:  # squares that float32 may have lost; elsewhere float64 only takes twice as long
        norm = float(torch.linalg.vector_norm(values, dtype=torch.float64))
    return 0, norm**2, 0.0


def _round(reader: Reader, task: Task, unit: Unit, source: Tensor) -> _Spelled:
    """Quantise the source's values, or take the overlay's, and measure what that changed."""
    rows, columns = source.shape
    narrowed = source.float() if source.dtype == torch.float64 else source
    codes = reader.buffer("codes", torch.float8_e4m3fn, rows, columns)
    scales = reader.buffer("bytes", torch.uint8, *grid(rows, columns))
    values = reader.buffer("rounded", torch.bfloat16, rows, columns)
    if task.overlay is None:
        changed, signal, noise = quantise_measured(narrowed, out=(codes, scales), values=values)
    else:
        laid = reader.rows(task.overlay.data, unit.first, unit.last, "overlay")
        if quantise_measured(laid, out=(codes, scales), values=values).changed:
            what = "the overlay's values do not lie on the grid"
            raise FormatError(what, where=task.overlay.data.where, fix="write them as a rounding onto the grid does")
        changed, signal, noise = measure(narrowed, codes, scales)
    if source.dtype == torch.float64:
        changed += int((narrowed.double() != source).sum())
    if changed:
        _may_round(reader, task, unit)
    spelled = repeated(scales, rows, columns) if task.layout == "mxfp8" else scales
    return _Spelled(codes, spelled, values, changed, signal, noise)


def _may_round(reader: Reader, task: Task, unit: Unit) -> None:
    """Refuse where rounding was not asked for, or the source has been rounded once already."""
    weight = task.weight
    if weight.scale is not None and not task.allow_lossy:
        if task.overlay is not None:
            what = "an overlay of a weight that was rounded once already"
            fix = f"{NEEDS_MASTER}, or add --allow-lossy"
            raise CheckpointError(what, where=weight.data.where, fix=fix, tensor=weight.name)
        scales = read_scales(reader, weight, unit.first, unit.last)
        _, good = powers(scales)
        if not bool(good.all()):
            raise not_exact(weight, scales, good, unit.first // weight.block[0])
        blocks = "x".join(map(str, weight.block))
        what = f"this weight in {blocks} blocks has values that no scale of a 128x128 block reaches"
        fix = f"{NEEDS_MASTER}, write --layout bf16, or add --allow-lossy"
        raise CheckpointError(what, where=weight.data.where, fix=fix, tensor=weight.name)
    if not task.may_round:
        what = "this weight does not lie on the grid"
        fix = "convert it: that rounds and says so"
        raise CheckpointError(what, where=weight.data.where, fix=fix, tensor=weight.name)


def _write(task: Task, unit: Unit, spelled: _Spelled) -> Done:
    """Put a linear weight's rows in place."""
    columns = task.weight.shape[1]
    if task.layout == "bf16":
        _pwrite(task.places[0], unit.first * columns * 2, spelled.values)
    else:
        assert spelled.codes is not None
        assert spelled.scales is not None
        scales, size = spelled.scales, 1
        if task.layout == "deepseek":
            scales, size = (scales.int() << 23).view(torch.float32), 4  # the byte is the exponent of a normal float32
        first = unit.first if task.layout == "mxfp8" else unit.first // BLOCK
        _pwrite(task.places[0], unit.first * columns, spelled.codes)
        _pwrite(task.places[1], first * scales.shape[1] * size, scales)
    return Done(spelled.changed, spelled.signal, spelled.noise, band_hashes(spelled.values))


def _keep(reader: Reader, task: Task, unit: Unit) -> Done:
    """Rows of a tensor that is no linear weight: as they are, but for floats that the master holds in BF16 or F32."""
    if unit.first == unit.last:
        return Done(0, 0.0, 0.0, b"")
    entry, dtype = task.weight.data, DTYPES[task.dtype]
    columns = 1 if not entry.shape else entry.shape[-1]
    large = unit.nbytes > LARGEST
    changed, hashes, hasher = 0, b"", blake3(NAMES[dtype].encode() + b"\n")
    for first, last, part in pieces(task.weight, unit.first, unit.last) if large else [(unit.first, unit.last, None)]:
        stored = reader.rows(entry, first, last, "data", part)
        kept, differ = _cast(task, stored, dtype)
        changed += differ
        offset = (first * columns + (part.start if part else 0)) * dtype.itemsize
        _pwrite(task.places[0], offset, kept)
        if not large:
            hashes = band_hashes(kept)
        elif dtype not in FLOATS[1:]:
            hasher.update(raw(kept))
    if large:  # wide types are narrowed by the band: they are the source's values, read once more
        hashes = unit_hashes(reader, unit) if dtype in FLOATS[1:] else hasher.digest()
    if changed and not task.may_round:
        what = "this tensor has values that BF16 does not"
        fix = "convert it: that rounds and says so"
        raise CheckpointError(what, where=entry.where, fix=fix, tensor=entry.name)
    return Done(changed, 0.0, 0.0, hashes)


def _cast(task: Task, stored: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """A tensor in the type that the master keeps it in, and whether that changed it."""
    if task.weight.data.dtype not in ("BF16", "F16", "F32") or task.dtype not in ("BF16", "F32"):
        return stored, 0
    kept = stored.to(dtype)
    if not finite(kept):
        raise _not_finite(task, stored, kept)
    if stored.dtype == dtype or dtype == torch.float32:
        return kept, 0
    return kept, int(not torch.equal(kept.float().view(torch.int32), stored.float().view(torch.int32)))


def _not_finite(task: Task, stored: Tensor, kept: Tensor) -> FormatError:
    """The error of the first value that is not finite in the type that a master keeps: what it is, and since when."""
    value = float(stored[kept.isfinite().logical_not()][0])
    if math.isfinite(value):
        largest = torch.finfo(kept.dtype).max
        what = f"{value:.6g} is too large for {task.dtype}, which ends at {largest:.6g}"
        fix = "find the step that it came from, or scale the tensor down; a master keeps such tensors in BF16"
    else:
        what = f"{'NaN' if math.isnan(value) else 'infinity'} in a tensor that is kept as it is"
        fix = "fetch the model again, or find the step that it came from: no engine computes with it"
    return FormatError(what, where=task.weight.data.where, fix=fix)


def finite(t: Tensor) -> bool:
    """Whether BF16 or F32 values are all finite."""
    if t.dtype == torch.bfloat16:
        return not bool(((t.view(torch.int16).numpy() & 0x7F80) == 0x7F80).any())
    return bool(t.isfinite().all())


def _pwrite(place: Place, offset: int, tensor: Tensor) -> None:
    data, at = raw(tensor), place.offset + offset
    try:
        done = os.pwrite(place.file, data, at)
        while done < len(data):
            done += os.pwrite(place.file, data[done:], at + done)
    except OSError as error:
        raise from_os_error(error, "writing a checkpoint") from error
