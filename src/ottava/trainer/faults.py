"""Faults that a worker commits against itself, at a known place, so that a rehearsal can be repeated.

A worker that was given no faults calls nothing here but an empty loop. Every fault is told to the supervisor before
it strikes, which is how it comes once: the supervisor does not hand it out again.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ottava.trainer.schedule import rng
from ottava.trainer.state import State
from ottava.trainer.supervised import Fault

FLIPS = 23  # the random stream of flipped bits


class Injector:
    """faults: by their number in the run; chip: this worker's; say: tells the supervisor."""

    def __init__(self, faults: Mapping[int, Fault], chip: int, pool: str, say: Callable[..., None]):
        self._chip, self._say = chip, say
        self._faults = {n: f for n, f in faults.items() if f.rank == chip and f.pool in (None, pool)}
        self._told: set[int] = set()

    def at(self, phase: str, step: int) -> None:
        """Die, hang or fail here, if a fault says so. step: how many are kept."""
        for number, fault in self._due(
            ("sigkill", "sigstop", "sleep", "error", "memory", "clock", "full"), step, phase
        ):
            self._tell(number, fault, step)
            if fault.kind == "sigkill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif fault.kind == "sigstop":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif fault.kind == "sleep":
                time.sleep(fault.seconds)
            elif fault.kind == "error":
                raise RuntimeError(f"an injected error in step {step + 1}")
            elif fault.kind == "memory":
                torch.empty(1 << 60, dtype=torch.uint8)  # the allocator refuses, in its own words
            elif fault.kind == "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            else:
                _jump(fault.seconds)

    def contribution(self, own: Tensor, step: int, columns: int) -> None:
        """Spoil this worker's gradient sum [width] before it is exchanged. columns: the last so many are losses."""
        for number, fault in self._due(("nan", "spike", "gradient"), step):
            self._tell(number, fault, step)
            if fault.kind == "nan":
                own[len(own) // 3] = float("nan")
                own[-columns] = float("nan")
            elif fault.kind == "spike":
                own[-columns] += 50.0
            else:
                flip(own[:-columns], fault.bits, step)

    def state(self, state: State, step: int, phase: str) -> None:
        """Flip bits of the state in memory."""
        for number, fault in self._due(("flip",), step, phase):
            self._tell(number, fault, step)
            flip(getattr(state, fault.target), fault.bits, step)

    def _due(self, kinds: tuple[str, ...], step: int, phase: str | None = None) -> list[tuple[int, Fault]]:
        found = []
        for number, fault in self._faults.items():
            whenever = phase in ("join", "load") or str(phase).startswith("save:")  # which steps are saved varies
            now = step >= fault.at_step if fault.sticky or whenever else step == fault.at_step
            if (
                fault.kind in kinds
                and now
                and phase in (None, fault.phase)
                and (fault.sticky or number not in self._told)
            ):
                found.append((number, fault))
        return found

    def _tell(self, number: int, fault: Fault, step: int) -> None:
        if number not in self._told:
            self._told.add(number)
            self._say("injected", number=number, kind=fault.kind, at=fault.phase, step=step, chip=self._chip)


def flip(values: Tensor, bits: int, seed: int) -> None:
    """Flip `bits` bits of distinct float32 elements, drawn from a seed; sign, exponent or fraction."""
    draw = rng(seed, FLIPS, len(values), 0)
    words = values.view(torch.int32)
    for index in draw.choice(len(values), bits, replace=False):
        words[int(index)] ^= 1 << int(draw.integers(0, 31))


def _jump(seconds: float) -> None:
    """Let this process's wall clock jump; the monotonic clock goes on, as it does in life."""
    real = time.time
    time.time = lambda: real() + seconds
