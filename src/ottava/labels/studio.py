"""Label Studio's JSON: tasks with annotations (people) and predictions (machines).

Fields are those of its task format (labelstud.io/guide/task_format). What it has no place for (a vote's id, the
guideline, blind or not) is kept under `meta` of an annotation's first region, which Label Studio carries along, and in
`data.ottava` of a task. Undos and decisions have no place there. Ties have no place in its Pairwise tag, so a pair is
written as Choices; both are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from ottava.artifact import replacing
from ottava.errors import DataError
from ottava.labels import exchange, questions
from ottava.labels.exchange import Dump, Entry
from ottava.labels.questions import Answer, Item
from ottava.labels.store import Vote

OURS = "ottava"
QUESTION = ("question", "text", "prompt", "instruction")
PAIRS = (("a", "b"), ("text1", "text2"), ("left", "right"), ("response1", "response2"), ("answer1", "answer2"))
"""Names that other people's tasks give to what is asked, and to the two sides of a pair."""
CONTROL = {"right_wrong": "verdict", "choice": "label", "pair": "preference", "text": "reply", "steps": "step"}


def to_json(content: Dump, path: Path) -> None:
    """The tasks, and beside them NAME.config.xml, the labelling interface, where one serves all of them."""
    people = {name: k for k, name in enumerate(sorted({v.annotator for e in content.entries for v in e.votes}), 1)}
    tasks = [_task(number, entry, people) for number, entry in enumerate(content.entries, 1)]
    if tasks:
        tasks[0]["data"][OURS] |= exchange.header(content)
    configs = {config(entry.item) for entry in content.entries}
    with replacing(path) as part:
        part.write_text(json.dumps(tasks, ensure_ascii=False), encoding="utf-8")
    if len(configs) == 1:
        with replacing(path.with_suffix(".config.xml")) as part:
            part.write_text(configs.pop(), encoding="utf-8")


def config(item: Item) -> str:
    """The labelling interface (XML) for items like this one."""
    texts = [key for key in item.content if key != "steps"]
    rows = [f'<Header value={quoteattr(key)}/><Text name={quoteattr(key)} value="${key}"/>' for key in texts]
    name = CONTROL[item.kind]
    if item.kind == "steps":
        for k in range(len(item.content["steps"])):
            rows.append(f'<Text name="shown_{k + 1}" value="$step_{k + 1}"/>' + _choices(f"{name}_{k + 1}", item))
    elif item.kind == "text":
        rows.append(f'<TextArea name="{name}" toName="question"/>')
    else:
        rows.append(_choices(name, item))
    return "<View>" + "".join(rows) + "</View>"


def _choices(name: str, item: Item) -> str:
    inner = "".join(f"<Choice value={quoteattr(answer)}/>" for answer in item.answers())
    return f'<Choices name="{name}" toName="question" choice="single">{inner}</Choices>'


def _task(number: int, entry: Entry, people: dict[str, int]) -> dict[str, Any]:
    item = entry.item
    data: dict[str, Any] = {key: value for key, value in item.content.items() if key != "steps"}
    data |= {f"step_{k}": text for k, text in enumerate(item.content.get("steps", ()), 1)}
    own = {key: value for key, value in exchange.to_plain(Entry(item)).items() if key not in ("votes", "decisions")}
    annotations = [_annotation(k, vote, item, people) for k, vote in enumerate(entry.live(), 1)]
    predictions = [{"model_version": who, "result": _result(item, said, {})} for who, said in item.opinions.items()]
    return {"id": number, "data": data | {OURS: own}, "annotations": annotations, "predictions": predictions}


def _annotation(number: int, vote: Vote, item: Item, people: dict[str, int]) -> dict[str, Any]:
    kept = {key: getattr(vote, key) for key in ("uid", "annotator", "guideline", "blind")}
    result = [] if vote.answer is None else _result(item, vote.answer, kept)
    moment = {} if vote.at is None else {"created_at": _iso(vote.at), "updated_at": _iso(vote.at)}
    return {
        "id": number, "completed_by": people[vote.annotator], "result": result, "was_cancelled": vote.kind == "skip",
        "ground_truth": False, "lead_time": None if vote.ms is None else vote.ms / 1000, "result_count": len(result),
    } | moment | ({} if result else {OURS: kept})  # fmt: skip


def _result(item: Item, answer: Answer, kept: dict[str, Any]) -> list[dict[str, Any]]:
    """An answer's regions. A step that was not judged has none."""
    name = CONTROL[item.kind]
    regions: list[dict[str, Any]] = []
    for k, said in enumerate(answer if isinstance(answer, list) else [answer], 1):
        if said is None:
            continue
        free = item.kind == "text"
        regions.append(
            {
                "id": f"{name}{k}", "from_name": f"{name}_{k}" if item.kind == "steps" else name,
                "to_name": "question", "type": "textarea" if free else "choices",
                "value": {"text": [said]} if free else {"choices": [said]}, "origin": "manual",
            }
        )  # fmt: skip
    if kept:
        regions[0]["meta"] = {OURS: kept}
    return regions


# ---- reading


def from_json(path: Path) -> Dump:
    """Label Studio's JSON export, of its own projects too. Raises DataError naming the task."""
    tasks = read_list(path, "tasks")
    guidelines: dict[int, str] = {}
    certificates: tuple[dict[str, Any], ...] = ()
    try:
        seen = _classes(tasks)
    except (TypeError, AttributeError) as error:
        raise DataError(f"this is not Label Studio's form: {error!r}"[:160], where=path) from None
    entries = []
    for number, task in enumerate(tasks):
        where = f"{path} task {number + 1}"
        if not isinstance(task, dict) or not isinstance(task.get("data"), dict):
            raise DataError("a task is an object with data", where=where)
        own = task["data"].get(OURS)
        if isinstance(own, dict) and exchange.MARK in own:
            guidelines, certificates = exchange.parse_header(own, where)
        try:
            entries.append(_entry(task, seen, where))
        except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError) as error:
            raise DataError(f"this is not Label Studio's form: {error!r}"[:160], where=where) from None
    return Dump(guidelines, certificates, tuple(entries))


def read_list(path: Path, what: str) -> list[Any]:
    """A JSON file that holds a list. Raises DataError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"this is not JSON: {error}", where=path) from None
    if not isinstance(found, list):
        raise DataError(f"the file holds no list of {what}", where=path)
    return found


def foreign_content(data: dict[str, Any], kind: str, where: str) -> dict[str, str]:
    """What is asked, from somebody else's fields. Raises DataError where nothing looks like a question."""
    content = {key: value for key, value in data.items() if isinstance(value, str)}
    key = next((key for key in QUESTION if content.get(key)), None)
    sides = next(((a, b) for a, b in PAIRS if a in content and b in content), None)
    if kind == "pair":
        if sides is None:
            raise DataError("the two texts of the pair are not found", where=where, fix="name them a and b")
        content |= {"a": content.pop(sides[0]), "b": content.pop(sides[1])}
        content.setdefault("question", content.pop(key) if key else "Which is better?")
        return content
    if key is None:
        raise DataError("no field holds a question", where=where, fix=f"name it {' or '.join(QUESTION)}")
    content.setdefault("question", content.pop(key))
    return content


def _classes(tasks: list[Any]) -> dict[str, list[str]]:
    """The choices seen under each control's name: the interface itself is not in the file."""
    found: dict[str, set[str]] = {}
    for task in tasks:
        for _, region in _regions(task):
            choices = (region.get("value") or {}).get("choices")
            for choice in choices if isinstance(choices, list) else ():
                found.setdefault(str(region.get("from_name")), set()).add(str(choice))
    return {name: sorted(choices) for name, choices in found.items()}


def _regions(task: Any) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(annotation or prediction, region) of a task."""
    if isinstance(task, dict):
        for said in [*(task.get("annotations") or ()), *(task.get("predictions") or ())]:
            if isinstance(said, dict):
                for region in said.get("result") or ():
                    if isinstance(region, dict):
                        yield said, region


def _entry(task: dict[str, Any], seen: dict[str, list[str]], where: str) -> Entry:
    item = _item(task, seen, where)
    opinions: dict[str, Answer] = {}
    for k, prediction in enumerate(task.get("predictions") or ()):
        said = _said(item, prediction["result"], where)
        if said is not None:
            opinions.setdefault(str(prediction.get("model_version") or f"prediction {k + 1}"), said)
    votes = [_vote(item, annotation, where) for annotation in task.get("annotations") or ()]
    whole = Item(item.id, item.kind, item.content, item.classes, item.source, item.gold, opinions)
    return Entry(whole, tuple(votes))


def _item(task: dict[str, Any], seen: dict[str, list[str]], where: str) -> Item:
    data = task["data"]
    if isinstance(data.get(OURS), dict):
        return questions.parse({key: value for key, value in data[OURS].items() if key != "opinions"}, where)
    forms = {(str(region.get("from_name")), str(region.get("type"))) for _, region in _regions(task)}
    if len(forms) > 1:
        what = f"the task asks several things ({', '.join(sorted(name for name, _ in forms))})"
        raise DataError(what, where=where, fix="export one question at a time")
    name, form = forms.pop() if forms else (next(iter(seen), ""), "choices" if seen else "textarea")
    kind = {"choices": "choice", "pairwise": "pair", "textarea": "text"}.get(form)
    if kind is None:
        raise DataError(f"regions of type {form!r} are none of choices, pairwise, textarea", where=where)
    classes = seen.get(name, []) if kind == "choice" else []
    if kind == "choice" and set(classes) <= {"right", "wrong"} and "answer" in data:
        kind, classes = "right_wrong", []
    if kind == "choice" and len(classes) < 2:
        classes = [*classes, "other"]  # a choice of which the file shows one
    content = foreign_content(data, kind, where)
    source = f"Label Studio task {task.get('id')}"
    return questions.parse(
        {"id": f"task-{task['id']}", "kind": kind, "content": content, "classes": classes, "source": source}, where
    )


def _said(item: Item, result: list[dict[str, Any]], where: str) -> Answer | None:
    """What regions say; None: nothing."""
    if not result:
        return None
    if item.kind == "steps":
        marks: list[str | None] = [None] * len(item.content["steps"])
        for region in result:
            marks[int(region["from_name"].rpartition("_")[2]) - 1] = region["value"]["choices"][0]
        return questions.check(item, marks, where)
    value = result[0]["value"]
    if "selected" in value:
        return questions.check(item, {"left": "a", "right": "b"}[value["selected"]], where)
    said = value["text"] if "text" in value else value["choices"]
    said = [said] if isinstance(said, str) else said
    if item.kind != "text" and len(said) != 1:
        raise DataError("several choices at once have no place in a store", where=where, fix="ask for one")
    return questions.check(item, "\n".join(said), where)


def _vote(item: Item, annotation: dict[str, Any], where: str) -> Vote:
    result = annotation.get("result") or []
    kept = annotation.get(OURS) or (result[0].get("meta") or {}).get(OURS) if result else annotation.get(OURS)
    kept = kept or {}
    answer = None if annotation.get("was_cancelled") else _said(item, result, where)
    lead, made = annotation.get("lead_time"), annotation.get("created_at")
    uid = kept.get("uid") or exchange.uid_of("label studio", item.id, item.digest, annotation)
    return Vote(
        uid, item.id, kept.get("annotator") or _who(annotation.get("completed_by")), answer,
        "skip" if answer is None else "vote", None, None if made is None else _millis(made),
        None if lead is None else round(lead * 1000), kept.get("guideline"), bool(kept.get("blind", False)),
    )  # fmt: skip


def _who(by: Any) -> str:
    """Label Studio names people by number, or by an object with their address."""
    if isinstance(by, dict):
        return str(by.get("email") or f"labelstudio-{by.get('id')}")
    return f"labelstudio-{by}"


def _iso(at: int) -> str:
    return datetime.fromtimestamp(at / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _millis(text: str) -> int:
    moment = datetime.fromisoformat(text)
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return round(moment.timestamp() * 1000)
