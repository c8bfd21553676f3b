"""The report in the terminal: a screen of plain text, aligned, at most 80 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from ottava.console import algorithms, reasoning, students
from ottava.console.words import listed, percent, plural, scientific, seconds, short

Content = Mapping[str, Any]
WIDTH = 79
MARGIN = 12  # columns of the headings
BLANK = "\N{NO-BREAK SPACE}"
MODES = {"thinking": "thinking", "direct": "direct", "direct_one_step": "direct, 1 step"}


def text(content: Content) -> str:
    """A run's report as text for the terminal."""
    head = f"{content['recipe']}: {content['status']}, {seconds(content['seconds'])} of work, seed {content['seed']}"
    blocks = (
        ("accuracy", _accuracy), ("fallback", _fallback), ("go/no-go", _go_no_go),
        ("reinforce", reasoning.reinforce_lines), ("students", students.lines),
        ("algorithms", algorithms.lines), ("remarks", reasoning.remark_lines), ("weights", _weights),
        ("labels", _labels), ("served", _served), ("rehearsal", _rehearsal), ("claims", _claims),
    )  # fmt: skip
    lines = [head, "", *(line for said in content["verdict"] for line in textwrap.wrap(said, WIDTH)), ""]
    lines += _block("stages", [_stages(content)])
    for heading, write in blocks:
        lines += _block(heading, list(write(content)))
    return "\n".join(lines)


def _block(heading: str, said: list[str]) -> list[str]:
    lines = []
    for number, sentence in enumerate(said):
        first = (heading if number == 0 else "").ljust(MARGIN)
        plain = "".join(c if c.isprintable() or c == BLANK else "?" for c in sentence)
        lines += textwrap.wrap(
            plain, WIDTH, initial_indent=first, subsequent_indent=" " * (MARGIN + 2), break_long_words=False,
            break_on_hyphens=False,
        )  # fmt: skip
    return [line.replace(BLANK, " ") for line in lines]


def _stages(content: Content) -> str:
    marks = {"done": "", "cached": ""}
    parts = []
    for stage in content["stages"]:
        status = "says no" if stage["verdict"] is False else marks.get(stage["status"], stage["status"])
        took = seconds(stage["seconds"]) if stage["seconds"] or not status else ""
        parts.append(" ".join(part for part in (stage["name"], status, took) if part).replace(" ", BLANK))
    return ", ".join(parts)


def _accuracy(content: Content) -> Iterator[str]:
    for mode, name in MODES.items():
        entry = (content["accuracy"] or {}).get(mode)
        if entry is not None:
            yield (
                f"{name:<16}{percent(entry['value']):>6}  [{percent(entry['low'])}, {percent(entry['high'])}]  "
                f"n {entry['n']}"
            )


def _fallback(content: Content) -> Iterator[str]:
    yield from _move(content["fallback"])
    if content["reinforce"] is not None:
        yield from _move(content["reinforce"]["fallback"], "in reinforcement, ")


def _move(move: Content | None, when: str = "") -> Iterator[str]:
    if move is None:
        return
    gap = move["seconds_without_a_step"]
    pause = "" if gap is None else f", {seconds(gap)} without a step"
    lost = f"{plural(move['lost_steps'], 'step')} lost{pause}"
    yield f"{when}{move['from']} -> {move['to']} at step {move['at_step']}: {lost}"
    if move["handoff_identical"] is not None:
        yield f"state before and after    {short(move['before'])}  {_same(move['handoff_identical'])}"
        yield f"replay without the fault  {_same(move['replay_identical'])}"
        inside = "inside" if move["inside"] else "OUTSIDE"
        yield (
            f"drift after {plural(move['window'], 'step')}      {scientific(move['drift'])}, {inside} the envelope "
            f"{scientific(move['envelope'])}"
        )


def _go_no_go(content: Content) -> Iterator[str]:
    found = content["go_no_go"]
    if found is None:
        return
    said = ", ".join(
        f"{look['action'].upper() if look['action'] != 'go' else 'go'} at {look['step']}" for look in found["looks"]
    )
    only_said = ", verdicts are only said" if found["on_stop"] == "warn" else ""
    yield f"{said}; error rate {percent(found['alpha'])}{only_said}"
    yield str(found["reason"])


def _weights(content: Content) -> Iterator[str]:
    fp8 = content["fp8"]
    if fp8 is None:
        return
    yield f"UE8M0 FP8, {fp8['label']}: {short(fp8['digest'])}"
    if fp8["digest_equal"] is not None:
        yield f"{listed(list(fp8['layouts'] or ()))}: {_same(fp8['digest_equal'])}"
    if fp8["answers_identical"] is not None:
        yield f"answers of the trained model and of the master: {_same(fp8['answers_identical'])}"
    if fp8["divergence"] is not None:
        found = fp8["divergence"]
        yield (
            f"against its source: top-1 agreement {percent(found['top1'])}, KL {scientific(found['kl'])} nats, "
            f"{found['positions']:,} positions"
        )
        if found.get("reference"):
            yield f"its source: {found['reference']}"


def _labels(content: Content) -> Iterator[str]:
    labels = content["labels"]
    if labels is not None:
        judged = f"{labels['audited']} of {labels['cold_start']} traces audited, {plural(labels['errors'], 'error')}"
        if labels.get("votes") is not None:
            judged = f"{labels['votes']} votes, {labels['audited']} of {labels['population']} proposals audited, "
            judged += f"{plural(labels['errors'], 'agreed trace')} refuted"
        yield (f"{judged}: at most {percent(labels['error_upper_95'])} wrong (95%)")


def _served(content: Content) -> Iterator[str]:
    serve = content["serve"]
    if serve is None:
        return
    example = serve["example"]
    yield f"asked     {example['question']}"
    if example.get("thinking"):
        yield f"thinking  {example['thinking']['reasoning']} -> {example['thinking']['content']}"
    yield f"direct    {example['direct']['content']}"
    broken = [name for name in ("thinking_ok", "direct_ok", "streamed", "drained") if serve[name] is False]
    yield f"NOT: {listed(broken)}" if broken else "streamed as it was answered, drained when it was stopped"


def _rehearsal(content: Content) -> Iterator[str]:
    yield from content["standing"]["rehearsal"]


def _claims(content: Content) -> Iterator[str]:
    rows = content["evidence"]
    counts = {level: sum(row["level"] == level for row in rows) for level in ("proven", "measured", "rehearsal")}
    if rows:
        yield ", ".join(f"{count} {level}" for level, count in counts.items())
    for row in rows:
        if row["holds"] is False:
            yield f"DOES NOT HOLD: {row['claim']} ({row['how']})"


def _same(equal: bool) -> str:
    return "identical" if equal else "DIFFERENT"
