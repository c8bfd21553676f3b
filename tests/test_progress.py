"""What serve says while models load, on a terminal and in a file."""

from __future__ import annotations

import io
import re

import pytest

from ottava.gateway import progress
from ottava.gateway.progress import Progress, loading


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_file_gets_a_line_for_every_change() -> None:
    to = io.StringIO()
    shown = Progress(to)
    for phases in (
        {"a": "starting", "b": "starting"},
        {"a": "loading", "b": "starting"},
        {"a": "ready", "b": "loading"},
    ):
        shown.show(phases)
        shown.show(phases)
    shown.show({"a": "ready", "b": "loading"}, last=True)
    said = re.sub(r"\d+\.\d s", "N s", to.getvalue()).splitlines()
    assert said == [
        "a: starting", "b: starting", "a: loading after N s", "a: ready after N s", "b: loading after N s",
    ]  # fmt: skip


def test_a_terminal_has_one_line_that_is_gone_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    to = Terminal()
    with loading("m", to):
        while to.getvalue().count("m loading 0 s") < 2:
            pass
    assert "\n" not in to.getvalue()
    assert to.getvalue().endswith("\r\x1b[K")


def test_a_model_that_does_not_load_is_never_called_ready() -> None:
    to = io.StringIO()
    with pytest.raises(ValueError, match="no"), loading("m", to):
        raise ValueError("no")
    assert to.getvalue() == "m: loading\n"
