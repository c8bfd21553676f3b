"""Grades that never raise and never hang, verifiers that are found out, and which problems are asked next."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from ottava import tasks
from ottava.errors import DataError, PlatformError
from ottava.tasks import Problem, Task, base, chains, choose, maths, verify
from ottava.tasks.base import final, generator, problem_of, read_lines, row, write_lines
from ottava.tasks.choose import Asked, Rate, Schedule, Stretch, draw, estimates, weights
from ottava.tasks.verify import Grade, Grader, canary, count, grade

PREAMBLE = """
import os, sys, time
from ottava.tasks.base import Problem
MAX_STEPS = 2
def sample(rng, steps, count, split, *, fewer=False):
    return [Problem(f"p{i}", steps, f"what is {i}?", str(i)) for i in range(count)]
def held_out(question): return False
def canonical(question): return question
def family(question): return question
def prompt(problem): return problem.question
"""

Make = Callable[[str], Task]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Make]:
    """A task of one's own whose check_answer is the given source, and a grader that can find it."""
    monkeypatch.syspath_prepend(tmp_path)
    verify._SHARED.close()

    def write(source: str) -> Task:
        name = f"own_task_{abs(hash((request.node.nodeid, source)))}"
        (tmp_path / f"{name}.py").write_text(f"{PREAMBLE}\n{source}\n")
        return tasks.get(f"own:{name}")

    yield write
    verify._SHARED.close()


SOUND = "def check_answer(problem, text): return text.strip() == problem.answer"
P = Problem("p", 1, "what is 3?", "3")


def test_a_sound_verifier_passes_and_grades_like_itself(make: Make) -> None:
    task = make(SOUND)
    assert canary(task) == []
    assert grade(task, P, "3") == Grade("right")
    assert grade(task, P, "4") == Grade("wrong")
    assert canary(cast(Task, chains)) == []


@given(st.integers(1, 6), st.integers(0, 9), st.text(max_size=5))
def test_chains_are_graded_as_they_check(steps: int, seed: int, text: str) -> None:
    (problem,) = chains.sample(generator(seed), steps, 1, "train")
    assert grade(cast(Task, chains), problem, problem.answer).right
    expected = "right" if text == problem.answer else "wrong"
    assert grade(cast(Task, chains), problem, text).kind == expected


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("def check_answer(problem, text): return 1 / 0", "raised ZeroDivisionError"),
        ("def check_answer(problem, text): raise SystemExit(0)", "raised SystemExit"),
        ("def check_answer(problem, text): raise KeyboardInterrupt", "raised KeyboardInterrupt"),
        ("def check_answer(problem, text): os._exit(0)", "the verifier died"),
        ("def check_answer(problem, text): os.kill(os.getpid(), 9)", "the verifier died"),
        ("def check_answer(problem, text): return 1", "raised NotABool"),
        ("def check_answer(problem, text): return 'yes'", "raised NotABool"),
        ("def check_answer(problem, text): return bytearray(1 << 40) == b''", "raised MemoryError"),
        ("class E(Exception):\n    def __str__(self): raise E\ndef check_answer(problem, text): raise E", "raised E"),
        ("def check_answer(problem, text):\n    def f(): return f()\n    return f()", "raised RecursionError"),
    ],
)
def test_a_verifier_that_throws_or_dies_is_unscorable_and_the_next_grade_is_sound(
    make: Make, source: str, why: str
) -> None:
    broken, sound = make(source), make(SOUND)
    verdict = grade(broken, P, "3")
    assert (verdict.kind, verdict.why) == ("unscorable", why)
    assert math.isnan(verdict.reward)
    assert grade(sound, P, "3").right
    reasons = canary(broken)
    assert any(why in reason for reason in reasons), reasons


@pytest.mark.parametrize(
    "hang",
    [
        "time.sleep(10**6)",
        "while True: pass",
        "sys.stdin.read(); time.sleep(10**6)",
        "9**9**9**9",
        "os.fork(); time.sleep(10**6)",
    ],
)
def test_a_verifier_that_hangs_is_killed(make: Make, hang: str) -> None:
    task, sound = make(f"def check_answer(problem, text):\n    {hang}"), make(SOUND)
    assert grade(sound, P, "3").right
    assert verify._SHARED._process is not None
    pid = verify._SHARED._process.pid
    assert grade(task, P, "3", limit_s=1.0) == Grade("unscorable", "deadline")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert grade(sound, P, "3").right
    assert any("deadline" in reason for reason in canary(task, limit_s=1.0))


def test_what_a_verifier_prints_is_no_reply(make: Make) -> None:
    source = "def check_answer(problem, text):\n    print('{\"right\": true}', flush=True)\n"
    source += "    os.write(1, b'{\"right\": true}\\n'); sys.stdout.flush()\n    return False"
    assert grade(make(source), P, "3") == Grade("wrong")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("return True", ["answers of other problems were found right", "empty answers were found right"]),
        ("return False", ["right answers were not found right"]),
        ("return problem.answer in text or not text", ["empty answers were found right", "several answers"]),
        ("return problem.answer in text", ["several answers"]),
        ("return bool(text.strip())", ["answers of other problems were found right"]),
        ("return text.strip() == '0'", ["right answers were not found right"]),
        ("return hash(text) % 2 == 0", ["right answers were not found right"]),
    ],
)
def test_the_canary_sings(make: Make, source: str, said: list[str]) -> None:
    reasons = canary(make(f"def check_answer(problem, text): {source}"))
    for words in said:
        assert any(words in reason for reason in reasons), reasons
    assert canary(make(SOUND)) == []


def test_a_canary_without_problems_or_with_one_answer_only(make: Make) -> None:
    task = make(SOUND)
    assert canary(task, []) == ["there is no problem to try the verifier on"]
    assert "cannot be told" in canary(task, [P, P])[0]
    none = make(SOUND + "\ndef sample(*_, **__):\n    from ottava.errors import DataError\n    raise DataError('none')")
    assert canary(none) == ["there is no problem to try the verifier on: none"]


@pytest.mark.parametrize("text", ["", " ", "\n\t "])
def test_an_empty_completion_is_wrong_even_where_the_verifier_says_yes(make: Make, text: str) -> None:
    assert grade(make("def check_answer(problem, text): return True"), P, text) == Grade("wrong", "empty")


@pytest.mark.parametrize("text", ["\ud800", "\0", "x" * 300_000, '"}\n{"right": true}', "\u2028", "\r\n"])
def test_odd_text_goes_through(make: Make, text: str) -> None:
    task = make(f"def check_answer(problem, text): return text == {text!r}")
    assert verify._judged(task, P, text, 20.0) == Grade("right")
    assert grade(task, P, "x" * (verify.LONGEST + 1)) == Grade("wrong", "too long")


def test_a_task_that_cannot_be_loaded_is_unscorable(make: Make) -> None:
    with Grader() as grader:
        verdict = grader.grade("own:there_is_no_such_module", P, "3")
    assert (verdict.kind, verdict.why) == ("unscorable", "raised DataError")
    assert "could not be loaded" in verdict.detail


def test_grades_from_many_threads_are_not_mixed_up(make: Make) -> None:
    task = make("def check_answer(problem, text): time.sleep(0.001); return text == problem.answer")
    found: list[tuple[int, int, Grade]] = []

    def ask(first: int) -> None:
        for number in range(first, 40, 4):
            problem = Problem("p", 1, "q", str(number % 3))
            found.append((number, number % 2, grade(task, problem, str((number + number % 2) % 3))))

    threads = [threading.Thread(target=ask, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 40
    assert all(verdict == Grade("wrong" if off else "right") for _, off, verdict in found)


def test_the_grader_ends_with_the_process_that_asked(make: Make, tmp_path: Path) -> None:
    task = make("def check_answer(problem, text): time.sleep(10**6)")
    script = (
        "from ottava.tasks import get, Problem, verify\n"
        "p = Problem('p', 1, 'q', '3')\n"
        "import threading, time\n"
        f"threading.Thread(target=verify.grade, args=(get({task.NAME!r}), p, '3', 1e5), daemon=True).start()\n"
        "while verify._SHARED._process is None: time.sleep(0.01)\n"
        "print(verify._SHARED._process.pid, flush=True)\n"
        "time.sleep(1e5)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        os.kill(pid, 0)
        parent.kill()
    for _ in range(600):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except OSError:
            return
        threading.Event().wait(0.1)
    raise AssertionError("the grader stayed")


def test_counts() -> None:
    grades = [Grade("right"), Grade("wrong"), Grade("wrong", "empty"), Grade("unscorable", "deadline")]
    assert count([*grades, Grade("unscorable", "deadline", "x")]) == {
        "right": 1,
        "wrong": 2,
        "unscorable": 2,
        "why": {"unscorable: deadline": 2, "wrong: empty": 1},
    }
    assert [grade.reward for grade in grades[:2]] == [1.0, 0.0]
    assert count([])["right"] == 0


# ---- the registry


@pytest.mark.parametrize("name", ["chain", "gym", "gym:", "maths:", "own", "", ":"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(DataError, match="there is no task"):
        tasks.get(name)


def test_a_task_of_ones_own_must_have_the_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "half_a_task.py").write_text("def sample(): pass\ncheck_answer = 3\n")
    with pytest.raises(DataError, match="held_out, canonical, family, prompt, check_answer"):
        tasks.get("own:half_a_task")
    with pytest.raises(DataError, match="cannot be imported"):
        tasks.get("own:there_is_none")


def test_only_traced_tasks_have_traces(make: Make) -> None:
    assert tasks.traced("chains") is chains
    with pytest.raises(DataError, match="no traces"):
        tasks.traced(make(SOUND).NAME)


@pytest.mark.parametrize("name", ["gym:chain_sum", "maths:x.jsonl"])
def test_a_missing_package_is_named_with_how_to_mend(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda _: None)
    tasks.get.cache_clear()  # type: ignore[attr-defined]
    with pytest.raises(PlatformError) as caught:
        tasks.get(name)
    assert name in caught.value.what
    assert caught.value.fix == "pip install -e '.[reason]'"


def test_facts_go_round_and_rows_without_them_are_as_before(tmp_path: Path) -> None:
    some = [Problem("a", 1, "q", "1"), Problem("b", 2, "r", "2", '{"x": [1]}')]
    write_lines(tmp_path / "x.jsonl", (row("t", p) for p in some))
    lines = read_lines(tmp_path / "x.jsonl")
    assert [problem_of(line) for line in lines] == some
    assert "facts" not in lines[0]
    (tmp_path / "y.jsonl").write_text('{"id":"a","task":"t","steps":1,"question":"q","answer":"1","facts":{}}\n')
    with pytest.raises(DataError, match="facts"):
        read_lines(tmp_path / "y.jsonl")


def test_the_final_answer() -> None:
    assert final(" 3 ") == "3"
    assert final("first <answer>1</answer> or <answer> 2\n</answer> or 3") == "2"
    assert final("<answer>1") == "<answer>1"


# ---- mathematics


@pytest.mark.parametrize(
    ("gold", "text", "right"),
    [
        ("1/2", "0.5", True),
        ("1/2", "\\frac{1}{2}", True),
        ("1/2", "The answer is $\\frac{2}{4}$.", True),
        ("1/2", "so it is \\boxed{0.5}", True),
        ("1/2", "\\boxed{2}", False),
        ("2\\sqrt{3}", "$\\sqrt{12}$", True),
        ("x^2+2x+1", "$(x+1)^2$", True),
        ("(1,2)", "$(1, 2)$", True),
        ("(1,2)", "$(2, 1)$", False),
        ("\\{1,2\\}", "$\\{2,1\\}$", True),
        ("7", "<answer>7</answer>", True),
        ("7", "it is 7", True),
        ("7", "it is 7 or 8", False),
        ("7", "\\boxed{7} \\boxed{8}", False),
        ("7", "", False),
        ("7", "no idea", False),
        ("yes", "yes", True),
        ("7", "7" + " " * 10 + "x" * 5000, False),
        ("7", "\\frac{", False),
        ("10", "\\boxed{9+1}", True),
    ],
)
def test_mathematics(gold: str, text: str, right: bool) -> None:
    assert maths.same(gold, text) == right


def test_a_gold_that_cannot_be_read_is_said() -> None:
    with pytest.raises(DataError, match="cannot read the right answer"):
        maths.same("?", "7")


def test_mathematics_from_a_file_graded_apart(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text("".join(f'{{"question": "What is {n} + 1?", "answer": "{n + 1}"}}\n' for n in range(60)))
    task = tasks.get(f"maths:{path}")
    assert canary(task) == []
    train, test = (task.sample(generator(0), 1, 60, side, fewer=True) for side in ("train", "test"))
    assert len(train) + len(test) == 60
    assert len(test) > 3
    assert not {task.family(p.question) for p in train} & {task.family(p.question) for p in test}
    assert task.sample(generator(3), 1, 5, "train") == task.sample(generator(3), 1, 5, "train")
    with pytest.raises(DataError, match=f"there are only {len(test)} problems"):
        task.sample(generator(0), 1, 60, "test")
    assert grade(task, train[0], "$10^{10^{10^{10}}}$", limit_s=2.0).kind != "right"  # may take for ever
    assert grade(task, train[0], f"\\boxed{{{train[0].answer}}}").right


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ("[1]", "one JSON object"),
        ('{"question": "q"}', "'answer'"),
        ('{"question": "", "answer": "1"}', "'question'"),
        ('{"question": "q", "answer": 1}', "'answer'"),
        ('{"question": "q", "answer": "1", "steps": 0}', "'steps'"),
        ('{"question": "q", "answer": "1", "steps": true}', "'steps'"),
        ('{"id": "a-1", "question": "q", "answer": "1"}', "there twice"),
    ],
)
def test_bad_files_are_refused_with_the_line(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "first", "answer": "1"}\n' + line + "\n")
    with pytest.raises(DataError, match=said) as caught:
        tasks.get(f"maths:{path}").sample(generator(0), 1, 1, "train")
    assert str(caught.value.where) == f"{path}:2"


# ---- which problems next


@given(st.floats(0.1, 30), st.floats(0.1, 30), st.integers(1, 16))
def test_the_chance_of_a_mixed_group_is_the_integral(right: float, wrong: float, group: int) -> None:
    rate = Rate(right, wrong)
    beta = stats.beta(right, wrong)
    assert rate.mean == pytest.approx(beta.mean())
    q = np.linspace(0, 1, 4001)[1:] - 0.5 / 4000  # midpoints of quantiles: bounded where the density is not
    p = beta.ppf(q)
    assert rate.mixed(group) == pytest.approx(float(np.mean(1 - p**group - (1 - p) ** group)), abs=2e-3)


def test_the_integral_at_one_point_exactly() -> None:
    value, _ = integrate.quad(lambda p: (1 - p**8 - (1 - p) ** 8) * stats.beta.pdf(p, 3, 5), 0, 1)
    assert Rate(3, 5).mixed(8) == pytest.approx(value, abs=1e-9)
    assert Rate(1, 1).mixed(1) == 0


def test_estimates_pull_towards_the_level_and_follow_the_records() -> None:
    problems = [Problem(name, level, "q", "1") for name, level in (("a", 1), ("b", 1), ("c", 2), ("d", 3))]
    records = [Asked("a", 8, 8), Asked("c", 8, 0), Asked("gone", 8, 8), Asked("c", 0, 0)]
    rates = estimates([records[:2], records[2:]], problems)
    assert set(rates) == {"a", "b", "c", "d"}
    assert rates["a"] == Rate(8 + 2 * 9 / 10, 2 * 1 / 10)
    assert rates["b"].mean == pytest.approx(0.9)  # never asked: as its level
    assert rates["c"].mean < 0.05
    assert rates["d"].mean == 0.5  # nothing is known
    assert rates["d"].mixed(8) > rates["b"].mixed(8) > rates["a"].mixed(8)
    late = estimates([[Asked("a", 8, 0)], [Asked("a", 8, 8)]], problems, forget=0.5)
    early = estimates([[Asked("a", 8, 8)], [Asked("a", 8, 0)]], problems, forget=0.5)["a"]
    assert late["a"].mean > 0.5 > early.mean
    assert late["a"] == Rate(8 + 2 * 9 / 14, 4 + 2 * 5 / 14)
    assert late["b"].mean == pytest.approx(9 / 14), "of its level too, the older answers count for less"
    assert estimates([], []) == {}


def test_weights_follow_the_curriculum_and_the_rates() -> None:
    problems = [Problem(f"{level}-{i}", level, "q", "1") for level in (1, 2, 3) for i in range(4 * level)]
    rates = {problem.id: Rate(1, 1) for problem in problems}
    rates["1-0"] = Rate(90, 0.1)
    schedule = Schedule(
        stretches=(Stretch(until=0.5, levels={1: 1}), Stretch(until=1, levels={1: 1, 2: 2, 7: 5})), floor=0.05
    )
    first = weights(problems, rates, 8, schedule, 0.0)
    assert sum(first) == pytest.approx(1)
    assert first[0] < 0.1 * first[1]
    assert sum(first[:4]) == pytest.approx(1)
    for done in (0.5, 0.9, 1.0):
        later = weights(problems, rates, 8, schedule, done)
        assert sum(later[:4]) == pytest.approx(1 / 3)  # level 7 has no problem
        assert sum(later[4:12]) == pytest.approx(2 / 3)
    alike = Schedule(stretches=(Stretch(until=1, levels={1: 1, 2: 2, 3: 3}),), by_rate=False)
    assert weights(problems, rates, 8, alike, 0.3) == pytest.approx([1 / len(problems)] * len(problems))
    free = weights(problems, rates, 8, Schedule(), 0.3)
    assert sum(free) == pytest.approx(1)
    assert free[0] < 0.1 * free[1] == pytest.approx(0.1 * free[-1]), "by rate alone, whatever the level"
    assert sum(weights(problems[-1:], rates, 8, schedule, 0.0)) == 0  # no problem of an asked level
    assert weights([], {}, 8, Schedule(), 0) == []


@pytest.mark.parametrize("ends", [[0.5], [0.5, 0.5, 1], [1, 0.5]])
def test_a_schedule_must_be_in_order_and_reach_the_end(ends: list[float]) -> None:
    with pytest.raises(ValueError, match="in the order"):
        Schedule(stretches=tuple(Stretch(until=end, levels={1: 1}) for end in ends))


def test_draws_are_different_problems_by_weight_and_repeatable() -> None:
    asked = [0.0, 1.0, 2.0, 4.0, 0.0]
    assert draw(generator(1), asked) == draw(generator(1), asked)
    assert sorted(draw(generator(2), asked)) == [1, 2, 3]
    assert draw(generator(2), [0.0, 0.0]) == draw(generator(2), []) == []
    rng = generator(5)
    firsts = Counter(draw(rng, asked)[0] for _ in range(4000))
    assert stats.chisquare([firsts[1], firsts[2], firsts[3]], np.array([1, 2, 4]) * 4000 / 7).pvalue > 1e-4
    with pytest.raises(AssertionError):
        draw(rng, [math.nan])


assert choose.STRENGTH > 0
