"""One writing for the many of one question: words by their stem, numbers by their value, one word for a few synonyms.

Tools that look for test questions by their words miss them as soon as a fraction is typeset another way. Here a
question, in plain signs (`signs`), becomes clauses of tokens. What is the same token on both sides is decided here and
nowhere else; what is the same *question* in `decontaminate`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

from ottava.labels import signs, values
from ottava.labels.signs import listed

Clause = tuple[str, ...]


_TOKEN = re.compile(
    r"\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+\.\d+|\.\d+|\d+(?:st|nd|rd|th)\b|\d+|[^\W\d_]+(?:'[^\W\d_]+)?(?:_\w+)?|"
    r"<=|>=|!=|->|\*\*|[-+*/^=<>()\[\]{}|!?.,;:%&]|[¬∀-⋿↔⇒⇔]"
)
_OPERATORS = frozenset(listed("+ - * / ^ = < > <= >= != -> % ! | mod sqrt root ¬ ∧ ∨ ↔ ⇒ ⇔"))
_BREAKS = frozenset(".?!;:,")
_STOP = frozenset(
    listed(
        "a an the of to in on at by for with and or is are was were be been being am do does did has have had it "
        "its he she they them his her their this that these those there then than as from so if we you i your our "
        "my me us him will would can could should may might must shall also just please very into onto upon which "
        "who whom whose what how many much one once let dollar dollars usd some any such each's following given "
        "now"
    )
)
_SAME = {  # small on purpose: what everybody would write for one another
    "buy": "purchase", "bought": "purchase", "obtain": "get", "got": "get", "receive": "get", "gain": "get",
    "calculate": "find", "compute": "find", "determine": "find", "evaluate": "find", "kid": "child",
    "children": "child",
    "start": "begin", "began": "begin", "commence": "begin", "large": "big", "small": "little", "pupil": "student",
    "finish": "complete", "end": "complete", "car": "automobile", "shop": "store", "cost": "price", "sold": "sell",
    "gave": "give", "given": "give", "made": "make", "ate": "eat", "eaten": "eat", "ran": "run", "went": "go",
    "took": "take", "taken": "take", "drove": "drive", "driven": "drive", "paid": "pay", "spent": "spend",
    "people": "person", "men": "man", "women": "woman", "bicycle": "bike", "picture": "photo", "every": "each",
    "per": "each", "percent": "%", "percentage": "%", "equal": "=", "equals": "=", "plus": "+", "minus": "-",
    "times": "*", "multiply": "*", "divide": "/", "division": "/",
    "kilometer": "km", "kilometre": "km", "metre": "meter", "centimeter": "cm",
    "centimetre": "cm", "kilogram": "kg", "gram": "g", "hr": "hour", "hrs": "hour", "mins": "minute", "secs": "second",
    "kms": "km", "kgs": "kg", "min": "minute", "sec": "second", "litre": "liter", "initially": "begin",
    "det": "determinant", "lim": "limit",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Text:
    """clauses: their tokens, in order; asks: those of them that ask, if any can be told; formulas: the pieces that are
    mathematics, which a word in between ends, though it says nothing; line: all tokens, and the brackets of sums."""

    clauses: tuple[Clause, ...]
    asks: tuple[Clause, ...]
    formulas: tuple[Clause, ...]
    line: str


def read(text: str) -> Text:
    """The text in one writing. Pure: the same everywhere."""
    clauses, asks, formulas, line = [], [], [], []
    for pieces, asked in _clauses(signs.flat(text)):
        line += [token for piece in pieces for token in piece]
        plain = [tuple(token for token in piece if token not in "()") for piece in pieces]
        clauses.append(tuple(token for piece in plain for token in piece))
        if asked:
            asks.append(clauses[-1])
        formulas += [tuple(run) for piece in plain for is_formula, run in groupby(piece, is_mathematics) if is_formula]
    return Text(tuple(clauses), tuple(asks), tuple(formulas), " ".join(line))


def is_number(token: str) -> bool:
    """Whether a token of a clause is a value."""
    return token[0].isdigit()


def is_operator(token: str) -> bool:
    """Whether a token of a clause is a sign of a formula."""
    return token in _OPERATORS


def is_mathematics(token: str) -> bool:
    """Whether a token of a clause belongs to a formula: a value, a sign, a variable, a function's name."""
    return len(token) == 1 or is_number(token) or is_operator(token) or "_" in token or token in _FUNCTIONS


_FUNCTIONS = frozenset(
    listed("sin cos tan sec csc cot arcsin arccos arctan log ln exp gcd lcm det binom bar vec int prod lim pm pi")
) | frozenset(listed("lfloor rfloor lceil rceil infinity cup cap"))


def _clauses(text: str) -> list[tuple[list[Clause], bool]]:
    """Clauses, in the pieces that stop words leave, and whether each asks."""
    out: list[tuple[list[Clause], bool]] = []
    words: list[str] = []
    ordered = False
    tokens = _TOKEN.findall(text)
    for place, token in enumerate([*tokens, "."]):
        if not words and token in _ORDERS:
            ordered = True
        elif token in _BREAKS and not (token == "!" and _formula(tokens, place)):
            pieces = _values(words)
            if pieces:
                out.append((pieces, ordered or token == "?" or bool(_ASKS & set(words[:4]))))
            words, ordered = [], False
        elif token not in "{}&\"'":
            words.append(_BRACKETS.get(token, token))
    return out


_ASKS = frozenset(listed("how what which find calculate compute determine evaluate solve simplify who when where"))
_ORDERS = frozenset(listed("give state name tell report write show provide please work"))
"""Words that begin an order: they say that something is asked, not what."""


def _formula(tokens: list[str], place: int) -> bool:
    return place > 0 and tokens[place - 1][0].isdigit()


def _values(words: list[str]) -> list[Clause]:
    """Numbers by value, words by stem; a new piece after every stop word."""
    pieces: list[list[str]] = [[]]
    words, place = _grouped(words), 0
    while place < len(words):
        number, used = values.number(words, place)
        if used:
            pieces[-1] += number
            place += used
            continue
        word = words[place]
        if word in "()" or _is_variable(words, place):
            pieces[-1].append(word)
        elif len(word) == 2 and word.isalpha() and word not in _SHORT:
            pieces[-1] += word  # a product of two
        elif word not in _STOP and (stemmed := stem(word)) not in _STOP:
            pieces[-1].append(stemmed)
        elif pieces[-1]:
            pieces.append([])
        place += 1
    return [tuple(t for at, t in enumerate(piece) if not _understood(piece, at)) for piece in pieces if piece]


def _is_variable(words: Sequence[str], place: int) -> bool:
    """Whether an `a` or an `i` is none of the language's."""
    before, after = words[place - 1 : place] if place else [], words[place + 1 : place + 2]
    if words[place] == "i" and before and before[0][0].isdigit():
        return True
    return words[place] in _ARTICLES and not _BESIDE.isdisjoint([*before, *after])


def _grouped(words: list[str]) -> list[str]:
    """Without the brackets that a formula does not need: around one token, around what is no sum and no power, and
    around words."""
    if "(" not in words:
        return [word for word in words if word != ")"]
    out, opened = list(words), []
    for place, word in enumerate(words):
        if word == "(":
            opened.append(place)
        elif word == ")":
            begin = opened.pop() if opened else None
            if begin is None or not _needed(words[begin + 1 : place], words[begin - 1] if begin else ""):
                out[place] = ""
                if begin is not None:
                    out[begin] = ""
    for place in opened:
        out[place] = ""
    return [word for word in out if word]


def _needed(inside: Sequence[str], before: str) -> bool:
    signs = not _BESIDE.isdisjoint(inside[1:]) or "-" in inside[1:]
    mathematics = all(len(word) <= 2 or is_mathematics(word) or word in "()" for word in inside)
    return len(inside) > 1 and mathematics and (signs or before in ("^", "/", "sqrt", "root"))


_BRACKETS = {"[": "(", "]": ")"}
_ARTICLES = frozenset("ai")
_BESIDE = frozenset(listed("+ * / ^ = < > <= >= !="))
_SHORT = frozenset(
    listed(
        "of to in is it as at be by do go he if me my no on or so up us we am an ok oh hi mr ms dr st vs re km cm mm "
        "kg mg ml hr ft lb oz pm mi cl dl pi ln lg mu nu xi tv pc id hz kb mb gb ii iv vi ix"
    )
)
"""Words and units of two letters; any other two are two variables side by side."""


def _understood(tokens: Sequence[str], at: int) -> bool:
    """Whether a sign of multiplication might as well not be written: beside a variable."""
    return (
        tokens[at] == "*"
        and 0 < at < len(tokens) - 1
        and any(len(t) == 1 and (t.isalpha() or t in "()") for t in (tokens[at - 1], tokens[at + 1]))
    )


@lru_cache(maxsize=200_000)
def stem(word: str) -> str:
    """A word without its commonest endings; one of several words that mean the same."""
    word = word.removesuffix("'s").removesuffix("'")
    found = _SAME.get(word) or _SAME_STEMS.get(_cut(word)) or word
    return _cut(found)


_KEEP = frozenset(listed("evening morning nothing something anything everything during building ceiling sibling"))


def _cut(word: str) -> str:
    word = word.removesuffix("s") if word[:-1] in _KEEP else word
    if word in _KEEP or not (word.isascii() and word.isalpha() and len(word) > 3):
        return word
    for ending, new in (("ies", "y"), ("sses", "ss"), ("ches", "ch"), ("shes", "sh"), ("xes", "x"), ("s", "")):
        if word.endswith(ending) and not word.endswith(("ss", "us", "is")):
            word = word[: -len(ending)] + new
            break
    for ending in ("ing", "ed"):
        if word.endswith(ending) and len(word) > len(ending) + 2:
            word = word[: -len(ending)]
            if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "lsz":
                word = word[:-1]
            break
    return word.removesuffix("e") if len(word) > 3 else word


_SAME_STEMS = {_cut(word): same for word, same in _SAME.items()}
