"""Reinforcement from verified answers, under the supervisor: the model so far learns from its own right replies.

What came in is evaluated before the first step, on the problems that the result is evaluated on.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping

from ottava import tasks
from ottava.artifact import Artifact, write_json
from ottava.checkpoint.layouts import read_config
from ottava.checkpoint.source import OF_ITS_WEIGHTS
from ottava.context import Context
from ottava.supervisor import loop
from ottava.supervisor import proof as proofs
from ottava.tasks import verify
from ottava.tasks.base import problem_of, read_lines
from ottava.trainer import asking, coming, curriculum, grpo, heldout, verdicts
from ottava.trainer.rl_spec import ReinforceSpec

VERSION = "1"
INPUTS = ("@model", "@label")
MODEL = True
CARE = frozenset(loop.CARE - {"drift"})
Spec = ReinforceSpec


def run(spec: ReinforceSpec, inputs: Mapping[str, Artifact], ctx: Context) -> Artifact:
    """Evaluate, reinforce, prove, export, evaluate again."""
    label, came = inputs["label"], inputs["model"].file("model")
    model = ctx.out / "model"
    shutil.copytree(came, model, ignore=shutil.ignore_patterns(*OF_ITS_WEIGHTS))
    max_new = spec.rollout.max_new if spec.mode == "direct" else None
    config = read_config(came)
    coming.require(coming.unadaptable(spec.lora, config), ctx.stage)
    asking.check(spec, label.path, came, coming.context_of(config), ctx.stage)
    heldout.check(spec, label.path, came)
    _trusted(label, ctx)
    before = proofs.evaluate(ctx, came, label, ctx.pool, max_new)
    write_json(ctx.out / "before.json", {**before, "pool": ctx.pool.name})
    base = {
        "spec": spec.model_dump(mode="json"), "seed": ctx.seed, "data": str(label.path), "chat": str(came),
        "objective": "grpo", "start_model": str(came), "content": [label.digest, inputs["model"].digest],
    }  # fmt: skip
    carried = proofs.carry(ctx, spec, base, proofs.phases(ctx.stage))
    shutil.copytree(ctx.work / ctx.stage / "rollouts", ctx.out / "rollouts")  # what was learnt from: the evidence
    ctx.progress(0.97, "evaluation")
    exported = proofs.export(ctx, base, carried, model)
    after = proofs.evaluations(ctx, model, label, carried.last, max_new)
    summary = {
        **proofs.summary(spec, carried),
        **verdicts.said(
            verdicts.of_generations(grpo.told(ctx.out / "rollouts")),
            verdicts.of_evaluation(before, "the model that came in"),
            verdicts.of_evaluation(after),
        ),
        "parameters": exported["parameters"],
        "trained": exported["trained"],
        "accuracy": proofs.figures(after),
        "reinforce": {**proofs.gain(before[spec.mode], after[spec.mode]), "mode": spec.mode},
    }
    if spec.curriculum is not None:
        summary["curriculum"] = curriculum.summary(spec, ctx.out / "rollouts", label.file("answers.jsonl"))
    reason = proofs.reason(spec.min_thinking, carried.proof, after, spec.mode)
    return ctx.commit({**summary, **({"reason": reason} if reason else {})}, verdict=reason is None)


def _trusted(label: Artifact, ctx: Context) -> None:
    """Raise DataError where the verifier's verdicts teach nothing. Who made the problems may have tried it already."""
    if label.summary.get("verifier_tried"):
        return
    ctx.progress(0.0, "trying the verifier")
    task = tasks.get(label.manifest["spec"]["task"])
    asked = [problem_of(line) for line in read_lines(label.file("answers.jsonl"))]
    verify.require_trusted(task, asked)
