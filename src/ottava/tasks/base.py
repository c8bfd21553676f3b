"""What every task has in common: a problem, the functions a task offers, and the registry.

Labelling, training and evaluation know a task only through these functions, so another task is one
module with the same functions and one line in `_KINDS`. A task has a name, by which every process finds it:

    chains                      a module of ours that is a task itself; chains:salt=WORD holds other problems out
    gym:chain_sum,max_terms=3   a kind, and what it is made of: `make` in the kind's module returns the task
    maths:FILE  code:FILE       problems from a file, with the kind's verifier
    own:package.module          a module of yours with the functions of `Task`
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from ottava.document import suggest
from ottava.errors import DataError, PlatformError, from_os_error

if TYPE_CHECKING:
    import numpy as np

Split = Literal["train", "test"]

_KINDS = {  # how the name is written -> the module
    "chains": ("chains", "ottava.tasks.chains"),
    "gym": ("gym:DATASET", "ottava.tasks.gym"),
    "maths": ("maths:FILE", "ottava.tasks.maths"),
    "code": ("code:FILE", "ottava.tasks.code"),
    "own": ("own:MODULE", "ottava.tasks.own"),
}
_TRACED = _SALTED = ("chains",)


@dataclass(frozen=True, slots=True)
class Problem:
    """One question with its answer.

    steps: how hard it is, from 1: the operations of a full trace, or the task's own levels. facts: JSON that the
    verifier needs besides the answer (tests of a program, numbers that may be used); most tasks have none.
    """

    id: str
    steps: int
    question: str
    answer: str
    facts: str = ""


class Task(Protocol):
    """The functions of a task; a module that has them is a task.

    NAME: what `get` finds it by, here and in another process. SAFE: `check_answer` only compares, so that it can be
    called in any process without a deadline; everything else is graded apart (`ottava.tasks.verify`).
    """

    NAME: str
    MAX_STEPS: int
    SAFE: bool

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

    def prompt(self, problem: Problem) -> str:
        """What the model is asked: the question, and how an answer is to be written where that is not plain."""

    def check_answer(self, problem: Problem, text: str) -> bool:
        """Whether `text`, what a model said after it thought, is a right answer."""


class Traced(Task, Protocol):
    """A task that also knows the right way to the answer, step by step.

    Text is made of tokens of `vocabulary()` with single spaces between them.
    """

    def vocabulary(self) -> list[str]:
        """The task's tokens, in the order of their ids."""

    def trace(self, problem: Problem) -> str:
        """The right trace."""

    def well_formed(self, problem: Problem, trace: str, answer: str) -> bool:
        """Whether the trace has the right shape and ends in `answer`. Says nothing of its steps' truth."""

    def check_trace(self, problem: Problem, trace: str) -> list[int]:
        """The indices of the wrong steps, from 0; empty where the trace is right."""

    def equivalent(self, problem: Problem, trace: str) -> bool:
        """Whether the steps are right but for how they are written. True of a right trace."""


def names(*, traced: bool = False) -> list[str]:
    """How the names of the tasks that there are are written. traced: of those that are known to have traces."""
    return [written for kind, (written, _) in _KINDS.items() if not traced or kind in _TRACED]


@functools.lru_cache(maxsize=64)
def get(name: str) -> Task:
    """The task called `name`. Raises DataError where there is none, PlatformError where its library is missing."""
    kind, _, rest = name.partition(":")
    written, module = _KINDS.get(kind, ("", ""))
    if not written or ((":" in written) != bool(rest) and kind not in _SALTED):
        raise DataError(f"there is no task {name!r}", fix=suggest(name, names()))
    found = importlib.import_module(module)
    return cast(Task, found.make(rest) if rest else found)


def traced(name: str) -> Traced:
    """The task called `name`, which must know its traces. Raises as `get`, and DataError where it knows none."""
    kind = name.partition(":")[0]
    never = kind in _KINDS and kind not in (*_TRACED, "own")  # said before its library is looked for
    if never or not hasattr(get(name), "check_trace"):
        raise DataError(
            f"the task {name!r} knows answers but no traces, and here traces are needed",
            fix="use chains; or the stage `problems` instead of `label`, and reinforce, which learn from answers alone",
        )
    return cast(Traced, get(name))


def require(library: str, package: str, what: str) -> None:
    """Raise PlatformError unless `library` (what is imported) of `package` (what is installed) is there."""
    if importlib.util.find_spec(library) is None:
        raise PlatformError(
            f"{what} needs the package {package}, which is not installed",
            where=f"import {library}",
            fix="pip install -e '.[reason]'",
        )


def plain(text: str) -> str:
    """One writing for white space, case and typographic variants."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def in_test(kin: str, one_in: int, salt: str) -> bool:
    """Whether a family is on the test side: a hash of its text, `one_in` of that many."""
    digest = hashlib.blake2b(kin.encode(), digest_size=8, person=salt.encode()[:16]).digest()
    return int.from_bytes(digest, "little") % one_in == 0


_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


def final(text: str, number: bool = False) -> str:
    """The answer in a text: what stands in the last <answer> tags, else all of it.

    number: where a number is asked for and no tags stand there, the last number of the text, if it has any.
    """
    tagged = _ANSWER.findall(text)
    if number and not tagged and (numbers := _NUMBER.findall(text)):
        return str(numbers[-1]).replace(",", "")
    return (tagged[-1] if tagged else text).strip()


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
        **({"facts": problem.facts} if problem.facts else {}),
        **more,
    }


def problem_of(line: Mapping[str, Any]) -> Problem:
    """The problem in a line of a data set, as `read_lines` returns it."""
    return Problem(line["id"], line["steps"], line["question"], line["answer"], line.get("facts", ""))


def task_of(lines: Iterable[Mapping[str, Any]]) -> Task:
    """The task of a data set's lines. Raises DataError where they name several or there are none; and as `get`."""
    found = sorted({str(line["task"]) for line in lines})
    if len(found) != 1:
        what = f"a data set is of one task, and this one is of {', '.join(found)}" if found else "the data set is empty"
        raise DataError(what)
    return get(found[0])


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
    if not isinstance(line.get("facts", ""), str):
        raise DataError(f"'facts' is {line['facts']!r}; it must be text", where=where)
    return line
