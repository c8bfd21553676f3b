"""From a line to the steps that learnt from it and back, against what the workers' models were really fed.

The oracle shares nothing with `console.lineage`: a spy in every worker process writes down the ids that go through the
model's forward pass, step by step, and they are matched with the lines by encoding each line's own text.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ottava import runner, stages
from ottava.cli import outcome
from ottava.console.lineage import Lineage
from ottava.errors import DataError
from ottava.labels.traces import VOTES
from ottava.models.chat import Chat
from ottava.recipe import load_recipe
from ottava.tasks.base import read_lines
from ottava.trainer import grpo, sft, worker

FLEET = """
name: one
pools:
  - {name: a, platform: cpu, workers: 2}
"""

SHAPE = (
    "{hidden: 32, layers: 2, heads: 2, dense_width: 48, expert_width: 16, latent_rank: 16, nope_dim: 8, rope_dim: 8, "
    "value_dim: 8}"
)
LABEL = (
    "  label: {task: chains, cold_start: 100, answers: 60, steps: [2, 3], one_step_share: 0.2, test_per_length: 4, "
    "test_one_step: 4, max_error: 0.5, policy: replay}\n"
)

RECIPE = f"""
name: traced
seed: 5
fleet: fleet.yaml
stages:
{LABEL}  train:
    shape: {SHAPE}
    steps: 20
    batch: 4
    virtual_shards: 2
    direct: {{begin: 0.25, batch: 2}}
    restarts: 1
    fault: {{at_step: 15, rank: 1}}
    drift: {{window: 2, replicas: 3}}
  reinforce:
    steps: 2
    virtual_shards: 2
    lengths: [1, 2]
    rollout: {{prompts: 4, group: 2, max_new: 16, updates: 1, minibatches: 2}}
    drift: {{window: 1, replicas: 3}}
"""


# ---------------------------------------------------------------- the spy, in the workers' own processes


def spied(args: dict[str, Any]) -> dict[str, Any]:
    """The supervisor's worker, with every forward pass of its losses written down."""
    told = Path(args["spy"]) / f"{os.getpid()}.jsonl"

    def note(step: int, shard: int, fed: list[Any]) -> None:
        with told.open("a") as file:  # a worker may be killed at any moment
            file.write(json.dumps({"step": step, "shard": shard, "fed": fed, "again": bool(args["replay"])}) + "\n")

    def watched(kind: Any) -> None:
        loss = kind.loss

        def noted(self: Any, model: Any, step: int, shard: int) -> Any:
            fed: list[Any] = []
            hook = model.register_forward_pre_hook(
                lambda _, __, given: fed.append(given["input_ids"].tolist()), with_kwargs=True
            )
            try:
                return loss(self, model, step, shard)
            finally:
                hook.remove()
                note(step, shard, fed)

        kind.loss = noted

    watched(sft.Sft)
    its_loss = grpo.Grpo._loss

    def asked(self: Any, model: Any, record: Any, rows: Any, *rest: Any) -> Any:
        if record.policy:  # the canonical shard has none
            lengths = record.rollouts.prompt_lengths
            prompts = [record.rollouts.prompts[i, : lengths[i]].tolist() for i in rows.tolist()]
            part = int(rows[0]) // self.spec.rollout.group
            note(record.step + part, record.shard, prompts[:: self.spec.rollout.group])
        return its_loss(self, model, record, rows, *rest)

    grpo.Grpo._loss = asked  # type: ignore[method-assign]
    return worker.run(args)


class Spying:
    """A launcher whose workers are watched."""

    def __init__(self, launcher: Any, folder: Path):
        self._launcher, self._folder = launcher, folder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._launcher, name)

    def spawn(self, target: str, args: Mapping[str, Any], **more: Any) -> Any:
        if target == "ottava.trainer.worker:run":
            where = self._folder / args.get("objective", "sft") / Path(args["data"]).name
            where.mkdir(parents=True, exist_ok=True)
            target, args = "tests.test_lineage:spied", {**args, "spy": str(where)}
        return self._launcher.spawn(target, args, **more)


def fed(folder: Path) -> dict[tuple[int, int], Any]:
    """(step from 0, shard) -> what the model was fed then. Whoever computed it, and however often: always the same."""
    found: dict[tuple[int, int], Any] = {}
    seen: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
    for path in folder.rglob("*.jsonl"):
        for told in map(json.loads, path.read_text().splitlines()):
            at = told["step"], told["shard"]
            assert found.setdefault(at, told["fed"]) == told["fed"], at
            if not told["again"]:
                seen[at].add(int(path.stem))
    assert len({pid for pids in seen.values() for pid in pids}) >= 2, "several workers told"
    return found


# ---------------------------------------------------------------- runs


def begin(folder: Path, text: str) -> Any:
    (folder / "fleet.yaml").write_text(FLEET)
    (folder / "recipe.yaml").write_text(text)
    return load_recipe(folder / "recipe.yaml", stages.specs())


class Interrupting(runner.Quiet):
    def progress(self, stage: str, fraction: float, message: str) -> None:
        if message == "main: step 10 of 20":
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def traced(launcher: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Path]:
    """(the run, what lineage said of it in its middle, the spies' folder): stopped by its user, then by a fault."""
    folder = tmp_path_factory.mktemp("lineage")
    spies, run = Spying(launcher, folder / "spies"), folder / "run"
    recipe = begin(folder, RECIPE)
    with pytest.raises(KeyboardInterrupt):
        runner.run(recipe, run, lambda: contextlib.nullcontext(spies), Interrupting())
    its = Lineage(run)
    middle = {
        "line": {row["id"]: its.line(row["id"]) for row in lines_of(run, "cold_start.jsonl")},
        "step": its.step(9),
    }
    with pytest.raises(DataError, match=r"train has done 1\d steps, and 20 is none of them"):
        its.step(20)
    runner.run(recipe, run, lambda: contextlib.nullcontext(spies), runner.Quiet())
    return run, middle, folder / "spies"


def artifact(run: Path, stage: str) -> Path:
    (found,) = run.glob(f"artifacts/{stage}-*")
    return found


def lines_of(run: Path, name: str) -> list[dict[str, Any]]:
    return read_lines(artifact(run, "label") / name)


def spelt(chat: Chat, row: Mapping[str, Any], thinking: bool) -> list[int]:
    """The ids of a line."""
    prompt = chat.prompts([row["question"]], thinking)[0]
    return prompt + chat.reply(row.get("reply", row["answer"]), row["trace"] if thinking else None)


def learnt(
    spies: Path, chat: Chat, cold: list[Any], direct: list[Any], of: str = "sft"
) -> dict[int, list[tuple[Any, ...]]]:
    """By step from 1: (mode, shard, place, id) of every example that went through the model."""
    known = [(spelt(chat, row, True), "thinking", row["id"]) for row in cold]
    known += [(spelt(chat, row, False), "direct", row["id"]) for row in direct]

    def is_of(ids: list[int], own: list[int]) -> bool:
        """Padded by zeros, and without the longest one's last id, which is only to be foretold."""
        return len(own) <= len(ids) + 1 and ids == (own + [0] * len(ids))[: len(ids)]

    out: dict[int, list[tuple[Any, ...]]] = defaultdict(list)
    for (step, shard), batches in fed(spies / of).items():
        for batch in batches:
            for place, ids in enumerate(batch):
                ((mode, name),) = [(mode, name) for own, mode, name in known if is_of(ids, own)]
                out[step + 1].append((mode, shard, place, name))
    return {step: sorted(uses) for step, uses in out.items()}


def said(found: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    return sorted((one["mode"], one["shard"], one["place"], one["id"]) for one in found["lines"])


# ---------------------------------------------------------------- the comparison


def test_every_step_and_every_line_both_ways(traced: tuple[Path, dict[str, Any], Path]) -> None:
    run, middle, spies = traced
    cold, answers = lines_of(run, "cold_start.jsonl"), lines_of(run, "answers.jsonl")
    true = learnt(spies, Chat.load(artifact(run, "train") / "model"), cold, answers)
    assert sorted(true) == list(range(1, 21))
    its = Lineage(run, "train")
    for step, uses in true.items():
        told = its.step(step)
        assert said(told) == uses, step
        assert {one["pool"] for one in told["lines"]} == {"a"}
    assert sum(mode == "direct" for uses in true.values() for mode, *_ in uses) == 15 * 2 * 2

    by_line: dict[str, list[Any]] = defaultdict(list)
    for step, uses in sorted(true.items()):
        for mode, shard, place, name in uses:
            by_line[name].append((step, mode, shard, place))
    for row in (*cold, *answers):
        seen = its.line(row["id"])["seen"]
        told_of = sorted((one["step"], one["mode"], one["shard"], one["place"]) for one in seen)
        assert told_of == sorted(by_line[row["id"]]), row["id"]
    assert any(not by_line[row["id"]] for row in answers), "some line was never learnt from"

    assert said(middle["step"]) == true[9]
    for name, told in middle["line"].items():
        done = told["steps_done"]["train"]
        assert 10 <= done < 15
        assert sorted(one["step"] for one in told["seen"]) == [step for step, *_ in by_line[name] if step <= done]


def test_what_reinforcement_asked(traced: tuple[Path, dict[str, Any], Path]) -> None:
    run, _, spies = traced
    chat = Chat.load(artifact(run, "train") / "model")
    answers = lines_of(run, "answers.jsonl")
    known = {tuple(chat.prompts([row["question"]], True)[0]): row["id"] for row in answers}
    true, its = fed(spies / "grpo"), Lineage(run, "reinforce")
    assert sorted(true) == [(step, shard) for step in range(2) for shard in range(2)]
    for (step, shard), prompts in true.items():
        told = its.step(step + 1)
        own = sorted((one["place"], one["id"]) for one in told["lines"] if one["shard"] == shard)
        assert own == [(place, known[tuple(ids)]) for place, ids in enumerate(prompts)]
    name = known[tuple(true[1, 1][0])]
    assert any((one["stage"], one["step"]) == ("reinforce", 2) for one in Lineage(run).line(name)["seen"])


def test_a_line_leads_to_its_votes_and_its_certificate(traced: tuple[Path, dict[str, Any], Path]) -> None:
    run, *_ = traced
    label = artifact(run, "label")
    certificate = json.loads((label / "certificate.json").read_text())
    voted = [json.loads(line) for line in (label / VOTES).read_text().splitlines()]
    assert len(voted) == certificate["population"]
    assert sum(len(one["votes"]) for one in voted) == certificate["votes"]
    its = Lineage(run)
    for row in lines_of(run, "cold_start.jsonl"):
        told = its.line(row["id"])
        (one,) = told["found"]
        (delivered,) = [item for item in one["votes"] if item["delivered"]]
        assert (delivered["trace"], delivered["decision"]) == (row["trace"], "right")
        assert (one["sources"], one["evidence"]) == (row["sources"], row["evidence"])
        assert told["certificates"] == {f"artifacts/{label.name}": certificate}
    test = lines_of(run, "test.jsonl")[0]["id"]
    assert its.line(test)["seen"] == [], "a test line is known, and nobody learnt from it"


def test_the_command(
    traced: tuple[Path, dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, *_ = traced

    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["ottava", "label", "trace", *args])
        return outcome(), *capsys.readouterr()

    code, out, _ = call(str(run), "--step", "7", "--stage", "train", "--json")
    assert (code, json.loads(out)) == (0, Lineage(run, "train").step(7))
    name = json.loads(out)["lines"][0]["id"]
    code, out, _ = call(str(run), name, "--json")
    assert (code, json.loads(out)) == (0, Lineage(run).line(name))
    code, out, _ = call(str(run), name)
    assert code == 0
    assert "train step 7  thinking" in out
    assert "certificate of artifacts/label-" in out
    wrong = {
        "no line has the id": (str(run), "nobody"),
        "name a line or a step": (str(run),),
        "several stages have a step 2": (str(run), "--step", "2"),
        "train has done 20 steps": (str(run), "--step", "21", "--stage", "train"),
        "the run has no stage 'serve'": (str(run), "--step", "1", "--stage", "serve"),
        "not the folder of a run": (str(run / "artifacts"), "--step", "1"),
        "label cannot be traced": (str(run), "--step", "1", "--stage", "label"),
    }
    for words, args in wrong.items():
        code, out, err = call(*args)
        assert (code, out) == (2, ""), words
        assert words in err


def test_a_harvest_is_what_was_learnt(begun: Path, launcher: Any, tmp_path: Path) -> None:
    """Where a model learns from its own right replies, lines are these, and the problem that each answers is found."""
    recipe = f"""
name: harvested
seed: 5
fleet: fleet.yaml
stages:
{LABEL}  start: {{source: {begun}}}
  train:
    harvest: {{asks: 60}}
    steps: 3
    batch: 4
    direct: {{begin: 0.5, batch: 2}}
    drift: {{window: 1, replicas: 3}}
"""
    spies, run = Spying(launcher, tmp_path / "spies"), tmp_path / "run"
    runner.run(begin(tmp_path, recipe), run, lambda: contextlib.nullcontext(spies), runner.Quiet())
    done = artifact(run, "train")
    replies = read_lines(done / "traces" / "cold_start.jsonl")
    true = learnt(tmp_path / "spies", Chat.load(done / "model"), replies, lines_of(run, "answers.jsonl"))
    its = Lineage(run)
    assert {step: said(its.step(step)) for step in (1, 2, 3)} == true
    one = next(one for one in its.step(1)["lines"] if one["mode"] == "thinking")
    assert one["file"] == f"artifacts/{done.name}/traces/cold_start.jsonl"
    assert (one["sources"], one["evidence"]["verified"]) == (["teacher"], True)
    told = its.line(one["id"])
    assert [found["file"] for found in told["found"]] == [f"artifacts/{artifact(run, 'label').name}/answers.jsonl"]
    assert 1 in {use["step"] for use in told["seen"]}


@pytest.mark.slow
def test_students_and_their_controls(begun: Path, launcher: Any, tmp_path: Path) -> None:
    """All students draw alike from the teacher's replies, and all controls alike from the cold start."""
    recipe = f"""
name: distilled
seed: 5
fleet: fleet.yaml
stages:
{LABEL}  start: {{source: {begun}}}
  distill:
    harvest: {{asks: 60}}
    steps: 3
    batch: 4
    direct: {{begin: 0.5, batch: 2}}
    students:
      - {{name: one, shape: {{family: qwen3, hidden: 32, width: 48}}}}
      - {{name: two, shape: {{family: llama, hidden: 32, width: 48}}}}
"""
    spies, run = Spying(launcher, tmp_path / "spies"), tmp_path / "run"
    runner.run(begin(tmp_path, recipe), run, lambda: contextlib.nullcontext(spies), runner.Quiet())
    done, answers = artifact(run, "distill"), lines_of(run, "answers.jsonl")
    chat = Chat.load(artifact(run, "start") / "model")
    arms = {
        "student": ("sft/traces", read_lines(done / "traces" / "cold_start.jsonl")),
        "control": (f"sft/{artifact(run, 'label').name}", lines_of(run, "cold_start.jsonl")),
    }
    for arm, (of, cold) in arms.items():
        its = Lineage(run, f"distill/{arm}")
        true = learnt(tmp_path / "spies", chat, cold, answers, of)
        assert {step: said(its.step(step)) for step in (1, 2, 3)} == true, arm
    assert set(Lineage(run).line(answers[0]["id"])["steps_done"]) == {"distill/student", "distill/control"}
