"""How good the gate is: python -m benchmarks.qualify [--json] [--clean 50] [--each 6] [--load 2] [--keep FILE]

clean    examinations of pools without a fault, on a machine kept busy: how often anybody is accused
planted  faults of every kind, at chips and places drawn from the seed: how often exactly the right worker is named

Pools have 2 or 4 CPU processes in turn. The machine is kept busy by `load` processes that compute in bursts, drawn
from the seed. --minutes: after so many no other examination begins; 0: all are made, in an order drawn from the seed.
--keep: a file that gets a line for every examination as it ends; the ones that are in it already are not made again.
Intervals are 95% ones of Clopper and Pearson.
"""

from __future__ import annotations

import argparse
import json
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

from benchmarks.common import options, share, show
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


def campaign(clean: int, each: int, seed: int) -> list[tuple[str, int, list[dict[str, Any]]]]:
    """What is examined, in an order drawn from the seed: (kind, workers, what is planted)."""
    draw = random.Random(seed)
    work = [("clean", 2 + 2 * (n % 2)) for n in range(clean)]
    # without a majority nobody can say which of two rounds as it should
    work += [(kind, 4 if kind == "rounding" else 2 + 2 * (n % 2)) for n in range(each) for kind in KINDS]
    draw.shuffle(work)
    return [(kind, workers, [] if kind == "clean" else [drawn(kind, workers, draw)]) for kind, workers in work]


def kept(path: Path, work: list[tuple[str, int, list[dict[str, Any]]]], seed: int) -> dict[int, dict[str, Any]]:
    """The examinations of an earlier start, by their place in `work`."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    found = {one["number"]: one for one in lines}
    for number, one in found.items():
        if one["seed"] != seed or number >= len(work) or work[number][2] != one["planted"]:
            sys.exit(f"{path} is of another campaign; name another file or give the same seed and counts")
    return found


def main() -> None:
    args = options(__doc__ or "", clean=50, each=6, load=2, seed=0, minutes=0, keep="")
    work = campaign(args.clean, args.each, args.seed)
    done = kept(Path(args.keep), work, args.seed) if args.keep else {}
    begun = time.monotonic()
    with busy(args.load, args.seed), LocalLauncher() as launcher:
        for number, (kind, workers, plants) in enumerate(work):
            if number in done:
                continue
            if args.minutes and time.monotonic() - begun > 60 * args.minutes:
                break
            at = {"number": number, "seed": args.seed, "kind": kind, "workers": workers, "planted": plants}
            load, one = os.getloadavg()[0], examined(launcher, workers, args.seed + number, plants)
            right = one["named"] == [str(plant["chip"]) for plant in plants]
            done[number] = at | {"right": right, "load": load} | one
            if args.keep:
                with Path(args.keep).open("a") as file:
                    file.write(json.dumps(done[number]) + "\n")
            print(f"{number + 1}/{len(work)} {done[number]}", file=sys.stderr, flush=True)
    told(list(done.values()), args)


def told(made: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Print the counts of the examinations that were made."""
    named: dict[str, list[bool]] = defaultdict(list)
    for one in made:
        named[one["kind"]].append(one["right"])
    wrong = [one for one in made if not one["right"]]
    clean = named.pop("clean", [])
    rows = [share("false alarms, clean runs", clean.count(False), len(clean))] if clean else []
    rows += [
        share(f"right worker named, {kind}", right.count(True), len(right)) for kind, right in sorted(named.items())
    ]
    planted = [right for each in named.values() for right in each]
    rows += [share("right worker named, all", planted.count(True), len(planted))] if planted else []
    show(
        rows,
        args.json,
        wrong=wrong,
        load=args.load,
        seed=args.seed,
        median_s=statistics.median(one["seconds"] for one in made),
        loadavg=statistics.median(one["load"] for one in made),
    )


if __name__ == "__main__":
    main()
