"""What became of a drill, from its run's journal: latencies, losses, broken guarantees; and a campaign's summary."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ottava.supervisor.scenario import FIRST, ONCE, SHARE, TWELVE, Scenario

Events = Sequence[Mapping[str, Any]]
FINISH = 0.8
"""The least share of a campaign of all twelve classes that finishes; the others stop with the right diagnosis."""


@dataclass(frozen=True)
class Outcome:
    """What became of one run. ended: finished | stopped | stuck; detect_s, recover_s: from the fault to its detection
    and to the next step; lost: steps that were reported and done again; undone: those an audit took back;
    corrupt_loads: workers that began from bytes that the undisturbed run never had; after: steps from a wrong gradient
    to the audit that found it, 0 in the same step; goodput: share of the time from the first start to the last step
    that went into steps that count; disk: mounted | injected, where it was to be full; wrong: why a guarantee broke."""

    name: str
    seed: int
    ended: str
    seen: tuple[str, ...]
    identical: bool | None
    detect_s: float | None
    recover_s: float | None
    lost: int
    undone: int
    corrupt_loads: int
    struck: bool
    seconds: float
    pools: tuple[str, ...]
    reason: str = ""
    after: int | None = None
    goodput: float | None = None
    disk: str | None = None
    wrong: tuple[str, ...] = field(default=())


def broken(scenario: Scenario, found: Outcome, events: Events) -> Iterable[str]:
    """The guarantees that a run broke."""
    overlooked = blind(scenario, events)
    gradient = any(e["event"] == "train.injected" and e["kind"] == "gradient" for e in events)
    unseen = gradient and not overlooked and "gradient" not in found.seen  # no audit fell on it: that is chance
    if overlooked:
        yield "an audit passed over a wrong gradient"
    if found.ended == "stuck":
        yield f"it did not end: {found.reason}"
    if found.identical is False and not unseen:
        yield "it ended in other bytes than the same schedule without a fault"
    if found.corrupt_loads:
        yield f"{found.corrupt_loads} workers began from a state that never was"
    if scenario.lost is not None and found.lost > scenario.lost:
        yield f"{found.lost} steps were lost, and at most {scenario.lost} may be"
    strangers = set(found.seen) - scenario.kinds
    if strangers:
        yield f"it was called {', '.join(sorted(strangers))}, and is {' or '.join(sorted(scenario.kinds)) or 'nothing'}"
    if found.ended == "stopped" and not (found.seen and bundled(events)):
        yield f"it stopped without a diagnosis: {found.reason}"
    if not found.struck:
        yield "the fault never struck"
    if any(e["event"] == "drill.outlived" for e in events):
        yield "a worker outlived its supervisor by two seconds"


def blind(scenario: Scenario, events: Events) -> bool:
    """Whether a step was audited and kept although a gradient was wrong in it. An audit that falls on one sees it."""
    lasting = any(fault.sticky for fault in (*scenario.faults, *scenario.later) if fault.kind == "gradient")
    audited = [e for e in events if e["event"] == "train.step" and e["audited"]]
    for struck in (e for e in events if e["event"] == "train.injected" and e["kind"] == "gradient"):
        steps = [e["step"] - struck["step"] for e in audited if e["attempt"] == struck["epoch"]]
        if 1 in steps or (lasting and max(steps, default=0) > 0):
            return True
    return False


def bundled(events: Events) -> bool:
    """Whether the last failure stopped the run, and its diagnosis is on disk."""
    failed = max((i for i, e in enumerate(events) if e["event"] == "train.fault"), default=0)
    folders = [e["folder"] for e in events[failed:] if e["event"] == "train.diagnosis"]
    stopped = any(e["event"] == "train.stop" for e in events[failed:])
    return stopped and any(folder is not None and Path(folder, "diagnosis.json").is_file() for folder in folders)


def foreign(join: Mapping[str, Any], known: Mapping[int, str], moved: bool) -> bool:
    """Whether a worker began from other bytes than the undisturbed run had there. moved: the oracle knows the first
    pool alone."""
    if moved and join["pool"] != FIRST:
        return False
    return bool(known.get(int(join["step"])) != join["digest"][:16])


def lost(events: Events) -> tuple[int, int]:
    """The most steps that were lost at once, and the most that were taken back by an audit."""
    reported = lost = undone = 0
    back = False
    for event in events:
        if event["event"] == "train.step":
            reported = int(event["step"])
        elif event["event"] == "train.rollback":
            back = True
        elif event["event"] == "train.start" and event["phase"] == "main":
            gap = max(0, reported - int(event["step"]))
            lost, undone = (lost, max(undone, gap)) if back else (max(lost, gap), undone)
            reported, back = int(event["step"]), False
    return lost, undone


def after(events: Events) -> int | None:
    """Steps that a wrong gradient passed for right before an audit found it."""
    struck = next((int(e["step"]) for e in events if e["event"] == "train.injected" and e["kind"] == "gradient"), None)
    seen = next((int(e["step"]) for e in events if e["event"] == "train.fault" and e["kind"] == "gradient"), None)
    return None if struck is None or seen is None else seen - struck


def goodput(events: Events) -> float | None:
    """The share of a run's time that went into steps that count."""
    began = next((float(e["t"]) for e in events if e["event"] == "train.start"), None)
    steps = {int(e["step"]): e for e in events if e["event"] == "train.step"}
    if began is None or not steps:
        return None
    spent = max(float(e["t"]) for e in steps.values()) - began
    return round(sum(float(e["seconds"]) for e in steps.values()) / spent, 4) if spent > 0 else None


def latencies(events: Events) -> tuple[float | None, float | None]:
    """Seconds to the first detection, from the last fault before it, and from the first fault to the next step."""
    strikes = [float(e["t"]) for e in events if e["event"] == "train.injected"]
    if not strikes:
        return None, None
    struck = strikes[0]
    seen = next((float(e["t"]) for e in events if e["event"] == "train.fault" and e["t"] >= struck), None)
    detect = None if seen is None else round(seen - max(t for t in strikes if t <= seen), 3)
    starts = [float(e["t"]) for e in events if e["event"] == "train.start" and e["t"] >= struck]
    first = next((float(e["t"]) for e in events if e["event"] == "train.step" and starts and e["t"] > starts[0]), None)
    return detect, None if first is None else round(first - struck, 3)


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What a campaign shows: the whole, and by class."""
    groups = {name: [o for o in outcomes if o.name == name] for name in dict.fromkeys(o.name for o in outcomes)}
    by_fault = {name: _figures(found) for name, found in groups.items()}
    whole = _figures(outcomes)
    if ONCE in groups:
        by_fault[ONCE] |= _audited(groups[ONCE])
        whole["broken"] += not by_fault[ONCE]["inside"]
    due = FINISH if groups.keys() >= set(TWELVE) else None
    share = whole["finished"] / whole["runs"] if outcomes else None
    whole["broken"] += due is not None and share is not None and share < due
    share = share and round(share, 4)
    disk = " and ".join(sorted({o.disk for o in outcomes if o.disk is not None})) or None
    return {**whole, "finished_share": share, "finished_due": due, "disk": disk, "by_fault": by_fault}


def remarks(result: Mapping[str, Any]) -> Iterable[str]:
    """What a summary says besides its figures: how many runs finished, and how a disk came to be full."""
    share, due = result["finished_share"], result["finished_due"]
    if share is not None:
        least = "" if due is None else f", and at least {due:.0%} must"
        yield f"{result['finished']} of {result['runs']} runs finished: {share:.1%}{least}"
    if result["disk"] is not None:
        how = "saves failed with an injected ENOSPC, as no small disk could be mounted"
        yield f"disk: {result['disk']}" + (f" ({how})" if "injected" in result["disk"] else "")


def _audited(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Gradients that were wrong once: how many an audit found, and where 99% of such counts lie."""
    from scipy.stats import binom

    found = sum(o.after is not None for o in outcomes)
    low, high = (int(x) for x in binom.interval(0.99, len(outcomes), SHARE))
    return {"found": found, "share": SHARE, "interval": [low, high], "inside": low <= found <= high}


def _figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    finished = [o for o in outcomes if o.ended == "finished"]
    return {
        "runs": len(outcomes),
        "finished": len(finished),
        "diagnosed": sum(o.ended == "stopped" and not o.wrong for o in outcomes),
        "bit_identical": sum(o.identical is True for o in finished),
        "lost_steps_max": max((o.lost for o in outcomes), default=0),
        "undone_steps_max": max((o.undone for o in outcomes), default=0),
        "found_after_max": max((o.after for o in outcomes if o.after is not None), default=None),
        "corrupt_loads": sum(o.corrupt_loads for o in outcomes),
        "detect_p50_s": _median(o.detect_s for o in outcomes),
        "mttr_p50_s": _median(o.recover_s for o in outcomes),
        "goodput_p50": _median(o.goodput for o in outcomes),
        "broken": sum(bool(o.wrong) for o in outcomes),
    }


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(statistics.median(known), 3) if known else None
