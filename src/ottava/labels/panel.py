"""How a panel of people judges one audited label, when each of them may be wrong.

People who have not voted on the item are asked one after the other, blind, until the odds are clear: each answer that
agrees with the label adds w, each that does not takes w off, w = ln(p / (1 - p)) with p the person's accuracy. At
AGREE the label is *confirmed*, at -AGAINST it is *refuted*. After LONGEST answers without an end it counts as refuted
from a third of that on; where there are not so many people, unless more weight is for it.

**Why the share of refuted labels bounds the share of wrong ones**, even where items differ in how hard they are. Take
the items on which a person is right with probability a > 1/2, and say a share e of their labels is wrong, for reasons
that are independent of the panel's given the item. Then the panel refutes e (1 - miss) + (1 - e) alarm of them, and
this is at least e where (1 - e) alarm >= e miss. The panel of people at 92% confirms with two answers more on one side
and refutes with three: e may be 0.37 where a = 0.6, and 0.31 where a = 0.7, for there false alarms outweigh misses;
where a = 0.92 it may be 0.08, and beyond that the misses are 0.8% of the wrong labels, for which the bound is divided
by 1 - `misses` (a test computes these numbers). What it cannot see: items on which most people are wrong.
"""

from __future__ import annotations

import math

AGREE = math.log(40.0)
AGAINST = math.log(600.0)
LONGEST = 11
"""Answers of one panel."""
WEIGHTS = (0.4, 3.6)
"""The least and the most that one answer may weigh: two who agree are always asked."""


def weight(accuracy: float) -> float:
    """What an answer of somebody of this accuracy weighs; 0: no use in a panel."""
    if accuracy <= 0.6:
        return 0.0
    return min(max(math.log(accuracy / max(1 - accuracy, 1e-9)), WEIGHTS[0]), WEIGHTS[1])


def verdict(odds: float, answers: int, more: bool) -> bool | None:
    """True: refuted; False: confirmed; None: ask another, if there are `more`."""
    if odds >= AGREE:
        return False
    if odds <= -AGAINST:
        return True
    if not more:
        return odds <= 0
    if answers >= LONGEST:
        return odds <= -AGAINST / 3
    return None


def misses(accuracy: float) -> float:
    """The share of wrong labels that a panel of such people confirms, with answers independent given the item."""
    return walk(1 - accuracy, weight(accuracy))[0] if weight(accuracy) else 1.0


def cost(accuracy: float) -> float:
    """Answers that a panel of such people needs for a right label."""
    return walk(accuracy, weight(accuracy))[1] if weight(accuracy) else float(LONGEST)


def walk(agree: float, w: float) -> tuple[float, float]:
    """(the probability of `confirmed`, answers on average) where each answer agrees with probability `agree` and
    weighs w.

    All paths are added up, step by step: the walls, and what is decided where the answers end.
    """
    open_, confirmed, answers = {0: 1.0}, 0.0, 0.0
    for step in range(1, LONGEST + 1):
        answers += sum(open_.values())
        new: dict[int, float] = {}
        for at, p in open_.items():
            for to, chance in ((at + 1, p * agree), (at - 1, p * (1 - agree))):
                said = verdict(to * w, step, True)
                if said is None:
                    new[to] = new.get(to, 0.0) + chance
                elif not said:
                    confirmed += chance
        open_ = new
    return confirmed, answers
