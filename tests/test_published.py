"""Published models with problems that have answers alone: fine-tuning on their own right replies, and distillation.

The models are made here: tiny, with and without a thinking switch, each a folder of Hugging Face.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ottava import runner, stages
from ottava.artifact import Artifact
from ottava.checkpoint.layouts import read_config
from ottava.checkpoint.safetensors import write
from ottava.console import report
from ottava.errors import RecipeError
from ottava.labels import harvest
from ottava.models.build import fresh
from ottava.models.chat import TINY_TEMPLATE, Chat, write_tiny
from ottava.models.load import load
from ottava.models.published import published, stored
from ottava.recipe import load_recipe
from ottava.stages import distill
from ottava.tasks import chains
from ottava.tasks.base import problem_of, read_lines, row, write_lines
from ottava.trainer import data
from ottava.trainer.loop import Trainer
from ottava.trainer.sft import Sft
from ottava.trainer.spec import Dense, TrainSpec
from ottava.trainer.start import make_trainer

PLAIN = """\
{%- for message in messages -%}
{%- if message.role == 'user' -%}<|User|>{{ message.content }}{%- else -%}{{ message.content }}<|end|>{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|Assistant|>{% endif -%}
"""
LEFT_TO_THE_MODEL = TINY_TEMPLATE.replace("'<think>' if thinking", "'' if thinking")
TAUGHT = {"direct": 150, "thinking": 300}  # steps


def config(vocabulary: int) -> dict[str, Any]:
    found = Dense(family="llama", hidden=32, width=64).config(vocabulary)
    return {**found, "max_position_embeddings": 96}


def folder_of(model: torch.nn.Module, folder: Path, settings: dict[str, Any]) -> Path:
    write(folder / "model.safetensors", ((name, stored(item)) for name, item in published(model).items()))
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def companions(folder: Path, template: str = PLAIN, cut: Any = "words") -> Chat:
    write_tiny(folder, chains.vocabulary(), cut)
    (folder / "chat_template.jinja").write_text(template)
    return Chat.load(folder)


def taught(folder: Path, mode: str, template: str) -> Path:
    """A llama that solves some chains: of one step directly, or of two thinking."""
    chat, rng = companions(folder, template), np.random.default_rng(2)
    level = 1 if mode == "direct" else 2
    problems = chains.sample(rng, level, 600, "train", fewer=True)
    write_lines(folder / "cold_start.jsonl", (row("chains", p, trace=chains.trace(p)) for p in problems))
    write_lines(folder / "answers.jsonl", (row("chains", p) for p in problems))
    spec = TrainSpec.model_validate(
        {"steps": TAUGHT[mode], "batch": 32, "virtual_shards": 1, "direct": {"weight": 0}, "grid_from": 1, "mode": mode}
    )
    settings = config(chat.tokenizer.get_vocab_size())
    trainer = Trainer(spec, 3, fresh(settings, 3), Sft(spec, 3, data.load(folder, chat, mode)))
    while trainer.state.step < spec.steps:
        trainer.step(lambda total: total, range(1))
    trainer.refresh()
    return folder_of(trainer.model, folder, settings)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a thinking switch."""
    return taught(tmp_path_factory.mktemp("plain"), "direct", PLAIN)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With one, and a template that leaves <think> to the model."""
    return taught(tmp_path_factory.mktemp("hybrid"), "thinking", LEFT_TO_THE_MODEL)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untaught, without a switch, with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("other")
    settings = config(companions(folder, cut="characters").tokenizer.get_vocab_size())
    return folder_of(fresh(settings, 5), folder, settings)


def run(tmp_path: Path, launcher: Any, sections: dict[str, Any]) -> tuple[dict[str, Artifact], Path]:
    path, out = recipe(tmp_path, sections), tmp_path / "run"
    found = load_recipe(path, stages.specs())
    done = runner.run(found, out, lambda: contextlib.nullcontext(launcher), runner.Quiet())
    report.write(out)
    return done, out


def recipe(tmp_path: Path, sections: dict[str, Any]) -> Path:
    (tmp_path / "fleet.yaml").write_text("name: one\npools: [{name: cpu}]\n")
    (tmp_path / "recipe.yaml").write_text(json.dumps({"name": "r", "seed": 3, "fleet": "fleet", "stages": sections}))
    return tmp_path / "recipe.yaml"


def problems(level: int) -> dict[str, Any]:
    return {"task": "chains", "levels": [level], "answers": 60, "test": 12}


LITTLE = {"steps": 6, "virtual_shards": 2, "batch": 8, "drift": {"window": 2}, "grid_from": 1}
FRESH = {"name": "fresh", "shape": {"family": "qwen3", "hidden": 32, "width": 48}}


# ---------------------------------------------------------------- whole runs


def test_a_model_without_a_switch_learns_from_its_own_replies_and_teaches(
    plain: Path, other: Path, tmp_path: Path, launcher: Any
) -> None:
    done, out = run(
        tmp_path,
        launcher,
        {
            "problems": problems(1),
            "start": {"source": str(plain)},
            "train-2": {**LITTLE, "mode": "direct", "max_new": 4, "harvest": {"asks": 60}},
            "distill": {
                **LITTLE, "mode": "direct", "max_new": 4, "harvest": {"asks": 60},
                "students": [FRESH, {"name": "began", "start": str(other)}],
            },
        },
    )  # fmt: skip
    tuned = done["train-2"]
    before, after = tuned.json("before.json"), tuned.json("evaluation.json")
    assert set(before) & {"thinking", "direct"} == {"direct"}
    assert tuned.summary["gain"]["before"] == before["direct"]["value"]
    assert (after["max_new"], tuned.summary["gain"]["after"]) == (4, after["direct"]["value"])
    kept = read_lines(tuned.file("traces/replies.jsonl"))
    assert len(kept) == tuned.summary["traces"]["right"] > 0
    assert {line["steps"] for line in kept} == {1}, "problems with one step are asked where they are all there is"
    assert all("trace" not in line and chains.check_answer(problem_of(line), line["reply"]) for line in kept)
    rows = {one["name"]: one for one in done["distill"].json("students.json")}
    assert all(
        (one["mode"], one["control_mode"], one["thinking"]) == ("direct", "direct", None) for one in rows.values()
    )
    assert "before" not in rows["fresh"]
    assert (rows["began"]["arch"], rows["began"]["start"], rows["began"]["n"]) == ("LlamaForCausalLM", str(other), 12)
    for name, its in (("fresh", plain), ("began", other)):
        for arm in ("student", "control"):
            folder = done["distill"].file(f"students/{name}/{arm}")
            assert (folder / "tokenizer.json").read_bytes() == (its / "tokenizer.json").read_bytes()
            assert (folder / "chat_template.jinja").read_text() == PLAIN
            load(folder)
            evaluated = done["distill"].json(f"students/{name}/{arm}.json")
            assert (evaluated["direct"]["n"], evaluated["max_new"]) == (12, 4)
    learnt = read_config(done["distill"].file("students/fresh/student"))
    assert (learnt["vocab_size"], learnt["max_position_embeddings"], learnt["eos_token_id"]) == (44, 96, 1)
    told = json.loads((out / "report.json").read_text())
    assert [one["mode"] for one in told["students"]] == ["direct", "direct"]
    assert told["students"][1]["before"]["before"] == rows["began"]["before"]["before"]
    assert told["tuned"][0]["stage"] == "train-2"
    claims = [one["claim"] for one in told["evidence"]]
    assert any(claim.startswith("began began at") for claim in claims)
    assert any("solve more answering directly than their controls" in claim for claim in claims)
    beside = next(one["how"] for one in told["evidence"] if "than their controls" in one["claim"])
    assert "on the answers alone" in beside
    assert (out / "report.html").stat().st_size > 0


@pytest.mark.slow
def test_a_model_with_a_switch_teaches_its_thinking(hybrid: Path, tmp_path: Path, launcher: Any) -> None:
    """Adapters learn from its own traces, and a fresh student from theirs; a control has answers alone."""
    pytest.importorskip("peft")
    lora = {"rank": 4, "targets": ["q_proj", "v_proj"]}
    done, out = run(
        tmp_path,
        launcher,
        {
            "problems": problems(2),
            "start": {"source": str(hybrid)},
            "train-2": {**LITTLE, "harvest": {"asks": 40}, "lora": lora},
            "distill": {**LITTLE, "harvest": {"asks": 40}, "students": [FRESH]},
        },
    )
    kept = read_lines(done["train-2"].file("traces/cold_start.jsonl"))
    assert kept
    assert all(line["trace"] and line["reply"] == line["said"] for line in kept)
    assert done["train-2"].summary["trained"] < done["train-2"].summary["parameters"]
    assert set(done["train-2"].summary["accuracy"]) == {"thinking", "direct"}
    (one,) = done["distill"].json("students.json")
    assert (one["mode"], one["control_mode"]) == ("thinking", "direct")
    control = done["distill"].json("students/fresh/control.json")
    assert one["control"] == control["direct"]["value"]
    assert control["max_new"] == 48, "an answer may be longer than that of a chain"
    assert "teacher.json" not in done["distill"].manifest["files"], "it was evaluated when it was made"
    told = json.loads((out / "report.json").read_text())
    assert told["traces"]["checked"] == done["distill"].summary["traces"]["right"], "the task knows its traces"


# ---------------------------------------------------------------- what is learnt from


def lines(folder: Path, name: str, **more: Any) -> list[chains.Problem]:
    found = chains.sample(np.random.default_rng(4), 2, 8, "train")
    write_lines(folder / name, (row("chains", p, **more) for p in found))
    return found


def test_direct_mode_learns_replies_and_without_them_answers(dataset: Path, tmp_path: Path) -> None:
    """By hand: each row is the direct prompt, then the reply and its end, and nothing else is a target."""
    chat, asked = Chat.load(dataset / "chat"), lines(tmp_path, "answers.jsonl")

    def by_hand(reply: Any) -> data.Examples:
        return data.pack([(chat.prompts([p.question], False)[0], chat.reply(reply(p))) for p in asked])

    def read() -> data.Data:
        found = data.load(tmp_path, chat, "direct")
        assert found.thinking == {}
        assert found.main is found.direct
        return found

    answers = by_hand(lambda problem: problem.answer)
    assert torch.equal(read().main[2].tokens, answers.tokens)
    assert torch.equal(read().main[2].targets, answers.targets)
    lines(tmp_path, "replies.jsonl", reply="7 7")
    assert torch.equal(read().main[2].tokens, by_hand(lambda _: "7 7").tokens)


def test_what_is_trained_on_is_what_is_asked(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task may add to its question how the answer is to be written; evaluations and rollouts ask so too."""
    chat, asked = Chat.load(dataset / "chat"), lines(tmp_path, "answers.jsonl")
    monkeypatch.setattr(chains, "prompt", lambda problem: f"{problem.question} 7")
    prompts = chat.prompts([f"{p.question} 7" for p in asked], False)
    tokens = data.load(tmp_path, chat, "direct").main[2].tokens
    assert all(tokens[i, : len(prompt)].tolist() == prompt for i, prompt in enumerate(prompts))


def test_direct_mode_mixes_nothing_in(dataset: Path) -> None:
    """Its loss is that of the replies: the section `direct` is of thinking runs."""
    chat = Chat.load(dataset / "chat")
    spec = TrainSpec.model_validate({"mode": "direct", "steps": 4, "direct": {"weight": 0.5, "begin": 0}})
    read = data.load(dataset, chat, "direct")
    batch = data.batch(read, spec, 3, 2, 0)
    assert (batch.direct, batch.direct_count) == (None, 0)
    objective = Sft(spec, 3, read)
    assert objective.told(2, {"loss": 1.0, "direct_loss": 0.0}) == {"loss": 1.0}


def test_a_reply_begins_with_think_where_the_template_leaves_it_to_the_model(tmp_path: Path) -> None:
    ours, theirs = (
        companions(tmp_path / name, text) for name, text in (("a", TINY_TEMPLATE), ("b", LEFT_TO_THE_MODEL))
    )
    assert (ours.opened, theirs.opened) == (True, False)
    asked = [{"role": "user", "content": "7"}]
    whole = [chat.render(asked, True) + chat.reply("1", "7 7") for chat in (ours, theirs)]
    assert whole[0] == whole[1], "the same conversation, whoever writes <think>"
    from ottava.engine.evaluate import well_formed

    assert well_formed(theirs, theirs.reply("1", "7 7"), True)


def test_a_fresh_model_has_the_ids_of_its_tokenizer(plain: Path, tmp_path: Path) -> None:
    """Not those of the main job's: another id ends replies, none is padding, and the context is its teacher's."""
    settings = {"pad_token_id": 3, "eos_token_id": 3}
    folder = tmp_path / "chat"
    companions(folder)
    (folder / "generation_config.json").write_text(json.dumps(settings))
    words = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**words, "pad_token": "<|Assistant|>"}))
    (folder / "config.json").write_text((plain / "config.json").read_text())
    lines(tmp_path, "answers.jsonl")
    spec = TrainSpec.model_validate({**LITTLE, "mode": "direct", "shape": FRESH["shape"]})
    args = {"spec": spec.model_dump(mode="json"), "seed": 1, "data": str(tmp_path), "chat": str(folder)}
    from ottava.trainer.start import config_of

    trainer = make_trainer(args)
    its = config_of(args, trainer)
    assert (its["eos_token_id"], its["pad_token_id"], its["bos_token_id"]) == (3, None, 2)
    assert (its["vocab_size"], its["max_position_embeddings"]) == (44, 96)
    assert trainer.model.get_input_embeddings().padding_idx is None  # type: ignore[operator]


# ---------------------------------------------------------------- keys


def test_another_content_of_a_students_folder_is_another_key(other: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(other, tmp_path / "model")
    student = distill.Student(name="a", start=str(tmp_path / "model"))
    first = student.model_dump(mode="json")
    assert first == student.model_dump(mode="json")
    (tmp_path / "model" / "config.json").write_text("{}")
    assert student.model_dump(mode="json")["start_content"] != first["start_content"]


# ---------------------------------------------------------------- what is missing is told when the recipe is read


START = {"source": "{plain}"}
STUDENT = {"mode": "direct", "students": [{"name": "a", "start": "{plain}"}]}


def one(**more: Any) -> dict[str, Any]:
    """A distillation of one student."""
    return {"start": START, "distill": {"mode": "direct", "students": [{"name": "a", **more}]}}


SHAPE = FRESH["shape"]
LOOKS = {"mode": "direct", "go_no_go": {"baseline": "x", "every": 1}}
MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"start": {"source": "{able}"}, "train": {}}, "answers and no traces.*mode: direct"),
    ({"train": {"mode": "direct"}}, "no vocabulary.*`start` stage"),
    ({"train": {"harvest": {}, "mode": "direct"}}, "no model before this stage"),
    ({"train": {"lora": {}, "grid_from": 1, "mode": "direct"}}, "adapters need a model"),
    ({"start": START, "train-2": {"harvest": {}}}, "no thinking switch, and 'train-2'.*set train-2.mode: direct"),
    ({"start": START, "reinforce": {}}, "no thinking switch, and 'reinforce'"),
    ({"start": START, "distill": {**STUDENT, "mode": "thinking"}}, "set distill.mode: direct"),
    ({"start": START, "train": LOOKS}, "leave it out with mode"),
    (one(shape=SHAPE, tokenizer="pairs"), "`label` stage"),
    (one(start="/nowhere"), "no such folder"),
    (one(start="package:no-such-one"), "not installed"),
    (one(), "either a shape"),
    (one(shape=SHAPE, start="x"), "either a shape"),
    ({"start": START, "distill": {**STUDENT, "on_policy": {"steps": 20}}}, "on_policy.mode is thinking, and mode is"),
    ({"start": START, "distill": {"mode": "direct", "lora": {}, "grid_from": 1, "students": [FRESH]}}, "leave lora"),
]  # fmt: skip


@pytest.mark.parametrize(("sections", "said"), MISTAKES)
def test_what_is_missing_is_told_before_anything_runs(
    other: Path, tmp_path: Path, sections: dict[str, Any], said: str
) -> None:
    companions(tmp_path / "able", TINY_TEMPLATE)
    text = json.dumps({"problems": problems(1), **sections}).replace("{able}", str(tmp_path / "able"))
    filled = json.loads(text.replace("{plain}", str(other)))
    with pytest.raises(RecipeError, match=f"(?s){said}") as error:
        load_recipe(recipe(tmp_path, filled), stages.specs())
    assert error.value.exit_code == 2
    assert "recipe.yaml:1:" in str(error.value.where)


@pytest.mark.parametrize(
    "sections",
    [
        {"start": START, "train": {"mode": "direct"}},
        {"start": START, "train": {"mode": "direct", "harvest": {}}},
        {"start": START, "reinforce": {"mode": "direct"}, "train-2": {"mode": "direct", "harvest": {}}},
        {"start": START, "distill": {**STUDENT, "lora": {}, "grid_from": 1}},
    ],
)
def test_what_can_be_carried_out_is_read(other: Path, tmp_path: Path, sections: dict[str, Any]) -> None:
    filled = json.loads(json.dumps({"problems": problems(1), **sections}).replace("{plain}", str(other)))
    load_recipe(recipe(tmp_path, filled), stages.specs())


def test_ids_are_not_compared_between_two_vocabularies(plain: Path, other: Path, tmp_path: Path, launcher: Any) -> None:
    sections = {
        "problems": problems(1),
        "start": {"source": str(plain)},
        "distill": {
            **LITTLE, "mode": "direct", "students": [{"name": "a", "start": str(other)}],
            "on_policy": {"mode": "direct", "steps": 9},
        },
    }  # fmt: skip
    with pytest.raises(RecipeError, match="another vocabulary than its teacher"):
        run(tmp_path, launcher, sections)


def test_harvests_of_both_kinds_have_their_own_files() -> None:
    assert (harvest.kept_in("thinking"), harvest.kept_in("direct")) == ("cold_start.jsonl", "replies.jsonl")
