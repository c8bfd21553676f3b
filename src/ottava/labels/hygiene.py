"""Clean sets: nothing twice, and nothing of the test in the training data.

Comparison is by the question, after normalisation: by ours (`plain`: white space, case, typographic variants), which no
task can get wrong, and by the task's, of which `canonical` sees through spelling, `family` also through rewriting that
leaves the problem the same. A paraphrase that none of them knows would pass; for chains there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ottava.errors import DataError
from ottava.tasks import Problem, Task
from ottava.tasks.base import plain

Normal = Callable[[str], str]


@dataclass
class Removed:
    """How many problems were taken out, and why."""

    exact: int = 0
    near: int = 0
    contaminated: int = 0


def normals(task: Task) -> tuple[Normal, ...]:
    """By what two questions may be found to be the same."""
    return plain, task.canonical, task.family


def deduplicate(problems: Iterable[Problem], normal: Normal, removed: Removed) -> list[Problem]:
    """The first problem of each normal form, in order. Counts exact repeats and near ones (same form) apart."""
    seen: dict[str, set[str]] = {}
    kept = []
    for problem in problems:
        spellings = seen.setdefault(normal(problem.question), set())
        if not spellings:
            kept.append(problem)
        elif problem.question in spellings:
            removed.exact += 1
        else:
            removed.near += 1
        spellings.add(problem.question)
    return kept


def decontaminate(
    problems: Iterable[Problem], tests: Iterable[Problem], normal: Sequence[Normal], removed: Removed
) -> list[Problem]:
    """The problems that have none of their normal forms from a test problem, in order; the others are counted."""
    tests, kept = list(tests), list(problems)
    whole = len(kept)
    for its in normal:
        forbidden = {its(test.question) for test in tests}
        kept = [problem for problem in kept if its(problem.question) not in forbidden]
    removed.contaminated += whole - len(kept)
    return kept


def require_disjoint(train: Sequence[Problem], tests: Sequence[Problem], normal: Sequence[Normal]) -> None:
    """Raise DataError where a training problem has a normal form of a test problem. Looks at every one."""
    for its in normal:
        forbidden = {its(test.question): test for test in tests}
        for problem in train:
            test = forbidden.get(its(problem.question))
            if test is not None:
                raise DataError(
                    f"the training problem {problem.id} ({problem.question!r}) is the test problem {test.id}",
                    fix="remove it from the training data; no accuracy on this test set would mean anything",
                )
