"""Figures, cost and schedule: against published runs worked out by hand, and by properties."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ottava import recipe
from ottava import stages as house
from ottava.artifact import Artifact
from ottava.context import Context
from ottava.errors import LauncherGone, OttavaError, PlatformError, RecipeError, ResourceError
from ottava.journal import Journal
from ottava.planner import chips, cost, reach
from ottava.planner.cost import Estimate
from ottava.planner.schedule import Job, makespan, schedule
from ottava.recipe import Fleet, Pool, load_fleet
from ottava.stages import plan

FLEETS = Path(__file__).parents[1] / "fleets"
CATALOGUE = chips.load(FLEETS / "chips.json")
LAPTOP = load_fleet(FLEETS / "laptop.yaml")
REFERENCE = load_fleet(FLEETS / "reference.yaml")

# --- figures -----------------------------------------------------------------------------------------------------


def test_every_figure_and_price_has_a_source_and_a_date() -> None:
    def provenances(node: Any) -> Any:
        if isinstance(node, chips.Provenance):
            yield node
        elif isinstance(node, recipe.Frozen):
            for name in type(node).model_fields:
                yield from provenances(getattr(node, name))
        elif isinstance(node, dict):
            for value in node.values():
                yield from provenances(value)

    found = list(provenances(CATALOGUE))
    text = chips.locate("chips.json").read_text()  # every number stands beside a source, and is read as such
    assert len(found) == text.count('"source":') >= 3 * (len(CATALOGUE.chips) + 4) + 7 * len(CATALOGUE.formats)
    assert all(p.source and p.date and p.certainty for p in found)
    for pool in (*LAPTOP.pools, *REFERENCE.pools):
        assert pool.usd_per_worker_hour is not None
        assert pool.usd_per_worker_hour.source
        assert pool.usd_per_worker_hour.date
        assert pool.chip in CATALOGUE.chips


def test_the_laptop_is_a_rehearsal_and_the_reference_is_not() -> None:
    assert [pool.stands_for for pool in LAPTOP.pools] == ["Ascend 910B", "H800"]
    assert {pool.platform for pool in LAPTOP.pools} == {"cpu"}
    assert not any(pool.rehearsal for pool in REFERENCE.pools)
    assert {pool.platform for pool in REFERENCE.pools} == {"npu", "cuda"}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d["chips"]["H800"]["bf16_tflops"].pop("source"), r"'chips.H800.bf16_tflops.source' is missing"),
        (lambda d: d["chips"]["H800"]["bf16_tflops"].update(value=-1), r"greater than 0"),
        (lambda d: d["chips"]["H800"]["usd_per_hour"].update(low=9), r"must rise"),
        (lambda d: d["chips"]["H800"].update(family="hoper"), r"'hoper', which has no entry"),
        (lambda d: d["chips"]["H800"].update(tflops=1), r"unknown key 'tflops'"),
    ],
)
def test_a_wrong_figure_is_refused_with_its_place(tmp_path: Path, edit: Any, message: str) -> None:
    data = json.loads((FLEETS / "chips.json").read_text())
    edit(data)
    path = tmp_path / "chips.json"
    path.write_text(json.dumps(data, indent=1))
    with pytest.raises(RecipeError, match=message) as caught:
        chips.load(path)
    assert str(path) in str(caught.value.where)


def test_an_unknown_chip_is_refused_with_a_suggestion() -> None:
    with pytest.raises(RecipeError, match="did you mean 'H800'"):
        CATALOGUE.chip("H80")
    with pytest.raises(RecipeError, match="no such file"):
        chips.locate("no-such-fleet")


# --- cost: published rows, worked out by hand --------------------------------------------------------------------


def test_flops_per_token_by_hand() -> None:
    # Llama 2 13B: 12.85e9 parameters without the embedding, 40 layers, 40 heads of 128, 4,096 tokens:
    # 6 x 12.85e9 = 77.10e9; 6 x 40 x 5,120 x 4,096 = 5.033e9.
    flops = cost.flops_per_token(12.85e9, layers=40, attention_width=5120, sequence=4096)
    assert flops == 77.10e9 + 5_033_164_800
    assert cost.training_flops(12.85e9, 2e12, layers=40, attention_width=5120, sequence=4096) == flops * 2e12
    assert cost.flops_per_token(137_600) == 825_600


# (chip, active parameters, layers, attention width, sequence, tokens, published chip hours)
PUBLISHED = [
    ("A100", 12.85e9, 40, 5120, 4096, 2e12, 368_640),  # Llama 2 13B, arXiv 2307.09288, table 2
    ("A100", 68.71e9, 80, 8192, 4096, 2e12, 1_720_320),  # Llama 2 70B, arXiv 2307.09288, table 2
    ("A100", 65.02e9, 80, 8192, 2048, 1.4e12, 1_022_362),  # LLaMA 65B, arXiv 2302.13971, table 15
    ("H800", 66.58e9, 95, 8192, 4096, 1e12, 300_600),  # DeepSeek 67B per 1T tokens, arXiv 2405.04434, section 3.2.3
    ("H800", 38.13e9, 61, 20480, 4096, 14.8e12, 2_664_000),  # DeepSeek-V3, arXiv 2412.19437, table 1; (192+128)/2 x 128
    ("910B3", 68.71e9, 80, 8192, 4096, 1e12, 1e12 / 439 / 3600),  # Llama 2 70B, MindSpeed-LLM v1.0.RC3: 439 tokens/s
    ("910B3", 12.85e9, 40, 5120, 4096, 1e12, 1e12 / 2016 / 3600),  # Llama 2 13B, MindSpeed-LLM v1.0.RC3: 2,016
]


@pytest.mark.parametrize(
    ("name", "parameters", "layers", "width", "sequence", "tokens", "hours"), PUBLISHED, ids=lambda v: str(v)
)
def test_published_runs_lie_inside_the_interval(
    name: str, parameters: float, layers: int, width: int, sequence: int, tokens: float, hours: float
) -> None:
    chip = CATALOGUE.chip(name)
    flops = cost.training_flops(parameters, tokens, layers=layers, attention_width=width, sequence=sequence)
    alone = cost.reference_seconds(flops, parameters, chip, CATALOGUE.family(chip), workers=1)
    assert alone.mid is not None
    assert alone.high is not None
    assert alone.low / 3600 < hours < alone.high / 3600
    assert abs(alone.mid / 3600 / hours - 1) < 0.30


def test_reference_time_by_hand() -> None:
    # Llama 2 70B on A100: (6 x 68.71e9 + 6 x 80 x 8192 x 4096) x 2e12 = 8.5673e23 FLOPs; / (312e12 x 0.58) / 3600
    chip = CATALOGUE.chip("A100")
    flops = (6 * 68.71e9 + 6 * 80 * 8192 * 4096) * 2e12
    one = cost.reference_seconds(flops, 68.71e9, chip, CATALOGUE.family(chip), workers=1)
    assert one.low / 3600 == pytest.approx(1_315_113, rel=1e-4)
    eight = cost.reference_seconds(flops, 68.71e9, chip, CATALOGUE.family(chip), workers=8)
    assert eight.low == pytest.approx(one.low / 8)


def test_no_point_is_claimed_outside_of_published_sizes() -> None:
    chip = CATALOGUE.chip("H800")
    for parameters in (137_600, 2.9e9, 1e12):
        estimate = cost.reference_seconds(1e18, parameters, chip, CATALOGUE.family(chip), workers=1)
        assert estimate.low > 0
        assert (estimate.mid, estimate.high) == (None, None)


def test_the_published_bill_of_deepseek_v3() -> None:
    # arXiv 2412.19437, table 1: 2.788M H800 hours at $2 are $5.576M.
    hours = 2_788_000 * 3600.0 / 2048
    bill = cost.usd(Estimate(hours, hours, hours), workers=2048, usd_per_worker_hour=Estimate(2, 2, 2))
    assert bill.mid == pytest.approx(5_576_000)
    r1 = 147_000 * 3600.0 / 512  # R1's reinforcement: 147K hours, $294K
    assert cost.usd(Estimate(r1, r1, r1), 512, Estimate(2, 2, 2)).mid == pytest.approx(294_000)


POSITIVE = st.floats(1e-3, 1e6)


@given(POSITIVE, POSITIVE, POSITIVE, POSITIVE)
def test_intervals_keep_their_order(a: float, b: float, c: float, d: float) -> None:
    left, right = Estimate(min(a, b), max(a, b), a + b), Estimate(min(c, d), max(c, d), c + d)
    product = left * right
    assert product.mid is not None
    assert product.high is not None
    assert product.low <= product.mid <= product.high
    assert product.low == left.low * right.low
    assert (left * Estimate(c, None, None)).mid is None
    measured = cost.measured_seconds(a, b)
    assert measured.mid == pytest.approx(a * b)
    assert measured.low < a * b < (measured.high or 0)


# --- schedule ----------------------------------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Job], list[str]]:
    """Jobs with random predecessors, durations, preferences, over one to four pools."""
    pools = [f"pool{i}" for i in range(draw(st.integers(1, 4)))]
    jobs: list[Job] = []
    for number in range(draw(st.integers(0, 9))):
        able = draw(st.lists(st.sampled_from(pools), min_size=1, unique=True))
        jobs.append(
            Job(
                f"job{number}",
                {pool: draw(st.integers(1, 50)) for pool in able},
                after=tuple(draw(st.lists(st.sampled_from([j.name for j in jobs]), unique=True)) if jobs else ()),
                prefer=tuple(draw(st.lists(st.sampled_from(pools), unique=True))),
                everywhere=draw(st.booleans()),
            )
        )
    return jobs, pools


@given(problems())
@settings(max_examples=200, deadline=None)
def test_schedules_are_sound(problem: tuple[list[Job], list[str]]) -> None:
    jobs, pools = problem
    placed = {p.name: p for p in schedule(jobs, pools)}
    assert {p.start for p in placed.values()} <= {0, *(p.end for p in placed.values())}, "a job waits for nothing"
    assert list(placed) == [job.name for job in jobs]
    for job in jobs:
        p = placed[job.name]
        assert p.end - p.start == job.seconds[p.pool]
        assert p.start >= max((placed[name].end for name in job.after), default=0)
        wanted = [pool for pool in job.prefer if pool in job.seconds]
        assert not wanted or p.pool == wanted[0]
        assert set(p.fallback) == (set() if job.everywhere else set(job.seconds) - {p.pool})
        assert list(p.fallback)[: max(0, len(wanted) - 1)] == ([] if job.everywhere else wanted[1:])
    for pool in pools:
        busy = sorted((p.start, p.end) for p in placed.values() if p.occupies(pool))
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(busy))
    assert makespan(list(placed.values())) == max((p.end for p in placed.values()), default=0)


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.integers(1, 9), min_size=1), min_size=1, max_size=6))
def test_a_chain_without_preferences_is_optimal(durations: list[dict[str, int]]) -> None:
    jobs = [Job(str(i), d, after=(str(i - 1),) if i else ()) for i, d in enumerate(durations)]
    assert makespan(schedule(jobs, "abc")) == sum(min(d.values()) for d in durations)


def test_independent_jobs_spread_over_pools() -> None:
    placed = schedule([Job("x", {"a": 4.0, "b": 5.0}), Job("y", {"a": 4.0, "b": 5.0})], ["a", "b"])
    assert [(p.pool, p.start, p.end) for p in placed] == [("a", 0, 4), ("b", 0, 5)]


def test_impossible_jobs_are_refused() -> None:
    with pytest.raises(ValueError, match="no pool can run 'x'"):
        schedule([Job("x", {"c": 1.0})], ["a", "b"])
    with pytest.raises(ValueError, match="comes before 'y'"):
        schedule([Job("x", {"a": 1.0}, after=("y",)), Job("y", {"a": 1.0})], ["a"])


# --- the plan ----------------------------------------------------------------------------------------------------


class Train(recipe.Spec):
    """A train section, as far as the plan looks at it."""

    steps: int = 600
    virtual_shards: int = 2


DEFAULT = plan.Spec()


def stages(**pinned: str) -> dict[str, recipe.Spec]:
    names = ("plan", "qualify", "label", "train", "convert", "verify", "serve")
    return {name: (Train if name == "train" else recipe.Spec)(budget_s=20, pool=pinned.get(name)) for name in names}


def speed(isa: str = "AVX512", factor: float = 1.0, step: float = 0.05, parameters: float = 137_600) -> plan.Speed:
    gflops = plan.Spec().reference_gflops[isa] / factor
    parts = {"train": (plan.Part("steps", 600, step),)}
    return plan.Speed(gflops, isa, parts, 600, 640.0, parameters, active_parameters=100_736, flops_per_token=604_416)


def make(spec: plan.Spec = DEFAULT, pinned: Mapping[str, str] = {}, **speeds: plan.Speed) -> dict[str, Any]:
    work = {name: stage for name, stage in stages(**pinned).items() if name != "plan"}
    speeds = speeds or {"ascend": speed("AVX2"), "nvidia": speed()}
    missing = {pool.name: "it is not here" for pool in LAPTOP.pools if pool.name not in speeds}
    return plan.make(spec, work, LAPTOP, CATALOGUE, speeds, missing)


def placed(result: Mapping[str, Any]) -> dict[str, str]:
    return {stage["name"]: stage["pool"] for stage in result["stages"]}


def test_small_models_train_on_domestic_chips_first() -> None:
    result = make()
    train = next(stage for stage in result["stages"] if stage["name"] == "train")
    assert (train["pool"], train["fallback"]) == ("ascend", ["nvidia"])
    assert "137,600 parameters" in train["reason"]
    assert placed(result)["serve"] == "ascend"
    assert placed(result)["convert"] == "nvidia"


def test_large_models_train_elsewhere_and_unknown_sizes_count_as_large() -> None:
    big = speed(parameters=70e9)
    assert placed(make(ascend=big, nvidia=big))["train"] == "nvidia"
    unknown = plan.Speed(100.0, "AVX2")
    assert placed(make(ascend=unknown, nvidia=unknown))["train"] == "nvidia"
    rules = (plan.Rule(stage="train", max_parameters=1e3, prefer=("Huawei",), reason="tiny"), *plan.RULES[2:])
    assert placed(make(plan.Spec(rules=rules)))["train"] == "nvidia"


def test_the_recipe_overrides_the_rules() -> None:
    result = make(pinned={"train": "nvidia"})
    train = next(stage for stage in result["stages"] if stage["name"] == "train")
    assert (train["pool"], train["fallback"], train["reason"]) == ("nvidia", ["ascend"], "the recipe puts it there")


def test_without_rules_a_stage_goes_where_it_ends_first() -> None:
    result = make(plan.Spec(rules=()), ascend=speed("AVX2", step=0.03), nvidia=speed("AVX512", factor=2, step=0.05))
    assert placed(result)["train"] == "ascend"
    result = make(plan.Spec(rules=()), ascend=speed("AVX2", step=0.06), nvidia=speed("AVX512", step=0.05))
    assert placed(result)["train"] == "nvidia"
    assert "ends first" in result["stages"][0]["reason"]


def test_a_missing_pool_is_left_out_and_said() -> None:
    result = make(nvidia=speed())
    assert set(placed(result).values()) == {"nvidia"}
    train = next(stage for stage in result["stages"] if stage["name"] == "train")
    assert "ascend cannot be used" in train["reason"]
    assert all("ascend cannot be used" in stage["reason"] for stage in result["stages"])
    assert result["unavailable"] == {"ascend": "it is not here"}
    with pytest.raises(PlatformError, match="pinned to the pool 'ascend'"):
        make(pinned={"serve": "ascend"}, nvidia=speed())


def test_seconds_and_cost_by_hand() -> None:
    result = make()
    train = next(stage for stage in result["stages"] if stage["name"] == "train")
    assert train["seconds"] == 600 * 0.05
    assert train["low"] == pytest.approx(30 / 1.36, abs=1e-3)
    assert train["high"] == pytest.approx(30 * 1.36, abs=1e-3)
    # two workers, $0.0425 an hour each, 30 s
    assert train["usd"] == pytest.approx(2 * 0.0425 * 30 / 3600, rel=1e-5)
    qualify = result["stages"][0]
    assert qualify["usd"] == pytest.approx(4 * 0.0425 * 20 / 3600, rel=1e-5)  # both pools
    assert result["usd"] == pytest.approx(sum(stage["usd"] for stage in result["stages"]), rel=1e-5)
    assert result["makespan_s"] == 30 + 5 * 20
    assert result["over_budget"] == ["train"]  # 30 / 1.36 = 22 s, and the budget is 20 s
    slow = make(ascend=speed("AVX2", factor=1.5), nvidia=speed(factor=1.3))
    assert slow["over_budget"] == ["train"]  # a budget is a ceiling: nobody can be found to exceed it


def test_what_is_only_a_budget_is_said_to_be_a_ceiling() -> None:
    result = make(ascend=speed("AVX2", factor=1.5), nvidia=speed(factor=10))
    rows = {stage["name"]: stage for stage in result["stages"]}
    assert (rows["serve"]["low"], rows["serve"]["seconds"], rows["serve"]["high"]) == (0, 30, pytest.approx(40.8))
    # ten times slower: the middle follows to a factor of 4, the high end all the way
    assert (rows["label"]["low"], rows["label"]["seconds"], rows["label"]["high"]) == (0, 80, pytest.approx(272))
    assert [name for name, row in rows.items() if "a ceiling, not a prediction" not in row["basis"]] == ["train"]
    assert rows["train"]["low"] > 0
    estimate, basis = plan.predict(DEFAULT, "serve", recipe.Spec(budget_s=20), plan.Speed(1.0, "unheard of"))
    assert (estimate.low, estimate.mid, estimate.high) == (0, 20, pytest.approx(27.2))
    assert "a ceiling, not a prediction" in basis


def test_the_gantt_shows_every_stage_on_every_pool_it_occupies() -> None:
    result = make()
    rows = {(bar["pool"], bar["stage"]) for bar in result["gantt"]}
    assert {("ascend", "qualify"), ("nvidia", "qualify"), ("ascend", "train"), ("nvidia", "label")} <= rows
    assert len(rows) == 7
    times = {stage["name"]: (stage["start_s"], stage["end_s"]) for stage in result["stages"]}
    assert all((bar["start_s"], bar["end_s"]) == times[bar["stage"]] for bar in result["gantt"])


def test_the_reference_fleet_prices_the_same_work_and_a_larger_one() -> None:
    work = plan.Workload(parameters=137_600, tokens=384_000, flops_per_token=9e5)
    priced = plan.price(REFERENCE, CATALOGUE, {"train": work, "at_scale": plan.Workload()})
    ascend, nvidia = priced["pools"]
    assert (ascend["chip"], nvidia["chip"]) == ("910B3", "H800")
    seconds = 384_000 * 9e5 / (313e12 * 64 * 0.66)
    assert ascend["train"]["hours"] == {"low": pytest.approx(seconds / 3600, rel=1e-5), "mid": None, "high": None}
    assert ascend["train"]["claim"].startswith("lower bound only")
    big = nvidia["at_scale"]
    # 6 x 8e9 x 160e9 = 7.68e21 FLOPs; / (989e12 x 0.389) / 3600 = 5,545 chip hours, $2 each
    assert big["hours"]["mid"] == pytest.approx(5545 / 64, rel=1e-3)
    assert big["usd"]["mid"] == pytest.approx(2 * 5545, rel=1e-3)
    assert big["usd"]["low"] < big["usd"]["mid"] < big["usd"]["high"]


MATMUL, STEPS = "ottava.platforms.probe:throughput", "ottava.trainer.probe:throughput"


class Launcher:
    """Answers the probes as a machine would; pools in `missing` have no device, and `accidents` come first."""

    def __init__(self, missing: tuple[str, ...] = (), accidents: Mapping[str, list[OttavaError]] = {}):
        self.missing, self.accidents, self.asked = missing, accidents, []

    def call(self, target: str, args: Any, *, pool: Pool, workers: int, logs: Path) -> list[dict[str, Any]]:
        self.asked.append((target, pool.name, workers))
        if self.accidents.get(target):
            raise self.accidents[target].pop(0)
        if target == reach.PRESENCE:
            return [{"missing": "torch_npu is not installed" if pool.name in self.missing else None}]
        assert pool.name not in self.missing
        if target == MATMUL:
            isa = "AVX2" if pool.env else "AVX512"
            return [{"together_gflops": 100.0 + rank, "instruction_set": isa} for rank in range(workers)]
        assert target == STEPS
        assert args["spec"]["steps"] == 600
        answer = {"tokens_per_s": 10_000.0, "tokens_per_step": 640.0, "parameters": 137_600, "steps": 600}
        answer |= {"active_parameters": 100_736, "flops_per_token": 604_416, "busy_seconds": 0.0}
        parts = [[("steps", 600, 0.05 + 0.01 * rank), ("starts", 3, None)] for rank in range(workers)]
        return [{**answer, "parts": each} for each in parts]


def run_plan(tmp_path: Path, launcher: Launcher, fleet: Fleet = LAPTOP, **kinds: recipe.Spec) -> Artifact:
    folders = {"out": tmp_path / "out", "work": tmp_path / "work"}
    for folder in folders.values():
        folder.mkdir()
    ctx = Context(
        stage="plan",
        seed=0,
        recipe_name="test",
        fleet=fleet,
        pool=fleet.pools[0],
        fallback=(),
        stages=kinds or stages(),
        journal=Journal(tmp_path / "journal.jsonl"),
        launcher=launcher,  # type: ignore[arg-type]
        destination=tmp_path / "plan",
        meta={"stage": "plan"},
        **folders,
    )
    return plan.run(plan.Spec(), {}, ctx)


def test_the_stage_measures_each_pool_and_writes_the_plan(tmp_path: Path) -> None:
    launcher = Launcher()
    made = run_plan(tmp_path, launcher)
    result = made.json("plan.json")
    assert [s["name"] for s in result["stages"]] == ["qualify", "label", "train", "convert", "verify", "serve"]
    keys = {"name", "pool", "fallback", "start_s", "end_s", "seconds", "low", "high", "usd", "reason"}
    assert all(keys <= set(stage) for stage in result["stages"])
    asked = {(pool, workers) for target, pool, workers in launcher.asked if target != reach.PRESENCE}
    assert asked == {("ascend", 2), ("nvidia", 2)}
    train = next(stage for stage in result["stages"] if stage["name"] == "train")
    start = result["measured"]["ascend"]["start_seconds"]
    assert 0 < start < 5
    assert train["seconds"] == pytest.approx(600 * 0.06 + 3 * start, abs=2e-3)  # the slowest worker sets the pace
    assert train["basis"].startswith("measured: 600 steps of 60 ms, 3 starts of ")
    assert result["measured"]["ascend"]["gflops"] == 100.0
    work = result["reference"]["works"]["train"]
    assert (work["parameters"], work["tokens"], work["flops"]) == (100_736, 600 * 640, 604_416 * 600 * 640)
    assert made.summary["makespan_s"] == result["makespan_s"]
    assert all(math.isfinite(stage["usd"]) for stage in result["stages"])


def test_a_recipe_without_training_is_planned_from_budgets(tmp_path: Path) -> None:
    launcher = Launcher()
    made = run_plan(tmp_path, launcher, convert=recipe.Spec(budget_s=5), serve=recipe.Spec(budget_s=7))
    result = made.json("plan.json")
    assert placed(result) == {"convert": "nvidia", "serve": "ascend"}
    assert {target for target, *_ in launcher.asked} == {reach.PRESENCE, MATMUL}
    assert result["stages"][0]["seconds"] == pytest.approx(5 * 155 / 100)
    assert set(result["reference"]["works"]) == {"at_scale"}


def tiny() -> dict[str, recipe.Spec]:
    return dict(recipe.load_recipe(FLEETS.parent / "recipes" / "tiny.yaml", house.specs()).stages)


def test_a_stage_is_more_than_its_steps() -> None:
    """Counted by hand for recipes/tiny.yaml: what is started, answered and stepped, on two workers of two pools."""
    from ottava.trainer import probe
    from ottava.trainer.spec import TrainSpec

    whole = tiny()
    assert plan._tests(whole) == 600
    asked = plan._students(whole)
    assert asked is not None
    assert (len(asked["specs"]), asked["asks"]) == (6, 600)
    train = whole["train"].model_dump(mode="json")
    small = {**train, "shape": {**train["shape"], "experts": 2}, "batch": 2, "virtual_shards": 1}
    told = {
        name: count
        for name, count, _ in probe.throughput({"spec": small, "repeats": 1, "tests": 600, "pools": 2})["parts"]
    }
    assert told == {
        "steps, a run and its replay": 2 * 650,
        "steps by one worker, the drift": 24 * (3 + 5),  # one worker: five replicas one after the other
        "starts of the drift": 4 + 5,
        "starts": 2 * 2 + 1 + 2,  # a run and its replay on two pools each, an export, two evaluations
        "answers": 2 * 600,
    }
    calm = TrainSpec.model_validate({**small, "fault": None})
    assert probe._drift(calm, 0, 1, 0.1) == []
    asked["specs"] = [{**spec, "batch": 2, "virtual_shards": 1} for spec in asked["specs"]]
    found = probe.students({**asked, "repeats": 1, "tests": 600, "teacher_answer_seconds": 0.001})["parts"]
    assert {name: count for name, count, _ in found} == {
        "steps": 12 * 500, "answers": 12 * 600, "answers of the teacher": 600, "starts": 1 + 36,
    }  # fmt: skip


def test_the_stages_do_not_import_torch() -> None:
    code = "import sys; import ottava.stages.plan, ottava.stages.qualify; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_no_pool_at_all_is_an_error_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(PlatformError, match="no pool of the fleet 'laptop' can be used"):
        run_plan(tmp_path, Launcher(missing=("ascend", "nvidia")))
    assert not (tmp_path / "plan").exists()


def test_a_pool_that_is_not_here_is_named_in_the_plan_and_its_summary(tmp_path: Path) -> None:
    made = run_plan(tmp_path, Launcher(missing=("ascend",)))
    assert made.summary["unavailable"] == {"ascend": "torch_npu is not installed"}
    result = made.json("plan.json")
    assert result["unavailable"] == made.summary["unavailable"]
    assert all("ascend cannot be used" in stage["reason"] for stage in result["stages"])


@pytest.mark.parametrize("target", [reach.PRESENCE, MATMUL, STEPS])
def test_a_worker_that_died_is_no_missing_pool(tmp_path: Path, target: str) -> None:
    """Killed once, it is asked again and nothing is lost; killed twice, the stage fails and publishes nothing."""
    killed = PlatformError("a worker was killed by SIGKILL")
    (tmp_path / "once").mkdir()
    launcher = Launcher(accidents={target: [killed]})
    made = run_plan(tmp_path / "once", launcher)
    assert made.summary["unavailable"] == {}
    assert len(launcher.asked) == 2 * 3 + 1
    (tmp_path / "twice").mkdir()
    with pytest.raises(PlatformError, match="SIGKILL"):
        run_plan(tmp_path / "twice", Launcher(accidents={target: [killed, killed]}))
    assert not (tmp_path / "twice" / "plan").exists()


@pytest.mark.parametrize("error", [LauncherGone("gone"), ResourceError("disk full"), OttavaError("other")])
@pytest.mark.parametrize("target", [reach.PRESENCE, MATMUL, STEPS])
def test_what_is_not_a_pools_fault_is_raised_at_once(tmp_path: Path, target: str, error: OttavaError) -> None:
    launcher = Launcher(accidents={target: [error]})
    with pytest.raises(type(error), match=error.what):
        run_plan(tmp_path, launcher)
    assert [asked for asked, *_ in launcher.asked].count(target) == 1
    assert not (tmp_path / "plan").exists()


def test_presence_is_what_the_platform_says() -> None:
    assert reach.presence({"platform": "cpu"}) == {"missing": None}
    assert "unknown platform 'tpu'" in reach.presence({"platform": "tpu"})["missing"]


def test_the_step_is_measured_with_as_many_workers_as_will_train(tmp_path: Path) -> None:
    launcher = Launcher()
    run_plan(tmp_path, launcher, train=Train(virtual_shards=1))
    workers = {(target, workers) for target, _, workers in launcher.asked}
    assert workers == {(reach.PRESENCE, 1), (MATMUL, 2), (STEPS, 1)}


@pytest.mark.parametrize(("key", "file"), [("chips", "chips.json"), ("reference", "reference.yaml")])
def test_the_key_follows_the_contents_of_the_files(tmp_path: Path, key: str, file: str) -> None:
    path = tmp_path / file
    path.write_bytes((FLEETS / file).read_bytes())
    spec = plan.Spec.model_validate({key: str(path)})
    before = spec.model_dump(mode="json")
    assert before[f"{key}_sha256"] == plan.Spec().model_dump()[f"{key}_sha256"] is not None
    path.write_bytes(path.read_bytes() + b"\n")
    after = spec.model_dump(mode="json")
    assert [name for name in after if after[name] != before[name]] == [f"{key}_sha256"]
    path.unlink()
    assert spec.model_dump()[f"{key}_sha256"] is None  # the run says that it is gone
    with pytest.raises(ValueError, match="no such file") as caught:
        plan.Spec.model_validate({key: str(path)})
    assert key in str(caught.value)
