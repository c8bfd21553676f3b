r"""One writing for the many of one question: typography, LaTeX, numbers, word endings, a few synonyms.

Tools that look for test questions by their words miss them as soon as a fraction is written \dfrac{1}{2} in the place
of
1/2. Here a question becomes clauses of tokens: words by their stem, numbers by their value, operators by one sign each.
What is the same token on both sides is decided here and nowhere else; what is the same *question* in `decontaminate`.
"""

from __future__ import annotations

import html
import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

Clause = tuple[str, ...]


def listed(text: str) -> list[str]:
    """The words of a text: tables that can be read."""
    return text.split()


LONGEST_NUMBER = 300
"""Digits, and more is a word: so long a number is none that anybody asks for, and Python reads no much longer ones."""

_LATEX = [  # order matters: the longest form first
    (r"\\(?:begin|end)\{[a-z]+\*?\}(?:\[[^]]*\])?", " "),
    (r"\\(?:left|right|bigl?|bigr|Bigl?|Bigr|displaystyle|textstyle|limits|nolimits)(?![a-zA-Z])", " "),
    (r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|mathbb|operatorname|mbox|emph|boxed)\s*\{([^{}]*)\}", r" \1 "),
    (r"\\ensuremath(?![a-zA-Z])", " "),
    (r"\{([^{}]*)\\over(?![a-zA-Z])([^{}]*)\}", r" (\1)/(\2) "),
    (r"\{,\}", ""),
    (r"\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r" (\1)/(\2) "),
    (r"\\[dtc]?frac\s*(\d)\s*(\d)", r" \1/\2 "),
    (r"\\sqrt\s*\[([^]]*)\]\s*\{([^{}]*)\}", r" root(\1)(\2) "),
    (r"\\sqrt\s*\{([^{}]*)\}", r" sqrt(\1) "),
    (r"\\sqrt\s*([0-9a-zA-Z])", r" sqrt(\1) "),
    (r"√\s*\(([^()]*)\)", r" sqrt(\1) "),
    (r"√\s*([0-9a-zA-Z]+)", r" sqrt(\1) "),
    (r"\^\s*\{([^{}]*)\}", r"^(\1)"),
    (r"_\s*\{([^{}]*)\}", r"_\1"),
    (r"\^\s*\(?\s*(?:\\circ|◦|°)\s*\)?", " degrees "),
    (r"\\(?:cdot|times|ast|bullet)(?![a-zA-Z])", " * "),
    (r"\\(?:div)(?![a-zA-Z])", " / "),
    (r"\\pmod\s*\{([^{}]*)\}", r" mod \1 "),
    (r"\\(?:leqslant|leqq|leq|le)(?![a-zA-Z])", " <= "),
    (r"\\(?:geqslant|geqq|geq|ge)(?![a-zA-Z])", " >= "),
    (r"\\(?:neq|ne)(?![a-zA-Z])", " != "),
    (r"\\lt(?![a-zA-Z])", " < "),
    (r"\\gt(?![a-zA-Z])", " > "),
    (r"\\(?:dots|ldots|cdots|dotsc)(?![a-zA-Z])", " ... "),
    (r"\\(?:qquad|quad|,|;|!|:| |\\)", " "),
    (r"\\([%$#&_{}])", r"\1"),
    (r"\\(?:to|rightarrow)(?![a-zA-Z])", " -> "),
    (r"\\(?:measured|spherical)angle", " angle "),
    (r"\\(?:land|wedge)(?![a-zA-Z])", "∧"),
    (r"\\(?:lor|vee)(?![a-zA-Z])", "∨"),
    (r"\\(?:neg|lnot)(?![a-zA-Z])", "¬"),
    (r"\\([a-zA-Z]+)", r" \1 "),
]
_SPOKEN = [
    (r"\bsquared\b", "^2"),
    (r"\bcubed\b", "^3"),
    (r"\b(?:the )?square root of (\w+)", r"sqrt(\1)"),
    (r"(?<=\w) over (?=\(|\d|[a-z]\b)", " / "),
    (r"\b(?:is )?(?:at most|no more than)\b", "<="),
    (r"\b(?:is )?(?:at least|no less than)\b", ">="),
]
_LATEX_RULES = [(re.compile(pattern), new) for pattern, new in [*_LATEX, *_SPOKEN]]

_SIGNS = str.maketrans({
    "−": "-", "–": "-", "—": " - ", "‐": "-", "‑": "-", "·": "*", "×": "*", "⋅": "*", "∗": "*", "÷": "/", "∕": "/",
    "⁄": "/",
    "≤": "<=", "≥": ">=", "⩽": "<=", "⩾": ">=", "∙": "*", "≠": "!=", "→": "->", "…": "...",
    "“": '"', "”": '"', "‘": "'", "’": "'", "„": '"', "«": '"',
    "»": '"', "π": " pi ", "θ": " theta ", "α": " alpha ", "β": " beta ", "∞": " infinity ", "∠": " angle ",
    "△": " triangle ", "°": " degrees ", "\u200b": "", "\u200c": "", "\u200d": "", "\ufeff": "", "\u00ad": "",
    "\u2060": "",
})  # fmt: skip
_POWERS = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+")
_LOW = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_VULGAR = re.compile("(\\d?)([¼½¾⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞])")

_MARKED = re.compile(r"[\\√^_{]|squared|cubed|square root|over|most|least|than")  # what a rule below begins with
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_SUPERSCRIPT = re.compile(r"<sup>([^<>]*)</sup>")
_ZERO = re.compile(r"(?<=[^\W\d_])0+(?=[^\W\d_])|\b0(?=[^\W\d_]{2,})")  # a scanner's O
_PER_CENT = re.compile(r"\bper\s+cent\b", re.IGNORECASE)

_UNITS = {
    "zero": 0, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
    "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16, "seventeen": 17,
    "eighteen": 18, "nineteen": 19,
}  # fmt: skip
_TENS = dict(zip(listed("twenty thirty forty fifty sixty seventy eighty ninety"), range(20, 100, 10), strict=True))
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_PARTS = {
    "half": 2, "halve": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8,
    "ninth": 9, "tenth": 10,
}  # fmt: skip

_TOKEN = re.compile(
    r"\d+(?:,\d{3})+(?:\.\d+)?|\d+\.\d+|\.\d+|\d+(?:st|nd|rd|th)\b|\d+|[^\W\d_]+(?:'[^\W\d_]+)?(?:_\w+)?|"
    r"<=|>=|!=|->|\*\*|[-+*/^=<>()\[\]{}|!?.,;:%&]|[¬∀-⋿↔⇒⇔]"
)
_OPERATORS = frozenset(listed("+ - * / ^ = < > <= >= != -> % ! | mod sqrt root ¬ ∧ ∨ ↔ ⇒ ⇔"))
_BREAKS = frozenset(".?!;:,")
_LABEL = re.compile(
    r"(?m)(?:^|(?<=\s))(?:\(?[A-Ha-h]|\(\d{1,2}|\([ivx]{1,4})\)\s+|^[ \t]*\d{1,2}\)\s+|"
    r"^[ \t]*(?:[A-H]|\d{1,2})[.:](?=\s)"
)
_BULLET = re.compile(r"(?m)^[ \t]*[-*•][ \t]+(?=\S)")
_OPENING = re.compile(
    r"(?im)^\s*(?:#+\s*)?(?:question|problem|exercise|task|example|q)\s*(?:no\.?\s*)?#?[\d.]*\s*(?:\([^()\n]*\)\s*)?(?:[.:)]|$)"
)
_MARK = re.compile(r"<\|[^|<>]*\|>|\[/?INST\]|^\s*[-=_*#~]{3,}\s*$", re.MULTILINE)  # of a chat's turns, and rules

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
    "times": "*",
    "multiply": "*", "divide": "/", "kilometer": "km", "kilometre": "km", "metre": "meter", "centimeter": "cm",
    "centimetre": "cm", "kilogram": "kg", "gram": "g", "hr": "hour", "hrs": "hour", "mins": "minute", "secs": "second",
    "kms": "km", "kgs": "kg", "min": "minute", "sec": "second", "litre": "liter", "initially": "begin",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Text:
    """clauses: their tokens, in order; asks: those of them that ask, if any can be told."""

    clauses: tuple[Clause, ...]
    asks: tuple[Clause, ...]


def read(text: str) -> Text:
    """The text in one writing. Pure: the same everywhere."""
    clauses, asks = [], []
    for tokens, asked in _clauses(_flat(text)):
        clauses.append(tokens)
        if asked:
            asks.append(tokens)
    return Text(tuple(clauses), tuple(asks))


def is_number(token: str) -> bool:
    """Whether a token of a clause is a value."""
    return token[0].isdigit()


def is_operator(token: str) -> bool:
    """Whether a token of a clause is a sign of a formula."""
    return token in _OPERATORS


def _flat(text: str) -> str:
    """Characters in one writing; LaTeX as plain signs."""
    text = _POWERS.sub(lambda m: "^" + unicodedata.normalize("NFKC", m[0]).replace("−", "-"), text)
    text = _LOW.sub(lambda m: "_" + unicodedata.normalize("NFKC", m[0]), text)
    text = _VULGAR.sub(lambda m: (m[1] + " + " if m[1] else "") + unicodedata.normalize("NFKC", m[2]), text)
    text = _MARK.sub(" ; ", text)
    if "<" in text or "&" in text:
        text = html.unescape(_TAG.sub(" ", _SUPERSCRIPT.sub(r"^{\1}", text)))
    text = _PER_CENT.sub("percent", _ZERO.sub(lambda m: "o" * len(m[0]), text))
    text = unicodedata.normalize("NFKC", text).translate(_SIGNS)
    text = _LABEL.sub(" ; ", _OPENING.sub(" ; ", text, count=1))
    if len(_BULLET.findall(text)) > 1:  # one alone is a minus where a line was broken
        text = _BULLET.sub(" ; ", text)
    text = " ".join(text.split())
    for _ in range(3 if _MARKED.search(text) else 0):  # braces inside braces
        before = text
        for pattern, new in _LATEX_RULES:
            text = pattern.sub(new, text)
        if text == before:
            break
    text = text.replace("**", "^" if re.search(r"\w\*\*\d", text) else " ").replace("$", " ").replace("`", " ")
    return re.sub(r"\(\s*(-?[\w.]+)\s*\)", r" \1 ", text).casefold()


def _clauses(text: str) -> list[tuple[Clause, bool]]:
    """Clauses without stop words, and whether each asks."""
    out: list[tuple[Clause, bool]] = []
    words: list[str] = []
    ordered = False
    tokens = _TOKEN.findall(text)
    for place, token in enumerate([*tokens, "."]):
        if not words and token in _ORDERS:
            ordered = True
        elif token in _BREAKS and not (token == "!" and _formula(tokens, place)):
            clause = _values(words)
            if clause:
                out.append((clause, ordered or token == "?" or bool(_ASKS & set(words[:4]))))
            words, ordered = [], False
        elif token not in "()[]{}&\"'":
            words.append(token)
    return out


_ASKS = frozenset(listed("how what which find calculate compute determine evaluate solve simplify who when where"))
_ORDERS = frozenset(listed("give state name tell report write show provide please work"))
"""Words that begin an order: they say that something is asked, not what."""


def _formula(tokens: list[str], place: int) -> bool:
    return place > 0 and tokens[place - 1][0].isdigit()


def _values(words: list[str]) -> Clause:
    """Numbers by value, words by stem, stop words out."""
    out: list[str] = []
    place = 0
    while place < len(words):
        number, used = _number(words, place)
        if used:
            out.extend(number)
            place += used
            continue
        word = words[place]
        place += 1
        if word not in _STOP and (stemmed := stem(word)) not in _STOP:
            out.append(stemmed)
    return tuple(out)


def _number(words: list[str], place: int) -> tuple[list[str], int]:
    """The value that begins at a place and how many words it takes; ([], 0) where none does."""
    word = words[place]
    if word[0].isdigit() or word[0] == ".":
        return _digits(words, place)
    if word in ("twice", "double", "doubled", "doubles"):
        return ["2", "*"], 1
    if word in ("triple", "thrice", "tripled"):
        return ["3", "*"], 1
    if word == "dozen":
        return ["12"], 1
    if word == "half":
        return ["1/2"], 1
    if word in ("a", "one") and place + 1 < len(words):
        part = _PARTS.get(words[place + 1])
        if part and (word == "one" or part == 2):
            return [f"1/{part}"], 2
        if words[place + 1] == "dozen":
            return ["12"], 2
    return _spelled(words, place)


def _digits(words: list[str], place: int) -> tuple[list[str], int]:
    word = words[place]
    if word[-1].isalpha() or len(word) > LONGEST_NUMBER:
        return [word], 1
    value = Fraction(word.replace(",", ""))
    over = words[place + 1 : place + 3]
    below = over[1] if len(over) == 2 and over[0] == "/" and len(over[1]) <= LONGEST_NUMBER else ""
    plain = below.isdigit() and int(below)
    after = words[place + 3 : place + 4]
    before = words[place - 1] if place else ""
    if plain and word.isdigit() and before not in ("/", "^") and after not in (["/"], ["^"]):
        return [str(value / int(below))], 3
    scale = _SCALES.get(words[place + 1]) if place + 1 < len(words) else None
    return ([str(value * scale)], 2) if scale else ([str(value)], 1)


def _spelled(words: list[str], place: int) -> tuple[list[str], int]:
    total = current = used = 0
    at = place
    while at < len(words):
        word = words[at]
        if word in _UNITS:
            current += _UNITS[word]
        elif word in _TENS:
            current += _TENS[word]
        elif word == "one" and (used or (at + 1 < len(words) and words[at + 1] in _SCALES)):
            current += 1
        elif word in _SCALES and (used or (at > 0 and words[at - 1] == "a")):
            current = max(current, 1) * _SCALES[word]
            if _SCALES[word] > 100:
                total, current = total + current, 0
        elif used and word in ("and", "-") and at + 1 < len(words) and _goes_on(words, at):
            at += 1
            continue
        else:
            break
        at += 1
        used = at - place
    value = total + current
    if used and place + used < len(words):
        part = _PARTS.get(words[place + used].removesuffix("s"))
        if part and part > 2 and value < part:
            return [str(Fraction(value, part))], used + 1
    return ([str(value)], used) if used else ([], 0)


def _goes_on(words: list[str], at: int) -> bool:
    """Whether `and` or a hyphen lies inside one number: one hundred and five, twenty-five."""
    follows = words[at + 1] in _UNITS or words[at + 1] in _TENS or words[at + 1] == "one"
    before = words[at - 1] in _TENS if words[at] == "-" else words[at - 1] in _SCALES
    return follows and before


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
