"""What one node of a cluster runs for the supervisor: a warm process server, and a lease on its workers.

The agent forks workers as the launcher of one machine does, so exit statuses, signals, logs and the pool's environment
are the same. What it adds is the link to a supervisor elsewhere: news of ended workers is asked for with `beat`, and
each beat proves that the supervisor has had the answer to the one before. So the lease runs from the time of that
answer, by this node's own clock: however late a beat is delivered, a supervisor that has waited longer than the lease
since the last answer that it had knows that no worker runs here.

Nothing here knows Ray: `supervisor.ray` makes an actor of it, tests call it as it is. All messages are JSON text.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ottava.cluster import code, interface_of, move_to
from ottava.errors import LauncherGone, OttavaError, PlatformError, from_os_error
from ottava.recipe import Pool
from ottava.supervisor.local import LocalLauncher, LocalProcess, free_port
from ottava.supervisor.zygote import describe

BEAT_S = 0.25  # the longest that a beat waits for news
LOOK_S = 0.01  # between two looks at the workers


class Agent:
    """Workers of one node.

    setup: node (its name), address (its IP), folder (the supervisor's working folder), path (its PYTHONPATH, absolute),
    lease_s (how long workers may run without a beat). launcher: one that is started already, for tests.
    """

    def __init__(self, setup: str, launcher: LocalLauncher | None = None):
        told = json.loads(setup)
        self._address, self._lease = told["address"], float(told["lease_s"])
        if launcher is None:
            move_to(told["folder"], told["path"])
            launcher = LocalLauncher(tag=f"{told['node']}-").__enter__()
            self._owned: LocalLauncher | None = launcher
        else:
            self._owned = None
        self._launcher = launcher
        self._news = threading.Condition()
        self._open: dict[int, LocalProcess] = {}
        self._ended: list[dict[str, Any]] = []
        self._gone = False
        self._answered = self._known = (
            time.monotonic()
        )  # the last answer to a beat, and the last that is known to be had
        threading.Thread(target=self._watch, daemon=True).start()

    def hello(self) -> str:
        """{code: what `code` says here, interface: the one that has this node's address, or None}, once workers can be
        forked: a group that waits for imports would be taken for one that hangs."""
        self._launcher.warm()
        return json.dumps({"code": code(), "interface": interface_of(self._address)})

    def port(self, address: str) -> str:
        """A free TCP port at `address`, which is this node's own or loopback."""
        return json.dumps(free_port(address))

    def start(self, number: int, request: str) -> str:
        """Fork worker `number`; {pid, log, shared: whether the supervisor sees the same log}.

        request: target, args, env, pool, logs, marker (a file that the supervisor has just written beside the logs). A
        worker that cannot be started has ended, and beat tells why.
        """
        told = json.loads(request)
        logs, pool = Path(told["logs"]), told["pool"]
        shared = Path(told["marker"]).exists()
        try:
            process = self._launcher.spawn(
                told["target"], told["args"], pool=pool and Pool.model_validate(pool), logs=logs, env=told["env"]
            )
        except Exception as error:  # whatever it is, the supervisor waits for the end of this worker
            with self._news:
                self._gone = self._gone or isinstance(error, LauncherGone)
                self._end(number, 70, {"error": describe(_known(error))})
            return json.dumps({"pid": 0, "log": str(logs), "shared": shared})
        with self._news:
            self._open[number] = process
        return json.dumps({"pid": process.pid, "log": str(process.log), "shared": shared})

    def signal(self, number: int, name: int) -> None:
        """Send a signal to worker `number`, if it still runs."""
        process = self._open.get(number)
        if process is not None:
            with suppress(LauncherGone):
                self._launcher.signal(process.pid, name)

    def beat(self, seen: int) -> str:
        """The workers that ended after the first `seen`; waits up to BEAT_S for one. Renews the lease.

        {ended: [{number, status, outcome}], gone: True where the process that starts workers has died}. outcome is
        {result} or {error}, as `local.answer` takes it.
        """
        self._known = self._answered
        with self._news:
            self._news.wait_for(lambda: self._gone or len(self._ended) > seen, BEAT_S)
            self._answered = time.monotonic()
            return json.dumps({"ended": self._ended[seen:], "gone": self._gone})

    def close(self) -> None:
        """Kill the workers, and return when they are dead."""
        self._kill_all()
        if self._owned is not None:
            self._owned.__exit__()

    def _watch(self) -> None:
        try:
            while not self._gone:
                self._look()
                if self._open and time.monotonic() - self._known > self._lease:
                    self._kill_all()
                time.sleep(LOOK_S)
        except (LauncherGone, OSError, ValueError):  # ValueError: the control socket was closed
            with self._news:
                self._gone = True
                self._news.notify_all()

    def _look(self) -> None:
        for number, process in list(self._open.items()):
            status = self._launcher.status(process.pid)
            if status is not None:
                outcome = _outcome(process)
                with self._news:
                    del self._open[number]
                    self._end(number, status, outcome)

    def _end(self, number: int, status: int, outcome: dict[str, Any]) -> None:
        self._ended.append({"number": number, "status": status, "outcome": outcome})
        self._news.notify_all()

    def _kill_all(self) -> None:
        for number in list(self._open):
            self.signal(number, signal.SIGKILL)


def _known(error: Exception) -> OttavaError:
    if isinstance(error, OttavaError):
        return error
    if isinstance(error, OSError):
        return from_os_error(error, "starting a worker")
    return PlatformError(f"a worker could not be started: {type(error).__name__}: {error}")


def _outcome(process: LocalProcess) -> dict[str, Any]:
    try:
        return {"result": process.result()}
    except OttavaError as error:
        return {"error": describe(error)}
