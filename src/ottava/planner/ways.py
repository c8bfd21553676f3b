"""Every way to do every job, and why the other ways are none: from the files to numbers for the solver.

What a chip cannot do (memory, links, chips, no figure for the work) rules a pool out for good. What people forbid (hard
rules, a refused licence) is kept apart by name, so that it can be relaxed and priced.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from ottava.errors import RecipeError
from ottava.planner import calibrate
from ottava.planner.calibrate import Calibration
from ottava.planner.instance import Instance, Option, Task
from ottava.planner.portfolio import Asked, Day, Job, Phase, Pool, Rule
from ottava.planner.predict import predict

Cause = Literal["work", "memory", "link", "domain", "chips", "pools", "time"]
HOURS_A_DAY = 24.0


@dataclass(frozen=True)
class Span3:
    """A figure with its interval, and what it rests on."""

    value: float
    low: float
    high: float
    basis: str

    def per(self, number: float) -> Span3:
        """Divided by a number."""
        return Span3(self.value / number, self.low / number, self.high / number, self.basis)


@dataclass(frozen=True)
class Way:
    """A job on `chips` chips of a pool: hours (with interval), dollars (with interval), and the soft rules against
    it."""

    pool: Pool
    chips: int
    hours: Span3
    usd: Span3
    against: tuple[str, ...]
    breaks: tuple[str, ...]
    penalty: float


@dataclass(frozen=True)
class Refusal:
    """Why a pool cannot do a job: what is needed, what is there, in one unit, and in a sentence."""

    pool: str
    cause: Cause
    why: str
    needs: float | None = None
    there: float | None = None


@dataclass(frozen=True)
class Piece:
    """One task of the instance: a job, or one share of one phase of what is served."""

    job: Job
    name: str
    ways: tuple[Way, ...]
    phase: Phase | None = None


@dataclass(frozen=True)
class Problem:
    """The instance with what its numbers mean."""

    asked: Asked
    instance: Instance
    pieces: tuple[Piece, ...]
    refusals: dict[str, tuple[Refusal, ...]] = field(default_factory=dict)

    def slot_of(self, day: Day) -> float:
        """Slots from the plan's start to a day."""
        return (day - self.asked.portfolio.start).days * HOURS_A_DAY / self.asked.portfolio.grid


def price(asked: Asked, pool: Pool) -> Span3:
    """Dollars of one chip for one hour."""
    told = pool.usd_per_chip_hour
    if told is not None:
        low, high = told.low or told.value, told.high or told.value
        return Span3(told.value, low, high, f"{told.source} ({told.date}; {told.certainty})")
    rent = asked.catalogue.chip(pool.chip).usd_per_hour
    if rent is None:
        where = asked.fleet_file.where(("pools", asked.inventory.pools.index(pool)))
        fix = "add usd_per_chip_hour to the pool, with its source"
        raise RecipeError(f"no price is known of the chip {pool.chip!r}", where=where, fix=fix)
    return Span3(rent.mid, rent.low, rent.high, f"{rent.source} ({rent.date}; {rent.certainty})")


def build(asked: Asked, calibration: Calibration | None = None) -> Problem:
    """All ways of all jobs. Raises RecipeError, with file and line, for a job that fits nowhere."""
    if calibration is None and any(job.workload is not None for job in asked.portfolio.jobs):
        calibration = calibrate.load()
    pieces: list[Piece] = []
    refusals: dict[str, tuple[Refusal, ...]] = {}
    for job in asked.portfolio.jobs:
        made, refused = _pieces(asked, job, calibration)
        refusals[job.name] = tuple(refused)
        if any(not piece.ways for piece in made):
            lines = "; ".join(f"{one.pool}: {one.why}" for one in refused)
            where = asked.job_line(job.name)
            fix = "give it a pool that can hold it, or another number of chips"
            raise RecipeError(f"the job {job.name!r} fits nowhere: {lines}", where=where, fix=fix)
        pieces += made
    numbers = {job.name: [n for n, p in enumerate(pieces) if p.job is job] for job in asked.portfolio.jobs}
    tasks = tuple(_task(asked, piece, [n for name in piece.job.after for n in numbers[name]]) for piece in pieces)
    portfolio = asked.portfolio
    pools = tuple(_steps(asked, pool) for pool in asked.inventory.pools)
    budget = None if portfolio.budget is None else math.floor(portfolio.budget)
    horizon = math.floor(portfolio.horizon / portfolio.grid)
    return Problem(asked, Instance(tasks, pools, horizon, budget), tuple(pieces), refusals)


def _steps(asked: Asked, pool: Pool) -> tuple[tuple[int, int], ...]:
    """A pool's chips over time, in slots. Chips count from the first whole slot in which they are there."""
    grid, horizon = asked.portfolio.grid, math.floor(asked.portfolio.horizon / asked.portfolio.grid)
    licence = pool.licence
    first = max(pool.lead_time, licence.lead_time if licence is not None and licence.state == "pending" else 0.0)
    changes = [(first, pool.chips - pool.reserved), *((max(first, a.after), a.chips) for a in pool.arrivals)]
    steps: dict[int, int] = {0: 0}
    for hours, chips in sorted(changes):
        slot = math.ceil(hours / grid)
        steps[slot] = max(steps.values()) + chips
    if licence is not None and licence.until is not None:
        last = max(0, math.floor((licence.until - asked.portfolio.start).days * HOURS_A_DAY / grid))
        steps = {slot: chips for slot, chips in steps.items() if slot < last} | {last: 0}
    return tuple((slot, chips) for slot, chips in sorted(steps.items()) if slot < horizon)


def _pieces(asked: Asked, job: Job, calibration: Calibration | None) -> tuple[list[Piece], list[Refusal]]:
    refused: list[Refusal] = []
    if job.kind != "serve":
        ways: list[Way] = []
        for pool in asked.inventory.pools:
            found = _ways(asked, job, pool, calibration)
            if isinstance(found, Refusal):
                refused.append(found)
            else:
                ways += found
        return [Piece(job, job.name, tuple(ways))], refused
    pieces = []
    for number, phase in enumerate(job.phases):
        ways = []
        for pool in asked.inventory.pools:
            one = _server(asked, job, phase, pool)
            if not isinstance(one, Refusal):
                ways.append(one)
            elif all(one.pool != other.pool for other in refused):
                refused.append(one)
        for share in range(job.split):
            label = f"{job.name}@{number + 1}" + (f".{share + 1}" if job.split > 1 else "")
            pieces.append(Piece(job, label, tuple(ways), phase))
    return pieces, refused


def _unfit(asked: Asked, job: Job, pool: Pool) -> Refusal | None:
    """What the pool lacks, whatever the number of chips."""
    chip = asked.catalogue.chip(pool.chip)
    usual = chip.network_gbps.value if chip.network_gbps is not None else None
    link = pool.link if pool.link is not None else usual
    joined = pool.domain or (int(chip.scaleup_chips.value) if chip.scaleup_chips is not None else None)
    if job.pools and pool.name not in job.pools:
        return Refusal(pool.name, "pools", "the job names other pools")
    if job.link and (link is None or link < job.link):
        there = "of unknown speed" if link is None else f"of {link:g}"
        why = f"it needs a network of {job.link:g} Gb/s a chip, and there is one {there}"
        return Refusal(pool.name, "link", why, job.link, link)
    if job.domain > 1 and (joined is None or joined < job.domain):
        why = f"it needs {job.domain} chips in one fast domain, and there are {joined or 'an unknown number'}"
        return Refusal(pool.name, "domain", why, job.domain, joined)
    return None


def _ways(asked: Asked, job: Job, pool: Pool, calibration: Calibration | None) -> list[Way] | Refusal:
    unfit = _unfit(asked, job, pool)
    if unfit is not None:
        return unfit
    each = asked.catalogue.chip(pool.chip).memory_gb.value
    fitting = [chips for chips in job.chips if chips * each >= job.memory]
    if not fitting:
        most = max(job.chips)
        why = f"it needs {job.memory:,.0f} GB, and {most:,} x {each:g} GB are {most * each:,.0f}"
        return Refusal(pool.name, "memory", why, job.memory, most * each)
    there = [chips for chips in fitting if chips <= pool.most]
    if not there:
        why = f"it needs {min(fitting):,} chips, and the plan may use {pool.most:,}"
        return Refusal(pool.name, "chips", why, min(fitting), pool.most)
    ways, longest = [], asked.portfolio.horizon
    shortest: float | None = None
    for chips in there:
        work = _chip_hours(asked, job, pool, chips, calibration)
        if isinstance(work, Refusal):
            return work
        hours = work.per(chips)
        taken = hours.high if asked.portfolio.count_on == "high" else hours.value
        shortest = taken if shortest is None else min(shortest, taken)
        if math.ceil(taken / asked.portfolio.grid) * asked.portfolio.grid <= longest:
            ways.append(_way(asked, job, pool, chips, hours))
    if not ways:
        weeks = (shortest or 0.0) / 168
        why = f"it takes {weeks:,.1f} weeks on {max(there):,} chips, and the plan has {longest / 168:,.1f}"
        return Refusal(pool.name, "time", why, weeks, longest / 168)
    return ways


def _chip_hours(asked: Asked, job: Job, pool: Pool, chips: int, calibration: Calibration | None) -> Span3 | Refusal:
    """What the job takes on this chip: as it says, by chip before family, or as the predictor says."""
    chip = asked.catalogue.chip(pool.chip)
    told = job.hours.get(pool.chip) or job.hours.get(chip.family)
    if told is not None:
        basis = f"{told.source} ({told.date}; {told.certainty})"
        return Span3(told.value, told.low or told.value, told.high or told.value, basis)
    if job.workload is None or job.workload.tokens is None or calibration is None:
        return Refusal(pool.name, "work", f"nothing says how long it takes on the {pool.chip}")
    changed = {"chip": pool.chip, "chips": chips, "network_gbps": pool.link or None, "layout": None}
    work = job.workload.model_copy(update=changed)
    try:
        found = predict(work, asked.catalogue, calibration)
    except RecipeError as error:
        return Refusal(pool.name, "work", f"the predictor has no figure: {error.what}")
    if found.tokens_per_s_per_chip is None or found.low is None or found.high is None:
        return Refusal(pool.name, "work", f"the predictor declines: {found.declined}")
    tokens = job.workload.tokens / 3600
    basis = f"predicted, 80% interval: {'; '.join(found.why)}"
    return Span3(tokens / found.tokens_per_s_per_chip, tokens / found.high, tokens / found.low, basis)


def _server(asked: Asked, job: Job, phase: Phase, pool: Pool) -> Way | Refusal:
    """One share of a phase: as many chips as its volume needs, in whole copies of the model."""
    unfit = _unfit(asked, job, pool)
    if unfit is not None:
        return unfit
    chip = asked.catalogue.chip(pool.chip)
    rate = job.rate.get(pool.chip) or job.rate.get(chip.family)
    if rate is None:
        return Refusal(pool.name, "work", f"nothing says how many tokens a second a {pool.chip} serves")
    copy = max(1, math.ceil(job.memory / chip.memory_gb.value))
    per_second = phase.volume / 86400 * (1 + job.headroom) / job.split
    copies = math.ceil(per_second / rate.value / copy)
    chips = copies * copy
    if chips > pool.most:
        why = f"a share of it needs {chips:,} chips, and the plan may use {pool.most:,}"
        return Refusal(pool.name, "chips", why, chips, pool.most)
    hours = (phase.until - phase.begin).days * HOURS_A_DAY
    basis = f"{rate.value:g} tokens/s/chip: {rate.source} ({rate.date}; {rate.certainty})"
    return _way(asked, job, pool, chips, Span3(hours, hours, hours, basis))


def _way(asked: Asked, job: Job, pool: Pool, chips: int, hours: Span3) -> Way:
    each = price(asked, pool)
    usd = Span3(
        chips * hours.value * each.value, chips * hours.low * each.low, chips * hours.high * each.high, each.basis
    )
    soft = [rule for rule in disregarded(asked, job, pool) if rule.strength == "soft"]
    hard = [f"rule {rule.name}" for rule in disregarded(asked, job, pool) if rule.strength == "hard"]
    if pool.licence is not None and pool.licence.state == "refused":
        hard.append(f"licence {pool.name}")
    penalty = sum(rule.price or 0.0 for rule in soft)
    if job.kind == "serve":
        penalty /= job.split * len(job.phases)
    return Way(pool, chips, hours, usd, tuple(rule.name for rule in soft), tuple(hard), penalty)


def disregarded(asked: Asked, job: Job, pool: Pool) -> list[Rule]:
    """The rules that speak against this job on this pool."""
    vendor = asked.catalogue.chip(pool.chip).vendor
    return [rule for rule in asked.portfolio.rules if rule.speaks_of(job) and not rule.allows(vendor, pool)]


def _task(asked: Asked, piece: Piece, after: list[int]) -> Task:
    portfolio, job = asked.portfolio, piece.job
    names = [pool.name for pool in asked.inventory.pools]
    grid, counted = portfolio.grid, portfolio.count_on

    def slot(day: Day) -> float:
        return (day - portfolio.start).days * HOURS_A_DAY / grid

    options = tuple(
        Option(
            names.index(way.pool.name), way.chips,
            max(1, math.ceil((way.hours.high if counted == "high" else way.hours.value) / grid - 1e-9)),
            math.ceil(way.usd.value), round(way.penalty), way.breaks,
        )
        for way in piece.ways
    )  # fmt: skip
    drop = None if job.worth is None else round(job.worth / (job.split * len(job.phases) if job.phases else 1))
    if piece.phase is not None:
        first, end = math.floor(slot(piece.phase.begin)), math.ceil(slot(piece.phase.until))
        options = tuple(Option(o.pool, o.chips, end - first, o.usd, o.penalty, o.breaks) for o in options)
        return Task(piece.name, options, max(0, first), None, None, 0, drop, tuple(after), fixed=True)
    release = 0 if job.not_before is None else max(0, math.ceil(slot(job.not_before)))
    wanted = job.deadline
    if wanted is None:
        return Task(piece.name, options, release, None, None, 0, drop, tuple(after))
    by, late = math.floor(slot(wanted.by)), round(wanted.usd_per_week * grid)
    return Task(piece.name, options, release, by if wanted.hard else None, by, late, drop, tuple(after))
