"""A store's whole content as one value, and that value as a file that other programs read.

    jsonl         a header (guidelines, certificates), then an item a line with its opinions, votes, undos and decisions
    parquet       the same, a row an item; `question` and `label` as plain columns for those who only train
    hf            a folder for `datasets.load_dataset`: the Parquet file and a card with the certificate
    labelstudio   Label Studio's JSON (tasks with annotations and predictions); no undos, no decisions
    argilla       Argilla's records (`records.to_json`); no undos, no decisions

Reading what is here already changes nothing; what contradicts the store is refused as a whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from ottava.artifact import file_digest, replacing
from ottava.errors import DataError, check_file
from ottava.labels import questions
from ottava.labels.questions import Item
from ottava.labels.store import Decision, Refusal, Store, Vote

FORMATS = ("jsonl", "parquet", "hf", "labelstudio", "argilla")
MARK = "ottava_labels"
MADE_BY = 1
"""Version of the JSONL and Parquet forms."""


@dataclass(frozen=True)
class Entry:
    """An item (with its opinions) and all that was said of it, in order."""

    item: Item
    votes: tuple[Vote, ...] = ()
    decisions: tuple[Decision, ...] = ()

    def live(self) -> list[Vote]:
        """Votes and skips that were not taken back."""
        undone = {vote.undoes for vote in self.votes}
        return [vote for vote in self.votes if vote.kind != "undo" and vote.uid not in undone]


@dataclass(frozen=True)
class Dump:
    """guidelines: texts by version, which votes name; certificates: what audits proved, the newest last; unread: fields
    of items that mean nothing here."""

    guidelines: dict[int, str] = field(default_factory=dict)
    certificates: tuple[dict[str, Any], ...] = ()
    entries: tuple[Entry, ...] = ()
    unread: tuple[str, ...] = ()


class Counts(NamedTuple):
    """What was new, and how many votes were here already."""

    items: int
    votes: int
    known: int
    decisions: int


def dump(store: Store) -> Dump:
    """The store at one moment, also while somebody writes to it."""
    db = store.db
    db.execute("BEGIN")
    try:
        guidelines = dict(db.execute("SELECT version, text FROM guidelines ORDER BY version").fetchall())
        certificates = [json.loads(row[0]) for row in db.execute("SELECT document FROM certificates ORDER BY seq")]
        people = dict(db.execute("SELECT id, name FROM annotators").fetchall())
        opinions: dict[int, dict[str, Any]] = {}
        for item, who, said in db.execute("SELECT item, who, answer FROM opinions ORDER BY seq"):
            opinions.setdefault(item, {})[who] = json.loads(said)
        items = {seq: replace(item, opinions=opinions.get(seq, {})) for seq, item in store.items()}
        votes = _votes(store, items, people)
        decisions = _decisions(store, items, people)
    finally:
        db.execute("COMMIT")
    entries = (Entry(item, tuple(votes.get(seq, ())), tuple(decisions.get(seq, ()))) for seq, item in items.items())
    return Dump(guidelines, tuple(certificates), tuple(entries))


def load(store: Store, content: Dump, origin: str, guideline: str | None = None) -> Counts:
    """Add what is new, all of it or nothing; guideline: a text that comes with it. Raises Refusal naming what
    contradicts the store."""
    items = votes = known = decisions = 0
    with store.together():
        try:
            if guideline is not None:
                store.add_guideline(guideline)
            versions = {version: store.add_guideline(text) for version, text in sorted(content.guidelines.items())}
            for document in content.certificates:
                store.add_certificate(document)
        except Refusal as refusal:
            raise Refusal(refusal.code, f"{refusal.what}; nothing was taken", where=origin) from None
        for entry in content.entries:
            try:
                items += store.add_items([entry.item], origin)
                for vote in entry.votes:
                    new = store.add_vote(replace(vote, guideline=_version(versions, vote.guideline), origin=origin))
                    votes, known = votes + new, known + (not new)
                for one in entry.decisions:
                    told = replace(one, guideline=_version(versions, one.guideline), origin=origin)
                    decisions += store.add_decision(told)
            except Refusal as refusal:
                what = f"item {entry.item.id!r}: {refusal.what}; nothing was taken"
                raise Refusal(refusal.code, what, where=origin, fix=refusal.fix) from None
    return Counts(items, votes, known, decisions)


def write(content: Dump, path: Path, form: str) -> None:
    """Write in one of FORMATS; the file (for `hf` the folder) is complete or not there. Raises DataError."""
    from ottava.labels import argilla, columns, studio

    writers: dict[str, Callable[[Dump, Path], None]] = {
        "jsonl": to_lines, "parquet": columns.to_parquet, "hf": columns.to_folder, "labelstudio": studio.to_json,
        "argilla": argilla.to_json,
    }  # fmt: skip
    writers[known(form)](content, path)


def read(path: Path, form: str) -> Dump:
    """Raises DataError naming the line, or the place, of what is wrong."""
    from ottava.labels import argilla, columns, studio

    readers: dict[str, Callable[[Path], Dump]] = {
        "jsonl": from_lines, "parquet": columns.from_parquet, "hf": columns.from_folder,
        "labelstudio": studio.from_json, "argilla": argilla.from_json,
    }  # fmt: skip
    if form != "hf":
        check_file(path)
    return readers[known(form)](path)


def origin(path: Path) -> str:
    """How imported rows name the file they are from."""
    return f"{path.name} sha256:{file_digest(path)[:16]}" if path.is_file() else path.name


def form_of(path: Path) -> str:
    """The format that a name stands for; JSON could be of two programs, and says nothing."""
    named = {".jsonl": "jsonl", ".parquet": "parquet"}
    if path.suffix in named:
        return named[path.suffix]
    if path.is_dir():
        return "hf"
    fix = f"--format {'|'.join(FORMATS)}"
    raise DataError("the name does not say which format this is", where=path, fix=fix)


def known(form: str) -> str:
    """The format itself, if there is such a one. Raises DataError."""
    if form not in FORMATS:
        raise DataError(f"{form!r} is no format", where="--format", fix=f"one of {', '.join(FORMATS)}")
    return form


# ---- JSON lines


def to_lines(content: Dump, path: Path) -> None:
    """One JSON object a line."""
    with replacing(path) as part, part.open("w", encoding="utf-8") as file:
        file.write(json.dumps(header(content), ensure_ascii=False) + "\n")
        for entry in content.entries:
            file.write(json.dumps(to_plain(entry), ensure_ascii=False) + "\n")


def from_lines(path: Path) -> Dump:
    """With or without header: lines of bare items are a way to begin."""
    guidelines: dict[int, str] = {}
    certificates: tuple[dict[str, Any], ...] = ()
    entries: list[Entry] = []
    fields: dict[str, None] = {}
    for where, document in _lines(path):
        if isinstance(document, dict) and MARK in document:
            guidelines, certificates = parse_header(document, where)
        else:
            entries.append(from_plain(document, where))
            fields.update(dict.fromkeys(document))
    if not entries and not guidelines:
        raise DataError("there is nothing in the file", where=path)
    return Dump(guidelines, certificates, tuple(entries), tuple(field for field in fields if field not in _ITEM))


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"this is not a line of JSON ({error}); nothing was taken", where=where) from None


def header(content: Dump) -> dict[str, Any]:
    """What is true of all items."""
    return {MARK: MADE_BY, "guidelines": content.guidelines, "certificates": list(content.certificates)}


def parse_header(document: dict[str, Any], where: str) -> tuple[dict[int, str], tuple[dict[str, Any], ...]]:
    """(guidelines, certificates). Raises DataError."""
    if document[MARK] != MADE_BY:
        what = f"the file is of form {document[MARK]!r}, and this program knows {MADE_BY}"
        raise DataError(what, where=where, fix="use the newer program")
    guidelines, certificates = document.get("guidelines", {}), document.get("certificates", [])
    if not isinstance(guidelines, dict) or not all(
        key.isdecimal() and len(key) <= 9 and isinstance(text, str) for key, text in guidelines.items()
    ):
        raise DataError("guidelines are texts by version", where=where)
    if not isinstance(certificates, list) or not all(isinstance(one, dict) for one in certificates):
        raise DataError("certificates are a list of objects", where=where)
    return {int(key): text for key, text in guidelines.items()}, tuple(certificates)


_ITEM = frozenset(("id", "kind", "content", "classes", "source", "gold", "opinions", "votes", "decisions"))
_VOTE: dict[str, type | tuple[type, ...]] = {
    "uid": str, "annotator": str, "kind": str, "answer": (str, list, type(None)), "undoes": (str, type(None)),
    "at": (int, type(None)), "ms": (int, type(None)), "guideline": (int, type(None)), "blind": bool,
}  # fmt: skip
_DECISION: dict[str, type | tuple[type, ...]] = {
    "uid": str, "answer": (str, list), "method": str, "annotator": (str, type(None)),
    "error": (float, int, type(None)), "votes": (list, tuple), "at": (int, type(None)), "ms": (int, type(None)),
    "guideline": (int, type(None)),
}  # fmt: skip


def to_plain(entry: Entry) -> dict[str, Any]:
    """An item's line."""
    item = entry.item
    return {
        "id": item.id, "kind": item.kind, "content": item.content, "classes": list(item.classes),
        "source": item.source, "gold": item.gold, "opinions": item.opinions,
        "votes": [{key: getattr(vote, key) for key in _VOTE} for vote in entry.votes],
        "decisions": [{key: getattr(one, key) for key in _DECISION} for one in entry.decisions],
    }  # fmt: skip


def from_plain(document: Any, where: str) -> Entry:
    """Raises DataError."""
    item = questions.parse(document, where)
    votes, decisions = document.get("votes") or [], document.get("decisions") or []
    if not isinstance(votes, list) or not isinstance(decisions, list):
        raise DataError("votes and decisions are lists", where=where)
    rows = [_row(vote, _VOTE, item, k, f"{where} votes[{k}]") for k, vote in enumerate(votes)]
    for k, row in enumerate(rows):
        if row.get("kind", "vote") not in ("vote", "skip", "undo"):
            raise DataError(f"{row['kind']!r} is no kind of vote", where=f"{where} votes[{k}]")
    made = [_row(one, _DECISION, item, k, f"{where} decisions[{k}]") for k, one in enumerate(decisions)]
    return Entry(
        item,
        tuple(Vote(**{"answer": None} | row, item=item.id) for row in rows),
        tuple(Decision(**row | {"votes": tuple(row.get("votes", ()))}, item=item.id) for row in made),
    )


def _row(document: Any, types: dict[str, Any], item: Item, number: int, where: str) -> dict[str, Any]:
    """A vote's or a decision's fields; one without a uid gets one from its item, its place there and its content."""
    if not isinstance(document, dict):
        raise DataError("a vote, or a decision, is an object", where=where)
    if unknown := set(document) - set(types):
        raise DataError(f"unknown field {sorted(unknown)[0]!r}", where=where, fix=f"one of {', '.join(types)}")
    for key, value in document.items():
        wanted = types[key]
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise DataError(f"{key} cannot be {json.dumps(value)[:60]}", where=where)
    if "annotator" not in document and types is _VOTE:
        raise DataError("a vote names its annotator", where=where)
    for key in ("answer", "method"):
        if types is _DECISION and key not in document:
            raise DataError(f"a decision has its {key}", where=where)
    error = document.get("error")
    if error is not None and not 0 <= error <= 1:
        raise DataError(f"error is a share from 0 to 1, not {str(error)[:40]}", where=where)
    if types is _DECISION and not all(
        isinstance(uid, str) and questions.writable(uid) for uid in document.get("votes", ())
    ):
        raise DataError("a decision names its votes by their ids", where=where)
    return {"uid": uid_of("votes" if types is _VOTE else "decisions", item.id, number, document)} | document


def uid_of(*parts: Any) -> str:
    """A vote's id made of its content, for files that have none: read twice, it is the same."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return "import-" + hashlib.sha256(text.encode()).hexdigest()[:32]


def _version(versions: dict[int, int], version: int | None) -> int | None:
    if version is None:
        return None
    if version not in versions:
        raise Refusal("bad", f"a vote names guideline {version}, which the file does not hold")
    return versions[version]


def _votes(store: Store, items: dict[int, Item], people: dict[int, str]) -> dict[int, list[Vote]]:
    found: dict[int, list[Vote]] = {}
    rows = store.db.execute(
        "SELECT v.item, v.uid, v.annotator, v.answer, v.kind, u.uid, v.at, v.ms, v.guideline, v.blind, v.origin"
        " FROM votes v LEFT JOIN votes u ON u.seq = v.undoes ORDER BY v.seq"
    )
    for item, uid, who, answer, kind, undoes, at, ms, guideline, blind, came in rows:
        said = None if answer is None else json.loads(answer)
        found.setdefault(item, []).append(
            Vote(uid, items[item].id, people[who], said, kind, undoes, at, ms, guideline, bool(blind), came)
        )
    return found


def _decisions(store: Store, items: dict[int, Item], people: dict[int, str]) -> dict[int, list[Decision]]:
    found: dict[int, list[Decision]] = {}
    rows = store.db.execute(
        "SELECT item, uid, answer, method, annotator, error, votes, at, ms, guideline, origin FROM decisions"
        " ORDER BY seq"
    )
    for item, uid, answer, method, who, error, votes, at, ms, guideline, came in rows:
        name = None if who is None else people[who]
        found.setdefault(item, []).append(
            Decision(
                uid, items[item].id, json.loads(answer), method, name, error, tuple(json.loads(votes)), at, ms,
                guideline, came,
            )
        )  # fmt: skip
    return found
