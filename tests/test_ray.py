"""The Ray launcher: the launcher's own tests on a cluster of three nodes on one machine, and deaths of all kinds.

Needs `pip install -e '.[ray]'`. Each node has a loopback address of its own: Ray replaces 127.0.0.1 by the machine's.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ottava import journal
from ottava.errors import PlatformError, PoolMissing
from ottava.platforms.cpu import OTHER_KERNELS
from ottava.recipe import Pool
from ottava.supervisor.launch import Cluster, cluster_for, started
from ottava.supervisor.local import LocalLauncher
from ottava.supervisor.loop import supervise
from ottava.supervisor.ray import RayLauncher

from .test_agent import nap
from .test_supervisor import (  # the same tests and what they need, with this module's `launcher`
    PLAIN,
    _running,
    make,
    test_a_fault_costs_no_step_and_no_bit,
    test_call,
    test_errors_cross_the_process,
    test_one_death_ends_the_call,
    undisturbed,
)

__all__ = [
    "nap", "test_a_fault_costs_no_step_and_no_bit", "test_call", "test_errors_cross_the_process",
    "test_one_death_ends_the_call", "undisturbed",
]  # fmt: skip

pytestmark = pytest.mark.slow

A, B, D = Pool(name="a", workers=2), Pool(name="b", env=OTHER_KERNELS), Pool(name="d", workers=2)
WIDE = Pool(name="wide", workers=4)
NODES = {"nodea": {"ottava:a": 2, "ottava:wide": 2}, "nodeb": {"ottava:b": 1, "ottava:wide": 2}}
HERE = "tests.test_ray:"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without chips and two nodes; afterwards nothing of it may be left."""
    pytest.importorskip("ray", reason="ray is not installed: pip install -e '.[ray]'")
    with started(NODES) as made:
        yield made
    wait_until(lambda: not started_with(f"RAY_TMPDIR={made.folder}"), "a process of the cluster is left")
    assert not Path(made.folder).exists()


def started_with(setting: str) -> list[int]:
    """The living processes in whose environment there is a setting."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if setting.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def network(cluster: Cluster) -> str:
    """What the addresses of its nodes begin with."""
    return cluster.address.rpartition(".")[0]


def wait_until(condition: Any, otherwise: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.05)


@pytest.fixture(scope="module")
def launcher(cluster: Cluster) -> Iterator[RayLauncher]:
    with RayLauncher(cluster.address, [A, B]) as processes:
        yield processes


# ---------------------------------------------------------------- places


def where(args: dict[str, Any]) -> dict[str, Any]:
    import torch

    torch.ones(2, 2) @ torch.ones(2, 2)
    names = ("OTTAVA_NODE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    seen = {name: os.environ[name] for name in names}
    return {**seen, "capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}


def test_pools_have_their_nodes_and_their_environment(launcher: RayLauncher, tmp_path: Path) -> None:
    """Pool b's environment limits its instruction set, and no other's: it is there before the first operation."""
    first, second = launcher.call(HERE + "where", {}, pool=A, workers=2, logs=tmp_path)
    limited = launcher.call(HERE + "where", {}, pool=B, logs=tmp_path)[0]
    again = launcher.call(HERE + "where", {}, pool=A, logs=tmp_path)[0]
    assert [(each["OTTAVA_NODE"], each["RANK"]) for each in (first, second, limited)] == [
        ("nodea", "0"), ("nodea", "1"), ("nodeb", "0")
    ]  # fmt: skip
    assert {each["threads"] for each in (first, second, limited)} == {1}
    script = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    plain = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    assert [each["capability"] for each in (first, second, again)] == [plain] * 3
    assert limited["capability"] == "AVX2"


def total(args: dict[str, Any]) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    value = torch.tensor([1 + dist.get_rank()])
    dist.all_reduce(value)
    dist.destroy_process_group()
    return {**where(args), "sum": int(value)}


def test_a_group_over_two_nodes_meets_at_the_first(cluster: Cluster, tmp_path: Path) -> None:
    with RayLauncher(cluster.address) as own:
        results = own.call(HERE + "total", {}, pool=WIDE, workers=4, logs=tmp_path)
    assert [(r["OTTAVA_NODE"], r["LOCAL_RANK"]) for r in results] == [
        ("nodea", "0"), ("nodea", "1"), ("nodeb", "0"), ("nodeb", "1")
    ]  # fmt: skip
    assert {r["MASTER_ADDR"] for r in results} == {network(cluster) + ".3"}
    assert {r["LOCAL_WORLD_SIZE"] for r in results} == {"2"}
    assert {r["sum"] for r in results} == {1 + 2 + 3 + 4}


def test_a_machine_that_was_left_is_not_used_again(cluster: Cluster) -> None:
    """Its chips are told apart by number, though it lives and comes first by name."""
    with RayLauncher(cluster.address) as own:
        for chips in ([0, 1, 2, 3], [2, 3], [1, 2], [0, 1], [0, 1, 2, 3]):
            places = own.rendezvous(WIDE, len(chips), chips)
            assert [place["OTTAVA_NODE"] for place in places] == ["nodea" if chip < 2 else "nodeb" for chip in chips]
            assert (
                [place["LOCAL_RANK"] for place in places] == ["0", "0"]
                if chips == [1, 2]
                else ["0", "1"] * (len(chips) // 2)
            )
    with RayLauncher(cluster.address) as after:  # a supervisor's successor counts as it did
        assert [place["OTTAVA_NODE"] for place in after.rendezvous(WIDE, 2, [2, 3])] == ["nodeb", "nodeb"]


def test_more_workers_than_chips_share_them(launcher: RayLauncher, tmp_path: Path) -> None:
    """As on one machine: replicas that do not talk to each other may be more than a pool's workers."""
    results = launcher.call("tests.test_supervisor:double", {"value": 1}, pool=B, workers=3, logs=tmp_path)
    assert [r["rank"] for r in results] == ["0", "1", "2"]


def test_a_cluster_that_cannot_place_says_what_is_missing(launcher: RayLauncher) -> None:
    with pytest.raises(PoolMissing) as error:
        launcher.rendezvous(Pool(name="c", workers=2), 2)
    assert error.value.what == "the cluster cannot place 2 workers of pool 'c': it has 0, 2 missing"
    assert error.value.where == "none of the 3 nodes has any"
    assert re.search(r"""ray start --address=127[.\d]+\.2:\d+ --resources='\{"ottava:c": 2\}'""", error.value.fix or "")


ANOTHER = """
import sys
from ottava.errors import PoolMissing
from ottava.recipe import Pool
from ottava.supervisor.ray import RayLauncher
with RayLauncher(sys.argv[1], patience_s=1.0) as launcher:
    try:
        launcher.rendezvous(Pool(name="b"), 1)
    except PoolMissing as error:
        print(error.what)
"""


def test_chips_that_another_run_holds_are_not_awaited_for_ever(
    launcher: RayLauncher, cluster: Cluster, tmp_path: Path
) -> None:
    launcher.call("tests.test_agent:nap", {"seconds": 0}, pool=B, logs=tmp_path)  # from now on this run holds them
    command = [sys.executable, "-c", ANOTHER, cluster.address]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout == "1 of the 1 workers of pool 'b' did not become free in 1 s\n", done.stderr


def test_a_node_with_other_code_is_refused(
    launcher: RayLauncher, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = RayLauncher(cluster.address)
    monkeypatch.setattr("ottava.supervisor.ray.code", lambda: "0.0.1 (another)")
    with own, pytest.raises(PlatformError, match=r"the node has ottava .* and this is 0.0.1 \(another\)") as error:
        own.rendezvous(None, 1)
    assert error.value.where == "node head"


def test_no_cluster_at_the_address(cluster: Cluster) -> None:
    script = "import sys; from ottava import cluster; cluster.CONNECT_S = 3.0; cluster.join(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", script, network(cluster) + ".2:1"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert "the Ray cluster did not answer in 3 s" in done.stderr


# ---------------------------------------------------------------- deaths


def test_a_killed_worker_is_seen(launcher: RayLauncher, tmp_path: Path) -> None:
    process = launcher.spawn("tests.test_agent:nap", {"seconds": 600}, pool=A, logs=tmp_path)
    assert process.wait(0.05) is None
    assert process.alive()
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    with pytest.raises(PlatformError, match="killed by SIGKILL"):
        process.result()
    assert process.log.parent == tmp_path


@pytest.mark.parametrize(("send", "status"), [("terminate", -signal.SIGTERM), ("kill", -signal.SIGKILL)])
def test_signals_reach_a_worker(launcher: RayLauncher, tmp_path: Path, send: str, status: int) -> None:
    process = launcher.spawn("tests.test_agent:nap", {"seconds": 600}, pool=B, logs=tmp_path)
    getattr(process, send)()  # at once: a signal does not overtake the start
    assert process.wait(60) == status


def test_the_death_of_an_agent_ends_its_workers_and_the_node_goes_on(launcher: RayLauncher, tmp_path: Path) -> None:
    """The node itself is alive, so the next group is placed on it again."""
    process = launcher.spawn("tests.test_agent:nap", {"seconds": 600}, pool=B, logs=tmp_path)
    pid = process.pid
    zygote = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    agent = int(Path(f"/proc/{zygote}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(agent, signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    with pytest.raises(PlatformError, match="the node is gone"):
        process.result()
    wait_until(lambda: not _running(pid), "a worker outlived its agent")
    assert launcher.call(HERE + "where", {}, pool=B, logs=tmp_path)[0]["OTTAVA_NODE"] == "nodeb"


@pytest.mark.parametrize("restarts", [0, 1])
def test_the_death_of_a_node_costs_no_bit(
    cluster: Cluster,
    launcher: RayLauncher,
    dataset: Path,
    tmp_path: Path,
    undisturbed: str,
    restarts: int,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Pool c's only node dies in mid-run: the run goes on on pool b, also where c is tried again first."""
    node = cluster.add(f"nodec{restarts}", {"ottava:c": 2})
    killed: list[int] = []

    def kill(step: int) -> None:
        if step >= 1 and not killed:  # a node takes longer to die than most of the steps
            killed.append(step)
            cluster.kill(node)

    run = make(dataset, tmp_path, launcher, (Pool(name="c", workers=2), PLAIN[1]), restarts=restarts)
    final, segments = supervise(replace(run, progress=kill))
    assert final.digest == undisturbed
    assert [s.pool for s in segments] == ["c", "b"]
    assert segments[0].lost == 0
    state = journal.fold(journal.read(run.journal.path))
    assert [f["kind"] for f in state.faults] == ["killed", "pool"][: 1 + restarts]
    if restarts:
        assert "the cluster cannot place 2 workers of pool 'c': it has 0" in state.faults[1]["message"]
    dead = {join["pid"] for join in state.joins if join["pool"] == "c"}
    assert len(dead) == 2
    assert not any(_running(pid) for pid in dead)
    assert capfd.readouterr().out == "", "Ray has written on standard output"


def test_the_death_of_one_of_a_pools_two_nodes_costs_no_bit(
    cluster: Cluster, launcher: RayLauncher, dataset: Path, tmp_path: Path
) -> None:
    """The daemons of the first rank's node are killed, and what it kept in memory is lost: the run goes on on the other
    node, from the copies that are there, and ends in the bytes of one worker that knows nothing of Ray."""
    with LocalLauncher() as alone:
        whole, _ = supervise(make(dataset, tmp_path / "whole", alone, (Pool(name="one"),), virtual_shards=4))
    pool = Pool(name="e", workers=4, nodes=2)
    nodes = {name: cluster.add(name, {"ottava:e": 2}) for name in ("nodee0", "nodee1")}
    run = make(dataset, tmp_path / "run", launcher, (pool, PLAIN[1]), virtual_shards=4, restarts=2)
    dead: list[int] = []

    def kill(step: int) -> None:
        if step >= 12 and not dead:
            joins = journal.fold(journal.read(run.journal.path)).joins
            assert [join["node"] for join in sorted(joins, key=lambda join: int(join["rank"]))] == [
                "nodee0", "nodee0", "nodee1", "nodee1"
            ]  # fmt: skip
            dead.extend(join["pid"] for join in joins if join["node"] == "nodee0")
            cluster.kill(nodes["nodee0"])
            shutil.rmtree(next((run.folder / "memory").glob("e*/nodee0")))

    final, segments = supervise(replace(run, progress=kill))
    assert final.digest == whole.digest
    state = journal.fold(journal.read(run.journal.path))
    assert [(f["kind"], f["chips"]) for f in state.faults] == [("node", [0, 1])]
    assert [(s.pool, s.failures) for s in segments] == [("e", 1)]
    starts = [e for e in journal.read(run.journal.path) if e["event"] == "train.start"]
    assert [e["chips"] for e in starts] == [[0, 1, 2, 3], [2, 3]]
    reported = max(
        e["step"] for e in journal.read(run.journal.path) if e["event"] == "train.step" and e["attempt"] == 1
    )
    assert reported - starts[1]["step"] <= 1
    assert not any(_running(pid) for pid in dead)
    cluster.kill(nodes["nodee1"])


# ---------------------------------------------------------------- the choice


def test_a_cluster_is_looked_at_before_anything_is_begun(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster_for(cluster.address, [A, WIDE]) as where:
        assert where.address == cluster.address
        assert where.chips == {"a": {"nodea": 2}, "wide": {"nodea": 2, "nodeb": 2}}
        assert where.away == ()
    with cluster_for("auto", [A]) as where:
        assert where.address == cluster.address
    monkeypatch.setattr("ottava.supervisor.launch.interface_of", lambda address: None if address[-2:] == ".4" else "lo")
    with cluster_for(cluster.address, [A, WIDE]) as where:
        assert where.away == ("nodeb",)
    with pytest.raises(PoolMissing, match="cannot place 2 workers of pool 'd'"), cluster_for(cluster.address, [A, D]):
        pass


def ottava(*words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "ottava.cli", *words]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=300)


FLEET = """
name: two
pools: [{name: wide, workers: 4, nodes: 2}, {name: b}]
"""

TRAIN = """
import os, pathlib, sys
from ottava.link import connect

line = connect()
line.join(step=0)
line.step(1)
print(os.environ["RANK"], os.environ["OTTAVA_NODE"], file=(pathlib.Path(sys.argv[1]) / os.environ["RANK"]).open("w"))
line.bye(1)
"""


def test_a_command_runs_on_the_cluster_that_is_named(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "fleet.yaml").write_text(FLEET)
    (tmp_path / "train.py").write_text(TRAIN)
    words = ["--fleet", str(tmp_path / "fleet.yaml"), "--ray", cluster.address, "--json", "--", sys.executable]
    done = ottava("supervise", "--out", str(tmp_path / "run"), *words, str(tmp_path / "train.py"), str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ended"] == "finished"
    assert [(tmp_path / str(rank)).read_text().split()[1] for rank in range(4)] == ["nodea", "nodea", "nodeb", "nodeb"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["supervise", "--workers", "2", "--", "true"], "cannot place 2 workers of pool 'local': it has 0, 2 missing"),
        (["run", "recipes/tiny.yaml"], "cannot place 2 workers of pool 'ascend'"),
        (["drill", "recipes/tiny.yaml"], "a drill needs pool 'a' on 2 nodes of 2"),
    ],
)
def test_a_cluster_without_the_pools_is_refused(cluster: Cluster, tmp_path: Path, words: list[str], said: str) -> None:
    out = tmp_path / "run"
    done = ottava(words[0], "--ray", cluster.address, "--out", str(out), *words[1:])
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert not out.exists(), "nothing is written"


def test_an_address_where_no_cluster_is_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    done = ottava("supervise", "--ray", network(cluster) + ".2:1", "--out", str(tmp_path / "run"), "--", "true")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Ray cluster" in done.stderr
    assert not (tmp_path / "run").exists()


DRIVER = """
import sys, time
from pathlib import Path
from ottava.recipe import Pool
from ottava.supervisor.ray import RayLauncher
with RayLauncher(sys.argv[1]) as launcher:
    pool, logs = Pool(name="wide", workers=4), Path(sys.argv[2])
    places = launcher.rendezvous(pool, 4)
    group = [launcher.spawn("tests.test_agent:nap", {"seconds": 600}, pool=pool, logs=logs, env=env) for env in places]
    print(*(process.pid for process in group), flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
def test_workers_die_with_their_driver(cluster: Cluster, tmp_path: Path, number: signal.Signals) -> None:
    """On both nodes; a driver that hangs is as good as dead, by the agents' lease."""
    command = [sys.executable, "-c", DRIVER, cluster.address, str(tmp_path)]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None
        pids = [int(pid) for pid in driver.stdout.readline().split()]
        assert len(pids) == 4
        driver.send_signal(number)
        wait_until(lambda: not any(map(_running, pids)), "a worker outlived its driver")
    finally:
        driver.kill()
        _, told = driver.communicate()
    assert driver.returncode == -(signal.SIGTERM if number == signal.SIGTERM else signal.SIGKILL)
    assert "SIGTERM" not in told, "Ray has kept the signal handler"
