"""What the commands around a store do: take in, give out, keys, labels from votes, and where a label is from."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ottava.errors import DataError, check_file
from ottava.labels import bound, exchange
from ottava.labels.questions import Answer, written
from ottava.labels.store import TABLES, Decision, Store, is_store, now


def take(store: Path, file: Path, form: str | None, guideline: Path | None) -> dict[str, Any]:
    """Import a file. Nothing is made, or changed, where it is refused."""
    content = exchange.read(file, form or exchange.form_of(file))
    text = _text(guideline) if guideline else None
    fresh = not store.exists()
    with Store.write(store, create=True) as target:
        try:
            counts = exchange.load(target, content, exchange.origin(file), text)
            found = {"items": counts.items, "votes": counts.votes, "known votes": counts.known,
                     "decisions": counts.decisions, "items in all": target.count("items")}  # fmt: skip
            return found | ({"fields not read": ", ".join(content.unread)} if content.unread else {})
        except BaseException:
            # under the lock: what another process has put there meanwhile stays
            if fresh and not any(map(target.count, TABLES)):
                target.db.close()
                for suffix in ("", "-wal", "-shm", ".lock"):
                    store.with_name(store.name + suffix).unlink(missing_ok=True)
            raise


def give(store: Path, out: Path, form: str | None, certificate: Path | None) -> dict[str, Any]:
    """Export to a file or folder."""
    form = exchange.known(form or exchange.form_of(out))
    if is_store(out):
        what = "this is a store: an export in its place would lose every vote in it"
        raise DataError(what, where=out, fix="name another file to write")
    if certificate is not None:
        document = _certificate(certificate)
        with Store.write(store) as target:
            target.add_certificate(document)
    with Store.read(store) as source:
        content = exchange.dump(source)
    exchange.write(content, out, form)
    votes = sum(vote.kind == "vote" for entry in content.entries for vote in entry.live())
    return {"written": str(out), "items": len(content.entries), "votes": votes}


def key(store: Path, name: str, lead: bool, end: bool) -> str | None:
    """A new key for this person (it cannot be shown again); None where their key has ended."""
    with Store.write(store) as target:
        if end:
            target.end_key(name)
            return None
        made = secrets.token_urlsafe(24)
        target.add_annotator(name, made, lead)
    return made


def decide(store: Path) -> dict[str, Any]:
    """Write a decision for every item whose label the evidence changed. People's adjudications stay."""
    from ottava.labels.ranking import Group, Ranker

    def proposed(group: Group) -> Iterator[tuple[int, Answer, str, float | None]]:
        """(item's number, label, method, believed error)."""
        if group.evidence is not None and group.kind != "steps":
            believed = zip(group.evidence.decisions().tolist(), group.evidence.risks().tolist(), strict=True)
            for row, (label, risk) in zip(group.rows, believed, strict=True):
                yield row, group.classes[label], "fusion", risk
            return
        for row in group.rows:  # of texts and marked steps every word counts: they agree, or somebody adjudicates
            said = {text for _, text in votes.get(row, ())}
            if len(said) == 1:
                yield row, json.loads(said.pop()), "agreed", None

    with Store.write(store) as target:
        ranker = Ranker(target, 0.03)
        ranker.rank()
        said_before = target.db.execute("SELECT item, method, answer FROM decisions ORDER BY seq")
        newest = {row: (method, text) for row, method, text in said_before}
        votes: dict[int, list[tuple[str, str]]] = {}
        for row, uid, text in target.db.execute("SELECT item, uid, answer FROM live ORDER BY seq"):
            votes.setdefault(row, []).append((uid, text))
        made, at = 0, now()
        with target.together():
            for group in ranker.groups.values():
                for row, answer, method, risk in proposed(group):
                    last = newest.get(row, ("", ""))
                    if last[0] == "adjudicated" or last == (method, written(answer)):
                        continue
                    uid, uids = f"{method}-{secrets.token_hex(12)}", tuple(uid for uid, _ in votes.get(row, ()))
                    name = group.items[group.where[row]].id
                    made += target.add_decision(
                        Decision(uid, name, answer, method, None, risk, uids, at, origin=method)
                    )
        return {"new decisions": made, "items": target.count("items"), "votes": target.count("live")}


def trace(store: Path, item: str) -> dict[str, Any]:
    """Source, opinions, votes, undos and decisions of one item, in order of time. Raises Refusal."""
    with Store.read(store) as source:
        found = source.item(item)
        rows = source.db.execute(_TRACE, {"item": item}).fetchall()
    names = ("at", "ms", "guideline", "blind", "of", "uid", "origin")
    events = [
        {"stored": stored, "what": what, "who": who, "says": None if says is None else json.loads(says)}
        | {name: value for name, value in zip(names, rest, strict=True) if value is not None}
        for stored, what, who, says, *rest in rows
    ]
    return {"item": found.id, "kind": found.kind, "content": found.content, "digest": found.digest,
            "source": found.source, "events": events}  # fmt: skip


_TRACE = """
SELECT stored, what, who, says, at, ms, guideline, blind, "of", uid, origin FROM (
  SELECT stored, 0 AS part, seq, 'item' AS what, NULL AS who, gold AS says, NULL AS at, NULL AS ms, NULL AS guideline,
    NULL AS blind, source AS "of", NULL AS uid, origin FROM items WHERE id = :item
  UNION ALL SELECT o.stored, 1, o.seq, 'opinion', o.who, o.answer, NULL, NULL, NULL, NULL, NULL, NULL, o.origin
    FROM opinions o JOIN items i ON i.seq = o.item WHERE i.id = :item
  UNION ALL SELECT v.stored, 2, v.seq, v.kind, a.name, v.answer, v.at, v.ms, v.guideline, v.blind, u.uid, v.uid,
    v.origin FROM votes v JOIN items i ON i.seq = v.item JOIN annotators a ON a.id = v.annotator
    LEFT JOIN votes u ON u.seq = v.undoes WHERE i.id = :item
  UNION ALL SELECT d.stored, 3, d.seq, 'decision: ' || d.method, a.name, d.answer, d.at, d.ms, d.guideline, NULL,
    d.votes, d.uid, d.origin FROM decisions d JOIN items i ON i.seq = d.item
    LEFT JOIN annotators a ON a.id = d.annotator
    WHERE i.id = :item)
ORDER BY stored, part, seq
"""


def told(found: dict[str, Any]) -> str:
    """A trace for people."""
    lines = [f"{found['item']} ({found['kind']}), sha256 {found['digest'][:16]}"]
    for event in found["events"]:
        at = datetime.fromtimestamp(event.get("at", event["stored"]) / 1000, UTC).isoformat(sep=" ", timespec="seconds")
        says = "" if event["says"] is None else json.dumps(event["says"], ensure_ascii=False)
        took = f"{event['ms'] / 1000:.1f} s" if "ms" in event else ""
        under = f"guideline {event['guideline']}" if "guideline" in event else ""
        blind = {1: "blind", 0: "not blind"}.get(event.get("blind", -1), "")
        of = f"of {event['of']}" if event.get("of") else ""
        origin = f"[{event['origin']}]" if event.get("origin") else ""
        words = (at[:19], event["what"], event["who"] or "", says, took, under, blind, of, origin)
        lines.append("  " + "  ".join(filter(None, words)))
    return "\n".join(lines)


def _certificate(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"this is not JSON: {error}", where=path) from None
    if not isinstance(document, dict):
        raise DataError("a certificate is a JSON object", where=path)
    bound.parse(document, path)  # a store only grows: what says nothing would be in it for good
    return document


def _text(path: Path) -> str:
    check_file(path)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError("the file is not text in UTF-8", where=path) from None
