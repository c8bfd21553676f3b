"""The queue over HTTP: leases, blindness, keys, and no vote lost when the server dies."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from ottava.labels import page
from ottava.labels.questions import Item
from ottava.labels.queue import Queue
from ottava.labels.ranking import Ranker
from ottava.labels.store import Store, Vote

from .label_stores import ANSWERS, ITEMS, KEYS, Server, divided, live, make, many, serving


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    known = Item("gold", "right_wrong", {"question": "1 + 1 = ?", "answer": "3"}, gold="wrong")
    path = make(tmp_path_factory.mktemp("store") / "labels.db", [*ITEMS, known, *many(60)])
    with serving(path) as server:
        yield server


# ---- the queue by itself, with a clock that stands still


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def queue(order: list[int], **more: Any) -> tuple[Queue, Clock]:
    clock = Clock()
    return Queue(order, clock=clock, rng=random.Random(1), **{"gold_share": 0.0} | more), clock


def test_two_people_are_not_asked_the_same_vote() -> None:
    desk, _ = queue(list(range(10)))
    first, second = desk.next("ann", 4), desk.next("bob", 4)
    assert (first, second) == ([0, 1, 2, 3], [4, 5, 6, 7])
    assert desk.next("ann", 4, holding=first) == [8, 9]
    assert desk.next("bob", 4, holding=second) == []


def test_who_leaves_in_mid_batch_holds_nothing_up() -> None:
    desk, clock = queue(list(range(4)), lease_s=120)
    assert desk.next("ann", 4) == [0, 1, 2, 3]
    clock.now += 100
    assert desk.next("ann", 0, holding=[0]) == []  # a sign of life renews what is held
    clock.now += 30
    assert desk.next("bob", 4) == [1, 2, 3]
    clock.now += 100
    assert desk.next("lea", 4) == [0]
    desk.leave("bob")
    assert desk.next("lea", 4, holding=[0]) == [1, 2, 3]
    desk.answered("ann", 0, "vote")  # the lease is another's by now: the vote counts all the same
    assert desk.next("ann", 4) == []


def test_what_was_voted_on_waits_for_the_next_ranking() -> None:
    desk, clock = queue([0, 1, 2])
    desk.next("ann", 1)
    desk.answered("ann", 0, "vote")
    assert desk.next("bob", 3) == [1, 2]
    asked_at, clock.now = clock.now + 1, clock.now + 2
    desk.answered("bob", 1, "vote")  # while the ranking was at work
    desk.install(asked_at, [0, 1, 2], [], [])
    desk.leave("bob")
    assert desk.next("ann", 3) == [2], "ann has voted on 0, and the ranking does not know of 1"
    assert desk.next("lea", 3) == [0]


def test_undo_and_skip() -> None:
    desk, clock = queue([0, 1])
    desk.answered("ann", 0, "skip")
    assert desk.next("ann", 2) == [1]
    assert desk.next("bob", 2) == [0], "others are asked what one has skipped"
    desk.answered("ann", 1, "vote")
    desk.answered("ann", 1, "undo")
    clock.now += 1
    desk.install(clock.now, [1, 0], [], [])
    assert desk.next("ann", 2) == [1]


def test_known_questions_are_mixed_in() -> None:
    desk, _ = queue(list(range(1000)), gold=[5000, 5001, 5002], gold_share=0.05)
    asked: list[int] = []
    for _ in range(100):
        asked += desk.next("ann", 1)
        desk.answered("ann", asked[-1], "vote")
    assert sorted(item for item in asked if item >= 5000) == [5000, 5001, 5002], "each at most once"
    assert len(set(asked)) == 100


def test_against_a_plain_queue() -> None:
    """The same questions as a queue that looks at every item anew: random people, votes, skips, undos, rankings."""
    rng = random.Random(3)
    desk, clock = queue(list(range(40)), lease_s=50)
    done: dict[str, set[int]] = {}
    leases: dict[int, tuple[str, float]] = {}
    spent: dict[int, float] = {}
    order = list(range(40))
    for _ in range(3000):
        clock.now += rng.random() * 10
        who, move = rng.choice(["ann", "bob", "lea"]), rng.random()
        if move < 0.5:
            want = rng.randrange(4)
            plain = []
            for item in order:
                free = item not in leases or leases[item][0] == who or leases[item][1] <= clock.now
                if len(plain) < want and free and item not in spent and item not in done.get(who, ()):
                    plain.append(item)
            assert desk.next(who, want) == plain
            leases.update(dict.fromkeys(plain, (who, clock.now + 50)))
        elif move < 0.9:
            item, kind = rng.randrange(40), rng.choice(["vote", "vote", "skip", "undo"])
            if kind == "undo" and item not in done.get(who, ()):
                continue
            desk.answered(who, item, kind)
            if leases.get(item, ("", 0))[0] == who:
                del leases[item]
            if kind == "undo":
                done[who].discard(item)
            else:
                done.setdefault(who, set()).add(item)
                if kind == "vote":
                    spent[item] = clock.now
        else:
            asked_at = clock.now - rng.random() * 30
            order = rng.sample(range(40), 40)
            desk.install(asked_at, order, [], [])
            spent = {item: at for item, at in spent.items() if at >= asked_at}


# ---- ranking


def test_items_on_which_machines_differ_come_first(tmp_path: Path) -> None:
    path = make(tmp_path / "labels.db", many(300))
    with Store.write(path) as store:
        ranker = Ranker(store, 0.03)
        drawn = ranker.rank()
        first = set(drawn.order[: 300 // 12].tolist())
        for row in first:  # people agree with the judge where it agrees with the verifier, and are split elsewhere
            name = f"q{row - 1}"
            for who in ("ann", "bob", "lea"):
                wrong = (row - 1) % 3 == 0 and who == "ann"
                store.add_vote(Vote(f"{who}-{name}", name, who, "wrong" if wrong else "right", ms=3000))
        ranking = ranker.rank()
        assert ranking.seconds == 3.0
        assert ranking.claim is not None
        top = ranking.order[:60].tolist()
        assert sum((row - 1) % 3 == 0 for row in top) > 50, "a third of the items have judges that differ"
        assert ranking.left > 0


def test_the_order_survives_new_items_and_people(tmp_path: Path) -> None:
    path = make(tmp_path / "labels.db", [*ITEMS, *many(30)])
    with Store.write(path) as store:
        ranker = Ranker(store, 0.03, votes=2)
        assert len(ranker.rank().order) == 35
        store.add_items([Item("late", "text", {"question": "?"})])
        store.add_vote(Vote("u1", "q3", "zoe", "right"))
        store.add_vote(Vote("u2", "t", "zoe", "Shorter."))
        order = ranker.rank().order.tolist()
        assert set(order) >= {4, 36}, "a text is asked until it has two answers"
        store.add_vote(Vote("u3", "t", "ann", "Shorter."))
        assert 4 not in ranker.rank().order


# ---- over HTTP


@pytest.mark.parametrize("key", ["x", "no-such-key", "a-key-of-ann-012345678", "a-key-of-ann-0123456789x"])
def test_without_a_key_nothing(served: Server, key: str) -> None:
    for path in ("/api/next", "/api/votes", "/api/conflict", "/api/leave"):
        assert served.raw(key, path, {}).status_code == 401
        assert httpx.post(served.url + path, json={}).status_code == 401
    assert httpx.get(served.url + "/").status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/api/votes", b"{", 422),
        ("/api/votes", b"[" * 10000, 422),
        ("/api/votes", b'{"votes": [{"uid": "12345678", "item": "r", "kind": "guess"}]}', 422),
        ("/api/votes", b'{"votes": [{"uid": "12345678", "item": "r", "kind": "vote", "blind": true}]}', 422),
        ("/api/votes", json.dumps({"votes": [{"uid": "uid-0000", "item": "r", "kind": "skip"}] * 201}).encode(), 422),
        ("/api/votes", b'{"votes": [' + b" " * (5 << 20), 413),
        ("/api/next", b'{"want": 1000}', 422),
        ("/api/nothing", b"{}", 404),
    ],
)  # fmt: skip
def test_bodies_that_are_none(served: Server, path: str, body: bytes, status: int) -> None:
    headers = {"Authorization": f"Bearer {KEYS['ann']}"}
    assert httpx.post(served.url + path, content=body, headers=headers, timeout=60).status_code == status
    assert httpx.get(served.url + "/health").json() == {"status": "ok"}


def test_a_question_says_no_more_than_it_may(served: Server) -> None:
    """No known answer, no source, no machine's opinion: every vote here is blind."""
    got = served.post("ann", "/api/next", {"want": 20})
    assert got["questions"]
    for question in got["questions"]:
        assert set(question) <= {"item", "kind", "content", "answers", "guideline", "swapped"}
    assert "sums.jsonl" not in json.dumps(got)
    served.post("ann", "/api/leave", {})


def test_votes_are_acknowledged_one_by_one(served: Server) -> None:
    rows = [
        {"uid": f"uid-ack-{item}", "item": item, "kind": "vote", "answer": answer, "ms": 5, "guideline": 1}
        for item, answer in ANSWERS.items()
    ]
    bad = {"uid": "uid-ack-bad", "item": "nowhere", "kind": "vote", "answer": "right"}
    acks = served.post("bob", "/api/votes", {"votes": [*rows[:2], bad, *rows[2:]]})["acks"]
    assert [ack["status"] for ack in acks] == ["stored", "stored", "refused", "stored", "stored", "stored"]
    assert acks[2]["code"] == "unknown_item"
    acks = served.post("bob", "/api/votes", {"votes": rows})["acks"]
    assert {ack["status"] for ack in acks} == {"known"}
    assert served.vote("bob", "r", "wrong", "uid-ack-again")["code"] == "twice"
    stolen = served.vote("ann", "r", "right", "uid-ack-r")
    assert stolen["code"] == "contradiction", "another's id does not speak for them"
    assert served.post(
        "bob", "/api/votes", {"votes": [{"uid": "uid-undo", "item": "r", "kind": "undo", "undoes": "uid-ack-r"}]}
    )
    assert served.vote("bob", "r", "wrong", "uid-ack-anew")["status"] == "stored"
    assert [row for row in live(served.store) if row[:2] == ("r", "bob")] == [("r", "bob", "wrong")]
    assert served.post("bob", "/api/next", {"want": 0})["me"]["votes"] == 5


def test_a_clock_that_is_ahead_is_not_believed(served: Server) -> None:
    served.vote("ann", "q50", "right", "uid-clock-1", at=32_000_000_000_000)
    served.vote("ann", "q51", "right", "uid-clock-2", at=1_600_000_000_000)
    with Store.read(served.store) as store:
        rows = dict(store.db.execute("SELECT uid, at FROM votes WHERE uid LIKE 'uid-clock%'").fetchall())
        assert abs(rows["uid-clock-1"] - store._one("SELECT stored FROM votes WHERE uid = 'uid-clock-1'")) < 60_000
    assert rows["uid-clock-2"] == 1_600_000_000_000


def test_suggestions_make_votes_that_are_not_blind(tmp_path: Path) -> None:
    path = make(tmp_path / "labels.db", many(3))
    with serving(path, "suggestions=1") as server:
        asked = server.post("ann", "/api/next", {"want": 1})["questions"][0]
        assert asked["suggestions"]["verifier"] == "right"
        server.vote("ann", asked["item"], "right", "uid-seen-1")
    with Store.read(path) as store:
        assert store.db.execute("SELECT blind FROM votes").fetchall() == [(0,)]


def test_conflicts_go_to_those_who_may_adjudicate(tmp_path: Path) -> None:
    path = divided(tmp_path / "labels.db")
    with serving(path) as server:
        while not server.post("lea", "/api/next", {"want": 0})["conflicts"]:
            assert server.process.poll() is None
        assert server.raw("ann", "/api/conflict", {}).status_code == 403
        question = server.post("lea", "/api/conflict", {})["question"]
        assert question["item"] == "q7"
        assert question["said"] == [{"answer": "right", "votes": 2}, {"answer": "wrong", "votes": 2}]
        row = {"uid": "uid-decide", "item": "q7", "kind": "decide", "answer": "wrong", "ms": 9, "guideline": 1}
        assert server.post("ann", "/api/votes", {"votes": [row]})["acks"][0]["status"] == "refused"
        assert server.post("lea", "/api/votes", {"votes": [row]})["acks"][0]["status"] == "stored"
        assert server.post("lea", "/api/conflict", {})["question"] is None
    with Store.read(path) as store:
        made = store.db.execute("SELECT answer, method, votes FROM decisions").fetchall()
    assert made == [('"wrong"', "adjudicated", json.dumps([f"p{k}-7" for k in range(1, 5)]))]


def test_a_server_killed_under_load_loses_no_acknowledged_vote(tmp_path: Path) -> None:
    """People vote at once; the server is killed, and started again; what was not acknowledged is sent again."""
    path = make(tmp_path / "labels.db", many(2000))
    rng = random.Random(5)
    with serving(path) as server:
        acknowledged: dict[str, tuple[str, str]] = {}

        def work(who: str, share: int) -> None:
            headers = {"Authorization": f"Bearer {KEYS[who]}"}
            with httpx.Client(headers=headers, timeout=20) as client:
                for k in range(share):
                    row = {"uid": f"uid-{who}-{k:04}", "item": f"q{k}", "kind": "vote", "answer": "right"}
                    try:
                        answer = client.post(server.url + "/api/votes", json={"votes": [row]})
                    except httpx.TransportError:
                        return
                    assert answer.json()["acks"][0]["status"] in ("stored", "known")
                    acknowledged[row["uid"]] = (row["item"], who)

        for _ in range(2):
            with ThreadPoolExecutor(3) as people:
                futures = [people.submit(work, who, 2000) for who in KEYS]
                goal = len(acknowledged) + rng.randrange(20, 60)
                while len(acknowledged) < goal and not all(future.done() for future in futures):
                    time.sleep(0.005)
                server.stop(signal.SIGKILL)
                for future in futures:
                    future.result()
            stored = {(item, who) for item, who, _ in live(path)}
            assert set(acknowledged.values()) <= stored
            server.start()
        assert len(acknowledged) >= 40
        before = len(live(path))
        for uid, (item, who) in list(acknowledged.items())[:20]:
            assert server.vote(who, item, "right", uid)["status"] == "known"
        assert len(live(path)) == before


def test_two_servers_on_one_store(served: Server) -> None:
    command = [sys.executable, "-m", "ottava.cli", "label", "serve", str(served.store), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"process {served.process.pid} writes to this store" in done.stderr


def test_a_store_without_keys_is_not_served(tmp_path: Path) -> None:
    with Store.write(tmp_path / "labels.db", create=True) as store:
        store.add_items(ITEMS)
    command = [sys.executable, "-m", "ottava.cli", "label", "serve", str(tmp_path / "labels.db"), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "ottava label key" in done.stderr


def test_sigterm_ends_it_quietly(tmp_path: Path) -> None:
    with serving(make(tmp_path / "labels.db")) as server:
        server.vote("ann", "r", "right", "uid-last-1")
        assert server.stop() == 0
    assert live(server.store) == [("r", "ann", "right")]


def test_the_page_asks_for_nothing_else() -> None:
    text, headers = page.whole()
    for word in ("http://", "https://", "src=", "url(", "@import", "innerHTML", "eval("):
        assert word not in text, word
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
