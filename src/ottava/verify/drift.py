"""Is a backend still what it was when it was certified? Asked after every re-scored reply, at a stated error rate.

Two kinds of *scores* compare what a backend said of the emitted ids with what a scorer says, teacher-forced:

    an id      by how much its log-probability differs, over 1 - p, p being the scorer's own probability: differences
               shrink with the uncertainty, and what is left has about one size (the idea of Token-DiFR, arXiv
               2511.20621, with the log-probability in place of the margin of the draw). Where the id was chosen
               greedily, a margin by which the scorer would have preferred another id counts as a difference too
    a piece    of 16 ids in a row: the mean logarithm of the spread, which is the standard deviation of the differences
               of the likeliest ids that both list (up to 20) at one place. One place tells as much by it as several
               ids do, so that a fault below the noise of one id shows; a piece and not an id, because what a text
               makes of the noise is shared by its neighbours

No law of the scores is assumed. Each new score is ranked among all earlier ones of its kind (id or piece, its place in
the text, its p), those of the certificate first: r of n + 1 are larger, ties broken at random, p-value r / (n + 1).
Where scores of a kind are exchangeable, these p-values are independent and uniform (Vovk, Gammerman, Shafer,
Algorithmic Learning in a Random World, 2005, section 2 and 4.6). The bets e p^(e - 1) then never grow on average,
whatever traffic is asked: a shift from one kind to another changes nothing. With equal parts of the money on ids and
pieces and on the bets, and a share w_j = 1 / (j (j + 1)) put down anew at each reply j, so that good replies before do
not use it up,

    M_K = mean over e of sum over j <= K of w_j W_j(e) ... W_K(e)  +  1 / (K + 1)          W_k: wealth of reply k alone

is a nonnegative martingale that starts at 1, and ever reaches 1 / alpha with probability at most alpha (Ville).

What must hold: scores of a kind are exchangeable, those of the certificate's texts and of traffic alike. Ids of one
reply share a prompt and a cache and are not quite that, and some traffic is harder than the certificate's texts. So an
alarm is only a reason to look: the same test is made of the *ratios* of the backend's scores to those that a control
has on the very same texts, in which what the text does cancels (`against`). Both rates are measured over whole replies
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

ALTERNATIVES = 20
"""Likeliest ids that are asked for at each place: as many as an API gives."""
PIECE = 16
"""Ids of a piece; what is left at the end of a reply is one if it is half as long."""
LEAST = 1e-6
"""A difference is taken to be at least this where its logarithm is taken."""

FAMILIES = ("id", "piece")
Kind = tuple[str, int, int]
"""A family, the place in the text, and of an id how sure the scorer was."""


@dataclass(frozen=True)
class Score:
    """value: the difference that is ranked, of an id, or its logarithm, of a piece; NaN counts as the largest."""

    kind: Kind
    value: float


@dataclass(frozen=True)
class Seen:
    """An id that was served. at: its place in prompt and reply; served, scorer: its log-probability; margin: the
    scorer's best less the id's own; others: (id, served, scorer) of the likeliest ids that both list."""

    at: int
    served: float
    scorer: float
    margin: float = 0.0
    others: tuple[tuple[int, float, float], ...] = ()


def shared(
    served: Sequence[tuple[int, float]], scorer: Sequence[tuple[int, float]]
) -> tuple[tuple[int, float, float], ...]:
    """The `others` of an id, of what either lists."""
    theirs = dict(scorer)
    return tuple((other, value, theirs[other]) for other, value in served if other in theirs)


def scores(seen: Sequence[Seen]) -> list[Score]:
    """The scores of a reply's ids, in their order, and of its pieces."""
    found = [_of_id(one) for one in seen]
    for first in range(0, len(seen), PIECE):
        logs = [_logarithm(_spread(one)) for one in seen[first : first + PIECE] if len(one.others) > 1]
        if len(logs) >= PIECE // 2:
            place = sum(seen[first].at >= step for step in PLACES)
            found.append(Score(("piece", place, 0), _number(math.fsum(logs) / len(logs))))
    return found


def against(mine: Sequence[Score], control: Sequence[Score]) -> list[Score]:
    """The logarithms of the ratios of two lists of `scores` of the same replies."""
    found = []
    for one, other in zip(mine, control, strict=True):
        a, b = (s.value if s.kind[0] == "piece" else _logarithm(s.value) for s in (one, other))
        found.append(Score(one.kind, _number(a - b)))
    return found


def _of_id(one: Seen) -> Score:
    p = math.exp(min(one.scorer, 0.0))
    kind = "id", sum(one.at >= place for place in PLACES), sum(p >= step for step in CERTAINTIES)
    return Score(kind, _number(max(abs(one.served - one.scorer), one.margin) / max(1.0 - p, SURE)))


def _spread(one: Seen) -> float:
    differences = [served - scorer for _, served, scorer in one.others]
    centre = math.fsum(differences) / len(differences)
    return math.sqrt(math.fsum((d - centre) ** 2 for d in differences) / len(differences))


def _logarithm(value: float) -> float:
    return math.log(value) if value > LEAST else math.nan if math.isnan(value) else math.log(LEAST)


def _number(value: float) -> float:
    return math.inf if math.isnan(value) else value


@dataclass
class Drift:
    """The evidence against one backend. dice: breaks ties. tokens, replies: scored so far."""

    dice: random.Random
    alpha: float = ALPHA
    tokens: int = 0
    replies: int = 0
    _seen: dict[Kind, list[float]] = field(default_factory=dict)
    _wealth: list[float] = field(default_factory=lambda: [-math.inf] * (len(FAMILIES) * len(BETS)))

    def calibrate(self, scores: Iterable[Score]) -> None:
        """Take scores of the certificate: they are ranked among, and no bet is made on them."""
        for one in scores:
            self._seen.setdefault(one.kind, []).append(one.value)
        for values in self._seen.values():
            values.sort()

    def add(self, scores: Sequence[Score]) -> bool:
        """Take the scores of one reply; whether the evidence is enough now."""
        self.replies += 1
        gains = [0.0] * len(self._wealth)
        for one in scores:
            logarithm, first = math.log(self._rank(one)), FAMILIES.index(one.kind[0]) * len(BETS)
            for number, bet in enumerate(BETS, first):
                gains[number] += math.log(bet) + (bet - 1) * logarithm
        share = -math.log(self.replies * (self.replies + 1.0))
        self._wealth = [_sum(held, share) + gain for held, gain in zip(self._wealth, gains, strict=True)]
        self.tokens += sum(one.kind[0] == "id" for one in scores)
        return self.evidence >= -math.log(self.alpha)

    def begin_again(self) -> None:
        """Drop the evidence. The scores stay, to be ranked among."""
        self.replies, self._wealth = 0, [-math.inf] * len(self._wealth)

    @property
    def evidence(self) -> float:
        """ln M."""
        total = -math.inf
        for held in self._wealth:
            total = _sum(total, held)
        return _sum(total - math.log(len(self._wealth)), -math.log(self.replies + 1.0))

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
