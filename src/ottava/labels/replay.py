"""`ottava label replay`: the policy against whoever holds the truth, one line a question.

Out: {"ask": {"item", "annotator", "blind"}}; in: {"vote": label}, or {"vote": null} where that person is away. At the
end {"done": {"decisions": {item: label}, "error_upper_95", "error", "asked"}}. Aside: {"forecast": ...}, how many votes
and hours there are to come, and until when.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

from ottava.errors import DataError
from ottava.labels.forecast import told as told_ahead
from ottava.labels.policy import MOST, Ask, Done, Policy
from ottava.labels.world import Label, World

LONGEST = 1 << 16
"""Bytes of one answer."""
LEAST = 200
"""Votes between two forecasts."""


def replay(
    world: World,
    target: float,
    hear: Callable[[int], bytes],
    say: Callable[[str], None],
    seed: int = 0,
    most: float = MOST,
    aside: Callable[[str], None] | None = None,
) -> Done:
    """Ask until done. say: gets each line without its end; hear: reads a line of at most so many bytes, b"" at the end;
    most: votes at most, as `Policy` has it; aside: gets a forecast when a phase begins and after every tenth of the
    votes, without any part in what is asked.

    Raises DataError for an answer that is none; nothing is decided then.
    """
    places = {label: k for k, label in enumerate(world.classes)}
    policy = Policy(world, target, seed, most)
    run = policy.run()
    number, begun = 0, time.monotonic()
    waited, due, phase = 0.0, float(LEAST), policy.phase
    try:
        question = next(run)
        while True:
            say(_line(world, question))
            number += 1
            before = time.monotonic()
            answer = _vote(hear(LONGEST), places, number, world, question)
            after = time.monotonic()
            waited += after - before
            question = run.send(answer)
            votes = len(policy.evidence)
            if aside and votes and (votes >= due or policy.phase != phase):
                each = waited / votes if world.seconds is None else float(world.seconds.mean())
                a_day = votes * 86400 / max(after - begun, 1e-6)
                line = told_ahead(policy.progress(), each, datetime.now().astimezone(), a_day)
                aside(json.dumps({"forecast": line}))
                due, phase = max(votes * 1.1, votes + LEAST), policy.phase
    except StopIteration as end:
        done: Done = end.value
    say(json.dumps({"done": summary(world, done)}))
    return done


def summary(world: World, done: Done) -> dict[str, Any]:
    """The last line's content."""
    return {
        "decisions": {str(name): world.classes[k] for name, k in zip(world.ids, done.decisions.tolist(), strict=True)},
        "error_upper_95": round(min(done.upper + 5e-7, 1.0), 6),
        "error": round(done.error, 6),
        "asked": done.asked,
    }


def told(done: Done) -> str:
    """The outcome in words."""
    lines = [
        f"{done.votes} votes ({done.asked} questions), {done.audited} labels audited: {done.error:.2%} are wrong, "
        f"at 95% confidence no more than {done.upper:.2%}"
    ]
    return "\n".join([*lines, *done.notes])


def _line(world: World, question: Ask) -> str:
    return json.dumps(
        {
            "ask": {
                "item": world.ids[question.item],
                "annotator": world.annotators[question.person],
                "blind": question.blind,
            }
        }
    )


def _vote(line: bytes, places: dict[Label, int], number: int, world: World, question: Ask) -> int | None:
    where = f"answer {number} (item {world.ids[question.item]!r}, annotator {world.annotators[question.person]!r})"
    if not line:
        raise DataError(
            "the answers ended in mid-run: nothing is decided",
            where=where,
            fix='answer every question with {"vote": label}, or {"vote": null} where the person is away',
        )
    try:
        if len(line) >= LONGEST:
            raise ValueError("the line is too long")
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        said = line[:80].decode(errors="replace").strip()
        raise DataError(f"this is not a line of JSON: {said!r} ({error})", where=where) from None
    if not isinstance(document, dict) or set(document) != {"vote"}:
        raise DataError(
            f'an answer is {{"vote": label}} or {{"vote": null}}, not {json.dumps(document)[:80]}', where=where
        )
    vote = document["vote"]
    if vote is None:
        return None
    if not isinstance(vote, str | int) or isinstance(vote, bool) or vote not in places:
        raise DataError(f"{vote!r} is none of the classes ({', '.join(map(repr, places))})", where=where)
    return places[vote]
