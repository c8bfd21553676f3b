"""What to do about a failure: a pure function, so that every case can be enumerated in a test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["killed", "hang", "error"]


@dataclass(frozen=True)
class Failure:
    """What the supervisor saw. step: the last step that was kept; message: the worker's own words."""

    pool: str
    kind: Kind
    step: int
    message: str


@dataclass(frozen=True)
class Restart:
    """Start again on the same pool from the last step."""

    pool: str


@dataclass(frozen=True)
class FallBack:
    """Go on on another pool from the last step."""

    source: str
    target: str


@dataclass(frozen=True)
class Stop:
    """Give up, and say why."""

    reason: str


Action = Restart | FallBack | Stop


def decide(pools: Sequence[str], restarts: int, failures: Sequence[Failure]) -> Action:
    """The next action after the last of `failures` (in order of time; at least one).

    pools: in order of preference; restarts: how many failures a pool may have before the run leaves
    it. An error that comes back at the same step in the same words is a bug, not a bad chip: the run
    stops and does not burn the other pool.
    """
    last = failures[-1]
    told = [(f.kind, f.step, f.message) for f in failures]
    if last.kind == "error" and told[-1] in told[:-1]:
        return Stop(f"the same error came back at step {last.step}: {last.message}")
    if sum(f.pool == last.pool for f in failures) <= restarts:
        return Restart(last.pool)
    later = pools[pools.index(last.pool) + 1 :]
    if not later:
        return Stop(f"no pool is left after {last.pool!r} failed at step {last.step}: {last.message}")
    return FallBack(last.pool, later[0])
