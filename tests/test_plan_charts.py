"""Charts of plans: at every width no label lies on another or beyond the edge."""

from __future__ import annotations

import datetime
import itertools
import re
from typing import Any

import pytest

from ottava.console import plans
from ottava.console.page import WIDTHS

START = datetime.date(2025, 2, 10)
WIDE = 7.0  # pixels of a letter at most


def texts(drawn: str) -> list[tuple[float, float, float, str]]:
    """(y, left, right, words) of every tick's label."""
    found = []
    for attributes, words in re.findall(r"<text ([^>]*)>([^<]*)</text>", drawn):
        known = dict(re.findall(r'([\w-]+)="([^"]*)"', attributes))
        if known.get("class") != "tick":
            continue
        x, wide = float(known["x"]), WIDE * len(words)
        left = x - {"middle": wide / 2, "end": wide}.get(known.get("text-anchor", ""), 0.0)
        found.append((float(known["y"]), left, left + wide, words))
    return sorted(found)


def check(drawn: str, width: int) -> list[str]:
    """The labels, once they are known to be apart and inside."""
    shown = texts(drawn)
    for (y, _, right, first), (below, left, _, second) in itertools.pairwise(shown):
        assert y != below or right <= left + 1, f"{first} lies on {second}"
    for _, left, right, words in shown:
        assert left >= -1, words
        assert right <= width + 1, words
    return [words for *_, words in shown]


def point(slot: int, usd: float) -> dict[str, Any]:
    return {"end_slot": slot, "usd": usd, "p10": 0.95 * usd, "p90": 1.1 * usd, "gap": 0.01}


@pytest.mark.parametrize("width", WIDTHS.values())
@pytest.mark.parametrize("ends", [(70, 81, 84, 125), (10, 11, 12, 13, 14), (5,)])
def test_dates_of_cost_against_time_lie_apart(width: int, ends: tuple[int, ...]) -> None:
    points = [point(end, 3.3e7 - 1e5 * end) for end in ends]
    labels = check(str(plans.frontier(points, START, 24.0, width)), width)
    assert str(START + datetime.timedelta(days=ends[0])) in labels


def task(name: str, pool: str, begin: float, end: float) -> dict[str, Any]:
    hours = {"start_h": 24 * begin, "end_h": 24 * end}
    said = {"start": "a", "end": "b", "usd": 1e5, "reason": "none"}
    return {"task": name, "job": name, "pool": pool, "chips": 8, "chip": "H800", **hours, **said}


@pytest.mark.parametrize("width", WIDTHS.values())
@pytest.mark.parametrize("days", [40, 210, 1500])
def test_months_lie_apart_and_inside(width: int, days: int) -> None:
    rows = [task("long", "p", 0, days)]
    labels = check(str(plans.by_pool(rows, START, width)), width)
    assert "Mar 2025" in labels
    runs = [days * share / 50 for share in range(1, 51)]
    check(str(plans.releases(runs, START, START + datetime.timedelta(days=days // 2), width)), width)


def test_a_short_bar_has_its_name_beside_it_where_there_is_room() -> None:
    rows = [task("brief-one", "p", 0, 1), task("brief-two", "p", 3, 4), task("long", "q", 0, 100)]
    drawn = str(plans.by_pool(rows, START, 940))
    assert ">brief-two</text>" in drawn
    assert ">brief-one</text>" not in drawn  # the next bar is in the way; its title says it
    assert "<title>brief-one" in drawn


@pytest.mark.parametrize("width", WIDTHS.values())
def test_names_of_a_tornado_end_before_its_bars(width: int) -> None:
    name = "time of student-llama-70b"
    rows = [{"name": name, "low": "1", "high": "2", "usd_low": 2.9e7, "usd_high": 3.3e7, "days": "never"}]
    drawn = str(plans.tornado(rows, 3e7, width))
    check(drawn, width)
    begin = min(float(x) for x in re.findall(r'<rect x="([\d.]+)"', drawn))
    assert begin >= min(WIDE * len(name), 0.6 * width)
