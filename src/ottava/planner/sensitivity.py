"""What a plan's cost and end depend on: its spread, a tornado of single causes, and cost against time.

The plan is kept as it is: the same pools, the same order. Only the curve of cost against time makes new plans.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ottava.planner.greedy import earliest, warm_start
from ottava.planner.instance import Chosen, Instance, Schedule, Task, after_all, judge
from ottava.planner.place import best
from ottava.planner.ways import Problem, Way, price

DRAWS = 2000
Z90 = 1.2815515655446004


@dataclass(frozen=True)
class Cause:
    """One uncertain input at its two ends. usd: of the whole plan; end: slot in which the last job (not served)
    ends."""

    name: str
    low: str
    high: str
    usd_low: float
    usd_high: float
    end_low: int
    end_high: int


def chosen(problem: Problem, schedule: Schedule) -> list[tuple[int, Way, Chosen]]:
    """(number, way, decision) of everything that was placed."""
    pairs = enumerate(zip(problem.pieces, schedule, strict=True))
    return [(number, piece.ways[one.option], one) for number, (piece, one) in pairs if one is not None]


def spread(problem: Problem, schedule: Schedule, seed: int = 0) -> dict[str, float]:
    """P10, P50 and P90 of the plan's dollars: hours lognormal between their ends, rents triangular, each by itself.

    The ends of an interval of hours count as its 10% and 90% quantiles; those of a rent as the least and the most.
    """
    rng = np.random.default_rng(seed)
    rent = {}
    for pool in problem.asked.inventory.pools:
        each = price(problem.asked, pool)
        flat = each.low >= each.high
        rent[pool.name] = np.full(DRAWS, each.value) if flat else rng.triangular(each.low, each.value, each.high, DRAWS)
    total = np.zeros(DRAWS)
    for _, way, _ in chosen(problem, schedule):
        z = rng.standard_normal(DRAWS)
        below, above = math.log(way.hours.value / way.hours.low) / Z90, math.log(way.hours.high / way.hours.value) / Z90
        total += way.chips * rent[way.pool.name] * way.hours.value * np.exp(z * np.where(z < 0, below, above))
    return {f"p{share}": float(np.quantile(total, share / 100)) for share in (10, 50, 90)}


def last_end(instance: Instance, schedule: Schedule) -> int:
    """The slot in which the last task ends that is not tied to a date."""
    pairs = zip(instance.tasks, schedule, strict=True)
    return max((one.start + task.options[one.option].slots for task, one in pairs if one and not task.fixed), default=0)


def retimed(instance: Instance, schedule: Schedule) -> list[Chosen | None]:
    """The same options in the same order, each as early as it can be; for an instance whose durations have changed.

    Time beyond the horizon is there, with the chips of the last slot.
    """
    longer = 2 * instance.horizon
    free = []
    for pool in range(len(instance.pools)):
        there = instance.capacity(pool)
        free.append(np.array(there + there[-1:] * (longer - len(there)), dtype=np.int64))
    place = {number: index for index, number in enumerate(after_all(instance))}
    found: list[Chosen | None] = [None] * len(schedule)
    order = sorted(
        (number for number, one in enumerate(schedule) if one is not None),
        key=lambda n: (not instance.tasks[n].fixed, schedule[n].start, place[n]),  # type: ignore[union-attr]
    )
    for number in order:
        one, task = schedule[number], instance.tasks[number]
        assert one is not None
        option = task.options[one.option]
        ready = task.release
        for before in task.after:
            other = found[before]
            assert other is not None
            ready = max(ready, other.start + instance.tasks[before].options[other.option].slots)
        start = earliest(free[option.pool], option.chips, option.slots, ready, longer - option.slots)
        start = one.start if start is None else start
        free[option.pool][start : start + option.slots] -= option.chips
        found[number] = Chosen(one.option, start)
    return found


def tornado(problem: Problem, schedule: Schedule) -> list[Cause]:
    """Every job's hours and every pool's rent at both ends, the rest in the middle; widest first."""
    instance, grid = problem.instance, problem.asked.portfolio.grid
    placed = chosen(problem, schedule)
    total = sum(way.usd.value for _, way, _ in placed)
    end = last_end(instance, retimed(instance, schedule))
    causes = []
    for number, way, one in placed:
        if way.hours.low == way.hours.high:
            continue
        rent = way.usd.value / way.hours.value
        ends = []
        for hours in (way.hours.low, way.hours.high):
            task = instance.tasks[number]
            options = list(task.options)
            options[one.option] = replace(options[one.option], slots=max(1, math.ceil(hours / grid - 1e-9)))
            tasks = (*instance.tasks[:number], replace(task, options=tuple(options)), *instance.tasks[number + 1 :])
            changed = replace(instance, tasks=tasks)
            ends.append(last_end(changed, retimed(changed, schedule)))
        usd = [total + (hours - way.hours.value) * rent for hours in (way.hours.low, way.hours.high)]
        words = [f"{hours / 24:,.3g} days" for hours in (way.hours.low, way.hours.high)]
        name = f"time of {problem.pieces[number].name}"
        causes.append(Cause(name, words[0], words[1], usd[0], usd[1], ends[0], ends[1]))
    for pool in problem.asked.inventory.pools:
        rent3 = price(problem.asked, pool)
        hours = sum(way.chips * way.hours.value for _, way, _ in placed if way.pool is pool)
        if hours and rent3.low < rent3.high:
            usd = [total + (end_ - rent3.value) * hours for end_ in (rent3.low, rent3.high)]
            ends3 = f"${rent3.low:g}", f"${rent3.high:g}"
            causes.append(Cause(f"rent of {pool.name}", ends3[0], ends3[1], usd[0], usd[1], end, end))
    return sorted(causes, key=lambda cause: cause.usd_low - cause.usd_high)


def pareto(problem: Problem, schedule: Schedule, *, points: int, seconds: float, workers: int) -> list[dict[str, Any]]:
    """Cost against time: the cheapest plan found whose last job ends by then, from the shortest time to the plan's own.

    Entries {end_slot, usd, p10, p90, objective, gap}; ends for which no plan was found are left out, and plans that end
    no sooner than a cheaper one.
    """
    instance = problem.instance
    latest = last_end(instance, schedule)
    first = min(latest, _shortest(instance))
    found = []
    for step in range(points):
        end = latest if points == 1 else first + round((latest - first) * step / (points - 1))
        tasks = tuple(replace(task, deadline=_sooner(task, end)) for task in instance.tasks)
        hurried = replace(instance, tasks=tasks)
        begun, told = warm_start(hurried)
        answer = best(hurried, begun, told, seconds, workers)
        if not answer.schedule or answer.bound is None:
            continue
        judged = judge(hurried, answer.schedule)
        gap = max(0.0, (judged.objective - answer.bound) / max(1, judged.objective))
        row = {"end_slot": last_end(hurried, answer.schedule), "usd": judged.usd, "objective": judged.objective}
        found.append({**row, "gap": round(gap, 5), **spread(problem, answer.schedule)})
    found.sort(key=lambda row: (row["end_slot"], row["usd"]))
    return [row for n, row in enumerate(found) if all(row["usd"] < other["usd"] for other in found[:n])]


def _sooner(task: Task, end: int) -> int | None:
    return task.deadline if task.fixed else min(end, end if task.deadline is None else task.deadline)


def _shortest(instance: Instance) -> int:
    """No plan ends sooner: every task by its shortest way, waiting for its predecessors only."""
    ends: dict[int, int] = {}
    for number in after_all(instance):
        task = instance.tasks[number]
        begin = max([task.release, *(ends.get(before, 0) for before in task.after)])
        ends[number] = begin + min((o.slots for o in task.options if not o.breaks), default=0)
    return max((end for number, end in ends.items() if not instance.tasks[number].fixed), default=0)
