"""What the Ray launcher rests on, without Ray: an agent with its lease, and where ranks go."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ottava.cluster import interface_of
from ottava.errors import DataError, LauncherGone, PlatformError, ResourceError
from ottava.supervisor import agent as module
from ottava.supervisor.agent import Agent
from ottava.supervisor.cluster import seat, spread
from ottava.supervisor.local import answer
from ottava.supervisor.ray import RayLauncher


@given(st.lists(st.sampled_from("xyz"), min_size=1, max_size=12), st.data())
def test_ranks_are_contiguous_and_chips_are_shared_evenly(slots: list[str], data: st.DataObject) -> None:
    busy = {name: data.draw(st.integers(0, slots.count(name))) for name in set(slots)}
    workers = data.draw(st.integers(1, 20))
    nodes = spread(slots, busy, workers)
    assert len(nodes) == workers
    assert nodes == sorted(nodes)
    free = {name: slots.count(name) - busy[name] for name in busy}
    if workers <= sum(free.values()):
        assert all(nodes.count(name) <= free[name] for name in busy)
    elif workers <= len(slots):
        assert all(nodes.count(name) <= slots.count(name) for name in busy)
    else:  # each chip has workers / chips of them, rounded up or down
        least, most = workers // len(slots), -(-workers // len(slots))
        assert all(least * slots.count(name) <= nodes.count(name) <= most * slots.count(name) for name in busy)


@given(st.lists(st.sampled_from("xyz"), min_size=4, max_size=8), st.data())
def test_a_chip_keeps_its_seat(slots: list[str], data: st.DataObject) -> None:
    chips = list(range(len(slots)))
    seats = seat({}, slots, chips)
    assert sorted(seats.values()) == sorted(slots)
    assert list(seats.values()) == sorted(slots), "contiguous on a node"
    some = data.draw(st.lists(st.sampled_from(chips), min_size=1, unique=True))
    assert seat(seats, slots, some) == seats
    dead = data.draw(st.sampled_from(slots))
    left = [node for node in slots if node != dead]
    spare = data.draw(st.lists(st.just("new"), max_size=len(slots)))
    after = seat(seats, left + spare, some)
    assert all(after[chip] == node for chip, node in seats.items() if node != dead)
    moved = [chip for chip in some if seats[chip] == dead]
    assert sum(chip in after for chip in moved) == min(len(moved), len(spare))


def test_interface_of() -> None:
    assert interface_of("127.0.0.3") == "lo"
    assert interface_of("203.0.113.77") is None  # reserved for documentation: nobody has it


def test_without_ray_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PlatformError, match="ray is not installed") as error, RayLauncher():
        pass
    assert error.value.fix == "pip install -e '.[ray]'"


def nap(args: dict[str, Any]) -> dict[str, Any]:
    """For processes that are started by name."""
    time.sleep(args["seconds"])
    return {"node": os.environ.get("OTTAVA_NODE"), "pid": os.getpid()}


# ---------------------------------------------------------------- the agent


class Server:
    """A process server without processes: they end when they are told to, or by a signal."""

    def __init__(self) -> None:
        self.statuses: dict[int, int] = {}
        self.pids = itertools.count(1)
        self.refusal: Exception | None = None

    def warm(self) -> None:
        pass

    def spawn(self, target: str, args: dict[str, Any], *, pool: Any, logs: Path, env: dict[str, str]) -> Any:
        if self.refusal is not None:
            raise self.refusal
        return SimpleNamespace(pid=next(self.pids), log=logs / "log", result=lambda: self.outcome(target))

    def outcome(self, target: str) -> dict[str, Any]:
        if target == "refuse":
            raise DataError("bad", where="there", fix="mend it")
        return {"value": 4}

    def status(self, pid: int) -> int | None:
        return self.statuses.get(pid)

    def signal(self, pid: int, number: int) -> None:
        self.statuses[pid] = -number


class Clock:
    """The agent's time stands still until it is moved."""

    now, sleep = 100.0, staticmethod(time.sleep)

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


LEASE = 3.0


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def agent(clock: Clock, server: Server) -> Iterator[Agent]:
    setup = {"node": "n", "address": "127.0.0.1", "folder": ".", "path": [], "lease_s": LEASE}
    made = Agent(json.dumps(setup), server)  # type: ignore[arg-type]
    yield made
    made._gone = True  # ends its thread


def start(agent: Agent, number: int, target: str = "double") -> dict[str, Any]:
    request = {"target": target, "args": {}, "env": {}, "pool": None, "logs": "/logs", "marker": "/dev/null"}
    told: dict[str, Any] = json.loads(agent.start(number, json.dumps(request)))
    return told


def ended(agent: Agent, seen: int) -> list[dict[str, Any]]:
    """What has ended: one beat, which waits for news for a while. Moves the lease on."""
    told: list[dict[str, Any]] = json.loads(agent.beat(seen))["ended"]
    return told


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_ends_are_told_once_and_in_order(agent: Agent, server: Server) -> None:
    assert start(agent, 7) == {"pid": 1, "log": "/logs/log", "shared": True}
    start(agent, 8, "refuse")
    server.statuses[2] = 2
    (first,) = ended(agent, 0)
    assert (first["number"], first["status"]) == (8, 2)
    with pytest.raises(DataError, match="bad"):
        answer(first["outcome"])
    agent.signal(8, signal.SIGKILL)  # it has ended: its number may be a stranger's now
    assert server.statuses == {2: 2}
    assert ended(agent, 1) == []
    server.statuses[1] = 0
    wait_until(lambda: len(agent._ended) == 2)
    assert ended(agent, 1) == [{"number": 7, "status": 0, "outcome": {"result": {"value": 4}}}]
    assert ended(agent, 0) == [first, *ended(agent, 1)]


def test_workers_outlive_no_lease(agent: Agent, server: Server, clock: Clock) -> None:
    start(agent, 0)
    for _ in range(5):  # five beats in time: each proves that the answer before it has arrived
        agent.beat(0)
        clock.now += 0.9 * LEASE
        agent.beat(0)
    time.sleep(10 * module.LOOK_S)
    assert server.statuses == {}
    clock.now += 1.1 * LEASE
    wait_until(lambda: server.statuses == {1: -signal.SIGKILL})


def test_a_beat_that_was_long_on_its_way_renews_nothing(agent: Agent, server: Server, clock: Clock) -> None:
    """It was sent right after the last answer and says that the supervisor lived then, not that it lives now."""
    start(agent, 0)
    agent.beat(0)
    clock.now += 0.9 * LEASE
    agent.beat(0)
    clock.now += 0.2 * LEASE
    wait_until(lambda: server.statuses == {1: -signal.SIGKILL})


@pytest.mark.parametrize(
    ("refusal", "kind", "gone"),
    [
        (NotADirectoryError(20, "Not a directory", "/logs"), ResourceError, False),
        (TypeError("a bug"), PlatformError, False),
        (LauncherGone("the process that starts workers is gone"), LauncherGone, True),
    ],
)
def test_a_worker_that_cannot_start_has_ended(
    agent: Agent, server: Server, refusal: Exception, kind: type[Exception], gone: bool
) -> None:
    server.refusal = refusal
    assert start(agent, 0)["pid"] == 0
    told = json.loads(agent.beat(0))
    assert told["gone"] == gone
    with pytest.raises(kind):
        answer(told["ended"][0]["outcome"])
