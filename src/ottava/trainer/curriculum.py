"""Which questions a generation asks, where a recipe has a curriculum (`tasks.choose`).

A worker holds nothing that a restart could lose: what earlier generations asked, and how it went, stands in their
records, and a draw is a function of (seed, generation, shard, those records). So the questions are the same for every
number of workers and after every interruption. Where a record of before is gone, the run goes back to the state that
drew it, as with any other that is needed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ottava.tasks import Problem
from ottava.tasks.base import problem_of, read_lines
from ottava.tasks.choose import Asked, Schedule, draw, estimates, weights
from ottava.trainer import records
from ottava.trainer.rl_spec import ReinforceSpec

if TYPE_CHECKING:
    import numpy as np

ASKED = "asked"
"""The key in a record's facts: [the problem's id, answers graded, answers right] of each group that was drawn."""

Facts = Mapping[int, Mapping[str, Any]]
"""By shard: what a generation's records say of it."""


@dataclass
class Curriculum:
    """The questions of every generation. problems: all that may be asked; facts: of an earlier generation, from its
    records, asked for once where `note` was not told of it."""

    spec: ReinforceSpec
    problems: Sequence[Problem]
    facts: Callable[[int], Facts]
    _told: dict[int, tuple[Asked, ...]] = field(default_factory=dict)
    _weights: tuple[int, list[float]] = (-1, [])

    def note(self, number: int, facts: Facts) -> None:
        """Take what all shards of a generation say."""
        self._told[number] = told(facts)

    def questions(self, rng: np.random.Generator, number: int) -> Iterator[Problem]:
        """What a shard of a generation asks, each problem once until all were asked. rng: the shard's own."""
        if self._weights[0] != number:
            self._weights = (number, self._of(number))
        while True:
            order = draw(rng, self._weights[1])
            assert order, "every stretch has problems"
            yield from (self.problems[i] for i in order)

    def _of(self, number: int) -> list[float]:
        """The weight of each problem."""
        how, rates = self.schedule, {}
        if how.by_rate:
            for earlier in range(number):
                if earlier not in self._told:
                    self.note(earlier, self.facts(earlier))
            rates = estimates([self._told[i] for i in range(number)], self.problems, forget=how.forget)
        return weights(self.problems, rates, self.spec.rollout.group, how, begins(self.spec, number))

    @property
    def schedule(self) -> Schedule:
        assert self.spec.curriculum is not None
        return self.spec.curriculum


def begins(spec: ReinforceSpec, number: int) -> float:
    """The share of the run that is done where a generation begins."""
    return min(1.0, number * spec.every / spec.steps)


def told(facts: Facts) -> tuple[Asked, ...]:
    """What a generation asked, shard by shard."""
    return tuple(Asked(*one) for shard in sorted(facts) for one in facts[shard][ASKED])


def facts_of(asked: Sequence[Asked]) -> list[list[Any]]:
    """As it stands in a record."""
    return [[one.problem, one.graded, one.right] for one in asked]


def summary(spec: ReinforceSpec, rollouts: Path, answers: Path) -> dict[str, Any]:
    """What the curriculum of a finished run did, from its records: {groups, mixed: the share of them with right and
    wrong answers, stretches: [{until, groups, mixed, levels: {level: {asked, wanted, right}}}]}.

    asked: a level's share of the groups; wanted: the schedule's, null where it says none; right: of graded answers.
    """
    schedule = spec.curriculum
    assert schedule is not None
    level = {problem.id: problem.steps for problem in map(problem_of, read_lines(answers))}
    ends = [stretch.until for stretch in schedule.stretches] or [1.0]
    parts: defaultdict[float, list[Asked]] = defaultdict(list)
    for number, shards in records.facts(rollouts).items():
        done = begins(spec, number)
        parts[next((end for end in ends if done < end), ends[-1])] += told(shards)
    every = [one for end in ends for one in parts[end]]
    stretches = []
    for end in ends:
        wanted = schedule.levels(max(0.0, end - 1e-12)) if schedule.stretches else None
        stretches.append({"until": end, **_mixed(parts[end]), "levels": _levels(parts[end], level, wanted)})
    return {**_mixed(every), "stretches": stretches}


def _mixed(asked: Sequence[Asked]) -> dict[str, Any]:
    return {"groups": len(asked), "mixed": round(sum(one.mixed for one in asked) / max(len(asked), 1), 4)}


def _levels(
    asked: Sequence[Asked], level: Mapping[str, int], wanted: Mapping[int, float] | None
) -> dict[str, dict[str, Any]]:
    groups = Counter(level[one.problem] for one in asked)
    graded, right = Counter[int](), Counter[int]()
    for one in asked:
        graded[level[one.problem]] += one.graded
        right[level[one.problem]] += one.right
    return {
        str(steps): {
            "asked": round(groups[steps] / max(len(asked), 1), 4),
            "wanted": None if wanted is None else round(wanted.get(steps, 0.0) / sum(wanted.values()), 4),
            "right": round(right[steps] / graded[steps], 4) if graded[steps] else None,
        }
        for steps in sorted({*groups, *(wanted or ())})
    }
