"""A scheduling problem as plain numbers, and the one function that says what a schedule costs and which rules it
breaks.

The solver, the heuristic, brute force and the tests all judge a schedule by `judge`: none of them is trusted to know
what its own answer is worth. Time counts slots from the plan's start; money whole dollars.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Option:
    """One way to do a task: `chips` of pool number `pool` for `slots`. usd: chips times time times price; penalty: what
    the soft rules it disregards are worth; breaks: constraints that forbid it, by name, unless they are relaxed."""

    pool: int
    chips: int
    slots: int
    usd: int
    penalty: int = 0
    breaks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """Something to place. release: first slot it may start in; deadline: slot by which it must have ended, or None;
    due, late: from when on each slot of lateness costs `late`; drop: what leaving it out costs, None: it must be done;
    after: numbers of tasks that must have ended; fixed: it starts in its release slot."""

    name: str
    options: tuple[Option, ...]
    release: int = 0
    deadline: int | None = None
    due: int | None = None
    late: int = 0
    drop: int | None = None
    after: tuple[int, ...] = ()
    fixed: bool = False


@dataclass(frozen=True)
class Instance:
    """Tasks, and per pool its capacity as steps (first slot, chips). budget: the most that all usd may come to."""

    tasks: tuple[Task, ...]
    pools: tuple[tuple[tuple[int, int], ...], ...]
    horizon: int
    budget: int | None = None

    def capacity(self, pool: int) -> list[int]:
        """Chips of a pool in every slot."""
        chips = [0] * self.horizon
        for first, count in self.pools[pool]:
            chips[first:] = [count] * max(0, self.horizon - first)
        return chips

    def json(self) -> dict[str, Any]:
        """As plain data; `of` reads it back."""
        return asdict(self)


def of(data: Mapping[str, Any]) -> Instance:
    """The instance that `Instance.json` wrote."""
    tasks = tuple(
        Task(**{**task, "options": tuple(Option(**{**o, "breaks": tuple(o["breaks"])}) for o in task["options"]),
                "after": tuple(task["after"])})
        for task in data["tasks"]
    )  # fmt: skip
    pools = tuple(tuple((int(first), int(chips)) for first, chips in steps) for steps in data["pools"])
    return Instance(tasks, pools, data["horizon"], data["budget"])


@dataclass(frozen=True)
class Chosen:
    """What was decided for a task: which option, and the slot it starts in."""

    option: int
    start: int


Schedule = Sequence[Chosen | None]
"""One decision a task, in order; None: it is left out."""


@dataclass(frozen=True)
class Judgement:
    """What a schedule is worth. objective: usd + penalties + lateness + what was left out; broken: what it violates."""

    objective: int
    usd: int
    penalty: int
    lateness: int
    dropped: int
    broken: tuple[str, ...] = field(default_factory=tuple)


def judge(instance: Instance, schedule: Schedule) -> Judgement:
    """Add up a schedule and list everything that it violates, in words."""
    usd = penalty = lateness = dropped = 0
    broken: list[str] = []
    used = [[0] * instance.horizon for _ in instance.pools]
    for task, chosen in zip(instance.tasks, schedule, strict=True):
        if chosen is None:
            if task.drop is None:
                broken.append(f"{task.name} is left out")
            dropped += task.drop or 0
            continue
        option = task.options[chosen.option]
        end = chosen.start + option.slots
        usd, penalty = usd + option.usd, penalty + option.penalty
        broken += [f"{task.name} breaks {name}" for name in option.breaks]
        if task.due is not None:
            lateness += task.late * max(0, end - task.due)
        if chosen.start < task.release or (task.fixed and chosen.start != task.release):
            broken.append(f"{task.name} starts at the wrong time")
        if end > min(instance.horizon, instance.horizon if task.deadline is None else task.deadline):
            broken.append(f"{task.name} ends too late")
        for slot in range(max(0, chosen.start), min(end, instance.horizon)):
            used[option.pool][slot] += option.chips
        for number in task.after:
            before, first = instance.tasks[number], schedule[number]
            if first is None or first.start + before.options[first.option].slots > chosen.start:
                broken.append(f"{task.name} does not wait for {before.name}")
    for pool, busy in enumerate(used):
        if any(need > there for need, there in zip(busy, instance.capacity(pool), strict=True)):
            broken.append(f"pool {pool} has too few chips")
    if instance.budget is not None and usd > instance.budget:
        broken.append("the budget is exceeded")
    return Judgement(usd + penalty + lateness + dropped, usd, penalty, lateness, dropped, tuple(broken))


def least(instance: Instance) -> int:
    """No schedule costs less: every task by its cheapest way, as if it were alone with those it waits for."""
    begin = [task.release for task in instance.tasks]
    total = 0
    for number in after_all(instance):
        task = instance.tasks[number]
        for before in task.after:
            shortest = min((o.slots for o in instance.tasks[before].options), default=0)
            begin[number] = max(begin[number], begin[before] + shortest)
        ways = [o for o in task.options if not o.breaks]
        costs = [
            o.usd + o.penalty + (0 if task.due is None else task.late * max(0, begin[number] + o.slots - task.due))
            for o in ways
        ]
        total += min([*costs, *([] if task.drop is None else [task.drop])], default=0)
    return total


def after_all(instance: Instance) -> list[int]:
    """Task numbers, predecessors first. ValueError names the tasks of a cycle."""
    order: list[int] = []
    state = [0] * len(instance.tasks)

    def visit(number: int, path: tuple[int, ...]) -> None:
        if state[number] == 2:
            return
        if state[number] == 1:
            circle = [*path[path.index(number) :], number]
            raise ValueError(" -> ".join(instance.tasks[one].name for one in circle))
        state[number] = 1
        for before in instance.tasks[number].after:
            visit(before, (*path, number))
        state[number] = 2
        order.append(number)

    for number in range(len(instance.tasks)):
        visit(number, ())
    return order


def windows(instance: Instance, loose: Collection[str] = (), may_drop: bool = False) -> tuple[list[int], list[int]]:
    """First start and last end of every task, tightened along what waits for what.

    loose: names of tasks whose deadline does not count; may_drop: any task may be left out.
    """
    tasks, horizon = instance.tasks, instance.horizon
    release = [min(task.release, horizon) for task in tasks]
    limit = [horizon if task.deadline is None or task.name in loose else min(task.deadline, horizon) for task in tasks]
    shortest = [min((option.slots for option in task.options), default=0) for task in tasks]
    order = after_all(instance)
    for number in order:
        for before in tasks[number].after:
            release[number] = min(horizon, max(release[number], release[before] + shortest[before]))
    if not may_drop and all(task.drop is None for task in tasks):
        for number in reversed(order):  # a task that may be left out does not hurry those before it
            for before in tasks[number].after:
                limit[before] = min(limit[before], max(0, limit[number] - shortest[number]))
    return release, [max(a, b) for a, b in zip(release, limit, strict=True)]
