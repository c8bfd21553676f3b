"""Work, time and money: pure functions from figures to intervals.

Two kinds of time are kept apart. On chips that are here, time is measured speed times work. On chips
that are not, time is an extrapolation from published runs: an interval whose ends come from data,
and only a lower bound for models smaller than any that was published.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

from ottava.planner.chips import Chip, Family

# A speed measured for a moment moves the middle of a budget's estimate by no more than this factor.
MOST_SLOWNESS = 4.0

# Error of time predictions for small models on one node, relative (34 published rows not used for fitting).
SMALL_MODEL_ERROR = 0.36


@dataclass(frozen=True)
class Estimate:
    """An interval. mid and high are None where only a lower bound can be claimed."""

    low: float
    mid: float | None
    high: float | None

    def map(self, function: Callable[[float], float]) -> Estimate:
        """The interval of a rising function of this quantity."""
        mid, high = (None if end is None else function(end) for end in (self.mid, self.high))
        return Estimate(function(self.low), mid, high)

    def __mul__(self, other: Estimate) -> Estimate:
        """The product of two independent positive quantities, end by end: the widest interval."""
        mid = None if self.mid is None or other.mid is None else self.mid * other.mid
        high = None if self.high is None or other.high is None else self.high * other.high
        return Estimate(self.low * other.low, mid, high)

    def json(self) -> dict[str, float | None]:
        """{"low", "mid", "high"} with six significant digits."""
        return {name: None if end is None else float(f"{end:.6g}") for name, end in asdict(self).items()}


def flops_per_token(active_parameters: float, layers: int = 0, attention_width: float = 0, sequence: int = 0) -> float:
    """Training FLOPs per token: 6 N for the weights plus 6 L w s for causal attention.

    active_parameters: those a token passes, with the output head and without the embedding. attention_width: heads
    times the mean of query and value dimensions; sequence: tokens attended over, of which a token sees half. A
    multiply-add counts as 2 FLOPs, forward once and backward twice (arXiv 2204.02311, appendix B, has 6 N + 12 L w s
    with attention over all tokens). Recomputation is not counted.
    """
    return 6 * active_parameters + 6 * layers * attention_width * sequence


def training_flops(active_parameters: float, tokens: float, **attention: int) -> float:
    """FLOPs of a whole training run; keywords as in flops_per_token."""
    return flops_per_token(active_parameters, **attention) * tokens


def measured_seconds(units: float, seconds_per_unit: float, error: float = SMALL_MODEL_ERROR) -> Estimate:
    """Wall seconds of work whose speed was measured here: units times seconds, give or take `error`."""
    seconds = units * seconds_per_unit
    return Estimate(seconds / (1 + error), seconds, seconds * (1 + error))


def ceiling_seconds(budget: float, slowness: float, error: float = SMALL_MODEL_ERROR) -> Estimate:
    """Wall seconds of a stage of which only a budget is known: a ceiling, so nothing is claimed of the low end.

    slowness: of this machine against the one for which the budget was set. mid, by which the schedule goes, follows it
    up to MOST_SLOWNESS; high follows it all the way.
    """
    return Estimate(0.0, budget * min(slowness, MOST_SLOWNESS), budget * slowness * (1 + error))


def reference_seconds(flops: float, active_parameters: float, chip: Chip, family: Family, workers: int) -> Estimate:
    """Wall seconds of training work on chips that are not here: an extrapolation, never a measurement.

    low: at the efficiency of matrix products alone, with nothing lost to links, memory or faults. mid and high: at
    the median and the 10% quantile of whole published runs; None for models outside of the published sizes.
    """
    peak = chip.peak() * workers
    low = flops / (peak * family.matmul_efficiency.value)
    if not family.parameters.low <= active_parameters <= family.parameters.high:
        return Estimate(low, None, None)
    return Estimate(low, flops / (peak * family.utilisation.mid), flops / (peak * family.utilisation.low))


def usd(seconds: Estimate, workers: int, usd_per_worker_hour: Estimate) -> Estimate:
    """What so many workers cost for so long."""
    return seconds.map(lambda s: s / 3600 * workers) * usd_per_worker_hour
