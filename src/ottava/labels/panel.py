"""How a panel of people judges one audited label, when each of them may be wrong.

People who have not voted on the item are asked one after the other, blind, until the odds are clear: each answer that
agrees with the label adds w, each that does not takes w off, w = ln(p / (1 - p)) with p the person's accuracy. At
AGREE the label is *confirmed*, at -AGAINST it is *refuted*. Where nobody is left to ask, or after LONGEST answers, it
is refuted in part: by the probability that it is wrong, given the odds, if one in four of disputed labels is. A tie
that counted as a whole refutation, as one might on the safe side, made most of the false alarms.

**Why the share of refuted labels bounds the share of wrong ones**, even where items differ in how hard they are. Take
the items on which a person is right with probability a > 1/2, and say a share e of their labels is wrong, for reasons
that are independent of the panel's given the item. Then the panel refutes e (1 - miss) + (1 - e) alarm of them, and
this is at least e where (1 - e) alarm >= e miss. For people at 92%, who confirm with two answers more on one side and
refute with three, and whatever their number from 1 to 11, e may be 0.34 where a = 0.6 and 0.28 where a = 0.7, for
there false alarms outweigh misses; for people at 80% (two and four) 0.26 and 0.18. Where a is the people's own
accuracy, misses are what counts: 0.8% of the wrong labels at 92%, 7.4% at 80%; for these the bound is divided by
1 - `misses` (a test computes all of these numbers). What it cannot see: items on which most people are wrong.
"""

from __future__ import annotations

import math

AGREE = math.log(12.0)
AGAINST = math.log(220.0)
LONGEST = 11
"""Answers of one panel."""
DISPUTED = 3.0
"""Odds that a disputed label is right: where a panel ends without a verdict, it is refuted by as much as it is then
believed wrong."""
WEIGHTS = (0.4, 2.4)
"""The least and the most that one answer may weigh: two who agree are always asked."""


def weight(accuracy: float) -> float:
    """What an answer of somebody of this accuracy weighs; 0: no use in a panel."""
    if accuracy <= 0.6:
        return 0.0
    return min(max(math.log(accuracy / max(1 - accuracy, 1e-9)), WEIGHTS[0]), WEIGHTS[1])


def verdict(odds: float, answers: int, more: bool) -> float | None:
    """How far the label is refuted: 1, 0 (confirmed), or between them where nobody is left (1 where nobody was there at
    all); None: ask another, if there are `more`."""
    if odds >= AGREE:
        return 0.0
    if odds <= -AGAINST:
        return 1.0
    if more and answers < LONGEST:
        return None
    if not answers:
        return 1.0
    return 1 / (1 + DISPUTED * math.exp(odds))


def misses(accuracy: float) -> float:
    """The share of wrong labels that a panel of such people confirms, with answers independent given the item."""
    return walk(1 - accuracy, weight(accuracy))[0] if weight(accuracy) else 1.0


def cost(accuracy: float) -> float:
    """Answers that a panel of such people needs for a right label."""
    return walk(accuracy, weight(accuracy))[1] if weight(accuracy) else float(LONGEST)


def walk(agree: float, w: float, most: int = LONGEST) -> tuple[float, float]:
    """(1 - how far the label is refuted, answers), both on average, where each answer agrees with probability `agree`
    and weighs w, and `most` people are there.

    All paths are added up, step by step: the walls, and what is decided where the answers end.
    """
    open_, confirmed, answers = {0: 1.0}, 0.0, 0.0
    for step in range(1, most + 1):
        answers += sum(open_.values())
        new: dict[int, float] = {}
        for at, p in open_.items():
            for to, chance in ((at + 1, p * agree), (at - 1, p * (1 - agree))):
                said = verdict(to * w, step, step < most)
                if said is None:
                    new[to] = new.get(to, 0.0) + chance
                else:
                    confirmed += chance * (1 - said)
        open_ = new
    return confirmed, answers
