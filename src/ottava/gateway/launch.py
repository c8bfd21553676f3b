"""How a backend's process comes to be: one order, and who carries it out.

`Local` starts it as a child of this process, on this machine. `ray.RayLauncher` has Ray choose a machine and a keeper
there, which starts it with `Local` too. Whoever watches it (`child`) sees no difference.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ottava.gateway import wire
from ottava.gateway.door import Address
from ottava.gateway.engines import EMBEDDED, OURS, Choice

LAST_WORDS_S = 1.0  # for what was said to be read after the end


@dataclass(frozen=True)
class Order:
    """A backend that is wanted. threads: of its kernels; None: as the environment says.

    host: the address of the machine at which it is to listen, with `key`, and only where the folder there has this
    `digest` of values; empty: on a unix socket.
    """

    name: str
    folder: str
    slots: int
    engine: Choice = OURS
    threads: int | None = None
    host: str = ""
    key: str = field(default="", repr=False)
    digest: str = ""


class Process(Protocol):
    """A backend's process, wherever it runs. pid: its number there; node: the machine's name, empty for this one.

    heard: when (`time.monotonic`) it last gave a sign of life; fault: how it ended, None: it runs.
    """

    @property
    def pid(self) -> int: ...
    @property
    def node(self) -> str: ...
    @property
    def heard(self) -> float: ...
    @property
    def fault(self) -> str | None: ...
    def address(self) -> Address | None:
        """Where it answers; None: not yet. Raises the OttavaError for which it never will."""

    async def wait(self) -> None:
        """Return once it has ended."""

    def kill(self) -> None:
        """Have it ended, soon; `wait` then returns."""


class Launcher(Protocol):
    """Who starts backends."""

    async def start(self, order: Order) -> Process:
        """Start one. Raises OSError where no process came to be, or an OttavaError."""

    async def close(self) -> None:
        """Give back what was taken, once every process has ended."""


class LocalProcess:
    """A child of this process. path: the socket, or a file that tells its port or its error; it appears when ready.

    said: takes what it writes on standard error; None: it goes where this process's goes.
    """

    node = ""

    def __init__(self, process: asyncio.subprocess.Process, path: Path, key: str, said: Callable[[bytes], object]):
        self._process, self._path, self._key, self._said = process, path, key, said
        self.pid, self.heard = process.pid, time.monotonic()
        self._hearing = asyncio.gather(self._breath(), self._words())

    @property
    def fault(self) -> str | None:
        status = self._process.returncode
        return None if status is None else f"it ended with status {status}"

    def address(self) -> Address | None:
        if not self._key:
            return Address(self._path) if self._path.exists() else None
        told = self.told()
        return None if told is None else address_of(told, self._key)

    def told(self) -> dict[str, Any] | None:
        """What one with a port says of it, or why it will have none; None: nothing yet."""
        return json.loads(self._path.read_bytes()) if self._path.exists() else None

    async def wait(self) -> None:
        await self._process.wait()
        if self._process.stderr is not None:
            await asyncio.wait({self._hearing}, timeout=LAST_WORDS_S)

    def kill(self) -> None:
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)  # asyncio's own may reap it before asyncio looks

    async def _breath(self) -> None:
        """Whatever it writes, as long as it lives: while it loads, that is its sign of life."""
        assert self._process.stdout is not None
        while await self._process.stdout.read(4096):
            self.heard = time.monotonic()

    async def _words(self) -> None:
        if self._process.stderr is not None:
            while text := await self._process.stderr.read(4096):
                self._said(text)


def address_of(told: Mapping[str, Any], key: str) -> Address:
    """The address that a backend has told. Raises the OttavaError that it has told instead."""
    if "error" in told:
        raise wire.error_of(told)
    return Address(key=key, **told)


class Local:
    """Starts backends on this machine, their sockets in a folder that is open to this user alone. said: see above."""

    def __init__(self, said: Callable[[bytes], object] | None = None):
        self._folder, self._said = Path(tempfile.mkdtemp(prefix="ottava-")), said

    async def start(self, order: Order) -> LocalProcess:
        path = self._folder / f"{order.name}.sock"
        path.unlink(missing_ok=True)
        args: dict[str, Any] = {"model": order.folder, "socket": str(path), "slots": order.slots}
        module = "ottava.gateway.backend"
        if order.engine.kind != EMBEDDED:
            module, args["engine"] = "ottava.gateway.vllm", asdict(order.engine)
        if order.host:
            args |= {"host": order.host, "digest": order.digest}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            json.dumps(args),
            stdin=asyncio.subprocess.PIPE,  # kept open: its end is the backend's
            stdout=asyncio.subprocess.PIPE,  # signs of life while it loads
            stderr=None if self._said is None else asyncio.subprocess.PIPE,
            env={**os.environ, **({} if order.threads is None else {"OMP_NUM_THREADS": str(order.threads)})},
            start_new_session=True,  # Ctrl-C is for the gateway, which then lets requests finish
        )
        if order.host:  # not on the command line, which every user of the machine can read
            assert process.stdin is not None
            process.stdin.write(order.key.encode() + b"\n")
        return LocalProcess(process, path, order.key, self._said or (lambda text: None))

    async def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
