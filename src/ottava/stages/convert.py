"""Writes the master: the trained model as UE8M0-FP8, the one set of bits from which every layout is made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field

import ottava.recipe
from ottava.artifact import Artifact, write_json
from ottava.context import Context
from ottava.errors import CheckpointError, RecipeError

VERSION = "1"
INPUTS = ("?train",)


class Spec(ottava.recipe.Spec):
    """The convert section of a recipe."""

    source: Annotated[str | None, Field(description="a Hugging Face folder; without it, the trained model")] = None


def run(spec: Spec, inputs: Mapping[str, Artifact], ctx: Context) -> Artifact:
    """Convert the source to model/ and conversion.json."""
    source = find_source(spec, inputs)
    ctx.progress(0.0, f"writing the master of {source.name}")
    args = {"source": str(source), "out": str(ctx.out / "model")}
    report = ctx.call("ottava.checkpoint.convert:convert", args)[0]
    write_json(ctx.out / "conversion.json", report)
    ctx.progress(1.0, f"{report['label']}, {report['bytes'] / 1e6:.1f} MB")
    return ctx.commit({key: report[key] for key in ("digest", "on_grid", "label", "sqnr_db", "bytes")})


def find_source(spec: Spec, inputs: Mapping[str, Artifact]) -> Path:
    """The folder to convert. Raises RecipeError where neither a source nor a trained model is there."""
    if spec.source is not None:
        folder = Path(spec.source).expanduser()
        if not folder.is_dir():
            raise CheckpointError("no such folder", where=folder, fix="set convert.source to a Hugging Face folder")
        return folder
    if "train" not in inputs:
        raise RecipeError("no model to convert", where="convert", fix="add a train stage, or set convert.source")
    return inputs["train"].file("model")
