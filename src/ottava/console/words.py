"""Numbers as a person reads them, the same in the terminal and on the page."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

SHOWN = 12  # hex digits of a digest that are shown


def columns(lines: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Lines of cells as lines of text, each column as wide as its widest cell. right: columns that end together."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  ".join(
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def percent(value: float | None) -> str:
    """A share: 0.923 -> 92.3%."""
    return "unknown" if value is None else f"{value:.1%}"


def interval(entry: Mapping[str, Any]) -> str:
    """The 95% interval of an accuracy."""
    return f"{percent(entry['low'])} to {percent(entry['high'])}"


def points(value: float | None) -> str:
    """A difference of two shares, in percentage points, with its sign: 0.0833 -> +8.3; nought has none."""
    return "unknown" if value is None else f"{100 * value:+.1f}".replace("+0.0", "0.0").replace("-0.0", "0.0")


def range_of(entry: Mapping[str, Any]) -> str:
    """The 95% interval of a difference, in percentage points."""
    return f"{points(entry['low'])} to {points(entry['high'])}"


def bracket(entry: Mapping[str, Any]) -> str:
    """The same, as the terminal shows it: [-1.0, +2.3]."""
    return f"[{points(entry['low'])}, {points(entry['high'])}]"


def seconds(value: float | None) -> str:
    """A duration in the unit that fits: 0.31 s, 12.3 s, 3 min 05 s, 2 h 04 min."""
    if value is None:
        return "unknown"
    if value < 9.995:
        return f"{value:.2g} s" if value < 0.995 else f"{value:.1f} s"
    if value < 99.5:
        return f"{value:.0f} s"
    if value < 3599.5:
        return f"{int(value + 0.5) // 60} min {int(value + 0.5) % 60:02d} s"
    minutes = int(value / 60 + 0.5)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def scientific(value: float | None) -> str:
    """A small number: 3.14e-06 -> 3.1e-6; nought stays 0."""
    if value is None:
        return "unknown"
    if value == 0 or 0.01 <= abs(value) < 1000:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def short(digest: str | None) -> str:
    """The head of a digest."""
    return "unknown" if digest is None else digest[:SHOWN]


def plural(count: int, noun: str) -> str:
    """1 step, 0 steps, 1,200 steps."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def listed(items: list[str]) -> str:
    """a; a and b; a, b and c."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""


def called(mode: str) -> str:
    """What a model does in a mode, as the object or the manner of a sentence."""
    return {"thinking": "thinking", "direct": "answering directly"}[mode]
