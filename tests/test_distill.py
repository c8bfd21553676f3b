"""Harvest and students: what is kept is right, whoever asked; a control differs from its student by its traces."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ottava import stages
from ottava.artifact import Artifact, commit, write_json
from ottava.context import Context
from ottava.errors import DataError, RecipeError
from ottava.journal import Journal, read
from ottava.labels import harvest
from ottava.models.load import load
from ottava.recipe import Fleet, Pool, load_recipe
from ottava.stages import distill
from ottava.tasks import chains
from ottava.tasks.base import problem_of, read_lines, row, write_lines
from ottava.trainer import records
from ottava.trainer.sft import fresh_trainer
from ottava.trainer.spec import Dense, Harvest, TrainSpec


def asked(begun: Path, dataset: Path, out: Path, monkeypatch: pytest.MonkeyPatch, world: int = 1, **more: Any) -> Any:
    """What so many workers find, one after the other."""
    args = {"model": str(begun), "data": str(dataset), "task": "chains", "seed": 3, "out": str(out), **more}
    args = {**Harvest(asks=60).model_dump(), **args}
    out.mkdir()
    told = []
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        told.append(harvest.ask(args))
    lines = [line for part in sorted(out.glob("part-*")) for line in read_lines(part)]
    return told, sorted(lines, key=lambda line: int(line["number"]))


def test_what_is_kept_is_right(begun: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (told,), lines = asked(begun, dataset, tmp_path / "one", monkeypatch)
    assert told["asked"] == 60
    assert 0 < told["right"] == len(lines) < 60, "the model solves some and not others"
    sound = 0
    for line in lines:
        problem = problem_of(line)
        assert chains.check_answer(problem, line["said"])
        assert problem.steps > 1
        sound += not chains.check_trace(problem, line["trace"])
        assert (line["evidence"]["steps"] == "right") == (not chains.check_trace(problem, line["trace"]))
    assert (told["checked"], told["steps_right"]) == (len(lines), sound)
    assert told["steps_respelt"] == sum(line["evidence"]["steps"] == "respelt" for line in lines)


@pytest.mark.parametrize("more", [{}, {"samples": 3, "temperature": 1.0}])
def test_more_workers_find_the_same_and_more_samples_find_more(
    begun: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    """Of each problem; which rows share a batch may change the last bits of a logit, but hardly an id."""
    _, one = asked(begun, dataset, tmp_path / "one", monkeypatch, **more)
    told, two = asked(begun, dataset, tmp_path / "two", monkeypatch, 2, **more)
    assert one == two
    assert sum(counts["asked"] for counts in told) == 60
    if more:
        _, greedy = asked(begun, dataset, tmp_path / "greedy", monkeypatch)
        _, once = asked(begun, dataset, tmp_path / "once", monkeypatch, **{**more, "samples": 1})
        assert {line["id"] for line in once} <= {line["id"] for line in one}
        assert len(one) > len(once)
        assert [line["trace"] for line in greedy] != [line["trace"] for line in one]


def test_a_test_problem_among_the_harvested_is_refused(
    begun: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, lines = asked(begun, dataset, tmp_path / "parts", monkeypatch)
    folder = tmp_path / "label"
    folder.mkdir()
    for name in ("test_one_step", "answers"):
        (folder / f"{name}.jsonl").write_bytes((dataset / f"{name}.jsonl").read_bytes())
    write_lines(folder / "test.jsonl", [row("chains", problem_of(lines[0]))])
    files = {path.name: {} for path in folder.iterdir()}
    label = Artifact(folder, {"spec": {"task": "chains"}, "files": files, "summary": {}})
    teacher = Artifact(begun.parent, {"files": {"model": {}}, "summary": {}})

    class Here:
        """A context whose workers are this process."""

        work, seed = tmp_path / "work", 3

        class pool:
            platform, workers = "cpu", 1

        @staticmethod
        def call(target: str, args: Any, workers: int) -> list[Any]:
            return [harvest.ask(args)]

    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(DataError, match="is the test problem"):
        harvest.collect(Harvest(asks=60), teacher, label, Here, tmp_path / "out")  # type: ignore[arg-type]
    (folder / "test.jsonl").write_bytes((dataset / "test.jsonl").read_bytes())
    counts = harvest.collect(Harvest(asks=60), teacher, label, Here, tmp_path / "out")  # type: ignore[arg-type]
    assert counts["right"] == len(read_lines(tmp_path / "out" / "cold_start.jsonl"))
    Here.call = None  # type: ignore[assignment,method-assign]
    again = harvest.collect(Harvest(asks=60), teacher, label, Here, tmp_path / "again")  # type: ignore[arg-type]
    assert again == counts, "it was asked once"


def test_the_six_have_r1s_families_and_grow() -> None:
    sizes = []
    for student in distill.SIX:
        from ottava.models.build import fresh

        sizes.append(sum(p.numel() for p in fresh(student.shape.config(44), 0).parameters()))
    assert sizes == sorted(sizes)
    assert sizes == [27584, 55200, 72408, 92032, 113904, 138000]
    families = [student.shape.family for student in distill.SIX]
    assert (families.count("qwen3"), families.count("llama")) == (4, 2)


def test_a_student_and_its_control_are_asked_the_same() -> None:
    """One spec trains both, so steps, examples, rates and first weights are equal; only the data folder differs."""
    spec = distill.Spec(steps=7, batch=3)
    training = spec.training(spec.students[0])
    assert isinstance(training, TrainSpec)
    assert (training.steps, training.batch, training.shape) == (7, 3, spec.students[0].shape)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_a_dense_student_trains_to_the_same_bits_whatever_the_workers(dataset: Path, family: Any) -> None:
    from ottava.models.chat import Chat
    from ottava.trainer import data, reduce

    spec = TrainSpec(steps=4, batch=4, virtual_shards=4, grid_from=0.5, shape=Dense(family=family, hidden=32, width=48))
    chat = Chat.load(dataset / "chat")
    read, size = data.load(dataset, chat), chat.tokenizer.get_vocab_size()
    ends = []
    for world in (1, 2, 4):
        trainers = [fresh_trainer(spec, 5, read, size) for _ in range(world)]
        for _ in range(spec.steps):
            for trainer in trainers:
                trainer.refresh()
            parts = [t.contribution(reduce.owned(4, rank, world)) for rank, t in enumerate(trainers)]
            total = reduce.tree_sum(parts)
            for trainer in trainers:
                own = total.clone()
                trainer.update(own, trainer.clip(own))
        ends.append({trainer.state.digest() for trainer in trainers})
    assert len(set.union(*ends)) == 1


def test_rounds_are_stages_and_the_model_so_far_follows_them() -> None:
    names = ["label", "train", "reinforce", "train-2", "reinforce-2", "distill", "convert"]
    assert stages.load("train-2") is stages.load("train")
    so_far = {name: stages.resolve("?@model", name, names)[0] for name in names}
    assert so_far == {
        "label": None, "train": None, "reinforce": "train", "train-2": "reinforce", "reinforce-2": "train-2",
        "distill": "reinforce-2", "convert": "reinforce-2",
    }  # fmt: skip


def test_two_students_of_one_name_are_a_mistake() -> None:
    one = {"name": "q", "shape": {"family": "qwen3", "hidden": 32, "width": 48}}
    with pytest.raises(ValueError, match="same name"):
        distill.Spec.model_validate({"students": [one, one]})
    with pytest.raises(ValueError, match="multiple"):
        distill.Spec.model_validate({"students": [{**one, "shape": {**one["shape"], "hidden": 30}}]})  # type: ignore[dict-item]


@pytest.mark.parametrize("ignored", [{"lora": {}, "grid_from": 1}, {"go_no_go": {"baseline": "x", "every": 10}}])
def test_what_students_have_no_use_for_is_refused(ignored: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="leave lora and go_no_go out"):
        distill.Spec.model_validate(ignored)


def test_the_row_of_a_student_holds_a_paired_interval() -> None:
    def found(right: list[int]) -> dict[str, Any]:
        value = {"value": sum(right) / len(right), "right": right}
        return {"thinking": value, "direct": value, "parameters": 9, "pool": "a"}

    better, worse = [1] * 9 + [0], [1] * 4 + [0] * 6
    got = distill._row(distill.SIX[0], {"student": found(better), "control": found(worse)}, 0.95)
    assert (got["thinking"], got["control"], got["n"]) == (0.9, 0.4, 10)
    assert got["kept"] == pytest.approx(0.9 / 0.95, abs=1e-4)
    assert 0 < got["low"] < 0.5 < got["high"] < 1
    assert json.dumps(got)


def test_a_model_that_was_exported_can_be_a_teacher(begun: Path) -> None:
    assert sum(p.numel() for p in load(begun).parameters()) == 137600


TWO = [{"name": "pairs", "shape": {"family": "qwen3", "hidden": 32, "width": 48}, "tokenizer": "pairs"}]


def test_a_student_with_a_tokenizer_of_its_own(begun: Path, dataset: Path, tmp_path: Path, launcher: Any) -> None:
    """The whole stage: its own words in traces, evaluation, exported files and on its own replies; so its control."""
    from ottava.models.chat import Chat, write_tiny

    label, teacher = tmp_path / "label", tmp_path / "teacher"
    shutil.copytree(dataset, label, ignore=shutil.ignore_patterns("chat"))
    shutil.copytree(begun, teacher / "model")
    write_json(teacher / "evaluation.json", {"thinking": {"value": 0.9}})
    inputs = {
        "label": commit(label, tmp_path / "a" / "label", stage="label", spec={"task": "chains"}, summary={}),
        "model": commit(teacher, tmp_path / "a" / "teacher", stage="reinforce", summary={}),
    }
    spec = distill.Spec.model_validate(
        {
            "steps": 8, "batch": 4, "direct": {"begin": 0.5, "batch": 4}, "harvest": {"asks": 60}, "students": TWO,
            "drift": {"window": 2},
            "on_policy": {
                "steps": 2, "lengths": [2], "rollout": {"prompts": 2, "group": 2, "max_new": 24},
                "divergence": {"kind": "alm"},
            },
        }
    )  # fmt: skip
    pool, work = Pool(name="a", workers=2), tmp_path / "work"
    for name in ("out", "work"):
        (work / name).mkdir(parents=True)
    ctx = Context(
        "distill", 3, "test", Fleet(name="one", pools=(pool,)), pool, (), {}, work / "out", work / "work",
        Journal(work / "journal.jsonl"), launcher, tmp_path / "done", {"stage": "distill"},
    )  # fmt: skip
    done = distill.run(spec, inputs, ctx)
    (row,) = done.json("students.json")
    assert (row["tokenizer"], row["n"]) == ("pairs", 30)
    assert row["on_policy"] is not None
    write_tiny(tmp_path / "own", chains.vocabulary(), "pairs")
    for arm in ("student", "control", "on-policy"):
        folder = done.file(f"students/pairs/{arm}")
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            assert (folder / name).read_bytes() == (tmp_path / "own" / name).read_bytes()
        assert json.loads((folder / "config.json").read_text())["vocab_size"] == 212
        assert load(folder).get_input_embeddings().num_embeddings == 212  # type: ignore[operator]
        assert Chat.load(folder).decode(Chat.load(folder).encode("7 a +5 2")) == "7 a +5 2"
    events = [event for event in read(work / "journal.jsonl") if event["event"] == "train.step"]
    told = [event for event in events if event["phase"] == "on-policy:pairs"]
    assert len(told) == 2
    assert all(0 <= event["covered"] <= 1 for event in told)
    assert len(records.listed(work / "work" / "on-policy-pairs" / "rollouts")) == 2


def test_a_divergence_of_ids_between_two_tokenizers_is_refused(tmp_path: Path) -> None:
    """When the recipe is read, with its place, the student's name and what would mend it."""
    fleet = Path(__file__).parent.parent / "fleets" / "laptop.yaml"
    (tmp_path / "laptop.yaml").write_text(fleet.read_text())
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps({"name": "r", "fleet": "laptop", "stages": {"distill": {"students": TWO}}}))
    load_recipe(recipe, stages.specs())
    load_recipe(recipe, stages.specs(), ["distill.on_policy.divergence.kind=uld"])
    with pytest.raises(RecipeError, match=r"student 'pairs' has a tokenizer of its own.*kind: alm") as error:
        load_recipe(recipe, stages.specs(), ["distill.on_policy.steps=100"])
    assert error.value.exit_code == 2
    with pytest.raises(RecipeError, match="beta is gkd's"):
        load_recipe(
            recipe, stages.specs(), ["distill.on_policy.divergence.kind=uld", "distill.on_policy.divergence.beta=0.5"]
        )
