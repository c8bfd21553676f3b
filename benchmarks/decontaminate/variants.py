"""Variants of a question, planted while the detector was being tuned. Each returns None where it has nothing to change.

They know nothing of the detector: no table or rule of it is used here.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

Variant = Callable[[str, random.Random], str | None]


def listed(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


_ONES = listed(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = listed("twenty thirty forty fifty sixty seventy eighty ninety")


def spelled(n: int) -> str:
    """A number below 10,000 in words."""
    ones, tens = _ONES, _TENS
    if n < 20:
        return ones[n]
    if n < 100:
        return tens[n // 10 - 2] + (f"-{ones[n % 10]}" if n % 10 else "")
    if n < 1000:
        return f"{ones[n // 100]} hundred" + (f" and {spelled(n % 100)}" if n % 100 else "")
    rest = n % 1000
    return f"{spelled(n // 1000)} thousand" + (f"{' and' if rest < 100 else ''} {spelled(rest)}" if rest else "")


def typography(text: str, rng: random.Random) -> str:
    """Case, white space, quotes, dashes, invisible characters, final punctuation."""
    changes: list[Callable[[str], str]] = [
        str.upper, str.lower, str.title, lambda t: t.replace(" ", "  "), lambda t: t.replace(" ", "\u00a0"),
        lambda t: t.replace("-", "\u2212"), lambda t: t.replace("'", "\u2019"), lambda t: t.rstrip(".?! "),
        lambda t: "\u200b".join(t.split(" ")[:1]) + " " + " ".join(t.split(" ")[1:]),
        lambda t: t.replace(". ", ".\n"), lambda t: f"  {t}\t\n", lambda t: t.replace(" ", "\n", 4),
    ]  # fmt: skip
    if "\\" in text or "$" in text:  # commands are not words
        changes = changes[3:5] + changes[6:]
    for change in rng.sample(changes, 2):
        text = change(text)
    return text


def latex(text: str, rng: random.Random) -> str | None:
    """The same formula as another author would type it."""
    before = text
    fraction = rng.choice(
        [r"\\dfrac{\1}{\2}", r"\\tfrac{\1}{\2}", r"(\1)/(\2)", r"\\frac {\1} {\2}", r"\\cfrac{\1}{\2}"]
    )
    text = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", fraction, text)
    text = re.sub(r"\^\{(\w)\}", rng.choice([r"^\1", r"^{ \1 }", r"^{\1}"]), text)
    if rng.random() < 0.4:
        text = re.sub(r"\^2\b|\^\{2\}", "²", re.sub(r"\^3\b|\^\{3\}", "³", text))
    text = text.replace(r"\cdot", rng.choice([r"\times", "·", "*", "×"])).replace(
        r"\times", rng.choice([r"\cdot ", "×", "*"])
    )
    text = text.replace(r"\leq", rng.choice([r"\le", "≤", "<=", r"\leqslant"])).replace(
        r"\neq", rng.choice([r"\ne", "≠"])
    )
    text = re.sub(r"\\sqrt\{(\d+)\}", rng.choice([r"√\1", r"\\sqrt{ \1 }", r"√(\1)", r"sqrt(\1)"]), text)
    text = text.replace(r"\left(", "(").replace(r"\right)", ")") if rng.random() < 0.5 else text
    text = (
        re.sub(r"(?<!\\left)\((?=[^()$]*\))([^()]*)\)", r"\\left(\1\\right)", text)
        if rng.random() < 0.3 and "\\left" not in text
        else text
    )
    text = text.replace(r"\angle ", "∠") if rng.random() < 0.5 else text
    text = text.replace(r"^{\circ}", rng.choice(["°", r"^\circ"]))
    open_, close = rng.choice([("$", "$"), (r"\(", r"\)"), ("", ""), (r"$\displaystyle ", "$"), ("$ ", " $")])
    text = re.sub(r"\$([^$]*)\$", lambda m: open_ + m[1] + close, text)
    text = re.sub(r" ([=+]) ", rng.choice([r" \1 ", r"\1", r" \, \1 \, ", r"~\1~".replace("~", " ")]), text)
    return text if text != before else None


def numbers_written(text: str, rng: random.Random) -> str | None:
    """The same numbers, written another way."""
    if "\\" in text or "$" in text:
        return None

    def other(match: re.Match[str]) -> str:
        word = match[0]
        if "." in word:
            return word.rstrip("0") if word.endswith("0") else word + "0"
        n = int(word)
        if n >= 1000 and rng.random() < 0.5:
            return f"{n:,}"
        return spelled(n) if 1 < n < 10_000 and rng.random() < 0.8 else word

    changed = re.sub(r"(?<![\w/.,])\d+(?:\.\d+)?(?![\w/,]|\.\d)", other, text)
    changed = changed.replace("half", "1/2") if rng.random() < 0.5 else changed
    changed = re.sub(r" percent", rng.choice(["%", " per cent", " percent"]), changed)
    return changed if changed != text else None


def other_numbers(text: str, rng: random.Random) -> str | None:
    """The same word problem with other numbers (contamination where the words carry the problem)."""
    if "\\" in text or "$" in text:
        return None

    def other(match: re.Match[str]) -> str:
        n = float(match[0])
        new = max(2, round(n * rng.uniform(0.4, 2.2))) if n > 1 else 1
        return str(new + (new == n and n > 1)) + (match[0][match[0].index(".") :] if "." in match[0] else "")

    changed = re.sub(r"\d+(?:\.\d+)?", other, text)
    return changed if changed != text else None


def sentences(text: str, rng: random.Random) -> str | None:
    """The statements in another order, the question first or last."""
    parts = re.split(r"(?<=[.?!]) (?=[A-Z])", text)
    if len(parts) < 3:
        return f"{parts[1]} {parts[0]}" if len(parts) == 2 else None
    body, ask = parts[:-1], parts[-1]
    new = rng.sample(body, len(body))
    if new == body:
        new = body[::-1]
    return " ".join([ask, *new] if rng.random() < 0.5 else [*new, ask])


def _turned(match: re.Match[str]) -> str:
    return f"{match[2][0].upper()}{match[2][1:]}, and {match[1][0].lower()}{match[1][1:]}."


def clauses(text: str, rng: random.Random) -> str | None:
    """Parts of a sentence in another order: lists, and what stands beside `and` or before `if`."""
    swaps = [
        (r"\b([Ii])f ([^,.]+), ([^.?]+)\?", lambda m: f"{m[3][0].upper()}{m[3][1:]} if {m[2]}?"),
        (r"\b(\d+ [a-z]+(?: [a-z]+)?) and (\d+ [a-z]+(?: [a-z]+)?)", lambda m: f"{m[2]} and {m[1]}"),
        (r"\b(\d+ [a-z]+ [a-z]+), (\d+ [a-z]+ [a-z]+) and (\d+ [a-z]+ [a-z]+)", lambda m: f"{m[3]}, {m[1]} and {m[2]}"),
        (r"\bIn ([^,.]+), ([^.]+)\.", lambda m: f"{m[2][0].upper()}{m[2][1:]}, in {m[1]}."),
        (r"\bOn ([A-Za-z ]+ evening) ([^.]+)\.", lambda m: f"{m[2][0].upper()}{m[2][1:]}, on {m[1]}."),
        (r"([A-Z][^.,]+) and ([a-z]{2,} [^.,]+)\.", _turned),
    ]  # fmt: skip
    if "\\" in text or "$" in text:
        return None
    for pattern, new in rng.sample(swaps, len(swaps)):
        changed = re.sub(pattern, new, text, count=1)
        if changed != text:
            return changed
    return None


def options(text: str, rng: random.Random) -> str | None:
    """The options in another order, labelled another way."""
    question, *rest = text.split("\n")
    found = [line[3:] for line in rest if re.match(r"[A-H]\) ", line)]
    if len(found) < 2:
        return None
    new = rng.sample(found, len(found))
    if new == found:
        new = found[::-1]
    style = rng.choice(["({}) {}", "{}. {}", "{}) {}", "- {1}"])
    return (
        question + "\n" + "\n".join(style.format(letter, item) for letter, item in zip("ABCDEFGH", new, strict=False))
    )


_WORDS = {
    "baked": "made", "buys": "purchases", "sells": "disposes of", "costs": "is priced at", "bicycle": "bike",
    "travels": "goes", "journey": "trip", "holds": "contains", "pupils": "students", "greatest": "largest",
    "every evening": "each evening", "friends": "buddies", "store": "shop", "customer": "buyer", "today": "now",
    "drawn at random": "picked randomly", "workers": "employees", "employs": "has", "kilometres": "km",
    "needs": "requires",
    "ride": "trip", "climbs": "crawls up", "produces": "prints", "plants": "puts in", "kill": "destroys",
    "survive": "outlive",
    "harbour": "port", "earn": "make", "rope": "cord", "pieces": "parts", "shorter": "smaller", "car": "automobile",
    "stickers": "decals", "altogether": "in total", "in total": "altogether", "finish": "complete", "bill": "check",
    "wants": "would like", "at the beginning": "initially", "live in": "inhabit", "farmer": "rancher",
    "reads": "goes through",
    "Find": "Determine", "Compute": "Calculate", "Evaluate": "Work out", "Solve": "Find the solution of",
    "glasses": "cups",
    "empty": "unoccupied", "grown": "increased", "village": "hamlet", "owns": "possesses", "books": "volumes",
    "Simplify": "Reduce",
    "What is": "Find", "greatest integer": "largest integer", "planet": "world", "divisible": "evenly divisible",
}  # fmt: skip


def words(text: str, rng: random.Random) -> str | None:
    """Two to four words replaced by others that mean the same: a light paraphrase."""
    here = [w for w in _WORDS if re.search(rf"\b{re.escape(w)}\b", text)]
    if not here:
        return None
    for word in rng.sample(here, min(len(here), rng.randint(2, 4))):
        text = re.sub(rf"\b{re.escape(word)}\b", _WORDS[word], text)
    return text


TUNED: dict[str, Variant] = {
    "typography": typography,
    "LaTeX": latex,
    "numbers written otherwise": numbers_written,
    "other numbers": other_numbers,
    "sentences in another order": sentences,
    "clauses in another order": clauses,
    "options in another order": options,
    "a few words": words,
}
