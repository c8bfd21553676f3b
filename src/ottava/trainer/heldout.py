"""What a run and its baseline are compared on: test problems with the task's own trace, and the baseline's folder.

Everything that may be wrong with a comparison is found here, before training begins, without loading a model.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ottava import tasks
from ottava.checkpoint.layouts import read_config
from ottava.errors import CheckpointError, DataError
from ottava.models.chat import read_tokenizer
from ottava.tasks import Problem
from ottava.tasks.base import problem_of, read_lines
from ottava.trainer.supervised import GoNoGo, Supervised
from ottava.verify.sequential import fresh

TEST = "test.jsonl"
"""Of a label artifact: problems that training never sees, thinking."""

KEY = "go_no_go"  # of whichever stage

RUN_MODELS = ("start", "train", "reinforce", "convert")
"""Stages that make the model of a run, in their order within a round; what is converted is the last of all rounds."""


_MADE = re.compile(rf"(?P<stage>{'|'.join(RUN_MODELS)})(-(?P<round>[0-9]+))?-[0-9a-f]+")


@dataclass(frozen=True)
class Example:
    """A held-out problem and its trace, which the task writes."""

    problem: Problem
    trace: str


def read(folder: Path) -> dict[str, Example]:
    """The held-out examples of a label artifact, by question. Raises DataError."""
    found = {}
    for line in read_lines(folder / TEST):
        problem = problem_of(line)
        found[problem.question] = Example(problem, tasks.traced(line["task"]).trace(problem))
    return found


def of_look(spec: Supervised, questions: Iterable[str], seed: int, step: int) -> list[str]:
    """The questions of the look after `step` steps: the same however often and from wherever it is asked."""
    assert spec.go_no_go is not None
    number = 0 if spec.go_no_go.reused else spec.looks.index(step)
    return fresh(questions, spec.go_no_go.examples, seed, number)


def model_folder(name: str) -> Path:
    """The model that a recipe's `baseline` names: a model's folder, a stage's artifact, or a run's folder.

    Of a run's models the converted one is taken, else that of the last stage of RUN_MODELS that is there. Raises
    CheckpointError where a stage made several.
    """
    folder = Path(name)
    for place in (folder, folder / "model"):
        if (place / "config.json").is_file():
            return place.resolve()
    made: defaultdict[tuple[bool, int, int], list[Path]] = defaultdict(list)
    for config in sorted(folder.glob("artifacts/*/model/config.json")):
        if (found := _MADE.fullmatch(config.parts[-3])) is not None:
            order, number = RUN_MODELS.index(found["stage"]), int(found["round"] or 1)
            made[order == len(RUN_MODELS) - 1, number, order].append(config.parent)
    if made:
        last = max(made)
        models = made[last]
        if len(models) == 1:
            return models[0].resolve()
        stage = RUN_MODELS[last[2]] + (f"-{last[1]}" if last[1] > 1 else "")
        what = f"the run of the baseline has {len(models)} models of the stage {stage!r}"
        raise CheckpointError(what, where=folder, fix=f"name one of them, such as {models[-1]}")
    what = "there is no model of the baseline" if folder.is_dir() else "there is no such baseline"
    raise CheckpointError(what, where=folder, fix=f"let {KEY}.baseline name a folder with config.json and safetensors")


def check(spec: Supervised, data: Path, chat: Path) -> None:
    """Whether the run can be compared with its baseline at every look. data: a label artifact's files; chat: the
    tokenizer's folder. Raises CheckpointError for the baseline, DataError where the examples run out."""
    if spec.go_no_go is None:
        return
    _same_vocabulary(model_folder(spec.go_no_go.baseline), chat)
    _enough(spec.go_no_go, len(spec.looks), len(read(data)), data)


def _enough(asked: GoNoGo, looks: int, held_out: int, data: Path) -> None:
    needed = asked.examples * (1 if asked.reused else looks)
    if needed > held_out:
        each = f"{looks} looks at {asked.examples} examples each take {needed}"
        what = f"a look at {needed} examples takes more" if asked.reused else each
        raise DataError(
            f"{what}, and {held_out} problems are held out",
            where=f"{KEY}, {data / TEST}",
            fix="hold more out (label.test_per_length), look less often or at fewer examples"
            + ("" if asked.reused else ", or let the looks share them (reused: true)"),
        )


def _same_vocabulary(baseline: Path, chat: Path) -> None:
    """Losses per token can be compared only where the tokens are the same."""
    ours, theirs = (_vocabulary(folder) for folder in (chat, baseline))
    if ours != theirs:
        odd = sorted(ours.items() ^ theirs.items())[0][0]
        raise CheckpointError(
            f"the baseline has another vocabulary ({len(theirs)} words, the run {len(ours)}; {odd!r} differs): losses "
            "per token cannot be compared",
            where=baseline,
            fix=f"let {KEY}.baseline name a model with the run's tokenizer",
        )
    size = read_config(baseline).get("vocab_size")
    if isinstance(size, int) and size < len(ours):
        what = f"the baseline's config.json says {size} words, and its tokenizer has {len(ours)}"
        raise CheckpointError(what, where=baseline)


def _vocabulary(folder: Path) -> Mapping[str, int]:
    vocabulary: dict[str, int] = read_tokenizer(folder / "tokenizer.json").get_vocab()
    return vocabulary
