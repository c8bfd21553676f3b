"""The CP-SAT model of intervals: for problems too large for `planner.search`, and for what is relaxed where there is no
plan. Imported in the solver's own process only (`planner.solver`).

Beside the constraints themselves it states what they imply in sums, because the solver proves its bound from those:
a task that takes an option pays at least the lateness which that option cannot avoid; and what has to be done between
two points in time fits into the chips that are there between them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from typing import Any

from ortools.sat.python import cp_model

from ottava.planner import columns, search
from ottava.planner.instance import Instance, Task, windows

MOST_CELLS = 1_000_000
"""Slots that all options occupy from all their starts; beyond, intervals have to do (`planner.search` is for fewer)."""

STATUS = {
    cp_model.OPTIMAL: "optimal",
    cp_model.FEASIBLE: "feasible",
    cp_model.INFEASIBLE: "infeasible",
    cp_model.UNKNOWN: "unknown",
}


class Model:
    """Variables of an instance: `present[t][o]`, `start[t]`, `end[t]`, `done[t]`, and what is relaxed."""

    def __init__(self, instance: Instance, slack: Mapping[str, Any] | None) -> None:
        self.instance, self.slack = instance, slack
        self.cp = cp_model.CpModel()
        self.relaxed: dict[str, tuple[Any, Any]] = {}  # name -> (is it relaxed, by how much)
        self.costs: list[Any] = []
        self.relax_costs: list[Any] = []
        self.present: list[list[Any]] = []
        self.start: list[Any] = []
        self.end: list[Any] = []
        self.done: list[Any] = []
        self.release, self.limit = windows(
            instance, () if slack is None else slack["deadlines"], bool(slack and slack["tasks"])
        )
        self.intervals: list[list[tuple[Any, int]]] = [[] for _ in instance.pools]
        for number, task in enumerate(instance.tasks):
            self._task(number, task)
        self._order()
        self._pools()
        self._budget()

    def _relax(self, name: str, most: int, cost: int) -> Any:
        """How much of a constraint is given up, from 0 to `most`, at `cost` a unit."""
        if name not in self.relaxed:
            amount = self.cp.new_int_var(0, max(0, most), f"amount of {name}")
            used = self.cp.new_bool_var(f"relaxed {name}")
            self.cp.add(amount == 0).only_enforce_if(~used)
            self.cp.add(amount >= 1).only_enforce_if(used)
            self.relaxed[name] = (used, amount)
            self.relax_costs.append(cost * amount)
        return self.relaxed[name]

    def _task(self, number: int, task: Task) -> None:
        cp, slack = self.cp, self.slack
        start = cp.new_int_var(self.release[number], self.limit[number], f"start {task.name}")
        end = cp.new_int_var(self.release[number], self.limit[number], f"end {task.name}")
        present = []
        for index, option in enumerate(task.options):
            chosen = cp.new_bool_var(f"{task.name} by {index}")
            latest = self.limit[number] - option.slots
            if latest < self.release[number]:
                cp.add(chosen == 0)
            else:
                interval = cp.new_optional_interval_var(
                    start, option.slots, end, chosen, f"{task.name} on {option.pool}"
                )
                self.intervals[option.pool].append((interval, option.chips))
            for name in option.breaks:
                rules = {} if slack is None else slack["rules"]
                if name in rules:
                    cp.add_implication(chosen, self._relax(f"rule {name}", 1, rules[name])[0])
                else:
                    cp.add(chosen == 0)
            present.append(chosen)
            self.costs.append((option.usd + option.penalty) * chosen)
        if task.fixed:
            cp.add(start == task.release)
        done = cp.new_bool_var(f"done {task.name}")
        cp.add(sum(present) == done)
        droppable = None if slack is None else slack["tasks"].get(task.name)
        if task.drop is not None:
            self.costs.append(task.drop * (1 - done))
        elif droppable is not None:
            cp.add_implication(~done, self._relax(f"task {task.name}", 1, droppable)[0])
        else:
            cp.add(done == 1)
        self.present.append(present)
        self.start.append(start)
        self.end.append(end)
        self.done.append(done)
        self._lateness(number, task)

    def _lateness(self, number: int, task: Task) -> None:
        cp, slack, end, done = self.cp, self.slack, self.end[number], self.done[number]
        if task.deadline is not None and slack is not None and task.name in slack["deadlines"]:
            most = self.limit[number] - task.deadline
            _, amount = self._relax(f"deadline {task.name}", most, slack["deadlines"][task.name])
            cp.add(end <= task.deadline + amount).only_enforce_if(done)
        if task.due is None or not task.late:
            return
        tardy = cp.new_int_var(0, max(0, self.limit[number] - task.due), f"late {task.name}")
        cp.add(tardy >= end - task.due).only_enforce_if(done)
        least = [
            max(0, self.release[number] + option.slots - task.due) * chosen
            for option, chosen in zip(task.options, self.present[number], strict=True)
        ]
        cp.add(tardy >= sum(least))
        self.costs.append(task.late * tardy)

    def _order(self) -> None:
        for number, task in enumerate(self.instance.tasks):
            for before in task.after:
                self.cp.add(self.start[number] >= self.end[before]).only_enforce_if(self.done[number])
                self.cp.add_implication(self.done[number], self.done[before])

    def _pools(self) -> None:
        for pool, steps in enumerate(self.instance.pools):
            capacity = self.instance.capacity(pool)
            most = max(capacity, default=0)
            extra: Any = 0
            if self.slack is not None and str(pool) in self.slack["pools"]:
                need = max((o.chips for t in self.instance.tasks for o in t.options if o.pool == pool), default=0)
                _, extra = self._relax(f"pool {pool}", 4 * max(most, need), self.slack["pools"][str(pool)])
            intervals, demands = [i for i, _ in self.intervals[pool]], [d for _, d in self.intervals[pool]]
            for first, end, chips in _segments(steps, self.instance.horizon):
                if chips < most:
                    intervals.append(self.cp.new_fixed_size_interval_var(first, end - first, f"away {pool} {first}"))
                    demands.append(most - chips)
            if intervals:
                self.cp.add_cumulative(intervals, demands, most + extra)
            self._energy(pool, capacity, extra)

    def _energy(self, pool: int, capacity: list[int], extra: Any) -> None:
        """Between two points, the chip-slots of what must lie between them are at most those that are there."""
        tasks = self.instance.tasks
        begins = sorted({0, *self.release})
        ends = sorted({self.instance.horizon, *self.limit})
        total = [0]
        for chips in capacity:
            total.append(total[-1] + chips)
        for first in begins:
            for last in ends:
                terms, weight = [], 0
                if last <= first:
                    continue
                for number, task in enumerate(tasks):
                    for option, chosen in zip(task.options, self.present[number], strict=True):
                        if option.pool != pool:
                            continue
                        inside = _least_inside(self.release[number], self.limit[number], option.slots, first, last)
                        if inside > 0:
                            terms.append(option.chips * inside * chosen)
                            weight += option.chips * inside
                there = total[last] - total[first]
                if weight > there and len(terms) > 1:
                    self.cp.add(sum(terms) <= there + (last - first) * extra)

    def _budget(self) -> None:
        if self.instance.budget is None:
            return
        spent = sum(
            option.usd * chosen
            for task, present in zip(self.instance.tasks, self.present, strict=True)
            for option, chosen in zip(task.options, present, strict=True)
        )
        over: Any = 0
        if self.slack is not None and self.slack["budget"] is not None:
            most = sum(max((o.usd for o in t.options), default=0) for t in self.instance.tasks)
            _, over = self._relax("budget", most, self.slack["budget"])
        self.cp.add(spent <= self.instance.budget + over)

    def hint(self, schedule: list[list[int] | None]) -> None:
        """Begin the search from a schedule."""
        for number, one in enumerate(schedule):
            for index, chosen in enumerate(self.present[number]):
                self.cp.add_hint(chosen, one is not None and one[0] == index)
            self.cp.add_hint(self.done[number], one is not None)
            if one is not None:
                slots = self.instance.tasks[number].options[one[0]].slots
                self.cp.add_hint(self.start[number], one[1])
                self.cp.add_hint(self.end[number], one[1] + slots)
            else:
                self.cp.add_hint(self.start[number], self.release[number])
                self.cp.add_hint(self.end[number], self.release[number])
        left = {f"task {task.name}" for task, one in zip(self.instance.tasks, schedule, strict=True) if one is None}
        for name, (used, amount) in self.relaxed.items():
            self.cp.add_hint(used, name in left)
            self.cp.add_hint(amount, int(name in left))


def _least_inside(release: int, limit: int, slots: int, first: int, last: int) -> int:
    """Slots of [first, last) that a task of `slots` within [release, limit) cannot avoid."""
    if slots > limit - release:
        return 0
    early = min(release + slots, last) - max(release, first)
    late = min(limit, last) - max(limit - slots, first)
    return max(0, min(early, late, slots))


def _segments(steps: Any, horizon: int) -> list[tuple[int, int, int]]:
    """(first, end, chips) of a pool's constant stretches."""
    points = [(0, 0), *steps, (horizon, 0)]
    found = [(a, b, chips) for (a, chips), (b, _) in itertools.pairwise(points)]
    return [(a, min(b, horizon), chips) for a, b, chips in found if a < min(b, horizon)]


def answer(instance: Instance, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Solve and tell: {status, schedule, objective, bound, relaxed, seconds}."""
    begun = time.monotonic()
    if asked["slack"] is None:
        found = columns.all_columns(instance)
        if columns.cells(found) <= MOST_CELLS:
            return search.answer(instance, found, asked)
    model = Model(instance, asked["slack"])
    if asked["hint"] is not None:
        model.hint(asked["hint"])
    told: dict[str, Any] = {"status": "unknown", "schedule": [], "objective": None, "bound": None, "relaxed": {}}
    if asked["slack"] is not None:
        model.cp.minimize(sum(used for used, _ in model.relaxed.values()))
        solver = _run(model, asked, begun, 0.5)
        told["status"] = STATUS.get(solver.response_proto.status, "unknown")
        if told["status"] not in ("optimal", "feasible"):
            return told | {"seconds": time.monotonic() - begun}
        model.cp.add(sum(used for used, _ in model.relaxed.values()) <= round(solver.objective_value))
        _repeat(model, solver)
        model.cp.minimize(sum(model.relax_costs))
    else:
        model.cp.minimize(sum(model.costs))
    solver = _run(model, asked, begun, 1.0)
    told["status"] = STATUS.get(solver.response_proto.status, "unknown")
    told["bound"] = solver.best_objective_bound
    if told["status"] in ("optimal", "feasible"):
        told["objective"] = solver.objective_value
        told["schedule"] = [_chosen(model, solver, number) for number in range(len(instance.tasks))]
        told["relaxed"] = {
            name: int(solver.value(amount)) for name, (used, amount) in model.relaxed.items() if solver.value(used)
        }
    return told | {"seconds": time.monotonic() - begun}


def _run(model: Model, asked: Mapping[str, Any], begun: float, share: float) -> cp_model.CpSolver:
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = max(1.0, (asked["seconds"] - (time.monotonic() - begun)) * share)
    solver.parameters.num_workers = asked["workers"]
    solver.parameters.relative_gap_limit = asked["gap"]
    solver.parameters.random_seed = asked["seed"]
    solver.solve(model.cp)
    return solver


def _repeat(model: Model, solver: cp_model.CpSolver) -> None:
    """Go on from what was just found."""
    model.cp.clear_hints()
    found = [_chosen(model, solver, number) for number in range(len(model.instance.tasks))]
    model.hint(found)


def _chosen(model: Model, solver: cp_model.CpSolver, number: int) -> list[int] | None:
    for index, chosen in enumerate(model.present[number]):
        if solver.value(chosen):
            return [index, int(solver.value(model.start[number]))]
    return None
