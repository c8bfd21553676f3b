"""What every task has in common: a problem, the functions a task offers, and the registry.

Labelling, training and evaluation know a task only through these functions, so a second task (a
wrapper of reasoning-gym, say) is one module with the same functions and one line in `_MODULES`.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from ottava.document import suggest
from ottava.errors import DataError, from_os_error

if TYPE_CHECKING:
    import numpy as np

Split = Literal["train", "test"]

_MODULES = {"chains": "ottava.tasks.chains"}


@dataclass(frozen=True, slots=True)
class Problem:
    """One question with its answer. steps: how many operations a full trace has."""

    id: str
    steps: int
    question: str
    answer: str


class Task(Protocol):
    """The functions of a task; a module that has them is a task.

    Text is made of tokens of `vocabulary()` with single spaces between them.
    """

    MAX_STEPS: int

    def vocabulary(self) -> list[str]:
        """The task's tokens, in the order of their ids."""

    def sample(
        self, rng: np.random.Generator, steps: int, count: int, split: Split, *, fewer: bool = False
    ) -> list[Problem]:
        """`count` distinct problems of one side of the split; DataError where there are not so many.

        fewer: return all there are instead of raising.
        """

    def held_out(self, question: str) -> bool:
        """Whether the question belongs to the test side. Alike for all questions of one family."""

    def canonical(self, question: str) -> str:
        """One writing for every spelling of the same question."""

    def family(self, question: str) -> str:
        """Alike for questions that are the same problem in substance."""

    def trace(self, problem: Problem) -> str:
        """The right trace."""

    def well_formed(self, problem: Problem, trace: str, answer: str) -> bool:
        """Whether the trace has the right shape and ends in `answer`. Says nothing of its steps' truth."""

    def check_answer(self, problem: Problem, text: str) -> bool:
        """Whether `text` is the answer, exactly."""

    def check_trace(self, problem: Problem, trace: str) -> list[int]:
        """The indices of the wrong steps, from 0; empty where the trace is right."""


def names() -> list[str]:
    """The tasks there are."""
    return list(_MODULES)


def get(name: str) -> Task:
    """The task called `name`. Raises DataError where there is none."""
    if name not in _MODULES:
        raise DataError(f"there is no task {name!r}", fix=suggest(name, names()))
    return cast(Task, importlib.import_module(_MODULES[name]))


def generator(seed: int, *names: object) -> np.random.Generator:
    """A random stream that depends on the seed and the names alone: not on the process, order or machine."""
    import numpy as np

    text = json.dumps([seed, *map(str, names)])
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little"))


def row(task: str, problem: Problem, **more: Any) -> dict[str, Any]:
    """The problem as a line of a data set."""
    return {
        "id": problem.id,
        "task": task,
        "steps": problem.steps,
        "question": problem.question,
        "answer": problem.answer,
        **more,
    }


def problem_of(line: Mapping[str, Any]) -> Problem:
    """The problem in a line of a data set, as `read_lines` returns it."""
    return Problem(line["id"], line["steps"], line["question"], line["answer"])


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON Lines so that the file is complete or not there at all."""
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise from_os_error(error, f"writing {path.name}") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a data set. Raises DataError with file:line on what is not a problem."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError("the file is not UTF-8 text", where=path) from error
    except OSError as error:
        raise from_os_error(error, "reading a data set") from error
    lines = []
    for number, raw in enumerate(text.split("\n"), 1):
        if raw.strip():
            lines.append(_line(raw, f"{path}:{number}"))
    return lines


def _line(raw: str, where: str) -> dict[str, Any]:
    try:
        line = json.loads(raw)
    except json.JSONDecodeError as error:
        raise DataError(f"this line is not JSON: {error.msg}", where=f"{where}:{error.colno}") from None
    if not isinstance(line, dict):
        raise DataError("a line of a data set is one JSON object", where=where)
    for key, kind in (("id", str), ("task", str), ("steps", int), ("question", str), ("answer", str)):
        if not isinstance(line.get(key), kind):
            have = "is missing" if key not in line else f"is {line[key]!r}"
            raise DataError(f"{key!r} {have}; it must be {'text' if kind is str else 'a number'}", where=where)
    return line
