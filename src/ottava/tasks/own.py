"""A module of yours as a task: `own:package.module`.

It is looked at before anybody uses it, and whatever it raises later is said with its own file and line: what is wrong
in it is its writer's to mend, and no fault of the program's. What `check_answer` raises is left as it is: where replies
are graded, that is a verdict on it (`ottava.tasks.verify`). What any of it prints goes to standard error, as standard
output is for what a command answers (`--json`: one object).
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import ottava
from ottava.errors import DataError, OttavaError

CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {  # a call that must be possible, and its writing
    "sample": ((None, 1, 1, "train"), {"fewer": True}, "sample(rng, steps, count, split, *, fewer=False)"),
    "held_out": (("",), {}, "held_out(question)"),
    "canonical": (("",), {}, "canonical(question)"),
    "family": (("",), {}, "family(question)"),
    "prompt": ((None,), {}, "prompt(problem)"),
    "check_answer": ((None, ""), {}, "check_answer(problem, text)"),
}
DOCUMENTED = "a task has the functions of ottava.tasks.base.Task; docs/reasoning.md has a small one whole"


class Own:
    """The task `own:<name>`. SAFE, MAX_STEPS: the module's, else False and 1; every other name is the module's."""

    def __init__(self, name: str, module: ModuleType) -> None:
        self.NAME, self.module = f"own:{name}", module
        self.SAFE: bool = getattr(module, "SAFE", False)
        self.MAX_STEPS: int = getattr(module, "MAX_STEPS", 1)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "module":
            raise AttributeError(name)
        found = getattr(self.module, name)
        if inspect.isfunction(found):
            found = _guarded(self, name, found)
        setattr(self, name, found)
        return found


def make(name: str) -> Own:
    """The task `own:<name>`. Raises DataError with file:line where the module is missing, breaks, or is no task."""
    try:
        with redirect_stdout(sys.stderr):
            module = importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            fix = "name it as an import does (package.module, without .py), and put its folder on PYTHONPATH"
            raise DataError(f"the task's module cannot be imported: {error}", where=f"own:{name}", fix=fix) from error
        what = f"the task's module cannot be imported: {described(error)}"
        raise DataError(what, where=line_of(error, f"own:{name}"), fix="mend the module") from error
    _look(name, module)
    return Own(name, module)


def _look(name: str, module: ModuleType) -> None:
    """Raise DataError where the module is no task."""
    file = module.__file__ or f"own:{name}"
    missing = [function for function in CALLS if not callable(getattr(module, function, None))]
    if missing:
        raise DataError(f"the module has no {', '.join(missing)}", where=f"{file}:1", fix=DOCUMENTED)
    for function, (args, kwargs, written) in CALLS.items():
        its = getattr(module, function)
        try:
            inspect.signature(its).bind(*args, **kwargs)
        except TypeError as error:
            where = f"{file}:{its.__code__.co_firstlineno}" if inspect.isfunction(its) else file
            fix = f"write it so that it can be called as {written}"
            raise DataError(f"{function} cannot be called as a task's is: {error}", where=where, fix=fix) from None
        except ValueError:
            continue  # something built in, which says nothing of its arguments
    said = {
        "NAME": (getattr(module, "NAME", f"own:{name}") == f"own:{name}", f"NAME is {f'own:{name}'!r}, or is left out"),
        "SAFE": (isinstance(getattr(module, "SAFE", False), bool), "SAFE is True or False"),
        "MAX_STEPS": (_level(getattr(module, "MAX_STEPS", 1)), "MAX_STEPS is the highest level, a number from 1"),
    }
    for attribute, (good, fix) in said.items():
        if not good:
            what = f"{attribute} of the task is {getattr(module, attribute)!r}"
            raise DataError(what, where=_assigned(file, attribute), fix=fix)


def _level(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _assigned(file: str, name: str) -> str:
    """Where a module's name is assigned, if that can be seen."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return file
    at = next((number for number, line in enumerate(lines, 1) if re.match(rf"{name}\b[^=]*=", line)), None)
    return file if at is None else f"{file}:{at}"


def _guarded(task: Own, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose exceptions are the user's mistakes, but for those of `check_answer`."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            with redirect_stdout(sys.stderr):
                return function(*args, **kwargs)
        except (Exception, SystemExit) as error:
            if name == "check_answer" or isinstance(error, OttavaError):
                raise
            what = f"{name} of the task {task.NAME!r} raised {described(error)}"
            raise DataError(what, where=line_of(error, task.NAME), fix="mend the task's module") from error

    return call


def described(error: BaseException) -> str:
    """An error in one bounded line that begins with its type."""
    try:
        if isinstance(error, OttavaError):  # whose text has several lines
            place = "" if error.where is None else f" ({error.where})"
            return f"{type(error).__name__}: {error.what}{place}"[:500]
        return f"{type(error).__name__}: {error}"[:500]
    except Exception:
        return type(error).__name__


def line_of(error: BaseException, otherwise: str) -> str:
    """file:line of the innermost line of the user's own code that an error came through."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not is_library(Path(frame.filename))]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else otherwise


def is_library(path: Path) -> bool:
    """Whether a source file is Python's, an installed package's or this program's, and not the user's own."""
    if {"site-packages", "dist-packages"} & set(path.parts) or str(path).startswith("<"):
        return True
    roots = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), str(Path(ottava.__file__).parent)]
    return any(path.is_relative_to(root) for root in roots)
