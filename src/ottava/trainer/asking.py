"""Whether the questions of a run can be asked: found where a stage starts, before anything that takes long."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ottava.engine.room import lacking
from ottava.errors import DataError
from ottava.models.chat import Chat
from ottava.tasks.base import problem_of, read_lines, task_of
from ottava.trainer.rl_spec import ReinforceSpec
from ottava.trainer.spec import FineTuning


def check(spec: ReinforceSpec, data: Path, chat: Path, context: int | None, key: str) -> None:
    """Whether there are problems of every level that is asked, and a reply fits behind the longest question.

    data: a label artifact's files; chat: the tokenizer's folder; context: ids that the model holds; key: where in the
    recipe the section stands. Raises DataError.
    """
    lines = read_lines(data / "answers.jsonl")
    task, problems = task_of(lines), [problem_of(line) for line in lines]
    there = sorted({problem.steps for problem in problems})
    missing = spec.without(there)
    if missing is not None:
        field, what, fix = missing
        raise DataError(what, where=f"{key}.{field}, {data / 'answers.jsonl'}", fix=fix)
    asked = [task.prompt(problem) for problem in problems if problem.steps in (spec.levels or there)]
    _fit(asked, spec.mode, spec.rollout.max_new, chat, context, f"{key}.rollout.max_new")


def check_replies(how: FineTuning, data: Path, chat: Path, context: int | None, key: str) -> None:
    """Whether replies fit behind the questions that a model is evaluated on and, where it is harvested, learnt from.

    As `check`. Where no length is said, replies are as long as their questions allow.
    """
    if how.limit is None or context is None:
        return
    names = ("answers.jsonl", "test.jsonl", "test_one_step.jsonl")
    lines = [line for name in names if (data / name).exists() for line in read_lines(data / name)]
    task = task_of(lines)
    _fit([task.prompt(problem_of(line)) for line in lines], how.mode, how.limit, chat, context, f"{key}.max_new")


def _fit(asked: Sequence[str], mode: str, reply: int, chat: Path, context: int | None, where: str) -> None:
    """Raise DataError where a reply does not fit behind the longest question."""
    if context is None:
        return
    longest = max(map(len, Chat.load(chat).prompts(asked, mode == "thinking")))
    if (wrong := lacking(reply, context, longest)) is not None:
        raise DataError(wrong[0], where=where, fix=wrong[1])
