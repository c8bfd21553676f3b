"""People whose votes are no evidence: who guesses, who copies, who drifts. And the questions whose answer is known.

The tests for copies and drift are one-sided, with a rate of false alarms for everybody together, ALARM. They lean on
what is believed of the items, so that the rate is one of intent; tests count alarms in worlds of honest people.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from ottava.labels.people import SHRINK

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ottava.labels.evidence import Evidence

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

ALARM = 1e-3
FEWEST = 30
"""Votes before anybody is judged."""
SURE = 0.9
"""A class is taken for known where the votes and machines without the person in question give it this probability."""

Kind = Literal["guesses", "copies", "drifts"]


@dataclass(frozen=True)
class Finding:
    """person: place in the annotators; ignore: the votes should not count; why: for people to read."""

    person: int
    kind: Kind
    ignore: bool
    why: str


def people(evidence: Evidence) -> list[Finding]:
    """Everything that is found, the most certain first."""
    return [*guessing(evidence), *copying(evidence), *drifting(evidence)]


def guessing(evidence: Evidence) -> list[Finding]:
    """Votes that do not depend on the item's class: a bot, a person who clicks, one label for all.

    How often each was right (what the fit took over from everybody else's votes is taken off again) against what
    guessing gives: named is who is within chance of it, one-sided, 95%. Nobody is judged before FEWEST votes.
    """
    out = []
    people, classes = evidence.people, evidence.classes()
    accuracy, borrowed = people.accuracy(classes), SHRINK * len(classes)
    usual = float(np.average(accuracy, weights=people.votes + 1e-9))
    for a, matrix in enumerate(people.matrices):
        count = float(people.votes[a])
        if count < FEWEST or a in evidence.ignored:
            continue
        right = float(accuracy[a] * (count + borrowed) - usual * borrowed) / count
        chance = float(classes @ matrix @ classes)
        margin = max(1.65 * np.sqrt(max(chance * (1 - chance), 0.01) / count), min(0.1, (1 - chance) / 5))
        if right < chance + margin:
            why = f"right on {right:.0%} of {count:.0f} items where guessing gives {chance:.0%}: not asked again"
            out.append(Finding(a, "guesses", True, why))
    # where one class is rare, honest people are hardly above chance: most people are no guessers, so a test that says
    # so tells nothing
    named = len(out) + len(evidence.ignored)
    return out if 2 * named <= len(people.matrices) else []


def copying(evidence: Evidence) -> list[Finding]:
    """Two who are wrong alike more often than chance allows: of such a pair, the votes of the one with fewer do not
    count.

    For items on which both voted and whose class the other evidence settles, the number on which both gave the same
    wrong label is compared with what independent people of their error rates would give (binomial tail).
    """
    from scipy.stats import binom

    votes = evidence.votes()
    if not len(votes):
        return []
    table = np.full(evidence.asked.shape, -1, np.int64)
    table[votes.items, votes.people] = votes.labels
    shared = np.flatnonzero((table >= 0).sum(1) >= 2)
    rows, believed = table[shared], evidence.prior[shared]
    logs = np.log(np.maximum(evidence.people.matrices, 1e-12))
    count = rows.shape[1]
    mine = np.zeros((len(shared), count, believed.shape[1]))
    for a in range(count):
        voted = rows[:, a] >= 0
        mine[voted, a] = logs[a][:, rows[voted, a]].T
    total = np.log(np.maximum(believed, 1e-12)) + mine.sum(1)
    pairs = count * (count - 1) // 2
    out: list[Finding] = []
    for a in range(count):
        for b in range(a):
            both = (rows[:, a] >= 0) & (rows[:, b] >= 0)
            if both.sum() < 10 or {a, b} & {found.person for found in out}:
                continue
            rest = total[both] - mine[both, a] - mine[both, b]
            rest = np.exp(rest - rest.max(1, keepdims=True))
            rest /= rest.sum(1, keepdims=True)
            known = rest.max(1) >= SURE
            truth = rest.argmax(1)[known]
            va, vb = rows[both, a][known], rows[both, b][known]
            alike = int(((va == vb) & (va != truth)).sum())
            if not known.any() or not alike:
                continue
            slip = 1 - SURE  # the known class itself may be wrong: then both seem wrong alike
            settled = float((1 - rest.max(1)[known]).mean())
            rate = float((va != truth).mean() * (vb != truth).mean()) + min(settled, slip)
            rate = max(rate, 0.02)
            if binom.sf(alike - 1, int(known.sum()), min(rate, 1.0)) < ALARM / pairs:
                fewer = a if evidence.people.votes[a] <= evidence.people.votes[b] else b
                other = b if fewer == a else a
                names = evidence.world.annotators
                why = (
                    f"the same wrong label as {names[other]} on {alike} of {int(known.sum())} items: a copy is no vote"
                )
                out.append(Finding(fewer, "copies", True, why))
    return out


def drifting(evidence: Evidence) -> list[Finding]:
    """Somebody who was right and no longer is: the guideline was read differently, or has changed.

    Agreement with the settled class in the later half of a person's votes against the earlier half (difference of two
    shares, one-sided).
    """
    from scipy.stats import norm

    votes, decisions = evidence.votes(), evidence.decisions()
    settled = evidence.risks() < 1 - SURE
    out = []
    limit = float(norm.isf(ALARM / max(len(evidence.people.matrices), 1)))
    for a in range(len(evidence.people.matrices)):
        own = (votes.people == a) & settled[votes.items]
        right = (votes.labels[own] == decisions[votes.items[own]]).astype(np.float64)
        half = len(right) // 2
        if half < FEWEST:
            continue
        first, last = right[:half].mean(), right[half:].mean()
        pooled = right.mean()
        error = np.sqrt(max(pooled * (1 - pooled), 1e-4) * 2 / half)
        if (first - last) / error > limit:
            why = (
                f"right on {first:.0%} of the earlier items and {last:.0%} of the later: "
                "not asked until the guideline is looked at together"
            )
            out.append(Finding(a, "drifts", False, why))
    return out


def gold(evidence: Evidence, person: int, count: int, sure: float = 0.995) -> Ints:
    """Items whose answer is known without this person, to see how well they do: the surest first, evenly over
    classes."""
    risks = evidence.risks()
    known = np.flatnonzero(~evidence.asked[:, person] & (evidence.counts >= 2) & (risks <= 1 - sure))
    ranked = known[np.argsort(risks[known], kind="stable")]
    decided, turn = evidence.decisions()[ranked], np.empty(len(known), np.int64)
    for k in range(len(evidence.world.classes)):
        here = np.flatnonzero(decided == k)
        turn[here] = np.arange(len(here))
    return ranked[np.argsort(turn, kind="stable")][:count]


def conflicts(evidence: Evidence, least: float = 0.2) -> Ints:
    """Items to be adjudicated by people together: several votes, and still a risk of `least`, the largest first."""
    risks = evidence.risks()
    open_ = np.flatnonzero((evidence.counts >= 3) & (risks >= least))
    return open_[np.argsort(-risks[open_], kind="stable")]
