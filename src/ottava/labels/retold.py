"""Test questions told again: what a person or a model leaves of one that is rewritten is its rare words and numbers.

A word, or a number, weighs the logarithm of how rare it is among all texts at hand: a name says more than *each* or
*day*, and 1,250 more than 2. Three ways of telling a story again are known by that: in other words, where the numbers
are the same; with other numbers, where the words are the same; and with more around it, where all of it is still there.
Who rewrites a story rewrites its question too; where the story is left as it is and something else is asked, it is
another problem.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from fractions import Fraction

import numpy as np
from scipy import sparse

from ottava.labels.likeness import Shape, apart, asks_for, is_word, turned

AGAIN, FIRM = 0.40, 0.80
"""How near a line must come to a test question to be the same story in other words: the weight of the words and numbers
that both have, times the share of the words', times the square of the numbers'. FIRM: where the question itself does
not seem to be the same one."""
LEAST = 0.10
"""The share of the words' weight below which nothing is looked at: a text of ten times the size tells more."""
REWRITTEN, SENTENCES = 0.40, 0.60
"""Of neighbouring words, what both share: below it the wording is another one. Above it, so much of the weight of words
must be shared: where sentences are left as they are and the rare words are others, a generator made both."""
PIECE = 0.30
"""The longest piece that is left as it was, of all words: where it is longer, the question was changed, not the
telling."""
WORDING, WORDS = 0.65, 0.80
"""The share of neighbouring words, and of the words' weight, from which on a story with other numbers is the same."""
WHOLE = 0.85
"""The share of a test question that stands in a text in which there is more."""
WORDY = 7
"""Words, from which on a story is known without its numbers."""
FORMULA = 4
"""Neighbours in formulas, from which on a question is no story."""
ALIKE, KIN = 3, 0.40
"""So many test questions that share so much of the words' weight are of one generator."""
CONVERTED = 0.8
"""What a number counts that stands there in another unit: 90 minutes, an hour and a half; 25%, a quarter."""
_UNITS = frozenset(map(Fraction, (1, 3, 7, 12, 24, 60, 100, 1000)))
FEW = 1_000
"""Texts that are thought to be there besides, in which nothing stands: of few one cannot tell what is rare."""
CLEAR = 1.5
"""How many times nearer one test question must be than the next."""
PAIRS = 2_000_000
"""Looked at in one step."""

Weights = Mapping[str, float]


def is_story(shape: Shape) -> bool:
    """Whether a question is told in words, and is no formula with words around it."""
    return sum(" " in feature for feature in shape.formula) < FORMULA


def alone(tests: Sequence[Shape], places: Sequence[int], weigh: Weights) -> list[int]:
    """Those of `places` that are no generator's: there are not ALIKE others of nearly the same words."""
    kin = Counter(
        test
        for other, test in pairs(tests, tests, places, weigh)
        if other != test and _share(_words(tests[other]), _words(tests[test]), weigh)[1] >= KIN
    )
    return [place for place in places if kin[place] < ALIKE]


def weights(shapes: Sequence[Shape]) -> dict[str, float]:
    """Of words and numbers, 0 to about 1 for what is in one text alone."""
    count = Counter(token for shape in shapes for token in (*_words(shape), *set(shape.numbers)))
    texts = len(shapes) + FEW
    return {token: max(math.log(texts / (many + 0.5)), 0.0) / math.log(texts) for token, many in count.items()}


def pairs(
    lines: Sequence[Shape], tests: Sequence[Shape], told: Sequence[int], weigh: Weights
) -> Iterator[tuple[int, int]]:
    """(line, test) where a line may be one of the tests `told`, by place, told again."""
    if not lines or not told:
        return
    places = {token: place for place, token in enumerate(weigh)}
    wanted = _matrix([tests[place] for place in told], weigh, places)
    of_tests = np.asarray(wanted.multiply(wanted).sum(1)).ravel()
    chunk = max(PAIRS // len(told), 1)
    for first in range(0, len(lines), chunk):
        some = _matrix(lines[first : first + chunk], weigh, places)
        of_lines = np.asarray(some.multiply(some).sum(1)).ravel()
        shared = (some @ wanted.T).tocoo()
        line, test = shared.row, shared.col
        union = of_lines[line] + of_tests[test] - shared.data
        near = shared.data >= LEAST * union
        yield from zip((first + line[near]).tolist(), [told[place] for place in test[near].tolist()], strict=True)


def _words(shape: Shape) -> list[str]:
    return sorted(filter(is_word, shape.words))  # so that sums are the same in every process


def _matrix(texts: Sequence[Shape], weigh: Weights, places: Mapping[str, int]) -> sparse.csr_matrix:
    """A row for each text; products of rows are the weight of the words that both have."""
    words = [_words(shape) for shape in texts]
    columns = [places[word] for some in words for word in some]
    values = np.sqrt([weigh[word] for some in words for word in some])
    ends = np.cumsum([0, *(len(some) for some in words)])
    return sparse.csr_matrix((values, columns, ends), shape=(len(texts), len(places)))


def told(ours: Shape, theirs: Shape, weigh: Weights) -> tuple[float, str]:
    """(how near a line is to a test question, how it tells it again: words, numbers, more; empty: it does not)."""
    same = asks_for(ours, theirs) and not turned(ours, theirs)
    wording = 1 - apart(_neighbours(ours), _neighbours(theirs))
    shared, share = _share(_words(ours), _words(theirs), weigh)
    known, numbers = _numbers(ours.numbers, theirs.numbers, weigh)
    near = (shared + known) * share * numbers**2
    several = len(set(theirs.numbers)) > 1
    if same and theirs.wordy >= WORDY:
        if share >= WORDS and wording >= WORDING:
            return shared * share, "numbers"
        missing = (
            _missing(_words(ours), _words(theirs), weigh) > 1 - WHOLE
            or _missing(ours.numbers, theirs.numbers, weigh) > 0
        )
        if several and not missing and len(ours.masked & theirs.masked) >= WHOLE * len(theirs.masked):
            return near, "more"
    if not several or near < (AGAIN if same else FIRM):
        return near, ""
    if wording >= REWRITTEN:
        return near, "words" if same and share >= SENTENCES else ""
    return near, "words" if same or _rewritten(ours, theirs) else ""


def _rewritten(ours: Shape, theirs: Shape) -> bool:
    """Whether no longer piece of a test question stands in the line as it was."""
    line, wanted = ours.line.split(), theirs.line.split()
    piece = SequenceMatcher(None, line, wanted, autojunk=False).find_longest_match()
    return piece.size < PIECE * len(wanted)


def _share(ours: Iterable[str], theirs: Iterable[str], weigh: Weights) -> tuple[float, float]:
    """(the weight of what both have, its share in all that either has), each as often as it stands there."""
    here, there = Counter(ours), Counter(theirs)
    both, either = (sum(weigh[token] * many for token, many in some.items()) for some in (here & there, here | there))
    return both, both / either if either else 0.0


def _numbers(ours: Iterable[str], theirs: Iterable[str], weigh: Weights) -> tuple[float, float]:
    """As `_share`, of numbers: in another unit one is nearly the same."""
    here, there = Counter(ours), Counter(theirs)
    both = sum(weigh[number] * many for number, many in (here & there).items())
    all_ = sum(weigh[number] * many for some in (here, there) for number, many in some.items())
    left = [(_value(number), weigh[number]) for number in (here - there).elements()]
    for number in (there - here).elements():
        value = _value(number)
        for place, (other, weight) in enumerate(left):
            if value and other and {value / other, other / value} & _UNITS:
                both += CONVERTED * min(weight, weigh[number])
                del left[place]
                break
    return both, both / (all_ - both) if all_ else 0.0


def _value(number: str) -> Fraction | None:
    """Of a number, or of which in a row it is."""
    try:
        return Fraction(number.rstrip("dhnrst"))
    except ValueError:
        return None


def _missing(ours: Iterable[str], theirs: Iterable[str], weigh: Weights) -> float:
    """The share of the weight of `theirs` that is not there."""
    here, there = Counter(ours), Counter(theirs)
    lost, all_ = (sum(weigh[token] * many for token, many in some.items()) for some in (there - here, there))
    return lost / all_ if all_ else 0.0


def _neighbours(shape: Shape) -> frozenset[str]:
    return frozenset(feature for feature in shape.masked if " " in feature)
