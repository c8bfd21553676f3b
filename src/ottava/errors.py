"""The error tree: every failure says what happened, where, and how to mend it.

Only `OttavaError` subclasses may cross a public boundary; the command line turns each into one
message and an exit code. Anything else that escapes is an internal fault (exit 3).

    OttavaError             exit 2: a user's mistake or a broken environment; nothing was written
    +- RecipeError          a recipe or fleet file: key, type, value
    +- DataError            a dataset, a problem file, an audit that failed its bound
    +- ArtifactError        a stage's folder is missing, torn or altered
    +- CheckpointError      a model folder or a safetensors file
    +- FormatError          values that have no UE8M0-FP8 form (inf, NaN)
    +- PlatformError        a device, a library or a pool that is not there, or a worker that died
    |  +- LauncherGone      the process that starts workers is gone: it says nothing about any pool
    |  +- PoolMissing       a pool's chips are not there, or not free: it says nothing about the others
    +- ResourceError        disk full, port in use, no memory
    +- Busy                 another process holds this run
    Verdict                 exit 1: the command worked and its answer is no
    TrainingFailed          exit 1: no pool is left, or the same fault came back
"""

from __future__ import annotations

import errno
from pathlib import Path


class OttavaError(Exception):
    """A failure the user can act on.

    what: what happened; where: `file:line:column`, a path or a pool; fix: how to mend it.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str | Path | None = None, fix: str | None = None):
        self.what, self.where, self.fix = what, None if where is None else str(where), fix
        super().__init__(self.render())

    def render(self) -> str:
        """The message as printed: one line each for what, where and how to mend."""
        lines = [f"error: {self.what}"]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  mend:  {self.fix}")
        return "\n".join(lines)


class RecipeError(OttavaError):
    """A recipe or fleet file is wrong."""


class DataError(OttavaError):
    """A dataset is wrong or does not meet its certificate."""


class ArtifactError(OttavaError):
    """A stage's artifact is missing, torn or altered."""


class CheckpointError(OttavaError):
    """A model folder or safetensors file cannot be used.

    tensor: the published name of the one tensor at whose door the fault lies, where there is one;
    cause: the fault in two or three words ("truncated file", "missing shard", "lying header", ...).
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | Path | None = None,
        fix: str | None = None,
        tensor: str | None = None,
        cause: str | None = None,
    ):
        super().__init__(what, where=where, fix=fix)
        self.tensor, self.cause = tensor, cause


class FormatError(OttavaError):
    """A tensor has values with no UE8M0-FP8 form."""


class PlatformError(OttavaError):
    """A device, library or pool is not there, or a worker ended without an answer."""


class LauncherGone(PlatformError):
    """The process that starts workers is gone. It says nothing about any pool."""


class PoolMissing(PlatformError):
    """A pool's chips are not there, or not free. It says nothing about the other pools."""


class ResourceError(OttavaError):
    """The machine refused: disk full, port in use, no memory."""


class Busy(OttavaError):
    """Another process holds this run's folder."""


class Verdict(OttavaError):
    """The command worked and the answer is no."""

    exit_code = 1


class TrainingFailed(Verdict):
    """The run cannot go on: no pool is left, or the same deterministic fault came back."""


def check_folder(folder: Path) -> None:
    """Raise CheckpointError where `folder` is none: it is not there, or it is a file."""
    if not folder.is_dir():
        what = "this is a file, and a model folder is wanted" if folder.exists() else "no such folder"
        raise CheckpointError(what, where=folder, fix="check the path, or name another folder", cause="missing file")


def check_file(path: Path) -> None:
    """Raise DataError where `path` is no file that could be read."""
    if not path.is_file():
        what = "this is a folder, and a file is wanted" if path.is_dir() else "no such file"
        raise DataError(what, where=path, fix="check the path, or name another file")


def from_os_error(error: OSError, doing: str, place: str | Path | None = None) -> OttavaError:
    """Turn the operating system's refusal into an error that says how to mend it.

    place: where it was, for calls that the system does not know the file of.
    """
    where: str | Path | None = error.filename if isinstance(error.filename, str) else place
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(
            f"disk full while {doing}",
            where=where,
            fix="free some space or choose another place for the output, then run again",
        )
    if error.errno == errno.EADDRINUSE:
        return ResourceError(
            f"port in use while {doing}", where=where, fix="stop the other server or pass --port 0 to pick a free one"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ResourceError(f"not allowed while {doing}: {error.strerror}", where=where, fix="check the permissions")
    if error.errno == errno.ENOENT:
        return ResourceError(f"no such file while {doing}", where=where, fix="check the path")
    return ResourceError(f"{error.strerror or error} while {doing}", where=where)
