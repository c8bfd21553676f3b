"""Tasks: verifiers against a second implementation, the split by exhaustive enumeration."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ottava import tasks
from ottava.errors import DataError
from ottava.tasks import Problem, Task, chains
from ottava.tasks.base import generator, problem_of, read_lines, row, write_lines
from ottava.tasks.statistics import wilson

ALL_OPERATIONS = [f"+{k}" for k in range(1, 10)] + [f"-{k}" for k in range(1, 10)] + ["*3", "*7", "*9"]


def write(start: int, operations: list[str], letters: str = "abcdef", gap: str = " ") -> str:
    return gap.join([str(start), *(f"{a}{gap}{o}" for a, o in zip(letters, operations, strict=False)), "="])


def brute(start: int, operations: list[str]) -> list[int]:
    """The second implementation: Python evaluates the whole expression; the last digit is taken once, at the end."""
    prefixes = itertools.accumulate(operations, lambda text, o: f"({text}{o})", initial=str(start))
    return [eval(text) % 10 for text in list(prefixes)[1:]]


raw_chains = st.tuples(st.integers(0, 9), st.lists(st.sampled_from(ALL_OPERATIONS), min_size=1, max_size=6))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    start, operations = draw(raw_chains)
    answer = str(brute(start, operations)[-1])
    return Problem("p", len(operations), write(start, operations), answer)


@given(raw_chains)
def test_arithmetic_agrees_with_a_second_implementation(chain: tuple[int, list[str]]) -> None:
    start, operations = chain
    assert chains.values(write(start, operations)) == brute(start, operations)


def test_every_operation_is_a_permutation_and_all_are_there() -> None:
    assert list(chains.OPERATIONS) == ALL_OPERATIONS
    for operation in chains.OPERATIONS:
        assert sorted(chains.apply(value, operation) for value in range(10)) == list(range(10))


def test_the_example_of_the_documentation() -> None:
    problem = Problem("p", 2, "7 a +5 b *3 =", "6")
    assert chains.trace(problem) == "7 a +5 2 b *3 6"
    assert chains.check_trace(problem, "7 a +5 2 b *3 6") == []
    assert chains.check_answer(problem, "6")


@given(problems(), st.data())
def test_a_changed_step_is_found_and_only_that_one(problem: Problem, data: st.DataObject) -> None:
    gold = chains.trace(problem)
    assert chains.check_trace(problem, gold) == []
    tokens = gold.split(" ")
    at = data.draw(st.integers(0, len(tokens) - 1))
    tokens[at] = data.draw(st.sampled_from([t for t in [*chains.vocabulary(), ""] if t != tokens[at]]))
    assert chains.check_trace(problem, " ".join(tokens)) == [max(0, (at - 1) // 3)]


@given(problems(), st.data())
def test_an_equivalent_trace_has_twins_of_the_operations_and_nothing_else(
    problem: Problem, data: st.DataObject
) -> None:
    """The oracle: a trace is equivalent if it is the gold trace of a question of the same family."""
    gold = chains.trace(problem).split(" ")
    twins = [
        data.draw(st.sampled_from([o for o in chains.OPERATIONS if _same(o, operation)])) for operation in gold[2::3]
    ]
    gold[2::3] = twins
    assert chains.equivalent(problem, " ".join(gold))
    at = data.draw(st.integers(0, len(gold) - 1))
    gold[at] = data.draw(st.sampled_from([t for t in [*chains.vocabulary(), ""] if t != gold[at]]))
    still = at % 3 == 2 and gold[at] in chains.OPERATIONS and _same(gold[at], twins[at // 3])
    assert chains.equivalent(problem, " ".join(gold)) == still
    assert not chains.equivalent(problem, " ".join(gold[:-1]))


def _same(one: str, other: str) -> bool:
    return all(chains.apply(digit, one) == chains.apply(digit, other) for digit in range(10))


@given(problems(), st.text(alphabet="0123456789abc+-* =", max_size=30))
def test_only_the_gold_text_passes(problem: Problem, text: str) -> None:
    gold = chains.trace(problem)
    for trace in (text, gold + text, text + gold):
        assert (chains.check_trace(problem, trace) == []) == (trace == gold)


@given(problems(), st.text(max_size=4))
def test_only_the_exact_answer_passes(problem: Problem, text: str) -> None:
    assert chains.check_answer(problem, text) == (text == problem.answer)
    assert [chains.check_answer(problem, digit) for digit in "0123456789"].count(True) == 1
    for spoilt in (problem.answer + " ", " " + problem.answer, problem.answer + "\n", problem.answer * 2, ""):
        assert not chains.check_answer(problem, spoilt)


def test_what_is_missing_or_too_much_is_named() -> None:
    problem = Problem("p", 3, "7 a +5 b *3 c -1 =", "5")
    gold = "7 a +5 2 b *3 6 c -1 5"
    assert chains.check_trace(problem, "") == [0, 1, 2]
    assert chains.check_trace(problem, "7 a +5 2") == [1, 2]
    assert chains.check_trace(problem, gold + " =") == [3]
    assert chains.check_trace(problem, "7 b *3 1 c -1 0") == [0, 1, 2]
    assert chains.check_trace(problem, "8 a +5 2 b *3 6 c -1 5") == [0]
    assert chains.check_trace(problem, "7 a +5 3 b *3 6 c -1 5") == [0], "a step is judged by the right value"


@given(problems(), st.data())
def test_form_is_not_truth(problem: Problem, data: st.DataObject) -> None:
    tokens = chains.trace(problem).split(" ")
    assert chains.well_formed(problem, " ".join(tokens), problem.answer)
    for i in range(problem.steps):
        tokens[3 * i + 2] = data.draw(st.sampled_from(chains.OPERATIONS))
        tokens[3 * i + 3] = data.draw(st.sampled_from(chains.DIGITS))
    trace, answer = " ".join(tokens), tokens[-1]
    assert chains.well_formed(problem, trace, answer), "wrong operations and values are still well written"
    other = str((int(answer) + 1) % 10)
    for spoilt in (trace.replace(" ", "  ", 1), trace + " ", trace[:-2], trace.upper(), trace.replace("a", "b"), ""):
        assert not chains.well_formed(problem, spoilt, answer)
    assert not chains.well_formed(problem, trace, other)


def enumerate_questions(steps: int) -> list[tuple[str, tuple[object, ...]]]:
    """Every question and its family by definition: the first digit and each operation's whole table."""
    tables = {o: tuple(eval(f"{v}{o}") % 10 for v in range(10)) for o in ALL_OPERATIONS}
    return [
        (write(start, list(chosen)), (start, *(tables[o] for o in chosen)))
        for start in range(10)
        for chosen in itertools.product(ALL_OPERATIONS, repeat=steps)
    ]


@pytest.mark.parametrize(("steps", "low", "high"), [(1, 0.28, 0.38), (2, 0.09, 0.11)])
def test_the_split_divides_everything_and_families_stay_together(steps: int, low: float, high: float) -> None:
    everything = enumerate_questions(steps)
    train = chains.sample(generator(1), steps, len(everything), "train", fewer=True)
    test = chains.sample(generator(2), steps, len(everything), "test", fewer=True)
    questions = [p.question for p in train + test]
    assert sorted(questions) == sorted(question for question, _ in everything)
    assert {p.question for p in test} == {question for question, _ in everything if chains.held_out(question)}
    family = dict(everything)
    assert not {family[p.question] for p in train} & {family[p.question] for p in test}
    assert low < len(test) / len(everything) < high
    assert len({p.id for p in train + test}) == len(everything)
    for problem in train + test:
        start, operations = chains.parse(problem.question)
        assert problem.steps == steps
        assert problem.answer == str(brute(start, operations)[-1])


def test_family_is_equality_of_what_the_steps_do() -> None:
    definition = dict(enumerate_questions(2))
    by_family: dict[str, set[object]] = {}
    for question, meaning in definition.items():
        by_family.setdefault(chains.family(question), set()).add(meaning)
    assert all(len(meanings) == 1 for meanings in by_family.values())
    assert len(by_family) == len(set(definition.values())) == 10 * 12**2


def test_one_step_training_shows_every_operation_and_digit() -> None:
    train = chains.sample(generator(0), 1, 210, "train", fewer=True)
    assert {p.question.split()[2] for p in train} == set(ALL_OPERATIONS)
    assert {p.question[0] for p in train} == {p.answer for p in train} == set("0123456789")


def test_the_split_never_changes() -> None:
    """A change here makes every published test set, and every accuracy on it, another one."""
    bits = "".join(str(int(chains.held_out(question))) for question, _ in enumerate_questions(2))
    assert hashlib.sha256(bits.encode()).hexdigest()[:16] == "3dd39e15e1848523"


@given(raw_chains, st.integers(0, 12), st.sampled_from(["", " ", "  ", "\t"]), st.data())
def test_spelling_is_seen_through(chain: tuple[int, list[str]], offset: int, gap: str, data: st.DataObject) -> None:
    start, operations = chain
    plain = write(start, operations)
    letters = "".join(chr(ord("a") + offset + i) for i in range(6))
    other = write(start, operations, letters, gap)
    other = other.replace("-", data.draw(st.sampled_from(["-", "\u2212", "\u2013", "\uff0d"])))
    other = other.replace("*", data.draw(st.sampled_from(["*", "\u00d7", "\u22c5"])))
    other = data.draw(st.sampled_from([other, other.upper(), f" {other}\n", other.rstrip("= \t")]))
    assert chains.canonical(other) == plain
    assert chains.family(other) == chains.family(plain)
    assert chains.held_out(other) == chains.held_out(plain)


def test_family_sees_sign_variants_and_canonical_does_not() -> None:
    assert chains.family("7 a -3 b *3 =") == chains.family("7 a +7 b *3 =")
    assert chains.canonical("7 a -3 b *3 =") != chains.canonical("7 a +7 b *3 =")
    assert chains.family("7 a +3 b *3 =") != chains.family("7 b *3 a +3 =")
    assert chains.canonical("What is  Left?") == chains.family("what IS left?") == "what is left?"


@pytest.mark.parametrize("steps", range(1, 7))
@pytest.mark.parametrize("split", ["train", "test"])
def test_samples_are_distinct_deterministic_and_of_the_vocabulary(steps: int, split: tasks.base.Split) -> None:
    got = chains.sample(generator(5, steps), steps, 60, split)
    assert got == chains.sample(generator(5, steps), steps, 60, split)
    assert got != chains.sample(generator(6, steps), steps, 60, split)
    assert len({p.question for p in got}) == 60
    vocabulary = chains.vocabulary()
    assert len(vocabulary) == len(set(vocabulary)) == 38
    for problem in got:
        assert chains.held_out(problem.question) == (split == "test")
        assert {*problem.question.split(" "), *chains.trace(problem).split(" "), problem.answer} <= set(vocabulary)


def test_large_samples_are_even() -> None:
    got = chains.sample(generator(3), 4, 20_000, "train")
    for counts in (
        np.unique([p.answer for p in got], return_counts=True)[1],
        np.unique([p.question.split()[4] for p in got], return_counts=True)[1],
    ):
        expected = len(got) / len(counts)
        assert float(((counts - expected) ** 2 / expected).sum()) < 60, counts  # chi-square, 9 or 20 degrees


def test_sampling_is_fast() -> None:
    began = time.process_time()
    assert len(chains.sample(generator(0), 6, 20_000, "train")) == 20_000
    assert time.process_time() - began < 1.0


def test_too_many_problems_asked_for() -> None:
    with pytest.raises(DataError) as caught:
        chains.sample(generator(0), 1, 100, "test")
    assert caught.value.render() == (
        "error: there are only 63 1-step problems in the test split, not the 100 asked for\n"
        "  mend:  ask for fewer, or for longer chains"
    )
    with pytest.raises(DataError, match="a chain has 1 to 6 steps, not 7"):
        chains.sample(generator(0), 7, 1, "train")


@pytest.mark.parametrize(
    "text",
    ["", "7 =", "7 a +5", "7  a +5 =", "7 b +5 =", "7 a +5 c +5 =", "7 a *2 =", "7 a +0 =", "17 a +5 =", "7 a +5 =\n",
     "7 a +5 b +5 c +5 d +5 e +5 f +5 g +5 =", "\u0667 a +5 ="],
)  # fmt: skip
def test_what_is_no_chain_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="is not a chain"):
        chains.parse(text)


def test_nothing_depends_on_the_hash_seed() -> None:
    code = (
        "from ottava.tasks import chains; from ottava.tasks.base import generator\n"
        "for s in ('train', 'test'): print(chains.sample(generator(7, 'x', 2), 3, 20, s))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("0", "1", "77")
    }
    assert len(outputs) == 1
    assert outputs.pop()


def test_generators_differ_by_seed_and_by_every_name() -> None:
    keys: list[tuple[object, ...]] = [(), ("a",), ("b",), ("a", "b"), ("ab",), ("a", 1), (1, "a")]
    drawn = {int(generator(seed, *key).integers(2**63)) for seed in (-1, 0, 1) for key in keys}
    assert len(drawn) == 3 * len(keys)


def test_registry() -> None:
    task: Task = chains  # mypy proves that the module has every function of a task
    assert tasks.get("chains") is task
    with pytest.raises(DataError, match="there is no task 'chain'") as caught:
        tasks.get("chain")
    assert "chains" in str(caught.value.fix)


def test_lines_go_round(tmp_path: Path) -> None:
    some = chains.sample(generator(0), 2, 5, "train")
    path = tmp_path / "some.jsonl"
    write_lines(path, (row("chains", p, trace=chains.trace(p)) for p in some))
    lines = read_lines(path)
    assert [problem_of(line) for line in lines] == some
    assert list(lines[0]) == ["id", "task", "steps", "question", "answer", "trace"]
    assert [p.name for p in tmp_path.iterdir()] == ["some.jsonl"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ":2:2\n"),
        ("[1]", "a line of a data set is one JSON object"),
        ('{"id": "x"}', "'task' is missing; it must be text"),
        ('{"id": "x", "task": "chains", "steps": "2", "question": "", "answer": ""}', "'steps' is '2'"),
        ('{"id": "x", "task": "chains", "steps": 2, "question": "", "answer": 6}', "'answer' is 6; it must be text"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    good = '{"id": "x", "task": "chains", "steps": 1, "question": "7 a +5 =", "answer": "2"}'
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(DataError) as caught:
        read_lines(path)
    assert f"where: {path}:2" in caught.value.render()
    assert message in caught.value.render() + "\n"


@given(st.integers(1, 3000), st.data())
def test_wilson_solves_its_equation(n: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, n))
    low, high = wilson(correct, n)
    assert 0 <= low <= correct / n <= high <= 1
    for bound in (low, high):  # by definition: where the score test just does not reject
        distance = 1.959963984540054 * math.sqrt(bound * (1 - bound) / n)
        edge = (bound == 0 and correct == 0) or (bound == 1 and correct == n)
        assert edge or math.isclose(abs(correct / n - bound), distance, rel_tol=1e-6, abs_tol=1e-9)


def test_wilson_of_nothing_and_a_known_value() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == 1.0
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # R. G. Newcombe, Stat. Med. 17 (1998) 857


def test_a_salt_holds_other_families_out() -> None:
    import numpy as np

    from ottava import tasks
    from ottava.tasks import chains

    fresh = tasks.traced("chains:salt=autumn")
    assert fresh.NAME == "chains:salt=autumn"
    test = fresh.sample(np.random.default_rng(1), 4, 200, "test")
    train = fresh.sample(np.random.default_rng(1), 4, 200, "train")
    assert all(fresh.held_out(p.question) for p in test)
    assert not any(fresh.held_out(p.question) for p in train)
    before = sum(chains.held_out(p.question) for p in test)
    assert 5 < before < 45, "a tenth of them, by chance, was held out before, too"
    assert all(not fresh.check_trace(p, fresh.trace(p)) for p in test)
    for wrong in ("chains:pepper=1", "chains:salt=", "chains:salt=a b"):
        with pytest.raises(DataError):
            tasks.get(wrong)
