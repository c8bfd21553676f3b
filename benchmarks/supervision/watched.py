"""What supervision costs while nothing fails: a worker's whole step (line, checks, digest, comparison with the others,
snapshot, durable states, audits) beside the trainer's step alone, by the clock, on a step of half a second or more.

Two workers on two cores; audits as the recipe's default has them (2% of the steps) and without. Two long steps differ
by more than supervision costs wherever a machine is shared, so what it does besides computing is timed by itself, too.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scipy.stats import binom

from benchmarks.common import throughput

BATCH = 720  # examples a virtual shard: a step of more than half a second on one core
FIRST = 400
BLOCK = 3


def rows(quick: bool = False) -> list[dict[str, Any]]:
    """All rows. Ratios are how many times the bare step's speed the watched one has: 0.95 is a cost of 5%."""
    from ottava.supervisor.hub import Hub
    from ottava.supervisor.local import LocalLauncher, rendezvous

    found = []
    for share in (0.0, 0.02):
        with tempfile.TemporaryDirectory() as name, LocalLauncher() as launcher, Hub() as hub:
            work = {"folder": name, "share": share, "pairs": 3 if quick else 24}
            tokens = hub.admit(1)
            target = "benchmarks.supervision.watched:steps"
            group = [
                launcher.spawn(target, work, pool=None, logs=Path(name), env=env | tokens) for env in rendezvous(2)
            ]
            joined = 0
            while any(process.alive() for process in group):
                for message in hub.hear(0.05):
                    joined += message["say"] == "join"
                if joined == len(group):
                    hub.tell("go")
                    joined = -1
            found += group[0].result()["rows"]
    return found


def steps(args: Mapping[str, Any]) -> dict[str, Any]:
    """In every worker: the rows, from this rank's clock."""
    import torch.distributed as dist

    from ottava import link, platforms
    from ottava.trainer import reduce
    from ottava.trainer import worker as workers
    from ottava.trainer.faults import Injector
    from ottava.trainer.probe import VOCABULARY, _stand_in
    from ottava.trainer.sft import fresh_trainer
    from ottava.trainer.spec import TrainSpec

    group, line = workers.join(platforms.get("cpu")), link.connect()
    spec = TrainSpec(batch=BATCH, direct={"batch": BATCH // 2}, audit={"share": args["share"]}, spike={"nats": 1e9})
    workers.make_trainer = lambda *_: fresh_trainer(spec, 0, _stand_in(), VOCABULARY)  # type: ignore[assignment]
    folder = Path(args["folder"])
    given = {
        "keep": {}, "start": None, "until": spec.steps, "memory": str(folder / "memory"), "run": "r", "vouched": 0,
        "durable": str(folder / "durable"), "recent": [],
    }  # fmt: skip
    (folder / "durable").mkdir(exist_ok=True)
    worker = workers.Worker(given, group, line, Injector({}, group.rank, "p", line.say))
    worker._begin()

    def exchange(value: Any) -> Any:
        return reduce.exchange_(value, group.rank, group.world)

    at = FIRST  # moves on, so that audits come as often as they are drawn
    own: list[float] = []  # seconds of a block's steps in which nothing was computed
    shares: list[float] = []
    for name in ("_enter", "_check_losses", "_keep", "_look"):
        _timed(worker, name, own)
    _timed(line, "step", own)

    def block(watched: bool) -> float:
        nonlocal at
        worker.trainer.state.step = at
        worker.digest = worker.trainer.state.digest()
        dist.barrier()
        begun = time.perf_counter()
        for _ in range(BLOCK):
            if watched:
                worker._step()
            else:
                worker.trainer.step(exchange, worker.shards)
        seconds = (time.perf_counter() - begun) / BLOCK
        if watched:
            shares.append(sum(own) / BLOCK / seconds)
        own.clear()
        at = FIRST + (at - FIRST + (BLOCK if watched else 0)) % 100
        return seconds

    title = f"a watched step, {args['share']:.0%} audited, against the bare step ({os.environ['WORLD_SIZE']} workers)"
    row = throughput(title, lambda: block(True), lambda: block(False), args["pairs"])
    worker.saver.close() if group.rank == 0 else None
    line.bye(at)
    shares = sorted(shares[1:])
    outside = int(binom.ppf(0.025, len(shares), 0.5))
    apart = {
        "name": f"the share of checks, digest, snapshot and line in a watched step, {args['share']:.0%} audited",
        "ratio": statistics.median(shares), "low": shares[max(outside - 1, 0)], "high": shares[-max(outside, 1)],
    }  # fmt: skip
    return {"rows": [row, apart]}


def _timed(place: Any, name: str, spent: list[float]) -> None:
    """Add the seconds of every call of a method to a list."""
    real = getattr(place, name)

    def timed(*args: Any, **more: Any) -> Any:
        begun = time.perf_counter()
        try:
            return real(*args, **more)
        finally:
            spent.append(time.perf_counter() - begun)

    setattr(place, name, timed)
