"""What a report tells of students: each beside its control, what it began from, and what its own replies brought.

A student and its control may be asked in different modes and may begin from a model that was there. Both are said
wherever a figure of theirs is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ottava.console.rows import Content, artifact, row
from ottava.console.source import Source
from ottava.console.words import bracket, called, interval, listed, percent, plural, points, range_of, scientific
from ottava.tasks.statistics import wilson

KEEPS = 0.98  # of the teacher's accuracy, for a student to count as having kept it
STUDENT = (
    "name", "arch", "params", "thinking", "control", "low", "high", "kept", "n", "stands_for", "pool", "start",
    "before",
)  # fmt: skip
ELSEWHERE = ("direct", "control_thinking")  # in a mode that is not the one of the comparison
ASKED = ("asked", "right", "checked", "steps_right", "steps_respelt", "steps_right_share")
UNITS = {"gkd": "nats an id", "alm": "nats a chunk", "uld": "L1 distance of a reply"}
"""What the divergence is told in, by its kind."""


# --- the object --------------------------------------------------------------------------------------------------


def content(source: Source) -> dict[str, Any]:
    """The report's keys students and traces, null where their stage has not finished."""
    distilled = source.summary("distill")
    return {
        "students": distilled and [_student(one, source) for one in distilled["students"]],
        "traces": distilled and _traces(distilled),
    }


def _student(one: Mapping[str, Any], source: Source) -> dict[str, Any]:
    modes = {key: one.get(key) or "thinking" for key in ("mode", "control_mode")}
    more = {key: one[key] for key in ELSEWHERE if key in one and set(modes.values()) != {"thinking"}}
    return {key: one.get(key) for key in STUDENT} | modes | more | {"on_policy": _on_policy(one, source)}


def _on_policy(one: Mapping[str, Any], source: Source) -> dict[str, Any] | None:
    """What a student's own replies brought, and its losses: [step, loss]."""
    found = one.get("on_policy")
    if not isinstance(found, Mapping):  # none, or a record of when it was the accuracy alone
        return None
    how = (source.asked["stages"]["distill"].get("on_policy") or {}).get("divergence") or {}
    losses = [[point.step, point.loss] for point in source.history.own_replies.get(one["name"], ())]
    return {**found, "divergence": how, "unit": UNITS.get(how.get("kind", "")), "losses": losses}


def _traces(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The teacher's own accuracy, how much it was asked, and the share of its right answers whose steps are right."""
    counts = {key: summary["traces"].get(key) for key in ASKED}
    low, high = wilson(counts["steps_right"], counts["checked"]) if counts["checked"] else (None, None)
    return {"teacher": summary["teacher"], **counts, "low": low, "high": high}


def solved(student: Mapping[str, Any]) -> float:
    """A student's accuracy in the mode that it was taught."""
    return float(student["direct"] if mode_of([student]) == "direct" else student["thinking"])


def mode_of(students: Sequence[Mapping[str, Any]]) -> str:
    """The mode that students were taught: one for all of them."""
    return str(students[0].get("mode", "thinking"))


def control_mode_of(students: Sequence[Mapping[str, Any]]) -> str:
    """The mode that their controls were asked in: one for all of them."""
    return str(students[0].get("control_mode", "thinking"))


def keeping(students: Sequence[Mapping[str, Any]], teacher: float) -> int:
    """How many students have at least KEEPS of the teacher's accuracy, in the mode that is taught."""
    return sum(teacher > 0 and solved(one) >= KEEPS * teacher - 1e-9 for one in students)


def ahead(students: Sequence[Mapping[str, Any]]) -> int:
    """How many students are above their controls, by the whole interval of the difference."""
    return sum(one["low"] > 0 for one in students)


def behind(students: Sequence[Mapping[str, Any]]) -> int:
    """How many students are below their controls, by the whole interval of the difference."""
    return sum(one["high"] < 0 for one in students)


def kept(found: Content) -> str | None:
    """How many students keep KEEPS of the teacher, in words."""
    students = found["students"]
    return f"{keeping(students, found['traces']['teacher'])} of {len(students)}" if students else None


# --- words -------------------------------------------------------------------------------------------------------


def _of(count: int, students: Sequence[Mapping[str, Any]]) -> str:
    return f"{count} of {plural(len(students), 'student')}"


def beside(students: Sequence[Mapping[str, Any]]) -> str:
    """What students do more of than their controls, and in which mode each was asked."""
    own, other = mode_of(students), control_mode_of(students)
    if own == other:
        return f"{called(own)} than their controls"
    return f"{called(own)} than their controls {called(other)}"


def instead(students: Sequence[Mapping[str, Any]]) -> str:
    """What controls learn in the place of what the teacher said, and how they are asked."""
    if control_mode_of(students) == "thinking":
        return "on the cold-start traces in the place of the teacher's"
    return "on the answers alone to all training problems, asked directly; its examples may be shorter"


def begun(students: Sequence[Mapping[str, Any]]) -> str:
    """What students and their controls began from."""
    starts = [(one["name"], one.get("start")) for one in students]
    if not any(start for _, start in starts):
        return "all from random weights"
    return listed([f"{name} from {start or 'random weights'}" for name, start in starts])


def between(students: Sequence[Mapping[str, Any]]) -> str:
    """Where the two are asked in different modes: that this is part of the difference; else empty."""
    if mode_of(students) == control_mode_of(students):
        return ""
    also = [one for one in students if one.get("control_thinking") is not None]
    known = listed([f"{one['name']}'s {percent(one['control_thinking'])}" for one in also])
    said = f"; asked with thinking on, controls solve: {known}" if also else ""
    return f"; the difference is that of the modes, too{said}"


def _sizes(students: Sequence[Mapping[str, Any]]) -> str:
    sizes = [one["params"] for one in students]
    return f"{min(sizes):,} to {max(sizes):,}"


def _places(students: Sequence[Mapping[str, Any]]) -> str:
    return listed([f"{one['name']} for {one['stands_for']}" for one in students if one["stands_for"]])


def _share(traces: Mapping[str, Any]) -> float | None:
    return traces["steps_right"] / traces["checked"] if traces["checked"] else None


def descent(own: Mapping[str, Any]) -> str:
    """How a student's divergence from its teacher went; empty where no step was told."""
    losses = own["losses"]
    unit = f" {own['unit']}" if own["unit"] else ""
    return f"{scientific(losses[0][1])} -> {scientific(losses[-1][1])}{unit}" if losses else ""


# --- claims ------------------------------------------------------------------------------------------------------


def claims(found: Content) -> Iterator[dict[str, Any]]:
    """Rows of the evidence."""
    students = found["students"]
    if students:
        check = f"cat {artifact(found, 'distill')}/students.json"
        yield from _taught(students, found["traces"]["teacher"], check)
        yield from _since(students, check)
        yield from _own_replies(students, found["traces"]["teacher"], check)
        yield from _standing(students)
    yield from _traced(found)


def _taught(students: Sequence[Mapping[str, Any]], teacher: float, check: str) -> Iterator[dict[str, Any]]:
    same = f"the same {students[0]['n']} test problems for all and for the teacher, greedy decoding; one seed"
    kept, mode = listed([f"{one['name']} {percent(solved(one))}" for one in students]), mode_of(students)
    yield row(
        "measured",
        f"{_of(keeping(students, teacher), students)} keep at least {KEEPS:.0%} of the teacher's {percent(teacher)} "
        f"{called(mode)}",
        f"{same}; {kept}, as measured, without an interval of the share",
        None,
        check,
    )
    each = listed([f"{one['name']} {points(solved(one) - one['control'])} ({range_of(one)})" for one in students])
    less = behind(students)
    yield row(
        "measured",
        f"{_of(ahead(students), students)} solve more {beside(students)}" + (f", and {less} less" if less else ""),
        f"a control is the same student from the same first weights ({begun(students)}), with as many examples in as "
        f"many steps, {instead(students)}; student minus control on the same problems, in points "
        f"(paired 95%, each by itself): {each}{between(students)}; one seed",
        None,
        check,
    )


def _since(students: Sequence[Mapping[str, Any]], check: str) -> Iterator[dict[str, Any]]:
    """Of students that began from a model that was there."""
    for one in students:
        if (gain := one.get("before")) is not None:
            yield row(
                "measured",
                f"{one['name']} began at {percent(gain['before'])} {called(mode_of([one]))} and is at "
                f"{percent(gain['after'])}: "
                f"{points(gain['after'] - gain['before'])} points (95%: {range_of(gain)})",
                f"{one['start']} before its first step and after its last, on the same {gain['n']} test problems, "
                "greedy decoding, paired score interval; one seed",
                None,
                check,
            )


def _own_replies(students: Sequence[Mapping[str, Any]], teacher: float, check: str) -> Iterator[dict[str, Any]]:
    """Of students that went on from there on their own replies."""
    for one in students:
        if (own := one["on_policy"]) is None:
            continue
        went = f"; its divergence from the teacher, first step and last: {descent(own)}" if own["losses"] else ""
        yield row(
            "measured",
            f"On its own replies {one['name']} went on from {percent(own['before'])} {called(mode_of([one]))} to "
            f"{percent(own['after'])}: {points(own['after'] - own['before'])} points (95%: {range_of(own)})",
            f"before the first step on its own replies and after the last, on the same {own['n']} test problems, "
            f"greedy decoding, paired score interval; {percent(own['kept'])} of the teacher's {percent(teacher)} on "
            f"the same problems in the same mode, without an interval of the share{went}; one seed",
            None,
            check,
        )


def _standing(students: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    if places := _places(students):
        yield row(
            "rehearsal",
            f"{plural(len(students), 'small student')} stand in for published ones",
            f"dense models with {_sizes(students)} parameters: {places}; nothing is shown of the published models",
        )


def _traced(found: Content) -> Iterator[dict[str, Any]]:
    traces = found["traces"]
    if traces is None or not traces["checked"]:
        return
    yield row(
        "measured",
        f"Of the teacher's traces with a right answer, {percent(_share(traces))} have right steps "
        f"(95%: {interval(traces)}); {percent(traces['steps_respelt'] / traces['checked'])} more do the same steps in "
        "another writing",
        f"{traces['asked']:,} problems asked, {traces['right']:,} answered rightly, {traces['checked']:,} traces "
        "checked step by step, Wilson interval; the students learn from every right answer, whatever its steps",
        None,
        f'grep -o \'"steps": *"[a-z]*"\' {artifact(found, "distill")}/traces/cold_start.jsonl | sort | uniq -c',
    )


# --- sentences ---------------------------------------------------------------------------------------------------


def story(found: Content) -> Iterator[str]:
    """Sentences of the verdict."""
    students = found["students"]
    if not students:
        return
    teacher = found["traces"]["teacher"]
    differ = mode_of(students) != control_mode_of(students)
    how = f", {called(mode_of(students))}," if differ else ""
    less = f" and {behind(students)} less" if behind(students) else ""
    controls = f"their controls, which had no teacher and were asked {_manner(control_mode_of(students))}"
    yield (
        f"{_of(keeping(students, teacher), students)} keep at least {KEEPS:.0%} of the teacher's "
        f"{percent(teacher)}; {ahead(students)} solve more{less}{how} than "
        f"{controls if differ else 'their controls, which had no teacher'} (one seed)."
    )


def _manner(mode: str) -> str:
    return {"thinking": "with thinking on", "direct": "directly"}[mode]


def stand_ins(found: Content) -> Iterator[str]:
    """What the students are a rehearsal of."""
    students = found["students"] or ()
    if places := _places(students):
        yield f"The students, dense models with {_sizes(students)} parameters: {places}"


# --- the terminal ------------------------------------------------------------------------------------------------


def lines(found: Content) -> Iterator[str]:
    """Each student beside its control, what it began at, and what the traces are worth."""
    students, traces = found["students"], found["traces"]
    if not students:
        return
    teacher, modes = traces["teacher"], (mode_of(students), control_mode_of(students))
    yield (
        f"{keeping(students, teacher)} of {len(students)} keep {KEEPS:.0%} of the teacher's {percent(teacher)}; n "
        f"{students[0]['n']} each, one seed"
    )
    if modes != ("thinking", "thinking"):
        yield f"students asked {_manner(modes[0])}, controls {_manner(modes[1])}"
    for one in students:
        yield (
            f"{one['name']:<9}{one['params']:>9,}  {percent(solved(one)):>6}  control "
            f"{percent(one['control']):>6}  {points(solved(one) - one['control']):>5} {bracket(one)}"
        )
        if (gain := one.get("before")) is not None:
            risen = points(gain["after"] - gain["before"])
            yield f"{one['name']:<9}before {percent(gain['before'])}, {risen} {bracket(gain)}; from {one['start']}"
        if (own := one["on_policy"]) is not None:
            risen = points(own["after"] - own["before"])
            went = f"; loss {descent(own)}" if own["losses"] else ""
            yield (
                f"{one['name']:<9}on its own replies {percent(own['before'])} -> {percent(own['after'])}, {risen} "
                f"{bracket(own)}, {percent(own['kept'])} of the teacher's{went}"
            )
    steps = f"; steps right in {percent(_share(traces))} [{interval(traces).replace(' to ', ', ')}]"
    yield f"traces: {traces['right']:,} right of {traces['asked']:,} asked{steps if traces['checked'] else ''}"
