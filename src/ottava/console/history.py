"""What the journal tells of the artifacts that a report speaks of, and of nothing else.

A run's folder may hold several attempts at a stage, killed ones among them, and events of recipes
that were tried in it before. A report must not mix them: events count only where they belong to the
key of the stage as the present recipe has it, or to work that this key went on with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ottava import journal
from ottava.journal import Event, RunState

KEY = 12  # hex digits of a stage's key in its artifact's name
KILLED = "the process was killed; the same command goes on where it was"
NUMBER = (int, float)
REINFORCED = ("reinforce", "reinforce-2")  # stages, and what their runs are called
OWN_REPLIES = "on-policy:"  # and before a student's name, what its run on its own replies is called
PARTS: Mapping[str, Mapping[str, type | tuple[type, ...]]] = {  # what an event must have to be told
    "run.start": {"recipe": str, "stages": list},
    "stage.start": {"stage": str, "key": str},
    "stage.progress": {"stage": str, "fraction": NUMBER},
    "train.join": {"pool": str},
    "train.start": {"step": int},
    "train.step": {"pool": str, "step": int},
    "train.verdict": {"step": int, "action": str, "reason": str},
    "train.fallback": {"source": str, "target": str},
}


@dataclass(frozen=True)
class Point:
    """One training step. Losses in nats per target token; direct None: no direct problems in the batch."""

    step: int
    loss: float
    direct: float | None
    pool: str
    on_grid: bool


@dataclass(frozen=True)
class Generation:
    """One generation of rollouts, numbered as in the journal, and the updates that learned from it.

    reward: the mean of its replies; mixed: the share of its groups with unequal rewards, the ones that teach; gap_max:
    the largest difference of a token's log-probability by sampler and learner, in nats, as `gap` is their mean; bound:
    what gap_max was held against, or None. drawn, unscorable: so many replies, and how many of them had no verdict;
    round: the stage that drew them.
    """

    number: int
    reward: float
    mixed: float
    gap: float
    gap_max: float
    pool: str
    last_step: int
    bound: float | None = None
    drawn: int = 0
    unscorable: int = 0
    round: str = ""


@dataclass(frozen=True)
class Bar:
    """A stretch of work. Seconds from the run's start, with the time left out in which nothing ran."""

    stage: str
    pool: str | None
    start: float
    end: float
    what: str = ""

    @property
    def again(self) -> bool:
        """Whether it is a replay of a run, or a student's control."""
        return self.what.endswith("replay") or self.what.startswith("control:")


@dataclass(frozen=True)
class History:
    """A run as far as it is of the present recipe. curve: of training; generations: of reinforcement; own_replies: the
    curve of each student that learnt from its own, by name; injected: the faults that were planned; verdicts: of go or
    no-go, as far as they still count."""

    state: RunState
    curve: Sequence[Point] = ()
    generations: Sequence[Generation] = ()
    bars: Sequence[Bar] = ()
    injected: Sequence[Event] = ()
    verdicts: Sequence[Event] = ()
    own_replies: Mapping[str, Sequence[Point]] = field(default_factory=dict)
    peak_memory_mb: float | None = None


@dataclass
class _Attempt:
    stage: str
    key: str
    work: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def closed(self) -> bool:
        return self.events[-1]["event"] in ("stage.done", "stage.failed", "stage.interrupted")

    @property
    def done(self) -> bool:
        return bool(self.events[-1]["event"] == "stage.done")

    @property
    def seconds(self) -> float:
        """From the first event to the last: what is known of an attempt that said no end."""
        return round(float(self.events[-1]["t"]) - float(self.events[0]["t"]), 3)


def history(events: Iterable[Event], digest: str, alive: bool) -> History:
    """The story of the recipe `digest`. alive: a process holds the run, so that its open stage is still running."""
    everything = [dict(event) for event in events if _whole(event)]
    keys = _present_keys(everything, digest)
    items = _grouped(everything)
    newest = next((item for item in reversed(items) if isinstance(item, _Attempt)), None)
    running = newest if alive and newest is not None and not newest.closed else None
    kept: list[dict[str, Any]] = []
    attempts: list[_Attempt] = []
    carried = _carried(items, keys)
    for item in items:
        if not isinstance(item, _Attempt):
            kept += [item] if _belongs(item, digest, keys) else []
        elif id(item) in carried:
            attempts.append(item)
            kept += item.events if item.closed or item is running else [*item.events, _interrupted(item)]
    state = journal.fold(kept)
    if running is not None and running in attempts:
        stage = state.stages[running.stage]
        stage.seconds = round(stage.seconds + running.seconds, 3)
    memory = [float(e["peak_memory_mb"]) for e in kept if e.get("peak_memory_mb") is not None]
    injected = [e for e in kept if e["event"] == "train.injected"]
    verdicts = journal.standing(kept, "train.verdict", "main")
    return History(
        state, curve(state.steps), generations(state.steps), bars(attempts), injected, verdicts,
        _own_replies(state.steps), max(memory, default=None),
    )  # fmt: skip


def _whole(event: Event) -> bool:
    """False where an event lacks a part; one bad line must not spoil the rest."""
    kind = event["event"]
    if not isinstance(kind, str):
        return False
    parts = PARTS.get(kind, {"stage": str} if kind.startswith("stage.") else {})
    return all(isinstance(event.get(name), wanted) for name, wanted in {"t": NUMBER, **parts}.items())


def _present_keys(events: Sequence[Event], digest: str) -> dict[str, str]:
    """By stage: the key under which the present recipe last met it; stages that it has not met are left out."""
    keys: dict[str, str] = {}
    ours = False
    for event in events:
        if event["event"] == "run.start":
            ours = event.get("digest") == digest
        elif event["event"] == "stage.start" and ours:
            keys[event["stage"]] = str(event["key"])[:KEY]
        elif event["event"] == "stage.cached" and ours:
            keys[event["stage"]] = _key_of(event)
    return keys


def _carried(items: Sequence[_Attempt | dict[str, Any]], keys: Mapping[str, str]) -> set[int]:
    """The attempts (by `id`) that led to the present keys: their own, and those whose work they went on with."""
    works = {item.work for item in items if isinstance(item, _Attempt) and keys.get(item.stage) == item.key}
    found: dict[str, list[_Attempt]] = {}
    for item in items:
        if isinstance(item, _Attempt):
            its = found.setdefault(item.stage, [])
            if keys.get(item.stage) == item.key:
                its.append(item)
            elif item.work in works - {""} and not (its and its[-1].done):
                found[item.stage] = [a for a in its if a.key == keys[item.stage]] if item.done else [*its, item]
    return {id(item) for its in found.values() for item in its}


def _key_of(event: Event) -> str:
    return str(event.get("artifact", "")).rpartition("-")[2]


def _belongs(event: Event, digest: str, keys: Mapping[str, str]) -> bool:
    if event["event"] == "run.start":
        return bool(event.get("digest") == digest)
    return event["event"] != "stage.cached" or keys.get(event["stage"]) == _key_of(event)


def _grouped(events: Sequence[dict[str, Any]]) -> list[_Attempt | dict[str, Any]]:
    """Events in order, those of each attempt at a stage gathered; stages run one at a time."""
    items: list[_Attempt | dict[str, Any]] = []
    attempt: _Attempt | None = None
    for event in events:
        kind = event["event"]
        if kind == "stage.start":
            attempt = _Attempt(event["stage"], str(event["key"])[:KEY], str(event.get("work", "")), [event])
            items.append(attempt)
        elif attempt is None or kind in ("run.start", "run.end", "stage.cached"):
            attempt = None
            items.append(event)
        else:
            attempt.events.append(event)
            attempt = None if attempt.closed else attempt
    return items


def _interrupted(attempt: _Attempt) -> dict[str, Any]:
    last = attempt.events[-1]
    return {
        "t": last["t"], "event": "stage.interrupted", "stage": attempt.stage,
        "seconds": attempt.seconds, "message": KILLED,
    }  # fmt: skip


def curve(steps: Iterable[Event], phase: str = "main") -> list[Point]:
    """The losses of the run itself, without its replay; a step that was taken again counts as it was last."""
    last = {e["step"]: e for e in steps if e.get("phase", "main") == phase and e.get("loss") is not None}
    return [
        Point(step, float(e["loss"]), e.get("direct_loss"), str(e.get("pool", "")), bool(e.get("on_grid")))
        for step, e in sorted(last.items())
    ]


def _own_replies(steps: Sequence[Event]) -> dict[str, list[Point]]:
    phases = dict.fromkeys(str(event.get("phase", "main")) for event in steps)
    mine = [phase for phase in phases if phase.startswith(OWN_REPLIES)]
    return {phase.removeprefix(OWN_REPLIES): curve(steps, phase) for phase in mine}


def generations(steps: Iterable[Event]) -> list[Generation]:
    """The rollouts that the last round of reinforcement learned from, without its replay; of one that came again, what
    was last told."""
    parts = ("generation", "reward", "mixed", "gap", "gap_max")
    mine = [event for event in steps if event.get("phase") in REINFORCED]
    last_round = mine[-1]["phase"] if mine else None
    whole = (e for e in mine if e["phase"] == last_round and all(isinstance(e.get(part), NUMBER) for part in parts))
    last = {e["generation"]: e for e in whole}
    bounds = {n: e.get("gap_bound") if isinstance(e.get("gap_bound"), NUMBER) else None for n, e in last.items()}
    return [
        Generation(
            number=n,
            reward=e["reward"],
            mixed=e["mixed"],
            gap=e["gap"],
            gap_max=e["gap_max"],
            pool=e["pool"],
            last_step=e["step"],
            bound=bounds[n],
            drawn=_count(e, "drawn"),
            unscorable=_count(e, "unscorable"),
            round=str(e["phase"]),
        )
        for n, e in sorted(last.items())
    ]


def _count(event: Event, name: str) -> int:
    return int(event[name]) if isinstance(event.get(name), NUMBER) else 0


def bars(attempts: Sequence[_Attempt]) -> list[Bar]:
    """What ran when: one bar for each attempt, and within training one for each stretch on a pool."""
    found: list[Bar] = []
    offset = 0.0
    for attempt in attempts:
        begun = float(attempt.events[0]["t"])
        pool = attempt.events[0].get("pool")
        found.append(Bar(attempt.stage, pool, offset, offset + attempt.seconds))
        stretches: list[list[Any]] = []
        for event in attempt.events:
            if event["event"] in ("train.join", "train.step"):
                name, at = (event.get("phase", "main"), event["pool"]), offset + float(event["t"]) - begun
                if not stretches or stretches[-1][0] != name:
                    stretches.append([name, at, at])
                stretches[-1][2] = at
        found += [Bar(attempt.stage, name[1], start, end, name[0]) for name, start, end in stretches]
        offset += attempt.seconds
    return found
