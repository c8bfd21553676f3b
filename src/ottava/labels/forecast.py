"""When will the certificate be reached? Votes, hours and a date, each with an interval.

A forecast is made from what the policy knows at one moment (`Progress`):

- labelling left: the claim falls about exponentially with votes; at the pace of the later half of the labelling so
  far, the goal is log(claim / goal) / pace votes away, and before there is a pace a quarter of all that may be asked;
- audit left: before it begins, the draws that the bound needs at the rate believed (`certificate.draws_needed`), each
  times what a panel costs; then by how far the bound is still above the estimate, as draws^(2/3) of the way;
- neither can take more than is left of the votes allowed.

What then comes of it is not derived but measured: 10%, 50% and 90% of (votes that it took) / (votes so forecast) in
simulated worlds, by phase, by how much of what may be asked is given, and by how much of the rest is forecast
(`SPREAD`). How often that holds on other seeds, and on kinds of worlds that were left out, is in docs/labels.md.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

Phase = Literal["calibrate", "label", "audit"]

Spread = tuple[float, float, float]
SPREAD: dict[Phase, tuple[tuple[Spread, ...], tuple[Spread, ...]]] = {
    "calibrate": (((0.33, 0.61, 1.50),) * 3,) * 2,
    "label": (
        ((0.73, 1.00, 1.59), (0.46, 0.75, 1.47), (0.23, 0.52, 1.01)),
        ((0.87, 1.11, 3.46), (0.73, 1.26, 2.37), (0.65, 0.99, 1.00)),
    ),
    "audit": (
        ((0.38, 0.56, 0.99), (0.19, 0.31, 0.61), (0.12, 0.17, 0.38)),
        ((0.45, 0.71, 1.81), (0.39, 1.06, 1.77), (0.66, 1.01, 1.05)),
    ),
}
"""By phase: while less than EARLY of what may be asked is given, and later; in each, where less than SOME of what is
left is believed to be needed, more of it, and all. Over the even seeds from 6000 to 6198 of 21 kinds of worlds
(`python -m benchmarks.labels.forecasts`)."""
EARLY, SOME, ALL = 0.3, 0.3, 0.999
ROOM = 60
"""Votes that the upper end always leaves: an audit is looked at after every 20 draws."""
MOVES = 0.02
"""The share of what may be asked by which that may still grow: it is set anew whenever people are known better."""


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
    return spread(now, spread_of(now))


def spread(now: Progress, shares: Spread) -> Forecast:
    """These shares of what is believed, within what may be asked."""
    left = max(now.most - now.votes, 0)
    low, likely, high = (share * believed(now) for share in shares)
    most = left + max(ROOM, MOVES * now.most)
    return Forecast((math.floor(min(low, left)), math.ceil(min(likely, left)), math.ceil(min(high + ROOM, most))))


def spread_of(now: Progress) -> Spread:
    """What is believed is off by these factors at such a moment."""
    _, late, how_much = part(now)
    return SPREAD[now.phase][late][how_much]


def part(now: Progress) -> tuple[Phase, int, int]:
    """The part of SPREAD that a moment is in."""
    share = believed(now) / max(now.most - now.votes, 1)
    return now.phase, int(now.votes >= EARLY * now.most), bisect_right((SOME, ALL), share)


def believed(now: Progress) -> float:
    """Votes that labelling and audit would take if all goes on as it is."""
    left = max(now.most - now.votes, 0)
    labelling = 0.0
    if now.phase != "audit" and now.claim > now.goal:
        labelling = math.log(now.claim / now.goal) / now.pace if now.pace > 0 else left / 4
    return min(labelling + now.audit, left)
