"""Go or no-go: a run that is worse than its baseline is stopped, one that is not goes on, and no bit depends on it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from ottava import journal
from ottava.artifact import write_json
from ottava.console import report
from ottava.errors import CheckpointError, DataError, TrainingFailed
from ottava.journal import Journal
from ottava.models.chat import Chat, write_tiny
from ottava.models.load import load
from ottava.stages import train
from ottava.supervisor import looks
from ottava.supervisor.detect import KNOWN, Watch
from ottava.supervisor.drill import spec_for
from ottava.supervisor.hub import Hub
from ottava.supervisor.looks import Gate, looks_of, plan_of, rule_of
from ottava.supervisor.loop import Run, replay, supervise
from ottava.tasks import chains
from ottava.tasks.base import row, write_lines
from ottava.trainer import data, heldout, snapshot
from ottava.trainer.guard import Alarm
from ottava.trainer.looks import Looker, losses
from ottava.trainer.loop import Trainer
from ottava.trainer.sft import fresh_trainer
from ottava.trainer.spec import TrainSpec
from ottava.trainer.supervised import Fault, GoNoGo
from ottava.trainer.worker import export
from ottava.verify.sequential import judge

from .test_detect import beat, step
from .test_link import heard, start
from .test_report import Made, claims
from .test_supervisor import PLAIN, make

ASKED: dict[str, Any] = {"at": [4, 8, 12], "examples": 80, "bound": 4.0, "margin": 0.2}
LAME: dict[str, Any] = {"optimiser": {"muon": 1e-6, "adam": 1e-7, "embedding": 1e-7}}
"""A run that learns nothing: a mistake in the recipe."""


@pytest.fixture(scope="module")
def held(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set, with more held out: 240 problems."""
    folder = tmp_path_factory.mktemp("held") / "label"
    shutil.copytree(dataset, folder)
    rng = np.random.default_rng(2)
    problems = [p for n in range(2, 5) for p in chains.sample(rng, n, 80, "test")]
    write_lines(folder / "test.jsonl", (row("chains", p) for p in problems))
    return folder


def model_of(run: Run, folder: Path) -> tuple[str, Path]:
    """The final digest of a run, and its model's folder."""
    final, _ = supervise(run)
    model = folder / "model"
    write_tiny(model, chains.vocabulary())
    snapshot.save(folder / "state", final)
    export({**run.base, "state": str(folder / "state"), "model": str(model), "latent": str(folder / "latent")})
    return final.digest, model


@pytest.fixture(scope="module")
def good(held: Path, launcher: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of a longer run."""
    folder = tmp_path_factory.mktemp("good")
    return model_of(make(held, folder, launcher, PLAIN), folder)[1]


@pytest.fixture(scope="module")
def short(held: Path, launcher: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A short run that nobody looks at: its final digest and its model."""
    folder = tmp_path_factory.mktemp("short")
    return model_of(make(held, folder, launcher, PLAIN, steps=12, restarts=2), folder)


def looking(held: Path, folder: Path, launcher: Any, model: Path, **more: Any) -> Run:
    asked = {**ASKED, "baseline": str(model), **more.pop("go_no_go", {})}
    return make(held, folder, launcher, PLAIN, **{"steps": 12, "restarts": 2, "go_no_go": asked, **more})


def told(run: Run, kind: str) -> list[dict[str, Any]]:
    return [event for event in journal.read(run.journal.path) if event["event"] == f"train.{kind}"]


def verdicts(run: Run) -> list[dict[str, Any]]:
    return [{k: v for k, v in event.items() if k != "t"} for event in told(run, "verdict")]


def steps(run: Run) -> list[int]:
    return [event["step"] for event in told(run, "step")]


class Stopped(Exception):
    """The supervisor is gone."""


# ---------------------------------------------------------------- runs


LENIENT: dict[str, Any] = {"margin": 3.0}
"""A margin that a young run keeps."""


@pytest.fixture(scope="module")
def calm(held: Path, launcher: Any, short: tuple[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run that is looked at and meets no fault, its final digest and its pools."""
    run = looking(held, tmp_path_factory.mktemp("calm"), launcher, short[1], go_no_go=LENIENT)
    final, segments = supervise(run)
    return run, final.digest, segments


def test_looking_changes_no_bit(launcher: Any, tmp_path: Path, short: tuple[str, Path], calm: Any) -> None:
    """The baseline is what the run itself comes to: its last look must find no difference."""
    digest = short[0]
    run, found, segments = calm
    assert found == digest
    assert run.id == replace(run, spec=run.spec.model_copy(update={"go_no_go": None})).id, (
        "its states are the same run's"
    )
    assert [(v["step"], v["look"], v["action"]) for v in verdicts(run)] == [(4, 1, "go"), (8, 2, "go"), (12, 3, "go")]
    assert not told(run, "stop")
    last = told(run, "look")[-1]
    assert last["run"] == pytest.approx(last["baseline"], abs=2e-6), "the weights of the step, on the grid as exported"
    used = [name for look in told(run, "look") for name in look["ids"]]
    assert len(set(used)) == len(used) == 240, "each look has examples of its own"
    again = replay(replace(run, phase="replay", folder=tmp_path / "replay"), segments)
    assert again.digest == digest
    assert len(told(run, "look")) == 3, "a replay is not looked at"


def test_a_run_that_learns_nothing_is_stopped(held: Path, launcher: Any, tmp_path: Path, good: Path) -> None:
    run = looking(held, tmp_path, launcher, good, **LAME)
    with pytest.raises(TrainingFailed, match=r"no-go after step 4: the run is .* worse than its baseline") as error:
        supervise(run)
    assert error.value.exit_code == 1
    (verdict,) = verdicts(run)
    assert verdict["action"] == "stop"
    assert verdict["excess"] > 1.0
    assert [event["reason"] for event in told(run, "stop")] == [verdict["reason"]]
    assert steps(run) == [1, 2, 3, 4], "nothing is computed beyond a no"
    assert not told(run, "fault"), "the workers ended by themselves"
    with pytest.raises(TrainingFailed, match="no-go after step 4"):  # asked again
        supervise(run)
    assert steps(run) == [1, 2, 3, 4]
    assert len(verdicts(run)) == 1


def test_a_sound_run_of_the_same_kind_is_not(held: Path, launcher: Any, tmp_path: Path, good: Path) -> None:
    """Late, with shared examples, against the very run that made the baseline: as good as it, and shown to be."""
    asked = {"at": [38, 40], "examples": 200, "reused": True, "margin": 1.5}
    run = looking(held, tmp_path, launcher, good, steps=40, restarts=0, go_no_go=asked)
    supervise(run)
    assert [(v["action"], v["proven"]) for v in verdicts(run)] == [("go", True), ("go", True)]
    first, last = told(run, "look")
    assert first["ids"] == last["ids"]


def test_a_warning_is_only_said(held: Path, launcher: Any, tmp_path: Path, good: Path) -> None:
    run = looking(held, tmp_path, launcher, good, go_no_go={"on_stop": "warn"}, **LAME)
    assert supervise(run)[0].step == 12
    assert [v["action"] for v in verdicts(run)] == ["stop"] * 3
    assert not told(run, "stop")


@pytest.mark.parametrize(
    ("phase", "at_step", "rank"),
    [
        ("look", 8, 0), ("kept", 12, 1), pytest.param("look", 8, 1, marks=pytest.mark.slow),
        pytest.param("kept", 8, 0, marks=pytest.mark.slow), pytest.param("look", 12, 0, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_death_at_a_look(
    held: Path, launcher: Any, tmp_path: Path, short: tuple[str, Path], calm: Any, phase: Any, at_step: int, rank: int
) -> None:
    """Before or in a look, also after the last step: every look is there, and nothing depends on the death."""
    digest, model = short
    run = looking(held, tmp_path, launcher, model, go_no_go=LENIENT)
    final, _ = supervise(run, [Fault(at_step=at_step, rank=rank, phase=phase)])
    assert final.digest == digest
    assert [f["kind"] for f in told(run, "fault")] == ["killed"]
    assert verdicts(run) == verdicts(calm[0])
    assert steps(run) == sorted(set(steps(run))), "no step was done twice"


def test_a_worker_that_dies_right_after_the_no(
    held: Path, launcher: Any, tmp_path: Path, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its death is no reason to start again, nor that of the end: the answer is there."""
    run = replace(looking(held, tmp_path, launcher, good, restarts=0, **LAME), pools=PLAIN[:1])
    hear = Gate.hear

    def kill(gate: Gate, message: Mapping[str, Any]) -> None:
        os.kill(next(j["pid"] for j in told(run, "join") if j["rank"] == 1), signal.SIGKILL)
        hear(gate, message)

    monkeypatch.setattr(Gate, "hear", kill)
    with pytest.raises(TrainingFailed, match="no-go after step 4"):
        supervise(run)
    assert len(told(run, "start")) == 1


@pytest.mark.parametrize("before", ["judge", "say", pytest.param("plan_of", marks=pytest.mark.slow)])
def test_a_supervisor_that_dies_at_a_look(
    held: Path, launcher: Any, tmp_path: Path, short: tuple[str, Path], calm: Any, monkeypatch: Any, before: str
) -> None:
    """Before the look is journaled, before it is judged, before the verdict is journaled: the next finds the same."""
    run = looking(held, tmp_path, launcher, short[1], go_no_go=LENIENT)
    _die_at_a_look(run, monkeypatch, before)
    assert supervise(run)[0].digest == calm[1]
    assert verdicts(run) == verdicts(calm[0])


@pytest.mark.parametrize("before", ["judge", pytest.param("say", marks=pytest.mark.slow)])
def test_a_supervisor_that_dies_before_the_no(
    held: Path, launcher: Any, tmp_path: Path, good: Path, monkeypatch: Any, before: str
) -> None:
    run = looking(held, tmp_path, launcher, good, **LAME)
    _die_at_a_look(run, monkeypatch, before)
    assert verdicts(run) == []
    with pytest.raises(TrainingFailed, match="no-go after step 4"):
        supervise(run)
    assert [v["action"] for v in verdicts(run)] == ["stop"]
    assert steps(run) == [1, 2, 3, 4]
    assert len(told(run, "start")) == 1, "the answer was in the journal"


def _die_at_a_look(run: Run, monkeypatch: pytest.MonkeyPatch, before: str) -> None:
    """Let the supervisor end inside its first look, where it calls `before`."""
    heard_by = Gate.hear

    def die(*_: Any, **__: Any) -> Any:
        raise Stopped

    def hear(gate: Gate, message: Mapping[str, Any]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(looks, before, die)
            heard_by(gate, message)

    with monkeypatch.context() as patch:
        patch.setattr(Gate, "hear", hear)
        with pytest.raises(Stopped):
            supervise(run)


def test_what_is_done_again_is_looked_at_again(
    held: Path, launcher: Any, tmp_path: Path, short: tuple[str, Path], calm: Any
) -> None:
    """All that is kept after step 5 is lost: the look after it counts no longer, and comes to the same."""
    run = looking(held, tmp_path, launcher, short[1], go_no_go=LENIENT, checkpoint_every=5)

    def interrupt(step: int) -> None:
        if step >= 9:
            raise Stopped

    with pytest.raises(Stopped):
        supervise(replace(run, progress=interrupt))
    shutil.rmtree(run.folder / "memory")
    supervise(run)
    assert [look["step"] for look in told(run, "look")] == [4, 8, 8, 12]
    assert told(run, "look")[1]["run"] == told(run, "look")[2]["run"]
    assert verdicts(run) == [verdicts(calm[0])[n] for n in (0, 1, 1, 2)]


def test_a_rule_that_is_loosened_judges_the_same_looks(held: Path, launcher: Any, tmp_path: Path, good: Path) -> None:
    run = looking(held, tmp_path, launcher, good, **LAME)
    with pytest.raises(TrainingFailed):
        supervise(run)
    loose = looking(held, tmp_path, launcher, good, go_no_go=LENIENT, **LAME)
    assert supervise(loose)[0].step == 12
    assert [look["step"] for look in told(run, "look")] == [4, 8, 12]


# ---------------------------------------------------------------- refused before it begins


def test_examples_that_run_out_are_refused(held: Path, launcher: Any, tmp_path: Path, short: tuple[str, Path]) -> None:
    run = looking(held, tmp_path, launcher, short[1], go_no_go={"examples": 81})
    with pytest.raises(DataError, match="3 looks at 81 examples each take 243, and 240 problems are held out") as error:
        supervise(run)
    assert error.value.exit_code == 2
    assert "test_per_length" in str(error.value)
    assert steps(run) == []
    heldout.check(looking(held, tmp_path, None, short[1], go_no_go={"reused": True}).spec, held, held / "chat")
    spec = looking(held, tmp_path, None, short[1], go_no_go={"reused": True, "examples": 241}).spec
    with pytest.raises(DataError, match="a look at 241 examples takes more, and 240"):
        heldout.check(spec, held, held / "chat")


def test_the_stage_refuses_before_it_trains(held: Path, tmp_path: Path, short: tuple[str, Path]) -> None:
    spec = looking(held, tmp_path, None, short[1], go_no_go={"examples": 81}).spec
    label = SimpleNamespace(path=held, json=lambda name: json.loads((held / name).read_text()), digest="0")
    ctx: Any = SimpleNamespace(pool=PLAIN[0], fallback=(), out=tmp_path / "out", seed=3, work=tmp_path / "work")
    with pytest.raises(DataError, match="240 problems are held out"):
        train.run(spec, {"label": label}, ctx)  # type: ignore[dict-item]


def test_another_vocabulary_is_refused(held: Path, launcher: Any, tmp_path: Path, short: tuple[str, Path]) -> None:
    other = tmp_path / "model"
    shutil.copytree(short[1], other)
    words = chains.vocabulary()
    words[3], words[4] = words[4], words[3]  # as many words, and none that the run lacks
    write_tiny(other, words)
    run = looking(held, tmp_path, launcher, other)
    with pytest.raises(CheckpointError, match="the baseline has another vocabulary") as error:
        supervise(run)
    assert error.value.exit_code == 2
    assert steps(run) == []
    write_tiny(other, chains.vocabulary())
    config = json.loads((other / "config.json").read_text())
    write_json(other / "config.json", {**config, "vocab_size": 10})
    with pytest.raises(CheckpointError, match=r"says 10 words, and its tokenizer has 44"):
        heldout.check(run.spec, held, held / "chat")


def test_the_baseline_is_found(tmp_path: Path, held: Path, launcher: Any) -> None:
    def model(*parts: str) -> Path:
        place = tmp_path.joinpath(*parts)
        place.mkdir(parents=True)
        (place / "config.json").write_text("{}")
        return place

    plain, trained = model("plain"), model("run", "artifacts", "train-1", "model")
    model("run", "artifacts", "distill-1", "model")
    assert heldout.model_folder(str(plain)) == plain
    assert heldout.model_folder(str(trained.parent)) == trained
    assert heldout.model_folder(str(tmp_path / "run")) == trained
    for stage in ("reinforce", "train-2", "reinforce-2", "train-3", "train-10"):  # the later, the more it has learnt
        later = model("run", "artifacts", f"{stage}-0a1b", "model")
        assert heldout.model_folder(str(tmp_path / "run")) == later
    converted = model("run", "artifacts", "convert-1", "model")
    assert heldout.model_folder(str(tmp_path / "run")) == converted
    model("run", "artifacts", "convert-2", "model")
    with pytest.raises(CheckpointError, match="has 2 models of the stage 'convert'"):
        heldout.model_folder(str(tmp_path / "run"))
    for nothing, words in (("none", "there is no such baseline"), ("run/artifacts", "there is no model")):
        with pytest.raises(CheckpointError, match=words):
            heldout.model_folder(str(tmp_path / nothing))
    with pytest.raises(CheckpointError, match="there is no such baseline"):
        supervise(looking(held, tmp_path, launcher, tmp_path / "none"))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "say when to look"),
        ({"every": 4, "at": [4]}, "say when to look"),
        ({"at": [4, 4]}, "ascending"),
        ({"at": [41]}, "after the last step, which is 40"),
        ({"every": 41}, "after the last step, which is 40"),
        ({"every": 4, "margin": 4.0}, "must be below the bound"),
        ({"every": 4, "alpha": 1.0}, "alpha"),
        ({"every": 4, "on_stop": "go"}, "on_stop"),
    ],
)
def test_a_recipe_that_makes_no_sense(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainSpec.model_validate({"steps": 40, "drift": {"window": 4}, "go_no_go": {"baseline": "b", **asked}})


def test_a_mistake_in_the_recipe_is_shown_where_it_is(tmp_path: Path) -> None:
    words = ["run", "recipes/tiny.yaml", "--set", "train.go_no_go={baseline: b}", "--out", str(tmp_path / "run")]
    found = subprocess.run([sys.executable, "-m", "ottava.cli", *words], capture_output=True, text=True, timeout=300)
    assert found.returncode == 2, found.stderr
    assert "say when to look" in found.stderr
    assert not (tmp_path / "run").exists()


def test_a_drill_does_not_look() -> None:
    asked = TrainSpec(go_no_go=GoNoGo(baseline="b", every=100))
    assert spec_for(asked).go_no_go is None


# ---------------------------------------------------------------- the parts


@pytest.fixture(scope="module")
def trainer(held: Path) -> Trainer:
    spec = make(held, held.parent / "none", None, PLAIN, steps=12, grid_from=0.5).spec
    chat = Chat.load(held / "chat")
    found = fresh_trainer(spec, 3, data.load(held, chat), chat.tokenizer.get_vocab_size())
    for _ in range(3):
        found.step(lambda total: total, range(2))
    return found


def test_losses_against_one_example_at_a_time(held: Path, trainer: Trainer) -> None:
    chat, examples = Chat.load(held / "chat"), list(heldout.read(held).values())[::7]
    pairs, expected = [], []
    for example in examples:
        prompt = chat.prompts([example.problem.question], thinking=True)[0]
        reply = chat.reply(example.problem.answer, chains.trace(example.problem))
        pairs.append((prompt, reply))
        with torch.no_grad():
            logits = trainer.model(input_ids=torch.tensor([prompt + reply]), use_cache=False).logits[0]
        words = logits.double().log_softmax(-1)
        each = [-float(words[len(prompt) - 1 + n, token]) for n, token in enumerate(reply)]
        expected.append(sum(each) / len(each))
    assert losses(trainer.model, pairs) == pytest.approx(expected, abs=2e-6)
    assert len({len(prompt) + len(reply) for prompt, reply in pairs}) == 3


@pytest.mark.parametrize("at", [3, 6])
def test_looking_leaves_everything_as_it_was(trainer: Trainer, at: int) -> None:
    """Also on the grid, where the weights that a step uses are not the latent ones."""
    trainer.state.step = at
    trainer.refresh()
    trainer.shard(0)
    state, loads = trainer.state.digest(), [counts.clone() for counts in trainer._counts]
    forward, draws = trainer.forward.clone(), torch.get_rng_state()
    trainer.forward.fill_(0.5)  # stale, as after an update
    with trainer.looking() as model:
        assert torch.equal(trainer.forward, forward)
        torch.rand(3)
        loss = model(input_ids=torch.ones(1, 9, dtype=torch.int64), use_cache=False).logits.sum()
        assert not loss.requires_grad
        assert not model.training
    assert torch.equal(forward, trainer.state.weights) == (at == 3)
    assert trainer.model.training
    assert trainer.state.digest() == state
    assert torch.equal(torch.get_rng_state(), draws)
    assert all(torch.equal(a, b) for a, b in zip(trainer._counts, loads, strict=True))
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert any(bool(counts.any()) for counts in loads)


def test_losses_that_are_no_numbers(held: Path, short: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    spec = looking(held, held.parent / "none", None, short[1]).spec
    chat = Chat.load(held / "chat")
    found = fresh_trainer(spec, 3, data.load(held, chat), chat.tokenizer.get_vocab_size())
    found.state.step = 4
    looker = Looker(found, held, held / "chat", short[1])
    assert [len(looker.look()[name]) for name in ("ids", "run", "baseline")] == [80] * 3
    broken = load(short[1])
    next(broken.parameters()).data.fill_(float("nan"))
    monkeypatch.setattr(looker, "_model", broken)
    with pytest.raises(DataError, match="baseline's loss on a held-out example is not finite"):
        looker.look()
    found.state.weights.fill_(float("nan"))
    with pytest.raises(Alarm, match="a held-out loss after step 4 is not finite"):
        looker.look()


def test_a_look_of_the_same_step_has_the_same_examples(held: Path) -> None:
    spec = TrainSpec(go_no_go=GoNoGo(baseline="b", every=300, examples=80))
    questions = list(heldout.read(held))
    found = {step: heldout.of_look(spec, questions, 7, step) for step in spec.looks}
    assert heldout.of_look(spec, questions[::-1], 7, 600) == found[600]
    assert heldout.of_look(spec, questions, 8, 600) != found[600]
    assert set(found[300]) | set(found[600]) | set(found[900]) == set(questions)
    assert all(chains.held_out(question) for question in questions)


def event(name: str, step: int, phase: str = "main", **fields: Any) -> dict[str, Any]:
    return {"event": f"train.{name}", "phase": phase, "step": step, **fields}


def test_which_looks_count() -> None:
    def look(step: int, mark: float = 0.0, **more: Any) -> dict[str, Any]:
        return event("look", step, **{"plan": "p", "ids": [str(step)], "run": [mark], "baseline": [0.0], **more})

    def seen(*events: dict[str, Any]) -> list[tuple[int, float]]:
        return [(found.step, found.run[0]) for found in looks_of(events, "main", "p")]

    assert seen(event("start", 0), look(4), look(8)) == [(4, 0.0), (8, 0.0)]
    assert seen(look(4), look(8), event("start", 8)) == [(4, 0.0), (8, 0.0)]
    assert seen(look(4), look(8), event("start", 7)) == [(4, 0.0)]
    assert seen(look(4), look(8), event("start", 5, "replay")) == [(4, 0.0), (8, 0.0)]
    assert seen(look(4), look(8), event("start", 5), look(8, 1.0)) == [(4, 0.0), (8, 1.0)]
    assert seen(look(4), look(4, 1.0)) == [(4, 1.0)]
    assert seen(look(4), look(8, plan="q")) == [(4, 0.0)]
    assert seen(look(4), {"event": "train.begin"}, look(8)) == [(8, 0.0)]


def test_the_plan_is_what_is_compared_and_the_rule_is_not() -> None:
    def plan(**more: Any) -> str:
        return plan_of(TrainSpec(go_no_go=GoNoGo(**{"baseline": "b", "every": 300, **more})))

    same = [
        {"margin": 0.3},
        {"alpha": 0.01},
        {"bound": 2.0},
        {"on_stop": "warn"},
        {"every": None, "at": (300, 600, 900)},
    ]
    assert {plan(**more) for more in same} == {plan()}
    others = [{"baseline": "c"}, {"examples": 7}, {"reused": True}, {"every": 450}]
    assert len({plan(), *(plan(**more) for more in others)}) == 5


def test_the_verdict_is_the_rule_s(tmp_path: Path) -> None:
    """What the gate says is what `judge` says of all looks, and it tells the workers."""
    asked = GoNoGo(baseline="b", at=(300, 600), examples=40, margin=0.1, bound=2.0)
    run: Any = SimpleNamespace(journal=Journal(tmp_path / "j"), phase="main")
    orders: list[tuple[str, Any]] = []
    hub: Any = SimpleNamespace(tell=lambda do, **fields: orders.append((do, fields)))
    gate = Gate(run, TrainSpec(go_no_go=asked), hub)
    assert gate.pending(0) == [300, 600]
    for at, worse in ((300, 0.05), (600, 1.5)):
        ids = [f"{at}-{n}" for n in range(40)]
        gate.hear({"step": at, "epoch": 1, "ids": ids, "run": [0.2 + worse] * 40, "baseline": [0.2] * 40})
    assert (gate.pending(200), gate.pending(300), gate.pending(600)) == ([300, 600], [600], [])
    found = looks_of(journal.read(tmp_path / "j"), "main", plan_of(TrainSpec(go_no_go=asked)))
    expected = [judge(found[:n], rule_of(asked)).event() for n in (1, 2)]
    said = [e for e in journal.read(tmp_path / "j") if e["event"] == "train.verdict"]
    assert [{k: e[k] for k in expected[0]} for e in said] == expected
    assert [e["action"] for e in said] == ["go", "stop"]
    assert orders == [("on", {"step": 300}), ("stop", {})]
    assert gate.refused


# ---------------------------------------------------------------- the line and the watch


WAITER = """
from ottava import link
line = link.connect()
line.join(step=3)
line.phase = "verdict"
for step in (4, 4, 3, 8):
    print(line.clearance(step), line.stopping, flush=True)
line.bye(8)
"""


def test_a_worker_waits_for_the_word() -> None:
    with Hub(lease_s=2.0) as hub:
        worker = start(hub.admit(1), code=WAITER)
        heard(hub, "join")
        hub.tell("go")
        assert any(heard(hub, "beat")[-1]["phase"] == "verdict" for _ in range(100))
        assert worker.poll() is None
        hub.tell("on", step=3)  # of an earlier look
        heard(hub, "beat", 3)
        assert worker.poll() is None
        hub.tell("on", step=4)
        heard(hub, "beat", 3)
        assert worker.poll() is None
        hub.tell("stop")
        assert worker.communicate(timeout=60)[0].splitlines() == ["True False"] * 3 + ["False True"]


def test_a_look_is_no_hang() -> None:
    found = Watch(2, TrainSpec(hang_s=60.0, hang_least_s=1.0), 0.0)
    for number in range(KNOWN + 1):
        for rank in range(2):
            found.hear(step(rank, 0.1 * number, number))
    assert found.deadline() == 1.0
    last = 0.1 * KNOWN

    def beats(now: float, *phases: str) -> None:
        for rank, phase in enumerate(phases):
            found.hear(beat(rank, now, phase))

    beats(last + 50, "look", "verdict")
    assert found.hung(last + 50) is None, "who looks has time"
    beats(last + 61, "look", "verdict")
    assert found.hung(last + 61) == (0,), "but not for ever: the others wait for it"
    beats(last + 61.5, "verdict", "verdict")
    assert found.hung(last + 62.4) is None, "a look that is done is progress"
    beats(last + 62.5, "verdict", "verdict")
    assert found.hung(last + 62.6) == (), "no worker's fault: the supervisor said nothing"


# ---------------------------------------------------------------- the report


def told_by(folder: Path, *judged: tuple[int, str, bool], failed: bool = False) -> dict[str, Any]:
    """The report of a run whose looks came to (step, action, proven)."""
    made = Made(folder, ("train",))
    made.begin("train")
    made.event("train.verdict", phase="main", step=500, action="stop", reason="an earlier try")
    made.event("train.start", phase="main", step=0)
    for number, (at, action, proven) in enumerate(judged, 1):
        numbers = {"excess": 0.1, "low": -0.2, "high": 0.4, "evidence": 1.0, "examples": 60, "look": number}
        rule = {"margin": 0.25, "alpha": 0.01, "bound": 4.0, "reused": False, "on_stop": "stop", "baseline": "b"}
        words = {"step": at, "action": action, "proven": proven, "reason": f"reason {number}"}
        made.event("train.verdict", phase="main", **numbers, **rule, **words)
    if failed:
        made.event("stage.failed", stage="train", seconds=1.0, message="no-go after step 9")
    content = report.build(folder)
    report.write(folder)
    return content


@pytest.mark.parametrize(
    ("action", "proven", "holds"),
    [("go", True, True), ("stop", False, False), ("go", False, None), ("warn", False, None)],
)
def test_the_report_says_what_was_shown(tmp_path: Path, action: str, proven: bool, holds: bool | None) -> None:
    content = told_by(tmp_path / "run", (4, "go", False), (9, action, proven), failed=action == "stop")
    (row,) = claims(content, "baseline")
    assert (row["level"], row["holds"]) == ("measured", holds)
    words = "nothing shows that the run is worse than" if holds is None else "the run is no worse than"
    assert row["claim"] == f"After step 9 {words} its baseline by more than 0.25 nats a token"
    for part in ("error rate 1.0%", "2 looks", "120 held-out examples", "reason 2"):
        assert part in row["how"]
    shown = report.text(content)
    assert f"go at 4, {action if action == 'go' else action.upper()} at 9; error rate 1.0%" in " ".join(shown.split())
    assert ("DOES NOT HOLD: After step 9" in " ".join(shown.split())) == (holds is False)
    assert "baseline by more than 0.25" in (tmp_path / "run" / "report.html").read_text()


def test_a_run_without_looks_says_nothing_of_a_baseline(tmp_path: Path) -> None:
    content = told_by(tmp_path / "run")
    assert content["go_no_go"] is None
    assert not claims(content, "baseline")
    assert "go/no-go" not in report.text(content)
