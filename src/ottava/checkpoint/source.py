"""Where a model comes from that nobody here trained: a Hugging Face folder, or an installed Python package."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path
from typing import Annotated

from pydantic import Field, computed_field, field_validator

from ottava import recipe
from ottava.artifact import digest_of
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
        if source is not None and source.startswith(PACKAGE) and not re.fullmatch(r"package:\w[\w.-]*", source):
            raise ValueError("a model in a Python package is written package:NAME")
        return source

    @property
    def package(self) -> str | None:
        """The name of the package to unpack, if the source is one."""
        return self.source.removeprefix(PACKAGE) if self.source and self.source.startswith(PACKAGE) else None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def package_version(self) -> str | None:
        """Part of the stage's key: another version of the package may be another model."""
        try:
            return None if self.package is None else metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def source_files(self) -> str | None:
        """Part of the stage's key: a digest of the names, sizes and times of the source folder's files."""
        if self.source is None or self.package is not None:
            return None
        folder = Path(self.source).expanduser()
        files = [(path.relative_to(folder).as_posix(), path.stat()) for path in folder.rglob("*") if path.is_file()]
        return digest_of(sorted([name, found.st_size, found.st_mtime_ns] for name, found in files))


def folder_of(source: str, where: str) -> Path:
    """A source that is a folder. where: the key that names it. Raises CheckpointError where there is none."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        fix = f"set {where} to a Hugging Face folder, or to package:NAME"
        raise CheckpointError("no such folder", where=folder, fix=fix)
    return folder
