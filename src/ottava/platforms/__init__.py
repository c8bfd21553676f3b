"""Chip families behind one interface: the only place in the project that calls a vendor's API.

A new family is one file here with a `PLATFORM` that passes tests/test_platforms.py unchanged.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from ottava.document import suggest
from ottava.errors import PlatformError
from ottava.platforms.base import ACTIONS, Action, FaultClass, Platform

__all__ = ["ACTIONS", "Action", "FaultClass", "Platform", "asked", "get", "names"]

_TOOLS = {"ascend", "base", "doctor", "lockin", "probe"}


def names() -> list[str]:
    """The chip families this installation knows, whether or not a device is here."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _TOOLS)


def get(name: str) -> Platform:
    """The platform called `name`, without touching any device. PlatformError where there is none."""
    known = names()
    if name not in known:
        raise PlatformError(f"unknown platform {name!r}", fix=suggest(name, known))
    platform = importlib.import_module(f"ottava.platforms.{name}").PLATFORM
    assert isinstance(platform, Platform)
    return platform


def asked(args: Mapping[str, Any]) -> Platform:
    """The platform that a worker was started for: args["platform"], by default cpu."""
    return get(args.get("platform", "cpu"))
