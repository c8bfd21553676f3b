"""A process that has torch and the model classes imported and forks workers on request.

A fresh interpreter spends seconds on imports before its first step; a fork spends milliseconds.
Nothing here runs a tensor operation, so a child may still choose its instruction set and thread
count through its environment (these are read at the first operation), and no OpenMP pool exists
that a fork could break. The process dies with its owner: the end of the control socket is the
order to kill every child.

Run as `python -m ottava.supervisor.zygote FD`; messages are JSON lines over the socket FD.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
WARM = ("torch", "torch.distributed", "transformers.models.deepseek_v3", "transformers.models.llama")


def main() -> None:
    """Serve fork requests until the owner goes away."""
    control = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for module in WARM:
        with suppress(ImportError):
            importlib.import_module(module)
    _materialise_lazy_imports()
    gc.freeze()
    children: set[int] = set()
    with suppress(BrokenPipeError, ConnectionResetError):  # the owner died while it was being told something
        _serve(control, children)
    for pid in children:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _serve(control: socket.socket, children: set[int]) -> None:
    _send(control, {"ready": os.getpid()})
    buffer = b""
    while True:
        readable, _, _ = select.select([control], [], [], 0.01 if children else 1.0)
        if readable:
            data = control.recv(1 << 16)
            if not data:
                return
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                _handle(control, children, json.loads(line))
        _reap(control, children)


def _materialise_lazy_imports() -> None:
    with suppress(ImportError):
        from transformers.models.deepseek_v3 import DeepseekV3ForCausalLM  # noqa: F401
        from transformers.models.llama import LlamaForCausalLM  # noqa: F401


def _handle(control: socket.socket, children: set[int], request: dict[str, Any]) -> None:
    if "kill" in request:
        pid = int(request["kill"])
        if pid in children:  # reaped here alone, so the number cannot belong to a stranger
            with suppress(ProcessLookupError):
                os.kill(pid, int(request["signal"]))
        return
    pid = os.fork()
    if pid == 0:
        control.close()
        _child(request)
    children.add(pid)
    _send(control, {"id": request["id"], "pid": pid})


def _reap(control: socket.socket, children: set[int]) -> None:
    while children:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        children.discard(pid)
        _send(control, {"exit": pid, "status": os.waitstatus_to_exitcode(status)})


def _send(control: socket.socket, message: dict[str, Any]) -> None:
    control.sendall(json.dumps(message).encode() + b"\n")


def _child(request: dict[str, Any]) -> None:
    """In the fork: take the pool's environment, run the target, write its result, never return."""
    status = 70
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1:
            os._exit(status)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.environ.update(request["env"])
        status = _run(request)
    except BaseException:
        traceback.print_exc()
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
        traceback.print_exc()
        result = {"error": _describe(error)}
        code = error.exit_code
    except OSError as error:
        traceback.print_exc()
        result = {"error": _describe(from_os_error(error, "running " + request["target"]))}
        code = 2
    with replacing(Path(request["result"])) as part:
        part.write_text(json.dumps(result))
    return code


def _describe(error: Any) -> dict[str, Any]:
    return {"type": type(error).__name__, "what": error.what, "where": error.where, "fix": error.fix}


if __name__ == "__main__":
    main()
    os._exit(0)  # a library that was imported for the children would tell of its leaks here
