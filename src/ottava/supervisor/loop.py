"""The supervisor's loop: start a pool's workers, watch them, decide on a failure, move the run.

What must not be lost is in files: states in `store`, decisions in the journal, of which `record` is a fold. Killed at
any moment and started again, the supervisor goes on; its old workers end by themselves when their line is cut.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from signal import Signals
from typing import Any

from ottava import journal, link
from ottava.artifact import digest_of
from ottava.context import Launcher, Process
from ottava.errors import (
    Busy,
    CheckpointError,
    DataError,
    OttavaError,
    PlatformError,
    PoolMissing,
    ResourceError,
    TrainingFailed,
)
from ottava.journal import Journal
from ottava.recipe import Pool
from ottava.supervisor import record, store
from ottava.supervisor.causes import Facts, RankFacts
from ottava.supervisor.decide import (
    Action,
    Exclude,
    Failure,
    FallBack,
    RollBack,
    Situation,
    Standing,
    Stop,
    decide,
    group,
)
from ottava.supervisor.detect import Watch, first_cause
from ottava.supervisor.diagnose import diagnose
from ottava.supervisor.hub import Hub
from ottava.supervisor.observe import oom_kills
from ottava.supervisor.record import Record, Segment
from ottava.supervisor.store import Found
from ottava.trainer import snapshot
from ottava.trainer.snapshot import Snapshot
from ottava.trainer.spec import Fault, TrainSpec

WORKER = "ottava.trainer.worker:run"
NOT_THE_POOLS = (ResourceError, DataError, CheckpointError)
CARE = {
    "budget_s", "pool", "fault", "audit", "spike", "restarts", "hang_s", "hang_least_s", "leave_stragglers",
    "checkpoint_every", "min_thinking", "drift",
}  # fmt: skip
"""What a recipe says of how a run is looked after: it does not change what is computed."""

REMEMBERED = 256  # steps whose losses a new group is told, to judge spikes by
UNSAVED = 3  # durable states in a row that may fail before the run stops
SILENCE = (
    8.0  # seconds to wait for a cause where all that is known is that a peer was lost: a node's death takes longest
)
SETTLE = 0.3  # seconds for the deaths and last words of one failure to become known


@dataclass(frozen=True)
class Run:
    """A run to supervise. phase: its name in the journal; base: what every worker is given.

    folder: states; pools: in order of preference; progress: told of every step.
    """

    phase: str
    spec: TrainSpec
    pools: Sequence[Pool]
    base: Mapping[str, Any]
    folder: Path
    journal: Journal
    launcher: Launcher
    logs: Path
    progress: Callable[[int], None] = lambda step: None

    @property
    def id(self) -> str:
        """What this run computes: states of another run are refused."""
        spec = self.spec.model_dump(mode="json", exclude=CARE)
        return digest_of([spec, self.base["seed"], self.base.get("content")])[:16]

    def pool(self, name: str) -> Pool:
        return next(pool for pool in self.pools if pool.name == name)

    def situation(self) -> Situation:
        """Where the run stands before anything happened."""
        standings = tuple(Standing(pool.name, tuple(range(pool.workers))) for pool in self.pools)
        return Situation(standings, self.spec.restarts, self.spec.virtual_shards)

    def record(self) -> Record:
        """What happened so far."""
        return record.fold(journal.read(self.journal.path), self.phase, self.situation())

    def say(self, event: str, **fields: Any) -> None:
        """Journal an event of this phase, on disk before this returns."""
        self.journal.append(event, phase=self.phase, **fields)
        self.journal.sync()


@dataclass(frozen=True)
class Stretch:
    """One start of a pool's workers: on which chips, to which step, what to keep, which faults to commit.

    situation: where the run stands, if what follows a failure depends on it.
    """

    pool: Pool
    chips: tuple[int, ...]
    until: int
    keep: Mapping[str, str] = field(default_factory=dict)
    faults: Mapping[str, Any] = field(default_factory=dict)
    situation: Situation | None = None


def supervise(run: Run, faults: Sequence[Fault] = ()) -> tuple[Snapshot, list[Segment]]:
    """Carry a run to its last step through whatever happens; its final state and the pools it went through.

    Raises TrainingFailed where no pool is left or a deterministic error came back, Busy where another supervisor
    holds the run.
    """
    with _alone(run), Hub(run.launcher.host) as hub:
        while True:
            now = run.record()
            found = _newest(run, now)
            if found is not None and found.step >= run.spec.steps and not found.durable:
                return found.load(), _closed(now, found.step)
            situation = now.fresh if now.stopped else now.situation
            if now.segments and now.segments[-1].pool != situation.pool.name:
                _move(run, now, found, situation.pool.name)
            pool = run.pool(situation.pool.name)
            chips = group(situation.pool.chips, run.spec.virtual_shards)
            keep = _keep(run, record.after(now.segments, pool.name, 0 if found is None else found.step, 0))
            left = {str(n): f.model_dump(mode="json") for n, f in enumerate(faults) if n not in now.injected}
            stretch = Stretch(pool, chips, run.spec.steps, keep, left, situation)
            failure = attempt(run, hub, stretch, now, found)
            if failure is not None:
                _act(run, decide(situation, failure)[1], failure)


def replay(run: Run, segments: Sequence[Segment]) -> Snapshot:
    """Run the same schedule of pools again with no fault in it; the final state, to be compared."""
    failures = 0
    with _alone(run), Hub(run.launcher.host) as hub:
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
            failure = attempt(run, hub, Stretch(pool, chips, segment.end), now, found)
            if failure is not None:
                failures += 1
                if failures > 2:
                    raise TrainingFailed(f"the replay failed: {failure.message}", where=f"pool {pool.name}")


def attempt(run: Run, hub: Hub, stretch: Stretch, now: Record, found: Found | None) -> Failure | None:
    """Start workers and watch them to the end of the stretch or to a failure; none is left alive."""
    epoch, step = now.epoch + 1, 0 if found is None else found.step
    memory = store.memory(run.folder, epoch)
    store.tidy(run.folder, epoch, found)
    run.say(
        "train.start", epoch=epoch, pool=stretch.pool.name, chips=list(stretch.chips), step=step,
        digest=None if found is None else found.digest, path=None if found is None else str(found.path),
    )  # fmt: skip
    args = {
        **run.base, "pool": stretch.pool.name, "chips": stretch.chips,
        "start": None if found is None else found.plain(),
        "until": stretch.until, "keep": dict(stretch.keep), "memory": str(memory),
        "durable": str(store.durable(run.folder)), "faults": dict(stretch.faults),
        "run": run.id, "vouched": now.situation.audited,
        "recent": now.losses(step, REMEMBERED),
    }  # fmt: skip
    tokens = hub.admit(epoch)
    processes: list[Process] = []
    try:
        for rank, place in enumerate(run.launcher.rendezvous(stretch.pool, len(stretch.chips))):
            env = _node(stretch, rank) | place | tokens
            processes.append(run.launcher.spawn(WORKER, args, pool=stretch.pool, logs=run.logs, env=env))
        return Attempt(run, hub, stretch, processes, epoch, now).watch()
    except PoolMissing as error:  # its machines are gone, or others hold them: the run may go on elsewhere
        failure = Failure(stretch.pool.name, "pool", step, error.what, tuple(range(stretch.pool.workers)))
        _tell_failure(run, epoch, failure)
        return failure
    finally:
        hub.admit(epoch + 1)
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def _node(stretch: Stretch, rank: int) -> dict[str, str]:
    """The rehearsal's machine of a rank: a pool's chips lie on `nodes` machines, in order."""
    per_node = max(1, stretch.pool.workers // stretch.pool.nodes)
    return {link.NODE: f"{stretch.pool.name}-{stretch.chips[rank] // per_node}"}


class Attempt:
    """One group of workers, watched."""

    def __init__(self, run: Run, hub: Hub, stretch: Stretch, processes: list[Process], epoch: int, now: Record):
        self.run, self.hub, self.stretch, self.processes, self.epoch, self.now = (
            run,
            hub,
            stretch,
            processes,
            epoch,
            now,
        )
        self.watcher = Watch(len(processes), run.spec, time.monotonic())
        self.joins: dict[int, dict[str, Any]] = {}
        self.alarms: list[dict[str, Any]] = []
        self.step = now.reported
        self.unsaved, self.slow_told = 0, False
        self.oom_kills = oom_kills()

    def watch(self) -> Failure | None:
        """To the end, or to a failure."""
        while True:
            self._hear(0.01)
            statuses = [process.wait(0.0) for process in self.processes]
            if all(status == 0 for status in statuses):
                self._hear(0.0)
                return None
            failure = self._trouble(statuses)
            if failure is not None:
                _tell_failure(self.run, self.epoch, failure)
                self._diagnose(failure)
                return failure

    def _diagnose(self, failure: Failure) -> None:
        """Before a stop or a move, while the workers are still there: one folder with what may have been the cause."""
        last = None if self.stretch.situation is None else decide(self.stretch.situation, failure)[1][-1]
        if not isinstance(last, Stop | FallBack):
            return
        words = f"stop: {last.reason}" if isinstance(last, Stop) else f"fall back to the pool {last.target}"
        ranks = tuple(self._rank(rank, fact) for rank, fact in enumerate(self.watcher.facts(time.monotonic())))
        blamed = tuple(rank for rank, chip in enumerate(self.stretch.chips) if chip in failure.chips)
        facts = Facts(
            self.stretch.pool.name, self.epoch, failure.kind, ranks, self.run.journal.path, failure.step,
            failure.message, blamed, self.stretch.pool.platform, self.oom_kills,
        )  # fmt: skip
        found = diagnose(self.run.folder, facts, words)
        self.run.say(
            "train.diagnosis", epoch=self.epoch, pool=failure.pool, causes=[cause.cause for cause in found.causes],
            folder=None if found.folder is None else str(found.folder),
        )  # fmt: skip

    def _rank(self, rank: int, fact: Mapping[str, Any]) -> RankFacts:
        process = self.processes[rank]
        words = next((str(a["message"]) for a in self.alarms if a["rank"] == rank), "")
        return RankFacts(
            rank, str(self.stretch.chips[rank]), process.pid, process.wait(0.0), fact["phase"], fact["step"],
            fact["silent_s"], words, process.log,
        )  # fmt: skip

    def _hear(self, timeout: float) -> None:
        for message in self.hub.hear(timeout):
            self.watcher.hear(message)
            kind = message["say"]
            if kind == "join":
                self._join(message)
            elif kind == "step" and message["rank"] == 0:
                self._step(message)
            elif kind == "alarm":
                self.alarms.append(message)
            elif kind in ("injected", "unsaved", "saved", "rejected"):
                self.unsaved = (
                    (self.unsaved + 1 if kind == "unsaved" else 0) if kind.endswith("saved") else self.unsaved
                )
                fields = {k: v for k, v in message.items() if k not in ("say", "t", "epoch")}
                self.run.say(f"train.{kind}", epoch=self.epoch, pool=self.stretch.pool.name, **fields)

    def _join(self, message: Mapping[str, Any]) -> None:
        self.joins[message["rank"]] = dict(message)
        names = ("rank", "world", "pid", "numerics_class", "step", "digest")
        self.run.journal.append(
            "train.join", phase=self.run.phase, pool=self.stretch.pool.name, attempt=self.epoch,
            **{name: message[name] for name in names},
        )  # fmt: skip
        if len(self.joins) == len(self.processes) and self._stranger() is None:
            self.hub.tell("go")

    def _stranger(self) -> Failure | None:
        """The failure of a group whose class is not the one that this pool had before."""
        before = self.now.classes.get(self.stretch.pool.name)
        classes = {join["numerics_class"] for join in self.joins.values()}
        if before is None or classes <= {before}:
            return None
        what = f"the pool's class was {before[:12]} before and is {min(classes - {before})[:12]} now"
        return self._failure("class", what, [r for r, j in self.joins.items() if j["numerics_class"] != before])

    def _step(self, message: Mapping[str, Any]) -> None:
        self.step = message["step"]
        left_out = ("say", "t", "rank", "epoch", "compute_s")
        fields = {key: value for key, value in message.items() if key not in left_out}
        where = {"pool": self.stretch.pool.name, "attempt": self.epoch}
        self.run.journal.append("train.step", phase=self.run.phase, **where, **fields)
        self.run.progress(self.step)

    def _trouble(self, statuses: Sequence[int | None]) -> Failure | None:
        """The failure that is there to be seen, once its causes have had time to be told."""
        if any(statuses) or self.alarms:
            return self._dead()
        stranger = self._stranger()
        if stranger is not None:
            return stranger
        if self.unsaved >= UNSAVED:
            return self._failure("disk", f"{self.unsaved} states in a row could not be made durable", ())
        now = time.monotonic()
        hung = self.watcher.hung(now)
        if hung is not None and None in statuses:
            waited = f"no step for {self.watcher.deadline():.3g} s"
            return self._failure("hang", waited, hung)
        slow = self.watcher.stragglers()
        if slow and self.run.spec.leave_stragglers:
            return self._failure("straggler", "far slower than the other workers", slow)
        if slow and not self.slow_told:
            self.slow_told = True
            chips = [self.stretch.chips[rank] for rank in slow]
            self.run.say("train.straggler", epoch=self.epoch, pool=self.stretch.pool.name, chips=chips, step=self.step)
        return None

    def _dead(self) -> Failure:
        """Name the cause of deaths and alarms. A fault that is no pool's, such as a full disk, is raised."""
        begun = time.monotonic()
        while (waited := time.monotonic() - begun) < SILENCE and any(process.alive() for process in self.processes):
            if waited > SETTLE and self._has_cause():
                break
            self._hear(0.02)
        self._hear(0.02)
        bad = {rank: status for rank, p in enumerate(self.processes) if (status := p.wait(0.0))}
        errors = {rank: _error(self.processes[rank]) for rank, status in bad.items() if status > 0}
        for error in errors.values():
            if isinstance(error, NOT_THE_POOLS):
                raise error
        alarm = first_cause(self.alarms)
        killed = [rank for rank, status in bad.items() if status < 0]
        if alarm is not None:
            return self._failure(alarm["kind"], alarm["message"], alarm.get("ranks", ()))
        if killed:  # what the others say then is that they lost their peer
            name = Signals(-bad[killed[0]]).name
            if self._nodes(killed):
                return self._failure("node", f"the machine {', '.join(self._nodes(killed))} is gone", killed)
            return self._failure("killed", f"a worker was killed by {name}", killed)
        words = sorted(
            errors.values(), key=lambda error: isinstance(error, PlatformError)
        )  # own words before an epitaph
        if words:
            return self._failure("error", words[0].what, ())
        return self._failure("collective", "the exchange between the workers broke, and none of them died", ())

    def _has_cause(self) -> bool:
        """Whether anything is known but that some have lost a peer."""
        bereft = {alarm["rank"] for alarm in self.alarms if alarm["kind"] == "peer"}
        ends = ((rank, process.wait(0.0)) for rank, process in enumerate(self.processes))
        return first_cause(self.alarms) is not None or any(
            status and (status < 0 or rank not in bereft) for rank, status in ends
        )

    def _nodes(self, ranks: Sequence[int]) -> list[str]:
        """The machines all of whose workers are dead, where there are others."""
        places = [process.node or _node(self.stretch, rank)[link.NODE] for rank, process in enumerate(self.processes)]
        if len(set(places)) < 2:
            return []
        dead = [places[rank] for rank in ranks]
        return [name for name in dict.fromkeys(dead) if dead.count(name) == places.count(name) > 1]

    def _failure(self, kind: str, message: str, ranks: Sequence[int]) -> Failure:
        chips = tuple(self.stretch.chips[rank] for rank in ranks)
        return Failure(self.stretch.pool.name, kind, self.step, message, chips)


def _tell_failure(run: Run, epoch: int, failure: Failure) -> None:
    run.say("train.fault", epoch=epoch, **vars(failure) | {"chips": list(failure.chips)})


def _error(process: Process) -> OttavaError:
    try:
        process.result()
    except OttavaError as error:
        return error
    return OttavaError("no message")


def _act(run: Run, actions: Sequence[Action], failure: Failure) -> None:
    """Journal what was decided; a stop is raised. What else is to be done follows from the journal."""
    for action in actions:
        if isinstance(action, Exclude):
            run.say("train.exclude", pool=action.pool, chips=list(action.chips), kind=failure.kind)
        elif isinstance(action, RollBack):
            run.say("train.rollback", pool=failure.pool, to_step=action.step, kind=failure.kind)
        elif isinstance(action, Stop):
            run.say("train.stop", pool=failure.pool, kind=failure.kind, reason=action.reason)
            fix = f"see {run.folder / 'diagnosis'} and the workers' logs"
            raise TrainingFailed(action.reason, where=f"pool {failure.pool}", fix=fix)


def _move(run: Run, now: Record, found: Found | None, target: str) -> None:
    """Tell of a move to another pool, with what it cost, and keep the newest state as the hand-off."""
    source, step = now.segments[-1].pool, 0 if found is None else found.step
    if found is not None and not found.durable:  # else the new pool's first worker makes it
        store.handoff_file(run.folder, step).parent.mkdir(parents=True, exist_ok=True)
        snapshot.save(store.handoff_file(run.folder, step), found.load())
    run.say(
        "train.fallback", source=source, target=target, at_step=step, lost_steps=max(0, now.reported - step),
        digest=None if found is None else found.digest, usd_per_hour=_price(run.pool(target)),
    )  # fmt: skip


def _price(pool: Pool) -> float | None:
    """What a pool costs an hour, where the fleet says so."""
    rent = pool.usd_per_worker_hour
    return None if rent is None else round(rent.value * pool.workers, 4)


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
        run.say("train.rejected", path=str(path), message=reason)
    return found


def window(spec: TrainSpec, start: int) -> int:
    """Over how many steps after a move the drift is measured: fewer where the run ends before."""
    return min(spec.drift.window, spec.steps - start)


def _closed(now: Record, step: int) -> list[Segment]:
    return [*now.segments[:-1], replace(now.segments[-1], end=step)] if now.segments else []


@contextmanager
def _alone(run: Run) -> Iterator[None]:
    """Hold the run's folder against a second supervisor on this machine; epochs fence one elsewhere."""
    run.folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run.folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        fix = "wait until it ends, or stop it"
        raise Busy("another supervisor is carrying this run", where=run.folder, fix=fix) from None
    try:
        yield
    finally:
        os.close(descriptor)
