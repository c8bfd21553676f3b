"""Who may ask, and how much at a time. Only digests of keys are kept; no key is ever written anywhere."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ottava.errors import DataError, from_os_error
from ottava.gateway.schema import ApiError

VARIABLE = "OTTAVA_API_KEYS"
"""The environment's keys, with commas; they are taken out of it, so that no backend inherits them."""
SHORTEST = 16  # characters of a key in the environment
ANYBODY = "anybody"


@dataclass(frozen=True)
class Keys:
    """The SHA-256 of each key, by its owner's name. None at all: everybody may ask."""

    digests: Mapping[str, bytes] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path | None) -> Keys:
        """The keys of a file (lines of a name and 64 hexadecimal digits) and of the environment. Raises DataError."""
        found = {} if path is None else _lines(path)
        for number, key in enumerate(filter(None, map(str.strip, os.environ.pop(VARIABLE, "").split(","))), 1):
            if len(key) < SHORTEST:
                raise DataError(
                    f"key {number} is shorter than {SHORTEST} characters", where=VARIABLE, fix="longer keys"
                )
            found[f"environment-{number}"] = hashlib.sha256(key.encode()).digest()
        if path is not None and not found:
            raise DataError("there is no key in the file", where=path, fix="write lines of: NAME SHA256")
        return cls(found)

    def owner(self, header: str | None) -> str:
        """Whose key an Authorization header holds. Every digest is compared in full. Raises ApiError 401."""
        if not self.digests:
            return ANYBODY
        kind, _, key = (header or "").partition(" ")
        said = hashlib.sha256(key.strip().encode(errors="surrogateescape")).digest()
        found = None
        for name, digest in self.digests.items():
            if hmac.compare_digest(said, digest):
                found = name
        if found is None or kind.lower() != "bearer":
            raise ApiError(401, "no valid key: send the header 'Authorization: Bearer KEY'", code="invalid_api_key")
        return found


def _lines(path: Path) -> dict[str, bytes]:
    if path.is_dir():
        raise DataError("this is a folder", where=path, fix="name the file with lines of: NAME SHA256")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        lines = ["\0"]
    except OSError as error:
        raise from_os_error(error, "reading keys", path) from None
    found: dict[str, bytes] = {}
    for number, line in enumerate(lines, 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or not re.fullmatch("[0-9a-f]{64}", words[1]) or words[0] in found:
            fix = "a line is a name of its own and the key's SHA-256: printf %s KEY | sha256sum"
            raise DataError("this is no line of keys", where=f"{path}:{number}", fix=fix)
        found[words[0]] = bytes.fromhex(words[1])
    return found


@dataclass
class Turnstile:
    """What one owner may do: so many requests at once, and so many a minute (a bucket that refills). 0: no limit."""

    at_once: int = 0
    a_minute: int = 0
    clock: Callable[[], float] = time.monotonic
    _inside: dict[str, int] = field(default_factory=dict)
    _buckets: dict[str, tuple[float, float]] = field(default_factory=dict)

    def enter(self, owner: str) -> None:
        """Raises ApiError 429 with the seconds to wait."""
        if self.at_once and self._inside.get(owner, 0) >= self.at_once:
            raise ApiError(429, f"{self.at_once} requests of this key are at work", code="too_many_at_once", retry=1)
        if self.a_minute:
            now, pace = self.clock(), self.a_minute / 60
            left, since = self._buckets.get(owner, (float(self.a_minute), now))
            left = min(float(self.a_minute), left + (now - since) * pace)
            if left < 1:
                self._buckets[owner] = (left, now)
                retry = max(1, int(-(-(1 - left) // pace)))
                raise ApiError(429, f"{self.a_minute} requests a minute are allowed", code="rate_limited", retry=retry)
            self._buckets[owner] = (left - 1, now)
        self._inside[owner] = self._inside.get(owner, 0) + 1

    def leave(self, owner: str) -> None:
        """To be called once for every `enter` that returned."""
        self._inside[owner] -= 1
        if not self._inside[owner]:
            del self._inside[owner]
