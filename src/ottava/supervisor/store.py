"""A run's states on disk and in memory, and which of them counts.

    memory/e00003/NODE/rank0.snap    every step, two slots in mapped memory: survives the death of any process
    durable/g-000000560-e00003/      a generation, now and then, flushed: survives a power cut
    handoff/state-560                what moved between pools; handoff/after-584: for the measurement of the drift

Every state carries its step, digest and, by its place, the epoch that wrote it. `newest` walks back from the newest
that counts to the first one whose bytes are whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ottava.errors import CheckpointError
from ottava.trainer import envelope, generations, snapshot
from ottava.trainer.snapshot import Snapshot

Usable = Callable[[int, int], bool]
"""(epoch, step) -> whether such a state counts: `record.Record.usable`."""


@dataclass(frozen=True)
class Found:
    """A whole state: where it is, and what it is."""

    path: Path
    epoch: int
    step: int
    digest: str
    run: str

    @property
    def durable(self) -> bool:
        """Whether it is a generation: its tensors go into a state that a worker has."""
        return self.path.is_dir()

    def load(self) -> Snapshot:
        """The bytes of one that is kept in memory."""
        return snapshot.load(self.path, self.step, self.run)

    def plain(self) -> dict[str, str | int]:
        """As a worker is told of it."""
        return {"path": str(self.path), "step": self.step, "digest": self.digest}


def memory(folder: Path, epoch: int) -> Path:
    """The folder of one epoch's snapshots."""
    return folder / "memory" / f"e{epoch:05d}"


def durable(folder: Path) -> Path:
    """The folder of flushed states, made if need be."""
    path = folder / "durable"
    path.mkdir(parents=True, exist_ok=True)
    return path


def handoff_file(folder: Path, step: int) -> Path:
    """Where the state that moved between pools after `step` steps is kept."""
    return folder / "handoff" / f"state-{step}"


def kept_file(folder: Path, step: int) -> Path:
    """Where the state after `step` steps is kept for the drift measurement."""
    path = folder / "handoff"
    path.mkdir(parents=True, exist_ok=True)
    return path / f"after-{step}"


def newest(folder: Path, run: str, usable: Usable) -> tuple[Found | None, list[tuple[Path, str]]]:
    """The newest state that counts and is whole, or None; and the newer ones that are not, with the reasons.

    run: the run's id. Raises CheckpointError where all generations are of another run.
    """
    rejected: list[tuple[Path, str]] = []
    _check_run(folder, run)
    listed = [(step, epoch, path) for path, epoch, step in _listed(folder) if usable(epoch, step)]
    for step, epoch, path in sorted(listed, key=lambda item: (-item[0], -item[1], item[2].is_dir(), str(item[2]))):
        try:
            return Found(path, epoch, step, _digest(path, step, run), run), rejected
        except (CheckpointError, OSError) as error:
            rejected.append((path, str(getattr(error, "what", error))))
    return None, rejected


def _digest(path: Path, step: int, run: str) -> str:
    if not path.is_dir():
        return snapshot.load(path, step, run).digest
    state = envelope.verify(path, run).state
    if state is None:
        raise CheckpointError("the generation does not say what state it holds", where=path)
    return state


def _check_run(folder: Path, run: str) -> None:
    """Refuse a folder in which everything is of another run: it was made by another recipe."""
    runs = set()
    for _, _, path in generations.listed(folder / "durable"):
        with suppress(CheckpointError):
            runs.add(envelope.peek(path).run)
    if runs and run not in runs:
        fix = "name another folder, or use the recipe that these states were made by"
        raise CheckpointError("the states in this folder are of another run", where=folder / "durable", fix=fix)


def tidy(folder: Path, epoch: int, best: Found | None) -> None:
    """Remove the memory of epochs that the next one cannot need: all but the newest two and that of the best state."""
    kept = {memory(folder, number) for number in (epoch - 1, epoch)}
    for path in (folder / "memory").glob("e*"):
        if path not in kept and (best is None or path not in best.path.parents):
            shutil.rmtree(path, ignore_errors=True)


def _listed(folder: Path) -> Iterator[tuple[Path, int, int]]:
    """(path, epoch, step) of all that says it is a state."""
    for path in (folder / "memory").glob("e*/*/*.snap"):
        for step in snapshot.steps(path):
            yield path, int(path.parent.parent.name[1:]), step
    for number, epoch, path in generations.listed(folder / "durable"):
        yield path, epoch, number
