"""Whether a fleet can carry a run at all, asked before anything is spent on it.

Each pool shows its bits, its accuracy, its links and its speed. What is measured here is what a
run later relies on: one numerics class per pool, sums that are exact on integers, no worker that
holds the others up.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Annotated, Any

from pydantic import Field

from ottava import recipe
from ottava.artifact import Artifact, write_json
from ottava.context import Context
from ottava.errors import LauncherGone, PlatformError
from ottava.planner import reach
from ottava.qualify.judges import (
    Check,
    Results,
    judge_bits,
    judge_collectives,
    judge_matmul,
    judge_presence,
    judge_resources,
    judge_speed,
)
from ottava.recipe import Pool

VERSION = "2"
INPUTS: tuple[str, ...] = ()

Positive = Annotated[float, Field(gt=0)]


class Spec(recipe.Spec):
    """What a pool must show."""

    straggler_factor: Annotated[float, Field(gt=1, description="slowest worker against the pool's median")] = 1.5
    attempts: Annotated[int, Field(ge=1, description="a straggler is one that is slow every time")] = 3
    min_bandwidth_gb_s: Annotated[float, Field(ge=0, description="all_reduce, 1e9 bytes per second")] = 0.05
    min_free_disk_gb: Annotated[float, Field(ge=0)] = 1.0
    min_free_memory_gb: Annotated[float, Field(ge=0, description="per worker")] = 0.5
    probe_s: Annotated[float, Field(gt=0, description="seconds of one speed measurement")] = 0.04


def run(spec: Spec, inputs: Mapping[str, Artifact], ctx: Context) -> Artifact:
    """Check every pool of the fleet. Artifact: qualification.json. The verdict is false where no pool passes."""
    pools: dict[str, dict[str, Any]] = {}
    for number, pool in enumerate(ctx.fleet.pools):
        ctx.progress(number / len(ctx.fleet.pools), f"checking {pool.name}")
        pools[pool.name] = check_pool(spec, pool, ctx)
    passed = [name for name, report in pools.items() if report["passed"]]
    classes = {report["numerics_class"] for report in pools.values() if report["numerics_class"] is not None}
    reasons = [f"{name}: {reason}" for name, report in pools.items() for reason in report["reasons"]]
    write_json(
        ctx.out / "qualification.json",
        {"pools": pools, "passed": passed, "classes_differ": len(classes) > 1, "bounds": spec.model_dump(mode="json")},
    )
    shown = ("passed", "rehearsal", "numerics_class", "matmul_max_error", "bandwidth_gb_s", "straggler_ratio")
    summary = {
        "pools": {name: {key: report[key] for key in shown} for name, report in pools.items()},
        "passed": passed,
        "classes_differ": len(classes) > 1,
        "reasons": reasons,
    }
    if not passed:
        summary["reason"] = f"no pool of the fleet {ctx.fleet.name!r} qualifies: {'; '.join(reasons)}"
    return ctx.commit(summary, verdict=bool(passed))


def check_pool(spec: Spec, pool: Pool, ctx: Context) -> dict[str, Any]:
    """All checks of one pool; where its platform is not here, that alone.

    A check whose workers failed twice has failed, with their error as the reason. Errors that are not the pool's, such
    as a full disk or the end of the process that starts workers, are raised: they are no verdict.
    """
    described: list[Mapping[str, Any]] = []
    checks = _checks(spec, pool, ctx, described)
    values = {name: check.value for name, check in checks.items() if check.passed or name != "numerics_class"}
    return {
        "passed": all(check.passed for check in checks.values()),
        "rehearsal": pool.stands_for,
        "numerics_class": values.get("numerics_class"),
        "matmul_max_error": values.get("matmul"),
        "bandwidth_gb_s": values.get("collectives"),
        "straggler_ratio": values.get("straggler"),
        "reasons": [f"{name}: {check.reason}" for name, check in checks.items() if not check.passed],
        "checks": {name: asdict(check) for name, check in checks.items()},
        "workers": pool.workers,
        "describe": described[0] if described else None,
    }


def _checks(spec: Spec, pool: Pool, ctx: Context, described: list[Mapping[str, Any]]) -> dict[str, Check]:
    """The checks by name; what the platform says of itself is appended to `described`."""
    free_disk = shutil.disk_usage(ctx.out).free
    args = {"platform": pool.platform, "seconds": spec.probe_s}

    def attempt(name: str, judge: Callable[[], Check]) -> Check:
        try:
            return judge()
        except LauncherGone:
            raise
        except PlatformError as error:
            return Check(name, False, None, "the check can be run", error.what)

    def ask(function: str, judge: Callable[[Results], Check]) -> Check:
        return attempt(function, lambda: judge(reach.ask(ctx, pool, f"ottava.platforms.probe:{function}", args)))

    def bits(results: Results) -> Check:
        described.append(results[0]["describe"])
        return judge_bits(results)

    present = attempt("platform", lambda: judge_presence(pool, reach.missing(ctx, pool)))
    if not present.passed:
        return {"platform": present}
    checks = {
        "platform": present,
        "numerics_class": ask("numerics_class", bits),
        "matmul": ask("matmul_error", judge_matmul),
        "collectives": ask("collectives", lambda results: judge_collectives(results, spec.min_bandwidth_gb_s)),
        "resources": ask(
            "resources",
            lambda results: judge_resources(results, free_disk, spec.min_free_memory_gb, spec.min_free_disk_gb),
        ),
    }
    for _ in range(spec.attempts):
        checks["straggler"] = ask("throughput", lambda results: judge_speed(results, spec.straggler_factor))
        if checks["straggler"].passed:
            break
    return checks
