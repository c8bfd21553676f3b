"""Whether the questions of a run can be asked: found where a stage starts, before anything that takes long."""

from __future__ import annotations

from pathlib import Path

from ottava.errors import DataError
from ottava.models.chat import Chat
from ottava.tasks.base import problem_of, read_lines, task_of
from ottava.trainer.rl_spec import ReinforceSpec


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
    longest = max(map(len, Chat.load(chat).prompts(asked, spec.mode == "thinking")))
    if context is not None and longest + spec.rollout.max_new > context:
        left = context - longest
        raise DataError(
            f"a question has up to {longest} ids and its reply {spec.rollout.max_new}, and the model's context holds "
            f"{context}",
            where=f"{key}.rollout.max_new",
            fix=f"max_new: {left} or less" if left > 0 else "shorter questions (other levels), or a longer context",
        )
