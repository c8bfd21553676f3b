"""The folder that a conversion fills, OUT.part: locked, and good for going on after a kill.

It holds the new files at their full size and a log. A line of the log names a weight whose bytes are on
disk (they are flushed before the line is written), so a conversion that was killed, or lost its
machine, goes on with the next weight. The log's first line says what is being converted and to what;
if that is not the same task, everything starts anew. The log goes last: what is renamed to OUT is
byte for byte what an undisturbed conversion makes.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ottava.artifact import canonical
from ottava.errors import Busy, CheckpointError, ResourceError, from_os_error

LOG = "conversion.log"
SPARE = 16 << 20
"""Bytes left free for the small files."""


class Part:
    """An open OUT.part. done: records of the log, by weight. flush: False keeps no log, so that nothing is resumed."""

    def __init__(self, folder: Path, descriptor: int, flush: bool):
        self.folder, self._descriptor, self._flush = folder, descriptor, flush
        self.files: dict[str, int] = {}
        self.done: dict[str, dict[str, Any]] = {}
        self._log = -1

    def begin(self, task: Mapping[str, Any], files: Mapping[str, tuple[bytes, int]]) -> None:
        """Go on with `task` if that is what the log tells of, else start anew.

        files: name -> (head, size). They are there, in full size and with their heads, when this returns.
        Raises ResourceError, before anything is written, where the disk has no room for them.
        """
        first = canonical(task) + b"\n"
        if not self._resume(first, files):
            for path in self.folder.iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self._check_space(sum(size for _, size in files.values()))
        for name, (head, size) in files.items():
            descriptor = os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o666)
            self.files[name] = descriptor
            os.ftruncate(descriptor, size)
            os.pwrite(descriptor, head, 0)
        self._log = os.open(self.folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        if not self.done and os.fstat(self._log).st_size == 0:
            os.write(self._log, first)

    def record(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Flush all data, then tell of the weights that are done."""
        if not self._flush:
            return
        for descriptor in self.files.values():
            os.fdatasync(descriptor)
        os.write(self._log, b"".join(canonical(record) + b"\n" for record in records))
        os.fdatasync(self._log)

    def close(self) -> None:
        """Close the files; the lock goes with the last descriptor."""
        for descriptor in (*self.files.values(), self._log, self._descriptor):
            if descriptor >= 0:
                os.close(descriptor)
        self.files.clear()

    def publish(self, out: Path) -> None:
        """Flush everything, drop the log, and give the folder its name."""
        (self.folder / LOG).unlink()
        if self._flush:
            for path in (*self.folder.iterdir(), self.folder):
                _flush(path)
        os.replace(self.folder, out)
        if self._flush:
            _flush(out.parent)

    def _resume(self, first: bytes, files: Mapping[str, tuple[bytes, int]]) -> bool:
        try:
            lines = (self.folder / LOG).read_bytes().splitlines(keepends=True)
            sizes = {name: (self.folder / name).stat().st_size for name in files}
        except OSError:
            return False
        if not lines or lines[0] != first or any(sizes[name] != size for name, (_, size) in files.items()):
            return False
        good = len(lines[0])
        for line in lines[1:]:
            try:
                record = json.loads(line)
                self.done[record["name"]] = record
            except (ValueError, KeyError, TypeError):
                break
            if not line.endswith(b"\n"):
                del self.done[record["name"]]
                break
            good += len(line)
        os.truncate(self.folder / LOG, good)  # a kill may have torn the last line
        return True

    def _check_space(self, size: int) -> None:
        there = sum(path.stat().st_blocks * 512 for path in self.folder.iterdir())
        disk = os.statvfs(self.folder)
        free, need = disk.f_bavail * disk.f_frsize, size + SPARE - there
        if need > free:
            raise ResourceError(
                f"no space: the conversion needs {need:,} bytes more, and {free:,} are free",
                where=self.folder.parent,
                fix="free some space or choose another place for the output",
            )


@contextmanager
def part_of(out: Path, *, flush: bool = True) -> Iterator[Part]:
    """OUT.part, locked. It stays when this process is interrupted or killed, and vanishes when the work fails.

    Raises Busy where another process converts to the same place, CheckpointError where `out` is there already.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError("the output folder is not empty", where=out, fix="delete it or name another")
    folder = out.with_name(out.name + ".part")
    try:
        part = Part(folder, _locked(folder), flush)
    except OSError as error:
        raise from_os_error(error, f"writing {out.name}") from error
    try:
        yield part
        part.publish(out)
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise from_os_error(error, f"writing {out.name}") from error
        raise
    finally:
        part.close()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _locked(folder: Path) -> int:
    """A descriptor of the folder that holds its lock. A folder that is renamed or removed meanwhile is another one."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            what = "another conversion is writing this folder"
            raise Busy(what, where=folder, fix="wait until it is done, or name another output") from None
        if folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat()):
            return descriptor
        os.close(descriptor)
