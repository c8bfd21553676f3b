"""How wrong may these labels be? A blind random audit, and the bound it supports.

The audit draws traces uniformly without replacement and shows the annotator the question and the
trace, nothing else: no votes, no sources, no other opinion. From the errors found follows an upper
bound of the error rate of the whole set, which the certificate states with how it was come by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ottava.errors import DataError
from ottava.labels.fusion import Label

if TYPE_CHECKING:
    import numpy as np

Annotator = Callable[[str, str], bool]  # (question, trace) -> whether every step is right

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Audit:
    """What an audit found. wrong: ids of the audited problems whose trace was judged wrong."""

    population: int
    audited: int
    wrong: tuple[str, ...]

    @property
    def errors(self) -> int:
        return len(self.wrong)

    @property
    def error_upper_95(self) -> float:
        """With 95% confidence no larger share of the population is wrong."""
        return clopper_pearson_upper(self.errors, self.audited, CONFIDENCE)

    def certificate(self, annotator: str) -> dict[str, Any]:
        """The findings as JSON. annotator: who judged, in words."""
        return {
            "audited": self.audited,
            "errors": self.errors,
            "error_upper_95": round(self.error_upper_95, 6),
            "annotator": annotator,
            "blind": True,
            "sampling": "uniform without replacement over all delivered traces, order shuffled",
            "population": self.population,
            "bound": "Clopper-Pearson, one-sided 95%; exact for draws with replacement, conservative for a finite set",
            "wrong": list(self.wrong),
        }


def clopper_pearson_upper(errors: int, n: int, confidence: float = 0.95) -> float:
    """The error rate at which `errors` or fewer in `n` draws has probability 1 - confidence. 1 where all are wrong.

    One-sided. Source: C. J. Clopper, E. S. Pearson, Biometrika 26 (1934) 404. Found by bisection of the
    exact binomial tail, to about 1e-16, so that no numerical library is needed.
    """
    assert 0 <= errors <= n, (errors, n)
    assert n > 0, "no draws, no bound"
    assert 0 < confidence < 1, confidence
    if errors == n:
        return 1.0
    low, high = errors / n, 1.0
    while low < (middle := (low + high) / 2) < high:
        if _binomial_tail(errors, n, middle) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


def _binomial_tail(k: int, n: int, p: float) -> float:
    """P(X <= k) for X binomial(n, p), 0 < p < 1, summed in logarithms so that large n does not underflow."""
    top = math.lgamma(n + 1)
    logs = (
        top - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * math.log(p) + (n - i) * math.log1p(-p)
        for i in range(k + 1)
    )
    return math.fsum(math.exp(value) for value in logs)


def audit(labels: Sequence[Label], size: int, rng: np.random.Generator, annotator: Annotator) -> Audit:
    """Judge `size` of the labels, or all if they are fewer, drawn uniformly. Raises DataError where there are none."""
    if not labels or size < 1:
        raise DataError(f"there is nothing to audit: {len(labels)} traces, {size} to be judged")
    drawn = [labels[i] for i in rng.choice(len(labels), min(size, len(labels)), replace=False)]
    wrong = tuple(label.problem.id for label in drawn if not annotator(label.problem.question, label.trace))
    return Audit(len(labels), len(drawn), wrong)


def require(findings: Audit, max_error: float) -> None:
    """Raise DataError where the bound is above `max_error`."""
    bound = findings.error_upper_95
    if bound > max_error:
        raise DataError(
            f"{findings.errors} of {findings.audited} audited traces are wrong: at 95% confidence up to "
            f"{bound:.1%} of the {findings.population} may be, and {max_error:.1%} is allowed",
            fix="ask better or more independent teachers, require more of them to agree, or audit a larger sample",
        )
