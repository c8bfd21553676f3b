"""What the workers of a group check together in every step, before a state is kept: numbers, losses, equal bits.

A wrong state must not be kept, so these checks are made in step and by all: each worker comes to the same finding
at the same place and none goes on. What is found is an `Alarm`: its kind, and whose chip it speaks against.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ottava.trainer.supervised import Spike


class Alarm(Exception):
    """A fault that a worker found. kind: as in `supervisor.decide.KINDS`; ranks: whom it speaks against; step: after
    which nothing counts, where it is not the last one."""

    def __init__(self, kind: str, message: str, ranks: Sequence[int] = (), step: int | None = None):
        super().__init__(message)
        self.kind, self.message, self.ranks, self.step = kind, message, tuple(sorted(ranks)), step


@dataclass(frozen=True)
class Group:
    """This worker's place among the workers."""

    rank: int
    world: int

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value (anything that JSON holds, or bytes), by rank."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def digests(self, value: str) -> list[str]:
        """Everybody's digest (hex, 32 bytes), by rank: `gather`, but fast enough for every step."""
        if self.world == 1:
            return [value]
        mine = torch.frombuffer(bytearray.fromhex(value), dtype=torch.uint8)
        found = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(found, mine)
        return [bytes(item.numpy()).hex() for item in found]


def minority(values: Sequence[Any]) -> tuple[int, ...]:
    """Whose value differs from that of more than half of all; () where there is no such majority."""
    value, count = Counter(values).most_common(1)[0]
    return tuple(i for i, v in enumerate(values) if v != value) if 2 * count > len(values) else ()


def check_class(reports: Sequence[tuple[str, str, str]]) -> None:
    """Raise the Alarm of a group whose workers compute other bits.

    reports, by rank: the numerics class, the same computed again, and what the platform says of itself. A chip that
    contradicts itself, or others that are what it is, is corrupt; one that says it is something else is of another
    class.
    """
    unsound = [rank for rank, (first, again, _) in enumerate(reports) if first != again]
    if unsound:
        raise Alarm("corrupt", f"a canonical shard came out in two ways on the same chip of rank {unsound[0]}", unsound)
    classes = [first for first, _, _ in reports]
    if len(set(classes)) == 1:
        return
    odd = minority(classes)
    shown = ", ".join(c[:12] for c in classes)
    if len({facts for _, _, facts in reports}) == 1:
        raise Alarm("corrupt", f"workers on equal chips and libraries compute other bits: {shown}", odd)
    raise Alarm("class", f"the workers are of {len(set(classes))} numerics classes: {shown}", odd)


def check_finite(values: Sequence[float], sound: Sequence[bool], where: str) -> None:
    """Raise the Alarm of numbers that are none. sound: by rank, whether its own contribution was finite."""
    if all(map(math.isfinite, values)):
        return
    bad = [rank for rank, good in enumerate(sound) if not good]
    raise Alarm("nan", f"the loss of {where} is not finite", bad if len(bad) < len(sound) else ())


def check_spike(loss: float, recent: Sequence[float], spec: Spike, where: str, guessing: float = math.inf) -> None:
    """Raise the Alarm of a loss far above that of guessing, or above the median of the recent ones of its kind.

    recent: losses of batches like this one, the last of which count; while they are too few, only `guessing` is a
    bound, the logarithm of the vocabulary's size: a curriculum that opens a harder kind of problem is no fault.
    """
    recent = list(recent)[-spec.window :]
    if loss > guessing + spec.nats:
        raise Alarm("spike", f"the loss of {where} is {loss:.4f}, and guessing would give {guessing:.4f}")
    if len(recent) < spec.window:
        return
    middle, spread = _middle(recent)
    if loss > middle + max(spec.nats, spec.spreads * spread):
        raise Alarm(
            "spike", f"the loss of {where} is {loss:.4f}, and the median of the last {len(recent)} {middle:.4f}"
        )


def check_drawn(loss: float, recent: Sequence[float], spec: Spike, where: str, most: float = math.inf) -> None:
    """Raise the Alarm of a divergence that no student can have, or of a student that keeps drifting from its teacher.

    The text is the student's own. It may begin as far from its teacher as it likes, and one reply that the teacher
    would never give can outweigh all the others of a step: neither guessing nor the step before bounds a single loss.
    What bounds it is `most`, by the divergence itself; and what no draw explains is a whole window whose median lies as
    far above that of the window before, or of as much as there was, as a spike above the median; of the two windows'
    spreads the larger counts. recent: as for `check_spike`, oldest first.
    """
    if loss > most + spec.nats:
        raise Alarm("spike", f"the loss of {where} is {loss:.4f}, and no student can have more than {most:.4f}")
    known = [*recent, loss][-2 * spec.window :]
    if len(known) <= spec.window:
        return
    (before, first), (now, last) = (_middle(part) for part in (known[: -spec.window], known[-spec.window :]))
    if now > before + max(spec.nats, spec.spreads * max(first, last)):
        what = f"the median loss of the {spec.window} steps up to {where} is {now:.4f}"
        raise Alarm("spike", f"{what}, and that of the {len(known) - spec.window} before {before:.4f}")


def _middle(losses: Sequence[float]) -> tuple[float, float]:
    """Their median, and the median of their distances from it."""
    middle = statistics.median(losses)
    return middle, statistics.median(abs(value - middle) for value in losses)


def outliers(losses: Sequence[float]) -> tuple[int, ...]:
    """The ranks whose share of the loss stands out: over three times the median of all. Fewer than three cannot say."""
    if len(losses) < 3:
        return ()
    middle = statistics.median(losses)
    return tuple(rank for rank, loss in enumerate(losses) if not loss <= 3 * middle)
