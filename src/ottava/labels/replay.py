"""`ottava label replay`: the policy against whoever holds the truth, one line a question.

Out: {"ask": {"item", "annotator", "blind"}}; in: {"vote": label}, or {"vote": null} where that person is away. At the
end {"done": {"decisions": {item: label}, "error_upper_95", "error", "asked"}}.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from ottava.errors import DataError
from ottava.labels.policy import Ask, Done, Policy
from ottava.labels.world import Label, World

LONGEST = 1 << 16
"""Bytes of one answer."""


def replay(
    world: World, target: float, hear: Callable[[int], bytes], say: Callable[[str], None], seed: int = 0
) -> Done:
    """Ask until done. say: gets each line without its end; hear: reads a line of at most so many bytes, b"" at the end.

    Raises DataError for an answer that is none; nothing is decided then.
    """
    places = {label: k for k, label in enumerate(world.classes)}
    policy = Policy(world, target, seed)
    run = policy.run()
    answer: int | None = None
    number = 0
    try:
        question = next(run)
        while True:
            say(_line(world, question))
            number += 1
            answer = _vote(hear(LONGEST), places, number, world, question)
            question = run.send(answer)
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
