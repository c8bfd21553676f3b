"""Last-digit chains: reasoning in miniature, exactly checkable, too long to guess in one go.

A chain starts from a digit and applies 1 to 6 operations; only the last digit counts. Steps are
lettered, so that a small model finds its place by the letter:

    question  7 a +5 b *3 =        trace  7 a +5 2 b *3 6        answer  6

Every one of the 21 operations permutes the ten digits, so no answer is likelier than another
(chance is 10%) and a single wrong value that is carried on always ends in a wrong answer.

Two questions are the same problem in substance, a *family*, if they differ only in how they are
written or in subtracting k for adding 10 - k. The split between training and test is a hash of the
family: no set drawn from one side can hold a question, or a sibling of a question, of the other.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ottava.errors import DataError
from ottava.tasks.base import Problem, Split

if TYPE_CHECKING:
    import numpy as np

DIGITS = tuple("0123456789")
_OPERANDS = (("+", range(1, 10)), ("-", range(1, 10)), ("*", (3, 7, 9)))
OPERATIONS = tuple(f"{sign}{k}" for sign, operands in _OPERANDS for k in operands)
LETTERS = tuple("abcdef")
NAME = "chains"
MAX_STEPS = len(LETTERS)
SAFE = True

_STRICT = re.compile(r"[0-9](?: [a-z] [-+*][0-9])+ =")
_LOOSE = re.compile(r"[0-9](?:[a-z][-+*][0-9])+=?")  # after white space is taken out
_SIGNS = str.maketrans("\u2212\u2012\u2013\u2014\u00d7\u00b7\u22c5\u2217", "----****")  # minus, dashes; times, dots


def vocabulary() -> list[str]:
    """The 38 tokens of questions, traces and answers."""
    return ["=", *DIGITS, *OPERATIONS, *LETTERS]


def apply(value: int, operation: str) -> int:
    """The digit after one operation."""
    k = int(operation[1:])
    return {"+": value + k, "-": value - k, "*": value * k}[operation[0]] % 10


def parse(question: str) -> tuple[int, list[str]]:
    """The first digit and the operations of a question. Strict; raises DataError."""
    tokens = question.split(" ")
    letters, operations = tokens[1:-1:2], tokens[2:-1:2]
    good = _STRICT.fullmatch(question) and tuple(letters) == LETTERS[: len(letters)]
    if not good or not set(operations) <= set(OPERATIONS):
        raise DataError(
            f"{question!r} is not a chain",
            fix=f"write it as '7 a +5 b *3 =' with up to {MAX_STEPS} steps of +1..+9, -1..-9, *3, *7 or *9",
        )
    return int(tokens[0]), operations


def values(question: str) -> list[int]:
    """The digit after each step; the last is the answer."""
    value, operations = parse(question)
    return [value := apply(value, operation) for operation in operations]


def trace(problem: Problem) -> str:
    """The right trace: every step with its value written out."""
    start, operations = parse(problem.question)
    return write_trace(start, operations, values(problem.question))


def write_trace(start: int, operations: list[str], after: list[int]) -> str:
    """A trace of these operations with these values after them, right or wrong."""
    steps = zip(LETTERS, operations, after, strict=False)
    return " ".join([str(start), *(f"{letter} {operation} {value}" for letter, operation, value in steps)])


def prompt(problem: Problem) -> str:
    """The question as it is."""
    return problem.question


def check_answer(problem: Problem, text: str) -> bool:
    """Whether `text` is the answer, to the character."""
    return text == problem.answer


def check_trace(problem: Problem, trace: str) -> list[int]:
    """The indices of the steps whose letter, operation or value is not the right one.

    A wrong first digit counts as step 0; whatever stands after the last step counts as step `steps`.
    Empty if and only if the trace is the right one to the character.
    """
    start, operations = parse(problem.question)
    gold = write_trace(start, operations, values(problem.question)).split(" ")
    have = trace.split(" ")
    wrong = {i for i in range(len(operations)) if have[3 * i + 1 : 3 * i + 4] != gold[3 * i + 1 : 3 * i + 4]}
    if have[0] != gold[0]:
        wrong.add(0)
    if len(have) > len(gold):
        wrong.add(len(operations))
    return sorted(wrong)


def equivalent(problem: Problem, trace: str) -> bool:
    """Whether `trace` has the right values after operations that are the question's modulo 10 (+7 for -3)."""
    start, operations = parse(problem.question)
    gold, have = write_trace(start, operations, values(problem.question)).split(" "), trace.split(" ")
    written = have[2::3]
    if len(have) != len(gold) or not set(written) <= set(OPERATIONS):
        return False
    have[2::3] = operations if list(map(_residue, written)) == list(map(_residue, operations)) else written
    return have == gold


def well_formed(problem: Problem, trace: str, answer: str) -> bool:
    """Whether the trace has the shape of one: all steps in order, known tokens, ending in `answer`.

    Neither the operations nor the values are compared with the question: this is grammar, not truth.
    """
    tokens = trace.split(" ")
    letters, operations, after = tokens[1::3], tokens[2::3], tokens[3::3]
    return (
        len(tokens) == 3 * problem.steps + 1
        and tuple(letters) == LETTERS[: problem.steps]
        and set(operations) <= set(OPERATIONS)
        and {tokens[0], *after} <= set(DIGITS)
        and after[-1] == answer
    )


def canonical(question: str) -> str:
    """One writing for white space, letter offset, upper case and typographic signs; other text is only tidied."""
    read = _read(question)
    if read is None:
        return " ".join(question.casefold().split())
    start, operations = read
    letters = (chr(ord("a") + i) for i in range(len(operations)))
    return " ".join([start, *(f"{a} {o}" for a, o in zip(letters, operations, strict=False)), "="])


def family(question: str) -> str:
    """Alike for questions that are the same modulo 10, however they are written: -3 and +7 are one operation."""
    read = _read(question)
    return canonical(question) if read is None else " ".join([read[0], *map(_residue, read[1])])


def _residue(operation: str) -> str:
    return f"+{-int(operation[1:]) % 10}" if operation[0] == "-" else operation


def _read(question: str) -> tuple[str, list[str]] | None:
    """The first digit and the operations of a question in any spelling; None where it is no chain."""
    text = "".join(unicodedata.normalize("NFKC", question.translate(_SIGNS)).casefold().split())
    if not _LOOSE.fullmatch(text):
        return None
    return text[0], [text[i : i + 2] for i in range(2, len(text.rstrip("=")), 3)]


def held_out(question: str, salt: str = "") -> bool:
    """Whether the question is on the test side: a third of one-step families, a tenth of longer ones."""
    return _held_out(family(question), salt)


def _held_out(kin: str, salt: str) -> bool:
    one_in = 3 if kin.count(" ") == 1 else 10
    digest = hashlib.blake2b(kin.encode(), digest_size=8, person=b"ottava/chains", salt=salt.encode()).digest()
    return int.from_bytes(digest, "little") % one_in == 0


def make(options: str) -> Fresh:
    """The task behind `chains:salt=WORD`. Raises DataError."""
    key, _, salt = options.partition("=")
    if key != "salt" or not re.fullmatch(r"[A-Za-z0-9]{1,16}", salt):
        raise DataError(f"{options!r} is no option of chains", fix="salt=WORD, of at most 16 letters and digits")
    return Fresh(salt)


@dataclass(frozen=True)
class Fresh:
    """The same task with other families held out: test problems that no earlier choice can have been made by."""

    salt: str
    MAX_STEPS = len(LETTERS)
    SAFE = True

    @property
    def NAME(self) -> str:
        return f"chains:salt={self.salt}"

    def sample(
        self, rng: np.random.Generator, steps: int, count: int, split: Split, *, fewer: bool = False
    ) -> list[Problem]:
        return sample(rng, steps, count, split, fewer=fewer, salt=self.salt)

    def held_out(self, question: str) -> bool:
        return held_out(question, self.salt)

    canonical, family = staticmethod(canonical), staticmethod(family)
    vocabulary, trace = staticmethod(vocabulary), staticmethod(trace)
    well_formed, check_trace = staticmethod(well_formed), staticmethod(check_trace)
    equivalent = staticmethod(equivalent)
    prompt, check_answer = staticmethod(prompt), staticmethod(check_answer)


def sample(
    rng: np.random.Generator, steps: int, count: int, split: Split, *, fewer: bool = False, salt: str = ""
) -> list[Problem]:
    """`count` distinct problems of `steps` steps from one side of the split, each equally likely.

    Depends on the state of `rng` alone. Raises DataError where the split has not so many problems,
    unless `fewer`: then all of them are returned.
    """
    if not 1 <= steps <= MAX_STEPS:
        raise DataError(f"a chain has 1 to {MAX_STEPS} steps, not {steps}")
    assert split in ("train", "test"), split
    assert count >= 0, count
    space = len(DIGITS) * len(OPERATIONS) ** steps
    size = count * (14 if split == "test" else 2) + 64
    while True:
        size = min(size, space)
        problems = _of_split(rng.choice(space, size, replace=False), steps, count, split, salt)
        if len(problems) == count or (size == space and fewer):
            return problems
        if size == space:
            raise DataError(
                f"there are only {len(problems)} {steps}-step problems in the {split} split, not the {count} asked for",
                fix="ask for fewer, or for longer chains",
            )
        size *= 4


def _of_split(codes: np.ndarray, steps: int, count: int, split: Split, salt: str) -> list[Problem]:
    """The first `count` of the numbered problems that are on the asked side. codes: int64 [m]."""
    import numpy as np

    base = len(OPERATIONS)
    rows = np.stack([codes, codes // base**steps, *(codes // base**i % base for i in range(steps))], axis=1).tolist()
    problems: list[Problem] = []
    for code, start, *chosen in rows:
        if len(problems) == count:
            break
        if _held_out(" ".join([DIGITS[start], *(_RESIDUES[i] for i in chosen)]), salt) == (split == "test"):
            value = start
            for i in chosen:
                value = _AFTER[value][i]
            lettered = (f"{letter} {OPERATIONS[i]}" for letter, i in zip(LETTERS, chosen, strict=False))
            question = f"{start} {' '.join(lettered)} ="
            problems.append(Problem(f"chains-{steps}-{code}", steps, question, DIGITS[value]))
    return problems


_RESIDUES = [_residue(operation) for operation in OPERATIONS]
_AFTER = [[apply(value, operation) for operation in OPERATIONS] for value in range(10)]
