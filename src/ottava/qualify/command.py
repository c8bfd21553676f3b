"""`ottava qualify`: one pool examined, judged, and said in one report."""

from __future__ import annotations

import datetime
import math
import re
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ottava.context import Launcher
from ottava.errors import OttavaError, PlatformError, RecipeError
from ottava.planner import chips, reach
from ottava.qualify import verdict
from ottava.qualify.completion import Rate, Run, completes
from ottava.qualify.gate import Found, Terms, Told, examine
from ottava.recipe import Fleet, Pool, Recipe, Spec
from ottava.trainer.spec import TrainSpec

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def seconds_of(text: str, where: str) -> float:
    """60s, 5m, 2h or a number of seconds, above 0. Raises RecipeError."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(s|m|min|h|)\s*", text)
    if match is None or not 0 < (value := float(match[1]) * _UNITS[match[2]]) < math.inf:
        raise RecipeError(f"{text!r} is no time", where=where, fix="give seconds, minutes or hours: 60s, 5m, 2h")
    return value


def check_hours(hours: float | None) -> None:
    """Raise RecipeError where the length of the planned run is none."""
    if hours is not None and not 0 < hours < math.inf:
        raise RecipeError(f"{hours} is no length of a run", where="--hours", fix="give hours above 0")


def section_of(recipe: Recipe | None) -> tuple[TrainSpec | None, str]:
    """The recipe's first `train` section, where it describes a model by itself, and whose sizes are therefore sent."""
    if recipe is None:
        return None, "no recipe: 1 MiB stands for the gradient"
    for name, spec in recipe.stages.items():
        if isinstance(spec, TrainSpec):
            if "start" in recipe.stages:
                return (
                    None,
                    f"{recipe.name}: its model is a published one, whose size is not looked up: 1 MiB stands for it",
                )
            return spec, f"{recipe.name}: the gradient of stage {name}"
    return None, f"{recipe.name} trains nothing: 1 MiB stands for the gradient"


def planned(recipe: Recipe | None, pool: Pool, workers: int, hours: float | None, restart_s: float) -> Run:
    """The run that is asked about: `hours`, or the budgets of the recipe's stages that train, or an hour."""
    training: list[Spec] = [] if recipe is None else [s for s in recipe.stages.values() if hasattr(s, "restarts")]
    budget = sum(spec.budget_s for spec in training) or 3600.0
    restarts = min((int(getattr(spec, "restarts")) for spec in training), default=2)  # noqa: B009
    return Run(budget if hours is None else 3600 * hours, workers, restart_s=max(1.0, restart_s), restarts=restarts)


def qualify(
    launcher: Launcher,
    fleet: Fleet,
    pool: Pool,
    terms: Terms,
    recipe: Recipe | None = None,
    hours: float | None = None,
    told: Told = lambda share, said: None,
) -> dict[str, Any]:
    """Examine a pool of a fleet. Returns the report, as JSON holds it; its "passed": whether all workers may run.

    Raises PlatformError where the pool's platform is not here, and what is no verdict on the pool.
    """
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ottava-qualify-") as name:
        logs = Path(name)
        _require(launcher, pool, logs)
        section, sizes = section_of(recipe)
        spec = None if section is None else section.model_dump(mode="json")
        found = examine(launcher, pool, Terms(**{**asdict(terms), "spec": spec}), logs, told)
        free_disk = shutil.disk_usage(Path.cwd()).free
    against = verdict.findings(found, verdict.Limits(), free_disk)
    named = {finding.chip for finding in against}
    allowed = [] if None in named else [chip for chip in found.chips if chip not in named]
    failures = verdict.failure_rate(found, against)
    run = planned(recipe, pool, len(allowed) or pool.workers, hours, found.start_s)
    return {
        "fleet": fleet.name, "pool": pool.name, "platform": pool.platform, "rehearsal": pool.stands_for,
        "workers": pool.workers, "passed": not against, "may_run": allowed,
        "findings": [asdict(finding) for finding in against],
        "examined": sorted(found.data), "measured_again": sorted(found.again),
        "figures": verdict.measured(found), "by_chip": _by_chip(found), "links": _links(found), "sizes": sizes,
        "soak": _soak(found, failures), "completes": _completes(run, failures, bool(allowed)),
        "calibration": _row(fleet, pool, found),
        "describe": next((d["describe"] for d in found.data.get("numbers", {}).values()), None),
        "error_rate": {"alpha": terms.alpha, "factor": terms.factor, "link_factor": terms.link_factor},
        "seconds": round(time.monotonic() - begun, 1),
    }  # fmt: skip


def _require(launcher: Launcher, pool: Pool, logs: Path) -> None:
    missing = launcher.call(reach.PRESENCE, {"platform": pool.platform}, pool=pool, workers=1, logs=logs)[0]["missing"]
    if missing is not None:
        raise PlatformError(missing, where=pool.name, fix="run on a machine that has it, or name another --pool")


def _by_chip(found: Found) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for chip in found.chips:
        numbers, speed = (found.data.get(part, {}).get(chip) for part in ("numbers", "speed"))
        out[str(chip)] = {
            "numerics_class": numbers and numbers["class"][:12],
            "matmul_max_error": numbers and numbers["matmul"]["max_error"],
            "matmul_ratio": numbers and {
                kind: max(case["max_ratio"] for case in numbers["matmul"]["cases"] if case["dtype"] == kind)
                for kind in ("float32", "bfloat16")
            },
            "fp8_exact": numbers and numbers["fp8_exact"],
            "fp8_ratio": numbers and numbers["fp8_product"],
            "speed": speed,
        }  # fmt: skip
    return out


def _links(found: Found) -> list[dict[str, Any]]:
    part: Mapping[int, Any] = found.data.get("links", {})
    return next((data["map"] for data in part.values()), [])


def _soak(found: Found, failures: Rate) -> dict[str, Any]:
    rounds = max((data["rounds"] for data in found.data.get("soak", {}).values()), default=0)
    return {
        "rounds": rounds, "worker_seconds": failures.exposure_s, "failures": failures.failures,
        "per_worker_hour": failures.per_worker_hour, "level": 0.8,
    }  # fmt: skip


def _completes(run: Run, failures: Rate, any_left: bool) -> dict[str, Any]:
    asked = {**asdict(run), "interval_s": verdict.finite(run.interval_s)}
    if not any_left:
        return {"estimate": 0.0, "low": 0.0, "high": 0.0, "run": asked, "reason": "no worker may run"}
    return {**completes(run, failures), "run": asked, "reason": None}


def _row(fleet: Fleet, pool: Pool, found: Found) -> dict[str, Any]:
    peak = None
    if pool.chip is not None and not pool.rehearsal:
        try:
            peak = chips.load(chips.locate("chips.json")).chip(pool.chip).peak() / 1e12
        except OttavaError:  # a chip without figures: measured, but no share of a peak
            peak = None
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    return verdict.calibration(f"{fleet.name}-{pool.name}", pool.chip, pool.stands_for, found, peak, day)
