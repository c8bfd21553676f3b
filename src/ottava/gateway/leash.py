"""Runs a command so that nothing of it is left behind, however the processes around it end.

vLLM's engine and workers go on, with their memory, when their server is killed (seen with 0.32.0), and segments of
shared memory may stay when all of them are. So its server is started through this one, which knows all that came of
it. It needs the standard library alone: `python -I leash.py SCRATCH COMMAND...` ends, with all that came of the command
and the folder SCRATCH, when the command or its own standard input ends.
"""

from __future__ import annotations

import ctypes
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

SET_PDEATHSIG, SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
GRACE = 5.0
"""Seconds that processes have to end by themselves before they are killed."""


def main() -> int:
    """Run the command of the arguments; its status."""
    adopt()
    scratch, *command = sys.argv[1:]
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        start_new_session=True,
        preexec_fn=partial(die_with_parent, os.getpid()),
    )
    while child.poll() is None and not select.select([0], [], [], 0.1)[0]:
        pass
    status = 1 if child.returncode is None else child.returncode & 0xFF
    end()
    shutil.rmtree(scratch, ignore_errors=True)
    return status


def adopt() -> None:
    """Have whoever descends from this process and loses its parent become its child."""
    ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with_parent(parent: int) -> None:
    """Have this process killed when the thread that started it ends, though it be stopped by then; and now, if its
    parent has ended before that could be said."""
    ctypes.CDLL(None).prctl(SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def end() -> None:
    """End every descendant: asked first, killed after GRACE seconds; and unlink their shared memory."""
    asked = descendants(os.getpid())
    shared = {name for pid in asked for name in segments(pid)}
    _signal(asked, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    while left := descendants(os.getpid()):
        if time.monotonic() > deadline:
            _signal(left, signal.SIGKILL)
        with suppress(OSError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.05)
    for name in shared:
        with suppress(OSError):
            os.unlink(name)


def _signal(pids: list[int], number: int) -> None:
    for pid in pids:
        with suppress(OSError):
            os.kill(pid, number)


def descendants(pid: int) -> list[int]:
    """Processes that came of one, those that have ended but were not waited for among them."""
    found: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *descendants(child)]
    return found


def segments(pid: int) -> set[str]:
    """Python's segments of shared memory that a process has mapped."""
    with suppress(OSError):
        return set(re.findall(r"/dev/shm/psm_\w+", Path(f"/proc/{pid}/maps").read_text()))
    return set()


if __name__ == "__main__":
    sys.exit(main())
