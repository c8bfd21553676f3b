"""What runs beside a backend on another machine: it starts it as the gateway would, and tells what becomes of it.

A keeper has one backend, which ends with it. `gateway.ray` makes an actor of it; nothing here knows Ray, and no token
passes here. All messages are JSON text.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

from ottava.cluster import code, move_to
from ottava.errors import PlatformError
from ottava.gateway import wire
from ottava.gateway.engines import Choice
from ottava.gateway.launch import Local, LocalProcess, Order

LOOK_S = 0.02  # between two looks at a backend that is loading


class Keeper:
    """The keeper of one backend. setup: {folder, path: the gateway's working folder and PYTHONPATH}; host: the address
    of this machine at which the backend is to listen."""

    def __init__(self, setup: str, host: str):
        told = json.loads(setup)
        move_to(told["folder"], told["path"])
        self._host, self._words = host, bytearray()
        self._local = Local(self._words.extend)
        self._last: Any = None

    async def start(self, order: str, gateway: str) -> str:
        """Start the backend of an `Order`: {pid}, or {error} where ottava is not what it is at the gateway (`code`)."""
        if code() != gateway:
            what = f"ottava is {code()} there, and {gateway} at the gateway: the bits may differ"
            return wire.of_error(PlatformError(what, fix="install the same ottava on all nodes")).decode()
        told = json.loads(order)
        wanted = replace(Order(**told), engine=Choice.read(told["engine"]), host=self._host)
        self._process: LocalProcess = await self._local.start(wanted)
        self._ended = asyncio.create_task(self._process.wait())
        return json.dumps({"pid": self._process.pid})

    async def news(self) -> str:
        """What is new, once something is; to be called again and again, one call at a time.

        {heard: its last sign of life, by this machine's clock, told: its address or its error, fault: how it ended,
        words: what it has said on standard error since}.
        """
        while (now := self._seen()) == self._last and not self._words:
            await asyncio.wait({self._ended}, timeout=LOOK_S if now["told"] is None else 1.0)
        self._last, words = now, self._words.decode(errors="replace")
        self._words.clear()
        return json.dumps({**now, "words": words})

    def _seen(self) -> dict[str, Any]:
        fault = self._process.fault if self._ended.done() else None
        return {"heard": self._process.heard, "told": self._process.told(), "fault": fault}

    async def kill(self) -> None:
        """End the backend, and return when it has."""
        self._process.kill()
        await self._ended
        await self._local.close()
