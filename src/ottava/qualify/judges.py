"""What a measurement must show: the limits that the stage `qualify` and `ottava qualify` hold a pool to."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ottava.recipe import Pool

Results = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Check:
    """One question put to a pool. bound: what the value was held against, in words."""

    name: str
    passed: bool
    value: Any
    bound: str
    reason: str = ""


def judge_presence(pool: Pool, missing: str | None) -> Check:
    """The pool's platform must be usable on this machine. value: its name."""
    return Check("platform", missing is None, pool.platform, "can be used here", missing or "")


def judge_bits(results: Results) -> Check:
    """All workers of a pool must be of one numerics class. value: its first 12 hex digits."""
    classes = [result["numerics_class"] for result in results]
    same = len(set(classes)) == 1
    reason = "" if same else f"the workers round differently: {', '.join(c[:12] for c in classes)}"
    return Check("numerics_class", same, classes[0][:12], "equal on all workers", reason)


def judge_matmul(results: Results) -> Check:
    """Every worker's products must lie inside the a-priori error bound. value: largest relative float32 error."""
    worst = max(results, key=lambda result: result["max_ratio"])
    value = max(result["max_error"] for result in results)
    reason = "" if worst["ok"] else f"a product is {worst['max_ratio']:.3g} times its error bound away from float64"
    return Check("matmul", all(result["ok"] for result in results), value, "k u / (1 - k u) of |A||B|", reason)


def judge_collectives(results: Results, floor: float) -> Check:
    """Sums over workers must be exact, and not slower than the floor. value: GB/s of the slowest worker, or None."""
    wrong = [result["rank"] for result in results if not result["exact"]]
    speeds = [result["bandwidth_gb_s"] for result in results if result["bandwidth_gb_s"] is not None]
    slowest = min(speeds, default=None)
    slow = slowest is not None and slowest < floor
    reason = f"all_reduce gave wrong sums on workers {wrong}" if wrong else ""
    if slow and not reason:
        reason = f"all_reduce reaches {slowest:.3g} GB/s, below {floor:g}"
    return Check("collectives", not wrong and not slow, slowest, f"exact on integers, at least {floor:g} GB/s", reason)


def judge_speed(results: Results, factor: float) -> Check:
    """No worker may be `factor` times slower than the median, alone or together. value: the worst such ratio."""
    ratio = 1.0
    for kind in ("gflops", "together_gflops"):
        speeds = [result[kind] for result in results]
        ratio = max(ratio, statistics.median(speeds) / min(speeds))
    slowest = min(results, key=lambda result: min(result["gflops"], result["together_gflops"]))
    reason = "" if ratio <= factor else f"worker {slowest['rank']} is {ratio:.2f} times slower than the pool's median"
    return Check("straggler", ratio <= factor, round(ratio, 3), f"at most {factor:g}", reason)


def judge_resources(results: Results, free_disk: float, memory_gb: float, disk_gb: float) -> Check:
    """Free memory for every worker and free disk (bytes) for the run. value: both in GB (1e9 bytes)."""
    free = min(result["memory_total"] - result["memory_used"] for result in results) / 1e9
    disk = free_disk / 1e9
    need = memory_gb * (len(results) if results[0]["shared_memory"] else 1)
    reasons = []
    if free < need:
        reasons.append(f"{free:.2f} GB of memory are free, {need:g} are needed")
    if disk < disk_gb:
        reasons.append(f"{disk:.2f} GB of disk are free, {disk_gb:g} are needed")
    value = {"free_memory_gb": round(free, 3), "free_disk_gb": round(disk, 3)}
    bound = f"memory {need:g} GB, disk {disk_gb:g} GB"
    return Check("resources", not reasons, value, bound, "; ".join(reasons))
