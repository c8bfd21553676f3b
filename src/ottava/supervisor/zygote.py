"""A process that has torch and the model classes imported and starts workers on request.

A fresh interpreter spends seconds on imports before its first step; a fork spends milliseconds. Nothing here runs a
tensor operation, so a child may still choose its instruction set and thread count through its environment (these are
read at the first operation), and no OpenMP pool exists that a fork could break. Workers of an accelerator are no forks
but standbys, started fresh beforehand: see `standby`. When one is taken others are started, so that a group that fails
finds as many waiting.

The process dies with its owner: the end of the control socket is the order to kill every child. Other processes of the
owner's may ask for workers of their own over a Unix socket; when one of them goes away, its workers are killed. Each
worker leads a session, which ends with it; what left even that is adopted here, and ends when no worker is left.

Run as `python -m ottava.supervisor.zygote FD PATH`; messages are JSON lines over the socket FD or one that is opened
to PATH, which lies in a folder of the owner's alone.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
SWEEP_S = 5.0  # for what workers left behind to be gone
UNWRITTEN = 74
"""The exit status of a worker whose result could not be written (EX_IOERR of sysexits.h)."""

WARM = ("torch", "torch.distributed", "transformers.models.deepseek_v3", "transformers.models.llama")


def main() -> None:
    """Serve fork requests until the owner goes away."""
    control = socket.socket(fileno=int(sys.argv[1]))
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for module in WARM:
        with suppress(ImportError):
            importlib.import_module(module)
    _materialise_lazy_imports()
    gc.freeze()
    server = socket.socket(socket.AF_UNIX)
    server.bind(sys.argv[2])
    server.listen()
    _serve(Client(control), server)


@dataclass
class Standby:
    """A process that waits for a request."""

    pid: int
    control: socket.socket

    def send(self, request: dict[str, Any]) -> bool:
        """Make it a worker; False where it is gone."""
        try:
            self.control.sendall(json.dumps(request).encode() + b"\n")
        except OSError:
            return False
        finally:
            self.control.close()
        return True


_waiting: defaultdict[str, list[Standby]] = defaultdict(list)
"""Those that wait, by kind: platform and environment."""


@dataclass
class Client:
    """Somebody who asks for workers. children: those that live."""

    control: socket.socket
    children: set[int] = field(default_factory=set)
    buffer: bytes = b""

    def send(self, message: dict[str, Any]) -> None:
        with suppress(OSError):  # it is gone: the next read says so
            self.control.sendall(json.dumps(message).encode() + b"\n")

    def close(self) -> None:
        for pid in self.children:
            _signal(pid, signal.SIGKILL)
        self.control.close()


def _serve(owner: Client, server: socket.socket) -> None:
    """Until the owner goes away."""
    clients = [owner]
    owner.send({"ready": os.getpid()})
    while owner in clients:
        idle = 1.0 if not any(client.children for client in clients) else 0.01
        readable, _, _ = select.select([server, *(client.control for client in clients)], [], [], idle)
        if server in readable:
            clients.append(Client(server.accept()[0]))
            clients[-1].send({"ready": os.getpid()})
        for client in [client for client in clients if client.control in readable]:
            if not _listen(client, server, clients):
                clients.remove(client)
                client.close()
                server.close() if client is owner else None
        _reap(clients)
    for client in clients:
        client.close()
    _sweep()


def _listen(client: Client, server: socket.socket, clients: list[Client]) -> bool:
    """Do what a client asks; False where it is gone."""
    try:
        data = client.control.recv(1 << 16)
    except OSError:
        return False
    *lines, client.buffer = (client.buffer + data).split(b"\n")
    for line in lines:
        _handle(client, json.loads(line), [server, *(other.control for other in clients)])
    return bool(data)


def _materialise_lazy_imports() -> None:
    with suppress(ImportError):
        from transformers.models.deepseek_v3 import DeepseekV3ForCausalLM  # noqa: F401
        from transformers.models.llama import LlamaForCausalLM  # noqa: F401


def _handle(client: Client, request: dict[str, Any], ours: list[socket.socket]) -> None:
    if "kill" in request:
        pid = int(request["kill"])
        if pid in client.children:  # reaped here alone, so the number cannot belong to a stranger
            _signal(pid, int(request["signal"]))
        return
    pid = _fork(request, ours) if request["standby"] is None else _engage(request)
    client.children.add(pid)
    client.send({"id": request["id"], "pid": pid})


def _fork(request: dict[str, Any], ours: list[socket.socket]) -> int:
    pid = os.fork()
    if pid == 0:
        for inherited in ours:
            inherited.close()
        lead()
        become(request)
    return pid


def _signal(pid: int, number: int) -> None:
    """To a worker and all that it started in its session."""
    with suppress(ProcessLookupError):
        try:
            os.killpg(pid, number)
        except ProcessLookupError:  # it leads none yet
            os.kill(pid, number)


def _engage(request: dict[str, Any]) -> int:
    """Give the request to a standby of its kind, a fresh one where none waits, and start its successors."""
    standby = request["standby"]
    kind = _waiting[json.dumps([standby["platform"], standby["env"]], sort_keys=True)]
    while True:
        taken = kind.pop(0) if kind else _start(standby)
        if taken.send(request):
            break
    while len(kind) < standby["keep"]:
        kind.append(_start(standby))
    return taken.pid


def _start(standby: dict[str, Any]) -> Standby:
    """Not by `subprocess`, which would reap it behind this process's back."""
    ours, theirs = socket.socketpair()
    with theirs:
        os.set_inheritable(theirs.fileno(), True)
        command = [sys.executable, "-m", "ottava.supervisor.standby", str(theirs.fileno()), standby["platform"]]
        quiet = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in range(3)]
        pid = os.posix_spawn(command[0], command, {**os.environ, **standby["env"]}, file_actions=quiet)
    return Standby(pid, ours)


def _reap(clients: list[Client]) -> None:
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None:
            return
        pid = ended.si_pid
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # before its number may be somebody else's
        _, status = os.waitpid(pid, 0)
        for kind in _waiting.values():
            kind[:] = [standby for standby in kind if standby.pid != pid]
        for client in clients:
            if pid in client.children:
                client.children.discard(pid)
                if not any(other.children for other in clients):
                    _sweep()
                client.send({"exit": pid, "status": os.waitstatus_to_exitcode(status)})


def _sweep() -> None:
    """End what workers left behind in sessions of their own: nobody's any more, it has come to this process."""
    until = time.monotonic() + SWEEP_S
    while time.monotonic() < until:
        ours = {standby.pid for kind in _waiting.values() for standby in kind}
        left = [pid for pid in _children() if pid not in ours]
        if not left:
            return
        for pid in left:
            _signal(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _children() -> list[int]:
    me = os.getpid()
    with suppress(OSError):
        return list(map(int, Path(f"/proc/{me}/task/{me}/children").read_text().split()))
    return []


def lead() -> None:
    """In a child: lead a session, and be killed when the process that started this one ends, at once if it has."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:
        os._exit(70)
    os.setsid()


def become(request: dict[str, Any]) -> None:
    """Be the worker that is asked for: take the environment, run the target, write its result, never return."""
    status = 70
    try:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        faulthandler.enable()
        faulthandler.register(signal.SIGUSR1, all_threads=True)  # a supervisor may ask where this process stands
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.environ.update(request["env"])
        status = _run(request)
    except BaseException:
        _print_trace()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _run(request: dict[str, Any]) -> int:
    from ottava.artifact import replacing
    from ottava.errors import OttavaError, from_os_error

    module, _, name = request["target"].partition(":")
    try:
        result = {"result": getattr(importlib.import_module(module), name)(request["args"])}
        code = 0
    except OttavaError as error:
        _print_trace()
        result = {"error": describe(error)}
        code = error.exit_code
    except OSError as error:
        _print_trace()
        result = {"error": describe(from_os_error(error, "running " + request["target"]))}
        code = 2
    try:
        with replacing(Path(request["result"])) as part:
            part.write_text(json.dumps(result))
    except OSError:
        return UNWRITTEN
    return code


def _print_trace() -> None:
    with suppress(OSError):  # a full disk takes no log either
        traceback.print_exc()


def describe(error: Any) -> dict[str, Any]:
    """An OttavaError as plain data, to be raised again on the other side of a process boundary."""
    return {"type": type(error).__name__, "what": error.what, "where": error.where, "fix": error.fix}


if __name__ == "__main__":
    main()
    os._exit(0)  # a library that was imported for the children would tell of its leaks here
