"""What is there twice: the very same text in another writing, and nearly the same.

Of each group the first line stays. Two lines are near where they have the same numbers, brackets and words that turn a
problem, and share at least NEAR of their words and neighbours: so another number or another question is no repeat, and
several answers to one question are kept, for the text that is compared is all of a line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ottava.labels import minhash
from ottava.labels.likeness import Shape, apart, brackets

NEAR = 0.90
"""The least Jaccard similarity of two near repeats."""
BANDS = minhash.Bands(20, 6)
"""At a similarity of 0.9 a pair is looked at with probability 0.99999997, at 0.6 with 0.62."""


@dataclass(frozen=True, slots=True)
class Repeat:
    """Lines by place: `line` repeats `of`, which is before it. similarity: 1 where only the writing differs."""

    line: int
    of: int
    similarity: float


def find(lines: Sequence[Shape], tails: Sequence[str] = ()) -> list[Repeat]:
    """Every line that repeats one before it, in order. No line is a repeat of one that is a repeat itself.

    tails: of each line what must be the very same, such as a short answer: one other word there makes another line.
    """
    found: dict[int, Repeat] = {}
    first: dict[tuple[str, str], int] = {}
    tails = tails or [""] * len(lines)
    for place, shape in enumerate(lines):
        at = first.setdefault((shape.line or f"{place}", tails[place]), place)
        if at != place:
            found[place] = Repeat(place, at, 1.0)
    distinct = list(first.values())
    beside = _beside(lines, distinct)
    for place in distinct:
        for other in sorted(beside.get(place, ())):
            if other in found:
                continue
            similarity = _near(lines[place], lines[other]) if tails[place] == tails[other] else None
            if similarity is not None:
                found[place] = Repeat(place, other, similarity)
                break
    return [_settled(found, found[place]) for place in sorted(found)]


def _beside(lines: Sequence[Shape], distinct: Sequence[int]) -> dict[int, set[int]]:
    """For lines, those before them with a band in common: the CROWDED nearest before, in a crowd."""
    beside: dict[int, set[int]] = {}
    for group in minhash.groups(minhash.keys([lines[place].full for place in distinct], BANDS)):
        places = [distinct[at] for at in group.tolist()]
        by_numbers: dict[tuple[str, ...], list[int]] = {}
        for place in places:
            before = by_numbers.setdefault(lines[place].numbers, [])
            if before:
                beside.setdefault(place, set()).update(before[-minhash.CROWDED :])
            before.append(place)
    return beside


def _near(ours: Shape, theirs: Shape) -> float | None:
    if ours.numbers != theirs.numbers or ours.turns != theirs.turns:
        return None
    similarity = 1 - apart(ours.full, theirs.full)
    return similarity if similarity >= NEAR and brackets(ours) == brackets(theirs) else None


def _settled(found: dict[int, Repeat], repeat: Repeat) -> Repeat:
    """The repeat of a line that stays: where the other is itself a near repeat, of what that repeats."""
    of = repeat.of
    while of in found:
        of = found[of].of
    return repeat if of == repeat.of else Repeat(repeat.line, of, repeat.similarity)
