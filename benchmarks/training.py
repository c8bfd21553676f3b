"""What exactness costs, each beside what it replaces: python -m benchmarks.training

snapshot     a step that is kept, beside a step that is not
tree sum     the fixed-order exchange of two workers, beside gloo's all_reduce
warm start   a worker forked from the warm process, beside a fresh interpreter, to its first line
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import options, paired, show


def steps(args: Mapping[str, Any]) -> dict[str, Any]:
    """In a worker: pairs of (kept, not kept) blocks of steps; the row."""
    from ottava.trainer import snapshot
    from ottava.trainer.loop import Trainer
    from ottava.trainer.probe import VOCABULARY, _stand_in
    from ottava.trainer.spec import TrainSpec
    from ottava.trainer.worker import join

    join()
    trainer = Trainer(TrainSpec(), 0, _stand_in(), VOCABULARY)
    writer = snapshot.Writer(Path(args["folder"]) / "b.snap", trainer.state.arena.numel() * 4)

    def block(keep: bool) -> float:
        trainer.state.step = 100
        begun = time.perf_counter()
        for _ in range(8):
            trainer.step(lambda total: total, range(2))
            if keep:
                writer.write(trainer.state.snapshot())
        return time.perf_counter() - begun

    return paired("snapshot", lambda: block(True), lambda: block(False), args["pairs"])


def exchange(args: Mapping[str, Any]) -> dict[str, Any]:
    """In two workers: the fixed tree beside all_reduce on a gradient of the demo's size, and of 64 MB."""
    import torch
    import torch.distributed as dist

    from ottava.trainer.reduce import exchange_
    from ottava.trainer.worker import join

    group = join()
    value = torch.randn(args["floats"])

    def block(ours: bool) -> float:
        dist.barrier()
        begun = time.perf_counter()
        for _ in range(args["repeats"]):
            if ours:
                exchange_(value, group.rank, group.world)
            else:
                dist.all_reduce(value)
            value.mul_(0.5)
        return time.perf_counter() - begun

    return paired(
        f"tree sum, {args['floats'] * 4 / 1e6:.2g} MB", lambda: block(True), lambda: block(False), args["pairs"]
    )


def nothing(args: Mapping[str, Any]) -> dict[str, Any]:
    """In a worker: import what a worker imports, do nothing."""
    import ottava.trainer.worker  # noqa: F401

    return {}


def main() -> None:
    args = options(__doc__ or "", pairs=10)
    from ottava.supervisor.local import LocalLauncher

    with tempfile.TemporaryDirectory() as name, LocalLauncher() as launcher:
        folder = Path(name)
        rows = launcher.call("benchmarks.training:steps", {"folder": name, "pairs": args.pairs}, logs=folder)
        for floats, repeats in ((140_000, 40), (16_000_000, 1)):
            work = {"floats": floats, "repeats": repeats, "pairs": args.pairs}
            rows += launcher.call("benchmarks.training:exchange", work, workers=2, logs=folder)[:1]

        def warm() -> float:
            begun = time.perf_counter()
            launcher.call("benchmarks.training:nothing", {}, logs=folder)
            return time.perf_counter() - begun

        def fresh() -> float:
            script = "import ottava.trainer.worker; from transformers.models.deepseek_v3 import DeepseekV3ForCausalLM"
            begun = time.perf_counter()
            subprocess.run([sys.executable, "-c", script], check=True)
            return time.perf_counter() - begun

        rows.append(paired("warm start", warm, fresh, min(args.pairs, 5)))
    show(rows, args.json)


if __name__ == "__main__":
    main()
