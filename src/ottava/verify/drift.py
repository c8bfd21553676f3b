"""Is a backend still what it was when it was certified? Asked after every re-scored reply, at a stated error rate.

A *score* is by how much a backend's log-probability of an emitted id differs from that of the scorer, teacher-forced,
over 1 - p, p being the scorer's own probability: differences shrink with the uncertainty, and what is left has about
one size (the idea of Token-DiFR, arXiv 2511.20621, with the log-probability in place of the margin of the draw). Where
the id was chosen greedily, a margin by which the scorer would have preferred another id counts as a difference too.

No law of the scores is assumed. Each new score is ranked among all earlier ones of its *kind* (its place in the text,
its p), those of the certificate first: r of n + 1 are larger, ties broken at random, p-value r / (n + 1). Where scores
of a kind are exchangeable, these p-values are independent and uniform (Vovk, Gammerman, Shafer, Algorithmic Learning
in a Random World, 2005, section 2 and 4.6). The bets e p^(e - 1) then never grow on average, whatever traffic is asked:
a shift from one kind to another changes nothing. With equal parts of the money on the bets, and a share
w_j = 1 / (j (j + 1)) put down anew at each reply j, so that good replies before do not use it up,

    M_K = mean over e of sum over j <= K of w_j W_j(e) ... W_K(e)  +  1 / (K + 1)          W_k: wealth of reply k alone

is a nonnegative martingale that starts at 1, and ever reaches 1 / alpha with probability at most alpha (Ville).

What must hold: scores of a kind are exchangeable, those of the certificate's texts and of traffic alike. Ids of one
reply share a prompt and a cache and are not quite that, so the rate is measured too, over whole replies
(`benchmarks.parity`).
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

ALPHA = 1e-3
BETS = (0.5, 0.7, 0.8, 0.9)
"""Exponents e: a small one finds large differences in few ids, one near 1 small ones in many."""
PLACES = (16, 32, 64, 128, 256, 512, 1024)
CERTAINTIES = (0.1, 0.5, 0.9)
SURE = 1e-3
"""1 - p is taken to be at least this: below, what is left is the rounding of p itself."""
MOST = 1 << 14
"""Scores of a kind that are kept to rank others among."""

Kind = tuple[int, int]


@dataclass(frozen=True)
class Score:
    """One id. at: its place in prompt and reply; value: the difference that is ranked, NaN counts as the largest."""

    kind: Kind
    value: float


def score(at: int, served: float, scorer: float, margin: float = 0.0) -> Score:
    """Of one id: the log-probability that was served, and the scorer's; margin: the scorer's best less the id's own."""
    p = math.exp(min(scorer, 0.0))
    kind = sum(at >= place for place in PLACES), sum(p >= step for step in CERTAINTIES)
    value = max(abs(served - scorer), margin) / max(1.0 - p, SURE)
    return Score(kind, math.inf if math.isnan(value) else value)


@dataclass
class Drift:
    """The evidence against one backend. dice: breaks ties. tokens, replies: scored so far."""

    dice: random.Random
    alpha: float = ALPHA
    tokens: int = 0
    replies: int = 0
    _seen: dict[Kind, list[float]] = field(default_factory=dict)
    _wealth: list[float] = field(default_factory=lambda: [-math.inf] * len(BETS))

    def calibrate(self, scores: Iterable[Score]) -> None:
        """Take scores of the certificate: they are ranked among, and no bet is made on them."""
        for one in scores:
            self._seen.setdefault(one.kind, []).append(one.value)
        for values in self._seen.values():
            values.sort()

    def add(self, scores: Sequence[Score]) -> bool:
        """Take the scores of one reply; whether the evidence is enough now."""
        self.replies += 1
        gains = [0.0] * len(BETS)
        for one in scores:
            logarithm = math.log(self._rank(one))
            for number, bet in enumerate(BETS):
                gains[number] += math.log(bet) + (bet - 1) * logarithm
        share = -math.log(self.replies * (self.replies + 1.0))
        self._wealth = [_sum(held, share) + gain for held, gain in zip(self._wealth, gains, strict=True)]
        self.tokens += len(scores)
        return self.evidence >= -math.log(self.alpha)

    def begin_again(self) -> None:
        """Drop the evidence. The scores stay, to be ranked among."""
        self.replies, self._wealth = 0, [-math.inf] * len(BETS)

    @property
    def evidence(self) -> float:
        """ln M."""
        total = -math.inf
        for held in self._wealth:
            total = _sum(total, held)
        return _sum(total - math.log(len(BETS)), -math.log(self.replies + 1.0))

    def _rank(self, one: Score) -> float:
        """The p-value in (0, 1] among all of its kind, which it joins."""
        seen = self._seen.setdefault(one.kind, [])
        low, high = bisect_left(seen, one.value), bisect_right(seen, one.value)
        larger, equal = len(seen) - high, high - low + 1
        p = (larger + equal * (1.0 - self.dice.random())) / (len(seen) + 1)
        if len(seen) < MOST:
            insort(seen, one.value)
        return p


def _sum(a: float, b: float) -> float:
    """log(exp(a) + exp(b))."""
    high, low = max(a, b), min(a, b)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))
