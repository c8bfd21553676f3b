"""The few lines that `ottava chat` needs to talk to a server."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import httpx

from ottava.errors import DataError, ResourceError

Part = Literal["reasoning", "content"]

KEY = "OTTAVA_API_KEY"
"""The environment variable with the key, where the server wants one; on a command line everybody could read it."""


def ask(
    url: str, text: str, thinking: bool | None = None, *, earlier: Sequence[dict[str, Any]] = ()
) -> Iterator[tuple[Part, str]]:
    """Ask a server and yield (part, text) as the answer comes.

    url: the server's root, as http://127.0.0.1:8000, with or without /v1. The key is that of KEY.
    thinking None: the server's default. earlier: the turns before this one. Raises DataError where the
    address is none or the request is refused, ResourceError where nobody answers.
    """
    body: dict[str, Any] = {"messages": [*earlier, {"role": "user", "content": text}], "stream": True}
    if thinking is not None:
        body["thinking"] = {"type": "enabled" if thinking else "disabled"}
    _require_address(url)
    where = f"{url.rstrip('/').removesuffix('/v1')}/v1/chat/completions"
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):  # the client's own message would hold the key
        raise DataError("a key is printable ASCII", where=KEY, fix="put the key into it that the server knows")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        with (
            httpx.Client(trust_env=False, timeout=httpx.Timeout(10.0, read=None)) as client,
            client.stream("POST", where, json=body, headers=headers) as response,
        ):
            if response.status_code != 200:
                response.read()
                raise _refusal(response, where)
            yield from _deltas(response.iter_lines(), where)
    except httpx.ConnectError as error:
        if "SSL" in str(error):
            fix = "write it as http://... where it speaks no TLS"
            raise ResourceError(f"no TLS with this server: {error}", where=where, fix=fix) from None
        raise ResourceError("no server answers", where=where, fix="start one with: ottava serve DIR") from None
    except httpx.HTTPError as error:
        raise ResourceError(f"the connection broke: {error}", where=where, fix="ask again") from None


def _require_address(url: str) -> None:
    try:
        parts = httpx.URL(url)
        good = parts.scheme in ("http", "https") and parts.host and 0 <= (parts.port or 0) < 2**16
    except httpx.InvalidURL:
        good = False
    if not good:
        raise DataError("not an http(s) address", where=url, fix="write it as http://127.0.0.1:8000")


def _deltas(lines: Iterator[str], where: str) -> Iterator[tuple[Part, str]]:
    parts: tuple[Part, ...] = ("reasoning", "content")
    for line in lines:
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            raise ResourceError(event["error"]["message"], where=where)
        for choice in event["choices"]:
            for part in parts:
                if choice["delta"].get(part):
                    yield part, choice["delta"][part]


def _refusal(response: httpx.Response, where: str) -> DataError | ResourceError:
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"the server answered {response.status_code}"
    kind = ResourceError if response.status_code >= 500 else DataError
    if response.status_code == 401:
        return DataError(
            "the server takes no question without a key that it knows", where=where, fix=f"put it into {KEY}"
        )
    what, _, fix = str(message).partition("\n")  # as `Gateway` puts a mend below what happened
    return kind(what, where=where, fix=fix or None)
