"""Adapters and a start from a published model: what is trained, what is sampled from, and what is exported."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ottava import runner, stages
from ottava.checkpoint.safetensors import write
from ottava.engine.rollout import InProcess, Sampling
from ottava.errors import CheckpointError, DataError, RecipeError
from ottava.models import lora
from ottava.models.build import fresh, from_config
from ottava.models.load import load
from ottava.models.published import published, stored, unrounded
from ottava.recipe import load_recipe
from ottava.stages import problems, reinforce
from ottava.stages import start as begin
from ottava.tasks.base import generator, task_of
from ottava.trainer import reduce, snapshot
from ottava.trainer.loop import Trainer
from ottava.trainer.rl_spec import ReinforceSpec
from ottava.trainer.spec import TrainSpec
from ottava.trainer.start import make_trainer
from ottava.trainer.worker import export

pytest.importorskip("peft")

LLAMA = {
    "model_type": "llama", "vocab_size": 44, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
LORA = {"rank": 4, "alpha": 8.0, "targets": ("q_proj", "v_proj")}
TAUGHT = 300  # steps: enough to solve some chains, too few for all
IDS = torch.arange(6, 44).repeat(2)[:60].view(3, 20)


def model(**more: Any) -> nn.Module:
    """A tiny llama whose every matrix matters: fresh output projections are zero. Its values are BF16's."""
    found = fresh({**LLAMA, **more}, 1)
    with torch.no_grad():
        for number, parameter in enumerate(found.parameters()):
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.2)
            parameter.copy_(parameter.bfloat16())
    return found


def adapted(seed: int = 3, **more: Any) -> nn.Module:
    """With adapters that change the logits."""
    found = lora.adapt(model(**more), 4, 8.0, ("q_proj", "v_proj"), seed)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(found.named_parameters()):
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.1)
    return found


def logits(its: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = its(input_ids=IDS, use_cache=False).logits
        return found


def folder_of(its: nn.Module, folder: Path, chat: Path) -> Path:
    shutil.copytree(chat, folder)
    write(folder / "model.safetensors", ((name, stored(item)) for name, item in published(its).items()))
    (folder / "config.json").write_text(json.dumps({**LLAMA, "architectures": ["LlamaForCausalLM"]}))
    return folder


@pytest.fixture(scope="module")
def start(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama that solves some of the chains of two steps, as a folder of Hugging Face."""
    import numpy as np

    from ottava.models.chat import Chat
    from ottava.tasks import chains
    from ottava.tasks.base import row, write_lines
    from ottava.trainer.data import load as read
    from ottava.trainer.sft import Sft

    folder, rng = tmp_path_factory.mktemp("start"), np.random.default_rng(2)
    taught = [(p, chains.trace(p)) for p in chains.sample(rng, 2, 600, "train")]
    write_lines(folder / "cold_start.jsonl", (row("chains", p, trace=trace) for p, trace in taught))
    write_lines(folder / "answers.jsonl", (row("chains", p) for p, _ in taught))
    its = TrainSpec(steps=TAUGHT, batch=32, virtual_shards=1, direct={"weight": 0.0}, grid_from=1.0)  # type: ignore[arg-type]
    trainer = Trainer(its, 3, fresh(LLAMA, 3), Sft(its, 3, read(folder, Chat.load(dataset / "chat"))))
    while trainer.state.step < its.steps:
        trainer.step(lambda total: total, range(1))
    trainer.refresh()
    return folder_of(trainer.model, folder / "model", dataset / "chat")


def spec(kind: type = ReinforceSpec, **more: Any) -> Any:
    own: dict[str, Any] = {"grid_from": 1.0, "lora": LORA, "virtual_shards": 2, "steps": 4}
    if kind is ReinforceSpec:
        own |= {"rollout": {"prompts": 4, "group": 4, "max_new": 24, "updates": 2}, "lengths": (2,)}
    return kind.model_validate({**own, **more})


def arguments(start: Path, dataset: Path, its: Any) -> dict[str, Any]:
    objective = "grpo" if isinstance(its, ReinforceSpec) else "sft"
    return {
        "spec": its.model_dump(mode="json"), "seed": 5, "data": str(dataset), "chat": str(start),
        "objective": objective, "start_model": str(start),
    }  # fmt: skip


# ---------------------------------------------------------------- adapters


def test_fresh_adapters_change_nothing_and_are_the_seeds() -> None:
    before = logits(model())
    first, again, other = (lora.adapt(model(), 4, 8.0, ("q_proj", "v_proj"), seed) for seed in (3, 3, 4))
    assert torch.equal(logits(first), before)
    values = [torch.cat([p.flatten() for p in its.parameters() if p.requires_grad]) for its in (first, again, other)]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])
    a = dict(first.named_parameters())["model.layers.0.self_attn.q_proj.lora_A.default.weight"]
    assert a.shape == (4, 32)
    assert 0.9 / 32**0.5 < float(a.detach().abs().max()) <= 1 / 32**0.5


def test_initial_adapters_do_not_depend_on_torchs_generator() -> None:
    torch.manual_seed(1)
    first = lora.adapt(model(), 4, 8.0, ("q_proj",), 3)
    torch.manual_seed(2)
    again = lora.adapt(model(), 4, 8.0, ("q_proj",), 3)
    for one, two in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


def test_merging_is_pefts_merge_and_unload() -> None:
    """The oracle: peft's own model with the same adapters, merged by peft itself."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    ours = adapted()
    theirs = get_peft_model(model(), LoraConfig(r=4, lora_alpha=8.0, target_modules=["q_proj", "v_proj"]))  # type: ignore[arg-type]
    weights = {
        f"base_model.model.{name.replace('.default', '')}": p for name, p in ours.named_parameters() if p.requires_grad
    }
    set_peft_model_state_dict(theirs, weights)
    assert torch.allclose(logits(theirs), logits(ours), atol=1e-6)
    whole = theirs.merge_and_unload()
    with lora.merged(ours) as inside:
        mine = {name: p.detach().clone() for name, p in inside.named_parameters()}
    assert mine.keys() == dict(whole.named_parameters()).keys()
    for name, parameter in whole.named_parameters():
        assert torch.equal(mine[name], parameter), name


def test_merging_leaves_every_bit_as_it_was() -> None:
    ours = adapted()
    before, apart = {name: p.detach().clone() for name, p in ours.named_parameters()}, logits(ours)
    with contextlib.suppress(KeyError), lora.merged(ours) as inside:
        assert not any("lora" in name for name, _ in inside.named_parameters())
        assert torch.allclose(logits(inside), apart, atol=1e-5)
        assert not torch.equal(logits(inside), logits(model())), "the adapters are in it"
        raise KeyError
    after = dict(ours.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(ours), apart)


def test_a_model_without_adapters_is_its_own_merge() -> None:
    its = model()
    with lora.merged(its) as same:
        assert same is its
        assert torch.equal(logits(same), logits(model()))


def test_the_engine_draws_by_the_adapted_weights() -> None:
    ours, prompts, sampling = adapted(), IDS[:, :7].tolist(), Sampling(12, (1,), 1.0)
    with lora.merged(ours) as whole:
        drawn = InProcess(whole).generate(prompts, sampling, 9)
    plain = InProcess(model()).generate(prompts, sampling, 9)
    assert not torch.equal(drawn.logprobs, plain.logprobs)
    with torch.no_grad():
        said = ours(input_ids=drawn.sequences()[:, :-1], use_cache=False).logits.log_softmax(-1)
    picked = said[:, 6:].gather(-1, drawn.replies[..., None])[..., 0]
    assert float(((picked - drawn.logprobs) * drawn.drawn()).abs().max()) < 1e-5


def test_names_of_no_layer_and_tied_heads_are_refused() -> None:
    with pytest.raises(RecipeError, match="no linear layer called 'qproj'"):
        lora.adapt(model(), 4, 8.0, ("q_proj", "qproj"), 0)
    with pytest.raises(RecipeError, match="shares its matrix"):
        lora.adapt(model(tie_word_embeddings=True), 4, 8.0, ("lm_head",), 0)
    with pytest.raises(ValueError, match="grid_from: 1"):
        spec(grid_from=0.5)


def test_what_bf16_does_not_hold_stays_f32() -> None:
    its = model()
    with torch.no_grad():
        dict(its.named_parameters())["model.layers.0.self_attn.q_proj.weight"][0, 0] = 1.0 + 2**-20
    found = {name: unrounded(item) for name, item in published(its).items()}
    assert [name for name, its in found.items() if its.dtype == torch.float32] == [
        "model.layers.0.self_attn.q_proj.weight"
    ]


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("kind", [ReinforceSpec, TrainSpec])
def test_only_adapters_are_trained_kept_and_hashed(kind: type, start: Path, dataset: Path) -> None:
    trainer = make_trainer(arguments(start, dataset, spec(kind)))
    assert {slot.name.partition(".lora_")[2] for slot in trainer.state.slots} == {f"{x}.default.weight" for x in "AB"}
    assert len(trainer.state.slots) == 2 * 2 * 2
    trained = sum(slot.size for slot in trainer.state.slots)
    assert trained == 2 * (4 * (32 + 32) + 4 * (32 + 16))
    assert trainer.state.arena.numel() == 3 * trained or kind is TrainSpec
    base = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    first = trainer.state.digest()
    for _ in range(2):
        trainer.step(lambda total: total, range(2))
    assert trainer.state.digest() != first
    trainer.refresh()
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(after[name], kept) for name, kept in base.items())
    b = [slot.view(trainer.state.weights) for slot in trainer.state.slots if "lora_B" in slot.name]
    assert all(bool(part.any()) for part in b)


def test_the_number_of_shards_workers_changes_nothing(start: Path, dataset: Path) -> None:
    def run(world: int) -> str:
        workers = [make_trainer(arguments(start, dataset, spec())) for _ in range(world)]
        shards = [reduce.owned(2, rank, world) for rank in range(world)]
        for _ in range(3):
            facts = []
            for its, own in zip(workers, shards, strict=True):
                its.refresh()
                mine = its.objective.prepare(its.model, its.state.step, own, its.state.digest)
                facts += [] if mine is None else [json.loads(json.dumps(mine))]
            for its in workers if facts else ():
                its.objective.settle(its.state.step, facts)
            total = reduce.tree_sum([its.contribution(own) for its, own in zip(workers, shards, strict=True)])
            for its in workers:
                whole = total.clone()
                its.update(whole, its.clip(whole))
        digests = {its.state.digest() for its in workers}
        assert len(digests) == 1
        return digests.pop()

    assert run(1) == run(2)


def test_the_exported_folder_is_the_adapted_model(start: Path, dataset: Path, tmp_path: Path) -> None:
    args = arguments(start, dataset, spec(steps=3, optimiser={"matrices": "adam", "adam": 1e-2, "warmup": 1}))
    trainer = make_trainer(args)
    for _ in range(3):
        trainer.step(lambda total: total, range(2))
    snapshot.save(tmp_path / "state", trainer.state.snapshot())
    out = tmp_path / "model"
    shutil.copytree(start, out, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    told = export({**args, "state": str(tmp_path / "state"), "model": str(out), "latent": str(tmp_path / "latent")})
    trainer.refresh()
    trainer.model.eval()
    expected = logits(trainer.model)
    assert torch.equal(trainer.forward, trainer.state.weights), "adapters are not rounded at the end either"
    assert torch.allclose(logits(load(out)), expected, atol=1e-5)
    assert not torch.allclose(logits(load(start)), expected, atol=1e-3), "training changed something"
    assert told["trained"] < told["parameters"] == sum(p.numel() for p in from_config(LLAMA).parameters())
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
    assert theirs.dtype == torch.float32
    assert torch.allclose(logits(theirs), expected, atol=1e-5)


def test_rewards_rise_with_adapters_alone(start: Path, dataset: Path) -> None:
    its = spec(
        steps=30, lora={"rank": 8, "alpha": 16.0, "targets": ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")},
        optimiser={"matrices": "adam", "adam": 5e-3, "warmup": 1, "decay_from": 1.0},
        rollout={"prompts": 16, "group": 8, "max_new": 20, "updates": 1, "temperature": 1.0},
    )  # fmt: skip
    trainer = make_trainer(arguments(start, dataset, its))
    rewards = [trainer.step(lambda total: total, range(2)).told["reward"] for _ in range(its.steps)]
    assert 0.05 < sum(rewards[:3]) / 3 < 0.9, rewards
    assert sum(rewards[-5:]) / 5 > sum(rewards[:3]) / 3 + 0.08, rewards


def test_direct_mode_asks_and_grades_without_thinking(start: Path, dataset: Path) -> None:
    from ottava.tasks import get

    trainer = make_trainer(arguments(start, dataset, spec(mode="direct")))
    grpo: Any = trainer.objective
    chat, task = grpo._chat, get("chains")
    problem = next(grpo._questions(0, 0))
    record = grpo._draw(trainer.model, 0, 0, "", 1, 0)
    length = int(record.rollouts.prompt_lengths[0])
    assert record.rollouts.prompts[0, :length].tolist() == chat.prompts([task.prompt(problem)], False)[0]
    right, thought = chat.reply(problem.answer), chat.reply(problem.answer, problem.answer)
    assert (grpo._reward(Counter(), problem, right), grpo._reward(Counter(), problem, thought)) == (1.0, 0.0)
    assert grpo._reward(Counter(), problem, right[:-1]) == 0.0, "a reply that was cut off"


# ---------------------------------------------------------------- a recipe


RECIPE = """
name: from-a-folder
seed: 3
fleet: fleet.yaml
stages:
  problems: {{task: chains, levels: [2], answers: 60, test: 20}}
  start: {{source: {source}}}
  reinforce:
    steps: 2
    virtual_shards: 2
    grid_from: 1
    lora: {{rank: 4, targets: [q_proj, v_proj]}}
    rollout: {{prompts: 2, group: 4, max_new: 20, updates: 1}}
  convert: {{}}
  verify: {{}}
"""


def test_a_recipe_that_begins_from_a_folder(start: Path, tmp_path: Path, launcher: Any) -> None:
    (tmp_path / "fleet.yaml").write_text("name: one\npools: [{name: cpu}]\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(source=start))
    recipe = load_recipe(tmp_path / "recipe.yaml", stages.specs())
    done = runner.run(recipe, tmp_path / "run", lambda: contextlib.nullcontext(launcher), runner.Quiet())
    summary = done["reinforce"].summary
    assert summary["replay_identical"] is True
    assert summary["on_grid_from_step"] is None
    assert summary["reinforce"]["n"] == 20
    assert summary["trained"] < summary["parameters"]
    assert set(summary["accuracy"]) == {"thinking", "direct"}, "there are no one-step problems"
    before = json.loads((done["reinforce"].path / "before.json").read_text())
    assert before["thinking"]["value"] == summary["reinforce"]["before"]
    assert done["convert"].summary["label"] == "rounded"
    assert done["verify"].manifest["verdict"] is not False
    assert done["verify"].summary["accuracy"]["thinking"]["n"] == 20
    assert done["start"].manifest["files"].keys() >= {"model/config.json", "model/model.safetensors"}
    assert not (done["reinforce"].path / "model" / "provenance.json").exists()


def test_what_a_stage_takes_as_model_and_problems() -> None:
    names = ["label", "problems", "start", "train", "reinforce", "convert"]
    assert stages.resolve("@model", "reinforce", names) == ("train", "model")
    assert stages.resolve("?@model", "train", names) == ("start", "model")
    assert stages.resolve("@label", "reinforce", names) == ("problems", "label")
    assert stages.resolve("@label", "train", ["label", "train"]) == ("label", "label")
    assert stages.resolve("?@model", "train", ["label", "train"]) == (None, "model")


def problems_spec(**more: Any) -> problems.Spec:
    return problems.Spec.model_validate({"task": "chains", "levels": [2], "answers": 50, "test": 10, **more})


class Publishing:
    """As much of a Context as the stage needs."""

    def __init__(self, out: Path):
        self.out, self.seed, self.summary = out, 3, dict[str, Any]()

    def progress(self, fraction: float, message: str) -> None:
        pass

    def commit(self, summary: dict[str, Any]) -> None:
        self.summary = summary


def test_problems_are_disjoint_and_the_seeds(tmp_path: Path) -> None:
    from ottava.tasks import chains
    from ottava.tasks.base import read_lines

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        ctx = Publishing(tmp_path / name)
        problems.run(problems_spec(levels=[2, 3]), {}, ctx)  # type: ignore[arg-type]
    assert ctx.summary["by_level"] == {"2": 50, "3": 50}
    train, test = (read_lines(tmp_path / "a" / f"{name}.jsonl") for name in ("answers", "test"))
    assert (len(train), len(test)) == (100, 20)
    assert not {chains.family(x["question"]) for x in train} & {chains.family(x["question"]) for x in test}
    for name in ("answers", "test"):
        assert (tmp_path / "a" / f"{name}.jsonl").read_bytes() == (tmp_path / "b" / f"{name}.jsonl").read_bytes()


def test_problems_whose_verifier_says_yes_to_everything_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ottava.tasks import chains

    monkeypatch.setattr(chains, "check_answer", lambda problem, text: True)
    with pytest.raises(DataError, match="must not be trusted"):
        problems.run(problems_spec(), {}, Publishing(tmp_path))  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_verifier_is_tried_once_for_an_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whom the problems were made, or else by the stage that is to learn from it."""
    from ottava.artifact import Artifact
    from ottava.tasks import chains

    ctx: Any = Publishing(tmp_path)
    problems.run(problems_spec(), {}, ctx)
    spec, files = problems_spec().model_dump(mode="json"), {"answers.jsonl": {}}
    tried = Artifact(tmp_path, {"stage": "problems", "spec": spec, "files": files, "summary": ctx.summary})
    untried = Artifact(tmp_path, {**tried.manifest, "stage": "label", "summary": {}})
    reinforce._trusted(untried, ctx)
    monkeypatch.setattr(chains, "check_answer", lambda problem, text: True)
    reinforce._trusted(tried, ctx)
    with pytest.raises(DataError, match="must not be trusted"):
        reinforce._trusted(untried, ctx)


def test_a_leak_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training problems that a task draws from its test side are taken out; where all are, there is nothing left."""
    from ottava.tasks import chains

    drawn = chains.sample
    monkeypatch.setattr(chains, "sample", lambda rng, n, count, split, **more: drawn(generator(1), n, 10, "test"))
    with pytest.raises(DataError, match="no training problem"):
        problems.run(problems_spec(), {}, Publishing(tmp_path))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"task": "nothing"}, "no task"), ({"levels": [2, 2]}, "each once"), ({"levels": []}, "at least 1")],
)
def test_wrong_problems_sections_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        problems_spec(**change)


def test_a_start_that_is_none_is_refused(tmp_path: Path, dataset: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        begin.run(begin.Spec(source=str(tmp_path / "none")), {}, Publishing(tmp_path / "out"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Field required"):
        begin.Spec.model_validate({})
    with pytest.raises(ValueError, match="package:NAME"):
        begin.Spec(source="package:../x")
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError):  # a tokenizer, and no model
        begin.run(begin.Spec(source=str(dataset / "chat")), {}, Publishing(tmp_path / "out"))  # type: ignore[arg-type]


def test_a_data_set_is_of_one_task() -> None:
    assert task_of([{"task": "chains"}, {"task": "chains"}]).NAME == "chains"
    for lines in ([], [{"task": "chains"}, {"task": "maths:x"}]):
        with pytest.raises(DataError, match="data set is"):
            task_of(lines)
