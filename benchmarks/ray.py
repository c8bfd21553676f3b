"""What the Ray launcher costs beside the launcher of one machine: python -m benchmarks.ray (needs the extra ray)

start        from opening the launcher to the first worker's end
spawn        one worker that does nothing, to its result
worker death from SIGKILL of a worker to the next step of the run, on the same pool
node death   from the death of a node to the next step on another pool, beside a worker's death on one machine

The cluster has three nodes on this machine: a rehearsal. memory_mb is each process's proportional set size.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common import options, paired, show

SMALL = {"num_cpus": 0, "object_store_memory": 80 << 20}
KINDS = ("gcs_server", "monitor.py", "dashboard.py", "raylet/raylet", "DashboardAgent", "RuntimeEnvAgent", "ray::Agent",
         "supervisor.zygote")  # fmt: skip
KILL_AT = 8


class Recovered(Exception):
    """The run has made its next step: there is nothing more to measure."""


def data(folder: Path) -> Path:
    """A label artifact's files with gold traces, and a tokenizer."""
    import numpy as np

    from ottava.artifact import write_json
    from ottava.models.chat import write_tiny
    from ottava.tasks import chains
    from ottava.tasks.base import row, write_lines

    folder.mkdir()
    problems = chains.sample(np.random.default_rng(1), 3, 60, "train")
    write_lines(folder / "cold_start.jsonl", (row("chains", p, trace=chains.trace(p)) for p in problems))
    for name in ("answers", "test", "test_one_step"):
        write_lines(folder / f"{name}.jsonl", (row("chains", p) for p in problems))
    write_json(folder / "vocabulary.json", chains.vocabulary())
    write_tiny(folder / "chat", chains.vocabulary())
    return folder


def recovery(launcher: Any, dataset: Path, names: list[str], strike: Callable[[dict[str, Any]], None]) -> float:
    """Seconds from `strike`, which is given the join of rank 1, to the next step."""
    from ottava import journal
    from ottava.journal import Journal
    from ottava.recipe import Pool
    from ottava.supervisor.loop import Run, supervise
    from ottava.trainer.spec import TrainSpec

    spec = TrainSpec.model_validate({"steps": 400, "batch": 2, "direct": {"begin": 0.3, "batch": 2}, "restarts": 0})
    pools = [Pool(name=name, workers=2) for name in names]
    if len(pools) == 1:
        spec = spec.model_copy(update={"restarts": 1})
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base = {"spec": spec.model_dump(mode="json"), "seed": 3, "data": str(dataset), "chat": str(dataset / "chat")}
        run = Run("main", spec, pools, base, folder / "main", Journal(folder / "j"), launcher, folder / "logs")
        struck: list[float] = []
        taken: list[float] = []

        def progress(step: int) -> None:
            faults = journal.fold(journal.read(run.journal.path)).faults if struck else []
            if not struck and step >= KILL_AT:
                joins = journal.fold(journal.read(run.journal.path)).joins
                struck.append(time.monotonic())
                strike(next(join for join in joins if join["rank"] == 1))
            elif faults:
                taken.append(time.monotonic() - struck[0])
                raise Recovered

        try:
            supervise(replace(run, progress=progress))
        except Recovered:
            return taken[0]
    raise RuntimeError("the run ended before it had recovered")


def kill(join: dict[str, Any]) -> None:
    os.kill(join["pid"], signal.SIGKILL)


def memory_mb(setting: str) -> dict[str, list[float]]:
    """The proportional set sizes of the processes in whose environment there is a setting, by kind."""
    found = defaultdict(list)
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if setting.encode() not in (folder / "environ").read_bytes().split(b"\0"):
                continue
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            lines = (folder / "smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        kind = next((kind for kind in KINDS if kind in command), "other")
        found[kind].append(round(next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024, 1))
    return dict(found)


def main() -> None:
    args = options(__doc__ or "", pairs=5)
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # short: it holds sockets
    os.environ |= {"RAY_TMPDIR": str(folder), "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    from ray.cluster_utils import Cluster

    head = {**SMALL, "include_dashboard": False, "node_ip_address": "127.0.0.2", "node_name": "head"}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for number, name in ((3, "a"), (4, "b")):
            cluster.add_node(
                **SMALL, node_ip_address=f"127.0.0.{number}", node_name=name, resources={f"ottava:{name}": 2}
            )
        rows, memory = measure(cluster, folder, args.pairs)
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
    show(rows, args.json, memory_mb=memory)


def measure(cluster: Any, folder: Path, pairs: int) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """All rows, and the memory of the cluster's processes with warm agents on two nodes."""
    from ottava.recipe import Pool
    from ottava.supervisor.local import LocalLauncher
    from ottava.supervisor.ray import RayLauncher

    dataset, logs, a = data(folder / "data"), folder / "logs", Pool(name="a", workers=2)

    def first(launcher: Any) -> float:
        begun = time.perf_counter()
        with launcher as opened:
            opened.call("benchmarks.startup:nothing", {}, pool=a, logs=logs)
            return time.perf_counter() - begun

    def spawn(launcher: Any) -> float:
        begun = time.perf_counter()
        launcher.call("benchmarks.startup:nothing", {}, pool=a, logs=logs)
        return time.perf_counter() - begun

    few = min(pairs, 5)
    rows = [paired("start", lambda: first(RayLauncher(cluster.address)), lambda: first(LocalLauncher()), few)]
    with RayLauncher(cluster.address, [a, Pool(name="b")]) as ours, LocalLauncher() as baseline:
        rows.append(paired("spawn", lambda: spawn(ours), lambda: spawn(baseline), 4 * pairs))
        memory = memory_mb(f"RAY_TMPDIR={folder}")
        rows.append(
            paired(
                "worker death",
                lambda: recovery(ours, dataset, ["a"], kill),
                lambda: recovery(baseline, dataset, ["a"], kill),
                pairs,
            )
        )

        def node_death() -> float:
            node = cluster.add_node(**SMALL, node_ip_address="127.0.0.5", node_name="c", resources={"ottava:c": 2})
            return recovery(ours, dataset, ["c", "b"], lambda join: cluster.remove_node(node, allow_graceful=False))

        rows.append(paired("node death", node_death, lambda: recovery(baseline, dataset, ["a", "b"], kill), few))
    return rows, memory


if __name__ == "__main__":
    main()
