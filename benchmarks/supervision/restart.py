"""How soon a killed group takes its next step: forked from the warm process, or from standbys, beside fresh ones.

Standbys are for accelerators, whose device a fork cannot inherit. Here they open cores, so what they save is imports; a
device's context and kernels come on top.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.common import throughput

FORKS = "ottava.platforms.cpu.Cpu.forks"
STANDBY = "ottava.supervisor.local._standby"
WAIT_S = 20.0  # until standbys are warm, on two cores that also train


def rows(quick: bool = False) -> list[dict[str, Any]]:
    """All rows: seconds from the kill of one of two workers to the group's next step, and how many times sooner."""
    pairs = 1 if quick else 3
    with tempfile.TemporaryDirectory() as name:
        base = _data(Path(name))
        found = []
        for title, ours in (("a fork", _forked), ("a standby", _standby)):
            row = throughput(f"{title} against a fresh process", lambda: ours(base), lambda: _fresh(base), pairs)  # noqa: B023
            found.append(row)
    return found


def _forked(base: dict[str, Any]) -> float:
    return _restart(base, wait=0.0)


def _standby(base: dict[str, Any]) -> float:
    with patch(FORKS, False):
        return _restart(base, wait=WAIT_S)


def _fresh(base: dict[str, Any]) -> float:
    from ottava.supervisor import local

    real: Callable[..., dict[str, Any] | None] = local._standby
    with patch(FORKS, False), patch(STANDBY, lambda pool, env: {**(real(pool, env) or {}), "keep": 0}):
        return _restart(base, wait=0.0)


def _restart(base: dict[str, Any], wait: float) -> float:
    """Train 12 steps on two workers, one of which is killed in the eighth. wait: seconds to stand still before."""
    from ottava import journal
    from ottava.journal import Journal
    from ottava.recipe import Pool
    from ottava.supervisor.local import LocalLauncher
    from ottava.supervisor.loop import Run, supervise
    from ottava.trainer.spec import TrainSpec
    from ottava.trainer.supervised import Fault

    spec = TrainSpec(steps=12, hang_s=120.0, restarts=1)
    pause = [Fault(at_step=4, rank=rank, kind="sleep", seconds=wait) for rank in (0, 1)] if wait else []
    faults = [*pause, Fault(at_step=8, rank=1, kind="sigkill")]
    with tempfile.TemporaryDirectory() as name, LocalLauncher() as launcher:
        folder = Path(name)
        spec_of = {**base, "spec": spec.model_dump(mode="json")}
        run = Run("main", spec, (Pool(name="a", workers=2),), spec_of, folder, Journal(folder / "j"), launcher, folder)
        supervise(run, faults)
        events = list(journal.read(folder / "j"))
    struck = next(e for e in events if e["event"] == "train.injected" and e["kind"] == "sigkill")
    after = next(e for e in events if e["event"] == "train.step" and e["attempt"] > struck["epoch"])
    return float(after["t"] - struck["t"])


def _data(folder: Path) -> dict[str, Any]:
    """A small labelled dataset with gold traces, and its tokenizer."""
    import numpy as np

    from ottava.models.chat import write_tiny
    from ottava.tasks import chains
    from ottava.tasks.base import row, write_lines

    rng = np.random.default_rng(1)
    cold = [p for n in range(2, 7) for p in chains.sample(rng, n, 20, "train")]
    answers = [p for n in range(1, 7) for p in chains.sample(rng, n, 60, "train")]
    write_lines(folder / "cold_start.jsonl", (row("chains", p, trace=chains.trace(p)) for p in cold))
    write_lines(folder / "answers.jsonl", (row("chains", p) for p in answers))
    write_tiny(folder / "chat", chains.vocabulary())
    return {"seed": 3, "data": str(folder), "chat": str(folder / "chat")}
