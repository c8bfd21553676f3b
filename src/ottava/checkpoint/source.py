"""Where a model comes from that nobody here trained: a Hugging Face folder, or an installed Python package."""

from __future__ import annotations

import re
import shutil
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, computed_field, field_validator

from ottava import recipe
from ottava.artifact import digest_of
from ottava.checkpoint.names import COMPANIONS
from ottava.context import Context
from ottava.errors import CheckpointError

PACKAGE = "package:"
OF_ITS_WEIGHTS = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "provenance.json", "conversion.json"
)  # fmt: skip
"""Files of a model's folder that speak of its weights; the others go with every model that is trained from it."""


class Source(recipe.Spec):
    """A section that names a model to begin from."""

    source: Annotated[
        str | None,
        Field(
            description="a Hugging Face folder, or package:NAME for the GGUF file that an installed Python package "
            "carries; without it, the trained model"
        ),
    ] = None

    @field_validator("source")
    @classmethod
    def _named(cls, source: str | None) -> str | None:
        return None if source is None else written(source)

    @property
    def package(self) -> str | None:
        """The name of the package to unpack, if the source is one."""
        return None if self.source is None else package_of(self.source)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def package_version(self) -> str | None:
        """Part of the stage's key: another version of the package may be another model."""
        return None if self.package is None else _version(self.package)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def source_files(self) -> str | None:
        """Part of the stage's key: a digest of the names, sizes and times of the source folder's files."""
        return None if self.source is None or self.package is not None else _files(self.source)


def written(source: str) -> str:
    """A source as a recipe may write it. Raises ValueError."""
    if source.startswith(PACKAGE) and not re.fullmatch(r"package:\w[\w.-]*", source):
        raise ValueError("a model in a Python package is written package:NAME")
    return source


def package_of(source: str) -> str | None:
    """The name of the package that a source names; None where it is a folder."""
    return source.removeprefix(PACKAGE) if source.startswith(PACKAGE) else None


def content_of(source: str) -> str | None:
    """What tells a source from itself at another time: the package's version (None: not installed), or of a folder's
    files a digest of their names, sizes and times."""
    package = package_of(source)
    return _files(source) if package is None else _version(package)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _files(source: str) -> str:
    folder = Path(source).expanduser()
    files = [(path.relative_to(folder).as_posix(), path.stat()) for path in folder.rglob("*") if path.is_file()]
    return digest_of(sorted([name, found.st_size, found.st_mtime_ns] for name, found in files))


def folder_of(source: str, where: str) -> Path:
    """A source that is a folder. where: the key that names it. Raises CheckpointError where there is none."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        fix = f"set {where} to a Hugging Face folder, or to package:NAME"
        raise CheckpointError("no such folder", where=folder, fix=fix)
    return folder


def bring(source: str, model: Path, ctx: Context, where: str) -> str:
    """Copy or unpack a source into the new folder `model`; what it was, in words. where: the key that names it.
    Raises CheckpointError, PlatformError."""
    package = package_of(source)
    if package is not None:
        ctx.progress(0.0, f"unpacking the model in {package}")
        args: dict[str, Any] = {"package": package, "out": str(model)}
        return str(ctx.call("ottava.checkpoint.packaged:unpack", args)[0]["statement"])
    folder = folder_of(source, where)
    names = ["config.json", *COMPANIONS, *(path.name for path in folder.glob("*.safetensors*"))]
    model.mkdir()
    for name in names:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, model / name)
    return str(folder.resolve())
