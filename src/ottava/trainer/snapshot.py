"""Every step's state, kept in a file that survives the death of its writer.

Two slots take turns: while one is written the other stays whole, and a slot counts only when its
commit word and SHA-256 agree with its bytes. The file is mapped memory: a killed process loses
nothing, because the pages belong to the system. Its blocks are reserved when it is made, so a full
disk is an error at the start and not a crash in mid-run. Loss of power is what checkpoints are for.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from ottava.artifact import replacing
from ottava.errors import CheckpointError, from_os_error

HEADER = struct.Struct("<8sqq32s32s8s")
MAGIC = b"OTTAVA01"
COMMITTED, OPEN = b"COMMIT01", b"\0" * 8
HEAD = 128


@dataclass(frozen=True)
class Snapshot:
    """A whole state as bytes. layout: digest of the tensors' names, places and shapes."""

    step: int
    layout: bytes
    payload: bytes | memoryview

    @property
    def digest(self) -> str:
        """SHA-256 over layout, step and payload: what snapshots, hand-offs and replays are compared by."""
        sha = hashlib.sha256(self.layout)
        sha.update(struct.pack("<q", self.step))
        sha.update(self.payload)
        return sha.hexdigest()


class Writer:
    """Writes states of `size` bytes into a two-slot file, one slot after the other."""

    def __init__(self, path: Path, size: int):
        self._size = size
        self._slot = -(-(HEAD + size) // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                os.posix_fallocate(descriptor, 0, 2 * self._slot)
                self._map = mmap.mmap(descriptor, 2 * self._slot)
            finally:
                os.close(descriptor)
        except OSError as error:
            error.filename = str(path)
            raise from_os_error(error, "reserving space for the run's snapshots") from error

    def write(self, snapshot: Snapshot) -> str:
        """Keep a state; returns its digest. When this returns, the death of the process cannot lose it."""
        value = snapshot.digest
        base = (snapshot.step % 2) * self._slot
        self._map[base : base + HEAD] = _head(snapshot, value, OPEN)
        self._map[base + HEAD : base + HEAD + self._size] = snapshot.payload
        self._map[base : base + HEAD] = _head(snapshot, value, COMMITTED)
        return value


def read(path: Path) -> Snapshot | None:
    """The newest whole state in a file, or None. Torn slots are passed over."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    half = len(data) // 2 if path.suffix == ".snap" else len(data)
    found = [snapshot for base in (0, half) if (snapshot := _slot(data, base)) is not None]
    return max(found, key=lambda s: s.step, default=None)


def newest(folder: Path) -> Snapshot | None:
    """The newest whole state in a folder, among its snapshots (`*.snap`) and checkpoints (`*.state`)."""
    paths = [*folder.glob("*.snap"), *folder.glob("*.state")]
    found = [snapshot for path in paths if (snapshot := read(path)) is not None]
    return max(found, key=lambda snapshot: snapshot.step, default=None)


def save(path: Path, snapshot: Snapshot) -> None:
    """Write one state durably: flushed to disk, then renamed into place."""
    try:
        with replacing(path) as part, part.open("wb") as file:
            file.write(_head(snapshot, snapshot.digest, COMMITTED))
            file.write(snapshot.payload)
    except OSError as error:
        raise from_os_error(error, "writing a checkpoint of the run") from error


def load(path: Path) -> Snapshot:
    """Read what `save` wrote. Raises CheckpointError where it is missing, torn or altered."""
    try:
        snapshot = _slot(path.read_bytes(), 0)
    except FileNotFoundError:
        raise CheckpointError("no such state file", where=path) from None
    if snapshot is None:
        raise CheckpointError("the state file is torn or was altered", where=path, fix="use an earlier one")
    return snapshot


def _head(snapshot: Snapshot, value: str, commit: bytes) -> bytes:
    size = len(snapshot.payload)
    return HEADER.pack(MAGIC, snapshot.step, size, snapshot.layout, bytes.fromhex(value), commit).ljust(HEAD, b"\0")


def _slot(data: bytes, base: int) -> Snapshot | None:
    if len(data) < base + HEAD:
        return None
    magic, step, size, layout, sha, commit = HEADER.unpack_from(data, base)
    if magic != MAGIC or commit != COMMITTED:
        return None
    payload = data[base + HEAD : base + HEAD + size]
    snapshot = Snapshot(step, layout, payload)
    return snapshot if len(payload) == size and snapshot.digest == sha.hex() else None
