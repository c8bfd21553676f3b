"""Charts as SVG text: pure functions, sized in pixels for the width they are shown at, coloured by the page's CSS.

Every mark that a number stands behind has a <title>, so that a pointer shows it; pools are told
apart by words as well as by colour. A chart is drawn once for a wide and once for a narrow page,
because text that is scaled down with a picture cannot be read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from markupsafe import Markup, escape

from ottava.console.history import Bar, Point
from ottava.console.words import interval, percent, scientific, seconds

Scale = Callable[[float], float]


def tag(name: str, *children: str, **attributes: Any) -> Markup:
    """One element, its text and attributes escaped. `class_` is class, `a_b` is a-b; attributes of None are dropped."""
    pairs = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None)
    head = Markup("").join(Markup(' {}="{}"').format(key, _number(value)) for key, value in pairs)
    body = Markup("").join(escape(child) for child in children)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), head, body)


def _number(value: Any) -> Any:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value


def linear(low: float, high: float, start: float, end: float) -> Scale:
    """Maps [low, high] to [start, end]."""
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def logarithmic(low: float, high: float, start: float, end: float) -> Scale:
    """Maps [low, high], both above 0, to [start, end] evenly in ratios; values outside are held at the ends."""
    inner = linear(math.log(low), math.log(high), start, end)
    return lambda value: inner(math.log(min(max(value, low), high)))


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round values in [low, high], about `count`: multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / max(1, count) or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda size: abs(math.log(size / raw)))
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in [low, high]; where there are fewer than three, their 2s and 5s too."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5)):
        found = [f * 10.0**p for p in powers for f in factors if low * 0.999 <= f * 10.0**p <= high * 1.001]
        if len(found) >= 3:
            break
    return found


@dataclass(frozen=True)
class Bin:
    """Neighbouring steps on one pool. mean: of losses geometric; direct: a second curve, or None where it has none."""

    first: int
    last: int
    low: float
    mean: float
    high: float
    direct: float | None
    pool: str

    @property
    def middle(self) -> float:
        return (self.first + self.last) / 2


class Pooled(Protocol):
    """Something that happened on a pool."""

    @property
    def pool(self) -> str: ...


P = TypeVar("P", bound=Pooled)


def groups(points: Sequence[P], count: int) -> list[Sequence[P]]:
    """At most about `count` groups of equally many neighbours; a new pool begins a new group."""
    size = max(1, math.ceil(len(points) / max(1, count)))
    found: list[Sequence[P]] = []
    start = 0
    for end in range(1, len(points) + 1):
        full = end == len(points) or end - start == size or points[end].pool != points[start].pool
        if full:
            found.append(points[start:end])
            start = end
    return found


def bins(points: Sequence[Point], count: int) -> list[Bin]:
    """At most about `count` bins of equally many steps; a new pool begins a new bin."""
    return [_bin(group) for group in groups(points, count)]


def _bin(points: Sequence[Point]) -> Bin:
    losses = [max(point.loss, 1e-12) for point in points]
    direct = [max(point.direct, 1e-12) for point in points if point.direct is not None]
    return Bin(
        points[0].step, points[-1].step, min(losses), _mean(losses), max(losses),
        _mean(direct) if direct else None, points[0].pool,
    )  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(value) for value in values) / len(values))


@dataclass(frozen=True)
class Frame:
    """The inside of a chart, in pixels."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True)
class Move:
    """Where a run changed pools, and what to write beside it."""

    step: int
    lines: Sequence[str]


def loss(points: Sequence[Point], pools: Sequence[str], move: Move | None, width: int, height: int) -> Markup:
    """The loss over steps, on a logarithmic axis: the mean of neighbouring steps, and the band they lie in.

    pools: their order decides their colours. Steps whose weights lay on the grid are shaded.
    """
    frame = Frame(62, 34, width - 16, height - 44)
    shown = bins(points, int(frame.right - frame.left) // 4)
    values = [v for b in shown for v in (b.low, b.high, b.direct) if v is not None]
    low, high = min(values) / 1.3, max(values) * 1.1
    x = linear(points[0].step, max(points[-1].step, points[0].step + 1), frame.left, frame.right)
    y = logarithmic(low, high, frame.bottom, frame.top)
    steps, names = (points[0].step, points[-1].step), ("training step", "loss, nats per token")
    parts = [*_grid_phase(points, x, frame), *axes(x, y, steps, log_ticks(low, high), frame, *names)]
    parts += curves(shown, pools, x, y, frame, "steps")
    parts += move_mark(move, x, frame) if move is not None else []
    parts += [hover(b, x, frame, "step", _told(b)) for b in shown]
    first, last = points[0], points[-1]
    label = f"Training loss from step {first.step} to {last.step}: from {first.loss:.2g} to {last.loss:.2g}"
    return svg(parts, width, height, label)


def curves(shown: Sequence[Bin], pools: Sequence[str], x: Scale, y: Scale, frame: Frame, noun: str) -> Iterable[Markup]:
    """The band and the lines of bins, pool by pool, each named along the top. noun: what is counted along the axis."""
    for pool, run in _runs(shown):
        style = f"p{pools.index(pool) if pool in pools else 0}"
        before = shown[shown.index(run[0]) - 1 : shown.index(run[0])]
        yield _band(run, x, y, style)
        yield _rail(run, pool, x, frame, style, noun)
        yield _line([(b.middle, b.mean) for b in (*before, *run)], x, y, f"line {style}")
        direct = [(b.middle, b.direct) for b in (*before, *run) if b.direct is not None]
        if len(direct) > 1:
            yield _line(direct, x, y, f"line direct {style}")


def _runs(shown: Sequence[Bin]) -> list[tuple[str, list[Bin]]]:
    runs: list[tuple[str, list[Bin]]] = []
    for one in shown:
        if not runs or runs[-1][0] != one.pool:
            runs.append((one.pool, []))
        runs[-1][1].append(one)
    return runs


def _grid_phase(points: Sequence[Point], x: Scale, frame: Frame) -> list[Markup]:
    on = [point.step for point in points if point.on_grid]
    if not on:
        return []
    start = x(on[0])
    size = {"width": frame.right - start, "height": frame.bottom - frame.top}
    box = tag("rect", x=start, y=frame.top, class_="on-grid", **size)
    edge = tag("line", x1=start, x2=start, y1=frame.top, y2=frame.bottom, class_="edge")
    words = [
        tag("text", line, x=frame.right - 6, y=frame.top + 16 + 14 * n, text_anchor="end", class_="note")
        for n, line in enumerate(("weights on", "the FP8 grid"))
    ]
    return [box, edge, *words]


def axes(
    x: Scale, y: Scale, steps: tuple[int, int], levels: Sequence[float], frame: Frame, across: str, upwards: str
) -> Iterable[Markup]:
    """Both axes of a curve. levels: where the vertical one is ruled; across, upwards: what they are of."""
    for value in levels:
        yield tag("line", x1=frame.left, x2=frame.right, y1=y(value), y2=y(value), class_="rule")
        yield tag("text", f"{value:g}", x=frame.left - 6, y=y(value) + 4, text_anchor="end", class_="tick")
    for value in ticks(*steps, 8 if frame.right - frame.left > 500 else 4):
        yield tag("line", x1=x(value), x2=x(value), y1=frame.bottom, y2=frame.bottom + 4, class_="axis")
        yield tag("text", f"{value:,.0f}", x=x(value), y=frame.bottom + 17, text_anchor="middle", class_="tick")
    yield tag("line", x1=frame.left, x2=frame.right, y1=frame.bottom, y2=frame.bottom, class_="axis")
    middle = (frame.left + frame.right) / 2
    yield tag("text", across, x=middle, y=frame.bottom + 36, text_anchor="middle", class_="label")
    turned = f"translate(12 {(frame.top + frame.bottom) / 2:.0f}) rotate(-90)"
    yield tag("text", upwards, transform=turned, text_anchor="middle", class_="label")


def _band(run: Sequence[Bin], x: Scale, y: Scale, style: str) -> Markup:
    upper = [f"{x(b.middle):.1f},{y(b.high):.1f}" for b in run]
    lower = [f"{x(b.middle):.1f},{y(b.low):.1f}" for b in reversed(run)]
    return tag("polygon", points=" ".join(upper + lower), class_=f"band {style}")


def _line(points: Sequence[tuple[float, float]], x: Scale, y: Scale, style: str) -> Markup:
    return tag("polyline", points=" ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points), class_=style)


def _rail(run: Sequence[Bin], pool: str, x: Scale, frame: Frame, style: str, noun: str) -> Markup:
    """A strip along the top that names the pool."""
    start, end = max(frame.left, x(run[0].first - 1)), x(run[-1].last)
    steps = f"{noun} {run[0].first:,} to {run[-1].last:,}"
    words = f"{pool}, {steps}" if end - start > 7.2 * len(f"{pool}, {steps}") else pool
    fits = end - start > 7.2 * len(words)
    middle = (start + end) / 2
    return tag(
        "g",
        tag("rect", x=start, y=frame.top - 26, width=max(1.0, end - start), height=20, class_=f"rail {style}"),
        tag("text", words if fits else "", x=middle, y=frame.top - 12, text_anchor="middle", class_="on-rail"),
        tag("title", f"{pool}, {steps}"),
    )


def move_mark(move: Move, x: Scale, frame: Frame) -> list[Markup]:
    """Where a run changed pools, crossed out, with its words."""
    at = x(move.step)
    late = at > (frame.left + frame.right) / 2  # losses fall: before a late move there is room below, after it above
    place, anchor = (at - 12, "end") if late else (at + 12, "start")
    top = frame.bottom - 16 * len(move.lines) if late else frame.top + 18
    mark = [
        tag("line", x1=at, x2=at, y1=frame.top - 26, y2=frame.bottom, class_="move"),
        tag("path", d=f"M{at - 5:.1f} {top - 10:.1f} l10 10 m0 -10 l-10 10", class_="cross"),
    ]
    words = [
        tag("text", line, x=place, y=top + 16 * n, text_anchor=anchor, class_="call" if n == 0 else "note")
        for n, line in enumerate(move.lines)
    ]
    return mark + words


def _told(one: Bin) -> str:
    direct = "" if one.direct is None else f", direct {scientific(one.direct)}"
    return f"loss {scientific(one.mean)}{direct}"


def hover(one: Bin, x: Scale, frame: Frame, noun: str, words: str) -> Markup:
    """What a pointer shows over a bin. noun: what is counted along the axis, in the singular."""
    start, end = x(one.first - 0.5), x(one.last + 0.5)
    steps = f"{noun} {one.first:,}" if one.first == one.last else f"{noun}s {one.first:,} to {one.last:,}"
    words = f"{steps} on {one.pool}: {words}"
    box = {"x": start, "y": frame.top, "width": end - start, "height": frame.bottom - frame.top}
    return tag("rect", tag("title", words), class_="hover", **box)


@dataclass(frozen=True)
class Lane:
    """One stage of the Gantt. planned: (start, end, earliest end, latest end) in seconds, or None."""

    stage: str
    note: str
    planned: tuple[float, float, float, float] | None
    bars: Sequence[Bar]


def gantt(lanes: Sequence[Lane], pools: Sequence[str], width: int) -> Markup:
    """Stages over time: an outline for what was planned, filled bars for what was."""
    row, left = 44, 142
    frame = Frame(left, 8, width - 14, 8 + row * len(lanes))
    ends = [bar.end for lane in lanes for bar in lane.bars]
    ends += [time for lane in lanes if lane.planned for time in (lane.planned[1], lane.planned[3])]
    end = max([*ends, 1e-3])
    x = linear(0, end, frame.left, frame.right)
    parts: list[Markup] = []
    for value in ticks(0, end, 8 if width > 500 else 4):
        parts.append(tag("line", x1=x(value), x2=x(value), y1=frame.top, y2=frame.bottom, class_="rule"))
        parts.append(tag("text", f"{value:g}", x=x(value), y=frame.bottom + 16, text_anchor="middle", class_="tick"))
    for number, lane in enumerate(lanes):
        parts += _lane(lane, pools, x, frame.top + row * number)
    middle = (frame.left + frame.right) / 2
    parts.append(tag("text", "seconds of work", x=middle, y=frame.bottom + 34, text_anchor="middle", class_="label"))
    said = "; ".join(f"{lane.stage}: {lane.note}" for lane in lanes)
    return svg(parts, width, int(frame.bottom) + 42, f"Plan and actual times by stage. {said}")


def _lane(lane: Lane, pools: Sequence[str], x: Scale, top: float) -> Iterable[Markup]:
    yield tag("text", lane.stage, x=0, y=top + 17, class_="stage")
    yield tag("text", lane.note, x=0, y=top + 32, class_="note")
    if lane.planned is not None:
        start, end, low, high = lane.planned
        took, least, most = (seconds(time - start) for time in (end, low, high))
        words = f"{lane.stage}, planned: {took}, between {least} and {most}"
        yield tag(
            "g",
            tag("title", words),
            tag("rect", x=x(start), y=top + 6, width=max(2.0, x(end) - x(start)), height=9, rx=2, class_="planned"),
            tag("path", d=f"M{x(low):.1f} {top + 10.5} H{x(high):.1f} m0 -4 v8", class_="whisker"),
        )
    divided = any(bar.what for bar in lane.bars)
    for bar in lane.bars:
        style = f"p{pools.index(bar.pool)}" if bar.pool in pools else "p0"
        kind = "replay" if bar.again else "work" if bar.what or not divided else "base"
        words = f"{lane.stage}{', ' + bar.what if bar.what else ''} on {bar.pool}: {seconds(bar.end - bar.start)}"
        box = {"x": x(bar.start), "y": top + 19, "width": max(2.0, x(bar.end) - x(bar.start)), "height": 14}
        yield tag("rect", tag("title", words), rx=2, class_=f"{kind} {style}", **box)


def intervals(rows: Sequence[tuple[str, Mapping[str, Any]]], width: int) -> Markup:
    """Accuracies as bars with their 95% intervals. rows: a name and {value, low, high, n}."""
    row = 46
    frame = Frame(2, 4, width - 92, 4 + row * len(rows))
    x = linear(0, 1, frame.left, frame.right)
    parts: list[Markup] = []
    for value in (0, 0.25, 0.5, 0.75, 1):
        parts.append(tag("line", x1=x(value), x2=x(value), y1=frame.top, y2=frame.bottom, class_="rule"))
        anchor = "middle" if value else "start"
        parts.append(tag("text", f"{value:.0%}", x=x(value), y=frame.bottom + 16, text_anchor=anchor, class_="tick"))
    for number, (name, entry) in enumerate(rows):
        top, low, high = frame.top + row * number, x(entry["low"]), x(entry["high"])
        words = f"{name}: {percent(entry['value'])}, 95% interval {interval(entry)}, n {entry['n']}"
        parts.append(
            tag(
                "g",
                tag("title", words),
                tag("text", name, x=frame.left, y=top + 13, class_="stage"),
                tag("rect", x=frame.left, y=top + 20, width=frame.right - frame.left, height=14, rx=2, class_="track"),
                tag("rect", x=frame.left, y=top + 20, width=max(1.0, x(entry["value"]) - frame.left), height=14, rx=2,
                    class_="value"),
                tag("path", d=f"M{low:.1f} {top + 22} v10 m0 -5 H{high:.1f} m0 -5 v10", class_="whisker"),
                tag("text", percent(entry["value"]), x=frame.right + 12, y=top + 29, class_="figure"),
                tag("text", f"n {entry['n']:,}", x=frame.right + 12, y=top + 43, class_="note"),
            )
        )  # fmt: skip
    said = "; ".join(f"{name} {percent(entry['value'])}" for name, entry in rows)
    return svg(parts, width, int(frame.bottom) + 24, f"Accuracy with 95% intervals: {said}")


def svg(parts: Iterable[Markup], width: int, height: int, label: str) -> Markup:
    """A whole chart. label: what it shows, for those who cannot see it."""
    box = f"0 0 {width} {height}"
    return tag("svg", *parts, viewBox=box, width=width, height=height, role="img", aria_label=label)
