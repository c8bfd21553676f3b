"""Labels that are not one word of a list: preference pairs, free text, steps. Each becomes what `world` knows: classes.

pair       the classes A and B (and tie, where allowed); shown in a drawn order, and turned back when answered
free text  answers that are equal, by the task's verifier or as text, are one class of their item
steps      each step is an item of its own, right or wrong; a trace is right where all of its steps are
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

from ottava.errors import DataError
from ottava.tasks.base import plain

Same = Callable[[str, str], bool]
FIRST, SECOND, TIE = "A", "B", "tie"


@dataclass(frozen=True)
class Pair:
    """Two responses as one person sees them. turned: the second stands first."""

    shown: tuple[str, str]
    turned: bool

    def meant(self, said: str) -> str:
        """The class of what a person said of what was shown: FIRST is the first *given*, whatever stood first."""
        if said not in (FIRST, SECOND, TIE):
            raise DataError(f"{said!r} is none of {FIRST}, {SECOND}, {TIE}")
        return {FIRST: SECOND, SECOND: FIRST, TIE: TIE}[said] if self.turned else said


def pair(first: str, second: str, item: str, person: str) -> Pair:
    """A pair in the order in which a person is to see it: half of the people of an item see each, always the same."""
    order = hashlib.blake2b(f"{item}\0{person}".encode(), digest_size=1).digest()[0] & 1
    turned = bool(order)
    return Pair((second, first) if turned else (first, second), turned)


def first_bias(shown: Sequence[tuple[bool, str]]) -> float | None:
    """How much more often what stood first was chosen than half of the time, from -0.5 to 0.5, by (turned, class).

    Orders are drawn, so that without such a bias it is 0 on average. None where nobody chose.
    """
    chosen = [(turned, said) for turned, said in shown if said in (FIRST, SECOND)]
    if not chosen:
        return None
    return sum((said == SECOND) == turned for turned, said in chosen) / len(chosen) - 0.5


def agreement(answers: Mapping[Hashable, str], same: Same | None = None) -> list[tuple[str, list[Hashable]]]:
    """Groups of people whose free answers are equal: (the shortest answer of each, who gave it), largest group first.

    same: whether two answers are equal in substance; it is asked of answers that are not equal as text, once a pair,
    and
    an answer joins the first group of which it equals the first answer. Ties: the group that came first.
    """
    by_text: dict[str, list[Hashable]] = {}
    written: dict[str, str] = {}
    for person, answer in answers.items():
        key = plain(answer)
        by_text.setdefault(key, []).append(person)
        if key not in written or len(answer) < len(written[key]):
            written[key] = answer
    groups: list[list[str]] = []
    for key in by_text:
        home = next((group for group in groups if same is not None and same(written[group[0]], written[key])), None)
        if home is None:
            groups.append([key])
        else:
            home.append(key)
    found = [
        (min((written[key] for key in group), key=len), [person for key in group for person in by_text[key]])
        for group in groups
    ]
    return sorted(found, key=lambda group: -len(group[1]))


def as_classes(
    items: Mapping[str, Mapping[Hashable, str]], same: Same | None = None, most: int = 4
) -> dict[str, list[str]]:
    """Of each item the answers that stand for its classes, at most `most`: what people vote between."""
    return {item: [answer for answer, _ in agreement(said, same)[:most]] for item, said in items.items()}


def step_items(traces: Mapping[str, Sequence[str]]) -> list[tuple[str, str, int]]:
    """(item, trace, step) of every step of every trace: the item's id is the trace's and the step's number from 1."""
    return [
        (f"{trace}#{number}", trace, number) for trace, steps in traces.items() for number in range(1, len(steps) + 1)
    ]


def trace_marks(decided: Mapping[str, str], traces: Mapping[str, Sequence[str]]) -> dict[str, list[int]]:
    """The wrong steps of each trace, from 1, by what was decided of its steps. Raises DataError where one is
    missing."""
    wrong: dict[str, list[int]] = {trace: [] for trace in traces}
    for item, trace, number in step_items(traces):
        said = decided.get(item)
        if said not in ("right", "wrong"):
            raise DataError(f"step {number} of {trace!r} is not decided: {said!r}", where=item)
        if said == "wrong":
            wrong[trace].append(number)
    return wrong


def first_wrong(wrong: Sequence[int]) -> int | None:
    """The first wrong step: what follows from it need not be judged (process supervision ends there, arXiv
    2305.20050)."""
    return min(wrong, default=None)
