"""Supervised fine-tuning under the supervisor, with the proof of what happened on the way.

The run prefers the pool where the plan put it and falls back to the others. What is proven every
time there was a fallback: the state that arrived is the state that left; the same schedule of pools
without a fault ends in the same bytes; and the drift against staying lies inside an envelope that
was measured, not chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ottava import journal
from ottava.artifact import Artifact, write_json
from ottava.context import Context
from ottava.errors import PlatformError
from ottava.models.chat import write_tiny
from ottava.recipe import Pool
from ottava.supervisor.drift import measure
from ottava.supervisor.loop import Run, Segment, handoff_file, kept_file, replay, supervise
from ottava.trainer import snapshot
from ottava.trainer.spec import TrainSpec

VERSION = "1"
INPUTS = ("label",)
Spec = TrainSpec


def run(spec: TrainSpec, inputs: Mapping[str, Artifact], ctx: Context) -> Artifact:
    """Train, prove, evaluate, export."""
    pools = (ctx.pool, *ctx.fallback)
    for pool in pools:
        if pool.platform != "cpu":
            raise PlatformError(
                f"the trainer runs on cpu pools so far, not on {pool.platform!r}",
                where=f"pool {pool.name}",
                fix="take that pool out of the fleet",
            )
    label = inputs["label"]
    model = ctx.out / "model"
    write_tiny(model, label.json("vocabulary.json"))
    base = {"spec": spec.model_dump(mode="json"), "seed": ctx.seed, "data": str(label.path), "chat": str(model)}
    if not (ctx.work / "main").exists():
        ctx.journal.append("train.begin")
    main = _run(spec, ctx, pools, base, "main", 0.0)
    final, segments = supervise(main, spec.fault)
    moves = [segment for segment in segments if segment.end and segment.end > segment.start]  # pools that did a step
    again = replay(_run(spec, ctx, pools, base, "replay", 0.46), segments)
    proof = {
        "segments": [vars(segment) for segment in segments],
        "final": final.digest,
        "replay": again.digest,
        "replay_identical": again.digest == final.digest,
        "classes": _classes(ctx),
        "fallback": _fallback(spec, ctx, main, base, moves) if len(moves) > 1 else None,
    }
    ctx.progress(0.97, "evaluation")
    last = next(pool for pool in pools if pool.name == segments[-1].pool)
    state = ctx.work / "final.state"
    snapshot.save(state, final)
    exported = ctx.call(
        "ottava.trainer.worker:export",
        {**base, "state": str(state), "model": str(model), "latent": str(ctx.out / "latent.safetensors")},
        pool=last,
    )[0]
    accuracy = {pool.name: _evaluate(ctx, model, label, pool) for pool in pools}
    write_json(ctx.out / "evaluation.json", {**accuracy[last.name], "pool": last.name, "pools": accuracy})
    write_json(ctx.out / "proof.json", proof)
    return ctx.commit(_summary(spec, proof, accuracy[last.name], last, exported), verdict=_good(proof))


def _run(
    spec: TrainSpec, ctx: Context, pools: Sequence[Pool], base: Mapping[str, Any], phase: str, offset: float
) -> Run:
    def progress(step: int) -> None:
        if step % 10 == 0:
            ctx.progress(offset + 0.46 * step / spec.steps, f"{phase}: step {step} of {spec.steps}")

    return Run(phase, spec, pools, base, ctx.work / phase, ctx.journal, ctx.launcher, ctx.work, progress)


def _fallback(
    spec: TrainSpec, ctx: Context, main: Run, base: Mapping[str, Any], segments: Sequence[Segment]
) -> dict[str, Any]:
    """What the move is proven to be: the journal's account, checked against the files."""
    ctx.progress(0.93, "drift against staying")
    source, target = segments[0], segments[1]
    state = journal.fold(journal.read(ctx.journal.path))
    arrived = ("main", target.pool, target.start)
    before = snapshot.load(handoff_file(main.folder))
    after = sorted({e["digest"] for e in state.joins if (e["phase"], e["pool"], e["step"]) == arrived})
    (ctx.out / "handoff.state").write_bytes(handoff_file(main.folder).read_bytes())
    old, new = (ctx.fleet.pool(segment.pool) for segment in (source, target))
    drift = measure(ctx.launcher, base, old, new, handoff_file(main.folder), spec.drift, ctx.work / "drift")
    kept = snapshot.load(kept_file(main.folder, target.start + spec.drift.window))
    return {
        "from": source.pool,
        "to": target.pool,
        "at_step": target.start,
        "lost_steps": source.lost,
        "seconds_without_a_step": _gap(state.steps, target.start),
        "before": before.digest,
        "after": after,
        "handoff_identical": bool(after) and after == [before.digest],
        **drift,
        "one_worker_identical": drift["moved"] == kept.digest,
    }


def _gap(steps: Sequence[Mapping[str, Any]], at: int) -> float | None:
    """Wall seconds between the last step before the move and the first after it."""
    times = {event["step"]: event["t"] for event in steps if event["phase"] == "main"}
    return round(times[at + 1] - times[at], 2) if at in times and at + 1 in times else None


def _classes(ctx: Context) -> dict[str, str]:
    """The numerics class of each pool, as its workers measured it when they joined."""
    joins = journal.fold(journal.read(ctx.journal.path)).joins
    return {event["pool"]: event["numerics_class"] for event in joins}


def _evaluate(ctx: Context, model: Path, label: Artifact, pool: Pool) -> dict[str, Any]:
    args = {"model": str(model), "data": str(label.path), "task": "chains"}
    return ctx.call("ottava.engine.evaluate:evaluate_folder", args, pool=pool)[0]


def _summary(
    spec: TrainSpec,
    proof: Mapping[str, Any],
    accuracy: Mapping[str, Any],
    pool: Pool,
    exported: Mapping[str, Any],
) -> dict[str, Any]:
    fallback = proof["fallback"]
    return {
        "steps": spec.steps,
        "parameters": exported["parameters"],
        "pool": pool.name,
        "accuracy": {mode: accuracy[mode] for mode in ("thinking", "direct", "direct_one_step")},
        "replay_identical": proof["replay_identical"],
        "fallback": None if fallback is None else {**fallback, "replay_identical": proof["replay_identical"]},
        "on_grid_from_step": int(spec.grid_from * spec.steps),
        "state_digest": proof["final"],
    }


def _good(proof: Mapping[str, Any]) -> bool:
    fallback = proof["fallback"]
    if not proof["replay_identical"]:
        return False
    return fallback is None or (
        fallback["handoff_identical"] and fallback["inside"] and fallback["one_worker_identical"]
    )
