"""Where `labels.forecast.SPREAD` is from, and how often its intervals hold: python -m benchmarks.labels.forecasts FILE

FILE is what `python -m benchmarks.labels --seeds 200 --first 6000 --worlds FILE` keeps. Worlds with even seeds are
fitted on, those with odd seeds are only looked at. A kind `left out` is fitted on all other kinds, with even seeds, and
looked at in its even seeds: what to expect of a world that is like none of these.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import show
from ottava.labels import forecast
from ottava.labels.forecast import Forecast, Progress, Spread

Moment = tuple[str, Progress, int]  # a kind, where a run of it stood, the votes that it then took
Table = dict[tuple[str, int, int], Spread]


def moments(worlds: Iterable[dict[str, Any]]) -> list[Moment]:
    """From the first fit on: before it nothing is known of the world."""
    return [
        (world["name"], now, world["total"] - now.votes)
        for world in worlds
        for now in (Progress(**moment) for moment in world["moments"])
        if now.phase != "calibrate"
    ]


def fit(known: Sequence[Moment]) -> Table:
    """10%, 50% and 90% of what it took as a share of what was believed, in each part of SPREAD."""
    shares: dict[tuple[str, int, int], list[float]] = {}
    for _, now, took in known:
        shares.setdefault(forecast.part(now), []).append(took / max(forecast.believed(now), 1.0))
    return {
        part: tuple(round(float(share), 2) for share in np.quantile(found, (0.1, 0.5, 0.9)))  # type: ignore[misc]
        for part, found in sorted(shares.items())
    }


def by(table: Table) -> Callable[[Progress], Forecast]:
    """Forecasts by another table; in a part that it does not have, by the one in use."""
    return lambda now: forecast.spread(now, table.get(forecast.part(now)) or forecast.spread_of(now))


def held(seen: Sequence[Moment], made: Callable[[Progress], Forecast] = forecast.forecast) -> dict[str, float]:
    """ours: the share of forecasts that held; width: the mean interval as a share of what may be asked in all; off: the
    median factor between the likely number and the true one."""
    inside, width, off = [], [], []
    for _, now, took in seen:
        low, likely, high = made(now).votes
        inside.append(low <= took <= high)
        width.append((high - low) / now.most)
        off.append(abs(math.log(max(likely, 1) / max(took, 1))))
    return {
        "ours": float(np.mean(inside)), "count": len(seen), "width": float(np.mean(width)),
        "off": math.exp(float(np.median(off))),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("worlds", type=Path, metavar="FILE")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    asked = parser.parse_args()
    worlds = {(w["name"], w["seed"]): w for w in map(json.loads, asked.worlds.read_text().splitlines())}
    even = moments(world for (_, seed), world in worlds.items() if seed % 2 == 0)
    odd = moments(world for (_, seed), world in worlds.items() if seed % 2)
    kinds = list(dict.fromkeys(name for name, _ in worlds))
    rows: list[dict[str, Any]] = [{"name": "even seeds", **held(even)}, {"name": "odd seeds", **held(odd)}]
    rest = 0.0
    for kind in kinds:
        alone = [one for one in even if one[0] == kind]
        left_out = held(alone, by(fit([one for one in even if one[0] != kind])))["ours"]
        rows.append({"name": kind, **held([one for one in odd if one[0] == kind]), "left_out": left_out})
        rest += left_out * len(alone)
    rows.append({"name": "each kind left out", "ours": rest / len(even), "count": len(even)})
    for part, found in fit(even).items():
        rows.append({"name": f"fitted {part}", "ours": found})
    show([{"baseline": 0.8, "ratio": None, "low": None, "high": None, **row} for row in rows], asked.json)


if __name__ == "__main__":
    main()
