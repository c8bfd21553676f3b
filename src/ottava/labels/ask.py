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
    own, said = states.sum(2), joint.sum(1)
    out: Floats = _entropy(own) + _entropy(said) - _entropy(joint.reshape(len(joint), -1))
    return np.maximum(out, 0.0)


def best_people(gain: Floats, seconds: Floats, given: Ints, allowed: NDArray[np.bool_], share: float) -> Ints:
    """People in the order in which to ask: most information per second first.

    gain: what an answer of each is worth on a typical item; seconds: how long each takes; given: votes so far. Nobody
    is given more than `share` times an equal part of the votes while others who may be asked have less.
    """
    people = np.flatnonzero(allowed)
    fair = (given[people].sum() + 1) / max(len(people), 1)
    tired = given[people] > share * fair
    worth = gain[people] / np.maximum(seconds[people], 1e-9)
    return people[np.lexsort((given[people], -worth, tired))]


def _entropy(p: Floats) -> Floats:
    out: Floats = -(p * np.log(np.maximum(p, 1e-300))).sum(1)
    return out
