"""`ottava qualify`: whoever is bad is named, whoever is only unlucky is not."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import binom, gamma, poisson

from ottava import cli
from ottava.errors import OttavaError, RecipeError
from ottava.qualify import command, judges, measure, plants, verdict
from ottava.qualify.bets import MOST, Bets
from ottava.qualify.completion import Run, allowed, completes, rate
from ottava.qualify.gate import Failure, Found, Terms, _exchanges, accusing, examine
from ottava.recipe import Pool, load_recipe
from ottava.supervisor.local import LocalLauncher
from ottava.trainer import reduce

ROOT = Path(__file__).parents[1]


# --- who is slower than the others ----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(2, 8))
def test_the_chance_of_the_coin_is_that_of_all_orders(count: int) -> None:
    """By enumeration: of all orders of `count` times, in how many is the first above the lower median of the others."""
    orders = list(itertools.permutations(range(1, count + 1)))
    above = sum(order[0] > sorted(order[1:])[(count - 2) // 2] for order in orders)
    assert Bets(count, 1.0, 0.01).chance == pytest.approx(above / len(orders))


def played(draw: random.Random, count: int, alpha: float, slow: float = 1.0, unit: int = 0) -> Bets:
    """Rounds of a machine on which everything is now and then many times slower, one round as another."""
    bets = Bets(count, 1.0, alpha)
    while not bets.done:
        load = draw.lognormvariate(0, 1)
        times = [load * draw.lognormvariate(0, 0.3) * (10 if draw.random() < 0.1 else 1) for _ in range(count)]
        times[unit] *= slow
        bets.add(times)
    return bets


@pytest.mark.parametrize("count", [2, 3, 4, 12])
def test_alike_are_accused_no_more_often_than_stated(count: int) -> None:
    """With no margin at all (factor 1), where the bound is closest: more than binomial chance allows is a defect."""
    draw, runs, alpha = random.Random(count), 400, 0.05
    alarms = sum(bool(played(draw, count, alpha).accused) for _ in range(runs))
    assert alarms <= binom.ppf(1 - 1e-6, runs, alpha)


@pytest.mark.parametrize("count", [2, 3, 4, 12])
def test_a_slow_one_is_found_and_no_other(count: int) -> None:
    for seed in range(20):
        unit = seed % count
        bets = played(random.Random(seed), count, 1e-3, slow=3.0, unit=unit)
        assert bets.accused == (unit,)
        assert bets.ratio(unit) > 1.5
        assert len(bets.rounds) <= MOST


def test_one_alone_is_compared_with_nobody() -> None:
    bets = played(random.Random(0), 1, 1e-3, slow=100.0)
    assert (bets.accused, bets.ratio(0)) == ((), 1.0)


# --- links ----------------------------------------------------------------------------------------------------------

edges = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)).filter(lambda e: e[0] != e[1]), unique=True)


@given(edges)
def test_a_cover_is_on_every_link_and_names_nobody_in_vain(links: list[tuple[int, int]]) -> None:
    named = verdict.cover(links)
    assert all(a in named or b in named for a, b in links)
    fewest = next(n for n in range(6) if any(
        all(a in some or b in some for a, b in links) for some in itertools.combinations(range(5), n)
    ))  # fmt: skip
    assert fewest <= len(named) <= 2 * max(1, fewest)
    assert len(set(named)) == len(named)


@pytest.mark.parametrize("workers", [2, 3, 4, 8])
def test_a_worker_whose_sending_is_slow_is_named_alone(workers: int) -> None:
    for chip in range(workers):
        assert verdict.cover([(chip, other) for other in range(workers) if other != chip]) == [chip]


# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("length", [100, 5000, 1 << 20, 5 << 20])
def test_the_messages_are_those_that_the_tree_sends(world: int, length: int) -> None:
    """Against the very generator that the trainer's exchange is driven by."""
    import torch

    stripe = min(length, reduce.STRIPE)
    doubles = length <= reduce.SMALL // (world // 2) ** 2
    value, room = torch.zeros(stripe), torch.zeros(stripe)
    rounds = (reduce.doubling if doubles else reduce.halving)(value, 0, world, room)
    sent = [4 * swap.outgoing.numel() for swap in rounds][: world.bit_length() - 1]
    said = measure.messages(length, world)
    tree = [size for name, size in said.items() if name.startswith("tree")]
    assert said["gradient"] == 4 * length
    assert sent == (tree * len(sent) if doubles else tree)


# --- will it get through --------------------------------------------------------------------------------------------


@given(st.integers(0, 20), st.floats(1.0, 1e6))
def test_the_interval_of_a_rate_is_exact(failures: int, exposure: float) -> None:
    found = rate(failures, exposure)
    assert poisson.cdf(failures, found.high * exposure) == pytest.approx(0.1)
    if failures:
        assert poisson.sf(failures - 1, found.low * exposure) == pytest.approx(0.1)
    else:
        assert found.low == 0.0


@given(st.integers(0, 5), st.floats(10.0, 1e5), st.integers(0, 4), st.floats(10.0, 1e5))
def test_the_probability_is_the_mean_over_all_rates(failures: int, exposure: float, restarts: int, work: float) -> None:
    """Against numerical integration over the rate."""
    run, found = Run(work, 4, restart_s=5.0, restarts=restarts), rate(failures, exposure)
    said = completes(run, found)
    posterior = gamma(failures + 0.5, scale=1 / exposure)

    def at(share: float) -> float:
        return float(poisson.cdf(restarts, posterior.ppf(share) * said["exposure_s"]))

    assert said["estimate"] == pytest.approx(quad(at, 0, 1, limit=500)[0], abs=1e-3)
    assert 0 <= said["low"] <= said["high"] <= 1


def test_what_a_run_survives() -> None:
    run = Run(3600, 8, checkpoint_s=10, interval_s=600, restart_s=60, restarts=9)
    assert run.fault_free_s == 3660
    assert run.loss_s == 360
    for deadline, most in ((None, 9), (3659, -1), (3660, 0), (3660 + 2 * 360, 2), (1e9, 9)):
        its = Run(**{**vars(run), "deadline_s": deadline})
        assert allowed(its) == most
    assert completes(Run(**{**vars(run), "deadline_s": 100.0}), rate(0, 1e9))["estimate"] == 0.0
    assert completes(run, rate(0, 1e9))["estimate"] > 0.999


# --- the verdict on what was found ----------------------------------------------------------------------------------


def numbers(**changed: Any) -> dict[str, Any]:
    good = {
        "class": "a" * 64, "again": "a" * 64, "fp8_exact": True, "fp8_product": 0.1,
        "matmul": {"ok": True, "max_ratio": 0.5, "max_error": 1e-7},
        "resources": {"memory_used": 0, "memory_total": 10**11, "shared_memory": True},
    }  # fmt: skip
    return {**good, **changed}


def named(found: Found) -> list[tuple[int | None, str]]:
    return [(f.chip, f.check) for f in verdict.findings(found, verdict.Limits(), 1e12)]


def of_numbers(*data: dict[str, Any]) -> Found:
    return Found(tuple(range(len(data))), {"numbers": dict(enumerate(data))})


def test_numbers_are_judged() -> None:
    odd = numbers(**{"class": "b" * 64, "again": "b" * 64})
    assert named(of_numbers(numbers(), numbers())) == []
    assert named(of_numbers(numbers(), odd, numbers())) == [(1, "numerics class")]
    assert named(of_numbers(numbers(), odd)) == [(0, "numerics class"), (1, "numerics class")]
    lossy = {**odd, "matmul": {"ok": False, "max_ratio": 9.0, "max_error": 1.0}}
    assert named(of_numbers(numbers(), lossy)) == [(1, "numerics")]
    assert named(of_numbers(numbers(), numbers(again="c" * 64))) == [(1, "repeatability")]
    assert named(of_numbers(numbers(fp8_exact=False), numbers(fp8_product=1.5))) == [(0, "fp8"), (1, "fp8")]
    poor = {"memory_used": 9, "memory_total": 10, "shared_memory": True}
    assert named(of_numbers(numbers(resources=poor), numbers())) == [(None, "resources")]


def speeds(accused: list[int], workers: int = 2) -> dict[int, dict[str, Any]]:
    return {chip: {"float32": {"accused": accused, "ratio": 2.0, "rate": 1e9}} for chip in range(workers)}


def test_only_who_is_slow_both_times_is_accused() -> None:
    for again, expected in (([1], [(1, "straggler")]), ([0], []), ([], [])):
        found = Found((0, 1), {"speed": speeds([1])}, again={"speed": speeds(again)})
        assert named(found) == expected
    assert accusing(speeds([1]))
    assert not accusing(speeds([]))


def test_a_chip_that_contradicts_itself_is_named_and_counted() -> None:
    data = {0: {"first": "a", "changed": [], "sums": []}, 1: {"first": "b", "changed": [3], "sums": []}}
    found = Found((0, 1), {"repeat": data}, soaked_s=3600.0, changed={1})
    assert named(found) == [(1, "repeatability")]
    assert verdict.failure_rate(found, ()).per_worker_hour["estimate"] == pytest.approx(1.0)
    died = Found((0, 1), failures=[Failure(0, "died", "soak:9", "killed")], soaked_s=7200.0)
    assert verdict.failure_rate(died, ()).per_worker_hour["estimate"] == pytest.approx(0.5)


def test_a_rehearsal_says_nothing_about_the_chip_it_stands_for() -> None:
    row = verdict.calibration("site", "H800", "H800", Found((0,), {"speed": speeds([], 1)}), None, "2026-01-01")
    assert (row["chip"], row["rehearsal"], row["matmul_efficiency"]) == (None, "H800", None)
    real = {0: {"bfloat16": {"accused": [], "ratio": 1.0, "rate": 5e14}}}
    row = verdict.calibration("site", "H800", None, Found((0,), {"speed": real}), 1000.0, "2026-01-01")
    assert (row["chip"], row["matmul_efficiency"]) == ("H800", 0.5)


# --- real workers, planted faults -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def starter() -> Iterator[LocalLauncher]:
    with LocalLauncher() as launcher:
        yield launcher


def look(starter: LocalLauncher, folder: Path, plant: str | None, workers: int = 2, **terms: Any) -> list[str]:
    planted = () if plant is None else (plants.parse(plant).model_dump(),)
    asked = Terms(**{"soak_s": 0.5, "hang_s": 30.0, "plants": planted, **terms})
    found = examine(starter, Pool(name="cores", workers=workers), asked, folder)
    return [f"{f.chip}: {f.check}" for f in verdict.findings(found, verdict.Limits(), 1e12)]


PLANTED = [
    ("numerics:1", ["1: numerics"], ("numbers", "repeat")),
    ("flip:1:3", ["1: repeatability"], ("repeat", "soak")),
    ("dead:1:repeat:2", ["1: died"], ("numbers", "repeat")),
    ("dead:0:soak:1", ["0: died"], ("repeat", "soak")),
    ("link:1:20", ["1: link"], ("links",)),
]


@pytest.mark.parametrize(("plant", "expected", "parts"), PLANTED, ids=[p[0] for p in PLANTED])
def test_a_planted_fault_is_named(
    starter: LocalLauncher, tmp_path: Path, plant: str, expected: list[str], parts: tuple[str, ...]
) -> None:
    assert look(starter, tmp_path, plant, parts=parts) == expected


@pytest.mark.parametrize("kind", ["hang", "stop"])
def test_who_hangs_is_named_and_the_others_go_on(starter: LocalLauncher, tmp_path: Path, kind: str) -> None:
    plant = plants.parse(f"{kind}:2:repeat:1").model_dump()
    terms = Terms(soak_s=0.5, hang_s=10.0, parts=("numbers", "repeat"), plants=(plant,))
    found = examine(starter, Pool(name="cores", workers=4), terms, tmp_path)
    assert [(f.chip, f.kind, f.at) for f in found.failures] == [(2, "hangs", "repeat:1")]
    assert sorted(found.data["repeat"]) == [0, 1, 3]


@pytest.mark.parametrize("place", ["links:2", "soak:1"])
def test_who_hangs_where_all_came_as_far_is_told_by_the_stacks(
    starter: LocalLauncher, tmp_path: Path, place: str
) -> None:
    plant = plants.parse(f"hang:1:{place}").model_dump()
    terms = Terms(soak_s=0.5, hang_s=10.0, parts=(place.partition(":")[0],), plants=(plant,))
    found = examine(starter, Pool(name="cores", workers=2), terms, tmp_path)
    assert [(f.chip, f.kind, f.at) for f in found.failures] == [(1, "hangs", place)]


def test_a_stack_says_who_waits_for_others() -> None:
    listens = 'Thread 0x1 (most recent call first):\n  File "ottava/link.py", line 9 in _listen'
    works = 'Thread 0x2 (most recent call first):\n{}  File "ottava/qualify/worker.py", line 46 in run'
    waits = '  File "site-packages/torch/distributed/distributed_c10d.py", line 2 in recv\n'
    assert _exchanges("\n\n".join([listens, works.format(waits)]))
    assert not _exchanges("\n\n".join([listens, works.format("")]))
    assert not _exchanges("\n\n".join([listens + "\n" + waits, works.format("")]))


def test_a_slow_sender_of_two_is_told_from_the_other(starter: LocalLauncher, tmp_path: Path) -> None:
    """Not by the sum of both ways, in which two workers are alike."""
    plant = plants.parse("link:0:20").model_dump()
    terms = Terms(parts=("links",), plants=(plant,))
    found = examine(starter, Pool(name="cores", workers=2), terms, tmp_path)
    by_pair = {(link["from"], link["to"]): link for link in found.data["links"][0]["map"]}
    assert by_pair[0, 1]["latency_s"] > 0.5e-3 * 20 * 0.2 > 2 * by_pair[1, 0]["latency_s"]


def test_the_odd_one_of_four_is_named(starter: LocalLauncher, tmp_path: Path) -> None:
    assert look(starter, tmp_path, "rounding:2", workers=4, parts=("numbers",)) == ["2: numerics class"]


@pytest.mark.slow
@pytest.mark.parametrize("plant", ["slow:1:2.5", "throttled:0:2.5"])
def test_a_slow_worker_is_named(starter: LocalLauncher, tmp_path: Path, plant: str) -> None:
    assert set(look(starter, tmp_path, plant, parts=("speed",))) == {f"{plant.split(':')[1]}: straggler"}


# --- the command ----------------------------------------------------------------------------------------------------


def called(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["ottava", "qualify", *words])
    return cli.outcome()


LAPTOP = ("--fleet", str(ROOT / "fleets" / "laptop.yaml"))


def test_the_command_passes_a_sound_pool_and_fails_a_bad_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (*LAPTOP, "--pool", "nvidia", "--soak", "0.5s", "--json", "--recipe", str(ROOT / "recipes" / "tiny.yaml"))
    assert called(monkeypatch, *words, "--out", str(tmp_path / "out")) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["passed"], report["may_run"], report["rehearsal"]) == (True, [0, 1], "H800")
    assert report == json.loads((tmp_path / "out" / "qualification.json").read_text())
    assert json.loads((tmp_path / "out" / "calibration.json").read_text())["qualify"] == [report["calibration"]]
    assert set(report["examined"]) == {"numbers", "collectives", "links", "speed", "repeat", "soak"}
    assert report["completes"]["low"] <= report["completes"]["estimate"] <= report["completes"]["high"]
    assert called(monkeypatch, *words, "--plant", "numerics:0") == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["passed"], report["may_run"]) == (False, [1])
    assert {finding["chip"] for finding in report["findings"]} == {0}


@pytest.mark.slow
def test_the_command_names_a_slow_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (*LAPTOP, "--pool", "ascend", "--soak", "0.5s", "--json", "--out", str(tmp_path / "out"))
    assert called(monkeypatch, *words, "--plant", "slow:1:2.5") == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["passed"], report["may_run"]) == (False, [0])
    assert {(finding["chip"], finding["check"]) for finding in report["findings"]} == {(1, "straggler")}
    assert "speed" in report["measured_again"]


BAD = [
    (("--pool", "nvida"), "nvida"),
    (("--pool", "nvidia", "--soak", "soon"), "no time"),
    (("--pool", "nvidia", "--soak", "-1s"), "no time"),
    (("--pool", "nvidia", "--hang", "0s"), "no time"),
    (("--pool", "nvidia", "--hours", "0"), "no length"),
    (("--pool", "nvidia", "--plant", "gremlin:1"), "no fault to plant"),
    (("--pool", "nvidia", "--plant", "slow:2"), "there is no chip 2"),
    (("--pool", "nvidia", "--plant", "dead:1:sped:2"), "no such place"),
    (("--pool", "nvidia", "--recipe", "nowhere.yaml"), "nowhere.yaml"),
]


@pytest.mark.parametrize(("words", "said"), BAD, ids=[" ".join(b[0][1:]) for b in BAD])
def test_a_mistake_is_told_and_nothing_is_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    said: str,
) -> None:
    assert called(monkeypatch, *LAPTOP, *words, "--out", str(tmp_path / "out")) == 2
    told = capsys.readouterr()
    assert said in told.err
    assert told.out == ""
    assert not (tmp_path / "out").exists()


def test_a_platform_that_is_not_here_is_a_mistake(starter: LocalLauncher, tmp_path: Path) -> None:
    from ottava.recipe import Fleet

    pool = Pool(name="far", platform="npu")
    with pytest.raises(OttavaError, match="cannot be used here"):
        command.qualify(starter, Fleet(name="f", pools=(pool,)), pool, Terms())


def test_whose_sizes_are_sent_is_said() -> None:
    from ottava import stages

    tiny = load_recipe(ROOT / "recipes" / "tiny.yaml", stages.specs())
    section, said = command.section_of(tiny)
    assert section is tiny.stages["train"]
    assert said == "tiny: the gradient of stage train"
    assert command.section_of(None)[0] is None
    run = command.planned(tiny, tiny.fleet.pools[0], 2, None, 3.0)
    assert (run.work_s, run.workers, run.restarts) == (90 + 60 + 260, 2, 0)
    assert command.planned(None, tiny.fleet.pools[0], 2, 5.0, 3.0).work_s == 18000
    with pytest.raises(RecipeError):
        command.check_hours(float("nan"))


def test_the_stage_and_the_command_judge_alike() -> None:
    from ottava.stages import qualify as stage

    assert stage.judge_matmul is judges.judge_matmul
    assert stage.judge_resources is judges.judge_resources
