"""The prediction of speed and memory: its arithmetic against second implementations, its calibration against planted
truths, and what it says of rows that are wrong or that it knows nothing of."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ottava import cli
from ottava.errors import RecipeError
from ottava.planner import calibrate, chips, fit, layouts, memory, predict, rows, steptime, students
from ottava.planner.steptime import Machine, Terms
from ottava.planner.workload import Layout, Model, Workload

CATALOGUE = chips.load(chips.locate("chips.json"))
PUBLISHED = rows.read(rows.published())
SHAPES = rows.known_shapes()
GPT3 = SHAPES["gpt3-175b"]
SIZED = {"arch": "llama3-8b", "chip": "H100", "n": 64, "seq": 8192, "gbs": 512}
SMALL = {"L": 16, "h": 1024, "heads": 8, "kv": 8, "hd": 128, "ffn": 4096, "glu": 1, "vocab": 32000}


def work(model: Model = GPT3, **changes: Any) -> Workload:
    given = {"id": "w", "chip": "A100", "n": 64, "seq": 2048, "gbs": 64, "precision": "fp16", "flash_attention": False}
    return Workload.model_validate({**given, **changes, "model": model})


def write(folder: Path, content: Any) -> Path:
    path = folder / "rows.json"
    path.write_text(json.dumps(content, indent=1))
    return path


# --- shapes


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("llama3-8b", 8.03, None), ("llama3-405b", 405.9, None), ("mixtral-8x7b", 46.7, 12.9),
        ("deepseek-v2", 235.7, 21.4), ("qwen3-235b", 235.1, 22.2), ("gpt-oss-120b", 116.8, 5.13),
        ("kimi-k2", 1026, 32.9),
    ],
)  # fmt: skip
def test_shapes_have_the_published_parameters(name: str, total: float, active: float | None) -> None:
    """Model cards. A card's active parameters count the embedding or not: half a per cent to 4% of these models."""
    assert SHAPES[name].parameters() / 1e9 == pytest.approx(total, rel=2e-3)
    if active is not None:
        assert SHAPES[name].active() / 1e9 == pytest.approx(active, rel=0.05)


def test_depth_heads_add_the_published_14_billion() -> None:
    """arXiv 2412.19437: 671B of the main model, and the hub's folder has 685B with the multi-token module."""
    model = SHAPES["deepseek-v3"]
    assert model.model_copy(update={"depth_heads": 0}).parameters() / 1e9 == pytest.approx(671, rel=1e-3)
    assert model.parameters() / 1e9 == pytest.approx(685 - 2, rel=3e-3)  # the module's own tables are shared here


def test_counts_agree_with_those_of_the_students() -> None:
    """A second implementation, which counts norms and biases too."""
    for shape in students.load(chips.locate("students.json")).students:
        model = Model(
            layers=shape.layers, hidden=shape.hidden, heads=shape.heads, kv_heads=shape.kv_heads,
            head_width=shape.hidden // shape.heads, width=shape.width, gated=True, vocabulary=shape.vocabulary,
        )  # fmt: skip
        assert model.parameters() == pytest.approx(shape.parameters(), rel=5e-4)
        assert model.active() == pytest.approx(shape.active(), rel=5e-4)


@given(st.integers(1, 60), st.integers(1, 80), st.sampled_from([0.0, 0.5, 1.0]))
def test_attended_positions_are_counted(window: int, sequence: int, share: float) -> None:
    model = SHAPES["llama3-8b"].model_copy(update={"window": (window, share)})
    near = sum(min(i + 0.5, window) for i in range(sequence)) / sequence  # a token sees half of its own position
    far = sum(i + 0.5 for i in range(sequence)) / sequence
    exact = share * near + (1 - share) * far
    assert model.attended(sequence) == pytest.approx(exact, abs=0.13)  # the edge of the window is half a position wide


# --- a step


def pipeline_seconds(stages: int, count: int, forward: float, backward: float) -> float:
    """The 1F1B schedule, event by event."""
    done: dict[tuple[str, int, int], float] = {}
    free = [0.0] * stages
    orders = []
    for stage in range(stages):
        warm = min(count, stages - 1 - stage)
        order = [("f", i) for i in range(warm)]
        for i in range(count - warm):
            order += [("f", warm + i), ("b", i)]
        orders.append(order + [("b", i) for i in range(count - warm, count)])
    at = [0] * stages
    while any(at[s] < len(orders[s]) for s in range(stages)):
        for stage in range(stages):
            if at[stage] == len(orders[stage]):
                continue
            kind, i = orders[stage][at[stage]]
            before = ("f", stage - 1, i) if kind == "f" else ("b", stage + 1, i)
            first = (kind == "f" and stage == 0) or (kind == "b" and stage == stages - 1)
            if not first and before not in done:
                continue
            ready = done[("f", stage, i)] if kind == "b" else 0.0
            ready = max(ready, 0.0 if first else done[before], free[stage])
            done[(kind, stage, i)] = free[stage] = ready + (forward if kind == "f" else backward)
            at[stage] += 1
    return max(free)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 12))
def test_the_bubble_is_that_of_the_schedule(stages: int, groups: int) -> None:
    """Against the schedule run event by event, with a head that costs nothing and links that are free."""
    count = groups * stages
    model = GPT3.model_copy(update={"vocabulary": 1})
    layout = Layout(tensor=8, pipeline=stages)
    machine = replace(Machine.of(CATALOGUE.chips["A100"]), network=1e30, link=1e30)
    asked = work(model, n=8 * stages, gbs=count, parallel=layout)
    whole = steptime.step(asked, layout, machine, Terms(scale=0.0))
    alone = steptime.step(asked.model_copy(update={"batch": 1, "chips": 8}), Layout(tensor=8), machine, Terms(scale=0))
    each = (alone.seconds - alone.parts["update"]) / stages
    exact = pipeline_seconds(stages, count, each / 3, each * 2 / 3)
    assert whole.seconds - whole.parts["update"] == pytest.approx(exact, rel=1e-3)


def test_parts_sum_to_the_step() -> None:
    for row in PUBLISHED:
        if row.work is not None and row.work.kind == "train":
            run, found = calibrate.prepare(row.work, CATALOGUE)
            assert sum(found.step.parts.values()) == pytest.approx(found.step.seconds, rel=1e-6), run.id


def test_without_losses_a_step_is_its_work_at_the_peak() -> None:
    """With every loss set to nothing, 6 N + attention FLOPs at the peak are what is left: a second count."""
    free = Terms(**dict.fromkeys(steptime.NAMES, 0.0) | {"efficiency": 1.0, "attention": 1.0, "fp8": 0.0})
    for name in ("llama3-70b", "gpt3-175b", "mixtral-8x7b"):
        asked = work(SHAPES[name], n=64, gbs=512, flash_attention=False)
        layout = Layout(tensor=8)
        machine = replace(Machine.of(CATALOGUE.chips["A100"]), link=1e30, network=1e30, memory=1e30)
        narrow = (asked.model.qk_width + asked.model.value_width) / 2
        assert narrow == 128  # where the efficiency of attention is the constant itself
        seconds = steptime.step(asked, layout, machine, free).seconds
        flops = asked.model.flops_per_token(asked.sequence) * asked.batch * asked.sequence
        assert seconds == pytest.approx(flops / (machine.peak * asked.chips), rel=1e-6), name


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(["llama3-70b", "deepseek-v3", "qwen3-30b", "gpt3-175b"]),
    st.sampled_from(["link", "network", "memory", "peak"]),
    st.floats(1.01, 8),
)
def test_better_hardware_is_never_slower(name: str, what: str, factor: float) -> None:
    model = SHAPES[name]
    layout = Layout(tensor=4, pipeline=2, expert=8 if model.experts else 1)
    asked = work(model, n=64, gbs=256, chip="H800", precision="bf16")
    machine = Machine.of(CATALOGUE.chips["H800"])
    better = replace(machine, **{what: getattr(machine, what) * factor})
    assert (
        steptime.step(asked, layout, better, Terms()).seconds <= steptime.step(asked, layout, machine, Terms()).seconds
    )


def test_the_search_finds_the_fastest_layout_that_fits() -> None:
    """Against all candidates, one by one."""
    for name, count in (("llama3-70b", 64), ("qwen3-30b", 16), ("deepseek-v3", 512)):
        asked = work(
            SHAPES[name], n=count, gbs=512, chip="H800", precision="bf16", flash_attention=True, recompute="full"
        )
        chip = CATALOGUE.chips["H800"]
        machine = Machine.of(chip)
        found = layouts.best(asked, chip, machine, Terms())
        assert found.fits
        assert found.memory_gb <= chip.memory_gb.value * layouts.USABLE
        for layout in layouts.candidates(asked, machine):
            assert count % layout.size == 0
            if memory.total_gb(asked, layout) <= chip.memory_gb.value * layouts.USABLE:
                assert found.step.seconds <= steptime.step(asked, layout, machine, Terms()).seconds


# --- memory


def test_selective_recomputation_saves_the_published_shares() -> None:
    """arXiv 2205.05198, section 5: 70% of GPT-3's activations and 65% of MT-NLG's."""
    for name, share in (("gpt3-175b", 0.70), ("mtnlg-530b", 0.65)):
        layout = Layout(tensor=8, pipeline=8 if name == "gpt3-175b" else 35)
        chips_ = layout.size
        kept = [
            memory.activations(work(SHAPES[name], n=chips_, recompute=how, parallel=layout), layout)
            for how in ("none", "selective")
        ]
        assert 1 - kept[1] / kept[0] == pytest.approx(share, abs=0.005)


@pytest.mark.parametrize("name", ["gpt-22b", "gpt3-175b", "mtnlg-530b", "gpt-1t-128"])
def test_activations_are_those_of_the_paper(name: str) -> None:
    """arXiv 2205.05198, equations 2 to 5, written out: s b h L (34 + 5 a s / h) / t, and 2 s b h L / t."""
    model, sequence, tensor = SHAPES[name], 2048, 8
    unit = sequence * model.hidden * model.layers / tensor
    whole = 34 + 5 * model.heads * sequence / model.hidden
    layout = Layout(tensor=tensor, pipeline=model.layers)
    for how, factor in (("none", whole), ("selective", 34), ("full", 2)):
        asked = work(model, n=layout.size, recompute=how, parallel=layout)
        assert memory.activations(asked, layout) == pytest.approx(unit * factor, rel=0.001)


def test_the_state_is_that_of_zero() -> None:
    """arXiv 1910.02054, table 1, with its FP16 gradients: 7.5B parameters take 120, 31.4 and 1.9 GB on 64 chips."""
    size, model = 7.5e9, SHAPES["gpt-7.5b"]
    asked = work(model, n=64)
    scale = size / memory.parameters_on_first_stage(asked, Layout())[0]
    extra = memory.GRADIENT - 2  # Megatron's gradients are FP32
    alone = memory.state(asked.model_copy(update={"chips": 1}), Layout()) * scale - extra * size
    spread = memory.state(asked, Layout()) * scale - extra * size
    assert alone / 1e9 == pytest.approx(120, rel=0.01)
    assert spread / 1e9 == pytest.approx(31.4, rel=0.01)
    whole = memory.state(work(model, n=64, stack="fsdp"), Layout()) * size / model.parameters() - extra * size / 64
    assert whole / 1e9 == pytest.approx(1.9, rel=0.02)


# --- calibration


def planted(families: dict[str, float], per: int, noise: float, seed: int) -> list[fit.Run]:
    """Runs whose speed is the constants' efficiency times a family's secret factor."""
    draw, found = np.random.default_rng(seed), []
    for family, factor in families.items():
        for number in range(per):
            scale = draw.uniform(1, 5)

            def speed(terms: Terms, scale: float = scale) -> float:
                return math.log(terms.efficiency) + scale

            actual = math.log(Terms().efficiency) + scale + factor + draw.normal(0, noise)
            found.append(fit.Run(f"{family}{number}", family, f"{family}-sku", f"site{number}", None, actual, speed))
    return found


def test_planted_families_are_found_and_few_runs_are_drawn_to_the_rest() -> None:
    many = planted({"a": 0.1, "b": -0.1}, 12, 0.1, seed=1)
    lone = planted({"c": 0.6}, 1, 0.0, seed=2)
    fitted = fit.fit([*many, *lone])
    for run, expected in ((many[0], 0.1), (many[-1], -0.1)):
        fresh = replace(run, site="new")
        base = run.speed(Terms())
        assert fit.predictive(fresh, fitted)[0] - base == pytest.approx(expected, abs=0.07)
    alone = fit.predictive(replace(lone[0], site="new"), fitted)
    shift = alone[0] - lone[0].speed(Terms())
    crowd = planted({"c": 0.6}, 12, 0.0, seed=2)
    sure = fit.predictive(replace(crowd[0], site="new"), fit.fit([*many, *crowd]))
    assert 0.1 < shift < 0.59  # between the others' mean, which is 0, and what the one run says
    assert shift < sure[0] - crowd[0].speed(Terms()) < 0.61  # twelve runs are believed more than one
    assert alone[1] > sure[1]


def test_the_posterior_is_that_of_a_linear_gaussian_model() -> None:
    """Where log speed is linear in the unknowns, ridge regression by least squares is the same: a second solver."""
    runs = planted({"a": 0.1, "b": -0.1}, 6, 0.1, seed=3)
    fitted = fit.fit(runs)
    prior = np.array([fit.PRIOR.get(name) or fitted.sigma[name.split()[0]] for name in fitted.names])
    gradient = np.array([fit.gradient_of(run, fitted.names, fitted.mean)[1] for run in runs])
    target = np.array([run.actual - run.speed(Terms()) for run in runs])
    last = fitted.sigma["noise"]  # the mean was solved with the sigmas of the round before
    stacked = np.vstack([gradient / last, np.diag(1 / prior)])
    solved, *_ = np.linalg.lstsq(stacked, np.concatenate([target / last, np.zeros(len(prior))]), rcond=None)
    assert gradient @ fitted.mean == pytest.approx(gradient @ solved, abs=0.03)


def some(names: tuple[str, ...]) -> list[tuple[Workload, float]]:
    return [(one, speed) for one, speed in calibrate.usable(PUBLISHED) if one.site in names]


def test_what_is_left_out_has_no_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times the speed of one site's runs moves no prediction of that site."""
    monkeypatch.setattr(fit, "ROUNDS", 1)
    known = some(("meta-llama2", "ai2", "phi4", "megatron-2022"))
    before = calibrate.cross_validate(known, CATALOGUE)
    changed = [(one, speed * 10 if one.site == "ai2" else speed) for one, speed in known]
    after = calibrate.cross_validate(changed, CATALOGUE)
    for old, new in zip(before, after, strict=True):
        same = (old.middle, old.low, old.high, old.baseline) == (new.middle, new.low, new.high, new.baseline)
        assert same == (old.run.site == "ai2")


def test_a_publisher_is_left_out_with_all_its_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times the speed of one release moves no prediction of the same publisher's other release."""
    monkeypatch.setattr(fit, "ROUNDS", 1)
    first, second = some(("meta-llama2",)), some(("ai2",))
    named = [(one.model_copy(update={"site": "bridge-25.11"}), speed) for one, speed in first]
    named += [(one.model_copy(update={"site": "bridge-26.02"}), speed) for one, speed in second]
    others = some(("phi4", "megatron-2022"))
    before = calibrate.strangers(named + others, CATALOGUE)
    assert {one.run.site for one in before} == {"bridge-25.11", "bridge-26.02"}
    faster = [(one, speed * 10 if one.site == "bridge-25.11" else speed) for one, speed in named]
    after = calibrate.strangers(faster + others, CATALOGUE)
    assert [one.middle for one in before] == [one.middle for one in after]
    assert calibrate.strangers(others, CATALOGUE) == []


def test_a_models_own_factor_is_learnt_where_it_has_experts() -> None:
    """Two models whose runs differ by a constant: known again at a new site; an unknown model is their mean."""
    runs = [replace(run, model="x" if number % 2 else "y", actual=run.actual + 0.2 * (number % 2 or -1))
            for number, run in enumerate(planted({"a": 0.0}, 24, 0.02, seed=5))]  # fmt: skip
    fitted = fit.fit(runs)
    fresh = replace(runs[1], site="new")
    known = fit.predictive(fresh, fitted)
    assert known[0] - fresh.speed(Terms()) == pytest.approx(0.2, abs=0.06)
    unknown = fit.predictive(replace(fresh, model="z"), fitted)
    assert unknown[0] - fresh.speed(Terms()) == pytest.approx(0.0, abs=0.06)
    assert unknown[1] > known[1]


def gate(efficiency: float | None, chip: str | None = "H800") -> dict[str, object]:
    """As `ottava qualify --out` writes it, but for figures that a prediction does not read."""
    row = {"id": "q", "kind": "qualify", "chip": chip, "site": "mine", "matmul_efficiency": efficiency, "n": 8}
    return {"train": [], "qualify": [row]}


def test_a_gates_row_speaks_for_its_site_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fast products seen at a site make predictions for it faster, elsewhere less, and leave its interval no wider."""
    monkeypatch.setattr(fit, "ROUNDS", 1)
    known = some(("meta-llama2", "ai2", "phi4", "megatron-2022"))
    runs = [calibrate.prepare(work, CATALOGUE, speed)[0] for work, speed in known]
    asked = Workload(**{"id": "w", "model": calibrate.usable(PUBLISHED)[0][0].model, "chip": "H800", "n": 64,
                        "seq": 4096, "gbs": 512})  # fmt: skip
    found = {}
    for share in (None, 0.4, 0.6, 0.8):
        beside = []
        if share is not None:
            (path := tmp_path / f"{share}.json").write_text(json.dumps(gate(share)))
            assert rows.read(path) == []
            beside = [calibrate.products(row, CATALOGUE) for row, _ in rows.examined(path)]
        fitted = fit.fit([*runs, *beside])
        for site in ("mine", "elsewhere"):
            one = calibrate.prepare(asked.model_copy(update={"site": site}), CATALOGUE)[0]
            found[share, site] = fit.predictive(one, fitted)
    here, there = ([found[share, site][0] for share in (0.4, 0.6, 0.8)] for site in ("mine", "elsewhere"))
    assert here == sorted(here)
    assert here[2] - here[0] > there[2] - there[0] > 0
    assert found[0.6, "mine"][1] < found[None, "mine"][1]


@pytest.mark.parametrize(("row", "said"), [
    (gate(None), "says nothing of a chip"),
    (gate(0.5, None), "says nothing of a chip"),
    (gate(0.5, "H9"), "no figures for a chip 'H9'"),
    (gate(7.0), "less than 1.2"),
])  # fmt: skip
def test_a_gates_row_that_says_nothing_is_refused(tmp_path: Path, row: dict[str, object], said: str) -> None:
    (path := tmp_path / "calibration.json").write_text(json.dumps(row))
    with pytest.raises(RecipeError, match=said) as caught:
        calibrate.calibrate_files([path], "chips.json", tmp_path / "c.json")
    assert "calibration.json:1" in str(caught.value.where)
    assert not (tmp_path / "c.json").exists()


@pytest.mark.parametrize(("speed", "said"), [
    (True, "a number above 0"), (-3, "a number above 0"), (math.nan, "a number above 0"), ("9", "a number above 0"),
    (9e9, "the peak of a H800"), (None, "nothing to learn"),
])  # fmt: skip
def test_a_run_of_ones_own_that_teaches_nothing_is_refused(tmp_path: Path, speed: Any, said: str) -> None:
    """A dense 8B model passes 6 FLOPs a parameter and token: no H800 reaches 9e9 tokens/s, at 2e15 operations/s."""
    row = {"id": "own", "arch": "llama3-8b", "chip": "H800", "n": 64, "seq": 8192, "gbs": 512, "site": "here"}
    path = write(tmp_path, [row | {"tokens_per_s_per_chip": speed}])
    with pytest.raises(RecipeError, match=said) as caught:
        calibrate.calibrate_files([path], "chips.json", tmp_path / "c.json")
    assert str(caught.value.where).startswith(str(path))
    assert not (tmp_path / "c.json").exists()


def test_a_file_without_rows_predicts_nothing(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no rows"):
        predict.predict_file(write(tmp_path, []))


def test_the_calibration_is_of_the_data_and_good_enough() -> None:
    """The committed calibration was made from the committed data, and reaches what was asked of it."""
    learnt = calibrate.load()
    assert learnt.data_sha256 == calibrate.digest(rows.published(), chips.locate("chips.json"))
    assert learnt.runs == len(calibrate.usable(PUBLISHED))
    whole, experts = learnt.accuracy["all"], learnt.accuracy["experts"]
    assert whole["mape"] <= 0.15
    assert experts["mape"] <= 0.20
    assert 0.75 <= whole["inside"] <= 0.90
    assert whole["ratio"] >= 1.5


@pytest.mark.slow
def test_the_committed_calibration_is_what_the_command_makes(tmp_path: Path) -> None:
    made, guesses = calibrate.calibrate_files([], "chips.json", tmp_path / "c.json")
    committed = calibrate.load()
    assert made.names == committed.names
    assert made.mean == pytest.approx(committed.mean, abs=1e-4)
    assert made.accuracy == committed.accuracy
    assert len({one.run.site for one in guesses}) == 24


# --- rows


def test_a_target_is_never_looked_at(tmp_path: Path) -> None:
    row = {"id": "r", "arch": "llama3-8b", "chip": "H100", "n": 64, "seq": 8192, "gbs": 512}
    blind, _ = predict.predict_file(write(tmp_path, [row]))
    told, _ = predict.predict_file(write(tmp_path, [row | {"tokens_per_s_per_chip": 1.0, "mfu_causal": 0.9}]))
    assert blind == told


def test_every_published_row_has_an_interval_or_a_reason(tmp_path: Path) -> None:
    raw = json.loads(rows.published().read_text())
    for section in ("train", "serve"):
        for row in raw[section]:
            row.pop("tokens_per_s_per_chip", None)
    found, warnings = predict.predict_file(write(tmp_path, {key: raw[key] for key in ("arch", "train", "serve")}))
    assert warnings == []
    assert [one.id for one, _ in found] == [row["id"] for key in ("train", "serve") for row in raw[key]]
    for one, ignored in found:
        assert ignored == ()
        if one.declined is None:
            assert one.tokens_per_s_per_chip is not None
            assert one.low is not None
            assert one.high is not None
            assert 0 < one.low < one.tokens_per_s_per_chip < one.high
            assert one.why
        else:
            assert (one.tokens_per_s_per_chip, one.low, one.high) == (None, None, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chip": "H1000"}, "H1000"),
        ({"n": -8}, "n: input should be greater than or equal to 1"),
        ({"arch": "llama3-9b"}, "did you mean 'llama3-8b'"),
        ({"parallel": {"tp": 8, "qq": 2}}, "unknown key 'qq'"),
        ({"precision": "fp7"}, "precision"),
        ({"gbs": "many"}, "gbs"),
        ({"n": True}, "plain number"),
        ({"n": "64"}, "plain number"),
        ({"n": 64 * 10**12}, "less than or equal to"),
        ({"tokens": True}, "plain number"),
        ({"gbs": None}, "gbs (batch) is not given"),
        ({"parallel": [8, 1]}, "parallel"),
        ({"arch": ["llama3-8b"]}, "no name and no shape"),
        ({"arch": {"L": 2}}, "missing"),
    ],
)
def test_a_wrong_row_is_named_with_its_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    good = {"id": "good", "arch": "llama3-8b", "chip": "H100", "n": 64, "seq": 8192, "gbs": 512}
    path = write(tmp_path, [good, good | {"id": "bad"} | change])
    with pytest.raises(RecipeError) as caught:
        predict.predict_file(path)
    assert message.lower() in str(caught.value).lower()
    where = str(caught.value.where)
    assert where.startswith(f"{path}:")
    first = next(n for n, line in enumerate(path.read_text().splitlines(), 1) if '"bad"' in line)
    assert int(where.split(":")[1]) >= first - 1


def test_two_rows_of_one_id_are_refused(tmp_path: Path) -> None:
    row = SIZED | {"id": "r"}
    with pytest.raises(RecipeError, match="stands twice"):
        rows.read(write(tmp_path, [row, row]))


def test_an_unknown_key_is_told(tmp_path: Path) -> None:
    row = SIZED | {"id": "r", "recompte": "full"}
    _, warnings = predict.predict_file(write(tmp_path, [row]))
    assert len(warnings) == 1
    assert "'recompte' is no key" in warnings[0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"arch": "gpt-1.7b", "n": 8}, None),
        ({"arch": SMALL, "n": 8}, "small model on one node"),
        ({"kind": "serve", "phase": "decode", "chip": "B200"}, "from a profile alone"),
        ({"kind": "rl"}, "name them"),
        ({"chip": "A100", "precision": "fp8"}, "no FP8"),
        ({"chip": "SPR-AMX-2core"}, "measure it"),
        ({"n": 16, "parallel": {"tp": 8, "pp": 4}}, "are fewer than"),
        ({"n": 60, "parallel": {"tp": 8}}, None),
        ({"arch": "deepseek-v3", "n": 7}, "alone take"),
    ],
)  # fmt: skip
def test_it_declines_where_it_is_not_good(tmp_path: Path, change: dict[str, Any], reason: str | None) -> None:
    row = {"id": "r", "arch": "llama3-8b", "chip": "H100", "n": 64, "seq": 2048, "gbs": 64} | change
    [(one, _)], _ = predict.predict_file(write(tmp_path, [row]))
    assert (one.declined is None) == (reason is None)
    if reason is not None:
        assert reason in str(one.declined)
        assert one.tokens_per_s_per_chip is None


def test_small_models_on_one_node_have_wide_intervals(tmp_path: Path) -> None:
    row = {"arch": "llama3-8b", "chip": "H100", "seq": 2048, "gbs": 512}
    found, _ = predict.predict_file(write(tmp_path, [row | {"id": "one", "n": 8}, row | {"id": "many", "n": 64}]))
    widths = [math.log((one.high or 0) / (one.low or 1)) for one, _ in found]
    assert widths[0] == pytest.approx(2 * calibrate.Z80 * calibrate.ALONE_SIGMA)
    assert widths[1] < widths[0] / 2


def test_a_known_site_narrows_the_interval() -> None:
    row = next(row for row in PUBLISHED if row.id == "ascend-yi-34b")
    assert row.work is not None
    learnt = calibrate.load()
    here = predict.predict(row.work, CATALOGUE, learnt)
    away = predict.predict(row.work.model_copy(update={"site": None}), CATALOGUE, learnt)
    assert math.log((here.high or 0) / (here.low or 1)) < math.log((away.high or 0) / (away.low or 1))


def test_reinforcement_is_the_sum_or_the_longer_of_its_sides() -> None:
    learnt = calibrate.load()
    base = work(SHAPES["qwen2-7b"], chip="H800", n=64, gbs=512, seq=8192, precision="bf16", flash_attention=True)
    train = predict.predict(base, CATALOGUE, learnt)
    side = {"chip": "910B3", "n": 32, "length": 7000, "tokens_per_s_per_chip": 500.0}
    tokens = 512 * 8192
    learn = tokens / (train.tokens_per_s_per_chip or 0) / 64 * 5 / 3
    generate = 512 * 7000 / 500 / 32
    hand = base.model.parameters() * 2 / (32 * 200 / 8 * 1e9)  # 910B3: 200 Gb/s a chip, the slower of both
    for overlapped, seconds in ((False, learn + generate + hand), (True, max(learn, generate + hand))):
        asked = Workload.model_validate(
            {**base.model_dump(), "kind": "rl", "rollout": {**side, "overlapped": overlapped}}
        )
        one = predict.predict(asked, CATALOGUE, learnt)
        assert one.seconds == pytest.approx(seconds, rel=1e-6)
        assert one.tokens_per_s_per_chip == pytest.approx(tokens / seconds / 96, rel=1e-6)


def test_rollouts_of_another_vendor_take_a_published_profile() -> None:
    asked = work(
        SHAPES["deepseek-v3"], chip="H800", n=512, gbs=512, seq=4096, precision="fp8", kind="rl", flash_attention=True,
        rollout={"chip": "H800", "n": 512, "length": 8000, "prompt": 1000, "precision": "fp8"},
    )  # fmt: skip
    profiles = [row for row in PUBLISHED if row.work is not None and row.work.kind == "serve"]
    one = predict.predict(asked, CATALOGUE, calibrate.load(), profiles)
    assert one.declined is None
    assert any("ds-online-decode" in why for why in one.why)
    assert predict.predict(asked, CATALOGUE, calibrate.load()).declined is not None


def test_the_command_prints_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = SIZED | {"id": "r", "tokens": 1e12}
    command: Callable[..., Any] = cli.app
    command(["predict", str(write(tmp_path, [row])), "--json"], standalone_mode=False)
    [one] = json.loads(capsys.readouterr().out)["rows"]
    assert one["id"] == "r"
    assert one["declined"] is None
    assert one["low"] < one["tokens_per_s_per_chip"] < one["high"]
    hours = 1e12 / one["tokens_per_s_per_chip"] / 64 / 3600
    assert one["hours"][1] == pytest.approx(hours, rel=1e-4)


def test_the_example_rows_are_predicted_but_for_the_one_without_a_profile(capsys: pytest.CaptureFixture[str]) -> None:
    command: Callable[..., Any] = cli.app
    command(["predict", str(Path(__file__).parents[1] / "fleets" / "rows.json"), "--json"], standalone_mode=False)
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["id"] for row in rows if row["declined"]] == ["serve-unprofiled"]
    assert all(row["low"] < row["tokens_per_s_per_chip"] < row["high"] for row in rows if not row["declined"])
