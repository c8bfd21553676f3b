"""What a portfolio and an inventory look like in files, and what is wrong with them, with file and line.

An inventory lists pools of chips; a portfolio lists jobs, rules and a budget. Every number carries its unit, every
figure its source, its date and how sure it is.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from ottava.document import Document, Key, read, suggest
from ottava.errors import RecipeError
from ottava.planner import quantity as q
from ottava.planner.chips import Catalogue, Provenance
from ottava.planner.workload import Workload
from ottava.recipe import Frozen, Name

Kind = Literal["train", "rl", "distill", "serve"]
Day = datetime.date
MOST_STEPS = 20_000
"""Steps of time of a plan: two years in hours. A grid finer than its horizon allows is a mistake."""


class Interval(Provenance):
    """A figure and the range it lies in; without ends it is certain."""

    value: float
    low: float | None = None
    high: float | None = None

    @model_validator(mode="after")
    def _rising(self) -> Self:
        low, high = (self.value if end is None else end for end in (self.low, self.high))
        if not 0 < low <= self.value <= high:
            raise ValueError("low, value and high must rise, above 0")
        return self


class Price(Interval):
    """Rent or cost of a chip for an hour, and the range it lies in."""

    value: q.UsdPerChipHour
    low: q.UsdPerChipHour | None = None
    high: q.UsdPerChipHour | None = None


class Licence(Provenance):
    """Whether the chips may be used: held; pending, from `lead_time` after the start on; or refused."""

    state: Literal["held", "pending", "refused"]
    lead_time: q.Hours = 0.0
    until: Day | None = None


class Arrival(Frozen):
    """More chips, `after` so long from the start of the plan."""

    chips: q.Count
    after: q.Hours


class Pool(Provenance):
    """Chips of one kind in one cluster. reserved: those of `chips` that the plan may not use; link: scale-out
    network of
    one chip; domain: chips joined by the fast network (both, and the price, by default the chip's own); lead_time:
    nothing is there before. Source and date are of `chips`.
    """

    name: Name
    chip: str
    chips: q.Number
    reserved: q.Number = 0
    arrivals: tuple[Arrival, ...] = ()
    lead_time: q.Hours = 0.0
    usd_per_chip_hour: Price | None = None
    link: q.GigabitsPerSecond | None = None
    domain: q.Count | None = None
    licence: Licence | None = None
    state_funded: bool = False
    note: str = ""

    @model_validator(mode="after")
    def _possible(self) -> Pool:
        if self.reserved > self.chips:
            raise ValueError(f"{self.reserved} of {self.chips} chips cannot be reserved")
        return self

    @property
    def most(self) -> int:
        """Chips once all have arrived."""
        return self.chips - self.reserved + sum(arrival.chips for arrival in self.arrivals)


class Inventory(Frozen):
    """A fleet to plan on. domestic: vendors whose chips need no dossier."""

    kind: Literal["inventory"]
    name: str
    description: str = ""
    domestic: tuple[str, ...] = ("Huawei",)
    pools: Annotated[tuple[Pool, ...], Field(min_length=1)]


class Rule(Provenance):
    """Which vendors a job may (hard) or should (soft) use. It speaks of all jobs that fit kinds, sizes, names and
    `state_funded` pools. price: what disregarding a soft rule once is worth. version: of the rule's text."""

    name: Name
    vendors: Annotated[tuple[str, ...], Field(min_length=1)]
    strength: Literal["hard", "soft"]
    price: q.Usd | None = None
    kinds: tuple[Kind, ...] = ()
    jobs: tuple[str, ...] = ()
    min_parameters: q.Parameters | None = None
    max_parameters: q.Parameters | None = None
    state_funded: bool | None = None
    version: str = "1"
    reason: str

    @model_validator(mode="after")
    def _priced(self) -> Rule:
        if (self.price is None) != (self.strength == "hard"):
            raise ValueError("a soft rule has a price (what disregarding it is worth), a hard one has none")
        return self

    def speaks_of(self, job: Job) -> bool:
        """True where the rule is about this job, whatever the pool."""
        size = job.parameters
        return (
            (not self.kinds or job.kind in self.kinds)
            and (not self.jobs or job.name in self.jobs)
            and (self.min_parameters is None or size > self.min_parameters)
            and (self.max_parameters is None or size <= self.max_parameters)
        )

    def allows(self, vendor: str, pool: Pool) -> bool:
        """True where a pool of this vendor agrees with the rule."""
        outside = self.state_funded is not None and pool.state_funded != self.state_funded
        return outside or vendor in self.vendors


class Work(Interval):
    """Chip-hours of a job on one kind of chip, with the interval that its source allows."""

    value: q.ChipHours
    low: q.ChipHours | None = None
    high: q.ChipHours | None = None


class Rate(Interval):
    """Tokens a second that one chip serves."""

    value: q.TokensPerSecondChip
    low: q.TokensPerSecondChip | None = None
    high: q.TokensPerSecondChip | None = None


class Deadline(Frozen):
    """When a job is wanted. hard: it must be done; otherwise each week of lateness costs usd_per_week."""

    by: Day
    hard: bool = False
    usd_per_week: q.UsdPerHour = 0.0


class Phase(Frozen):
    """What is served from a day until another (which is not in it)."""

    begin: Day
    until: Day
    volume: q.TokensPerDay

    @model_validator(mode="after")
    def _forward(self) -> Phase:
        if self.until <= self.begin:
            raise ValueError("a phase ends after it begins")
        return self


class Job(Provenance):
    """Work to place. chips: how many it may run on, one of them is chosen; hours: by chip or by family of chips;
    memory:
    of everything it holds, over all its chips (of a server: of one copy); worth: it may be left out, at this price."""

    name: Name
    kind: Kind
    parameters: q.Parameters
    chips: tuple[q.Count, ...] = ()
    hours: dict[str, Work] = Field({})
    workload: Workload | None = None
    memory: q.Gigabytes
    link: q.GigabitsPerSecond = 0.0
    domain: q.Count = 1
    not_before: Day | None = None
    deadline: Deadline | None = None
    after: tuple[str, ...] = ()
    worth: q.Usd | None = None
    pools: tuple[str, ...] = ()
    phases: tuple[Phase, ...] = ()
    rate: dict[str, Rate] = Field({})
    headroom: q.Share = 0.0
    split: q.Count = 1

    @model_validator(mode="after")
    def _whole(self) -> Job:
        if self.kind == "serve":
            if not self.phases or not self.rate or self.hours or self.chips:
                raise ValueError("what is served has phases and a rate, and neither chips nor hours")
        elif not self.chips or (not self.hours and self.workload is None) or self.phases or self.rate:
            raise ValueError("work has chips, and hours or a workload, and neither phases nor a rate")
        return self


class Portfolio(Frozen):
    """Jobs to place from `start` on. count_on: which end of the hours' intervals the schedule reckons with."""

    kind: Literal["portfolio"]
    name: str
    description: str = ""
    start: Day
    horizon: q.Hours
    grid: q.Hours = 24.0
    budget: q.Usd | None = None
    count_on: Literal["value", "high"] = "value"
    rules: tuple[Rule, ...] = ()
    jobs: Annotated[tuple[Job, ...], Field(min_length=1)]


@dataclass(frozen=True)
class Asked:
    """A checked question: what to place, on what, with which figures; and the files, for messages."""

    portfolio: Portfolio
    inventory: Inventory
    catalogue: Catalogue
    jobs_file: Document
    fleet_file: Document

    def job_line(self, name: str) -> str:
        """Where a job stands."""
        return self.jobs_file.where(("jobs", [job.name for job in self.portfolio.jobs].index(name)))


def load(jobs: Path, fleet: Path, catalogue: Catalogue) -> Asked:
    """Read and check both files. Raises RecipeError with file, line and column."""
    jobs_file, fleet_file = read(jobs), read(fleet)
    _expect(jobs_file, "portfolio")
    _expect(fleet_file, "inventory")
    asked = Asked(jobs_file.parse(Portfolio), fleet_file.parse(Inventory), catalogue, jobs_file, fleet_file)
    _check_steps(asked)
    for file, what in ((jobs_file, "jobs"), (jobs_file, "rules"), (fleet_file, "pools")):
        check_distinct(file, what)
    _check_chips(asked)
    _check_names(asked)
    _check_circle(asked)
    _check_rules(asked)
    return asked


def _expect(document: Document, kind: str) -> None:
    found = document.data.get("kind")
    if found == kind:
        return
    if "stages" in document.data:
        fix = "a recipe's own plan is made by `ottava run RECIPE --only plan`; this command places a portfolio of jobs"
        raise RecipeError("this is a recipe, not a portfolio of jobs", where=document.source, fix=fix)
    example = {"portfolio": "fleets/r2-jobs.yaml", "inventory": "fleets/deepseek.yaml", "run": "fleets/r2-run.yaml"}[
        kind
    ]
    where = document.where(("kind",), key=True)
    raise RecipeError(f"a file with `kind: {kind}` is wanted here", where=where, fix=f"see {example}")


def check_distinct(file: Document, what: str) -> None:
    """Entries of a list with one name twice. Raises RecipeError at the second."""
    names = [entry["name"] for entry in file.data.get(what) or ()]
    twice = next((number for number, name in enumerate(names) if name in names[:number]), None)
    if twice is not None:
        where = file.where((what, twice, "name"))
        raise RecipeError(f"two {what} have the name {names[twice]!r}", where=where, fix="rename one of them")


def _check_steps(asked: Asked) -> None:
    """The plan's steps of time: at least one, and no more than can be searched."""
    portfolio = asked.portfolio
    if portfolio.grid <= 0 or portfolio.horizon < portfolio.grid:
        where = asked.jobs_file.where(("grid" if "grid" in asked.jobs_file.data else "horizon",))
        what = "the horizon is at least one step of the grid, and the grid is above 0"
        raise RecipeError(what, where=where, fix="lengthen the horizon, or make the grid finer")
    if portfolio.horizon / portfolio.grid > MOST_STEPS:
        steps = portfolio.horizon / portfolio.grid
        what = f"the plan has {steps:,.0f} steps of its grid, and {MOST_STEPS:,} can be searched"
        raise RecipeError(what, where=asked.jobs_file.where(("horizon",)), fix="shorten it, or make the grid coarser")


def _check_chips(asked: Asked) -> None:
    for index, pool in enumerate(asked.inventory.pools):
        if pool.chip not in asked.catalogue.chips:
            where = asked.fleet_file.where(("pools", index, "chip"))
            fix = suggest(pool.chip, asked.catalogue.chips)
            raise RecipeError(f"no figures for a chip {pool.chip!r}", where=where, fix=fix)
    known = [*asked.catalogue.chips, *asked.catalogue.families]
    for index, job in enumerate(asked.portfolio.jobs):
        for key in ("hours", "rate"):
            for name in getattr(job, key):
                if name not in known:
                    where = asked.jobs_file.where(("jobs", index, key, name), key=True)
                    raise RecipeError(f"no chip or family {name!r}", where=where, fix=suggest(name, known))


def _check_names(asked: Asked) -> None:
    jobs = [job.name for job in asked.portfolio.jobs]
    pools = [pool.name for pool in asked.inventory.pools]
    places: list[tuple[Key, tuple[str, ...], list[str], str]] = []
    for index, job in enumerate(asked.portfolio.jobs):
        places += [
            (("jobs", index, "after"), job.after, jobs, "job"),
            (("jobs", index, "pools"), job.pools, pools, "pool"),
        ]
    vendors = sorted({chip.vendor for chip in asked.catalogue.chips.values()})
    for index, rule in enumerate(asked.portfolio.rules):
        places += [(("rules", index, "jobs"), rule.jobs, jobs, "job")]
        places += [(("rules", index, "vendors"), rule.vendors, vendors, "vendor")]
    for path, names, known, what in places:
        for number, name in enumerate(names):
            if name not in known:
                where = asked.jobs_file.where((*path, number))
                raise RecipeError(f"there is no {what} {name!r}", where=where, fix=suggest(name, known))
    for number, vendor in enumerate(asked.inventory.domestic):
        if vendor not in vendors:
            where = asked.fleet_file.where(("domestic", number))
            raise RecipeError(f"there is no vendor {vendor!r}", where=where, fix=suggest(vendor, vendors))


def _check_circle(asked: Asked) -> None:
    """Jobs that wait for themselves."""
    after: Mapping[str, tuple[str, ...]] = {job.name: job.after for job in asked.portfolio.jobs}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            circle = " -> ".join([*path[path.index(name) :], name])
            where = asked.jobs_file.where(("jobs", list(after).index(name), "after"))
            raise RecipeError(f"jobs wait for each other in a circle: {circle}", where=where, fix="remove one `after`")
        if name not in done:
            for before in after[name]:
                visit(before, (*path, name))
            done.add(name)

    for name in after:
        visit(name, ())


def _check_rules(asked: Asked) -> None:
    """Hard rules of one job that no vendor satisfies together."""
    there = [(pool, asked.catalogue.chips[pool.chip].vendor) for pool in asked.inventory.pools]
    for job in asked.portfolio.jobs:
        hard = [
            (number, rule)
            for number, rule in enumerate(asked.portfolio.rules)
            if rule.strength == "hard" and rule.speaks_of(job)
        ]
        for place, (second, rule) in enumerate(hard):
            for first, other in hard[:place]:
                allowed = [pool for pool, vendor in there if rule.allows(vendor, pool) and other.allows(vendor, pool)]
                if allowed or not set(rule.vendors).isdisjoint(other.vendors):
                    continue
                lines = [asked.jobs_file.where(("rules", number)) for number in (first, second)]
                raise RecipeError(
                    f"the rules {other.name!r} ({lines[0]}) and {rule.name!r} leave no vendor for {job.name!r}: "
                    f"{', '.join(other.vendors)} against {', '.join(rule.vendors)}",
                    where=lines[1],
                    fix="make one of them soft, or let it speak of other jobs",
                )


def provenance(node: Any) -> list[Provenance]:
    """Everything in a model that has a source."""
    found = [node] if isinstance(node, Provenance) else []
    if isinstance(node, Frozen):
        for name in type(node).model_fields:
            found += provenance(getattr(node, name))
    elif isinstance(node, dict):
        for value in node.values():
            found += provenance(value)
    elif isinstance(node, list | tuple):
        for value in node:
            found += provenance(value)
    return found
