"""Sampled recomputation: the only thing that finds a wrong gradient before it is summed.

Workers that hold equal weights after a step prove that they added the same numbers, not that the numbers were right.
On a share p of the steps, drawn from (seed, step), each worker computes its neighbour's contribution again and all
compare bits; the exchange is made so that every worker computes every partial sum by itself. A fault that stays is
found within ln(0.01) / ln(1 - p) steps with 99%; one that comes once, with probability p. Where two disagree, all
compute the contribution once more: wrong is who contradicts itself, else who stands against most.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

from torch import Tensor

from ottava.trainer import reduce, schedule
from ottava.trainer.guard import Alarm, Group
from ottava.trainer.loop import Trainer

AUDIT = 31  # the random stream that chooses the steps


def due(share: float, seed: int, step: int, draw: int = 0) -> bool:
    """Whether the step after `step` kept ones is audited. draw: another one chooses other steps."""
    return share > 0 and float(schedule.rng(seed, AUDIT, step, draw).random()) < share


def hashed(value: Tensor) -> str:
    """A digest of a tensor's bytes."""
    return hashlib.sha256(value.cpu().numpy().tobytes()).hexdigest()


def check(trainer: Trainer, group: Group, own: str) -> None:
    """Raise the Alarm of a contribution that two workers compute differently. own: the hash of this worker's.

    Call it between the contribution and the update, on all workers: the forward weights must be those of the step.
    """
    neighbour = (group.rank + 1) % group.world
    found = group.gather([own, _again(trainer, group, neighbour)])
    disputed = [owner for owner in range(group.world) if found[owner][0] != found[owner - 1][1]]
    if not disputed:
        return
    owner = disputed[0]
    values = group.gather([_again(trainer, group, owner), *([own] if group.rank == owner else [])])
    values[owner - 1].append(found[owner - 1][1])
    liars = dissenters(values)
    named = ", ".join(map(str, liars)) if liars else "one of them"
    step = trainer.state.step + 1
    raise Alarm(
        "gradient", f"the contribution of rank {owner} to step {step} came out in two ways: rank {named}", liars
    )


def dissenters(values: Sequence[Sequence[str]]) -> tuple[int, ...]:
    """Who is wrong: the ranks that contradict themselves, else those against most ranks; () where that is a tie."""
    fickle = tuple(rank for rank, held in enumerate(values) if len(set(held)) > 1)
    if fickle:
        return fickle
    holders: dict[str, int] = defaultdict(int)
    for held in values:
        holders[held[0]] += 1
    right = [value for value, count in holders.items() if 2 * count > len(values)]
    return tuple(rank for rank, held in enumerate(values) if right and held[0] != right[0])


def _again(trainer: Trainer, group: Group, rank: int) -> str:
    return hashed(trainer.contribution(reduce.owned(trainer.spec.virtual_shards, rank, group.world)))
