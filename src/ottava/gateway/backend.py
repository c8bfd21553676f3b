"""One engine in a process of its own, spoken to over a unix socket or a port with a key (`wire`, `door`).

It is started by `launch` and watched by `child`. It ends when its standard input or its parent does: a gateway that was
killed leaves nothing behind. Nobody but the user who started it can reach the socket: its folder is closed to others.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from ottava.checkpoint.digest import values_digest
from ottava.checkpoint.stream import default_workers
from ottava.engine.session import Deliver, Engine, Sampling, Token
from ottava.errors import CheckpointError, DataError, OttavaError, Verdict
from ottava.gateway import leash, wire
from ottava.gateway.door import BACKLOG, Door
from ottava.gateway.engines import OURS, Choice, loadable, startable
from ottava.models.chat import Chat

BREATH = 1.0  # seconds between two signs of life while loading


def main() -> int:
    """Load the folder that the arguments name (JSON: model, socket, slots) and answer until standard input ends.

    host, digest: on another machine than the gateway's, at this address of it, if the folder's values have this digest.
    """
    args = json.loads(sys.argv[1])
    door = door_of(args)
    outlive_nobody()
    os.write(1, b".")  # what it imports is imported
    try:
        with breathing():
            if door is not None:
                require(OURS, args)
            engine = Engine.load(args["model"], slots=args["slots"], queue=args["slots"])
    except OttavaError as error:
        return given_up(error, door, args)
    asyncio.run(Backend(engine).run(Path(args["socket"]), door))
    return 0


def door_of(args: Mapping[str, Any]) -> Door | None:
    """The port that the arguments ask for, with the key that is the first line of standard input; None: a socket."""
    return Door(args["host"], sys.stdin.buffer.readline().decode().strip()) if args.get("host") else None


def require(choice: Choice, args: Mapping[str, Any]) -> None:
    """Raise the OttavaError that says what this machine lacks: the engine, the folder, or the values that it holds
    where the gateway is."""
    startable(choice)
    folder = Path(args["model"])
    if not folder.is_dir():
        fix = "copy it there, under the same path, or share it"
        raise CheckpointError(f"there is no folder {folder}", where=folder, fix=fix)
    found = values_digest(folder, default_workers())
    if found != args["digest"]:
        what = f"its folder {folder} holds other values: digest {found[:16]}, the gateway's {args['digest'][:16]}"
        raise Verdict(what, where=folder, fix="copy the gateway's folder there")
    loadable(choice, folder)


def given_up(error: OttavaError, door: Door | None, args: Mapping[str, Any]) -> int:
    """Tell why nothing will be answered: the gateway's machine by the file that it waits for, else standard error."""
    if door is None:
        print(error.render(), file=sys.stderr, flush=True)
    else:
        early = Path(args["socket"]).with_suffix(".new")
        early.write_bytes(wire.of_error(error))
        early.rename(args["socket"])
    return error.exit_code


def outlive_nobody() -> None:
    """End this process when its standard input or its parent does; the second also where it is stopped."""
    leash.die_with_parent(os.getppid())  # where that has ended already, standard input has too

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


@contextmanager
def breathing() -> Iterator[None]:
    """A byte on standard output now and then says that this process lives and loads."""
    loaded = threading.Event()

    def breathe() -> None:
        with suppress(OSError):  # nobody listens any more
            while not loaded.wait(BREATH):
                os.write(1, b".")

    threading.Thread(target=breathe, daemon=True).start()
    try:
        yield
    finally:
        loaded.set()


class Backend:
    """Answers the questions of `wire` with an engine."""

    def __init__(self, engine: Speaker):
        self._engine, self._moved = engine, time.monotonic()
        self._read: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[bytes | None]] = _line

    async def run(self, path: Path, door: Door | None = None) -> None:
        """Listen for ever. The socket, or the file with the door's address, appears once questions are answered."""
        early = path.with_suffix(".new")
        early.unlink(missing_ok=True)
        self._read = _line if door is None else door.question
        if door is None:
            server = await asyncio.start_unix_server(self._serve, early, limit=wire.LONGEST, backlog=BACKLOG)
        else:
            server, address = await door.listen(self._serve)
            early.write_bytes(address)
        early.rename(path)
        async with server:
            await server.serve_forever()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if (line := await self._read(reader, writer)) is None:
                return
            asked = json.loads(line or b"{}")
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


async def _line(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    return await reader.readline()


def _rendered(engine: Speaker, messages: list[dict[str, Any]], thinking: bool, *tools: Any) -> list[int] | None:
    try:
        return engine.chat.render(messages, thinking, *tools)
    except DataError:
        return None


if __name__ == "__main__":
    sys.exit(main())
