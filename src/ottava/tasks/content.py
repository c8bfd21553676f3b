"""What a task is made of that lies outside the program: the user's module, or the file with the problems.

A verifier that was edited judges otherwise, so its content is part of the key of the stage that draws problems, and
stands in that stage's artifact (`task.json`), whose digest is part of the key of every stage after it. A task that is
built in has no content here: the version of its stage stands for it.

Of `own:MODULE` counted are the module, the packages around it, and what these import of the user's own code, found by
their import statements; and the files that the module names in FILES. What it imports by other means, reads without
naming it, or takes from an installed package is not seen.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from ottava.artifact import digest_of, file_digest, write_json
from ottava.errors import DataError, OttavaError, from_os_error
from ottava.tasks.base import get
from ottava.tasks.own import is_library

RECORD = "task.json"
"""Of an artifact with problems whose task has content: what `of` said when they were drawn."""

_FILES = ("maths", "code")


def of(task: str) -> dict[str, Any] | None:
    """{task, digest, files: {module or file: SHA-256}}; None for a task that is built in. Raises DataError."""
    kind, _, rest = task.partition(":")
    if kind == "own":
        found = {name: _digest(source, task) for name, source in _modules(rest).items()}
        found |= {f"file {name}": _digest(path, task) for name, path in _named(task)}
    elif kind in _FILES:
        path = Path(rest).expanduser()
        found = {path.name: _digest(path, task)}
    else:
        return None
    return {"task": task, "digest": digest_of(found), "files": dict(sorted(found.items()))}


def key(task: str) -> dict[str, str]:
    """What a stage's key has of the task: its digest, or nothing where it is built in."""
    found = of(task)
    return {} if found is None else {"task": found["digest"]}


def record(folder: Path, task: str) -> None:
    """Write the task's content beside the problems that were drawn from it; nothing where it is built in."""
    if (found := of(task)) is not None:
        write_json(folder / RECORD, found)


def placed(error: OttavaError) -> str:
    """What is wrong with a task and where, in one line, for those who say a place of their own beside it."""
    return error.what if error.where is None else f"{error.what} ({error.where})"


def require_same(told: Mapping[str, Any]) -> None:
    """Raise DataError where the task is no more what it was when `told` was recorded."""
    now = of(told["task"])
    if now is None or now["digest"] != told["digest"]:
        files = {} if now is None else now["files"]
        changed = sorted(name for name in told["files"] | files if told["files"].get(name) != files.get(name))
        raise DataError(
            f"the task {told['task']!r} is not what it was when its problems were drawn: {', '.join(changed)} changed",
            where=told["task"],
            fix="run the same command again: what was judged by it is done anew",
        )


def _digest(path: Path, task: str) -> str:
    try:
        return file_digest(path)
    except OSError as error:
        raise from_os_error(error, f"reading the task {task}", path) from error


def _named(task: str) -> Iterator[tuple[str, Path]]:
    """The files that the module says it reads."""
    its: Any = get(task)
    names = getattr(its, "FILES", ())
    if not isinstance(names, (tuple, list)) or not all(isinstance(name, str) for name in names):
        fix = 'a tuple of names, as FILES = ("words.txt",)'
        raise DataError(f"FILES of the task is {names!r}", where=task, fix=fix)
    for name in names:
        yield name, Path(its.module.__file__).parent / name


def _modules(name: str) -> dict[str, Path]:
    """The sources of a module of the user's: its own, its packages', and those that they import."""
    importlib.invalidate_caches()
    found: dict[str, Path] = {}
    left, top = list(_with_packages(name)), name.partition(".")[0]
    while left:
        module = left.pop()
        if module in found:
            continue
        spec = _spec(module)
        source = None if spec is None or not spec.has_location or spec.origin is None else Path(spec.origin)
        if spec is None or source is None or (is_library(source) and module.partition(".")[0] != top):
            continue
        found[module] = source
        if source.suffix == ".py":
            left += _imported(source, module if spec.submodule_search_locations is not None else _parent(module))
    if name not in found:
        raise DataError(f"the source of the module {name} cannot be found", where=f"own:{name}")
    return found


def _spec(module: str) -> ModuleSpec | None:
    """Where a module would be imported from; nothing is imported to find that out."""
    spec: ModuleSpec | None = None
    for name in _with_packages(module):
        try:
            path = None if spec is None else spec.submodule_search_locations
            spec = importlib.util.find_spec(name) if "." not in name else PathFinder.find_spec(name, path or [])
        except (ImportError, ValueError):
            return None
        if spec is None:
            return None
    return spec


def _with_packages(module: str) -> Iterator[str]:
    """a, a.b and a.b.c of a.b.c."""
    parts = module.split(".")
    yield from (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _parent(module: str) -> str:
    return module.rpartition(".")[0]


def _imported(source: Path, package: str) -> Iterator[str]:
    """The modules that a source's import statements name, wherever they stand. package: what it lies in."""
    try:
        tree = ast.parse(source.read_bytes())
    except SyntaxError as error:
        raise DataError(f"this is no Python: {error.msg}", where=f"{source}:{error.lineno}") from None
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _with_packages(alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            if base:
                yield from _with_packages(base)
                yield from (f"{base}.{alias.name}" for alias in node.names)
