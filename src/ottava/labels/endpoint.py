"""Asking a model behind any OpenAI-compatible endpoint, where the network, the server and the key are somebody else's.

`Endpoint.ask` sends many questions at once and gives a text for each, or None with the reason counted: it never
raises for
what a server does. Answers are kept on disk by the digest of what was asked, so that a run that was stopped asks only
for
what is missing. The key comes from an environment variable and is in no file, message or log.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ottava import artifact
from ottava.errors import PlatformError

if TYPE_CHECKING:
    import httpx

LARGEST = 4 << 20
"""Bytes of one reply; a larger one is no answer."""
PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True)
class Endpoint:
    """url: its base, as http://host/v1. key_from: the environment variable with the key, if it needs one.

    at_once: questions under way; tries: of each; limit_s: wall seconds of each try, the whole reply included; cache: a
    folder, or None; usd_per_million: of prompt and of completion tokens, for the bill.
    """

    url: str
    model: str
    key_from: str | None = None
    at_once: int = 8
    tries: int = 4
    limit_s: float = 60.0
    max_tokens: int = 64
    cache: Path | None = None
    usd_per_million: tuple[float, float] = (0.0, 0.0)

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

    def ask(self, prompts: Sequence[str]) -> tuple[list[str | None], Tally]:
        """The model's text for each prompt, or None; and what became of all."""
        return asyncio.run(self._all(prompts))

    async def _all(self, prompts: Sequence[str]) -> tuple[list[str | None], Tally]:
        import httpx

        if self.cache is not None:
            artifact.make_folder(self.cache)
        tally, places = Tally(), asyncio.Semaphore(self.at_once)
        distinct = list(dict.fromkeys(prompts))
        headers = {"authorization": f"Bearer {os.environ[self.key_from]}"} if self.key_from else {}
        limits = httpx.Limits(max_connections=self.at_once)
        async with httpx.AsyncClient(headers=headers, timeout=self.limit_s, limits=limits, trust_env=False) as client:

            async def one(prompt: str) -> str | None:
                async with places:
                    return await self._one(client, prompt, tally)

            said = dict(zip(distinct, await asyncio.gather(*map(one, distinct)), strict=True))
        return [said[prompt] for prompt in prompts], tally

    async def _one(self, client: httpx.AsyncClient, prompt: str, tally: Tally) -> str | None:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        kept = None if self.cache is None else self.cache / f"{artifact.digest_of([self.url, body])}.json"
        if kept is not None and (known := _kept(kept)) is not None:
            tally.cached += 1
            return known
        chance = random.Random(prompt)
        for attempt in range(self.tries):
            if attempt:
                tally.again += 1
            why, wait = "", min(PAUSE_S * 2**attempt * (0.5 + chance.random()), LONGEST_PAUSE_S)
            try:
                tally.asked += 1
                said = await asyncio.wait_for(self._try(client, body, tally), self.limit_s)
                if isinstance(said, str):
                    if kept is not None:
                        artifact.write_json(kept, {"text": said})
                    return said
                why, final, longer = said.why, said.final, said.wait_s
                wait = wait if longer is None else min(max(longer, 0.0), LONGEST_PAUSE_S)
            except TimeoutError:
                why, final = "no answer in time", False
            except Exception as error:  # whatever a server can do to a client is its failure, not the run's
                why, final = f"connection: {type(error).__name__}", False
            if final:
                break
            if attempt + 1 < self.tries:
                await asyncio.sleep(wait)
        tally.failed[why] += 1
        return None

    async def _try(self, client: httpx.AsyncClient, body: dict[str, Any], tally: Tally) -> str | _Refusal:
        async with client.stream("POST", f"{self.url.rstrip('/')}/chat/completions", json=body) as reply:
            if reply.status_code != 200:
                wait = _retry_after(reply.headers.get("retry-after"))
                return _Refusal(f"status {reply.status_code}", reply.status_code not in AGAIN, wait)
            data = bytearray()
            async for chunk in reply.aiter_bytes():
                data += chunk
                if len(data) > LARGEST:
                    return _Refusal("a reply too large", True)
        try:
            said = json.loads(bytes(data))
            text = said["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            return _Refusal("a reply that is none")
        if not isinstance(text, str):
            return _Refusal("a reply without text", True)
        tally.count(said.get("usage"), self.usd_per_million)
        return text


@dataclass(frozen=True)
class _Refusal:
    why: str
    final: bool = False
    wait_s: float | None = None


@dataclass
class Tally:
    """asked: requests sent; again: those of them that repeat one; cached: questions that needed none; failed: questions
    without an answer, by why."""

    asked: int = 0
    again: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    usd: float = 0.0
    failed: Counter[str] = field(default_factory=Counter)

    def count(self, usage: Any, usd_per_million: tuple[float, float]) -> None:
        """Add what an answer cost; a server that does not say is not believed to be free, but counted as 0 tokens."""
        numbers = [usage.get(key) if isinstance(usage, dict) else 0 for key in ("prompt_tokens", "completion_tokens")]
        prompt, completion = (n if isinstance(n, int) and 0 <= n < 10**9 else 0 for n in numbers)
        self.prompt_tokens += prompt
        self.completion_tokens += completion
        self.usd += (prompt * usd_per_million[0] + completion * usd_per_million[1]) / 1e6

    def told(self) -> dict[str, Any]:
        """As JSON."""
        return {**vars(self), "usd": round(self.usd, 6), "failed": dict(sorted(self.failed.items()))}


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
