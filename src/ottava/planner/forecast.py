"""Will it be done by then: simulated runs with failures, the way to a release, and what a fallback costs.

A failure rate is never known, only estimated from failures seen in so many chip-hours; each simulated run draws its own
from what that says (a gamma distribution, Jeffreys prior). Between failures work is saved every so often; a failure
costs what was not saved, and a restart, which may fail too.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from ottava.document import Document, Key, read, suggest
from ottava.errors import RecipeError
from ottava.planner import quantity as q
from ottava.planner.chips import Catalogue, Provenance
from ottava.planner.portfolio import Interval, Price, check_distinct
from ottava.recipe import Frozen, Name

Array = NDArray[np.float64]
Z90 = 1.2815515655446004  # of the normal distribution: the 90% quantile
SHORTEST_MTBF_H = 0.05
LONGEST_H = 5 * 365 * 24.0
"""A run that has not ended after so many hours never does, for a plan's purposes."""


class Time(Interval):
    """A time with its 10% and 90% quantiles; without them it is certain."""

    value: q.Hours
    low: q.Hours | None = None
    high: q.Hours | None = None

    def draw(self, rng: np.random.Generator, count: int) -> Array:
        """From a lognormal distribution on each side of the middle, which is its median."""
        z = rng.standard_normal(count)
        below = math.log(self.value / (self.low or self.value)) / Z90
        above = math.log((self.high or self.value) / self.value) / Z90
        return np.asarray(self.value * np.exp(z * np.where(z < 0, below, above)))


class Failures(Provenance):
    """Failures that stopped a whole run, seen in so many chip-hours."""

    seen: q.Number
    chip_hours: q.ChipHours

    @model_validator(mode="after")
    def _watched(self) -> Failures:
        if self.chip_hours <= 0:
            raise ValueError("failures are seen in chip-hours above 0")
        return self

    def rate(self, rng: np.random.Generator, count: int) -> Array:
        """Failures a chip-hour, drawn from what is known of them."""
        return np.asarray(rng.gamma(self.seen + 0.5, 1 / self.chip_hours, count))

    @property
    def mean(self) -> float:
        """Failures a chip-hour, expected."""
        return (self.seen + 0.5) / self.chip_hours


class Chips(Frozen):
    """Where a run computes. work: wall time of the whole run there without a failure; interval: between checkpoints, by
    default the best by Daly's formula."""

    chip: str
    chips: q.Count
    work: Time
    failures: Failures
    checkpoint: q.Seconds
    restart: q.Seconds
    interval: q.Seconds | None = None
    usd_per_chip_hour: Price


class Fallback(Frozen):
    """What is done if the run does not go well: at `decide_after`, with less than `least` of the progress that was
    planned by then, it moves on, with what it has, which takes `move`."""

    decide_after: q.Hours
    least: q.Chance
    move: q.Hours
    to: Chips


class Stage(Frozen):
    """A step to the release: a time, or a run on chips. again: the chance that it has to be done once more."""

    name: Name
    after: tuple[str, ...] = ()
    time: Time | None = None
    run: Chips | None = None
    fallback: Fallback | None = None
    again: q.Chance = 0.0

    @model_validator(mode="after")
    def _one(self) -> Stage:
        if (self.time is None) == (self.run is None):
            raise ValueError("a stage has a time or a run, one of both")
        if self.fallback is not None and self.run is None:
            raise ValueError("a stage without a run has nothing to fall back from")
        return self


class Run(Frozen):
    """The way to a release."""

    kind: Literal["run"]
    name: str
    description: str = ""
    start: datetime.date
    by: datetime.date
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]


def load(path: Path, catalogue: Catalogue) -> Run:
    """Read and check a file such as fleets/r2-run.yaml. Raises RecipeError with file and line."""
    document = read(path)
    if document.data.get("kind") != "run":
        where = document.where(("kind",), key=True)
        raise RecipeError("a file with `kind: run` is wanted here", where=where, fix="see fleets/r2-run.yaml")
    run = document.parse(Run)
    check_distinct(document, "stages")
    _check(run, document)
    _check_chips(run, document, catalogue)
    return run


def _check(run: Run, document: Document) -> None:
    names = [stage.name for stage in run.stages]
    for index, stage in enumerate(run.stages):
        for number, before in enumerate(stage.after):
            where = document.where(("stages", index, "after", number))
            if before not in names:
                raise RecipeError(f"there is no stage {before!r}", where=where, fix=suggest(before, names))
            if names.index(before) >= index:
                raise RecipeError(
                    f"{stage.name!r} waits for {before!r}, which does not stand before it", where=where,
                    fix="list stages in order; a circle cannot be put in order",
                )  # fmt: skip
    check_date(run, run.by, document.where(("by",)))


def check_date(run: Run, by: datetime.date, where: str) -> None:
    """A date to release by that is not after the start. Raises RecipeError."""
    if by <= run.start:
        what = f"{by} is not after {run.start}, when the first stage starts"
        raise RecipeError(what, where=where, fix="give a later date")


def _check_chips(run: Run, document: Document, catalogue: Catalogue) -> None:
    """Chips nobody knows, and runs that fail so often that simulating them has no end."""
    for index, stage in enumerate(run.stages):
        places: list[tuple[Key, Chips | None]] = [
            (("stages", index, "run"), stage.run),
            (("stages", index, "fallback", "to"), stage.fallback.to if stage.fallback else None),
        ]
        for at, there in places:
            if there is None:
                continue
            if there.chip not in catalogue.chips:
                fix = suggest(there.chip, catalogue.chips)
                raise RecipeError(f"no figures for a chip {there.chip!r}", where=document.where((*at, "chip")), fix=fix)
            mtbf = 1 / (there.failures.mean * there.chips)
            if mtbf < SHORTEST_MTBF_H:
                what = f"so many chips fail every {3600 * mtbf:.2g} s: no run makes progress at that rate"
                fix = "check chips, seen and chip_hours"
                raise RecipeError(what, where=document.where((*at, "failures")), fix=fix)


def daly_interval(checkpoint_h: float, mtbf_h: float) -> float:
    """Hours of work between checkpoints that cost least (J. T. Daly, FGCS 22, 2006, eq. 37); Young's to first order."""
    if checkpoint_h >= 2 * mtbf_h:
        return mtbf_h
    ratio = math.sqrt(checkpoint_h / (2 * mtbf_h))
    return math.sqrt(2 * checkpoint_h * mtbf_h) * (1 + ratio / 3 + ratio * ratio / 9) - checkpoint_h


def expected_hours(work_h: float, interval_h: float, checkpoint_h: float, restart_h: float, mtbf_h: float) -> float:
    """Mean wall hours of a run in whole intervals, failures coming at random, in restarts too (Daly 2006, eq. 20)."""
    segment = math.expm1((interval_h + checkpoint_h) / mtbf_h)
    return mtbf_h * math.exp(restart_h / mtbf_h) * segment * work_h / interval_h


@dataclass(frozen=True)
class Walk:
    """What became of simulated runs: wall hours, failures, and the share of the work that is done and saved."""

    hours: Array
    failures: Array
    done: Array


def simulate(
    rng: np.random.Generator, work: Array, rate: Array, interval: float, checkpoint: float, restart: float,
    stop: float = LONGEST_H,
) -> Walk:  # fmt: skip
    """Run until done, or until `stop` hours. rate: failures an hour; all times in hours.

    After the last interval there is no checkpoint. A run stopped keeps what it saved.
    """
    count = len(work)
    hours, failures, left = np.zeros(count), np.zeros(count), work.astype(float).copy()
    idle = np.zeros(count)  # a restart stands before all attempts but the first
    active = np.flatnonzero(left > 0)
    while len(active):
        need = left[active] + checkpoint * (np.ceil(left[active] / interval - 1e-12) - 1)
        until = rng.exponential(1 / np.maximum(rate[active], 1e-300))
        room = stop - hours[active]
        ends = np.minimum(until, room)
        finished = idle[active] + need <= ends
        saved = np.floor(np.maximum(0.0, ends - idle[active]) / (interval + checkpoint)) * interval
        hours[active] += np.where(finished, idle[active] + need, ends)
        left[active] = np.where(finished, 0.0, np.maximum(0.0, left[active] - saved))
        failed = ~finished & (until < room)
        failures[active] += failed
        idle[active] = restart
        active = active[failed]
    return Walk(hours, failures, 1 - left / work)


@dataclass(frozen=True)
class Drawn:
    """A stage in every simulated run: hours, dollars, failures, whether it moved, whether it ended at all."""

    hours: Array
    usd: Array
    failures: Array
    moved: NDArray[np.bool_]
    ended: NDArray[np.bool_]


def draw_stage(stage: Stage, rng: np.random.Generator, count: int, *, fallback: bool = True) -> Drawn:
    """Simulate one stage `count` times; what has to be done again is drawn anew."""
    first = _once(stage, rng, count, fallback)
    if not stage.again:
        return first
    more, second = rng.random(count) < stage.again, _once(stage, rng, count, fallback)
    return Drawn(
        first.hours + more * second.hours, first.usd + more * second.usd, first.failures + more * second.failures,
        first.moved | (more & second.moved), first.ended & (~more | second.ended),
    )  # fmt: skip


def _once(stage: Stage, rng: np.random.Generator, count: int, fallback: bool) -> Drawn:
    never = np.zeros(count, dtype=bool)
    if stage.run is None:
        assert stage.time is not None
        return Drawn(stage.time.draw(rng, count), np.zeros(count), np.zeros(count), never, ~never)
    work = stage.run.work.draw(rng, count)
    second = stage.fallback if fallback else None
    stop = LONGEST_H if second is None else second.decide_after
    rate = stage.run.failures.rate(rng, count) * stage.run.chips
    walk = simulate(rng, work, rate, *_care(stage.run), stop=stop)
    price = _prices(stage.run.usd_per_chip_hour, rng, count)
    if second is None:
        return Drawn(walk.hours, walk.hours * stage.run.chips * price, walk.failures, never, walk.done >= 1)
    moved = (walk.done < 1) & (walk.done < second.least * min(1.0, second.decide_after / stage.run.work.value))
    stay, go = np.flatnonzero((walk.done < 1) & ~moved), np.flatnonzero(moved)
    hours, failures = walk.hours.copy(), walk.failures.copy()
    ended = walk.done >= 1
    rest = simulate(rng, work[stay] * (1 - walk.done[stay]), rate[stay], *_care(stage.run))
    hours[stay] += rest.hours
    failures[stay] += rest.failures
    ended[stay] = rest.done >= 1
    usd = hours * stage.run.chips * price
    other = second.to
    there = other.work.draw(rng, len(go)) * (1 - walk.done[go])
    walk2 = simulate(rng, there, other.failures.rate(rng, len(go)) * other.chips, *_care(other))
    hours[go] += second.move + walk2.hours
    failures[go] += walk2.failures
    usd[go] += walk2.hours * other.chips * _prices(other.usd_per_chip_hour, rng, len(go))
    ended[go] = walk2.done >= 1
    return Drawn(hours, usd, failures, moved, ended)


def _care(run: Chips) -> tuple[float, float, float]:
    """Hours: between checkpoints, of a checkpoint, of a restart."""
    checkpoint, restart = run.checkpoint / 3600, run.restart / 3600
    mtbf = 1 / (run.failures.mean * run.chips)
    interval = run.interval / 3600 if run.interval is not None else daly_interval(max(checkpoint, 1e-6), mtbf)
    return max(interval, 1e-6), checkpoint, restart


def _prices(price: Price, rng: np.random.Generator, count: int) -> Array:
    low, high = price.low or price.value, price.high or price.value
    return np.asarray(rng.triangular(low, price.value, high, count) if low < high else np.full(count, price.value))


def planned_hours(stage: Stage) -> float:
    """What a plan reckons with: the middle of the time, or of the work with the failures to be expected."""
    if stage.run is None:
        assert stage.time is not None
        return stage.time.value
    run = stage.run
    mtbf = 1 / (run.failures.mean * run.chips)
    interval, checkpoint, restart = _care(run)
    return min(LONGEST_H, expected_hours(run.work.value, interval, checkpoint, restart, mtbf))


def forecast(run: Run, draws: int = 10_000, seed: int = 0, by: datetime.date | None = None) -> dict[str, Any]:
    """The forecast as JSON: {probability, low, high, by, release: {p10, p50, p90}, usd, stages, driver, fallback}.

    low, high: the 95% interval that the number of draws leaves. driver: the stage that makes late releases late most
    often. fallback: the same without it, where there is one.
    """
    wanted = by or run.by
    told = _simulated(run, draws, seed, wanted, fallback=True)
    if any(stage.fallback is not None for stage in run.stages):
        other = _simulated(run, draws, seed, wanted, fallback=False)
        told["fallback"] = {
            "moves": max(stage["moved"] for stage in told["stages"]),
            "without": {key: other[key] for key in ("probability", "never", "release", "usd")},
            "usd_p50": told["usd"]["p50"] - other["usd"]["p50"],
        }
    else:
        told["fallback"] = None
    return told


def _simulated(run: Run, draws: int, seed: int, by: datetime.date, *, fallback: bool) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    drawn = {stage.name: draw_stage(stage, rng, draws, fallback=fallback) for stage in run.stages}
    hours = {name: one.hours for name, one in drawn.items()}
    release = _release(run, hours)
    ended = np.all([one.ended for one in drawn.values()], axis=0)
    limit = (by - run.start).days * 24.0
    good = ended & (release <= limit)
    planned = {stage.name: planned_hours(stage) for stage in run.stages}
    usd = np.sum([one.usd for one in drawn.values()], axis=0)
    drivers = _drivers(run, hours, release, planned, ended & ~good)
    low, high = _wilson(int(good.sum()), draws)
    rows = [_row(run, stage, drawn[stage.name], planned[stage.name], drivers) for stage in run.stages]
    late = [row for row in rows if row["drives"]]
    return {
        "name": run.name, "start": run.start.isoformat(), "by": by.isoformat(), "draws": draws, "seed": seed,
        "probability": round(float(good.mean()), 4), "low": round(low, 4), "high": round(high, 4),
        "never": round(float((~ended).mean()), 4),
        "planned": _date(run, float(_release(run, {n: np.array([h]) for n, h in planned.items()})[0])),
        "release": {key: _date(run, at) for key, at in _quantiles(np.where(ended, release, np.inf)).items()},
        "usd": {key: _whole(value) for key, value in _quantiles(usd).items()},
        "stages": rows,
        "driver": max(late, key=lambda row: row["drives"])["name"] if late else None,
    }  # fmt: skip


def _release(run: Run, hours: Mapping[str, Array]) -> Array:
    """When the last stage ends, in hours from the start."""
    ends: dict[str, Array] = {}
    for stage in run.stages:
        begin = np.max([np.zeros_like(hours[stage.name]), *(ends[name] for name in stage.after)], axis=0)
        ends[stage.name] = begin + hours[stage.name]
    return np.asarray(np.max(list(ends.values()), axis=0))


def _drivers(
    run: Run, hours: Mapping[str, Array], release: Array, planned: Mapping[str, float], late: NDArray[np.bool_]
) -> dict[str, tuple[float, float]]:
    """By stage: the share of late releases that it drives, and the mean days that these would gain had it gone to plan.

    A release's driver is the stage that, had it taken as long as planned, would have brought it forward most.
    """
    if not late.any():
        return dict.fromkeys(hours, (0.0, 0.0))
    gains = {
        name: (release - _release(run, {**hours, name: np.full_like(release, planned[name])}))[late] for name in hours
    }
    first = np.argmax(list(gains.values()), axis=0)
    return {
        name: (float((first == index).mean()), float(gain.mean()) / 24)
        for index, (name, gain) in enumerate(gains.items())
    }


def _row(
    run: Run, stage: Stage, drawn: Drawn, planned: float, drivers: Mapping[str, tuple[float, float]]
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": stage.name,
        "planned_h": round(planned, 1),
        "hours": {key: _whole(value) for key, value in _quantiles(drawn.hours).items()},
        "usd": {key: _whole(value) for key, value in _quantiles(drawn.usd).items()},
        "failures": round(float(drawn.failures.mean()), 2),
        "moved": round(float(drawn.moved.mean()), 4),
        "drives": round(drivers[stage.name][0], 4),
        "slip_days": round(drivers[stage.name][1], 2),
    }
    if stage.run is not None:
        interval, checkpoint, _ = _care(stage.run)
        mtbf = 1 / (stage.run.failures.mean * stage.run.chips)
        young = math.sqrt(2 * max(checkpoint, 1e-6) * mtbf)
        row |= {"mtbf_h": round(mtbf, 2), "interval_h": round(interval, 3), "young_h": round(young, 3)}
    return row


def _quantiles(values: Array) -> dict[str, float]:
    ordered = np.sort(values)
    return {f"p{share}": float(ordered[min(len(ordered) - 1, share * len(ordered) // 100)]) for share in (10, 50, 90)}


def _whole(value: float) -> float:
    return round(value, 1) if value < 1000 else round(value)


def _date(run: Run, hours: float) -> str | None:
    """None: never, or beyond what is simulated."""
    if not math.isfinite(hours) or hours >= LONGEST_H:
        return None
    moment = datetime.datetime.combine(run.start, datetime.time()) + datetime.timedelta(hours=math.ceil(hours))
    return moment.date().isoformat()


def _wilson(good: int, n: int) -> tuple[float, float]:
    z = 1.959963984540054
    share, half = good / n, z * math.sqrt(good * (n - good) / n**3 + z * z / (4 * n * n))
    middle = share + z * z / (2 * n)
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def histogram(run: Run, draws: int, seed: int) -> Sequence[float]:
    """Days to the release of every simulated run that ends, for a chart."""
    rng = np.random.default_rng(seed)
    drawn = {stage.name: draw_stage(stage, rng, draws) for stage in run.stages}
    ended = np.all([one.ended for one in drawn.values()], axis=0)
    days = _release(run, {name: one.hours for name, one in drawn.items()})[ended] / 24
    return [float(day) for day in np.sort(days)]
