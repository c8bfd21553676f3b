"""`ottava label evidence`: what machines say of a data set's lines, as a world for the policy.

A line has `question` and what is judged of it: `response` (right or wrong), two `responses` (which is better), `steps`
(each right or wrong), or only the question (classes). `answer` is the known answer, for a task's verifier. Nothing here
is a vote: verifiers and judges are features, and what could not be verified or read is null. A judge sees a trace as a
whole and marks its steps; in the world each step is an item of its own (`kinds.step_items`), as people are asked of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ottava import artifact, tasks
from ottava.errors import DataError, Verdict
from ottava.labels import judges as machine
from ottava.labels import kinds, price
from ottava.labels.clean import Line, read
from ottava.labels.endpoint import Endpoint
from ottava.labels.judges import Asks, Item
from ottava.labels.price import Budget, Price
from ottava.labels.world import parse
from ottava.tasks import Problem, verify

Kind = Literal["right", "classes", "pair", "steps"]
CLASSES = {"right": ("right", "wrong"), "pair": ("A", "B"), "steps": ("right", "wrong")}


def gather(
    data: Path,
    out: Path,
    kind: Kind,
    people: Sequence[str],
    *,
    classes: Sequence[str] = (),
    task: str | None = None,
    judges: Sequence[tuple[str, str]] = (),
    prices: Sequence[str] = (),
    budget: float | None = None,
    key_from: str | None = None,
    cache: Path | None = None,
    at_once: int = 8,
) -> dict[str, Any]:
    """Write the world to `out`; what was counted. judges: (address, model) of each; prices: of each, or one for all.
    Raises DataError, and Verdict where the budget does not reach: then nothing is written but the cache."""
    for source in (data, Path((task or "").partition(":")[2] or data)):
        if out.exists() and source.exists() and out.samefile(source):
            raise DataError("the world would be written over what it is made from", where=out, fix="another --out")
    purse, costs = _purse(judges, prices, budget, cache)
    ends = [
        Endpoint(url, model, key_from, at_once, cache=cache, price=cost, budget=purse)
        for (url, model), cost in zip(judges, costs, strict=True)
    ]
    found, counts = world(data, kind, people, classes=classes, task=task, judges=ends)
    artifact.make_folder(out.parent)
    artifact.write_json(out, found)
    return counts if purse is None else {**counts, "spent": round(purse.spent, 6), "budget": purse.limit}


def _purse(
    judges: Sequence[tuple[str, str]], prices: Sequence[str], budget: float | None, cache: Path | None
) -> tuple[Budget | None, list[Price | None]]:
    """(the budget, with what was spent before; the price of each judge)."""
    if len(prices) not in (0, 1, len(judges)):
        what = f"{len(prices)} prices and {len(judges)} judges"
        raise DataError(what, where="--price", fix="one for all judges, or one for each, in order")
    read = [price.parse(text) for text in prices]
    costs: list[Price | None] = [None] * len(judges)
    if read:
        costs[:] = read * len(judges) if len(read) == 1 else read
    if budget is None:
        return None, costs
    if not read or not judges:
        raise DataError("a budget needs prices", where="--budget", fix="--price IN:OUT, of a million tokens")
    if cache is None:
        what = "what is asked for money must be kept, so that a run that the budget stops can go on"
        raise DataError(what, where="--budget", fix="--cache DIR")
    known = {judge: cost for judge, cost in zip(judges, costs, strict=True) if cost is not None}
    return Budget(budget, price.spent(cache, known)), costs


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
    # what the policy would refuse is refused before a judge is paid
    parse({"classes": list(labels), "annotators": list(people), "items": [{"id": 0}]})
    lines = read(data)
    items = [_item(line, kind, data) for line in lines]
    names = _names(lines, items, kind)
    counts: dict[str, Any] = {"items": len(items)}
    verifier: list[str | None] = [None] * len(items)
    if task is not None:
        verifier, counts["verifier"] = _verified(task, lines, items, data)
    said, counts["judges"] = [], []
    for judge in judges:
        opinions, told = _judged(judge, kind, items, labels)
        _affordable(told["requests"])
        said.append(opinions)
        counts["judges"].append(told)
    return {
        "classes": list(labels),
        "annotators": list(people),
        "items": [
            {"id": name, "verifier": None if kind == "steps" else verifier[k], "judges": [one[k] for one in said]}
            for k, name in enumerate(names)
        ],
    }, counts


def _names(lines: Sequence[Line], items: Sequence[Item], kind: Kind) -> list[str]:
    """The world's items: lines, or each line's steps."""
    if kind != "steps":
        return [line.id for line in lines]
    traces = {line.id: item.responses for line, item in zip(lines, items, strict=True)}
    return [name for name, _, _ in kinds.step_items(traces)]


def _affordable(requests: Mapping[str, Any]) -> None:
    """Raise Verdict where the budget ended before the questions did."""
    if not requests.get("unasked"):
        return
    took = f"{requests['asked']} requests were sent, at a cost of {requests['cost']:g}"
    unknown = f", not counting {requests['unknown']} of unknown cost" if requests["unknown"] else ""
    what = f"the budget does not reach for {requests['unasked']} questions: {took}{unknown}; no world is written"
    raise Verdict(what, where="--budget", fix="the same command with a higher --budget asks only for what is missing")


def _item(line: Line, kind: Kind, data: Path) -> Item:
    where, found = f"{data}:{line.number}", line.data
    if kind == "classes":
        return Item(line.question)
    if kind == "pair":
        two = found.get("responses")
        if not isinstance(two, list) or len(two) != 2 or not all(isinstance(text, str) for text in two):
            raise DataError("'responses' must be a list of two texts, to be compared", where=where)
        return Item(line.question, (two[0], two[1]))
    if kind == "steps":
        steps = found.get("steps")
        if not isinstance(steps, list) or not steps or not all(isinstance(text, str) for text in steps):
            raise DataError("'steps' must be a list of at least one text, to be marked", where=where)
        return Item(line.question, tuple(steps))
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
    if kind == "steps":
        marks, counts = machine.steps(judge, items)
        out: list[str | None] = []
        for item, its in zip(items, marks, strict=True):
            out += its or [None] * len(item.responses)
        return out, counts
    return machine.pairs(judge, items) if kind == "pair" else machine.classes(judge, items, labels)
