"""Numbers in digits and in words, by their value: 1,250 and 1250; 3/4, 0.75 and three quarters; two and a half."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

LONGEST_NUMBER = 300
"""Digits, and more is a word: so long a number is none that anybody asks for, and Python reads no much longer ones."""

_UNITS = {
    "zero": 0, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
    "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16, "seventeen": 17,
    "eighteen": 18, "nineteen": 19,
}  # fmt: skip
_TENS = {
    "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90,
}  # fmt: skip
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_PARTS = {
    "half": 2, "halve": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8,
    "ninth": 9, "tenth": 10,
}  # fmt: skip
_TIMES = {"twice": "2", "double": "2", "doubled": "2", "doubles": "2", "triple": "3", "thrice": "3", "tripled": "3"}
_DOZENS = ("dozen", "dozens")


def number(words: Sequence[str], place: int) -> tuple[list[str], int]:
    """The value that begins at a place, as tokens, and how many words it takes; ([], 0) where none does."""
    word = words[place]
    if word in _TIMES:
        return [_TIMES[word], "*"], 1
    if word == "half" and list(words[place + 1 : place + 3]) == ["a", "dozen"]:
        return ["6"], 3
    if word[0].isdigit() or word[0] == ".":
        if word[-1].isalpha() or len(word) > LONGEST_NUMBER:
            return [word], 1
        value, used = _digits(words, place)
    else:
        found = _part(words, place) or _spelled(words, place)
        if found is None:
            return [], 0
        value, used = found
    return [str(value)], used


def _digits(words: Sequence[str], place: int) -> tuple[Fraction, int]:
    fraction = _fraction(words, place)
    if fraction is not None:
        return fraction, 3
    value = Fraction(words[place].replace(",", ""))
    if place + 1 < len(words) and words[place + 1] in _SCALES:
        return value * _SCALES[words[place + 1]], 2
    mixed = _fraction(words, place + 1) if words[place].isdigit() else None
    if mixed is not None and 0 < mixed < 1:
        return value + mixed, 4
    return _whole(value, words, place, 1)


def _fraction(words: Sequence[str], place: int) -> Fraction | None:
    """Digits over digits, alone: not part of a longer chain of divisions or of a power."""
    if len(words) < place + 3 or words[place + 1] != "/":
        return None
    above, below = words[place], words[place + 2]
    if not (above.isdigit() and below.isdigit()) or max(len(above), len(below)) > LONGEST_NUMBER or not int(below):
        return None
    if (place and words[place - 1] in ("/", "^")) or words[place + 3 : place + 4] in (["/"], ["^"]):
        return None
    return Fraction(int(above), int(below))


def _part(words: Sequence[str], place: int) -> tuple[Fraction, int] | None:
    """half, a half, one third, a third of; a dozen."""
    word, after = words[place], words[place + 1] if place + 1 < len(words) else ""
    if word == "half":
        return Fraction(1, 2), 1
    if word in _DOZENS:
        return Fraction(12), 1
    if word in ("a", "one"):
        if after in _DOZENS:
            return Fraction(12), 2
        if after in _PARTS and (word == "one" or _PARTS[after] == 2 or list(words[place + 2 : place + 3]) == ["of"]):
            return Fraction(1, _PARTS[after]), 2
    return None


def _spelled(words: Sequence[str], place: int) -> tuple[Fraction, int] | None:
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
    if not used:
        return None
    value = Fraction(total + current)
    part = _PARTS.get(words[place + used].removesuffix("s")) if place + used < len(words) else None
    if part and part > 2 and value < part:
        return value / part, used + 1
    return _whole(value, words, place, used)


def _goes_on(words: Sequence[str], at: int) -> bool:
    """Whether `and` or a hyphen lies inside one number: one hundred and five, twenty-five."""
    follows = words[at + 1] in _UNITS or words[at + 1] in _TENS or words[at + 1] == "one"
    before = words[at - 1] in _TENS if words[at] == "-" else words[at - 1] in _SCALES
    return follows and before


def _whole(value: Fraction, words: Sequence[str], place: int, used: int) -> tuple[Fraction, int]:
    """What may follow a whole number and belongs to it: dozen; and a half, and one quarter."""
    rest = list(words[place + used : place + used + 3])
    if rest[:1] and rest[0] in _DOZENS:
        return value * 12, used + 1
    if len(rest) == 3 and rest[0] == "and" and rest[1] in ("a", "one") and rest[2] in _PARTS:
        return value + Fraction(1, _PARTS[rest[2]]), used + 3
    return value, used
