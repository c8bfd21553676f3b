"""How much memory a run takes, all its processes together, sampled while it runs (Linux)."""

from __future__ import annotations

import os
import threading
from pathlib import Path

EVERY_S = 1.5


class Watch:
    """Samples this process and its descendants. Use as a context manager; peak_mb: None where it cannot be read."""

    def __init__(self) -> None:
        self.peak_mb: float | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            used = family_mb(os.getpid())
            if used:
                self.peak_mb = max(self.peak_mb or 0.0, used)
            if self._end.wait(EVERY_S):
                return


def family_mb(pid: int) -> float:
    """Proportional set size of a process and its descendants in MB: shared pages are counted once."""
    waiting, total = [pid], 0
    while waiting:
        number = waiting.pop()
        folder = Path("/proc") / str(number)
        try:
            rollup = (folder / "smaps_rollup").read_text()
            for task in (folder / "task").iterdir():
                waiting += [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue  # it has ended
        total += next((int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")), 0)
    return total / 1024
