"""The search among the columns of a program that is small enough for them. Imported in the solver's own process only.

1. GLOP solves the linear program; its prices give the bound (`planner.columns`, exact).
2. Neighbourhoods: a few tasks that want the same chips at the same time are placed anew by CP-SAT, all others kept;
   few columns have so low a reduced cost that they are worth trying, so each takes a moment. The neighbourhoods grow.
3. What time is left goes to CP-SAT on all tasks and all columns that a better schedule can have. It alone proves the
   best, or that there is no schedule.

Up to the time limits all of it is decided by the seed: neighbourhoods are bounded by CP-SAT's deterministic time.
"""

from __future__ import annotations

import datetime
import math
import random
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from ortools.math_opt.python import mathopt
from ortools.sat.python import cp_model

from ottava.planner.columns import (
    SCALE,
    Bound,
    Column,
    Prices,
    bound,
    chip_rows,
    left_out,
    wait_rows,
)
from ottava.planner.instance import Instance

SHARE = 0.6  # of the time, at most, for neighbourhoods
LOOK = 0.1  # of the time, at most, for a first look at everything where no schedule is known
FIRST = 10  # tasks in the first neighbourhood
EFFORT = 1.0  # deterministic seconds a neighbourhood
WORTH = 0.01  # reduced costs above this share of the bound are not tried in neighbourhoods


class Search:
    """An instance's columns, the best schedule so far (`best`: a column a task, None: none yet), and its bound.

    A task that must be done and is not yet has a column of its own, dearer than everything; only neighbourhoods use it.
    """

    def __init__(self, instance: Instance, columns: list[Column], seed: int) -> None:
        self.instance, self.draw = instance, random.Random(seed)
        self.real = len(columns)
        most = [max((c.cost for c in columns if c.task == task), default=0) for task in range(len(instance.tasks))]
        self.missing = 1 + sum(most)
        must = [left_out(instance, n, self.missing) for n, task in enumerate(instance.tasks) if task.drop is None]
        self.columns = columns + must
        self.number = {(c.task, c.option, c.start): number for number, c in enumerate(self.columns)}
        self.room = np.array([instance.capacity(pool) for pool in range(len(instance.pools))], dtype=np.int64)
        self.best: list[int] | None = None
        self.bound = Bound(0, [0] * self.real)
        self.floor = 0

    def take(self, schedule: Sequence[Sequence[int] | None]) -> None:
        """Begin from a schedule: (option, start) a task, None: left out."""
        end = self.instance.horizon
        keys = [(n, None, end) if one is None else (n, one[0], one[1]) for n, one in enumerate(schedule)]
        if all(key in self.number for key in keys):
            self.best = [self.number[key] for key in keys]

    def schedule(self) -> list[list[int] | None]:
        """The best schedule, as `take` has it; empty where there is none that leaves out nothing it must not."""
        if self.best is None or self.objective is None:
            return []
        taken = [self.columns[number] for number in self.best]
        return [None if c.option is None else [c.option, c.start] for c in taken]

    @property
    def objective(self) -> int | None:
        """Cost of the best schedule; None while there is none that leaves out nothing it must not."""
        if self.best is None or any(number >= self.real for number in self.best):
            return None
        return sum(self.columns[number].cost for number in self.best)

    def gap(self) -> float:
        """(objective - floor) / objective; infinite while there is no schedule."""
        return math.inf if self.objective is None else (self.objective - self.floor) / max(1, self.objective)

    def price(self, seconds: float) -> None:
        """The bound from the linear program's prices, or, where it has none, from no prices at all."""
        found = _linear(self.instance, self.columns[: self.real], self.room, seconds)
        nothing = Prices([[0] * self.instance.horizon for _ in self.instance.pools])
        known = bound(self.instance, self.columns[: self.real], found or nothing)
        self.floor = max(0, known.dollars)
        # a missing task's column is as attractive as its price says, which is not at all
        self.bound = Bound(known.total, known.reduced + [SCALE * self.missing] * (len(self.columns) - self.real))

    def improve(self, until: float, gap: float) -> None:
        """Neighbourhoods, until the gap is reached, they are everything, or the time is up."""
        assert self.best is not None
        size, count, near = float(FIRST), len(self.instance.tasks), self._near()
        while size < count and self.gap() > gap and time.monotonic() < until:
            free = self._drawn(round(size), near)
            proven = self._anew(free, until)
            size = size + 1 / 3 if proven else max(FIRST / 2, size - 2)

    def _near(self) -> Any:
        """How much each two tasks want the same chips: by columns of low reduced cost, and because they wait."""
        tasks, unit = self.instance.tasks, self._unit()
        wants = np.zeros((len(tasks), *self.room.shape))
        for column, reduced in zip(self.columns, self.bound.reduced, strict=True):
            if reduced <= unit and column.option is not None:
                wants[column.task, column.pool, column.start : column.end] += column.chips * math.exp(
                    -3 * reduced / unit
                )
        flat = wants.reshape(len(tasks), -1)
        flat /= np.linalg.norm(flat, axis=1, keepdims=True) + 1e-9
        near = flat @ flat.T
        for number, task in enumerate(tasks):
            for before in task.after:
                near[number, before] += 0.5
                near[before, number] += 0.5
        return near

    def _unit(self) -> float:
        """Reduced costs up to this are worth trying: also no more than what is left to gain."""
        unit = WORTH * SCALE * max(1, self.floor)
        return unit if self.objective is None else max(1.0, min(unit, SCALE * self.objective - self.bound.total))

    def _drawn(self, size: int, near: Any) -> list[int]:
        """Tasks to place anew: first one that pays much more than its share, then such as are near those drawn."""
        assert self.best is not None
        most = 5 * WORTH * SCALE * max(1, self.floor)
        regret = np.array([min(float(self.bound.reduced[number]), most) for number in self.best])
        weights = regret + 0.1 * regret.mean() + 1
        numbers, at_random = range(len(self.best)), self.draw.random() < 0.25
        free = self.draw.choices(numbers, weights.tolist())
        while len(free) < size:
            likely = (
                np.ones(len(numbers))
                if at_random
                else near[self.draw.choice(free)] * (0.3 + regret / (regret.max() + 1))
            )
            likely[free] = 0
            if likely.sum() <= 0:
                likely = np.ones(len(numbers))
                likely[free] = 0
            free += self.draw.choices(numbers, likely.tolist())
        return sorted(free)

    def _anew(self, free: Collection[int], until: float) -> bool:
        """Place some tasks anew, all others kept. True where that is proven to be the best of this neighbourhood."""
        assert self.best is not None
        wanted, room, budget = self._open(set(free))
        now = sum(self.columns[self.best[task]].cost for task in free)
        cp = _Program(self.instance, self.columns, wanted, room, budget)
        cp.hint(self.best)
        cp.between(0, now - 1)
        solver = _solver(until, workers=1)
        solver.parameters.max_deterministic_time = EFFORT
        solver.parameters.linearization_level = 2
        solver.parameters.symmetry_level = 0
        solver.parameters.cp_model_probing_level = 0
        status = solver.solve(cp.model)
        if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            for number in cp.chosen(solver):
                self.best[self.columns[number].task] = number
        return bool(status in (cp_model.OPTIMAL, cp_model.INFEASIBLE))

    def _open(self, free: set[int]) -> tuple[list[int], Any, int | None]:
        """Columns that tasks of a neighbourhood may take beside those kept, and the chips and budget left to them."""
        assert self.best is not None
        room, budget, horizon = self.room.copy(), self.instance.budget, self.instance.horizon
        first, last = dict.fromkeys(free, 0), dict.fromkeys(free, horizon)
        for task, number in enumerate(self.best):
            kept = self.columns[number]
            if task not in free:
                room[kept.pool, kept.start : kept.end] -= kept.chips
                budget = None if budget is None else budget - kept.usd
                for before in free.intersection(self.instance.tasks[task].after):
                    last[before] = min(last[before], kept.start)
            else:
                for before in set(self.instance.tasks[task].after) - free:
                    first[task] = max(first[task], self.columns[self.best[before]].end)
        unit, now = self._unit(), set(self.best)
        wanted = [
            number
            for number, c in enumerate(self.columns)
            if c.task in free
            and (self.bound.reduced[number] <= unit or number in now or (c.option is None and number < self.real))
            and first[c.task] <= c.start and c.end <= last[c.task]
            and (c.option is None or room[c.pool, c.start : c.end].min() >= c.chips)
        ]  # fmt: skip
        return wanted, room, budget

    def whole(self, until: float, workers: int, gap: float) -> str:
        """CP-SAT on everything. What is proven: optimal, feasible, infeasible, unknown."""
        objective = self.objective
        wanted: Iterable[int] = range(self.real)
        if objective is not None:
            wanted = self.bound.within(self.columns[: self.real], objective)
        cp = _Program(self.instance, self.columns, list(wanted), self.room, self.instance.budget)
        if objective is not None and self.best is not None:
            cp.hint(self.best)
        cp.between(self.floor, objective)
        solver = _solver(until, workers)
        solver.parameters.relative_gap_limit = gap
        status = solver.solve(cp.model)
        if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            best = cp.chosen(solver)
            self.best = sorted(best, key=lambda number: self.columns[number].task)
            proven = math.ceil(solver.best_objective_bound - 1e-6)  # whole numbers, told as floating point
            self.floor = max(self.floor, min(proven, sum(self.columns[number].cost for number in best)))
        if status == cp_model.INFEASIBLE and objective is None:
            return "infeasible"
        if self.objective is None:
            return "unknown"
        return "optimal" if self.gap() <= gap else "feasible"


class _Program:
    """Columns as literals: one a task, chips in every slot, waiting, the budget; the cost is made as low as it goes."""

    def __init__(
        self, instance: Instance, columns: Sequence[Column], wanted: list[int], room: Any, budget: int | None
    ) -> None:
        self.model, self.columns = cp_model.CpModel(), columns
        self.waiting: dict[tuple[int, int, int], Any] = {}  # has `before` ended by a slot, and the task not begun?
        self.ones = {number: self.model.new_bool_var("") for number in wanted}
        of: dict[int, list[Any]] = {}
        for number, one in self.ones.items():
            of.setdefault(columns[number].task, []).append(one)
        for ones in of.values():
            self.model.add_exactly_one(ones)
        for (pool, slot), held in chip_rows(columns, wanted).items():
            chips, there = [columns[n].chips for n in held], int(room[pool, slot])
            if sum(chips) > there:
                unit = math.gcd(*chips)
                self.model.add(self._sum(held, [one // unit for one in chips]) <= there // unit)
        for task, before, rows in wait_rows(instance, columns, wanted):
            last: Any = 0
            for slot, ended, begun in rows:
                between = self.model.new_bool_var("")
                self.waiting[task, before, slot] = between
                self.model.add(between == last + self._sum(ended) - self._sum(begun))
                last = between
        if budget is not None:
            self.model.add(self._sum(wanted, [columns[n].usd for n in wanted]) <= budget)
        self.cost = self._sum(wanted, [columns[n].cost for n in wanted])
        self.model.minimize(self.cost)

    def _sum(self, numbers: Sequence[int], weights: Sequence[int] | None = None) -> Any:
        ones = [self.ones[number] for number in numbers]
        weights = [1] * len(ones) if weights is None else weights
        return cp_model.LinearExpr.weighted_sum(ones, weights)

    def hint(self, best: Collection[int]) -> None:
        """Begin from these columns."""
        taken = set(best)
        there = {self.columns[number].task: self.columns[number] for number in best}
        for number, one in self.ones.items():
            self.model.add_hint(one, number in taken)
        for (task, before, slot), between in self.waiting.items():
            self.model.add_hint(between, there[before].end <= slot < there[task].start)

    def between(self, least: int, most: int | None) -> None:
        """What is known of the cost."""
        self.model.add(self.cost >= least)
        if most is not None:
            self.model.add(self.cost <= most)

    def chosen(self, solver: cp_model.CpSolver) -> list[int]:
        """Numbers of the columns taken."""
        return [number for number, one in self.ones.items() if solver.value(one)]


def _solver(until: float, workers: int) -> cp_model.CpSolver:
    """A solver that ends by a point in time, but has half a second in any case."""
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = max(0.5, until - time.monotonic())
    solver.parameters.num_workers = workers
    return solver


def _linear(instance: Instance, columns: Sequence[Column], room: Any, seconds: float) -> Prices | None:
    """Prices from the linear program; None where it has no solution, or none in time."""
    model, numbers = mathopt.Model(), range(len(columns))
    parts = [model.add_variable(lb=0.0) for _ in columns]
    of: list[list[Any]] = [[] for _ in instance.tasks]
    for column, part in zip(columns, parts, strict=True):
        of[column.task].append(part)
    if not all(of):
        return None
    for mine in of:
        model.add_linear_constraint(mathopt.fast_sum(mine) == 1)
    chips = {
        (pool, slot): model.add_linear_constraint(
            mathopt.fast_sum(columns[n].chips * parts[n] for n in held) <= int(room[pool, slot])
        )
        for (pool, slot), held in chip_rows(columns, numbers).items()
    }
    waits = {}
    for task, before, rows in wait_rows(instance, columns, numbers):
        last: Any = 0.0
        for slot, ended, begun in rows:
            between = waits[task, before, slot] = model.add_variable(lb=0.0)
            more = mathopt.fast_sum(parts[n] for n in ended) - mathopt.fast_sum(parts[n] for n in begun)
            model.add_linear_constraint(between - last == more)
            last = between
    budget = None
    if instance.budget is not None:
        spent = mathopt.fast_sum(column.usd * part for column, part in zip(columns, parts, strict=True))
        budget = model.add_linear_constraint(spent <= instance.budget)
    model.minimize(mathopt.fast_sum(column.cost * part for column, part in zip(columns, parts, strict=True)))
    limit = mathopt.SolveParameters(time_limit=datetime.timedelta(seconds=seconds))
    result = mathopt.solve(model, mathopt.SolverType.GLOP, params=limit)
    if result.termination.reason != mathopt.TerminationReason.OPTIMAL:
        return None
    duals, reduced = result.dual_values(), result.reduced_costs()
    prices = Prices(
        [[0] * instance.horizon for _ in instance.pools], {}, 0 if budget is None else _whole(duals[budget])
    )
    for (pool, slot), row in chips.items():
        prices.chips[pool][slot] = _whole(duals[row])
    for (task, before, slot), between in waits.items():
        prices.waits.setdefault((task, before), [0] * instance.horizon)[slot] = _whole(-reduced[between])
    return prices


def _whole(dual: float) -> int:
    """A row's price: what one more of its right side would save."""
    return max(0, round(-dual * SCALE))


def answer(instance: Instance, columns: list[Column], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Solve and tell, as `planner.model.answer` does."""
    begun, seconds, gap = time.monotonic(), asked["seconds"], asked["gap"]
    told: dict[str, Any] = {"status": "infeasible", "schedule": [], "objective": None, "bound": None, "relaxed": {}}
    if len({column.task for column in columns}) < len(instance.tasks):  # a task that fits nowhere
        return told | {"seconds": time.monotonic() - begun}
    search = Search(instance, columns, asked["seed"])
    search.price(seconds * SHARE)
    hint = asked["hint"]
    if hint is not None:
        search.take(hint)
    status = "unknown"
    if search.objective is None:
        status = search.whole(time.monotonic() + seconds * LOOK, asked["workers"], gap)
    if status not in ("infeasible", "optimal"):
        if search.best is None:
            search.take([None] * len(instance.tasks))
        search.improve(begun + seconds * SHARE, gap)
        status = "optimal" if search.gap() <= gap else search.whole(begun + seconds, asked["workers"], gap)
    told |= {"status": status, "schedule": search.schedule(), "objective": search.objective}
    if status != "infeasible":
        told["bound"] = search.floor
    return told | {"seconds": time.monotonic() - begun}
