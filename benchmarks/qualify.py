"""How good the gate is: python -m benchmarks.qualify [--json] [--clean 50] [--each 6] [--load 2] [--minutes 0]

clean    examinations of pools without a fault, on a machine kept busy: how often anybody is accused
planted  faults of every kind, at chips and places drawn from the seed: how often exactly the right worker is named

Pools have 2 or 4 CPU processes in turn. The machine is kept busy by `load` processes that compute in bursts, drawn
from the seed. minutes: after so many no other examination begins; 0: all are made, in an order drawn from the seed.
Intervals are 95% ones of Clopper and Pearson.
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scipy.stats import beta

from benchmarks.common import options, show
from ottava.qualify import verdict
from ottava.qualify.gate import Terms, examine
from ottava.qualify.plants import KINDS
from ottava.recipe import Pool
from ottava.supervisor.local import LocalLauncher

BURSTS = """
import os, random, sys, time
draw, parent = random.Random(int(sys.argv[1])), os.getppid()
while os.getppid() == parent:
    until = time.monotonic() + draw.uniform(0.01, 1.0)
    while time.monotonic() < until:
        pass
    time.sleep(draw.uniform(0.0, 0.5))
"""
FREE_DISK = 1e12  # the disk is not what is examined here


@contextmanager
def busy(count: int, seed: int) -> Iterator[None]:
    """So many processes that compute in bursts; they end with this one."""
    started = [subprocess.Popen([sys.executable, "-c", BURSTS, str(seed + n)]) for n in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def drawn(kind: str, workers: int, draw: random.Random) -> dict[str, Any]:
    """A fault of a kind, on a chip drawn, as strong as drawn."""
    plant: dict[str, Any] = {"kind": kind, "chip": draw.randrange(workers)}
    if kind in ("slow", "throttled"):
        plant["factor"] = draw.uniform(1.6, 3.0)
    elif kind == "link":
        plant["factor"] = draw.uniform(5.0, 20.0)
    elif kind == "flip":
        plant["every"] = draw.randrange(5, 40)
    elif kind in ("dead", "hang", "stop"):
        plant["at"] = draw.choice(["numbers:1", "collectives:1", "links:4", "speed:5", "repeat:3", "soak:2"])
    return plant


def examined(launcher: LocalLauncher, workers: int, seed: int, plants: list[dict[str, Any]]) -> dict[str, Any]:
    """One examination: {"named": chips, "said": the findings, "seconds"}."""
    begun = time.monotonic()
    terms = Terms(soak_s=1.0, hang_s=12.0, seed=seed, plants=plants)
    with tempfile.TemporaryDirectory() as folder:
        found = examine(launcher, Pool(name="cores", workers=workers), terms, Path(folder))
    against = verdict.findings(found, verdict.Limits(), FREE_DISK)
    said = [f"{f.chip}: {f.check}: {f.reason}" for f in against]
    return {"named": sorted({str(f.chip) for f in against}), "said": said, "seconds": time.monotonic() - begun}


def row(name: str, good: int, runs: int) -> dict[str, Any]:
    """Counts with the exact 95% interval of the share."""
    low = float(beta.ppf(0.025, good, runs - good + 1)) if good else 0.0
    high = float(beta.ppf(0.975, good + 1, runs - good)) if good < runs else 1.0
    return {"name": name, "ours": good, "baseline": runs, "ratio": good / runs, "low": low, "high": high}


def main() -> None:
    args = options(__doc__ or "", clean=50, each=6, load=2, seed=0, minutes=0)
    draw, wrong, seconds, loads = random.Random(args.seed), [], [], []
    named: dict[str, list[bool]] = defaultdict(list)
    begun = time.monotonic()
    with busy(args.load, args.seed), LocalLauncher() as launcher:
        work: list[tuple[str, int]] = [("clean", 2 + 2 * (n % 2)) for n in range(args.clean)]
        # without a majority nobody can say which of two rounds as it should
        work += [(kind, 4 if kind == "rounding" else 2 + 2 * (n % 2)) for n in range(args.each) for kind in KINDS]
        draw.shuffle(work)
        for number, (kind, workers) in enumerate(work):
            if args.minutes and time.monotonic() - begun > 60 * args.minutes:
                break
            loads.append(os.getloadavg()[0])
            plants = [] if kind == "clean" else [drawn(kind, workers, draw)]
            one = examined(launcher, workers, args.seed + number, plants)
            right = one["named"] == [str(plant["chip"]) for plant in plants]
            named[kind].append(right)
            seconds.append(one["seconds"])
            if not right:
                wrong.append({"planted": plants, "workers": workers, **one})
            print(f"{number + 1}/{len(work)} {kind} {workers} {plants} {right} {one}", file=sys.stderr, flush=True)
    clean = named.pop("clean", [])
    rows = [row("false alarms, clean runs", clean.count(False), len(clean))] if clean else []
    rows += [row(f"right worker named, {kind}", right.count(True), len(right)) for kind, right in sorted(named.items())]
    planted = [right for each in named.values() for right in each]
    rows += [row("right worker named, all", planted.count(True), len(planted))] if planted else []
    show(
        rows,
        args.json,
        wrong=wrong,
        load=args.load,
        seed=args.seed,
        median_s=statistics.median(seconds),
        loadavg=statistics.median(loads),
    )


if __name__ == "__main__":
    main()
