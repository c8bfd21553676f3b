"""Sampled figures against a model whose chances are known, greedy ones against `evaluate`, the curve by hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ottava import cli
from ottava.engine import measure
from ottava.engine.evaluate import evaluate
from ottava.engine.measure import Terms, compare, draw, measure_folders, read
from ottava.errors import DataError
from ottava.tasks import Problem, chains
from ottava.tasks.base import generator, row, write_lines
from ottava.tasks.verify import grade
from tests.test_engine import CONFIG, END, VOCABULARY, random_model, tiny_chat, write_folder

Say = Callable[[tuple[int, ...], int], Mapping[int, float]]
GREEDY = Terms(samples=1, k=1, temperature=0)


class Student(nn.Module):
    """Says each id with the probability that `say(prompt, position)` gives it; the rest is nothing."""

    def __init__(self, say: Say):
        super().__init__()
        from transformers import DeepseekV3Config

        self.config = DeepseekV3Config(**CONFIG)
        self.weight = nn.Parameter(torch.zeros(1))
        self.say = say

    def forward(self, input_ids: Tensor, past_key_values: Any, **_: Any) -> SimpleNamespace:
        state = past_key_values.__dict__.setdefault("state", {"prompts": input_ids, "position": 0})
        past_key_values.batch_select_indices = lambda rows: state.update(prompts=state["prompts"][rows])
        logits = torch.full((len(state["prompts"]), 1, VOCABULARY), -1e9)
        for at, prompt in enumerate(state["prompts"].tolist()):
            for token, chance in self.say(tuple(prompt), state["position"]).items():
                logits[at, 0, token] = torch.tensor(chance, dtype=torch.float64).log()
        state["position"] += 1
        return SimpleNamespace(logits=logits)


def problems(count: int = 5) -> list[Problem]:
    return draw(chains, 3 * count, 3, "test", (1, 2, 3))


def wrong(problem: Problem) -> str:
    return str((int(problem.answer) + 1) % 10)


def student(asked: list[Problem], chances: Mapping[str, float]) -> Student:
    """Reasons as taught; the answer is right with the problem's chance, else one too high."""
    chat, right, bad = tiny_chat(), {}, {}
    for problem in asked:
        for thinking in (True, False):
            key = tuple(chat.prompts([problem.question], thinking)[0])
            trace = chains.trace(problem) if thinking else None
            right[key] = (chat.reply(problem.answer, trace), chances[problem.id])
            bad[key] = chat.reply(wrong(problem), trace)

    def say(prompt: tuple[int, ...], position: int) -> dict[int, float]:
        line, chance = right[prompt]
        if position != len(line) - 2:
            return {line[position] if position < len(line) else END: 1.0}
        return {line[position]: chance, bad[prompt][position]: 1 - chance}

    return Student(say)


@pytest.mark.parametrize("thinking", [True, False])
def test_greedy_figures_are_those_of_evaluate(thinking: bool) -> None:
    asked = problems()
    model = student(asked, {p.id: 0.9 if i % 4 else 0.1 for i, p in enumerate(asked)})
    ours = measure.measure(model, tiny_chat(), chains, asked, GREEDY)
    mode = measure.MODES[thinking]
    figures = ours["modes"][mode]

    # `evaluate` keeps its batches whole, and so never asks the student to select rows
    theirs = evaluate(model, tiny_chat(), asked, thinking, partial(grade, chains))
    assert figures["digest"] == theirs["digest"]
    assert figures["greedy"] == {key: theirs[key] for key in ("value", "low", "high")}
    assert [int(one["right"]) for one in ours["rows"][mode]] == theirs["right"]
    assert figures["pass1"] == theirs["value"] == 11 / 15
    assert figures["mode_following"] == 1.0


def test_sampled_figures_are_the_model_s_own_chances() -> None:
    asked = problems(8)
    chances = {p.id: (i % 5) / 4 for i, p in enumerate(asked)}
    found = measure.measure(student(asked, chances), tiny_chat(), chains, asked, Terms(samples=64, k=8))
    mean = sum(chances.values()) / len(asked)
    for mode in ("thinking", "direct"):
        figures = found["modes"][mode]
        assert figures["pass1"] == pytest.approx(mean, abs=4 * 0.5 / (24 * 64) ** 0.5)
        assert figures["low"] < mean < figures["high"]
        assert set(figures["pass_k"]) == {"1", "2", "4", "8"}
        for k, tries in figures["pass_k"].items():
            expected = sum(1 - (1 - chance) ** int(k) for chance in chances.values()) / len(asked)
            assert tries["value"] == pytest.approx(expected, abs=0.04), (mode, k)
            assert tries["low"] < tries["value"] < tries["high"]
        sure = [r["correct"] for r, p in zip(found["rows"][mode], asked, strict=True) if chances[p.id] in (0, 1)]
        assert set(sure) == {0, 64}


def test_a_measurement_depends_on_weights_and_seed_alone() -> None:
    asked, chat = problems(), tiny_chat()
    told: list[tuple[int, int]] = []
    terms = Terms(samples=4, k=2, max_new=20, budgets=(3,))

    def once(seed: int, weights: int = 0) -> dict[str, Any]:
        terms_now = Terms(**{**vars(terms), "seed": seed})
        return measure.measure(
            random_model(weights), chat, chains, asked, terms_now, lambda done, of: told.append((done, of))
        )

    first = once(1)
    assert told[-1] == (15 * (2 * 5 + 1),) * 2
    assert first == once(1)
    assert first["modes"]["thinking"]["length"] != once(2)["modes"]["thinking"]["length"]
    assert first["modes"]["thinking"]["digest"] == once(2)["modes"]["thinking"]["digest"]
    assert first["modes"]["thinking"]["digest"] != once(1, 1)["modes"]["thinking"]["digest"]


def test_batches_are_cut_by_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = problems(8)
    model = student(asked, {p.id: 0.5 for p in asked})
    whole = measure.measure(model, tiny_chat(), chains, asked, Terms(samples=4, k=2))
    monkeypatch.setattr(measure, "_ROWS", 7)
    assert measure.measure(model, tiny_chat(), chains, asked, Terms(samples=4, k=2)) == whole
    wide = SimpleNamespace(config=SimpleNamespace(hidden_size=8192, num_attention_heads=64, num_key_value_heads=8))
    wide.config.num_hidden_layers, wide.config.vocab_size = 80, 128_000
    assert measure._batch(wide, 1 << 20) == 1  # type: ignore[arg-type]


def test_a_budget_of_thinking_ends_it() -> None:
    """Chains of s steps think 3s + 1 ids and then </think>: with fewer, </think> is forced and the script is lost."""
    asked = problems()
    model = student(asked, {p.id: 1.0 for p in asked})
    found = measure.measure(
        model, tiny_chat(), chains, asked, Terms(samples=1, k=1, temperature=0, budgets=(0, 4, 7, 10))
    )
    assert [point["tokens"] for point in found["budgets"]] == [0, 4, 7, 10]
    assert [point["accuracy"] for point in found["budgets"]] == [0.0, 1 / 3, 2 / 3, 1.0]
    assert [point["thought"] for point in found["budgets"]] == [0.0, 4.0, 6.0, 7.0]
    assert all(point["low"] <= point["accuracy"] <= point["high"] and point["n"] == 15 for point in found["budgets"])


def test_ill_formed_and_endless_replies_are_told() -> None:
    asked, chat = problems(), tiny_chat()
    endless = {tuple(chat.prompts([p.question], t)[0]) for p in asked[:5] for t in (True, False)}
    good = student(asked, {p.id: 1.0 for p in asked}).say

    def say(prompt: tuple[int, ...], position: int) -> Mapping[int, float]:
        return {9: 1.0} if prompt in endless else good(prompt, position)

    found = measure.measure(
        Student(say), chat, chains, asked, Terms(samples=1, k=1, temperature=0, max_new=40, thinking=False)
    )
    figures = found["modes"]["direct"]
    assert list(found["modes"]) == ["direct"]
    assert (figures["mode_following"], figures["length"]["truncated"]) == (2 / 3, 1 / 3)
    assert figures["length"] == {"mean": (5 * 40 + 10 * 2) / 15, "p50": 2, "p95": 40, "truncated": 1 / 3}
    assert figures["pass1"] == 2 / 3
    assert figures["by_steps"]["1"] == {"n": 5, "pass1": 0.0}


def test_problems_are_fresh_and_of_one_side() -> None:
    asked = draw(chains, 300, 0, "test")
    assert len({p.question for p in asked}) == len(asked) == 300
    assert all(chains.held_out(p.question) for p in asked)
    assert {p.steps for p in asked} == {1, 2, 3, 4, 5, 6}
    assert asked == draw(chains, 300, 0, "test") != draw(chains, 300, 1, "test")
    ones = draw(chains, 500, 0, "test", (1,))
    assert 50 < len(ones) < 100  # all that there are
    many = draw(chains, 900, 0, "test", (1, 3))
    assert sum(p.steps == 1 for p in many) == len(ones)
    assert len(many) == 900  # what one level lacks the other gives
    backwards = draw(chains, 900, 0, "test", (3, 1))
    assert len(backwards) == 900
    assert not any(chains.held_out(p.question) for p in draw(chains, 50, 0, "train"))
    sides = [chains.held_out(p.question) for p in draw(chains, 100, 0, "all")]
    assert 20 < sum(sides) < 80
    theirs = chains.sample(generator(0, "test", 5), 5, 50, "test")
    assert {p.id for p in theirs} != {p.id for p in draw(chains, 50, 0, "test", (5,))}


def test_a_data_set_is_read_with_its_task(tmp_path: Path) -> None:
    asked, path = problems(), tmp_path / "test.jsonl"
    write_lines(path, [row("chains", p) for p in asked])
    task, found = read(path)
    assert (task.NAME, found) == ("chains", asked)
    write_lines(path, [row("chains", asked[0]), row("maths:x", asked[1])])
    with pytest.raises(DataError, match="2 tasks"):
        read(path)
    assert read(path, "chains")[1] == asked[:2]
    path.write_text("\n")
    with pytest.raises(DataError, match="no problem"):
        read(path)


def test_two_models_are_paired_problem_by_problem() -> None:
    def rows(right: str) -> list[dict[str, Any]]:
        return [{"id": str(i), "right": x == "1"} for i, x in enumerate(right)]

    found = compare(rows("1111100000"), rows("1111011111"))
    assert (found["b_better"], found["a_better"], found["n"]) == (5, 1, 10)
    assert found["difference"] == pytest.approx(0.4)
    assert found["p_value"] == pytest.approx(2 * (1 + 6) / 64)  # two tails of six tosses
    assert found["low"] < 0.4 < found["high"]
    with pytest.raises(DataError, match="different problems"):
        compare(rows("11"), rows("111"))


@pytest.mark.parametrize(
    "terms",
    [
        {"samples": 8, "k": 5},
        {"samples": 0},
        {"k": 0},
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"temperature": -1.0},
        {"budgets": (-1,)},
        {"budgets": (8,), "thinking": False},
        {"budgets": (8,), "max_new": 8},
    ],
)
def test_terms_that_cannot_be(terms: dict[str, Any]) -> None:
    with pytest.raises(DataError) as caught:
        Terms(**terms)
    assert caught.value.what


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("measured") / "model", random_model(2))


def test_a_folder_against_itself(folder: Path) -> None:
    found = measure_folders([folder, folder], chains, problems(), Terms(samples=2, k=1, max_new=12))
    assert set(found["compare"]) == {"thinking", "direct"}
    for verdict in found["compare"].values():
        assert (verdict["difference"], verdict["p_value"], verdict["n"]) == (0.0, 1.0, 15)
    assert found["modes"] == found["other"]["modes"]


def without_switch(folder: Path, to: Path) -> Path:
    import shutil

    shutil.copytree(folder, to)
    (to / "chat_template.jinja").write_text("{% for m in messages %}<|User|>{{ m.content }}{% endfor %}<|Assistant|>")
    return to


def said(monkeypatch: pytest.MonkeyPatch, capsys: Any, *args: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["ottava", "evaluate", *map(str, args)])
    code = cli.outcome()
    streams = capsys.readouterr()
    return code, streams.out, streams.err


def test_the_command(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--task", "chains", "--n", 12, "--samples", 4, "--k", 2, "--budgets", "2,0", "--max-new", 10]
    out = tmp_path / "result.json"
    code, printed, _ = said(monkeypatch, capsys, folder, folder, *asked, "--json", "--out", out)
    assert code == 0
    found, kept = json.loads(printed), json.loads(out.read_text())
    assert (found["model"], found["task"], found["n"], found["seed"]) == (str(folder), "chains", 12, 0)
    assert "rows" not in found
    assert [len(kept["rows"][mode]) for mode in ("thinking", "direct")] == [12, 12]
    assert {**kept, "rows": 0, "other": 0} == {**found, "rows": 0, "other": 0}
    assert [point["tokens"] for point in found["budgets"]] == [0, 2]
    code, printed, _ = said(monkeypatch, capsys, folder, folder, *asked)
    assert code == 0
    assert ("A thinking" in printed, "B direct" in printed, "no difference is shown" in printed) == (True,) * 3
    plain = without_switch(folder, tmp_path / "plain")
    code, printed, _ = said(monkeypatch, capsys, plain, "--task", "chains", "--n", 6, "--max-new", 4, "--json")
    assert (code, list(json.loads(printed)["modes"])) == (0, ["direct"])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "nothing to ask"),
        (["--task", "chians"], "did you mean"),
        (["--task", "chains", "--k", 5], "pass@5"),
        (["--task", "chains", "--samples", 6, "--k", 4], "pass@4"),
        (["--task", "chains", "--temperature", 0, "--samples", 8], "temperature 0"),
        (["--task", "chains", "--budgets", "8;16"], "no list of numbers"),
        (["--task", "chains", "--levels", "9"], "1 to 6 steps"),
        (["--task", "chains", "--n", 0], "--n"),
        (["--task", "chains", "--split", "dev"], "--split"),
        (["--task", "chains", "--max-new", 10_000], "context"),
        (["--task", "chains", "--platform", "tpu"], "platform"),
        (["--task", "maths:none.jsonl"], "none.jsonl"),
        (["--problems", "none.jsonl"], "none.jsonl"),
        (["--task", "chains", "--out", "nowhere/x.json"], "no folder"),
        (["--task", "chains", "--harness", "no such, task"], "names of tasks"),
        (["empty", "--task", "chains"], "tokenizer.json"),
        (["absent", "--task", "chains"], "no such folder"),
        (["plain", "--task", "chains", "--thinking"], "no thinking switch"),
        (["plain", "--task", "chains", "--budgets", "4"], "no thinking switch"),
    ],
)
def test_bad_input_is_one_message(
    args: list[Any],
    words: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OTTAVA_HARNESS", sys.executable)
    monkeypatch.chdir(tmp_path)
    without_switch(folder, tmp_path / "plain")
    (tmp_path / "empty").mkdir()
    named = args[:1] if args and args[0] in ("empty", "absent", "plain") else [folder]
    code, printed, told = said(monkeypatch, capsys, *named, *args[args[:1] == named :])
    assert (code, printed) == (2, ""), told
    assert words in told
    assert told.count("error:") == 1
