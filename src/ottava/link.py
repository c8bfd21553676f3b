"""The worker's end of the line to its supervisor. Standard library only, so that any trainer can speak it.

A worker says what it does (JSON lines over TCP) and is told to go, to stop, or to leave. It holds a lease: the
supervisor renews it a few times a second; a worker whose lease ran out, or whose line is cut, ends at once, so that
no worker outlives its supervisor and none that was thought dead writes again. `docs/protocol.md` describes the lines.

    link = connect()                 # from the environment; without a supervisor everything below does nothing
    link.join(step=0)                # waits until the whole group is here
    while not link.stopping:
        ...; link.step(step, loss=loss)
        link.check()                 # before anything is written: raises LeaseLost where it ran out
    link.bye(step)
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

ADDRESS, TOKEN, EPOCH, LEASE = "OTTAVA_LINK", "OTTAVA_TOKEN", "OTTAVA_EPOCH", "OTTAVA_LEASE_S"
NODE, STATE = "OTTAVA_NODE", "OTTAVA_STATE"
"""The environment that a supervisor gives its workers, beside torchrun's RANK and WORLD_SIZE."""

EXIT_ALONE = 75
"""The exit status of a worker that lost its supervisor or its lease."""

BEAT_S = 0.2
JOIN_S = 600.0


class LeaseLost(RuntimeError):
    """This worker may write nothing any more: another one may be in its place."""


class Link:
    """One worker's line. phase: what it is doing, told with every beat; stopping: the supervisor asked for an end."""

    def __init__(self, address: tuple[str, int], token: str, rank: int, epoch: int, lease_s: float):
        self.rank, self.epoch, self.phase = rank, epoch, "start"
        self._lease_s, self._step = lease_s, -1
        self._until = time.monotonic() + lease_s
        self._go, self._stop, self._done = threading.Event(), threading.Event(), False
        self._cleared, self._word = -1, threading.Condition()
        self._lock = threading.Lock()
        self._socket = socket.create_connection(address, timeout=10)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.say("hello", token=token, pid=os.getpid(), node=os.environ.get(NODE, ""))
        self._thread = threading.Thread(target=self._listen, name="ottava-link", daemon=True)
        self._thread.start()

    @property
    def stopping(self) -> bool:
        """Whether the supervisor asked for an orderly end: keep the state, say bye, return."""
        return self._stop.is_set()

    def say(self, what: str, **fields: Any) -> None:
        """Send one line. A cut line is no error here: the listening thread ends the process."""
        line = json.dumps({"say": what, "rank": self.rank, "epoch": self.epoch, **fields}, separators=(",", ":"))
        with self._lock, suppress(OSError):
            self._socket.sendall(line.encode() + b"\n")

    def join(self, **facts: Any) -> None:
        """Say that this worker is ready, and wait until all of its group are."""
        self.phase = "join"
        self.say("join", **facts)
        if not self._go.wait(JOIN_S):
            self._leave("no word to go")

    def step(self, step: int, **facts: Any) -> None:
        """Say that a step is done and its state is kept."""
        self._step = step
        self.say("step", step=step, **facts)

    def clearance(self, step: int) -> bool:
        """Wait until the supervisor lets the run go on beyond this step, or wants its end: whether it goes on."""
        with self._word:
            self._word.wait_for(lambda: self._cleared >= step or self.stopping)
        return not self.stopping

    def alarm(self, kind: str, step: int, message: str, **facts: Any) -> None:
        """Say that something is wrong here: kind as in `supervisor.decide.KINDS`. The worker then ends by itself."""
        self.say("alarm", kind=kind, step=step, message=message, **facts)

    def check(self) -> None:
        """Raise LeaseLost where the lease ran out: call it right before a write."""
        if time.monotonic() > self._until:
            raise LeaseLost("the lease of this worker ran out")

    def bye(self, step: int, **facts: Any) -> None:
        """Say that the work is done; from now on a cut line is no fault."""
        self._done = True
        self.say("bye", step=step, **facts)

    def _listen(self) -> None:
        buffer, beat = b"", 0.0
        self._socket.settimeout(BEAT_S)
        while not self._done:
            now = time.monotonic()
            if now > self._until:
                self._leave("lease")
            if now - beat >= BEAT_S:
                beat = now
                self.say("beat", step=self._step, phase=self.phase)
            try:
                data = self._socket.recv(1 << 16)
            except TimeoutError:
                continue
            except OSError:
                data = b""
            if not data:
                self._leave("line")
                return
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                self._obey(json.loads(line))

    def _obey(self, message: Mapping[str, Any]) -> None:
        do = message.get("do")
        if do == "lease":
            self._until = time.monotonic() + self._lease_s
        elif do == "go":
            self._go.set()
        elif do in ("on", "stop"):
            with self._word:
                if do == "stop":
                    self._stop.set()
                else:
                    self._cleared = max(self._cleared, int(message["step"]))
                self._word.notify_all()
        elif do == "stacks":
            with suppress(OSError), Path(message["path"]).open("w") as file:
                faulthandler.dump_traceback(file)
        elif do == "leave":
            self._leave("order")

    def _leave(self, why: str) -> None:
        if not self._done:
            with suppress(OSError):
                os.write(2, f"ottava: the supervisor is gone ({why}); rank {self.rank} ends\n".encode())
            os._exit(EXIT_ALONE)


class Alone(Link):
    """The line of a worker without a supervisor: says nothing, waits for nobody, may always write."""

    def __init__(self) -> None:
        self.rank, self.epoch, self.phase = int(os.environ.get("RANK", "0")), 0, "start"

    @property
    def stopping(self) -> bool:
        return False

    def say(self, what: str, **fields: Any) -> None:
        pass

    def join(self, **facts: Any) -> None:
        pass

    def step(self, step: int, **facts: Any) -> None:
        pass

    def clearance(self, step: int) -> bool:
        return True

    def check(self) -> None:
        pass

    def bye(self, step: int, **facts: Any) -> None:
        pass


def connect() -> Link:
    """The line that the environment names; `Alone` where it names none."""
    if ADDRESS not in os.environ:
        return Alone()
    host, _, port = os.environ[ADDRESS].rpartition(":")
    rank, epoch = int(os.environ.get("RANK", "0")), int(os.environ[EPOCH])
    return Link((host, int(port)), os.environ[TOKEN], rank, epoch, float(os.environ[LEASE]))
