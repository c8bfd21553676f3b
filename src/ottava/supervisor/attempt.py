"""One start of a pool's workers, whatever they compute: begun, watched to its end or to a failure, none left alive."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from signal import Signals
from typing import Any, Protocol

from ottava import link
from ottava.artifact import held
from ottava.context import Launcher, Process
from ottava.errors import (
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
from ottava.supervisor.causes import Facts, RankFacts
from ottava.supervisor.decide import Action, Exclude, Failure, FallBack, RollBack, Situation, Stop, decide
from ottava.supervisor.detect import Care, Watch, first_cause
from ottava.supervisor.diagnose import diagnose
from ottava.supervisor.hub import Hub
from ottava.supervisor.observe import headroom, oom_kills
from ottava.supervisor.record import Record

NOT_THE_POOLS = (ResourceError, DataError, CheckpointError)
UNSAVED = 3  # durable states in a row that may fail before the run stops
SILENCE = 8.0  # seconds to wait for a cause where only a lost peer is known: a node's death takes longest to be known
LOOK_S = 2.0  # between looks at memory and disk
FROM_OUTSIDE = ("SIGKILL", "SIGTERM", "SIGHUP", "SIGINT", "SIGQUIT")
"""Signals that somebody sends; the others come from what the process itself did."""

SETTLE = 0.2  # seconds for the deaths and last words of one failure to become known


class Watched(Protocol):
    """What must be known of a run to look after its workers. phase: its name in the journal."""

    @property
    def phase(self) -> str: ...
    @property
    def care(self) -> Care: ...
    @property
    def folder(self) -> Path: ...
    @property
    def journal(self) -> Journal: ...
    @property
    def launcher(self) -> Launcher: ...
    @property
    def logs(self) -> Path: ...
    @property
    def progress(self) -> Callable[[int], None]: ...


@dataclass(frozen=True)
class Stretch:
    """One start of a pool's workers: on which chips, what they run with which arguments.

    situation: where the run stands, if what follows a failure depends on it; env: for the workers; speaks: whether
    they are known to speak, so that silence from the start is a hang; on: what is done about words of the first worker
    that only this run knows.
    """

    pool: Pool
    chips: tuple[int, ...]
    target: str
    args: Mapping[str, Any]
    situation: Situation | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    speaks: bool = True
    on: Mapping[str, Callable[[Mapping[str, Any]], None]] = field(default_factory=dict)


def attempt(run: Watched, hub: Hub, stretch: Stretch, now: Record, epoch: int) -> Failure | None:
    """Start workers and watch them to the end of the stretch or to a failure; none is left alive."""
    tokens = hub.admit(epoch, len(stretch.chips))
    processes: list[Process] = []
    try:
        places = run.launcher.rendezvous(stretch.pool, len(stretch.chips), stretch.chips)
        for rank, place in enumerate(places):
            env = _node(stretch, rank) | place | tokens | dict(stretch.env)
            processes.append(
                run.launcher.spawn(stretch.target, stretch.args, pool=stretch.pool, logs=run.logs, env=env)
            )
        return Attempt(run, hub, stretch, processes, epoch, now).watch()
    except PoolMissing as error:  # its machines are gone, or others hold them: the run may go on elsewhere
        failure = Failure(stretch.pool.name, "pool", now.reported, error.what, tuple(range(stretch.pool.workers)))
        _tell_failure(run, epoch, failure)
        return failure
    finally:
        hub.admit(epoch + 1)
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def say(run: Watched, event: str, **fields: Any) -> None:
    """Journal an event of this run's phase, on disk before this returns."""
    run.journal.append(event, phase=run.phase, **fields)
    run.journal.sync()


def act(run: Watched, actions: Sequence[Action], failure: Failure) -> None:
    """Journal what was decided; a stop is raised. What else is to be done follows from the journal."""
    for action in actions:
        if isinstance(action, Exclude):
            say(run, "train.exclude", pool=action.pool, chips=list(action.chips), kind=failure.kind)
        elif isinstance(action, RollBack):
            say(run, "train.rollback", pool=failure.pool, to_step=action.step, kind=failure.kind)
        elif isinstance(action, Stop):
            say(run, "train.stop", pool=failure.pool, kind=failure.kind, reason=action.reason)
            fix = f"see {run.folder / 'diagnosis'} and the workers' logs"
            raise TrainingFailed(action.reason, where=f"pool {failure.pool}", fix=fix)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a run's folder against a second supervisor on this machine; epochs fence one elsewhere."""
    with held(folder, "another supervisor is carrying this run", "wait until it ends, or stop it"):
        yield


class Attempt:
    """One group of workers, watched."""

    def __init__(self, run: Watched, hub: Hub, stretch: Stretch, processes: list[Process], epoch: int, now: Record):
        self.run, self.hub, self.stretch = run, hub, stretch
        self.processes, self.epoch, self.now = processes, epoch, now
        self.watcher = Watch(len(processes), run.care, time.monotonic(), stretch.speaks)
        self.joins: dict[int, dict[str, Any]] = {}
        self.alarms: list[dict[str, Any]] = []
        self.step = now.reported
        self.unsaved, self.slow_told = 0, False
        self.oom_kills = oom_kills()
        self.looked, self.low = 0.0, frozenset[str]()

    def watch(self) -> Failure | None:
        """To the end, or to a failure."""
        while True:
            self._hear(0.01)
            statuses = [process.wait(0.0) for process in self.processes]
            if all(status == 0 for status in statuses):
                self._hear(0.0)
                return None
            self._look_at_machine()
            failure = self._trouble(statuses)
            if failure is not None:
                _tell_failure(self.run, self.epoch, failure)
                self._diagnose(failure)
                return failure

    def _look_at_machine(self) -> None:
        """Say it once when memory or disk are about to run out: nobody is to blame yet, and somebody may mend it."""
        now = time.monotonic()
        if now - self.looked < LOOK_S:
            return
        self.looked, left = now, headroom(self.run.folder)
        for what in left.keys() - self.low:
            say(self.run, "train.low", epoch=self.epoch, pool=self.stretch.pool.name, what=what, left=left[what])
        self.low = frozenset(left)

    def _diagnose(self, failure: Failure) -> None:
        """Before a stop or a move, while the workers are still there: one folder with what may have been the cause."""
        last = None if self.stretch.situation is None else decide(self.stretch.situation, failure)[1][-1]
        if not isinstance(last, Stop | FallBack):
            return
        words = f"stop: {last.reason}" if isinstance(last, Stop) else f"fall back to the pool {last.target}"
        self._ask_for_stacks()
        ranks = tuple(self._rank(rank, fact) for rank, fact in enumerate(self.watcher.facts(time.monotonic())))
        blamed = tuple(rank for rank, chip in enumerate(self.stretch.chips) if chip in failure.chips)
        facts = Facts(
            self.stretch.pool.name, self.epoch, failure.kind, ranks, self.run.journal.path, failure.step,
            failure.message, blamed, self.stretch.pool.platform, self.oom_kills,
        )  # fmt: skip
        found = diagnose(self.run.folder, facts, words)
        say(self.run, 
            "train.diagnosis", epoch=self.epoch, pool=failure.pool, causes=[cause.cause for cause in found.causes],
            folder=None if found.folder is None else str(found.folder),
        )  # fmt: skip

    def _ask_for_stacks(self) -> None:
        """Have the workers' listening threads write where they stand; those that are stopped cannot."""
        for rank, process in enumerate(self.processes):
            if process.alive():
                self.hub.tell("stacks", rank, path=str(self._stacks(rank).resolve()))
        self._hear(SETTLE)

    def _stacks(self, rank: int) -> Path:
        return self.run.logs / f"stacks-epoch{self.epoch}-rank{rank}.txt"

    def _rank(self, rank: int, fact: Mapping[str, Any]) -> RankFacts:
        process = self.processes[rank]
        words = next((str(a["message"]) for a in self.alarms if a["rank"] == rank), "")
        return RankFacts(
            rank, str(self.stretch.chips[rank]), process.pid, process.wait(0.0), fact["phase"], fact["step"],
            fact["silent_s"], words, process.log, stacks=self._stacks(rank),
        )  # fmt: skip

    def _hear(self, timeout: float) -> None:
        for message in self.hub.hear(timeout):
            self.watcher.hear(message)
            kind = message["say"]
            if kind == "join":
                self._join(message)
            elif kind == "step" and message["rank"] == 0:
                self._step(message)
            elif kind in self.stretch.on and message["rank"] == 0:
                self.stretch.on[kind](message)
            elif kind == "alarm":
                self.alarms.append(message)
            elif kind in ("injected", "unsaved", "saved", "rejected", "gate", "precision"):
                if kind.endswith("saved"):
                    self.unsaved = self.unsaved + 1 if kind == "unsaved" else 0
                fields = {k: v for k, v in message.items() if k not in ("say", "t", "epoch")}
                say(self.run, f"train.{kind}", epoch=self.epoch, pool=self.stretch.pool.name, **fields)

    def _join(self, message: Mapping[str, Any]) -> None:
        self.joins[message["rank"]] = dict(message)
        names = ("rank", "world", "pid", "numerics_class", "step", "digest")
        self.run.journal.append(
            "train.join", phase=self.run.phase, pool=self.stretch.pool.name, attempt=self.epoch,
            node=self._machine(message["rank"]), **{name: message.get(name) for name in names},
        )  # fmt: skip
        if len(self.joins) == len(self.processes) and self._stranger() is None:
            self.hub.tell("go")

    def _stranger(self) -> Failure | None:
        """The failure of a group whose class is not the one that this pool had before."""
        before = self.now.classes.get(self.stretch.pool.name)
        classes = {str(join.get("numerics_class")) for join in self.joins.values()}
        if before is None or classes <= {before}:
            return None
        what = f"the pool's class was {before[:12]} before and is {min(classes - {before})[:12]} now"
        return self._failure("class", what, [r for r, j in self.joins.items() if j.get("numerics_class") != before])

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
        if slow and self.run.care.leave_stragglers:
            return self._failure("straggler", "far slower than the other workers", slow)
        if slow and not self.slow_told:
            self.slow_told = True
            chips = [self.stretch.chips[rank] for rank in slow]
            say(self.run, "train.straggler", epoch=self.epoch, pool=self.stretch.pool.name, chips=chips, step=self.step)
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
        alarm = first_cause(self.alarms)
        killed = [rank for rank, status in bad.items() if status < 0]
        if alarm is not None:
            found = self._failure(alarm["kind"], alarm["message"], alarm.get("ranks", ()))
            return replace(found, step=alarm["step"]) if alarm["kind"] == "rollout" else found
        for error in errors.values():
            if isinstance(error, NOT_THE_POOLS):
                raise error
        if killed:  # what the others say then is that they lost their peer
            name, kills = Signals(-bad[killed[0]]).name, oom_kills()
            if name == "SIGKILL" and kills is not None and self.oom_kills is not None and kills > self.oom_kills:
                return self._failure("memory", "the system had no memory left and killed a worker", killed)
            if self._nodes(killed):
                return self._failure("node", f"the machine {', '.join(self._nodes(killed))} is gone", killed)
            kind = "killed" if name in FROM_OUTSIDE else "crash"
            return self._failure(kind, f"a worker was killed by {name}", killed)
        bereft = {alarm["rank"]: alarm["message"] for alarm in self.alarms if alarm["kind"] == "peer"}
        own = [error for rank, error in errors.items() if rank not in bereft]
        words = sorted(own, key=lambda error: isinstance(error, PlatformError))  # own words before an epitaph
        if words:
            return self._failure("error", words[0].what, ())
        said = "".join(f": {message}" for message in list(bereft.values())[:1])
        return self._failure("collective", f"the exchange between the workers broke, and none of them died{said}", ())

    def _has_cause(self) -> bool:
        """Whether anything is known but that some have lost a peer."""
        bereft = {alarm["rank"] for alarm in self.alarms if alarm["kind"] == "peer"}
        ends = ((rank, process.wait(0.0)) for rank, process in enumerate(self.processes))
        return first_cause(self.alarms) is not None or any(
            status and (status < 0 or rank not in bereft) for rank, status in ends
        )

    def _nodes(self, ranks: Sequence[int]) -> list[str]:
        """The machines all of whose workers are dead, where there are others."""
        places = [self._machine(rank) for rank in range(len(self.processes))]
        if len(set(places)) < 2:
            return []
        dead = [places[rank] for rank in ranks]
        return [name for name in dict.fromkeys(dead) if dead.count(name) == places.count(name) > 1]

    def _machine(self, rank: int) -> str:
        """The machine of a rank: the launcher's word where it knows several, else the rehearsal's."""
        return self.processes[rank].node or _node(self.stretch, rank)[link.NODE]

    def _failure(self, kind: str, message: str, ranks: Sequence[int]) -> Failure:
        chips = tuple(self.stretch.chips[rank] for rank in ranks)
        return Failure(self.stretch.pool.name, kind, self.step, message, chips)


def _tell_failure(run: Watched, epoch: int, failure: Failure) -> None:
    say(run, "train.fault", epoch=epoch, **vars(failure) | {"chips": list(failure.chips)})


def _error(process: Process) -> OttavaError:
    try:
        process.result()
    except OttavaError as error:
        return error
    return OttavaError("no message")


def _node(stretch: Stretch, rank: int) -> dict[str, str]:
    """The rehearsal's machine of a rank: a pool's chips lie on `nodes` machines, in order."""
    per_node = max(1, stretch.pool.workers // stretch.pool.nodes)
    return {link.NODE: f"{stretch.pool.name}-{stretch.chips[rank] // per_node}"}
