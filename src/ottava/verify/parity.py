"""Does a backend compute what the reference computes? Prompts and log-probabilities in, a verdict out.

Two backends that claim the same numerics (`Engine.numerics`) owe each other the same bits, as long as the reference
itself gives the same bits alone and in company: then every log-probability is compared for equality. All others are
held against a noise floor: what the same values give when another implementation computes them in the same precision
(`verify.control`). Its difference from the reference holds the rounding of both sides, as the backend's own does; the
reference's bfloat16 against its own float32 would hold one side's alone, and a sound engine would fail. With d a
difference of log-probabilities, teacher-forced on replies that the reference said,

    R = mean |d of the backend| / mean |d of the control|

over the same positions. A backend passes where the upper 99% bound of R (bootstrap over texts, as positions of one
text are not independent) and the ratio of the two 99th percentiles are below 1.5, in every band of positions apart.
Signs are never averaged: they cancel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

LIMIT = 1.5
LEVEL = 0.99
DRAWS = 2000
ENOUGH = 4
"""Replies that must reach into a band for it to be tested apart; fewer count in the whole alone."""
BANDS: tuple[tuple[str, int, int | None], ...] = (("first", 0, 16), ("middle", 16, 64), ("late", 64, None))
"""Names, first and last place in the reply: a fault of positions or of the cache may show in one alone."""

Scores = Sequence[Sequence[float]]
"""Log-probabilities [texts][ids of the reply], each given all ids before it."""
Prompts = Mapping[str, Sequence[int] | None]
"""Ids of each case's prompt; None where the template refuses it."""


@dataclass(frozen=True)
class Finding:
    """The outcome of one comparison. why: what differs, in a line; None: nothing. bands: numbers by band."""

    test: Literal["bits", "noise"]
    why: str | None
    bands: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def prompts_differ(reference: Prompts, other: Prompts) -> str | None:
    """What the first prompt that differs differs in; None where all are equal."""
    for case, wanted in reference.items():
        found = other.get(case)
        if found is None and wanted is None:
            continue
        if found is None or wanted is None:
            refuses, renders = ("it", "the reference") if found is None else ("the reference", "it")
            return f"the prompt of {case}: {refuses} refuses what {renders} renders"
        if list(found) != list(wanted):
            pairs = zip(wanted, found, strict=False)
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(wanted), len(found)))
            return (
                f"the prompt of {case} differs from id {at} on: {_some(found, at)}, the reference {_some(wanted, at)}"
            )
    return None


def same_bits(reference: Scores, other: Scores) -> Finding:
    """Whether every log-probability is the reference's own."""
    if (wrong := _shapes(reference, other)) is not None:
        return Finding("bits", wrong)
    bands = {}
    for name, first, last in BANDS:
        pairs = [
            pair
            for a, b in zip(reference, other, strict=True)
            for pair in zip(a[first:last], b[first:last], strict=True)
        ]
        apart = [abs(a - b) for a, b in pairs if a != b]  # also where one is no number
        bands[name] = {
            "tokens": len(pairs), "differ": len(apart), "mean": math.fsum(apart) / len(pairs) if pairs else 0.0,
        }  # fmt: skip
    wrong = ", ".join(
        f"{name} {band['differ']} of {band['tokens']} by {band['mean']:.2g} on average"
        for name, band in bands.items()
        if band["differ"]
    )
    return Finding("bits", f"its log-probabilities are not the reference's bits: {wrong}" if wrong else None, bands)


def within_noise(reference: Scores, other: Scores, control: Scores) -> Finding:
    """Whether a backend is as near to the reference as the control is. The bootstrap has a fixed seed."""
    if (wrong := _shapes(reference, other) or _shapes(reference, control)) is not None:
        return Finding("noise", wrong)
    mine, floor = _apart(reference, other), _apart(reference, control)
    bands: dict[str, dict[str, float]] = {}
    for name, first, last in (("all", 0, None), *BANDS):
        a, b = ([row[first:last] for row in rows if len(row) > first] for rows in (mine, floor))
        if len(a) >= min(ENOUGH, len(mine)):
            bands[name] = _ratio(a, b)
    wrong = ", ".join(
        f"{name} {band['ratio']:.3g} (99% bound {band['upper']:.3g}, 99th percentiles {band['p99']:.3g})"
        for name, band in bands.items()
        if not (band["upper"] < LIMIT and band["p99"] < LIMIT)  # so that NaN fails
    )
    said = f"its log-probabilities are further from the reference than {LIMIT} times the noise floor: {wrong}"
    return Finding("noise", said if wrong else None, bands)


def _ratio(mine: Sequence[NDArray[np.float64]], floor: Sequence[NDArray[np.float64]]) -> dict[str, float]:
    sums, floors = (np.array([row.sum() for row in rows]) for rows in (mine, floor))
    chosen = np.random.default_rng(0).integers(0, len(sums), (DRAWS, len(sums)))
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = sums[chosen].sum(1) / floors[chosen].sum(1)
        ratio = sums.sum() / floors.sum()
        tails = [np.quantile(np.concatenate(rows), LEVEL) for rows in (mine, floor)]
        p99 = tails[0] / tails[1]
    tokens = sum(map(len, mine))
    return {
        "tokens": tokens,
        "mean": float(sums.sum()) / tokens,
        "floor": float(floors.sum()) / tokens,
        "ratio": float(ratio),
        "upper": float(np.quantile(drawn, LEVEL)) if np.isfinite(drawn).all() else math.nan,
        "p99": float(p99),
    }


def _apart(reference: Scores, other: Scores) -> list[NDArray[np.float64]]:
    return [np.abs(np.asarray(a, float) - np.asarray(b, float)) for a, b in zip(reference, other, strict=True)]


def _shapes(reference: Scores, other: Scores) -> str | None:
    wanted, found = ([len(row) for row in rows] for rows in (reference, other))
    return None if wanted == found else f"it scored {sum(found)} ids where there are {sum(wanted)}"


def _some(ids: Sequence[int], at: int) -> str:
    return " ".join(map(str, ids[at : at + 4])) or "ends"


def plain(finding: Finding) -> dict[str, Any]:
    """A finding for JSON: what is no number becomes null."""
    bands = {
        name: {key: value if math.isfinite(value) else None for key, value in band.items()}
        for name, band in finding.bands.items()
    }
    return {"test": finding.test, "passed": finding.why is None, "why": finding.why, "positions": bands}
