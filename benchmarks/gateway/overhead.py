"""What the gateway adds to one small request: the same one over HTTP, and straight to the backend's socket, in turn.

Both go to the same process of the same engine. Over HTTP come parsing, the template, admission, the relay of every
token and the events; the client's own parsing is on both sides.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.stats import binom

from benchmarks.gateway.bed import Connection, Server, folder, serving
from ottava.engine.session import Sampling
from ottava.gateway import wire
from ottava.models.chat import Chat

MESSAGES = [{"role": "user", "content": "7 a +5 b *3 ="}]
NEW = 8
SILENT = (0, 1, 2, 3, 4, 5)  # all replies have one length

Pair = tuple[float, float]
"""Seconds through the gateway, and straight."""


async def straight(path: Path, ids: Sequence[int]) -> tuple[float, float]:
    """Seconds to the first id and to the end, asked as the gateway asks."""
    began = time.perf_counter()
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(wire.line({"op": "generate", "ids": ids, "sampling": wire.of_sampling(Sampling(NEW)), "forced": []}))
    lines, first = 0, 0.0
    while await reader.readline():
        lines += 1
        first = first or time.perf_counter() - began
    assert lines == NEW + 1
    writer.close()
    return first, time.perf_counter() - began


async def pairs(server: Server, ids: Sequence[int], count: int) -> dict[str, list[Pair]]:
    """Both ways in turn, of a stream and of a plain answer."""
    ((_, told),) = server.backends().items()
    found: dict[str, list[Pair]] = {"first id, streamed": [], "whole reply, streamed": [], "whole reply, plain": []}
    async with Connection(server.port) as connection:
        for number in range(count + 20):
            body = {"messages": MESSAGES, "max_tokens": NEW}
            stream = await connection.ask({**body, "stream": True})
            first, whole = await straight(Path(told["socket"]), ids)
            plain = await connection.ask(body)
            assert stream.good
            assert plain.good
            if number >= 20:  # the first ones warm both up
                found["first id, streamed"].append((stream.first, first))
                found["whole reply, streamed"].append((stream.whole, whole))
                found["whole reply, plain"].append((plain.whole, whole))
    return found


def row(name: str, both: Sequence[Pair]) -> dict[str, Any]:
    """Medians, their ratio, and the median of the differences with its 95% interval by ranks, in milliseconds."""
    added = sorted(1000 * (ours - theirs) for ours, theirs in both)
    outside = int(binom.ppf(0.025, len(added), 0.5))
    ours, theirs = (statistics.median(side) for side in zip(*both, strict=True))
    return {
        "name": f"{name}, through the gateway and straight", "ours": ours, "baseline": theirs, "ratio": ours / theirs,
        "added_ms": statistics.median(added), "low": added[max(outside - 1, 0)], "high": added[-max(outside, 1)],
        "pairs": len(added),
    }  # fmt: skip


def rows(quick: bool) -> list[dict[str, Any]]:
    """A row for the first id and the whole reply. low, high: of added_ms."""
    with tempfile.TemporaryDirectory() as place:
        model = folder(Path(place) / "model", silent=SILENT)
        ids = Chat.load(model).render(MESSAGES, False)
        with serving([model]) as server:
            found = asyncio.run(pairs(server, ids, 50 if quick else 500))
    return [row(name, both) for name, both in found.items()]
