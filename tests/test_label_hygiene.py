"""Repeats and test questions are found however they are written, and nothing else is: planted, and by a second way."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.decontaminate import sources, variants
from benchmarks.decontaminate.__main__ import by_hand, table
from benchmarks.decontaminate.fourth_variants import FOURTH
from benchmarks.decontaminate.more_variants import MORE
from benchmarks.decontaminate.third_variants import THIRD
from hypothesis import given, settings
from hypothesis import strategies as st

from ottava.artifact import file_digest, load
from ottava.errors import DataError, ResourceError
from ottava.labels import clean, decontaminate, dedup, likeness, minhash, normal, retold

TESTS = [*sources.WORD_PROBLEMS, *sources.LATEX, *(sources.choice(*each) for each in sources.CHOICES)]


def shapes(*texts: str) -> list[likeness.Shape]:
    return [likeness.shape(text) for text in texts]


def found(line: str, tests: list[str]) -> list[decontaminate.Match]:
    return decontaminate.find(shapes(line), decontaminate.tests(tests))


# ---- one writing


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"Compute $\frac{1}{2} + x^{2}$.", "compute 1/2 + x²"),
        (r"$\dfrac{3}{4} \cdot \left( y - 2 \right)$", "(3)/(4) × ( y − 2 )"),
        (r"\(\sqrt{16} \leq 5\)", "√16 ≤ 5"),
        ("He has twenty-five dogs.", "he has 25 dogs"),
        ("one hundred and five apples", "105 apple"),
        ("1,250.50 grams", "1250.5 grams"),
        ("two thirds of 3 million people", "2/3 of 3,000,000 people"),
        ("a dozen eggs and half a litre", "12 eggs and 1/2 litre"),
        ("It’s 5 o’clock — at most.", "it's 5 o'clock - at most"),
        ("60 percent", "60 %"),
        ("<i>x<sup>2</sup></i> &times; 3", "x^2 * 3"),
        ("Question 7: what is the sum?", "What is the sum?"),
        ("A) red B) blue", "(A) red\n(B) blue"),
        (r"$\dfrac{x^{2}-9}{x^2-5\,x+6}$", r"\((x^2 - 9)/(x^{2} - 5x + 6)\)"),
        (r"$\dfrac1{32}$ and $2\frac{1}{2}$", "1/32 and 2 1/2"),
        (r"${n \choose 2}$", r"$\binom n2$"),
        (r"$\lvert 2x-5\rvert \ge 7$", "|2x - 5| ≥ 7"),
        (r"$\lfloor\sqrt{200}\rfloor$", "⌊√200⌋"),
        (r"$\begin{pmatrix}2&1\\5&3\end{pmatrix}$", r"$\begin{bmatrix} 2 & 1 \\ 5 & 3 \end{bmatrix}$"),
        (r"$\gcd(252, 198)$", r"$\operatorname{gcd}(252,198)$"),
        (r"$\int_0^1 x\,\mathrm{d}x$", r"$\int_{0}^{1} x dx$"),
        (r"$3a\cdot b = 6$", "3ab = 6"),
        (r"$\varphi \in \mathbb{R}$, $A \cup B = \varnothing$", "φ ∈ ℝ, A ∪ B = ∅"),
        (r"$x \equiv 3 \pmod 5$", r"x ≡ 3 \pmod{5}"),
        ("3 dozen eggs, two and a half hours", "36 eggs, 2.5 hours"),
        ("a quarter of the 80 km at 60 km/h", "1/4 of the 80 km at 60 km per hour"),
    ],
)
def test_two_ways_to_write_the_same_become_one(one: str, other: str) -> None:
    lines = [normal.read(text).line for text in (one, other)]
    assert lines[0] == lines[1]
    assert lines[0]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("3 - 5", "5 - 3"),
        ("2 + 3 * 4", "2 * 3 + 4"),
        ("(2 + 3) * 4", "2 + 3 * 4"),
        (r"$\frac{x + 1}{x - 2}$", "x + 1/x - 2"),
        (r"$2^{3x}$", "2^3 x"),
        ("x^2", "x_2"),
        ("1/2", "2"),
        ("12", "1 2"),
        ("P → Q", "P ∧ Q"),
        ("gcd(252,198)", "252,198 grams"),
    ],
)
def test_what_differs_stays_different(one: str, other: str) -> None:
    assert dedup.find(shapes(one, other)) == []
    assert likeness.shape(one).line != likeness.shape(other).line


@given(st.integers(2, 9999))
def test_a_number_in_words_is_the_number(n: int) -> None:
    assert normal.read(f"there are {variants.spelled(n)} birds").clauses == ((str(n), "bird"),)


@given(st.text())
@settings(max_examples=300)
def test_any_text_is_read_and_reading_is_stable(text: str) -> None:
    read = normal.read(text)
    assert all(clause and all(token and " " not in token for token in clause) for clause in read.clauses)
    assert normal.read(text) == read


# ---- MinHash, against what it estimates


def test_candidates_come_as_often_as_the_formula_says() -> None:
    bands, rng = minhash.Bands(8, 3), random.Random(1)
    for overlap in (20, 50, 80):
        hits, pairs, total = 0, 400, 0.0
        left, right = [], []
        for k in range(pairs):
            words = [f"{k} {rng.random()}" for _ in range(100 + overlap)]
            left.append(set(words[:100]))
            right.append(set(words[overlap:]) if overlap < 100 else set(words))
        ours, theirs = minhash.keys(left, bands), minhash.keys(right, bands)
        for a, b, x, y in zip(left, right, ours, theirs, strict=True):
            hits += bool((x == y).any())
            total += bands.candidate(len(a & b) / len(a | b))
        spread = np.sqrt(pairs * 0.25)
        assert abs(hits - total) < 5 * spread, overlap


def test_signatures_do_not_depend_on_company_or_order() -> None:
    sets = [{f"w{i}" for i in range(k, k + 9)} for k in range(50)]
    together = minhash.keys(sets, decontaminate.BANDS)
    assert (minhash.keys(sets[::-1], decontaminate.BANDS)[::-1] == together).all()
    assert (minhash.keys(sets[7:8], decontaminate.BANDS)[0] == together[7]).all()


def test_datasketch_finds_the_same_pairs() -> None:
    sketch = pytest.importorskip("datasketch")
    texts = [text for text in TESTS for _ in range(1)]
    rng = random.Random(3)
    texts += [changed for text in TESTS if (changed := variants.words(text, rng)) is not None]
    sets = [likeness.shape(text).full for text in texts]
    bands = minhash.Bands(20, 6)
    ours = {
        (int(a), int(b))
        for group in minhash.groups(minhash.keys(sets, bands))
        for a, b in itertools.combinations(group, 2)
    }
    index = sketch.MinHashLSH(num_perm=120, params=(bands.bands, bands.rows))
    theirs = set()
    for place, features in enumerate(sets):
        hashed = sketch.MinHash(num_perm=120)
        hashed.update_batch([feature.encode() for feature in features])
        theirs.update((other, place) for other in index.query(hashed))
        index.insert(place, hashed)
    alike = {
        (a, b)
        for a, b in itertools.combinations(range(len(sets)), 2)
        if 1 - likeness.apart(sets[a], sets[b]) >= dedup.NEAR
    }
    assert alike
    assert alike <= ours
    assert alike <= theirs


# ---- repeats


def brute(lines: list[likeness.Shape]) -> set[int]:
    """The places of repeats, by comparing every pair."""
    gone: set[int] = set()
    for place, shape in enumerate(lines):
        for before in range(place):
            other = lines[before]
            same = shape.line == other.line
            near = shape.numbers == other.numbers and shape.turns == other.turns
            near = near and likeness.brackets(shape) == likeness.brackets(other)
            if same or (before not in gone and near and 1 - likeness.apart(shape.full, other.full) >= dedup.NEAR):
                gone.add(place)
                break
    return gone


@pytest.mark.parametrize("seed", range(3))
def test_repeats_are_those_of_comparing_all_pairs(seed: int) -> None:
    rng = random.Random(seed)
    texts = list(TESTS)
    for text in TESTS:
        texts += [change(text, rng) or text for change in (variants.typography, variants.words)]
    rng.shuffle(texts)
    lines = shapes(*texts)
    assert {repeat.line for repeat in dedup.find(lines)} == brute(lines)


def test_another_number_answer_or_question_is_no_repeat() -> None:
    one = sources.WORD_PROBLEMS[3]
    lines = shapes(one, one.replace("240", "250"), one.replace("buy", "sell"))
    assert dedup.find(lines) == []
    assert dedup.find(shapes(one, one), ["16", "17"]) == []
    assert [r.of for r in dedup.find(shapes(one, one), ["16", "16"])] == [0]
    assert dedup.find(shapes("", "", "…")) == []


# ---- test questions


def test_planted_variants_are_found_and_hard_negatives_are_not() -> None:
    """The reach on the families that the detector was tuned on; the unseen ones are the benchmark's."""
    rows = {
        row["name"]: row
        for row in table(variants.TUNED | MORE | THIRD | FOURTH, "all", 1) + by_hand("by_hand.json", "hand")
    }
    for measure in ("all: recall", "all: precision", "hand: recall", "hand: precision"):
        assert rows[measure]["ours"] >= 0.95
        assert rows[measure]["ours"] > rows[measure]["baseline"]


def test_other_numbers_count_where_the_words_carry_the_problem_and_only_there() -> None:
    story = sources.WORD_PROBLEMS[0]
    assert [match.why for match in found(story.replace("48", "52"), TESTS)] == ["numbers"]
    assert found("What is 3 + 4?", ["What is 5 + 9?"]) == []
    three = [story.replace("48", number) for number in ("48", "60", "72")]
    assert found(story.replace("48", "52"), three) == []  # the test set itself has it with other numbers
    many = shapes(*(story.replace("48", str(number)) for number in range(100, 100 + decontaminate.CROWD)))
    assert decontaminate.find(many, decontaminate.tests(TESTS)) == []  # and so has the data
    assert len(decontaminate.find(many[1:], decontaminate.tests(TESTS))) == decontaminate.CROWD - 1


def test_the_nearest_test_question_is_named() -> None:
    for place, text in enumerate(TESTS):
        assert [match.test for match in found(f"Please help me!\n\n{text}", TESTS)] == [place]


BAKER = (
    "Every morning Delphine bakes 48 croissants. She keeps six of them for her family, gives a quarter of the rest to "
    "the school, and sells what is left for $3 each. How much money does Delphine make each day?"
)


@pytest.mark.parametrize(
    ("why", "text"),
    [
        ("words", "Delphine takes 48 croissants out of her oven daily. 6 stay at home with the family, 1/4 of the "
         "remaining ones go to a school, and the others are sold at $3 apiece. What is her total daily income?"),
        ("numbers", "Every morning Delphine bakes 90 croissants. She keeps ten of them for her family, gives a fifth "
         "of the rest to the school, and sells what is left for $2.50 each. How much does Delphine make each day?"),
        ("words", "Every morning Delphine bakes 48 croissants. Her oven is 12 years old and uses 3 kilowatt-hours. "
         "She keeps six of them for her family, gives a quarter of the rest to the school, and sells what is left for "
         "$3 each. How much money does Delphine make each day?"),
        ("", "Every morning Delphine bakes 48 croissants. She keeps six of them for her family, gives a quarter of the "
         "rest to the school, and sells what is left for $3 each. How many croissants does the school get?"),
        ("", "Ottilie prints 48 posters. Five are torn, a quarter of the others hang in the school, and 2 are in each "
         "of the remaining rooms. How many rooms are there?"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("beside", [0, 200])
def test_a_story_that_is_told_again_is_found(why: str, text: str, beside: int) -> None:
    """By itself, and among others, where words weigh otherwise."""
    pytest.importorskip("reasoning_gym")
    others = sources.generated("gsm_symbolic", beside, 77) if beside else []
    matches = decontaminate.find(shapes(text, *others), decontaminate.tests([BAKER, *sources.WORD_PROBLEMS]))
    assert [match.why for match in matches if match.line == 0] == [why] * bool(why)
    assert all(match.test == 0 for match in matches if match.line == 0)


def test_pairs_worth_a_look_against_all_pairs() -> None:
    tests, lines = shapes(*TESTS), shapes(*sources.SAME_TOPIC, *(text[: len(text) // 2] for text in TESTS))
    weigh = retold.weights([*lines, *tests])
    places = list(range(0, len(tests), 2))
    found = set(retold.pairs(lines, tests, places, weigh))

    def expected(ours: likeness.Shape, theirs: likeness.Shape) -> bool:
        mine, wanted = (sorted(filter(likeness.is_word, some.words)) for some in (ours, theirs))
        both = sum(weigh[word] for word in mine if word in wanted)
        either = sum(weigh[word] for word in {*mine, *wanted})
        return both > 0 and both >= retold.LEAST * either

    assert found == {(i, k) for i, ours in enumerate(lines) for k in places if expected(ours, tests[k])}
    assert len(found) > len(places)


@pytest.mark.parametrize(
    ("one", "other", "known"),
    [
        (("3/2", "45"), ("90", "45"), True),
        (("1/4",), ("25",), True),
        (("9/4", "500"), ("2250", "1/2"), True),
        (("45th",), ("45",), True),
        (("3", "5"), ("4", "7"), False),
        (("0",), ("5",), False),
    ],
)
def test_numbers_in_other_units(one: tuple[str, ...], other: tuple[str, ...], known: bool) -> None:
    weigh = dict.fromkeys((*one, *other), 1.0)
    both, share = retold._numbers(one, other, weigh)
    assert (both > 0, share > 0) == (known, known)
    assert retold._numbers(other, one, weigh) == (both, share)
    assert share < retold._numbers(one, one, weigh)[1] == 1.0


def test_rare_words_weigh_more() -> None:
    weigh = retold.weights(shapes(*(f"the apple of person number {k}" for k in range(50)), "the pear of ottilie"))
    assert 0 < weigh["appl"] < weigh["pear"] == weigh["ottili"] < 1
    assert retold.weights([]) == {}


def test_puzzles_of_one_generator_are_told_apart() -> None:
    pytest.importorskip("reasoning_gym")
    tests = sources.generated("word_sorting", 30, 1)
    lines = sources.generated("word_sorting", 300, 5000)  # question i is of seed + i
    assert len(decontaminate.find(shapes(*lines), decontaminate.tests(tests))) <= 3
    assert len(decontaminate.find(shapes(*tests), decontaminate.tests(tests))) == 30


# ---- the command


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def data(tmp_path: Path) -> tuple[Path, Path]:
    rows: list[dict[str, Any]] = [
        {"id": f"p{k}", "question": text, "answer": str(k), "kept": True}
        for k, text in enumerate(sources.WORD_PROBLEMS[:10])
    ]
    rows += [
        {"question": sources.WORD_PROBLEMS[0].upper(), "answer": "0"},
        {"question": sources.WORD_PROBLEMS[0], "answer": "0"},
        {"question": sources.WORD_PROBLEMS[1], "answer": "another answer"},
        {"messages": [{"role": "user", "content": sources.WORD_PROBLEMS[20]}, {"role": "assistant", "content": "8"}]},
    ]
    tests = [{"question": sources.WORD_PROBLEMS[20]}, {"problem": sources.WORD_PROBLEMS[3].replace("240", "270")}]
    return write(tmp_path / "data.jsonl", rows), write(tmp_path / "test.jsonl", tests)


def test_a_clean_data_set_says_what_went_and_where_each_line_is_from(tmp_path: Path) -> None:
    path, test = data(tmp_path)
    report = clean.clean(path, [test], tmp_path / "out")
    load(tmp_path / "out")  # every file is that of the manifest
    kept = [json.loads(line) for line in (tmp_path / "out" / "data.jsonl").read_text().splitlines()]
    gone = [json.loads(line) for line in (tmp_path / "out" / "removed.jsonl").read_text().splitlines()]
    before = [json.loads(line) for line in path.read_text().splitlines()]
    assert (report["lines"], report["kept"], report["removed"]) == (14, len(kept), len(gone)) == (14, 10, 4)
    assert {row["line"]: row["why"] for row in gone} == {
        4: "test question: other numbers",
        11: "repeat: another writing",
        12: "repeat: another writing",
        14: "test question: another writing",
    }
    assert [row["is"].get("line") for row in gone] == [2, 1, 1, 1]
    assert len({row["id"] for row in kept}) == len(kept)
    sourced = {row["source"] for row in kept + gone}
    assert len(sourced) == 14 == len(before)
    assert all({**row, "id": 0, "source": 0}.items() >= {"kept": True}.items() for row in kept if row["id"][0] == "p")
    assert report["data"]["sha256"] == file_digest(path)


def test_the_same_input_gives_the_same_bytes_in_any_process(tmp_path: Path) -> None:
    path, test = data(tmp_path)
    code = "import sys; from pathlib import Path; from ottava.labels.clean import clean; "
    code += "clean(*(lambda a, b, c: (a, [b], c))(*map(Path, sys.argv[1:])))"
    digests = set()
    for seed in ("0", "1"):
        out = tmp_path / seed
        subprocess.run(
            [sys.executable, "-c", code, path, test, out],
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        )
        digests.add(load(out).digest)
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ('{"question": "a"}\n{', ":2", "not JSON"),
        ("[1]\n", ":1", "one JSON object"),
        ('{"answer": "a"}\n', ":1", "there is no question"),
        ('{"question": "a", "id": true}\n', ":1", "'id' is True"),
        ('{"question": "a", "id": 1}\n{"question": "b", "id": "1"}\n', ":2", "already that of line 1"),
        ("\n", "", "no line"),
        ('{"question": "\udc80"}\n', ":1", "not JSON"),
        ("[" * 100_000 + "\n", ":1", "not JSON"),
        ('{"question": "a \\ud800 b"}\n', ":1", "half a letter"),
        ('{"question": "a", "answer": ' + "9" * 6000 + "}\n", ":1", "not JSON"),
    ],
)
def test_bad_data_is_refused_with_its_line_and_nothing_is_written(
    tmp_path: Path, text: str, where: str, what: str
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=what) as error:
        clean.clean(path, [], tmp_path / "out")
    assert error.value.where == f"{path}{where}"
    assert [entry.name for entry in tmp_path.iterdir()] == ["data.jsonl"]


def test_long_numbers_and_nul_are_text(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    long = "9" * 6000
    rows = [f"What is {long} plus one?", f"What is 1/{long} of a cake?", "a \0 b \ud83d\ude00"]
    path.write_text("".join(json.dumps({"question": row}) + "\n" for row in rows))
    clean.clean(path, [], tmp_path / "out")
    kept = [json.loads(line)["question"] for line in (tmp_path / "out" / "data.jsonl").read_text().splitlines()]
    assert kept == [json.loads(json.dumps(row)) for row in rows]


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    path, test = data(tmp_path)
    clean.clean(path, [test], tmp_path / "out")
    with pytest.raises(ResourceError, match="something already"):
        clean.clean(path, [test], tmp_path / "out")


def test_the_command(tmp_path: Path) -> None:
    path, test = data(tmp_path)
    line = [sys.executable, "-m", "ottava.cli", "label", "clean", path, "--against", test, "--out", tmp_path / "o"]
    done = subprocess.run([*line, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["kept"] == 10
    again = subprocess.run(line, capture_output=True, text=True)
    assert (again.returncode, again.stdout) == (2, "")
    assert "something already" in again.stderr
