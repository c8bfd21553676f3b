"""Do people mean the same by the same question? Krippendorff's alpha: 1 is perfect, 0 is what chance gives.

alpha = 1 - observed / expected disagreement, over all pairs of votes on one item (Krippendorff, Content Analysis, 4th
ed. 2018, ch. 12). Items may have any number of votes; those with one have no pair and do not count. What a pair of
different labels counts is the metric's: `nominal` 1, `interval` the square of their distance, `ordinal` the square of
how many votes lie between them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import numpy as np

from ottava.errors import DataError
from ottava.labels.people import Votes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

Metric = Literal["nominal", "ordinal", "interval"]


def alpha(votes: Votes, items: int, classes: int, metric: Metric = "nominal", values: Floats | None = None) -> float:
    """Krippendorff's alpha of the votes; NaN where nothing can disagree: no item has two votes, or all labels are one.

    values: [classes], what each class measures, for `interval`; by default its place. Raises DataError.
    """
    if values is not None and (values.shape != (classes,) or not np.isfinite(values).all()):
        raise DataError(f"the interval metric needs a finite value for each of the {classes} classes")
    said = np.bincount(votes.items * classes + votes.labels, minlength=items * classes)
    table = said.reshape(items, classes).astype(np.float64)
    each = table.sum(1)
    table, each = table[each >= 2], each[each >= 2]
    totals = table.sum(0)
    share = table / (each - 1)[:, None]
    pairs = share.T @ table - np.diag(share.sum(0))  # [classes, classes]: coincidences
    apart = _apart(metric, totals, np.arange(classes, dtype=np.float64) if values is None else values)
    expected = float((np.outer(totals, totals) * apart).sum()) / max(totals.sum() - 1, 1.0)
    return 1 - float((pairs * apart).sum()) / expected if expected > 0 else math.nan


def _apart(metric: Metric, totals: Floats, values: Floats) -> Floats:
    """How far labels are from each other, [classes, classes]."""
    if metric == "nominal":
        return 1 - np.eye(len(totals))
    if metric == "interval":
        return np.square(values[:, None] - values)
    if metric == "ordinal":
        middle = np.cumsum(totals) - totals / 2  # votes from c to k, of c and k themselves a half
        return np.square(middle[:, None] - middle)
    raise DataError(f"no metric {metric!r}: nominal, ordinal or interval")
