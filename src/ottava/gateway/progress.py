"""What `ottava serve` says while models load: which backend, in which phase, since when.

One line that is written anew on a terminal, a line for every change elsewhere.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TextIO

EVERY = 0.2  # seconds between two looks of a line that moves


class Progress:
    """The phases of what loads, by name. to: where it is written (default: standard error)."""

    def __init__(self, to: TextIO | None = None):
        self._to = sys.stderr if to is None else to
        self._moves = self._to.isatty()
        self._phases: dict[str, tuple[str, float]] = {}
        self._shown = 0.0

    def show(self, phases: Mapping[str, str], *, last: bool = False) -> None:
        """To be called as often as one likes with every backend's phase. last: nothing more is loading."""
        now = time.monotonic()
        changed = [name for name, phase in phases.items() if self._phases.get(name, ("", 0.0))[0] != phase]
        before = dict(self._phases)
        self._phases |= {name: (phases[name], now) for name in changed}
        if not self._moves:
            for name in changed:
                after = f" after {now - before[name][1]:.1f} s" if name in before else ""
                self._to.write(f"{name}: {phases[name]}{after}\n")
        elif last:
            self._to.write("\r\x1b[K")
        elif now - self._shown > EVERY or changed:
            said = (f"{name} {phase} {now - since:.0f} s" for name, (phase, since) in self._phases.items())
            self._to.write("\r\x1b[K" + "   ".join(said))
            self._shown = now
        self._to.flush()


@contextmanager
def loading(name: str, to: TextIO | None = None) -> Iterator[None]:
    """Say meanwhile that this process loads a model."""
    progress, over = Progress(to), threading.Event()
    progress.show({name: "loading"})

    def move() -> None:
        while not over.wait(EVERY):
            progress.show({name: "loading"})

    mover = threading.Thread(target=move, daemon=True)
    mover.start()
    try:
        yield
    finally:
        over.set()
        mover.join()
        progress.show({name: "ready"} if sys.exc_info()[0] is None else {}, last=True)
