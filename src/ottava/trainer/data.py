"""The training data as token arrays, and every batch as a pure function of (seed, step, virtual shard).

There is no loader: a worker asks for shard v of step s and gets the same examples on any chip, in
any group, after any restart.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ottava.errors import DataError
from ottava.models.chat import Chat
from ottava.tasks.base import get, problem_of
from ottava.trainer import schedule
from ottava.trainer.spec import TrainSpec

IGNORE = -100

REPLIES = "replies.jsonl"
"""Of a harvest in direct mode: problems with what the model said."""


@dataclass(frozen=True)
class Examples:
    """Examples of one length. tokens [K, T]: prompt and reply, zero-padded; targets [K, T-1]: IGNORE off the reply."""

    tokens: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Data:
    """Examples by chain length, for both modes. What learns in direct mode has none that think."""

    thinking: dict[int, Examples]
    direct: dict[int, Examples]

    @property
    def main(self) -> dict[int, Examples]:
        """What every step learns from."""
        return self.thinking or self.direct


@dataclass(frozen=True)
class Batch:
    """One virtual shard's share of a step. thinking: of what every step learns from; direct: of what is mixed in.
    *_count: target tokens of the whole step, over all shards."""

    thinking: Examples
    thinking_count: int
    direct: Examples | None
    direct_count: int


@dataclass(frozen=True)
class Drawn:
    """What all shards draw from the examples of one mode. rows [V, K]; count: target tokens, over all shards."""

    pool: Examples
    rows: Tensor
    count: int

    def examples(self, shard: int) -> Examples:
        """One shard's examples."""
        return Examples(self.pool.tokens[self.rows[shard]], self.pool.targets[self.rows[shard]])


@dataclass(frozen=True)
class Draws:
    """A whole step's draws, made once for all shards."""

    step: int
    thinking: Drawn
    direct: Drawn | None


def load(folder: Path, chat: Chat, mode: str = "thinking") -> Data:
    """Read `cold_start.jsonl` and `answers.jsonl` of a label artifact; in direct mode what replies are to be alone:
    those in `replies.jsonl` (`labels.harvest`) where the folder has it, else the answers. Raises DataError."""
    return _load(folder, mode, lambda rows, thinking: _examples(rows, chat, thinking=thinking))


def numbered(folder: Path, mode: str = "thinking") -> Data:
    """As `load`, with the number of its line in its file, from 1, in the place of an example's tokens [K, 1], and no
    targets. `draw` and `share` know no difference: what they draw from it are the lines that a step learns from."""
    return _load(folder, mode, lambda rows, _: {length: _numbers(places) for length, places in _grouped(rows).items()})


def files(folder: Path, mode: str = "thinking") -> tuple[Path | None, Path]:
    """What is learnt with thinking, if anything is, and what is learnt directly."""
    if mode == "direct":
        harvested = folder / REPLIES
        return None, harvested if harvested.exists() else folder / "answers.jsonl"
    return folder / "cold_start.jsonl", folder / "answers.jsonl"


def _load(folder: Path, mode: str, examples: Callable[[list[dict[str, Any]], bool], dict[int, Examples]]) -> Data:
    thinking, direct = files(folder, mode)
    needed = ("question", "answer", "steps")
    cold = {} if thinking is None else examples(_read(thinking, (*needed, "trace")), True)
    return Data(cold, examples(_read(direct, needed), False))


def batch(data: Data, spec: TrainSpec, seed: int, step: int, shard: int) -> Batch:
    """Shard `shard` of step `step`. Every worker knows the draws of all shards, so counts need no exchange."""
    return share(draw(data, spec, seed, step), shard)


def draw(data: Data, spec: TrainSpec, seed: int, step: int) -> Draws:
    """What all shards draw in step `step`."""
    pool = data.main[schedule.thinking_length(spec, seed, step, sorted(data.main))]
    thinking = _draw(pool, spec.batch, seed, schedule.THINKING, step, spec.virtual_shards)
    if not schedule.direct_joins(spec, step):
        return Draws(step, thinking, None)
    pool = data.direct[schedule.direct_length(spec, seed, step, sorted(data.direct))]
    direct = _draw(pool, spec.direct.batch, seed, schedule.DIRECT, step, spec.virtual_shards)
    return Draws(step, thinking, direct)


def share(draws: Draws, shard: int) -> Batch:
    """One shard's batch."""
    direct = draws.direct
    return Batch(
        draws.thinking.examples(shard),
        draws.thinking.count,
        None if direct is None else direct.examples(shard),
        0 if direct is None else direct.count,
    )


def _draw(pool: Examples, size: int, seed: int, stream: int, step: int, shards: int) -> Drawn:
    draws = [schedule.rng(seed, stream, step, v).integers(0, len(pool.tokens), size) for v in range(shards)]
    rows = torch.from_numpy(np.stack(draws))
    return Drawn(pool, rows, int((pool.targets[rows] != IGNORE).sum()))


def _examples(rows: list[dict[str, Any]], chat: Chat, *, thinking: bool) -> dict[int, Examples]:
    prompts = chat.prompts([_asked(row) for row in rows], thinking)
    replies = [chat.reply(row.get("reply", row["answer"]), row["trace"] if thinking else None) for row in rows]
    return {length: pack((prompts[i], replies[i]) for i in places) for length, places in _grouped(rows).items()}


def _grouped(rows: Sequence[Mapping[str, Any]]) -> dict[int, list[int]]:
    """Which rows are of each length, in their order."""
    grouped: dict[int, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        grouped[int(row["steps"])].append(place)
    return dict(sorted(grouped.items()))


def _numbers(places: Sequence[int]) -> Examples:
    return Examples(torch.tensor(places)[:, None] + 1, torch.empty(len(places), 0, dtype=torch.int64))


def _asked(row: Mapping[str, Any]) -> str:
    """What evaluations ask too: the question, and what the task says of how to answer."""
    return get(row["task"]).prompt(problem_of({"id": "", **row})) if "task" in row else str(row["question"])


def pack(pairs: Iterable[tuple[list[int], list[int]]]) -> Examples:
    """Prompts and replies, as token ids, in arrays as long as the longest."""
    pairs = list(pairs)
    width = max(len(prompt) + len(reply) for prompt, reply in pairs)
    tokens = np.zeros((len(pairs), width), np.int64)
    targets = np.full((len(pairs), width - 1), IGNORE, np.int64)
    for i, (prompt, reply) in enumerate(pairs):
        end = len(prompt) + len(reply)
        tokens[i, :end] = prompt + reply
        targets[i, len(prompt) - 1 : end - 1] = reply
    return Examples(torch.from_numpy(tokens), torch.from_numpy(targets))


def _read(path: Path, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                row = json.loads(line)
                if not isinstance(row, dict) or any(key not in row for key in keys):
                    raise DataError(f"a line needs the keys {', '.join(keys)}", where=f"{path}:{number}")
                rows.append(row)
    except FileNotFoundError:
        raise DataError("no such dataset file", where=path) from None
    except ValueError as error:
        raise DataError(f"not valid JSON: {error}", where=path) from None
    if not rows:
        raise DataError("the dataset is empty", where=path)
    return rows
