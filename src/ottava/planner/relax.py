"""Where no plan exists: the fewest constraints that would have to give way, by how much, and what that costs.

Hard rules, refused licences, deadlines, chips of a pool, the budget and the jobs themselves can be given up. Memory,
links and the length of the plan cannot.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from ottava.planner.greedy import warm_start
from ottava.planner.instance import Chosen
from ottava.planner.solver import Answer, Slack, solve
from ottava.planner.ways import Problem, price

KINDS = ("rules", "deadlines", "pools", "budget", "tasks")
SAID = {
    "rules": "rules and licences", "deadlines": "deadlines", "pools": "chips", "budget": "the budget", "tasks": "jobs",
}  # fmt: skip


def slack(problem: Problem, kinds: Collection[str] = KINDS) -> Slack:
    """What may give way, with the price of one unit of it."""
    asked, instance = problem.asked, problem.instance
    grid, hours = asked.portfolio.grid, asked.portfolio.horizon
    cheapest = {p.name: round(min(way.usd.value for way in p.ways)) for p in problem.pieces}
    names = sorted({name for task in instance.tasks for option in task.options for name in option.breaks})
    tasks = list(zip(problem.pieces, instance.tasks, strict=True))
    rents = {number: price(asked, pool).value for number, pool in enumerate(asked.inventory.pools)}
    late = {
        t.name: t.late or max(1, round(cheapest[p.name] * grid / hours)) for p, t in tasks if t.deadline is not None
    }
    return Slack(
        rules=dict.fromkeys(names, 1) if "rules" in kinds else {},
        deadlines=late if "deadlines" in kinds else {},
        pools={pool: max(1, round(rent * hours)) for pool, rent in rents.items()} if "pools" in kinds else {},
        budget=1 if "budget" in kinds and instance.budget is not None else None,
        tasks={t.name: 10 * cheapest[p.name] for p, t in tasks if t.drop is None} if "tasks" in kinds else {},
    )


def fewest(problem: Problem, *, seconds: float, workers: int, kinds: Collection[str] = KINDS) -> list[dict[str, Any]]:
    """The smallest set of constraints to relax; of sets of one size, the cheapest that was found in time.

    Entries {constraint, kind, by, unit, usd, proven, reason}; usd: what it costs at the prices given, None where it has
    none (a rule). proven: True where no smaller set and no cheaper one of this size exists.
    """
    allowed = slack(problem, kinds)
    found = solve(problem.instance, seconds=seconds, workers=workers, slack=allowed, hint=_without(problem, allowed))
    return [_entry(problem, name, amount, found) for name, amount in found.relaxed.items()]


def _without(problem: Problem, allowed: Slack) -> list[Chosen | None] | None:
    """A schedule that leaves out what does not fit, to begin the search from; None where jobs may not be given up."""
    if not allowed.tasks:
        return None
    tasks = problem.instance.tasks
    loose = tuple(replace(task, drop=allowed.tasks.get(task.name, task.drop)) for task in tasks)
    schedule, told = warm_start(replace(problem.instance, tasks=loose))
    return None if told.broken else schedule


def alone(problem: Problem, *, seconds: float, workers: int) -> list[dict[str, Any]]:
    """For every kind of constraint, whether giving up this kind alone is enough, and how: {kind, enough,
    relaxations}."""
    rows = []
    for kind in KINDS:
        allowed = slack(problem, (kind,))
        if not (allowed.rules or allowed.deadlines or allowed.pools or allowed.budget or allowed.tasks):
            continue
        found = solve(problem.instance, seconds=seconds, workers=workers, slack=allowed)
        entries = [_entry(problem, name, amount, found) for name, amount in found.relaxed.items()]
        enough = {"optimal": True, "feasible": True, "infeasible": False}.get(found.status)
        rows.append({"kind": SAID[kind], "enough": enough, "relaxations": entries})
    return rows


def _entry(problem: Problem, name: str, amount: int, found: Answer) -> dict[str, Any]:
    """One relaxation in words and dollars."""
    asked, (what, _, rest) = problem.asked, name.partition(" ")
    usd: float | None = None
    if what == "rule":
        unit, reason = "", _rule_words(problem, rest, found)
        kind = rest.partition(" ")[0]
    elif what == "deadline":
        kind, unit, by = "deadline", "h", amount * asked.portfolio.grid
        late = next(task.late for task in problem.instance.tasks if task.name == rest)
        usd = float(late * amount) if late else None
        reason = f"{rest} would end {by / 24:,.0f} days after its deadline"
    elif what == "pool":
        pool = asked.inventory.pools[int(rest)]
        kind, unit = "chips", "chips"
        usd = amount * price(asked, pool).value * asked.portfolio.horizon
        reason = f"{pool.name} would need {amount:,} more {pool.chip}; the price is their rent for the whole plan"
        rest = pool.name
    elif what == "budget":
        kind, unit, usd, rest = "budget", "USD", float(amount), "budget"
        reason = f"the budget would have to be ${amount:,} larger"
    else:
        kind, unit, reason = "job", "", f"{rest} would have to be given up"
        usd = None
    by = amount * asked.portfolio.grid if what == "deadline" else amount
    proven = found.status == "optimal"
    return {"constraint": rest, "kind": kind, "by": by, "unit": unit, "usd": usd, "proven": proven, "reason": reason}


def _rule_words(problem: Problem, name: str, found: Answer) -> str:
    users = [
        piece.name
        for piece, one in zip(problem.pieces, found.schedule, strict=True)
        if one is not None and name in piece.ways[one.option].breaks
    ]
    return f"the {name} would have to give way for {', '.join(users) or 'nothing'}"
