"""Charts of what was learnt: the reward of reinforcement, and students beside their controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from ottava.console import charts
from ottava.console.charts import Bin, Frame, Move, linear, svg, tag, ticks
from ottava.console.history import Generation, Point
from ottava.console.students import mode_of, solved
from ottava.console.words import percent, plural, scientific


def reward(points: Sequence[Generation], pools: Sequence[str], move: Move | None, width: int, height: int) -> Markup:
    """The mean reward over generations, on a linear axis from 0 to 1 (further where rewards lie further): the mean of
    neighbouring generations, and the band they lie in. Dotted: the share of groups that teach.

    pools: their order decides their colours. move: with a generation as its step.
    """
    frame = Frame(62, 34, width - 16, height - 44)
    shown = [_bin(group) for group in charts.groups(points, int(frame.right - frame.left) // 12)]
    first, last = points[0].number, points[-1].number
    low, high = min(0.0, *(b.low for b in shown)), max(1.0, *(b.high for b in shown))
    x = linear(first, max(last, first + 1), frame.left, frame.right)
    y = linear(low, high, frame.bottom, frame.top)
    parts = [*charts.axes(x, y, (first, last), ticks(low, high, 5), frame, "generation of rollouts", "mean reward")]
    parts += charts.curves(shown, pools, x, y, frame, "generations")
    parts += charts.move_mark(move, x, frame) if move is not None else []
    for b in shown:
        words = f"mean reward {b.mean:.3f}, {percent(b.direct)} of the groups teach"
        parts.append(charts.hover(b, x, frame, "generation", words))
    span = f"from {points[0].reward:.2f} to {points[-1].reward:.2f}"
    return svg(parts, width, height, f"Mean reward over {plural(len(points), 'generation')}: {span}")


def _bin(group: Sequence[Generation]) -> Bin:
    rewards, mixed = [one.reward for one in group], [one.mixed for one in group]
    return Bin(
        group[0].number, group[-1].number, min(rewards), sum(rewards) / len(group), max(rewards),
        sum(mixed) / len(group), group[0].pool,
    )  # fmt: skip


def divergence(points: Sequence[Point], pools: Sequence[str], name: str, unit: str, width: int, height: int) -> Markup:
    """How far a student's own replies are from its teacher over steps, on a linear axis from 0: the mean of
    neighbouring steps, and the band they lie in. pools: their order decides their colours."""
    frame = Frame(62, 34, width - 16, height - 44)
    shown = [_mean_of(group) for group in charts.groups(points, int(frame.right - frame.left) // 4)]
    first, last = points[0].step, points[-1].step
    low, high = min(0.0, *(b.low for b in shown)), max(1e-9, *(b.high for b in shown))
    x = linear(first, max(last, first + 1), frame.left, frame.right)
    y = linear(low, high, frame.bottom, frame.top)
    parts = [*charts.axes(x, y, (first, last), ticks(low, high, 4), frame, f"step of {name}", unit)]
    parts += charts.curves(shown, pools, x, y, frame, "steps")
    parts += [charts.hover(b, x, frame, "step", f"divergence {scientific(b.mean)}") for b in shown]
    span = f"from {scientific(points[0].loss)} to {scientific(points[-1].loss)}"
    return svg(
        parts, width, height, f"Divergence of {name} from its teacher over {plural(len(points), 'step')}: {span}"
    )


def _mean_of(group: Sequence[Point]) -> Bin:
    losses = [one.loss for one in group]
    mean = sum(losses) / len(losses)
    return Bin(group[0].step, group[-1].step, min(losses), mean, max(losses), None, group[0].pool)


def students(rows: Sequence[Mapping[str, Any]], teacher: float, width: int) -> Markup:
    """Each student (a disc) beside its control (a ring), on a linear axis, with the teacher's accuracy as a line.

    rows: as the report's `students`; teacher: its accuracy in the mode that is taught.
    """
    row = 40
    longest = max(len(one["name"]) for one in rows)
    frame = Frame(max(70, min(8.5 * longest + 22, width / 3)), 26, width - 74, 26 + row * len(rows))
    x = linear(0, 1, frame.left, frame.right)
    parts: list[Markup] = []
    for value in ticks(0, 1, 10 if width > 500 else 4):
        parts.append(tag("line", x1=x(value), x2=x(value), y1=frame.top, y2=frame.bottom, class_="rule"))
        parts.append(tag("text", f"{value:.0%}", x=x(value), y=frame.bottom + 16, text_anchor="middle", class_="tick"))
    at = x(teacher)
    anchor = "middle" if frame.left + 70 < at < frame.right - 20 else "end" if at > frame.left + 70 else "start"
    parts.append(tag("line", x1=at, x2=at, y1=frame.top - 6, y2=frame.bottom, class_="move"))
    parts.append(
        tag("text", f"the teacher, {percent(teacher)}", x=at, y=frame.top - 12, text_anchor=anchor, class_="call")
    )
    for number, one in enumerate(rows):
        parts.append(_pair(one, x(solved(one)), x(one["control"]), frame, frame.top + row * (number + 0.5)))
    middle = (frame.left + frame.right) / 2
    kind = {"thinking": "thinking accuracy", "direct": "accuracy"}[mode_of(rows)]
    parts.append(tag("text", kind, x=middle, y=frame.bottom + 36, text_anchor="middle", class_="label"))
    said = "; ".join(f"{one['name']} {percent(solved(one))}, control {percent(one['control'])}" for one in rows)
    label = f"Students and their controls, of a teacher with {percent(teacher)}: {said}"
    return svg(parts, width, int(frame.bottom) + 44, label)


def _pair(one: Mapping[str, Any], student: float, control: float, frame: Frame, y: float) -> Markup:
    words = f"{one['name']}: {percent(solved(one))}, its control {percent(one['control'])}, n {one['n']}"
    return tag(
        "g",
        tag("title", words),
        tag("text", one["name"], x=0, y=y - 2, class_="stage"),
        tag("text", f"{one['params']:,}", x=0, y=y + 13, class_="note"),
        tag("line", x1=control, x2=student, y1=y, y2=y, class_="between"),
        tag("circle", cx=control, cy=y, r=7, class_="ring"),
        tag("circle", cx=student, cy=y, r=4.5, class_="dot"),
        tag("text", percent(solved(one)), x=frame.right + 74, y=y + 5, text_anchor="end", class_="figure"),
    )
