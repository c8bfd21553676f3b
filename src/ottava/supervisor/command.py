"""Supervises any command that trains: other people's trainers, which speak `link` or at least end with a status.

The workers of a pool are started with torchrun's variables, the line to their supervisor and OTTAVA_STATE, a folder for
their states. What a failure leads to is decided as for our own trainer; where to go on from is the trainer's business
(`trainer.hf` does it for Hugging Face's), so nothing is claimed about bits here.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ottava import journal, link
from ottava.context import Launcher
from ottava.errors import RecipeError
from ottava.journal import Journal
from ottava.recipe import Pool
from ottava.supervisor import record
from ottava.supervisor.attempt import Stretch, act, alone, attempt, say
from ottava.supervisor.decide import group, standing
from ottava.supervisor.hub import Hub
from ottava.supervisor.record import Record

STATE = "state"
PHASE = "command"


@dataclass(frozen=True)
class Care:
    """How a command's workers are looked after. hang_s: seconds without a step that count as a hang while step times
    are unknown; later 3 times the 99th percentile of the steps' times, but no less than hang_least_s. What never spoke
    is only watched for its end."""

    restarts: int = 3
    hang_s: float = 600.0
    hang_least_s: float = 60.0
    leave_stragglers: bool = False


@dataclass(frozen=True)
class Run:
    """A command to supervise. folder: its states, logs and diagnoses; pools: in order of preference."""

    command: Sequence[str]
    pools: Sequence[Pool]
    folder: Path
    journal: Journal
    launcher: Launcher
    care: Care = Care()
    progress: Callable[[int], None] = lambda step: None
    phase: str = PHASE

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    def record(self) -> Record:
        """What happened so far."""
        shards = max(pool.workers for pool in self.pools)
        situation = standing(self.pools, self.care.restarts, shards, elastic=False)
        return record.fold(journal.read(self.journal.path), self.phase, situation)


def supervise(run: Run) -> dict[str, Any]:
    """Carry a command to its end through whatever happens; the account of it (`summary`).

    Raises RecipeError where another command ran in this folder, TrainingFailed where no pool is left or the same error
    came back, Busy where another supervisor holds the folder.
    """
    with alone(run.folder), Hub(run.launcher.host) as hub:
        _begin(run)
        while True:
            now = run.record()
            situation = now.fresh if now.stopped else now.situation
            pool = next(pool for pool in run.pools if pool.name == situation.pool.name)
            if now.segments and now.segments[-1].pool != pool.name:
                say(run, "train.fallback", source=now.segments[-1].pool, target=pool.name, at_step=now.reported)
            chips = group(situation.pool.chips, situation.shards)
            epoch = now.epoch + 1
            say(run, "train.start", epoch=epoch, pool=pool.name, chips=list(chips), step=now.reported)
            args = {"command": list(run.command), "folder": os.getcwd()}
            env = {link.STATE: str((run.folder / STATE).resolve())}
            stretch = Stretch(pool, chips, "ottava.supervisor.command:become", args, situation, env, speaks=False)
            failure = attempt(run, hub, stretch, now, epoch)
            if failure is None:
                say(run, "train.end")
                return summary(run)
            act(run, run.record().actions, failure)


def check(command: Sequence[str]) -> None:
    """Raise RecipeError where there is no such command."""
    if not command or shutil.which(command[0]) is None:
        what = f"there is no command {command[0]!r}" if command else "no command was given"
        raise RecipeError(what, where="COMMAND", fix="ottava supervise --out RUN -- python train.py")


def become(args: Mapping[str, Any]) -> NoReturn:
    """In a worker's process: turn into the command."""
    os.chdir(args["folder"])
    os.execvp(args["command"][0], args["command"])


def summary(run: Run) -> dict[str, Any]:
    """What the journal says: {ended, steps, lost_steps, starts, faults: [{kind, pool, chips, step, message}], pools}.

    lost_steps: steps that were reported and done again, over all starts.
    """
    events = [e for e in journal.read(run.journal.path) if e.get("phase") == run.phase]
    reported = lost = 0
    for event in events:
        if event["event"] == "train.step":
            reported = max(reported, int(event["step"]))
        elif event["event"] == "train.join" and event.get("step") is not None and event.get("rank") == 0:
            lost += max(0, reported - int(event["step"]))
            reported = int(event["step"])
    names = ("kind", "pool", "chips", "step", "message")
    starts = [event for event in events if event["event"] == "train.start"]
    return {
        "ended": "finished" if events and events[-1]["event"] == "train.end" else "stopped",
        "steps": reported,
        "lost_steps": lost,
        "starts": len(starts),
        "faults": [{name: event[name] for name in names} for event in events if event["event"] == "train.fault"],
        "pools": list(dict.fromkeys(event["pool"] for event in starts)),
    }


def _begin(run: Run) -> None:
    """Refuse a folder in which another command ran; a finished one is not run again by mistake."""
    told = [e for e in journal.read(run.journal.path) if e["event"] == "command.begin"]
    if told and told[0]["command"] != list(run.command):
        what = f"another command ran here: {shlex.join(told[0]['command'])}"
        raise RecipeError(what, where=run.folder, fix="name another folder with --out")
    if told and summary(run)["ended"] == "finished":
        raise RecipeError("the command has ended here already", where=run.folder, fix="name another folder with --out")
    if not told:
        run.journal.append("command.begin", command=list(run.command))
