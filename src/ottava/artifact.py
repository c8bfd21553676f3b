"""Immutable folders with a manifest of digests and a content address.

A stage's result is either wholly there or not there at all: it is written in a scratch folder,
its files are flushed to disk, and one rename publishes it. The manifest holds the SHA-256 of every
file, so a torn or altered artifact is told from a good one, and the key (spec, inputs, version)
tells whether a stage has already been done.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ottava.errors import ArtifactError, Busy, ResourceError, from_os_error

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Artifact:
    """A published folder. digest: SHA-256 over its files' names, sizes and digests."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def stage(self) -> str:
        return str(self.manifest["stage"])

    @property
    def digest(self) -> str:
        return str(self.manifest["digest"])

    @property
    def summary(self) -> dict[str, Any]:
        """What the stage says of its result: small, JSON, shown in the report."""
        return dict(self.manifest["summary"])

    def file(self, name: str) -> Path:
        """The path of a file in the folder; ArtifactError where the manifest has none of that name."""
        if not any(n == name or n.startswith(name + "/") for n in self.manifest["files"]):
            raise ArtifactError(f"the {self.stage} artifact has no {name!r}", where=self.path)
        return self.path / name

    def json(self, name: str) -> Any:
        """A JSON file of the folder, read."""
        return json.loads(self.file(name).read_text())


def canonical(data: Any) -> bytes:
    """One byte string for one value: JSON with sorted keys and no spaces."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest_of(data: Any) -> str:
    """SHA-256 of the canonical form, in hex."""
    return hashlib.sha256(canonical(data)).hexdigest()


def require_room(folder: Path, need: int, what: str, fix: str, where: Path | None = None) -> None:
    """Raise ResourceError where the disk of `folder` has fewer than `need` bytes free. what: "a generation"; where: the
    folder that the error names, if it is another."""
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if disk.f_blocks and need > free:  # some file systems do not know their size and say 0
        told = f"no room for {what}: it needs {need:,} bytes, and {free:,} are free"
        raise ResourceError(told, where=where or folder, fix=fix)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, data: Any) -> None:
    """Write JSON so that the file is complete or not there at all."""
    with replacing(path) as part:
        part.write_text(json.dumps(data, indent=1) + "\n")


def make_folder(folder: Path) -> Path:
    """A folder that a command was told to work in, made if need be. Raises ResourceError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ResourceError("a file is where the folder would be", where=folder, fix="choose another --out") from None
    except OSError as error:
        raise from_os_error(error, "making the folder", folder) from error
    return folder


def hold(folder: Path, what: str, fix: str) -> int:
    """Make a folder if need be and lock it; the descriptor that holds the lock until it is closed.

    Raises Busy with these words where another process has the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise Busy(what, where=folder, fix=fix) from None
    return descriptor


@contextmanager
def held(folder: Path, what: str, fix: str) -> Iterator[None]:
    """`hold` a folder while the block runs."""
    descriptor = hold(folder, what, fix)
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write beside `path`; it is flushed and takes its place when the block ends, or is removed."""
    part = path.with_name(path.name + ".part")
    try:
        yield part
        fsync(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def commit(scratch: Path, destination: Path, **meta: Any) -> Artifact:
    """Publish `scratch` as `destination` with a manifest. meta: stage, key, version, inputs, spec, summary, ...

    Every file and both folders are flushed before the rename, so that what is named is on disk.
    """
    try:
        files = {
            path.relative_to(scratch).as_posix(): {"sha256": file_digest(path), "bytes": path.stat().st_size}
            for path in sorted(scratch.rglob("*"))
            if path.is_file() and path.name != MANIFEST
        }
        manifest = {**meta, "created": round(time.time(), 3), "digest": digest_of(files), "files": files}
        write_json(scratch / MANIFEST, manifest)
        for name in files:
            fsync(scratch / name)
        fsync(scratch)
        destination.parent.mkdir(parents=True, exist_ok=True)
        if destination.exists():
            shutil.rmtree(destination)
        os.rename(scratch, destination)
        fsync(destination.parent)
    except OSError as error:
        raise from_os_error(error, f"publishing {destination.name}", destination) from error
    return Artifact(destination, manifest)


def load(path: Path) -> Artifact:
    """Open an artifact and check every byte against its manifest. Raises ArtifactError."""
    fix = f"delete {path} and run again: the stage will be redone"
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = manifest["files"]
    except FileNotFoundError:
        raise ArtifactError("no manifest: this is not a complete artifact", where=path, fix=fix) from None
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
        raise ArtifactError("the manifest cannot be read", where=path / MANIFEST, fix=fix) from None
    if manifest.get("digest") != digest_of(files):
        raise ArtifactError("the manifest does not match its own digest", where=path / MANIFEST, fix=fix)
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            raise ArtifactError("a file of the artifact is missing", where=file, fix=fix)
        if file.stat().st_size != entry["bytes"] or file_digest(file) != entry["sha256"]:
            raise ArtifactError("a file of the artifact was altered since it was written", where=file, fix=fix)
    return Artifact(path, manifest)


def fsync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
