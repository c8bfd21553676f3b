"""Five hundred streams that are held while nothing moves in them, and what a new request notices of it.

Waiting: the backend has nothing to say yet; all streams are at a backend that is stopped, new requests go to another
one. Unread: the clients read nothing; what the system's buffers do not take waits in the gateway. Afterwards every
tenth stream is read to its end. Memory is that of the gateway's process.
"""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from benchmarks.gateway.bed import Connection, Server, all_ready, folder, serving

STREAMS = 500
UNREAD = 300  # ids of an answer that nobody reads, each with 20 alternatives: more than the system's buffers take
ASKED = {"messages": [{"role": "user", "content": "7 a +5 b *3 ="}], "stream": True, "max_tokens": 8}
SILENT = (0, 1, 2, 3, 4, 5)


async def latency(server: Server, count: int) -> float:
    """Median seconds of a small request."""
    async with Connection(server.port) as connection:
        answers = [await connection.ask(ASKED) for _ in range(count)]
    assert all(answer.good for answer in answers)
    return statistics.median(answer.whole for answer in answers)


async def compare(
    name: str, server: Server, more: dict[str, Any], count: int, *, stopped: int | None = None, receive: int = 0
) -> dict[str, Any]:
    """A row: a new request while the streams are held, against before and after. stopped: the backend they are at."""
    await latency(server, 20)
    quiet, memory = [await latency(server, count)], server.memory()
    _signal(stopped, signal.SIGSTOP)
    async with AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(Connection(server.port, receive=receive)) for _ in range(STREAMS)]
        for stream in streams:
            stream.send(ASKED | more)
        heads = [await stream.head() for stream in streams]
        assert {head.status for head in heads} == {200}
        while await server.metric("ottava_load") != (0 if stopped is None else STREAMS):
            await asyncio.sleep(0.5)  # until all was said, or all are waiting
        held, memory = await latency(server, count), server.memory() - memory
        _signal(stopped, signal.SIGCONT)
        for stream in streams[::10]:
            answer = await stream.rest(heads[0])
            assert answer.good, answer.events[-1:]
            assert answer.message()[2] == "length"
    quiet.append(await latency(server, count))
    base = statistics.mean(quiet)
    return {
        "name": f"a new request while {STREAMS} streams are {name}", "ours": held, "baseline": base,
        "ratio": held / base, "low": held / max(quiet), "high": held / min(quiet),
        "kib_per_stream": memory / STREAMS / 1024,
    }  # fmt: skip


def _signal(pid: int | None, number: int) -> None:
    if pid is not None:
        os.kill(pid, number)


def waiting(model: Path, count: int) -> dict[str, Any]:
    """The cheaper one of two backends takes all streams and says nothing."""
    args: dict[str, Any] = {"labels": ["price=1", "price=2"], "policy": "cheapest", "slots": STREAMS, "queue": 0}
    with serving([model, model], patience={"hung": 3600.0, "still": 3600.0}, **args) as server:
        asyncio.run(all_ready(server, 2))
        (cheap,) = [pid for pid, told in server.backends().items() if told["socket"].endswith("cpu-0-0.sock")]
        return asyncio.run(compare("waiting", server, {}, count, stopped=cheap))


def unread(model: Path, count: int) -> dict[str, Any]:
    """All answers are complete, and nobody takes them."""
    more = {"max_tokens": UNREAD, "logprobs": True, "top_logprobs": 20}
    with serving([model], slots=32, queue=STREAMS) as server:
        return asyncio.run(compare("not read", server, more, count, receive=4096))


def rows(quick: bool) -> list[dict[str, Any]]:
    """A row for each way of being idle. low, high: against the slower and the quicker of the two times without them."""
    with tempfile.TemporaryDirectory() as place:
        model = folder(Path(place) / "model", silent=SILENT)
        return [part(model, 50 if quick else 300) for part in (waiting, unread)]
