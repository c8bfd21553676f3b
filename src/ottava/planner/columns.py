"""The time-indexed program of an instance: one column for every way and slot in which a task may be done, and what a
price on everything scarce proves about them.

Chips of a pool in a slot, waiting for another task, and the budget are scarce. Whatever prices above zero are put on
them, what the tasks cost at least when each is alone and pays these prices, less what all that is scarce is worth, is
at most what any schedule costs (Lagrange's bound; Geoffrion, Mathematical Programming Study 2, 1974). A linear program
proposes the prices, in floating point; the bound is worked out from them here, in whole numbers, so that it holds
however wrong they are.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from ottava.planner.instance import Instance, windows

SCALE = 1_000_000
"""Prices are whole millionths of a dollar."""


@dataclass(frozen=True, slots=True)
class Column:
    """A task done by an option in [start, end), at a cost in whole dollars that includes penalty and lateness. option
    None: it is left out; start and end are then the horizon, so that whoever waits for it is left out too."""

    task: int
    option: int | None
    start: int
    end: int
    cost: int
    usd: int = 0
    pool: int = 0
    chips: int = 0


@dataclass(frozen=True)
class Prices:
    """Prices, all >= 0, in 1 / SCALE dollars. chips[pool][slot]: a chip for a slot; waits[task, before][slot]: that a
    task has begun by a slot before another has ended; budget: one dollar spent."""

    chips: list[list[int]]
    waits: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    budget: int = 0


@dataclass(frozen=True)
class Bound:
    """No schedule costs less than `dollars`; one that has column c costs at least (total + reduced[c]) / SCALE."""

    total: int
    reduced: list[int]

    @property
    def dollars(self) -> int:
        """The bound in whole dollars, rounded up: what schedules cost is whole."""
        return -(-self.total // SCALE)

    def within(self, columns: Sequence[Column], objective: int) -> list[int]:
        """Numbers of the columns that a schedule of this cost, or a lower one, can have."""
        most = SCALE * objective - self.total
        return [number for number, _ in enumerate(columns) if self.reduced[number] <= most]


def all_columns(instance: Instance) -> list[Column]:
    """Every column that capacity, release, deadline and what it waits for allow by themselves."""
    release, limit = windows(instance)
    found: list[Column] = []
    rooms = [instance.capacity(pool) for pool in range(len(instance.pools))]
    for number, task in enumerate(instance.tasks):
        for index, option in enumerate(task.options):
            if option.breaks:
                continue
            last = limit[number] - option.slots
            starts = range(release[number], (min(last, task.release) if task.fixed else last) + 1)
            room = rooms[option.pool]
            for start in starts:
                end = start + option.slots
                if min(room[start:end], default=option.chips) < option.chips:
                    continue
                late = 0 if task.due is None else task.late * max(0, end - task.due)
                cost = option.usd + option.penalty + late
                found.append(Column(number, index, start, end, cost, option.usd, option.pool, option.chips))
        if task.drop is not None:
            found.append(left_out(instance, number, task.drop))
    return found


def left_out(instance: Instance, task: int, cost: int) -> Column:
    """The column of a task that is left out."""
    return Column(task, None, instance.horizon, instance.horizon, cost)


def cells(columns: Collection[Column]) -> int:
    """Slots that all columns occupy: the size of the program."""
    return sum(column.end - column.start for column in columns)


def chip_rows(columns: Sequence[Column], chosen: Collection[int]) -> dict[tuple[int, int], list[int]]:
    """Numbers of those of the chosen columns that hold chips, by (pool, slot)."""
    rows: dict[tuple[int, int], list[int]] = {}
    for number in chosen:
        column = columns[number]
        for slot in range(column.start, column.end):
            rows.setdefault((column.pool, slot), []).append(number)
    return rows


def wait_rows(
    instance: Instance, columns: Sequence[Column], chosen: Collection[int]
) -> Iterator[tuple[int, int, list[tuple[int, list[int], list[int]]]]]:
    """(task, before, [(slot, columns by which `before` has ended since the slot before, columns by which the task has
    begun since)]) for all of which the chosen columns have one: of the first there were never fewer than of the second.

    The differences keep the program small: each column stands once a pair, not once a slot.
    """
    of: dict[int, list[int]] = {}
    for number in chosen:
        of.setdefault(columns[number].task, []).append(number)
    for task, mine in of.items():
        for before in instance.tasks[task].after:
            slots = sorted({columns[n].start for n in mine if columns[n].option is not None})
            rows: list[tuple[int, list[int], list[int]]] = [(slot, [], []) for slot in slots]
            for n in mine:
                if columns[n].option is not None:
                    rows[bisect.bisect_left(slots, columns[n].start)][2].append(n)
            for n in of.get(before, ()):
                place = bisect.bisect_left(slots, columns[n].end)
                if place < len(rows):
                    rows[place][1].append(n)
            if before in of:
                yield task, before, rows


def bound(instance: Instance, columns: Sequence[Column], prices: Prices) -> Bound:
    """What the prices prove, exactly. A task without columns adds nothing: there is no schedule then."""
    until = [[0, *itertools.accumulate(of_pool)] for of_pool in prices.chips]  # of a chip, from 0 to a slot
    after = {pair: [*itertools.accumulate(reversed([*row, 0]))][::-1] for pair, row in prices.waits.items()}
    waits: list[list[list[int]]] = [[] for _ in instance.tasks]
    holds: list[list[list[int]]] = [[] for _ in instance.tasks]
    for (task, before), row in after.items():
        waits[task].append(row)
        holds[before].append(row)
    paid = []
    for column in columns:
        price = SCALE * column.cost + prices.budget * column.usd
        price += column.chips * (until[column.pool][column.end] - until[column.pool][column.start])
        price += sum(row[column.start] for row in waits[column.task])
        paid.append(price - sum(row[column.end] for row in holds[column.task]))
    least: list[int | None] = [None] * len(instance.tasks)
    for column, price in zip(columns, paid, strict=True):
        known = least[column.task]
        least[column.task] = price if known is None else min(known, price)
    worth = prices.budget * (instance.budget or 0) + sum(
        price * chips
        for pool, of_pool in enumerate(prices.chips)
        for price, chips in zip(of_pool, instance.capacity(pool), strict=True)
    )
    reduced = [price - (least[column.task] or 0) for column, price in zip(columns, paid, strict=True)]
    return Bound(sum(one or 0 for one in least) - worth, reduced)
