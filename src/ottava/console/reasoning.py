"""What a report tells of reinforcement, of the students and of a comparison of algorithms.

Every difference stands with its interval and with what it was taken over. One run has one seed: what a gain is over
seeds, a run cannot tell, and its report does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ottava.console.history import REINFORCED, Generation
from ottava.console.rows import Content, artifact, row
from ottava.console.source import MODES, Source, entry, move
from ottava.console.words import bracket, interval, listed, percent, plural, points, range_of, scientific, seconds
from ottava.tasks.statistics import paired, wilson
from ottava.trainer import verdicts

KEEPS = 0.98  # of the teacher's accuracy, for a student to count as having kept it
STUDENT = ("name", "arch", "params", "thinking", "control", "low", "high", "kept", "n", "stands_for", "pool")
LATER = ("mode", "control_mode", "direct", "start", "before")  # only of students that were not asked with thinking on
TUNED = ("train", "train-2")
ASKED = ("asked", "right", "checked", "steps_right", "steps_respelt", "steps_right_share")
ALGORITHM = ("name", "gain", "low", "high", "seeds", "default")
BESIDE = ("name", "cpu_s", "rows", "updates", "difference", "difference_low", "difference_high")
"""Of an algorithm, beside its gain: means over seeds, and how far its gain is from the baseline's."""
EQUAL = {"rows": "equal replies", "updates": "equal updates"}
"""What a comparison gave every algorithm as much of, by `compare.equal`."""


# --- the object --------------------------------------------------------------------------------------------------


def content(source: Source) -> dict[str, Any]:
    """The report's keys reinforce, students, traces, algorithms and comparison, null where their stage has not
    finished; and tuned where a published model was fine-tuned."""
    distilled, compared = source.summary("distill"), source.summary("compare")
    return {
        "reinforce": _reinforce(source),
        "students": distilled and [_student(one) for one in distilled["students"]],
        "traces": distilled and _traces(distilled),
        "algorithms": compared and [{key: one.get(key) for key in ALGORITHM} for one in compared["algorithms"]],
        "comparison": compared and _comparison(compared),
        **_tuned(source),
    }


def remarks(source: Source) -> list[dict[str, str]]:
    """What stages say of verdicts, beside what they found: rows {stage, remark}. Of a round of reinforcement that has
    not finished, what its generations so far come to, by the rule that it will be judged by."""
    rows = [
        {"stage": stage, "remark": str(remark)}
        for stage in source.asked["stages"]
        for remark in (source.summary(stage) or {}).get("remarks", ())
    ]
    drawn = source.history.generations
    if drawn and source.summary(drawn[-1].round) is None:
        told = verdicts.of_generations([vars(one) for one in drawn])
        rows += [{"stage": drawn[-1].round, "remark": f"so far, {remark}"} for remark in told]
    return rows


def _tuned(source: Source) -> dict[str, Any]:
    """Rounds of fine-tuning that began from a model that was there, on answers or on its own right replies."""
    summaries = {stage: source.summary(stage) or {} for stage in TUNED}
    rows = [
        {
            "stage": stage,
            **summary["gain"],
            **{key: (summary.get("traces") or {}).get(key) for key in ("asked", "right")},
        }
        for stage, summary in summaries.items()
        if "gain" in summary
    ]
    return {"tuned": rows} if rows else {}


def _student(one: Mapping[str, Any]) -> dict[str, Any]:
    more = {key: one[key] for key in LATER if key in one and ("mode" in one or key != "direct")}
    return {key: one.get(key) for key in STUDENT} | more


def solved(student: Mapping[str, Any]) -> float:
    """A student's accuracy in the mode that it was taught."""
    return float(student["direct"] if mode_of([student]) == "direct" else student["thinking"])


def mode_of(students: Sequence[Mapping[str, Any]]) -> str:
    """The mode that students were taught: one for all of them."""
    return str(students[0].get("mode", "thinking"))


def _reinforce(source: Source) -> dict[str, Any] | None:
    stage = next((name for name in reversed(REINFORCED) if source.summary(name)), "")
    summary = source.summary(stage)
    if summary is None:
        return None
    spec, proof = source.asked["stages"][stage], source.file(stage, "proof.json") or {}
    drawn = source.history.generations
    gain = summary["reinforce"]
    return {
        **{key: gain[key] for key in ("before", "after", "low", "high", "n")},
        "stage": stage,
        "mode": spec.get("mode", "thinking"),
        "modes": _modes(source, stage),
        "algorithm": (spec.get("policy") or {}).get("loss"),
        "steps": summary.get("steps"),
        "generations": len(drawn),
        "gap": sum(one.gap for one in drawn) / len(drawn) if drawn else None,
        "gap_max": max((one.gap_max for one in drawn), default=None),
        **_bounded(drawn),
        "pool": summary.get("pool"),
        "on_grid_from_step": summary.get("on_grid_from_step"),
        "fallback": move(summary.get("fallback")),
        **source.faults(stage, f"{stage}-replay"),
        "final_state": proof.get("final"),
        "replayed_state": proof.get("replay"),
        "replay_identical": proof.get("replay_identical"),
        **({"curriculum": summary["curriculum"]} if "curriculum" in summary else {}),
    }


def _bounded(drawn: Sequence[Generation]) -> dict[str, Any]:
    """gap_bound: the least that a generation's largest gap was held against; gap_within: whether every one was below
    its own. None where a generation was held against nothing."""
    bounds = [one.bound for one in drawn]
    known = [bound for bound in bounds if bound is not None]
    if not known or len(known) < len(bounds):
        return {"gap_bound": None, "gap_within": None}
    within = all(one.gap_max <= bound for one, bound in zip(drawn, known, strict=True))
    return {"gap_bound": min(known), "gap_within": within}


def _modes(source: Source, stage: str) -> dict[str, Any]:
    """By mode: the accuracy before and after, and the paired interval of their difference."""
    files = [source.file(stage, name) or {} for name in ("before.json", "evaluation.json")]
    found: dict[str, Any] = {}
    for mode in MODES:
        before, after = (file.get(mode) for file in files)
        if before is None or after is None:
            continue
        both = paired(before["right"], after["right"])
        found[mode] = {"before": entry(before), "after": entry(after), "low": both.low, "high": both.high}
    return found


def _traces(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The teacher's own accuracy, how much it was asked, and the share of its right answers whose steps are right."""
    counts = {key: summary["traces"].get(key) for key in ASKED}
    low, high = wilson(counts["steps_right"], counts["checked"]) if counts["checked"] else (None, None)
    return {"teacher": summary["teacher"], **counts, "low": low, "high": high}


def _comparison(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What was equal, by what rule the default follows, and what could not be told from the baseline."""
    return {
        **{key: summary[key] for key in ("baseline", "equal", "rule")},
        "undecided": summary["not_shown"],
        "algorithms": [{key: one[key] for key in BESIDE} for one in summary["algorithms"]],
    }


# --- claims ------------------------------------------------------------------------------------------------------


def claims(found: Content) -> Iterator[dict[str, Any]]:
    """Rows of the evidence."""
    for part in (_fine_tuned, _gained, _agreed, _taught, _traced, _compared):
        yield from part(found)


def _fine_tuned(found: Content) -> Iterator[dict[str, Any]]:
    for one in found.get("tuned", ()):
        learnt = "the answers alone" if one["asked"] is None else "right replies of the model so far"
        told = "" if one["asked"] is None else f"; {one['right']:,} right replies to {one['asked']:,} training problems"
        yield row(
            "measured",
            f"Fine-tuning on {learnt} ({one['stage']}) takes {_mode(one['mode'])} from {percent(one['before'])} to "
            f"{percent(one['after'])}: {points(one['after'] - one['before'])} points (95%: {range_of(one)})",
            f"the model that it began from and the model after the last step, on the same {one['n']} test problems, "
            f"greedy decoding, paired score interval; one seed{told}",
            None,
            f"cat {artifact(found, one['stage'])}/manifest.json",
        )


def _gained(found: Content) -> Iterator[dict[str, Any]]:
    gain = found["reinforce"]
    if gain is None:
        return
    where, mode = artifact(found, gain["stage"]), gain["mode"]
    files = f"json.load(open(f'{where}/{{f}}.json'))['{mode}']['right'] for f in ('before', 'evaluation')"
    span = f"from {percent(gain['before'])} to {percent(gain['after'])}"
    said = f"{span}: {points(gain['after'] - gain['before'])} points (95%: {range_of(gain)})"
    if gain["low"] > 0 or gain["high"] < 0:
        claim, holds = f"Reinforcement raises {_mode(mode)} {said}", gain["low"] > 0
    else:
        claim, holds = f"Nothing shows that reinforcement changes {_mode(mode)}, {said}", None
    yield row(
        "measured",
        claim,
        f"the model before the first step and the model after the last, on the same {gain['n']} test problems that "
        "training never saw, greedy decoding, paired score interval; one seed",
        holds,
        f'python -c "import json; from ottava.tasks.statistics import paired; print(paired(*({files})))"',
    )


def _mode(mode: str) -> str:
    return {"thinking": "thinking", "direct": "answering directly"}[mode]


def _agreed(found: Content) -> Iterator[dict[str, Any]]:
    drawn = found["reinforce"]
    if drawn is None or drawn["gap_max"] is None:
        return
    yield row(
        "measured",
        f"Sampler and learner agree on every token to within {scientific(drawn['gap_max'])} nats",
        "log-probability of each sampled token, in the groups that were learned from, by the engine that drew it and "
        f"by the learner before its update; {plural(drawn['generations'], 'generation')}, "
        f"{scientific(drawn['gap'])} on average; ids at a tie between experts are set aside; {_held(drawn)}",
        drawn["gap_within"],
        f'grep \'"phase": *"{drawn["stage"]}"\' journal.jsonl '
        "| grep -o '\"gap_max\": *[^,}]*' | sort -t: -gk2 | tail -1",
    )


def _held(drawn: Mapping[str, Any]) -> str:
    if drawn["gap_bound"] is None:
        return "held against no bound"
    return (
        f"held against {scientific(drawn['gap_bound'])} nats, 8 times the 99.9th percentile of what rounding alone "
        "does to this model's log-probabilities, measured before the first step"
    )


def keeping(students: Sequence[Mapping[str, Any]], teacher: float) -> int:
    """How many students have at least KEEPS of the teacher's accuracy, in the mode that is taught."""
    return sum(teacher > 0 and solved(one) >= KEEPS * teacher - 1e-9 for one in students)


def ahead(students: Sequence[Mapping[str, Any]]) -> int:
    """How many students are above their controls, by the whole interval of the difference."""
    return sum(one["low"] > 0 for one in students)


def kept(found: Content) -> str | None:
    """How many students keep KEEPS of the teacher, in words."""
    students = found["students"]
    return f"{keeping(students, found['traces']['teacher'])} of {len(students)}" if students else None


def _of(count: int, students: Sequence[Mapping[str, Any]]) -> str:
    return f"{count} of {plural(len(students), 'student')}"


def _taught(found: Content) -> Iterator[dict[str, Any]]:
    students = found["students"]
    if not students:
        return
    teacher, check = found["traces"]["teacher"], f"cat {artifact(found, 'distill')}/students.json"
    same = f"the same {students[0]['n']} test problems for all and for the teacher, greedy decoding; one seed"
    kept, mode = listed([f"{one['name']} {percent(solved(one))}" for one in students]), mode_of(students)
    yield row(
        "measured",
        f"{_of(keeping(students, teacher), students)} keep at least {KEEPS:.0%} of the teacher's {percent(teacher)} "
        f"{_mode(mode)}",
        f"{same}; {kept}, as measured, without an interval of the share",
        None,
        check,
    )
    beside = listed([f"{one['name']} {points(solved(one) - one['control'])} ({range_of(one)})" for one in students])
    less = sum(one["high"] < 0 for one in students)
    yield row(
        "measured",
        f"{_of(ahead(students), students)} solve more {_mode(mode)} than their controls"
        + (f", and {less} less" if less else ""),
        f"a control is the same student from the same first weights, with as many examples in as many steps, "
        f"{_instead(students)}; student minus control on the same problems, in points "
        f"(paired 95%, each by itself): {beside}; one seed",
        None,
        check,
    )
    yield from _since(students, check)
    if not _places(students):
        return
    shapes = f"dense models with {_sizes(students)} parameters"
    yield row(
        "rehearsal",
        f"{plural(len(students), 'small student')} stand in for published ones",
        f"{shapes}: {_places(students)}; nothing is shown of the published models",
    )


def _instead(students: Sequence[Mapping[str, Any]]) -> str:
    """What controls learn in the place of what the teacher said."""
    if students[0].get("control_mode", "thinking") == "thinking":
        return "on the cold-start traces in the place of the teacher's"
    return "on the answers alone to all training problems, asked directly; its examples may be shorter"


def _since(students: Sequence[Mapping[str, Any]], check: str) -> Iterator[dict[str, Any]]:
    """Of students that began from a model that was there."""
    for one in students:
        if (gain := one.get("before")) is not None:
            yield row(
                "measured",
                f"{one['name']} began at {percent(gain['before'])} and is at {percent(gain['after'])}: "
                f"{points(gain['after'] - gain['before'])} points (95%: {range_of(gain)})",
                f"{one['start']} before its first step and after its last, on the same {gain['n']} test problems, "
                "greedy decoding, paired score interval; one seed",
                None,
                check,
            )


def _sizes(students: Sequence[Mapping[str, Any]]) -> str:
    sizes = [one["params"] for one in students]
    return f"{min(sizes):,} to {max(sizes):,}"


def _places(students: Sequence[Mapping[str, Any]]) -> str:
    return listed([f"{one['name']} for {one['stands_for']}" for one in students if one["stands_for"]])


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


def _share(traces: Mapping[str, Any]) -> float | None:
    return traces["steps_right"] / traces["checked"] if traces["checked"] else None


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


def _compared(found: Content) -> Iterator[dict[str, Any]]:
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


# --- sentences ---------------------------------------------------------------------------------------------------


def remark_lines(found: Content) -> Iterator[str]:
    """What stages say of verdicts, for the terminal."""
    for one in found["remarks"]:
        yield f"{one['stage']}: {one['remark']}"


def story(found: Content) -> Iterator[str]:
    """Sentences of the verdict."""
    gain, students = found["reinforce"], found["students"]
    if gain is not None:
        yield (
            f"Reinforcement took its {_mode(gain['mode'])} from {percent(gain['before'])} to {percent(gain['after'])} "
            f"of the same {gain['n']} problems: "
            f"{points(gain['after'] - gain['before'])} points (95%: {range_of(gain)}; one seed)."
        )
    if students:
        teacher = found["traces"]["teacher"]
        yield (
            f"{_of(keeping(students, teacher), students)} keep at least {KEEPS:.0%} of the teacher's "
            f"{percent(teacher)}; {ahead(students)} solve more than their controls, which had no teacher (one seed)."
        )


def stand_ins(found: Content) -> Iterator[str]:
    """What the students are a rehearsal of."""
    students = found["students"] or ()
    if places := _places(students):
        yield f"The students, dense models with {_sizes(students)} parameters: {places}"


# --- the terminal ------------------------------------------------------------------------------------------------


def reinforce_lines(found: Content) -> Iterator[str]:
    """The gain, and what proves that it can be had again."""
    gain = found["reinforce"]
    if gain is None:
        return
    for mode, both in gain["modes"].items():
        before, after = both["before"], both["after"]
        yield (
            f"{mode.replace('_one_step', ', 1 step').replace('_', ' '):<16}{percent(before['value']):>6} -> "
            f"{percent(after['value']):<6}  {points(after['value'] - before['value']):>5} points "
            f"{bracket(both)}  n {after['n']}"
        )
    if (asked := gain.get("curriculum")) is not None:
        yield f"by its curriculum {percent(asked['mixed'])} of {plural(asked['groups'], 'group')} were mixed"
    same = "identical" if gain["replay_identical"] else "DIFFERENT"
    yield f"{gain['algorithm']}, {plural(gain['steps'], 'step')}, {plural(gain['generations'], 'generation')}; one seed"
    yield f"replay from the records   {same}"
    if gain["gap_max"] is not None:
        allowed = "" if gain["gap_bound"] is None else f", {scientific(gain['gap_bound'])} allowed"
        yield f"sampler against learner   within {scientific(gain['gap_max'])} nats a token{allowed}"


def student_lines(found: Content) -> Iterator[str]:
    """Each student beside its control, and what the traces are worth."""
    students, traces = found["students"], found["traces"]
    if not students:
        return
    teacher = traces["teacher"]
    yield (
        f"{keeping(students, teacher)} of {len(students)} keep {KEEPS:.0%} of the teacher's {percent(teacher)}; n "
        f"{students[0]['n']} each, one seed"
    )
    for one in students:
        yield (
            f"{one['name']:<9}{one['params']:>9,}  {percent(solved(one)):>6}  control "
            f"{percent(one['control']):>6}  {points(solved(one) - one['control']):>5} {bracket(one)}"
        )
    steps = f"; steps right in {percent(_share(traces))} [{interval(traces).replace(' to ', ', ')}]"
    yield f"traces: {traces['right']:,} right of {traces['asked']:,} asked{steps if traces['checked'] else ''}"


def algorithm_lines(found: Content) -> Iterator[str]:
    """Each algorithm's gain over seeds, what it cost, and how the default follows."""
    if not found["algorithms"]:
        return
    for one in compared(found):
        yield (
            f"{one['name']:<10}{points(one['gain']):>6} points {bracket(one)}  {plural(one['seeds'], 'seed')}  "
            f"{seconds(one['cpu_s'])} CPU  {'default' if one['default'] else one['verdict']}"
        )
    yield spent(found)
    yield undecided(found)
    yield found["comparison"]["rule"]
