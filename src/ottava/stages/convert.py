"""Writes the master: the model as UE8M0-FP8, the one set of values that every layout spells.

The model is the one that was trained, a folder, or one that an installed Python package carries. The
last is unpacked into the artifact itself, as `source/`: it is the only copy in BF16 that there is, and
what divergence is measured against must be the very tensors that were converted.

    model/              the master, in the layout asked for
    conversion.json     what the conversion did and, under `source`, to what
    source/             the unpacked model, where it came from a package
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, computed_field, field_validator, model_validator

import ottava.recipe
from ottava.artifact import Artifact, digest_of, file_digest, write_json
from ottava.context import Context
from ottava.errors import CheckpointError, RecipeError

VERSION = "2"
INPUTS = ("?train",)

PACKAGE = "package:"


class Spec(ottava.recipe.Spec):
    """The convert section of a recipe."""

    source: Annotated[
        str | None,
        Field(
            description="a Hugging Face folder, or package:NAME for the GGUF file that an installed Python package "
            "carries; without it, the trained model"
        ),
    ] = None

    layout: Annotated[
        Literal["e8m0", "deepseek", "mxfp8", "bf16"],
        Field(description="how the values are written down; they are the same in every layout"),
    ] = "e8m0"
    rounding: Annotated[
        Literal["nearest", "gptq"],
        Field(description="nearest, or gptq: what a layer computes from calibration text decides between two codes"),
    ] = "nearest"
    calibration: Annotated[str | None, Field(description="a text file for gptq; without it, built-in texts")] = None

    @field_validator("source")
    @classmethod
    def _named(cls, source: str | None) -> str | None:
        if source is not None and source.startswith(PACKAGE) and not re.fullmatch(r"package:\w[\w.-]*", source):
            raise ValueError("a model in a Python package is written package:NAME")
        return source

    @model_validator(mode="after")
    def _calibrated(self) -> Spec:
        if self.calibration is not None and self.rounding != "gptq":
            raise ValueError("calibration is for rounding: gptq")
        if self.calibration is not None and not Path(self.calibration).expanduser().is_file():
            raise ValueError(f"calibration: no such file: {self.calibration}")
        return self

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

    @computed_field  # type: ignore[prop-decorator]
    @property
    def calibration_sha256(self) -> str | None:
        """Part of the stage's key: another text rounds otherwise."""
        return None if self.calibration is None else file_digest(Path(self.calibration).expanduser())


def run(spec: Spec, inputs: Mapping[str, Artifact], ctx: Context) -> Artifact:
    """Convert the source to model/ and conversion.json."""
    source, origin = _unpack(spec.package, ctx) if spec.package else _find(spec, inputs)
    ctx.progress(0.5 if spec.package else 0.0, f"writing the master of {spec.package or source.name}")
    report = _convert(spec, source, ctx) | {"source": origin}
    for folder in (ctx.out, ctx.out / "model"):  # the model's folder keeps its origin wherever it goes
        write_json(folder / "conversion.json", report)
    ctx.progress(1.0, f"{report['label']}, {report['bytes'] / 1e6:.1f} MB")
    summary = {key: report[key] for key in ("digest", "on_grid", "label", "layout", "rounding", "sqnr_db", "bytes")}
    return ctx.commit(summary | ({"source": origin["statement"]} if spec.package else {}))


def _convert(spec: Spec, source: Path, ctx: Context) -> dict[str, Any]:
    args: dict[str, Any] = {"source": str(source), "out": str(ctx.out / "model"), "layout": spec.layout}
    if spec.rounding == "nearest":
        return ctx.call("ottava.checkpoint.convert:convert", args)[0]
    text = {"text": str(Path(spec.calibration).expanduser())} if spec.calibration else {}
    return ctx.call("ottava.models.calibrate:convert_calibrated", args | text)[0]


def _find(spec: Spec, inputs: Mapping[str, Artifact]) -> tuple[Path, dict[str, Any]]:
    if spec.source is not None:
        folder = Path(spec.source).expanduser()
        if not folder.is_dir():
            raise CheckpointError(
                "no such folder", where=folder, fix="set convert.source to a Hugging Face folder, or to package:NAME"
            )
        return folder, {"kind": "folder", "folder": str(folder.resolve())}
    if "train" not in inputs:
        raise RecipeError("no model to convert", where="convert", fix="add a train stage, or set convert.source")
    return inputs["train"].file("model"), {"kind": "train", "artifact": inputs["train"].digest}


def _unpack(package: str, ctx: Context) -> tuple[Path, dict[str, Any]]:
    ctx.progress(0.0, f"unpacking the model in {package}")
    source = ctx.out / "source"
    args = {"package": package, "out": str(source)}
    provenance = ctx.call("ottava.checkpoint.packaged:unpack", args)[0]
    return source, {"kind": "package", "folder": source.name, **provenance}
