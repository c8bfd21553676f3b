"""Puts jobs on pools and times: a list schedule, which places one job after the other and never moves one.

It is optimal for the chain of stages that a recipe is. For many jobs competing for many pools over
weeks, a solver belongs beside it, behind the same function signature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Job:
    """Work to place. seconds: by pool, only where it can run; after: jobs that must have ended.

    prefer: pools to take in this order; empty: the pool on which it ends first. everywhere: it occupies every pool.
    """

    name: str
    seconds: Mapping[str, float]
    after: tuple[str, ...] = ()
    prefer: tuple[str, ...] = ()
    everywhere: bool = False


@dataclass(frozen=True)
class Placement:
    """A job with its pool, the pools to fall back to in order, and its times in seconds from the plan's start."""

    name: str
    pool: str
    fallback: tuple[str, ...]
    start: float
    end: float
    everywhere: bool = False

    def occupies(self, pool: str) -> bool:
        """True where the job keeps `pool` busy between its start and its end."""
        return self.everywhere or self.pool == pool


def schedule(jobs: Sequence[Job], pools: Sequence[str]) -> list[Placement]:
    """Place each job, in the order given, as early as its predecessors and its pool allow.

    `jobs` lists predecessors before successors. Ties go to the pool that comes first. Raises ValueError for a job
    that no pool can run or whose predecessor does not come before it.
    """
    free = dict.fromkeys(pools, 0.0)
    placed: dict[str, Placement] = {}
    for job in jobs:
        missing = [name for name in job.after if name not in placed]
        if missing:
            raise ValueError(f"{job.name!r} comes before {missing[0]!r}, which must have ended")
        able = [pool for pool in pools if pool in job.seconds]
        if not able:
            raise ValueError(f"no pool can run {job.name!r}")
        ready = max((placed[name].end for name in job.after), default=0.0)
        if job.everywhere:
            ready = max(ready, *free.values())
        order = _order(job, able, {pool: max(ready, free[pool]) for pool in able})
        start = max(ready, free[order[0]])
        end = start + job.seconds[order[0]]
        fallback = () if job.everywhere else tuple(order[1:])
        placement = Placement(job.name, order[0], fallback, start, end, job.everywhere)
        for pool in pools:
            if placement.occupies(pool):
                free[pool] = end
        placed[job.name] = placement
    return list(placed.values())


def _order(job: Job, able: Sequence[str], start: Mapping[str, float]) -> list[str]:
    """The pools that can run a job, best first: as preferred, then by the time it would end."""
    rank = {pool: place for place, pool in enumerate(job.prefer)}
    return sorted(able, key=lambda pool: (rank.get(pool, len(rank)), start[pool] + job.seconds[pool]))


def makespan(placements: Sequence[Placement]) -> float:
    """Seconds from the plan's start to the end of the last job."""
    return max((placement.end for placement in placements), default=0.0)
