"""Which problems to ask next: those of which some answers are right and some wrong.

A group of answers that are all right or all wrong teaches a group-relative method nothing. How often a problem's
answers are right is estimated from the records of what was asked before, with a Beta prior that comes from its level;
the weight of a problem is the chance that a group of G answers is mixed, over what is still unknown about its rate.
All functions are pure: the same records give the same weights, so a draw can be repeated from the records.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
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

    @property
    def mixed(self) -> bool:
        """Whether some were right and some wrong."""
        return 0 < self.right < self.graded


def estimates(
    generations: Sequence[Sequence[Asked]], problems: Sequence[Problem], *, forget: float = 1.0
) -> dict[str, Rate]:
    """The rate of each problem, by id. generations: what each asked, oldest first; unknown problems are left out.

    forget: what an answer still counts for a generation later (1: all; the model learns, and old answers are of an
    older model). The prior of a problem is the mean of its level's answers, worth STRENGTH of them; without any, one
    right and one wrong. Additions and products in a fixed order: the same bits on every machine.
    """
    assert 0 < forget <= 1, forget
    level = {problem.id: problem.steps for problem in problems}
    own: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    pooled: defaultdict[int, list[float]] = defaultdict(lambda: [1.0, 1.0])
    worth = 1.0
    for asked in reversed(generations):
        for one in asked:
            assert 0 <= one.right <= one.graded, one
            if one.problem in level:
                for counts in (own[one.problem], pooled[level[one.problem]]):
                    counts[0] += worth * one.right
                    counts[1] += worth * (one.graded - one.right)
        worth *= forget
    found = {}
    for name, steps in level.items():
        right, wrong = own.get(name, (0.0, 0.0))
        a, b = pooled[steps]
        found[name] = Rate(right + STRENGTH * a / (a + b), wrong + STRENGTH * b / (a + b))
    return found


Share = Annotated[float, Field(ge=1e-6, le=1e6)]  # beside the others of its stretch; their sum is a number


class Stretch(Frozen):
    """Until this share of the run, these levels are asked, with these weights."""

    until: Annotated[float, Field(gt=0, le=1)]
    levels: Annotated[dict[int, Share], Field(min_length=1)]


class Schedule(Frozen):
    """A curriculum as data: stretches of a run, one after the other; the last lasts to the end.

    Within a level problems are weighted by their chance to give a mixed group (by_rate), or alike. Without stretches
    the weights of problems decide between levels too.
    """

    stretches: Annotated[tuple[Stretch, ...], Field(description="which levels are asked when; none: all of them")] = ()
    by_rate: Annotated[bool, Field(description="ask those more that are right now and wrong then")] = True
    floor: Annotated[float, Field(gt=0, le=1, description="least weight by rate: none is forgotten for ever")] = 0.05
    forget: Annotated[float, Field(gt=0, le=1, description="what an answer counts for a generation later")] = 0.9

    @model_validator(mode="after")
    def _in_order(self) -> Schedule:
        ends = [stretch.until for stretch in self.stretches]
        if ends != sorted(set(ends)) or (ends and ends[-1] != 1):
            raise ValueError("stretches stand in the order of `until`, and the last is until 1")
        if not self.stretches and not self.by_rate:
            raise ValueError("without stretches and by_rate there is no curriculum: leave it out, or say one of them")
        return self

    @property
    def asked(self) -> tuple[int, ...]:
        """The levels of all stretches, ascending; none: all that there are."""
        return tuple(sorted({level for stretch in self.stretches for level in stretch.levels}))

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
    chance = {rate: max(schedule.floor, rate.mixed(group)) for rate in set(rates.values())} if schedule.by_rate else {}
    plain = [chance[rates[p.id]] if schedule.by_rate and p.id in rates else 1.0 for p in problems]
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


def draw(rng: np.random.Generator, weights: Sequence[float]) -> list[int]:
    """The indices of all that have a weight, each once, drawn one after the other by weight.

    Exponential keys (Efraimidis and Spirakis, 2006): depends on the state of `rng` and the weights alone.
    """
    import numpy as np

    asked = np.asarray(weights, dtype=np.float64)
    assert np.isfinite(asked).all(), "weights are finite"
    assert (asked >= 0).all(), "weights are not negative"
    uniform = 1.0 - rng.random(len(asked))  # (0, 1]
    with np.errstate(divide="ignore"):
        keys = np.where(asked > 0, -np.log(uniform) / asked, np.inf)
    return [int(i) for i in np.argsort(keys, kind="stable")[: int((asked > 0).sum())]]
