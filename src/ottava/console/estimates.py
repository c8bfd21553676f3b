"""What `predict`, `calibrate` and `cost` print, and the chart of predictions against actual runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from ottava.console.charts import Frame, log_ticks, logarithmic, svg, tag
from ottava.planner.calibrate import Guess
from ottava.planner.predict import Prediction

GROUPS = {"all": "all runs", "dense": "dense", "experts": "mixture of experts", "publisher": "publisher unknown"}
COLOURS = {"ampere": "#7a5195", "hopper": "#2a7f62", "blackwell": "#d45087", "ascend": "#c65102"}
STYLE = """
text { font: 12px sans-serif; fill: #333 } .rule { stroke: #ddd } .axis { stroke: #555 } .equal { stroke: #555 }
.tick { fill: #666 } .bar { stroke-width: 1; stroke-opacity: .45 }
"""


def row(prediction: Prediction, ignored: Sequence[str] = ()) -> dict[str, Any]:
    """One row of `ottava predict --json`, six significant digits."""

    def short(value: float | None) -> float | None:
        return None if value is None else float(f"{value:.6g}")

    layout = prediction.layout
    return {
        "id": prediction.id,
        "tokens_per_s_per_chip": short(prediction.tokens_per_s_per_chip),
        "low": short(prediction.low),
        "high": short(prediction.high),
        "declined": prediction.declined,
        "memory_gb": short(prediction.memory_gb),
        "state_gb": short(prediction.state_gb),
        "step_s": short(prediction.seconds),
        "hours": None if prediction.hours is None else [short(value) for value in prediction.hours],
        "parallel": None if layout is None else layout.model_dump(by_alias=True),
        "parts_s": None if prediction.parts is None else {name: short(s) for name, s in prediction.parts.items()},
        "why": list(prediction.why),
        "ignored": list(ignored),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `row` for a terminal."""
    width = max([len(str(one["id"])) for one in rows] + [4])
    lines = [f"{'work':{width}}  tokens/s/chip      80% interval  memory GB  layout"]
    for one in rows:
        if one["declined"] is not None:
            lines.append(f"{one['id']:{width}}  declined: {one['declined']}")
            continue
        memory = "" if one["memory_gb"] is None else f"{one['memory_gb']:.1f}"
        sizes = one["parallel"] or {}
        layout = " ".join(f"{name}{size}" for name, size in sizes.items() if size != 1) or "one" if sizes else ""
        span = f"{one['low']:,.0f} to {one['high']:,.0f}"
        lines.append(f"{one['id']:{width}}  {one['tokens_per_s_per_chip']:13,.0f}  {span:>16}  {memory:>9}  {layout}")
    return "\n".join(lines)


def accuracy_table(groups: Mapping[str, Mapping[str, float]]) -> str:
    """The cross-validation's figures as a Markdown table."""
    head = "| group | runs | mean error | median | worst | bias | in the 80% interval | 6ND x MFU | times better |"
    lines = [head, "|---" * 9 + "|"]
    for name, one in groups.items():
        lines.append(
            f"| {GROUPS.get(name, name)} | {one['runs']:.0f} | {one['mape']:.1%} | {one['median']:.1%} "
            f"| {one['worst']:.1%} | {one['bias']:+.1%} | {one['inside']:.0%} | {one['baseline']:.1%} "
            f"| {one['ratio']:.2f} |"
        )
    return "\n".join(lines)


def bill_text(bill: Mapping[str, Any]) -> str:
    """A bill for a terminal: marginal beside amortised, and where each figure is from."""
    low, high = bill["usd_amortised_range"]
    fleet, dear = bill["fleet"], bill["fleet"]["usd"]
    lines = [
        f"{bill['name']}: {bill['gpu_hours']:,.0f} chip hours on {bill['gpus']:,} {bill['chip']}",
        f"  marginal   ${bill['usd_marginal']:,.0f} at ${bill['usd_per_gpu_hour']:g} an hour",
        f"  amortised  ${bill['usd_amortised']:,.0f} (${low:,.0f} to ${high:,.0f}): "
        "its hours of a fleet that was bought",
        f"  the fleet  ${dear['mid']:,.0f} (${dear['low']:,.0f} to ${dear['high']:,.0f}) for {fleet['chips']:,} chips",
    ]
    for one in bill["licence"]:
        lines.append(f"  licence    from {one['from']}: {one['chip']} {one['what']}")
    return "\n".join([*lines, *(f"  source     {source}" for source in bill["sources"])])


def against_actual(guesses: Sequence[Guess], width: int = 720, height: int = 560) -> Markup:
    """Cross-validated predictions with their 80% intervals over actual speeds, both logarithmic, coloured by family."""
    frame = Frame(78, 24, width - 24, height - 52)
    low = min(min(one.low, one.actual) for one in guesses) / 1.2
    high = max(max(one.high, one.actual) for one in guesses) * 1.2
    x = logarithmic(low, high, frame.left, frame.right)
    y = logarithmic(low, high, frame.bottom, frame.top)
    parts = [tag("style", Markup(STYLE))]
    for value in log_ticks(low, high):
        parts += [
            tag("line", x1=frame.left, x2=frame.right, y1=y(value), y2=y(value), class_="rule"),
            tag("line", x1=x(value), x2=x(value), y1=frame.top, y2=frame.bottom, class_="rule"),
            tag("text", f"{value:,.0f}", x=frame.left - 6, y=y(value) + 4, text_anchor="end", class_="tick"),
            tag("text", f"{value:,.0f}", x=x(value), y=frame.bottom + 17, text_anchor="middle", class_="tick"),
        ]
    parts.append(tag("line", x1=x(low), y1=y(low), x2=x(high), y2=y(high), class_="equal"))
    for one in guesses:
        colour = COLOURS.get(one.run.family, "#333")
        at = x(one.actual)
        said = f"{one.run.id}: actual {one.actual:,.0f}, predicted {one.middle:,.0f}, {one.low:,.0f} to {one.high:,.0f}"
        bar = tag("line", x1=at, x2=at, y1=y(one.low), y2=y(one.high), stroke=colour, class_="bar")
        hollow = {"fill": "#fff", "stroke": colour} if one.run.sparse else {"fill": colour}
        parts.append(tag("g", tag("title", said), bar, tag("circle", cx=at, cy=y(one.middle), r=4, **hollow)))
    for number, family in enumerate(sorted({one.run.family for one in guesses})):
        top = frame.top + 16 + 18 * number
        parts.append(tag("circle", cx=frame.left + 14, cy=top - 4, r=4, fill=COLOURS.get(family, "#333")))
        parts.append(tag("text", family, x=frame.left + 24, y=top))
    middle = (frame.left + frame.right) / 2
    words = "published tokens/s and chip (hollow: mixture of experts)"
    parts.append(tag("text", words, x=middle, y=frame.bottom + 40, text_anchor="middle"))
    turned = f"translate(14 {(frame.top + frame.bottom) / 2:.0f}) rotate(-90)"
    words = "predicted without its site, with the 80% interval"
    parts.append(tag("text", words, transform=turned, text_anchor="middle"))
    drawn = svg(parts, width, height, f"Predicted against published speed of {len(guesses)} runs")
    return drawn.replace("<svg ", Markup('<svg xmlns="http://www.w3.org/2000/svg" '), 1)
