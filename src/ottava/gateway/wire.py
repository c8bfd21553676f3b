"""What the gateway and a backend process say to each other: JSON lines, one question a connection (`door`).

The gateway writes one line, {"op": ...}; hanging up is how it cancels. A backend answers with lines:

    hello     {"pid", "context", "invariant" and "numerics": see `Engine`}
    health    {"load": requests at work or waiting, "still": seconds since the last token of any of them}
    render    {"ids"}: of each conversation [messages, thinking, or tools too] by its own template; null where refused
    generate  [id, logprob, [[id, logprob], ...]] for every token, then {"done": true}
    score     the same of the ids from "first" (1) on, which are all given, with the likeliest id

or with {"error", "fix", "kind"}. A stream without its last line was cut off: the backend died.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ottava.engine.generate import ThinkBudget
from ottava.engine.session import QueueFull, Sampling, Token
from ottava.errors import DataError, OttavaError, ResourceError, Verdict

LONGEST = 1 << 26
"""Bytes that a line may have: a prompt of millions of ids."""

_KINDS: dict[str, type[OttavaError]] = {
    "data": DataError, "full": QueueFull, "resource": ResourceError, "verdict": Verdict,
}  # fmt: skip


def line(message: Any) -> bytes:
    """One message as a line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def sampling_of(said: Mapping[str, Any]) -> Sampling:
    """A Sampling from its message."""
    think = said["think"]
    return Sampling(**{**said, "think": None if think is None else ThinkBudget(*think)})


def of_sampling(how: Sampling) -> dict[str, Any]:
    """The message of a Sampling."""
    think = None if how.think is None else (how.think.end, how.think.tokens)
    return {**vars(how), "think": think}


def of_token(token: Token) -> bytes:
    """The line of a token."""
    return line([token.id, token.logprob, token.top])


def token_of(said: Any) -> Token:
    """A token from its message."""
    number, logprob, top = said
    return Token(number, logprob, tuple((other, value) for other, value in top))


def of_error(error: Exception) -> bytes:
    """The line of an exception."""
    kind = next((name for name, kind in _KINDS.items() if isinstance(error, kind)), "resource")
    what, fix = (
        (error.what, error.fix) if isinstance(error, OttavaError) else (f"{type(error).__name__}: {error}", None)
    )
    return line({"error": what, "fix": fix, "kind": kind})


def error_of(said: Mapping[str, Any]) -> OttavaError:
    """The exception of an error's message."""
    return _KINDS[said["kind"]](said["error"], fix=said["fix"])
