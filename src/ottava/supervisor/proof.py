"""A supervised run with the proof of what happened on the way, for every stage that trains.

The run prefers the pool where the plan put it and falls back to the others. What is proven every time there was a
fallback: the state that arrived is the state that left; the same schedule of pools without a fault ends in the same
bytes; and the drift against staying lies inside an envelope that was measured, not chosen.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ottava import journal
from ottava.artifact import Artifact, write_json
from ottava.context import Context
from ottava.errors import PlatformError
from ottava.journal import RunState
from ottava.recipe import Pool
from ottava.supervisor.drift import measure
from ottava.supervisor.loop import Run, replay, rollouts, supervise, window
from ottava.supervisor.record import Segment
from ottava.supervisor.store import handoff_file, kept_file
from ottava.tasks.statistics import paired
from ottava.trainer import snapshot
from ottava.trainer.snapshot import Snapshot
from ottava.trainer.supervised import Fault, Supervised


@dataclass(frozen=True)
class Carried:
    """A run at its end. last: the pool of its last step; proof: JSON."""

    final: Snapshot
    last: Pool
    proof: dict[str, Any]


def carry(ctx: Context, spec: Supervised, base: Mapping[str, Any], phases: tuple[str, str]) -> Carried:
    """Train under supervision, and prove it. phases: the names of the run and of its replay in the journal.

    base: what every worker is given. Raises what `supervise` does.
    """
    pools, phase = (ctx.pool, *ctx.fallback), phases[0]
    main = _run(spec, ctx, pools, base, phase, 0.0)
    final, segments = _begun(ctx, main, phases, spec.fault)
    again = replay(_run(spec, ctx, pools, base, phases[1], 0.46, main), segments)
    proof = {
        "segments": [vars(segment) for segment in segments],
        "final": final.digest,
        "replay": again.digest,
        "replay_identical": again.digest == final.digest,
        "classes": _classes(ctx, phase),
        "fallback": _fallback(spec, ctx, main, base, segments),
    }
    return Carried(final, next(pool for pool in pools if pool.name == segments[-1].pool), proof)


def phases(stage: str) -> tuple[str, str]:
    """What a stage's run and its replay are called in the journal."""
    return ("main", "replay") if stage == "train" else (stage, f"{stage}-replay")


def through(
    ctx: Context, spec: Supervised, base: Mapping[str, Any], phase: str, fault: Fault | None
) -> tuple[Snapshot, Pool]:
    """Train under supervision without more proof than that; the final state and the pool of its last step."""
    pools = (ctx.pool, *ctx.fallback)
    quiet = Run(phase, spec, pools, base, ctx.work / _folder(phase), ctx.journal, ctx.launcher, ctx.work)
    final, segments = _begun(ctx, quiet, (phase,), fault)
    return final, next(pool for pool in pools if pool.name == segments[-1].pool)


def _begun(ctx: Context, run: Run, phases: Sequence[str], fault: Fault | None) -> tuple[Snapshot, list[Segment]]:
    if not run.folder.exists():
        ctx.journal.append("train.begin", phases=list(phases))
    return supervise(run, [] if fault is None else [fault])


def _folder(phase: str) -> str:
    return phase.replace(":", "-")


def summary(spec: Supervised, carried: Carried) -> dict[str, Any]:
    """What a stage's summary says of the run."""
    proof, fallback = carried.proof, carried.proof["fallback"]
    restarted = any(segment["failures"] for segment in proof["segments"])
    return {
        "steps": spec.steps,
        "pool": carried.last.name,
        "replay_identical": proof["replay_identical"],
        "fallback": None if fallback is None else {**fallback, "replay_identical": proof["replay_identical"]},
        "fault_happened": None if spec.fault is None else fallback is not None or restarted,
        "on_grid_from_step": int(spec.grid_from * spec.steps) if spec.grid_from < 1 else None,
        "state_digest": proof["final"],
    }


def reason(least: float, proof: Mapping[str, Any], accuracy: Mapping[str, Any], mode: str = "thinking") -> str | None:
    """Why the verdict on a run is no; None where it is yes. least: min_thinking, of the accuracy in `mode`."""
    fallback = proof["fallback"]
    if not proof["replay_identical"]:
        return "the same schedule of pools without the fault ended in other bytes"
    if fallback is not None and not fallback["handoff_identical"]:
        return "the state that arrived is not the state that left"
    if fallback is not None and not fallback["one_worker_identical"]:
        return "one worker computed other bits than the pool's workers"
    if fallback is not None and not fallback["inside"]:
        return f"the drift {fallback['drift']:.3g} is above its envelope {fallback['envelope']:.3g}"
    solved = accuracy[mode]["value"]
    return f"{mode} solves {solved:.1%}, and min_thinking is {least:.1%}" if solved < least else None


def export(ctx: Context, base: Mapping[str, Any], carried: Carried, model: Path) -> dict[str, Any]:
    """Write the model into a folder that has its tokenizer, and the proof beside it; {parameters, step}."""
    write_json(ctx.out / "proof.json", carried.proof)
    return exported(ctx, base, carried.final, carried.last, model, ctx.out / "latent.safetensors")


def exported(
    ctx: Context, base: Mapping[str, Any], final: Snapshot, pool: Pool, model: Path, latent: Path | None = None
) -> dict[str, Any]:
    """Write a state's model into a folder with its tokenizer, and the weights before rounding; {parameters, step}."""
    state = ctx.work / "final.state"
    snapshot.save(state, final)
    args = {**base, "state": str(state), "model": str(model), "latent": latent and str(latent)}
    return ctx.call("ottava.trainer.worker:export", args, pool=pool)[0]


def evaluations(ctx: Context, model: Path, label: Artifact, last: Pool, max_new: int | None = None) -> dict[str, Any]:
    """The accuracy on the last pool of training; on the others, as far as they are still there, in evaluation.json."""
    pools = (ctx.pool, *ctx.fallback)
    found = {last.name: evaluate(ctx, model, label, last, max_new)}
    for pool in pools:
        if pool.name not in found:
            try:
                found[pool.name] = evaluate(ctx, model, label, pool, max_new)
            except PlatformError as error:  # a pool that the run could leave may be gone for good
                ctx.journal.append("train.unevaluated", pool=pool.name, reason=error.what)
    each = {pool.name: found[pool.name] for pool in pools if pool.name in found}
    asked = {} if max_new is None else {"max_new": max_new}
    write_json(ctx.out / "evaluation.json", {**found[last.name], **asked, "pool": last.name, "pools": each})
    return found[last.name]


def evaluate(ctx: Context, model: Path, label: Artifact, pool: Pool, max_new: int | None = None) -> dict[str, Any]:
    """The accuracy of a model's folder on one pool, on the label artifact's test problems. max_new: ids of a reply."""
    args = {"model": str(model), "data": str(label.path), "platform": pool.platform, "max_new": max_new}
    return ctx.call("ottava.engine.evaluate:evaluate_folder", args, pool=pool)[0]


def gain(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """{before, after, low, high: the paired 95% interval of the difference, n}, of the same problems."""
    found = paired(before["right"], after["right"])
    return {"before": before["value"], "after": after["value"], "low": found.low, "high": found.high, "n": found.n}


def figures(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The accuracies of an evaluation, without what was right one by one."""
    modes = ("thinking", "direct", "direct_one_step")
    found = {mode: evaluation[mode] for mode in modes if mode in evaluation}
    return {mode: {name: one for name, one in entry.items() if name != "right"} for mode, entry in found.items()}


def _run(
    spec: Supervised,
    ctx: Context,
    pools: Sequence[Pool],
    base: Mapping[str, Any],
    phase: str,
    offset: float,
    learn_from: Run | None = None,
) -> Run:
    def progress(step: int) -> None:
        if step % 10 == 0:
            ctx.progress(offset + 0.46 * step / spec.steps, f"{phase}: step {step} of {spec.steps}")

    return Run(phase, spec, pools, base, ctx.work / phase, ctx.journal, ctx.launcher, ctx.work, progress, learn_from)


def _fallback(
    spec: Supervised, ctx: Context, main: Run, base: Mapping[str, Any], segments: Sequence[Segment]
) -> dict[str, Any] | None:
    """What the moves are proven to be; None where the run stayed on one pool. Drift is that of the last move."""
    done = [segment for segment in segments if segment.end and segment.end > segment.start]  # pools that did a step
    if len(done) < 2:
        return None
    ctx.progress(0.93, "drift against staying")
    state = journal.fold(journal.read(ctx.journal.path))
    moves = [_move(main.phase, state, source, target) for source, target in itertools.pairwise(done)]
    source, target = done[-2:]
    old, new = (ctx.fleet.pool(segment.pool) for segment in (source, target))
    sizes = spec.drift.model_copy(update={"window": window(spec, target.start)})
    handoff = handoff_file(main.folder, target.start)
    (ctx.out / "handoff.state").write_bytes(handoff.read_bytes())
    records = {"rollouts": str(rollouts(main)), "run": main.id, "seals": main.record().seals, "replay": True}
    drift = measure(ctx.launcher, {**base, **records}, old, new, handoff, sizes, ctx.work / "drift")
    kept = snapshot.load(kept_file(main.folder, target.start + sizes.window))
    return {
        **moves[-1],
        "lost_steps": sum(move["lost_steps"] for move in moves),
        "handoff_identical": all(move["handoff_identical"] for move in moves),
        "moves": moves,
        **drift,
        "one_worker_identical": drift["moved"] == kept.digest,
    }


def _move(phase: str, state: RunState, source: Segment, target: Segment) -> dict[str, Any]:
    """One move between pools. The witnesses of what left: the file, and the digest journaled with the step.

    handoff_identical: every worker of the new pool joined with live tensors of that very digest.
    """
    before = next(e["digest"] for e in reversed(state.fallbacks) if (e["phase"], e["at_step"]) == (phase, target.start))
    arrived = (phase, target.pool, target.start)
    joins = [e for e in state.joins if (e["phase"], e["pool"], e["step"]) == arrived]
    journaled = [e["digest"] for e in state.steps if (e["phase"], e["step"]) == (phase, target.start)]
    everyone = bool(joins) and {e["rank"] for e in joins} == set(range(joins[-1]["world"]))
    after = sorted({e["digest"] for e in joins})
    return {
        "from": source.pool,
        "to": target.pool,
        "at_step": target.start,
        "lost_steps": source.lost,
        "seconds_without_a_step": _gap(phase, state.steps, target.start),
        "before": before,
        "after": after,
        "handoff_identical": everyone and after == [before] and all(before.startswith(d) for d in journaled),
    }


def _gap(phase: str, steps: Sequence[Mapping[str, Any]], at: int) -> float | None:
    """Wall seconds between the last step before the move and the first after it."""
    times = {event["step"]: event["t"] for event in steps if event["phase"] == phase}
    return round(times[at + 1] - times[at], 2) if at in times and at + 1 in times else None


def _classes(ctx: Context, phase: str) -> dict[str, str]:
    """The numerics class of each pool, as its workers measured it when they joined."""
    joins = journal.fold(journal.read(ctx.journal.path)).joins
    return {event["pool"]: event["numerics_class"] for event in joins if event["phase"] == phase}
