"""What a run must say of its verifier's verdicts, wherever it is read: in the terminal, the report, the page, `--json`.

The one rule. A reply that could not be graded is not wrong and teaches nothing, so whoever reads an accuracy must know
how many there were. And where in a whole run no group's rewards differ, nothing was learnt from them, however well the
run ended: so ends one whose verifier always says yes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SHOWN = 3
"""Reasons that are named in a remark, the most frequent ones."""


def of_generations(told: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is to be said of the generations of a run, each as its steps' events tell of it: drawn (replies),
    unscorable, reward (the share right of those with a verdict), mixed (the share of groups that teach), and why, if it
    is known (reasons, with how many replies each)."""
    if not told:
        return []
    drawn, lost = (sum(int(one.get(name, 0)) for one in told) for name in ("drawn", "unscorable"))
    why: Counter[str] = Counter()
    for one in told:
        why.update(one.get("why", {}))
    return [*ungraded(lost, drawn, "nothing was learnt from them", why), *_flat(told, lost, drawn)]


def _flat(told: Sequence[Mapping[str, Any]], lost: int, drawn: int) -> list[str]:
    if any(one["mixed"] > 0 for one in told):
        return []
    rewards = {float(one["reward"]) for one in told if one.get("unscorable", 0) < one.get("drawn", 1)}
    said = "the replies of every group had the same reward"
    if drawn and lost == drawn:
        said = "no reply could be graded"
    elif rewards == {1.0}:
        said = "every reply was found right"
    elif rewards == {0.0}:
        said = "every reply was found wrong"
    return [f"nothing was learnt from rewards in {_many(len(told), 'generation')}: {said}"]


def ungraded(lost: int, of: int, so: str, why: Mapping[str, int] | None = None, what: str = "replies") -> list[str]:
    """Of so many replies, so many could not be graded. so: what followed from that; why: reasons, with counts."""
    if not lost:
        return []
    most = sorted((why or {}).items(), key=lambda one: (-one[1], one[0]))[:SHOWN]
    reasons = f" ({', '.join(f'{reason}: {count:,}' for reason, count in most)})" if most else ""
    return [f"{lost:,} of {of:,} {what} could not be graded{reasons}: {so}"]


def of_evaluation(found: Mapping[str, Any], whose: str = "") -> list[str]:
    """What is to be said of an evaluation: {mode: {n, unscorable: {reason: count}, ...}, ...}. whose: which model's."""
    remarks = []
    for mode, entry in found.items():
        if isinstance(entry, Mapping) and (why := entry.get("unscorable")):
            what = f"{mode.replace('_', ' ')} test replies{whose and f' of {whose}'}"
            remarks += ungraded(sum(why.values()), entry["n"], "they count as wrong", why, what)
    return remarks


def of_harvest(counts: Mapping[str, Any]) -> list[str]:
    """What is to be said of a harvest: {graded, unscorable}."""
    lost = counts.get("unscorable", 0)
    return ungraded(lost, counts.get("graded", lost), "none of them was kept", what="harvested replies")


def repeated(drawn: int, kept: int) -> list[str]:
    """Of a test set with questions that were there twice."""
    if drawn == kept:
        return []
    return [f"{drawn - kept:,} of {drawn:,} test problems were there twice and were taken out: {kept:,} are left"]


def said(*remarks: Iterable[str]) -> dict[str, list[str]]:
    """The part of a stage's summary that has its remarks; nothing where there are none."""
    found = list(dict.fromkeys(remark for part in remarks for remark in part))
    return {"remarks": found} if found else {}


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"all {count:,} {noun}s"
