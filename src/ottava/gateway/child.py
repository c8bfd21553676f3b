"""One backend as the gateway sees it: a process that is started (`launch`), asked, watched, and started again.

A hung process and a dead one are the same thing here: what does not answer in time is killed, and everybody who
waited for it learns it from the closed socket.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ottava.engine.session import Sampling, Token
from ottava.errors import OttavaError, ResourceError, Verdict
from ottava.gateway import wire
from ottava.gateway.door import Address
from ottava.gateway.engines import EMBEDDED, OURS, Choice
from ottava.gateway.launch import Launcher, Order, Process

BACKOFF = (0.2, 30.0)
"""Seconds before the first start again, and at most; each is twice the one before."""
SLICES = 10
CALM = 30.0  # a backend that was ready for so many seconds begins the backoff anew

State = Literal["loading", "ready", "down", "refused"]


class Lost(Exception):
    """The backend died, or was taken for dead, before the answer was complete."""


@dataclass(frozen=True)
class Patience:
    """Seconds. every: between two looks at a backend; hung: that it may take to answer one; still: without a token
    while it has work, as its longest prompt may take, or without a sign of life while it loads; load: for loading."""

    every: float = 0.5
    hung: float = 10.0
    still: float = 300.0
    load: float = 3600.0


@dataclass(frozen=True)
class Place:
    """What a backend is. price: of a million ids, in any currency, one for all. engine: see `engines`."""

    name: str
    folder: Path
    vendor: str = "cpu"
    price: float = 0.0
    engine: Choice = OURS

    def takes(self, sampling: Sampling) -> bool:
        """Whether its engine can do what is asked: only ours holds replies to a grammar."""
        return sampling.grammar is None or self.engine.kind == EMBEDDED


Check = Callable[["Child"], Awaitable[None]]


@dataclass
class Child:
    """A backend process. changed(): called whenever it may have become able to take work, or unable.

    state: refused means that `check` or the canary refused it, barred says why; it is then not started again. invariant
    and numerics: what it says of its engine (see `Engine`).
    rate: tokens a second of one request, a moving mean; None: unknown. phase: state, and of loading what it does now.
    """

    place: Place
    slots: int
    launcher: Launcher
    patience: Patience
    changed: Callable[[], None]
    check: Check | None = None
    threads: int | None = None
    state: State = "down"
    busy: int = 0
    starts: int = 0
    fault: str = ""
    phase: str = "down"
    context: int = 0
    invariant: bool = False
    numerics: str | None = None
    barred: str = ""
    rate: float | None = None
    _process: Process | None = None
    _address: Address | None = None
    _opened: set[asyncio.StreamWriter] = field(default_factory=set)

    @property
    def pid(self) -> int | None:
        """Of its process, on the machine that this runs on."""
        return None if self._process is None else self._process.pid

    @property
    def node(self) -> str:
        """The name of that machine; empty for the gateway's own."""
        return "" if self._process is None else self._process.node

    @property
    def free(self) -> bool:
        """Whether it takes another request."""
        return self.state == "ready" and self.busy < self.slots

    def alike(self, other: Child) -> bool:
        """Whether it is known to go on with a reply of the other's bit for bit."""
        return self.invariant and other.invariant and self.place.folder == other.place.folder

    async def keep(self) -> None:
        """Have it run, for ever: start, check, watch, and after its end begin anew."""
        wait = BACKOFF[0]
        try:
            while True:
                began = time.monotonic()
                state: State = "down"
                try:
                    await self._start()
                    began = time.monotonic()
                    await self._watch()
                except Lost as error:
                    self.fault = str(error)
                except Verdict as error:
                    self.barred = error.what
                except OttavaError as error:
                    self.fault, state = error.what, "refused"
                if self.barred:
                    self.fault, state = f"refused: {self.barred}", "refused"
                await self.end(state)
                print(f"backend {self.place.name}: {self.fault}", file=sys.stderr, flush=True)
                if self.barred:
                    return
                wait = BACKOFF[0] if time.monotonic() - began > CALM else wait
                await asyncio.sleep(wait)
                wait = min(2 * wait, BACKOFF[1])
        finally:
            await self.end("refused" if self.barred else "down")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """It runs, unwatched, until the end of the block. Raises Lost."""
        try:
            await self._start()
            yield
        finally:
            await self.end("down")

    def refuse(self, why: str) -> None:
        """It answers no more, now and for good: what runs on it goes on elsewhere."""
        self.barred = why
        self._give_up()

    async def _start(self) -> None:
        self.state, self.phase, self.starts = "loading", "starting", self.starts + 1
        place = self.place
        order = Order(place.name, str(place.folder), self.slots, place.engine, self.threads)
        try:
            self._process = process = await self.launcher.start(order)
        except OSError as error:
            raise Lost(f"it could not be started: {error}") from None
        began, deadline = process.heard, time.monotonic() + self.patience.load
        while (address := process.address()) is None:
            if process.fault is not None:
                raise Lost(f"{process.fault} while loading")
            if time.monotonic() > deadline:
                raise Lost(f"it did not load within {self.patience.load:g} seconds")
            if time.monotonic() - process.heard > self.patience.still:
                raise Lost(f"it gave no sign of life for {self.patience.still:g} seconds while loading")
            if process.heard > began:
                self.phase = "loading"
            await asyncio.sleep(0.02)
        self._address = address
        hello = await self.ask(op="hello")
        self.context, self.invariant = hello["context"], hello["invariant"]
        self.numerics = hello.get("numerics")
        if self.check is not None:
            self.phase = "checking"
            await self.check(self)
        self.state, self.phase, self.fault = "ready", "ready", ""
        self.changed()

    async def _watch(self) -> None:
        """Returns by raising Lost, once the process has ended or does not answer."""
        assert self._process is not None
        ended = asyncio.create_task(self._process.wait())
        try:
            while True:
                await asyncio.wait({ended}, timeout=self.patience.every)
                if ended.done():
                    raise Lost(str(self._process.fault))
                try:
                    health = await self._health()
                except OttavaError as error:
                    raise Lost(error.what) from None
                if health["still"] > self.patience.still:
                    raise Lost(f"it has work, and no token came for {self.patience.still:g} seconds")
        finally:
            ended.cancel()

    async def _health(self) -> dict[str, Any]:
        """What it says of itself. The time it may take is cut: where this process was stopped, one slice is lost."""
        asking = asyncio.create_task(self.ask(op="health"))
        try:
            for _ in range(SLICES):
                if (await asyncio.wait({asking}, timeout=self.patience.hung / SLICES))[0]:
                    return asking.result()
        finally:
            asking.cancel()
        raise Lost(f"it did not answer within {self.patience.hung:g} seconds")

    async def end(self, state: State) -> None:
        """Kill the process, and tell all who wait for it."""
        self._give_up()
        self.state, self.phase = state, state
        process, self._process = self._process, None
        for writer in [*self._opened]:  # before its end is known: a machine that is gone says nothing of it
            writer.transport.abort()
        if process is not None:
            await process.wait()
        self.changed()

    async def ask(self, **question: Any) -> dict[str, Any]:
        """One answer. Raises Lost, or what the backend says."""
        async with aclosing(self._lines(question)) as lines:
            async for said in lines:
                return said  # type: ignore[no-any-return]
        raise Lost("it hung up")

    async def generate(
        self, ids: Sequence[int], sampling: Sampling, emitted: Sequence[int], forced: Sequence[int] = ()
    ) -> AsyncGenerator[Token, None]:
        """What follows `emitted` in a reply that begins with `forced`. Raises Lost, or what the engine raises.

        An invariant engine reads the emitted ids with the prompt, all at once. Another one takes the very steps again
        that generating took, one for each: read at once, they could change the last bits of what follows.
        """
        rest, again = forced[len(emitted) :], emitted
        if self.invariant:
            ids, sampling, again = [*ids, *emitted], replace(sampling, said=len(emitted)), ()
        how = wire.of_sampling(sampling)
        asked = {"op": "generate", "ids": ids, "sampling": how, "forced": [*again, *rest]}
        incarnation = self.starts
        try:
            async with aclosing(self._tokens(asked, len(again))) as tokens:
                async for token in tokens:
                    yield token
        except Lost:
            if self.starts == incarnation:  # nobody else is to be sent there until it has begun anew
                self._give_up()
            raise

    def _give_up(self) -> None:
        self.state = "refused" if self.barred else "down"
        if self._process is not None:
            self._process.kill()

    async def _tokens(self, asked: dict[str, Any], said_before: int) -> AsyncGenerator[Token, None]:
        number, since = 0, 0.0
        async with aclosing(self._lines(asked)) as lines:
            async for said in lines:
                if not isinstance(said, list):
                    return
                number += 1
                if number > said_before:
                    if number > said_before + 1:  # the first waits for its prompt
                        self._paced(time.monotonic() - since)
                    since = time.monotonic()
                    yield wire.token_of(said)
        raise Lost("it hung up in mid-answer")

    async def forced(self, ids: Sequence[int], first: int = 1, top: int = 1) -> list[Token]:
        """The ids from `first` on with their log-probabilities and the `top` likeliest ids, by the path that serves.

        Raises Lost, or what the engine raises.
        """
        found: list[Token] = []
        async with aclosing(self._lines({"op": "score", "ids": ids, "first": first, "top": top})) as lines:
            async for said in lines:
                if not isinstance(said, list):
                    return found[first + len(found) - len(ids) :] if len(found) > len(ids) - first else found
                found.append(wire.token_of(said))
        raise Lost("it hung up in mid-answer")

    async def score(self, ids: Sequence[int]) -> list[float]:
        """Log-probabilities of the ids after the first. Raises as `forced` does."""
        return [token.logprob for token in await self.forced(ids)]

    def _paced(self, seconds: float) -> None:
        rate = 1.0 / max(seconds, 1e-6)
        self.rate = rate if self.rate is None else 1.0 / (0.98 / self.rate + 0.02 / rate)

    async def _lines(self, question: dict[str, Any]) -> AsyncGenerator[Any, None]:
        address = self._address
        assert address is not None
        try:
            async with asyncio.timeout(self.patience.hung):
                reader, writer = await address.connect()
        except OSError as error:  # TimeoutError is one
            raise Lost(f"it cannot be reached: {error or 'no answer'}") from None
        self._opened.add(writer)
        try:
            writer.write(address.question(wire.line(question)))
            await address.greeted(reader)
            while (text := await reader.readline()).endswith(b"\n"):  # half a line is what a death leaves
                said = json.loads(text)
                if isinstance(said, dict) and "error" in said:
                    raise wire.error_of(said)
                yield said
        except ConnectionError as error:
            raise Lost(f"the connection broke: {error}") from None
        finally:
            self._opened.discard(writer)
            writer.close()


def unavailable(children: Sequence[Child]) -> ResourceError:
    """What to tell a client when no backend comes back."""
    states = ", ".join(f"{child.place.name} is {child.state}" for child in children)
    return ResourceError(f"no backend can answer: {states}", fix="try again later")
