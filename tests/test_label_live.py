"""The whole policy over a store that people answer: its certificate is a function of the rows, and holds."""

from __future__ import annotations

import json
import random
import shutil
import signal
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from ottava.errors import DataError, Verdict
from ottava.labels import bound, commands, live
from ottava.labels.live import Follower
from ottava.labels.questions import Item
from ottava.labels.store import Decision, Store, Vote

from .label_stores import ITEMS, KEYS, make, many, serving

TARGET = 0.1


def world(count: int, seed: int, people: int = 5) -> tuple[list[Item], dict[str, str], dict[str, float]]:
    """Items with a verifier and two judges, the truth, and how often each person is right."""
    dice, items, truth = random.Random(seed), [], {}
    for k in range(count):
        right = dice.random() < 0.6
        truth[f"q{k}"] = "right" if right else "wrong"
        said = {}
        if right and dice.random() < 0.6:
            said["verifier"] = "right"
        for judge in ("one", "two"):
            said[judge] = truth[f"q{k}"] if dice.random() < 0.8 else dice.choice(["right", "wrong"])
        items.append(Item(f"q{k}", "right_wrong", {"question": f"{k}?", "answer": "1"}, opinions=said))
    return items, truth, {f"p{k}": 0.9 + 0.02 * (k % 4) for k in range(people)}


def filled(path: Path, items: list[Item], people: Any) -> Path:
    with Store.write(path, create=True) as store, store.together():
        store.add_items(items, "test")
        for name in people:
            store.add_annotator(name, f"a-key-of-{name}-0123456789")
    return path


def answered(
    store: Store,
    numbers: list[int],
    truth: dict[str, str],
    people: dict[str, float],
    every: int,
    seed: int,
    phase: str = "",
) -> Follower:
    """People at random answer what is wanted, to the end or to a phase; a ranking after so many votes."""
    dice, names = random.Random(seed), dict(store.db.execute("SELECT seq, id FROM items").fetchall())
    follower, uid = Follower(store, numbers, clock_ms=1 << 62), 0
    rows = "SELECT a.name, i.id FROM live v JOIN annotators a ON a.id = v.annotator JOIN items i ON i.seq = v.item"
    said: set[tuple[str, str]] = set(store.db.execute(rows))
    for _ in range(20_000):
        order = [names[int(row)] for row in follower.rank().order]
        run = follower.runs[numbers[0]]
        if run.done is not None or run.policy.phase == phase:
            return follower
        given = 0
        for item in order:
            who = [name for name in people if (name, item) not in said]
            if not who or given == every:
                continue
            name, given, uid = dice.choice(who), given + 1, uid + 1
            said.add((name, item))
            answer = truth[item] if dice.random() < people[name] else {"right": "wrong", "wrong": "right"}[truth[item]]
            store.add_vote(Vote(f"vote-{seed}-{uid:06}", item, name, answer))
        if not given:
            row = follower.stuck(run)
            assert row is not None, "nothing is asked, and nothing is waited for"
            store.add_run(row)
    raise AssertionError("it does not end")


@pytest.mark.parametrize(("every", "seed"), [(1, 0), (7, 1), (60, 2)])
def test_the_rows_alone_give_the_run_however_often_it_was_looked_at(tmp_path: Path, every: int, seed: int) -> None:
    items, truth, people = world(150, seed)
    path = filled(tmp_path / "labels.db", items, people)
    with Store.write(path) as store:
        (number,) = live.begin(store, TARGET)
        assert live.begin(store, TARGET) == [number]
        run = answered(store, [number], truth, people, every, seed).runs[number]
        again = live.follow(store, number)
        assert again.certificate() == run.certificate()
        assert again.decisions() == run.decisions()
        assert [one.uid for _, one in again.policy.used] == [one.uid for _, one in run.policy.used]
        document = live.settle(store, run)
        wrong = np.mean([label != truth[name] for name, label, _ in run.decisions()])
        assert document["error_upper_95"] >= wrong
        if document["reached"]:
            assert document["error_upper_95"] <= TARGET
        decided = dict(store.db.execute("SELECT i.id, d.answer FROM decisions d JOIN items i ON i.seq = d.item"))
        assert decided == {name: f'"{label}"' for name, label, _ in run.decisions()}
        assert live.begin(store, TARGET) == [number], "it has ended: nothing more is to be done"
        assert live.begin(store, TARGET / 2) != [number]
    assert live.certify(path) == [document]


def tampered(path: Path, command: str) -> None:
    """As somebody would who opens the file with another program."""
    db = sqlite3.connect(path)
    for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
        db.execute(f"DROP TRIGGER {name}")
    db.execute(command)
    db.commit()
    db.close()


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    items, truth, people = world(150, 3)
    path = filled(tmp_path_factory.mktemp("ended") / "labels.db", items, people)
    with Store.write(path) as store:
        numbers = live.begin(store, TARGET)
        live.settle(store, answered(store, numbers, truth, people, 20, 3).runs[numbers[0]])
    return path


FLIP = """UPDATE votes SET answer = CASE answer WHEN '"right"' THEN '"wrong"' ELSE '"right"' END WHERE seq = 5"""
LESS = """UPDATE certificates SET document = replace(document, '"error_upper_95": 0.', '"error_upper_95": 0.0')"""
SEED = """UPDATE runs SET document = replace(document, '"seed": ', '"seed": 1')"""


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (FLIP, "votes_sha256"),
        ("DELETE FROM votes WHERE seq = 5", "votes_sha256"),
        (LESS, "error_upper_95"),
        (SEED, "votes_sha256"),
    ],
)
def test_what_was_changed_behind_its_back_is_found(ended: Path, tmp_path: Path, command: str, said: str) -> None:
    with Store.read(ended) as store:
        copy = sqlite3.connect(tmp_path / "copy.db")
        store.db.backup(copy)
        copy.close()
    live.certify(tmp_path / "copy.db")
    tampered(tmp_path / "copy.db", command)
    with pytest.raises(Verdict, match=said + "|does not end"):
        live.certify(tmp_path / "copy.db")


def test_votes_that_come_later_change_nothing(ended: Path, tmp_path: Path) -> None:
    with Store.read(ended) as store:
        copy = sqlite3.connect(tmp_path / "copy.db")
        store.db.backup(copy)
        copy.close()
    with Store.write(tmp_path / "copy.db") as store:
        store.add_annotator("late", "a-key-of-late-0123456789")
        for k in range(150):
            store.add_vote(Vote(f"late-{k:06}", f"q{k}", "late", "wrong"))
    live.certify(tmp_path / "copy.db")


def test_an_export_carries_the_certificate_that_training_asks_for(ended: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "copy.db"
    shutil.copy(ended, path)
    commands.give(path, tmp_path / "whole", "hf", None)
    with Store.read(path) as store:
        (certificate,) = live.certificates(store)
    found = bound.require(tmp_path / "whole", certificate["error_upper_95"])
    assert found is not None
    assert (found.upper, found.judged_by) == (certificate["error_upper_95"], "people")
    with pytest.raises(DataError, match="may be wrong"):
        bound.require(tmp_path / "whole", certificate["error_upper_95"] / 2)
    with Store.write(path) as store:
        name, said = store.db.execute(
            "SELECT i.id, d.answer FROM decisions d JOIN items i ON i.seq = d.item"
        ).fetchone()
        other = "wrong" if json.loads(said) == "right" else "right"
        person = store.known()[0].name
        store.add_decision(Decision("changed-by-hand-1", name, other, "adjudicated", person, None, (), 1))
    commands.give(path, tmp_path / "changed", "hf", None)
    with pytest.raises(DataError, match="no certificate"):
        bound.require(tmp_path / "changed", 0.5)
    (tmp_path / "nothing.json").write_text('{"foo": 1}')
    with pytest.raises(DataError, match="error_upper_95"):
        commands.give(path, tmp_path / "foreign", "hf", tmp_path / "nothing.json")


def test_what_can_be_certified(tmp_path: Path) -> None:
    path = make(tmp_path / "all.db")
    with Store.write(path) as store:
        numbers = live.begin(store, TARGET)
        kinds = {begun["group"][0] for _, begun in live.runs(store)}
        assert kinds == {"right_wrong", "choice", "pair"}
        order = Follower(store, numbers).rank()
        asked = {
            store.db.execute("SELECT id FROM items WHERE seq = ?", (int(row),)).fetchone()[0] for row in order.order
        }
        assert asked == {item.id for item in ITEMS}, "the others are asked as ever"
        for bad in (0.0, 1.0, -1.0):
            with pytest.raises(DataError, match="a share between 0 and 1"):
                live.begin(store, bad)
    text = make(tmp_path / "text.db", [item for item in ITEMS if item.kind in ("text", "steps")])
    with Store.write(text) as store, pytest.raises(DataError, match="can be certified"):
        live.begin(store, TARGET)
    with pytest.raises(DataError, match="no run has ended"):
        live.certify(path)


def test_nobody_is_waited_for_who_was_not_seen_for_long(tmp_path: Path) -> None:
    path = make(tmp_path / "labels.db", many(12))
    with Store.write(path) as store:
        (number,) = live.begin(store, TARGET)
        follower = Follower(store, [number], clock_ms=1 << 62, away_hours=2 / 3600)
        follower.rank()
        run = follower.runs[number]
        assert follower.stuck(run) is None
        first = f"q{run.policy.coming[0]}"
        time.sleep(2.2)
        store.add_vote(Vote("vote-of-ann", first, "ann", "right"))
        follower.rank()
        row = follower.stuck(run)  # a second vote is wanted, and ann alone is there
        assert row is not None
        assert row["close"]["item"] == run.rows[run.policy.coming[0]]
        store.add_run(row)
        store.add_vote(Vote("vote-of-bob", first, "bob", "wrong"))  # too late for this run
        follower.rank()
        assert f"q{run.policy.coming[0]}" != first
        assert [one.uid for _, one in run.policy.used] == ["vote-of-ann"]
        assert [one.uid for _, one in live.follow(store, number).policy.used] == ["vote-of-ann"]


def test_a_run_goes_on_when_somebody_comes_back_after_days(tmp_path: Path) -> None:
    path = make(tmp_path / "labels.db", many(12))
    with Store.write(path) as store:
        (number,) = live.begin(store, TARGET)
        follower = Follower(store, [number], clock_ms=1 << 62, away_hours=0.2 / 3600)
        follower.rank()
        run = follower.runs[number]
        first = f"q{run.policy.coming[0]}"
        store.add_vote(Vote("vote-of-ann", first, "ann", "right"))
        time.sleep(0.4)
        follower.rank()
        assert follower.stuck(run) is None, "nobody is there, and nothing is in a hurry"
        assert follower.stuck(run, ["lea", "ann"]) is None, "lea can answer"
        row = follower.stuck(run, ["ann"])  # she has answered, and would be asked nothing for ever
        assert row is not None
        assert row["close"]["item"] == run.rows[run.policy.coming[0]]
        store.end_key("lea")
        assert follower.stuck(run, ["lea", "ann"]) == row, "without a key she cannot"


def test_people_are_kept_busy_with_what_panels_will_want(tmp_path: Path) -> None:
    """Everything that is wanted behind the present item is answered first; the run must find all that it needs."""
    items, truth, people = world(150, 5, people=20)
    path = filled(tmp_path / "labels.db", items, people)
    dice = random.Random(5)
    with Store.write(path) as store:
        numbers = live.begin(store, 0.03, 6.0)
        follower = answered(store, numbers, truth, people, 7, 5, "audit")
        run = follower.runs[numbers[0]]
        names = [item.id for item in run.group.items]
        query = "SELECT a.name FROM live v JOIN annotators a ON a.id = v.annotator JOIN items i ON i.seq = v.item"

        def answer(place: int) -> None:
            said = {name for (name,) in store.db.execute(f"{query} WHERE i.id = ?", (names[place],))}
            name, label = dice.choice([name for name in people if name not in said]), truth[names[place]]
            if dice.random() > 0.8:
                label = "wrong" if label == "right" else "right"
            store.add_vote(Vote(f"early-{place}-{name}", names[place], name, label))

        head, ahead = int(run.policy.coming[0]), run.policy.coming[1 : live.BUSY[0]].tolist()
        while wanted := [place for place in run.policy.wanted() if place != head]:
            answer(wanted[0])
            follower.rank()
            assert int(run.policy.coming[0]) == head
        while int(run.policy.coming[0]) == head:
            answer(head)
            follower.rank()
        assert run.done is None
        assert int(run.policy.coming[0]) not in ahead, "it waits for a vote that nobody was asked for"
        book = follower.book(run)
        judged = [place for place in ahead if run.policy._judged[place]]
        assert len(judged) > 30
        assert all(run.policy.taken[place] == len(book.said[place]) for place in judged), "asked for nothing"


def test_more_votes_are_another_run(tmp_path: Path) -> None:
    items, truth, people = world(60, 6)
    path = filled(tmp_path / "labels.db", items, people)
    with Store.write(path) as store:
        first = live.begin(store, TARGET)
        run = answered(store, first, truth, people, 7, 6).runs[first[0]]
        assert not live.settle(store, run)["reached"]
        assert any("--most-votes" in note for note in run.certificate()["notes"])
        assert live.begin(store, TARGET) == first
        second = live.begin(store, TARGET, 4.0)
        assert second != first
        run = answered(store, second, truth, people, 7, 7).runs[second[0]]
        assert live.settle(store, run)["reached"]
        for bad in (0.0, float("nan"), float("inf")):
            with pytest.raises(DataError, match="a number above 0"):
                live.begin(store, TARGET, bad)
    assert [one["reached"] for one in live.certify(path)] == [False, True]


def test_an_answer_is_taken_when_it_cannot_be_undone(tmp_path: Path) -> None:
    path = make(tmp_path / "labels.db", many(12))
    with Store.write(path) as store:
        (number,) = live.begin(store, TARGET)
        follower = Follower(store, [number])
        follower.rank()
        run = follower.runs[number]
        first, second = (f"q{k}" for k in run.policy.coming[:2])
        store.add_vote(Vote("vote-1-of-ann", first, "ann", "right"))
        follower.rank()
        assert run.policy.used == []
        assert live.can_undo(store, "vote-1-of-ann", int(time.time() * 1000))
        assert not live.can_undo(store, "vote-1-of-ann", int(time.time() * 1000) + 9_000)
        store.add_vote(Vote("undo-1-of-ann", first, "ann", None, "undo", "vote-1-of-ann"))
        store.add_vote(Vote("vote-2-of-ann", first, "ann", "wrong"))
        store.add_vote(Vote("vote-3-of-ann", second, "ann", "right"))
        follower.rank()
        assert [(item, one.uid) for item, one in run.policy.used] == [(int(first[1:]), "vote-2-of-ann")]
        assert not live.can_undo(store, "vote-2-of-ann", int(time.time() * 1000))
        assert live.can_undo(store, "vote-3-of-ann", int(time.time() * 1000))


def test_a_store_of_the_first_version_gets_its_runs(tmp_path: Path) -> None:
    path = make(tmp_path / "labels.db", many(3))
    tampered(path, "DROP TABLE runs")
    tampered(path, "PRAGMA user_version = 1")
    with Store.read(path) as store:
        assert store.count("items") == 3
    with Store.write(path) as store:
        assert live.begin(store, TARGET) == [1]
        with pytest.raises(sqlite3.IntegrityError, match="only grows"):
            store.db.execute("DELETE FROM runs")


# ---- by HTTP


def post(client: httpx.Client, who: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    key = KEYS.get(who, f"a-key-of-{who}-0123456789")
    answer = client.post(path, json=body, headers={"authorization": f"Bearer {key}"})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def until_asked(client: httpx.Client, who: str, count: int) -> dict[str, Any]:
    end = time.monotonic() + 60
    while True:
        found = post(client, who, "/api/next", {"want": count})
        if found["questions"] or time.monotonic() > end:
            return found
        time.sleep(0.2)


def test_questions_are_blind_and_what_is_built_upon_stays(tmp_path: Path) -> None:
    path = make(tmp_path / "labels.db", many(60))
    with serving(path, f"target={TARGET}") as server, httpx.Client(base_url=server.url, trust_env=False) as client:
        found = until_asked(client, "ann", 3)
        first, second, _ = found["questions"]
        assert set(first) == {"item", "kind", "content", "answers", "guideline"}
        assert set(first["content"]) == {"question", "answer"}
        (run,) = found["progress"]["runs"]
        assert run["phase"] == "calibrate"
        assert run["votes"][0] <= run["votes"][1] <= run["votes"][2]
        said = [
            {"uid": f"uid-of-{q['item']}-0", "item": q["item"], "kind": "vote", "answer": "right"}
            for q in (first, second)
        ]
        acks = [post(client, "ann", "/api/votes", {"votes": [one]})["acks"][0] for one in said]
        assert [ack["status"] for ack in acks] == ["stored"] * 2
        undo = [
            {"uid": f"undo-{k}-of-ann", "item": one["item"], "kind": "undo", "undoes": one["uid"]}
            for k, one in enumerate(said)
        ]
        late, good = (post(client, "ann", "/api/votes", {"votes": [one]})["acks"][0] for one in undo)
        assert (late["status"], late["code"]) == ("refused", "late")
        assert good["status"] == "stored"


def test_who_asks_in_vain_after_days_ends_the_wait_for_who_is_away(tmp_path: Path) -> None:
    """Ann has answered everything, the server was down, nobody else comes."""
    path = make(tmp_path / "labels.db", many(12))
    with Store.write(path) as store:
        (number,) = live.begin(store, TARGET)
        for k in range(12):
            store.add_vote(Vote(f"vote-of-ann-{k}", f"q{k}", "ann", "right"))
    time.sleep(1.5)
    with (
        serving(path, f"target={TARGET}", f"away_hours={1 / 3600}") as server,
        httpx.Client(base_url=server.url, trust_env=False) as client,
        Store.read(path) as store,
    ):
        end = time.monotonic() + 60
        while (run := live.follow(store, number)).done is None and time.monotonic() < end:
            assert post(client, "ann", "/api/next", {"want": 4})["questions"] == []
            time.sleep(0.3)
    assert run.done is not None


@pytest.mark.slow
def test_a_whole_run_by_many_people_with_the_server_killed(tmp_path: Path) -> None:
    items, truth, people = world(400, 5, people=6)
    path = filled(tmp_path / "labels.db", items, people)
    acked: set[str] = set()

    def work(url: str, name: str, seed: int, stop: threading.Event) -> None:
        dice = random.Random(seed)
        with httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
            while not stop.is_set():
                try:
                    asked = post(client, name, "/api/next", {"want": 4})
                    if not asked["questions"]:
                        time.sleep(0.3)
                    for question in asked["questions"]:
                        item = question["item"]
                        good = dice.random() < people[name]
                        other = {"right": "wrong", "wrong": "right"}[truth[item]]
                        uid = f"{name}-{item}-{dice.random():.9f}"
                        row = {"uid": uid, "item": item, "kind": "vote", "answer": truth[item] if good else other}
                        for ack in post(client, name, "/api/votes", {"votes": [row]})["acks"]:
                            if ack["status"] != "refused":
                                acked.add(uid)
                except httpx.HTTPError:
                    return

    def done() -> bool:
        with Store.read(path) as store:
            return bool(live.certificates(store))

    for turn in range(4):
        with serving(path, f"target={TARGET}") as server:
            stop = threading.Event()
            crowd = [threading.Thread(target=work, args=(server.url, name, turn, stop)) for name in people]
            for one in crowd:
                one.start()
            end = time.monotonic() + (6 if turn < 3 else 400)
            while time.monotonic() < end and not done():
                time.sleep(0.5)
            server.stop(signal.SIGKILL if turn < 3 else signal.SIGTERM)
            stop.set()
            for one in crowd:
                one.join()
        if done():
            break
    with Store.read(path) as store:
        kept = {uid for (uid,) in store.db.execute("SELECT uid FROM votes")}
        assert acked <= kept
        (certificate,) = live.certificates(store)
        decided = dict(store.db.execute("SELECT i.id, d.answer FROM decisions d JOIN items i ON i.seq = d.item"))
    wrong = np.mean([decided[name] != f'"{said}"' for name, said in truth.items()])
    assert wrong <= certificate["error_upper_95"]
    assert live.certify(path) == [certificate]
