"""What the tests of the label store share: items of every kind, servers in processes of their own, clients."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from ottava.labels.questions import Item
from ottava.labels.store import Store, Vote

KEYS = {"ann": "a-key-of-ann-0123456789", "bob": "a-key-of-bob-0123456789", "lea": "a-key-of-lea-0123456789"}
ITEMS = (
    Item("r", "right_wrong", {"question": "What is 2 + 2?", "answer": "4"}, source="sums.jsonl:1"),
    Item("c", "choice", {"question": "Which field is it of?"}, ("algebra", "geometry")),
    Item("p", "pair", {"question": "Why?", "a": "Because.", "b": "For a reason."}),
    Item("t", "text", {"question": "Say it shorter."}),
    Item("s", "steps", {"question": "7 +5 *3", "steps": ["7 +5 = 2", "2 *3 = 6", "6"]}),
)
ANSWERS: dict[str, Any] = {"r": "right", "c": "geometry", "p": "tie", "t": "Shorter.", "s": ["right", "wrong", None]}


def many(count: int) -> list[Item]:
    """Items of one group, each with two judges' opinions."""
    return [
        Item(
            f"q{k}",
            "right_wrong",
            {"question": f"{k} + 1 = ?", "answer": str(k + 1)},
            source=f"sums.jsonl:{k}",
            opinions={"verifier": "right", "judge": "right" if k % 3 else "wrong"},
        )
        for k in range(count)
    ]


def make(path: Path, items: Sequence[Item] = ITEMS) -> Path:
    """A store with a guideline, people with keys (lea adjudicates) and items."""
    with Store.write(path, create=True) as store, store.together():
        store.add_guideline("Judge what is written.")
        for name, key in KEYS.items():
            store.add_annotator(name, key, lead=name == "lea")
        store.add_items(items, "test")
    return path


def divided(path: Path) -> Path:
    """Forty items on which four people agree, half of them wrong, but for q7, where they are two against two."""
    make(path, many(40))
    with Store.write(path) as store, store.together():
        for who in ("p1", "p2", "p3", "p4"):
            for k in range(40):
                wrong = who > "p2" if k == 7 else k % 2
                store.add_vote(Vote(f"{who}-{k}", f"q{k}", who, "wrong" if wrong else "right"))
    return path


class Server:
    """`ottava label serve` in a process of its own, that can be killed and started again at the same port."""

    def __init__(self, store: Path, *options: str):
        self.store, self.options, self.port = store, options, 0
        self.start()

    def start(self) -> None:
        ready = self.store.with_suffix(".ready")
        ready.unlink(missing_ok=True)
        args = {"store": str(self.store), "port": self.port, "ready": str(ready)} | dict(
            option.split("=") for option in self.options
        )
        code = f"from ottava.labels.serve import serve; serve({args!r})"
        self.process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
        while not ready.exists():
            assert self.process.poll() is None, self.process.communicate()[1]
            time.sleep(0.05)
        self.port = json.loads(ready.read_text())["port"]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self, how: int = signal.SIGTERM) -> int:
        """The exit code."""
        if self.process.poll() is None:
            os.kill(self.process.pid, how)
            self.process.communicate()
        return self.process.returncode

    def post(self, who: str, path: str, body: Any) -> dict[str, Any]:
        answer = self.raw(who, path, body)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def raw(self, who: str, path: str, body: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {KEYS.get(who, who)}"}
        return httpx.post(self.url + path, json=body, headers=headers, timeout=60)

    def vote(self, who: str, item: str, answer: Any, uid: str, **more: Any) -> dict[str, Any]:
        """The acknowledgement of one vote."""
        row = {"uid": uid, "item": item, "kind": "vote", "answer": answer, "ms": 1200, "guideline": 1} | more
        return dict(self.post(who, "/api/votes", {"votes": [row]})["acks"][0])


@contextlib.contextmanager
def serving(store: Path, *options: str) -> Iterator[Server]:
    server = Server(store, *options)
    try:
        yield server
    finally:
        server.stop(signal.SIGKILL)


def live(path: Path) -> list[tuple[str, str, Any]]:
    """(item, who, answer) of the votes that count, in order."""
    with Store.read(path) as store:
        rows = store.db.execute(
            "SELECT i.id, a.name, v.answer FROM live v JOIN items i ON i.seq = v.item JOIN annotators a"
            " ON a.id = v.annotator ORDER BY v.seq"
        ).fetchall()
    return [(item, who, json.loads(answer)) for item, who, answer in rows]
