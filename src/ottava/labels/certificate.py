"""How wrong may the labels be? An upper bound from a weighted audit, valid however often one looks.

Items are drawn without replacement, the next one always with probability r_i / (sum of r over those not drawn): labels
that are believed to be risky are drawn more often. With z_i = 1 if item i's label is refuted, N items, S the refuted
ones drawn so far and q the probability of the draw, y = z / (N q) has the mean m - S / N, if m is the share of refuted
labels among all. One bets that it is lower (Waudby-Smith, Ramdas, NeurIPS 2020, arXiv 2006.04347, for draws without
replacement; Shekhar et al., arXiv 2305.06884, for weights):

    wealth(m) = mean over b of the product over draws of  1 + b (m - S / N - y) / y_max
    y_max = (sum of r left) / (N r_min)

For the true m every bet is a nonnegative martingale from 1 (y is at most y_max, b < 1), so wealth ever reaches 1 /
alpha with probability at most alpha (Ville). Every m whose wealth has reached it is too large; wealth grows with m, so
the bound is where it is reached, and the least bound so far holds too. `verify.sequential` bets on alike, unweighted
examples of an endless population; here labels are drawn with weights from a finite one: once all are drawn, the bound
is the share itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ottava.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

BETS = (0.9, 0.6, 0.4, 0.25, 0.12)
MOST_WEIGHT = 2.5
"""How much rarer than an average label the safest may be drawn: rarer, and one wrong label there would weigh too
much."""


def weights(risks: Floats) -> Floats:
    """Sampling weights from the believed probability of error, [items]: its root, with a floor.

    Where they are right the variance is smallest for the root; the bound holds for any weights above 0.
    """
    root = np.sqrt(np.maximum(risks, 0) + 2e-3)
    root /= root.mean()
    return np.clip(root, 1 / MOST_WEIGHT, 6.0)


def order(weights: Floats, rng: np.random.Generator) -> Ints:
    """All items in the order in which they are drawn (Efraimidis, Spirakis, Inf. Process. Lett. 97 (2006) 181)."""
    return np.argsort(rng.exponential(size=len(weights)) / weights, kind="stable")


@dataclass
class Bound:
    """The bound on the share of refuted labels. weights: [items], above 0; alpha: the chance that it is ever too low.

    Draws must come in the order that `order` gives; each verdict is told once.
    """

    weights: Floats
    alpha: float
    _least: float = 1.0
    _left: float = 0.0
    _seen: float = 0.0
    _y: list[float] = field(default_factory=list)
    _top: list[float] = field(default_factory=list)
    _share: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not (len(self.weights) and np.all(np.isfinite(self.weights)) and np.all(self.weights > 0)):
            raise DataError("an audit draws from at least one item, each with a weight above 0")
        if not 0 < self.alpha < 1:
            raise DataError(f"alpha is a probability between 0 and 1: {self.alpha}")
        self._left, self._lowest = float(self.weights.sum()), float(self.weights.min())

    def tell(self, item: int, refuted: float) -> None:
        """The next item drawn, and how far a panel refutes its label: 0 to 1."""
        count, r = len(self.weights), float(self.weights[item])
        self._y.append(float(refuted) * self._left / (count * r))
        self._top.append(max(self._left / (count * self._lowest), 1e-12))
        self._share.append(self._seen / count)
        self._left = max(self._left - r, 0.0)
        self._seen += float(refuted)

    @property
    def drawn(self) -> int:
        return len(self._y)

    def upper(self) -> float:
        """No larger share is refuted, with probability 1 - alpha for all times at once."""
        count = len(self.weights)
        if self.drawn == count:
            self._least = min(self._least, self._seen / count)
        if self.drawn:
            low, high = self._seen / count, self._least
            y, top, share = (np.asarray(values) for values in (self._y, self._top, self._share))
            aim = -math.log(self.alpha)
            while high - low > 1e-5:
                middle = (low + high) / 2
                if self._wealth(middle, y, top, share) >= aim:
                    high = middle
                else:
                    low = middle
            self._least = min(self._least, high)
        return self._least

    def rest(self) -> float:
        """The same of what was not drawn: no more labels, as a share of all, would be refuted among them."""
        return max(self.upper() - self._seen / len(self.weights), 0.0)

    def wealth(self, share: float) -> float:
        """The logarithm of the wealth against `share`; infinite where it is below what has been seen."""
        return self._wealth(share, *(np.asarray(values) for values in (self._y, self._top, self._share)))

    def _wealth(self, m: float, y: Floats, top: Floats, share: Floats) -> float:
        gain = (m - share - y) / top
        logs = [float(np.log1p(bet * np.maximum(gain, -1.0)).sum()) for bet in BETS]
        return float(np.logaddexp.reduce(logs)) - math.log(len(BETS))


def likely_most(mean: float, alpha: float) -> int:
    """Of errors that are `mean` on average, independent of one another, there are more with a probability of at most
    alpha (Poisson, which is wider than the sum of coins that it stands for)."""
    most, at_most = 0, math.exp(-mean)
    term = at_most
    while at_most < 1 - alpha and most < 2 * mean + 20:  # beyond that, rounding
        most += 1
        term *= mean / most
        at_most += term
    return most


def draws_needed(rate: float, target: float, alpha: float, spread: float = 1.3) -> float:
    """A forecast: audited items until the bound falls to `target` where a share `rate` is refuted; infinite if never.

    The information of a draw is that of a coin (Kullback-Leibler); `spread` is what mixing bets and weights costs.
    """
    rate = max(rate, 1e-6)
    if not rate < target < 1:
        return math.inf
    gain = rate * math.log(rate / target) + (1 - rate) * math.log((1 - rate) / (1 - target))
    return spread * -math.log(alpha) / gain
