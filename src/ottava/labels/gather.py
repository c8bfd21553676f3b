"""`ottava label evidence`: what machines say of a data set's lines, as a world for the policy.

A line has `question` and what is judged of it: `response` (right or wrong), two `responses` (which is better), or
only the
question (classes). `answer` is the known answer, for a task's verifier. Nothing here is a vote: verifiers and judges
are
features, and what could not be verified or read is null.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ottava import tasks
from ottava.errors import DataError
from ottava.labels import judges as machine
from ottava.labels.clean import Line, read
from ottava.labels.judges import Asks, Item
from ottava.tasks import Problem, verify

Kind = Literal["right", "classes", "pair"]
CLASSES = {"right": ("right", "wrong"), "pair": ("A", "B")}


def world(
    data: Path,
    kind: Kind,
    people: Sequence[str],
    *,
    classes: Sequence[str] = (),
    task: str | None = None,
    judges: Sequence[Asks] = (),
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the world, what was counted). Raises DataError where a line lacks what its kind needs."""
    if kind == "classes" and len(classes) < 2:
        raise DataError("there must be at least two classes", where="--class")
    if task is not None and kind != "right":
        raise DataError("a task's verifier says right or wrong, and nothing of other kinds", where="--task")
    labels = CLASSES.get(kind) or tuple(classes)
    lines = read(data)
    items = [_item(line, kind, data) for line in lines]
    counts: dict[str, Any] = {"items": len(items)}
    verifier: list[str | None] = [None] * len(items)
    if task is not None:
        verifier, counts["verifier"] = _verified(task, lines, items, data)
    said, counts["judges"] = [], []
    for judge in judges:
        opinions, told = _judged(judge, kind, items, labels)
        said.append(opinions)
        counts["judges"].append(told)
    return {
        "classes": list(labels),
        "annotators": list(people),
        "items": [
            {"id": line.id, "verifier": verifier[k], "judges": [opinions[k] for opinions in said]}
            for k, line in enumerate(lines)
        ],
    }, counts


def _item(line: Line, kind: Kind, data: Path) -> Item:
    where, found = f"{data}:{line.number}", line.data
    if kind == "classes":
        return Item(line.question)
    if kind == "pair":
        two = found.get("responses")
        if not isinstance(two, list) or len(two) != 2 or not all(isinstance(text, str) for text in two):
            raise DataError("'responses' must be a list of two texts, to be compared", where=where)
        return Item(line.question, (two[0], two[1]))
    if not isinstance(found.get("response"), str):
        raise DataError("'response' is missing: the text that is right or wrong", where=where)
    return Item(line.question, (found["response"],))


def _verified(
    name: str, lines: Sequence[Line], items: Sequence[Item], data: Path
) -> tuple[list[str | None], dict[str, Any]]:
    """right, wrong or None for each item by the task's verifier."""
    task, why = tasks.get(name), Counter[str]()
    out: list[str | None] = []
    for line, item in zip(lines, items, strict=True):
        answer, facts = line.data.get("answer"), line.data.get("facts", "")
        if not isinstance(answer, str) or not isinstance(facts, str):
            raise DataError("'answer' must be text: the known answer, for the verifier", where=f"{data}:{line.number}")
        grade = verify.grade(task, Problem(line.id, 1, line.question, answer, facts), item.responses[0])
        out.append(None if grade.kind == "unscorable" else grade.kind)
        why[grade.kind if grade.kind != "unscorable" else f"null: {grade.why}"] += 1
    return out, dict(sorted(why.items()))


def _judged(
    judge: Asks, kind: Kind, items: Sequence[Item], labels: Sequence[str]
) -> tuple[list[str | None], dict[str, Any]]:
    if kind == "right":
        return machine.right(judge, items)
    return machine.pairs(judge, items) if kind == "pair" else machine.classes(judge, items, labels)
