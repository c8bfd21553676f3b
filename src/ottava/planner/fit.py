"""The fit behind `ottava calibrate`: one hierarchical model of all published runs, by maximum a posteriori.

log(actual speed) = log(speed of steptime with the constants and the family's efficiency) + SKU + site + model + noise,
the model only where it has experts. Every unknown has a Gaussian prior: constants around what steptime.Terms says,
families around each other, SKUs, sites (a cluster or a publication) and models around 0. So a family with many runs
speaks for itself, and one with few is drawn to the rest (shrinkage). The variances of these levels and of noise
maximise the marginal likelihood of the linearised model (empirical Bayes; Robbins 1956, Laird and Ware 1982), so that
nothing is set by hand. What is not known of a new SKU, site or model widens its interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ottava.planner.steptime import NAMES, Terms

Array = npt.NDArray[np.float64]

PRIOR = {
    "efficiency": 0.25, "fp8": 0.35, "attention": 0.3, "shape": 0.4, "elementwise": 0.3, "plain_attention": 0.4,
    "links": 0.3, "network": 0.4, "spread": 0.4, "imbalance": 0.5, "overhead": 0.5, "routing": 0.5, "scale": 0.7,
    "run": 0.7,
}  # fmt: skip
"""Sigma of the logarithm of each constant before any run is seen: about how far textbooks and papers lie apart."""

LEVELS = ("family", "sku", "site", "model")
FIRST = {"family": 0.15, "sku": 0.08, "site": 0.1, "model": 0.1, "noise": 0.12, "sparse": 0.1}
LEAST, MOST, WEAK = 0.02, 0.4, 0.7
"""Bounds of a sigma, and how closely (sigma of the logarithm) FIRST holds it: without, few runs could let it vanish."""
ROUNDS, STEPS = 3, 4


@dataclass(frozen=True)
class Run:
    """One published run as the fit sees it. actual: log of its tokens/s and chip; speed: the same from constants;
    model: the name of a model with experts, whose kernels are its own and whose runs scatter more; None of others."""

    id: str
    family: str
    sku: str
    site: str
    model: str | None
    actual: float
    speed: Callable[[Terms], float]

    @property
    def sparse(self) -> bool:
        """Of a model with experts."""
        return self.model is not None


@dataclass(frozen=True)
class Fit:
    """What was learnt. names: of the unknowns; mean and covariance: of their posterior (constants as logarithms of
    their ratio to the prior's middle); sigma: by level, and of the noise."""

    names: tuple[str, ...]
    mean: Array
    covariance: Array
    sigma: dict[str, float]


def terms_of(mean: Array, family: float = 0.0) -> Terms:
    """The constants, with a family's efficiency."""
    first = Terms()
    found = {name: getattr(first, name) * math.exp(mean[i]) for i, name in enumerate(NAMES)}
    return replace(Terms(**found), efficiency=found["efficiency"] * math.exp(family))


def fit(runs: Sequence[Run]) -> Fit:
    """The posterior of all unknowns, by Gauss-Newton; variances by the marginal likelihood, in turn."""
    known = {level: {who for run in runs if (who := getattr(run, level)) is not None} for level in LEVELS}
    names = NAMES + tuple(f"{level} {who}" for level in LEVELS for who in sorted(known[level]))
    sigma, mean = dict(FIRST), np.zeros(len(names))
    for _ in range(ROUNDS):
        for _ in range(STEPS):
            gradient, residual = _linear(runs, names, mean)
            target, noise = residual + gradient @ mean, _noise(runs, sigma)
            mean, covariance = _solve(gradient, target, _prior(names, sigma), noise)
        sigma = _variances(runs, gradient, target, names, sigma)
    return Fit(names, mean, covariance, sigma)


def gradient_of(run: Run, names: tuple[str, ...], mean: Array) -> tuple[float, Array]:
    """log speed of a run at `mean`, and its derivatives by all unknowns; levels that are not among them count as 0."""
    place = {name: i for i, name in enumerate(names)}
    family = place.get(f"family {run.family}")
    shift = 0.0 if family is None else float(mean[family])
    at = run.speed(terms_of(mean, shift))
    gradient, small = np.zeros(len(names)), 1e-4
    for i in range(len(NAMES)):
        moved = mean.copy()
        moved[i] += small
        gradient[i] = (run.speed(terms_of(moved, shift)) - at) / small
    if family is not None:
        gradient[family] = gradient[NAMES.index("efficiency")]
    value = at
    for level in LEVELS[1:]:
        known = place.get(f"{level} {getattr(run, level)}")
        if known is not None:
            gradient[known] = 1.0
            value += float(mean[known])
    return value, gradient


def _linear(runs: Sequence[Run], names: tuple[str, ...], mean: Array) -> tuple[Array, Array]:
    """Derivatives (runs x unknowns) and residuals of log speed."""
    both = [gradient_of(run, names, mean) for run in runs]
    return np.array([g for _, g in both]), np.array([run.actual - v for run, (v, _) in zip(runs, both, strict=True)])


def _prior(names: tuple[str, ...], sigma: dict[str, float]) -> Array:
    """Prior sigma of each unknown."""
    return np.array([PRIOR[name] if name in PRIOR else sigma[name.split()[0]] for name in names])


def _noise(runs: Sequence[Run], sigma: dict[str, float]) -> Array:
    """Sigma of each run's own scatter."""
    return np.array([math.hypot(sigma["noise"], sigma["sparse"] * run.sparse) for run in runs])


def _solve(gradient: Array, target: Array, prior: Array, noise: Array) -> tuple[Array, Array]:
    """Posterior mean and covariance of a linear Gaussian model with prior N(0, prior^2)."""
    weighted = gradient.T / noise**2
    precision: Array = weighted @ gradient + np.diag(1 / prior**2)
    covariance: Array = np.asarray(np.linalg.inv(precision), dtype=np.float64)
    return covariance @ weighted @ target, covariance


def _variances(
    runs: Sequence[Run], gradient: Array, target: Array, names: tuple[str, ...], sigma: dict[str, float]
) -> dict[str, float]:
    """The variances of levels and noise that make the runs most likely, one after the other over a grid of ratios."""

    def evidence(tried: dict[str, float]) -> float:
        covariance = (gradient * _prior(names, tried) ** 2) @ gradient.T + np.diag(_noise(runs, tried) ** 2)
        _, log = np.linalg.slogdet(covariance)
        weak = sum((math.log(tried[key] / FIRST[key]) / WEAK) ** 2 for key in FIRST)
        return float(-0.5 * (log + target @ np.linalg.solve(covariance, target) + weak))

    found = dict(sigma)
    for key in found:
        grid = [min(MOST, max(LEAST, found[key] * math.exp(ratio))) for ratio in np.linspace(-0.5, 0.5, 11)]
        found[key] = max(grid, key=lambda value, key=key: evidence(found | {key: value}))  # type: ignore[misc]
    return found


def predictive(run: Run, fitted: Fit) -> tuple[float, float]:
    """Mean and sigma of log speed of a run that was not among those of the fit."""
    value, gradient = gradient_of(run, fitted.names, fitted.mean)
    variance = float(gradient @ fitted.covariance @ gradient) + _noise([run], fitted.sigma)[0] ** 2
    for level in LEVELS[1:]:
        who = getattr(run, level)
        if who is not None and f"{level} {who}" not in fitted.names:
            variance += fitted.sigma[level] ** 2
    if f"family {run.family}" not in fitted.names:
        variance += (fitted.sigma["family"] * gradient[NAMES.index("efficiency")]) ** 2
    return value, math.sqrt(variance)
