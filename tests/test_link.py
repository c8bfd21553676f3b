"""The line between workers and their supervisor: who is heard, who must go, and what a stale worker can still do."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ottava import link
from ottava.link import Alone, LeaseLost, Link
from ottava.supervisor.hub import Hub

WORKER = """
import sys, time
from ottava import link
line = link.connect()
line.join(step=3)
print("joined", flush=True)
while not line.stopping:
    time.sleep(0.01)
line.bye(5)
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub(lease_s=1.0) as found:
        yield found


def start(environment: dict[str, str], rank: int = 0, code: str = WORKER) -> subprocess.Popen[str]:
    env = {**os.environ, **environment, "RANK": str(rank), "WORLD_SIZE": "2"}
    return subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)


def heard(hub: Hub, what: str, count: int = 1) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    deadline = time.monotonic() + 60
    while len(found) < count:
        assert time.monotonic() < deadline, f"nobody said {what}"
        found += [message for message in hub.hear(0.1) if message["say"] == what]
    return found


def test_join_go_stop_bye(hub: Hub) -> None:
    environment = hub.admit(4)
    workers = [start(environment, rank) for rank in range(2)]
    joins = heard(hub, "join", 2)
    assert {(join["rank"], join["epoch"], join["step"]) for join in joins} == {(0, 4, 3), (1, 4, 3)}
    assert all("token" not in join for join in joins)
    # one that was under way may still say what was before
    assert any(heard(hub, "beat")[-1]["phase"] == "join" for _ in range(10))
    assert all(worker.poll() is None for worker in workers)
    hub.tell("go")
    assert [worker.stdout.readline() for worker in workers if worker.stdout] == ["joined\n"] * 2
    hub.tell("stop")
    assert {bye["step"] for bye in heard(hub, "bye", 2)} == {5}
    assert [worker.wait(60) for worker in workers] == [0, 0]


def test_a_worker_ends_with_its_supervisor() -> None:
    with Hub() as hub:
        worker = start(hub.admit(1))
        heard(hub, "join")
    assert worker.wait(60) == link.EXIT_ALONE


def test_a_new_epoch_sends_the_old_one_away(hub: Hub) -> None:
    stale = start(hub.admit(1))
    heard(hub, "join")
    old = hub.admit(2)
    assert stale.wait(60) == link.EXIT_ALONE
    late = start({**old, link.EPOCH: "1"})  # it was started for epoch 1 and comes too late
    assert late.wait(60) == link.EXIT_ALONE
    assert hub.hear(0.0) == []


def test_who_has_not_the_token_is_not_heard(hub: Hub) -> None:
    environment = hub.admit(1)
    stranger = start({**environment, link.TOKEN: "guess"})
    assert stranger.wait(60) == link.EXIT_ALONE
    assert hub.hear(0.0) == []


@pytest.mark.parametrize("line", [b"GET / HTTP/1.1\r\n\r\n", b"\xff\xfe\n", b"[]\n", b'{"say":"hello"}\n', b"3\n"])
def test_noise_does_not_disturb(hub: Hub, line: bytes) -> None:
    environment = hub.admit(1)
    host, port = hub.address.split(":")
    with socket.create_connection((host, int(port)), timeout=30) as noise:
        noise.sendall(line)
        assert noise.recv(100) == b"", "it hangs up"
    worker = start(environment)
    heard(hub, "join")
    worker.kill()
    worker.wait()


def test_a_rank_cannot_speak_for_another(hub: Hub) -> None:
    environment = hub.admit(1)
    host, port = hub.address.split(":")
    with socket.create_connection((host, int(port)), timeout=30) as line:
        for said, rank in (("hello", 0), ("step", 1), ("step", 0)):
            message = {"say": said, "rank": rank, "epoch": 1, "token": environment[link.TOKEN], "step": 1}
            line.sendall(json.dumps(message).encode() + b"\n")
        (step,) = heard(hub, "step")
    assert step["rank"] == 0


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        ({"say": "step", "step": "seven"}, "step is 'seven' and must be a whole number"),
        ({"say": "step"}, "'step' without 'step'"),
        ({"say": "step", "step": True}, "step is True and must be a whole number"),
        ({"say": "step", "step": 1, "loss": "n/a"}, "loss is 'n/a' and must be a number"),
        ({"say": "step", "step": 1, "seconds": "x"}, "seconds is 'x' and must be a number"),
        ({"say": "beat", "step": 1}, "'beat' without 'phase'"),
        ({"say": "alarm", "step": 1, "message": "m"}, "'alarm' without 'kind'"),
        ({"say": "alarm", "kind": "nan", "step": 1, "message": "m", "ranks": [7]}, "7 is no rank of this group"),
        ({"say": "look", "step": 1, "ids": "x", "run": [], "baseline": []}, "ids is 'x' and must be a list"),
    ],
)
def test_a_line_that_is_no_message_is_an_error_of_its_rank(hub: Hub, said: dict[str, object], wrong: str) -> None:
    environment = hub.admit(1, 2)
    host, port = hub.address.split(":")
    with socket.create_connection((host, int(port)), timeout=30) as line:
        for message in ({"say": "hello", "token": environment[link.TOKEN]}, said):
            line.sendall(json.dumps({"rank": 1, "epoch": 1, **message}).encode() + b"\n")
        (alarm,) = heard(hub, "alarm")
        while line.recv(1 << 16):  # then the line is cut
            pass
    assert (alarm["kind"], alarm["rank"]) == ("error", 1)
    assert str(alarm["message"]).endswith(wrong)


def test_a_rank_beyond_the_group_is_not_admitted(hub: Hub) -> None:
    environment = hub.admit(1, 2)
    host, port = hub.address.split(":")
    with socket.create_connection((host, int(port)), timeout=30) as line:
        message = {"say": "hello", "rank": 2, "epoch": 1, "token": environment[link.TOKEN]}
        line.sendall(json.dumps(message).encode() + b"\n")
        assert json.loads(line.recv(1 << 16)) == {"do": "leave"}


def test_a_stopped_worker_has_lost_its_lease_when_it_wakes(tmp_path: Path) -> None:
    """The fence that needs no supervisor: nobody renews a lease in an epoch that is over, and the clock goes on.

    A worker may have been stopped between its check and its write, so one write may still come: no check of its own can
    forbid that one (the store refuses it by its epoch, tests/test_generations.py).
    """
    code = WORKER.replace("time.sleep(0.01)", "time.sleep(0.01); line.check(); open(sys.argv[1], 'a').write('x')")
    written = tmp_path / "written"
    with Hub(lease_s=0.6) as hub:
        env = {**os.environ, **hub.admit(1), "RANK": "0"}
        worker = subprocess.Popen([sys.executable, "-c", code, str(written)], env=env)
        heard(hub, "join")
        hub.tell("go")
        deadline = time.monotonic() + 60
        while not (written.exists() and written.stat().st_size > 3):
            assert time.monotonic() < deadline
        os.kill(worker.pid, signal.SIGSTOP)
        hub.admit(2)
        time.sleep(1.0)
        before = written.stat().st_size
        os.kill(worker.pid, signal.SIGCONT)
        assert worker.wait(60) != 0
        assert written.stat().st_size <= before + 1, "a stale worker wrote"


def test_without_a_supervisor_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(link.ADDRESS, raising=False)
    line = link.connect()
    assert isinstance(line, Alone)
    line.join(step=0)
    line.check()
    line.step(1, loss=2.0)
    line.bye(1)
    assert not line.stopping


def test_check_tells_of_a_lost_lease(hub: Hub) -> None:
    environment = hub.admit(1)
    host, port = environment[link.ADDRESS].split(":")
    line = Link((host, int(port)), environment[link.TOKEN], 0, 1, 30.0)
    line.check()
    line._until = time.monotonic() - 1
    with pytest.raises(LeaseLost):
        line.check()
    line.bye(0)
