"""How far two questions are apart once both are in one writing (`normal`): the measures that `dedup` and
`decontaminate` share.

A question is the set of its tokens and of the pairs of neighbours within a clause: sentences, clauses and options may
change places, and what stands inside a formula may not.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from ottava.labels import normal
from ottava.labels.signs import listed

_TURNS = (  # words that turn one problem into another, in groups that ask the same
    "total altogether sum combin overall both entir entirely", "more additional extra further exceed greater",
    "less fewer lower below under", "left remain remaind leftover still", "difference differ", "product", "ratio",
    "average mean", "median", "mode", "maximum most largest greatest highest maximal max biggest", "percent %",
    "minimum least smallest lowest minimal min fewest", "not no never without except", "neither nor", "even", "odd",
    "before ago earlier previously", "after later next", "increas rise ris grow grew grown", "decreas drop discount",
    "area", "perimeter circumferenc", "volum", "surfac", "prime", "divisor factor", "multipl", "ascend increasing",
    "descend", "union", "intersection", "true", "false", "positiv", "negativ", "inver revers", "profit", "loss",
    "first", "second", "third", "last", "integral integrat", "derivativ differentiat", "sin", "cos", "tan",
    "radius", "diameter", "deep depth", "weekly week",
    "daily day", "monthly month", "yearly year annual annually", "add", "subtract", "give", "get", "lose lost", "sell",
    "purchas",
)  # fmt: skip
_TURNING = frozenset(normal.stem(words.split()[0]) for words in _TURNS)
_ASKED = _TURNING - {"get"}  # how much does he get, how much is he given
_MEASURES = frozenset(
    normal.stem(word) for word in listed("average median mode ratio product area perimeter volum surfac percent")
)
"""What is asked for by its name: nobody asks for an area without that word."""
_ASKING = frozenset(
    normal.stem(word)
    for word in listed(
        "find solve simplify reduce work out express expression equation system value answer result problem exact "
        "exactly possible satisfy solution real term number state hold get when all between point from such following"
    )
)
"""Words by which one asks for anything at all."""
TURNS = {normal.stem(word): normal.stem(words.split()[0]) for words in _TURNS for word in words.split()}


LEAST = 4


@dataclass(frozen=True, slots=True)
class Shape:
    """Of one question. clauses: of tokens, words that mean the same turn being one; asks: those of them that ask;
    line: all tokens; words: all but numbers; full: tokens and neighbours; masked: the same with every number as #;
    formula: the same of what is mathematics; numbers: all but 1, sorted; values: how many with the ones; turns: what
    kinds of words turn it; wordy: how many words it has, each counted once; told: each as often as it stands there."""

    clauses: tuple[normal.Clause, ...]
    asks: tuple[normal.Clause, ...]
    line: str
    words: frozenset[str]
    full: frozenset[str]
    masked: frozenset[str]
    formula: frozenset[str]
    numbers: tuple[str, ...]
    values: int
    turns: frozenset[str]
    wordy: int
    told: int


def shape(text: str) -> Shape:
    """What is compared of a text."""
    read = normal.read(text)
    clauses, asks = (tuple(tuple(TURNS.get(t, t) for t in c) for c in some) for some in (read.clauses, read.asks))
    return _of(clauses, asks, _features(read.formulas), " ".join(TURNS.get(t, t) for t in read.line.split()))


def _of(
    clauses: tuple[normal.Clause, ...], asks: tuple[normal.Clause, ...], formula: frozenset[str], line: str
) -> Shape:
    tokens = [token for clause in clauses for token in clause]
    words = frozenset(token for token in tokens if not normal.is_number(token))
    return Shape(
        clauses,
        asks,
        line,
        words,
        _features(clauses),
        _features(tuple(_masked(clause) for clause in clauses)),
        formula,
        tuple(sorted(token for token in tokens if normal.is_number(token) and token != "1")),
        sum(normal.is_number(token) for token in tokens),
        words & _TURNING,
        sum(is_word(word) for word in words),
        sum(is_word(token) for token in tokens),
    )


def is_word(token: str) -> bool:
    return len(token) > 1 and not normal.is_number(token) and not normal.is_operator(token)


def _masked(clause: normal.Clause) -> normal.Clause:
    return tuple("#" if normal.is_number(token) else token for token in clause)


def _features(clauses: tuple[normal.Clause, ...]) -> frozenset[str]:
    found = {token for clause in clauses for token in clause}
    found.update(f"{a} {b}" for clause in clauses for a, b in pairwise(clause))
    return frozenset(found)


def brackets(shape: Shape) -> frozenset[str]:
    """Where brackets stand in formulas: what a fraction is over, what is multiplied."""
    found = pairwise(shape.line.split()) if "(" in shape.line else ()
    return frozenset(f"{a} {b}" for a, b in found if a in "()" or b in "()")


def apart(ours: frozenset[str], theirs: frozenset[str]) -> float:
    """Jaccard's distance, 0 (equal) to 1 (nothing in common)."""
    if ours == theirs:
        return 0.0
    shared = len(ours & theirs)
    return 1 - shared / (len(ours) + len(theirs) - shared)


def trimmed(ours: Shape, theirs: Shape) -> Shape:
    """`ours` without what somebody wrote around a question: clauses at either end that have no number and almost
    nothing of `theirs`, and such in between that have no turning word either."""
    alien = [_alien(clause, theirs) for clause in ours.clauses]
    inner = [place for place, is_alien in enumerate(alien) if not is_alien]
    if not inner:
        return ours
    kept = tuple(
        clause
        for place, clause in enumerate(ours.clauses)
        if not alien[place] or (inner[0] < place < inner[-1] and not _TURNING.isdisjoint(clause))
    )
    if len(kept) == len(ours.clauses):
        return ours
    return _of(kept, tuple(clause for clause in ours.asks if clause in kept), ours.formula, ours.line)


def _alien(clause: normal.Clause, theirs: Shape) -> bool:
    if any(normal.is_number(token) or normal.is_operator(token) for token in clause):
        return False
    return sum(token not in theirs.words for token in clause) > 0.7 * len(clause)


def contains(ours: Shape, theirs: Shape) -> bool:
    """Whether the tokens of `theirs` stand in `ours` one after the other, and no formula or list of numbers goes on
    before or after them. A question of under LEAST tokens is found in too many texts to say anything."""
    wanted, text = f" {theirs.line} ", f" {ours.line} "
    place = text.find(wanted) if theirs.line.count(" ") + 1 >= LEAST else -1
    if place < 0:
        return False
    before, after = text[:place].split()[-1:], text[place + len(wanted) :].split()[:1]
    return not any(normal.is_number(token) or normal.is_operator(token) for token in before + after)


def asks_for(ours: Shape, theirs: Shape) -> bool:
    """Whether the line asks for what the test question asks for: one of its clauses has most of what both texts know of
    the clause that asks, and turns it the same way. Where it names another thing that both texts know, it does not."""
    asking = [clause for clause in theirs.asks if any(is_word(token) for token in clause)]
    if not asking or not ours.clauses:
        return True
    asked = frozenset(_masked(asking[-1]))
    known = asked & (ours.words | {"#"})
    clauses = [frozenset(_masked(clause)) for clause in ours.asks or ours.clauses]
    best = max(reversed(clauses), key=lambda clause: (len(clause & known), -len(clause)))
    if 2 * len(best & known) < min(len(known), len(best & (theirs.words | {"#"}))):
        return False
    if len(best) > 2 * len(asked):  # nobody wrote punctuation: it holds more than the question
        return True
    rest = frozenset(token for clause in theirs.clauses if clause != asking[-1] for token in clause)
    switched = _words((best - asked) & rest) and _words(asked - best)
    turns = (best & _ASKED) - asked
    if turns == {"total"} and not asked & _ASKED:  # how much he pays: the total amount that he pays
        turns = frozenset()
    return not turns and asked & _MEASURES <= ours.words and not switched


def _words(tokens: frozenset[str]) -> bool:
    return any(is_word(token) for token in tokens - _ASKING)


def asks_for_another(ours: Shape, theirs: Shape) -> bool:
    """Whether a line names something that the test question does not know where that asks for something that the line
    does not: the radius, the centre. For texts of few words, in which nobody has many to replace."""
    if not theirs.asks or not ours.asks:
        return False
    wanted, named = _asked_only(theirs, ours), _asked_only(ours, theirs)
    return any(not any(_misread(word, other) for other in named) for word in wanted) and any(
        not any(_misread(word, other) for other in wanted) for word in named
    )


def says_the_same(ours: Shape, theirs: Shape) -> bool:
    """Whether neither asks with a word that the other does not know, and not both have other words of their own."""
    ours_alone, theirs_alone = ours.words - theirs.words, theirs.words - ours.words
    both = all(_words(some) for some in (ours_alone, theirs_alone))
    if both or not ours.turns ^ theirs.turns <= _ASKING:
        return False
    return not _asked_only(ours, theirs) and not _asked_only(theirs, ours)


def _asked_only(ours: Shape, theirs: Shape) -> set[str]:
    """The words of the clauses that ask which the other text does not know."""
    return {word for clause in ours.asks for word in clause if is_word(word)} - theirs.words - _ASKING


def _misread(word: str, other: str) -> bool:
    """One letter read as another one."""
    return len(word) == len(other) > 3 and sum(a != b for a, b in zip(word, other, strict=True)) == 1


def turned(ours: Shape, theirs: Shape) -> bool:
    """Whether a word that turns a problem was replaced by another. Where only one of them has such a word, it may be a
    way of speaking."""
    return bool(ours.turns - theirs.turns) and bool(theirs.turns - ours.turns)
