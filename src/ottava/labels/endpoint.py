"""Asking a model behind any OpenAI-compatible endpoint, where the network, the server and the key are somebody else's.

`Endpoint.ask` sends many questions at once and gives a text for each, or None with the reason counted: it never raises
for what a server does. Answers are kept on disk by the digest of what was asked, so that a run that was stopped asks
only for what is missing; what each took stands beside them (`price`). The key comes from an environment variable and is
in no file, message or log.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ottava import artifact
from ottava.errors import PlatformError
from ottava.labels import price
from ottava.labels.price import Budget, Ledger, Price, Usage

if TYPE_CHECKING:
    import httpx

LARGEST = 4 << 20
"""Bytes of one reply; a larger one is no answer."""
PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True)
class Endpoint:
    """url: its base, as http://host/v1. key_from: the environment variable with the key, if it needs one.

    at_once: questions under way; tries: of each; limit_s: wall seconds of each try, the whole reply included;
    max_tokens: of an answer, where the question does not say; cache: a folder, or None; price: None where it is not
    known; budget: shared by all judges of a command.
    """

    url: str
    model: str
    key_from: str | None = None
    at_once: int = 8
    tries: int = 4
    limit_s: float = 60.0
    max_tokens: int = 64
    cache: Path | None = None
    price: Price | None = None
    budget: Budget | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise PlatformError("a judge's address is http://HOST/v1 or https://HOST/v1", where=self.url)
        if parts.username or parts.password:
            raise PlatformError(
                "a key does not belong into an address", where=parts.hostname, fix="name a variable of it"
            )
        if self.key_from is not None and not os.environ.get(self.key_from):
            raise PlatformError(
                f"the environment variable {self.key_from} is not set", fix="put the judge's key into it"
            )

    def ask(self, prompts: Sequence[str], tokens: Sequence[int] = ()) -> tuple[list[str | None], Tally]:
        """The model's text for each prompt, or None; and what became of all. tokens: of each answer at most."""
        return asyncio.run(self._all(prompts, dict(zip(prompts, tokens, strict=False))))

    async def _all(self, prompts: Sequence[str], tokens: Mapping[str, int]) -> tuple[list[str | None], Tally]:
        import httpx

        if self.cache is not None:
            artifact.make_folder(self.cache)
        tally, places = Tally(self.price), asyncio.Semaphore(self.at_once)
        ledger = None if self.cache is None else Ledger(self.cache)
        changed = asyncio.Condition()
        distinct = list(dict.fromkeys(prompts))
        headers = {"authorization": f"Bearer {os.environ[self.key_from]}"} if self.key_from else {}
        limits = httpx.Limits(max_connections=self.at_once)
        async with httpx.AsyncClient(headers=headers, timeout=self.limit_s, limits=limits, trust_env=False) as client:

            async def one(prompt: str) -> str | None:
                async with places:
                    work = _Work(client, prompt, tokens.get(prompt, self.max_tokens), tally, ledger, changed)
                    return await self._one(work)

            said = dict(zip(distinct, await asyncio.gather(*map(one, distinct)), strict=True))
        return [said[prompt] for prompt in prompts], tally

    async def _one(self, work: _Work) -> str | None:
        tally, body = work.tally, {
            "model": self.model,
            "messages": [{"role": "user", "content": work.prompt}],
            "temperature": 0,
            "max_tokens": work.max_tokens,
        }  # fmt: skip
        kept = None if self.cache is None else self.cache / f"{artifact.digest_of([self.url, body])}.json"
        if kept is not None and (known := _kept(kept)) is not None:
            tally.cached += 1
            return known
        chance = random.Random(work.prompt)
        why = ""
        for attempt in range(self.tries):
            wait = min(PAUSE_S * 2**attempt * (0.5 + chance.random()), LONGEST_PAUSE_S)
            said = await self._paid(work, body, attempt)
            if said is None:
                tally.unasked += 1
                return None
            if isinstance(said, str):
                if kept is not None:
                    artifact.write_json(kept, {"text": said})
                return said
            why, wait = said.why, wait if said.wait_s is None else min(max(said.wait_s, 0.0), LONGEST_PAUSE_S)
            if said.final:
                break
            if attempt + 1 < self.tries:
                await asyncio.sleep(wait)
        tally.failed[why] += 1
        return None

    async def _paid(self, work: _Work, body: dict[str, Any], attempt: int) -> str | _Refusal | None:
        """One try, if the budget reaches for it, and what it cost; None if it does not."""
        most = price.worst(work.prompt, work.max_tokens)
        reserved = self._cost(most)
        if self.budget is not None and not await self.budget.reserve(reserved, work.changed):
            return None
        work.tally.asked += 1
        work.tally.again += bool(attempt)
        said, took = await self._answer(work, body)
        usage = most if took is _UNKNOWN else took
        if usage is not None:
            assert isinstance(usage, Usage)
            work.tally.count(usage)
            if work.ledger is not None:
                work.ledger.add(self.url, self.model, usage)
        if self.budget is not None:
            await self.budget.settle(reserved, 0.0 if usage is None else self._cost(usage), work.changed)
        return said

    def _cost(self, usage: Usage) -> float:
        return 0.0 if self.price is None else self.price.of(usage.prompt, usage.completion)

    async def _answer(self, work: _Work, body: dict[str, Any]) -> tuple[str | _Refusal, Usage | object | None]:
        """(what came, what it took: None where nothing was served, _UNKNOWN where the server may have served it)."""
        import httpx

        try:
            return await asyncio.wait_for(self._try(work.client, body), self.limit_s)
        except TimeoutError:
            return _Refusal("no answer in time"), _UNKNOWN
        except httpx.ConnectError as error:
            return _Refusal(f"connection: {type(error).__name__}"), None
        except Exception as error:  # whatever a server can do to a client is its failure, not the run's
            return _Refusal(f"connection: {type(error).__name__}"), _UNKNOWN

    async def _try(
        self, client: httpx.AsyncClient, body: dict[str, Any]
    ) -> tuple[str | _Refusal, Usage | object | None]:
        async with client.stream("POST", f"{self.url.rstrip('/')}/chat/completions", json=body) as reply:
            if reply.status_code != 200:
                wait = _retry_after(reply.headers.get("retry-after"))
                return _Refusal(f"status {reply.status_code}", reply.status_code not in AGAIN, wait), None
            data = bytearray()
            async for chunk in reply.aiter_bytes():
                data += chunk
                if len(data) > LARGEST:
                    return _Refusal("a reply too large", True), _UNKNOWN
        took: Usage | object = _UNKNOWN
        try:
            said = json.loads(bytes(data))
            took = price.said(said.get("usage")) or _UNKNOWN
            text = said["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            return _Refusal("a reply that is none"), took
        return (text if isinstance(text, str) else _Refusal("a reply without text", True)), took


_UNKNOWN = object()


@dataclass(frozen=True)
class _Work:
    """One question, and where what becomes of it is told."""

    client: httpx.AsyncClient
    prompt: str
    max_tokens: int
    tally: Tally
    ledger: Ledger | None
    changed: asyncio.Condition


@dataclass(frozen=True)
class _Refusal:
    why: str
    final: bool = False
    wait_s: float | None = None


@dataclass
class Tally:
    """asked: requests sent; again: those of them that repeat one; cached: questions that needed none; unasked: those
    that the budget did not reach for; failed: questions without an answer, by why. Tokens are those that the server
    said; unknown: requests of which it did not say what they took. cost: of what it said, None without a price."""

    price: Price | None = None
    asked: int = 0
    again: int = 0
    cached: int = 0
    unasked: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    unknown: int = 0
    failed: Counter[str] = field(default_factory=Counter)

    def count(self, usage: Usage) -> None:
        """Add what a request took; a server that does not say is not believed to be free."""
        if not usage.known:
            self.unknown += 1
            return
        self.prompt_tokens += usage.prompt
        self.completion_tokens += usage.completion

    @property
    def cost(self) -> float | None:
        return None if self.price is None else self.price.of(self.prompt_tokens, self.completion_tokens)

    def told(self) -> dict[str, Any]:
        """As JSON."""
        found = {key: value for key, value in vars(self).items() if key != "price"}
        cost = {} if self.cost is None else {"cost": round(self.cost, 6)}
        return {**found, **cost, "failed": dict(sorted(self.failed.items()))}


def _kept(path: Path) -> str | None:
    try:
        text = json.loads(path.read_text(encoding="utf-8"))["text"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return text if isinstance(text, str) else None


def _retry_after(said: str | None) -> float | None:
    """Seconds that a server asks to wait: a number, or a date (RFC 9110, 10.2.3)."""
    if said is None:
        return None
    try:
        return float(said)
    except ValueError:
        try:
            return email.utils.parsedate_to_datetime(said).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
