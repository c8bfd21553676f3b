"""How close to the best a portfolio's plan is proven to be: python -m benchmarks.plan [--json]

Fifty jobs on twelve pools over 26 weeks (in steps of --grid days), made at random by seed at two loads: moderate (all
jobs can be done) and oversubscribed (the pools hold about two thirds of what is asked, so that jobs are left out at a
price). Each is given --seconds, of which the heuristic and the start of the solver's process are part. gap is what is
proven: (objective - bound) / objective. `ours` is the proven gap of the solver, `baseline` that of the heuristic alone
against the same bound.
"""

from __future__ import annotations

import random
import time
from dataclasses import replace

from benchmarks.common import options, show
from ottava.planner.greedy import warm_start
from ottava.planner.instance import Instance, Option, Task, judge
from ottava.planner.place import best

JOBS, POOLS, WEEKS = 50, 12, 26
SIZES = (128, 256, 512, 1024, 2048)
LOAD = {"moderate": 0.6, "oversubscribed": 1.5}


def instance(seed: int, load: float, grid: int = 7, jobs: int = JOBS, pools: int = POOLS) -> Instance:
    """A portfolio whose jobs ask for about `load` times the chip-days there are. Above 1 jobs may be left out.

    Pools: 512 to 4,096 chips of one of four kinds, with their speed and price; a third of them grow during the plan.
    Jobs: one to three sizes, on the kinds of pools that take them; most are wanted by a day and cost money when late,
    some have a last day; a third wait for another; the work of each is scaled to the load.
    """
    draw, days = random.Random(seed), 7 * WEEKS
    kinds = [(1.0, 48.0), (0.45, 20.0), (0.3, 12.0), (0.8, 30.0)]  # speed, USD a chip-day
    of_pool = [draw.randrange(len(kinds)) for _ in range(pools)]
    capacity = []
    for _ in range(pools):
        chips = draw.choice((512, 1024, 2048, 4096))
        grows = draw.random() < 1 / 3
        capacity.append(((0, chips // 2), (draw.randrange(14, 84), chips)) if grows else ((0, chips),))
    speed = [kinds[kind][0] * draw.uniform(0.9, 1.1) for kind in of_pool]
    price = [kinds[kind][1] * draw.uniform(0.9, 1.1) for kind in of_pool]
    there = sum(chips * days * fast for steps, fast in zip(capacity, speed, strict=True) for _, chips in steps[-1:])
    shares = [draw.lognormvariate(0, 0.8) for _ in range(jobs)]
    tasks: list[Task] = []
    for number in range(jobs):
        work = there * load * shares[number] / sum(shares)  # chip-days at speed 1
        tasks.append(_task(draw, number, work, capacity, speed, price, days, load > 1, tasks))
    return coarse(Instance(tuple(tasks), tuple(capacity), days), grid)


def coarse(fine: Instance, grid: int) -> Instance:
    """An instance in days as one in steps of `grid` days: durations rounded up, capacity and releases late."""
    if grid == 1:
        return fine
    tasks = []
    for task in fine.tasks:
        options = tuple(replace(o, slots=-(-o.slots // grid)) for o in task.options)
        due = None if task.due is None else -(-task.due // grid)
        tasks.append(replace(task, options=options, release=-(-task.release // grid), due=due, late=task.late * grid))
    pools = tuple(tuple((-(-first // grid), chips) for first, chips in steps) for steps in fine.pools)
    return Instance(tuple(tasks), pools, fine.horizon // grid)


def _task(
    draw: random.Random, number: int, work: float, capacity: list[tuple[tuple[int, int], ...]],
    speed: list[float], price: list[float], days: int, may_drop: bool, before: list[Task],
) -> Task:  # fmt: skip
    found: list[Option] = []
    liked = set(draw.sample(range(len(speed)), draw.randint(max(1, len(speed) // 3), len(speed))))
    for pool in sorted(liked):
        for chips in SIZES:
            slots = -int(-work // (chips * speed[pool]))
            if chips <= capacity[pool][-1][1] and 2 <= slots <= days * 0.6:
                usd = round(chips * slots * price[pool])
                found.append(Option(pool, chips, slots, usd, penalty=round(0.2 * usd) if draw.random() < 0.3 else 0))
    if not found:  # too large or too small for every pool it likes: as much as fits the largest
        pool = max(range(len(speed)), key=lambda p: capacity[p][-1][1])
        slots = max(2, min(round(days * 0.6), -int(-work // (capacity[pool][-1][1] * speed[pool]))))
        found = [Option(pool, capacity[pool][-1][1], slots, round(capacity[pool][-1][1] * slots * price[pool]))]
    shortest = min(option.slots for option in found)
    cheapest = min(option.usd for option in found)
    release = draw.randrange(0, max(1, min(days // 2, days - shortest)))
    after = (draw.randrange(number),) if number and draw.random() < 1 / 3 else ()
    ready = max([release, *(before[one].release + min(o.slots for o in before[one].options) for one in after)])
    due = min(days, ready + round(shortest * draw.uniform(1.1, 3.0)) + draw.randrange(28))
    late = round(cheapest * draw.uniform(0.005, 0.03))
    drop = round(cheapest * draw.uniform(1.2, 3.0)) if may_drop else None
    return Task(f"job-{number}", tuple(found), release, None, due, late, drop, after)


def solved(name: str, seed: int, load: float, grid: int, seconds: float, workers: int) -> dict[str, object]:
    """One row: what is proven of this portfolio."""
    asked, begun = instance(seed, load, grid), time.monotonic()
    start, told = warm_start(asked)
    found = best(asked, start, told, seconds - (time.monotonic() - begun), workers)
    took = round(time.monotonic() - begun, 1)  # heuristic, start of the solver's process and solver
    row: dict[str, object] = {"name": f"{name} {seed}", "status": found.status, "seconds": took}
    if not found.schedule or found.bound is None:
        return row | {"ours": None, "baseline": None}
    judged = judge(asked, found.schedule)
    assert not judged.broken
    alone = None if told.broken else (told.objective - found.bound) / told.objective
    return row | {
        "ours": round(max(0.0, (judged.objective - found.bound) / judged.objective), 5),
        "baseline": None if alone is None else round(alone, 5),
        "left_out": sum(one is None for one in found.schedule),
    }


def main() -> None:
    """Print {"results": [...]} or a table."""
    args = options(__doc__ or "", seeds=5, seconds=30, workers=2, grid=7)
    rows = [
        solved(name, seed, load, args.grid, args.seconds, args.workers)
        for name, load in LOAD.items()
        for seed in range(args.seeds)
    ]
    show(rows, args.json)


if __name__ == "__main__":
    main()
