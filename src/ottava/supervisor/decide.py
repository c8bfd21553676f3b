"""What to do about a failure: a pure function of what happened so far, so that every case can be enumerated in a test.

not the pool's fault (disk, a data file)           stop: moving would not help
engine and learner are not the same policy         stop: the hand-over is wrong, and no chip is to blame
the same deterministic failure twice               stop: it is a bug, another pool is not burnt
wrong gradients                                    go back to the last state that an audit vouches for
a generation's rollouts lost                       go back to the state that drew them
wrong bits, another class, a dead node or chip     leave those chips at once
killed, hanging, stuck, slow, wrong numbers        leave a chip at its second strike, if it is not the pool's last
more failures than the pool may have, or no chip   fall back to the next pool; none left: stop
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ottava.recipe import Pool

KINDS = {
    "killed": "a worker's process ended by a signal",
    "node": "a whole machine is gone",
    "crash": "a worker's process ended by a signal of its own doing, such as a segmentation fault",
    "hang": "no progress",
    "error": "a worker raised an error",
    "nan": "a loss or gradient that is not finite",
    "spike": "a loss far above the recent ones",
    "corrupt": "workers that must hold equal bits do not, or memory changed by itself",
    "gradient": "a gradient that an audit computed otherwise",
    "class": "workers that compute other bits than their pool",
    "straggler": "a worker far slower than the others",
    "stuck": "a chip that has to be opened anew, as its driver says",
    "lost": "a chip that its driver gives up",
    "memory": "a worker had no memory",
    "collective": "the exchange between workers broke, and none of them died",
    "pool": "the pool's chips are not there, others hold them, or its software cannot do the work",
    "rollout": "what a generation of replies drew is gone or altered; step: the generation's first",
    "mismatch": "the engine that draws replies is not the policy that learns from them",
    "disk": "the disk refuses, and no state could be made durable for too long",
}
"""The kinds of failure, by what is seen."""

BUGS = ("error", "crash", "memory")
DETERMINISTIC = (*BUGS, "nan", "spike")
"""Seen twice with the same words at the same step, these are bugs of the recipe or the code; the last two may be of
the numbers alone."""

OUT_AT_ONCE = ("corrupt", "gradient", "class", "node", "straggler", "lost", "pool")
STRIKES = 2


@dataclass(frozen=True)
class Failure:
    """What the supervisor saw. step: the last that was kept; message: the worker's own words; chips: who is blamed."""

    pool: str
    kind: str
    step: int
    message: str
    chips: tuple[int, ...] = ()


@dataclass(frozen=True)
class Standing:
    """A pool in a run. chips: all of its chips that are still trusted; failures: how often it failed so far."""

    name: str
    chips: tuple[int, ...]
    failures: int = 0
    strikes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Situation:
    """Where a run stands. at: the present pool's index; restarts: failures that a pool may have before the run
    leaves it; shards: V, the most workers there is work for; audited: the last step whose state an audit vouches for;
    elastic: whether it may go on with fewer workers, so that chips can be left.
    """

    pools: tuple[Standing, ...]
    restarts: int
    shards: int
    at: int = 0
    audited: int = 0
    elastic: bool = True
    history: tuple[Failure, ...] = ()

    @property
    def pool(self) -> Standing:
        return self.pools[self.at]


@dataclass(frozen=True)
class Exclude:
    """Start no worker on these chips any more."""

    pool: str
    chips: tuple[int, ...]


@dataclass(frozen=True)
class RollBack:
    """States after this step count no longer."""

    step: int


@dataclass(frozen=True)
class Start:
    """Start again on the same pool."""

    pool: str
    chips: tuple[int, ...]


@dataclass(frozen=True)
class FallBack:
    """Go on on another pool."""

    source: str
    target: str
    chips: tuple[int, ...]


@dataclass(frozen=True)
class Stop:
    """Give up, and say why."""

    reason: str


Action = Exclude | RollBack | Start | FallBack | Stop


def standing(pools: Sequence[Pool], restarts: int, shards: int, elastic: bool = True) -> Situation:
    """Where a run stands before anything happened."""
    whole = tuple(Standing(pool.name, tuple(range(pool.workers))) for pool in pools)
    return Situation(whole, restarts, shards, elastic=elastic)


def decide(situation: Situation, failure: Failure) -> tuple[Situation, tuple[Action, ...]]:
    """The situation after a failure on its present pool, and what to do, in order.

    The last action is always a Start, a FallBack or a Stop; a run has at most (restarts + 1) failures a pool.
    """
    now = replace(situation, history=(*situation.history, failure))
    if failure.kind == "disk":
        return now, (Stop(f"no state can be made durable: {failure.message}"),)
    if failure.kind == "mismatch":
        return now, (Stop(failure.message),)
    if failure.kind in DETERMINISTIC and any(_same(failure, earlier, situation) for earlier in situation.history):
        return now, (Stop(f"the same {failure.kind} came back at step {failure.step}: {failure.message}"),)
    actions: list[Action] = []
    if failure.kind in ("gradient", "rollout"):
        actions.append(RollBack(now.audited if failure.kind == "gradient" else failure.step))
    standing, out = _strike(now.pool, failure, now.elastic)
    if out:
        actions.append(Exclude(standing.name, out))
    now = replace(now, pools=(*now.pools[: now.at], standing, *now.pools[now.at + 1 :]))
    if standing.failures <= now.restarts and standing.chips:
        return now, (*actions, Start(standing.name, group(standing.chips, now.shards)))
    later = [index for index in range(now.at + 1, len(now.pools)) if now.pools[index].chips]
    if not later:
        why = f"no pool is left after {standing.name!r} failed at step {failure.step}: {failure.message}"
        return now, (*actions, Stop(why))
    now = replace(now, at=later[0])
    return now, (*actions, FallBack(standing.name, now.pool.name, group(now.pool.chips, now.shards)))


def _same(failure: Failure, earlier: Failure, situation: Situation) -> bool:
    """Whether a deterministic failure came back, as a bug does. Where it followed a chip to other shards, it is the
    chip's: see `_strike`."""
    again = (failure.kind, failure.step, failure.message) == (earlier.kind, earlier.step, earlier.message)
    moved = len(situation.pool.chips) > 1 and failure.pool == earlier.pool
    return again and not (failure.chips and failure.chips == earlier.chips and moved)


def _strike(pool: Standing, failure: Failure, elastic: bool) -> tuple[Standing, tuple[int, ...]]:
    """The pool with the failure counted, and the chips that leave it: where a pool would have none left, strikes alone
    are no reason, as its restarts are counted anyhow."""
    strikes = (*pool.strikes, *failure.chips)
    blamed = [chip for chip in dict.fromkeys(failure.chips) if chip in pool.chips]
    at_once = failure.kind in OUT_AT_ONCE
    out = tuple(c for c in blamed if at_once or strikes.count(c) >= STRIKES) if elastic else ()
    out = out if at_once or len(out) < len(pool.chips) else ()
    trusted = [chip for chip in pool.chips if chip not in out]
    # Whoever is blamed goes to the end, so that its shards come to another chip: what then comes back is no chip's.
    left = tuple(sorted(trusted, key=lambda chip: chip in blamed))
    return Standing(pool.name, left, pool.failures + 1, strikes), out


def group(chips: Sequence[int], shards: int) -> tuple[int, ...]:
    """The chips to start workers on: a power of two of them, at most one for each virtual shard."""
    size = 1
    while 2 * size <= min(len(chips), shards):
        size *= 2
    return tuple(chips[:size])
