"""How fast a workload runs, how much memory it takes, and how sure that is; or why nothing can be said.

A number is never given without its 80% interval and without what it rests on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ottava.errors import RecipeError
from ottava.planner import calibrate, memory, rows
from ottava.planner.calibrate import Z80, Calibration
from ottava.planner.chips import Catalogue, load, locate
from ottava.planner.rows import Row
from ottava.planner.workload import Layout, Rollout, Workload

PROFILE_SIGMA = 0.2
"""Sigma of the logarithm of speed between a profile and the same work served elsewhere. Assumed: published profiles of
the same model on like chips lie 50% apart, at unlike batches."""

LEAST_PARAMETERS = 1.5e9
"""On one node nothing is said of models below this: no published run of the data is smaller, and launches decide."""

NEAR = 0.25
"""A serving profile speaks of contexts and batches this close to its own, relative."""


@dataclass(frozen=True)
class Prediction:
    """tokens_per_s_per_chip with its 80% interval [low, high]; all three None where `declined` says why not.

    chips: that the rate is of one of; memory_gb: of the fullest chip, 1e9 bytes, of which state_gb weights, gradients
    and optimiser; layout: given or found; seconds: of one optimiser step; hours: [low, middle, high] for the workload's
    tokens where it names them; parts: of a step, in seconds before calibration; why: what the number rests on.
    """

    id: str
    tokens_per_s_per_chip: float | None
    low: float | None
    high: float | None
    chips: int = 0
    memory_gb: float | None = None
    state_gb: float | None = None
    layout: Layout | None = None
    seconds: float | None = None
    hours: tuple[float, float, float] | None = None
    parts: dict[str, float] | None = None
    declined: str | None = None
    why: tuple[str, ...] = ()


def predict(workload: Workload, chips: Catalogue, calibration: Calibration, profiles: Sequence[Row] = ()) -> Prediction:
    """Tokens a second and chip, with an 80% interval. profiles: measured serving, for serving, rollouts and teachers.

    Tokens are those trained on (train, rl, distill) or those read or generated (serve). Raises RecipeError for a chip
    without figures.
    """
    chips.chip(workload.chip)
    if workload.kind == "serve":
        return _serve(workload, profiles)
    reason = _unknown(workload, chips)
    if reason is not None:
        return Prediction(workload.id, None, None, None, workload.chips, declined=reason)
    trained = _train(workload, chips, calibration)
    if workload.kind == "train" or workload.rollout is None or trained.declined is not None:
        return trained
    return _two(trained, workload, chips, profiles)


def _unknown(work: Workload, chips: Catalogue) -> str | None:
    """Why the model is not good for this workload; None where it is."""
    chip = chips.chip(work.chip)
    if chip.bf16_tflops is None or chip.memory_tbs is None:
        return f"the speed of {work.chip} is not known: measure it"
    if work.kind == "rl" and work.rollout is None:
        return "reinforcement spends most of its time on rollouts: name them (rollout: chip, n, length)"
    if work.chips <= calibrate.ALONE_CHIPS and work.model.parameters() < LEAST_PARAMETERS:
        return "a small model on one node: no published run of the data is as small, and the error there is 36%"
    if work.precision in ("fp8", "mxfp8") and chip.fp8_tflops is None:
        return f"{work.chip} has no FP8 arithmetic"
    if work.layout is not None and work.chips < work.layout.size:
        return f"{work.chips} chips are fewer than tp x pp x cp = {work.layout.size}"
    return None


def _train(work: Workload, chips: Catalogue, calibration: Calibration) -> Prediction:
    """Training by the calibrated model of a step."""
    site = calibration.sites.get(work.site or "", work.site)
    work = work.model_copy(update={"site": site})
    run, found = calibrate.prepare(work, chips)
    state, room = memory.state(work, found.layout) / 1e9, chips.chip(work.chip).memory_gb.value
    if state > room:
        reason = f"weights, gradients and optimiser alone take {state:,.0f} GB on a chip of {room:g} GB"
        return Prediction(work.id, None, None, None, work.chips, found.memory_gb, state, found.layout, declined=reason)
    middle, low, high = calibrate.interval(run, calibration.fit(), work)
    why = [_evidence(run.family, work, calibration)]
    why.append("the layout is given" if work.layout else "the layout was searched for: the fastest that fits")
    if work.chips % found.layout.size:
        why.append(f"{work.chips} chips are no multiple of tp x pp x cp = {found.layout.size}: taken for rounded")
    if not found.fits:
        why.append("it does not fit into the chip's memory as described: recompute more, or spread it further")
    if calibrate.alone(work):
        why.append("a small model on one node: the error there is 36%, and the interval says so")
    seconds = work.batch * work.sequence / middle / work.chips
    return Prediction(
        work.id, middle, low, high, work.chips, found.memory_gb, state, found.layout,
        seconds, _hours(work, middle, low, high, work.chips), found.step.parts, None, tuple(why),
    )  # fmt: skip


def _evidence(family: str, work: Workload, calibration: Calibration) -> str:
    """What of this run's kind the calibration has seen."""
    seen = [f"{level} {name}" for level, name in (("family", family), ("sku", work.chip), ("site", work.site))]
    known = [name for name in seen if name in calibration.names]
    return f"calibrated on {calibration.runs} published runs; seen before: {', '.join(known) or 'nothing of its kind'}"


def _hours(work: Workload, middle: float, low: float, high: float, chips: int) -> tuple[float, float, float] | None:
    if work.tokens is None:
        return None
    of = work.tokens / chips / 3600
    return of / high, of / middle, of / low


def _serve(work: Workload, profiles: Sequence[Row]) -> Prediction:
    """Serving, from a profile of one's own (measured) or a published one of the same work; otherwise it declines."""
    if work.measured is not None:
        return _served(work, work.measured, "a profile of one's own")
    for row in profiles:
        if row.work is not None and row.actual is not None and _alike(work, row.work):
            return _served(work, row.actual, f"the published profile {row.id}")
    reason = "serving is predicted from a profile alone (a roofline was off by 60%): give `measured`, tokens/s and chip"
    return Prediction(work.id, None, None, None, work.chips, declined=reason)


def _alike(work: Workload, other: Workload) -> bool:
    """True where a profile of `other` speaks of `work`."""
    same = (work.model, work.chip, work.phase, work.precision) == (
        other.model,
        other.chip,
        other.phase,
        other.precision,
    )
    pairs = ((work.context, other.context), (work.batch_per_chip, other.batch_per_chip))
    near = all(a is None or b is None or abs(a / b - 1) <= NEAR for a, b in pairs)
    return same and near and (work.phase != "prefill" or abs(work.sequence / other.sequence - 1) <= NEAR)


def _served(work: Workload, rate: float, rests: str) -> Prediction:
    wide = math.exp(Z80 * PROFILE_SIGMA)
    why = (f"{rests}; the interval is assumed, not measured",)
    hours = _hours(work, rate, rate / wide, rate * wide, work.chips)
    return Prediction(work.id, rate, rate / wide, rate * wide, work.chips, hours=hours, why=why)


def _two(trained: Prediction, work: Workload, chips: Catalogue, profiles: Sequence[Row]) -> Prediction:
    """A learner and what generates for it: rollouts of reinforcement, or a teacher's replies.

    Seconds of a step: the learner's (with a forward pass of the reference and one of the old policy in reinforcement:
    5/3 of training), the generation of the batch, and the hand-off of weights; side by side where they overlap.
    """
    side = work.rollout
    assert side is not None
    assert trained.tokens_per_s_per_chip
    assert trained.low
    assert trained.high
    chips.chip(side.chip)
    rate, rests = _rollout_rate(work, side, profiles)
    if rate is None:
        return Prediction(work.id, None, None, None, work.chips, declined=rests)
    tokens = work.batch * work.sequence
    passes = 5 / 3 if work.kind == "rl" else 1.0
    learn = passes * tokens / trained.tokens_per_s_per_chip / work.chips
    generate = work.batch * side.length / rate / side.chips
    hand = _hand_off(work, side, chips) if work.kind == "rl" else 0.0
    total = max(learn, generate + hand) if side.overlapped else learn + generate + hand
    spread = math.log(trained.high / trained.low) / (2 * Z80)
    parts = [(learn, spread), (generate, PROFILE_SIGMA * 1.25)]
    if side.overlapped:
        sigma = max(parts)[1]
    else:
        sigma = math.sqrt(sum((seconds * each) ** 2 for seconds, each in parts)) / total
    together = side.chips + work.chips
    middle, wide = tokens / total / together, math.exp(Z80 * sigma)
    shares = f"learning {learn:.3g} s, generating {generate:.3g} s, handing weights over {hand:.3g} s a step"
    return Prediction(
        work.id, middle, middle / wide, middle * wide, together, trained.memory_gb, trained.state_gb, trained.layout,
        total, _hours(work, middle, middle / wide, middle * wide, together),
        {"learn": learn, "generate": generate, "hand": hand}, None, (*trained.why, f"rollouts: {rests}", shares),
    )  # fmt: skip


def _rollout_rate(work: Workload, side: Rollout, profiles: Sequence[Row]) -> tuple[float | None, str]:
    """Generated tokens a second and chip, and what says so; None and why, where nothing does."""
    if side.tokens_per_s_per_chip is not None:
        return side.tokens_per_s_per_chip, "the rate given"
    model = side.model or work.model
    for row in profiles:
        other = row.work
        if other is None or row.actual is None or other.phase != "decode":
            continue
        context = side.prompt + side.length / 2
        same = (other.model, other.chip, other.precision) == (model, side.chip, side.precision)
        if same and (other.context is None or abs(context / other.context - 1) <= NEAR):
            return row.actual, f"the published profile {row.id}"
    return None, f"generation on {side.chip} is predicted from a profile alone: give rollout.tokens_per_s_per_chip"


def _hand_off(work: Workload, side: Rollout, chips: Catalogue) -> float:
    """Seconds to bring new weights to the generators: all learners send at once, over the slower network."""
    size = 1 if side.precision in ("fp8", "mxfp8", "int8") else 2
    rates = [chips.chip(name).network_gbps for name in (work.chip, side.chip)]
    slowest = min(100.0 if rate is None else rate.value for rate in rates)
    return work.model.parameters() * size / (min(work.chips, side.chips) * slowest / 8 * 1e9)


def predict_file(
    path: Path, chips: str = "chips.json", calibration: Path | None = None
) -> tuple[list[tuple[Prediction, tuple[str, ...]]], list[str]]:
    """Every row of a file with its prediction and the keys that nobody knows; and warnings.

    Raises RecipeError with file, line and column where a row is wrong; nothing is predicted then.
    """
    asked = rows.read(path)
    place = locate(chips)
    catalogue, learnt = load(place), calibrate.load(calibration)
    for row in asked:
        _check_chips(row, catalogue)
    wanted = {"serve", "rl", "distill"}
    profiles = rows.read(rows.published()) if any(row.work and row.work.kind in wanted for row in asked) else []
    profiles = [row for row in profiles if row.work is not None and row.work.kind == "serve"]
    warnings = [f"{row.where}: {key!r} is no key of a row, and has no effect" for row in asked for key in row.ignored]
    if calibration is None and learnt.data_sha256 != calibrate.digest(rows.published(), place):
        warnings.append("the calibration is older than the data: ottava calibrate makes it anew")
    return [(_one(row, catalogue, learnt, profiles), row.ignored) for row in asked], warnings


def _one(row: Row, catalogue: Catalogue, learnt: Calibration, profiles: Sequence[Row]) -> Prediction:
    if row.work is None:
        return Prediction(row.id, None, None, None, declined=row.missing)
    return predict(row.work, catalogue, learnt, profiles)


def _check_chips(row: Row, catalogue: Catalogue) -> None:
    """Raise RecipeError, with its place, for a chip that has no figures."""
    work = row.work
    for name in [] if work is None else [work.chip] + ([work.rollout.chip] if work.rollout else []):
        try:
            catalogue.chip(name)
        except RecipeError as error:
            raise RecipeError(f"{row.id}: {error.what}", where=row.where, fix=error.fix) from None
