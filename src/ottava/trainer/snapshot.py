"""Every step's state, kept in a file that survives the death of its writer.

Two slots take turns: while one is written the other stays whole, and a slot counts only when its
commit word and digest agree with its bytes. The file is mapped memory: a killed process loses
nothing, because the pages belong to the system. Its blocks are reserved when it is made, so a full
disk is an error at the start and not a crash in mid-run. Loss of power is what checkpoints are for.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from ottava.artifact import replacing
from ottava.errors import CheckpointError, from_os_error

HEADER = struct.Struct("<8sqq32s32s16s8s")
MAGIC = b"OTTAVA03"
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
        """BLAKE3 over layout, step and payload: what snapshots, hand-offs and replays are compared by, every step."""
        return blake3(self.layout + struct.pack("<q", self.step)).update(self.payload).hexdigest()


class Writer:
    """Writes states of `size` bytes of one run (its id) into a two-slot file, one slot after the other."""

    def __init__(self, path: Path, size: int, run: str = ""):
        self.path, self._size, self._run = path, size, run
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

    def write(self, snapshot: Snapshot, value: str | None = None) -> str:
        """Keep a state; returns its digest (`value`, where it is known). Then no process's death can lose it."""
        value = snapshot.digest if value is None else value
        base = (snapshot.step % 2) * self._slot
        self._map[base : base + HEAD] = _head(snapshot, value, self._run, OPEN)
        self._map[base + HEAD : base + HEAD + self._size] = snapshot.payload
        self._map[base : base + HEAD] = _head(snapshot, value, self._run, COMMITTED)
        return value


def states(path: Path, run: str = "") -> list[Snapshot]:
    """The whole states of a run in a two-slot file, newest first; none where it is missing. Torn slots are passed over.

    Raises CheckpointError where a whole state is of another run.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    found = [found for base in (0, len(data) // 2) if (found := _slot(data, base)) is not None]
    for _, its_run in found:
        if its_run != run:
            raise CheckpointError("the state is of another run", where=path)
    return sorted((snapshot for snapshot, _ in found), key=lambda snapshot: -snapshot.step)


def steps(path: Path) -> list[int]:
    """The steps that a two-slot file says it holds, from its heads alone: their bytes may still prove torn."""
    found = []
    try:
        with path.open("rb") as file:
            half = path.stat().st_size // 2
            for base in (0, half):
                file.seek(base)
                head = file.read(HEADER.size)
                if len(head) == HEADER.size:
                    magic, step, _, _, _, _, commit = HEADER.unpack(head)
                    found += [step] if (magic, commit) == (MAGIC, COMMITTED) else []
    except OSError:
        pass
    return found


def save(path: Path, snapshot: Snapshot) -> None:
    """Write one state durably: flushed to disk, then renamed into place."""
    try:
        with replacing(path) as part, part.open("wb") as file:
            file.write(_head(snapshot, snapshot.digest, "", COMMITTED))
            file.write(snapshot.payload)
    except OSError as error:
        raise from_os_error(error, "writing a checkpoint of the run", path) from error


def load(path: Path, step: int | None = None, run: str = "") -> Snapshot:
    """Read what `save` wrote, or a run's state after `step` steps from a two-slot file.

    Raises CheckpointError where it is missing, torn, altered or of another run.
    """
    if path.suffix == ".snap":
        found = [snapshot for snapshot in states(path, run) if snapshot.step == step]
        if not found:
            raise CheckpointError(f"the file has no whole state of step {step}", where=path)
        return found[0]
    try:
        whole = _slot(path.read_bytes(), 0)
    except FileNotFoundError:
        raise CheckpointError("no such state file", where=path) from None
    if whole is None:
        raise CheckpointError("the state file is torn or was altered", where=path, fix="use an earlier one")
    return whole[0]


def _head(snapshot: Snapshot, value: str, run: str, commit: bytes) -> bytes:
    size, name = len(snapshot.payload), run.encode()
    assert len(name) <= 16, "a run's id is 16 characters at most"
    head = HEADER.pack(MAGIC, snapshot.step, size, snapshot.layout, bytes.fromhex(value), name, commit)
    return head.ljust(HEAD, b"\0")


def _slot(data: bytes, base: int) -> tuple[Snapshot, str] | None:
    """A whole state and its run's id; None where there is none."""
    if len(data) < base + HEAD:
        return None
    magic, step, size, layout, sha, name, commit = HEADER.unpack_from(data, base)
    if magic != MAGIC or commit != COMMITTED:
        return None
    payload = data[base + HEAD : base + HEAD + size]
    snapshot = Snapshot(step, layout, payload)
    if len(payload) != size or snapshot.digest != sha.hex():
        return None
    return snapshot, name.rstrip(b"\0").decode(errors="replace")
