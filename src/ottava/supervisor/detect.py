"""What the supervisor can see from outside: who makes no progress, and who is slow. Fed with messages and the time.

Everything else (numbers, bits, classes) the workers find together in `trainer.guard`, before a state is kept.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

SILENT_S = 1.0
"""A worker that sent no beat (one every 0.2 s) for so long is stopped or starved."""

KNOWN = 16
"""Steps after which their times say what a hang is."""

LONG = ("save", "evaluate", "look", "rollout")
"""Phases that take their own time, whatever a step takes: `hang_s` counts while a worker is in one."""

SLOW, SLOW_STEPS, SLOW_S = 3.0, 8, 2.0
"""A straggler takes so many times longer than the median of the others, over so many steps, and for so long. Below
that, leaving it and going on with half as many workers costs more than it gains."""

WAITING = ("join", "reduce", "verdict")
"""Phases in which a worker waits for others: for its peers, or for the supervisor's word on a look."""


class Care(Protocol):
    """How a run's workers are looked after: as in `trainer.spec.TrainSpec`."""

    @property
    def hang_s(self) -> float: ...
    @property
    def hang_least_s(self) -> float: ...
    @property
    def leave_stragglers(self) -> bool: ...


class Watch:
    """One start of a group. Times are monotonic seconds. speaks: whether silence from the very start is a hang."""

    def __init__(self, world: int, care: Care, now: float, speaks: bool = True):
        self._world, self._care, self._speaks = world, care, speaks
        self._progress = now
        self._times: deque[float] = deque(maxlen=200)
        self._beats = dict.fromkeys(range(world), now)
        self._phases = dict.fromkeys(range(world), "start")
        self._steps = dict.fromkeys(range(world), -1)
        self._told: dict[int, float] = {}
        self._done: set[int] = set()
        self._computed: dict[int, deque[float]] = {rank: deque(maxlen=SLOW_STEPS) for rank in range(world)}

    def hear(self, message: Mapping[str, Any]) -> None:
        """Take note of a message."""
        rank, self._speaks = message["rank"], True
        self._beats[rank] = message["t"]
        if message["say"] == "beat":
            before, self._phases[rank] = self._phases[rank], str(message["phase"])
            if before in LONG and before != self._phases[rank]:  # what it did was no step, and it is done
                self._progress = message["t"]
        elif message["say"] == "step":
            self._steps[rank] = message["step"]
            self._progress = message["t"]
            if "seconds" in message or rank in self._told:  # a trainer that does not time its steps is timed here
                self._times.append(float(message.get("seconds", message["t"] - self._told.get(rank, 0.0))))
            self._told[rank] = message["t"]
            if "compute_s" in message:
                self._computed[rank].append(float(message["compute_s"]))
        elif message["say"] == "join":
            self._progress = message["t"]
        elif message["say"] == "bye":
            self._done.add(rank)

    def deadline(self) -> float:
        """Seconds without a step after which the group counts as hanging."""
        if len(self._times) < KNOWN:
            return self._care.hang_s
        ordered = sorted(self._times)
        p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
        least = self._care.hang_s if any(phase in LONG for phase in self._phases.values()) else self._care.hang_least_s
        return max(least, 3 * p99)

    def hung(self, now: float) -> tuple[int, ...] | None:
        """None while there is progress; else whom it speaks against: the silent, or those whom the others wait for."""
        if not self._speaks or now - self._progress <= self.deadline():
            return None
        busy = {rank: beat for rank, beat in self._beats.items() if rank not in self._done}
        silent = tuple(rank for rank, beat in busy.items() if now - beat > SILENT_S)
        if silent:
            return silent if len(silent) < self._world or self._world == 1 else ()
        waiting = {rank for rank, phase in self._phases.items() if phase in WAITING}
        others = tuple(rank for rank in self._phases if rank not in waiting)
        return others if waiting else ()

    def stragglers(self) -> tuple[int, ...]:
        """Ranks that have been far slower than the others for a while."""
        if self._world < 2 or any(len(times) < SLOW_STEPS for times in self._computed.values()):
            return ()
        if sum(max(times[step] for times in self._computed.values()) for step in range(SLOW_STEPS)) < SLOW_S:
            return ()
        medians = {rank: statistics.median(times) for rank, times in self._computed.items()}
        return tuple(
            rank
            for rank, own in medians.items()
            if own > SLOW * statistics.median([other for peer, other in medians.items() if peer != rank])
        )

    def facts(self, now: float) -> list[dict[str, Any]]:
        """What is known of each rank: {rank, phase, step, silent_s}."""
        return [
            {"rank": r, "phase": self._phases[r], "step": self._steps[r], "silent_s": round(now - self._beats[r], 3)}
            for r in range(self._world)
        ]


def first_cause(alarms: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The alarm that is a cause and no consequence: one who lost its peer says nothing about why."""
    causes = [alarm for alarm in alarms if alarm["kind"] != "peer"]
    return causes[0] if causes else None
