"""Supervised fine-tuning under the supervisor, with the proof of what happened on the way.

The run prefers the pool where the plan put it and falls back to the others. What is proven every
time there was a fallback: the state that arrived is the state that left; the same schedule of pools
without a fault ends in the same bytes; and the drift against staying lies inside an envelope that
was measured, not chosen.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ottava import journal
from ottava.artifact import Artifact, write_json
from ottava.context import Context
from ottava.errors import PlatformError
from ottava.journal import RunState
from ottava.models.chat import write_tiny
from ottava.recipe import Pool
from ottava.supervisor import loop
from ottava.supervisor.drift import measure
from ottava.supervisor.loop import Run, replay, supervise, window
from ottava.supervisor.record import Segment
from ottava.supervisor.store import handoff_file, kept_file
from ottava.trainer import heldout, snapshot
from ottava.trainer.snapshot import Snapshot
from ottava.trainer.spec import TrainSpec

VERSION = "1"
INPUTS = ("label",)
CARE = frozenset(loop.CARE - {"drift"})  # the states that the drift is measured from are kept as the run goes by
Spec = TrainSpec


def run(spec: TrainSpec, inputs: Mapping[str, Artifact], ctx: Context) -> Artifact:
    """Train, prove, evaluate, export."""
    pools = (ctx.pool, *ctx.fallback)
    label = inputs["label"]
    model = ctx.out / "model"
    write_tiny(model, label.json("vocabulary.json"))
    heldout.check(spec, label.path, model)
    base = {"spec": spec.model_dump(mode="json"), "seed": ctx.seed, "data": str(label.path), "chat": str(model)}
    base["content"] = label.digest
    if not (ctx.work / "main").exists():
        ctx.journal.append("train.begin")
    main = _run(spec, ctx, pools, base, "main", 0.0)
    final, segments = supervise(main, [] if spec.fault is None else [spec.fault])
    again = replay(_run(spec, ctx, pools, base, "replay", 0.46), segments)
    last = next(pool for pool in pools if pool.name == segments[-1].pool)
    proof = {
        "segments": [vars(segment) for segment in segments],
        "final": final.digest,
        "replay": again.digest,
        "replay_identical": again.digest == final.digest,
        "classes": _classes(ctx),
        "fallback": _fallback(spec, ctx, main, base, segments),
    }
    ctx.progress(0.97, "evaluation")
    exported = _export(ctx, base, final, model, last)
    accuracy = _evaluations(ctx, model, label, pools, last)
    write_json(ctx.out / "evaluation.json", {**accuracy[last.name], "pool": last.name, "pools": accuracy})
    write_json(ctx.out / "proof.json", proof)
    reason = _reason(spec, proof, accuracy[last.name])
    summary = _summary(spec, proof, accuracy[last.name], last, exported)
    return ctx.commit({**summary, **({"reason": reason} if reason else {})}, verdict=reason is None)


def _export(ctx: Context, base: Mapping[str, Any], final: Snapshot, model: Path, pool: Pool) -> dict[str, Any]:
    state = ctx.work / "final.state"
    snapshot.save(state, final)
    args = {**base, "state": str(state), "model": str(model), "latent": str(ctx.out / "latent.safetensors")}
    return ctx.call("ottava.trainer.worker:export", args, pool=pool)[0]


def _run(
    spec: TrainSpec, ctx: Context, pools: Sequence[Pool], base: Mapping[str, Any], phase: str, offset: float
) -> Run:
    def progress(step: int) -> None:
        if step % 10 == 0:
            ctx.progress(offset + 0.46 * step / spec.steps, f"{phase}: step {step} of {spec.steps}")

    return Run(phase, spec, pools, base, ctx.work / phase, ctx.journal, ctx.launcher, ctx.work, progress)


def _fallback(
    spec: TrainSpec, ctx: Context, main: Run, base: Mapping[str, Any], segments: Sequence[Segment]
) -> dict[str, Any] | None:
    """What the moves are proven to be; None where the run stayed on one pool. Drift is that of the last move."""
    done = [segment for segment in segments if segment.end and segment.end > segment.start]  # pools that did a step
    if len(done) < 2:
        return None
    ctx.progress(0.93, "drift against staying")
    state = journal.fold(journal.read(ctx.journal.path))
    moves = [_move(main, state, source, target) for source, target in itertools.pairwise(done)]
    source, target = done[-2:]
    old, new = (ctx.fleet.pool(segment.pool) for segment in (source, target))
    sizes = spec.drift.model_copy(update={"window": window(spec, target.start)})
    handoff = handoff_file(main.folder, target.start)
    (ctx.out / "handoff.state").write_bytes(handoff.read_bytes())
    drift = measure(ctx.launcher, base, old, new, handoff, sizes, ctx.work / "drift")
    kept = snapshot.load(kept_file(main.folder, target.start + sizes.window))
    return {
        **moves[-1],
        "lost_steps": sum(move["lost_steps"] for move in moves),
        "handoff_identical": all(move["handoff_identical"] for move in moves),
        "moves": moves,
        **drift,
        "one_worker_identical": drift["moved"] == kept.digest,
    }


def _move(main: Run, state: RunState, source: Segment, target: Segment) -> dict[str, Any]:
    """One move between pools. The witnesses of what left: the file, and the digest journaled with the step.

    handoff_identical: every worker of the new pool joined with live tensors of that very digest.
    """
    before = next(
        e["digest"] for e in reversed(state.fallbacks) if (e["phase"], e["at_step"]) == ("main", target.start)
    )
    arrived = ("main", target.pool, target.start)
    joins = [e for e in state.joins if (e["phase"], e["pool"], e["step"]) == arrived]
    journaled = [e["digest"] for e in state.steps if (e["phase"], e["step"]) == ("main", target.start)]
    everyone = bool(joins) and {e["rank"] for e in joins} == set(range(joins[-1]["world"]))
    after = sorted({e["digest"] for e in joins})
    return {
        "from": source.pool,
        "to": target.pool,
        "at_step": target.start,
        "lost_steps": source.lost,
        "seconds_without_a_step": _gap(state.steps, target.start),
        "before": before,
        "after": after,
        "handoff_identical": everyone and after == [before] and all(before.startswith(d) for d in journaled),
    }


def _gap(steps: Sequence[Mapping[str, Any]], at: int) -> float | None:
    """Wall seconds between the last step before the move and the first after it."""
    times = {event["step"]: event["t"] for event in steps if event["phase"] == "main"}
    return round(times[at + 1] - times[at], 2) if at in times and at + 1 in times else None


def _classes(ctx: Context) -> dict[str, str]:
    """The numerics class of each pool, as its workers measured it when they joined."""
    joins = journal.fold(journal.read(ctx.journal.path)).joins
    return {event["pool"]: event["numerics_class"] for event in joins}


def _evaluations(
    ctx: Context, model: Path, label: Artifact, pools: Sequence[Pool], last: Pool
) -> dict[str, dict[str, Any]]:
    """The accuracy on every pool that is still there; on the last one of training there must be one."""
    found = {last.name: _evaluate(ctx, model, label, last)}
    for pool in pools:
        if pool.name not in found:
            try:
                found[pool.name] = _evaluate(ctx, model, label, pool)
            except PlatformError as error:  # a pool that the run could leave may be gone for good
                ctx.journal.append("train.unevaluated", pool=pool.name, reason=error.what)
    return {pool.name: found[pool.name] for pool in pools if pool.name in found}


def _evaluate(ctx: Context, model: Path, label: Artifact, pool: Pool) -> dict[str, Any]:
    args = {"model": str(model), "data": str(label.path), "task": "chains", "platform": pool.platform}
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
        "fault_happened": None if spec.fault is None else fallback is not None or _restarted(proof),
        "on_grid_from_step": int(spec.grid_from * spec.steps) if spec.grid_from < 1 else None,
        "state_digest": proof["final"],
    }


def _restarted(proof: Mapping[str, Any]) -> bool:
    return any(segment["failures"] for segment in proof["segments"])


def _reason(spec: TrainSpec, proof: Mapping[str, Any], accuracy: Mapping[str, Any]) -> str | None:
    """Why the verdict is no; None where it is yes."""
    fallback, thinking = proof["fallback"], accuracy["thinking"]["value"]
    if not proof["replay_identical"]:
        return "the same schedule of pools without the fault ended in other bytes"
    if fallback is not None and not fallback["handoff_identical"]:
        return "the state that arrived is not the state that left"
    if fallback is not None and not fallback["one_worker_identical"]:
        return "one worker computed other bits than the pool's workers"
    if fallback is not None and not fallback["inside"]:
        return f"the drift {fallback['drift']:.3g} is above its envelope {fallback['envelope']:.3g}"
    if thinking < spec.min_thinking:
        return f"thinking solves {thinking:.1%}, and min_thinking is {spec.min_thinking:.1%}"
    return None
