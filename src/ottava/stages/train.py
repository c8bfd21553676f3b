"""Supervised fine-tuning under the supervisor, with the proof of what happened on the way (`supervisor.proof`).

It begins from the model so far, or from a fresh one of the recipe's shape. Of `problems` only answers are known: there
it learns from a model's own right replies, or from the answers alone (mode: direct), and what came in is evaluated
before the first step.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping

from ottava.artifact import Artifact, write_json
from ottava.checkpoint.layouts import read_config
from ottava.checkpoint.source import OF_ITS_WEIGHTS
from ottava.context import Context
from ottava.labels import bound, harvest
from ottava.models.chat import write_tiny
from ottava.supervisor import loop
from ottava.supervisor import proof as proofs
from ottava.trainer import asking, coming, heldout, verdicts
from ottava.trainer.spec import TrainSpec

VERSION = "1"
INPUTS = ("?@model", "?start", "@label")
MODEL = True
VOCABULARY = "vocabulary.json"
CARE = frozenset(loop.CARE - {"drift"})  # the states that the drift is measured from are kept as the run goes by
Spec = TrainSpec


def run(spec: TrainSpec, inputs: Mapping[str, Artifact], ctx: Context) -> Artifact:
    """Train, prove, evaluate, export."""
    label = inputs["label"]
    certified = bound.require(label.path, spec.max_label_error)
    came = inputs.get("model" if spec.harvest is None else "start")  # on its own replies a model learns from the start
    model, content = ctx.out / "model", [label.digest]
    base = {"spec": spec.model_dump(mode="json"), "seed": ctx.seed, "data": str(label.path), "chat": str(model)}
    if came is None:
        write_tiny(model, label.json(VOCABULARY))
    else:
        config = read_config(came.file("model"))
        coming.require(coming.unadaptable(spec.lora, config), ctx.stage)
        asking.check_replies(spec, label.path, came.file("model"), coming.context_of(config), ctx.stage)
        shutil.copytree(came.file("model"), model, ignore=shutil.ignore_patterns(*OF_ITS_WEIGHTS))
        base |= {"start_model": str(came.file("model"))}
        content.append(came.digest)
    heldout.check(spec, label.path, model)
    before = None
    if came is not None and VOCABULARY not in label.manifest["files"]:
        before = proofs.evaluate(ctx, came.file("model"), label, ctx.pool, spec.limit)
        write_json(ctx.out / "before.json", {**before, "pool": ctx.pool.name})
    harvested = None
    if spec.harvest is not None:
        ctx.progress(0.0, "asking the model so far")
        harvested = harvest.collect(spec.harvest, inputs["model"], label, ctx, ctx.out / "traces", spec)
        base |= {"data": str(ctx.out / "traces")}
        content.append(inputs["model"].digest)
    base["content"] = content
    carried = proofs.carry(ctx, spec, base, proofs.phases(ctx.stage))
    ctx.progress(0.97, "evaluation")
    exported = proofs.export(ctx, base, carried, model)
    last = proofs.evaluations(ctx, model, label, carried.last, spec.limit)
    summary = {
        **proofs.summary(spec, carried),
        **verdicts.said(
            verdicts.of_harvest(harvested or {}),
            verdicts.of_evaluation(before or {}, "the model that came in"),
            verdicts.of_evaluation(last),
        ),
        "parameters": exported["parameters"],
        "trained": exported["trained"],
        "accuracy": proofs.figures(last),
        **(
            {}
            if certified is None
            else {"labels": {"error_upper_95": certified.upper, "judged_by": certified.judged_by}}
        ),
        **({} if harvested is None else {"traces": harvested}),
        **({} if before is None else {"gain": {**proofs.gain(before[spec.mode], last[spec.mode]), "mode": spec.mode}}),
    }
    reason = proofs.reason(spec.min_thinking, carried.proof, last, spec.mode)
    return ctx.commit({**summary, **({"reason": reason} if reason else {})}, verdict=reason is None)
