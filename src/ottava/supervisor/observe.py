"""What a machine says of its processes, memory, disks and kernel, for a diagnosis. Linux; what it hides is None.

Nothing here changes anything or waits for long: it is asked while a run stands still.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from ottava import platforms
from ottava.supervisor.causes import LOW_DISK, LOW_MEMORY, Facts, RankFacts, Seen

DMESG_S = 2.0
SHARED_MEMORY = Path("/dev/shm")

_STAMP = re.compile(r"^\[\s*[\d.]+\]\s*")
_KERNEL = re.compile(
    r"out of memory|oom-kill|killed process|hardware error|\bmce:|NVRM: Xid|EDAC|\bECC\b|fallen off the bus|segfault"
    r"|general protection|trap |traps:|I/O error",
    re.IGNORECASE,
)

Value = TypeVar("Value")


def noting(notes: list[str], what: str, act: Callable[[], Value], otherwise: Value) -> Value:
    """What `act` returns; where it fails, `otherwise`, with a line in `notes`. A diagnosis must not fail."""
    try:
        return act()
    except Exception as error:
        notes.append(f"{what}: {type(error).__name__}: {error}")
        return otherwise


def observe(facts: Facts, folder: Path, events: Iterable[dict[str, Any]]) -> tuple[Seen, list[str]]:
    """What can be seen now, and what could not. folder: the run's; events: the end of its journal."""
    notes: list[str] = []
    processes = {rank.rank: process(rank.pid) for rank in facts.ranks if rank.here and rank.status is None}
    seen = Seen(
        states={number: state for number, (state, _) in processes.items()},
        waits={number: wait for number, (_, wait) in processes.items()},
        faults=noting(notes, "the platform's reading of the errors", lambda: classify(facts), {}),
        oom_kills=noting(notes, "the control group", oom_kills, None),
        memory=noting(notes, "memory", memory, None),
        load=noting(notes, "load", lambda: (os.getloadavg()[0], len(os.sched_getaffinity(0))), None),
        disks=noting(notes, "disks", lambda: disks((folder, SHARED_MEMORY)), {}),
        kernel=noting(notes, "the kernel's log", kernel, ()),
        repeats=noting(notes, "the journal", lambda: repeats(events), 0),
    )
    return seen, notes


def process(pid: int, root: Path = Path("/proc")) -> tuple[str, str]:
    """The state's letter and the kernel function that a process waits in; ("", "") where there is none."""
    try:
        state = (root / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "", ""
    wait = ""
    with suppress(OSError):
        wait = (root / str(pid) / "wchan").read_text().strip("0\n")
    return state, wait


def describe(pid: int, root: Path = Path("/proc")) -> str:
    """/proc's status, wchan and stat of a process, and where each of its threads waits."""
    folder, out = root / str(pid), []
    for name in ("status", "wchan", "stat"):
        try:
            out.append(f"== {name}\n{(folder / name).read_text(errors='replace').rstrip()}\n")
        except OSError as error:
            out.append(f"== {name}\n({error.strerror})\n")
    with suppress(OSError):
        threads = sorted((folder / "task").iterdir(), key=lambda path: int(path.name))
        lines = (f"{thread.name}: {' '.join(process(int(thread.name), folder / 'task'))}" for thread in threads)
        out.append("== threads: state and kernel function\n" + "\n".join(lines) + "\n")
    return "".join(out)


def catches(pid: int, number: int, root: Path = Path("/proc")) -> bool:
    """Whether a process has a handler for a signal, so that sending it does not end the process."""
    try:
        lines = (root / str(pid) / "status").read_text().splitlines()
        mask = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return False
    return bool(mask >> (number - 1) & 1)


def oom_kills(root: Path = Path("/")) -> int | None:
    """How many processes of this control group the kernel has killed for lack of memory; None where it does not say.

    Control groups of both versions. A worker's group is its supervisor's on one machine.
    """
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            files = [f"sys/fs/cgroup/memory{path}/memory.oom_control"] if "memory" in controllers.split(",") else []
            files += [] if controllers else [f"sys/fs/cgroup{path}/memory.events"]
            for file in files:
                with suppress(OSError):
                    for entry in (root / file).read_text().splitlines():
                        name, _, count = entry.partition(" ")
                        if name == "oom_kill":
                            return int(count)
    return None


def memory() -> tuple[int, int]:
    """Free and total bytes of the machine, or of the control group where that is smaller."""
    used, total = platforms.get("cpu").memory()
    return total - used, total


def headroom(folder: Path) -> dict[str, float]:
    """What is about to run out, with the share of it that is left: "memory", "disk" (that of `folder`)."""
    shares = {"memory": (LOW_MEMORY, memory), "disk": (LOW_DISK, lambda: disks([folder])[str(folder)])}
    out = {}
    for what, (low, measured) in shares.items():
        with suppress(OSError, KeyError, ValueError, ZeroDivisionError):
            free, total = measured()
            if free / total < low:
                out[what] = round(free / total, 4)
    return out


def disks(paths: Iterable[Path]) -> dict[str, tuple[int, int]]:
    """Free and total bytes where these paths are."""
    out = {}
    for path in paths:
        with suppress(OSError):
            usage = shutil.disk_usage(path)
            out[str(path)] = (usage.free, usage.total)
    return out


def kernel() -> tuple[str, ...]:
    """The kernel's last lines about memory, hardware and crashes, oldest first; none where they may not be read."""
    done = subprocess.run(["dmesg"], capture_output=True, timeout=DMESG_S, check=True, stdin=subprocess.DEVNULL)
    return chosen(done.stdout.decode(errors="replace").splitlines())


def chosen(lines: Iterable[str], most: int = 40) -> tuple[str, ...]:
    """Which of the kernel's lines are kept, without their time since the start."""
    return tuple(_STAMP.sub("", line) for line in lines if _KERNEL.search(line))[-most:]


def classify(facts: Facts) -> dict[int, str]:
    """What each rank's last words call for, as its platform reads them (`platforms.FaultClass`)."""
    platform = platforms.get(facts.platform)
    said: dict[int, RankFacts] = {rank.rank: rank for rank in facts.ranks if rank.message}
    return {number: str(platform.classify_error(RuntimeError(rank.message))) for number, rank in said.items()}


def repeats(events: Iterable[dict[str, Any]]) -> int:
    """How often the journal's last fault is in it: the same kind, step and words."""
    faults = [(e.get("kind"), e.get("step"), e.get("message")) for e in events if e["event"] == "train.fault"]
    return Counter(map(repr, faults))[repr(faults[-1])] if faults else 0
