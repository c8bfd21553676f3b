"""The store keeps every vote that it acknowledged, takes nothing back, and refuses what cannot be."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ottava.errors import Busy, DataError
from ottava.labels import questions
from ottava.labels.store import APPLICATION, TABLES, Decision, Refusal, Store, Vote

from .label_stores import ANSWERS, ITEMS, KEYS, live, make, many


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make(tmp_path / "labels.db")


def vote(uid: str, item: str = "r", who: str = "ann", **more: Any) -> Vote:
    return Vote(uid, item, who, more.pop("answer", ANSWERS[item]), **more)


def test_every_kind_of_answer_comes_back(path: Path) -> None:
    with Store.write(path) as store:
        for item in ANSWERS:
            assert store.add_vote(vote(f"uid-{item}", item, at=1, ms=900, guideline=1))
    assert live(path) == [(item, "ann", answer) for item, answer in ANSWERS.items()]


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("verb", ["UPDATE {} SET stored = 0", "DELETE FROM {}"])
def test_nothing_is_changed_or_removed(path: Path, table: str, verb: str) -> None:
    with Store.write(path) as store:
        store.add_vote(vote("u1", guideline=1))
        store.add_items([questions.Item("x", "text", {"question": "?"}, opinions={"judge": "yes"})])
        store.add_decision(Decision("d1", "r", "right", "fusion"))
        store.add_certificate({"bound": 0.01})
        store.add_run({"begin": {}})
        assert store.count(table)
        with pytest.raises(sqlite3.IntegrityError, match="only grows"):
            store.db.execute(verb.format(table))
        with pytest.raises(sqlite3.IntegrityError):
            store.db.execute(f"REPLACE INTO {table} SELECT * FROM {table} LIMIT 1")


def test_a_vote_sent_twice_is_stored_once(path: Path) -> None:
    with Store.write(path) as store:
        assert store.add_vote(vote("u1"))
        assert not store.add_vote(vote("u1"))
        assert store.count("votes") == 1


@pytest.mark.parametrize(
    ("second", "code"),
    [
        (vote("u1", answer="wrong"), "contradiction"),
        (vote("u1", who="bob"), "contradiction"),
        (vote("u2"), "twice"),
        (vote("u2", answer="wrong"), "twice"),
        (Vote("u2", "nowhere", "ann", "right"), "unknown_item"),
        (vote("u2", who="bob", answer="perhaps"), "bad"),
        (vote("u2", "s", answer=["right"]), "bad"),
        (vote("u2", "s", answer=[None, None, None]), "bad"),
        (vote("u2", "t", answer=" "), "bad"),
        (vote("u2", "t", answer="a\0b"), "bad"),
        (vote("u2", who="bob", ms=-1), "bad"),
        (vote("u2", who="bob", at=-1), "bad"),
        (vote("u2", who="bob", guideline=9), "bad"),
        (vote("u2", who=" "), "bad"),
        (Vote("u2", "r", "ann", None, "undo", "u9"), "unknown_vote"),
        (Vote("u2", "r", "bob", None, "undo", "u1"), "unknown_vote"),
        (Vote("u2", "c", "ann", None, "undo", "u1"), "unknown_vote"),
    ],
)
def test_what_cannot_be_is_refused_alone(path: Path, second: Vote, code: str) -> None:
    with Store.write(path) as store:
        said = store.add_all([vote("u1"), second, vote("u3", "c")])
        assert said[0] is True
        assert said[2] is True
        assert isinstance(said[1], Refusal)
        assert said[1].code == code
        assert store.count("votes") == 2
        assert store.count("annotators") == len(KEYS)


def test_an_undo_is_a_row_of_its_own(path: Path) -> None:
    with Store.write(path) as store:
        store.add_all([vote("u1"), Vote("u2", "r", "ann", None, "undo", "u1"), vote("u3", answer="wrong")])
        again = store.add_all([Vote("u4", "r", "ann", None, "undo", "u1"), vote("u1")])
        assert isinstance(again[0], Refusal)
        assert again[1] is False
        assert store.count("votes") == 3
    assert live(path) == [("r", "ann", "wrong")]


def test_items_are_what_they_were(path: Path) -> None:
    with Store.write(path) as store:
        assert store.add_items(ITEMS) == 0
        other = questions.Item("r", "right_wrong", {"question": "What is 2 + 2?", "answer": "5"})
        with pytest.raises(Refusal, match="is another one"):
            store.add_items([other])
        judged = questions.Item("r", "right_wrong", ITEMS[0].content, opinions={"judge": "right"})
        store.add_items([judged])
        with pytest.raises(Refusal, match="and now"):
            store.add_items([questions.Item("r", "right_wrong", ITEMS[0].content, opinions={"judge": "wrong"})])


def test_only_digests_of_keys_are_kept(path: Path) -> None:
    with Store.write(path) as store:
        store.add_annotator("ann", "another-key-of-ann")
        store.end_key("bob")
        assert {known.name for known in store.known()} == {"ann", "lea"}
        assert [known.name for known in store.known() if known.lead] == ["lea"]
    for file in path.parent.glob("labels.db*"):
        content = file.read_bytes()
        assert not any(key.encode() in content for key in (*KEYS.values(), "another-key-of-ann"))


def test_a_second_writer_is_refused_and_readers_are_not(path: Path) -> None:
    code = f"from pathlib import Path; from ottava.labels.store import Store; Store.write(Path({str(path)!r}))"
    with Store.write(path) as store:
        with pytest.raises(Busy, match=f"process {os.getpid()} writes"):
            Store.write(path)
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert f"process {os.getpid()} writes to this store" in said.stderr
        store.add_vote(vote("u1"))
        assert live(path) == [("r", "ann", "right")]
    Store.write(path).close()


def test_files_that_are_no_store(tmp_path: Path) -> None:
    text, other, newer = tmp_path / "text.db", tmp_path / "other.db", make(tmp_path / "newer.db")
    text.write_text("no store at all, though it is long enough to look at, is it not?\n" * 40)
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE cats(name)")
    with sqlite3.connect(newer) as db:
        db.execute("PRAGMA user_version = 3")
    before = newer.read_bytes()
    for path, said in ((text, "not a database"), (other, "no store of labels"), (newer, "of version 3")):
        for opened in (Store.write, Store.read):
            with pytest.raises(DataError, match=said):
                opened(path)
    assert newer.read_bytes() == before
    with pytest.raises(DataError, match="no such store"):
        Store.write(tmp_path / "nowhere.db")
    assert not (tmp_path / "nowhere.db").exists()
    assert sqlite3.connect(other).execute("PRAGMA application_id").fetchone()[0] != APPLICATION


def test_a_damaged_store_is_told(tmp_path: Path) -> None:
    path = make(tmp_path / "labels.db", many(400))
    with Store.write(path) as store:
        store.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content = bytearray(path.read_bytes())
    content[8192:40960] = random.Random(1).randbytes(32768)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"damaged|cannot be used"):
        Store.write(path)


def test_a_vote_that_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    """A process votes and says so on its output; it is killed at a random moment, again and again."""
    path = make(tmp_path / "labels.db", many(4000))
    code = f"""
import sys
from pathlib import Path
from ottava.labels.store import Store, Vote
store = Store.write(Path({str(path)!r}))
first = int(sys.argv[1])
for k in range(first, 4000, 3):
    said = store.add_all([Vote(f"uid-{{i}}", f"q{{i}}", "ann", "right", ms=i) for i in range(k, min(k + 3, 4000))])
    assert all(said)
    print(k + 2, flush=True)
"""
    rng, last = random.Random(7), -1
    for _ in range(6):
        process = subprocess.Popen([sys.executable, "-c", code, str(last + 1)], stdout=subprocess.PIPE, text=True)
        assert process.stdout
        heard = [process.stdout.readline()]  # it has begun
        time.sleep(rng.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        heard += process.stdout.read().splitlines(keepends=True)
        process.wait()
        acknowledged = max(int(line) for line in heard if line.endswith("\n") and line.strip())
        with Store.write(path) as store:
            stored = [row[0] for row in store.db.execute("SELECT ms FROM live ORDER BY ms")]
        assert stored == list(range(len(stored))), "whole transactions, in order"
        assert len(stored) - 1 >= acknowledged
        assert len(stored) % 3 == 0 or len(stored) == 4000
        last = len(stored) - 1
    assert last > 20


@given(st.lists(st.sampled_from(["right", "wrong", None]), min_size=1, max_size=8))
def test_the_first_wrong_step(marks: list[str | None]) -> None:
    at = questions.first_wrong(marks)
    assert (at is None) == ("wrong" not in marks)
    assert at is None or (marks[at] == "wrong" and "wrong" not in marks[:at])


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ([], "an item is a JSON object"),
        ({"id": "a", "kind": "guess", "content": {}}, "no kind of question"),
        ({"id": "", "kind": "text", "content": {"question": "?"}}, "id must be a text"),
        ({"id": "a", "kind": "text", "content": {}}, "has no 'question'"),
        ({"id": "a", "kind": "text", "content": {"question": 1}}, "must be a text"),
        ({"id": "a", "kind": "text", "content": {"question": "\ud800"}}, "must be a text"),
        ({"id": "a", "kind": "steps", "content": {"question": "?", "steps": []}}, "must be a list of texts"),
        ({"id": "a", "kind": "choice", "content": {"question": "?"}, "classes": ["x"]}, "at least two"),
        ({"id": "a", "kind": "choice", "content": {"question": "?"}, "classes": ["x", "x"]}, "twice"),
        ({"id": "a", "kind": "text", "content": {"question": "?"}, "classes": ["x", "y"]}, "takes no classes"),
        ({"id": "a", "kind": "pair", "content": {"question": "?", "a": "x", "b": "y"}, "gold": "A"}, "none of a, b"),
        ({"id": "a", "kind": "text", "content": {"question": "?"}, "opinions": ["x"]}, "opinions are an object"),
    ],
)
def test_items_that_are_none(document: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        questions.parse(document, "file:1")


class Voting(RuleBasedStateMachine):
    """The store against a dictionary: people vote, undo, skip and send again, in any order."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.store = Store.write(make(Path(self.folder.name) / "labels.db"))
        self.model: dict[tuple[str, str], tuple[str, str]] = {}  # (item, who) -> (uid, answer)
        self.sent: list[Vote] = []

    @rule(who=st.sampled_from(sorted(KEYS)), item=st.sampled_from(["r", "r2", "p"]), wrong=st.booleans())
    def votes(self, who: str, item: str, wrong: bool) -> None:
        answer = ("b" if wrong else "a") if item == "p" else ("wrong" if wrong else "right")
        row = Vote(f"uid-{len(self.sent)}", item, who, answer)
        said = self.store.add_all([row])[0]
        allowed = item != "r2" and (item, who) not in self.model
        assert (said is True) == allowed
        if allowed:
            self.model[item, who] = (row.uid, json.dumps(answer))
            self.sent.append(row)

    @rule(who=st.sampled_from(sorted(KEYS)), item=st.sampled_from(["r", "p"]))
    def undoes(self, who: str, item: str) -> None:
        uid = self.model.get((item, who), ("uid-none", ""))[0]
        row = Vote(f"undo-{uid}-{len(self.sent)}", item, who, None, "undo", uid)
        assert (self.store.add_all([row])[0] is True) == ((item, who) in self.model)
        if self.model.pop((item, who), None):
            self.sent.append(row)

    @rule(data=st.data())
    def sends_again(self, data: st.DataObject) -> None:
        if self.sent:
            assert self.store.add_all([data.draw(st.sampled_from(self.sent))]) == [False]

    @invariant()
    def agree(self) -> None:
        rows = self.store.db.execute(
            "SELECT i.id, a.name, v.uid, v.answer FROM live v JOIN items i ON i.seq = v.item"
            " JOIN annotators a ON a.id = v.annotator"
        ).fetchall()
        assert {(item, who): (uid, answer) for item, who, uid, answer in rows} == self.model
        assert len(rows) == len(self.model)
        assert self.store.count("votes") == len(self.sent)

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()


TestVoting = Voting.TestCase


def test_a_row_that_cannot_be_stored_takes_no_other_with_it(path: Path) -> None:
    """One client's nonsense is refused alone; the votes of others in the same write are kept."""
    with Store.write(path) as store:
        said = store.add_all([vote("uid-a"), vote("uid-b", who="bob", guideline=10**30), vote("uid-c", who="\ud800")])
        assert said[0] is True
        assert all(isinstance(one, Refusal) for one in said[1:])
        assert store.count("live") == 1
