"""Mathematical answers, compared as mathematics: 1/2 is 0.5 is \\frac{1}{2}. Through math-verify.

`maths:FILE` takes its problems from a JSON Lines file. math-verify parses LaTeX and simplifies with sympy; both can
take for ever on a few characters, and its own timeouts use signals (they fail in threads and call a timeout a wrong
answer). So they are off, and answers are graded in a process of their own (`ottava.tasks.verify`), with a deadline that
holds for everything. Source: https://github.com/huggingface/Math-Verify.
"""

from __future__ import annotations

import logging
from typing import Any

from ottava.errors import DataError
from ottava.tasks.base import Problem, final, require
from ottava.tasks.files import FileTask

HINT = "Put the final answer in \\boxed{}."
LONGEST = 4000  # characters of an answer; a longer one is a text with an answer somewhere in it


def make(path: str) -> Maths:
    """The task `maths:<path>`. Raises PlatformError without math-verify."""
    require("math_verify", "math-verify", f"the task maths:{path}")
    return Maths(f"maths:{path}", path)


class Maths(FileTask):
    """Questions with mathematical answers."""

    def prompt(self, problem: Problem) -> str:
        return f"{problem.question.rstrip()}\n{HINT}"

    def check_answer(self, problem: Problem, text: str) -> bool:
        return same(problem.answer, text)


def same(gold: str, text: str) -> bool:
    """Whether the last answer in `text` equals `gold`. Raises DataError where `gold` cannot be read.

    May take for ever, and much memory: call it where it can be killed.
    """
    said = final(text)
    if said == gold.strip():
        return True
    if not said or len(said) > LONGEST:
        return False
    from math_verify import verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own timeouts are off
    right = _read(f"\\boxed{{{gold}}}") or _read(gold)
    if all(isinstance(x, str) for x in right):  # text is what it falls back to
        raise DataError(f"math-verify cannot read the right answer {gold!r}")
    return bool(verify(right, _read(said) or _read(f"${said}$"), timeout_seconds=None))


def _read(text: str) -> list[Any]:
    from math_verify import parse

    found: list[Any] = parse(text, parsing_timeout=0)
    return found
