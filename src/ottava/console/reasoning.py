"""What a report tells of reinforcement and of fine-tuning; with `students` and `algorithms`, of learning to reason.

Every difference stands with its interval and with what it was taken over. One run has one seed: what a gain is over
seeds, a run cannot tell, and its report does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ottava.console import algorithms, students
from ottava.console.history import REINFORCED, Generation
from ottava.console.rows import Content, artifact, row
from ottava.console.source import MODES, Source, entry, move
from ottava.console.words import bracket, called, percent, plural, points, range_of, scientific
from ottava.tasks.statistics import paired
from ottava.trainer import verdicts

TUNED = ("train", "train-2")


# --- the object --------------------------------------------------------------------------------------------------


def content(source: Source) -> dict[str, Any]:
    """The report's keys reinforce, students, traces, algorithms and comparison, null where their stage has not
    finished; and tuned where a published model was fine-tuned."""
    return {"reinforce": _reinforce(source), **students.content(source), **algorithms.content(source), **_tuned(source)}


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


# --- claims ------------------------------------------------------------------------------------------------------


def claims(found: Content) -> Iterator[dict[str, Any]]:
    """Rows of the evidence."""
    for part in (_fine_tuned, _gained, _agreed, students.claims, algorithms.claims):
        yield from part(found)


def _fine_tuned(found: Content) -> Iterator[dict[str, Any]]:
    for one in found.get("tuned", ()):
        learnt = "the answers alone" if one["asked"] is None else "right replies of the model so far"
        told = "" if one["asked"] is None else f"; {one['right']:,} right replies to {one['asked']:,} training problems"
        yield row(
            "measured",
            f"Fine-tuning on {learnt} ({one['stage']}) takes {called(one['mode'])} from {percent(one['before'])} to "
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
        claim, holds = f"Reinforcement raises {called(mode)} {said}", gain["low"] > 0
    else:
        claim, holds = f"Nothing shows that reinforcement changes {called(mode)}, {said}", None
    yield row(
        "measured",
        claim,
        f"the model before the first step and the model after the last, on the same {gain['n']} test problems that "
        "training never saw, greedy decoding, paired score interval; one seed",
        holds,
        f'python -c "import json; from ottava.tasks.statistics import paired; print(paired(*({files})))"',
    )


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


# --- sentences ---------------------------------------------------------------------------------------------------


def remark_lines(found: Content) -> Iterator[str]:
    """What stages say of verdicts, for the terminal."""
    for one in found["remarks"]:
        yield f"{one['stage']}: {one['remark']}"


def story(found: Content) -> Iterator[str]:
    """Sentences of the verdict."""
    gain = found["reinforce"]
    if gain is not None:
        yield (
            f"Reinforcement took its {called(gain['mode'])} from {percent(gain['before'])} to {percent(gain['after'])} "
            f"of the same {gain['n']} problems: "
            f"{points(gain['after'] - gain['before'])} points (95%: {range_of(gain)}; one seed)."
        )
    yield from students.story(found)


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
