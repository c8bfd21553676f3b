"""Places a portfolio: heuristic, solver, and for every decision one sentence that says why.

The plan says how far from the best it may be (the proven gap), and, where no plan exists, the fewest constraints that
would have to give way.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ottava.artifact import file_digest
from ottava.planner import relax
from ottava.planner.greedy import earliest, warm_start
from ottava.planner.instance import Chosen, Instance, Judgement, Schedule, after_all, judge, least
from ottava.planner.quantity import dollars
from ottava.planner.solver import Answer, solve
from ottava.planner.ways import Piece, Problem, Way

OPTIMAL = 1e-4  # a plan proven this close to the best, relative, is called optimal


def plan(problem: Problem, *, seconds: float = 30.0, workers: int = 0, alternatives: bool = True) -> dict[str, Any]:
    """The plan as JSON: {status, gap, seconds, objective, bound, usd, ..., assignments, left_out, relaxations}.

    status: optimal (proven to the last dollar in 10,000), feasible (with its gap), infeasible (then `relaxations`), or
    unknown. gap: (objective - bound) / objective. Raises PlatformError without OR-Tools.
    """
    clock = time.monotonic()
    begun, told = warm_start(problem.instance)
    found = best(problem.instance, begun, told, seconds - (time.monotonic() - clock), workers)
    if not found.schedule:
        return _without(problem, found, seconds, workers, alternatives)
    schedule = earlier(problem.instance, found.schedule)
    judged = judge(problem.instance, schedule)
    if judged.broken:
        raise AssertionError(f"the solver's schedule is none: {judged.broken}")
    gap = _gap(judged, found)
    return _head(problem) | {
        "status": "optimal" if gap is not None and gap <= OPTIMAL else "feasible",
        "gap": gap,
        "seconds": round(time.monotonic() - clock, 3),
        "objective": judged.objective,
        "bound": None if found.bound is None else round(found.bound, 1),
        "heuristic_objective": None if told.broken else told.objective,
        **costs(problem, schedule, judged),
        "assignments": assignments(problem, schedule),
        "left_out": left_out(problem, schedule),
        "relaxations": [],
    }


def best(instance: Instance, begun: list[Chosen | None], told: Judgement, seconds: float, workers: int) -> Answer:
    """The solver's answer, or the heuristic's (begun, told) where that is the best there can be, or time was too
    short."""
    floor = least(instance)
    if not told.broken and told.objective - floor <= OPTIMAL * told.objective:
        return Answer("optimal", begun, told.objective, floor, {}, 0.0)
    found = solve(instance, seconds=seconds, workers=workers, hint=begun)
    bound = max(floor, found.bound if found.bound is not None else floor)
    if not told.broken and (not found.schedule or judge(instance, found.schedule).objective > told.objective):
        return Answer("feasible", begun, told.objective, bound, {}, found.seconds)
    return replace(found, bound=bound)


def _head(problem: Problem) -> dict[str, Any]:
    asked = problem.asked
    files = {"jobs": asked.jobs_file.source, "fleet": asked.fleet_file.source}
    return {
        "portfolio": asked.portfolio.name,
        "fleet": asked.inventory.name,
        "start": asked.portfolio.start.isoformat(),
        "grid_h": asked.portfolio.grid,
        "horizon_h": asked.portfolio.horizon,
        "inputs": {what: {"path": path, "sha256": file_digest(Path(path))} for what, path in files.items()},
    }


def _gap(judged: Judgement, found: Answer) -> float | None:
    if found.bound is None:
        return None
    return round(max(0.0, (judged.objective - found.bound) / max(1, judged.objective)), 6)


def _without(problem: Problem, found: Answer, seconds: float, workers: int, alternatives: bool) -> dict[str, Any]:
    """What is said where there is no plan."""
    head = _head(problem) | {"status": found.status, "gap": None, "seconds": round(found.seconds, 3), "assignments": []}
    if found.status != "infeasible":
        return head | {"status": "unknown", "relaxations": []}
    told = relax.fewest(problem, seconds=seconds, workers=workers)
    others = relax.alone(problem, seconds=min(seconds, 10.0), workers=workers) if alternatives else []
    return head | {"relaxations": told, "alternatives": others}


def earlier(instance: Instance, schedule: Schedule) -> list[Chosen | None]:
    """The same options, each as early as what stands before it allows; nothing gets later."""
    import numpy as np

    free = [np.array(instance.capacity(pool), dtype=np.int64) for pool in range(len(instance.pools))]
    for task, chosen in zip(instance.tasks, schedule, strict=True):
        if chosen is not None:
            option = task.options[chosen.option]
            free[option.pool][chosen.start : chosen.start + option.slots] -= option.chips
    moved = list(schedule)
    place = {number: index for index, number in enumerate(after_all(instance))}
    order = sorted(place, key=lambda n: (one.start if (one := schedule[n]) is not None else 0, place[n]))
    for number in order:
        task, chosen = instance.tasks[number], moved[number]
        if chosen is None or task.fixed:
            continue
        option = task.options[chosen.option]
        free[option.pool][chosen.start : chosen.start + option.slots] += option.chips
        ready = task.release
        for before in task.after:
            one = moved[before]
            assert one is not None
            ready = max(ready, one.start + instance.tasks[before].options[one.option].slots)
        start = earliest(free[option.pool], option.chips, option.slots, ready, chosen.start)
        start = chosen.start if start is None else start
        free[option.pool][start : start + option.slots] -= option.chips
        moved[number] = Chosen(chosen.option, start)
    return moved


def costs(problem: Problem, schedule: Schedule, judged: Judgement) -> dict[str, Any]:
    """Dollars of the plan with their interval, energy, and when it ends."""
    ways = [way for _, way, _ in _taken(problem, schedule)]
    spent = [energy(problem, way) for way in ways]
    ends = [
        one.start + t.options[one.option].slots for t, one in zip(problem.instance.tasks, schedule, strict=True) if one
    ]
    return {
        "usd": round(sum(way.usd.value for way in ways)),
        "usd_low": round(sum(way.usd.low for way in ways)),
        "usd_high": round(sum(way.usd.high for way in ways)),
        "kwh": None if None in spent else sum(one for one in spent if one is not None),
        "budget": problem.instance.budget,
        "penalty_usd": judged.penalty,
        "lateness_usd": judged.lateness,
        "left_out_usd": judged.dropped,
        "end": _day(problem, max(ends, default=0)),
    }


def _taken(problem: Problem, schedule: Schedule) -> list[tuple[Piece, Way, Chosen]]:
    pairs = zip(problem.pieces, schedule, strict=True)
    return [(piece, piece.ways[one.option], one) for piece, one in pairs if one is not None]


def _day(problem: Problem, slot: float) -> str:
    start = datetime.datetime.combine(problem.asked.portfolio.start, datetime.time())
    moment = start + datetime.timedelta(hours=slot * problem.asked.portfolio.grid)
    return moment.date().isoformat() if moment.time() == datetime.time() else moment.isoformat(timespec="minutes")


def assignments(problem: Problem, schedule: Schedule) -> list[dict[str, Any]]:
    """One entry a task that was placed, in order of time."""
    instance, rows = problem.instance, []
    for number, (piece, one) in enumerate(zip(problem.pieces, schedule, strict=True)):
        if one is None:
            continue
        task, way = instance.tasks[number], piece.ways[one.option]
        end = one.start + task.options[one.option].slots
        binding, waits = _waits(problem, schedule, number)
        rows.append(
            {
                "job": piece.job.name, "task": piece.name, "kind": piece.job.kind, "pool": way.pool.name,
                "chip": way.pool.chip, "chips": way.chips, "start": _day(problem, one.start), "end": _day(problem, end),
                "start_h": one.start * problem.asked.portfolio.grid, "end_h": end * problem.asked.portfolio.grid,
                "hours": round(way.hours.value, 1), "hours_low": round(way.hours.low, 1),
                "hours_high": round(way.hours.high, 1), "usd": round(way.usd.value), "usd_low": round(way.usd.low),
                "usd_high": round(way.usd.high), "kwh": energy(problem, way),
                "against": list(way.against), "binding": binding,
                "late_h": _late(problem, number, end), "basis": way.hours.basis,
                "reason": f"{_place(problem, piece, one)}; {waits}",
            }
        )  # fmt: skip
    return sorted(rows, key=lambda row: (row["start_h"], row["task"]))


def energy(problem: Problem, way: Way) -> int | None:
    """kWh of the chips alone, at the power they are rated for, all the time; None where that is not known. Hosts,
    network and cooling are not in it."""
    watts = problem.asked.catalogue.chip(way.pool.chip).watts
    return None if watts is None else round(way.chips * way.hours.value * watts.value / 1000)


def _late(problem: Problem, number: int, end: int) -> float:
    task = problem.instance.tasks[number]
    return 0.0 if task.due is None else max(0, end - task.due) * problem.asked.portfolio.grid


def _place(problem: Problem, piece: Piece, one: Chosen) -> str:
    """Why this pool: the only one; the cheapest; or what the cheaper one lacks."""
    way = piece.ways[one.option]
    lawful = [other for other in piece.ways if not other.breaks]
    pools = {other.pool.name for other in lawful}
    refused = problem.refusals.get(piece.job.name, ())
    if len(pools) == 1:
        others = [f"{r.pool} ({r.why})" for r in refused]
        banned = {o.pool.name: o.breaks[0] for o in piece.ways if o.breaks}
        others += [f"{pool} (against the {name})" for pool, name in banned.items()]
        return f"{way.pool.name} is the only pool that takes it" + (f": not {others[0]}" if others else "")
    cost = way.usd.value + way.penalty
    best = min(lawful, key=lambda other: other.usd.value + other.penalty)
    next_best = min(
        (o for o in lawful if o.pool.name != way.pool.name), key=lambda other: other.usd.value + other.penalty
    )
    rules = f", counting {dollars(way.penalty)} for disregarding {' and '.join(way.against)}" if way.against else ""
    if cost <= best.usd.value + best.penalty + 1 and cost >= next_best.usd.value + next_best.penalty - 1:
        return f"no pool of {len(pools)} that take it costs less{rules} ({dollars(cost)}, as on {next_best.pool.name})"
    if cost <= best.usd.value + best.penalty + 1:
        there = f"{dollars(cost)} against {dollars(next_best.usd.value + next_best.penalty)} on {next_best.pool.name}"
        spared = f", where it would disregard {' and '.join(next_best.against)}" if next_best.against else ""
        return f"{way.pool.name} costs least of {len(pools)} pools that take it{rules} ({there}{spared})"
    if best.pool.name == way.pool.name:
        spared = dollars(cost - best.usd.value - best.penalty)
        return f"{way.chips:,} chips of {way.pool.name} for the sake of time: {best.chips:,} cost {spared} less{rules}"
    dearer = dollars(cost - best.usd.value - best.penalty)
    return f"{way.pool.name} costs {dearer} more than {best.pool.name}{rules}, which has no room for it in time"


def _waits(problem: Problem, schedule: Schedule, number: int) -> tuple[str, str]:
    """(what binds, the sentence): why the task does not start one slot earlier."""
    instance = problem.instance
    task, one = instance.tasks[number], schedule[number]
    assert one is not None
    if task.fixed:
        return "phase", f"it is served from {_day(problem, one.start)} on"
    for before in task.after:
        other = schedule[before]
        if other is not None and other.start + instance.tasks[before].options[other.option].slots == one.start:
            return "after", f"it starts when {problem.pieces[before].name} has ended"
    if one.start <= task.release:
        wanted = "at once" if one.start == 0 else f"on {_day(problem, one.start)}, as soon as it may"
        return "release", f"it starts {wanted}"
    option = task.options[one.option]
    capacity = instance.capacity(option.pool)
    holding = [
        problem.pieces[other].name
        for other, chosen in enumerate(schedule)
        if other != number and chosen is not None
        and instance.tasks[other].options[chosen.option].pool == option.pool
        and chosen.start < one.start <= chosen.start + instance.tasks[other].options[chosen.option].slots
    ]  # fmt: skip
    if capacity[one.start - 1] < option.chips:
        return "lead time", f"it starts when chips arrive on {problem.pieces[number].ways[one.option].pool.name}"
    held = f", which {' and '.join(holding[:2])} held" if holding else ""
    return "chips", f"it starts when {option.chips:,} chips are free{held}"


def left_out(problem: Problem, schedule: Sequence[Chosen | None]) -> list[dict[str, Any]]:
    """Tasks that were not placed, and why."""
    rows = []
    for number, (piece, one) in enumerate(zip(problem.pieces, schedule, strict=True)):
        if one is None:
            task = problem.instance.tasks[number]
            cheapest = min(way.usd.value for way in piece.ways)
            why = f"leaving it out costs {dollars(task.drop or 0)}; placing it costs {dollars(cheapest)} at least, and"
            waits = [problem.pieces[n].name for n in task.after if schedule[n] is None]
            end = (
                f" {waits[0]}, which it waits for, is left out"
                if waits
                else " takes chips, or budget, of jobs worth more"
            )
            rows.append({"job": piece.job.name, "task": piece.name, "usd": task.drop or 0, "reason": why + end})
    return rows
