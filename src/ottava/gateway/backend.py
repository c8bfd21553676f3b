"""One engine in a process of its own, spoken to over a unix socket (`wire`).

It is started and watched by `pool`. It ends when its standard input does: a gateway that was killed leaves nothing
behind. Nobody but the user who started it can reach the socket: its folder is closed to others.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from ottava.engine.session import Deliver, Engine, Sampling, Token
from ottava.errors import DataError, OttavaError
from ottava.gateway import wire
from ottava.models.chat import Chat

BACKLOG = 4096  # requests that may come before one is looked at
BREATH = 1.0  # seconds between two signs of life while loading


def main() -> int:
    """Load the folder that the arguments name (JSON: model, socket, slots) and answer until standard input ends."""
    args = json.loads(sys.argv[1])
    outlive_nobody()
    loaded = threading.Event()
    os.write(1, b".")  # what it imports is imported
    threading.Thread(target=_breathe, args=(loaded,), daemon=True).start()
    try:
        engine = Engine.load(args["model"], slots=args["slots"], queue=args["slots"])
    except OttavaError as error:
        print(error.render(), file=sys.stderr, flush=True)
        return error.exit_code
    loaded.set()
    asyncio.run(Backend(engine).run(Path(args["socket"])))
    return 0


def outlive_nobody() -> None:
    """End this process when its standard input does."""

    def wait() -> None:
        sys.stdin.buffer.read()
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


class Cancellable(Protocol):
    """A request that was submitted."""

    def cancel(self) -> None: ...


class Speaker(Protocol):
    """What of `Engine` a backend needs: ours has it, and `vllm` gives it to another's."""

    @property
    def chat(self) -> Chat: ...
    @property
    def context(self) -> int: ...
    @property
    def invariant(self) -> bool: ...
    @property
    def alive(self) -> bool: ...
    @property
    def load_now(self) -> int: ...
    def submit(
        self, ids: Sequence[int], sampling: Sampling, deliver: Deliver, forced: Sequence[int] = ()
    ) -> Cancellable: ...


def _breathe(loaded: threading.Event) -> None:
    """A byte on standard output now and then says that it lives and loads."""
    with suppress(OSError):  # nobody listens any more
        while not loaded.wait(BREATH):
            os.write(1, b".")


class Backend:
    """Answers the questions of `wire` with an engine."""

    def __init__(self, engine: Speaker):
        self._engine, self._moved = engine, time.monotonic()

    async def run(self, path: Path) -> None:
        """Listen for ever. The socket appears once questions are answered."""
        early = path.with_suffix(".new")
        early.unlink(missing_ok=True)
        # A full backlog would look to the gateway like a backend that is gone.
        server = await asyncio.start_unix_server(self._serve, early, limit=wire.LONGEST, backlog=BACKLOG)
        early.rename(path)
        async with server:
            await server.serve_forever()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            asked = json.loads(await reader.readline() or b"{}")
            if asked.get("op") in ("generate", "score"):
                await self._stream(asked, reader, writer)
            else:
                writer.write(wire.line(await asyncio.to_thread(self._answer, asked)))
                await writer.drain()
        except ConnectionError:
            pass
        except Exception as error:
            writer.write(wire.of_error(error))
        finally:
            writer.close()

    def _answer(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        engine, op = self._engine, asked.get("op")
        if op == "health":
            if not engine.alive:
                raise DataError("the engine's thread has ended")
            load = engine.load_now
            return {"load": load, "still": time.monotonic() - self._moved if load else 0.0}
        if op == "hello":
            return {
                "pid": os.getpid(),
                "context": engine.context,
                "invariant": engine.invariant,
                "numerics": getattr(engine, "numerics", None),  # others promise no bits
            }
        if op == "render":
            return {"ids": [_rendered(engine, *one) for one in asked["conversations"]]}
        raise DataError(f"no such question: {op!r}")

    async def _stream(
        self, asked: Mapping[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        ids: Sequence[int] = asked["ids"]
        if asked["op"] == "score":
            first = asked.get("first", 1)
            ids, forced, how = ids[:first], ids[first:], Sampling(max_new=len(ids) - first, top=asked.get("top", 1))
        else:
            forced, how = asked["forced"], wire.sampling_of(asked["sampling"])
        loop, over = asyncio.get_running_loop(), asyncio.Event()

        def write(item: Token | Exception | None) -> None:
            self._moved = time.monotonic()
            if isinstance(item, Token):
                writer.write(wire.of_token(item))
            else:
                writer.write(wire.line({"done": True}) if item is None else wire.of_error(item))
                over.set()

        if not self._engine.load_now:
            self._moved = time.monotonic()

        def deliver(item: Token | Exception | None) -> None:
            loop.call_soon_threadsafe(write, item)

        job = self._engine.submit(ids, how, deliver, forced)
        waits = [asyncio.create_task(reader.read()), asyncio.create_task(over.wait())]  # hung up, or done
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            job.cancel()
            for task in waits:
                task.cancel()


def _rendered(engine: Speaker, messages: list[dict[str, Any]], thinking: bool, *tools: Any) -> list[int] | None:
    try:
        return engine.chat.render(messages, thinking, *tools)
    except DataError:
        return None


if __name__ == "__main__":
    sys.exit(main())
