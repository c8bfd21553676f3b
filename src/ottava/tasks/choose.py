"""Which problems to ask next: those of which some answers are right and some wrong.

A group of answers that are all right or all wrong teaches a group-relative method nothing. How often a problem's
answers are right is estimated from the records of what was asked before, with a Beta prior that comes from its level;
the weight of a problem is the chance that a group of G answers is mixed, over what is still unknown about its rate.
All functions are pure: the same records give the same weights, so a draw can be repeated from the records.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from ottava.recipe import Frozen
from ottava.tasks.base import Problem

if TYPE_CHECKING:
    import numpy as np

STRENGTH = 2.0  # answers that a prior counts for


@dataclass(frozen=True, slots=True)
class Rate:
    """A Beta distribution of a pass rate: `right` and `wrong` are its two parameters, prior included."""

    right: float
    wrong: float

    @property
    def mean(self) -> float:
        return self.right / (self.right + self.wrong)

    def mixed(self, group: int) -> float:
        """The chance that `group` answers are neither all right nor all wrong.

        1 - E[p^G] - E[(1-p)^G]; the moments of a Beta distribution are products.
        """
        assert group >= 1, group
        both = self.right + self.wrong
        all_right = all_wrong = 1.0
        for i in range(group):
            all_right *= (self.right + i) / (both + i)
            all_wrong *= (self.wrong + i) / (both + i)
        return max(0.0, 1.0 - all_right - all_wrong)


@dataclass(frozen=True, slots=True)
class Asked:
    """One problem in one generation: how many of its answers were graded, and how many were right.

    Unscorable answers are in neither.
    """

    problem: str
    graded: int
    right: int


def estimates(records: Iterable[Asked], problems: Sequence[Problem], *, forget: float = 1.0) -> dict[str, Rate]:
    """The rate of each problem, by id. records: oldest first; those of unknown problems are left out.

    forget: what a generation of the same problem's record still counts for after another one (1: all; the model
    learns, and old answers are of an older model). The prior of a problem is the mean of its level's records, worth
    STRENGTH answers; without any, one right and one wrong.
    """
    assert 0 < forget <= 1, forget
    level = {problem.id: problem.steps for problem in problems}
    own: dict[str, tuple[float, float]] = {}
    for record in records:
        assert 0 <= record.right <= record.graded, record
        if record.problem in level and record.graded:
            right, wrong = own.get(record.problem, (0.0, 0.0))
            own[record.problem] = (right * forget + record.right, wrong * forget + record.graded - record.right)
    pooled: defaultdict[int, list[float]] = defaultdict(lambda: [1.0, 1.0])
    for name, (right, wrong) in own.items():
        pooled[level[name]][0] += right
        pooled[level[name]][1] += wrong
    found = {}
    for name, steps in level.items():
        right, wrong = own.get(name, (0.0, 0.0))
        a, b = pooled[steps]
        found[name] = Rate(right + STRENGTH * a / (a + b), wrong + STRENGTH * b / (a + b))
    return found


class Stretch(Frozen):
    """Until this share of the run, these levels are asked, with these weights."""

    until: Annotated[float, Field(gt=0, le=1)]
    levels: Annotated[dict[int, Annotated[float, Field(gt=0)]], Field(min_length=1)]


class Schedule(Frozen):
    """A curriculum as data: stretches of a run, one after the other; the last lasts to the end.

    by_rate: whether problems of a level are weighted by their chance to give a mixed group, or alike.
    floor: the least weight of a problem, so that none is forgotten for ever.
    """

    stretches: tuple[Stretch, ...] = ()
    by_rate: bool = True
    floor: Annotated[float, Field(gt=0, le=1)] = 0.05

    @model_validator(mode="after")
    def _in_order(self) -> Schedule:
        ends = [stretch.until for stretch in self.stretches]
        if ends != sorted(set(ends)) or (ends and ends[-1] != 1):
            raise ValueError("stretches stand in the order of `until`, and the last is until 1")
        return self

    def levels(self, done: float) -> Mapping[int, float] | None:
        """The weights of the levels after a share `done` of the run; None: all levels alike."""
        assert 0 <= done <= 1, done
        return next((stretch.levels for stretch in self.stretches if done < stretch.until), self._last)

    @property
    def _last(self) -> Mapping[int, float] | None:
        return self.stretches[-1].levels if self.stretches else None


def weights(
    problems: Sequence[Problem], rates: Mapping[str, Rate], group: int, schedule: Schedule, done: float
) -> list[float]:
    """The weight of each problem in the next draw; they sum to 1. Levels without problems count for nothing.

    A level's share is the schedule's, however many problems it has; all weights are 0 where no problem is of an asked
    level.
    """
    levels = schedule.levels(done)
    plain = [
        max(schedule.floor, rates[problem.id].mixed(group)) if schedule.by_rate and problem.id in rates else 1.0
        for problem in problems
    ]
    if levels is None:
        total = sum(plain)
        return [weight / total for weight in plain] if total else plain
    sums: defaultdict[int, float] = defaultdict(float)
    for problem, weight in zip(problems, plain, strict=True):
        sums[problem.steps] += weight
    there = sum(share for level, share in levels.items() if sums[level] > 0)
    return [
        levels.get(problem.steps, 0.0) / there * weight / sums[problem.steps] if there else 0.0
        for problem, weight in zip(problems, plain, strict=True)
    ]


def draw(rng: np.random.Generator, weights: Sequence[float], count: int) -> list[int]:
    """The indices of `count` different problems, drawn one after the other by weight; fewer where fewer have any.

    Exponential keys (Efraimidis and Spirakis, 2006): depends on the state of `rng` and the weights alone.
    """
    import numpy as np

    asked = np.asarray(weights, dtype=np.float64)
    assert np.isfinite(asked).all(), "weights are finite"
    assert (asked >= 0).all(), "weights are not negative"
    uniform = 1.0 - rng.random(len(asked))  # (0, 1]
    with np.errstate(divide="ignore"):
        keys = np.where(asked > 0, -np.log(uniform) / asked, np.inf)
    order = np.argsort(keys, kind="stable")
    return [int(i) for i in order[: min(count, int((asked > 0).sum()))]]
