"""A conversation with a server at the terminal: its history, the thinking switch, answers as they come.

Nothing that a model says can steer the terminal: control characters are left out.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from rich.console import Console

from ottava.errors import OttavaError
from ottava.gateway.client import ask

COMMANDS = "/think and /direct switch, /new forgets what was said, /quit leaves; Ctrl-C stops an answer"
_NAMES = {None: "", True: "thinking ", False: "direct "}


@dataclass
class Conversation:
    """What was said, and how the next question is asked. thinking None: as the server does it."""

    url: str
    console: Console
    thinking: bool | None = None
    said: list[dict[str, str]] = field(default_factory=list)

    def command(self, line: str) -> bool:
        """Obey a line that begins with a stroke; False: leave."""
        if line == "/quit":
            return False
        if line == "/new":
            self.said.clear()
        elif line in ("/think", "/direct"):
            self.thinking = line == "/think"
        else:
            self._note(f"no such command: {line}. {COMMANDS}" if line != "/help" else COMMANDS)
        return True

    def question(self, text: str) -> None:
        """Ask, and show the answer. A question that got none is forgotten; an answer that was stopped is kept."""
        content = ""
        last = None
        try:
            for part, piece in ask(self.url, text, self.thinking, earlier=self.said):
                if last not in (None, part):
                    self.console.print()
                last = part
                self._show(piece, dim=part == "reasoning")
                content += piece if part == "content" else ""
        except KeyboardInterrupt:
            self._note("\n(stopped)")
        except OttavaError as error:
            self._note(error.render())
            if not content:
                return
        if last is not None:
            self.console.print()
        if content:
            self.said += [{"role": "user", "content": text}, {"role": "assistant", "content": content}]

    def _show(self, text: str, *, dim: bool) -> None:
        self.console.out(harmless(text), style="dim" if dim else None, highlight=False, end="")
        self.console.file.flush()

    def _note(self, text: str) -> None:
        self.console.out(harmless(text), style="dim", highlight=False)


def converse(url: str, thinking: bool | None, *, read: Callable[[str], str] = input) -> None:
    """Talk until /quit or the end of the input. read: shows a prompt and gives a line, as `input` does."""
    with suppress(ImportError):
        import readline  # noqa: F401  (lines can then be edited and called back)
    console = Console(file=sys.stdout, soft_wrap=True)
    talk = Conversation(url, console, thinking)
    console.out(COMMANDS, style="dim", highlight=False)
    while True:
        try:
            line = read(f"{_NAMES[talk.thinking]}> ").strip()
        except KeyboardInterrupt:
            console.out("\n(/quit or Ctrl-D leaves)", style="dim", highlight=False)
            continue
        except EOFError:
            console.print()
            return
        if line.startswith("/"):
            if not talk.command(line):
                return
        elif line:
            talk.question(line)


def harmless(text: str) -> str:
    """The text without control characters, which a terminal would obey; lines and tabs stay."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
