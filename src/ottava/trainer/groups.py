"""What a virtual shard draws in a generation: replies in groups, and their verdicts.

A group whose verdicts are all equal teaches nothing. DAPO's dynamic sampling (arXiv 2503.14476, sec. 3.2) draws others
in its place. Here that is done inside the shard, in rounds, and the numbers by which rows draw their choices go on from
round to round: what comes out is a function of (weights, seed, generation, shard) as it is without. What was thrown
away was paid for, so it is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ottava.engine.rollout import Rollouts
from ottava.tasks import Problem
from ottava.tasks.choose import Asked
from ottava.trainer.advantages import advantages, mixed

Generate = Callable[[Sequence[Problem], range], Rollouts]
"""Replies to problems, a group to each; the range has a number for each reply, by which it draws its choices."""


@dataclass(frozen=True)
class Groups:
    """Q groups of G replies. problems: one a group; verdicts: float32 [Q, G], 1, 0 or NaN without a verdict.

    rows, ids, scored, right: of all replies that were drawn, the replaced ones too: how many there were, their ids,
    those with a verdict, and those found right. asked: the same by group, in the order in which they were drawn.
    """

    rollouts: Rollouts
    problems: tuple[Problem, ...]
    verdicts: Tensor
    rows: int
    ids: int
    scored: int
    right: int
    asked: tuple[Asked, ...]


def draw(
    questions: Iterator[Problem],
    generate: Generate,
    judge: Callable[[Problem, list[int]], float],
    *,
    first: int,
    wanted: int,
    group: int,
    rounds: int,
) -> Groups:
    """`wanted` groups, of which as many teach something as `rounds` rounds of further draws could find.

    first: the number of the first row; at most wanted * group * (1 + rounds) follow. Each round is one batch, of as
    many questions as there are flat groups. Those that are left flat after the last round stay in, the first ones.
    """
    parts: list[Rollouts] = []
    problems: list[Problem] = []
    verdicts, missing = torch.empty(0, group), wanted
    for _ in range(1 + rounds):
        asked = list(islice(questions, missing))
        begin = first + len(problems) * group
        parts.append(generate(asked, range(begin, begin + len(asked) * group)))
        found = [judge(asked[row // group], ids) for row, ids in enumerate(parts[-1].ids())]
        problems, verdicts = problems + asked, torch.cat([verdicts, torch.tensor(found).view(-1, group)])
        flat = advantages(verdicts).flat
        missing = wanted - int((~flat).sum())
        if not missing:
            break
    chosen = list(mixed(flat, wanted))
    chosen = sorted(chosen + flat.nonzero()[:, 0].tolist()[: wanted - len(chosen)])
    rows = (torch.tensor(chosen)[:, None] * group + torch.arange(group)).reshape(-1)
    scored = verdicts.isfinite()
    return Groups(
        pick(join(parts), rows),
        tuple(problems[index] for index in chosen),
        verdicts[chosen],
        verdicts.numel(),
        sum(int(part.reply_lengths.sum()) for part in parts),
        int(scored.sum()),
        int(verdicts[scored].sum()),
        tuple(
            Asked(problem.id, int(known.sum()), int(row[known].sum()))
            for problem, row, known in zip(problems, verdicts, scored, strict=True)
        ),
    )


def join(parts: Sequence[Rollouts]) -> Rollouts:
    """Rollouts one after the other, as wide as the widest."""
    if len(parts) == 1:
        return parts[0]
    prompt = max(part.prompts.shape[1] for part in parts)
    reply = max(part.replies.shape[1] for part in parts)
    widths = {"prompts": prompt, "routes": prompt + reply - 1}
    joined: dict[str, Any] = {}
    for field in fields(Rollouts):
        tensors = [getattr(part, field.name) for part in parts]
        if tensors[0] is None or tensors[0].ndim == 1:
            joined[field.name] = None if tensors[0] is None else torch.cat(tensors)
        else:
            joined[field.name] = torch.cat([_wide(tensor, widths.get(field.name, reply)) for tensor in tensors])
    return Rollouts(**joined)


def pick(rollouts: Rollouts, rows: Tensor) -> Rollouts:
    """Some rows, in this order."""
    tensors: dict[str, Any] = {field.name: getattr(rollouts, field.name) for field in fields(Rollouts)}
    picked: dict[str, Any] = {name: None if tensor is None else tensor[rows] for name, tensor in tensors.items()}
    return Rollouts(**picked)


def _wide(tensor: Tensor, width: int) -> Tensor:
    """[N, width, ...], zeros on the right."""
    return F.pad(tensor, [0, 0] * (tensor.ndim - 2) + [0, width - tensor.shape[1]])
