"""What a supervisor knows: a fold of the journal, so that it may be killed at any moment and goes on.

A run is a row of starts, each with an epoch, a pool, chips and the state it began from. What came to be in an earlier
epoch after that state counts no longer: its files are passed over, whoever wrote them and when. That is the fence
against a worker that was thought dead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ottava import journal
from ottava.supervisor.decide import Action, Failure, RollBack, Situation, Stop, decide


@dataclass(frozen=True)
class Segment:
    """A stretch of a run on one pool: from the state after `start` steps to `end` steps (None: not yet).

    failures: those after which the run started again on this pool; lost: steps that were reported on it
    and not found again when the run left it.
    """

    pool: str
    start: int
    end: int | None = None
    failures: int = 0
    lost: int = 0


@dataclass
class Record:
    """A run's supervision as its journal tells it.

    epoch: the last one; seals: (epoch, step): of that epoch and earlier ones only states up to that step count;
    reported: the last step that was reported; injected: numbers of the faults that struck; recent: losses by step;
    times: when a step was reported, by the wall clock; classes: the numerics class of each pool; actions: what was
    decided on the last failure; moved: the pool and step of a move that was told and has not begun; stopped: the last
    decision was to stop.
    """

    situation: Situation
    fresh: Situation
    epoch: int = 0
    segments: list[Segment] = field(default_factory=list)
    seals: list[tuple[int, int]] = field(default_factory=list)
    reported: int = 0
    injected: set[int] = field(default_factory=set)
    recent: dict[int, float] = field(default_factory=dict)
    times: dict[int, float] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)
    actions: tuple[Action, ...] = ()
    moved: tuple[str, int] | None = None
    stopped: bool = False

    def take(self, event: Mapping[str, Any]) -> None:
        """Fold one event of this run's phase; others change nothing."""
        method = getattr(self, "_" + str(event["event"]).removeprefix("train."), None)
        if method is not None:
            method(event)

    def usable(self, epoch: int, step: int) -> bool:
        """Whether a state of that epoch and step counts."""
        return all(epoch > sealed or step <= limit for sealed, limit in self.seals)

    def losses(self, step: int, window: int) -> list[tuple[int, float]]:
        """(step, loss) of the last `window` steps up to `step`, as far as they are known."""
        return [(n, self.recent[n]) for n in range(max(step - window, 0) + 1, step + 1) if n in self.recent]

    def _start(self, event: Mapping[str, Any]) -> None:
        self.epoch, step = int(event["epoch"]), int(event["step"])
        self.seals.append((self.epoch - 1, step))
        self.segments = after(self.segments, str(event["pool"]), step, self.reported)
        self.reported, self.moved = step, None
        if self.stopped:
            self.situation, self.stopped = replace(self.fresh, audited=self.situation.audited), False
        # what an audit vouched for beyond this state is gone: states of those steps are made anew
        self.situation = replace(self.situation, audited=min(self.situation.audited, step))

    def _join(self, event: Mapping[str, Any]) -> None:
        if event.get("numerics_class") is not None:
            self.classes[event["pool"]] = event["numerics_class"]

    def _step(self, event: Mapping[str, Any]) -> None:
        self.reported = max(self.reported, int(event["step"]))
        self.times[int(event["step"])] = float(event.get("t", 0.0))
        if event.get("loss") is not None:
            self.recent[int(event["step"])] = float(event["loss"])
        if event.get("audited"):
            self.situation = replace(self.situation, audited=int(event["step"]))

    def _fallback(self, event: Mapping[str, Any]) -> None:
        self.moved = event["target"], int(event["at_step"])

    def _injected(self, event: Mapping[str, Any]) -> None:
        self.injected.add(int(event["number"]))

    def _fault(self, event: Mapping[str, Any]) -> None:
        failure = Failure(event["pool"], event["kind"], event["step"], event["message"], tuple(event["chips"]))
        self.situation, self.actions = decide(self.situation, failure)
        for action in self.actions:
            if isinstance(action, RollBack):
                self.seals.append((self.epoch, action.step))
        if isinstance(self.actions[-1], Stop):
            self.stopped = True
        if self.segments and self.situation.pool.name == self.segments[-1].pool:
            self.segments[-1] = replace(self.segments[-1], failures=self.segments[-1].failures + 1)


def after(segments: Sequence[Segment], pool: str, step: int, reported: int) -> list[Segment]:
    """The segments when a group starts on `pool` from the state after `step` steps. Later ones never were."""
    kept = [replace(s, end=None) if s.end is not None and s.end > step else s for s in segments if s.start <= step]
    if kept and kept[-1].pool == pool:
        return kept
    if kept:
        kept[-1] = replace(kept[-1], end=step, lost=max(0, reported - step))
    return [*kept, Segment(pool, step)]


def fold(events: Iterable[Mapping[str, Any]], phase: str, situation: Situation) -> Record:
    """The record of one phase of a run, from the journal's events. Pure."""
    record = Record(situation, situation)
    for event in events:
        if journal.begins_anew(event, phase):
            record = Record(situation, situation)
        elif event["event"].startswith("train.") and event.get("phase") == phase:
            record.take(event)
    return record
