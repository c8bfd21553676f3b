"""Backends on a cluster of three nodes on one machine: their tokens, and deaths of all kinds.

Needs `pip install -e '.[ray]'`. Each node has a loopback address of its own, so that all of it but a network's own
faults is real.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from ottava.engine.session import Sampling
from ottava.errors import DataError, PlatformError, Verdict
from ottava.gateway.child import Child, Patience, Place
from ottava.gateway.parity import Parity
from ottava.gateway.pool import Pool
from ottava.gateway.ray import RayLauncher
from ottava.gateway.server import serve
from ottava.models.chat import Chat
from ottava.supervisor.launch import Cluster, started

from .test_engine import END, ETHINK, random_model, write_folder
from .test_failover import all_ready, items, kill, moves, tokens, undisturbed
from .test_gateway import URL, USER
from .test_ray import started_with, wait_until

pytestmark = pytest.mark.slow

NODES = {"left": {"ottava:serve": 2, "ottava:left": 1}, "right": {"ottava:serve": 2}}
ONE = {"ottava:serve": 1.0}
PATIENCE = Patience(every=0.2, hung=5.0, still=60.0)
HOW = Sampling(200, temperature=1.0, seed=5)
LONG = 400  # tokens: whoever is killed at the first is killed in the middle


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that never ends by itself."""
    return write_folder(tmp_path_factory.mktemp("served") / "model", random_model(quiet=[0, END, 2, 3, 4, ETHINK]))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head and two nodes on each of which both backends fit; afterwards nothing of it may be left."""
    pytest.importorskip("ray", reason="ray is not installed: pip install -e '.[ray]'")
    with started(NODES) as made:
        yield made
    wait_until(lambda: not started_with(f"RAY_TMPDIR={made.folder}"), "a process of the cluster is left")


@asynccontextmanager
async def placed(cluster: Cluster, folder: Path, names: str = "ab", **more: Any) -> AsyncIterator[Pool]:
    check = Parity(folder, threads=1)
    launcher = RayLauncher(cluster.address, dict.fromkeys(names, ONE), more.pop("digest", check.digest))
    found = [Place(name, folder) for name in names]
    pool = Pool(found, threads=1, patience=PATIENCE, launcher=launcher, **{"check": check, **more})
    try:
        await pool.start()
        yield pool
    finally:
        await pool.stop()
        await check.close()


def backends(cluster: Cluster) -> list[int]:
    """The living backend processes that were placed by the cluster."""
    found = []
    for pid in started_with(f"RAY_TMPDIR={cluster.folder}"):
        try:
            found += [pid] * (b"ottava.gateway.backend" in Path(f"/proc/{pid}/cmdline").read_bytes())
        except OSError:
            continue
    return found


def test_tokens_are_those_of_an_engine_here_and_the_key_is_nowhere_to_be_read(cluster: Cluster, folder: Path) -> None:
    ids = Chat.load(folder).render(USER, True)

    async def main() -> None:
        async with placed(cluster, folder) as pool:
            await all_ready(pool)
            assert {child.node for child in pool.children} == {"left", "right"}
            wanted = undisturbed(folder, ids, HOW)
            for busy in pool.children:  # each of the two
                busy.busy = busy.slots
                found = await items(pool, ids, HOW)
                busy.busy = 0
                assert tokens(found) == wanted
            for child in pool.children:
                address = child._address
                assert address is not None
                assert address.host.startswith("127.")
                assert len(address.key) > 30
                for pid in started_with(f"RAY_TMPDIR={cluster.folder}"):
                    for name in ("cmdline", "environ"):
                        assert address.key.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()
                async with httpx.AsyncClient(trust_env=False) as client:
                    where = f"http://{address.host}:{address.port}/"
                    said = await client.post(where, json={"op": "health"}, headers={"authorization": "Bearer x"})
                    assert said.status_code == 401
                    hers = {"authorization": f"Bearer {address.key}"}
                    said = await client.post(where, content=b'{"op": "health"}\n', headers=hers)
                    assert "still" in said.json()
            keys = {child._address.key for child in pool.children if child._address}
            assert len(keys) == 2
        assert not backends(cluster)

    asyncio.run(main())


def keeper(child: Child) -> int:
    """The process of Ray in which a backend's keeper is."""
    return int(re.search(r"PPid:\s*(\d+)", Path(f"/proc/{child.pid}/status").read_text())[1])  # type: ignore[index]


DEATHS: dict[str, Callable[[Child], None]] = {
    "backend": kill,
    "backend stopped": lambda child: kill(child, signal.SIGSTOP),
    "keeper": lambda child: os.kill(keeper(child), signal.SIGKILL),
    "keeper stopped with its backend": lambda child: (
        os.kill(keeper(child), signal.SIGSTOP), kill(child, signal.SIGSTOP), None
    )[2],
}  # fmt: skip


@pytest.mark.parametrize("death", DEATHS)
def test_whatever_dies_in_mid_stream_the_stream_is_the_undisturbed_one(
    death: str, cluster: Cluster, folder: Path
) -> None:
    ids = Chat.load(folder).render(USER, True)
    stopped: list[int] = []

    def strike(child: Child) -> None:
        stopped.extend([keeper(child)] if "keeper stopped" in death else [])
        DEATHS[death](child)

    async def main() -> None:
        async with placed(cluster, folder) as pool:
            await all_ready(pool)
            found = await items(pool, ids, HOW, {40: strike})
            assert tokens(found) == undisturbed(folder, ids, HOW)
            assert len(moves(found)) == 2
            assert pool.failovers == 1
            await all_ready(pool)
            assert sorted(child.starts for child in pool.children) == [1, 2]
            assert tokens(await items(pool, ids, HOW)) == tokens(found)

    try:
        asyncio.run(main())
    finally:
        for pid in stopped:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
    wait_until(lambda: not backends(cluster), "a backend is left")


def test_a_whole_node_goes_and_its_backend_comes_back_on_another(folder: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed: pip install -e '.[ray]'")
    ids = Chat.load(folder).render(USER, True)
    with started({}) as cluster:
        nodes = {name: cluster.add(name, {"ottava:serve": 2}) for name in ("left", "right")}

        async def main() -> None:
            async with placed(cluster, folder) as pool:
                await all_ready(pool)
                import ray

                gone, mine = [], ray.get_runtime_context().get_node_id()
                here = [node["NodeName"] for node in ray.nodes() if node["NodeID"] == mine]
                for child in pool.children:  # Ray's test cluster does not let go of the node that this process is at
                    child.busy = child.slots if child.node in here else 0

                def power(child: Child) -> None:
                    for one in pool.children:
                        one.busy = one.busy if one is child else 0
                    gone.append((child, child.node, child.pid))
                    kill(child, signal.SIGSTOP)  # with the power the next token goes
                    cluster.kill(nodes[child.node])

                found = await items(pool, ids, HOW, {40: power})
                assert tokens(found) == undisturbed(folder, ids, HOW)
                assert pool.failovers == 1
                [(child, node, pid)] = gone
                await asyncio.to_thread(
                    wait_until, lambda: not Path(f"/proc/{pid}").exists(), "a backend has outlived its node"
                )
                async with asyncio.timeout(240):
                    while child.state != "ready" or child.starts == 1:
                        await asyncio.sleep(0.1)
                assert {one.node for one in pool.children} == {"left", "right"} - {node}
                assert tokens(await items(pool, ids, HOW)) == tokens(found)

        asyncio.run(main())
        wait_until(lambda: not backends(cluster), "a backend is left")


def test_a_node_whose_folder_has_other_values_is_refused(cluster: Cluster, folder: Path) -> None:
    async def other(_: Path) -> str:
        return "0" * 64

    async def main() -> None:
        async with placed(cluster, folder, "a", digest=other):
            raise AssertionError("it serves other values")

    with pytest.raises(Verdict, match=r"a: refused: on node (left|right): its folder .* holds other values: digest"):
        asyncio.run(main())
    wait_until(lambda: not backends(cluster), "a backend is left")


def test_a_cluster_without_room_is_refused(cluster: Cluster, folder: Path) -> None:
    with pytest.raises(PlatformError) as found:
        RayLauncher(cluster.address, {"a": {"ottava:left": 1.0}, "b": {"ottava:left": 1.0}}, Parity(folder).digest, 2.0)
    said = found.value.render()
    assert "no room for 2 backends of ottava:left=1 each" in said
    assert "left has ottava:left=1" in said
    assert "right has ottava:left=0" in said


def command(cluster: Cluster, folder: Path, *more: str) -> list[str]:
    where = ["--ray", cluster.address, "--port", "0", "--replicas", "2"]
    return [sys.executable, "-m", "ottava.cli", "serve", str(folder), *where, *more]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--ray-resources", "GPU=8"], "no room for 2 backends of GPU=8 each"),
        (["--ray-resources", "GPU"], "these are no resources: 'GPU'"),
        (["--ray-resources", "GPU=1", "--ray-resources", "GPU=1"], "2 times resources and 1 folders"),
        (["--ray", "nowhere"], "'nowhere' names no Ray cluster"),
        (["--ray", "local", "--ray-resources", "GPU=1"], "the nodes of a rehearsal have none of GPU=1"),
    ],
)
def test_what_cannot_be_is_said_in_one_message(cluster: Cluster, folder: Path, more: list[str], said: str) -> None:
    found = subprocess.run(command(cluster, folder, *more), capture_output=True, text=True, timeout=200, check=False)
    assert found.returncode == 2
    assert said in found.stderr
    assert "Traceback" not in found.stderr
    assert found.stdout == ""


def test_resources_without_a_cluster_are_refused(folder: Path) -> None:
    for more in ({}, {"replicas": 2}):
        with pytest.raises(DataError, match="no Ray cluster is to be used"):
            serve({"model": str(folder), "ray_resources": ["GPU=1"], **more})


@contextmanager
def serving(cluster: Cluster, folder: Path, log: Path) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """A gateway in a process of its own with two backends, and a client of it."""
    with log.open("w") as err:
        asked = command(cluster, folder, "--ray-resources", "ottava:serve=1")
        gateway = subprocess.Popen(asked, stdout=subprocess.DEVNULL, stderr=err, text=True)
        try:
            end = time.monotonic() + 240  # two backends are loaded and certified
            while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
                assert time.monotonic() < end, log.read_text()
                assert gateway.poll() is None, log.read_text()
                time.sleep(0.2)
            with httpx.Client(base_url=found[0], trust_env=False, timeout=120) as client:
                wait_until(lambda: client.get("/metrics").text.count("ottava_backend_ready{") == 2, "no two backends")
                assert len(backends(cluster)) == 2
                yield gateway, client
        finally:
            gateway.kill()
            gateway.wait()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_the_gateway(cluster: Cluster, folder: Path, tmp_path: Path, number: signal.Signals) -> None:
    body = {"messages": USER, "max_tokens": LONG, "stream": True, "stream_options": {"include_usage": True}}
    with serving(cluster, folder, tmp_path / "err") as (gateway, client):
        with client.stream("POST", URL, json=body) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("data: ")
            gateway.send_signal(number)
            if number == signal.SIGKILL:
                with pytest.raises(httpx.HTTPError):
                    list(lines)
            else:
                *_, last, done = [line for line in lines if line.startswith("data: ")]
                assert done == "data: [DONE]"
                assert json.loads(last.removeprefix("data: "))["usage"]["completion_tokens"] == LONG
        wait_until(lambda: not backends(cluster), "a backend outlived its gateway")
        assert gateway.wait(60) == (-number if number == signal.SIGKILL else 0)
