"""A pool that is broken on purpose must not qualify; the laptop's pools must."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from ottava.artifact import Artifact
from ottava.context import Context
from ottava.errors import LauncherGone, OttavaError, PlatformError, ResourceError
from ottava.journal import Journal
from ottava.planner import reach
from ottava.qualify import judges
from ottava.recipe import Fleet, Pool, load_fleet
from ottava.stages import qualify
from ottava.supervisor.local import LocalLauncher

LAPTOP = load_fleet(Path(__file__).parents[1] / "fleets" / "laptop.yaml")
PROBE = "ottava.platforms.probe:"


# --- workers that are broken; they run in the pool's processes ------------------------------------------------------


def lossy_matmul(args: Mapping[str, Any]) -> dict[str, Any]:
    """Worker 1 multiplies with the 8 significant bits of BF16."""
    import torch

    from ottava.platforms import probe

    def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a.bfloat16().float() @ b.bfloat16().float()) if a.dtype == torch.float32 else a @ b

    if os.environ["RANK"] == "1":
        torch.matmul = matmul
    return probe.matmul_error(args)


def lost_contribution(args: Mapping[str, Any]) -> dict[str, Any]:
    """Worker 1 sends one wrong element."""
    import torch
    import torch.distributed as dist

    from ottava.platforms import probe

    whole = dist.all_reduce

    def all_reduce(tensor: torch.Tensor) -> None:
        if os.environ["RANK"] == "1" and tensor.numel() > 1:
            tensor[-1] += 1
        whole(tensor)

    dist.all_reduce = all_reduce
    return probe.collectives(args)


def slow_link(args: Mapping[str, Any]) -> dict[str, Any]:
    """Every sum takes 0.2 s."""
    import torch
    import torch.distributed as dist

    from ottava.platforms import probe

    whole = dist.all_reduce

    def all_reduce(tensor: torch.Tensor) -> None:
        time.sleep(0.2 if tensor.numel() > 1 else 0.0)
        whole(tensor)

    dist.all_reduce = all_reduce
    return probe.collectives({**args, "sizes": [1 << 16], "repeats": 2})


def slow_worker(args: Mapping[str, Any]) -> dict[str, Any]:
    """Worker 1 is five times slower."""
    import torch

    from ottava.platforms import probe

    whole = torch.matmul

    def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        start = time.perf_counter()
        product = whole(a, b)
        until = start + 5 * (time.perf_counter() - start)
        while time.perf_counter() < until:
            pass
        return product

    if os.environ["RANK"] == "1":
        torch.matmul = matmul
    return probe.throughput(args)


def other_rounding(args: Mapping[str, Any]) -> dict[str, Any]:
    """Worker 1 was built with other kernels."""
    import torch

    from ottava.platforms import probe

    exp = torch.exp
    if os.environ["RANK"] == "1":
        torch.exp = lambda x: exp(x) * (1 + 2.0**-23)
    return probe.numerics_class(args)


def dead_worker(args: Mapping[str, Any]) -> dict[str, Any]:
    """Worker 1 dies inside a collective."""
    from ottava.platforms import probe

    with probe.group(probe.platforms.get("cpu")) as (rank, _):
        if rank == 1:
            os._exit(9)
        time.sleep(30)
    return {}


# --- the machinery --------------------------------------------------------------------------------------------------


class Sabotaged:
    """A launcher that runs `instead[target]` on the pools named in `only`."""

    def __init__(self, real: LocalLauncher, instead: Mapping[str, str] = {}, only: tuple[str, ...] = ()):
        self.real, self.instead, self.only = real, instead, only

    def call(self, target: str, args: Any, *, pool: Pool, workers: int, logs: Path) -> list[dict[str, Any]]:
        if pool.name in self.only:
            target = self.instead.get(target, target)
        return self.real.call(target, args, pool=pool, workers=workers, logs=logs)


@pytest.fixture(scope="module")
def launcher() -> Iterator[LocalLauncher]:
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in paths if path))
        with LocalLauncher() as started:
            yield started


def run_qualify(
    tmp_path: Path, launcher: Any, fleet: Fleet = LAPTOP, spec: qualify.Spec | None = None
) -> tuple[Artifact, dict[str, Any]]:
    folders = {"out": tmp_path / "out", "work": tmp_path / "work"}
    for folder in folders.values():
        folder.mkdir()
    ctx = Context(
        stage="qualify",
        seed=0,
        recipe_name="test",
        fleet=fleet,
        pool=fleet.pools[0],
        fallback=(),
        stages={},
        journal=Journal(tmp_path / "journal.jsonl"),
        launcher=launcher,
        destination=tmp_path / "qualify",
        meta={"stage": "qualify"},
        **folders,
    )
    made = qualify.run(spec or qualify.Spec(attempts=5), {}, ctx)
    return made, made.json("qualification.json")


def only(name: str) -> Fleet:
    return Fleet(name="one", pools=(LAPTOP.pool(name),))


# --- tests ----------------------------------------------------------------------------------------------------------


def test_the_laptop_pools_qualify(tmp_path: Path, launcher: LocalLauncher) -> None:
    made, report = run_qualify(tmp_path, launcher)
    assert made.manifest["verdict"] is True
    assert made.summary["passed"] == ["ascend", "nvidia"]
    assert made.summary["reasons"] == []
    assert "reason" not in made.summary
    for name, pool in made.summary["pools"].items():
        assert pool["passed"]
        assert len(pool["numerics_class"]) == 12
        assert 0 < pool["matmul_max_error"] < 1e-5
        assert pool["bandwidth_gb_s"] > 0.05
        assert pool["straggler_ratio"] >= 1
        assert pool["rehearsal"] == LAPTOP.pool(name).stands_for
        checks = report["pools"][name]["checks"]
        assert set(checks) == {"platform", "numerics_class", "matmul", "collectives", "resources", "straggler"}
        assert all(check["bound"] for check in checks.values())
        assert checks["collectives"]["value"] == pool["bandwidth_gb_s"]
    assert json.loads(json.dumps(report)) == report
    assert report["bounds"]["straggler_factor"] == 1.5
    sets = {pool["describe"]["instruction_set"] for pool in report["pools"].values()}
    classes = {pool["numerics_class"] for pool in made.summary["pools"].values()}
    assert len(sets) == len(classes) == (2 if made.summary["classes_differ"] else 1)


BROKEN = [
    ("matmul_error", "lossy_matmul", "matmul", "times its error bound"),
    ("collectives", "lost_contribution", "collectives", "wrong sums on workers"),
    ("collectives", "slow_link", "collectives", "GB/s, below"),
    ("collectives", "dead_worker", "collectives", "worker"),
    ("throughput", "slow_worker", "straggler", "worker 1 is"),
    ("numerics_class", "other_rounding", "numerics_class", "round differently"),
]


@pytest.mark.parametrize(("probe", "breakage", "check", "reason"), BROKEN, ids=[b[1] for b in BROKEN])
def test_a_broken_pool_is_caught_and_said(
    tmp_path: Path, launcher: LocalLauncher, probe: str, breakage: str, check: str, reason: str
) -> None:
    sabotaged = Sabotaged(launcher, {PROBE + probe: f"test_qualify:{breakage}"}, only=("nvidia",))
    spec = qualify.Spec(attempts=1, min_bandwidth_gb_s=0.002, straggler_factor=1.4)
    made, report = run_qualify(tmp_path, sabotaged, only("nvidia"), spec)
    pool = report["pools"]["nvidia"]
    assert not pool["checks"][check]["passed"]
    assert reason in pool["checks"][check]["reason"]
    assert made.manifest["verdict"] is False
    assert any(line.startswith(f"nvidia: {check}: ") for line in made.summary["reasons"])
    assert made.summary["reason"].startswith("no pool of the fleet 'one' qualifies: nvidia: ")
    assert reason in made.summary["reason"]


GOOD = {
    "presence": {"missing": None},
    "numerics_class": {"numerics_class": "ab" * 32, "describe": {"instruction_set": "AVX2"}},
    "matmul_error": {"ok": True, "max_ratio": 0.5, "max_error": 1e-7},
    "collectives": {"exact": True, "bandwidth_gb_s": 1.0},
    "resources": {"memory_used": 10**9, "memory_total": 10**10, "shared_memory": True},
    "throughput": {"gflops": 100.0, "together_gflops": 90.0},
}


class Scripted:
    """A launcher without processes: good answers, but for those in `bad`, by pool and probe; `accidents` come first."""

    def __init__(
        self,
        bad: Mapping[tuple[str, str], Mapping[str, Any]] = {},
        accidents: Mapping[str, list[OttavaError]] = {},
    ):
        self.bad, self.accidents = bad, accidents

    def call(self, target: str, args: Any, *, pool: Pool, workers: int, logs: Path) -> list[dict[str, Any]]:
        name = "presence" if target == reach.PRESENCE else target.removeprefix(PROBE)
        if self.accidents.get(name):
            raise self.accidents[name].pop(0)
        return [{**GOOD[name], **self.bad.get((pool.name, name), {}), "rank": rank} for rank in range(workers)]


def test_one_good_pool_is_enough(tmp_path: Path) -> None:
    made, _ = run_qualify(tmp_path, Scripted({("ascend", "matmul_error"): {"ok": False, "max_ratio": 3.0}}))
    assert made.manifest["verdict"] is True
    assert made.summary["passed"] == ["nvidia"]
    assert [reason.split(":")[:2] for reason in made.summary["reasons"]] == [["ascend", " matmul"]]


@pytest.mark.parametrize("probe", ["presence", "numerics_class", "collectives"])
def test_a_worker_that_died_is_asked_once_more(tmp_path: Path, probe: str) -> None:
    killed = PlatformError("a worker was killed by SIGKILL")
    for times, passed in ((1, True), (2, False)):
        folder = tmp_path / str(times)
        folder.mkdir()
        made, _ = run_qualify(folder, Scripted(accidents={probe: [killed] * times}), only("nvidia"))
        assert made.manifest["verdict"] is passed
        assert ("SIGKILL" in made.summary.get("reason", "")) is not passed


@pytest.mark.parametrize("error", [LauncherGone("gone"), ResourceError("disk full"), OttavaError("other")])
@pytest.mark.parametrize("probe", list(GOOD))
def test_what_is_not_a_pools_fault_is_no_verdict(tmp_path: Path, probe: str, error: OttavaError) -> None:
    for accidents in ([error], [PlatformError("a worker died"), error]):
        folder = tmp_path / str(len(accidents))
        folder.mkdir()
        with pytest.raises(type(error), match=error.what):
            run_qualify(folder, Scripted(accidents={probe: accidents}))
        assert not (folder / "qualify").exists()


def test_the_end_of_the_process_that_starts_workers_is_no_verdict(tmp_path: Path) -> None:
    with LocalLauncher() as launcher:
        assert launcher._zygote is not None
        launcher._zygote.kill()
        with pytest.raises(LauncherGone):
            run_qualify(tmp_path, launcher)
    assert not (tmp_path / "qualify").exists()


def test_a_fleet_of_missing_chips_does_not_qualify(tmp_path: Path, launcher: LocalLauncher) -> None:
    fleet = Fleet(name="far", pools=(Pool(name="far", platform="npu", workers=2),))
    made, report = run_qualify(tmp_path, launcher, fleet)
    if report["pools"]["far"]["passed"]:
        pytest.skip("this machine has NPUs")
    assert made.manifest["verdict"] is False
    assert all("cannot be used here" in reason for reason in made.summary["reasons"])
    assert "far: platform: the platform 'npu' cannot be used here" in made.summary["reason"]
    assert set(report["pools"]["far"]["checks"]) == {"platform"}
    assert made.summary["pools"]["far"]["numerics_class"] is None
    assert made.summary["classes_differ"] is False


# --- the judges, on their own ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alone", "together", "passed", "ratio"),
    [
        ([100, 100], [90, 90], True, 1.0),
        ([100, 60], [90, 90], True, 1.333),
        ([100, 40], [90, 90], False, 1.75),
        ([100, 100], [90, 30], False, 2.0),  # throttles only under load
        ([100, 100, 100, 60], [90, 90, 90, 90], False, 1.667),
        ([100], [90], True, 1.0),
    ],
)
def test_stragglers_are_judged_against_the_median(
    alone: list[float], together: list[float], passed: bool, ratio: float
) -> None:
    results = [
        {"rank": rank, "gflops": a, "together_gflops": t}
        for rank, (a, t) in enumerate(zip(alone, together, strict=True))
    ]
    check = judges.judge_speed(results, factor=1.5)
    assert (check.passed, check.value) == (passed, ratio)
    assert bool(check.reason) != passed


def test_a_straggler_is_slow_every_time(tmp_path: Path) -> None:
    """One slow measurement on a busy machine is measured again; the pool passes on the first clean one."""
    speeds = iter([20.0, 20.0, 95.0])

    class Busy(Scripted):
        def call(self, target: str, args: Any, *, pool: Pool, workers: int, logs: Path) -> list[dict[str, Any]]:
            if not target.endswith("throughput"):
                return super().call(target, args, pool=pool, workers=workers, logs=logs)
            return [{"rank": r, "gflops": g, "together_gflops": g} for r, g in enumerate((100.0, next(speeds)))]

    _, report = run_qualify(tmp_path, Busy(), only("nvidia"), qualify.Spec(attempts=3))
    assert report["pools"]["nvidia"]["checks"]["straggler"]["passed"]
    assert next(speeds, None) is None


@pytest.mark.parametrize(
    ("shared", "free_disk", "passed"), [(True, 2e9, False), (False, 2e9, True), (False, 0.5e9, False)]
)
def test_memory_and_disk_are_judged(shared: bool, free_disk: float, passed: bool) -> None:
    """0.7 GB are free: enough for each of two devices of their own, not for two workers that share it."""
    results = [{"memory_used": 300_000_000, "memory_total": 1_000_000_000, "shared_memory": shared}] * 2
    check = judges.judge_resources(results, free_disk, 0.5, 1.0)
    assert check.passed == passed
    assert ("GB" in check.reason) != passed


def test_a_full_disk_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    made, report = run_qualify(tmp_path, Scripted(), only("nvidia"))
    assert made.manifest["verdict"] is False
    assert "0.01 GB of disk are free" in report["pools"]["nvidia"]["checks"]["resources"]["reason"]
