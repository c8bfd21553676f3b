"""Variants that were held out at first, and that the detector has been tuned on since: see docs/labels.md."""

from __future__ import annotations

import random
import re

from benchmarks.decontaminate import variants
from benchmarks.decontaminate.variants import Variant, listed

_BEFORE = (
    "Please solve the following problem step by step.\n\n", "Question 17: ", "**Problem.** ", "Q: ",
    "Here is a task for you:\n",
    "You are a helpful tutor. Think carefully before you answer.\n", "### Exercise\n",
    "Solve this and show your work: ", "3) ",
)  # fmt: skip
_AFTER = (
    "\n\nLet's think step by step.", "\nAnswer:", "", "\nPut your final answer within \\boxed{}.",
    "\nGive only the result.",
    " Explain your reasoning.", "\n\nA:", " Thank you!",
)  # fmt: skip


def wrapped(text: str, rng: random.Random) -> str:
    """The question inside the words of a prompt."""
    return rng.choice(_BEFORE) + text + rng.choice(_AFTER)


_NAMES = listed("Maria Omar Lena Anna Boris Clara Lopez Peter Sofia Nadia Emil Vera Jonas Leeds York")
_NEW = listed("Priya Kofi Yuki Diego Amara Sven Fatima Liam Noor Tariq Ingrid Chen Paolo Utrecht Bergen")


def names(text: str, rng: random.Random) -> str | None:
    """Other people and places."""
    new = dict(zip(_NAMES, rng.sample(_NEW, len(_NEW)), strict=True))
    changed = re.sub(r"\b(" + "|".join(_NAMES) + r")\b", lambda m: new[m[0]], text)
    return changed if changed != text else None


def scanned(text: str, rng: random.Random) -> str | None:
    """As recognised from a page: lines broken, words hyphenated, ligatures, two letters wrong."""
    if "\\" in text or "$" in text:
        return None
    text = text.replace("fi", "ﬁ").replace("fl", "ﬂ")
    letters = [i for i, c in enumerate(text) if c.isalpha() and c.islower()]
    for place in rng.sample(letters, 2):
        text = (
            text[:place]
            + {"l": "i", "e": "c", "o": "0", "n": "u", "a": "o"}.get(text[place], text[place])
            + text[place + 1 :]
        )
    out, line = [], ""
    for word in text.split(" "):
        if len(line) + len(word) > 46:
            out.append(line)
            line = ""
        line += word + " "
    return "\n".join([*(part.rstrip() for part in out), line.rstrip()])


def markup(text: str, rng: random.Random) -> str | None:
    """Formulas as other tools print them: HTML, other commands, displayed."""
    if "$" not in text:
        return None
    text = re.sub(
        r"\\frac\{([^{}]*)\}\{([^{}]*)\}",
        rng.choice([r"{\1 \\over \2}", r"{\\displaystyle\\frac{\1}{\2}}", r"\1/\2"]),
        text,
    )
    text = re.sub(r"\^\{(\w+)\}", rng.choice([r"<sup>\1</sup>", r"**\1", r"^\1"]), text)
    text = text.replace(r"\leq", rng.choice(["&le;", r"\leqq", "⩽"])).replace(
        r"\times", rng.choice(["&times;", r"\ast"])
    )
    text = text.replace(r"\cdot", rng.choice(["&middot;", r"\bullet", "∙"])).replace(
        r"\left", rng.choice([r"\big", r"\Bigl"])
    )
    text = text.replace(r"\right", rng.choice([r"\big", r"\Bigr"])).replace(r"\angle", r"\measuredangle")
    style = rng.choice(
        [r"\\[\1\\]", r"$$\1$$", r"\\begin{equation}\1\\end{equation}", r"\\ensuremath{\1}", r"<i>\1</i>"]
    )
    return re.sub(r"\$([^$]*)\$", style, text)


def asked_otherwise(text: str, rng: random.Random) -> str | None:
    """The question as an order, or the order as a question."""
    rules = [
        (r"How many ([^?]+)\?", rng.choice([r"Give the number of \1.", r"Work out how many \1."])),
        (r"What is ([^?]+)\?", rng.choice([r"State \1.", r"Can you tell me what \1 is?"])),
        (r"How (long|old|far|much) ([^?]+)\?", r"Work out how \1 \2."),
        (r"\b(?:Find|Compute|Determine|Evaluate|Simplify) (.+)\.$", rng.choice([r"What is \1?", r"Please give \1."])),
        (r"\bWhich ([^?]+)\?", r"Name the \1, please."),
    ]
    for pattern, new in rules:
        changed = re.sub(pattern, new, text, count=1)
        if changed != text:
            return changed
    return None


def mixed(text: str, rng: random.Random) -> str | None:
    """Three kinds of change one after the other."""
    names_ = [name for name in variants.TUNED if name not in ("other numbers", "typography")]
    done = 0
    for name in sorted(
        rng.sample(names_, len(names_)), key=lambda name: name.startswith("numbers")
    ):  # written out last
        changed = variants.TUNED[name](text, rng)
        if changed is not None and done < 3:
            text, done = changed, done + 1
    return text if done >= 2 else None


MORE: dict[str, Variant] = {
    "inside a prompt": wrapped,
    "other names": names,
    "as recognised from a page": scanned,
    "other mark-up": markup,
    "asked otherwise": asked_otherwise,
    "three changes at once": mixed,
}
