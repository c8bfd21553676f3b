"""`ottava calibrate`: learns from published runs, says how good that is on runs it has not seen, and writes it down.

The measure is cross-validation by source: each site (a cluster, or who published) is left out as a whole, the rest is
fitted anew, variances too, and the runs left out are predicted.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from ottava import document
from ottava.artifact import file_digest, write_json
from ottava.errors import RecipeError
from ottava.planner import chips, fit, layouts, rows, steptime
from ottava.planner.chips import Catalogue
from ottava.planner.rows import Row, site_of
from ottava.planner.steptime import Machine, Terms
from ottava.planner.workload import Workload
from ottava.recipe import Frozen

FILE = "calibration.json"
Z80 = 1.2815515655446004
"""Standard deviations from the middle to the ends of an 80% interval."""

ALONE_CHIPS, ALONE_PARAMETERS, ALONE_SIGMA = 8, 10e9, 0.45
"""Small models on one node scatter more than the runs of the fit: 36% mean error over published rows that were not used
for fitting; a normal logarithm with sigma 0.45 has this mean."""


class Calibration(Frozen):
    """What was learnt: fit.Fit as JSON, the digests of what it was learnt from, and the cross-validation's result.

    covariance: the lower triangle, row by row; sites: names of publications to the site they speak of.
    """

    data_sha256: str
    runs: int
    names: tuple[str, ...]
    mean: tuple[float, ...]
    covariance: tuple[float, ...]
    sigma: dict[str, float]
    sites: dict[str, str]
    accuracy: dict[str, dict[str, float]]

    def fit(self) -> fit.Fit:
        """As the fit left it."""
        size = len(self.names)
        lower = np.zeros((size, size))
        lower[np.tril_indices(size)] = self.covariance
        whole = lower + np.tril(lower, -1).T
        return fit.Fit(self.names, np.array(self.mean), whole, dict(self.sigma))


@dataclass(frozen=True)
class Guess:
    """A run that was left out: its actual speed, the middle and the ends of its interval, and the baseline's word."""

    run: fit.Run
    actual: float
    middle: float
    low: float
    high: float
    baseline: float

    @property
    def error(self) -> float:
        """Relative, signed."""
        return self.middle / self.actual - 1

    @property
    def inside(self) -> bool:
        """Within the 80% interval."""
        return self.low <= self.actual <= self.high


def digest(data: Path, catalogue: Path) -> str:
    """Of the data that a calibration is made from."""
    return file_digest(data)[:32] + file_digest(catalogue)[:32]


def load(path: Path | None = None) -> Calibration:
    """Read a calibration (fleets/calibration.json). Raises RecipeError where it is missing or damaged."""
    path = path or chips.locate(FILE)
    try:
        return Calibration.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else "the file is not one of ottava calibrate"
        raise RecipeError(f"no calibration: {reason}", where=path, fix="make one: ottava calibrate") from None


def prepare(work: Workload, catalogue: Catalogue, actual: float = 1.0) -> tuple[fit.Run, layouts.Found]:
    """A workload as the fit sees it, with its layout. The search uses the constants' priors, in the fit as later in
    predictions, so that both speak of the same layout."""
    chip = catalogue.chip(work.chip)
    machine = Machine.of(chip, work.network_gbps)
    found = layouts.best(work, chip, machine, Terms())

    def speed(terms: Terms) -> float:
        return math.log(steptime.speed(work, found.layout, machine, terms))

    name = None if work.model.experts is None else work.model_name or ""
    return fit.Run(work.id, chip.family, work.chip, work.site or "", name, math.log(actual), speed), found


def usable(known: Iterable[Row]) -> list[tuple[Workload, float]]:
    """The training rows with a target that can be compared with a prediction."""
    return [
        (row.work, row.actual)
        for row in known
        if row.work and row.actual and row.work.kind == "train" and row.about.get("use_for_error", True)
    ]


def interval(run: fit.Run, fitted: fit.Fit, work: Workload) -> tuple[float, float, float]:
    """Median and 80% interval of tokens/s and chip."""
    value, sigma = fit.predictive(run, fitted)
    wide = max(sigma, ALONE_SIGMA) if alone(work) else sigma
    return math.exp(value), math.exp(value - Z80 * wide), math.exp(value + Z80 * wide)


def alone(work: Workload) -> bool:
    """True for small models on one node."""
    return work.chips <= ALONE_CHIPS and work.model.parameters() < ALONE_PARAMETERS


def products(row: rows.Examined, catalogue: Catalogue) -> fit.Run:
    """A measurement of matrix products alone, as the fit sees it: `efficiency` at that SKU and site, no more."""
    assert row.chip is not None
    assert row.matmul_efficiency is not None
    family = catalogue.chip(row.chip).family
    actual = math.log(row.matmul_efficiency)
    return fit.Run(row.id, family, row.chip, row.site, None, actual, lambda terms: math.log(terms.efficiency))


def cross_validate(
    known: Sequence[tuple[Workload, float]],
    catalogue: Catalogue,
    told: Callable[[float], None] = lambda share: None,
    beside: Sequence[fit.Run] = (),
    source: Callable[[str], str] = lambda site: site,
    only: Sequence[str] | None = None,
) -> list[Guess]:
    """Predict every run from the runs of other sources. told: is given the share that is done; beside: what is learnt
    from and not predicted; source: of a site, by default itself; only: these sources are left out, by default all."""
    pairs = [(prepare(work, catalogue, actual)[0], work) for work, actual in known]
    sources = sorted({source(run.site) for run, _ in pairs}) if only is None else only
    found = []
    for number, name in enumerate(sources):
        seen = [(run, work) for run, work in pairs if source(run.site) != name]
        fitted = fit.fit([run for run, _ in seen] + [run for run in beside if source(run.site) != name])
        for run, work in pairs:
            if source(run.site) == name:
                middle, low, high = interval(run, fitted, work)
                rough = _baseline(run, work, seen, catalogue)
                found.append(Guess(run, math.exp(run.actual), middle, low, high, rough))
        told((number + 1) / len(sources))
    return found


def publisher(site: str) -> str:
    """Of a site that is one release of a publisher's table (NAME-25.11): NAME; of others the site itself."""
    return re.sub(r"-\d\d\.\d\d$", "", site)


def strangers(known: Sequence[tuple[Workload, float]], catalogue: Catalogue) -> list[Guess]:
    """Runs of publishers with several releases, predicted without any of that publisher's."""
    sites = {work.site or "" for work, _ in known}
    several = sorted({publisher(site) for site in sites if publisher(site) != site})
    return cross_validate(known, catalogue, source=publisher, only=several)


def _baseline(run: fit.Run, work: Workload, seen: Sequence[tuple[fit.Run, Workload]], catalogue: Catalogue) -> float:
    """Peak over 6 N at the median utilisation of the family's other runs (of all, where it has none)."""

    def ceiling(one: Workload) -> float:
        return catalogue.chip(one.chip).peak() / (6 * one.model.active())

    same = [(other, one) for other, one in seen if other.family == run.family] or seen
    shares = [math.exp(other.actual) / ceiling(one) for other, one in same]
    return float(np.median(shares)) * ceiling(work)


def accuracy(guesses: Sequence[Guess]) -> dict[str, dict[str, float]]:
    """By group (all, dense, experts, families): runs, mape, worst, bias, inside (shares), baseline (its mape)."""
    groups: dict[str, list[Guess]] = {"all": list(guesses)}
    groups["dense"] = [one for one in guesses if not one.run.sparse]
    groups["experts"] = [one for one in guesses if one.run.sparse]
    for one in sorted(guesses, key=lambda guess: guess.run.family):
        groups.setdefault(one.run.family, []).append(one)
    return {name: _figures(group) for name, group in groups.items() if group}


def _figures(group: Sequence[Guess]) -> dict[str, float]:
    errors = [abs(one.error) for one in group]
    rough = [abs(one.baseline / one.actual - 1) for one in group]
    figures = {
        "runs": len(group), "mape": float(np.mean(errors)), "median": float(np.median(errors)), "worst": max(errors),
        "bias": float(np.mean([one.error for one in group])), "inside": float(np.mean([one.inside for one in group])),
        "baseline": float(np.mean(rough)), "ratio": float(np.mean(rough) / np.mean(errors)),
    }  # fmt: skip
    return {name: round(value, 4) for name, value in figures.items()}


def make(
    seen: Sequence[Row],
    catalogue: Catalogue,
    data_sha256: str,
    guesses: Sequence[Guess],
    beside: Sequence[fit.Run] = (),
) -> Calibration:
    """Fit all runs; `guesses` are the cross-validation's, whose figures are kept with it."""
    known = usable(seen)
    fitted = fit.fit([*(prepare(work, catalogue, actual)[0] for work, actual in known), *beside])
    sites = {}
    for row in seen:
        name = site_of(str(row.about.get("source") or ""))
        if row.work is not None and row.work.site and name:
            sites[name] = row.work.site
    lower = fitted.covariance[np.tril_indices(len(fitted.names))]
    return Calibration(
        data_sha256=data_sha256, runs=len(known), names=fitted.names, mean=_short(fitted.mean),
        covariance=_short(lower), sigma={name: round(value, 5) for name, value in fitted.sigma.items()}, sites=sites,
        accuracy=accuracy(guesses),
    )  # fmt: skip


def calibrate_files(
    own: Sequence[Path], catalogue_name: str, out: Path, told: Callable[[float], None] = lambda share: None
) -> tuple[Calibration, list[Guess]]:
    """Calibrate on the published runs and on files of one's own, and write `out`. Raises RecipeError."""
    data, place = rows.published(), chips.locate(catalogue_name)
    catalogue, known = chips.load(place), rows.read(data)
    measured = [one for path in own for one in rows.examined(path)]
    ours = {path: rows.read(path) for path in own}
    known += [row for theirs in ours.values() for row in theirs]
    asked = [(row.work.chip, row.where) for row in known if row.work is not None]
    for chip, where in asked + [(str(one.chip), where) for one, where in measured]:
        if chip not in catalogue.chips:
            fix = document.suggest(chip, catalogue.chips)
            raise RecipeError(f"no figures for a chip {chip!r}", where=where, fix=fix)
    for path, theirs in ours.items():
        _check_speeds(path, theirs, catalogue)
    if not usable(known):
        raise RecipeError("no row is a training run with a speed", where=data, fix="add tokens_per_s_per_chip")
    beside = [products(one, catalogue) for one, _ in measured]
    guesses = cross_validate(usable(known), catalogue, told, beside)
    made = make(known, catalogue, digest(data, place), guesses, beside)
    if unknown := strangers(usable(known), catalogue):
        made = made.model_copy(update={"accuracy": {**made.accuracy, "publisher": _figures(unknown)}})
    write_json(out, made.model_dump(mode="json"))
    return made, guesses


def _check_speeds(path: Path, own: Sequence[Row], catalogue: Catalogue) -> None:
    """Speeds of one's own runs that are none, or that no chip reaches; and files that teach nothing."""
    for row in own:
        said = row.about.get(rows.TARGET)
        if said is None:
            continue
        if isinstance(said, bool) or not isinstance(said, int | float) or not 0 < said < math.inf:
            what = f"{row.id}: {rows.TARGET} is a number above 0, found {said!r}"
            raise RecipeError(what, where=row.where, fix="write tokens of a second and chip, as measured")
        if row.work is None or row.work.kind != "train":
            continue
        chip = catalogue.chip(row.work.chip)
        peaks = [figure.value for figure in (chip.bf16_tflops, chip.fp8_tflops, chip.int8_tops) if figure is not None]
        most = 1e12 * max(peaks, default=math.inf) / row.work.model.flops_per_token(row.work.sequence)
        if said > most:
            what = f"{row.id}: {said:,.6g} tokens/s and chip, and the peak of a {row.work.chip} is {most:,.4g}"
            raise RecipeError(what, where=row.where, fix="divide by the number of chips; check tokens_per_s_per_chip")
    if not usable(own) and not rows.examined(path):
        what = f"no row is a training run with its {rows.TARGET}: there is nothing to learn"
        raise RecipeError(what, where=path, fix=f"add {rows.TARGET}, as measured")


def _short(values: Any) -> tuple[float, ...]:
    return tuple(float(f"{value:.6g}") for value in values)
