"""Will the run get through? From the failures that were seen, as long as nothing better is known.

Failures are taken for a Poisson process over worker hours. What was seen in a soak of minutes says little about days:
the interval says how little, and `completes` carries it on to the answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

LEVEL = 0.8  # of every interval here


@dataclass(frozen=True)
class Rate:
    """Failures per second of one worker. low, high: the exact 80% interval for a Poisson count (Garwood, Biometrika 28
    (1936) 437); failures, exposure_s: what was seen, in seconds of workers."""

    failures: int
    exposure_s: float
    low: float
    high: float

    @property
    def per_worker_hour(self) -> dict[str, float]:
        """The estimate and its interval, per hour of one worker."""
        shown = {"estimate": self.failures / self.exposure_s, "low": self.low, "high": self.high}
        return {name: 3600 * value for name, value in shown.items()}


def rate(failures: int, exposure_s: float) -> Rate:
    """The failure rate after so many failures in so many worker seconds (> 0)."""
    from scipy.stats import chi2

    outside = (1 - LEVEL) / 2
    low = chi2.ppf(outside, 2 * failures) / 2 if failures else 0.0
    return Rate(
        failures, exposure_s, float(low) / exposure_s, float(chi2.ppf(1 - outside, 2 * failures + 2)) / 2 / exposure_s
    )


@dataclass(frozen=True)
class Run:
    """A planned run. work_s: without faults and checkpoints; checkpoint_s: one costs, every interval_s of work;
    restart_s: from a failure to the next step; restarts: how many the supervisor makes; deadline_s: None: none."""

    work_s: float
    workers: int
    checkpoint_s: float = 0.0
    interval_s: float = math.inf
    restart_s: float = 10.0
    restarts: int = 2
    deadline_s: float | None = None

    @property
    def fault_free_s(self) -> float:
        """Seconds that it takes when nothing fails."""
        return self.work_s * (1 + self.checkpoint_s / self.interval_s)

    @property
    def loss_s(self) -> float:
        """What a failure costs on average: a restart, and half of what lies between two states (Young, 1974)."""
        return self.restart_s + min(self.interval_s, self.work_s) / 2


def allowed(run: Run) -> int:
    """How many failures the run survives: no more than its restarts, nor than fit before the deadline; -1: not even
    none fits."""
    if run.deadline_s is None:
        return run.restarts
    return min(run.restarts, math.floor((run.deadline_s - run.fault_free_s) / run.loss_s))


def completes(run: Run, found: Rate) -> dict[str, Any]:
    """The probability that the run completes: that no more failures come than it survives.

    estimate: over all rates, weighed by what was seen (Jeffreys' prior, Gamma(1/2, 0): a negative binomial count);
    low, high: at the ends of the rate's interval. A failure lengthens the run, and in that time others may come: the
    exposure is that of the run with all the failures that it survives.
    """
    from scipy.stats import nbinom, poisson

    most = allowed(run)
    exposure = run.workers * (run.fault_free_s + max(0, most) * run.loss_s)
    if most < 0:
        return {"estimate": 0.0, "low": 0.0, "high": 0.0, "survives": 0, "exposure_s": exposure}
    seen = found.exposure_s
    return {
        "estimate": float(nbinom.cdf(most, found.failures + 0.5, seen / (seen + exposure))),
        "low": float(poisson.cdf(most, found.high * exposure)),
        "high": float(poisson.cdf(most, found.low * exposure)),
        "survives": most,
        "exposure_s": exposure,
    }
