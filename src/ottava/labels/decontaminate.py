"""Test questions among training data, however they are written.

A line is *contaminated* where it is a test question

- in another writing: LaTeX, signs, case, white space, numbers as words, sentences or options in another order;
- in other words, as long as the numbers are the same: names or a few words changed, courtesies around it;
- a story told again, by its rare words and its numbers (`retold`);
- with other numbers, where the words carry the problem: at least WORDY words, nearly all the same, and a template that
  stands alone. Where the test set has the template several times with other numbers, or the data many times, then the
  numbers *are* the problem (what is 3 + 4?), and other numbers are another problem.

How near is near is taken from the data: a line must be twice as near to a test question as that is to the nearest
*other* test question, and than to the CROWD-th of the lines. So thousands of puzzles from one generator, which share
all but a few words, are not taken for each other. No word that turns a problem into another (left, altogether, most,
not) may have been replaced by another such word, and the clause that asks must be alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from ottava.labels import likeness, minhash, retold
from ottava.labels.likeness import Shape, apart

BANDS = minhash.Bands(42, 3)
SAME = (0.40, 0.40, 0.50, 0.65)
"""The greatest distance, word by word, of a paraphrase with the same numbers, by how many different ones there are
(from three on, the last)."""
SHORT = 0.30
"""The same where there are fewer than WORDY words: then neighbours count too."""
FORMULA = 0.15
"""The greatest distance of two formulas that are the same but for a sign that was read wrongly."""
LONG = 5
"""Neighbours in a formula, from which on it says by itself which problem it is."""
OTHER = 0.12
"""The greatest distance of the same problem with other numbers, numbers masked."""
KIN = 0.70
"""Test questions further apart than this are not of one generator."""
WORDY = 7
TOLD = 5
"""Words, each as often as it stands there, of a story that is short and known by its template to the letter."""
BAG = 0.15
"""The greatest distance of the words alone, where there is no formula: numbers and conditions may stand anywhere."""
CROWD = 50
MANY = 200
"""Test questions with one set of numbers that a line is held against for its numbers alone."""
ALIKE = 3
"""Test questions with one template, from which on it is a generator's."""


@dataclass(frozen=True, slots=True)
class Match:
    """Line and test question by place. why: writing, words or numbers. distance: 0 to 1."""

    line: int
    test: int
    why: str
    distance: float


@dataclass
class Tests:
    """Test questions, ready to be looked for. radius: [tests], how near a line with the same numbers must be; generic:
    [tests], whether other numbers make another problem."""

    shapes: list[Shape]
    radius: list[float] = field(init=False)
    generic: list[bool] = field(init=False)

    def __post_init__(self) -> None:
        self.by_words = _by_words(self.shapes)
        self.distinct = list(self.by_words)
        self.keys = minhash.keys(self.distinct, BANDS)
        self.by_numbers: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for place, shape in enumerate(self.shapes):
            if len(set(shape.numbers)) > 1:
                self.by_numbers[shape.numbers].append(place)
        self.radius = [1.0] * len(self.shapes)
        self.generic = [not _carried_by_words(shape) for shape in self.shapes]
        templates: list[set[tuple[str, ...]]] = [{shape.numbers} for shape in self.shapes]
        for a, b in minhash.similar(self.keys, self.keys):
            for place in _all(self.by_words[self.distinct[a]]):
                self._beside(place, self.by_words[self.distinct[b]], templates[place])
        self.generic = [g or len(found) >= ALIKE for g, found in zip(self.generic, templates, strict=True)]

    def _beside(self, place: int, others: _ByNumbers, template: set[tuple[str, ...]]) -> None:
        """Look at test questions that are like the one at `place`: how near it may be come to, and whether it is one
        of a generator's."""
        ours = self.shapes[place]
        for numbers, places in others.items():
            if numbers == ours.numbers:
                gaps = [apart(ours.full, self.shapes[other].full) for other in places]
            else:
                gaps = [apart(ours.masked, self.shapes[places[0]].masked)]
                if gaps[0] <= 2 * OTHER and len(template) < ALIKE:
                    template.add(numbers)
            self.radius[place] = min([self.radius[place], *(gap / 2 for gap in gaps if 0 < gap <= KIN)])


_ByNumbers = dict[tuple[str, ...], list[int]]


def _by_words(shapes: Sequence[Shape]) -> dict[frozenset[str], _ByNumbers]:
    """Places of shapes by words, then by numbers: a generator's thousands have a few sets of words."""
    found: dict[frozenset[str], _ByNumbers] = defaultdict(lambda: defaultdict(list))
    for place, shape in enumerate(shapes):
        found[shape.words][shape.numbers].append(place)
    return found


def _all(by_numbers: _ByNumbers) -> list[int]:
    return [place for places in by_numbers.values() for place in places]


def tests(questions: Sequence[str]) -> Tests:
    """Get test questions ready."""
    return Tests([likeness.shape(question) for question in questions])


def find(lines: Sequence[Shape], against: Tests) -> list[Match]:
    """The nearest test question of every contaminated line, in the lines' order."""
    same: dict[int, list[tuple[float, int]]] = defaultdict(list)  # test -> (distance, line)
    other: dict[int, list[tuple[float, int]]] = defaultdict(list)
    for line, test in _candidates(lines, against):
        ours, theirs = lines[line], against.shapes[test]
        if likeness.contains(ours, theirs) and (not against.generic[test] or ours.numbers == theirs.numbers):
            same[test].append((0.0, line))
            continue
        trimmed = likeness.trimmed(ours, theirs)
        for seen in (ours,) if trimmed is ours else (ours, trimmed):
            if seen.numbers == theirs.numbers:
                if _near(seen, theirs):
                    gap = max(apart(seen.full, theirs.full), apart(seen.formula, theirs.formula))
                    same[test].append((gap, line))
                    break
            elif not against.generic[test] and _as_many(seen, theirs):
                gap = apart(seen.masked, theirs.masked)
                if gap <= (OTHER if theirs.wordy >= WORDY else 0):
                    other[test].append((gap, line))
                    break
    return _nearest(lines, against, same, other, _retold(lines, against))


def _retold(lines: Sequence[Shape], against: Tests) -> list[Match]:
    """Stories that are told again: of each line the nearest test question, if it is clearly nearer than the next. What
    many lines tell with other numbers is a generator's."""
    stories = [place for place, shape in enumerate(against.shapes) if retold.is_story(shape)]
    weigh = retold.weights([*lines, *against.shapes])
    stories = retold.alone(against.shapes, stories, weigh)
    near: dict[int, list[tuple[float, int, str]]] = defaultdict(list)
    for line, test in retold.pairs(lines, against.shapes, stories, weigh):
        if retold.is_story(lines[line]):
            nearness, why = retold.told(lines[line], against.shapes[test], weigh)
            near[line].append((nearness, test, why))
    found: dict[int, list[Match]] = defaultdict(list)
    for line, tests in near.items():
        (best, test, why), *others = sorted(tests, reverse=True)
        if why == "numbers" and against.generic[test]:
            continue
        if why and (not others or best >= retold.CLEAR * others[0][0]):
            found[test].append(Match(line, test, "numbers" if why == "numbers" else "words", 1 / (1 + best)))
    return [match for some in found.values() for match in some if len({lines[m.line].numbers for m in some}) < CROWD]


def _candidates(lines: Sequence[Shape], against: Tests) -> list[tuple[int, int]]:
    """Pairs worth a look: alike in words, or with the very same numbers. Of a generator's questions only those with the
    same numbers."""
    by_words = _by_words(lines)
    distinct = list(by_words)
    pairs: set[tuple[int, int]] = set()
    for at, place in minhash.similar(minhash.keys(distinct, BANDS), against.keys):
        group = by_words[distinct[at]]
        for numbers, found in against.by_words[against.distinct[place]].items():
            for test in found:
                near = group.get(numbers, ()) if against.generic[test] else _all(group)
                pairs.update((line, test) for line in near)
    for words, group in by_words.items():
        if words in against.by_words:  # certain, however crowded a band is
            for numbers, found in against.by_words[words].items():
                pairs.update((line, test) for test in found for line in group.get(numbers, ()))
    for line, shape in enumerate(lines):
        pairs.update((line, test) for test in against.by_numbers.get(shape.numbers, ())[:MANY])
    return sorted(pairs)


def _carried_by_words(shape: Shape) -> bool:
    """Whether a problem is its words more than its numbers: many words, or a story in which the few come again."""
    said = [clause for clause in shape.clauses if not shape.words.isdisjoint(clause)]
    story = len(said) > 1 and len(shape.numbers) > 1 and "=" not in shape.words
    return shape.wordy >= WORDY or (story and shape.told >= TOLD)


def _as_many(ours: Shape, theirs: Shape) -> bool:
    """As many numbers; a one may be a word of speech or a value."""
    return len(ours.numbers) == len(theirs.numbers) or ours.values == theirs.values


def _same_formula(ours: Shape, theirs: Shape) -> bool:
    """Whether a short line is about the very same formula, and either that is long enough to be nobody else's, with no
    word that turns it into another problem, or the words ask the same."""
    if theirs.wordy >= WORDY or ours.formula != theirs.formula:
        return False
    long = sum(" " in feature for feature in theirs.formula) >= LONG
    return (long and ours.turns == theirs.turns) or likeness.says_the_same(ours, theirs)


def _near(ours: Shape, theirs: Shape) -> bool:
    """Whether a line with the same numbers may be the test question in other words."""
    if theirs.wordy < WORDY:
        alike = apart(ours.full, theirs.full) <= SHORT or apart(ours.words, theirs.words) <= BAG
        return (alike and apart(ours.formula, theirs.formula) <= FORMULA) or _same_formula(ours, theirs)
    return apart(ours.words, theirs.words) <= SAME[min(len(set(theirs.numbers)), len(SAME) - 1)]


def _nearest(
    lines: Sequence[Shape],
    against: Tests,
    same: dict[int, list[tuple[float, int]]],
    other: dict[int, list[tuple[float, int]]],
    told: Sequence[Match],
) -> list[Match]:
    best: dict[int, Match] = {}

    def offer(match: Match) -> None:
        if match.line not in best or match.distance < best[match.line].distance:
            best[match.line] = match

    for test, near in same.items():
        radius, theirs = against.radius[test], against.shapes[test]
        gaps = sorted(gap for gap, _ in near if gap > 0)
        if len(gaps) >= CROWD:
            radius = min(radius, gaps[CROWD - 1] / 2)
        for gap, line in near:
            near_enough = gap <= radius or _same_formula(lines[line], theirs)
            if gap == 0 or (near_enough and _asks_the_same(lines[line], theirs)):
                offer(Match(line, test, "writing" if gap == 0 else "words", gap))
    for test, near in other.items():
        if len({lines[line].numbers for _, line in near}) >= CROWD:
            continue
        for gap, line in near:
            if _asks_the_same(lines[line], against.shapes[test]):
                offer(Match(line, test, "numbers", gap))
    for match in told:
        offer(match)
    return [best[line] for line in sorted(best)]


def _asks_the_same(ours: Shape, theirs: Shape) -> bool:
    seen = likeness.trimmed(ours, theirs)
    if theirs.wordy < WORDY and ours.formula == theirs.formula and likeness.says_the_same(seen, theirs):
        return True
    if theirs.wordy < WORDY and likeness.asks_for_another(seen, theirs):
        return False
    return not likeness.turned(seen, theirs) and likeness.asks_for(seen, theirs)
