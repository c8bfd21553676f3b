"""People whose votes are no evidence: who guesses, who copies, who drifts. And the questions whose answer is known.

Each test sets two accounts of somebody's votes against each other, both of them given what is known of the items
without that person: an honest one, taken at its likeliest, and another whose parameters are not fitted to these votes
but mixed. By universal inference (Wasserman, Ramdas and Balakrishnan, PNAS 117 (2020) 16880) the second is 1/a times
likelier than the first with probability a at most, if the person is honest, at all looks together (drifts: at each
look, as the mixture grows with the votes); the people share SLANDER. What is known of the items is believed, not known,
so that the rate is one of intent: the table of docs/labels.md counts the accused among the honest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from ottava.labels.people import GUESS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ottava.labels.evidence import Evidence
    from ottava.labels.people import Votes

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]
    Bools = NDArray[np.bool_]

SLANDER = 0.01
"""The probability that a test names somebody among honest people, each of the three."""
FEWEST = 30
"""Votes before anybody is judged."""
FOLLOWS = 0.5
"""Of an honest person's votes, the share at least that follow the item's class: right on 75% of two classes."""
ALIKE = 0.1
"""Of two honest people's votes on one item, the share at most that are alike for a reason that the model does not know:
a question that misleads both."""
MEETINGS = 5
"""Items that two people have both voted on, before they are compared."""
FALL, EVERY = 0.2, 10
"""A drift: this much less of the votes follows from some vote on, which is one in so many."""

Kind = Literal["guesses", "copies", "drifts"]


@dataclass(frozen=True)
class Finding:
    """person: place in the annotators; ignore: the votes should not count; why: for people to read."""

    person: int
    kind: Kind
    ignore: bool
    why: str


@dataclass(frozen=True)
class Account:
    """One person's votes in order of time, given what is known without them.

    labels: [votes]; parts: [3, votes], how likely each vote is of somebody who looks, of one who says the commonest
    class unseen, and by chance, evenly spread.
    """

    labels: Ints
    parts: Floats


def people(evidence: Evidence) -> list[Finding]:
    """Everything that is found, the gravest first; nobody twice."""
    votes = evidence.votes()
    if not len(votes):
        return []
    judged = np.flatnonzero(np.bincount(votes.people) >= FEWEST).tolist()
    accounts = {person: account(evidence, votes, person) for person in judged}
    out = guessing(evidence, accounts)
    out += copying(evidence, votes, {found.person for found in out})
    named = {found.person for found in out}
    return out + drifting(evidence, {a: one for a, one in accounts.items() if a not in named})


def account(evidence: Evidence, votes: Votes, person: int) -> Account:
    """What is known of the items a person voted on, with that person's own votes taken out again."""
    own, both = votes.people == person, evidence.people.both()[:, person]
    items, labels = votes.items[own], votes.labels[own]
    rest = evidence.states[items] / np.maximum(both[:, :, labels].transpose(2, 1, 0), 1e-12)
    rest /= rest.sum((1, 2), keepdims=True)
    classes = rest.shape[1]
    agrees = rest[np.arange(len(labels)), labels]
    looks = agrees[:, 0] + (1 - GUESS) * agrees[:, 1] + GUESS / classes * rest[:, :, 1].sum(1)
    usual = labels == evidence.classes().argmax()
    return Account(labels, np.stack([looks, usual.astype(np.float64), np.full(len(labels), 1 / classes)]))


def guessing(evidence: Evidence, accounts: dict[int, Account]) -> list[Finding]:
    """Votes that do not depend on the item's class: a bot, a person who clicks, one label for all.

    The honest account: FOLLOWS or more of the votes follow the class, the others are slips, spread evenly, or the
    commonest class said unseen; so nobody is named for slips, nor because a class is rare. The other: each label has a
    share of its own.
    """
    out, classes = [], len(evidence.world.classes)
    limit = np.log(len(evidence.people.matrices) / SLANDER)
    for person, one in accounts.items():
        if _unseen(one.labels, classes) - _following(one.parts, FOLLOWS)[1] > limit:
            share = _following(one.parts)[0]
            count = len(one.labels)
            why = f"{share:.0%} of {count} votes follow the items, the others fall alike on all: not asked again"
            out.append(Finding(person, "guesses", True, why))
    # most people are no guessers: where a test says so, it is the fit that is wrong, and nothing is told by it
    named = len(out) + len(evidence.ignored)
    return out if 2 * named <= len(evidence.people.matrices) else []


def _unseen(labels: Ints, classes: int) -> float:
    """The log likelihood of labels that depend on nothing: the mean of even shares, and of shares of their own, each
    told by the labels before it and a half (Krichevsky and Trofimov, IEEE Trans. Inf. Theory 27 (1981) 199)."""
    from scipy.special import gammaln

    counts = np.bincount(labels, minlength=classes) + 0.5
    own = gammaln(counts).sum() - gammaln(counts.sum()) - classes * gammaln(0.5) + gammaln(classes / 2)
    return float(np.logaddexp(own, -len(labels) * np.log(classes)) - np.log(2))


def _following(parts: Floats, least: float = 0.0, rounds: int = 60) -> tuple[float, float]:
    """(share of votes that follow, log likelihood at the likeliest share of `least` or more) by expectation and
    maximisation of a mixture of the three parts."""
    mixed = np.array([0.6, 0.1, 0.3])
    for _ in range(rounds):
        mixed = (mixed[:, None] * parts / (mixed @ parts)).mean(1)
        if mixed[0] < least:
            mixed = np.array([least, *((1 - least) * mixed[1:] / mixed[1:].sum())])
    return float(mixed[0]), float(np.log(mixed @ parts).sum())


def copying(evidence: Evidence, votes: Votes, others: set[int]) -> list[Finding]:
    """Two who answer alike more often than the items explain: of such a pair, the votes of the one with fewer do not
    count. others: people who are not compared.

    The honest account: each answers by what the item is, and up to ALIKE of the answers are alike for another reason.
    The other: half of the answers to all of them are copied.
    """
    from scipy.special import logsumexp

    both = evidence.people.both()
    table = np.full(evidence.asked.shape, -1, np.int64)
    table[votes.items, votes.people] = votes.labels
    met = np.flatnonzero((table >= 0).sum(1) >= 2)
    table, states, count = table[met], evidence.states[met], evidence.asked.shape[1]
    voted = (table >= 0).astype(np.float64)
    often = np.argwhere(np.tril(voted.T @ voted, -1) >= MEETINGS).tolist()
    honest, copied = np.linspace(0, ALIKE, 6)[:, None], np.linspace(0.5, 1, 6)[:, None]
    limit = np.log(count * (count - 1) / 2 / SLANDER) if count > 1 else 0.0
    pairs: list[tuple[float, int, int, str]] = []
    for a, b in often:
        if {a, b} & others:
            continue
        where = (table[:, a] >= 0) & (table[:, b] >= 0)
        first, second = table[where, a], table[where, b]
        likely = both[:, a][:, :, first].transpose(2, 1, 0), both[:, b][:, :, second].transpose(2, 1, 0)
        heard = states[where] / np.maximum(likely[1], 1e-12)  # the item without the second, and without the first:
        rest = heard / np.maximum(likely[0], 1e-12)
        alone = (rest * likely[0] * likely[1]).sum((1, 2)) / np.maximum((rest * likely[0]).sum((1, 2)), 1e-300)
        same = first == second
        null = np.log(np.maximum((1 - honest) * alone + honest * same, 1e-300)).sum(1).max()
        told = logsumexp(np.log(np.maximum((1 - copied) * alone + copied * same, 1e-300)).sum(1)) - np.log(6)
        if told - null > limit:
            repeats = (heard * both[:, b][:, :, first].transpose(2, 1, 0)).sum((1, 2)) / heard.sum((1, 2))
            text = f"on {same.sum()} of {len(same)} items, where {repeats.sum():.0f} are to be expected"
            pairs.append((float(told - null), a, b, text))
    out: list[Finding] = []
    for _, a, b, text in sorted(pairs, reverse=True):
        if {a, b} & {found.person for found in out}:
            continue
        fewer, other = (a, b) if evidence.people.votes[a] <= evidence.people.votes[b] else (b, a)
        why = f"the same answer as {evidence.world.annotators[other]} {text}: a copy is no vote"
        out.append(Finding(fewer, "copies", True, why))
    return out


def drifting(evidence: Evidence, accounts: dict[int, Account]) -> list[Finding]:
    """Somebody who was right and no longer is: the guideline was read differently, or has changed.

    The honest account: one share of the votes follows the items, from the first to the last. The other: from some vote
    on it is less by FALL or more. Slips may be any in the first, and are spread evenly in the other.
    """
    from scipy.special import logsumexp

    out, shares = [], np.linspace(0.05, 0.95, 10)
    falls = shares[:, None] - shares >= FALL - 1e-9
    limit = np.log(len(evidence.people.matrices) / SLANDER)
    for person, one in accounts.items():
        count = len(one.labels)
        turns = np.arange(FEWEST, count - FEWEST + 1, EVERY)
        if not len(turns):
            continue
        sums = np.log(shares[:, None] * one.parts[0] + (1 - shares)[:, None] * one.parts[2]).cumsum(1)
        before, after = sums[:, turns - 1], sums[:, -1:] - sums[:, turns - 1]
        stories = np.where(falls[:, :, None], before[:, None] + after[None], -np.inf)
        told = logsumexp(stories) - np.log(falls.sum() * len(turns))
        if told - _following(one.parts)[1] > limit:
            turn = int(turns[stories.max((0, 1)).argmax()])
            first, last = (_following(one.parts[:, part])[0] for part in (slice(turn), slice(turn, None)))
            why = (
                f"{first:.0%} of the first {turn} votes follow the items and {last:.0%} of the {count - turn} since: "
                "not asked until the guideline is looked at together"
            )
            out.append(Finding(person, "drifts", False, why))
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
