"""The fit behind `ottava calibrate`: one hierarchical model of all published runs, by maximum a posteriori.

log(actual speed) = log(speed of steptime with the constants and the family's efficiency) + SKU + site + noise. Every
unknown has a Gaussian prior: constants around what steptime.Terms says, families around each other, SKUs and sites (a
cluster or a publication) around 0. So a family with many runs speaks for itself, and one with few is drawn to the rest
(shrinkage). The variances of families, SKUs, sites and noise maximise the marginal likelihood of the linearised model
(empirical Bayes; Robbins 1956, Laird and Ware 1982), so that nothing is set by hand. What is not known of a new SKU or
site widens its interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

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

LEVELS = ("family", "sku", "site")
FIRST = {"family": 0.15, "sku": 0.08, "site": 0.1, "noise": 0.12}
LEAST, MOST = 0.02, 0.4
ROUNDS, STEPS = 4, 5


@dataclass(frozen=True)
class Run:
    """One published run as the fit sees it. speed: logarithm of tokens/s and chip at constants, a function of them."""

    id: str
    family: str
    sku: str
    site: str
    actual: float
    speed: Any


@dataclass(frozen=True)
class Fit:
    """What was learnt. names: of the unknowns; mean and covariance: of their posterior (constants as logarithms of their
    ratio to the prior's middle); sigma: by level, and of the noise."""

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
    names = NAMES + tuple(f"{level} {who}" for level in LEVELS for who in sorted({getattr(run, level) for run in runs}))
    sigma, mean = dict(FIRST), np.zeros(len(names))
    for _ in range(ROUNDS):
        for _ in range(STEPS):
            gradient, residual = _linear(runs, names, mean)
            mean, covariance = _solve(gradient, residual + gradient @ mean, _prior(names, sigma), sigma["noise"])
        sigma = _variances(gradient, residual + gradient @ mean, names, sigma)
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
    for level in ("sku", "site"):
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


def _solve(gradient: Array, target: Array, prior: Array, noise: float) -> tuple[Array, Array]:
    """Posterior mean and covariance of a linear Gaussian model with prior N(0, prior^2)."""
    covariance = np.linalg.inv(gradient.T @ gradient / noise**2 + np.diag(1 / prior**2))
    return covariance @ gradient.T @ target / noise**2, covariance


def _variances(gradient: Array, target: Array, names: tuple[str, ...], sigma: dict[str, float]) -> dict[str, float]:
    """The variances of levels and noise that make the runs most likely, one after the other over a grid of ratios."""
    found = dict(sigma)
    for key in (*LEVELS, "noise"):
        grid = {value for ratio in np.linspace(-0.5, 0.5, 11) if (value := _held(found[key] * math.exp(ratio)))}
        found[key] = max(sorted(grid), key=lambda value: _evidence(gradient, target, names, found | {key: value}))
    return found


def _held(value: float) -> float:
    return float(min(MOST, max(LEAST, value)))


def _evidence(gradient: Array, target: Array, names: tuple[str, ...], sigma: dict[str, float]) -> float:
    """log marginal likelihood, with a weak prior that holds the sigmas near FIRST (half-normal would let them vanish)."""
    prior = _prior(names, sigma)
    covariance = (gradient * prior**2) @ gradient.T + np.eye(len(target)) * sigma["noise"] ** 2
    _, log = np.linalg.slogdet(covariance)
    weak = sum((math.log(sigma[key] / FIRST[key]) / 0.7) ** 2 for key in FIRST)
    return float(-0.5 * (log + target @ np.linalg.solve(covariance, target) + weak))


def predictive(run: Run, fitted: Fit) -> tuple[float, float]:
    """Mean and sigma of log speed of a run that was not among those of the fit."""
    value, gradient = gradient_of(run, fitted.names, fitted.mean)
    variance = float(gradient @ fitted.covariance @ gradient) + fitted.sigma["noise"] ** 2
    for level in ("sku", "site"):
        if f"{level} {getattr(run, level)}" not in fitted.names:
            variance += fitted.sigma[level] ** 2
    if f"family {run.family}" not in fitted.names:
        variance += (fitted.sigma["family"] * gradient[NAMES.index("efficiency")]) ** 2
    return value, math.sqrt(variance)
