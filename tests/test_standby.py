"""Workers that waited with their device open: the platform of cores stands in for one that cannot be forked."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ottava.errors import PlatformError
from ottava.platforms.cpu import OTHER_KERNELS, Cpu
from ottava.recipe import Pool
from ottava.supervisor.local import LocalLauncher
from ottava.supervisor.loop import supervise
from ottava.trainer.supervised import Fault

from .test_supervisor import PLAIN, make

ABOUT = "tests.test_standby:about"
POOL = Pool(name="a", platform="cpu", workers=2, env=OTHER_KERNELS)


def about(args: Any) -> dict[str, Any]:
    """What a worker is: its number, when it was started, what decides its bits, and its rank."""
    import torch

    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return {
        "pid": os.getpid(),
        "started": started,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "rank": os.environ["RANK"],
        "value": args["value"],
    }


def killed(args: Any) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


@pytest.fixture
def standbys(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalLauncher]:
    monkeypatch.setattr(Cpu, "forks", False)
    with LocalLauncher() as found:
        yield found


def waiting(launcher: LocalLauncher) -> set[int]:
    """The processes that wait: the zygote's children that are no workers, between two calls."""
    assert launcher._zygote is not None
    zygote = launcher._zygote.pid
    return set(map(int, Path(f"/proc/{zygote}/task/{zygote}/children").read_text().split()))


@pytest.mark.slow
def test_a_second_group_was_there_before_it_was_asked_for(standbys: LocalLauncher, tmp_path: Path) -> None:
    first = standbys.call(ABOUT, {"value": 1}, pool=POOL, workers=2, logs=tmp_path)
    ready, asked = waiting(standbys), time.clock_gettime(time.CLOCK_BOOTTIME)
    second = standbys.call(ABOUT, {"value": 2}, pool=POOL, workers=2, logs=tmp_path)
    assert len(ready) == 2
    assert {worker["pid"] for worker in second} == ready
    assert all(worker["started"] <= asked for worker in second)
    assert [worker["rank"] for worker in first + second] == ["0", "1"] * 2
    assert [worker["value"] for worker in first + second] == [1, 1, 2, 2]
    assert {worker["threads"] for worker in first + second} == {1}


@pytest.mark.slow
def test_each_environment_has_standbys_of_its_own(standbys: LocalLauncher, tmp_path: Path) -> None:
    """What decides bits is read when a process starts to compute: a standby of another pool would compute others."""
    plain = POOL.model_copy(update={"name": "b", "env": {"ATEN_CPU_CAPABILITY": "default"}})
    found = [
        standbys.call(ABOUT, {"value": 0}, pool=pool, logs=tmp_path)[0]["capability"]
        for pool in (POOL, plain, POOL, plain)
    ]
    assert found == ["AVX2", "DEFAULT", "AVX2", "DEFAULT"]


@pytest.mark.slow
def test_dead_standbys_are_replaced(standbys: LocalLauncher, tmp_path: Path) -> None:
    with pytest.raises(PlatformError, match="killed by SIGKILL"):
        standbys.call("tests.test_standby:killed", {}, pool=POOL, workers=2, logs=tmp_path)
    for pid in waiting(standbys):
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while waiting(standbys):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert standbys.call(ABOUT, {"value": 3}, pool=POOL, logs=tmp_path)[0]["value"] == 3


def test_standbys_end_with_their_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Cpu, "forks", False)
    with LocalLauncher() as launcher:
        launcher.call(ABOUT, {"value": 1}, pool=POOL, workers=2, logs=tmp_path)
        left = waiting(launcher)
        assert left
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in left):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_run_on_standbys_ends_in_the_bytes_of_a_run_on_forks(
    standbys: LocalLauncher, launcher: Any, dataset: Path, tmp_path: Path
) -> None:
    undisturbed, _ = supervise(make(dataset, tmp_path / "u", launcher, PLAIN, steps=12))
    run = make(dataset, tmp_path / "s", standbys, PLAIN, steps=12, restarts=1)
    final, segments = supervise(run, [Fault(pool="a", at_step=5, rank=1, kind="sigkill")])
    assert (segments[0].failures, segments[0].lost) == (1, 0)
    assert final.digest == undisturbed.digest


def test_a_worker_sees_its_own_chip_alone() -> None:
    """A chip that the run has left is nobody's: its number is passed over."""
    launcher = LocalLauncher()
    pool = Pool(name="g", platform="cuda", workers=4)
    places = launcher.rendezvous(pool, 2, [1, 3])
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places] == ["1", "3"]
    assert [place["LOCAL_RANK"] for place in places] == ["0", "1"]
    assert not any("VISIBLE" in name for name in launcher.rendezvous(POOL, 1)[0])
