"""What the benchmarks share: options, paired timing, and the one form of output."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scipy.stats import beta, binom, t


def options(description: str, **more: int | str) -> argparse.Namespace:
    """--json, and a number or a text for each name in `more`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    for name, default in more.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    return parser.parse_args()


def paired(name: str, ours: Callable[[], float], baseline: Callable[[], float], pairs: int) -> dict[str, Any]:
    """Run both sides in turn; each returns seconds. The ratio ours/baseline with a 95% interval over pairs."""
    ours(), baseline()
    a, b = [], []
    for _ in range(pairs):
        a.append(ours())
        b.append(baseline())
    logs = [math.log(x / y) for x, y in zip(a, b, strict=True)]
    half = t.ppf(0.975, pairs - 1) * statistics.stdev(logs) / math.sqrt(pairs) if pairs > 1 else math.inf
    centre = statistics.mean(logs)
    return {
        "name": name,
        "ours": statistics.median(a),
        "baseline": statistics.median(b),
        "ratio": math.exp(centre),
        "low": math.exp(centre - half),
        "high": math.exp(centre + half),
    }


def throughput(name: str, ours: Callable[[], float], baseline: Callable[[], float], pairs: int) -> dict[str, Any]:
    """How many times faster ours is: baseline's seconds over ours, run in turn.

    The median over pairs, and as low and high the 95% interval of the median by ranks (no law of errors assumed).
    """
    ours(), baseline()
    a, b = [], []
    for _ in range(pairs):
        a.append(ours())
        b.append(baseline())
    ratios = sorted(y / x for x, y in zip(a, b, strict=True))
    outside = int(binom.ppf(0.025, pairs, 0.5))  # ranks below this one leave 2.5% on their side
    return {
        "name": name,
        "ours": statistics.median(a),
        "baseline": statistics.median(b),
        "ratio": statistics.median(ratios),
        "low": ratios[max(outside - 1, 0)],
        "high": ratios[min(pairs - outside, pairs - 1)],
    }


def share(name: str, good: int, runs: int) -> dict[str, Any]:
    """Counts with the exact 95% interval of the share (Clopper and Pearson)."""
    low = float(beta.ppf(0.025, good, runs - good + 1)) if good else 0.0
    high = float(beta.ppf(0.975, good + 1, runs - good)) if good < runs else 1.0
    return {"name": name, "ours": good, "baseline": runs, "ratio": good / runs, "low": low, "high": high}


def show(results: Sequence[Mapping[str, Any]], as_json: bool, **more: Any) -> None:
    """Print {results: [...]} or a table."""
    if as_json:
        json.dump({"results": list(results), **more}, sys.stdout)
        sys.stdout.write("\n")
        return
    for row in results:
        print("  ".join(f"{key}={value:.4g}" if isinstance(value, float) else f"{value}" for key, value in row.items()))
    for key, value in more.items():
        print(f"{key}: {value}")


def run_parts(package: str, parts: Sequence[str], description: str) -> None:
    """The command line of a package of benchmarks: run the parts that are asked for and print {"results": [...]}.

    parts: modules of the package, each with rows(quick).
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions: a look, not a measurement")
    parser.add_argument("--only", default=",".join(parts), help=f"parts, separated by commas: {', '.join(parts)}")
    options = parser.parse_args()
    chosen = options.only.split(",")
    if unknown := set(chosen) - set(parts):
        parser.error(f"no part named {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    results: list[Mapping[str, Any]] = []
    for part in chosen:
        print(f"measuring {part} ...", file=sys.stderr, flush=True)
        results += importlib.import_module(f"{package}.{part}").rows(options.quick)
    show(results, options.json)
