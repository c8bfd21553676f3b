"""The report as one file that needs nothing else: no network, no scripts, readable on paper and on a phone.

Everything that comes out of an artifact passes through autoescaping, and the page's own policy
forbids scripts and requests, so that a question in a dataset stays text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ottava.console import algorithms, charts, dots, students, words
from ottava.console.charts import Lane, Move
from ottava.console.history import Bar, History

Content = Mapping[str, Any]

WIDTHS = {"narrow": 330, "medium": 620, "wide": 940}  # pixels; the page's CSS shows the one that fits
MODES = {"thinking": "Thinking", "direct": "Direct", "direct_one_step": "Direct, one step"}
MARKS = {
    "done": "✓", "cached": "✓", "running": "▸", "waiting": "·", "failed": "✕", "interrupted": "‖", "altered": "✕",
    "refused": "✕", "unfinished": "·",
}  # fmt: skip


def render(content: Content, history: History) -> str:
    """The whole page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = ("percent", "interval", "seconds", "scientific", "short", "plural", "listed", "points", "range_of")
    environment.filters |= {name: getattr(words, name) for name in filters}
    environment.filters |= {name: getattr(algorithms, name) for name in ("compared", "spent", "undecided")}
    environment.filters |= {name: getattr(students, name) for name in ("begun", "between", "descent")}
    pools = [pool["pool"] for pool in content["fleet"]]
    return environment.get_template("report.html").render(
        r=content,
        pools=pools,
        rehearsed=any(pool["imitates"] for pool in content["fleet"]),
        marks=MARKS,
        modes=MODES,
        digests=digests(content),
        reference=reference(content),
        loss=_loss(content, history, pools),
        gantt=_gantt(content, history, pools),
        accuracy=_accuracy(content),
        reward=_reward(content, history, pools),
        gains=_gains(content),
        students=_students(content),
        descents=_descents(content, history, pools),
        kept=students.kept(content),
    )


def _sizes(draw: Callable[[int], Markup]) -> Markup:
    """A chart at every width."""
    return Markup("").join(charts.tag("div", draw(width), class_=f"chart {name}") for name, width in WIDTHS.items())


def _loss(content: Content, history: History, pools: Sequence[str]) -> Markup | None:
    if len(history.curve) < 2:
        return None
    move, mark = content["fallback"], None
    if move is not None:
        gap = move["seconds_without_a_step"]
        lines = [f"{move['from']} lost at step {move['at_step']}", f"{words.plural(move['lost_steps'], 'step')} lost"]
        mark = Move(move["at_step"], [*lines, *([] if gap is None else [f"{words.seconds(gap)} without a step"])])
    return _sizes(lambda width: charts.loss(history.curve, pools, mark, width, 300 if width < 500 else 360))


def _reward(content: Content, history: History, pools: Sequence[str]) -> Markup | None:
    drawn = history.generations
    if len(drawn) < 2:
        return None
    move, mark = (content["reinforce"] or {}).get("fallback"), None
    if move is not None:
        at = next((one.number for one in drawn if one.last_step >= move["at_step"]), drawn[-1].number)
        mark = Move(at, [f"{move['from']} lost at step {move['at_step']}"])
    return _sizes(lambda width: dots.reward(drawn, pools, mark, width, 240 if width < 500 else 300))


def _gains(content: Content) -> Markup | None:
    modes = (content["reinforce"] or {}).get("modes") or {}
    rows = [(f"{MODES[mode]}, {when}", both[when]) for mode, both in modes.items() for when in ("before", "after")]
    return charts.intervals(rows, 360) if rows else None


def _students(content: Content) -> Markup | None:
    rows = content["students"]
    return _sizes(lambda width: dots.students(rows, content["traces"]["teacher"], width)) if rows else None


def _descents(content: Content, history: History, pools: Sequence[str]) -> list[Markup]:
    """A chart for each student that learnt from its own replies."""
    drawn = [one for one in content["students"] or () if len(history.own_replies.get(one["name"], ())) > 1]

    def chart(one: Content) -> Callable[[int], Markup]:
        points, unit = history.own_replies[one["name"]], (one["on_policy"] or {}).get("unit") or "divergence"
        return lambda width: dots.divergence(points, pools, one["name"], unit, width, 220)

    return [_sizes(chart(one)) for one in drawn]


def _gantt(content: Content, history: History, pools: Sequence[str]) -> Markup | None:
    if not history.bars:
        return None
    planned = {row["stage"]: row for row in (content["plan"] or {}).get("rows", ())}
    offset = max((bar.end for bar in history.bars if bar.stage == "plan"), default=0.0)
    lanes = [_lane(stage, planned.get(stage["name"]), history.bars, offset) for stage in content["stages"]]
    return _sizes(lambda width: charts.gantt(lanes, pools, width))


def _lane(stage: Content, row: Content | None, bars: Sequence[Bar], offset: float) -> Lane:
    times = None
    if row is not None:
        start = offset + row["start_s"]
        times = (start, offset + row["end_s"], start + row["low"], start + row["high"])
    took = words.seconds(stage["seconds"]) if stage["seconds"] else stage["status"]
    note = f"{took} / {words.seconds(row['planned_s'])}" if row is not None else took
    return Lane(stage["name"], note, times, [bar for bar in bars if bar.stage == stage["name"]])


def _accuracy(content: Content) -> Markup | None:
    rows = [(name, (content["accuracy"] or {}).get(mode)) for mode, name in MODES.items()]
    known = [(name, entry) for name, entry in rows if entry is not None]
    return charts.intervals(known, 360) if known else None


def digests(content: Content) -> list[dict[str, Any]]:
    """Groups {name, equal, rows: [(what, digest)]} of digests that are to be equal."""
    move, training, fp8 = content["fallback"], content["training"], content["fp8"]
    groups: list[dict[str, Any]] = []
    if move is not None and move["before"] is not None:
        after = [(f"arrived on {move['to']}", digest) for digest in move["after"] or ()]
        rows = [(f"left {move['from']}", move["before"]), *after]
        groups.append({"name": "State in the hand-off", "equal": move["handoff_identical"], "rows": rows})
    if training is not None and training["final_state"] is not None:
        rows = [("the run", training["final_state"]), ("its replay", training["replayed_state"])]
        groups.append({"name": "State after the last step", "equal": training["replay_identical"], "rows": rows})
    if (found := content["reinforce"]) is not None:
        move = found["fallback"]
        if move is not None:
            after = [(f"arrived on {move['to']}", digest) for digest in move["after"] or ()]
            rows = [(f"left {move['from']}", move["before"]), *after]
            groups.append({"name": "Reinforcement, handed off", "equal": move["handoff_identical"], "rows": rows})
        rows = [("the run", found["final_state"]), ("from its records", found["replayed_state"])]
        groups.append({"name": "State after reinforcement", "equal": found["replay_identical"], "rows": rows})
    if fp8 is not None:
        rows = list((fp8["layouts"] or {"master": fp8["digest"]}).items())
        groups.append({"name": "Values of the weights, by layout", "equal": fp8["digest_equal"], "rows": rows})
    return groups


def reference(content: Content) -> list[dict[str, Any]]:
    """The extrapolated price of the same work elsewhere: rows {what, size, pool, time, usd, claim}."""
    found = (content["plan"] or {}).get("reference") or {"works": {}, "pools": []}
    names = {"train": "this training run", "at_scale": "a run at scale"}
    return [
        {
            "what": names.get(work, work),
            "size": f"{size['parameters']:.3g} active parameters, {size['tokens']:.3g} tokens",
            "pool": f"{pool['workers']} x {pool['chip']}",
            "time": _span(pool[work]["hours"], _hours),
            "usd": _span(pool[work]["usd"], _usd),
            "claim": pool[work]["claim"],
        }
        for work, size in found["works"].items()
        for pool in found["pools"]
        if work in pool
    ]


def _hours(value: float) -> str:
    return f"{value:,.0f} h" if value >= 10 else f"{words.scientific(3600 * value)} s"


def _usd(value: float) -> str:
    return f"${value:,.0f}" if value >= 10 else f"${words.scientific(value)}"


def _span(estimate: Content, write: Callable[[float], str]) -> str:
    if estimate["high"] is None:
        return f"at least {write(estimate['low'])}"
    return f"{write(estimate['low'])} to {write(estimate['high'])}"
