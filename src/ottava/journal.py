"""The run's memory: an append-only file of events, and the pure fold that turns them into state.

Every process of a run appends to one file; nothing else is shared on the side. The page, the
report and the supervisor read folds of it, so what they show is what happened.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Event = Mapping[str, Any]


class Journal:
    """Appends events to a file, one JSON object a line, from any number of processes.

    One `write` of one line on a descriptor opened O_APPEND: lines of several writers do not mix,
    and a killed writer leaves at most one torn line at the end, which readers skip.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._torn = _torn(self.path)

    def append(self, event: str, **fields: Any) -> None:
        """Append one event with the time in seconds since the epoch. OSError where it was not written whole."""
        line = json.dumps({"t": round(time.time(), 4), "event": event, **fields}, separators=(",", ":"))
        data = b"\n" * self._torn + line.encode() + b"\n"
        try:
            written = os.write(self._fd, data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        self._torn = written < len(data)
        if self._torn:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def sync(self) -> None:
        """Wait until what was appended is on disk."""
        os.fdatasync(self._fd)


def _torn(path: Path) -> bool:
    size = path.stat().st_size
    if size == 0:
        return False
    with path.open("rb") as file:
        file.seek(size - 1)
        return file.read(1) != b"\n"


def read(path: Path | str) -> Iterator[dict[str, Any]]:
    """The events of a journal in order; torn lines are skipped."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    for line in text.splitlines():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(event, dict) and "event" in event:
            yield event


def begins_anew(event: Event, phase: str) -> bool:
    """Whether a phase of training begins anew with this event: what was said of it before counts no longer."""
    return bool(event["event"] == "train.begin" and phase in event.get("phases", (phase,)))


def standing(events: Iterable[Event], kind: str, phase: str) -> list[dict[str, Any]]:
    """The events of a kind, each with a step, that still count in one phase of a run, in the order of their steps.

    Of a step that was taken again the last counts, and none after the step that a later start went back to. Pure.
    """
    found: list[dict[str, Any]] = []
    for event in events:
        name = event["event"]
        if begins_anew(event, phase):
            found = []
        elif name in ("train.start", kind) and event.get("phase") == phase:
            step = int(event["step"])
            found = [earlier for earlier in found if earlier["step"] < step + (name == "train.start")]
            found += [dict(event)] if name == kind else []
    return found


@dataclass
class StageState:
    """One stage as the journal tells it. seconds: wall time of the attempts that were run, added up."""

    name: str
    status: str = "waiting"  # waiting | running | done | cached | failed | interrupted
    pool: str | None = None
    seconds: float = 0.0
    started: float | None = None
    ended: float | None = None
    artifact: str | None = None
    progress: float = 0.0
    message: str = ""


@dataclass
class RunState:
    """A run as its journal tells it."""

    recipe: str = ""
    stages: dict[str, StageState] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    joins: list[dict[str, Any]] = field(default_factory=list)
    faults: list[dict[str, Any]] = field(default_factory=list)
    fallbacks: list[dict[str, Any]] = field(default_factory=list)


TRAINING = {
    "train.step": "steps",
    "train.join": "joins",
    "train.fault": "faults",
    "train.fallback": "fallbacks",
}


def fold(events: Iterable[Event]) -> RunState:
    """Turn events into state. Pure; unknown events are ignored, so old readers read new journals."""
    state = RunState()
    for event in events:
        kind = event["event"]
        if kind == "run.start":
            state.recipe = event["recipe"]
            for name in event["stages"]:
                state.stages.setdefault(name, StageState(name))
        elif kind.startswith("stage."):
            _fold_stage(state.stages.setdefault(event["stage"], StageState(event["stage"])), kind[6:], event)
        elif kind == "train.begin":  # a stage that starts anew forgets what an abandoned attempt said
            for name in TRAINING.values():
                setattr(state, name, [e for e in getattr(state, name) if not begins_anew(event, e.get("phase", ""))])
        elif kind in TRAINING:
            getattr(state, TRAINING[kind]).append(dict(event))
    return state


def _fold_stage(stage: StageState, kind: str, event: Event) -> None:
    if kind == "start":
        stage.status, stage.pool, stage.started, stage.ended = "running", event.get("pool"), event["t"], None
    elif kind == "progress":
        stage.progress, stage.message = event["fraction"], event.get("message", "")
    elif kind == "done":
        stage.status, stage.artifact, stage.progress = "done", event.get("artifact"), 1.0
        _close(stage, event)
    elif kind == "cached":
        stage.status = "cached" if stage.status != "done" else "done"
        stage.artifact, stage.progress = event.get("artifact"), 1.0
        stage.pool = event.get("pool", stage.pool)
    elif kind in ("failed", "interrupted"):
        stage.status, stage.message = kind, event.get("message", "")
        _close(stage, event)


def _close(stage: StageState, event: Event) -> None:
    stage.ended = event["t"]
    stage.seconds = round(stage.seconds + float(event.get("seconds", 0.0)), 3)
