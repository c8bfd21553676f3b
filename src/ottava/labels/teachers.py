"""Imperfect teachers that propose step-by-step traces. A rehearsal: programs that stand in for models.

A pipeline that is only ever fed right traces proves nothing about its checks. These programs solve
chains and err in known ways at known rates, so that what verification, agreement and the audit
catch, and what they let through, can be measured. They propose from the question alone.

Error modes (at most one to a trace), and what each is a test of:

    slip      a step's value is off by one, and later steps go on from it   -> wrong final answer
    miscopy   another operation of the same kind is read at one step        -> wrong final answer
    drop      a step is left out                                            -> wrong shape
    garble    the trace is written badly                                    -> wrong shape
    misprint  an earlier step's value is written wrongly, but later steps
              go on from the right one                                      -> right answer, wrong step
    swap      the values of two earlier neighbouring steps change places    -> right answer, wrong steps

The last two pass any check of the final answer. `echo` repeats what `hasty` says half of the time,
errors included: two votes that are one opinion, the trap of machine judges taken as independent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ottava.tasks import Problem
from ottava.tasks.base import generator
from ottava.tasks.chains import OPERATIONS, apply, parse, write_trace

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class Proposal:
    """What a teacher says: a trace and the final answer it comes to."""

    teacher: str
    trace: str
    answer: str


@dataclass(frozen=True)
class Teacher:
    """errors: probability of each error mode in a trace. echoes: (another teacher, how often it is repeated)."""

    name: str
    errors: Mapping[str, float]
    echoes: tuple[str, float] | None = None


TEACHERS = {
    teacher.name: teacher
    for teacher in (
        Teacher("careful", {"slip": 0.06, "misprint": 0.01}),
        Teacher("hasty", {"slip": 0.12, "drop": 0.04, "garble": 0.03, "misprint": 0.02, "swap": 0.015}),
        Teacher("copyist", {"miscopy": 0.15, "garble": 0.05, "swap": 0.03}),
        Teacher("echo", {"slip": 0.10, "garble": 0.02, "misprint": 0.02}, echoes=("hasty", 0.5)),
    )
}


def propose(teacher: Teacher, problem: Problem, seed: int) -> Proposal:
    """The teacher's trace for a chain; the same for the same (seed, teacher, question) on every machine."""
    rng = generator(seed, "teacher", teacher.name, problem.question)
    if teacher.echoes is not None and rng.random() < teacher.echoes[1]:
        said = propose(TEACHERS[teacher.echoes[0]], problem, seed)
        return Proposal(teacher.name, said.trace, said.answer)
    start, operations = parse(problem.question)
    draw = rng.random()
    for mode, rate in teacher.errors.items():
        draw -= rate
        if draw < 0:
            trace, answer = _MODES[mode](rng, start, operations)
            return Proposal(teacher.name, trace, answer)
    after = _run(start, operations)
    return Proposal(teacher.name, write_trace(start, operations, after), str(after[-1]))


Said = tuple[str, str]  # trace, answer


def _run(start: int, operations: list[str], slip_at: int = -1, by: int = 0) -> list[int]:
    """The value after each step; at step `slip_at` it is off by `by` and is carried on."""
    after, value = [], start
    for i, operation in enumerate(operations):
        value = (apply(value, operation) + by * (i == slip_at)) % 10
        after.append(value)
    return after


def _slip(rng: np.random.Generator, start: int, operations: list[str]) -> Said:
    after = _run(start, operations, int(rng.integers(len(operations))), int(rng.choice([-1, 1])))
    return write_trace(start, operations, after), str(after[-1])


def _miscopy(rng: np.random.Generator, start: int, operations: list[str]) -> Said:
    i = int(rng.integers(len(operations)))
    others = [o for o in OPERATIONS if o[0] == operations[i][0] and o != operations[i]]
    read = [*operations[:i], others[int(rng.integers(len(others)))], *operations[i + 1 :]]
    after = _run(start, read)
    return write_trace(start, read, after), str(after[-1])


def _drop(rng: np.random.Generator, start: int, operations: list[str]) -> Said:
    i = int(rng.integers(len(operations)))
    kept = operations[:i] + operations[i + 1 :]
    after = _run(start, kept)
    return write_trace(start, kept, after), str(after[-1] if after else start)


def _garble(rng: np.random.Generator, start: int, operations: list[str]) -> Said:
    after = _run(start, operations)
    trace, answer = write_trace(start, operations, after), str(after[-1])
    spoilt = [trace.replace(" ", ""), trace.replace(" a ", " "), f"{trace} = {answer}", trace.upper(), f"so {trace}"]
    return spoilt[int(rng.integers(len(spoilt)))], answer


def _misprint(rng: np.random.Generator, start: int, operations: list[str]) -> Said:
    after = _run(start, operations)
    answer = str(after[-1])
    if len(after) > 1:  # the last value is the answer itself
        i = int(rng.integers(len(after) - 1))
        after[i] = (after[i] + int(rng.integers(1, 10))) % 10
    return write_trace(start, operations, after), answer


def _swap(rng: np.random.Generator, start: int, operations: list[str]) -> Said:
    after = _run(start, operations)
    answer = str(after[-1])
    if len(after) > 2:
        i = int(rng.integers(len(after) - 2))
        after[i], after[i + 1] = after[i + 1], after[i]
    return write_trace(start, operations, after), answer


_MODES: dict[str, Callable[[np.random.Generator, int, list[str]], Said]] = {
    "slip": _slip,
    "miscopy": _miscopy,
    "drop": _drop,
    "garble": _garble,
    "misprint": _misprint,
    "swap": _swap,
}
