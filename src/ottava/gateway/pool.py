"""Several backends behind the face of one engine: a request ends although the backend at work on it does not.

The gateway keeps the ids that it has given to the client. When a backend is lost, the prompt and these ids go to
another one, which takes them as said and goes on behind them. Choices are a function of seed and position, and the
engine computes a row alone, so what follows is what would have followed; nothing is said twice, because what the
client has is what is sent.
"""

from __future__ import annotations

import asyncio
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from ottava.engine.room import lacking
from ottava.engine.session import Overdue, QueueFull, Sampling, Token
from ottava.errors import DataError, ResourceError, Verdict, check_folder
from ottava.gateway.child import Check, Child, Lost, Patience, Place, unavailable
from ottava.gateway.engines import EMBEDDED, KINDS, OURS, Choice
from ottava.gateway.launch import Launcher, Local
from ottava.gateway.progress import Progress
from ottava.models.chat import Chat

if TYPE_CHECKING:
    from ottava.gateway.canary import Canary
    from ottava.gateway.parity import Parity

TRIES = 5
"""Backends that may be lost in a row without a token of a request: it may be the request that kills them."""

Policy = Literal["balanced", "domestic", "cheapest", "fastest"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
DOMESTIC = ("ascend",)


@dataclass(frozen=True)
class Moved:
    """Here another backend takes over: its name, and how many ids the client has already.

    exact: whether what follows is known to be what would have followed, bit for bit.
    """

    backend: str
    at: int
    exact: bool = True


Item = Token | Moved | Exception | None
Deliver = Callable[[Item], object]


class Run:
    """A request in the pool. cancel() ends it."""

    def __init__(self, task: asyncio.Task[None]):
        self._task = task

    def cancel(self) -> None:
        self._task.cancel()


class Pool:
    """Backends that all hold one model. places: what to start; slots: requests at a time of each; queue: that wait.

    queue_s: how many seconds they may wait for their first slot; wait_s: how long a request waits for a backend while
    none runs. check: raises an OttavaError where a backend may not serve. chat: renders prompts, by default that of
    the first place. launcher: by default this machine's; ended with the pool. canary, to be set before the start: looks
    at what backends say; parity: what `check` found, to be told. To be used on the event loop on which it was started.
    """

    def __init__(
        self,
        places: Sequence[Place],
        *,
        slots: int = 4,
        queue: int = 16,
        queue_s: float = math.inf,
        wait_s: float = 60.0,
        policy: Policy = "balanced",
        patience: Patience | None = None,
        check: Check | None = None,
        threads: int | None = None,
        chat: Chat | None = None,
        launcher: Launcher | None = None,
    ):
        require_policy(policy)
        self.chat = chat or Chat.load(places[0].folder)
        self.canary: Canary | None = None
        self.parity: Parity | None = None
        self.queue, self.queue_s, self.wait_s, self.policy = queue, queue_s, wait_s, policy
        self.failovers = 0
        self._launcher = launcher or Local()
        threads = threads or max(1, (os.cpu_count() or 1) // len(places))
        self.children = [
            Child(place, slots, self._launcher, patience or Patience(), self._wake, check, threads) for place in places
        ]
        self._runs: set[asyncio.Task[None]] = set()
        self._lines: list[asyncio.Future[None]] = []  # who waits for a slot, in order
        self._keepers: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start every backend, and return once one is ready. Raises ResourceError where none comes up."""
        began, progress = time.monotonic(), Progress()
        self._keepers = [asyncio.create_task(child.keep()) for child in self.children]
        if self.canary is not None:
            self._keepers.append(asyncio.create_task(self.canary.work()))
        while not self.alive:
            for keeper in self._keepers:
                if keeper.done():
                    keeper.result()
            if all(child.fault for child in self.children):
                faults = "; ".join(f"{child.place.name}: {child.fault}" for child in self.children)
                if all(child.barred for child in self.children):
                    raise Verdict(f"no backend may serve: {faults}", fix="what it said stands above")
                raise ResourceError(f"no backend came up: {faults}", fix="what it said stands above")
            await asyncio.sleep(0.02)
            progress.show({child.place.name: child.phase for child in self.children})
        progress.show({child.place.name: child.phase for child in self.children}, last=True)
        ready = sum(child.state == "ready" for child in self.children)
        took = time.monotonic() - began
        print(f"{ready} of {len(self.children)} backends ready after {took:.1f} s", file=sys.stderr, flush=True)

    async def stop(self) -> None:
        """End every request and backend."""
        tasks = [*self._runs, *self._keepers]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._launcher.close()

    @property
    def alive(self) -> bool:
        """Whether a backend can answer now."""
        return any(child.state == "ready" for child in self.children)

    @property
    def capacity(self) -> int:
        """Requests that may generate or wait at a time."""
        return sum(child.slots for child in self.children) + self.queue

    @property
    def waiting(self) -> bool:
        """Whether a request waits for a slot."""
        return bool(self._lines)

    @property
    def load_now(self) -> int:
        """Requests that are generating or waiting."""
        return len(self._runs)

    @property
    def context(self) -> int:
        """Ids of prompt and reply that every backend that has started can hold."""
        return min((child.context for child in self.children if child.context), default=0)

    def submit(self, ids: Sequence[int], sampling: Sampling, deliver: Deliver, forced: Sequence[int] = ()) -> Run:
        """As `Engine.submit`; `deliver` also gets a Moved before the first token of each backend."""
        if not ids:
            raise DataError("the prompt is empty")
        if self.context and (wrong := lacking(1, self.context, len(ids))) is not None:
            raise DataError(wrong[0])
        if not any(child.place.takes(sampling) for child in self.children):
            raise DataError(
                "no backend here can hold a reply to a schema or to calls",
                fix="ask without, or serve with --engine embedded",
            )
        if self.load_now >= self.capacity:
            raise QueueFull(f"{self.queue} requests are waiting already", fix="try again in a second")
        if sampling.seed is None:  # another backend must be able to go on with it
            sampling = replace(sampling, seed=secrets.randbits(63))
        if self.canary is not None:
            sampling, deliver = self.canary.tap(ids, sampling, deliver, forced)
        task = asyncio.create_task(self._run(list(ids), sampling, deliver, forced))
        self._runs.add(task)
        task.add_done_callback(self._runs.discard)
        return Run(task)

    async def _run(self, ids: list[int], sampling: Sampling, deliver: Deliver, forced: Sequence[int]) -> None:
        try:
            await self._relay(ids, sampling, deliver, forced)
        except asyncio.CancelledError:
            deliver(ResourceError("the request was cancelled"))
            raise
        except Exception as error:
            deliver(error)
        else:
            deliver(None)

    async def _relay(self, ids: list[int], sampling: Sampling, deliver: Deliver, forced: Sequence[int]) -> None:
        emitted: list[int] = []
        lost = 0  # in a row, without a token
        again = False
        speaker: Child | None = None  # who said the last of them
        while lost < TRIES:
            child = await self._place(sampling, again)
            deliver(Moved(child.place.name, len(emitted), speaker is None or child.alike(speaker)))
            before = len(emitted)
            try:
                async with aclosing(child.generate(ids, sampling, emitted[:], forced)) as tokens:
                    async for token in tokens:
                        emitted.append(token.id)
                        speaker = child
                        deliver(token)
                return
            except Lost:
                self.failovers += 1
                lost, again = 1 if len(emitted) > before else lost + 1, True
            finally:
                self.release(child)
        raise ResourceError(f"{TRIES} backends were lost over this request", fix="send it again")

    async def _place(self, sampling: Sampling, again: bool) -> Child:
        """A backend with a slot for us, by the policy. Who was moved goes before who waits for the first time."""
        deadline = time.monotonic() + self.wait_s
        patience = math.inf if again else time.monotonic() + self.queue_s
        while (child := self._choose(sampling, first=again or not self._lines)) is None:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._lines.insert(0 if again else len(self._lines), turn)
            try:
                with suppress(TimeoutError):
                    await asyncio.wait_for(turn, max(0.0, min(1.0, patience - time.monotonic())))
            finally:
                self._lines.remove(turn)
            again = True  # having waited, it goes before who comes now
            if self.alive:
                deadline = time.monotonic() + self.wait_s
            elif time.monotonic() > deadline:
                raise unavailable(self.children)
            if time.monotonic() > patience and self._choose(sampling, first=True) is None:
                raise Overdue(self.queue_s)
        child.busy += 1
        return child

    def release(self, child: Child) -> None:
        """Give back a slot that was taken."""
        child.busy -= 1
        self._wake()

    def _choose(self, sampling: Sampling, *, first: bool) -> Child | None:
        able = [child for child in self.children if child.free and child.place.takes(sampling)] if first else []
        return min(able, key=self._rank, default=None)

    def _rank(self, child: Child) -> tuple[float, ...]:
        """The smallest is taken; between equals, the one with the least to do."""
        wish: dict[Policy, float] = {
            "balanced": 0.0,
            "domestic": child.place.vendor not in DOMESTIC,
            "cheapest": child.place.price,
            "fastest": -(child.rate or float("inf")),  # what nobody has measured is tried first
        }
        return wish[self.policy], child.busy, child.starts

    def _wake(self) -> None:
        """Let the first in line look again."""
        free = sum(child.slots - child.busy for child in self.children if child.state == "ready")
        for turn in self._lines[:free]:
            if not turn.done():
                turn.set_result(None)


def require_policy(policy: str) -> None:
    """Raise DataError where it is none of `POLICIES`."""
    if policy not in POLICIES:
        raise DataError(f"no such policy: {policy}", where="--policy", fix=", ".join(POLICIES))


def places(
    folders: Sequence[Path], replicas: int, labels: Sequence[str] = (), chosen: Sequence[Choice] = ()
) -> list[Place]:
    """K backends of each folder. labels: "vendor=ascend,price=1.5", one of each folder, or none; chosen: the engine of
    each (`engines.choices`), or none: ours. Raises DataError."""
    for folder in folders:
        check_folder(folder)
    if replicas < 1:
        raise DataError(f"{replicas} replicas", where="--replicas", fix="1 or more")
    if labels and len(labels) != len(folders):
        what = f"{len(labels)} labels and {len(folders)} folders"
        raise DataError(what, where="--label", fix="give one --label of each DIR, in their order, or none")
    found = []
    for number, folder in enumerate(folders):
        engine = chosen[number] if chosen else OURS
        usual = KINDS[engine.kind].vendor if engine.kind in KINDS else "cpu"
        vendor, price = _label(labels[number], usual) if labels else (usual, 0.0)
        called = vendor if engine.kind == EMBEDDED else f"{vendor}-{engine.kind}"
        for replica in range(replicas):
            found.append(Place(f"{called}-{number}-{replica}", folder, vendor, price, engine))
    return found


def _label(text: str, usual: str) -> tuple[str, float]:
    fix = "write it as vendor=ascend,price=1.5; both may be left out"
    said = dict(part.partition("=")[::2] for part in text.split(",") if part)
    wrong = said.keys() - {"vendor", "price"}
    vendor = said.get("vendor", usual)
    try:
        price = float(said.get("price", 0))
    except ValueError:
        price = -1.0
    if wrong or not (vendor.isalnum() and len(vendor) <= 20) or not 0 <= price < 1e12:
        raise DataError(f"this is no label: {text!r}", where="--label", fix=fix)
    return vendor, price
