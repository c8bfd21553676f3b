"""Argilla's records, as `dataset.records.to_json` writes and `from_json` reads them (docs.argilla.io, Record.to_dict).

A response there has a user, a value and a status, and nothing else: when, how long, the guideline and the vote's id go
along in the record's metadata. Steps are a question each (step_1, step_2, ...). Undos and decisions have no place.
"""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

from ottava.artifact import replacing
from ottava.errors import DataError
from ottava.labels import exchange, questions
from ottava.labels.exchange import Dump, Entry
from ottava.labels.questions import Answer, Item
from ottava.labels.store import Vote
from ottava.labels.studio import CONTROL, OURS, foreign_content, read_list

PEOPLE = uuid.UUID("6f747461-7661-4c61-8265-6c2e70656f70")
"""Namespace in which a name has always the same user id: Argilla knows people by UUID."""
_KEPT = ("uid", "annotator", "kind", "at", "ms", "guideline", "blind")


def to_json(content: Dump, path: Path) -> None:
    """A list of records."""
    records = [_record(entry) for entry in content.entries]
    if records:
        first = json.loads(records[0]["metadata"][OURS]) | exchange.header(content)
        records[0]["metadata"][OURS] = json.dumps(first, ensure_ascii=False)
    with replacing(path) as part:
        part.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")


def _record(entry: Entry) -> dict[str, Any]:
    item, live = entry.item, entry.live()
    fields = {key: value for key, value in item.content.items() if isinstance(value, str)}
    fields |= {f"step_{k}": text for k, text in enumerate(item.content.get("steps", ()), 1)}
    own = {key: value for key, value in exchange.to_plain(Entry(item)).items() if key not in ("votes", "decisions")}
    own["votes"] = {str(user(vote.annotator)): {key: getattr(vote, key) for key in _KEPT} for vote in live}
    responses: dict[str, list[dict[str, Any]]] = {}
    for vote in live:
        for name, value in _values(item, vote.answer):
            status = "discarded" if vote.kind == "skip" else "submitted"
            said = {"value": value, "user_id": str(user(vote.annotator)), "status": status}
            responses.setdefault(name, []).append(said)
    suggestions = {}
    for agent, opinion in list(item.opinions.items())[:1]:  # Argilla has room for one suggestion to a question
        for name, value in _values(item, opinion):
            suggestions[name] = {"value": value, "score": None, "agent": agent}
    return {
        "id": item.id, "fields": fields, "metadata": {OURS: json.dumps(own, ensure_ascii=False)},
        "suggestions": suggestions, "responses": responses, "vectors": {},
        "status": "completed" if live else "pending", "_server_id": None,
    }  # fmt: skip


def user(name: str) -> uuid.UUID:
    """The id by which a person is known there."""
    return uuid.uuid5(PEOPLE, name)


def _values(item: Item, answer: Answer | None) -> list[tuple[str, str | None]]:
    """(question, value) of an answer; of a skip the first question, without a value."""
    name = CONTROL[item.kind]
    if isinstance(answer, list):
        return [(f"{name}_{k}", said) for k, said in enumerate(answer, 1) if said is not None]
    return [(f"{name}_1" if item.kind == "steps" else name, answer)]


# ---- reading


def from_json(path: Path) -> Dump:
    """Argilla's records, of its own data sets too. Raises DataError naming the record."""
    records = read_list(path, "records")
    guidelines: dict[int, str] = {}
    certificates: tuple[dict[str, Any], ...] = ()
    try:
        seen = _classes(records)
    except (TypeError, AttributeError) as error:
        raise DataError(f"this is not Argilla's form: {error!r}"[:160], where=path) from None
    entries = []
    for number, record in enumerate(records):
        where = f"{path} record {number + 1}"
        if not isinstance(record, dict) or not isinstance(record.get("fields"), dict):
            raise DataError("a record is an object with fields", where=where)
        try:
            own = json.loads((record.get("metadata") or {}).get(OURS) or "{}")
            if exchange.MARK in own:
                guidelines, certificates = exchange.parse_header(own, where)
            entries.append(_entry(record, own, seen, where))
        except (KeyError, TypeError, AttributeError, IndexError, ValueError, RecursionError) as error:
            raise DataError(f"this is not Argilla's form: {error!r}"[:160], where=where) from None
    return Dump(guidelines, certificates, tuple(entries))


def _classes(records: list[Any]) -> dict[str, list[str]]:
    """The values seen under each question; long or many different ones are free text, and no classes."""
    found: dict[str, set[str]] = {}
    for record in records:
        if isinstance(record, dict):
            for name, responses in (record.get("responses") or {}).items():
                for response in responses if isinstance(responses, list) else ():
                    if isinstance(response, dict) and isinstance(response.get("value"), str):
                        found.setdefault(name, set()).add(response["value"])
    return {
        name: sorted(values)
        for name, values in found.items()
        if len(values) <= 20 and all(len(value) <= 40 for value in values)
    }


def _entry(record: dict[str, Any], own: dict[str, Any], seen: dict[str, list[str]], where: str) -> Entry:
    responses = record.get("responses") or {}
    item = questions.parse(own, where) if "kind" in own else _foreign(record, responses, seen, where)
    said: dict[str, dict[str, Any]] = {}
    for name, answers in responses.items():
        for answer in answers:
            if answer.get("status") == "draft":
                continue
            said.setdefault(answer["user_id"], {})[name] = answer
    votes = [_vote(item, who, answers, own, where) for who, answers in said.items()]
    order = {who: k for k, who in enumerate(own.get("votes") or {})}
    votes.sort(key=lambda vote: order.get(str(user(vote.annotator)), len(order)))
    return Entry(item, tuple(votes))


def _vote(item: Item, who: str, answers: dict[str, Any], own: dict[str, Any], where: str) -> Vote:
    kept = (own.get("votes") or {}).get(who)
    # Argilla's own files do not say the status: a response without a value is one that was discarded
    discarded = any(answer.get("status") == "discarded" or answer["value"] is None for answer in answers.values())
    answer = None if discarded else _answer(item, answers, where)
    kept = kept or {
        "uid": exchange.uid_of("argilla", item.id, item.digest, who, answers), "annotator": f"argilla-{who}",
        "kind": "skip" if answer is None else "vote", "blind": False,
    }  # fmt: skip
    row = {"answer": answer} | {key: value for key, value in kept.items() if key in _KEPT}
    return exchange.from_plain(exchange.to_plain(Entry(item)) | {"votes": [row]}, where).votes[0]


def _answer(item: Item, answers: dict[str, Any], where: str) -> Answer:
    if item.kind == "steps":
        name = CONTROL["steps"]
        marks = [answers.get(f"{name}_{k}", {}).get("value") for k in range(1, len(item.content["steps"]) + 1)]
        return questions.check(item, marks, where)
    if len(answers) > 1:
        raise DataError("the record answers several questions", where=where, fix="export one question at a time")
    return questions.check(item, next(iter(answers.values()))["value"], where)


def _foreign(record: dict[str, Any], responses: dict[str, Any], seen: dict[str, list[str]], where: str) -> Item:
    names = sorted(responses) or sorted(seen)
    classes = seen.get(names[0], []) if names else []
    kind = "choice" if len(classes) > 1 else "text"
    if classes and set(classes) <= {"right", "wrong"} and "answer" in record["fields"]:
        kind = "right_wrong"
    content = foreign_content(record["fields"], kind, where)
    name = str(record.get("id") or record.get("_server_id"))
    document = {"id": name, "kind": kind, "content": content, "classes": classes if kind == "choice" else []}
    return questions.parse(document | {"source": f"Argilla record {name}"}, where)
