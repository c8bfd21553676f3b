# ruff: noqa: E501  (the files below are one job or pool a line, so that their mistakes have lines)
"""Portfolios: mistakes with their lines, reasons, what gives way, the dossier, the pick, the command line."""

from __future__ import annotations

import html
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ottava.console import planning
from ottava.errors import ArtifactError, RecipeError
from ottava.planner import chips, pick, place, portfolio, quantity, relax, sensitivity, students, ways
from ottava.planner.instance import judge
from tests.test_solve import needs_solver

FLEETS = Path(__file__).parents[1] / "fleets"
CATALOGUE = chips.load(FLEETS / "chips.json")
CITED = 'source: "made up", date: "2026-11", certainty: guess'
FLEET = f"""kind: inventory
name: two
pools:
  - {{name: nvidia, chip: H800, chips: 64, link: 400 Gb/s, domain: 8, usd_per_chip_hour: {{value: 2 USD/chip-hour, {CITED}}}, {CITED}}}
  - {{name: ascend, chip: 910B3, chips: 64, link: 200 Gb/s, domain: 8, usd_per_chip_hour: {{value: 1 USD/chip-hour, {CITED}}}, {CITED}}}
"""
JOBS = f"""kind: portfolio
name: three
start: 2026-01-05
horizon: 4 weeks
budget: 30000 USD
rules:
  - {{name: home, vendors: [Huawei], strength: soft, price: 500 USD, reason: domestic first, {CITED}}}
jobs:
  - {{name: first, kind: train, parameters: 8e9 parameters, chips: [32, 64], memory: 130 GB, hours: {{hopper: {{value: 5376 chip-hours, low: 4000 chip-hours, high: 8000 chip-hours, {CITED}}}, ascend: {{value: 8064 chip-hours, {CITED}}}}}, deadline: {{by: 2026-01-20, usd_per_week: 1000 USD/week}}, {CITED}}}
  - {{name: second, kind: rl, parameters: 8e9 parameters, chips: [64], memory: 130 GB, link: 300 Gb/s, after: [first], hours: {{H800: {{value: 3072 chip-hours, {CITED}}}}}, {CITED}}}
  - {{name: answers, kind: serve, parameters: 8e9 parameters, memory: 16 GB, phases: [{{begin: 2026-01-19, until: 2026-01-26, volume: 8.64e8 tokens/day}}], rate: {{910B3: {{value: 500 tokens/s/chip, {CITED}}}, H800: {{value: 900 tokens/s/chip, {CITED}}}}}, {CITED}}}
"""


def asked(tmp_path: Path, jobs: str = JOBS, fleet: str = FLEET) -> portfolio.Asked:
    (tmp_path / "jobs.yaml").write_text(jobs)
    (tmp_path / "fleet.yaml").write_text(fleet)
    return portfolio.load(tmp_path / "jobs.yaml", tmp_path / "fleet.yaml", CATALOGUE)


def planned(tmp_path: Path, jobs: str = JOBS, fleet: str = FLEET, **more: Any) -> dict[str, Any]:
    return place.plan(ways.build(asked(tmp_path, jobs, fleet)), seconds=10, workers=1, **more)


def test_a_plan_by_hand(tmp_path: Path) -> None:
    """first: 8,064 hours at $1 on Ascend beat 5,376 at $2; second has one pool; 20 chips of Ascend answer for a week."""
    told = planned(tmp_path)
    rows = {row["job"]: row for row in told["assignments"]}
    assert (told["status"], told["gap"]) == ("optimal", 0.0)
    assert [(rows[n]["pool"], rows[n]["usd"]) for n in ("first", "second", "answers")] == [
        ("ascend", 8064), ("nvidia", 6144), ("ascend", 20 * 168),
    ]  # fmt: skip
    assert told["usd"] == 8064 + 6144 + 20 * 168
    watts = {name: CATALOGUE.chip(name).watts.value for name in ("910B3", "H800")}  # type: ignore[union-attr]
    spent = [8064 * watts["910B3"] / 1000, 3072 * watts["H800"] / 1000, 20 * 168 * watts["910B3"] / 1000]
    assert [rows[n]["kwh"] for n in ("first", "second", "answers")] == [round(one) for one in spent]
    assert told["kwh"] == sum(round(one) for one in spent)
    assert told["objective"] == told["usd"] + 500
    assert (rows["first"]["start"], rows["first"]["end"], rows["first"]["binding"]) == (
        "2026-01-05",
        "2026-01-11",
        "release",
    )
    assert rows["second"]["start"] == rows["first"]["end"]
    assert rows["second"]["binding"] == "after"
    assert "when first has ended" in rows["second"]["reason"]
    assert (
        "nvidia is the only pool that takes it: not ascend (it needs a network of 300 Gb/s" in rows["second"]["reason"]
    )
    assert "$8,064 against $11,252 on nvidia, where it would disregard home" in rows["first"]["reason"]
    assert all(row["reason"].count(";") == 1 for row in rows.values())


@pytest.mark.parametrize(
    ("where", "old", "new", "message"),
    [
        ("fleet", "chip: H800", "chip: H8000", "no figures for a chip 'H8000'"),
        ("fleet", "chips: 64, link: 200", "chips: -64, link: 200", "greater than or equal to 0"),
        ("fleet", "link: 400 Gb/s", "link: 400", "no unit"),
        (
            "fleet",
            "name: ascend, chip: 910B3, chips: 64",
            "name: ascend, chip: 910B3, chips: 64, reserved: 65",
            "reserved",
        ),
        ("fleet", "kind: inventory", "kind: portfolio", "`kind: inventory`"),
        ("jobs", "horizon: 4 weeks", "horizon: 4", "no unit"),
        ("jobs", "horizon: 4 weeks", "horizon: 4 fortnights", "'fortnights'"),
        ("jobs", "budget: 30000 USD", "budget: -1 USD", "below 0"),
        ("jobs", "vendors: [Huawei]", "vendors: [Hauwei]", "no vendor 'Hauwei'"),
        ("jobs", "hours: {H800", "hours: {H900", "no chip or family 'H900'"),
        ("jobs", "after: [first]", "after: [frist]", "no job 'frist'"),
        ("jobs", "after: [first]", "after: [second]", "circle: second -> second"),
        ("jobs", "strength: soft, price: 500 USD", "strength: soft", "a soft rule has a price"),
        ("jobs", "chips: [64], memory: 130 GB", "chips: [64], memory: 130 TB", "fits nowhere"),
        ("jobs", "chips: [64], memory: 130 GB", "chips: [65], memory: 130 GB", "fits nowhere"),
        ("jobs", "name: second", "name: first", "two jobs have the name"),
        ("fleet", "name: ascend, chip", "name: nvidia, chip", "two pools have the name"),
        ("fleet", "chips: 64, link: 200", "chips: true, link: 200", "plain number"),
        ("fleet", "chips: 64, link: 200", 'chips: "64", link: 200', "plain number"),
        ("fleet", "chips: 64, link: 200", "chips: 64000000000000000000, link: 200", "less than or equal to"),
        ("jobs", "horizon: 4 weeks", "horizon: 4e5 weeks", "20,000 can be searched"),
        ("jobs", "horizon: 4 weeks", "horizon: 4e30 weeks", "more than there can be"),
        ("jobs", "horizon: 4 weeks", "horizon: 3 h", "at least one step"),
        ("jobs", "low: 4000", "low: 6000", "must rise"),
        ("jobs", "high: 8000", "high: 5000", "must rise"),
        ("jobs", "start: 2026-01-05", "start: 2026-02-30", "date"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path: Path, where: str, old: str, new: str, message: str) -> None:
    texts = {"jobs": JOBS, "fleet": FLEET}
    assert old in texts[where]
    before = texts[where].splitlines()
    texts[where] = texts[where].replace(old, new, 1)
    line = next(n for n, (a, b) in enumerate(zip(before, texts[where].splitlines(), strict=True), 1) if a != b)
    with pytest.raises(RecipeError) as caught:
        ways.build(asked(tmp_path, texts["jobs"], texts["fleet"]))
    assert message in caught.value.what
    assert caught.value.where is not None
    assert caught.value.where.startswith(str(tmp_path / f"{where}.yaml"))
    assert f":{line}:" in caught.value.where


def test_rules_that_contradict_each_other_are_both_named(tmp_path: Path) -> None:
    hard = [
        f"  - {{name: {name}, vendors: [{vendor}], strength: hard, reason: x, {CITED}}}"
        for name, vendor in (("ours", "Huawei"), ("theirs", "NVIDIA"))
    ]
    jobs = JOBS.replace("rules:\n", "rules:\n" + "\n".join(hard) + "\n")
    with pytest.raises(
        RecipeError, match=r"'ours' \(.*jobs.yaml:7:5\) and 'theirs' leave no vendor for 'first'.*\n.*jobs.yaml:8:5"
    ):
        asked(tmp_path, jobs)


def test_a_longer_circle_is_told_whole(tmp_path: Path) -> None:
    jobs = JOBS.replace("{name: first, kind: train,", "{name: first, kind: train, after: [second],")
    with pytest.raises(RecipeError, match="first -> second -> first"):
        asked(tmp_path, jobs)


def test_a_recipe_is_no_portfolio(tmp_path: Path) -> None:
    recipe = FLEETS.parent / "recipes" / "tiny.yaml"
    (tmp_path / "fleet.yaml").write_text(FLEET)
    with pytest.raises(RecipeError, match="this is a recipe") as caught:
        portfolio.load(recipe, tmp_path / "fleet.yaml", CATALOGUE)
    assert "--only plan" in (caught.value.fix or "")


@needs_solver
def test_what_has_to_give_way_is_the_budget_and_by_how_much(tmp_path: Path) -> None:
    told = planned(tmp_path, JOBS.replace("budget: 30000 USD", "budget: 17000 USD"))
    assert (told["status"], told["assignments"]) == ("infeasible", [])
    (one,) = told["relaxations"]
    assert (one["constraint"], one["by"], one["usd"]) == ("budget", 8064 + 6144 + 20 * 168 - 17000, 568.0)
    enough = {row["kind"]: row["enough"] for row in told["alternatives"]}
    assert enough["the budget"] is True
    assert enough["chips"] is False


@needs_solver
def test_a_hard_rule_without_room_is_what_has_to_give_way(tmp_path: Path) -> None:
    only = f"  - {{name: ours, vendors: [Huawei], strength: hard, jobs: [second], reason: x, {CITED}}}\n"
    told = planned(tmp_path, JOBS.replace("rules:\n", "rules:\n" + only), alternatives=False)
    assert [one["constraint"] for one in told["relaxations"]] == ["rule ours"]
    assert "for second" in told["relaxations"][0]["reason"]


@needs_solver
def test_shares_that_do_not_fit_need_so_many_more_chips(tmp_path: Path) -> None:
    """Four shares of 20 chips, served at once on a pool of 30 chips, and nowhere else: 50 more, and what the budget lacks."""
    fleet = FLEET.replace("chips: 64, link: 200", "chips: 30, link: 200")
    jobs = JOBS.replace("volume: 8.64e8", "volume: 34.56e8").replace(
        "rate: {910B3", "split: 4, pools: [ascend], rate: {910B3"
    )
    jobs = jobs.replace("chips: [32, 64], memory", "chips: [32, 64], pools: [nvidia], memory")
    problem = ways.build(asked(tmp_path, jobs, fleet))
    found = relax.fewest(problem, seconds=10, workers=1)
    over = 5376 * 2 + 3072 * 2 + 4 * 20 * 168 - 30_000
    assert {(one["constraint"], one["by"], one["proven"]) for one in found} == {
        ("ascend", 4 * 20 - 30, True),
        ("budget", over, True),
    }


def test_the_dossier_argues_both_ways(tmp_path: Path) -> None:
    told = planned(tmp_path, JOBS.replace("price: 500 USD", "price: 0 USD").replace("value: 8064", "value: 12000"))
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(told))
    content, text = planning.dossier(path, out=tmp_path / "out", seconds=10)
    requests = {one["job"]: one for one in content["requests"]}
    assert set(requests) == {"first", "second"}
    assert requests["first"]["home"]["verdict"] == "possible"
    assert requests["second"]["home"]["verdict"] == "no way"
    assert "300 Gb/s" in requests["second"]["home"]["refusals"][0]["why"]
    assert any("us-2023-10" in line for line in requests["first"]["law"])
    assert "| home | 1, 2026-11 |" in text
    page = (tmp_path / "out" / "dossier.html").read_text()
    assert "No domestic chip of the inventory" in page
    assert (tmp_path / "out" / "dossier.md").read_text() == text
    (tmp_path / "jobs.yaml").write_text(JOBS + "# changed\n")
    with pytest.raises(ArtifactError, match="changed since the plan"):
        planning.dossier(path)


def test_pages_are_whole_and_hold_what_was_decided(tmp_path: Path) -> None:
    asked(tmp_path)
    told = planning.plan(
        tmp_path / "jobs.yaml", tmp_path / "fleet.yaml", seconds=5, workers=1, out=tmp_path / "out", points=0
    )
    page = (tmp_path / "out" / "plan.html").read_text()
    assert json.loads((tmp_path / "out" / "plan.json").read_text()) == told
    assert page.count("<svg") == page.count("</svg>") == 3
    for row in told["assignments"]:
        assert row["task"] in page
    assert "<script" not in page
    text, long = planning.plan_text(told), planning.plan_text(told, why=True)
    assert all(row["task"] in text and row["reason"] not in text for row in told["assignments"])
    assert all(row["reason"] in long and row["reason"] in html.unescape(page) for row in told["assignments"])
    assert max(map(len, text.splitlines())) <= 100
    planning.forecast(FLEETS / "r2-run.yaml", by=None, draws=200, seed=0, out=tmp_path / "out")
    assert "Probability of release by day" in (tmp_path / "out" / "forecast.html").read_text()


def test_the_tornado_and_the_spread_by_hand(tmp_path: Path) -> None:
    problem = ways.build(
        asked(
            tmp_path,
            JOBS.replace(
                "value: 8064 chip-hours", "value: 8064 chip-hours, low: 6000 chip-hours, high: 9000 chip-hours"
            ),
        )
    )
    told = place.plan(problem, seconds=5, workers=1)
    schedule = planning.schedule_of(problem, told)
    assert not judge(problem.instance, schedule).broken
    (cause,) = sensitivity.tornado(problem, schedule)
    assert (cause.name, cause.usd_high - cause.usd_low) == ("time of first", pytest.approx(3000))
    spread = sensitivity.spread(problem, schedule)
    fixed = 6144 + 20 * 168
    assert spread["p10"] == pytest.approx(fixed + 6000, rel=0.02)
    assert spread["p90"] == pytest.approx(fixed + 9000, rel=0.02)


def test_the_shipped_example_is_whole() -> None:
    found = portfolio.load(FLEETS / "r2-jobs.yaml", FLEETS / "deepseek.yaml", CATALOGUE)
    cited = portfolio.provenance(found.portfolio) + portfolio.provenance(found.inventory)
    assert all(one.source and one.date and one.certainty for one in cited)
    counts: dict[str, int] = {}
    for pool in found.inventory.pools:
        counts[pool.chip] = counts.get(pool.chip, 0) + (pool.chips if pool.name != "h20-new" else 0)
    assert (counts["H800"], counts["H100"], counts["H20"]) == (10_000, 10_000, 30_000)
    assert next(pool.chips for pool in found.inventory.pools if pool.name == "h800-v3") == 2048


@given(st.floats(0, 1e12, allow_nan=False), st.sampled_from(sorted(quantity.TIME)))
def test_a_number_keeps_its_unit(number: float, unit: str) -> None:
    assert quantity.read(f"{number!r} {unit}", quantity.TIME) == number * quantity.TIME[unit]


@pytest.mark.parametrize("text", [5, "5", "-5 h", "h", "", "5 h h", True, None, "nan h", "inf h", "1e19 h"])
def test_what_is_no_quantity_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match=r"unit|number|below|beyond"):
        quantity.read(text, quantity.TIME)


def test_the_largest_student_that_fits_is_picked() -> None:
    work = students.load(FLEETS / "students.json")
    shapes = {shape.name: shape for shape in work.students}
    for memory in (2.5, 10.0, 24.0, 64.0, 200.0):
        told = pick.pick(work, CATALOGUE, memory_gb=memory, bandwidth_gbs=100.0, context=4096)
        fits = []
        for shape in work.students:
            cache = 4 * shape.layers * shape.kv_heads * (shape.hidden // shape.heads) * 4096 / 1e9
            if min(pick.BYTES[form] for form in ("e8m0", "bf16")) * shape.parameters() / 1e9 + cache <= 0.9 * memory:
                fits.append(shape.parameters())
        chosen = told["choice"]
        assert (shapes[chosen["student"]].parameters() if chosen else None) == max(fits, default=None)


def test_a_speed_above_the_memorys_own_is_refused() -> None:
    work = students.load(FLEETS / "students.json")
    told = pick.pick(work, CATALOGUE, memory_gb=24.0, bandwidth_gbs=100.0, speed=1e4)
    assert told["choice"] is None
    assert told["why_not"]
    slow = pick.pick(work, CATALOGUE, memory_gb=24.0, bandwidth_gbs=100.0, speed=1.0)
    assert all(row["ceiling_tokens_per_s"] >= 1.0 for row in slow["rows"] if row["verdict"] == "yes")


def test_the_command_line(tmp_path: Path) -> None:
    asked(tmp_path)

    def ottava(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "ottava.cli", *words], capture_output=True, text=True, check=False)

    good = ottava("plan", str(tmp_path / "jobs.yaml"), "--fleet", str(tmp_path / "fleet.yaml"), "--json")
    assert good.returncode == 0, good.stderr
    assert {"status", "gap", "seconds", "assignments"} <= set(json.loads(good.stdout))
    (tmp_path / "fleet.yaml").write_text(FLEET.replace("chip: H800", "chip: H8000"))
    bad = ottava(
        "plan", str(tmp_path / "jobs.yaml"), "--fleet", str(tmp_path / "fleet.yaml"), "--out", str(tmp_path / "out")
    )
    assert (bad.returncode, bad.stdout) == (2, "")
    assert "fleet.yaml:4:" in bad.stderr
    assert not (tmp_path / "out").exists()
    none = ottava("pick", "--memory", "1 GB", "--bandwidth", "10 GB/s", "--json")
    assert none.returncode == 1
    assert json.loads(none.stdout)["choice"] is None
