"""What could not be carried out is refused when the recipe is read, or where the stage starts, with the place."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ottava import stages
from ottava.artifact import Artifact
from ottava.engine.room import lacking
from ottava.errors import DataError, RecipeError
from ottava.recipe import load_recipe
from ottava.stages import distill
from ottava.trainer import asking, coming
from ottava.trainer.spec import TrainSpec
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
        (
            "reinforce.rollout.max_new=128",
            "reply of 128 ids does not fit behind any question: the model's context holds 128",
        ),
        ("train={mode: direct, max_new: 128}", "a reply of 128 ids does not fit behind any question"),
        ("distill.max_new=200", "a reply of 200 ids does not fit behind any question"),
        ("reinforce={lora: {targets: [q_proj, w1]}, grid_from: 1}", "no linear layer called 'w1'"),
        (f"{ON_POLICY}={{lora: {{targets: [kv_b_proj]}}, grid_from: 1}}", "no linear layer called 'kv_b_proj'"),
        ("compare.reinforce={lora: {targets: [k_proj]}, grid_from: 1}", "no linear layer called 'k_proj'"),
        ("convert.source=/no/such/folder", "there is no such folder: /no/such/folder"),
        ("compare.train.harvest.asks=3", r"train\.harvest: it would be ignored"),
        ("compare.train={lora: {}, grid_from: 1}", r"train\.lora: it would be ignored"),
        ("compare.train.max_new=9", r"train\.max_new: it would be ignored"),
        ("compare.train.audit.share=0.5", r"train\.audit: it would be ignored: a trial has no supervisor"),
        ("compare.train.pool=cpu", r"train\.pool: it would be ignored"),
        ("compare.reinforce.restarts=2", r"reinforce\.restarts: it would be ignored"),
        ("compare.reinforce.min_thinking=0.5", r"reinforce\.min_thinking: it would be ignored"),
        (
            "reinforce={curriculum: {stretches: [{until: 1, levels: {2: 1e308, 3: 1e308}}]}}",
            "less than or equal to 1000000",
        ),
        ("reinforce={curriculum: {stretches: [{until: 1, levels: {2: 0}}]}}", "greater than or equal to"),
        ("train.harvest.asks=10", "no model before this stage whose replies"),
        ("train={lora: {rank: 4}, grid_from: 1}", "adapters need a model to begin from"),
        ("compare.cold_start=61", "61 traces, and the stage 'label' makes 60"),
        ("compare.reinforce.lengths=[9]", "no problems of 9 steps"),
        ("compare.reinforce.rollout.max_new=500", "a reply of 500 ids"),
        (f"{ON_POLICY}.policy.loss=dapo", "on_policy.policy: it would be ignored"),
        (f"{ON_POLICY}.min_thinking=0.5", "on_policy.min_thinking: it would be ignored"),
        (f"{ON_POLICY}.pool=cpu", "on_policy.pool: it would be ignored"),
        (f"{ON_POLICY}.lengths=[7]", "no problems of 7 steps"),
        (f"{ON_POLICY}.rollout.max_new=500", "a reply of 500 ids"),
        ("label.task=gym:chain_sum", "no traces, .* the stage 'problems'"),
        ("reinforce={curriculum: {stretches: [{until: 1, levels: {7: 1}}]}}", "no problems of 7 steps"),
    ],
)
def test_what_could_not_be_carried_out_is_refused(tmp_path: Path, said: str, why: str) -> None:
    with pytest.raises(RecipeError, match=why) as error:
        read(tmp_path, said)
    assert error.value.where == f"--set {said}"
    assert error.value.exit_code == 2


def test_a_conversion_of_nothing_is_refused(tmp_path: Path) -> None:
    text = RECIPE[: RECIPE.index("  train:")] + "  convert: {}\n"
    with pytest.raises(RecipeError, match="no model to convert") as error:
        read(tmp_path, text=text)
    assert error.value.where == f"{tmp_path / 't.yaml'}:6:12"
    assert "convert" in read(tmp_path, text=text.replace("  convert", "  train: {steps: 2}\n  convert")).stages


@pytest.mark.parametrize(
    ("old", "new", "where", "what", "fix"),
    [
        ("clip_low", "clip_lo", "15:27", "unknown key 'clip_lo'", "did you mean 'clip_low'?"),
        ("change: {policy: {loss: dr", "change: {polcy: {loss: dr", "14:18", "unknown key 'polcy'", "'policy'"),
        ("clip_low: 0.1", "clip_low: 7", "15:37", "less than or equal to 1", None),
        ("{policy: {clip_low: 0.1}}", "{audit: {share: 0.1}}", "15:25", "tries.0.audit: it would be ignored", None),
        ("change: {policy: {loss: dr_grpo}}", "change: {hang_s: 3.0}", "14:26", "change.hang_s: it would be", None),
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
    lora = {"steps": 2, "grid_from": 1, "lora": {"targets": ["q_proj"]}}
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
    with pytest.raises(DataError, match=r"reply of 120 ids does not fit.* holds 128") as error:
        check(rollout={"max_new": 120})
    left = int(re.findall(r"have (\d+) ids", str(error.value.fix))[0])
    check(rollout={"max_new": left})
    with pytest.raises(DataError):
        check(rollout={"max_new": left + 1})


@pytest.mark.parametrize("family", ["deepseek_v3", "llama", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("which", range(3))
def test_a_config_tells_the_layers_that_can_have_adapters(family: str, tied: bool, which: int) -> None:
    """Against the model class itself, with an adapter put on every layer in turn."""
    import torch

    from ottava.models import layers, lora
    from ottava.models.build import from_config
    from ottava.trainer.spec import Dense, Shape

    own: dict[str, Any] = {
        "deepseek_v3": ({}, {"q_lora_rank": 8}, {"first_k_dense_replace": 0, "n_shared_experts": 1}),
        "qwen3_moe": ({}, {"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}),
    }.get(family, ({}, {}, {}))[which]
    if family == "deepseek_v3":
        config = Shape().config(44)
    else:
        config = Dense(family="llama" if family == "llama" else "qwen3", hidden=32, width=48).config(44)
    if family == "qwen3_moe":
        config |= {"model_type": family, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config |= {"tie_word_embeddings": tied, **own}
    modules = from_config(config).named_modules()
    names = {name.rpartition(".")[2] for name, layer in modules if isinstance(layer, torch.nn.Linear)}

    def takes(name: str) -> bool:
        try:
            with lora.merged(lora.adapt(from_config(config), 2, 4.0, [name], 0)):
                pass
        except (RecipeError, AttributeError, ValueError):
            return False
        return True

    found = {name for name in names if takes(name)}
    assert "o_proj" in found
    assert layers.linear(config) == found
    assert layers.linear({"model_type": "mamba"}) is None


def test_adapters_are_refused_by_a_folders_config_and_without_peft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a published folder, of which nothing but config.json is read; and a context that is short."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"model_type": "llama", "max_position_embeddings": 64, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    lora = {"steps": 9, "grid_from": 1, "lora": {"targets": ["q_proj"]}, "mode": "direct"}
    asked: dict[str, Any] = {"start": {"source": str(folder)}, "problems": {"task": "chains", "answers": 9},
                             "train": lora, "reinforce": {**lora, "rollout": {"max_new": 32}}}  # fmt: skip

    def refused(*sets: str) -> str:
        data = yaml.safe_load(RECIPE) | {"stages": asked}
        with pytest.raises(RecipeError) as error:
            read(tmp_path, *sets, text=yaml.safe_dump(data))
        assert error.value.exit_code == 2
        return f"{error.value.what}; {error.value.fix}"

    assert read(tmp_path, text=yaml.safe_dump(yaml.safe_load(RECIPE) | {"stages": asked})).stages
    said = refused("train.lora.targets=[wq]")
    assert "no linear layer called 'wq' for adapters; it has: down_proj, gate_proj, k_proj, o_proj, q_proj, up" in said
    assert "'lm_head'" in refused("reinforce.lora.targets=[lm_head]")
    assert "a reply of 64 ids does not fit" in refused("train.max_new=64")
    assert "a reply of 64 ids does not fit" in refused("reinforce.rollout.max_new=64")
    with monkeypatch.context() as patched:
        patched.setattr(coming, "find_spec", lambda name: None)
        assert "peft, which is not installed; pip install" in refused()


def test_replies_that_are_evaluated_fit_behind_their_questions(dataset: Path) -> None:
    def check(limit: int | None, context: int | None = 128) -> None:
        how = TrainSpec.model_validate({"max_new": limit})
        asking.check_replies(how, dataset, dataset / "chat", context, "train")

    check(None)
    check(10_000, None)
    with pytest.raises(DataError, match="reply of 120 ids does not fit behind a question of") as error:
        check(120)
    assert error.value.where == "train.max_new"
    left = int(re.findall(r"have (\d+) ids", str(error.value.fix))[0])
    check(left)
    with pytest.raises(DataError):
        check(left + 1)


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 200))
def test_a_reply_fits_where_both_fit(reply: int, context: int, question: int) -> None:
    assert (lacking(reply, context, question) is None) == (reply + question <= context)
    assert (lacking(reply, context) is None) == (reply + 1 <= context)


def test_students_that_read_alike_are_looked_at_once(
    begun: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six with their teacher's tokenizer and two with one of their own: two looks."""
    looked: list[Path] = []
    monkeypatch.setattr(asking, "check", lambda spec, data, chat, *more: looked.append(chat))
    pairs = [
        {"name": f"p{n}", "shape": {"family": "llama", "hidden": 32, "width": 48}, "tokenizer": "pairs"} for n in (1, 2)
    ]
    its = [one.model_dump(exclude={"start_content"}) for one in distill.SIX]
    spec = distill.Spec.model_validate({"students": [*its, *pairs], "on_policy": {"divergence": {"kind": "alm"}}})

    class Here:
        work, stage = tmp_path, "distill"

    inputs = {
        "label": Artifact(dataset, {"files": {"vocabulary.json": {}}}),
        "model": Artifact(begun.parent, {"stage": "train", "files": {"model": {}}}),
    }
    distill._able(spec, inputs, Here)  # type: ignore[arg-type]
    assert looked == [begun, tmp_path / "tokenizers" / "pairs"]


@pytest.mark.parametrize("words", [["/nope"], [".", "/nope"], [".", "--problems", "/nope"]])
def test_evaluate_looks_at_paths_before_it_loads_torch(words: list[str]) -> None:
    script = "import sys; from ottava import cli; code = cli.outcome(); print('torch' in sys.modules); sys.exit(code)"
    done = subprocess.run(
        [sys.executable, "-c", script, "evaluate", *words, "--task", "chains"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout.strip() == "False"
    assert "/nope" in done.stderr
