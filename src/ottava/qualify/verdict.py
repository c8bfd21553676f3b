"""From what was found to what is said: findings against chips, the pass list, the row for the planner."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ottava.qualify import judges
from ottava.qualify.completion import Rate, rate
from ottava.qualify.gate import Found
from ottava.qualify.judges import Check


@dataclass(frozen=True)
class Finding:
    """What speaks against a chip; chip None: against the pool as a whole."""

    chip: int | None
    check: str
    reason: str


@dataclass(frozen=True)
class Limits:
    """What the pool as a whole must show: as the stage's spec."""

    bandwidth_gb_s: float = 0.05
    memory_gb: float = 0.5
    disk_gb: float = 1.0


def findings(found: Found, limits: Limits, free_disk: float) -> list[Finding]:
    """All that speaks against chips or the pool, chips first; what two parts found alike, once."""
    out = [Finding(f.chip, f.kind, f"{f.reason} (in {f.at})") for f in found.failures]
    out += _numbers(found.data.get("numbers", {}), limits, free_disk)
    out += _links(found, limits)
    out += _speed(found)
    out += _repeated(found, {finding.chip for finding in out})
    named = {finding.chip for finding in out}
    out += _collectives(found.data.get("collectives", {}), named - {None} != set())
    once = {(f.chip, f.check, f.reason if f.check == "straggler" else ""): f for f in reversed(out)}
    return sorted(once.values(), key=lambda f: (f.chip is None, f.chip or 0, f.check, f.reason))


def _numbers(part: Mapping[int, Mapping[str, Any]], limits: Limits, free_disk: float) -> list[Finding]:
    out = []
    for chip, data in part.items():
        if data["class"] != data["again"]:
            out.append(Finding(chip, "repeatability", "the same gradient came out in two ways"))
        check = judges.judge_matmul([data["matmul"]])
        if not check.passed:
            out.append(Finding(chip, "numerics", check.reason))
        if not data["fp8_exact"]:
            out.append(Finding(chip, "fp8", "values put on the FP8 grid are not those of the reference"))
        if (data["fp8_product"] or 0.0) > 1:
            out.append(Finding(chip, "fp8", "an FP8 product is further from float64 than its bound"))
    out += _odd({chip: data["class"] for chip, data in part.items()}, "numerics class", {f.chip for f in out})
    if part:
        check = judges.judge_resources(
            [data["resources"] for data in part.values()], free_disk, limits.memory_gb, limits.disk_gb
        )
        out += _pool("resources", check)
    return out


def _odd(values: Mapping[int, str], check: str, known: set[int | None]) -> list[Finding]:
    """Who computes other bits than most; all, where there are no most and nobody is known to be wrong already."""
    if len(set(values.values())) < 2:
        return []
    value, count = Counter(values.values()).most_common(1)[0]
    odd = [chip for chip, other in values.items() if other != value]
    if 2 * count > len(values):
        return [
            Finding(chip, check, f"computes other bits ({values[chip][:12]}) than most ({value[:12]})") for chip in odd
        ]
    if known - {None}:
        return []
    return [
        Finding(chip, check, "the workers compute different bits, and no majority tells who is wrong")
        for chip in values
    ]


def _pool(name: str, check: Check) -> list[Finding]:
    return [] if check.passed else [Finding(None, name, check.reason)]


def cover(edges: Sequence[tuple[int, int]]) -> list[int]:
    """Few chips that together are on all of these directed links: always the one on most of those left, of equals the
    one that sends most, then the higher number."""
    left, chosen = list(edges), []
    while left:
        senders, ends = Counter(a for a, _ in left), Counter(chip for edge in left for chip in edge)
        worst = max(ends, key=lambda chip: (ends[chip], senders[chip], chip))
        chosen.append(worst)
        left = [edge for edge in left if worst not in edge]
    return chosen


def _slow_links(part: Mapping[int, Mapping[str, Any]]) -> set[tuple[int, int]]:
    return {(a, b) for data in part.values() for a, b in data["slow"]}


def _links(found: Found, limits: Limits) -> list[Finding]:
    part, again = found.data.get("links", {}), found.again.get("links", {})
    slow = sorted(_slow_links(part) & _slow_links(again))
    wrong = sorted({(a, b) for data in part.values() for a, b in data["wrong"]})
    links = next(iter(part.values()))["map"] if part else []
    below = [(link["from"], link["to"]) for link in links if link["best_gb_s"] < limits.bandwidth_gb_s]
    out = []
    for edges, what in ((wrong, "other bytes arrive than were sent"), (slow, "slower than the others")):
        for chip in cover(edges):
            shown = ", ".join(f"{a}->{b}" for a, b in edges if chip in (a, b))
            out.append(Finding(chip, "link", f"{shown}: {what}"))
    if below and not out:
        shown = ", ".join(f"{a}->{b}" for a, b in below)
        if len(below) == len(links):
            out.append(Finding(None, "link", f"all links are below {limits.bandwidth_gb_s:g} GB/s"))
        else:
            out += [Finding(c, "link", f"{shown}: below {limits.bandwidth_gb_s:g} GB/s") for c in cover(below)]
    return out


def _speed(found: Found) -> list[Finding]:
    def accused(part: Mapping[int, Mapping[str, Any]]) -> dict[str, set[int]]:
        return {name: set(work["accused"]) for data in part.values() for name, work in data.items()}

    first, again, out = accused(found.data.get("speed", {})), accused(found.again.get("speed", {})), []
    for name, chips in first.items():
        for chip in sorted(chips & again.get(name, set())):
            ratio = found.again["speed"][chip][name]["ratio"]
            out.append(Finding(chip, "straggler", f"{name}: {ratio:.2f} times slower than the others"))
    return out


def _repeated(found: Found, wrong: set[int | None]) -> list[Finding]:
    """wrong: whom something speaks against already, which explains that the bits differ."""
    out: list[Finding] = []
    for name in ("repeat", "soak"):
        part = found.data.get(name, {})
        for chip, data in part.items():
            if chip in {finding.chip for finding in out}:
                continue
            if data["changed"]:
                out.append(
                    Finding(chip, "repeatability", f"{len(data['changed'])} times other bits from the same work")
                )
            elif data.get("sums"):
                out.append(Finding(chip, "repeatability", f"{len(data['sums'])} times another sum than the others"))
    known = {f.chip for f in out}
    out += [Finding(c, "repeatability", "other bits from the same work") for c in sorted(found.changed - known)]
    unsound = {finding.chip for finding in out}
    firsts = {chip: data["first"] for chip, data in found.data.get("repeat", {}).items() if chip not in unsound}
    return out + _odd(firsts, "numerics class", unsound | wrong)


def _collectives(part: Mapping[int, Mapping[str, Any]], named: bool) -> list[Finding]:
    """Sums speak against the pool, as all end with the same one; nothing new where a chip is known to be bad. How fast
    they are is judged link by link, from the best of many rounds: of a few sums on a busy machine all may be slow."""
    if not part or named:
        return []
    results = list(part.values())
    check = judges.judge_collectives(results, 0.0)
    out = _pool("collectives", check)
    if any(data["tree"] is not None and not data["tree"]["exact"] for data in results):
        out.append(Finding(None, "collectives", "the tree sum of the gradient is wrong"))
    return out


def failure_rate(found: Found, against: Sequence[Finding]) -> Rate:
    """Of one worker, from the soak and what came to light while it ran."""
    in_soak = {f.chip for f in found.failures if f.at.startswith("soak")} | found.changed
    return rate(len(in_soak), max(found.soaked_s, 1e-3))


def measured(found: Found) -> dict[str, Any]:
    """The pool's figures: of each work the median worker's rate, of links and sums those at the run's sizes."""
    speed = found.data.get("speed", {})
    names = list(next(iter(speed.values()))) if speed else []
    rates = {name: [data[name]["rate"] for data in speed.values()] for name in names}
    links: dict[str, Any] = next(iter(found.data.get("links", {}).values()), {"map": []})
    sums = list(found.data.get("collectives", {}).values())
    return {
        "gemm_tflops": {name: statistics.median(r) / 1e12 for name, r in rates.items() if name != "memory"},
        "memory_gb_s": statistics.median(rates["memory"]) / 1e9 if "memory" in rates else None,
        "link_gb_s": _median(link["bandwidth_gb_s"] for link in links["map"]),
        "link_latency_s": _median(link["latency_s"] for link in links["map"]),
        "all_reduce": _slowest(sums),
        "tree": max((s["tree"] for s in sums if s["tree"]), key=lambda t: t["seconds"], default=None),
        "messages": sums[0]["named"] if sums else {},
    }


def _median(values: Any) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None


def _slowest(sums: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if not sums or sums[0]["world"] == 1:
        return []
    return [
        {
            "bytes": rows[0]["bytes"],
            "seconds": max(r["seconds"] for r in rows),
            "gb_s": min(r["bandwidth_gb_s"] for r in rows),
        }
        for rows in zip(*(s["sizes"] for s in sums), strict=True)
    ]


def calibration(
    site: str, chip: str | None, rehearsal: str | None, found: Found, peak_tflops: float | None, day: str
) -> dict[str, Any]:
    """The row that the planner can learn from, in the manner of a published run. chip: as in fleets/chips.json, None
    for a processor that is in no such file: a rehearsal says nothing about the chip that it stands for."""
    figures = measured(found)
    speed = found.data.get("speed", {})
    spread = {
        name: [min(d[name]["rate"] for d in speed.values()) / 1e12, max(d[name]["rate"] for d in speed.values()) / 1e12]
        for name in figures["gemm_tflops"]
    }
    bf16 = figures["gemm_tflops"].get("bfloat16")
    return {
        "id": f"qualify-{site}-{day}",
        "kind": "qualify",
        "chip": None if rehearsal is not None else chip,
        "rehearsal": rehearsal,
        "site": site,
        "n": len(found.chips),
        "gemm_tflops": figures["gemm_tflops"],
        "gemm_tflops_range": spread,
        "peak_bf16_tflops": peak_tflops,
        "matmul_efficiency": None if peak_tflops is None or bf16 is None else bf16 / peak_tflops,
        "memory_gb_s": figures["memory_gb_s"],
        "link_gb_s": figures["link_gb_s"],
        "link_latency_s": figures["link_latency_s"],
        "all_reduce": figures["all_reduce"],
        "provenance": "measured",
        "source": "ottava qualify",
        "date": day,
    }


def finite(value: float) -> float | None:
    """A number as JSON holds it."""
    return value if math.isfinite(value) else None
