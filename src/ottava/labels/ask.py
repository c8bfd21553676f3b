"""Which question next, and to whom: by expected information gain per second of a person's time.

The gain is the mutual information of an item's class and the answer, under the posterior that knows of hard items: one
more opinion on an item that puzzles everybody teaches little, and is not asked for. Random picking costs a fifth more
votes at the same accuracy (docs/labels.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ottava.labels.people import GUESS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]


def gains(states: Floats, matrix: Floats) -> Floats:
    """Expected information of one answer on each item, in nats: states [items, classes, 2], matrix [classes,
    answers]."""
    puzzled = (1 - GUESS) * matrix + GUESS / matrix.shape[-1]
    joint = states[:, :, 0, None] * matrix + states[:, :, 1, None] * puzzled  # P(class, answer)
    own, said = states[:, :, 0] + states[:, :, 1], sum(joint[:, k] for k in range(joint.shape[1]))
    out: Floats = _entropy(own) + _entropy(said) - _entropy(joint.reshape(len(joint), -1))
    return np.maximum(out, 0.0)


def best_person(gain: Floats, seconds: Floats, given: Ints, allowed: NDArray[np.bool_], share: float) -> int:
    """Whom to ask: most information per second first; where that is equal, who has given fewer votes.

    gain: what an answer of each is worth on a typical item; seconds: how long each takes; given: votes so far; allowed:
    at least one. Nobody is given more than `share` times an equal part of the votes while others who may be asked have
    less.
    """
    people = allowed.nonzero()[0]
    had, worth = given[people], gain[people] / seconds[people]
    worth[had * len(people) > share * (np.add.reduce(had) + 1)] -= 1e9  # tired: after everybody else
    best = (worth == np.maximum.reduce(worth)).nonzero()[0]
    return int(people[best[had[best].argmin()]])


def _entropy(p: Floats) -> Floats:
    out: Floats = (p * np.log(np.maximum(p, 1e-300))) @ np.full(p.shape[1], -1.0)
    return out
