"""Problems from a file of one's own: JSON Lines with `question` and `answer`, and what the verifier needs."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ottava.errors import DataError, from_os_error
from ottava.tasks.base import Problem, Split, in_test, plain

if TYPE_CHECKING:
    import numpy as np

TEST_ONE_IN = 5


class FileTask:
    """A task whose problems are lines of a file; a subclass says how an answer is checked.

    A line has `question` and `answer` (text), and may have `id` (text), `steps` (a level from 1), `facts` (any JSON).
    Sides: a hash of the question's text, a fifth is for tests. The file is read when problems are asked for, so that a
    process that only checks answers does not need it.
    """

    SAFE = False

    def __init__(self, name: str, path: str) -> None:
        self.NAME = name
        self.path = Path(path).expanduser()

    @property
    def MAX_STEPS(self) -> int:
        return max(problem.steps for problem in self.problems)

    @functools.cached_property
    def problems(self) -> list[Problem]:
        """All problems in the file's order. Raises DataError with file:line."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError("the file is not UTF-8 text", where=self.path) from error
        except OSError as error:
            raise from_os_error(error, f"reading the problems of {self.NAME}") from error
        found: dict[str, Problem] = {}
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                problem = self.read(line, number)
                if problem.id in found:
                    raise DataError(f"the id {problem.id!r} is there twice", where=f"{self.path}:{number}")
                found[problem.id] = problem
        if not found:
            raise DataError("there is no problem in the file", where=self.path)
        return list(found.values())

    def read(self, line: str, number: int) -> Problem:
        """One line as a problem. Raises DataError."""
        where = f"{self.path}:{number}"
        try:
            data = json.loads(line)
        except ValueError as error:
            raise DataError(f"this line is not JSON: {error}", where=where) from None
        if not isinstance(data, dict):
            raise DataError("a line is one JSON object", where=where)
        given = {"id": f"{self.path.stem}-{number}", "steps": 1, "facts": None, **data}
        for key, kind in (("question", str), ("answer", str), ("id", str), ("steps", int)):
            if not isinstance(given.get(key), kind) or given[key] in ("", 0) or given[key] is True:
                raise DataError(f"{key!r} must be {'text' if kind is str else 'a number from 1'}", where=where)
        facts = "" if given["facts"] is None else json.dumps(given["facts"])
        problem = Problem(given["id"], given["steps"], given["question"], given["answer"], facts)
        self.check(problem, where)
        return problem

    def check(self, problem: Problem, where: str) -> None:
        """Raise DataError where a problem cannot be verified."""

    def sample(
        self, rng: np.random.Generator, steps: int, count: int, split: Split, *, fewer: bool = False
    ) -> list[Problem]:
        """See Task. steps: the level that lines have."""
        side = [p for p in self.problems if p.steps == steps and self.held_out(p.question) == (split == "test")]
        distinct = list({self.canonical(p.question): p for p in side}.values())
        if len(distinct) < count and not fewer:
            raise DataError(
                f"there are only {len(distinct)} problems of level {steps} in the {split} split, not the {count} asked "
                "for",
                where=self.path,
                fix="ask for fewer, or add some",
            )
        return [distinct[i] for i in rng.permutation(len(distinct))[:count]]

    def held_out(self, question: str) -> bool:
        """A fifth of all families."""
        return in_test(self.family(question), TEST_ONE_IN, "ottava/files")

    def canonical(self, question: str) -> str:
        return plain(question)

    def family(self, question: str) -> str:
        return plain(question)

    def prompt(self, problem: Problem) -> str:
        return problem.question

    def check_answer(self, problem: Problem, text: str) -> bool:
        raise NotImplementedError


def facts(problem: Problem) -> Any:
    """The problem's facts as data; None where it has none. Raises DataError."""
    try:
        return json.loads(problem.facts) if problem.facts else None
    except ValueError as error:
        raise DataError(f"the facts of {problem.id} are not JSON: {error}") from None
