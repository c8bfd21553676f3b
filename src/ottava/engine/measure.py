"""How good a model is, from greedy and from sampled replies, so that another may be compared with it.

One greedy reply a problem says what the model serves and pairs two models problem by problem; several sampled ones say
how often it is right and what more tries would give. Which replies are drawn depends on the weights, the seed and the
problems alone: batches are cut by what the model is, not by how much memory is free.
A reply counts only when it is well formed in the mode that was asked for (`evaluate.well_formed`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from torch import nn

from ottava import platforms
from ottava.artifact import digest_of
from ottava.engine.evaluate import well_formed
from ottava.engine.generate import ThinkBudget
from ottava.engine.rollout import InProcess, Sampling
from ottava.engine.room import lacking
from ottava.errors import DataError
from ottava.models.chat import Chat
from ottava.models.load import load
from ottava.tasks import Problem, Task
from ottava.tasks.base import Split, generator, get, problem_of, read_lines
from ottava.tasks.statistics import mean_interval, paired, pass_at_k, wilson
from ottava.tasks.verify import Grade, grade

LIMIT = 1024
"""Ids of a reply where nobody says another number: the gateway's default too."""

_ROWS = 256
_CACHE = 1 << 28  # numbers in the cache of one batch
_LOGITS = 1 << 24  # numbers in the logits of one step

MODES = {True: "thinking", False: "direct"}
Told = Callable[[int, int], None]


@dataclass(frozen=True)
class Terms:
    """What is measured. Raises DataError.

    samples: replies drawn to each problem, at this temperature (0: the greedy one, samples 1); k: of pass@k, which
    needs samples >= 2k. thinking: the one mode that is asked for; None: each that the model has. budgets: ids of
    thinking allowed, for the curve. max_new: ids a reply may have (default: what the context holds, at most LIMIT).
    """

    samples: int = 8
    k: int = 4
    temperature: float = 1.0
    seed: int = 0
    thinking: bool | None = None
    budgets: tuple[int, ...] = ()
    max_new: int | None = None

    def __post_init__(self) -> None:
        if self.samples < 1 or self.k < 1:
            raise DataError(f"k is {self.k} and samples is {self.samples}: there is at least one of each")
        if self.k > 1 and self.samples < 2 * self.k:
            raise DataError(
                f"pass@{self.k} from {self.samples} replies to a problem has no spread to judge it by",
                fix=f"draw {2 * self.k} or more (--samples), or take a smaller --k",
            )
        if self.temperature == 0 and self.samples > 1:
            raise DataError("at temperature 0 all replies to a problem are the same one", fix="--samples 1 --k 1")
        if not 0 <= self.temperature < math.inf:
            raise DataError(f"the temperature is {self.temperature}", fix="a finite number, 0 for greedy replies")
        if any(tokens < 0 for tokens in self.budgets):
            raise DataError(f"the thinking budget is {min(self.budgets)} ids", fix="0 or more")
        if self.budgets and self.thinking is False:
            raise DataError("a budget of thinking says nothing of direct replies", fix="leave out --direct")
        if self.max_new is not None and self.max_new <= max(self.budgets, default=0):
            raise DataError(
                f"a reply may have {self.max_new} ids, no more than the budget of its thinking",
                fix="a larger --max-new, or smaller --budgets",
            )

    def modes(self, chat: Chat) -> list[bool]:
        """The modes to ask in: thinking first. Raises DataError where the model has no such mode."""
        able = chat.thinks
        if not able and (self.thinking or self.budgets):
            raise DataError(
                "this model has no thinking switch", fix="leave out --budgets, and ask it with --direct or neither"
            )
        asked = (True, False) if self.thinking is None else (self.thinking,)
        return [mode for mode in asked if able or not mode]


@dataclass(frozen=True)
class Reply:
    """One reply: its ids, the content after thinking, whether it is well formed in its mode, and its grade."""

    ids: tuple[int, ...]
    content: str
    followed: bool
    grade: Grade

    @property
    def right(self) -> bool:
        return self.grade.right


def draw(task: Task, n: int, seed: int, split: Split | Literal["all"], levels: Sequence[int] = ()) -> list[Problem]:
    """n problems of the task, as many of each level as can be, from a random stream of this module's own.

    split: "test" (no training saw them, nor their families), "train" or "all". levels: default all that the task has.
    Fewer than n where there are no more. Raises DataError where there is none.
    """
    asked = tuple(levels) or tuple(range(1, task.MAX_STEPS + 1))
    sides: tuple[Split, ...] = ("train", "test") if split == "all" else (split,)

    def pool(level: int, count: int) -> list[Problem]:
        stream = generator(seed, "evaluate", task.NAME, level, count)
        of_both = [problem for side in sides for problem in task.sample(stream, level, count, side, fewer=True)]
        return [of_both[i] for i in stream.permutation(len(of_both))[:count]]

    found: dict[int, list[Problem]] = {}
    refused: DataError | None = None
    for number, level in enumerate(asked):  # what an easy level lacks the harder ones give
        missing = n - sum(map(len, found.values()))
        share = -(-missing // (len(asked) - number))
        try:
            found[level] = pool(level, share)
        except DataError as error:
            if levels:
                raise
            refused = error  # a level that the task cannot have
    for level in sorted(found, key=lambda level: -len(found[level])):
        missing = n - sum(map(len, found.values()))
        if missing > 0:
            found[level] = pool(level, len(found[level]) + missing)
    problems = [problem for level in sorted(found) for problem in found[level]]
    if not problems:
        raise refused or DataError(f"{task.NAME} has no problem on this side", where=f"--split {split}")
    return problems[:n]


def read(path: Path, name: str | None = None) -> tuple[Task, list[Problem]]:
    """The problems of a data set (lines of id, task, steps, question, answer) and the task that they are of.

    name: the task, where it is not the lines' own. Raises DataError.
    """
    lines = read_lines(path)
    if not lines:
        raise DataError("there is no problem in the file", where=path)
    names = {line["task"] for line in lines} if name is None else {name}
    if len(names) > 1:
        raise DataError(f"the file holds problems of {len(names)} tasks", where=path, fix="one file a task, or --task")
    return get(names.pop()), [problem_of(line) for line in lines]


def choose(
    problems: Sequence[Problem], where: Path, n: int | None, seed: int, levels: Sequence[int] = ()
) -> list[Problem]:
    """Those of a file's problems that are asked, in its order: all of these levels (none: of every level), or n of
    them, as many of each level as can be, by the seed.

    Raises DataError where there are not so many, or none of a level.
    """
    there = sorted({problem.steps for problem in problems})
    missing = [level for level in levels if level not in there]
    if missing:
        what = f"the file has no problem of level {missing[0]}"
        raise DataError(what, where=where, fix=f"--levels {','.join(map(str, there))}, or some of these")
    wanted = {level: [i for i, one in enumerate(problems) if one.steps == level] for level in levels or there}
    most = sum(map(len, wanted.values()))
    if n is None or n == most:
        return [problems[i] for i in sorted(i for its in wanted.values() for i in its)]
    if n > most:
        of = f" of level {', '.join(map(str, levels))}" if levels else ""
        raise DataError(f"{n} problems are to be asked, and the file has {most}{of}", where=where, fix=f"--n {most}")
    chosen: list[int] = []
    smallest = sorted(wanted, key=lambda level: (len(wanted[level]), level))
    for number, level in enumerate(smallest):  # what a small level lacks the larger ones give
        share = min(len(wanted[level]), -(-(n - len(chosen)) // (len(smallest) - number)))
        order = generator(seed, "evaluate", "file", level).permutation(len(wanted[level]))
        chosen += [wanted[level][i] for i in order[:share]]
    return [problems[i] for i in sorted(chosen)]


def measure(
    model: nn.Module, chat: Chat, task: Task, problems: Sequence[Problem], terms: Terms, told: Told | None = None
) -> dict[str, Any]:
    """Every figure of one model. Raises DataError where it cannot be asked.

    Returns modes: {mode: {pass1, low, high, n, samples, pass_k: {k: {value, low, high}}, greedy: {value, low, high},
    mode_following, length: {mean, p50, p95, truncated}, unscorable, by_steps: {level: {n, pass1}}, digest, max_new}},
    budgets: [{tokens, accuracy, low, high, n, thought}], and rows: {mode: [{id, steps, content, right, correct}]}, one
    a problem, in their order. digest: of all greedy ids. unscorable: replies without a verdict, counted as wrong.
    Intervals are of 95%, over problems. told(done, all): called as replies come.
    """
    if not problems:
        raise DataError("there is no problem to ask")
    modes = terms.modes(chat)
    sampled = terms.temperature > 0
    count = _Count(len(problems) * (len(modes) * (1 + terms.samples * sampled) + len(terms.budgets)), told)
    asking = _Asking(model, chat, task, problems, terms, count)
    found: dict[str, Any] = {"modes": {}, "budgets": [], "rows": {}}
    for thinking in modes:
        greedy = asking.replies(thinking)
        drawn = asking.replies(thinking, terms.temperature, terms.samples) if sampled else greedy
        found["modes"][MODES[thinking]] = {
            **_figures(chat, problems, greedy, drawn, terms),
            "max_new": asking.max_new[thinking],
        }
        found["rows"][MODES[thinking]] = [
            {
                "id": problem.id,
                "steps": problem.steps,
                "content": one.content,
                "right": one.right,
                "correct": sum(reply.right for reply in several),
            }
            for problem, (one,), several in zip(problems, greedy, drawn, strict=True)
        ]
    for tokens in terms.budgets:
        found["budgets"].append(_point(tokens, chat, [one for (one,) in asking.replies(True, budget=tokens)]))
    return found


def measure_folders(
    folders: Sequence[Path],
    task: Task,
    problems: Sequence[Problem],
    terms: Terms,
    platform: str = "cpu",
    told: Told | None = None,
) -> dict[str, Any]:
    """`measure` of one or two model folders on the same problems; of two, compared.

    Returns model, task, n, seed and what `measure` returns; with two also other: the same of the second, and compare:
    {mode: `compare`}. Raises CheckpointError where a folder is no model with a chat template, and DataError.
    """
    chats = [Chat.load(folder) for folder in folders]  # what is missing is told before the work
    for chat in chats:
        terms.modes(chat)
    device = platforms.get(platform).open()
    results = []
    for number, (folder, chat) in enumerate(zip(folders, chats, strict=True)):
        told_of = None if told is None else _part(told, number, len(folders))
        found = measure(load(folder).to(device), chat, task, problems, terms, told_of)
        results.append({"model": str(folder), **found})
    head = {"task": task.NAME, "n": len(problems), "seed": terms.seed, "temperature": terms.temperature}
    if len(results) == 1:
        return {**head, **results[0]}
    first, second = results
    both = [mode for mode in first["rows"] if mode in second["rows"]]
    against = {mode: compare(first["rows"][mode], second["rows"][mode]) for mode in both}
    return {**head, **first, "other": second, "compare": against}


def compare(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Two models' rows on the same problems, by their greedy replies: which is better, and how sure that is.

    b_better: problems that only the second solved; a_better: only the first. p_value: McNemar's, exact. difference:
    second - first, with its 95% paired interval. Raises DataError where the problems differ.
    """
    if [row["id"] for row in first] != [row["id"] for row in second]:
        raise DataError("the two were asked different problems", fix="evaluate both with the same seed and n")
    found = paired([row["right"] for row in first], [row["right"] for row in second])
    return {
        "b_better": found.gained,
        "a_better": found.lost,
        "p_value": found.p,
        "difference": found.difference,
        "low": found.low,
        "high": found.high,
        "n": found.n,
    }


# ---- replies


class _Asking:
    """Asks one model the problems, and grades what it says; the same answer to a problem is graded once."""

    def __init__(
        self, model: nn.Module, chat: Chat, task: Task, problems: Sequence[Problem], terms: Terms, count: _Count
    ):
        self.engine, self.chat, self.task = InProcess(model), chat, task
        self.problems, self.terms, self.count = problems, terms, count
        self._questions = [task.prompt(problem) for problem in problems]
        self.max_new: dict[bool, int] = {}  # ids that a reply might have, by the mode
        self._grades: dict[tuple[int, str], Grade] = {}

    def replies(
        self, thinking: bool, temperature: float = 0.0, each: int = 1, budget: int | None = None
    ) -> list[list[Reply]]:
        """`each` replies to every problem. budget: ids of thinking, then </think> is forced."""
        prompts = self.chat.prompts(self._questions, thinking)
        longest = max(map(len, prompts))
        room = self.engine.context - longest
        if (wrong := lacking(self.terms.max_new or 1, self.engine.context, longest)) is not None:
            raise DataError(wrong[0], fix=wrong[1])
        assert self.chat.think_end is not None or budget is None
        think = None if budget is None else ThinkBudget(self.chat.think_end or 0, budget)
        max_new = self.terms.max_new or min(LIMIT, room)
        self.max_new[thinking] = max_new
        sampling = Sampling(max_new, self.chat.stop_ids, temperature, think=think)
        seed = int(generator(self.terms.seed, "evaluate").integers(1 << 63))
        rows = [number for number in range(len(prompts)) for _ in range(each)]
        size = _batch(self.engine.model, longest + max_new)
        out: list[list[Reply]] = [[] for _ in prompts]
        for begin in range(0, len(rows), size):
            part = rows[begin : begin + size]
            asked = [prompts[number] for number in part]
            found = self.engine.generate(asked, sampling, seed, range(begin, begin + len(part)))
            for number, row, length in zip(part, found.replies.tolist(), found.reply_lengths.tolist(), strict=True):
                out[number].append(self._reply(number, row[:length], thinking))
            self.count.add(len(part))
        return out

    def _reply(self, number: int, ids: list[int], thinking: bool) -> Reply:
        content = self.chat.split(ids, thinking)[1]
        followed = well_formed(self.chat, ids, thinking)
        if not followed:
            return Reply(tuple(ids), content, False, Grade("wrong", "not well formed"))
        key = (number, content)
        if key not in self._grades:
            self._grades[key] = grade(self.task, self.problems[number], content)
        return Reply(tuple(ids), content, True, self._grades[key])


class _Count:
    """Tells how many of all replies there are."""

    def __init__(self, total: int, told: Told | None):
        self.total, self.told, self.done = total, told, 0

    def add(self, replies: int) -> None:
        self.done += replies
        if self.told is not None:
            self.told(self.done, self.total)


def _part(told: Told, number: int, parts: int) -> Told:
    """The progress of one of some equal parts as that of the whole."""
    return lambda done, total: told(number * total + done, parts * total)


def _batch(model: nn.Module, width: int) -> int:
    """Rows of one batch: a function of the model and of the widest row, so that equal calls make equal batches."""
    config: Any = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    grouped = 2 * head * (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    rank = getattr(config, "kv_lora_rank", None)
    position = config.num_hidden_layers * (rank + config.qk_rope_head_dim if rank else grouped)
    return int(max(1, min(_ROWS, _CACHE // (position * width), _LOGITS // config.vocab_size)))


# ---- figures


def _figures(
    chat: Chat, problems: Sequence[Problem], greedy: list[list[Reply]], drawn: list[list[Reply]], terms: Terms
) -> dict[str, Any]:
    """One mode's figures. greedy: one reply a problem; drawn: `samples` of them, which all but `greedy` are made of."""
    each = len(drawn[0])
    correct = [sum(reply.right for reply in replies) for replies in drawn]
    low, high = mean_interval([c / each for c in correct], each)
    replies = [reply for several in drawn for reply in several]
    first = [one.right for (one,) in greedy]
    greedy_low, greedy_high = wilson(sum(first), len(first))
    steps: defaultdict[int, list[float]] = defaultdict(list)
    for problem, c in zip(problems, correct, strict=True):
        steps[problem.steps].append(c / each)
    return {
        "pass1": sum(correct) / (each * len(correct)),
        "low": low,
        "high": high,
        "n": len(correct),
        "samples": each,
        "pass_k": {str(k): _pass_k(correct, each, k) for k in _powers(terms.k)},
        "greedy": {"value": sum(first) / len(first), "low": greedy_low, "high": greedy_high},
        "mode_following": fmean(reply.followed for reply in replies),
        "length": _lengths(chat, replies),
        "unscorable": sum(reply.grade.kind == "unscorable" for reply in replies),
        "by_steps": {str(s): {"n": len(shares), "pass1": fmean(shares)} for s, shares in sorted(steps.items())},
        "digest": digest_of([reply.ids for (reply,) in greedy]),
    }


def _pass_k(correct: Sequence[int], samples: int, k: int) -> dict[str, float]:
    values = [pass_at_k(samples, c, k) for c in correct]
    low, high = mean_interval(values, samples / k)
    return {"value": fmean(values), "low": low, "high": high}


def _powers(k: int) -> list[int]:
    """1, 2, 4, ... and k itself."""
    return sorted({1 << i for i in range(k.bit_length())} | {k})


def _lengths(chat: Chat, replies: Sequence[Reply]) -> dict[str, float]:
    """Of the ids of replies, the stop id included; truncated: the share that did not end by itself."""
    lengths = sorted(len(reply.ids) for reply in replies)

    def quantile(share: float) -> int:
        return lengths[max(0, math.ceil(share * len(lengths)) - 1)]  # the smallest with so many at or below it

    cut = fmean(reply.ids[-1] not in chat.stop_ids for reply in replies)
    return {"mean": fmean(lengths), "p50": quantile(0.5), "p95": quantile(0.95), "truncated": cut}


def _point(tokens: int, chat: Chat, replies: Sequence[Reply]) -> dict[str, Any]:
    """A point of the curve. thought: the mean of the ids before </think>."""
    right = sum(reply.right for reply in replies)
    low, high = wilson(right, len(replies))
    thought = fmean(_thought(chat, reply.ids) for reply in replies)
    return {
        "tokens": tokens,
        "accuracy": right / len(replies),
        "low": low,
        "high": high,
        "n": len(replies),
        "thought": thought,
    }


def _thought(chat: Chat, ids: Sequence[int]) -> int:
    return next((place for place, token in enumerate(ids) if token == chat.think_end), len(ids))
