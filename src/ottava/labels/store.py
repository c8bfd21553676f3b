"""Votes are the dearest thing that a labelling team has: one SQLite file that only grows.

Nothing in it is ever changed or removed: triggers refuse UPDATE and DELETE, and an undo is a row of its own that names
the vote it takes back. A vote is on disk before it is acknowledged (WAL, synchronous=FULL), so that a kill or a power
cut loses none that was. One process writes (a lock beside the file says who); any number may read meanwhile.

    guidelines   texts by version           opinions    what machines say of items
    annotators   names                      votes       who, when, how long, under which guideline, blind or not
    keys         SHA-256 of people's keys   decisions   what came of it, how, and from which votes
    items        what is asked, and from where          certificates
    runs         what the policy was begun with, and which items it was told to wait no longer for (`live`)
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ottava.errors import Busy, DataError, ResourceError, from_os_error
from ottava.labels import questions
from ottava.labels.questions import Answer, Item

VERSION = 2
APPLICATION = 0x4F544C42
"""SQLite's application_id: "OTLB"."""
DAY = 86_400_000
TABLES = ("guidelines", "annotators", "keys", "items", "opinions", "votes", "decisions", "certificates", "runs")

_SCHEMA = """
CREATE TABLE guidelines(version INTEGER PRIMARY KEY, text TEXT NOT NULL, sha256 TEXT NOT NULL UNIQUE,
  stored INTEGER NOT NULL) STRICT;
CREATE TABLE annotators(id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, stored INTEGER NOT NULL) STRICT;
CREATE TABLE keys(seq INTEGER PRIMARY KEY, annotator INTEGER NOT NULL REFERENCES annotators(id),
  digest BLOB CHECK(length(digest) = 32), lead INTEGER NOT NULL CHECK(lead IN (0, 1)), stored INTEGER NOT NULL) STRICT;
CREATE TABLE items(seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, content TEXT NOT NULL,
  classes TEXT NOT NULL, gold TEXT, source TEXT NOT NULL, digest TEXT NOT NULL, origin TEXT NOT NULL,
  stored INTEGER NOT NULL) STRICT;
CREATE TABLE opinions(seq INTEGER PRIMARY KEY, item INTEGER NOT NULL REFERENCES items(seq), who TEXT NOT NULL,
  answer TEXT NOT NULL, origin TEXT NOT NULL, stored INTEGER NOT NULL, UNIQUE(item, who)) STRICT;
CREATE TABLE votes(seq INTEGER PRIMARY KEY, uid TEXT NOT NULL UNIQUE, item INTEGER NOT NULL REFERENCES items(seq),
  annotator INTEGER NOT NULL REFERENCES annotators(id), kind TEXT NOT NULL CHECK(kind IN ('vote', 'skip', 'undo')),
  answer TEXT CHECK((kind = 'vote') = (answer IS NOT NULL)), undoes INTEGER UNIQUE REFERENCES votes(seq)
  CHECK((kind = 'undo') = (undoes IS NOT NULL)), at INTEGER, ms INTEGER CHECK(ms >= 0),
  guideline INTEGER REFERENCES guidelines(version), blind INTEGER NOT NULL CHECK(blind IN (0, 1)),
  origin TEXT NOT NULL, stored INTEGER NOT NULL) STRICT;
CREATE INDEX votes_by_item ON votes(item, annotator);
CREATE VIEW live AS SELECT v.* FROM votes v WHERE v.kind = 'vote'
  AND NOT EXISTS (SELECT 1 FROM votes u WHERE u.undoes = v.seq);
CREATE TRIGGER one_vote BEFORE INSERT ON votes WHEN NEW.kind = 'vote' AND EXISTS
  (SELECT 1 FROM live WHERE item = NEW.item AND annotator = NEW.annotator)
  BEGIN SELECT RAISE(ABORT, 'this person has voted on this item'); END;
CREATE TABLE decisions(seq INTEGER PRIMARY KEY, uid TEXT NOT NULL UNIQUE, item INTEGER NOT NULL REFERENCES items(seq),
  answer TEXT NOT NULL, method TEXT NOT NULL, annotator INTEGER REFERENCES annotators(id), error REAL,
  votes TEXT NOT NULL, at INTEGER, ms INTEGER, guideline INTEGER REFERENCES guidelines(version), origin TEXT NOT NULL,
  stored INTEGER NOT NULL) STRICT;
CREATE INDEX decisions_by_item ON decisions(item);
CREATE TABLE certificates(seq INTEGER PRIMARY KEY, document TEXT NOT NULL, sha256 TEXT NOT NULL UNIQUE,
  stored INTEGER NOT NULL) STRICT;
"""
_RUNS = "CREATE TABLE runs(seq INTEGER PRIMARY KEY, document TEXT NOT NULL, stored INTEGER NOT NULL) STRICT;"


class Refusal(DataError):
    """One row that the store does not take. code: unknown_item, unknown_vote, twice, contradiction, bad."""

    def __init__(self, code: str, what: str, *, where: str | None = None, fix: str | None = None):
        super().__init__(what, where=where, fix=fix)
        self.code = code


@dataclass(frozen=True)
class Vote:
    """A row to be stored. uid: the client's own id of it: sent twice, it is stored once. undoes: the uid of the vote,
    or skip, that an undo takes back. at: when, milliseconds since 1970 (UTC), or None where it is not known; ms: how
    long it took; guideline: the version that was shown; blind: no suggestion was. origin: where it came in."""

    uid: str
    item: str
    annotator: str
    answer: Answer | None
    kind: Literal["vote", "skip", "undo"] = "vote"
    undoes: str | None = None
    at: int | None = None
    ms: int | None = None
    guideline: int | None = None
    blind: bool = True
    origin: str = "queue"


@dataclass(frozen=True)
class Decision:
    """What an item's label is: method (fusion, adjudicated, ...), the believed probability that it is wrong, and the
    uids of the votes that it rests on. annotator: who decided, where a person did."""

    uid: str
    item: str
    answer: Answer
    method: str
    annotator: str | None = None
    error: float | None = None
    votes: tuple[str, ...] = ()
    at: int | None = None
    ms: int | None = None
    guideline: int | None = None
    origin: str = "queue"


class Known(NamedTuple):
    """Whose key it is. lead: may adjudicate."""

    name: str
    digest: bytes
    lead: bool


def now() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


class Store:
    """The file. Use `create`, `write` or `read`; as a context manager it closes itself.

    Each call that adds is a transaction, or a part of the one that `together` opens.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, lock: int | None):
        self.path, self.db, self._lock = path, connection, lock
        self._items: dict[str, int] = {}
        self._people: dict[str, int] = {}

    @classmethod
    def write(cls, path: Path, create: bool = False) -> Store:
        """The only writer. Raises Busy where there is one, DataError where the file is no store of this version."""
        if not create and not path.is_file():
            raise DataError("no such store", where=path, fix=f"make one: ottava label import {path} ITEMS.jsonl")
        lock = _lock(path)
        store = cls(path, sqlite3.connect(":memory:"), lock)
        try:
            fresh = not path.exists() or path.stat().st_size == 0
            store.db = _connect(path)
            with _readable(path):
                if fresh:
                    _make(store.db)
                _check(store.db, path)
                _renew(store.db)
                for pragma in (
                    "journal_mode = WAL",
                    "synchronous = FULL",
                    "foreign_keys = ON",
                    "recursive_triggers = ON",
                ):
                    store.db.execute(f"PRAGMA {pragma}")
        except BaseException:
            store.close()
            raise
        return store

    @classmethod
    def read(cls, path: Path) -> Store:
        """Only to read, also while another process writes. Raises DataError."""
        if not path.is_file():
            raise DataError("no such store", where=path, fix="check the path")
        store = cls(path, _connect(path, "ro"), None)
        with _readable(path):
            _check(store.db, path, quick=True)
        return store

    def close(self) -> None:
        self.db.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """One transaction for all that is added in the block; nothing of it stays where the block raises."""
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.db.execute("COMMIT")
        except BaseException as error:
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
            self._items.clear()
            self._people.clear()
            if isinstance(error, sqlite3.Error):
                raise _told(error, self.path) from None
            raise

    def add_all(self, rows: Iterable[Vote | Decision]) -> list[bool | Refusal]:
        """Many people's answers in one transaction, which costs one wait for the disk: what `add_vote` or
        `add_decision` says of each. One that is refused takes none of the others with it."""
        said: list[bool | Refusal] = []
        with self.together():
            for row in rows:
                self.db.execute("SAVEPOINT one")
                try:
                    said.append(self.add_vote(row) if isinstance(row, Vote) else self.add_decision(row))
                except DataError as error:
                    self.db.execute("ROLLBACK TO one")
                    self._people.clear()
                    said.append(error if isinstance(error, Refusal) else Refusal("bad", error.what, where=error.where))
                self.db.execute("RELEASE one")
        return said

    # ---- adding

    def add_guideline(self, text: str) -> int:
        """The version of this text, a new one where it is new."""
        with _storable():
            sha = hashlib.sha256(text.encode()).hexdigest()
        found = self._one("SELECT version FROM guidelines WHERE sha256 = ?", sha)
        if found is not None:
            return int(found)
        return self._add("guidelines", text=text, sha256=sha, stored=now())

    def add_annotator(self, name: str, key: str | None = None, lead: bool = False) -> None:
        """A person, and from now on this key of theirs (only its SHA-256 is kept); the old key ends."""
        person = self._person(questions.check_name(name, "a name"))
        if key is not None:
            self._add(
                "keys", annotator=person, digest=hashlib.sha256(key.encode()).digest(), lead=int(lead), stored=now()
            )

    def end_key(self, name: str) -> None:
        """This person may not answer any more; what they said stays."""
        person = self._one("SELECT id FROM annotators WHERE name = ?", name)
        if person is None:
            raise DataError(f"nobody here is called {name!r}", where=self.path)
        self._add("keys", annotator=person, digest=None, lead=0, stored=now())

    def add_items(self, items: Iterable[Item], origin: str = "") -> int:
        """How many were new. The same item again is absorbed; another one of the same id is refused."""
        count = 0
        for item in items:
            count += self._add_item(item, origin)
        return count

    def _add_item(self, item: Item, origin: str) -> bool:
        old = self._row("SELECT seq, digest, gold FROM items WHERE id = ?", item.id)
        gold = None if item.gold is None else questions.written(item.gold)
        if old is None:
            seq = self._add(
                "items", id=item.id, kind=item.kind, content=json.dumps(item.content, ensure_ascii=False),
                classes=json.dumps(item.classes, ensure_ascii=False), gold=gold, source=item.source,
                digest=item.digest, origin=origin, stored=now(),
            )  # fmt: skip
            self._items[item.id] = seq
        else:
            seq = old[0]
            if old[1] != item.digest or (gold is not None and gold != old[2]):
                what = f"item {item.id!r} is here already, and is another one"
                raise Refusal("contradiction", what, where=origin, fix="give it another id")
        for who, said in item.opinions.items():
            self._add_opinion(seq, item.id, who, questions.written(said), origin)
        return old is None

    def _add_opinion(self, seq: int, name: str, who: str, answer: str, origin: str) -> None:
        old = self._one("SELECT answer FROM opinions WHERE item = ? AND who = ?", seq, who)
        if old is None:
            self._add("opinions", item=seq, who=who, answer=answer, origin=origin, stored=now())
        elif old != answer:
            what = f"{who!r} said {old} of item {name!r}, and now {answer}"
            raise Refusal("contradiction", what, where=origin, fix="name another version of a judge otherwise")

    def add_vote(self, vote: Vote) -> bool:
        """True: stored; False: it was here already, word for word. Raises Refusal where it cannot be taken."""
        item, seq = self.item(vote.item), self._items[vote.item]
        person = self._person(vote.annotator)
        answer = self._answer(vote, item)
        old = self._row("SELECT item, annotator, kind, answer FROM votes WHERE uid = ?", vote.uid)
        if old is not None:
            if old != (seq, person, vote.kind, answer):
                raise Refusal("contradiction", f"the vote {vote.uid!r} is here already, and says something else")
            return False
        undoes = self._undone(vote, seq, person) if vote.kind == "undo" else None
        if vote.kind == "vote" and self._one("SELECT 1 FROM live WHERE item = ? AND annotator = ?", seq, person):
            fix = "undo that vote first"
            raise Refusal("twice", f"{vote.annotator!r} has voted on item {vote.item!r}", fix=fix)
        self._add(
            "votes", uid=questions.check_name(vote.uid, "a vote's id"), item=seq, annotator=person, kind=vote.kind,
            answer=answer, undoes=undoes, at=_moment(vote.at), ms=_span(vote.ms),
            guideline=self._guideline(vote.guideline), blind=int(vote.blind), origin=vote.origin, stored=now(),
        )  # fmt: skip
        return True

    def add_decision(self, decision: Decision) -> bool:
        """As `add_vote`. The newest decision of an item counts."""
        item, seq = self.item(decision.item), self._items[decision.item]
        answer = questions.written(questions.check(item, decision.answer, f"item {decision.item!r}"))
        old = self._row("SELECT item, answer FROM decisions WHERE uid = ?", decision.uid)
        if old is not None:
            if old != (seq, answer):
                raise Refusal("contradiction", f"the decision {decision.uid!r} is here already, and is another one")
            return False
        self._add(
            "decisions", uid=questions.check_name(decision.uid, "a decision's id"), item=seq, answer=answer,
            method=decision.method, annotator=None if decision.annotator is None else self._person(decision.annotator),
            error=decision.error, votes=json.dumps(decision.votes), at=_moment(decision.at), ms=_span(decision.ms),
            guideline=self._guideline(decision.guideline), origin=decision.origin, stored=now(),
        )  # fmt: skip
        return True

    def add_certificate(self, document: Mapping[str, Any]) -> None:
        """What an audit proved of the labels, as JSON; the same one again is absorbed."""
        text = json.dumps(document, sort_keys=True, ensure_ascii=False)
        with _storable():
            sha = hashlib.sha256(text.encode()).hexdigest()
        if self._one("SELECT 1 FROM certificates WHERE sha256 = ?", sha) is None:
            self._add("certificates", document=text, sha256=sha, stored=now())

    def add_run(self, document: Mapping[str, Any]) -> int:
        """What `live` has to remember of a run of the policy: its number."""
        return self._add("runs", document=json.dumps(document, sort_keys=True, ensure_ascii=False), stored=now())

    # ---- reading

    def item(self, name: str) -> Item:
        """Raises Refusal (unknown_item)."""
        row = self._row("SELECT seq, id, kind, content, classes, source, gold FROM items WHERE id = ?", name)
        if row is None:
            raise Refusal("unknown_item", f"no item is called {name!r}", where=str(self.path))
        self._items[name] = row[0]
        return _item(row[1:])

    def items(self, after: int = 0) -> Iterator[tuple[int, Item]]:
        """Those with a number above `after`, in the order of their arrival, without opinions."""
        query = "SELECT seq, id, kind, content, classes, source, gold FROM items WHERE seq > ? ORDER BY seq"
        for row in self.db.execute(query, (after,)):
            yield row[0], _item(row[1:])

    def guideline(self) -> tuple[int, str]:
        """The newest version, and its text; (0, "") where there is none."""
        found = self._row("SELECT version, text FROM guidelines ORDER BY version DESC LIMIT 1")
        return (0, "") if found is None else (int(found[0]), str(found[1]))

    def known(self) -> list[Known]:
        """The keys that hold: the newest of each person, but for those that were ended."""
        rows = self.db.execute(
            "SELECT a.name, k.digest, k.lead FROM keys k JOIN annotators a ON a.id = k.annotator"
            " WHERE k.digest IS NOT NULL AND k.seq = (SELECT max(seq) FROM keys WHERE annotator = k.annotator)"
            " ORDER BY a.id"
        )
        return [Known(name, digest, bool(lead)) for name, digest, lead in rows]

    def count(self, table: str) -> int:
        """Rows of one of TABLES, or of `live`."""
        assert table in (*TABLES, "live"), table
        return int(self._one(f"SELECT count(*) FROM {table}") or 0)

    def _one(self, query: str, *values: Any) -> Any:
        row = self._row(query, *values)
        return None if row is None else row[0]

    def _row(self, query: str, *values: Any) -> Any:
        with _storable():
            return self.db.execute(query, values).fetchone()

    # ---- what rows are made of

    def _add(self, table: str, **row: Any) -> int:
        names = ", ".join(row)
        marks = ", ".join("?" * len(row))
        try:
            with _storable():
                cursor = self.db.execute(f"INSERT INTO {table}({names}) VALUES({marks})", tuple(row.values()))
        except sqlite3.Error as error:
            raise _told(error, self.path) from None
        return int(cursor.lastrowid or 0)

    def _person(self, name: str) -> int:
        found = self._people.get(name) or self._one("SELECT id FROM annotators WHERE name = ?", name)
        if found is None:
            found = self._add("annotators", name=questions.check_name(name, "an annotator"), stored=now())
        self._people[name] = int(found)
        return int(found)

    def _answer(self, vote: Vote, item: Item) -> str | None:
        if vote.kind != "vote":
            if vote.answer is not None:
                raise Refusal("bad", f"{vote.kind} has no answer")
            return None
        try:
            return questions.written(questions.check(item, vote.answer, f"item {item.id!r}"))
        except DataError as error:
            raise Refusal("bad", error.what, where=error.where, fix=error.fix) from None

    def _undone(self, vote: Vote, item: int, person: int) -> int:
        """The number of the row that this one takes back."""
        row = self._row("SELECT seq, item, annotator, kind FROM votes WHERE uid = ?", vote.undoes)
        if row is None or row[1:3] != (item, person) or row[3] == "undo":
            raise Refusal("unknown_vote", f"{vote.annotator!r} has no vote {vote.undoes!r} on item {vote.item!r}")
        if self._one("SELECT 1 FROM votes WHERE undoes = ?", row[0]):
            raise Refusal("twice", f"the vote {vote.undoes!r} is undone already")
        return int(row[0])

    def _guideline(self, version: int | None) -> int | None:
        if version in (None, 0):
            return None
        if self._one("SELECT 1 FROM guidelines WHERE version = ?", version) is None:
            raise Refusal("bad", f"there is no guideline of version {version}", where=str(self.path))
        return version


def _item(row: tuple[Any, ...]) -> Item:
    name, kind, content, classes, source, gold = row
    known = None if gold is None else json.loads(gold)
    return Item(name, kind, json.loads(content), tuple(json.loads(classes)), source, known)


def _moment(at: int | None) -> int | None:
    if at is not None and (isinstance(at, bool) or not isinstance(at, int) or not 0 <= at < 1 << 53):
        raise Refusal("bad", f"a time is in milliseconds since 1970, not {str(at)[:40]}")
    return at


def _span(ms: int | None) -> int | None:
    """A day at most: who comes back later has not thought all that time."""
    if ms is not None and (isinstance(ms, bool) or not isinstance(ms, int) or ms < 0):
        raise Refusal("bad", f"how long it took is in milliseconds, not {str(ms)[:40]}")
    return None if ms is None else min(ms, DAY)


def _connect(path: Path, mode: str = "rwc") -> sqlite3.Connection:
    from urllib.parse import quote

    try:
        return sqlite3.connect(
            f"file:{quote(str(path.absolute()))}?mode={mode}", uri=True, isolation_level=None, check_same_thread=False,
            timeout=10.0,
        )  # fmt: skip
    except sqlite3.Error as error:
        raise _told(error, path) from None


def _lock(path: Path) -> int:
    """The writer's lock: a file beside the store (locks on the store itself are SQLite's own)."""
    beside = path.with_name(path.name + ".lock")
    try:
        lock = os.open(beside, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise from_os_error(error, "opening the store", beside) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        who = os.read(lock, 200).decode(errors="replace").strip() or "another process"
        os.close(lock)
        fix = "stop that one, or use it: any number of people can answer on one server"
        raise Busy(f"{who} writes to this store", where=path, fix=fix) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"process {os.getpid()}".encode(), 0)
    return lock


def _make(db: sqlite3.Connection) -> None:
    pragmas = f"PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {VERSION};"
    db.executescript(f"BEGIN; {_SCHEMA} {_RUNS} {_triggers(TABLES)} {pragmas} COMMIT;")


def _renew(db: sqlite3.Connection) -> None:
    """Version 1 had no runs."""
    if db.execute("PRAGMA user_version").fetchone()[0] == 1:
        db.executescript(f"BEGIN; {_RUNS} {_triggers(('runs',))} PRAGMA user_version = {VERSION}; COMMIT;")


def _triggers(tables: Iterable[str]) -> str:
    return "".join(
        f"CREATE TRIGGER {table}_no_{verb} BEFORE {verb} ON {table} "
        f"BEGIN SELECT RAISE(ABORT, '{table} only grows'); END;"
        for table in tables
        for verb in ("UPDATE", "DELETE")
    )


def _check(db: sqlite3.Connection, path: Path, quick: bool = False) -> None:
    """Raises DataError where the file is no store, a newer one, or damaged."""
    application = db.execute("PRAGMA application_id").fetchone()[0]
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if application != APPLICATION:
        raise DataError("this is no store of labels", where=path, fix="name another file")
    if version > VERSION:
        what = f"the store is of version {version}, and this program knows {VERSION}: nothing was changed"
        raise DataError(what, where=path, fix="use the newer program")
    if not quick:
        found = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise DataError(f"the store is damaged: {found}", where=path, fix="use a copy of it, or an export")


def is_store(path: Path) -> bool:
    """Whether a file is a store, of this version or another (SQLite keeps the application's id at byte 68)."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(72)
    return head.startswith(b"SQLite format 3\0") and head[68:] == APPLICATION.to_bytes(4, "big")


@contextlib.contextmanager
def _storable() -> Iterator[None]:
    """What SQLite has no place for (half a surrogate pair, a number beyond 64 bits) is refused, as other bad input."""
    try:
        yield
    except UnicodeEncodeError:
        raise Refusal("bad", "a text holds half a letter (a lone surrogate), which cannot be stored") from None
    except OverflowError:
        raise Refusal("bad", "a number is too large to be stored") from None


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise _told(error, path) from None


def _told(error: sqlite3.Error, path: Path) -> DataError | ResourceError:
    said = str(error)
    if "full" in said:
        return ResourceError("the disk is full: the vote is not stored", where=path, fix="free some space")
    if "readonly" in said or "unable to open" in said:
        return ResourceError(f"the store cannot be opened: {said}", where=path, fix="check path and permissions")
    if isinstance(error, sqlite3.IntegrityError):
        return Refusal("contradiction", said, where=str(path))
    return DataError(f"the store cannot be used: {said}", where=path, fix="use a copy of it, or an export")
