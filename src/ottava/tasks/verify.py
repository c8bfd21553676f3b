"""Grades that cannot raise and cannot hang, and a test of the verifier itself before anybody learns from it.

A reward is only as good as its verifier, and verifiers are other people's code that is fed what a model wrote: they
throw, hang, call eval, or say yes to everything. So each answer is graded in a process that can be killed, with a
deadline of its own; what could not be graded is *unscorable*, which is not wrong: it is counted, and no one learns
from it. A timeout is not reproducible: grades are recorded, never computed again.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from ottava.errors import DataError, OttavaError
from ottava.tasks.base import Problem, Task, generator, row
from ottava.tasks.own import described

Kind = Literal["right", "wrong", "unscorable"]

LIMIT_S = 20.0
LOAD_S = 120.0  # importing sympy and reasoning-gym on a busy machine
MEMORY_MB = 4096
LONGEST = 1_000_000  # characters
TRIED = 8
"""Problems that a verifier is tried on."""


@dataclass(frozen=True, slots=True)
class Grade:
    """right, wrong or unscorable. why: empty, or a few words that can be counted; detail: for reading."""

    kind: Kind
    why: str = ""
    detail: str = ""

    @property
    def right(self) -> bool:
        return self.kind == "right"

    @property
    def reward(self) -> float:
        """1 or 0; NaN where it could not be graded."""
        return {"right": 1.0, "wrong": 0.0, "unscorable": float("nan")}[self.kind]


class Grader:
    """A process that grades, started when it is first needed, and again after it had to be killed.

    Threads may share it; they are served one after the other. After a fork the child has one of its own.
    """

    def __init__(self, memory_mb: int = MEMORY_MB) -> None:
        self._memory_mb = memory_mb
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._buffer = b""
        self._loaded: set[str] = set()

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the process and whatever it started."""
        if self._process is not None and self._owner == os.getpid():
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                with suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]
        self._process, self._buffer, self._loaded = None, b"", set()

    def grade(self, task: str, problem: Problem, text: str, limit_s: float = LIMIT_S) -> Grade:
        """The grade of `text` by the task of that name. limit_s: wall seconds for this answer. Never raises."""
        with self._lock:
            if task not in self._loaded:
                answer = self._ask({"load": task}, LOAD_S)
                if not isinstance(answer, dict) or "loaded" not in answer:
                    self.close()
                    return _grade(answer, "the task could not be loaded")
                self._loaded.add(task)
            return _grade(self._ask({"task": task, "problem": row(task, problem), "text": text}, limit_s))

    def _ask(self, request: dict[str, Any], limit_s: float) -> dict[str, Any] | str:
        """The reply, or why there is none: the process is then gone."""
        try:
            self._start()
            data, reply = json.dumps(request).encode() + b"\n", None
            deadline = time.monotonic() + limit_s
            while reply is None:
                data, reply = self._exchange(data, deadline - time.monotonic())
        except TimeoutError:
            self.close()
            return "deadline"
        except (OSError, ValueError):
            self.close()
            return "the verifier died"
        return reply

    def _exchange(self, data: bytes, left: float) -> tuple[bytes, dict[str, Any] | None]:
        """Write and read what can be; the rest of `data`, and the reply if it is complete."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        inlet, outlet = self._process.stdin.fileno(), self._process.stdout.fileno()
        readable, writable, _ = select.select([outlet], [inlet] if data else [], [], max(0.0, left))
        if not readable and not writable:
            raise TimeoutError
        if writable:
            data = data[os.write(inlet, data) :]
        if readable:
            read = os.read(outlet, 65536)
            if not read:
                raise BrokenPipeError
            self._buffer += read
            line, ended, rest = self._buffer.partition(b"\n")
            if ended:
                self._buffer = rest
                reply = json.loads(line)
                if not isinstance(reply, dict):
                    raise ValueError("a reply is an object")
                return data, reply
        return data, None

    def _start(self) -> None:
        if self._process is not None and self._owner != os.getpid():
            self._process, self._buffer, self._loaded = None, b"", set()  # a fork: it is the parent's
        if self._process is None:
            kept = {name: os.environ[name] for name in ("HOME", "PATH", "OTTAVA_CACHE") if name in os.environ}
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ottava.tasks.grader", str(self._memory_mb)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**kept, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path), "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
            assert self._process.stdin is not None
            os.set_blocking(self._process.stdin.fileno(), False)
            self._owner = os.getpid()


def _grade(answer: dict[str, Any] | str, doing: str = "") -> Grade:
    """A reply as a grade."""
    if isinstance(answer, str):
        return Grade("unscorable", answer, doing)
    if "right" in answer:
        return Grade("right" if answer["right"] else "wrong")
    said = str(answer.get("raised"))
    return Grade("unscorable", "raised " + said.partition(":")[0], ": ".join(filter(None, (doing, said))))


_SHARED = Grader()
atexit.register(_SHARED.close)


def grade(task: Task, problem: Problem, text: str, limit_s: float = LIMIT_S) -> Grade:
    """The grade of one answer. Never raises and never hangs; limit_s: wall seconds, for a task that is not SAFE.

    An empty answer is wrong, whatever the verifier would say.
    """
    if not text.strip():
        return Grade("wrong", "empty")
    return _judged(task, problem, text, limit_s)


def _judged(task: Task, problem: Problem, text: str, limit_s: float) -> Grade:
    if len(text) > LONGEST:
        return Grade("wrong", "too long")
    if not task.SAFE:
        return _SHARED.grade(task.NAME, problem, text, limit_s)
    try:
        return Grade("right" if task.check_answer(problem, text) else "wrong")
    except Exception as error:
        return _grade({"raised": described(error)})


def count(grades: Iterable[Grade]) -> dict[str, Any]:
    """How many were right, wrong and unscorable, and of the latter two why (where it was not just another answer)."""
    grades = list(grades)
    kinds = Counter(grade.kind for grade in grades)
    why = Counter(f"{grade.kind}: {grade.why}" for grade in grades if grade.why)
    return {
        "right": kinds["right"],
        "wrong": kinds["wrong"],
        "unscorable": kinds["unscorable"],
        "why": dict(sorted(why.items())),
    }


def require_trusted(task: Task, problems: Sequence[Problem]) -> None:
    """Raise DataError where the task's verifier must not be learnt from, by `canary`."""
    if reasons := canary(task, problems):
        own = task.NAME.startswith("own:")
        what = f"the verifier of {task.NAME} must not be trusted: {'; '.join(reasons)}"
        raise DataError(what, fix="mend check_answer in the task's module" if own else "another task")


def canary(
    task: Task, problems: Sequence[Problem] | None = None, *, limit_s: float = LIMIT_S, stray: float = 0.25
) -> list[str]:
    """Why the task's verifier must not be trusted; empty where nothing was found. Never raises on what it does.

    A right answer must be right; nothing, and a text that names several answers, must be wrong; so must the answer of
    another problem, but for a share `stray` (two problems may have answers that are equal in other words).
    problems: those that will be learned from, of which TRIED from all along the list are tried; None: problems of the
    easiest level.
    """
    if problems is None:
        try:
            problems = task.sample(generator(0, "canary", task.NAME), 1, TRIED, "train", fewer=True)
        except OttavaError as error:
            return [f"there is no problem to try the verifier on: {error.what}"]
    problems = problems[:: max(1, len(problems) // TRIED)][:TRIED]
    if not problems:
        return ["there is no problem to try the verifier on"]
    tried: dict[str, list[Grade]] = {"gold": [], "other": [], "empty": [], "several": []}
    for kind, problem, text in _trials(problems):
        found = _judged(task, problem, text, limit_s)
        tried[kind].append(found)
        if found.why == "deadline":
            return _reasons(tried, stray)[-1:]  # a verifier that hangs once is not asked 40 times
    return _reasons(tried, stray)


def _trials(problems: Sequence[Problem]) -> Iterator[tuple[str, Problem, str]]:
    """What a verifier is asked: the kind of answer, the problem and the answer."""
    for number, problem in enumerate(problems):
        turned = [*problems[number + 1 :], *problems[:number]]
        others = list(dict.fromkeys(other.answer for other in turned if other.answer != problem.answer))
        yield "gold", problem, problem.answer
        yield "empty", problem, ""
        yield "empty", problem, " \n"
        if others:
            yield "other", problem, others[0]
            yield "several", problem, "\n".join([*others, problem.answer, others[0]])


def _reasons(tried: dict[str, list[Grade]], stray: float) -> list[str]:
    said = {
        "gold": ("right answers were not found right", "wrong", 0.0),
        "other": ("answers of other problems were found right", "right", stray),
        "empty": ("empty answers were found right", "right", 0.0),
        "several": ("texts that name several answers were found right", "right", stray),
    }
    reasons = []
    for name, (words, bad, allowed) in said.items():
        grades = tried[name]
        hits = sum(grade.kind == bad for grade in grades)
        if hits > allowed * len(grades):
            reasons.append(f"{hits} of {len(grades)} {words}")
    if not tried["other"]:
        reasons.append("all problems have the same answer: a verifier that always says yes cannot be told")
    lost = [grade for grades in tried.values() for grade in grades if grade.kind == "unscorable"]
    for why, number in sorted(Counter(grade.why for grade in lost).items()):
        detail = next(grade.detail for grade in lost if grade.why == why)
        answers = "answer" if number == 1 else "answers"
        reasons.append(f"{number} {answers} could not be graded: {why}" + (f" ({detail})" if detail else ""))
    return reasons
