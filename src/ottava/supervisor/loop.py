"""The supervisor's loop: start a pool's workers, watch them, decide on a failure, move the run.

What must not be lost is in files: states in `store`, decisions in the journal, of which `record` is a fold. Killed at
any moment and started again, the supervisor goes on; its old workers end by themselves when their line is cut.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ottava import journal
from ottava.artifact import digest_of
from ottava.context import Launcher
from ottava.errors import RecipeError, TrainingFailed
from ottava.journal import Journal
from ottava.recipe import Pool
from ottava.supervisor import record, store
from ottava.supervisor.attempt import Stretch, act, alone, attempt, say
from ottava.supervisor.decide import Situation, group, standing
from ottava.supervisor.hub import Hub
from ottava.supervisor.looks import Gate
from ottava.supervisor.record import Record, Segment
from ottava.supervisor.store import Found
from ottava.trainer import snapshot
from ottava.trainer.snapshot import Snapshot
from ottava.trainer.supervised import Fault, Supervised

WORKER = "ottava.trainer.worker:run"
CARE = {
    "budget_s", "pool", "fault", "audit", "spike", "restarts", "hang_s", "hang_least_s", "leave_stragglers",
    "checkpoint_every", "min_thinking", "drift", "go_no_go",
}  # fmt: skip
"""What a recipe says of how a run is looked after: it does not change what is computed."""

REMEMBERED = 256  # steps whose losses a new group is told, to judge spikes by


@dataclass(frozen=True)
class Run:
    """A run to supervise. phase: its name in the journal; base: what every worker is given.

    folder: states; pools: in order of preference; progress: told of every step; learn_from: a run whose rollouts this
    one learns from, instead of drawing its own.
    """

    phase: str
    spec: Supervised
    pools: Sequence[Pool]
    base: Mapping[str, Any]
    folder: Path
    journal: Journal
    launcher: Launcher
    logs: Path
    progress: Callable[[int], None] = lambda step: None
    learn_from: Run | None = None

    @property
    def care(self) -> Supervised:
        """How its workers are looked after."""
        return self.spec

    @property
    def id(self) -> str:
        """What this run computes: states of another run are refused."""
        spec = self.spec.model_dump(mode="json", exclude=CARE)
        return digest_of([spec, self.base["seed"], self.base.get("content"), self.base.get("objective")])[:16]

    def pool(self, name: str) -> Pool:
        return next(pool for pool in self.pools if pool.name == name)

    def situation(self) -> Situation:
        """Where the run stands before anything happened."""
        return standing(self.pools, self.spec.restarts, self.spec.virtual_shards)

    def record(self) -> Record:
        """What happened so far."""
        return record.fold(journal.read(self.journal.path), self.phase, self.situation())


def supervise(run: Run, faults: Sequence[Fault] = ()) -> tuple[Snapshot, list[Segment]]:
    """Carry a run to its last step through whatever happens; its final state and the pools it went through.

    Raises TrainingFailed where no pool is left, a deterministic error came back or the run is beyond its baseline's
    margin, Busy where another supervisor holds the run.
    """
    with alone(run.folder), Hub(run.launcher.host) as hub:
        gate = Gate(run, run.spec, hub)
        while True:
            now = run.record()
            _known(run, now)
            found = _newest(run, now)
            step = 0 if found is None else found.step
            gate.settle(step)
            looks = gate.args(step)
            if found is not None and step >= run.spec.steps and not found.durable and not looks:
                return found.load(), _closed(now, step)
            situation = now.fresh if now.stopped else now.situation
            leaving = bool(now.segments) and now.segments[-1].pool != situation.pool.name
            if leaving and now.moved != (situation.pool.name, step):
                _move(run, now, found, situation.pool.name)
            pool = run.pool(situation.pool.name)
            chips = group(situation.pool.chips, run.spec.virtual_shards)
            keep = _keep(run, record.after(now.segments, pool.name, step, 0))
            left = {str(n): f.model_dump(mode="json") for n, f in enumerate(faults) if n not in now.injected}
            args = _begin(run, pool, chips, now, found) | {"until": run.spec.steps, "keep": keep, "faults": left}
            stretch = Stretch(pool, chips, WORKER, args | looks, situation, on={"look": gate.hear})
            failure = attempt(run, hub, stretch, now, now.epoch + 1)
            if failure is not None and not gate.refused:
                act(run, run.record().actions, failure)


def replay(run: Run, segments: Sequence[Segment]) -> Snapshot:
    """Run the same schedule of pools again with no fault in it; the final state, to be compared."""
    failures = 0
    with alone(run.folder), Hub(run.launcher.host) as hub:
        while True:
            now = run.record()
            found = _newest(run, now)
            done = 0 if found is None else found.step
            if found is not None and done >= run.spec.steps and not found.durable:
                return found.load()
            segment = next(s for s in segments if s.end is not None and (done < s.end or s is segments[-1]))
            pool = run.pool(segment.pool)
            assert segment.end is not None
            chips = group(range(pool.workers), run.spec.virtual_shards)
            args = _begin(run, pool, chips, now, found) | {"until": segment.end, "keep": {}, "faults": {}}
            failure = attempt(run, hub, Stretch(pool, chips, WORKER, args), now, now.epoch + 1)
            if failure is not None:
                failures += 1
                if failures > 2:
                    raise TrainingFailed(f"the replay failed: {failure.message}", where=f"pool {pool.name}")


def _known(run: Run, now: Record) -> None:
    """Refuse a run that went through a pool that is no longer among its pools: nobody could repeat it."""
    names = [pool.name for pool in run.pools]
    for segment in now.segments:
        if segment.pool not in names:
            what = f"the run was on the pool {segment.pool!r}, which is none of those that it may use now"
            fix = "put the pool back, or begin anew in another folder"
            raise RecipeError(what, where=", ".join(names), fix=fix)


def _begin(run: Run, pool: Pool, chips: Sequence[int], now: Record, found: Found | None) -> dict[str, Any]:
    """Journal a start of a pool's workers from the state that was found; what they are given."""
    epoch, step = now.epoch + 1, 0 if found is None else found.step
    store.tidy(run.folder, epoch, found)
    say(
        run, "train.start", epoch=epoch, pool=pool.name, chips=list(chips), step=step,
        digest=None if found is None else found.digest, path=None if found is None else str(found.path),
    )  # fmt: skip
    return {
        **run.base, "pool": pool.name, "platform": pool.platform, "chips": chips,
        "start": None if found is None else found.plain(),
        "rollouts": str(rollouts(run)), "seals": (run if run.learn_from is None else run.learn_from).record().seals,
        "replay": run.learn_from is not None,
        "memory": str(store.memory(run.folder, epoch)), "durable": str(store.durable(run.folder)),
        "run": run.id, "vouched": min(now.situation.audited, step), "recent": now.losses(step, REMEMBERED),
    }  # fmt: skip


def rollouts(run: Run) -> Path:
    """Where the rollouts lie that a run learns from, if it learns from rollouts."""
    return (run.learn_from or run).folder / "rollouts"


def _move(run: Run, now: Record, found: Found | None, target: str) -> None:
    """Tell of a move to another pool, and keep the newest state as the hand-off.

    What it cost: steps to be done again, and the seconds since the state that is kept, at the price of the pool
    that stood still; the clock of the journal is the wall's.
    """
    source, step = now.segments[-1].pool, 0 if found is None else found.step
    if found is not None and not found.durable:  # else the new pool's first worker makes it
        store.handoff_file(run.folder, step).parent.mkdir(parents=True, exist_ok=True)
        snapshot.save(store.handoff_file(run.folder, step), found.load())
    seconds = None if step not in now.times else max(0.0, time.time() - now.times[step])
    price = run.pool(source).usd_per_worker_hour
    lost = None if seconds is None or price is None else price.value * run.pool(source).workers * seconds / 3600
    say(
        run, "train.fallback", source=source, target=target, at_step=step, lost_steps=max(0, now.reported - step),
        digest=None if found is None else found.digest,
        lost_s=None if seconds is None else round(seconds, 2), lost_usd=None if lost is None else round(lost, 4),
    )  # fmt: skip


def _keep(run: Run, segments: Sequence[Segment]) -> dict[str, str]:
    """The states that the drift measurement needs, and where they are kept: the hand-off, and one some steps later."""
    if len(segments) < 2:
        return {}
    at = segments[-1].start + window(run.spec, segments[-1].start)
    handoff = store.handoff_file(run.folder, segments[-1].start)
    missing = {} if handoff.exists() else {str(segments[-1].start): str(handoff)}
    return {**missing, str(at): str(store.kept_file(run.folder, at))}


def _newest(run: Run, now: Record) -> Found | None:
    """The state to go on from; those that are passed over are journaled."""
    found, rejected = store.newest(run.folder, run.id, now.usable)
    for path, reason in rejected:
        say(run, "train.rejected", path=str(path), message=reason)
    return found


def window(spec: Supervised, start: int) -> int:
    """Over how many steps after a move the drift is measured: fewer where the run ends before."""
    return min(spec.drift.window, spec.steps - start)


def _closed(now: Record, step: int) -> list[Segment]:
    return [*now.segments[:-1], replace(now.segments[-1], end=step)] if now.segments else []
