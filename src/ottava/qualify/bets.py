"""Which of several alike is slower than the others? Asked on a machine where everything is now and then slow.

In every round each worker (or link) does the same work, in an order drawn anew, under the same conditions. If all are
alike, their times within a round are exchangeable, whatever else the machine does: the time of one exceeds the lower
median of the others with probability p0 = (L - 1 - k) / L at most, L: how many there are, k: the median's place among
the L - 1 others. So the event "slower than `factor` times that median" is a coin that comes up with p0 at most, and one
bets on it (Waudby-Smith, Ramdas, J. R. Stat. Soc. B 86 (2024) 1; as `verify.sequential` does on losses):

    wealth = mean over b of the product over rounds of (1 + b (x - p0)),   x: 1 if it came up, else 0

If all are alike and rounds do not remember each other, this is a nonnegative supermartingale from 1, so it ever reaches
L / alpha for any of the L with probability at most alpha (Ville), however many rounds are made and whenever one stops.
Rounds do remember each other where a load sits on one core for a while: workers that share cores are therefore all put
on the same one in a round (`measure`), and whoever is suspected is measured again by fresh processes (`gate`).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

SHARES = (0.2, 0.4, 0.6, 0.8, 0.95)  # of the largest bet, 1 / p0: small ones find rare slowness, large ones are fast
LEAST, MOST = 12, 160
"""Rounds: none is cleared earlier; at `MOST`, who is not accused is cleared."""
CLEARED = 0.1  # one who is slow nine rounds in ten has lost that much after 12 in 3 cases of a million


@dataclass
class Bets:
    """One question about `count` units. factor: slower by less is no fault; alpha: of accusing anybody when all are
    alike."""

    count: int
    factor: float
    alpha: float
    rounds: list[tuple[float, ...]] = field(default_factory=list)
    _wealth: list[list[float]] = field(default_factory=list)
    _highest: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._wealth = [[1.0] * len(SHARES) for _ in range(self.count)]
        self._highest = [1.0] * self.count

    @property
    def chance(self) -> float:
        """p0: how often one of many alike exceeds the lower median of the others, at most."""
        return (self.count - 1 - (self.count - 2) // 2) / self.count

    def add(self, seconds: Sequence[float]) -> None:
        """One round: the time of every unit, in the units' order."""
        assert len(seconds) == self.count
        self.rounds.append(tuple(seconds))
        if self.count < 2:
            return
        for unit, own in enumerate(seconds):
            others = statistics.median_low([*seconds[:unit], *seconds[unit + 1 :]])
            gain = (own > self.factor * others) - self.chance
            self._wealth[unit] = [
                w * (1 + b * gain / self.chance) for w, b in zip(self._wealth[unit], SHARES, strict=True)
            ]
            self._highest[unit] = max(self._highest[unit], self.evidence(unit))

    def evidence(self, unit: int) -> float:
        """The wealth against a unit now."""
        return statistics.fmean(self._wealth[unit])

    @property
    def accused(self) -> tuple[int, ...]:
        """The units whose wealth has ever reached count / alpha."""
        return tuple(unit for unit, wealth in enumerate(self._highest) if wealth >= self.count / self.alpha)

    @property
    def done(self) -> bool:
        """Whether every unit is accused or cleared: the bets against it are lost, or there were enough rounds."""
        made = len(self.rounds)
        if made >= MOST or (self.count < 2 and made >= LEAST):
            return True
        return made >= LEAST and all(u in self.accused or self.evidence(u) < CLEARED for u in range(self.count))

    def ratio(self, unit: int) -> float:
        """How many times slower than the others a unit is: the median over rounds, 1.0 where there are no others."""
        if self.count < 2:
            return 1.0
        pairs = [(r[unit], statistics.median_low([*r[:unit], *r[unit + 1 :]])) for r in self.rounds]
        return statistics.median(own / other for own, other in pairs)
