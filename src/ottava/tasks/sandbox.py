"""Runs a program that nobody has read, and judges it by what it answers: it is told no expected value.

A model that is rewarded for passing tests learns to pass them in any way there is: leave before they ran, print what
they print, return an object that equals everything, read the answers from the disk. So a program gets questions only.
What it returned travels out as plain data, and the comparison is made here, in the process that trusts itself.

Each run is a process of its own (`jail`): limits on CPU time, memory, file size, processes; an empty environment and
folder; output bounded; a deadline, after which it is killed with all it started. Where the system allows namespaces
(`walls`), it has no network, sees no file but the interpreter's, and no other process; where it does not, an audit
hook of Python refuses the plain ways to these, which is less, and `Verdict.walls` and `walls()` say so.
"""

from __future__ import annotations

import functools
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from ottava.tasks import jail

Kind = Literal["right", "wrong", "unscorable"]

SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin")
_TAIL = 300  # characters of what a program said last, kept for the reason


@dataclass(frozen=True, slots=True)
class Call:
    """A test: the function `name` with `args` returns `expected`. Plain data: None, numbers, text, and containers."""

    name: str
    args: tuple[Any, ...]
    expected: Any


@dataclass(frozen=True, slots=True)
class Program:
    """A test: given `stdin`, the whole program prints `stdout`; white space at the ends of lines does not count."""

    stdin: str
    stdout: str


@dataclass(frozen=True, slots=True)
class Limits:
    """What one process may take. wall_s: should leave room for a busy machine: CPU time is what bounds a program."""

    cpu_s: int = 2
    wall_s: float = 20.0
    memory_mb: int = 512
    file_mb: int = 16
    output_kb: int = 256


@dataclass(frozen=True, slots=True)
class Walls:
    """Which of the walls stand: no network, no files, no other processes. why: what the system said of the others."""

    network: bool
    files: bool
    processes: bool
    why: str = ""

    @property
    def whole(self) -> bool:
        return self.network and self.files and self.processes

    def __str__(self) -> str:
        missing = [name for name in ("network", "files", "processes") if not getattr(self, name)]
        if not missing:
            return "programs are shut in: no network, no files, no other processes"
        return (
            f"programs are kept by limits and an audit hook only, without a wall for {', '.join(missing)} ({self.why})"
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """right, wrong, or unscorable (the machine's fault, not the program's). why: a few words that can be counted;
    detail: for reading."""

    kind: Kind
    why: str = ""
    detail: str = ""
    walls: Walls | None = None


@dataclass
class _Ended:
    """How a process ended. cut: why it was killed, if it was. code: None where it did not say."""

    pipes: dict[str, bytearray] = field(default_factory=dict)
    walls: Walls | None = None
    pid: int | None = None
    grouped: bool = False
    code: int | None = None
    cpu: float = 0.0
    cut: str = ""


def run(
    source: str, tests: Sequence[Call] | Sequence[Program], limits: Limits | None = None, *, isolate: bool | None = None
) -> Verdict:
    """Whether the program passes all tests. Tests of one kind; calls share one process, programs have one each.

    isolate: namespaces or not; None: where they work. Never raises on what the program does; the verdict is
    unscorable where it could not be run, or had no chance to in its time.
    """
    assert tests, "a program without tests is neither right nor wrong"
    limits = limits or Limits()
    isolate = walls().whole if isolate is None else isolate
    calls = [test for test in tests if isinstance(test, Call)]
    if calls:
        assert len(calls) == len(tests), "tests of one kind"
        request = {"calls": [[call.name, jail.encode(tuple(call.args))] for call in calls]}
        ended = _start(source, request, limits, isolate)
        return _values(ended, calls, limits)
    verdict = Verdict("unscorable", "no tests")
    for test in tests:
        assert isinstance(test, Program)
        ended = _start(source, {"calls": None, "stdin": test.stdin}, limits, isolate)
        verdict = _printed(ended, test, limits)
        if verdict.kind != "right":
            break
    return verdict


@functools.cache
def walls() -> Walls:
    """Which walls this system allows, found out once by running a small right program behind them."""
    source = "import collections, json, math, re\ndef probe(x):\n    return json.loads(x)"
    request = {"calls": [["probe", jail.encode(("[1]",))]]}
    ended = _start(source, request, Limits(), True)
    found = ended.walls or Walls(False, False, False, ended.cut or _tail(ended) or "the sandbox did not start")
    if found.whole and _values(ended, [Call("probe", ("[1]",), [1])], Limits()).kind != "right":
        return Walls(False, False, False, "a right program fails behind the walls: " + _tail(ended))
    return found


def _values(ended: _Ended, calls: Sequence[Call], limits: Limits) -> Verdict:
    """Compare what came back with what was expected, in order. A line without its end was cut off, and counts as none;
    a whole one that cannot be read is no word of the jail's, however the process ended."""
    *lines, _ = bytes(ended.pipes["results"]).split(b"\n")
    for number, call in enumerate(calls):
        try:
            line = json.loads(lines[number])
            if "raised" in line:
                said = str(line["raised"])
                return Verdict("wrong", "raised " + said.partition(":")[0], f"test {number}: {said}", ended.walls)
            value = jail.decode(line["value"])
            same = equal(value, call.expected)
        except IndexError:
            return _unfinished(ended, limits) or Verdict(
                "wrong", "ended early", f"after {len(lines)} of {len(calls)} tests", ended.walls
            )
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
            return Verdict("wrong", "unreadable value", f"test {number}", ended.walls)
        if not same:
            return Verdict("wrong", "value", f"test {number}: {value!r}"[:_TAIL], ended.walls)
    return Verdict("right", walls=ended.walls)


def _printed(ended: _Ended, test: Program, limits: Limits) -> Verdict:
    """Compare what was printed with what was expected; a program that failed is wrong whatever it printed."""
    wrong = _unfinished(ended, limits)
    if wrong is not None:
        return wrong
    if ended.code != 0:
        return Verdict("wrong", f"status {ended.code}", _tail(ended), ended.walls)
    printed = bytes(ended.pipes["stdout"]).decode("utf-8", errors="replace")
    if _lines(printed) != _lines(test.stdout):
        return Verdict("wrong", "output", printed[:_TAIL], ended.walls)
    return Verdict("right", walls=ended.walls)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _unfinished(ended: _Ended, limits: Limits) -> Verdict | None:
    """The verdict on a process that did not end by itself; None where it did."""
    if ended.walls is None or ended.cut == "busy":
        why = "machine too busy" if ended.cut else "the sandbox did not start"
        return Verdict("unscorable", why, _tail(ended), ended.walls)
    if ended.cut:
        return Verdict("wrong", ended.cut, _tail(ended), ended.walls)
    if ended.code is None:
        return Verdict("wrong", "ended early", _tail(ended), ended.walls)
    if ended.code < 0:
        late = ended.code == -signal.SIGKILL and ended.cpu >= 0.9 * limits.cpu_s
        why = "cpu time" if late else f"killed by {signal.Signals(-ended.code).name}"
        return Verdict("wrong", why, _tail(ended), ended.walls)
    return None


def _tail(ended: _Ended) -> str:
    return bytes(ended.pipes.get("stderr", b""))[-_TAIL:].decode("utf-8", errors="replace").strip()


def equal(ours: Any, theirs: Any) -> bool:
    """Equal as Python's == says, except that floats may differ by rounding (1e-9 of their size) and NaN equals NaN."""
    if isinstance(ours, float) or isinstance(theirs, float):
        if not (isinstance(ours, (int, float)) and isinstance(theirs, (int, float))):
            return False
        both_nan = math.isnan(ours) and math.isnan(theirs)
        return both_nan or math.isclose(ours, theirs, rel_tol=1e-9, abs_tol=1e-12)
    if isinstance(ours, (list, tuple)):
        alike = type(ours) is type(theirs) and len(ours) == len(theirs)
        return alike and all(map(equal, ours, theirs))
    if isinstance(ours, dict):
        return (
            isinstance(theirs, dict) and ours.keys() == theirs.keys() and all(equal(ours[k], theirs[k]) for k in ours)
        )
    return bool(ours == theirs)


def _start(source: str, request: Mapping[str, Any], limits: Limits, isolate: bool) -> _Ended:
    """Run one process to its end, or to the end of its time."""
    ended = _Ended({name: bytearray() for name in ("stdout", "stderr", "status", "results")})
    with TemporaryDirectory(prefix="ottava-program-", ignore_cleanup_errors=True) as folder:
        whole = {
            **request,
            "source": source,
            "isolate": isolate,
            "parent": os.getpid(),
            "roots": _roots(),
            "limits": {"cpu": limits.cpu_s, "memory": limits.memory_mb << 20, "file": limits.file_mb << 20},
        }
        place = os.path.realpath(folder)
        Path(place, "request.json").write_text(json.dumps(whole), encoding="utf-8")
        status, results = os.pipe(), os.pipe()
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", jail.__file__, str(status[1]), str(results[1])],
                cwd=place,
                env={},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(status[1], results[1]),
                start_new_session=True,
            )
        except OSError as error:
            ended.pipes["stderr"] += str(error).encode()
            os.close(status[0])
            os.close(results[0])
            return ended
        finally:
            os.close(status[1])
            os.close(results[1])
        assert process.stdout is not None
        assert process.stderr is not None
        with process, os.fdopen(status[0], "rb") as said, os.fdopen(results[0], "rb") as values:
            pipes = {"stdout": process.stdout, "stderr": process.stderr, "status": said, "results": values}
            try:
                _attend(pipes, ended, limits)
            finally:
                _kill(process, ended)
    return ended


def _attend(pipes: Mapping[str, Any], ended: _Ended, limits: Limits) -> None:
    """Read until the process said how it ended, its time is over or it wrote too much."""
    deadline = time.monotonic() + limits.wall_s
    cap = limits.output_kb << 10
    with selectors.DefaultSelector() as selector:
        for name, pipe in pipes.items():
            os.set_blocking(pipe.fileno(), False)
            selector.register(pipe, selectors.EVENT_READ, name)
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                ended.cut = "busy" if _wants_cpu(ended) else "deadline"
                return
            ready = [key for key, _ in selector.select(left)]
            for key in sorted(ready, key=lambda key: key.data == "status"):  # last words before the end
                data = os.read(key.fd, 65536)
                if not data:
                    selector.unregister(key.fileobj)
                ended.pipes[key.data] += data
                if len(ended.pipes[key.data]) > cap:
                    ended.cut = "too much output"
                    return
                if key.data == "status":
                    _note(ended)
                    if not data:
                        for name in ("stdout", "stderr", "results"):
                            _drain(pipes[name].fileno(), ended, name, cap)
                        return


def _drain(fd: int, ended: _Ended, name: str, cap: int) -> None:
    with suppress(BlockingIOError):
        while data := os.read(fd, 65536):
            ended.pipes[name] += data
            if len(ended.pipes[name]) > cap:
                ended.cut = "too much output"
                return


def _note(ended: _Ended) -> None:
    """Take in what the outer process of the jail says."""
    *lines, rest = bytes(ended.pipes["status"]).split(b"\n")
    ended.pipes["status"] = bytearray(rest)
    for said in map(json.loads, lines):
        if "walls" in said:
            ended.walls = Walls(**said["walls"], why=said["why"])
            ended.pid, ended.grouped = said["pid"], said["group"]
        else:
            ended.code, ended.cpu = said["code"], said["cpu"]


def _wants_cpu(ended: _Ended) -> bool:
    """Whether the process waits for a CPU rather than for something else (proc(5): state R), or has not begun."""
    if ended.pid is None:
        return True
    with suppress(OSError):
        return Path(f"/proc/{ended.pid}/stat").read_text().rpartition(")")[2].split()[0] == "R"
    return False


def _kill(process: subprocess.Popen[bytes], ended: _Ended) -> None:
    """Kill whatever is left: the jail's group, and the group of the program, which cannot leave it."""
    if ended.code is None and ended.pid is not None:  # the outer process has not reaped it: the id is still its own
        with suppress(ProcessLookupError):
            (os.killpg if ended.grouped else os.kill)(ended.pid, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@functools.cache
def _roots() -> list[str]:
    """Folders that an interpreter needs: its own, and the system's libraries. None lies within another."""
    python = [sys.base_prefix, os.path.realpath(sys.base_prefix), os.path.dirname(os.path.realpath(os.__file__))]
    roots: list[str] = []
    for root in [*SYSTEM, *python]:
        if os.path.isabs(root) and root != "/" and not any(f"{root}/".startswith(f"{have}/") for have in roots):
            roots.append(root)
    return roots
