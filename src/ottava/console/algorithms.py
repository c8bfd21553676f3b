"""What a report tells of a comparison of algorithms: gains over seeds, what they cost, and how the default follows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ottava.console.rows import Content, artifact, row
from ottava.console.source import Source
from ottava.console.words import bracket, listed, plural, points, range_of, seconds

ALGORITHM = ("name", "gain", "low", "high", "seeds", "default")
BESIDE = ("name", "cpu_s", "rows", "updates", "difference", "difference_low", "difference_high")
"""Of an algorithm, beside its gain: means over seeds, and how far its gain is from the baseline's."""
EQUAL = {"rows": "equal replies", "updates": "equal updates"}
"""What a comparison gave every algorithm as much of, by `compare.equal`."""


def content(source: Source) -> dict[str, Any]:
    """The report's keys algorithms and comparison, null where their stage has not finished."""
    compared = source.summary("compare")
    return {
        "algorithms": compared and [{key: one.get(key) for key in ALGORITHM} for one in compared["algorithms"]],
        "comparison": compared and _comparison(compared),
    }


def _comparison(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What was equal, by what rule the default follows, and what could not be told from the baseline."""
    return {
        **{key: summary[key] for key in ("baseline", "equal", "rule")},
        "undecided": summary["not_shown"],
        "algorithms": [{key: one[key] for key in BESIDE} for one in summary["algorithms"]],
    }


def compared(found: Content) -> list[dict[str, Any]]:
    """The algorithms with all that is told of each, in the table's order. verdict: beside the baseline."""
    how = found["comparison"]
    both = zip(found["algorithms"], how["algorithms"], strict=True)
    return [{**one, **beside, "verdict": _verdict(how, beside)} for one, beside in both]


def _verdict(how: Mapping[str, Any], one: Mapping[str, Any]) -> str:
    if one["name"] == how["baseline"]:
        return "baseline"
    if one["name"] in how["undecided"]:
        return "undecided"
    return "better" if one["difference_low"] > 0 else "worse"


def undecided(found: Content) -> str:
    """Which algorithms could not be told from the baseline, as a sentence."""
    how = found["comparison"]
    if not how["undecided"]:
        return f"Every algorithm was told from the baseline, {how['baseline']}."
    return f"Undecided, as they could not be told from the baseline {how['baseline']}: {listed(how['undecided'])}."


def spent(found: Content) -> str:
    """What was equal, and what was not."""
    costs = [one["cpu_s"] for one in found["comparison"]["algorithms"]]
    took = f"a run took {seconds(min(costs))} to {seconds(max(costs))} of CPU in the mean"
    return f"At {EQUAL[found['comparison']['equal']]}; {took}."


def claims(found: Content) -> Iterator[dict[str, Any]]:
    """Rows of the evidence."""
    if not found["algorithms"]:
        return
    rows = compared(found)
    default = next(one["name"] for one in rows if one["default"])
    each = [
        f"{one['name']} {points(one['gain'])} ({range_of(one)}, {plural(one['seeds'], 'seed')}, "
        f"{seconds(one['cpu_s'])} of CPU, {one['verdict']})"
        for one in sorted(rows, key=lambda one: -one["gain"])
    ]
    yield row(
        "measured",
        f"{len(rows)} algorithms were compared at {EQUAL[found['comparison']['equal']]}; {default} is the default",
        f"gain in thinking accuracy, in points (95% over seeds; CPU seconds of a run, mean): {listed(each)}. "
        f"{undecided(found)} The rule, written before: {found['comparison']['rule']}",
        None,
        f"cat {artifact(found, 'compare')}/algorithms.json",
    )


def lines(found: Content) -> Iterator[str]:
    """Each algorithm's gain over seeds, what it cost, and how the default follows."""
    if not found["algorithms"]:
        return
    wide = max(10, *(1 + len(one["name"]) for one in compared(found)))
    for one in compared(found):
        yield (
            f"{one['name']:<{wide}}{points(one['gain']):>6} points {bracket(one)}  {plural(one['seeds'], 'seed')}  "
            f"{seconds(one['cpu_s'])} CPU  {'default' if one['default'] else one['verdict']}"
        )
    yield spent(found)
    yield undecided(found)
    yield found["comparison"]["rule"]
