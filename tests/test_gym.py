"""reasoning-gym as tasks: its own scorer is the oracle; the two sides are disjoint; what evaluates text is fenced."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import reasoning_gym

from ottava import tasks
from ottava.errors import DataError
from ottava.tasks import Problem, gym, verify
from ottava.tasks.base import generator
from ottava.tasks.gym import Gym
from ottava.tasks.jail import decode
from ottava.tasks.verify import canary, grade

NAMED = ["chain_sum", "basic_arithmetic", "gsm_symbolic", "countdown,min_numbers=3,max_numbers=3"]
MORE = ["gcd", "leg_counting", "maze", "arc_1d", "knights_knaves", "word_sorting", "rearc", "prime_factorization"]


@pytest.fixture(autouse=True)
def kept(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTTAVA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setattr(gym, "CHUNK", 12)


def make(name: str) -> Gym:
    task = tasks.get(f"gym:{name}")
    assert isinstance(task, Gym)
    return task


def draw(name: str, count: int = 12, level: int = 1, seed: int = 0) -> list[Problem]:
    return make(name).sample(generator(seed), level, count, "train")


@pytest.mark.parametrize("name", NAMED + MORE)
def test_grades_are_those_of_the_packages_own_scorer(name: str) -> None:
    task = make(name)
    problems = draw(name)
    assert len({problem.id for problem in problems}) == 12
    scorer = reasoning_gym.get_score_answer_fn(task.dataset)
    for problem, other in zip(problems, [*problems[1:], problems[0]], strict=True):
        first, index = map(int, problem.id.rpartition("-")[2].split("+"))
        item = task._make(task._config(1, first, gym.BLOCK))[index]  # the generator again
        assert (item["question"], item["answer"]) == (problem.question, problem.answer)
        for text in (problem.answer, other.answer, problem.answer + "1", "nonsense"):
            try:
                expected = scorer(text, item) >= 1
            except ValueError:
                expected = False
            assert task.check_answer(problem, text) == expected, text
        assert task.check_answer(problem, f"so it is <answer>{problem.answer}</answer>.")


@pytest.mark.parametrize("name", NAMED + MORE)
def test_the_verifier_is_sound(name: str) -> None:
    assert canary(make(name), draw(name)) == []


def test_a_published_verifier_that_does_not_look_at_the_question_is_found_out() -> None:
    """puzzle24 of 0.1.25 takes any four numbers that make 24, also those of another problem."""
    reasons = canary(make("puzzle24"), draw("puzzle24", 4))
    assert reasons
    assert "answers of other problems were found right" in reasons[0]


@pytest.mark.parametrize("name", NAMED)
def test_training_and_test_are_disjoint_by_family_and_by_seed(name: str) -> None:
    task = make(name)
    train = task.sample(generator(1), 1, 60, "train", fewer=True)
    test = task.sample(generator(1), 1, 30, "test", fewer=True)
    assert len(test) == 30
    assert not {task.family(p.question) for p in train} & {task.family(p.question) for p in test}
    seeds = {"train": range(1 << 31), "test": range(1 << 31, 1 << 32)}
    for side, problems in (("train", train), ("test", test)):
        assert all(task.held_out(p.question) == (side == "test") for p in problems)
        assert all(sum(map(int, p.id.rpartition("-")[2].split("+"))) in seeds[side] for p in problems)


def test_about_a_fifth_is_held_out() -> None:
    task = make("chain_sum")
    problems = [p for n in range(12) for p in task._block(generator(n), 4, "train")]
    share = sum(task.held_out(p.question) for p in problems) / len(problems)
    assert 0.14 < share < 0.26  # 768 problems: four standard errors


def test_siblings_are_one_family() -> None:
    task = make("chain_sum")
    ask = "State the final answer to the following arithmetic problem: {} ="
    assert task.family(ask.format("4 + 3 - 2")) == task.family(ask.format("3 - 2 +  4"))
    assert task.family(ask.format("4 + 3 - 2")) != task.family(ask.format("4 - 3 + 2"))
    assert task.family(ask.format("-5 + -3")) == task.family(ask.format("-3 + -5"))
    for problem in draw("countdown,min_numbers=3,max_numbers=3"):
        known = decode(json.loads(problem.facts))
        other = f"Find a way to make {known['target']} using all of these numbers: "
        other += ", ".join(map(str, sorted(known["numbers"]))) + problem.question[problem.question.index(".\n") :]
        assert make("countdown").family(other) == make("countdown").family(problem.question)


def test_levels_are_the_packages_curriculum() -> None:
    task = make("chain_sum")
    assert task.MAX_STEPS == 11
    for level in (1, 4, 11):
        for problem in draw("chain_sum", 5, level):
            known = decode(json.loads(problem.facts))
            assert known["num_terms"] == level + 1
            assert known["num_digits"] == min(level, 10)
            assert problem.steps == level
    assert make("gsm_symbolic").MAX_STEPS == 1
    with pytest.raises(DataError, match="levels 1 to 11, not 12"):
        draw("chain_sum", 1, 12)


def test_options_fix_a_setting() -> None:
    problems = draw("chain_sum,max_terms=3,max_digits=2", 40)
    known = [decode(json.loads(p.facts)) for p in problems]
    assert {k["num_terms"] for k in known} == {2, 3}
    assert {k["num_digits"] for k in known} == {1, 2}
    assert problems[0].id.startswith("gym:chain_sum,max_terms=3,max_digits=2-1-")
    with pytest.raises(DataError, match="cannot be had"):
        draw("chain_sum,max_terms=3", 1, 5)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("chain_summ", "did you mean 'chain_sum'"),
        ("chain_sum,max_term=3", "did you mean 'max_terms'"),
        ("chain_sum,max_terms", "is not an option"),
        ("chain_sum,max_terms=x", "is not an option"),
        ("chain_sum,size=9", "no option 'size'"),
        ("chain_sum,max_terms=0", "cannot be had"),
        ("rubiks_cube", "gives no answer"),
        ("composite", "gives no answer"),
    ],
)
def test_names_and_options_that_are_none(name: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        tasks.get(f"gym:{name}")


def test_a_small_space_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make("chain_sum")  # level 1: two terms of one digit, 200 questions
    found = task.sample(generator(0), 1, 1000, "train", fewer=True)
    test = task.sample(generator(0), 1, 1000, "test", fewer=True)
    assert len(found) + len(test) == 200
    with pytest.raises(DataError, match=f"only {len(test)} problems"):
        task.sample(generator(0), 1, 1000, "test")


ATTACKS = [
    "__import__('os').system('touch {0}')",
    "[open('{0}', 'w')]",
    "(lambda: open('{0}', 'w'))()",
    'exec(chr(111) + \'pen("{0}", "w")\')',
    "().__class__.__base__.__subclasses__()",
    "[x for x in [open('{0}', 'w')]]",
    "1 if open('{0}', 'w') else 2",
]


@pytest.mark.parametrize("name", sorted(gym.EVALUATED))
def test_what_the_model_wrote_is_never_run(name: str, tmp_path: Path) -> None:
    """Nine scorers pass text to eval; the attacks would leave a file, and the generators' own answers still pass."""
    task = make(name)
    level = 1
    problems = task._drawn(generator(0), level, 3, "train")
    target = tmp_path / "broken"
    for attack in ATTACKS:
        assert not task.check_answer(problems[0], attack.format(target))
    assert not target.exists()
    assert all(task.check_answer(problem, problem.answer) for problem in problems)


def test_the_attacks_work_where_nothing_fences_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gym, "EVALUATED", {})
    target = tmp_path / "broken"
    (problem,) = make("spiral_matrix")._drawn(generator(0), 1, 1, "train")
    make("spiral_matrix").check_answer(problem, ATTACKS[0].format(target))
    assert target.exists()


@pytest.mark.parametrize("text", ["9**9**9**9", "7//2", "1.5 + 1", "2 3"])
def test_countdown_takes_sums_of_the_given_numbers_only(text: str) -> None:
    (problem,) = draw("countdown,min_numbers=3,max_numbers=3", 1)
    assert grade(make("countdown,min_numbers=3,max_numbers=3"), problem, text, limit_s=60.0).kind == "wrong"


def test_slow_problems_are_generated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "countdown,min_numbers=3,max_numbers=4"
    first = draw(name, 15)
    files = {path: path.read_bytes() for path in gym.cache().glob("countdown-1-train-*")}
    assert len(files) >= 2  # 12 a file
    monkeypatch.setattr(Gym, "_block", None)  # asking the generator again would raise
    assert draw(name, 15) == first
    assert draw(name, 15, seed=1) != first
    assert {p.id for p in draw(name, 15, seed=1)} & {p.id for p in first}
    assert files.items() <= {path: path.read_bytes() for path in gym.cache().glob("countdown-1-train-*")}.items()


def test_a_draw_depends_on_the_seed_alone() -> None:
    code = (
        "from ottava.tasks import get; from ottava.tasks.base import generator\n"
        "for n in ('chain_sum', 'basic_arithmetic', 'gsm_symbolic', 'maze', 'knights_knaves'):\n"
        "    print([(p.id, p.question, p.facts) for p in get('gym:' + n).sample(generator(7, n), 1, 6, 'test')])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={**environment, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert len(outputs.pop()) > 1000


def test_every_dataset_that_is_offered_can_be_had() -> None:
    for name in gym.datasets():
        assert make(name).MAX_STEPS >= 1
    assert len(gym.datasets()) == 100


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in gym.datasets() if name not in gym.SLOW])
def test_every_quick_verifier_is_sound(name: str) -> None:
    assert canary(make(name), make(name)._drawn(generator(0, name), 1, 8, "train")) == []


@pytest.fixture(scope="module", autouse=True)
def grader() -> object:
    """One process for all of this file's grades."""
    yield
    verify._SHARED.close()


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("7", True), ("The answer is 7.", True), ("4 + 3 = 7", True), ("3 + 4 is 1,007", False), ("7 or 8", False),
        ("<answer>7</answer> as 8 - 1", True), ("the <answer>8</answer> of 7", False), ("seven", False), ("-7", False),
        ("7.5", False),
    ],
)  # fmt: skip
def test_of_a_text_around_a_number_the_last_one_counts(text: str, right: bool) -> None:
    problem = replace(draw("chain_sum", 1)[0], answer="7")
    assert make("chain_sum").check_answer(problem, text) is right


def test_a_bare_question_can_be_asked() -> None:
    bare = make("chain_sum,hint=false")
    problem = bare.sample(generator(1), 1, 1, "train")[0]
    assert bare.prompt(problem) == problem.question
    assert make("chain_sum").prompt(problem) == f"{problem.question}\n{gym.HINT}"
    assert bare.NAME == "gym:chain_sum,hint=false", "another process finds the same"
    assert canary(bare, bare.sample(generator(2), 1, 8, "train")) == []
