"""Everything that depends on the step alone, as pure functions of (spec, step).

Nothing here is state, so nothing here can be lost in a restart.
"""

from __future__ import annotations

import numpy as np

from ottava.trainer.spec import TrainSpec
from ottava.trainer.supervised import Supervised

LENGTHS, THINKING, DIRECT = range(3)


def rng(seed: int, stream: int, step: int, shard: int) -> np.random.Generator:
    """The random generator of (seed, stream, step, virtual shard): a host counter, never saved."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, step, shard, 0]))


def rate(spec: Supervised, step: int) -> float:
    """The factor on every learning rate: linear warm-up, flat, linear decay to the floor."""
    done = step / spec.steps
    start = min(1.0, (step + 1) / spec.optimiser.warmup)
    tail = 1.0 - spec.optimiser.decay_from
    decay = 1.0 if tail == 0 else min(1.0, max(spec.optimiser.floor, (1 - done) / tail))
    return start * decay


def on_grid(spec: Supervised, step: int) -> bool:
    """True where the forward pass of `step` runs through UE8M0-FP8 weights; never where grid_from is 1."""
    return spec.grid_from < 1 and step >= spec.grid_from * spec.steps


def direct_joins(spec: TrainSpec, step: int) -> bool:
    """True where answers without reasoning are part of the batch."""
    return spec.mode == "thinking" and spec.direct.weight > 0 and step >= spec.direct.begin * spec.steps


def thinking_length(spec: TrainSpec, seed: int, step: int, lengths: list[int]) -> int:
    """How many steps the chains of this batch have; `lengths` are those the data holds, sorted.

    The longest open length grows evenly from `start`; half of the batches are of that length. From
    `open_at` on all lengths are alike.
    """
    draw = rng(seed, LENGTHS, step, 0)
    shortest, longest = lengths[0], lengths[-1]
    if step >= spec.curriculum.open_at * spec.steps:
        return int(draw.choice(lengths))
    start = min(max(spec.curriculum.start, shortest), longest)
    top = min(longest, start + int(step / (spec.curriculum.open_at * spec.steps) * (longest - start + 1)))
    if draw.random() < 0.5:
        return top
    return int(draw.choice([n for n in lengths if n <= top]))


def direct_length(spec: TrainSpec, seed: int, step: int, lengths: list[int]) -> int:
    """How many steps the direct problems of this batch have: `one_step` of the batches have one."""
    draw = rng(seed, LENGTHS, step, 1)
    longer = [n for n in lengths if n > 1]
    if 1 in lengths and (not longer or draw.random() < spec.direct.one_step):
        return 1
    return int(draw.choice(longer))
