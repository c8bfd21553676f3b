"""The supervisor's end of its workers' lines: admits one epoch's workers, hears them, renews their leases.

A thread of its own, so that leases are renewed while the supervisor hashes or writes. A worker of another epoch, or
without the token, is told to leave: it may do nothing in this run any more.
"""

from __future__ import annotations

import hmac
import json
import queue
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import UnionType
from typing import Any

from ottava import link

LEASE_S = 5.0
"""How long a worker lives that hears nothing. A line that is cut ends it at once."""

LONGEST = 1 << 20  # bytes of one line


@dataclass
class _Line:
    """One connection. rank: None until it said hello in this epoch with the token."""

    socket: socket.socket
    rank: int | None = None
    buffer: bytes = b""


@dataclass
class _Members:
    """Who may speak now. world: ranks are below it; None: any."""

    epoch: int = 0
    world: int | None = None
    lines: dict[int, _Line] = field(default_factory=dict)


_NEEDED = {
    "beat": ("step", "phase"), "step": ("step",), "alarm": ("kind", "step", "message"), "bye": ("step",),
    "look": ("step", "ids", "run", "baseline"), "injected": ("number", "kind", "step"), "saved": ("step",),
    "unsaved": ("step",), "rejected": ("step",),
}  # fmt: skip
_KINDS: tuple[tuple[type | UnionType, str, tuple[str, ...]], ...] = (
    (str, "text", ("say", "kind", "message", "phase", "path", "digest", "numerics_class", "node", "at")),
    (int, "a whole number", ("step", "number", "chip", "world", "pid")),
    (int | float, "a number", ("seconds", "compute_s", "loss", "direct_loss", "norm")),
    (list, "a list", ("ids", "run", "baseline", "ranks")),
)


def mistake(message: Mapping[str, Any], world: int | None = None) -> str | None:
    """What is wrong with a worker's line, as `link` sends them; None where nothing is."""
    for name in _NEEDED.get(str(message.get("say")), ()):
        if message.get(name) is None:
            return f"{message['say']!r} without {name!r}"
    for kind, called, names in _KINDS:
        for name in names:
            value = message.get(name)
            if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
                return f"{name} is {value!r} and must be {called}"
    for rank in message.get("ranks") or ():
        if type(rank) is not int or rank < 0 or (world is not None and rank >= world):
            return f"{rank!r} is no rank of this group"
    return None


class Hub:
    """Use as a context manager. Messages are those of `link`, each with `t`, the monotonic time it was heard."""

    def __init__(self, host: str = "127.0.0.1", lease_s: float = LEASE_S):
        self._lease_s, self._token = lease_s, secrets.token_hex(16)
        self._messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._lock = threading.RLock()
        self._members = _Members()
        self._server = socket.create_server((host, 0), backlog=256)
        self._server.setblocking(False)
        self._wake, self._waker = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="ottava-hub", daemon=True)
        self.address = f"{host}:{self._server.getsockname()[1]}"

    def __enter__(self) -> Hub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._waker.close()
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    def admit(self, epoch: int, world: int | None = None) -> dict[str, str]:
        """From now on only workers of `epoch` are heard, `world` of them; the others are told to leave.

        Returns their environment.
        """
        with self._lock:
            for line in self._members.lines.values():
                _tell(line, {"do": "leave"})
            self._members = _Members(epoch, world)
        return {
            link.ADDRESS: self.address,
            link.TOKEN: self._token,
            link.EPOCH: str(epoch),
            link.LEASE: str(self._lease_s),
        }

    def hear(self, timeout: float) -> list[dict[str, Any]]:
        """What was said since the last call; waits up to `timeout` seconds for the first."""
        out = []
        with suppress(queue.Empty):
            out.append(self._messages.get(timeout=timeout))
            while True:
                out.append(self._messages.get_nowait())
        return [message for message in out if message["epoch"] == self._members.epoch]

    def tell(self, do: str, rank: int | None = None, **fields: Any) -> None:
        """Tell one worker, or all."""
        with self._lock:
            for number, line in self._members.lines.items():
                if rank is None or number == rank:
                    _tell(line, {"do": do, **fields})

    def _serve(self) -> None:
        renewed = 0.0
        while True:
            for key, _ in self._selector.select(self._lease_s / 10):
                if key.fileobj is self._wake:
                    return
                if key.fileobj is self._server:
                    with suppress(OSError):
                        connection, _ = self._server.accept()
                        connection.settimeout(1.0)
                        self._selector.register(connection, selectors.EVENT_READ, _Line(connection))
                else:
                    self._read(key.data)
            if time.monotonic() - renewed > self._lease_s / 10:
                renewed = time.monotonic()
                self.tell("lease")

    def _read(self, line: _Line) -> None:
        try:
            data = line.socket.recv(1 << 16)
        except OSError:
            data = b""
        *whole, line.buffer = (line.buffer + data).split(b"\n")
        for text in whole:
            try:
                self._take(line, json.loads(text))
            except (ValueError, KeyError, TypeError, AttributeError):
                data = b""  # no worker of ours: hang up
        if not data or len(line.buffer) > LONGEST:
            self._selector.unregister(line.socket)
            line.socket.close()
            with self._lock:
                if line.rank is not None and self._members.lines.get(line.rank) is line:
                    del self._members.lines[line.rank]

    def _take(self, line: _Line, message: Mapping[str, Any]) -> None:
        with self._lock:
            if message["say"] == "hello":
                known = hmac.compare_digest(str(message["token"]).encode(), self._token.encode())
                rank, world = int(message["rank"]), self._members.world
                if known and message["epoch"] == self._members.epoch and rank >= 0 and (world is None or rank < world):
                    line.rank = rank
                    self._members.lines[line.rank] = line
                    _tell(line, {"do": "lease"})
                else:
                    _tell(line, {"do": "leave"})
            if line.rank is None or (message["rank"], message["epoch"]) != (line.rank, self._members.epoch):
                return
            heard = {key: value for key, value in message.items() if key != "token"}
            wrong = mistake(heard, self._members.world)
            if wrong is not None:
                said = f"rank {line.rank} sent a line that is no message: {wrong}"
                heard = {"say": "alarm", "kind": "error", "step": -1, "message": said, "rank": line.rank,
                         "epoch": self._members.epoch}  # fmt: skip
        self._messages.put({**heard, "t": time.monotonic()})
        if wrong is not None:
            raise ValueError(wrong)


def _tell(line: _Line, message: Mapping[str, Any]) -> None:
    with suppress(OSError):  # it is gone: its exit status says so
        line.socket.sendall(json.dumps(message, separators=(",", ":")).encode() + b"\n")
