"""Where each living worker stands: its stack, from whoever can give it, and what /proc says of it.

py-spy looks into a process from outside, if it is installed. Otherwise a worker whose faulthandler is registered for
SIGUSR1 writes its stack to its log, even when it is stuck in native code:

    faulthandler.enable(); faulthandler.register(signal.SIGUSR1, all_threads=True)
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ottava.supervisor.causes import Facts, RankFacts, Seen
from ottava.supervisor.observe import catches, describe, noting

OWN_S = 1.5  # seconds for all workers together
PY_SPY_S = 5.0
MOST_BYTES = 64 << 10


def collect(facts: Facts, seen: Seen, notes: list[str]) -> dict[str, str]:
    """Texts by file name: `rank-R.proc.txt` of every living worker here and `rank-R.txt` of those whose stack is had.

    notes: gets a line for each living worker whose stack is not.
    """
    living = [rank for rank in facts.ranks if rank.status is None and rank.here and seen.states.get(rank.rank)]
    out = {f"rank-{rank.rank}.proc.txt": describe(rank.pid) for rank in living}
    found: dict[int, str] = {}
    spy, until = shutil.which("py-spy"), time.monotonic() + PY_SPY_S
    for rank in living if spy else ():
        what = f"py-spy of rank {rank.rank}"
        found[rank.rank] = noting(notes, what, lambda pid=rank.pid: _spied(str(spy), pid, until), "")  # type: ignore[misc]
    left = [rank for rank in living if not found.get(rank.rank) and not _stopped(rank, seen)]
    none: dict[int, str] = {}
    found.update(noting(notes, "the workers' own stacks", lambda: _asked(left), none))
    for rank in facts.ranks:
        if not found.get(rank.rank):
            found[rank.rank] = noting(notes, f"the stacks of rank {rank.rank}", lambda r=rank: _given(r), "")  # type: ignore[misc]
    for rank in living:
        if not found.get(rank.rank):
            why = "it is stopped" if _stopped(rank, seen) else "it does not answer SIGUSR1"
            notes.append(f"the stack of rank {rank.rank}: {why}, and py-spy {'failed' if spy else 'is not installed'}")
    return out | {f"rank-{number}.txt": text for number, text in sorted(found.items()) if text}


def _stopped(rank: RankFacts, seen: Seen) -> bool:
    return seen.states.get(rank.rank) in ("T", "t")


def _given(rank: RankFacts) -> str:
    return _from(rank.stacks, 0) if rank.stacks is not None and rank.stacks.exists() else ""


def _spied(spy: str, pid: int, until: float) -> str:
    limit = until - time.monotonic()
    if limit <= 0:
        return ""
    command = [spy, "dump", "--nonblocking", "--pid", str(pid)]
    done = subprocess.run(command, capture_output=True, timeout=limit, stdin=subprocess.DEVNULL)
    return done.stdout.decode(errors="replace") if done.returncode == 0 else ""


def _asked(ranks: Sequence[RankFacts]) -> dict[int, str]:
    """Send SIGUSR1 and read what the workers add to their logs. One without a handler would die of it: not asked."""
    asked: dict[int, tuple[Path, int]] = {}
    for rank in ranks:
        if rank.log is not None and rank.log.exists() and catches(rank.pid, signal.SIGUSR1):
            asked[rank.rank] = rank.log, rank.log.stat().st_size
            with suppress(ProcessLookupError):
                os.kill(rank.pid, signal.SIGUSR1)
    until, out = time.monotonic() + OWN_S, dict.fromkeys(asked, "")
    while asked and time.monotonic() < until:
        time.sleep(0.05)
        now = {number: _from(path, start) for number, (path, start) in asked.items()}
        if all(now.values()) and now == out:  # all have answered, and none is still writing
            break
        out = now
    return out


def _from(path: Path, start: int) -> str:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(MOST_BYTES).decode(errors="replace")
