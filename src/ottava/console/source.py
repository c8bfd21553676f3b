"""What a report is made from: a run's folder, read at any moment of the run.

Artifacts are checked against their manifests first: nothing is told of bytes that were altered.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ottava import artifact, journal
from ottava.artifact import Artifact
from ottava.console.history import History, history
from ottava.errors import ArtifactError, DataError, OttavaError, from_os_error

FIGURES = ("value", "n", "low", "high", "correct", "by_steps")
MOVE = (
    "from", "to", "at_step", "lost_steps", "seconds_without_a_step", "before", "after", "handoff_identical",
    "replay_identical", "one_worker_identical", "drift", "envelope", "inside", "window", "replicas",
)  # fmt: skip
MODES = ("thinking", "direct", "direct_one_step")
FINISHED = ("done", "cached")
MAKERS = ("start", "train", "reinforce", "train-2", "reinforce-2")
"""The stages that make a model, in order: those with MODEL, named here because a stage's module loads torch."""


@dataclass(frozen=True)
class Source:
    """What a report is made from. asked: run.json; artifacts: those of the present recipe, by stage.

    altered: by stage, why its artifact is not believed.
    """

    folder: Path
    asked: Mapping[str, Any]
    history: History
    artifacts: Mapping[str, Artifact]
    altered: Mapping[str, str]

    @property
    def model(self) -> str:
        """The stage that made the model so far; empty where none has. An altered one counts: no other stands for it."""
        made = [name for name in MAKERS if name in self.artifacts or name in self.altered]
        return made[-1] if made else ""

    def summary(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage says of its result; None where it is not finished or not in the recipe."""
        return self.artifacts[stage].summary if stage in self.artifacts else None

    def file(self, stage: str, name: str) -> Any:
        """A JSON file of a finished stage, or None."""
        found = self.artifacts.get(stage)
        return found.json(name) if found is not None and name in found.manifest["files"] else None

    def faults(self, *phases: str) -> dict[str, Any]:
        """What went wrong in some phases of training, and what was planned to."""
        told = {
            "faults": (self.history.state.faults, ("phase", "pool", "kind", "step", "message")),
            "injected": (self.history.injected, ("pool", "kind", "rank", "step")),
        }
        return {
            name: [{key: e.get(key) for key in keep} for e in events if e.get("phase", "main") in phases]
            for name, (events, keep) in told.items()
        }


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Records that are not as a run writes them become an ArtifactError that names `path`."""
    try:
        yield
    except (AttributeError, DataError, LookupError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"the run's records cannot be read: {error!r}", where=path, fix="run the recipe again, in another --out"
        ) from error


def entry(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """An accuracy as a report tells it."""
    return None if found is None else {key: found.get(key) for key in FIGURES}


def accuracies(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """An evaluation as a report tells it: an accuracy by mode."""
    return None if found is None else {mode: entry(found.get(mode)) for mode in MODES}


def move(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A move between pools as a report tells it."""
    return None if found is None else {key: found.get(key) for key in MOVE}


def read(folder: Path) -> Source:
    folder = Path(folder).resolve()
    try:
        with readable(folder / "run.json"):
            asked = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            digest, names = str(asked["digest"]), list(asked["stages"].keys())
    except (FileNotFoundError, NotADirectoryError):
        raise OttavaError(
            "this is not the folder of a run: it has no run.json",
            where=folder,
            fix="name a folder that `ottava run` made, such as runs/tiny",
        ) from None
    except OSError as error:
        raise from_os_error(error, "reading run.json") from error
    artifacts: dict[str, Artifact] = {}
    altered: dict[str, str] = {}
    with readable(folder / "journal.jsonl"):
        told = history(journal.read(folder / "journal.jsonl"), digest, _at_work(folder))
        for name in names:
            stage = told.state.stages.get(name)
            if stage is not None and stage.artifact and stage.status in FINISHED:
                try:
                    artifacts[name] = artifact.load(folder / "artifacts" / stage.artifact)
                except ArtifactError as error:
                    altered[name] = error.what
    return Source(folder, asked, told, artifacts, altered)


def _at_work(folder: Path) -> bool:
    """True while a process holds the run's lock; a kill leaves its events open, but never the lock."""
    try:
        descriptor = os.open(folder / "lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False
