"""The page on which people answer: one file that asks for nothing else, so that it works without a network.

Style and script stand in the page, and its policy allows these two by their digests and no others: whatever is in a
question stays text. It talks to the server that it came from, and to nobody else.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path

PLAIN = {
    "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Resource-Policy": "same-origin",
}  # fmt: skip
"""Headers of every answer."""


@cache
def whole() -> tuple[str, dict[str, str]]:
    """(the page, its headers)."""
    folder = Path(__file__).parent / "templates"
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("queue.css", "queue.js"))
    text = (folder / "queue.html").read_text(encoding="utf-8")
    text = text.replace("/*STYLE*/", style).replace("/*SCRIPT*/", script)
    policy = (
        f"default-src 'none'; script-src {_allowed(script)}; style-src {_allowed(style)}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, PLAIN | {"Content-Security-Policy": policy}


def _allowed(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
