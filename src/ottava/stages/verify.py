"""Proof that what will be served is what was trained: the same values in every layout, the same answers.

Weights are compared by digests of exact values. Answers are compared one by one: the master, read
back from its bytes, must generate the very tokens that the trainer's own model did, on the same
pool. For a model that came from elsewhere, divergence from its source is measured instead: top-1
agreement and KL on a fixed text, the master against the very folder that was converted.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, computed_field, field_validator, model_validator

from ottava import recipe
from ottava.artifact import Artifact, file_digest, write_json
from ottava.context import Context
from ottava.errors import ArtifactError, CheckpointError

VERSION = "2"
INPUTS = ("convert", "?@model", "?@label")


class Spec(recipe.Spec):
    """The verify section of a recipe."""

    text: Annotated[str | None, Field(description="a text file to measure divergence from the source on")] = None
    max_kl: Annotated[
        float | None, Field(gt=0, description="nats a token; the verdict is no where KL's 95% upper bound is above it")
    ] = None
    window: Annotated[int, Field(ge=8, description="tokens per window of the text")] = 128
    limit: Annotated[int, Field(ge=2, description="windows of the text that are used at most")] = 16

    @field_validator("text")
    @classmethod
    def _readable(cls, text: str | None) -> str | None:
        try:
            if text is not None and not find_text(text).read_text(encoding="utf-8").strip():
                raise ValueError("the file is empty")
        except FileNotFoundError:
            raise ValueError("no such file; paths start where the command runs, or at the source tree") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 text, byte {error.start}") from None
        except OSError as error:
            raise ValueError(f"cannot be read: {error.strerror}") from None
        return text

    @model_validator(mode="after")
    def _bound_of_something(self) -> Spec:
        if self.max_kl is not None and self.text is None:
            raise ValueError("max_kl needs a text to measure KL on")
        return self

    @computed_field  # type: ignore[prop-decorator]
    @property
    def text_sha256(self) -> str | None:
        """Part of the stage's key: another text gives other figures."""
        return None if self.text is None else file_digest(find_text(self.text))


def find_text(name: str) -> Path:
    """A text by its path from the working folder or, if it is not there, from this source tree."""
    path = Path(name).expanduser()
    return path if path.exists() else Path(__file__).parents[3] / path


def run(spec: Spec, inputs: Mapping[str, Artifact], ctx: Context) -> Artifact:
    """Compare layouts, compare with the source, compare answers."""
    convert = inputs["convert"]
    master = convert.file("model")
    scratch = ctx.work / "layouts"
    shutil.rmtree(scratch, ignore_errors=True)  # what a killed run left there
    layouts = ctx.call("ottava.verify.weights:prove_layouts", {"folder": str(master), "scratch": str(scratch)})[0]
    ctx.progress(0.3, "layouts compared")
    result: dict[str, Any] = {
        "digest": layouts["digest"],
        "layouts": layouts["layouts"],
        "digest_equal": layouts["equal"] and layouts["digest"] == convert.summary["digest"],
        "on_grid": convert.summary["on_grid"],
        "label": convert.summary["label"],
        "accuracy": None,
        "trained_on_grid": "model" in inputs and inputs["model"].summary.get("on_grid_from_step") is not None,
        "answers_identical": None,
        "divergence": None,
    }
    if "model" in inputs and "label" in inputs:
        result |= _answers(inputs["model"], inputs["label"], master, convert.summary["on_grid"], ctx)
    if spec.text is not None:
        result["divergence"] = _divergence(spec, inputs, master, ctx)
    reason = _reason(result, convert.summary["digest"])
    write_json(ctx.out / "verification.json", result)
    return ctx.commit({**result, **({"reason": reason} if reason else {})}, verdict=reason is None)


def _answers(train: Artifact, label: Artifact, master: Path, on_grid: bool, ctx: Context) -> dict[str, Any]:
    """Evaluate the master as the trainer evaluated its model; equal means token by token.

    on_grid: whether the conversion changed no weight; one that rounded is measured, and not asked to be equal.
    """
    trained = train.json("evaluation.json")
    pool = ctx.fleet.pool(trained["pool"])
    args = {"model": str(master), "data": str(label.path), "platform": pool.platform, "max_new": trained.get("max_new")}
    served = ctx.call("ottava.engine.evaluate:evaluate_folder", args, pool=pool)[0]
    accuracy = {mode: served[mode] for mode in ("thinking", "direct", "direct_one_step") if mode in served}
    if not on_grid:
        return {"accuracy": accuracy}
    same = ctx.call(
        "ottava.verify.weights:compare_folders", {"a": str(master), "b": str(train.file("model"))}, pool=pool
    )[0]
    return {
        "accuracy": accuracy,
        "answers_identical": served["answers_digest"] == trained["answers_digest"],
        "weights_identical": same["equal"],
        "different": same["different"],
    }


def _divergence(spec: Spec, inputs: Mapping[str, Artifact], master: Path, ctx: Context) -> dict[str, Any]:
    """The master's divergence from what it was converted from, with the text, the bound and the reference named."""
    folder, reference = _reference(inputs)
    ctx.progress(0.5, "divergence from the source")
    text = find_text(spec.text or "")
    folders = {"reference": str(folder), "other": str(master)}
    args = {**folders, "text": str(text), "window": spec.window, "limit": spec.limit}
    measured = ctx.call("ottava.verify.numerics:compare_folders", args)[0]
    return {**measured, "max_kl": spec.max_kl, "text": spec.text, "reference": reference}


def _reference(inputs: Mapping[str, Artifact]) -> tuple[Path, str]:
    """The folder that was converted, by what conversion.json says, and what it is in words."""
    source = inputs["convert"].json("conversion.json")["source"]
    if source["kind"] == "package":
        return inputs["convert"].file(source["folder"]), source["statement"]
    if source["kind"] == "folder":
        if not Path(source["folder"]).is_dir():
            fix = "put it back, or take verify.text out of the recipe"
            raise CheckpointError("the converted folder is no longer there", where=source["folder"], fix=fix)
        return Path(source["folder"]), source["folder"]
    if "model" not in inputs or inputs["model"].digest != source["artifact"]:
        raise ArtifactError("the trained model that was converted is not there", fix="run without --only")
    return inputs["model"].file("model"), "the trained model"


def _reason(result: Mapping[str, Any], converted: str) -> str | None:
    """Why the verdict is no; None where it is yes."""
    if result["digest"] != converted:
        return f"the master holds other values than the conversion wrote: {result['digest']}, {converted}"
    if not result["digest_equal"]:
        return f"the layouts hold different values: {result['layouts']}"
    if result["trained_on_grid"] and not result["on_grid"]:
        return "the training ended on the grid, and conversion rounded its weights"
    if result.get("weights_identical") is False:
        return f"the master does not hold the trained weights; tensors that differ: {result['different']}"
    if result["answers_identical"] is False:
        return "the weights are equal, but the master answers otherwise than the trained model did"
    found = result["divergence"]
    if found is not None and found["max_kl"] is not None and found.get("kl_high", math.inf) > found["max_kl"]:
        return f"KL from the source is {found['kl']:.4g} nats, {_upper(found)}; at most {found['max_kl']} was allowed"
    return None


def _upper(found: Mapping[str, Any]) -> str:
    return f"at 95% up to {found['kl_high']:.4g}" if "kl_high" in found else "of one window, which bounds nothing"
