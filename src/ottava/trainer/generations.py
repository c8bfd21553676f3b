"""Durable states of a run under one root: made so that a kill leaves all or nothing, found by walking back.

A generation (its form is in `envelope`) is made in a scratch folder, flushed file by file, and gets its name last, by
one rename; it is never written again. So a kill at any moment leaves the generations that were there, and at most
one more. `newest` walks back to the last one that verifies; `prune` never leaves fewer than it is told to keep.

A scratch folder is guarded by a lock that dies with its writer, so that cleaning up never takes the work of a living
one, whichever epoch it is of. A flush that failed is never repeated on the same file, because systems forget
what they could not write: the next save starts in a fresh folder.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from ottava.artifact import MANIFEST, digest_of, fsync, require_room
from ottava.checkpoint import safetensors
from ottava.errors import CheckpointError, from_os_error
from ottava.trainer import envelope
from ottava.trainer.envelope import OTHER_RUN, UNKNOWN_VERSION, Generation, folder_name, load, peek, reject, verify

__all__ = ["Generation", "Rejected", "listed", "load", "newest", "peek", "prune", "seal", "sweep", "verify", "write"]

SCRATCH, TRASH, LOCK = ".tmp-", ".trash-", "lock"
SPARE = 1 << 20
"""Bytes of a disk that are left free for manifests and folders."""

NOT_OURS = {OTHER_RUN, UNKNOWN_VERSION, "symlink", "not a folder"}
"""Causes for which a folder is not removed, however old it is."""

At = Callable[[str], object]
"""Called with the name of each durable operation before it is done, so that a drill can die there."""

_NAME = re.compile(r"g-(\d{9,})-e(\d{5,})", re.ASCII)
_LEFT = re.compile(rf"({SCRATCH}|{TRASH})g-\d{{9,}}-e\d{{5,}}-[0-9a-f]{{8}}".replace(".", r"\."), re.ASCII)


@dataclass(frozen=True)
class Rejected:
    """A folder that was passed over. cause: as CheckpointError's, or "not usable"; what: one sentence."""

    path: Path
    step: int
    epoch: int
    cause: str
    what: str


def _nothing(_point: str) -> None:
    pass


# ---------------------------------------------------------------- making


def write(
    root: Path,
    files: Mapping[str, Mapping[str, Tensor]],
    *,
    step: int,
    run: str,
    epoch: int,
    state: str | None = None,
    extra: Mapping[str, Any] | None = None,
    at: At = _nothing,
) -> Generation:
    """Make a generation of CPU tensors. files: file name (may be nested) -> tensor's name -> tensor.

    run: the run's id; epoch: the writer's fencing number; state: the digest of the whole state; extra: JSON.
    The manifest's hashes are those of the tensors in memory, so what the disk made of them is checked against what
    was meant. at: called before "payload" and "fsync:payload" of every file, "manifest", "fsync:manifest",
    "fsync:folder", "rename" and "fsync:root"; what it raises before the rename ends the save without a trace, so a
    writer that has lost its lease can be stopped there.

    Raises ResourceError where the disk refuses or has no room, CheckpointError where the generation is there
    already or a file's name is not sound. Whatever is raised before the rename, nothing of it is left.
    """
    assert files, "a generation without files"
    for name in files:
        envelope.check_name(name, root)
    with _telling("writing a generation", root):
        destination = _destination(root, step, epoch)
        _check_room(root, files)
        with _scratch(root, destination.name) as scratch:
            folder = scratch / destination.name
            folder.mkdir()
            hashes = {}
            for name, tensors in files.items():
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                at("payload")
                safetensors.write(path, tensors.items(), safetensors.plan_of(tensors))
                at("fsync:payload")
                fsync(path)
                hashes[name] = _hash(tensors)
            manifest = _manifest(hashes, step=step, run=run, epoch=epoch, state=state, extra=extra)
            return _publish(scratch, folder, destination, manifest, at)


def seal(
    folder: Path,
    root: Path,
    *,
    step: int,
    run: str,
    epoch: int,
    state: str | None = None,
    extra: Mapping[str, Any] | None = None,
    at: At = _nothing,
) -> Generation:
    """Make a generation of a folder that another trainer has finished: any regular files, nested or not.

    The folder gets a manifest and moves to its name under `root`. After a kill it is where it was, whole, perhaps with
    the manifest in it, and can be sealed again; or it is the generation.

    Raises CheckpointError where it is empty, holds links or a manifest.json of its own, lies on another disk than
    `root`, or the generation is there already; ResourceError where the disk refuses.
    """
    with _telling("sealing a generation", folder):
        destination = _destination(root, step, epoch)
        _check_no_manifest(folder)
        names = sorted(envelope.walk(folder).keys() - {MANIFEST})
        if not names:
            reject(folder, "there is nothing in it", "missing file", fix="let the trainer write its checkpoint first")
        if folder.stat().st_dev != root.stat().st_dev:
            what = "the folder lies on another disk than the generations, so no rename can move it there"
            reject(folder, what, "other disk", fix=f"let the trainer write its checkpoints on the disk of {root}")
        hashes = {}
        for name in names:
            envelope.check_name(name, folder)
            at("fsync:payload")
            fsync(folder / name)
            hashes[name] = envelope.hash_file(folder / name)
        manifest = _manifest(hashes, step=step, run=run, epoch=epoch, state=state, extra=extra)
        with _scratch(root, destination.name) as scratch:
            return _publish(scratch, folder, destination, manifest, at)


def _destination(root: Path, step: int, epoch: int) -> Path:
    """The generation's path, in a root that is there. Raises CheckpointError where something has it already."""
    assert step >= 0 <= epoch, (step, epoch)
    if not root.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        fsync(root.parent)
    path = root / folder_name(step, epoch)
    if os.path.lexists(path):
        _taken(path)
    return path


def _taken(path: Path) -> NoReturn:
    fix = "start the group anew: it gets the next epoch, and with it another name"
    reject(path, "there is one of this step and epoch, and generations are never overwritten", "already there", fix)


def _check_no_manifest(folder: Path) -> None:
    """Raise CheckpointError where a folder has a manifest.json that is not what an earlier sealing left."""
    envelope.check_folder(folder)
    try:
        peek(folder)
    except CheckpointError as error:
        if error.cause not in ("missing manifest", "lying name"):
            what = f"the folder has a {MANIFEST} of its own, and that is what a generation's manifest is called"
            reject(folder / MANIFEST, what, "unsafe name", fix="let the trainer call that file otherwise")


def _manifest(files: Mapping[str, tuple[str, int]], *, extra: Mapping[str, Any] | None, **meta: Any) -> dict[str, Any]:
    data = {
        "version": envelope.VERSION,
        **meta,
        "created": round(time.time(), 3),
        "extra": dict(extra or {}),
        "files": {name: {"sha256": sha, "bytes": size} for name, (sha, size) in files.items()},
    }
    plain: dict[str, Any] = json.loads(json.dumps(data))  # what a reader will see: no tuples, all keys strings
    return {**plain, "digest": digest_of(plain)}


def _publish(scratch: Path, folder: Path, destination: Path, manifest: Mapping[str, Any], at: At) -> Generation:
    """Put the manifest into a folder whose files are on disk, and give the folder its name."""
    draft = scratch / MANIFEST
    at("manifest")
    draft.write_bytes(envelope.render(manifest))
    at("fsync:manifest")
    fsync(draft)
    os.replace(draft, folder / MANIFEST)
    at("fsync:folder")
    for parent, _, _ in os.walk(folder, onerror=_raise):
        fsync(Path(parent))
    at("rename")
    try:
        os.rename(folder, destination)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            _taken(destination)
        raise
    at("fsync:root")
    fsync(destination.parent)
    return Generation(destination, manifest)


def _raise(error: OSError) -> NoReturn:
    raise error


def _check_room(root: Path, files: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise ResourceError where the disk says that it has no room for these files."""
    need = SPARE + sum(_size(tensors) for tensors in files.values())
    fix = "free some space, keep fewer generations, or name another folder"
    require_room(root, need, "a generation", fix)


def _size(tensors: Mapping[str, Tensor]) -> int:
    head, _ = safetensors.head_of(safetensors.plan_of(tensors))
    return len(head) + sum(tensor.nbytes for tensor in tensors.values())


def _hash(tensors: Mapping[str, Tensor]) -> tuple[str, int]:
    """SHA-256 and size of the file that these tensors make."""
    head, offsets = safetensors.head_of(safetensors.plan_of(tensors))
    sha = hashlib.sha256(head)
    for name in sorted(offsets, key=lambda name: offsets[name]):
        sha.update(safetensors.raw(tensors[name]))
    return sha.hexdigest(), _size(tensors)


# ---------------------------------------------------------------- finding and removing


def listed(root: Path) -> list[tuple[int, int, Path]]:
    """(step, epoch, folder) of whatever is called as a generation is, the newest first. Nothing is verified."""
    found = [(int(m[1]), int(m[2]), root / name) for name in _names(root) if (m := _NAME.fullmatch(name))]
    return sorted(found, reverse=True)


def _names(root: Path) -> list[str]:
    with _telling("listing generations", root):
        try:
            return os.listdir(root)
        except FileNotFoundError:
            return []


def newest(
    root: Path, run: str, usable: Callable[[Generation], bool] = lambda _: True
) -> tuple[Generation | None, list[Rejected]]:
    """The newest generation that verifies and is usable, and the newer ones that were passed over, with reasons.

    usable: the caller's own test (is it older than the fault? has it a layout that can be loaded?). Where the newest
    is good, no other is opened. (None, []) means that there is none; None with rejected ones, that all are lost:
    not to be taken for a run that never saved.
    Raises CheckpointError where there are generations and all of them are of another run.
    """
    rejected = []
    for step, epoch, path in listed(root):
        try:
            generation = verify(path, run)
        except CheckpointError as error:
            rejected.append(_rejected(path, step, epoch, error))
            continue
        if usable(generation):
            return generation, rejected
        rejected.append(Rejected(path, step, epoch, "not usable", "it is sound, and the caller cannot use it"))
    if rejected and all(item.cause == OTHER_RUN for item in rejected):
        what = f"none of the {len(rejected)} generations here is of the run {run!r}; the newest: {rejected[0].what}"
        fix = "name this run's own folder, or use the recipe that these were made by"
        raise CheckpointError(what, where=root, fix=fix, cause=OTHER_RUN)
    return None, rejected


def _rejected(path: Path, step: int, epoch: int, error: CheckpointError) -> Rejected:
    where = "" if error.where in (None, str(path)) else f" ({error.where})"
    return Rejected(path, step, epoch, error.cause or "unreadable", error.what + where)


def prune(
    root: Path, run: str, keep: int = 3, pinned: frozenset[int] = frozenset(), at: At = _nothing
) -> tuple[list[Path], list[Rejected]]:
    """Remove what is older than the `keep` newest generations that verify; returns the removed, and the rejected.

    What stays, however old: generations of a step in `pinned`, of another run, or with a manifest of a version that is
    not known here. Where fewer than `keep` verify, nothing is removed. A folder is renamed before its files go (`at` is
    told "trash", then "remove"), so a kill leaves no half of a generation under its name. Several may prune at a time.
    What dead processes left unfinished goes too. Raises ResourceError where the disk refuses.
    """
    assert keep >= 1, keep
    sweep(root)
    old, rejected, verified = [], [], 0
    for step, epoch, path in listed(root):
        enough = verified >= keep
        try:
            its_run = peek(path).run if enough else verify(path, run).run
        except CheckpointError as error:
            if not enough:
                rejected.append(_rejected(path, step, epoch, error))
            if not enough or error.cause in NOT_OURS:
                continue
            its_run = run  # nobody's any more: it lies where this run's old generations lie
        verified += not enough
        if enough and its_run == run and step not in pinned:
            old.append(path)
    return [path for path in reversed(old) if _discard(path, at)], rejected  # the oldest first


def _discard(path: Path, at: At) -> bool:
    """Remove a generation. False where somebody else was faster."""
    trash = path.with_name(f"{TRASH}{path.name}-{secrets.token_hex(4)}")
    with _telling("removing an old generation", path):
        at("trash")
        try:
            os.rename(path, trash)
        except FileNotFoundError:
            return False
        fsync(path.parent)  # else a loss of power could leave the old name, and not all of the files
        at("remove")
        _remove(trash)
    return True


def sweep(root: Path) -> list[Path]:
    """Remove what was left by processes that died while they made or removed a generation; returns what went.

    Cheap: nothing is hashed. The scratch folder of a living writer, of whichever epoch, is locked and stays.
    """
    gone = []
    for path in (root / name for name in sorted(_names(root)) if _LEFT.fullmatch(name)):
        lock = None
        with suppress(OSError):  # not ours to remove, or another process is at it
            if path.name.startswith(SCRATCH):
                lock = _lock(path)
            if lock is not None or path.name.startswith(TRASH):
                _remove(path)
                gone.append(path)
        if lock is not None:
            os.close(lock)
    return gone


def _remove(folder: Path) -> None:
    with suppress(FileNotFoundError):  # another process is at it
        shutil.rmtree(folder)


@contextmanager
def _scratch(root: Path, name: str) -> Iterator[Path]:
    """A fresh folder for unfinished work, locked while the block runs; then it goes, with whatever is in it."""
    lock = None
    while lock is None:
        folder = root / f"{SCRATCH}{name}-{secrets.token_hex(4)}"
        folder.mkdir()
        try:
            lock = _lock(folder)
        except FileNotFoundError:  # swept before it was locked
            continue
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                shutil.rmtree(folder, ignore_errors=True)
                raise
            lock = os.open(folder, os.O_RDONLY)  # no locks on this disk: whoever sweeps cannot take it either
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds a scratch folder's lock, or None where a living process has it.

    The lock is on a file in it, as NFS locks no folders, and goes with the process, however that ends.
    """
    path = folder / LOCK
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError | FileNotFoundError):
            return None
        raise
    os.close(descriptor)
    return None


@contextmanager
def _telling(doing: str, where: Path) -> Iterator[None]:
    """Turn what the system refuses into an error that says how to mend it."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(where)
        raise from_os_error(error, doing) from error
