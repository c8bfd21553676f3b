"""For every foreign chip that a plan asks for: what it is for, what the best domestic plan is, why that fails and by
how much, what would have to change, and by which rules.

It argues in both directions: where a domestic plan does the work, the dossier says so and what it costs.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ottava.artifact import file_digest
from ottava.errors import ArtifactError, RecipeError
from ottava.planner import bills, relax
from ottava.planner.chips import Catalogue
from ottava.planner.greedy import warm_start
from ottava.planner.instance import judge, least
from ottava.planner.portfolio import Asked, load
from ottava.planner.quantity import dollars
from ottava.planner.solver import solve
from ottava.planner.ways import Problem, Refusal, Span3, Way, build


def read_plan(path: Path) -> dict[str, Any]:
    """A plan.json, as `ottava plan` writes it. Raises ArtifactError."""
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(
            "no such file", where=path, fix="make it: ottava plan JOBS --fleet FLEET --out DIR"
        ) from None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ArtifactError(f"this is no plan: {error}", where=path, fix="give the plan.json of ottava plan") from None
    if not isinstance(plan, dict) or not {"inputs", "assignments", "status"} <= set(plan):
        raise ArtifactError("this is no plan of ottava plan", where=path, fix="give its plan.json")
    return plan


def inputs(plan: Mapping[str, Any], catalogue: Catalogue) -> Asked:
    """The files a plan was made from. Raises ArtifactError where they have changed since."""
    paths = {what: Path(entry["path"]) for what, entry in plan["inputs"].items()}
    for what, path in paths.items():
        if path.is_file() and file_digest(path) != plan["inputs"][what]["sha256"]:
            raise ArtifactError("this file has changed since the plan was made", where=path, fix="plan again")
    return load(paths["jobs"], paths["fleet"], catalogue)


def make(
    plan: Mapping[str, Any], catalogue: Catalogue, *, seconds: float = 10.0, workers: int = 0,
    evidence: Sequence[Path] = (),
) -> dict[str, Any]:  # fmt: skip
    """The dossier as JSON: {plan, fleet, domestic, requests: [...], rules: [...], evidence: [...]}.

    One request for each job and foreign pool of the plan.
    """
    problem = build(inputs(plan, catalogue))
    asked = problem.asked
    measured = [_evidence(path) for path in evidence]
    requests: list[dict[str, Any]] = []
    done: dict[str, dict[str, Any]] = {}
    for job in asked.portfolio.jobs:
        rows = [row for row in plan["assignments"] if row["job"] == job.name and not domestic(asked, row["chip"])]
        for pool in sorted({row["pool"] for row in rows}):
            if job.name not in done:
                done[job.name] = _at_home(problem, job.name, rows, plan.get("objective"), seconds, workers)
            requests.append(_request(problem, job.name, pool, rows, done[job.name], measured))
    return {
        "plan": plan["portfolio"], "fleet": plan["fleet"], "start": plan["start"], "status": plan["status"],
        "gap": plan["gap"], "domestic": list(asked.inventory.domestic), "requests": requests,
        "rules": [rule.model_dump(mode="json") for rule in asked.portfolio.rules], "evidence": measured,
    }  # fmt: skip


def domestic(asked: Asked, chip: str) -> bool:
    """True where a chip's vendor is one of the domestic ones."""
    return asked.catalogue.chip(chip).vendor in asked.inventory.domestic


def _request(
    problem: Problem, name: str, pool: str, rows: Sequence[Mapping[str, Any]], home: Mapping[str, Any],
    measured: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    asked = problem.asked
    job = next(job for job in asked.portfolio.jobs if job.name == name)
    there = next(one for one in asked.inventory.pools if one.name == pool)
    mine = [row for row in rows if row["pool"] == pool]
    figures = [
        *(home["figures"]),
        f"{there.chips:,} {there.chip} in {pool}: {there.source} ({there.date}; {there.certainty})",
    ]
    return {
        "job": name, "kind": job.kind, "parameters": job.parameters, "memory_gb": job.memory, "pool": pool,
        "chip": there.chip, "chips": sum(row["chips"] for row in mine), "from": min(row["start"] for row in mine),
        "until": max(row["end"] for row in mine), "usd": sum(row["usd"] for row in mine),
        "usd_low": sum(row["usd_low"] for row in mine), "usd_high": sum(row["usd_high"] for row in mine),
        "reason": mine[0]["reason"], "workload_source": f"{job.source} ({job.date}; {job.certainty})",
        "home": {key: value for key, value in home.items() if key != "figures"},
        "rules": [rule.name for rule in asked.portfolio.rules if rule.speaks_of(job)],
        "law": law(there.chip, min(row["start"] for row in mine), there.state_funded),
        "sources": list(dict.fromkeys([*figures, *(row["basis"] for row in mine)])),
        "evidence": [one for one in measured if any(chip in (there.chip, pool) for chip in one["chips"])],
    }  # fmt: skip


def law(chip: str, day: str, state_funded: bool) -> list[str]:
    """What fleets/rules.json says of a chip on the day it is wanted, and what it says later, each with its date."""
    known, on = bills.rules(), datetime.date.fromisoformat(day[:10])
    where = "state-funded" if state_funded else "private"
    holding = [bills.holding(known, kind, chip, on, where) for kind in ("export", "share", "domestic")]
    later = [rule for rule in known if chip in rule.chips and rule.begins > on]
    return [
        f"{rule.id}, from {rule.begins}{' (later than this plan asks)' if rule in later else ''}: {rule.what} "
        f"({rule.source}; {rule.certainty})"
        for rule in [one for one in holding if one is not None] + later
    ]


def _at_home(
    problem: Problem, name: str, rows: Sequence[Mapping[str, Any]], weight: float | None, seconds: float, workers: int
) -> dict[str, Any]:
    """The best that domestic chips do for one job, and what is wrong with it."""
    asked = problem.asked
    pools = {pool.name for pool in asked.inventory.pools if domestic(asked, pool.chip)}
    ways = [way for way in next(p.ways for p in problem.pieces if p.job.name == name) if way.pool.name in pools]
    refusals = [one for one in problem.refusals[name] if one.pool in pools]
    abroad = Span3(_sum(rows, "usd"), _sum(rows, "usd_low"), _sum(rows, "usd_high"), "the plan")
    verdict, best = "no way", None
    fails: list[str] = []
    change: list[str] = []
    if ways:
        best = min(ways, key=lambda way: (bool(way.breaks), way.usd.value + way.penalty, way.hours.value))
        verdict, fails, change = _compare(problem, name, pools, best, abroad, weight, seconds, workers)
    else:
        fails = ["no domestic pool of the inventory takes it" if refusals else "the inventory has no domestic chips"]
        change = [_lift(one) for one in refusals]
    figures = [way.hours.basis for way in ways[:1]] + [way.usd.basis for way in ways[:1]]
    return {
        "verdict": verdict, "best": None if best is None else _way(best) | {"shares": len(rows)}, "fails": fails,
        "change": change,
        "refusals": [{"pool": o.pool, "why": o.why, "needs": o.needs, "there": o.there} for o in refusals],
        "figures": figures,
    }  # fmt: skip


def _way(way: Way) -> dict[str, Any]:
    weeks = {key: round(getattr(way.hours, key) / 168, 2) for key in ("value", "low", "high")}
    usd = {key: round(getattr(way.usd, key)) for key in ("value", "low", "high")}
    return {"pool": way.pool.name, "chip": way.pool.chip, "chips": way.chips, "weeks": weeks, "usd": usd}


def _lift(one: Refusal) -> str:
    """What would make a refused pool possible."""
    missing = None if one.needs is None or one.there is None else one.needs - one.there
    if one.cause == "chips" and missing is not None:
        return f"{one.pool}: {missing:,.0f} more chips"
    if one.cause == "memory" and missing is not None:
        return f"{one.pool}: {missing:,.0f} GB more, by more or larger chips"
    if one.cause == "time" and missing is not None and one.needs is not None:
        return (
            f"{one.pool}: {missing:,.1f} weeks more, or {one.needs / one.there:,.1f} times the chips"
            if one.there
            else ""
        )
    if one.cause == "work":
        return f"{one.pool}: a measurement of this work on one of its nodes (ottava qualify), as nothing is published"
    return f"{one.pool}: {one.why}"


def _compare(
    problem: Problem,
    name: str,
    pools: set[str],
    best: Way,
    abroad: Span3,
    weight: float | None,
    seconds: float,
    workers: int,
) -> tuple[str, list[str], list[str]]:
    """(verdict, why it fails, what would have to change) of the whole portfolio with this job at home."""
    at_home = restricted(problem, name, pools)
    begun, told = warm_start(at_home.instance)
    fails = _lateness(problem, name, best)
    dearer = Span3(
        best.usd.value - abroad.value, best.usd.low - abroad.high, best.usd.high - abroad.low, best.usd.basis
    )
    pieces = sum(piece.job.name == name for piece in problem.pieces)
    if pieces == 1 and dearer.value > 0:
        fails.append(
            f"alone it costs {dollars(dearer.value)} more, between {dollars(dearer.low)} and {dollars(dearer.high)}"
        )
    if not told.broken and told.objective <= least(at_home.instance) * (1 + 1e-4):
        found_status, objective = "optimal", float(told.objective)
    else:
        found = solve(at_home.instance, seconds=seconds, workers=workers, hint=None if told.broken else begun)
        schedule = found.schedule or ([] if told.broken else begun)
        objective = float(judge(at_home.instance, schedule).objective) if schedule else float("nan")
        found_status = "feasible" if schedule else found.status
    if found_status in ("optimal", "feasible"):
        before = weight
        extra = "" if before is None else f", at {dollars(objective - before)} more, penalties and lateness included"
        fails.insert(0, f"with {name} on domestic chips the portfolio still fits{extra}")
        return "possible", fails, []
    if found_status == "unknown":
        return "not known", [*fails, "the solver found no plan with it in the time it had"], []
    entries = relax.fewest(at_home, seconds=seconds, workers=workers)
    if not entries:
        words = f"none was found in {seconds:g} s: give the search more time (--seconds)"
        return "fails", [f"with {name} on domestic chips no plan of the portfolio exists", *fails], [words]
    change = [entry["reason"] + ("" if entry["usd"] is None else f" ({dollars(entry['usd'])})") for entry in entries]
    fails.insert(0, f"with {name} on domestic chips no plan of the portfolio exists")
    return "fails", fails, change


def restricted(problem: Problem, name: str, pools: set[str]) -> Problem:
    """The same portfolio with one job on these pools only."""
    pieces, tasks = list(problem.pieces), list(problem.instance.tasks)
    for number, piece in enumerate(pieces):
        if piece.job.name == name:
            keep = [index for index, way in enumerate(piece.ways) if way.pool.name in pools]
            pieces[number] = replace(piece, ways=tuple(piece.ways[index] for index in keep))
            tasks[number] = replace(tasks[number], options=tuple(tasks[number].options[index] for index in keep))
    return replace(problem, pieces=tuple(pieces), instance=replace(problem.instance, tasks=tuple(tasks)))


def _lateness(problem: Problem, name: str, best: Way) -> list[str]:
    """By how much the job alone, on the best domestic way, misses its deadline."""
    number = next(n for n, piece in enumerate(problem.pieces) if piece.job.name == name)
    job, task = problem.pieces[number].job, problem.instance.tasks[number]
    if job.deadline is None or task.due is None:
        return []
    begin = float(task.release)
    for before in task.after:
        other = problem.instance.tasks[before]
        begin = max(begin, other.release + min(option.slots for option in other.options))
    grid = problem.asked.portfolio.grid
    late = [(begin * grid + getattr(best.hours, key) - task.due * grid) / 168 for key in ("value", "low", "high")]
    if late[2] <= 0:
        return []
    words = f"it ends {late[0]:,.1f} weeks after its deadline" if late[0] > 0 else "it may end after its deadline"
    return [f"{words} even if it starts at once (between {late[1]:,.1f} and {late[2]:,.1f} weeks)"]


def _evidence(path: Path) -> dict[str, Any]:
    """What `qualify` measured: the file, the chips it speaks of, and its verdict by pool."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"no measurement can be read: {error}", where=path, fix="give a qualification.json") from None
    pools = content.get("pools") if isinstance(content, dict) else None
    if not isinstance(pools, dict):
        raise RecipeError("this is no measurement of qualify", where=path, fix="give a qualification.json")
    chips = list(pools)
    chips += [str(one["chip"]) for one in pools.values() if isinstance(one, dict) and one.get("chip")]
    rows = [{"pool": name, "told": _flat(one)} for name, one in pools.items()]
    return {"path": str(path), "sha256": file_digest(path), "chips": chips, "pools": rows}


def _flat(one: Any) -> str:
    """Its plain figures in a line."""
    if not isinstance(one, dict):
        return str(one)
    return ", ".join(f"{key} {value}" for key, value in one.items() if isinstance(value, str | int | float))


def _sum(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    return float(sum(row[key] for row in rows))
