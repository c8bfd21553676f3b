"""A warm process that forks workers of NPUs on host memory, and whose workers fail on order (test_drills.py).

torch_npu is loaded in it and no device is open, so a worker costs milliseconds where a fresh one spends five seconds of
processor time on imports. On host memory a driver's state cannot be broken by a fork; on a chip it can, which is why
Ottava starts such workers fresh. `launcher` gives the tests such a process; in it standbys wait and are taken as always
(supervisor/standby.py), only that each is a fork. test_standby.py has fresh ones.

What to do stands in a worker's environment, ORDER: `code=507015 place=boundary step=2 rank=1`. At that step and place
the rank gets a rule for the stand-in, and the next call that the rule names returns the code.

Run as `python -m tests.npu.zygote FD PATH`.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ottava.supervisor import standby, zygote
from ottava.supervisor.local import THREADS, LocalLauncher

ORDER = "TESTS_NPU_ORDER"
RULES = "HOST_CANN_FAULTS"
NONE = ""
"""Rules have to be there from the first call on, if only none."""

PLACES = {
    "boundary": ("kept", "call=aclrtSynchronizeStreamWithTimeout code={code}"),
    "collective": (
        "reduce",
        "call=HcclBatchSendRecv code={code} later=1",
    ),  # the exchange itself, in its stream's order
    "launch": ("reduce", "call=HcclBatchSendRecv code={code}"),  # at the call, as HCCL's own codes come
}
"""Where a code comes: the worker's phase in which the rule is given, and the rule."""


@contextmanager
def launcher() -> Iterator[LocalLauncher]:
    """A launcher whose workers are forks of such a process."""
    ours, theirs = socket.socketpair()
    with TemporaryDirectory(prefix="npu-") as folder, ours:
        path = str(Path(folder) / "zygote")
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.npu.zygote", str(theirs.fileno()), path],
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **dict.fromkeys(THREADS, "1"), "TOKENIZERS_PARALLELISM": "false", RULES: NONE},
        )
        theirs.close()
        assert b"ready" in ours.recv(1000)
        with LocalLauncher(server=path) as made:
            yield made
        ours.close()
        process.wait(60)


def fork_standby(its: dict[str, Any]) -> zygote.Standby:
    """In the place of `zygote._start`."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            null = os.open(os.devnull, os.O_RDWR)
            for number in range(3):
                os.dup2(null, number)
            os.closerange(3, theirs.fileno())
            os.closerange(theirs.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
            os.environ.update(its["env"])
            sys.argv = ["standby", str(theirs.fileno()), its["platform"]]
            standby.main()
        finally:
            os._exit(0)
    theirs.close()
    return zygote.Standby(pid, ours)


def calm() -> None:
    """Let torch_npu's thread that gives back what a queue is done with sleep 5 ms where it asks for a microsecond.

    It never waits for news, so that every process with an open device would take a tenth of a core for nothing. Where
    this user may not say so (it needs the right to nice), the tests are only slower.
    """
    for thread in os.listdir("/proc/self/task"):
        with suppress(OSError):
            if Path(f"/proc/self/task/{thread}/comm").read_text() == "release_thread\n":
                Path(f"/proc/{thread}/timerslack_ns").write_text("5000000")


def main() -> None:
    import torch_npu  # noqa: F401  (loaded before the forks)

    from ottava.platforms.npu import Npu
    from ottava.trainer import worker

    enter, warm = worker.Worker._enter, Npu.warm

    def calmly(self: Npu) -> None:
        warm(self)
        calm()

    def obedient(self: worker.Worker, phase: str) -> None:
        order = dict(word.split("=") for word in os.environ.get(ORDER, "").split())
        step = self.trainer.state.step + (phase == "reduce")  # of a step that is done, or that is under way
        if order and (int(order["step"]), int(order["rank"])) == (step, self.group.rank):
            where, rule = PLACES[order["place"]]
            if where == phase:
                os.environ[RULES] = rule.format(code=order["code"])
        calm()
        enter(self, phase)

    Npu.warm = calmly  # type: ignore[method-assign]
    worker.Worker._enter = obedient  # type: ignore[method-assign]
    zygote._start = fork_standby
    zygote.main()


if __name__ == "__main__":
    main()
