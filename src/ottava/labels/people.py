"""What people's votes say, when nobody is always right: Dawid and Skene's model, sparse, with items that are hard.

Each person a has a confusion matrix C_a[k, v]: how often an item of class k is called v. Dawid and Skene (J. R. Stat.
Soc. C 28 (1979) 20) estimate it together with the classes by expectation and maximisation. Two things are added:

- The prior of an item's class is its own, [items, classes]: that is where machine evidence enters (`stacker`).
- A share of the items may be *hard*: there a vote is a mere guess with probability GUESS, and else the person's own.
  Without that, two people who are both puzzled look like two witnesses, and agreement is believed too much.

Votes are kept as three arrays and summed by `bincount`, so that an iteration costs a few passes over the votes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]
    Floats = NDArray[np.float64]

GUESS = 0.7
"""Of the votes on a hard item, the share that are guesses: 92% becomes 63% with two classes."""
SHRINK = 12.0
"""Votes of each class that a person's matrix starts with, spread as everybody's: few votes prove little."""
EVEN = 300.0
"""Votes of each class that everybody's matrix starts with, as if all classes were equally easy: where a class is rare,
slips on the others outnumber it, and it would come to stand for them."""
HARD_A, HARD_B = 0.5, 50.0
"""Beta prior of the share of hard items: none, unless votes say so."""


@dataclass(frozen=True)
class Votes:
    """items, people, labels: [votes], whole numbers from 0."""

    items: Ints
    people: Ints
    labels: Ints

    def __len__(self) -> int:
        return len(self.items)


@dataclass(frozen=True)
class People:
    """matrices: [people, classes, classes], C_a[k, v]; hard: share of hard items; votes: [people], how many they
    gave."""

    matrices: Floats
    hard: float
    votes: Floats

    def accuracy(self, classes: Floats) -> Floats:
        """How often each is right on items that are not hard, [people]; classes: [classes], how common each is."""
        out: Floats = np.einsum("akk,k->a", self.matrices, classes)
        return out

    def both(self) -> Floats:
        """The matrices on ordinary and on hard items: [2, people, classes, classes]."""
        return np.stack([self.matrices, (1 - GUESS) * self.matrices + GUESS / self.matrices.shape[-1]])


def start(people: int, classes: int, right: float = 0.85) -> People:
    """Everybody right with probability `right`, wrong labels alike."""
    matrix = np.full((classes, classes), (1 - right) / (classes - 1))
    np.fill_diagonal(matrix, right)
    return People(np.repeat(matrix[None], people, 0), HARD_A / (HARD_A + HARD_B), np.zeros(people))


def posterior(prior: Floats, votes: Votes, people: People, hard: bool = True) -> Floats:
    """P(class, ordinary or hard | evidence): [items, classes, 2 (or 1 without hard items)] from prior [items,
    classes]."""
    count, classes = prior.shape
    logs = np.log(np.maximum(people.both()[: 2 if hard else 1], 1e-12))
    shares = (1 - people.hard, people.hard) if hard else (1.0,)
    out = np.empty((count, classes, len(shares)))
    base = np.log(np.maximum(prior, 1e-12))
    for h, share in enumerate(shares):
        for k in range(classes):
            said = np.bincount(votes.items, logs[h, votes.people, k, votes.labels], count)
            out[:, k, h] = base[:, k] + np.log(max(share, 1e-12)) + said
    out -= out.max((1, 2), keepdims=True)
    np.exp(out, out)
    out /= out.sum((1, 2), keepdims=True)
    return out


def improve(states: Floats, votes: Votes, people: People, shrink: float = SHRINK) -> People:
    """The matrices and the share of hard items that the posterior `states` [items, classes, 1 or 2] makes likeliest."""
    count, classes = len(people.matrices), states.shape[1]
    where = votes.people * classes + votes.labels
    totals = np.empty((count, classes, classes))
    for k in range(classes):
        weight = states[votes.items, k, 0]
        if states.shape[2] == 2:
            own = (1 - GUESS) * people.matrices[votes.people, k, votes.labels]
            weight = weight + states[votes.items, k, 1] * own / (own + GUESS / classes)
        totals[:, k, :] = np.bincount(where, weight, count * classes).reshape(count, classes)
    pooled = totals.sum(0) + 0.5
    right = min(max(float(np.trace(pooled) / pooled.sum()), 0.55), 0.97)
    pooled += EVEN * start(1, classes, right).matrices[0]
    pooled /= pooled.sum(-1, keepdims=True)
    matrices = totals + shrink * pooled
    matrices /= np.maximum(matrices.sum(-1, keepdims=True), 1e-300)
    hard = 0.0
    if states.shape[2] == 2:
        voted = np.bincount(votes.items, minlength=len(states)) > 0
        hard = float((states[voted, :, 1].sum() + HARD_A) / (voted.sum() + HARD_A + HARD_B))
    return People(matrices, hard, np.bincount(votes.people, minlength=count).astype(np.float64))


def dawid_skene(
    votes: Votes, items: int, people: int, classes: int, *, rounds: int = 100, tolerance: float = 1e-6
) -> tuple[Floats, People]:
    """The model of 1979 by itself: (P(class) [items, classes], People). No hard items, no shrinking, a common prior.

    Starts from the share of votes; stops when no probability moves by more than `tolerance`.
    """
    shares = np.bincount(votes.items * classes + votes.labels, minlength=items * classes).astype(np.float64)
    believed = shares.reshape(items, classes)
    believed = (believed + 1e-9) / (believed + 1e-9).sum(1, keepdims=True)
    crowd = start(people, classes)
    for _ in range(rounds):
        crowd = improve(believed[:, :, None], votes, crowd, shrink=1e-9)
        prior = np.broadcast_to(believed.mean(0), believed.shape)
        new = posterior(prior, votes, crowd, hard=False)[:, :, 0]
        moved, believed = float(np.abs(new - believed).max(initial=0.0)), new
        if moved < tolerance:
            break
    return believed, crowd
