"""The certificate goes with the data: made by the policy in the label stage, and asked for before any training."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ottava import stages, tasks
from ottava.artifact import digest_of
from ottava.console import claims, summary
from ottava.errors import DataError, RecipeError
from ottava.labels import bound, traces
from ottava.labels.audit import clopper_pearson_upper
from ottava.recipe import load_recipe
from ottava.stages import label as stage
from ottava.stages import train
from ottava.tasks.base import problem_of, read_lines
from ottava.trainer.spec import TrainSpec

RECIPE = """\
name: t
seed: 7
fleet: cpu
stages:
  label: {steps: [2, 4], cold_start: 60, answers: 300, audit: 40}
  train: {steps: 2}
"""


def read(tmp_path: Path, *sets: str, text: str = RECIPE) -> Any:
    (tmp_path / "cpu.yaml").write_text("{name: cpu, pools: [{name: cpu}]}\n")
    (tmp_path / "t.yaml").write_text(text)
    return load_recipe(tmp_path / "t.yaml", stages.specs(), sets)


# ---- the gate


def certified(folder: Path, upper: Any = 0.04) -> Path:
    (folder / bound.FILE).write_text(
        json.dumps({"error_upper_95": upper, "audited": 9, "annotator": "two people", "bound": "exact"})
    )
    return folder


def test_a_bound_is_read_and_held_against_the_limit(tmp_path: Path) -> None:
    (certified(tmp_path) / "data.jsonl").write_text("")
    assert bound.require(tmp_path, 0.04) == bound.Bound(0.04, "exact", "two people", 9)
    assert bound.require(tmp_path / "data.jsonl", 0.05) is not None
    assert bound.require(tmp_path / "nowhere", None) is None
    with pytest.raises(DataError, match=r"up to 4\.00% .* 9 judged by two people.* 3\.99% is allowed"):
        bound.require(tmp_path, 0.0399)


@pytest.mark.parametrize("said", [None, True, "0.1", -0.1, 1.5, float("nan"), [0.1]])
def test_a_certificate_that_says_no_share_is_refused(tmp_path: Path, said: Any) -> None:
    with pytest.raises(DataError, match="must be a share"):
        bound.require(certified(tmp_path, said), 1.0)


@pytest.mark.parametrize(("content", "what"), [(None, "no certificate"), ("{", "cannot be read"), ("[1]", "a share")])
def test_without_a_certificate_there_is_no_training(tmp_path: Path, content: str | None, what: str) -> None:
    if content is not None:
        (tmp_path / bound.FILE).write_text(content)
    inputs: Any = {"label": SimpleNamespace(path=tmp_path, digest="d", json=None)}
    ctx: Any = SimpleNamespace(out=tmp_path / "out", seed=0, stage="train")
    with pytest.raises(DataError, match=what):
        train.run(TrainSpec(steps=2, max_label_error=0.1), inputs, ctx)
    assert not (tmp_path / "out").exists()


def test_the_command_refuses_any_folder(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "ottava.cli", "label", "require", certified(tmp_path), "--json", "--max-error"]
    good = subprocess.run([*line, "0.05"], capture_output=True, text=True)
    assert (good.returncode, json.loads(good.stdout)["upper"]) == (0, 0.04)
    bad = subprocess.run([*line, "0.03"], capture_output=True, text=True)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert "4.00%" in bad.stderr


def test_a_limit_that_no_audit_could_show_is_refused_with_the_recipe(tmp_path: Path) -> None:
    best = clopper_pearson_upper(0, 40)
    assert read(tmp_path, f"train.max_label_error={best + 1e-6}")
    with pytest.raises(RecipeError, match="an audit of 40 labels cannot show"):
        read(tmp_path, f"train.max_label_error={best - 1e-6}")
    problems = RECIPE.replace("label: {steps: [2, 4], cold_start: 60, answers: 300, audit: 40}", "problems: PROBLEMS")
    problems = problems.replace("PROBLEMS", "{task: chains, answers: 50, test: 20}\n  start: {source: x}")
    with pytest.raises(RecipeError, match="gives no certificate"):
        read(tmp_path, "train={steps: 2, mode: direct, max_label_error: 0.1}", text=problems)


def test_recipes_of_before_keep_their_digests(tmp_path: Path) -> None:
    recipe = read(tmp_path)
    assert "policy" not in recipe.stages["label"].model_dump(mode="json")
    assert "max_label_error" not in recipe.stages["train"].model_dump(mode="json")
    assert read(tmp_path, "label.policy=audit").digest == recipe.digest
    assert read(tmp_path, "train.max_label_error=0.2").digest != recipe.digest
    told = read(tmp_path, "train.max_label_error=0.2").stages["train"].model_dump(mode="json")
    assert TrainSpec.model_validate(told).max_label_error == 0.2
    assert digest_of(told) != digest_of(recipe.stages["train"].model_dump(mode="json"))


# ---- the label stage by the policy


def run(folder: Path, seed: int, **more: Any) -> Any:
    folder.mkdir(parents=True)
    ctx: Any = SimpleNamespace(
        seed=seed,
        out=folder,
        progress=lambda fraction, message="": None,
        commit=lambda summary, verdict=None: SimpleNamespace(path=folder, summary=summary),
    )
    spec = stage.Spec(cold_start=150, answers=600, test_per_length=20, test_one_step=20, **more)
    return stage.run(spec, {}, ctx)


@pytest.mark.parametrize("seed", [7, 3])
def test_by_the_policy_wrong_traces_are_not_delivered_and_the_answers_are_the_same(tmp_path: Path, seed: int) -> None:
    audited, asked = run(tmp_path / "a", seed), run(tmp_path / "b", seed, policy="replay")
    task = tasks.traced("chains")
    rows = {name: read_lines(tmp_path / name / "cold_start.jsonl") for name in "ab"}
    wrong = {name: [r["id"] for r in rows[name] if task.check_trace(problem_of(r), r["trace"])] for name in "ab"}
    assert len(wrong["a"]) >= len(wrong["b"])
    certificate = json.loads((tmp_path / "b" / "certificate.json").read_text())
    assert set(wrong["a"]) - set(wrong["b"]) <= set(certificate["wrong"])
    assert len(wrong["b"]) / len(rows["b"]) <= certificate["error_upper_95"] <= 0.10
    assert asked.summary["error_upper_95"] == certificate["error_upper_95"]
    assert "standing in for people" in certificate["annotator"]
    assert certificate["votes"] == asked.summary["votes"] > 0
    assert Counter(r["steps"] for r in rows["a"]) == Counter(r["steps"] for r in rows["b"])
    for name in ("answers", "test", "test_one_step"):
        assert (tmp_path / "a" / f"{name}.jsonl").read_bytes() == (tmp_path / "b" / f"{name}.jsonl").read_bytes()
    kept = [r for r in rows["a"] if r["id"] not in certificate["wrong"]]
    assert [r for r in rows["b"] if r in kept] == kept
    assert audited.summary["annotator"] != asked.summary["annotator"]


def test_stand_ins_err_at_their_rates_and_always_the_same() -> None:
    who = [(f"i{k}", person) for k in range(500) for person in range(8)]
    votes = {right: [traces.vote(right, item, person, 1) for item, person in who] for right in (True, False)}
    assert sum(votes[True]) / 4000 == pytest.approx(traces.ALARMS, abs=0.01)
    assert 1 - sum(votes[False]) / 4000 == pytest.approx(traces.MISSES, abs=0.015)
    assert votes[True] == [traces.vote(True, item, person, 1) for item, person in who]


def test_the_report_says_how_the_certificate_was_come_by() -> None:
    told: dict[str, Any] = {
        "audited": 180, "errors": 1, "error_upper_95": 0.042, "annotator": "an oracle", "cold_start": 150,
        "max_error": 0.1, "disjoint": None, "population": 247, "votes": 638,
    }  # fmt: skip
    content: dict[str, Any] = {"labels": told, "stages": [], "artifacts": {}, "run": {"folder": "runs/x"}}
    (line,) = summary._labels(content)
    assert line == "638 votes, 180 of 247 proposals audited, 1 agreed trace refuted: at most 4.2% wrong (95%)"
    (line,) = summary._labels({"labels": {**told, "votes": None}})
    assert line == "180 of 150 traces audited, 1 error: at most 4.2% wrong (95%)"
    (claim, *_) = claims._labelled(content)
    assert "638 blind votes" in claim["how"]
    assert "martingale" in claim["how"]


def test_people_who_guess_certify_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "MISSES", 0.45)
    monkeypatch.setattr(traces, "ALARMS", 0.45)
    with pytest.raises(DataError, match=r"10\.0% is allowed"):
        run(tmp_path / "a", 7, policy="replay")
    assert not (tmp_path / "a" / "cold_start.jsonl").exists()


def test_an_audits_size_would_be_ignored_by_the_policy() -> None:
    with pytest.raises(ValueError, match="audit would be ignored"):
        stage.Spec(policy="replay", audit=50)
