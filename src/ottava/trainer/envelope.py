"""What a durable state is on disk, and the test that it is complete and as it was written.

A **generation** is a folder g-STEP-eEPOCH: payload files and a manifest with the size and SHA-256 of each. Disks lose
and flip bits, and people move files: nothing is handed out of a folder in which not every byte is what the
manifest says, and the manifest answers for itself with a digest over all of it. This guards against faults and
mistakes, not against somebody who forges a manifest; the names in it are checked as a stranger's all the same.

The manifest is JSON, in exactly the bytes that `render` makes:
version; run (id); step; epoch; created (seconds since 1970); state (digest of the whole state, or null); extra (the
writer's own); files: name -> {sha256, bytes}; digest (SHA-256 of the canonical form of all the rest).
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from torch import Tensor

from ottava.artifact import MANIFEST, digest_of
from ottava.checkpoint import safetensors
from ottava.errors import CheckpointError

VERSION = 1
MANIFEST_LIMIT = 100_000_000
KEYS = {"version", "run", "step", "epoch", "created", "state", "extra", "files", "digest"}
OTHER_RUN, UNKNOWN_VERSION = "other run", "unknown version"


@dataclass(frozen=True)
class Generation:
    """A generation that was written or verified just now. manifest: as on disk."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def run(self) -> str:
        return str(self.manifest["run"])

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def epoch(self) -> int:
        return int(self.manifest["epoch"])

    @property
    def state(self) -> str | None:
        """The digest of the state that it holds, where its writer gave one."""
        return None if self.manifest["state"] is None else str(self.manifest["state"])

    @property
    def extra(self) -> dict[str, Any]:
        return dict(self.manifest["extra"])

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """Name -> {sha256, bytes}."""
        return dict(self.manifest["files"])


def folder_name(step: int, epoch: int) -> str:
    """What the generation of a step and an epoch is called."""
    return f"g-{step:09d}-e{epoch:05d}"


def render(manifest: Mapping[str, Any]) -> bytes:
    """The bytes of a manifest file."""
    return json.dumps(manifest, indent=1).encode() + b"\n"


def verify(folder: Path, run: str | None = None) -> Generation:
    """Read every byte of a generation and compare it with the manifest. run: the run it must be of, if any.

    Raises CheckpointError with a cause: those of `peek`, other run, unsafe name, symlink, not a regular file, missing
    file, extra file, truncated file, altered file, and unreadable where the disk does not give the bytes.
    """
    with _judging(folder):
        generation = peek(folder)
        if run is not None and generation.run != run:
            what = f"it is of the run {generation.run!r}, and {run!r} was asked for"
            reject(folder, what, OTHER_RUN, fix="name the folder of this run, or use the recipe that it was made by")
        for name in generation.files:
            check_name(name, folder)
        _check_files(folder, generation.files)
    return generation


def peek(folder: Path) -> Generation:
    """A generation by its manifest alone; its files are not looked at, so nothing of it may be loaded.

    Raises CheckpointError with a cause: missing folder, symlink, not a folder, missing manifest, not a regular file,
    altered manifest, unknown version, lying name, unreadable.
    """
    with _judging(folder):
        check_folder(folder)
        manifest = _read_manifest(folder)
    name = folder_name(manifest["step"], manifest["epoch"])
    if Path(os.path.abspath(folder)).name != name:
        reject(folder, f"its name lies: by its manifest it is {name}", "lying name")
    return Generation(folder, manifest)


def load(generation: Generation, name: str) -> dict[str, Tensor]:
    """The tensors of one safetensors file. They are hashed once more, as they are handed out.

    Raises CheckpointError where the file is none of the generation's, or what was read is not what was written.
    """
    path = generation.path / name
    if name not in generation.files:
        reject(path, "the generation has no such file", "missing file")
    found = safetensors.read_header(path)
    tensors = {tensor: safetensors.load(entry) for tensor, entry in found.items()}
    with _judging(path), path.open("rb") as file:
        sha = hashlib.sha256(file.read(min((entry.start for entry in found.values()), default=-1)))
    for tensor in tensors.values():  # in the order in which they lie, and without holes
        sha.update(safetensors.raw(tensor))
    if sha.hexdigest() != generation.files[name]["sha256"]:
        reject(path, "its bytes are not those that were written", "altered file")
    return tensors


def check_folder(folder: Path) -> None:
    """Raise CheckpointError unless this is a folder and no link to one."""
    try:
        mode = folder.lstat().st_mode
    except FileNotFoundError:
        reject(folder, "there is no such folder", "missing folder")
    if stat.S_ISLNK(mode):
        reject(folder, "a link stands in the place of a folder", "symlink")
    if not stat.S_ISDIR(mode):
        reject(folder, "it is no folder", "not a folder")


def check_name(name: str, where: Path) -> None:
    """Raise CheckpointError unless `name` is a plain relative path that a payload file may have."""
    plain = name == PurePosixPath(name).as_posix() and not name.startswith("/") and name.isprintable()
    if not plain or ".." in name.split("/") or name in (".", MANIFEST):
        reject(where, f"{name!r} is no sound name for a file of a generation", "unsafe name")


def walk(folder: Path) -> dict[str, int]:
    """The files under a folder by relative name, with their sizes. CheckpointError at links, pipes and the like."""
    found: dict[str, int] = {}
    waiting = [folder]
    while waiting:
        with os.scandir(waiting.pop()) as items:
            for item in items:
                path, status = Path(item.path), item.stat(follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    waiting.append(path)
                else:
                    _check_kind(path, status.st_mode)
                    found[path.relative_to(folder).as_posix()] = status.st_size
    return found


def hash_file(path: Path) -> tuple[str, int]:
    """SHA-256 and size of a regular file. What turns out to be a link or a pipe is not followed nor waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb", buffering=0) as file:
        _check_kind(path, os.fstat(descriptor).st_mode)
        return hashlib.file_digest(file, "sha256").hexdigest(), file.tell()


def reject(where: str | Path, what: str, cause: str, fix: str = "use an earlier generation") -> NoReturn:
    """Raise the CheckpointError that says why a generation is not used."""
    raise CheckpointError(f"no sound generation: {what}", where=where, fix=fix, cause=cause)


def _check_kind(path: Path, mode: int) -> None:
    if stat.S_ISLNK(mode):
        reject(path, "a link stands in the place of a file", "symlink")
    if not stat.S_ISREG(mode):
        reject(path, "this is no regular file", "not a regular file")


def _read_manifest(folder: Path) -> dict[str, Any]:
    """A folder's manifest: the very bytes that `render` makes, of the right types, its digest right."""
    path = folder / MANIFEST
    try:
        status = path.lstat()
    except FileNotFoundError:
        reject(folder, "it has no manifest: it was never finished", "missing manifest")
    _check_kind(path, status.st_mode)
    if status.st_size > MANIFEST_LIMIT:
        reject(path, f"the manifest has {status.st_size} bytes; the limit is 100 MB", "altered manifest")
    text = path.read_bytes()
    try:
        manifest = json.loads(text)
        if isinstance(manifest, dict) and type(manifest.get("version")) is int and manifest["version"] != VERSION:
            what = f"its manifest is of version {manifest['version']}; this program knows version {VERSION}"
            reject(path, what, UNKNOWN_VERSION, fix="use the program that wrote it")
        sound = _is_manifest(manifest) and render(manifest) == text
        sound = sound and digest_of({k: v for k, v in manifest.items() if k != "digest"}) == manifest["digest"]
    except (ValueError, RecursionError):  # no JSON, or characters that UTF-8 has no bytes for
        sound = False
    if not sound:
        reject(path, "the manifest is not as it was written", "altered manifest")
    return dict(manifest)


def _is_manifest(data: Any) -> bool:
    """Whether keys and types are those of a manifest."""
    if not isinstance(data, dict) or data.keys() != KEYS or not isinstance(data["files"], dict):
        return False
    items = data["files"].values()
    if not all(isinstance(item, dict) and item.keys() == {"sha256", "bytes"} for item in items):
        return False
    numbers = (data["step"], data["epoch"], *(item["bytes"] for item in items))
    texts = (data["run"], data["digest"], data["state"] or "", *(item["sha256"] for item in items))
    return (
        all(type(number) is int and number >= 0 for number in numbers)
        and all(isinstance(text, str) for text in texts)
        and isinstance(data["created"], int | float)
        and isinstance(data["extra"], dict)
    )


def _check_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    found = walk(folder)
    for name in sorted(files.keys() - found.keys()):
        reject(folder / name, "a file of the generation is missing", "missing file")
    for name in sorted(found.keys() - files.keys() - {MANIFEST}):
        reject(folder / name, "a file was added that is none of the generation's", "extra file")
    for name, entry in files.items():
        if found[name] < entry["bytes"]:
            what = f"the file has {found[name]} bytes and was written with {entry['bytes']}"
            reject(folder / name, what, "truncated file")
    for name, entry in files.items():
        if hash_file(folder / name) != (entry["sha256"], entry["bytes"]):
            reject(folder / name, "its bytes are not those that were written", "altered file")


@contextmanager
def _judging(path: Path) -> Iterator[None]:
    """What the system refuses to give is as good as lost: a CheckpointError too."""
    try:
        yield
    except FileNotFoundError as error:
        reject(error.filename or path, "it vanished while it was read", "missing file")
    except OSError as error:
        reject(error.filename or path, f"it cannot be read: {error.strerror}", "unreadable")
