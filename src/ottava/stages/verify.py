"""Proof that what will be served is what was trained: the same values in every layout, the same answers.

Weights are compared by digests of exact values. Answers are compared one by one: the master, read
back from its bytes, must generate the very tokens that the trainer's own model did, on the same
pool. For a model that came from elsewhere, divergence from its source is measured instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ottava import recipe
from ottava.artifact import Artifact, write_json
from ottava.context import Context
from ottava.errors import RecipeError

VERSION = "1"
INPUTS = ("convert", "?train", "?label")


class Spec(recipe.Spec):
    """The verify section of a recipe."""

    text: Annotated[str | None, Field(description="a text file to measure divergence from the source on")] = None
    window: Annotated[int, Field(ge=8, description="tokens per window of the text")] = 128
    limit: Annotated[int, Field(ge=2, description="windows of the text that are used at most")] = 16


def run(spec: Spec, inputs: Mapping[str, Artifact], ctx: Context) -> Artifact:
    """Compare layouts, compare with the source, compare answers."""
    convert = inputs["convert"]
    master = convert.file("model")
    scratch = ctx.work / "layouts"
    layouts = ctx.call("ottava.verify.weights:prove_layouts", {"folder": str(master), "scratch": str(scratch)})[0]
    ctx.progress(0.3, "layouts compared")
    result: dict[str, Any] = {
        "digest": layouts["digest"],
        "layouts": layouts["layouts"],
        "digest_equal": layouts["equal"] and layouts["digest"] == convert.summary["digest"],
        "on_grid": convert.summary["on_grid"],
        "label": convert.summary["label"],
        "accuracy": None,
        "answers_identical": None,
        "divergence": None,
    }
    if "train" in inputs and "label" in inputs:
        result |= _answers(inputs["train"], inputs["label"], master, ctx)
    if spec.text is not None:
        result["divergence"] = _divergence(spec, convert, master, ctx)
    write_json(ctx.out / "verification.json", result)
    good = bool(result["digest_equal"]) and result["answers_identical"] is not False
    return ctx.commit({**result, **({} if good else {"reason": _reason(result)})}, verdict=good)


def _answers(train: Artifact, label: Artifact, master: Path, ctx: Context) -> dict[str, Any]:
    """Evaluate the master as the trainer evaluated its model; equal means token by token."""
    trained = train.json("evaluation.json")
    pool = ctx.fleet.pool(trained["pool"])
    args = {"model": str(master), "data": str(label.path), "task": "chains"}
    served = ctx.call("ottava.engine.evaluate:evaluate_folder", args, pool=pool)[0]
    same = ctx.call(
        "ottava.verify.weights:compare_folders", {"a": str(master), "b": str(train.file("model"))}, pool=pool
    )[0]
    return {
        "accuracy": {mode: served[mode] for mode in ("thinking", "direct", "direct_one_step")},
        "answers_identical": served["answers_digest"] == trained["answers_digest"],
        "weights_identical": same["equal"],
        "different": same["different"],
    }


def _divergence(spec: Spec, convert: Artifact, master: Path, ctx: Context) -> dict[str, Any]:
    text = Path(spec.text or "")
    if not text.is_file():
        raise RecipeError("verify.text: no such file", where=text, fix="name a text file")
    source = convert.json("conversion.json").get("source")
    ctx.progress(0.5, "divergence from the source")
    args = {
        "reference": source, "other": str(master), "text": str(text), "window": spec.window, "limit": spec.limit,
        "threads": 2,
    }  # fmt: skip
    return ctx.call("ottava.verify.numerics:compare_folders", args)[0]


def _reason(result: Mapping[str, Any]) -> str:
    if not result["digest_equal"]:
        return f"the layouts hold different values: {result['layouts']}"
    return f"the master answers otherwise than the trained model; tensors that differ: {result.get('different')}"
