"""Whom to ask what, now: in memory, so that nobody waits for the next question.

`ranking` says in which order items are worth asking about, now and then; between two rankings this hands them out. An
item is *leased* to one person while it is asked, so that two people do not give the same vote at a time; a lease ends
with the vote, or when the person has not been heard of for a while. An item that was voted on waits for the next
ranking, which knows of the vote.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

LEASE_SECONDS = 120.0
GOLD = 0.05
"""The share of questions whose answer is known: too few to cost much, enough to see who guesses."""
PACE_SECONDS = 900.0
"""How far back the pace is measured."""


@dataclass
class Queue:
    """order, gold, conflicts: numbers of items, the next one first; done: who has answered, or skipped, what."""

    order: Sequence[int] = ()
    gold: Sequence[int] = ()
    conflicts: Sequence[int] = ()
    left: int | None = None
    seconds: float = 20.0
    claim: float | None = None
    gold_share: float = GOLD
    lease_s: float = LEASE_SECONDS
    clock: Callable[[], float] = time.monotonic
    rng: random.Random = field(default_factory=random.Random)
    done: dict[str, set[int]] = field(default_factory=dict)
    settled: set[int] = field(default_factory=set)
    _leases: dict[int, tuple[str, float]] = field(default_factory=dict)
    _spent: dict[int, float] = field(default_factory=dict)
    _cursor: dict[str, int] = field(default_factory=dict)
    _recent: deque[float] = field(default_factory=deque)
    _since: int = 0

    def install(self, asked_at: float, order: Sequence[int], gold: Sequence[int], conflicts: Sequence[int]) -> None:
        """A new ranking. asked_at: the clock when it was asked for: what was voted on since is not in it."""
        self.order, self.gold, self.conflicts = order, gold, conflicts
        self._spent = {item: at for item, at in self._spent.items() if at >= asked_at}
        self._cursor.clear()
        self._since = len(self._spent)

    def next(self, who: str, want: int, holding: Iterable[int] = ()) -> list[int]:
        """Up to `want` items for this person, who keeps those in `holding`; each is leased to them from now on."""
        now = self.clock()
        held = set(holding)
        for item in held:
            if self._free(item, who, now):
                self._leases[item] = (who, now + self.lease_s)
        found: list[int] = []
        while len(found) < want:
            known = self._gold(who, held, now) if self.rng.random() < self.gold_share else None
            chosen = self._first(who, held, now) if known is None else known
            if chosen is None:
                break
            self._leases[chosen] = (who, now + self.lease_s)
            held.add(chosen)
            found.append(chosen)
        return found

    def next_conflict(self, who: str) -> int | None:
        """An item to be adjudicated that nobody else is at."""
        now = self.clock()
        for item in self.conflicts:
            if item not in self.settled and self._free(item, who, now):
                self._leases[item] = (who, now + self.lease_s)
                return item
        return None

    def answered(self, who: str, item: int, kind: str) -> None:
        """kind: vote, skip, undo or decide. A lease that has ended makes no difference: every vote counts."""
        now = self.clock()
        if self._leases.get(item, ("", 0.0))[0] == who:
            del self._leases[item]
        if kind == "undo":
            self.done.setdefault(who, set()).discard(item)
            self._cursor.pop(who, None)  # it may have gone past this one
            return
        if kind == "decide":
            self.settled.add(item)
            self._spent[item] = now
            return
        self.done.setdefault(who, set()).add(item)
        if kind == "vote":
            self._spent[item] = now
            self._recent.append(now)
            self._since += 1

    def leave(self, who: str) -> None:
        """This person goes: what they hold is free for others at once."""
        self._leases = {item: lease for item, lease in self._leases.items() if lease[0] != who}

    def open_conflicts(self) -> int:
        """How many wait for adjudication."""
        return sum(item not in self.settled for item in self.conflicts)

    def pace(self) -> float:
        """Votes a second of late; 0 where that is not known."""
        now = self.clock()
        while self._recent and self._recent[0] < now - PACE_SECONDS:
            self._recent.popleft()
        return len(self._recent) / max(now - self._recent[0], 1.0) if len(self._recent) >= 3 else 0.0

    def progress(self) -> dict[str, Any]:
        """Votes, hours of work and the date at the present pace; None where it is not known."""
        pace = self.pace()
        left = None if self.left is None else max(self.left - self._since, 0)
        finish = None
        if left and pace:
            seconds = min(left / pace, 10 * 365 * 86_400.0)
            finish = (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat(timespec="minutes")
        hours = None if left is None else round(left * self.seconds / 3600, 2)
        return {"left": left, "hours": hours, "finish": finish, "believed_error": self.claim}

    def _free(self, item: int, who: str, now: float) -> bool:
        lease = self._leases.get(item)
        return lease is None or lease[0] == who or lease[1] <= now

    def _first(self, who: str, held: set[int], now: float) -> int | None:
        """The first item of the order for this person.

        The cursor goes past what will stay closed to them until the next ranking, so that nothing is looked at twice.
        """
        mine, order, start = self.done.get(who, set()), self.order, self._cursor.get(who, 0)
        passing = True
        for place in range(start, len(order)):
            item = int(order[place])
            closed = item in mine or item in self._spent or item in self.settled
            if passing and closed:
                self._cursor[who] = place + 1
            passing = passing and closed
            if not closed and item not in held and self._free(item, who, now):
                return item
        return None

    def _gold(self, who: str, held: set[int], now: float) -> int | None:
        """A known item that this person has not seen."""
        mine = self.done.get(who, set())
        for _ in range(min(8, len(self.gold))):
            item = int(self.gold[self.rng.randrange(len(self.gold))])
            if item not in mine and item not in held and self._free(item, who, now):
                return item
        return None
