"""Charts of plans and forecasts: a Gantt by pool, cost against time, a tornado, and when a release will be there."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from ottava.console.charts import Frame, Scale, linear, svg, tag, ticks

Row = Mapping[str, Any]
COLOURS = 4
HEIGHT = 15  # of one bar
MONTH, DATE, AMOUNT = 62, 72, 54  # pixels that the name of a month, a date and an amount of money take


def money(value: float) -> str:
    """Dollars in the unit that fits: $950, $12.3k, $5.58M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{'-' if value < 0 else ''}${abs(value) / size:,.3g}{unit}"
    return f"${value:,.0f}"


def _months(start: datetime.date, days: float, x: Scale, frame: Frame) -> list[Markup]:
    """Rules at the first of every month, named where there is room."""
    parts, free = [], frame.left
    month = datetime.date(start.year + start.month // 12, start.month % 12 + 1, 1)
    while (month - start).days < days:
        at = x((month - start).days)
        parts.append(tag("line", x1=at, x2=at, y1=frame.top, y2=frame.bottom, class_="rule"))
        if free <= at <= frame.right - MONTH:
            parts.append(tag("text", month.strftime("%b %Y"), x=at + 3, y=frame.bottom + 15, class_="tick"))
            free = at + MONTH
        month = datetime.date(month.year + month.month // 12, month.month % 12 + 1, 1)
    return parts


def by_pool(rows: Sequence[Row], start: datetime.date, width: int) -> Markup:
    """Assignments of a plan over time, grouped by pool; jobs that run side by side stand below each other."""
    pools = list(dict.fromkeys(row["pool"] for row in sorted(rows, key=lambda row: row["pool"])))
    jobs = list(dict.fromkeys(row["job"] for row in rows))
    days = max((row["end_h"] for row in rows), default=24.0) / 24
    left = 112
    lanes = {pool: _lanes([row for row in rows if row["pool"] == pool]) for pool in pools}
    heights = {pool: 12 + (HEIGHT + 4) * len(lanes[pool]) for pool in pools}
    frame = Frame(left, 6, width - 10, 6 + sum(heights.values()))
    x = linear(0, days, frame.left, frame.right)
    parts, top = _months(start, days, x, frame), frame.top
    for pool in pools:
        parts.append(tag("line", x1=0, x2=frame.right, y1=top, y2=top, class_="rule"))
        parts.append(tag("text", pool, x=0, y=top + 17, class_="stage"))
        for number, lane in enumerate(lanes[pool]):
            begins = [*(x(row["start_h"] / 24) for row in lane[1:]), frame.right]
            for row, room in zip(lane, begins, strict=True):
                parts.append(_bar(row, jobs.index(row["job"]) % COLOURS, x, top + 7 + (HEIGHT + 4) * number, room))
        top += heights[pool]
    said = "; ".join(f"{row['task']} on {row['pool']}, {row['start']} to {row['end']}" for row in rows)
    return svg(parts, width, int(frame.bottom) + 24, f"Plan by pool. {said}")


def _lanes(rows: Sequence[Row]) -> list[list[Row]]:
    """The fewest lanes in which no two bars overlap (first fit by start)."""
    lanes: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: row["start_h"]):
        lane = next((lane for lane in lanes if lane[-1]["end_h"] <= row["start_h"]), None)
        if lane is None:
            lane = []
            lanes.append(lane)
        lane.append(row)
    return lanes


def _bar(row: Row, colour: int, x: Scale, top: float, room: float) -> Markup:
    """A task; its name stands in it, or behind it where it ends before `room`."""
    begin, end = x(row["start_h"] / 24), x(row["end_h"] / 24)
    what = f"{row['task']}: {row['chips']:,} {row['chip']}, {row['start']} to {row['end']}"
    words = f"{what}, {money(row['usd'])}. {row['reason']}"
    name, wide = row["task"], 7.4 * len(row["task"]) + 10
    label = tag("text", name, x=begin + 5, y=top + 11.5, class_="on-rail") if end - begin > wide else Markup("")
    if not label and room - end > wide:
        label = tag("text", name, x=max(end, begin + 2) + 5, y=top + 11.5, class_="note")
    return tag(
        "g",
        tag("title", words),
        tag("rect", x=begin, y=top, width=max(2.0, end - begin), height=HEIGHT, rx=2, class_=f"work p{colour}"),
        label,
    )


def frontier(points: Sequence[Row], start: datetime.date, grid_h: float, width: int) -> Markup:
    """Cost against the day the last job ends, with P10 to P90 as whiskers."""
    frame = Frame(70, 12, width - 36, 250)
    days = [point["end_slot"] * grid_h / 24 for point in points]
    low, high = min(p["p10"] for p in points), max(p["p90"] for p in points)
    x = linear(min(days) - 3, max(days) + 3, frame.left, frame.right)
    y = linear(0.97 * low, 1.03 * high, frame.bottom, frame.top)
    parts = [tag("line", x1=frame.left, x2=frame.right, y1=frame.bottom, y2=frame.bottom, class_="axis")]
    for value in ticks(0.97 * low, 1.03 * high, 5):
        parts.append(tag("line", x1=frame.left, x2=frame.right, y1=y(value), y2=y(value), class_="rule"))
        parts.append(tag("text", money(value), x=frame.left - 6, y=y(value) + 4, text_anchor="end", class_="tick"))
    path = " ".join(f"{x(day):.1f},{y(point['usd']):.1f}" for day, point in zip(days, points, strict=True))
    parts.append(tag("polyline", points=path, class_="line p1"))
    said, free = [], [frame.left - DATE] * 2
    for day, point in sorted(zip(days, points, strict=True), key=lambda pair: pair[0]):
        date = start + datetime.timedelta(days=day)
        words = (
            f"by {date}: {money(point['usd'])}, {money(point['p10'])} to {money(point['p90'])}, gap {point['gap']:.1%}"
        )
        said.append(words)
        lower, upper = y(point["p10"]), y(point["p90"])
        mark = f"M{x(day) - 4:.1f} {lower:.1f} h8 m-4 0 V{upper:.1f} m-4 0 h8"
        dot = tag("circle", cx=x(day), cy=y(point["usd"]), r=4, class_="work p1")
        parts.append(tag("g", tag("title", words), tag("path", d=mark, class_="whisker"), dot))
        line = next((line for line in (0, 1) if x(day) >= free[line]), None)
        if line is not None:  # else the mark's title alone says it
            below = frame.bottom + 16 + 14 * line
            parts.append(tag("text", str(date), x=x(day), y=below, text_anchor="middle", class_="tick"))
            free[line] = x(day) + DATE
    middle = (frame.left + frame.right) / 2
    parts.append(tag("text", "the last job ends", x=middle, y=frame.bottom + 48, text_anchor="middle", class_="label"))
    return svg(parts, width, int(frame.bottom) + 56, f"Cost against time: {'; '.join(said)}")


def tornado(rows: Sequence[Row], middle: float, width: int) -> Markup:
    """What moves the plan's cost, widest first. rows: {name, low, high, usd_low, usd_high, days}."""
    row, left = 34, min(7.6 * max((len(one["name"]) for one in rows), default=0) + 12, 0.6 * width)
    frame = Frame(left, 8, width - 20, 8 + row * len(rows))
    ends = [value for one in rows for value in (one["usd_low"], one["usd_high"])]
    low, high = min([*ends, middle]), max([*ends, middle])
    x = linear(low, high if high > low else low + 1, frame.left, frame.right)
    parts = []
    for value in ticks(low, high, min(4, max(2, int((frame.right - frame.left) / AMOUNT) - 1))):
        parts.append(tag("line", x1=x(value), x2=x(value), y1=frame.top, y2=frame.bottom, class_="rule"))
        parts.append(tag("text", money(value), x=x(value), y=frame.bottom + 16, text_anchor="middle", class_="tick"))
    for number, one in enumerate(rows):
        top = frame.top + row * number
        begin, end = sorted((x(one["usd_low"]), x(one["usd_high"])))
        words = f"{one['name']}: {one['low']} to {one['high']}, {money(one['usd_low'])} to {money(one['usd_high'])}"
        parts.append(
            tag(
                "g",
                tag("title", f"{words}; the last job ends {one['days']}"),
                tag("text", one["name"], x=0, y=top + 14, class_="stage"),
                tag("text", f"{one['low']} to {one['high']}", x=0, y=top + 28, class_="note"),
                tag("rect", x=begin, y=top + 6, width=max(2.0, end - begin), height=16, rx=2, class_="work p0"),
            )
        )
    at = x(middle)
    parts.append(tag("line", x1=at, x2=at, y1=frame.top, y2=frame.bottom, class_="edge"))
    said = "; ".join(f"{one['name']} {money(one['usd_low'])} to {money(one['usd_high'])}" for one in rows)
    return svg(parts, width, int(frame.bottom) + 24, f"What the cost depends on: {said}")


def releases(days: Sequence[float], start: datetime.date, by: datetime.date, width: int) -> Markup:
    """The probability that the release is there by each day. days: of every simulated run, rising."""
    frame = Frame(52, 14, width - 16, 240)
    last = max(days[min(len(days) - 1, 98 * len(days) // 100)], (by - start).days + 7)
    x, y = linear(0, last, frame.left, frame.right), linear(0, 1, frame.bottom, frame.top)
    parts = _months(start, last, x, frame)
    for value in (0, 0.25, 0.5, 0.75, 1):
        parts.append(tag("line", x1=frame.left, x2=frame.right, y1=y(value), y2=y(value), class_="rule"))
        parts.append(tag("text", f"{value:.0%}", x=frame.left - 6, y=y(value) + 4, text_anchor="end", class_="tick"))
    step = max(1, len(days) // 200)
    shown = [(day, (number + 1) / len(days)) for number, day in enumerate(days) if number % step == 0 and day <= last]
    parts.append(tag("polyline", points=" ".join(f"{x(d):.1f},{y(p):.1f}" for d, p in shown), class_="line p1"))
    wanted = x((by - start).days)
    good = sum(day <= (by - start).days for day in days) / len(days)
    parts.append(tag("line", x1=wanted, x2=wanted, y1=frame.top, y2=frame.bottom, class_="move"))
    at = frame.bottom - 8 if good > 0.5 else frame.top + 12  # where the curve is not
    parts.append(tag("text", f"{by}: {good:.0%}", x=wanted - 6, y=at, text_anchor="end", class_="call"))
    return svg(parts, width, int(frame.bottom) + 24, f"Probability of release by day; by {by}: {good:.0%}")
