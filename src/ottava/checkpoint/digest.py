"""One digest for one set of exact values, whatever the layout. Its definition:

1. A tensor is a matrix [R, C]: C is its last dimension, R the product of all others (a vector is [1, C],
   a number [1, 1]). FP8 and FP4 weights count as one tensor with their scales, under the weight's name;
   its values are code x scale. Of FP4, shape and values are those of the unpacked matrix.
2. A band is 128 rows, the last one what is left. A tensor without elements has no bands.
3. A band's values are spelled in the narrowest of BF16, F32 and F64 that holds all of them exactly, little
   endian, row by row; -0 and 0 differ. Integers and booleans are spelled as they are stored. BF16 stays what it
   is. A band with a NaN is not narrowed: F32 and F64 stay what they are, F16 becomes F32 with every NaN as
   7FC00000, FP8 and FP4 become F64 with every NaN as 7FF8000000000000.
4. band hash    = BLAKE3(type + "\\n" + spelled values), 32 bytes; the type as safetensors calls it ("BF16").
   tensor hash  = BLAKE3(canonical JSON [name, shape] + "\\n" + its band hashes in order), 32 bytes.
   model digest = BLAKE3(tensor hashes in order of name), in hex.
   Canonical JSON: no spaces, non-ASCII characters as they are, UTF-8. Names are ordered by code point.

Every scale is read, and nothing in a configuration is believed. The digest exists for every well-formed
checkpoint, also for FP8 whose scales are no powers of two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from blake3 import blake3
from torch import Tensor

from ottava.artifact import canonical
from ottava.checkpoint.layouts import Weight, weights
from ottava.checkpoint.safetensors import NAMES, raw
from ottava.checkpoint.stream import (
    FLOATS,
    LARGEST,
    Reader,
    Unit,
    exact_rows,
    narrow,
    narrowest,
    pieces,
    shared_out,
    units,
)
from ottava.fp8.spec import BLOCK

SIZE = 32
"""Bytes of a hash."""

Progress = Callable[[int, int], object]
"""Called now and then with the bytes that are done and the bytes in all."""


@dataclass(frozen=True)
class Digest:
    """The digest of one tensor. joined: its band hashes, one after the other."""

    name: str
    shape: tuple[int, ...]
    joined: bytes

    @property
    def bands(self) -> list[bytes]:
        """The hash of each band."""
        return [self.joined[at : at + SIZE] for at in range(0, len(self.joined), SIZE)]

    @cached_property
    def hash(self) -> bytes:
        """The tensor hash."""
        return blake3(canonical([self.name, list(self.shape)]) + b"\n" + self.joined).digest()

    @property
    def hex(self) -> str:
        """The tensor hash, in hex."""
        return self.hash.hex()


def digests(
    source: Path | Mapping[str, Weight], workers: int = 1, progress: Progress | None = None
) -> dict[str, Digest]:
    """The digest of every published weight of a folder, by name, sorted.

    source: a model folder or file, or what `weights` found in one. Memory: a few MiB for each worker, and 32 bytes
    for each band. Raises CheckpointError where the checkpoint is not well-formed.
    """
    found = weights(source) if isinstance(source, Path) else source
    total, done = sum(weight.data.end - weight.data.start for weight in found.values()), 0
    hashes: dict[str, dict[int, bytes]] = {name: {} for name in found}

    def work(reader: Reader, unit: Unit) -> tuple[Unit, bytes]:
        return unit, unit_hashes(reader, unit)

    jobs = (unit for weight in found.values() for unit in units(weight))
    for _, (unit, result) in shared_out(work, jobs, workers):
        hashes[unit.weight.name][unit.first] = result
        done += unit.nbytes
        if progress is not None:
            progress(done, total)
    joined = {name: b"".join(parts[first] for first in sorted(parts)) for name, parts in hashes.items()}
    return {name: Digest(name, found[name].shape, joined[name]) for name in found}


def model_digest(found: Iterable[Digest]) -> str:
    """The digest of a model, in hex, from those of its tensors."""
    return blake3(b"".join(item.hash for item in sorted(found, key=lambda item: item.name))).hexdigest()


def values_digest(folder: Path, workers: int = 1) -> str:
    """The digest of a model's exact values. Raises as `digests` does."""
    return model_digest(digests(folder, workers).values())


def unit_hashes(reader: Reader, unit: Unit) -> bytes:
    """The band hashes of a unit, one after the other."""
    if unit.nbytes <= LARGEST:
        return band_hashes(exact_rows(reader, unit.weight, unit.first, unit.last))
    parts = pieces(unit.weight, unit.first, unit.last)
    kinds = {narrowest(exact_rows(reader, unit.weight, *part)) for part in parts}
    kind = max(kinds, key=FLOATS.index) if len(kinds) > 1 else kinds.pop()
    hasher = blake3(NAMES[kind].encode() + b"\n")
    for part in parts:
        hasher.update(raw(exact_rows(reader, unit.weight, *part).to(kind)))
    return hasher.digest()


def band_hashes(rows: Tensor) -> bytes:
    """The hashes, one after the other, of the bands of exact values [rows, columns]."""
    if rows.dtype not in FLOATS[1:]:
        return _hashed(rows)
    return b"".join(_hashed(narrow(rows[first : first + BLOCK])) for first in range(0, len(rows), BLOCK))


def _hashed(rows: Tensor) -> bytes:
    head = NAMES[rows.dtype].encode() + b"\n"
    data = raw(rows)
    size = BLOCK * rows.shape[1] * rows.dtype.itemsize
    return b"".join(blake3(head).update(data[at : at + size]).digest() for at in range(0, len(data), size or 1))
