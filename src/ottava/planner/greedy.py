"""A schedule in a moment: the solver's warm start, and what is left when its time is up.

Tasks are placed one after the other, each where it costs least at the earliest time its pool has room. Many orders are
tried; the best schedule by `judge` is kept. A task that the budget or the pools have no room for is left out where it
may be.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ottava.planner.instance import Chosen, Instance, Judgement, Task, after_all, judge

Free = list[NDArray[np.int64]]


def warm_start(instance: Instance, rounds: int = 600, seed: int = 0) -> tuple[list[Chosen | None], Judgement]:
    """The best schedule of several fixed orders, then of `rounds` in which a few tasks of the best order change places.

    It may violate what cannot be met.
    """
    draw = random.Random(seed)
    best: tuple[list[float], list[Chosen | None], Judgement] | None = None
    orders = _orders(instance)
    for number in range(rounds + len(orders)):
        rank = orders[number] if best is None or number < len(orders) else _moved(best[0], draw)
        schedule = place(instance, rank)
        told = judge(instance, schedule)
        if best is None or (len(told.broken), told.objective) <= (len(best[2].broken), best[2].objective):
            best = rank, schedule, told
    assert best is not None
    return best[1], best[2]


def _orders(instance: Instance) -> list[list[float]]:
    """Ranks by which tasks are taken, lowest first: by latest start, by worth of a chip-slot, by size, by release."""
    horizon = instance.horizon

    def size(task: Task) -> float:
        return min((o.chips * o.slots for o in task.options), default=1) or 1

    def slack(task: Task) -> float:
        ends = [end for end in (task.deadline, task.due) if end is not None]
        return min([*ends, horizon]) - min((o.slots for o in task.options), default=0)

    def worth(task: Task) -> float:
        return float("inf") if task.drop is None else task.drop / size(task)

    must = [0.0 if task.drop is None else 1.0 for task in instance.tasks]
    return [
        [slack(task) for task in instance.tasks],
        [-worth(task) for task in instance.tasks],
        [m * 1e9 + slack(task) for m, task in zip(must, instance.tasks, strict=True)],
        [-size(task) for task in instance.tasks],
        [float(task.release) for task in instance.tasks],
    ]


def _moved(rank: Sequence[float], draw: random.Random) -> list[float]:
    """The same order with one to four tasks put elsewhere."""
    places = [0.0] * len(rank)
    for place, number in enumerate(sorted(range(len(rank)), key=lambda n: rank[n])):
        places[number] = float(place)
    for _ in range(draw.randint(1, 4)):
        places[draw.randrange(len(rank))] = draw.uniform(-1, len(rank))
    return places


def place(instance: Instance, rank: Sequence[float]) -> list[Chosen | None]:
    """Place tasks by rank, never one before its predecessors."""
    free: Free = [np.array(instance.capacity(pool), dtype=np.int64) for pool in range(len(instance.pools))]
    chosen: list[Chosen | None] = [None] * len(instance.tasks)
    left = instance.budget
    for number in _ranked(instance, rank):
        task = instance.tasks[number]
        ends = [_end(instance, before, chosen[before]) for before in task.after]
        known = [end for end in ends if end is not None]
        if len(known) < len(ends):
            continue
        ready = max([task.release, *known])
        late = task.fixed and ready > task.release
        found = None if late else _cheapest(instance, task, ready, free, left)
        if found is None:
            continue
        chosen[number] = found
        option = task.options[found.option]
        free[option.pool][found.start : found.start + option.slots] -= option.chips
        left = None if left is None else left - option.usd
    return chosen


def _ranked(instance: Instance, rank: Sequence[float]) -> list[int]:
    """By rank, but a task's predecessors take its rank where it is lower, and come first."""
    urgency = list(rank)
    order = after_all(instance)
    for number in reversed(order):
        for before in instance.tasks[number].after:
            urgency[before] = min(urgency[before], urgency[number])
    place = {number: index for index, number in enumerate(order)}
    return sorted(range(len(rank)), key=lambda n: (urgency[n], place[n]))


def _end(instance: Instance, number: int, chosen: Chosen | None) -> int | None:
    return None if chosen is None else chosen.start + instance.tasks[number].options[chosen.option].slots


def _cheapest(instance: Instance, task: Task, ready: int, free: Free, left: int | None) -> Chosen | None:
    """The option with the lowest cost at its earliest time; ties go to the one that ends first."""
    best: tuple[int, int, int] | None = None
    chosen = None
    for number, option in enumerate(task.options):
        if option.breaks or (left is not None and option.usd > left):
            continue
        last = min(instance.horizon, instance.horizon if task.deadline is None else task.deadline) - option.slots
        start = earliest(free[option.pool], option.chips, option.slots, ready, ready if task.fixed else last)
        if start is None or start > last:
            continue
        end = start + option.slots
        late = 0 if task.due is None else task.late * max(0, end - task.due)
        cost = option.usd + option.penalty + late
        if task.drop is not None and cost > task.drop:
            continue
        key = (cost, end, option.chips)
        if best is None or key < best:
            best, chosen = key, Chosen(number, start)
    return chosen


def earliest(free: NDArray[np.int64], chips: int, slots: int, first: int, last: int) -> int | None:
    """The first slot in [first, last] from which `slots` slots each have `chips` free; None where there is none."""
    full = np.flatnonzero(free[first:] < chips) + first
    start = first
    for busy in full:
        if busy - start >= slots:
            break
        start = int(busy) + 1
    return start if start <= last and start + slots <= len(free) else None
