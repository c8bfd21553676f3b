"""How long people wait: an answer until it is on disk, and the next question, with many at once and many items.

A real server (`ottava label serve`), its store on this disk, its ranking process at work, and clients over HTTP. Twice:
with everybody answering every half second, which is faster than people are, and with no pause at all. `ours` is the
95th percentile in milliseconds, `low` and `high` its 95% interval by ranks, `baseline` the bound of 50 ms.

With `--target-error` the policy runs over the store (docs/labels.md), and only what it will need is asked: `nothing` is
the share of people's time in which there was no question for them, and they asked again after 0.1 s.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from scipy.stats import binom

from benchmarks.common import show
from ottava.labels.questions import Item
from ottava.labels.store import Store

BOUND_MS = 50.0


def fill(path: Path, items: int, people: int) -> None:
    """A store with this many items, two machines' opinions of each, and people with keys."""
    with Store.write(path, create=True) as store, store.together():
        store.add_guideline("Judge what is written.")
        for k in range(people):
            store.add_annotator(f"person-{k}", key(k))
        store.add_items(
            Item(
                f"q{k}",
                "right_wrong",
                {"question": f"What is {k} + {k % 97}?", "answer": str(k + k % 97 + (k % 7 == 0))},
                source=f"sums.jsonl:{k}",
                opinions={"verifier": "wrong" if k % 7 == 0 else "right", "judge": "right" if k % 3 else "wrong"},
            )
            for k in range(items)
        )


def key(person: int) -> str:
    return f"key-of-person-{person}-0123456789"


class Client:
    """One person: HTTP/1.1 over one connection, with as little work of its own as can be."""

    def __init__(self, port: int, person: int):
        self.port, self.person, self.votes = port, person, 0
        self.stored: list[float] = []
        self.asked: list[float] = []
        self.nothing = 0.0

    async def work(self, until: float, pause: float) -> None:
        """Vote and ask for the next question until then; seconds of each wait."""
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        await asyncio.sleep(pause * self.person / 20)  # not all in the same instant
        questions = (await self.post("/api/next", {"want": 5}))["questions"]
        while time.monotonic() < until:
            if not questions:
                await asyncio.sleep(0.1)
                self.nothing += 0.1
                questions = (await self.post("/api/next", {"want": 5}))["questions"]
                continue
            begun = time.perf_counter()
            question = questions.pop(0)
            answer = "wrong" if int(question["item"][1:]) % 7 == 0 else "right"
            row = {"uid": f"{os.getpid()}-{self.person}-{question['item']}", "item": question["item"], "kind": "vote"}
            acks = (await self.post("/api/votes", {"votes": [row | {"answer": answer, "ms": 800, "guideline": 1}]}))[
                "acks"
            ]
            assert acks[0]["status"] == "stored", acks
            middle = time.perf_counter()
            holding = [one["item"] for one in questions]
            questions += (await self.post("/api/next", {"want": 5 - len(questions), "holding": holding}))["questions"]
            done = time.perf_counter()
            self.stored.append(middle - begun)
            self.asked.append(done - middle)
            await asyncio.sleep(max(pause - (done - begun), 0))
        self.writer.close()

    async def post(self, path: str, body: Any) -> Any:
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {key(self.person)}\r\n"
        self.writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        said = await self.reader.readuntil(b"\r\n\r\n")
        assert b" 200 " in said.split(b"\r\n")[0], said
        length = next(line for line in said.split(b"\r\n") if line.lower().startswith(b"content-length"))
        return json.loads(await self.reader.readexactly(int(length.split(b":")[1])))


def percentile(name: str, seconds: list[float]) -> dict[str, Any]:
    """The 95th percentile in milliseconds."""
    ranked = sorted(1000 * one for one in seconds)
    low, middle, high = (
        ranked[min(max(int(rank), 0), len(ranked) - 1)]
        for rank in (binom.ppf(0.025, len(ranked), 0.95) - 1, 0.95 * len(ranked), binom.ppf(0.975, len(ranked), 0.95))
    )
    row = {"name": name, "ours": middle, "baseline": BOUND_MS, "ratio": middle / BOUND_MS, "low": low, "high": high}
    return row | {"median": ranked[len(ranked) // 2], "largest": ranked[-1], "count": len(ranked)}


async def measure(port: int, people: int, seconds: float, pause: float, name: str) -> list[dict[str, Any]]:
    clients = [Client(port, person) for person in range(people)]
    until = time.monotonic() + seconds
    await asyncio.gather(*(client.work(until, pause) for client in clients))
    stored = [one for client in clients for one in client.stored]
    asked = [one for client in clients for one in client.asked]
    nothing = sum(client.nothing for client in clients) / (people * seconds)
    return [
        percentile(f"{name}: vote on disk, ms at p95", stored),
        percentile(f"{name}: next question, ms at p95", asked) | {"nothing": nothing},
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--people", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each of the two loads")
    parser.add_argument("--target-error", type=float, default=None, help="run the policy over the store")
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to be measured")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        store, ready = Path(name) / "labels.db", Path(name) / "ready.json"
        print(f"writing {options.items:,} items ...", file=sys.stderr, flush=True)
        fill(store, options.items, options.people)
        args = {"store": str(store), "port": 0, "ready": str(ready), "target": options.target_error}
        code = f"from ottava.labels.serve import serve; serve({args!r})"
        with subprocess.Popen([sys.executable, "-c", code]) as server:
            try:
                while not ready.exists():
                    assert server.poll() is None, "the server ended"
                    time.sleep(0.1)
                port = json.loads(ready.read_text())["port"]
                results = []
                for load, pause in (("every 0.5 s", 0.5), ("no pause", 0.0)):
                    print(f"{options.people} people, {load}, {options.seconds:.0f} s ...", file=sys.stderr, flush=True)
                    results += asyncio.run(measure(port, options.people, options.seconds, pause, load))
            finally:
                server.send_signal(signal.SIGTERM)
        with Store.read(store) as after:
            votes = after.count("live")
        given = sum(row["count"] for row in results) // 2
        assert votes == given, (votes, given)
    show(results, options.json, votes_acknowledged=given, votes_stored=votes)


if __name__ == "__main__":
    main()
