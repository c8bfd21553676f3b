"""The folder that a conversion fills, OUT.part: locked, and good for going on after a kill.

It holds the new files at their full size and a log. A line of the log names a weight whose bytes are on
disk (they are flushed before the line is written), so a conversion that was killed, or lost its
machine, goes on with the next weight. The log's first line says what is being converted and to what;
if that is not the same task, everything starts anew. At every moment a log marks the folder as this
module's. When all is on disk the log gets another name, the folder becomes OUT, and the log goes: what
stays is byte for byte what an undisturbed conversion makes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from ottava.artifact import canonical, fsync, hold, require_room
from ottava.checkpoint.names import COMPANIONS
from ottava.checkpoint.safetensors import INDEX
from ottava.errors import CheckpointError, ResourceError, from_os_error

LOG = "conversion.log"
WHOLE = "conversion.whole.log"
"""The log's name once everything is on disk. In OUT it is what a kill just before the end left."""

SPARE = 16 << 20
"""Bytes left free for the small files."""

HASH_BYTES = 32

_PLAIN = (*COMPANIONS, INDEX, LOG, WHOLE, "config.json", "conversion.json", "rounding.json", "provenance.json")
OURS = rf"([^/]+\.safetensors|{'|'.join(map(re.escape, _PLAIN))})(\.part)?"
"""The names of the files that an unfinished folder may hold. A folder with others is somebody else's."""


class Record(NamedTuple):
    """A finished weight. changed, signal, noise: as in `spelling.Done`; hash: the tensor hash, in hex."""

    name: str
    hash: str
    changed: int
    signal: float
    noise: float

    @staticmethod
    def read(line: bytes) -> Record:
        """From a line of the log. ValueError: no JSON, as a kill leaves it; TypeError: JSON, but no record."""
        found = json.loads(line)
        if not isinstance(found, dict):
            raise TypeError("a record is a table")
        record = Record(**found)  # TypeError where keys are missing or unknown
        numbers = (record.changed, record.signal, record.noise)
        if not isinstance(record.name, str) or not all(isinstance(value, int | float) for value in numbers):
            raise TypeError("a record's values have other types")
        try:
            whole = len(bytes.fromhex(record.hash)) == HASH_BYTES
        except ValueError:
            whole = False
        if not whole:
            raise TypeError("a record's hash is none")
        return record


class Part:
    """An open OUT.part. done: records of the log, by weight; resumed: whether an earlier run left some.

    flush: False keeps no log, so that nothing is resumed.
    """

    def __init__(self, folder: Path, descriptor: int, flush: bool):
        self.folder, self._descriptor, self._flush = folder, descriptor, flush
        self.resumed = False
        self.files: dict[str, int] = {}
        self.done: dict[str, Record] = {}
        self._log = -1

    def begin(self, task: Mapping[str, Any], files: Mapping[str, tuple[bytes, int]]) -> None:
        """Go on with `task` if that is what the log tells of, else start anew.

        files: name -> (head, size). They are there, in full size and with their heads, when this returns.
        Raises ResourceError, before anything is written, where the disk has no room for them.
        """
        first = canonical(task) + b"\n"
        again = self._resume(first, files)
        self._log = os.open(self.folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        if not again:  # the log stays: it marks the folder as this module's
            for path in self.folder.iterdir():
                if path.name != LOG:
                    path.unlink()
            os.truncate(self._log, 0)
        self.resumed = bool(self.done)
        self._check_space(sum(size for _, size in files.values()))
        for name, (head, size) in files.items():
            descriptor = os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o666)
            self.files[name] = descriptor
            os.ftruncate(descriptor, size)
            os.pwrite(descriptor, head, 0)
        if not self.done and os.fstat(self._log).st_size == 0:
            os.write(self._log, first)

    def record(self, records: Iterable[Record]) -> None:
        """Flush all data, then tell of the weights that are done."""
        if not self._flush:
            return
        for descriptor in self.files.values():
            os.fdatasync(descriptor)
        os.write(self._log, b"".join(canonical(record._asdict()) + b"\n" for record in records))
        os.fdatasync(self._log)

    def close(self) -> None:
        """Close the files; the lock goes with the last descriptor."""
        for descriptor in (*self.files.values(), self._log, self._descriptor):
            if descriptor >= 0:
                os.close(descriptor)
        self.files.clear()

    def publish(self, out: Path) -> None:
        """Flush everything, give the folder its name, and drop the log."""
        if self._flush:
            for path in (*self.folder.iterdir(), self.folder):
                fsync(path)
        os.replace(self.folder / LOG, self.folder / WHOLE)
        os.replace(self.folder, out)
        (out / WHOLE).unlink()
        if self._flush:
            fsync(out)
            fsync(out.parent)

    def _resume(self, first: bytes, files: Mapping[str, tuple[bytes, int]]) -> bool:
        try:
            lines = (self.folder / LOG).read_bytes().splitlines(keepends=True)
            sizes = {name: (self.folder / name).stat().st_size for name in files}
        except OSError:
            return False
        if not lines or lines[0] != first or any(sizes[name] != size for name, (_, size) in files.items()):
            return False
        good, done = len(lines[0]), {}
        for line in lines[1:]:
            try:
                record = Record.read(line)
            except ValueError:
                break
            except TypeError:  # not this module's: nothing in such a log can be believed
                return False
            if not line.endswith(b"\n"):
                break
            done[record.name] = record
            good += len(line)
        os.truncate(self.folder / LOG, good)  # a kill may have torn the last line
        self.done = done
        return True

    def _check_space(self, size: int) -> None:
        there = sum(path.stat().st_blocks * 512 for path in self.folder.iterdir())
        fix = "free some space or choose another place for the output"
        require_room(self.folder, size + SPARE - there, "the conversion", fix, self.folder.parent)


@contextmanager
def part_of(out: Path, *, flush: bool = True) -> Iterator[Part]:
    """OUT.part, locked. It stays when this process is interrupted or killed, and vanishes when the work fails.

    Where the machine refuses (a full disk) it stays too if an earlier run's weights are in it: space can be made.
    Raises Busy where another process converts to the same place, CheckpointError where `out` is there already.
    """
    check_free(out)
    out = Path(os.path.abspath(out))
    folder = out.with_name(out.name + ".part")
    try:
        part = Part(folder, _locked(folder, _is_part), flush)
    except OSError as error:
        raise from_os_error(error, f"writing {out.name}") from error
    try:
        yield part
        part.publish(out)
    except Exception as error:
        told = from_os_error(error, f"writing {out.name}") if isinstance(error, OSError) else error
        if not (part.resumed and isinstance(told, ResourceError)):
            _remove(folder)
        if told is not error:
            raise told from error
        raise
    finally:
        part.close()


def check_free(out: Path) -> None:
    """Raise CheckpointError where `out` holds something already, or is no name that a folder can be given.

    The log that a kill left in a complete `out` goes on the way.
    """
    if out.is_symlink() or not Path(os.path.abspath(out)).name:
        raise CheckpointError("the output must be a folder of its own, no link", where=out, fix="name another")
    if out.exists() and not out.is_dir():
        raise CheckpointError("a file is where the output folder would be", where=out, fix="name another folder")
    if (out / WHOLE).is_file() and _is_part(out):
        (out / WHOLE).unlink(missing_ok=True)
    if out.exists() and any(out.iterdir()):
        raise CheckpointError("the output folder is not empty", where=out, fix="delete it or name another")


@contextmanager
def locked(folder: Path, names: str) -> Iterator[None]:
    """A folder that is made if need be and nobody else's meanwhile; left empty, it goes.

    names: a regular expression that all names in it must match; else CheckpointError: what is somebody else's is not
    written to. Raises Busy.
    """
    try:
        descriptor = _locked(folder, lambda there: all(re.fullmatch(names, path.name) for path in there.iterdir()))
    except OSError as error:
        raise from_os_error(error, f"writing {folder.name}") from error
    try:
        yield
    finally:
        with suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), folder.stat()):  # else it is gone, or another's by now
                folder.rmdir()
        os.close(descriptor)


def _is_part(folder: Path) -> bool:
    """Whether a folder is this module's: empty, or a log of its own and nothing but files with names that it gives."""
    names = [path.name for path in folder.iterdir() if path.is_file() and not path.is_symlink()]
    if len(names) < len(list(folder.iterdir())) or not all(re.fullmatch(OURS, name) for name in names):
        return False
    return not names or any(log in names and _first_line(folder / log) for log in (LOG, WHOLE))


def _remove(folder: Path) -> None:
    """Delete a folder of this module's, its log last: whatever a kill leaves can be known for what it is."""
    with suppress(OSError):
        for path in sorted(folder.iterdir(), key=lambda path: path.name in (LOG, WHOLE)):
            path.unlink()
        folder.rmdir()


def _first_line(log: Path) -> bool:
    """Whether a log begins as one of this module's does. A kill may have left it empty."""
    with log.open("rb") as file:
        line = file.readline(1 << 20)
    try:
        return not line or isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _locked(folder: Path, ours: Callable[[Path], bool]) -> int:
    """A descriptor of the folder that holds its lock. A folder that is renamed or removed meanwhile is another one."""
    while True:
        if folder.is_symlink() or (folder.exists() and not (folder.is_dir() and ours(folder))):
            what = "this is where unfinished work is kept, and something else is here"
            raise CheckpointError(what, where=folder, fix="move it away, or name another output")
        fix = "wait until it is done, or name another output"
        descriptor = hold(folder, "another conversion is writing this folder", fix)
        if folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat()):
            return descriptor
        os.close(descriptor)
