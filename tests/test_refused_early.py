"""What could not be carried out is refused when the recipe is read, or where the stage starts, with the place."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ottava import stages
from ottava.errors import DataError, RecipeError
from ottava.recipe import load_recipe
from ottava.trainer import asking
from tests.test_grpo import spec

RECIPE = """\
name: t
seed: 7
fleet: cpu
stages:
  label: {steps: [2, 4], cold_start: 60, answers: 300, audit: 40}
  train: {steps: 2}
  reinforce: {steps: 2, lengths: [2, 3], rollout: {updates: 1}}
  distill: {steps: 2}
  compare:
    cold_start: 30
    arms:
      - {name: grpo, change: {policy: {loss: grpo}}}
      - name: other
        change: {policy: {loss: dr_grpo}}
        tries: [{policy: {clip_low: 0.1}}]
"""


def read(tmp_path: Path, *sets: str, text: str = RECIPE) -> Any:
    (tmp_path / "cpu.yaml").write_text("{name: cpu, pools: [{name: cpu}]}\n")
    (tmp_path / "t.yaml").write_text(text)
    return load_recipe(tmp_path / "t.yaml", stages.specs(), sets)


def test_the_recipe_itself_is_good(tmp_path: Path) -> None:
    assert "compare" in read(tmp_path).stages


ON_POLICY = "distill.on_policy"


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("reinforce.lengths=[2,99]", "there are no problems of 99 steps to ask; there are those of 1, 2, 3, 4"),
        ("reinforce.rollout.max_new=128", "may have 128 ids, and the model's context holds 128"),
        ("train.harvest.asks=10", "no model before this stage whose replies"),
        ("train={lora: {rank: 4}, grid_from: 1}", "adapters need a model to begin from"),
        ("compare.cold_start=61", "61 traces, and the stage 'label' makes 60"),
        ("compare.reinforce.lengths=[9]", "no problems of 9 steps"),
        ("compare.reinforce.rollout.max_new=500", "may have 500 ids"),
        (f"{ON_POLICY}.policy.loss=dapo", "on_policy.policy: it would be ignored"),
        (f"{ON_POLICY}.min_thinking=0.5", "on_policy.min_thinking: it would be ignored"),
        (f"{ON_POLICY}.pool=cpu", "on_policy.pool: it would be ignored"),
        (f"{ON_POLICY}.lengths=[7]", "no problems of 7 steps"),
        (f"{ON_POLICY}.rollout.max_new=500", "may have 500 ids"),
        ("label.task=gym:chain_sum", "no traces, .* the stage 'problems'"),
        ("reinforce={curriculum: {stretches: [{until: 1, levels: {7: 1}}]}}", "no problems of 7 steps"),
    ],
)
def test_what_could_not_be_carried_out_is_refused(tmp_path: Path, said: str, why: str) -> None:
    with pytest.raises(RecipeError, match=why) as error:
        read(tmp_path, said)
    assert error.value.where == f"--set {said}"


@pytest.mark.parametrize(
    ("old", "new", "where", "what", "fix"),
    [
        ("clip_low", "clip_lo", "15:27", "unknown key 'clip_lo'", "did you mean 'clip_low'?"),
        ("change: {policy: {loss: dr", "change: {polcy: {loss: dr", "14:18", "unknown key 'polcy'", "'policy'"),
        ("clip_low: 0.1", "clip_low: 7", "15:37", "less than or equal to 1", None),
        (
            "{name: grpo, change: {policy: {loss: grpo",
            "{name: grpo, change: {policy: {loss: gpo",
            "12:46",
            "'gpo'",
            None,
        ),
    ],
)
def test_a_misspelt_key_in_an_arm_is_told_with_its_line(
    tmp_path: Path, old: str, new: str, where: str, what: str, fix: str | None
) -> None:
    assert RECIPE.count(old) == 1
    with pytest.raises(RecipeError) as error:
        read(tmp_path, text=RECIPE.replace(old, new))
    assert error.value.where == f"{tmp_path / 't.yaml'}:{where}"
    assert what in error.value.what
    assert fix is None or fix in str(error.value.fix)


def test_with_a_start_adapters_and_a_harvest_are_for_the_first_round_too(tmp_path: Path) -> None:
    data = yaml.safe_load(RECIPE)
    data["stages"] = {"label": data["stages"]["label"], "start": {"source": "m"}, "train": {"steps": 2, "harvest": {}}}
    assert read(tmp_path, text=yaml.safe_dump(data)).stages["train"].harvest is not None
    lora = {"steps": 2, "grid_from": 1, "lora": {}}
    data["stages"]["train"] = lora
    assert read(tmp_path, text=yaml.safe_dump(data)).stages["train"].lora is not None
    data["stages"] = {"label": data["stages"]["label"], "train": {"steps": 2}, "train-2": lora}
    assert read(tmp_path, text=yaml.safe_dump(data)).stages["train-2"].lora is not None
    data["stages"]["train-2"] = lora | {"harvest": {}}  # from first weights again, on replies of the model so far
    with pytest.raises(RecipeError, match="need a model to begin from"):
        read(tmp_path, text=yaml.safe_dump(data))


def test_a_stage_sees_that_its_questions_can_be_asked(dataset: Path) -> None:
    def check(context: int | None = 128, **more: Any) -> None:
        asking.check(spec(**more), dataset, dataset / "chat", context, "reinforce")

    check()
    check(context=None, rollout={"max_new": 1000})
    with pytest.raises(DataError, match="no problems of 9 steps") as error:
        check(lengths=(2, 9))
    assert str(error.value.where).startswith("reinforce.lengths")
    with pytest.raises(DataError, match=r"reply 120.* holds 128") as error:
        check(rollout={"max_new": 120})
    left = int(str(error.value.fix).split()[1])
    check(rollout={"max_new": left})
    with pytest.raises(DataError):
        check(rollout={"max_new": left + 1})


@pytest.mark.parametrize("words", [["/nope"], [".", "/nope"], [".", "--problems", "/nope"]])
def test_evaluate_looks_at_paths_before_it_loads_torch(words: list[str]) -> None:
    script = "import sys; from ottava import cli; code = cli.outcome(); print('torch' in sys.modules); sys.exit(code)"
    done = subprocess.run(
        [sys.executable, "-c", script, "evaluate", *words, "--task", "chains"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout.strip() == "False"
    assert "/nope" in done.stderr
