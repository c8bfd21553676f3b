"""The sandbox under attack: every attack is run behind the namespaces' walls and with the audit hook alone."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ottava.errors import DataError, PlatformError
from ottava.tasks import Problem, code, get, sandbox
from ottava.tasks.jail import decode, encode
from ottava.tasks.sandbox import Call, Limits, Program, Verdict, Walls, equal, walls

DOUBLE = [Call("f", (2,), 4), Call("f", (-3,), -6)]
GOOD = "def f(x):\n    return 2 * x\n"
SHORT = Limits(cpu_s=1, wall_s=30.0, memory_mb=256, file_mb=1, output_kb=64)
PATIENT = Limits(cpu_s=10, wall_s=120.0)  # of a busy machine

Judge = Callable[..., Verdict]


@pytest.fixture(params=["walls", "hook"])
def judge(request: pytest.FixtureRequest) -> Judge:
    """`run` with walls or without; tests that need walls are skipped where the system has none, which is said."""
    isolate = request.param == "walls"
    if isolate and not walls().whole:
        pytest.skip(str(walls()))

    def run(source: str, tests: Any = DOUBLE, limits: Limits = SHORT) -> Verdict:
        verdict = sandbox.run(textwrap.dedent(source), tests, limits, isolate=isolate)
        assert verdict.walls is not None
        assert verdict.walls.whole == isolate
        return verdict

    return run


def processes() -> set[str]:
    """The command lines of all processes that this user can see."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            found.add((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace") + folder.name)
        except OSError:
            continue
    return found


def test_a_right_program_is_right_and_a_wrong_one_wrong(judge: Judge) -> None:
    assert judge(GOOD).kind == "right"
    verdict = judge("def f(x):\n    return x * x\n")
    assert (verdict.kind, verdict.why) == ("wrong", "value")
    assert verdict.detail == "test 1: 9"  # the first test passes


def test_a_program_may_use_the_standard_library_and_a_file(judge: Judge) -> None:
    source = """
        import collections, decimal, fractions, heapq, itertools, random, re, sqlite3, zlib
        def f(x):
            with open("note.txt", "w") as file:
                file.write(str(x))
            return 2 * int(open("note.txt").read())
    """
    assert judge(source).kind == "right"


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("import os; os._exit(0)", "ended early"),
        ("import sys; sys.exit(0)", "raised SystemExit"),
        ("print(4); print(-6); raise SystemExit", "raised SystemExit"),
        ("def f(x):\n    import os\n    os._exit(0)", "ended early"),
        ("def f(x):\n    print(4)", "value"),
        ("def f(x):\n    return [4", "raised SyntaxError"),
        ("def g(x):\n    return 2 * x", "raised NameError"),
        ("f = 1", "raised TypeError"),
        ("raise KeyboardInterrupt", "raised KeyboardInterrupt"),
        (
            "class A:\n    def __eq__(self, other): return True\n    __hash__ = None\nf = lambda x: A()",
            "raised TypeError",
        ),
        ("class A(int):\n    def __eq__(self, other): return True\nf = lambda x: A(9)", "raised TypeError"),
        ("def f(x):\n    return f(x)", "raised RecursionError"),
        ("import ctypes; ctypes.string_at(0)", None),  # a crash, or no ctypes
        ("def f(x):\n    a = []\n    for _ in range(10**5): a = [a]\n    return a", "raised RecursionError"),
        ("\0", "raised ValueError"),
        ("\ud800", None),
    ],
)
def test_no_way_around_the_tests(judge: Judge, source: str, why: str | None) -> None:
    """Leaving early, printing what is expected, returning what equals everything."""
    verdict = judge(source)
    assert verdict.kind == "wrong", verdict
    if why is not None and source != "\0":
        assert verdict.why == why, verdict


def test_results_that_are_forged_on_the_pipe_must_still_be_right(judge: Judge) -> None:
    """A program finds the pipe and writes lines itself; not knowing what is expected, that helps nobody."""
    forged = """
        import os
        for fd in range(3, 4096):  # it has the number that it had in our process, which may have many
            try:
                os.write(fd, b'{"value": 1}\\n{"value": true}\\n{"right": true}\\n')
            except OSError:
                pass
        os._exit(0)
    """
    assert judge(forged).kind == "wrong"
    assert judge(forged.replace("1}", "[[[}")).kind == "wrong"
    deep = """{"value": ' + b'[' * 5000 + b']' * 5000 + b'}\\n"""
    assert judge(forged.replace('{"value": 1}\\n', deep)).why == "unreadable value"


@pytest.mark.parametrize("code", [None, 0, -9])
def test_a_forged_line_is_what_it_is_however_the_process_ended(code: int | None) -> None:
    """Which of the two is known first is up to the machine, and must not decide the verdict."""
    ends = {None: "ended early", 0: "ended early", -9: "killed by SIGKILL"}
    for line, why in ((b"[[[\n", "unreadable value"), (b'{"value": 4}\n{"va', ends[code]), (b"", ends[code])):
        pipes = {"results": bytearray(line), "stderr": bytearray()}
        ended = sandbox._Ended(pipes, walls=Walls(True, True, True), code=code)
        verdict = sandbox._values(ended, DOUBLE, SHORT)
        assert (verdict.kind, verdict.why) == ("wrong", why)


def test_the_expected_values_are_not_inside(judge: Judge) -> None:
    """All that the process was given is searched for a value that only the tests know."""
    secret = 8_731_946_205
    source = """
        import gc, os, sys
        def f(x):
            seen = []
            for frame in sys._current_frames().values():
                while frame is not None:
                    seen += [repr(frame.f_locals), repr(frame.f_globals)]
                    frame = frame.f_back
            seen += [repr(x) for x in gc.get_objects() if type(x) in (dict, list)]
            for path in os.listdir("."):
                seen.append(open(path).read())
            return str(x + 1) in " ".join(seen)
    """
    assert judge(source, [Call("f", (secret - 1,), secret)]).detail == "test 0: False"
    source = source.replace("x + 1", "x")  # the search itself works: it finds an argument
    assert judge(source, [Call("f", (secret - 1,), secret)]).detail == "test 0: True"


def test_endless_computing_ends_by_cpu_time(judge: Judge) -> None:
    verdict = judge("def f(x):\n    while True: pass")
    assert (verdict.kind, verdict.why) == ("wrong", "cpu time")


def test_sleep_ends_by_the_deadline(judge: Judge) -> None:
    verdict = judge("import time; time.sleep(1000)", limits=Limits(wall_s=2.0))
    assert (verdict.kind, verdict.why) == ("wrong", "deadline")


def test_signals_do_not_save_a_program(judge: Judge) -> None:
    source = """
        import signal
        for number in range(1, 65):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        while True: pass
    """
    assert judge(source).why == "cpu time"


def test_a_fork_bomb_does_not_go_off(judge: Judge) -> None:
    before = processes()
    source = """
        import os
        def f(x):
            while True:
                if os.fork() == 0:
                    os.setsid()
    """
    verdict = judge(source, limits=Limits(cpu_s=1, wall_s=5.0))
    assert verdict.kind == "wrong"
    wait(lambda: not [line for line in processes() - before if "jail.py" in line])


def test_a_program_that_leaves_its_session_is_killed_all_the_same(judge: Judge) -> None:
    source = """
        import os, time
        try: os.setsid()
        except OSError: pass
        try: os.setpgid(0, 0)
        except OSError: pass
        time.sleep(1000)
    """
    before = processes()
    assert judge(source, limits=Limits(wall_s=2.0)).why == "deadline"
    wait(lambda: not [line for line in processes() - before if "jail.py" in line])


@pytest.mark.parametrize(
    "act",
    [
        "x = bytearray(1 << 30)",
        "x = [0] * (1 << 28)",
        "x = 'x' * (1 << 30)",
    ],
)
def test_memory_is_bounded(judge: Judge, act: str) -> None:
    assert judge(f"{GOOD}\n{act}").why == "raised MemoryError"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_huge_output_is_cut(judge: Judge, stream: str) -> None:
    source = f"import sys\nwhile True: sys.{stream}.write('x' * 9999)"
    assert judge(source, limits=PATIENT).why == "too much output"
    assert judge("f = lambda x: [0] * 10**6", limits=PATIENT).why == "too much output"


def test_files_are_bounded(judge: Judge) -> None:
    source = """
        import signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with open("big", "wb") as file:
            file.write(bytes(8 << 20))
        def f(x): return 2 * x
    """
    assert judge(source).why == "raised OSError"


def test_nothing_outside_is_written_or_read(judge: Judge, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    target = tmp_path / "target.txt"
    assert judge(f"open({str(target)!r}, 'w').write('x')\n{GOOD}").kind == "wrong"
    assert judge(f"import os\nos.mkdir({str(tmp_path / 'folder')!r})\n{GOOD}").kind == "wrong"
    assert list(tmp_path.iterdir()) == []
    target.write_text("[4, -6]")
    target.chmod(0o666)
    assert judge(f"answers = eval(open({str(target)!r}).read())\nf = lambda x: answers.pop(0)").kind == "wrong"
    assert judge(f"import os\nos.remove({str(target)!r})\n{GOOD}").kind == "wrong"
    assert target.read_text() == "[4, -6]"
    assert judge(f"import os\nos.rename({str(target)!r}, 'mine')\n{GOOD}").kind == "wrong"
    assert target.exists()


def test_no_socket_leads_anywhere(judge: Judge) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        knock = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=5)\n{GOOD}"
        assert judge(knock).kind == "wrong"
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
        subprocess.run([sys.executable, "-c", knock], check=True, timeout=60)  # outside it does lead somewhere
        server.accept()[0].close()


def test_the_environment_is_empty_and_the_parents_cannot_be_read(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTTAVA_SECRET", "opensesame")
    source = """
        import os
        def f(x):
            return sorted(os.environ)
    """
    allowed = {"LC_CTYPE"}  # Python sets it itself where the locale is C
    verdict = sandbox.run(textwrap.dedent(source), [Call("f", (1,), [])], SHORT, isolate=judge(GOOD).walls == walls())
    assert verdict.kind == "right" or verdict.detail == f"test 0: {sorted(allowed)}"
    peek = """
        import os
        found = []
        for pid in [os.getpid(), os.getppid(), *range(1, 40000)]:
            try: found.append(open(f"/proc/{pid}/environ", "rb").read())
            except OSError: pass
        def f(x):
            return [b"opensesame" in text for text in found]
    """
    assert judge(peek).detail == "test 0: []"


def test_other_processes_cannot_be_killed(judge: Judge) -> None:
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as victim:
        assert judge(f"import os\nos.kill({victim.pid}, 9)\n{GOOD}").kind == "wrong"
        judge(f"import os\ntry: os.kill(-1, 9)\nexcept OSError: pass\n{GOOD}")
        assert victim.poll() is None
        assert victim.stdin is not None
        victim.stdin.close()


def test_the_walls_cannot_be_moved_from_within() -> None:
    if not walls().whole:
        pytest.skip(str(walls()))
    source = """
        import ctypes, os
        libc = ctypes.CDLL(None)
        def f(x):
            os.makedirs("d", exist_ok=True)
            tried = [libc.umount2(b"/tmp", 2), libc.umount2(b"/usr", 2), libc.setuid(0), libc.chroot(b"d")]
            tried += [libc.unshare(0x10000000), libc.unshare(0x20000)]
            tried += [libc.mount(b"none", b"/usr", None, 32 | 4096, None)]
            tried += [libc.sethostname(b"x", 1), libc.fork()]
            return [tried, os.path.exists("/proc/1"), sorted(os.listdir("/"))]
    """
    verdict = sandbox.run(textwrap.dedent(source), [Call("f", (1,), None)], SHORT, isolate=True)
    tried, proc, top = eval(verdict.detail.removeprefix("test 0: "))
    assert tried == [-1] * 9
    assert not proc
    assert set(top) <= {"usr", "lib", "lib32", "lib64", "bin", "dev", "tmp", Path(sys.base_prefix).parts[1]}


def test_the_walls_stand_where_the_system_allows_them() -> None:
    """Else every test of a wall would be skipped the day one falls. util-linux's unshare is the second opinion."""
    spaces = ["--user", "--map-root-user", "--mount", "--net", "--ipc", "--uts", "--pid", "--fork"]
    try:
        allowed = subprocess.run(["unshare", *spaces, "mount", "-t", "tmpfs", "x", "/mnt"], capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no unshare(1) to ask")
    if allowed.returncode == 0:
        assert walls() == Walls(True, True, True)
    else:
        pytest.skip(allowed.stderr.decode())


def test_walls_that_do_not_stand_are_named() -> None:
    verdict = sandbox.run(GOOD, DOUBLE, isolate=False)
    assert verdict.kind == "right"
    assert verdict.walls == Walls(False, False, verdict.walls is not None and verdict.walls.processes, "not asked for")
    assert "without a wall for network, files" in str(verdict.walls)
    assert "no network" in str(Walls(True, True, True))


def test_programs_are_judged_by_what_they_print(judge: Judge) -> None:
    square = [Program("5\n", "25\n"), Program("-2\n", "4")]
    assert judge("print(int(input()) ** 2)", square).kind == "right"
    assert judge("print(int(input()) ** 2, '  ')\nprint()", square).kind == "right"  # white space at ends
    assert judge("print(int(input()) * 5)", square).why == "output"
    assert judge("print(int(input()) ** 2)\nraise SystemExit(3)", square).why == "status 3"
    assert judge("print(int(input()) ** 2)\nimport sys\nsys.exit(0)", square).kind == "right"
    assert judge("import os; os._exit(0)", square).why == "output"
    assert judge("print(int(input()) ** 2); 1 / 0", square).why == "status 1"


def test_a_machine_that_refuses_is_not_the_programs_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError("no more processes")

    monkeypatch.setattr(sandbox.subprocess, "Popen", refuse)
    verdict = sandbox.run(GOOD, DOUBLE, isolate=False)
    assert (verdict.kind, verdict.why) == ("unscorable", "the sandbox did not start")


def test_a_program_that_got_no_cpu_is_not_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_wants_cpu", lambda ended: True)
    verdict = sandbox.run("import time; time.sleep(1000)", DOUBLE, Limits(wall_s=1.0), isolate=False)
    assert (verdict.kind, verdict.why) == ("unscorable", "machine too busy")


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inside: (
        st.lists(inside, max_size=3)
        | st.lists(inside, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inside, max_size=3)
        | st.sets(st.integers() | st.text(), max_size=3)
    ),
    max_leaves=8,
)


@given(plain)
def test_plain_data_goes_round(value: Any) -> None:
    back = decode(json.loads(json.dumps(encode(value))))
    assert back == value
    assert repr(back) == repr(value) or isinstance(value, (set, list, tuple, dict))
    assert equal(back, value)


def test_equality() -> None:
    assert equal(0.1 + 0.2, 0.3)
    assert equal([float("nan"), 1], [float("nan"), 1])
    assert not equal(0.30001, 0.3)
    assert not equal([1], (1,))
    assert not equal({"a": 0.1}, {"b": 0.1})
    assert not equal("1.0", 1.0)
    assert equal({"a": 0.1 + 0.2}, {"a": 0.3})


# ---- the task


def problem(**facts: Any) -> Problem:
    return Problem("p", 1, "Write f.", GOOD, json.dumps(facts))


def test_the_task_reads_programs_and_tests(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    more = "def g(x):\n    return (x, {x})\n"
    asserts = {"asserts": ["assert g(1) == (1, {1})", "assert not h(2)", "assert h(3) is True"]}
    path.write_text(
        code.line("Write f.", GOOD, {"calls": [["f", [2], 4]]})
        + "\n"
        + code.line("Write g.", more + "h = lambda x: x == 3", asserts)
        + "\n"
    )
    task = get(f"code:{path}")
    first, second = task.problems  # type: ignore[attr-defined]
    assert task.check_answer(first, f"Here it is:\n```python\n{GOOD}```\nDone.")
    assert task.check_answer(first, GOOD)
    assert task.check_answer(first, f"```\nwrong\n```\nor better\n```python\n{GOOD}\n```")
    assert not task.check_answer(first, f"```python\n{GOOD}\n```\nor worse\n```\nwrong\n```")
    assert not task.check_answer(first, "``````")
    assert task.check_answer(second, second.answer)
    assert not task.check_answer(second, first.answer)
    assert code.tests(second)[0] == Call("g", (1,), (1, {1}))


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"calls": []},
        {"calls": [["f", [1]]]},
        {"asserts": ["assert f(x) == 1"]},
        {"asserts": ["assert f(1) == g(2)"]},
        {"asserts": ["assert f(1) < 2"]},
        {"asserts": ["assert f(1) == 1; import os"]},
        {"asserts": ["f(1"]},
        {"whatever": [1]},
    ],
)
def test_tests_of_unknown_form_are_refused_with_the_line(tmp_path: Path, facts: dict[str, Any]) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("\n" + code.line("Write f.", GOOD, facts) + "\n")
    with pytest.raises(DataError) as caught:
        _ = get(f"code:{path}").MAX_STEPS
    assert f"{path}:2" in str(caught.value.where)


def test_a_program_that_could_not_be_run_is_no_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "run", lambda *_: Verdict("unscorable", "machine too busy"))
    with pytest.raises(PlatformError, match="machine too busy"):
        code.make("nowhere.jsonl").check_answer(problem(calls=[["f", [2], 4]]), GOOD)


def test_the_program_dies_with_the_process_that_asked(tmp_path: Path) -> None:
    """A trainer is killed while a program sleeps: the program must not stay."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from ottava.tasks.sandbox import *\n"
        "run('import time; print(1, flush=True); time.sleep(1000)', [Program('', '')], Limits(wall_s=900.0))\n"
    )
    source = str(Path(sandbox.__file__).parents[2])
    before = processes()

    def left() -> list[str]:
        return [line for line in processes() - before if "jail.py" in line]

    parent = subprocess.Popen([sys.executable, "-c", script, source])
    wait(lambda: len(left()) >= 2)
    parent.kill()
    parent.wait()
    wait(lambda: not left())


def wait(until: Callable[[], bool]) -> None:
    for _ in range(1200):
        if until():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come")
