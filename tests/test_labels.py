"""Labels: teachers err as documented, fusion never peeks, hygiene removes what is planted, the bound covers."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ottava import document
from ottava.errors import DataError, RecipeError
from ottava.labels import fusion
from ottava.labels.audit import Audit, audit, clopper_pearson_upper, require
from ottava.labels.fusion import Label, Tally, collect, fuse
from ottava.labels.hygiene import Removed, decontaminate, deduplicate, require_disjoint
from ottava.labels.teachers import TEACHERS, Proposal, Teacher, propose
from ottava.stages import label as stage
from ottava.tasks import Problem, Task, chains
from ottava.tasks.base import generator, problem_of, read_lines

CHAIN = Problem("p", 3, "7 a +5 b *3 c -1 =", "5")
GOLD = "7 a +5 2 b *3 6 c -1 5"


# ---- teachers


@pytest.mark.parametrize(
    ("mode", "well_formed", "right_answer"),
    [
        ("slip", True, False),
        ("miscopy", True, False),
        ("drop", False, None),
        ("garble", False, True),
        ("misprint", True, True),
        ("swap", True, True),
    ],
)
def test_error_modes_do_what_they_are_documented_to_do(mode: str, well_formed: bool, right_answer: bool | None) -> None:
    teacher = Teacher("t", {mode: 1.0})
    some = [p for n in (3, 6) for p in chains.sample(generator(0), n, 200, "train")]
    spoilt = 0
    for problem in some:
        said = propose(teacher, problem, 0)
        assert chains.well_formed(problem, said.trace, said.answer) == well_formed
        if right_answer is False and mode == "miscopy":  # 0 *3 and 0 *7 are the same
            spoilt += said.answer != problem.answer
            assert chains.check_trace(problem, said.trace)
        elif right_answer is not None:
            assert (said.answer == problem.answer) == right_answer
            spoilt += bool(chains.check_trace(problem, said.trace))
        else:
            spoilt += 1
    assert spoilt > 0.85 * len(some), "values that are swapped may be equal, and then nothing is wrong"


def test_teachers_err_at_their_rates() -> None:
    some = chains.sample(generator(0), 5, 3000, "train")
    for teacher in TEACHERS.values():
        if teacher.echoes is None:
            wrong = sum(bool(chains.check_trace(p, propose(teacher, p, 1).trace)) for p in some)
            rate = sum(teacher.errors.values())
            sigma = math.sqrt(rate * (1 - rate) * len(some))
            # swaps of equal values, a tenth of them, are no errors
            assert -4 * sigma - 0.1 * teacher.errors.get("swap", 0) * len(some) < wrong - rate * len(some) < 4 * sigma


def test_echo_shares_the_mistakes_of_hasty_and_careful_does_not() -> None:
    some = chains.sample(generator(0), 5, 2000, "train")

    def shared(a: str, b: str) -> float:
        pairs = [(propose(TEACHERS[a], p, 0), propose(TEACHERS[b], p, 0), p) for p in some]
        wrong = [(x.trace == y.trace) for x, y, p in pairs if chains.check_trace(p, y.trace)]
        return sum(wrong) / len(wrong)

    assert 0.42 < shared("echo", "hasty") < 0.58
    assert shared("careful", "hasty") < 0.05


def test_proposals_depend_on_seed_teacher_and_question_alone() -> None:
    some = chains.sample(generator(0), 6, 300, "train")
    said = [[propose(t, p, 3) for p in some] for t in TEACHERS.values()]
    assert said == [[propose(t, p, 3) for p in reversed(some)][::-1] for t in TEACHERS.values()]
    assert said != [[propose(t, p, 4) for p in some] for t in TEACHERS.values()]
    assert said[0] == [propose(TEACHERS["careful"], Problem("x", p.steps, p.question, "?"), 3) for p in some]


# ---- fusion


class Blindfolded:
    """The chains task without its oracle: labelling must not ask it."""

    def __getattr__(self, name: str) -> Any:
        assert name not in ("check_trace", "trace"), "the oracle was asked"
        return getattr(chains, name)


BLIND = cast(Task, Blindfolded())
SLIPPED = "7 a +5 3 b *3 9 c -1 8"
MISPRINT = "7 a +5 4 b *3 6 c -1 5"


def says(*said: tuple[str, str]) -> list[Proposal]:
    return [Proposal(f"t{i}", trace, answer) for i, (trace, answer) in enumerate(said)]


GOOD, BAD, SILENT, UGLY = (GOLD, "5"), (SLIPPED, "8"), (MISPRINT, "5"), (GOLD + " =", "5")


@pytest.mark.parametrize(
    ("proposals", "agree", "trace", "sources", "reason"),
    [
        (says(GOOD, GOOD), 2, GOLD, ("t0", "t1"), None),
        (says(BAD, GOOD, UGLY, GOOD), 2, GOLD, ("t1", "t3"), None),
        (says(BAD, BAD, BAD, GOOD), 1, GOLD, ("t3",), None),
        (says(BAD, BAD, BAD, GOOD), 2, None, (), fusion.NO_AGREEMENT),
        (says(BAD, UGLY), 1, None, (), fusion.NO_ANSWER),
        (says((GOLD, "8")), 1, None, (), fusion.NO_ANSWER),  # the trace does not end in the answer given
        (says(GOOD, SILENT), 1, None, (), fusion.TIE),
        (says(GOOD, SILENT, SILENT), 2, MISPRINT, ("t1", "t2"), None),  # what agreement cannot see
        (says(GOOD, SILENT, GOOD), 2, GOLD, ("t0", "t2"), None),
        (says(), 1, None, (), fusion.NO_ANSWER),
    ],
)
def test_fusion_by_cases(
    proposals: list[Proposal], agree: int, trace: str | None, sources: tuple[str, ...], reason: str | None
) -> None:
    tally = Tally()
    label = fuse(BLIND, CHAIN, proposals, agree, tally)
    assert (label.trace if label else None) == trace
    assert (label.sources if label else ()) == sources
    assert dict(tally.rejected) == ({reason: 1} if reason else {})
    assert tally.accepted == (label is not None)
    assert tally.proposals.total() == len(proposals)


def test_grades_and_shared_mistakes_are_counted() -> None:
    tally = Tally()
    otherwise_bad = ("7 a +5 1 b *3 3 c -1 2", "2")
    label = fuse(BLIND, CHAIN, says(BAD, GOOD, BAD, UGLY, SILENT, GOOD, otherwise_bad), 2, tally)
    assert label == Label(CHAIN, GOLD, ("t1", "t5"), right=3, asked=7)
    assert tally.shared_mistakes == Counter({"t0+t2": 1})
    assert tally.by_teacher()["t0"] == {"right answer": 0, "wrong answer": 1, "malformed": 0}
    assert tally.by_teacher()["t3"] == {"right answer": 0, "wrong answer": 0, "malformed": 1}


@settings(max_examples=60)
@given(st.lists(st.sampled_from([GOOD, BAD, SILENT, UGLY]), max_size=7), st.integers(1, 3))
def test_an_accepted_trace_is_right_in_form_and_answer_and_has_the_votes(said: list[Any], agree: int) -> None:
    label = fuse(BLIND, CHAIN, says(*said), agree, Tally())
    good, silent = said.count(GOOD), said.count(SILENT)
    assert (label is not None) == (good != silent and max(good, silent) >= agree)
    if label:
        assert label.trace == (GOLD if good > silent else MISPRINT)
        assert (len(label.sources), label.right) == (max(good, silent), good + silent)


def test_collect_stops_when_it_has_enough() -> None:
    some = chains.sample(generator(0), 3, 50, "train")
    asked = []

    def ask(problem: Problem) -> list[Proposal]:
        asked.append(problem)
        return [propose(Teacher(name, {}), problem, 0) for name in "ab"]

    labels = collect(BLIND, some, ask, 7, 2, Tally())
    assert [label.problem for label in labels] == some[:7] == asked
    assert len(collect(BLIND, some, ask, 99, 2, Tally())) == 50


# ---- hygiene


def planted(question: str, of: Problem) -> Problem:
    return Problem(f"planted-{question}", of.steps, question, of.answer)


def test_planted_duplicates_are_removed() -> None:
    some = chains.sample(generator(0), 3, 40, "train")
    one, two = Problem("1", 2, "7 a -3 b *3 =", "2"), Problem("2", 2, "1 a +1 b *7 =", "4")
    dirty = [one, two, *some, planted(one.question, one), planted("7 c \u22123 d \u00d73 =", one)]
    dirty += [planted("1a+1 b*7=", two), planted("1A +1  B *7 =", two)]
    removed = Removed()
    assert deduplicate(dirty, chains.canonical, removed) == [one, two, *some]
    assert removed == Removed(exact=1, near=3)
    sibling = planted("7 a +7 b *3 =", one)
    assert deduplicate([one, sibling], chains.canonical, Removed()) == [one, sibling]
    assert deduplicate([one, sibling], chains.family, removed) == [one]
    assert removed == Removed(exact=1, near=4)


def test_planted_test_problems_are_removed() -> None:
    train, test = (chains.sample(generator(0), 3, 40, split) for split in ("train", "test"))
    seven = planted("7 a -3 b *3 =", Problem("t", 2, "7 a -3 b *3 =", "2"))
    leaks = [test[3], planted(test[5].question.replace(" ", ""), test[5]), planted("7 d +7 e *3", seven)]
    removed = Removed()
    assert decontaminate([leaks[0], *train, *leaks[1:]], [*test, seven], [chains.family], removed) == train
    assert removed == Removed(contaminated=3)
    require_disjoint(train, test, [chains.family])
    for leak in leaks:
        with pytest.raises(DataError, match="is the test problem"):
            require_disjoint([*train, leak], [*test, seven], [chains.family])


# ---- audit


def exact_tail(k: int, n: int, p: Fraction) -> Fraction:
    return sum((math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1)), Fraction(0))


@given(st.integers(1, 60), st.data(), st.sampled_from([0.8, 0.95, 0.99]))
def test_the_bound_solves_the_exact_binomial_tail(n: int, data: st.DataObject, confidence: float) -> None:
    errors = data.draw(st.integers(0, n - 1))
    bound = Fraction(clopper_pearson_upper(errors, n, confidence))
    alpha, width = 1 - Fraction(confidence), Fraction(1, 10**11)
    assert exact_tail(errors, n, bound - width) > alpha > exact_tail(errors, n, bound + width)


def test_the_bound_agrees_with_the_beta_quantile() -> None:
    beta = pytest.importorskip("scipy.stats").beta
    for n in (1, 2, 10, 100, 600, 5000):
        for errors in {0, 1, n // 100, n // 3, n - 1}:
            if errors < n:
                expected = beta.ppf(0.95, errors + 1, n - errors)
                assert clopper_pearson_upper(errors, n) == pytest.approx(expected, abs=1e-9)
    assert clopper_pearson_upper(4, 4) == 1.0
    assert clopper_pearson_upper(0, 100) == pytest.approx(1 - 0.05**0.01, abs=1e-12)


def hypergeometric(population: int, wrong: int, n: int, k: int) -> float:
    return math.comb(wrong, k) * math.comb(population - wrong, n - k) / math.comb(population, n)


def test_coverage_is_at_least_95_percent_for_every_number_of_wrong_labels() -> None:
    """Exhaustive: every count of wrong traces among 200, every outcome of an audit of 100 and of 30."""
    for n in (30, 100):
        bounds = [clopper_pearson_upper(errors, n) for errors in range(n + 1)]
        for wrong in range(201):
            possible = range(max(0, n - (200 - wrong)), min(n, wrong) + 1)
            covered = sum(hypergeometric(200, wrong, n, k) for k in possible if bounds[k] >= wrong / 200)
            assert covered >= 0.95 - 1e-12, (n, wrong, covered)
        for p in (i / 400 for i in range(1, 400)):  # an endless population
            covered = sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1) if bounds[k] >= p)
            assert covered >= 0.95 - 1e-12, (n, p, covered)


def labels_with(population: int, wrong: int) -> list[Label]:
    problems = (Problem(str(i), 3, f"q{i}", "5") for i in range(population))
    return [Label(p, "bad" if i < wrong else "good", ("t",), 1, 1) for i, p in enumerate(problems)]


def good(question: str, trace: str) -> bool:
    return trace == "good"


@pytest.mark.parametrize("wrong", [150, 300, 400])
def test_coverage_measured_over_many_audits(wrong: int) -> None:
    labels, audits = labels_with(5000, wrong), 2000
    covered = sum(audit(labels, 100, generator(s, "cover"), good).error_upper_95 >= wrong / 5000 for s in range(audits))
    assert covered / audits >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / audits)
    assert covered < audits, "a bound that never fails would say nothing"


def test_the_audit_is_blind_uniform_and_without_replacement() -> None:
    labels, shown = labels_with(20, 3), Counter[tuple[str, str]]()
    for seed in range(2000):
        calls: list[tuple[Any, ...]] = []

        def annotator(*what: Any, calls: list[tuple[Any, ...]] = calls) -> bool:
            calls.append(what)
            return True

        audit(labels, 5, generator(seed), annotator)
        assert len(set(calls)) == 5
        shown.update(calls)
    assert set(shown) == {(label.problem.question, label.trace) for label in labels}
    assert sum((n - 500) ** 2 / 500 for n in shown.values()) < 50  # chi-square, 19 degrees (less: no replacement)


def test_certificate_and_failure() -> None:
    findings = audit(labels_with(40, 40), 10, generator(0), good)
    assert (findings.errors, findings.audited, findings.error_upper_95) == (10, 10, 1.0)
    everything = audit(labels_with(8, 2), 100, generator(0), good)
    assert (everything.audited, set(everything.wrong)) == (8, {"0", "1"})
    certificate = Audit(200, 100, ("a", "b")).certificate("a person")
    assert certificate["error_upper_95"] == pytest.approx(0.0616, abs=1e-4)
    assert {k: certificate[k] for k in ("audited", "errors", "annotator", "blind", "population", "wrong")} == {
        "audited": 100, "errors": 2, "annotator": "a person", "blind": True, "population": 200, "wrong": ["a", "b"]
    }  # fmt: skip
    require(Audit(200, 100, ("a",)), 0.05)
    with pytest.raises(DataError) as caught:
        require(Audit(200, 100, ("a", "b")), 0.05)
    assert caught.value.what == (
        "2 of 100 audited traces are wrong: at 95% confidence up to 6.2% of the 200 may be, and 5.0% is allowed"
    )
    with pytest.raises(DataError, match="nothing to audit"):
        audit([], 10, generator(0), good)


# ---- the stage


def context(out: Path, seed: int = 0) -> Any:
    out.mkdir(parents=True, exist_ok=True)
    seen: list[float] = []
    commit = SimpleNamespace(summary=None)

    def publish(summary: dict[str, Any], verdict: bool | None = None) -> Any:
        commit.summary = summary
        return SimpleNamespace(path=out, summary=summary)

    return SimpleNamespace(
        seed=seed, out=out, progress=lambda f, m="": seen.append(f), commit=publish, seen=seen, committed=commit
    )


def small(**more: Any) -> stage.Spec:
    return stage.Spec(**{"answers": 600, "test_per_length": 20, "test_one_step": 20, **more})


def test_the_default_stage_delivers_what_was_asked(tmp_path: Path) -> None:
    ctx = context(tmp_path / "out")
    summary = stage.run(stage.Spec(), {}, ctx).summary
    names = ("cold_start", "answers", "test", "test_one_step")
    rows = {name: read_lines(tmp_path / "out" / f"{name}.jsonl") for name in names}
    assert {name: len(lines) for name, lines in rows.items()} == {
        "cold_start": 200, "answers": 20_000, "test": 600, "test_one_step": 60
    }  # fmt: skip
    assert {name: summary[name] for name in rows} == {name: len(lines) for name, lines in rows.items()}
    assert Counter(line["steps"] for line in rows["cold_start"]) == dict.fromkeys(range(2, 7), 40)
    assert Counter(line["steps"] for line in rows["test"]) == dict.fromkeys(range(2, 7), 120)
    by_steps = Counter(line["steps"] for line in rows["answers"])
    assert sorted(by_steps) == [1, 2, 3, 4, 5, 6]
    assert by_steps[1] == 147, "all the one-step training problems there are"
    assert all(by_steps[n] > 3800 for n in range(2, 7))
    assert {line["steps"] for line in rows["answers"][:100]} >= {2, 3, 4, 5, 6}, "lengths are mixed"
    questions = [line["question"] for name in rows for line in rows[name]]
    assert len(set(questions)) == len(questions)
    train = {chains.family(line["question"]) for name in ("cold_start", "answers") for line in rows[name]}
    assert not train & {chains.family(line["question"]) for name in ("test", "test_one_step") for line in rows[name]}
    for name in rows:
        for problem in map(problem_of, rows[name]):
            assert problem.answer == str(chains.values(problem.question)[-1])
            assert chains.held_out(problem.question) == name.startswith("test")
    assert all(len(line["sources"]) >= 2 and line["trace"].endswith(line["answer"]) for line in rows["cold_start"])
    assert all("trace" not in line for name in rows if name != "cold_start" for line in rows[name])
    assert json.loads((tmp_path / "out/vocabulary.json").read_text()) == chains.vocabulary()
    certificate = json.loads((tmp_path / "out/certificate.json").read_text())
    for key in ("audited", "errors", "error_upper_95", "annotator"):
        assert certificate[key] == summary[key]
    truth = {line["id"] for line in rows["cold_start"] if chains.check_trace(problem_of(line), line["trace"])}
    assert set(certificate["wrong"]) <= truth
    assert summary["annotator"] == "oracle standing in for a person"
    assert summary["error_upper_95"] == pytest.approx(clopper_pearson_upper(summary["errors"], 100), abs=1e-6)
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["accepted"] == 200
    assert report["asked"] == 200 + sum(summary["rejected"].values())
    assert ctx.seen == sorted(ctx.seen)
    assert not list((tmp_path / "out").glob("*.part"))


def test_the_oracle_is_asked_in_the_audit_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, honest = list[str](), chains.check_trace

    def oracle(problem: Problem, trace: str) -> list[int]:
        asked.append(problem.id)
        return honest(problem, trace)

    monkeypatch.setattr(chains, "check_trace", oracle)
    monkeypatch.delattr(chains, "trace")
    stage.run(small(), {}, context(tmp_path))
    delivered = [line["id"] for line in read_lines(tmp_path / "cold_start.jsonl")]
    assert len(set(asked)) == len(asked) == 100
    assert set(asked) < set(delivered)


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


RUN = """
import sys; sys.path.insert(0, {tests!r})
from pathlib import Path
from test_labels import context, small, stage
stage.run(small(), {{}}, context(Path(sys.argv[1]), 5))
"""


def test_the_same_seed_makes_the_same_bytes_in_any_process(tmp_path: Path) -> None:
    stage.run(small(), {}, context(tmp_path / "here", 5))
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        code = RUN.format(tests=str(Path(__file__).parent))
        subprocess.run([sys.executable, "-c", code, str(tmp_path / hash_seed)], env=environment, check=True)
        assert digests(tmp_path / hash_seed) == digests(tmp_path / "here")
    stage.run(small(), {}, context(tmp_path / "other", 6))
    here = digests(tmp_path / "here")
    differ = {name for name, digest in digests(tmp_path / "other").items() if digest != here[name]}
    assert differ >= {"cold_start.jsonl", "answers.jsonl", "test.jsonl", "test_one_step.jsonl"}


def plant(monkeypatch: pytest.MonkeyPatch, leaked: int = 3) -> None:
    """Training samples that begin with three leaks from the test set and two repeats of their own."""
    honest, leaks = chains.sample, dict[int, list[Problem]]()

    def dirty(rng: Any, steps: int, count: int, split: Any, *, fewer: bool = False) -> list[Problem]:
        got = honest(rng, steps, count, split, fewer=fewer)
        if split == "test":
            one, two = got[1], got[2]
            leaks[steps] = [got[0], planted(one.question.replace(" ", ""), one), planted(two.question + " ", two)]
            return got
        return [*leaks[steps][:leaked], got[0], got[0], planted(got[0].question.replace("a", "q"), got[0]), *got[1:]]

    monkeypatch.setattr(chains, "sample", dirty)


def test_the_stage_removes_what_is_planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clean = stage.run(small(), {}, context(tmp_path / "clean")).summary
    plant(monkeypatch)
    summary = stage.run(small(), {}, context(tmp_path / "out")).summary
    assert (clean["contaminated_removed"], summary["contaminated_removed"]) == (0, 3 * 6)
    assert summary["duplicates_removed"] >= 2 * 6
    assert (summary["cold_start"], summary["answers"]) == (200, 600)
    texts = "".join((tmp_path / "out" / f"{name}.jsonl").read_text() for name in ("cold_start", "answers"))
    assert "planted" not in texts


def test_no_two_traces_are_of_one_family(tmp_path: Path) -> None:
    summary = stage.run(small(steps=(2, 2), cold_start=300), {}, context(tmp_path)).summary
    lines = read_lines(tmp_path / "cold_start.jsonl")
    assert len({chains.family(line["question"]) for line in lines}) == len(lines) == 300
    assert summary["duplicates_removed"] > 0


def test_the_stage_raises_where_a_leak_would_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, leaked=1)
    monkeypatch.setattr(stage, "decontaminate", lambda problems, *rest: problems)
    ctx = context(tmp_path / "out")
    with pytest.raises(DataError, match="is the test problem"):
        stage.run(small(), {}, ctx)
    assert ctx.committed.summary is None


def test_the_stage_fails_on_bad_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TEACHERS, "hasty", Teacher("hasty", {"misprint": 0.5}))
    monkeypatch.setitem(TEACHERS, "echo", Teacher("echo", {}, echoes=("hasty", 1.0)))
    ctx = context(tmp_path / "out")
    with pytest.raises(DataError, match="audited traces are wrong: at 95% confidence up to"):
        stage.run(small(teachers=("hasty", "echo")), {}, ctx)
    assert ctx.committed.summary is None
    monkeypatch.setitem(TEACHERS, "hasty", Teacher("hasty", {"garble": 0.9}))
    with pytest.raises(DataError, match=r"only \d+ of 40 traces on \d+ problems of 2 steps") as caught:
        stage.run(small(teachers=("careful", "hasty")), {}, context(tmp_path / "few"))
    assert "too few agree" in caught.value.what


def test_the_stage_says_when_there_are_not_enough_problems(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="5000 problems with answers were asked for, and only"):
        stage.run(small(steps=(2, 2), answers=5000), {}, context(tmp_path / "a"))
    with pytest.raises(DataError, match="only 63 1-step problems in the test split"):
        stage.run(small(test_one_step=64), {}, context(tmp_path / "b"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cold_star: 3", "cold_star"),
        ("cold_start: many", "cold_start"),
        ("task: chain", "there is no task 'chain'; there is chains"),
        ("teachers: [careful, me]", "there is no teacher 'me'; there are careful, hasty, copyist, echo"),
        ("teachers: [hasty, hasty]", "a teacher is named twice"),
        ("teachers: [hasty]", "2 teachers cannot agree where 1 are asked"),
        ("steps: [1, 6]", "the shortest problem has at least 2 steps"),
        ("steps: [5, 4]", "the longest no fewer than the shortest"),
        ("steps: [2, 7]", "the longest problems of chains have 6 steps, not 7"),
        ("audit: 300", "audit is 300, and there are only 200 traces"),
        ("audit: 20", "an audit of 20 traces cannot show an error under 13.9%, even if all are right"),
    ],
)
def test_bad_specs_are_refused_with_their_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(text + "\n")
    with pytest.raises(RecipeError) as caught:
        document.read(path).parse(stage.Spec)
    assert message in caught.value.render()
    assert f"{path}:1:" in caught.value.render()


def test_importing_the_stage_loads_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "scipy", "numpy", "ray"}
    code = f"import sys, ottava.stages.label; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---- what is left


def residual(folder: Path, seeds: int, **spec: Any) -> tuple[float, float, float]:
    """(share of wrong traces by the oracle, share of problems accepted, share of audits whose bound held)."""
    wrong = asked = held = 0
    for seed in range(seeds):
        out = folder / str(seed)
        bare = {"answers": 1, "one_step_share": 0, "test_per_length": 1, "test_one_step": 1, "max_error": 1}
        summary = stage.run(stage.Spec(**{**bare, **spec}), {}, context(out, seed)).summary
        lines = read_lines(out / "cold_start.jsonl")
        bad = sum(bool(chains.check_trace(problem_of(line), line["trace"])) for line in lines)
        wrong, asked = wrong + bad, asked + 200 + sum(summary["rejected"].values())
        held += summary["error_upper_95"] >= bad / len(lines)
    return wrong / (200 * seeds), 200 * seeds / asked, held / seeds


def test_residual_error_is_real_and_small(tmp_path: Path) -> None:
    share, accepted, held = residual(tmp_path, 15)
    assert 0.001 < share < 0.012
    assert accepted > 0.9
    assert held >= 0.8


@pytest.mark.slow
def test_residual_error_by_teachers(tmp_path: Path) -> None:
    """Prints the table of docs/labels.md: run with `-m slow -s`."""
    four = tuple(TEACHERS)
    table = {}
    three = ("careful", "hasty", "echo")
    for agree, teachers in ((2, four), (1, four), (3, four), (2, four[:3]), (2, three), (1, four[:1])):
        name = f"{agree} of {', '.join(teachers)}"
        table[name] = residual(tmp_path / name, 100, agree=agree, teachers=teachers)
        print(f"| {name} | {table[name][0]:.2%} | {table[name][1]:.1%} | {table[name][2]:.0%} |")
    independent, biased = table[f"2 of {', '.join(four[:3])}"], table["2 of careful, hasty, echo"]
    assert independent[0] < 0.002 < 0.008 < biased[0], "a vote that repeats another is worse than none"
    assert all(held >= 0.95 for _, _, held in table.values())
