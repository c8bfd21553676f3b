"""Accuracy with its interval, and a digest that tells whether two models gave the same answers.

An accuracy alone cannot show that the served model is the trained one; equal ids of every answer can.
A thinking answer counts only when it is well formed: one </think>, an end, and the right content.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ottava import platforms
from ottava.artifact import digest_of
from ottava.engine.generate import generate
from ottava.errors import DataError
from ottava.models.chat import Chat
from ottava.models.load import load
from ottava.tasks import Problem
from ottava.tasks.base import Task, problem_of, read_lines, task_of
from ottava.tasks.statistics import wilson
from ottava.tasks.verify import Grade, grade

BATCH = 256

Judge = Callable[[Problem, str], Grade]


def evaluate(
    model: nn.Module,
    chat: Chat,
    problems: Sequence[Problem],
    thinking: bool,
    judge: Judge,
    *,
    max_new: int | None = None,
    batch: int = BATCH,
    prompt: Callable[[Problem], str] = attrgetter("question"),
) -> dict[str, Any]:
    """Ask every problem once, greedily.

    judge(problem, content): the grade of the content; one that cannot be graded is not right. prompt: what is asked.
    max_new: ids a reply may have (default: twice the prompt and 16 when thinking, else 8). Problems are grouped by
    prompt length and asked in batches of `batch`, in order, so equal models give equal ids. Returns n, correct, value,
    low, high (Wilson, 95%), by_steps, right (by problem: 1 or 0), the digest of all generated ids in the order of
    `problems`, and where some could not be graded unscorable: {reason: replies}.
    """
    replies = answer(model, chat, [prompt(problem) for problem in problems], thinking, max_new=max_new, batch=batch)
    grades = [
        judge(problem, chat.split(ids, thinking)[1]) if well_formed(chat, ids, thinking) else Grade("wrong")
        for problem, ids in zip(problems, replies, strict=True)
    ]
    right = [one.right for one in grades]
    lost = Counter(one.why for one in grades if one.kind == "unscorable")
    by_steps: defaultdict[int, list[bool]] = defaultdict(list)
    for problem, ok in zip(problems, right, strict=True):
        by_steps[problem.steps].append(ok)
    low, high = wilson(sum(right), len(right))
    return {
        "n": len(right),
        "correct": sum(right),
        "right": [int(ok) for ok in right],
        "value": sum(right) / len(right),
        "low": low,
        "high": high,
        "by_steps": {str(s): {"n": len(x), "correct": sum(x)} for s, x in sorted(by_steps.items())},
        "digest": digest_of(replies),
        **({"unscorable": dict(sorted(lost.items()))} if lost else {}),
    }


def answer(
    model: nn.Module,
    chat: Chat,
    questions: Sequence[str],
    thinking: bool,
    *,
    max_new: int | None = None,
    batch: int = BATCH,
) -> list[list[int]]:
    """The greedy reply to each question: ids up to and including the stop id. Raises DataError where there are none."""
    if not questions:
        raise DataError("there is no problem to ask")
    prompts = chat.prompts(questions, thinking)
    lengths: defaultdict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        lengths[len(prompt)].append(index)
    device = next(model.parameters()).device
    replies: list[list[int]] = [[] for _ in prompts]
    for length, group in sorted(lengths.items()):
        limit = max_new or (2 * length + 16 if thinking else 8)
        for start in range(0, len(group), batch):
            chunk = group[start : start + batch]
            ids = torch.tensor([prompts[i] for i in chunk], device=device)
            for i, row in zip(chunk, generate(model, ids, limit, stop=chat.stop_ids).tolist(), strict=True):
                replies[i] = _trim(row, chat.stop_ids)
    return replies


def well_formed(chat: Chat, ids: Sequence[int], thinking: bool) -> bool:
    """Whether a reply ended by itself and its control tokens are those of its mode: one </think> if thinking, no other.

    A model may open with <think> by itself where its template does not.
    """
    silent = {*chat.control.values(), *chat.stop_ids}
    control = [i for i in ids if i in silent]
    if thinking and control and ids[0] == chat.think_start:
        control = control[1:]
    expected = [chat.think_end] if thinking else []
    return bool(control) and control[:-1] == expected and control[-1] == ids[-1] and ids[-1] in chat.stop_ids


def _trim(row: list[int], stop_ids: Sequence[int]) -> list[int]:
    ends = [row.index(stop) for stop in stop_ids if stop in row]
    return row[: min(ends) + 1] if ends else row


def evaluation(
    model: nn.Module,
    chat: Chat,
    task: Task,
    test: Sequence[Problem],
    one_step: Sequence[Problem] = (),
    max_new: int | None = None,
) -> dict[str, Any]:
    """The content of evaluation.json: the test problems in both modes, and one-step problems asked directly.

    A model without a thinking switch is asked directly alone. What cannot be graded is not right.
    """
    asked = {"thinking": (test, True), "direct": (test, False), "direct_one_step": (one_step, False)}
    if chat.thinking_key is None:
        del asked["thinking"]

    judge = partial(grade, task)
    results = {
        mode: evaluate(model, chat, problems, thinking, judge, max_new=max_new, prompt=task.prompt)
        for mode, (problems, thinking) in asked.items()
        if problems
    }
    return {**results, "answers_digest": digest_of([result["digest"] for result in results.values()])}


def evaluate_folder(args: Mapping[str, Any]) -> dict[str, Any]:
    """`evaluation` of a model folder, for a stage's worker.

    args: model (a Hugging Face folder), data (a folder with test.jsonl, whose lines name the task, and with
    test_one_step.jsonl or without), platform, max_new (ids of a reply; without it, as `evaluate` says).
    """
    device = platforms.asked(args).open()
    data, folder = Path(args["data"]), Path(args["model"])
    lines = {
        name: read_lines(data / f"{name}.jsonl") if (data / f"{name}.jsonl").exists() or name == "test" else []
        for name in ("test", "test_one_step")
    }
    test, one_step = ([problem_of(line) for line in found] for found in lines.values())
    task = task_of([*lines["test"], *lines["test_one_step"]])
    return evaluation(load(folder).to(device), Chat.load(folder), task, test, one_step, args.get("max_new"))
