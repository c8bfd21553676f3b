"""The comparison of algorithms: the table and its default by hand, equal compute, and trials that are done once."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ottava import runner, stages
from ottava.artifact import load
from ottava.errors import RecipeError
from ottava.recipe import load_recipe
from ottava.stages import compare
from ottava.stages.compare import MEANS, Spec, merged, table
from ottava.tasks.statistics import t_interval
from ottava.trainer import trials

T2 = 12.706204736432095  # Student's t, 97.5%, one degree of freedom


def row(before: float, after: float, rows: float = 100.0, **more: Any) -> dict[str, Any]:
    return {**dict.fromkeys(MEANS, 1.0), "before": before, "after": after, "rows": rows, "stopped": None, **more}


def test_gains_and_paired_differences() -> None:
    found = {"grpo": [row(0.8, 0.9), row(0.7, 0.9)], "dapo": [row(0.8, 0.95), row(0.7, 0.93)]}
    grpo, dapo = table("grpo", found)
    assert grpo["gain"] == pytest.approx(0.15)
    assert (grpo["low"], grpo["high"]) == pytest.approx((0.15 - T2 * 0.05, 0.15 + T2 * 0.05))
    assert grpo["difference"] is None
    assert dapo["difference"] == pytest.approx(0.04)
    assert (dapo["difference_low"], dapo["difference_high"]) == pytest.approx((0.04 - T2 * 0.01, 0.04 + T2 * 0.01))
    assert [(one["name"], one["seeds"], one["default"]) for one in (grpo, dapo)] == [
        ("grpo", 2, True),
        ("dapo", 2, False),
    ], "0.04 +/- 0.13: not shown"
    assert (grpo["before"], grpo["after"]) == pytest.approx((0.75, 0.9))


def ahead(by: float, spread: float = 0.001, rows: float = 100.0) -> list[dict[str, Any]]:
    return [row(0.8, 0.9 + by + spread * ((seed % 2) - 0.5) + 0.01 * seed, rows) for seed in range(6)]


@pytest.mark.parametrize(
    ("arms", "default"),
    [
        ({"a": ahead(0.02), "b": ahead(0.01)}, "a"),
        ({"a": ahead(0.02, spread=0.2), "b": ahead(0.01)}, "b"),  # a is the higher by chance alone
        ({"a": ahead(0.02, rows=120.0), "b": ahead(0.01)}, "b"),  # a drew more replies
        ({"a": ahead(0.02, rows=104.0), "b": ahead(0.01)}, "a"),
        ({"a": ahead(-0.02), "b": ahead(0.0, spread=0.05)}, "grpo"),
        ({}, "grpo"),
    ],
)
def test_the_default_follows_by_the_rule(arms: dict[str, Any], default: str) -> None:
    rows = table("grpo", {"grpo": ahead(0.0, spread=0.0), **arms})
    assert [one["name"] for one in rows if one["default"]] == [default]


def test_more_algorithms_need_a_clearer_difference() -> None:
    """Of many that are alike, one looks better by chance: all intervals together hold with 95%."""
    two = table("grpo", {"grpo": ahead(0.0, spread=0.0), "a": ahead(0.02, spread=0.03)})
    many = table(
        "grpo", {"grpo": ahead(0.0, spread=0.0), "a": ahead(0.02, spread=0.03), **{n: ahead(0.0) for n in "bcdefgh"}}
    )
    assert many[1]["difference_low"] < two[1]["difference_low"]
    assert many[1]["low"] == two[1]["low"], "the gain's own interval is of 95%"
    assert two[1]["default"] > many[1]["default"]


def spec(**more: Any) -> Spec:
    return Spec.model_validate(more)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"seeds": [1001]}, "at least 2"),
        ({"seeds": [1001, 1001]}, "twice"),
        ({"seeds": [7, 1001]}, "greater than or equal to 1000"),
        ({"search": {"seeds": [1000]}}, "less than 1000"),
        ({"baseline": "ppo"}, "none of grpo"),
        ({"reinforce": {"policy": {"loss": "dapo"}}}, "said in `arms`"),
        ({"arms": [{"name": "grpo", "change": {"policy": {"los": 1}}}]}, "arms.0.change.policy.los"),
        ({"arms": [{"name": "grpo"}, {"name": "b", "tries": [{}, {}]}], "search": {}}, "as many tries"),
    ],
)
def test_what_cannot_be_compared_is_refused(said: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        spec(**said)


def test_an_arm_has_its_own_defaults_and_the_search_is_alike_for_all() -> None:
    its = spec(reinforce={"steps": 8, "rollout": {"group": 4}}, search={"seeds": [1], "rates": [1e-3, 2e-3]})
    by_name = {arm.name: [its.asked(change) for change in its.changes(arm)] for arm in its.arms}
    assert {len(asked) for asked in by_name.values()} == {2}
    for asked in by_name.values():
        assert [one.optimiser.adam for one in asked] == [1e-3, 2e-3]
        assert {one.optimiser.matrices for one in asked} == {"adam"}
        assert {(one.steps, one.rollout.group, one.rollout.prompts) for one in asked} == {(8, 4, 16)}
    assert by_name["dapo"][0].policy.clip_high == 0.28
    assert by_name["grpo"][0].policy.clip_high == 0.2
    assert merged({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}}) == {"a": {"b": 1, "c": 3}}


def test_the_recipe_of_the_table_holds() -> None:
    its = load_recipe(Path("recipes/reason.yaml"), stages.specs()).stages["compare"]
    assert isinstance(its, Spec)
    assert {"grpo", "dr_grpo", "dapo", "gspo"} <= {arm.name for arm in its.arms}
    assert its.search is not None
    assert len(its.seeds) >= 5


# ------------------------------------------------------------ for real, tiny

TINY = """
name: tiny-reason
seed: 3
fleet: f
stages:
  label: {cold_start: 60, answers: 300, steps: [2, 3], test_per_length: 5, test_one_step: 5, audit: 60}
  compare:
    seeds: [1001, 1002]
    cold_start: 30
    test_per_length: 10
    train: {steps: 40, batch: 8, direct: {weight: 0.0}, grid_from: 0.9}
    reinforce: {steps: 4, lengths: [2, 3], rollout: {prompts: 2, group: 4, max_new: 20}}
    arms:
      - {name: grpo}
      - {name: dapo, change: {policy: {loss: dapo}}}
    search: {seeds: [1], rates: [5.0e-4, 1.0e-3]}
"""


def its_recipe(folder: Path, *sets: str) -> Any:
    (folder / "f.yaml").write_text("name: f\npools:\n  - {name: a, workers: 2}\n")
    (folder / "r.yaml").write_text(TINY)
    return load_recipe(folder / "r.yaml", stages.specs(), sets)


def test_a_tiny_table_from_cold_starts(tmp_path: Path, launcher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole stage; interrupted, it goes on, and what was done is not done again."""

    class Again:
        def __enter__(self) -> Any:
            return launcher

        def __exit__(self, *_: object) -> None:
            pass

    def go(*sets: str) -> Any:
        return runner.run(its_recipe(tmp_path, *sets), tmp_path / "run", Again, runner.Quiet())

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(compare, "_write", stop)
        with pytest.raises(KeyboardInterrupt):
            go()
    work = tmp_path / "run" / "work" / "compare" / "work"
    before = {path: path.stat().st_mtime_ns for path in work.glob(f"*/*/{trials.RESULT}")}
    assert len(before) == 3 + 2 * 2 + 2 * 2, "starts, search, table"
    half = sorted(before)[::2]
    for path in half:
        path.unlink()
    found = go()["compare"]
    lines = [json.loads(line) for line in found.file("trials.jsonl").read_text().splitlines()]
    assert len(lines) == 11
    again = {line["digest"] for line in lines if line["part"] != "start"}
    assert not work.exists()
    assert load(found.path).summary == found.summary
    rows = {one["name"]: one for one in found.summary["algorithms"]}
    assert set(rows) == {"grpo", "dapo"}
    for one in rows.values():
        assert {"name", "gain", "low", "high", "seeds", "default"} <= one.keys()
        assert one["seeds"] == 2
        assert one["low"] <= one["gain"] <= one["high"]
    assert sum(one["default"] for one in rows.values()) == 1
    budget = 2 * 2 * 2 * 4  # generations, shards, prompts, replies
    assert rows["grpo"]["rows"] == budget
    assert rows["grpo"]["updates"] == 4
    for line in lines:
        if line["part"] == "table" and line["name"] == "dapo":
            assert line["rows"] <= 2 * budget
            assert line["updates"] == 4 or line["rows"] > budget / 2
    search = found.json("search.json")
    assert {len(one["trials"]) for one in search.values()} == {2}
    for name, one in search.items():
        best = max(trial["gain"] for trial in one["trials"])
        assert one["chosen"] == next(trial["change"] for trial in one["trials"] if trial["gain"] == best)
        assert one["chosen"] == rows[name]["change"]
    starts = {line["seed"]: line["thinking"]["right"] for line in lines if line["part"] == "start"}
    assert set(starts) == {1, 1001, 1002}
    assert {len(right) for right in starts.values()} == {20}
    assert len(again) > 2


def test_a_trial_is_one_function_of_what_is_asked(tmp_path: Path, begun: Path, dataset: Path) -> None:
    asked = {
        "kind": "arm", "seed": 5, "data": str(dataset), "task": "chains", "chat": str(begun), "start": "",
        "objective": "grpo", "start_model": str(begun), "rows": 64,
        "spec": compare.Spec().asked(
            {"steps": 6, "lengths": [2, 3], "rollout": {"prompts": 2, "group": 4, "max_new": 20},
             "policy": {"resample": 1}}
        ).model_dump(mode="json"),
    }  # fmt: skip
    results = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / trials.TRIAL).write_text(json.dumps(asked))
        assert trials.work({"trials": [str(folder)], "platform": "cpu"}) == {"done": 1}
        results.append(json.loads((folder / trials.RESULT).read_text()))
        before = (folder / trials.RESULT).stat().st_mtime_ns
        assert trials.work({"trials": [str(folder)], "platform": "cpu"}) == {"done": 0}
        assert (folder / trials.RESULT).stat().st_mtime_ns == before
    assert results[0]["digest"] == results[1]["digest"]
    its = results[0]
    assert its["rows"] >= its["updates"] / 2 * 16, "two shards of two groups of four, and what came in their place"
    assert len(its["rewards"]) == math.ceil(its["updates"] / 2)
    assert its["rows"] - 16 <= 64, "no generation was begun that could not be paid"
    assert its["stopped"] is None


def test_a_run_whose_numbers_are_lost_ends_before_the_update(
    begun: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.test_grpo import base
    from tests.test_grpo import spec as reinforce

    trainer = trials.make_trainer(base(begun, dataset, reinforce()))
    clip = type(trainer).clip
    monkeypatch.setattr(
        type(trainer), "clip", lambda self, total: math.nan if self.state.step == 2 else clip(self, total)
    )
    told, stopped = trials._train(trainer, None)
    assert stopped is not None
    assert "step 3" in stopped
    assert trainer.state.step == 2
    assert len(told) == 1
    assert trainer.state.weights.isfinite().all()


def test_stage_errors_name_the_mend(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the baseline 'x'"):
        its_recipe(tmp_path, "compare.baseline=x")


def test_an_interval_of_more_confidence_is_wider() -> None:
    assert t_interval([0.0, 2.0]) == pytest.approx((1 - T2, 1 + T2))
    assert t_interval([0.0, 2.0], 0.99) == pytest.approx((1 - 63.65674116, 1 + 63.65674116))
