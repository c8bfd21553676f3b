"""All that is known of the items so far: machines' opinions, people's votes, and what both together say."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np

from ottava.labels import people as crowd
from ottava.labels import stacker
from ottava.labels.people import People, Votes
from ottava.labels.world import World

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Bools = NDArray[np.bool_]


class Evidence:
    """Append-only votes and the posterior that they and the machines give.

    states: P(class, ordinary or hard), [items, classes, 2], up to date after every vote; matrices and stacker are
    those of the last `refit`. asked: [items, people], who has voted on what. ignored: people whose votes do not count.
    """

    def __init__(self, world: World):
        self.world = world
        count, classes = len(world), len(world.classes)
        self.patterns = stacker.patterns(world)
        self.people: People = crowd.start(len(world.annotators), classes)
        self.prior: Floats = np.full((count, classes), 1 / classes)
        self.asked: Bools = np.zeros((count, len(world.annotators)), bool)
        self.counts = np.zeros(count, np.int64)
        self.ignored: set[int] = set()
        self._votes: list[tuple[int, int, int]] = []
        self._weights: Floats | None = None
        self._reset()

    def __len__(self) -> int:
        return len(self._votes)

    def add(self, item: int, person: int, label: int) -> None:
        """A vote: the item's posterior moves at once. A second vote of a person on an item is an error of the
        caller."""
        assert not self.asked[item, person], (item, person)
        self._votes.append((item, person, label))
        self.asked[item, person] = True
        self.counts[item] += 1
        if person not in self.ignored:
            moved = self.states[item] * self._likelihood[person, label]
            self.states[item] = moved / np.add.reduce(moved, axis=None)

    def votes(self) -> Votes:
        """The votes that count, in order of time."""
        table = np.asarray(self._votes, np.int64).reshape(-1, 3)
        if self.ignored:
            table = table[~np.isin(table[:, 1], list(self.ignored))]
        return Votes(table[:, 0], table[:, 1], table[:, 2])

    def refit(self, rounds: int = 8) -> None:
        """Fit people and stacker to all votes: expectation and maximisation in turn, from where they were."""
        votes = self.votes()
        classes = len(self.world.classes)
        voted = np.bincount(votes.items, minlength=len(self.world)) > 0
        where = self.patterns.of[voted] * classes
        size = len(self.patterns.features) * classes
        for _ in range(rounds):
            states = crowd.posterior(self.prior, votes, self.people)
            believed = states.sum(2)[voted]
            soft = np.stack(
                [np.bincount(where + k, believed[:, k], size)[k::classes].astype(np.float64) for k in range(classes)], 1
            )
            table, self._weights = stacker.fit(self.patterns, soft, self._weights)
            before, self.prior = self.prior, table[self.patterns.of]
            self.people = crowd.improve(states, votes, self.people)
            if float(np.abs(before - self.prior).max()) < 1e-3:
                break
        self._reset()

    def _reset(self) -> None:
        self.states: Floats = crowd.posterior(self.prior, self.votes(), self.people)
        self._likelihood = self.people.both().transpose(1, 3, 2, 0).copy()  # [people, answers, classes, 2]

    @property
    def believed(self) -> Floats:
        """P(class), [items, classes]."""
        out: Floats = self.states[:, :, 0] + self.states[:, :, 1]  # ten times faster than a sum over so short an axis
        return out

    def believed_of(self, item: int) -> Floats:
        """P(class) of one item, [classes]."""
        out: Floats = self.states[item].sum(1)
        return out

    def decisions(self) -> NDArray[np.int64]:
        """The likeliest class of each item."""
        out: NDArray[np.int64] = self.believed.argmax(1)
        return out

    def risks(self) -> Floats:
        """The probability that the likeliest class is not the right one, [items]."""
        best: Floats = reduce(np.maximum, self.believed.T)
        return np.maximum(1 - best, 0.0)

    def doubts(self, by: float) -> Floats:
        """The probability that each decision is wrong if people are right less often by so much, [items]."""
        chance = 1 / len(self.world.classes)
        right = float(self.people.accuracy(self.classes()).mean())
        share = min(by / max(right - chance, 1e-9), 1.0)
        weaker = replace(self.people, matrices=(1 - share) * self.people.matrices + share * chance)
        states = crowd.posterior(self.prior, self.votes(), weaker)
        out: Floats = 1 - states.sum(2)[np.arange(len(states)), self.decisions()]
        return out

    def classes(self) -> Floats:
        """How common each class is believed to be."""
        out: Floats = self.believed.mean(0)
        return out
