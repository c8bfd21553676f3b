"""The launcher of one machine: asks the zygote for processes and keeps their exit statuses."""

from __future__ import annotations

import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ottava import errors, platforms
from ottava.context import Launcher, Process
from ottava.errors import LauncherGone, OttavaError, PlatformError, ResourceError
from ottava.recipe import Pool
from ottava.supervisor.zygote import UNWRITTEN

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class LocalProcess:
    """A forked worker. log: its output; result: what its function returned, once it has exited."""

    node = None

    def __init__(self, launcher: LocalLauncher, pid: int, log: Path, result: Path):
        self._launcher, self.pid, self.log, self._result = launcher, pid, log, result

    def alive(self) -> bool:
        """True until the exit status is known."""
        return self._launcher.status(self.pid) is None

    def wait(self, timeout: float | None = None) -> int | None:
        """The exit status (negative: minus the signal), or None when it still runs after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self._launcher.status(self.pid, wait=0.02)) is None:
            if deadline is not None and time.monotonic() >= deadline:
                return None
        return status

    def terminate(self) -> None:
        self._launcher.signal(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        self._launcher.signal(self.pid, signal.SIGKILL)

    def result(self) -> dict[str, Any]:
        """What the function returned. Raises the OttavaError that it raised, or PlatformError if it died."""
        status = self.wait()
        try:
            outcome: dict[str, Any] = json.loads(self._result.read_text())
        except FileNotFoundError:
            if status == UNWRITTEN:
                fix = "free some space or choose another place for the output, then run again"
                raise ResourceError(
                    "a worker could not write its result: is the disk full?", where=self._result.parent, fix=fix
                ) from None
            raise PlatformError(_epitaph(status, self.log), where=self.log) from None
        finally:
            self._result.unlink(missing_ok=True)
        return answer(outcome)


def answer(outcome: Mapping[str, Any]) -> dict[str, Any]:
    """What a worker's function returned; raises the OttavaError that it raised."""
    if "error" in outcome:
        error = outcome["error"]
        kind = getattr(errors, error["type"], OttavaError)
        raise kind(error["what"], where=error["where"], fix=error["fix"])
    result: dict[str, Any] = outcome["result"]
    return result


def _epitaph(status: int | None, log: Path) -> str:
    if status is not None and status < 0:
        return f"a worker was killed by {signal.Signals(-status).name}"
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    said = [line for line in lines if line.strip() and not line[0].isspace()]  # an error's own line; more may follow it
    return f"a worker died with status {status}" + (f": {said[-1].strip()}" if said else "")


def _gone() -> LauncherGone:
    return LauncherGone("the process that starts workers is gone", fix="run the same command again")


class LocalLauncher:
    """Starts functions by name in processes of this machine. Use as a context manager.

    server: the `address` of another launcher, whose warm process is then used too; None: one of its own. tag: part of
    the name of every log; keeps machines apart that write into one folder.
    """

    host = "127.0.0.1"

    def __init__(self, server: str | None = None, tag: str = "") -> None:
        self._server, self._tag = server, tag
        self._folder: TemporaryDirectory[str] | None = None
        self._lock = threading.RLock()
        self._ids = itertools.count()
        self._buffer = b""
        self._statuses: dict[int, int] = {}
        self._pids: dict[int, int] = {}
        self._zygote: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """Where other processes of this user may ask the same warm process for workers."""
        assert self._server is not None, "the launcher was not entered"
        return self._server

    def __enter__(self) -> LocalLauncher:
        self._ready = False
        if self._server is not None:
            self._control = socket.socket(socket.AF_UNIX)
            self._control.connect(self._server)
            return self
        ours, theirs = socket.socketpair()
        self._folder = TemporaryDirectory(prefix="ottava-")
        self._server = str(Path(self._folder.name) / "zygote")
        environment = {**os.environ, **dict.fromkeys(THREADS, "1"), "TOKENIZERS_PARALLELISM": "false"}
        environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # a broken vendor plug-in must not break the CPU pools
        self._zygote = subprocess.Popen(
            [sys.executable, "-m", "ottava.supervisor.zygote", str(theirs.fileno()), self._server],
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
        theirs.close()
        self._control = ours
        return self

    def __exit__(self, *_: object) -> None:
        self._control.close()
        if self._zygote is not None:
            self._zygote.wait()
        if self._folder is not None:
            self._folder.cleanup()

    def warm(self) -> None:
        """Return when workers can be forked. Raises LauncherGone."""
        with self._lock:
            while not self._ready:
                self._pump(1.0)

    def spawn(
        self,
        target: str,
        args: Mapping[str, Any],
        *,
        pool: Pool | None,
        logs: Path,
        env: Mapping[str, str] = {},
    ) -> LocalProcess:
        """Start one process with the pool's environment and run `package.module:function` with `args` in it.

        It is a fork of a warm process, or, where the platform cannot be forked, one that waited with its device open.
        """
        number = next(self._ids)
        name = f"{target.rpartition('.')[2].replace(':', '.')}-{self._tag}{os.getpid()}-{number}"
        logs.mkdir(parents=True, exist_ok=True)
        log, result = logs / f"{name}.log", logs / f"{name}.result"
        request = {
            "id": number,
            "target": target,
            "args": dict(args),
            "env": {**dict.fromkeys(THREADS, "1"), **(pool.env if pool else {}), **env},
            "log": str(log),
            "result": str(result),
            "standby": _standby(pool, env),
        }
        with self._lock:
            self._send(request)
            while number not in self._pids:
                self._pump(1.0)
            return LocalProcess(self, self._pids.pop(number), log, result)

    def call(
        self,
        target: str,
        args: Mapping[str, Any],
        *,
        pool: Pool | None = None,
        workers: int = 1,
        logs: Path,
    ) -> list[dict[str, Any]]:
        """Run a function in `workers` processes that can form a process group; their results by rank.

        When one fails, the others are killed and its error is raised.
        """
        return call_group(self, target, args, pool=pool, workers=workers, logs=logs)

    def rendezvous(self, pool: Pool | None, workers: int, chips: Sequence[int] = ()) -> list[dict[str, str]]:
        """The environment of each rank of a group on this machine, which sees its own chip alone."""
        seen = list(chips) or range(workers)
        return [{**env, **visible(pool, chip)} for env, chip in zip(rendezvous(workers), seen, strict=True)]

    def status(self, pid: int, wait: float = 0.0) -> int | None:
        """The exit status of a child, or None while it runs; waits up to `wait` seconds for news."""
        with self._lock:
            if pid not in self._statuses:
                self._pump(wait)
            return self._statuses.get(pid)

    def signal(self, pid: int, number: int) -> None:
        """Send a signal to a child, if it still runs."""
        with self._lock:
            self._send({"kill": pid, "signal": number})

    def _send(self, message: Mapping[str, Any]) -> None:
        while not self._ready:
            self._pump(1.0)
        try:
            self._control.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            raise _gone() from None

    def _pump(self, timeout: float) -> None:
        readable, _, _ = select.select([self._control], [], [], timeout)
        if not readable:
            return
        try:
            data = self._control.recv(1 << 16)
        except ConnectionResetError:  # it ended with requests unread
            data = b""
        if not data:
            raise _gone()
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "ready" in message:
                self._ready = True
            elif "exit" in message:
                self._statuses[message["exit"]] = message["status"]
            else:
                self._pids[message["id"]] = message["pid"]
                self._statuses.pop(message["pid"], None)  # of a process that had this number before


def call_group(
    launcher: Launcher, target: str, args: Mapping[str, Any], *, pool: Pool | None, workers: int, logs: Path
) -> list[dict[str, Any]]:
    """Run a function in `workers` processes of any launcher; their results by rank. None is left alive."""
    group: list[Process] = []
    try:
        for env in launcher.rendezvous(pool, workers):
            group.append(launcher.spawn(target, args, pool=pool, logs=logs, env=env))
        waiting = list(group)
        while waiting:
            done = [p for p in waiting if p.wait(0.02 / len(waiting)) is not None]
            for process in done:
                waiting.remove(process)
                if process.wait() != 0:
                    process.result()
                    raise PlatformError(_epitaph(process.wait(), process.log), where=process.log)
        return [process.result() for process in group]
    finally:
        for process in group:
            if process.alive():
                process.kill()
                process.wait()


def visible(pool: Pool | None, chip: int) -> dict[str, str]:
    """The environment in which a worker sees one chip of its machine, where its platform has such a variable."""
    return {} if pool is None else platforms.get(pool.platform).visible_env([chip])


def _standby(pool: Pool | None, env: Mapping[str, str]) -> dict[str, Any] | None:
    """What kind of standby a worker must have been, and how many are to wait; None where it is forked instead."""
    platform = None if pool is None else platforms.get(pool.platform)
    if pool is None or platform is None or platform.forks:
        return None
    fixed = {**dict.fromkeys(THREADS, "1"), **pool.env}  # what decides bits is read when the device is opened
    seen = {k: v for k, v in env.items() if k == platform.visible}
    keep = 1 if seen else int(env.get("LOCAL_WORLD_SIZE", "1"))
    return {"platform": pool.platform, "env": fixed | seen, "keep": keep}


def free_port(address: str = "127.0.0.1") -> int:
    """A TCP port that nobody listens on now at an address of this machine."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
        return port


def rendezvous(workers: int) -> list[dict[str, str]]:
    """The environment of each rank of a process group on this machine, in torchrun's variables."""
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(workers),
        "LOCAL_WORLD_SIZE": str(workers),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(workers)]
