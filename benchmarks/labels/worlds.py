"""Synthetic worlds that keep their truth to themselves: the policy sees `world`, and asks `vote`.

Each is a kind of trouble that shared/notes or the issue names; the parameters are in `KINDS`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ottava.labels.world import NOTHING, World


@dataclass(frozen=True)
class Kind:
    """How a world is made. Rates are shares of items or votes."""

    items: int = 10_000
    classes: int = 2
    skew: float = 0.5  # how common the first class is; the others share the rest
    people: int = 12
    right: float = 0.92
    spread: float = 0.02
    judges: int = 4
    judge_right: float = 0.86
    shared: float = 0.6  # of a judge's errors, those it makes together with the others
    verifiable: float = 0.6
    missed: float = 0.0  # right answers that the verifier calls wrong (two classes: one side; else: no label)
    hard: float = 0.0
    hard_right: float = 0.65
    hard_judges: float = 0.65
    anchored: float = 0.0  # votes that repeat the judges' majority, where the question is not blind
    bots: int = 0  # people who guess
    copies: int = 0  # people who repeat the first one's votes
    lazy: int = 0  # people, the last ones, who say the first class to everything
    blind_to: float = 0.0  # right answers less on items of every class but the first, ordinary items
    drifters: int = 0  # people, those before them, who after DRIFT votes are right on DRIFTED only
    away: float = 0.0


DRIFT, DRIFTED = 150, 0.7

KINDS: dict[str, Kind] = {
    "notes": Kind(),
    "verifier misses 38%": Kind(missed=0.38),
    "nothing verifiable": Kind(verifiable=0.0),
    "all verifiable": Kind(verifiable=1.0),
    "judges all alike": Kind(shared=1.0),
    "four classes": Kind(classes=4),
    "people at 80%": Kind(right=0.80, spread=0.04),
    "people at 86%": Kind(right=0.86, spread=0.03),
    "people at 97%": Kind(right=0.97, spread=0.01),
    "hard items": Kind(right=0.94, hard=0.08, hard_right=0.65),
    "hard items nothing verifiable": Kind(right=0.94, hard=0.08, hard_right=0.65, verifiable=0.0),
    "hard items and misses": Kind(right=0.94, hard=0.08, hard_right=0.62, missed=0.38),
    "anchored people": Kind(anchored=0.7),
    "two bots and two copies": Kind(bots=2, copies=2),
    "two who say one label": Kind(lazy=2),
    "guideline drift": Kind(drifters=2),
    "rare class": Kind(skew=0.9),
    "one item in fifty": Kind(skew=0.98),
    "rare and overlooked": Kind(skew=0.9, right=0.94, blind_to=0.24),
    "no judges": Kind(judges=0),
    "people come and go": Kind(away=0.2),
}


def planted(kind: Kind, given: np.ndarray) -> dict[str, set[int]]:
    """Who is no honest person, by what they should be found to do. Of who copy each other, all but one should be
    found. Who would drift is one of them only after more than DRIFT votes; given: [people], how many they gave."""
    end = kind.people - kind.lazy
    return {
        "guesses": {*range(kind.bots), *range(end, kind.people)},
        "copies": set(range(kind.bots, kind.bots + kind.copies + 1)) if kind.copies else set(),
        "drifts": {person for person in range(end - kind.drifters, end) if given[person] > DRIFT},
    }


class Truth:
    """A world with its truth. asked: votes given."""

    def __init__(self, kind: Kind, seed: int):
        self.kind, self.rng = kind, np.random.default_rng(seed)
        rng, n, k = self.rng, kind.items, kind.classes
        rest = (1 - kind.skew) / (k - 1) if k == 2 or kind.skew != 0.5 else 1 / k
        share = np.array([1 - rest * (k - 1), *[rest] * (k - 1)])
        self.truth = rng.choice(k, n, p=share / share.sum())
        self.hard = rng.random(n) < kind.hard
        self.right = np.clip(rng.normal(kind.right, kind.spread, kind.people), 0.55, 0.995)
        self.right += kind.right - self.right.mean()
        judges = self._judges()
        self.suggestion = np.array([np.bincount(row, minlength=k).argmax() if len(row) else 0 for row in judges])
        verifier = np.full(n, NOTHING)
        can = rng.random(n) < kind.verifiable
        verifier[can] = self.truth[can]
        miss = can & (rng.random(n) < kind.missed)
        if k == 2:  # class 0 is "right": a right answer is called wrong, never the other way
            verifier[miss & (self.truth == 0)] = 1
        else:
            verifier[miss] = NOTHING
        self.world = World(
            tuple(f"c{i}" for i in range(k)),
            tuple(f"p{i}" for i in range(kind.people)),
            tuple(f"i{i}" for i in range(n)),
            verifier.astype(np.int64),
            judges.astype(np.int64),
        )
        self.asked = 0
        self.given = np.zeros(kind.people, np.int64)

    def _judges(self) -> np.ndarray:
        kind, rng = self.kind, self.rng
        wrong = 1 - np.where(self.hard, kind.hard_judges, kind.judge_right)
        together = rng.random(kind.items) < wrong
        common = self._other(self.truth)
        out = np.empty((kind.items, kind.judges), np.int64)
        for j in range(kind.judges):
            copies = rng.random(kind.items) < kind.shared
            alone = np.where(rng.random(kind.items) < wrong, self._other(self.truth), self.truth)
            out[:, j] = np.where(copies, np.where(together, common, self.truth), alone)
        return out

    def _other(self, labels: np.ndarray) -> np.ndarray:
        return (labels + self.rng.integers(1, self.kind.classes, len(labels))) % self.kind.classes

    def vote(self, item: int, person: int, blind: bool) -> int | None:
        """What this person says, counted."""
        kind, rng, k = self.kind, self.rng, self.kind.classes
        if kind.away and rng.random() < kind.away:
            return None
        self.asked += 1
        self.given[person] += 1
        return self._say(item, person, blind, rng, k)

    def _say(self, item: int, person: int, blind: bool, rng: np.random.Generator, k: int) -> int:
        kind = self.kind
        if person < kind.bots:
            return int(rng.integers(k))
        if kind.bots < person <= kind.bots + kind.copies:  # the same answer as the one they copy
            person, rng = kind.bots, np.random.default_rng([item, kind.bots])
        elif kind.copies and person == kind.bots:
            rng = np.random.default_rng([item, kind.bots])
        if person >= kind.people - kind.lazy:
            return 0
        if not blind and rng.random() < kind.anchored:
            return int(self.suggestion[item])
        right = self.right[person] if not self.hard[item] else kind.hard_right
        right -= kind.blind_to * bool(self.truth[item])
        if kind.people - kind.lazy - kind.drifters <= person < kind.people - kind.lazy and self.given[person] > DRIFT:
            right = DRIFTED
        if rng.random() < right:
            return int(self.truth[item])
        return int((self.truth[item] + rng.integers(1, k)) % k)

    def error(self, decisions: np.ndarray) -> float:
        """The share of wrong labels."""
        return float((decisions != self.truth).mean())


def two_plus_one(kind: Kind, seed: int) -> tuple[float, float]:
    """(votes an item, error) of two votes and a third on disagreement, on this very world; a tie of three: the
    first."""
    if kind.people < 3:
        raise SystemExit(f"two votes and a third need three people: --set people={kind.people}")
    truth = Truth(replace(kind, away=0.0), seed)
    rng = np.random.default_rng([seed, 1])
    wrong = 0
    for item in range(kind.items):
        a, b, c = rng.choice(kind.people, 3, replace=False)
        first, second = truth.vote(item, a, True), truth.vote(item, b, True)
        if first != second:
            third = truth.vote(item, c, True)
            first = second if third == second else first
        wrong += first != truth.truth[item]
    return truth.asked / kind.items, float(wrong) / kind.items
