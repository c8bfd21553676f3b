"""What judges cost, and a budget at which asking ends.

Tokens are those that the endpoint says (`usage`); prices are the user's, in any currency, and a budget is in the same.
A request of which the endpoint does not say what it took has an unknown cost: it is counted as unknown, and against a
budget it counts as the most that it can have been. What was asked is kept in a ledger beside the answers (`--cache`),
so that a budget holds over all calls of a command that was stopped, and not for each anew.

A request is sent only where its worst case fits into what is left, with the worst cases of those under way. A token is
at least one byte of text, so the prompt's bytes are its worst case, with TEMPLATE for what the server puts around it.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ottava import journal
from ottava.errors import DataError

LEDGER = "ledger.jsonl"
TEMPLATE = 256
"""Tokens of a chat template and of a server's own words around a prompt."""


class Price(NamedTuple):
    """Of a million tokens, in any currency."""

    prompt: float
    completion: float

    def of(self, prompt: int, completion: int) -> float:
        """What so many tokens cost."""
        return (prompt * self.prompt + completion * self.completion) / 1e6


class Usage(NamedTuple):
    """Tokens of one request. known: the endpoint said them; else they are the most that it can have been."""

    prompt: int
    completion: int
    known: bool = True


def parse(text: str) -> Price:
    """IN:OUT, such as 0.15:0.60. Raises DataError."""
    try:
        numbers = [float(part) for part in text.split(":")]
    except ValueError:
        numbers = []
    if len(numbers) != 2 or not all(math.isfinite(number) and number >= 0 for number in numbers):
        what = f"{text!r} is no price of a million tokens"
        raise DataError(what, where="--price", fix="IN:OUT, for prompts and for answers, such as 0.15:0.60")
    return Price(*numbers)


def said(usage: Any) -> Usage | None:
    """What a reply's `usage` says, or None where it does not."""
    if not isinstance(usage, dict):
        return None
    numbers = [usage.get(key) for key in ("prompt_tokens", "completion_tokens")]
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 10**9 for n in numbers):
        return None
    return Usage(int(numbers[0]), int(numbers[1]))  # type: ignore[arg-type]


def worst(prompt: str, max_tokens: int) -> Usage:
    """The most that a request can take."""
    return Usage(len(prompt.encode(errors="replace")) + TEMPLATE, max_tokens, known=False)


@dataclass
class Budget:
    """One for all judges of a command. spent: what was spent, unknown costs at their worst; over: it does not reach for
    what was to be asked next, and nothing more is."""

    limit: float
    spent: float = 0.0
    over: bool = False
    _under_way: float = field(default=0.0, repr=False)

    async def reserve(self, cost: float, changed: asyncio.Condition) -> bool:
        """Whether a request of at most this cost may be sent; waits for those under way where that depends on them."""
        async with changed:
            await changed.wait_for(lambda: self.over or not self._between(cost))
            self.over = self.over or self.spent + cost > self.limit
            if not self.over:
                self._under_way += cost
            return not self.over

    async def settle(self, reserved: float, cost: float, changed: asyncio.Condition) -> None:
        """A request has ended, and cost this."""
        async with changed:
            self._under_way -= reserved
            self.spent += cost
            changed.notify_all()

    def _between(self, cost: float) -> bool:
        """It fits if those under way turn out cheap, and does not if they do not."""
        return self.spent + cost <= self.limit < self.spent + self._under_way + cost


class Ledger:
    """What requests took, a line each, in the folder of the answers."""

    def __init__(self, folder: Path):
        self._journal = journal.Journal(folder / LEDGER)

    def add(self, url: str, model: str, usage: Usage) -> None:
        """Note one request."""
        self._journal.append("tokens", url=url, model=model, **usage._asdict())


def spent(folder: Path, prices: dict[tuple[str, str], Price]) -> float:
    """What is in a folder's ledger, at these prices by (url, model); other judges are another matter. Raises DataError
    where the ledger is none."""
    total = 0.0
    for event in journal.read(folder / LEDGER):
        try:
            price = prices.get((event["url"], event["model"]))
            total += 0.0 if price is None else price.of(int(event["prompt"]), int(event["completion"]))
        except (KeyError, TypeError, ValueError):
            raise DataError("the ledger cannot be read: what was spent is not known", where=folder / LEDGER) from None
    return total
