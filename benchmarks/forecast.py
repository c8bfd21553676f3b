"""Do the forecast's intervals hold on real runs? python -m benchmarks.forecast [--json] [--runs 24] [--first 8]

Small training runs under the supervisor, whose workers are killed at random: at times of an exponential clock, in
restarts too. After one that warms the machine, each run is forecast before it starts, from what the journals of the
runs before say: failures in so many seconds, what a restart took, the rest of the time. Counted is how often its wall
time lies from P10 to P90.

--first: runs that only teach; --mtbf: mean seconds between kills, unknown to the forecast. ours: runs inside the
interval; baseline: runs forecast; low, high: 95% interval of the share (Clopper and Pearson).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t

from benchmarks.common import options, share, show
from ottava import journal
from ottava.artifact import write_json
from ottava.context import Launcher, Process
from ottava.journal import Journal
from ottava.models.chat import write_tiny
from ottava.planner.forecast import Chips, Failures, Stage, Time, draw_stage
from ottava.planner.portfolio import Price
from ottava.recipe import Pool
from ottava.supervisor.local import LocalLauncher
from ottava.supervisor.loop import Run, supervise
from ottava.tasks import chains
from ottava.tasks.base import row, write_lines
from ottava.trainer.spec import TrainSpec

MADE: dict[str, Any] = {"source": "benchmarks.forecast", "date": "2026-11-23", "certainty": "measured"}
POOL = Pool(name="cores", workers=1)
DRAWS = 4000
STILL_S = 2.0


class Deadly:
    """A launcher whose processes are killed at random. stood_still: the whole machine was stopped meanwhile."""

    def __init__(self, inner: Launcher, seed: int, mtbf: float):
        self._inner, self._draw, self._mtbf = inner, random.Random(seed), mtbf
        self._alive: list[Process] = []
        self._stop, self.stood_still = threading.Event(), False
        self._thread = threading.Thread(target=self._kill, daemon=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def spawn(self, *args: Any, **options: Any) -> Process:
        process = self._inner.spawn(*args, **options)
        self._alive = [*(one for one in self._alive if one.alive()), process]
        return process

    def __enter__(self) -> Deadly:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _kill(self) -> None:
        while True:
            wait, begun = self._draw.expovariate(1 / self._mtbf), time.monotonic()
            if self._stop.wait(wait):
                break
            self.stood_still |= time.monotonic() - begun > wait + STILL_S
            alive = [process for process in self._alive if process.alive()]
            if alive:
                self._draw.choice(alive).kill()
        self.stood_still |= time.monotonic() - begun > wait + STILL_S


@dataclass
class Past:
    """What journals of earlier runs say: failures, seconds of a chip, seconds of each restart, and each run's rest."""

    failures: int = 0
    seconds: float = 0.0
    restarts: list[float] = field(default_factory=list)
    work: list[float] = field(default_factory=list)

    def learn(self, path: Path) -> float:
        """Take a run's journal in; its wall seconds, from its first start to its last step."""
        events = [e for e in journal.read(path) if e["event"] in ("train.start", "train.step", "train.fault")]
        times = [float(e["t"]) for e in events]
        wall, idle = times[-1] - times[0], 0.0
        for number, event in enumerate(events):
            after = next((x for x in range(number + 1, len(events)) if events[x]["event"] != "train.start"), None)
            if event["event"] == "train.fault" and after is not None:
                idle += times[after] - times[number]
                if events[after]["event"] == "train.step":  # else a failure came while it restarted
                    self.restarts.append(times[after] - times[number])
        self.failures += sum(event["event"] == "train.fault" for event in events)
        self.seconds += wall
        self.work.append(wall - idle)
        return wall

    def forecast(self, steps: int, seed: int) -> tuple[float, float, float]:
        """P10, P50 and P90 of the wall seconds of another such run."""
        logs = [math.log(work) for work in self.work]
        wide = t.ppf(0.9, len(logs) - 1) * statistics.stdev(logs) * math.sqrt(1 + 1 / len(logs))
        middle = math.exp(statistics.mean(logs))
        ends = {"low": f"{middle / 3600 * math.exp(-wide)} h", "high": f"{middle / 3600 * math.exp(wide)} h"}
        run = Chips(
            chip="core", chips=POOL.workers, work=Time(value=f"{middle / 3600} h", **ends, **MADE),
            failures=Failures(seen=self.failures, chip_hours=f"{self.seconds / 3600} chip-hours", **MADE),
            checkpoint="0 s", restart=f"{statistics.mean(self.restarts or [0.0])} s", interval=f"{middle / steps} s",
            usd_per_chip_hour=Price(value="1 USD/chip-hour", **MADE),
        )  # fmt: skip
        hours = draw_stage(Stage(name="run", run=run), np.random.default_rng(seed), DRAWS).hours
        return tuple(3600 * float(q) for q in np.quantile(hours, [0.1, 0.5, 0.9]))  # type: ignore[return-value]


def problems(folder: Path) -> None:
    """What a small run trains on."""
    rng = np.random.default_rng(1)
    cold = [p for n in range(2, 5) for p in chains.sample(rng, n, 20, "train")]
    answers = [p for n in range(1, 5) for p in chains.sample(rng, n, 60, "train")]
    write_lines(folder / "cold_start.jsonl", (row("chains", p, trace=chains.trace(p)) for p in cold))
    write_lines(folder / "answers.jsonl", (row("chains", p) for p in answers))
    write_json(folder / "vocabulary.json", chains.vocabulary())
    write_tiny(folder / "chat", chains.vocabulary())


def drilled(launcher: Launcher, data: Path, folder: Path, steps: int) -> Path:
    """One run to its end; its journal."""
    asked = {"steps": steps, "batch": 2, "direct": {"begin": 0.3, "batch": 2}, "checkpoint_every": steps,
             "hang_s": 120.0, "drift": {"window": 4}, "restarts": 1000}  # fmt: skip
    spec = TrainSpec.model_validate(asked)
    base = {"spec": spec.model_dump(mode="json"), "seed": 3, "data": str(data), "chat": str(data / "chat")}
    run = Run("main", spec, (POOL,), base, folder / "main", Journal(folder / "j"), launcher, folder / "logs")
    supervise(run)
    return run.journal.path


def sound(local: Launcher, data: Path, place: Path, number: int, args: argparse.Namespace) -> Path:
    """The journal of a run during which the machine did not stand still: such a one is made again."""
    for attempt in itertools.count():
        folder = place / f"{number}-{attempt}"
        folder.mkdir()
        with Deadly(local, 1000 * args.seed + number + 10**6 * attempt, args.mtbf) as launcher:
            path = drilled(launcher, data, folder, args.steps)  # type: ignore[arg-type]
        if not launcher.stood_still:
            return path
    raise AssertionError


def main() -> None:
    args = options(__doc__ or "", runs=24, first=8, steps=200, mtbf=2, seed=0)
    past, made = Past(), []
    with tempfile.TemporaryDirectory() as name, LocalLauncher() as local:
        data = Path(name) / "label"
        data.mkdir()
        problems(data)
        (Path(name) / "warm").mkdir()
        drilled(local, data, Path(name) / "warm", args.steps)  # type: ignore[arg-type]
        for number in range(args.first + args.runs):
            said = past.forecast(args.steps, number) if number >= args.first else None
            seen, wall = past.failures, past.learn(sound(local, data, Path(name), number, args))
            one = {"wall_s": wall, "failures": past.failures - seen, "restart_s": statistics.mean(past.restarts or [0])}
            if said is not None:
                one |= {"p10": said[0], "p50": said[1], "p90": said[2], "inside": said[0] <= wall <= said[2]}
                made.append(one)
            print(f"{number + 1}/{args.first + args.runs} {json.dumps(one)}", file=sys.stderr, flush=True)
    show(told(made), args.json, runs=made, seed=args.seed)


def told(made: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The counts: inside, below and above the interval."""
    return [
        share("wall time from P10 to P90", sum(one["inside"] for one in made), len(made)),
        share("above P90", sum(one["wall_s"] > one["p90"] for one in made), len(made)),
        share("above P50", sum(one["wall_s"] > one["p50"] for one in made), len(made)),
    ]


if __name__ == "__main__":
    main()
