"""An accuracy without its interval says little, and a difference without one nothing. All intervals are of 95%."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ottava.errors import DataError

_Z95 = 1.959963984540054  # the 97.5% point of the normal distribution


def wilson(correct: int, n: int) -> tuple[float, float]:
    """The 95% interval of a share of `correct` in `n`; (0, 1) where n is 0.

    Source: E. B. Wilson, J. Am. Stat. Assoc. 22 (1927) 209; the score interval, without continuity correction.
    """
    assert 0 <= correct <= n, (correct, n)
    if n == 0:
        return 0.0, 1.0
    return _wilson(correct / n, n)


def _wilson(share: float, n: float) -> tuple[float, float]:
    z2 = _Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    low = 0.0 if share == 0 else centre - half
    high = 1.0 if share == 1 else centre + half
    return low, high


def mean_interval(values: Sequence[float], each: float = 1.0) -> tuple[float, float]:
    """The 95% interval of the mean of values in [0, 1], one a problem; each: answers that a value was made from.

    Answers to one problem are alike, so that n x each of them say less than as many problems would. Wilson's interval
    of so many independent answers as have the values' own standard error: at least n (all 0 or all 1), at most
    n x each. Of values 0 and 1 it is `wilson`. (0, 1) where there is no value. Sources: E. Miller, arXiv 2411.00640
    (errors clustered by question); L. Kish, Survey Sampling, 1965 (the effective size of a sample).
    """
    assert each >= 1, each
    n = len(values)
    if n == 0:
        return 0.0, 1.0
    assert all(0 <= value <= 1 for value in values), values
    share = math.fsum(values) / n
    spread = math.fsum((value - share) ** 2 for value in values) / n
    within = share * (1 - share)
    size = float(n) if within <= 0 else n * min(each, within / spread if spread > 0 else math.inf)
    return _wilson(share, size)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The chance that at least one of k answers is right, without bias, from n answers of which `correct` were.

    1 - C(n - c, k) / C(n, k), exact in integers until the last division. Source: M. Chen et al., arXiv 2107.03374,
    eq. 1. With n = k it is 0 or 1 and says nothing of its own spread: take n >= 2k. Raises DataError where n < k.
    """
    assert 0 <= correct <= n, (correct, n)
    if not 1 <= k <= n:
        raise DataError(
            f"pass@{k} cannot be had from {n} answers to a problem", fix=f"take {k} or more, {2 * k} is good"
        )
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def mcnemar(gained: int, lost: int) -> float:
    """The two-sided p of "as many were gained as lost", exact: the binomial test of the pairs that differ.

    gained: wrong before and right after; lost: the reverse. Source: Q. McNemar, Psychometrika 12 (1947) 153.
    """
    assert gained >= 0, gained
    assert lost >= 0, lost
    n = gained + lost
    tail = term = 1
    for i in range(min(gained, lost)):
        term = term * (n - i) // (i + 1)  # C(n, i + 1)
        tail += term
    return min(1.0, 2 * tail / (1 << n))


def paired_interval(gained: int, lost: int, n: int) -> tuple[float, float]:
    """The 95% interval of (gained - lost) / n, the change of a share on the same n problems; (-1, 1) where n is 0.

    The score interval: all differences d that a test does not reject. Unlike the normal one it is right where nothing
    or little was lost. Source: T. Tango, Statistics in Medicine 17 (1998) 891, eq. 13 to 18.
    """
    assert gained >= 0, gained
    assert lost >= 0, lost
    assert gained + lost <= n, (gained, lost, n)
    if n == 0:
        return -1.0, 1.0
    estimate = (gained - lost) / n
    return (
        _root(gained, lost, n, _Z95, -1.0, estimate),
        _root(gained, lost, n, -_Z95, estimate, 1.0),
    )


def _root(gained: int, lost: int, n: int, z: float, low: float, high: float) -> float:
    """Where the score falls to z, by bisection: it falls from one end to the other."""
    for _ in range(100):
        middle = (low + high) / 2
        if _score(gained, lost, n, middle) > z:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _score(gained: int, lost: int, n: int, d: float) -> float:
    """How many standard errors the observed difference lies above d, where d is the true one."""
    a, b, c = 2 * n, -gained - lost + (2 * n - gained + lost) * d, -lost * d * (1 - d)
    share = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)  # of the lost, most likely given d
    variance = n * (2 * share + d * (1 - d))
    distance = gained - lost - n * d
    if variance <= 0:
        return 0.0 if distance == 0 else math.copysign(math.inf, distance)
    return distance / math.sqrt(variance)


@dataclass(frozen=True, slots=True)
class Paired:
    """Two models on the same n problems. difference: after - before, with its 95% interval; p: McNemar's, exact."""

    n: int
    before: int
    after: int
    gained: int
    lost: int
    difference: float
    low: float
    high: float
    p: float


def paired(before: Sequence[bool], after: Sequence[bool]) -> Paired:
    """Compare two models problem by problem. Raises DataError where there is none, or unequally many."""
    if len(before) != len(after) or not before:
        raise DataError(
            f"{len(before)} answers before and {len(after)} after cannot be paired",
            fix="evaluate both on the same problems",
        )
    n = len(before)
    gained = sum(bool(b) and not a for a, b in zip(before, after, strict=True))
    lost = sum(bool(a) and not b for a, b in zip(before, after, strict=True))
    low, high = paired_interval(gained, lost, n)
    right = sum(map(bool, before))
    difference = (gained - lost) / n
    return Paired(n, right, right + gained - lost, gained, lost, difference, low, high, mcnemar(gained, lost))


def t_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """The interval of the mean of independent values (seeds, say), by Student's t; of 95% where nothing else is said.

    Raises DataError for fewer than two values: one has no spread.
    """
    n = len(values)
    if n < 2:
        raise DataError(f"{n} values have no interval", fix="take two seeds or more")
    if not all(map(math.isfinite, values)):
        raise DataError("a value is not finite: the mean has no interval")
    from scipy.special import stdtrit

    mean = math.fsum(values) / n
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    half = float(stdtrit(n - 1, (1 + confidence) / 2)) * math.sqrt(variance / n)
    return mean - half, mean + half
