"""Programs, judged by hidden tests in a sandbox: `code:FILE`.

A line of the file has `question`, `answer` (a solution that is right) and `facts`, one of

    {"calls": [["f", [1, 2], 3], ...]}         f(1, 2) returns 3
    {"programs": [["5\\n", "25\\n"], ...]}       given this on standard input, that is printed
    {"asserts": ["assert f(1, 2) == 3", ...]}  a call with literals, compared with a literal; other asserts are refused:
                                               they would have to be run where the program can reach them

Arguments and values of calls are JSON; what JSON has not is {"tuple": [...]}, {"set": [...]}, {"dict": [[k, v], ...]}.
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any, cast

from ottava.errors import DataError, PlatformError
from ottava.tasks import sandbox
from ottava.tasks.base import Problem, final
from ottava.tasks.files import FileTask, facts
from ottava.tasks.jail import decode
from ottava.tasks.sandbox import Call, Limits, Program

HINT = "Answer with one Python program between ```python and ```."
_FENCED = re.compile(r"```[A-Za-z0-9+-]*[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL)


def make(path: str) -> Code:
    """The task `code:<path>`."""
    return Code(f"code:{path}", path)


class Code(FileTask):
    """Questions whose answers are programs. limits: of one process."""

    def __init__(self, name: str, path: str, limits: Limits | None = None) -> None:
        super().__init__(name, path)
        self.limits = limits or Limits()

    def check(self, problem: Problem, where: str) -> None:
        try:
            tests(problem)
        except DataError as error:
            raise DataError(error.what, where=where, fix=error.fix) from None

    def prompt(self, problem: Problem) -> str:
        return f"{problem.question.rstrip()}\n{HINT}"

    def check_answer(self, problem: Problem, text: str) -> bool:
        """Whether the program in `text` passes all tests. Raises PlatformError where it could not be run."""
        source = program(text)
        if not source.strip():
            return False
        verdict = sandbox.run(source, tests(problem), self.limits)
        if verdict.kind == "unscorable":
            raise PlatformError(f"{verdict.why}: {verdict.detail}")
        return verdict.kind == "right"


def program(text: str) -> str:
    """The program in a text: the last fenced block, else the answer as it stands."""
    blocks: list[str] = _FENCED.findall(text)
    return blocks[-1] if blocks else final(text)


def tests(problem: Problem) -> list[Call] | list[Program]:
    """The tests of a problem. Raises DataError where there are none, or they are of no known form."""
    known = facts(problem)
    if not isinstance(known, dict) or len(known) != 1 or not next(iter(known.values())):
        raise DataError(
            f"the problem {problem.id} has no tests",
            fix='facts are {"calls": ...}, {"programs": ...} or {"asserts": ...}',
        )
    kind, listed = next(iter(known.items()))
    try:
        if kind == "calls":
            return [Call(str(name), tuple(decode(args)), decode(expected)) for name, args, expected in listed]
        if kind == "programs":
            return [Program(str(stdin), str(stdout)) for stdin, stdout in listed]
        if kind == "asserts":
            return [_call(line) for line in listed]
    except (ValueError, TypeError, SyntaxError) as error:
        raise DataError(f"a test of {problem.id} cannot be read: {error}") from None
    raise DataError(f"{problem.id} has tests of an unknown form {kind!r}", fix="use calls, programs or asserts")


def _call(line: str) -> Call:
    """`assert f(1, [2]) == (3,)` as a call. Raises ValueError on any other assert."""
    tree = ast.parse(line.strip()).body
    refused = ValueError(f"{line!r} is not a call with literals that is compared with a literal")
    if len(tree) != 1 or not isinstance(tree[0], ast.Assert):
        raise refused
    test, call, expected = tree[0].test, tree[0].test, cast(ast.expr, ast.Constant(True))
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        call, expected = test.operand, ast.Constant(False)
    elif isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], (ast.Eq, ast.Is)):
        call, expected = test.left, test.comparators[0]
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.keywords:
        raise refused
    try:
        return Call(call.func.id, tuple(map(ast.literal_eval, call.args)), ast.literal_eval(expected))
    except ValueError:
        raise refused from None


def line(question: str, answer: str, tests: dict[str, Any], **more: Any) -> str:
    """A line of a file for this task."""
    return json.dumps({"question": question, "answer": answer, "facts": tests, **more})
