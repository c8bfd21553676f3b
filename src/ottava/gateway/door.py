"""Where a backend listens: a unix socket that its user alone can reach, or a port on the cluster's network, with a key.

Both take the lines of `wire`. On a network a question is the body of an HTTP request that shows the key of this one
start, and the answer the body of its response, so that whoever comes without the key gets a plain 401. Nothing is read
of a stranger but a short header, for a short time.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ottava.gateway import wire

HEAD = 8192
"""Bytes that a request's header may have."""
STRANGER_SECONDS = 10.0
"""Until a connection has shown its key."""
STRANGERS = 256
"""Connections at a time that have not shown it. One more closes the oldest: the gateway shows its key at once, so that
whoever says nothing cannot keep it out."""
BACKLOG = 4096  # connections that may come before one is looked at; a full one would look like a backend that is gone

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass(frozen=True)
class Address:
    """A backend as the gateway reaches it: a socket's path, or host, port and key."""

    path: Path | None = None
    host: str = ""
    port: int = 0
    key: str = field(default="", repr=False)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection for one question. Raises OSError."""
        if self.path is not None:
            return await asyncio.open_unix_connection(self.path, limit=wire.LONGEST)
        return await asyncio.open_connection(self.host, self.port, limit=wire.LONGEST)

    def question(self, line: bytes) -> bytes:
        """What is to be written to ask a line."""
        if self.path is not None:
            return line
        head = f"POST / HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nAuthorization: Bearer {self.key}\r\n"
        return f"{head}Content-Length: {len(line)}\r\nConnection: close\r\n\r\n".encode() + line

    async def greeted(self, reader: asyncio.StreamReader) -> None:
        """Read up to the first line of the answer. Raises ConnectionError where the question was not let in."""
        if self.path is not None:
            return
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            raise ConnectionError("it hung up") from None
        if not head.startswith(b"HTTP/1.1 200 "):
            raise ConnectionError(f"it answered: {head.splitlines()[0].decode(errors='replace')}")


@dataclass
class Door:
    """A port at `host`, an address of this machine, that opens to `key` alone."""

    host: str
    key: str = field(repr=False)
    _strangers: dict[asyncio.Timeout, None] = field(default_factory=dict, repr=False)  # the oldest first

    def __post_init__(self) -> None:
        if not self.key:
            raise ValueError("a port without a key would be open to everybody")

    async def listen(self, serve: Serve) -> tuple[asyncio.Server, bytes]:
        """The server, and the line that tells its address."""
        server = await asyncio.start_server(serve, self.host, 0, limit=HEAD, backlog=BACKLOG)
        host, port = server.sockets[0].getsockname()[:2]
        return server, wire.line({"host": host, "port": port})

    async def question(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes | None:
        """The line that was asked, once the key was shown and the answer's header written; None: sent away."""
        try:
            async with asyncio.timeout(STRANGER_SECONDS) as waits:
                with self._counted(waits):
                    status, length = self._weighed(await reader.readuntil(b"\r\n\r\n"))
        except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            return None
        if status != "200 OK":
            said = json.dumps({"error": {"message": status, "type": "invalid_request_error"}}).encode()
            more = f"WWW-Authenticate: Bearer\r\nContent-Type: application/json\r\nContent-Length: {len(said)}\r\n"
            writer.write(f"HTTP/1.1 {status}\r\n{more}Connection: close\r\n\r\n".encode() + said)
            return None
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nConnection: close\r\n\r\n")
        try:
            return await reader.readexactly(length)
        except asyncio.IncompleteReadError:
            return None

    @contextmanager
    def _counted(self, waits: asyncio.Timeout) -> Iterator[None]:
        while len(self._strangers) >= STRANGERS:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            if not oldest.expired():
                oldest.reschedule(0.0)
        self._strangers[waits] = None
        try:
            yield
        finally:
            self._strangers.pop(waits, None)

    def _weighed(self, head: bytes) -> tuple[str, int]:
        """The status for a request's header, and the length of its body. The key is compared in constant time."""
        said = re.search(rb"\r\nauthorization:[ \t]*bearer[ \t]+([^\r\n]*)\r\n", head, re.IGNORECASE)
        if not hmac.compare_digest(said[1].strip() if said else b"", self.key.encode()):
            return "401 Unauthorized", 0
        length = re.search(rb"\r\ncontent-length:[ \t]*(\d{1,9})[ \t]*\r\n", head, re.IGNORECASE)
        if length is None or int(length[1]) > wire.LONGEST:
            return "400 Bad Request", 0
        return "200 OK", int(length[1])
