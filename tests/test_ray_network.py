"""A cut network: a node in a network namespace of its own, whose link goes down in mid-run. Needs root and `ip netns`.

The one case in which a node's workers live on while nobody can reach them: only their lease can end them.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ottava import journal
from ottava.recipe import Pool
from ottava.supervisor.loop import supervise
from ottava.supervisor.ray import RayLauncher

from .test_ray import HERE, started_with, wait_until
from .test_supervisor import PLAIN, _running, make

pytestmark = pytest.mark.slow

NEAR, FAR, PORT = "10.77.11.1", "10.77.11.2", "6417"
NET = Pool(name="net", workers=2)


def shell(command: str) -> None:
    subprocess.run(command.split(), check=True, capture_output=True)


@pytest.fixture
def link() -> Iterator[tuple[str, str]]:
    """(this side's interface, the namespace of the other side)."""
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("needs root and the ip command")
    name = f"ottava{os.getpid() % 10**6}"
    try:
        shell(f"ip netns add {name}")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    try:
        shell(f"ip link add {name}a type veth peer name {name}b netns {name}")
        for at, interface, address in (("", f"{name}a", NEAR), (f"ip netns exec {name} ", f"{name}b", FAR)):
            shell(f"{at}ip addr add {address}/24 dev {interface}")
            shell(f"{at}ip link set {interface} up")
        shell(f"ip netns exec {name} ip link set lo up")
        yield f"{name}a", name
    finally:
        subprocess.run(["ip", "link", "del", f"{name}a"], check=False, capture_output=True)
        shell(f"ip netns del {name}")


@pytest.fixture
def address(link: tuple[str, str]) -> Iterator[str]:
    """A head with one chip of pool net and one of pool b on this side, and a node with one of pool net on the other."""
    pytest.importorskip("ray", reason="ray is not installed: pip install -e '.[ray]'")
    folders = [tempfile.mkdtemp(prefix="ray", dir="/tmp") for _ in range(2)]
    ray = [sys.executable, "-c", "import sys; from ray.scripts.scripts import main; sys.exit(main())"]
    small = ["--num-cpus=0", "--object-store-memory=80000000", "--disable-usage-stats"]

    def start(folder: str, *options: str, prefix: tuple[str, ...] = ()) -> None:
        setting = {"RAY_TMPDIR": folder, "RAY_AUTH_MODE": "disabled"}
        subprocess.run([*prefix, *ray, "start", *options, *small], check=True, env={**os.environ, **setting})

    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_AUTH_MODE", "disabled")
    try:
        start(
            folders[0], "--head", f"--port={PORT}", f"--node-ip-address={NEAR}", "--node-name=near",
            "--include-dashboard=false", '--resources={"ottava:net": 1, "ottava:b": 1}',
        )  # fmt: skip
        start(
            folders[1], f"--address={NEAR}:{PORT}", f"--node-ip-address={FAR}", "--node-name=far",
            '--resources={"ottava:net": 1}', prefix=("ip", "netns", "exec", link[1]),
        )  # fmt: skip
        yield f"{NEAR}:{PORT}"
    finally:
        patch.undo()
        for folder in folders:
            for pid in started_with(f"RAY_TMPDIR={folder}"):
                os.kill(pid, signal.SIGKILL)
            wait_until(lambda at=folder: not started_with(f"RAY_TMPDIR={at}"), "a process of the cluster is left")
            shutil.rmtree(folder, ignore_errors=True)


def test_a_cut_link_ends_the_workers_behind_it(
    address: str, link: tuple[str, str], dataset: Path, tmp_path: Path
) -> None:
    with RayLauncher(address, [NET, PLAIN[1]]) as launcher:
        results = launcher.call(HERE + "total", {}, pool=NET, workers=2, logs=tmp_path / "logs")
        assert [(r["OTTAVA_NODE"], r["MASTER_ADDR"], r["sum"]) for r in results] == [("far", FAR, 3), ("near", FAR, 3)]
        whole, _ = supervise(make(dataset, tmp_path / "whole", launcher, (NET,)))
        run = make(dataset, tmp_path / "cut", launcher, (NET, PLAIN[1]), restarts=0, hang_s=60.0)
        cut: list[int] = []

        def strike(step: int) -> None:
            joins = journal.fold(journal.read(run.journal.path)).joins
            if step >= 12 and not cut:
                cut.extend(join["pid"] for join in joins)
                shell(f"ip link set {link[0]} down")
            elif {join["pool"] for join in joins} == {"net", "b"}:
                assert not any(map(_running, cut)), "the run went on elsewhere before its old workers were dead"

        final, segments = supervise(replace(run, progress=strike))
        shell(f"ip link set {link[0]} up")
    assert len(cut) == 2
    assert [segment.pool for segment in segments] == ["net", "b"]
    assert final.digest == whole.digest


def test_a_head_that_dies_takes_its_workers_along(address: str, tmp_path: Path) -> None:
    """The driver beats on without the head, so its workers live, until Ray ends the driver (a minute by default)."""
    script = (
        "import sys, time; from pathlib import Path; from ottava.recipe import Pool\n"
        "from ottava.supervisor.ray import RayLauncher\n"
        "with RayLauncher(sys.argv[1]) as launcher:\n"
        "    net, logs = Pool(name='net', workers=2), Path(sys.argv[2])\n"
        "    group = [launcher.spawn('tests.test_agent:nap', {'seconds': 600}, pool=net, logs=logs, env=env)\n"
        "             for env in launcher.rendezvous(net, 2)]\n"
        "    print(*(process.pid for process in group), flush=True); time.sleep(600)\n"
    )
    fast: dict[str, Any] = {**os.environ, "RAY_gcs_rpc_server_reconnect_timeout_s": "5"}
    driver = subprocess.Popen(
        [sys.executable, "-c", script, address, str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=fast,
    )  # fmt: skip
    try:
        assert driver.stdout is not None
        pids = [int(pid) for pid in driver.stdout.readline().split()]
        (head,) = _named("gcs_server")
        os.kill(head, signal.SIGKILL)
        wait_until(lambda: driver.poll() is not None, "the driver outlived the cluster's head")
        wait_until(lambda: not any(map(_running, pids)), "a worker outlived its driver")
    finally:
        driver.kill()
        driver.wait()


def _named(part: str) -> list[int]:
    """The processes in whose command line there are `part` and this test's port."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if part.encode() in command and PORT.encode() in command:
            found.append(int(folder.name))
    return found
