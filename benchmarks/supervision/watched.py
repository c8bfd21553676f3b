"""What supervision costs while nothing fails: a worker's whole step (line, checks, digest, comparison with the others,
snapshot, durable states, audits) beside the trainer's step alone, by the clock, on a step of half a second or more.

Two workers on two cores; audits as the recipe's default has them (2% of the steps) and without.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
            work = {"folder": name, "share": share, "pairs": 3 if quick else 16}
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
    from ottava.trainer.loop import Trainer
    from ottava.trainer.probe import VOCABULARY, _stand_in
    from ottava.trainer.spec import TrainSpec

    group, line = workers.join(platforms.get("cpu")), link.connect()
    spec = TrainSpec(batch=BATCH, direct={"batch": BATCH // 2}, audit={"share": args["share"]}, spike={"nats": 1e9})
    workers.make_trainer = lambda _: Trainer(spec, 0, _stand_in(), VOCABULARY)  # type: ignore[assignment]
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
        at = FIRST + (at - FIRST + (BLOCK if watched else 0)) % 100
        return seconds

    title = f"a watched step, {args['share']:.0%} audited, against the bare step ({os.environ['WORLD_SIZE']} workers)"
    row = throughput(title, lambda: block(True), lambda: block(False), args["pairs"])
    worker.saver.close() if group.rank == 0 else None
    line.bye(at)
    return {"rows": [row]}
