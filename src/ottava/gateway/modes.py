"""One decision on thinking, whatever form the client used.

Every API family has its own switch, and a server that ignores one of them answers in the wrong mode
without a word. Here each form becomes a wish; wishes that agree decide, wishes that differ are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from ottava.gateway.schema import Asked, Effort

EFFORTS: Mapping[str, bool] = {effort: effort not in ("none", "minimal") for effort in get_args(Effort)}
SUFFIXES: Mapping[str, bool] = {"-thinking": True, "-direct": False}


class Conflict(ValueError):
    """The request asks for both modes, or for one that the model lacks."""


def served_names(name: str, switch: bool) -> list[str]:
    """The model names that clients may use: the name, and with each suffix where the model has a thinking switch."""
    return [name, *(name + suffix for suffix in SUFFIXES)] if switch else [name]


def wishes(request: Asked, name: str) -> dict[str, bool]:
    """What each form of a request asks for, by the form as the client wrote it. name: the served model's."""
    found: dict[str, bool] = {}
    if request.thinking is not None:
        found[f"thinking.type={request.thinking.type!r}"] = request.thinking.type == "enabled"
    if request.reasoning_effort is not None:
        found[f"reasoning_effort={request.reasoning_effort!r}"] = EFFORTS[request.reasoning_effort]
    if request.reasoning is not None and request.reasoning.effort is not None:
        found[f"reasoning.effort={request.reasoning.effort!r}"] = EFFORTS[request.reasoning.effort]
    for key in ("thinking", "enable_thinking"):
        value = getattr(request.chat_template_kwargs, key, None)
        if value is not None:
            found[f"chat_template_kwargs.{key}={str(value).lower()}"] = value
    for suffix, value in SUFFIXES.items():
        if request.model == name + suffix:
            found[f"model={request.model!r}"] = value
    return found


def decide(asked: Mapping[str, bool], switch: bool) -> bool:
    """Thinking or not; not where nobody asks. switch: whether the model can think. Raises Conflict naming the forms."""
    on = [form for form, value in asked.items() if value]
    off = [form for form, value in asked.items() if not value]
    if on and off:
        raise Conflict(f"{on[0]} asks for thinking and {off[0]} asks against it; send one of them")
    if on and not switch:
        raise Conflict(f"{on[0]} asks for thinking, but this model has no thinking switch")
    return bool(on)
