"""What `ottava evaluate` prints: a line a mode, a line a budget, and who won."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ottava.console.words import columns
from ottava.errors import RecipeError


def numbers(text: str | None, option: str) -> list[int]:
    """Whole numbers with commas between them, rising, each once. Raises RecipeError."""
    if text is None:
        return []
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"{text!r} is no list of numbers", where=option, fix="write it as 8,16,32") from None
    return sorted(set(found))


def without_rows(result: Mapping[str, Any]) -> dict[str, Any]:
    """The result without what is one entry a problem."""
    kept = {key: value for key, value in result.items() if key != "rows"}
    if "other" in kept:
        kept["other"] = without_rows(kept["other"])
    return kept


def text(result: Mapping[str, Any]) -> str:
    """The result as tables. Intervals are of 95%."""
    both = [result, *([result["other"]] if "other" in result else [])]
    letters = [""] if len(both) == 1 else ["A ", "B "]
    blocks = [f"{result['task']}, n {result['n']}, seed {result['seed']}, temperature {result['temperature']:g}"]
    blocks += [f"{letter}{one['model']}" for letter, one in zip(letters, both, strict=True)]
    lines = [
        _line(letter, mode, figures)
        for letter, one in zip(letters, both, strict=True)
        for mode, figures in one["modes"].items()
    ]
    blocks += ["", *columns([_HEAD, *lines])]
    curve = [
        [f"{letter}{point['tokens']}", share(point, "accuracy"), f"{point['thought']:.1f}"]
        for letter, one in zip(letters, both, strict=True)
        for point in one["budgets"]
    ]
    if curve:
        blocks += ["", *columns([["budget", "greedy", "ids of thinking"], *curve])]
    if "compare" in result:
        blocks += ["", *(_verdict(mode, found) for mode, found in result["compare"].items())]
    asked = [(mode, *task) for mode, tasks in result.get("harness", {}).items() for task in tasks.items()]
    if asked:
        blocks += ["", *(_harness(*one) for one in asked)]
    return "\n".join(blocks)


_HEAD = ["mode", "pass@1", "pass@k", "greedy", "followed", "ids: mean, p50, p95", "cut off"]


def _line(letter: str, mode: str, figures: Mapping[str, Any]) -> list[str]:
    tries = ", ".join(f"{k}: {found['value']:.1%}" for k, found in figures["pass_k"].items() if k != "1")
    length = figures["length"]
    lost = f" ({figures['unscorable']} unscorable)" if figures["unscorable"] else ""
    return [
        f"{letter}{mode}",
        share(figures, "pass1") + lost,
        tries or "-",
        share(figures["greedy"]),
        f"{figures['mode_following']:.1%}",
        f"{length['mean']:.1f}, {length['p50']}, {length['p95']}",
        f"{length['truncated']:.1%}",
    ]


def share(entry: Mapping[str, Any], key: str = "value") -> str:
    """A share with its interval."""
    return f"{entry[key]:.1%} [{entry['low']:.1%}, {entry['high']:.1%}]"


def _verdict(mode: str, found: Mapping[str, Any]) -> str:
    if found["low"] > 0 or found["high"] < 0:
        said = "B is better" if found["difference"] > 0 else "A is better"
    else:
        said = "no difference is shown"
    return (
        f"{mode}: {said}: B - A {found['difference']:+.1%} [{found['low']:+.1%}, {found['high']:+.1%}]; only B solved "
        f"{found['b_better']}, only A {found['a_better']} of {found['n']} (greedy; McNemar p {found['p_value']:.2g})"
    )


def _harness(mode: str, name: str, said: Mapping[str, Any]) -> str:
    figures = ", ".join(f"{key} {value:.4f}" for key, value in said.items() if isinstance(value, float))
    line = f"lm-evaluation-harness, {mode}: {name} n {said['n']}: {figures}"
    if "differing" in said:
        count = len(said["differing"])
        line += "; the same answer to every problem" if not count else f"; another answer to {count} problems"
    return line
