"""lm-evaluation-harness against our server: both must read the same answer to every problem."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from ottava.engine.measure import Terms, draw, measure_folders
from ottava.errors import DataError, PlatformError
from ottava.gateway import harness
from ottava.tasks import Problem, chains, get
from ottava.tasks.base import read_lines
from tests.test_engine import random_model, tiny_chat, write_folder


def test_the_task_file_says_what_the_harness_must_know(tmp_path: Path) -> None:
    asked = draw(chains, 6, 0, "test")
    harness.write_task(tmp_path, chains, asked)
    config = yaml.safe_load((tmp_path / "ottava.yaml").read_text())
    lines = read_lines(Path(config["dataset_kwargs"]["data_files"]["test"]))
    assert [(line["id"], line["prompt"], line["answer"]) for line in lines] == [
        (p.id, p.question, p.answer) for p in asked
    ]
    assert (config["task"], config["output_type"], config["generation_kwargs"]["temperature"]) == (
        "ottava",
        "generate_until",
        0.0,
    )


def test_other_answers_are_named() -> None:
    rows = [{"id": "a", "content": "1"}, {"id": "b", "content": "2"}, {"id": "c", "content": ""}]
    assert harness.differing(rows, {"a": "1", "b": "3"}) == ["b", "c"]


def test_what_cannot_be_asked_is_told_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OTTAVA_HARNESS", str(tmp_path / "none"))
    with pytest.raises(PlatformError) as caught:
        harness.check(["ottava"], chains)
    assert "OTTAVA_HARNESS" in str(caught.value.fix)
    monkeypatch.setenv("OTTAVA_HARNESS", sys.executable)
    harness.check(["ottava", "gsm8k"], chains)
    with pytest.raises(DataError, match="needs its verifier"):
        harness.check(["ottava"], get("code:none.jsonl"))
    for names in ([], [""], ["a b"], ["x,y"]):
        with pytest.raises(DataError):
            harness.check(names, chains)


def test_a_harness_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "lm_eval"
    script.write_text("#!/bin/sh\necho first >&2; echo 'no task called x' >&2; exit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("OTTAVA_HARNESS", str(script))
    with pytest.raises(PlatformError, match="no task called x"):
        harness._ask(tmp_path, tmp_path / "out", "http://127.0.0.1:9", "m", ["x"], 8)


def taught(asked: list[Problem]) -> torch.nn.Module:
    """A small model that learns these problems by heart, in both modes."""
    torch.manual_seed(0)
    model, chat = random_model(0).train(), tiny_chat()
    lines = []
    for thinking in (True, False):
        for problem, prompt in zip(asked, chat.prompts([p.question for p in asked], thinking), strict=True):
            lines.append((prompt, chat.reply(problem.answer, chains.trace(problem) if thinking else None)))
    width = max(len(prompt) + len(reply) for prompt, reply in lines)
    ids, targets = torch.zeros(len(lines), width, dtype=torch.int64), torch.full((len(lines), width), -100)
    for at, (prompt, reply) in enumerate(lines):
        ids[at, : len(prompt) + len(reply)] = torch.tensor([*prompt, *reply])
        targets[at, len(prompt) : len(prompt) + len(reply)] = torch.tensor(reply)
    optimiser = torch.optim.AdamW(model.parameters(), 5e-3, weight_decay=0.0)
    for _ in range(120):
        logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model.eval()


@pytest.mark.slow
def test_the_harness_reads_the_same_answer_to_every_problem(tmp_path: Path) -> None:
    try:
        harness.program()
    except PlatformError as error:
        pytest.skip(f"{error.what}: make .venv-harness/installed")
    asked = draw(chains, 40, 0, "test", (1, 2))
    folder = write_folder(tmp_path / "model", taught(asked[::2]))  # about half are known
    terms = Terms(samples=1, k=1, temperature=0)
    ours = measure_folders([folder], chains, asked, terms)
    limits = {mode: figures["max_new"] for mode, figures in ours["modes"].items()}
    theirs = harness.run(folder, ["ottava"], chains, asked, limits, ours["rows"])
    assert json.loads(json.dumps(theirs)) == theirs
    for mode in ("thinking", "direct"):
        said = theirs[mode]["ottava"]
        assert said["differing"] == []
        assert said["n"] == 40
        # the harness looks at the content alone; a reply counts for us only if it is well formed too
        literal = [row["content"] == p.answer for row, p in zip(ours["rows"][mode], asked, strict=True)]
        assert said["exact_match,none"] == pytest.approx(sum(literal) / 40, abs=1e-12)
        assert 0.3 < ours["modes"][mode]["greedy"]["value"] < 1.0
        if ours["modes"][mode]["mode_following"] == 1.0:
            assert said["exact_match,none"] == pytest.approx(ours["modes"][mode]["greedy"]["value"], abs=1e-12)
