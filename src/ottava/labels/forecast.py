"""When will the certificate be reached? Votes, hours and a date, each with an interval.

A forecast is made from what the policy knows at one moment (`Progress`):

- labelling left: the claim falls about exponentially with votes; at the pace of the later half of the labelling so
  far, the goal is log(claim / goal) / pace votes away, and before there is a pace a quarter of all that may be asked;
- audit left: before it begins, the draws that the bound needs at the rate believed (`certificate.draws_needed`), each
  times what a panel costs; then by how far the bound is still above the estimate, as draws^(2/3) of the way;
- neither can take more than is left of the votes allowed.

The interval is not derived but measured: the share of forecast to outcome in simulated worlds (`SPREAD`), of which it
holds the middle 80%; its coverage on other worlds is in docs/labels.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

Phase = Literal["calibrate", "label", "audit"]

SPREAD: dict[Phase, tuple[float, float]] = {"calibrate": (0.35, 1.6), "label": (0.8, 2.6), "audit": (0.35, 1.9)}
"""10% and 90% of (votes that it then took) / (votes forecast), over five worlds each of nine kinds."""
ROOM = 60
"""Votes that the upper end always leaves: an audit is looked at after every 20 draws."""


@dataclass(frozen=True)
class Progress:
    """One moment of a run. votes: given so far; most: votes allowed in all; claim: the believed error and goal: where
    labelling ends; pace: how much the logarithm of the claim falls with a vote, 0 where that is not known; audit:
    votes that the audit still needs at the rate believed, infinite where it would never end."""

    phase: Phase
    votes: int
    most: int
    claim: float
    goal: float
    pace: float
    audit: float


@dataclass(frozen=True)
class Forecast:
    """votes still to be given: low, likely, high; the middle 80%."""

    votes: tuple[int, int, int]

    def hours(self, seconds: float) -> tuple[float, float, float]:
        """Hours of people's time, where a vote takes `seconds` of it."""
        low, likely, high = (count * seconds / 3600 for count in self.votes)
        return low, likely, high

    def dates(self, now: datetime, votes_a_day: float) -> tuple[datetime, datetime, datetime]:
        """When that is, where the people together give so many votes a day; the end of time where they give none."""

        def at(count: int) -> datetime:
            try:
                return now + timedelta(days=count / votes_a_day if count else 0.0)
            except (OverflowError, ZeroDivisionError):
                return datetime.max.replace(tzinfo=now.tzinfo)

        low, likely, high = map(at, self.votes)
        return low, likely, high


def told(now: Progress, seconds: float, clock: datetime, votes_a_day: float) -> dict[str, Any]:
    """A forecast as a document: phase, votes given, and low, likely and high of the votes, hours and dates to come."""
    found = forecast(now)
    return {
        "phase": now.phase,
        "given": now.votes,
        "votes": list(found.votes),
        "hours": [round(hours, 2) for hours in found.hours(seconds)],
        "date": [date.isoformat(timespec="seconds") for date in found.dates(clock, votes_a_day)],
    }


def forecast(now: Progress) -> Forecast:
    """How many votes until the end, from one moment."""
    left = max(now.most - now.votes, 0)
    labelling = 0.0
    if now.phase != "audit" and now.claim > now.goal:
        labelling = math.log(now.claim / now.goal) / now.pace if now.pace > 0 else left / 4
    likely = min(labelling + now.audit, left)
    low, high = SPREAD[now.phase]
    return Forecast(
        (math.floor(min(low * likely, left)), math.ceil(likely), math.ceil(min(high * likely + ROOM, left)))
    )
