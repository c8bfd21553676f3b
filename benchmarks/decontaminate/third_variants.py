"""Variants that were held out at first, and that the detector has been tuned on since: see docs/labels.md."""

from __future__ import annotations

import random
import re

from benchmarks.decontaminate import more_variants, sources, variants
from benchmarks.decontaminate.variants import Variant

BY_HAND = {
    0: "On Monday Maria made 48 cookies for her school's fair, and on Tuesday half that number. How many cookies is "
    "that "
    "altogether?",
    1: "On his land a farmer keeps 120 sheep and 45 goats. After selling 30 sheep at the market he buys 12 goats "
    "from his "
    "neighbour. How many animals has he got now?",
    2: "At 60 miles per hour a train takes 3 hours from Leeds to York. What is the distance between Leeds and York?",
    3: "Every week Omar puts aside 15 dollars of pocket money for a bike that costs 240 dollars. How many weeks will "
    "he have to "
    "save until he can afford it?",
    4: "A full water tank contains 500 litres. Because of a leak 25 litres are lost every hour. How many hours does "
    "it take "
    "until there are only 300 litres left in it?",
    5: "A class has 32 students. 18 of them play football, 14 play chess, and 6 play both games. How many play "
    "neither of the "
    "two?",
    6: "For one cake a baker takes 3 eggs and 250 grams of flour. In his kitchen there are 20 eggs and 1500 grams of "
    "flour. How "
    "many cakes can he bake at most?",
    7: "Each evening Lena reads 24 pages of a novel that has 360 pages. She has read 120 pages so far. How many more "
    "evenings "
    "will it take her to finish?",
    9: "A restaurant bill of 84 dollars is shared by three friends. Anna pays double what Boris pays, and Clara 4 "
    "dollars more "
    "than Boris. What does Clara pay?",
    12: "A father and his son are 50 years old together. 5 years from now the father will be three times as old as "
    "the son. "
    "What is the son's age now?",
    14: "There are 5 red, 7 blue and 8 green marbles in a bag. Somebody draws one marble at random. How likely is it "
    "that it is "
    "not green?",
    15: "A swimming pool is filled by two pipes. Alone, the first would take 6 hours and the second 4 hours. How "
    "long does it "
    "take with both pipes together?",
    19: "For each ride a taxi takes 4 dollars at the start plus 2 dollars per kilometre. Peter's ride to the airport "
    "cost 30 "
    "dollars. How many kilometres long was it?",
    20: "A wall is 10 metres high. A snail climbs 3 metres of it each day and slides back 2 metres each night. On "
    "which day is it "
    "at the top?",
    25: "There are 25 rows of 18 seats each in a theatre, and on Friday evening 387 of the seats were taken. How "
    "many stayed "
    "empty?",
    27: "A 72 metre rope is cut in two so that one piece is 5 times as long as the other one. How many metres long "
    "is the "
    "shorter piece?",
    29: "On 100 kilometres a car needs 7 litres of fuel, and there are 42 litres in its full tank. How many "
    "kilometres can it "
    "go with a full tank?",
    33: "Shelves of 35 centimetres are cut from planks of 240 centimetres, without waste. How many planks must the "
    "carpenter buy "
    "for 50 shelves?",
    35: "Jonas gets 6 notebooks at 2.50 dollars each and 3 pens at 1.20 dollars each, and pays with a 20 dollar "
    "note. How much "
    "change is he given?",
}
"""A person's light rewriting of some word problems: all facts and numbers are kept."""


def by_hand(text: str, rng: random.Random) -> str | None:
    """A person's rewriting."""
    places = {problem: place for place, problem in enumerate(sources.WORD_PROBLEMS)}
    return BY_HAND.get(places[text]) if text in places else None


_PROMPTS = (
    "I'm stuck on my homework. {}\nCan you help me?", "<|user|>\n{}\n<|assistant|>",
    "### Instruction:\n{}\n\n### Response:",
    "Hello! {}", "Exercise 4.12\n{}", "[INST] {} [/INST]", "{}\n\nRespond with only the final answer.",
    "Human: {}\n\nAssistant:",
    "Answer the question below in one line.\n----\n{}\n----",
)  # fmt: skip


def chat(text: str, rng: random.Random) -> str:
    """Inside other prompts."""
    return rng.choice(_PROMPTS).format(text)


def phone(text: str, rng: random.Random) -> str | None:
    """As typed in haste: no capitals, no punctuation but the dots of numbers, abbreviations."""
    if "\\" in text or "$" in text or "\n" in text:
        return None
    text = re.sub(r"(?<!\d)[.,;:?!']|[.,;:?!'](?!\d)", "", text.lower())
    for long, short in (
        (" and ", " & "),
        (" with ", " w/ "),
        (" hours", " hrs"),
        (" minutes", " min"),
        ("kilometres", "km"),
    ):
        text = text.replace(long, short)
    return text.replace(" you ", " u ")


_SPOKEN = [
    (r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"\1 over \2"), (r"\\sqrt\{([^{}]*)\}", r"the square root of \1"),
    (r"\^\{?2\}?", " squared"), (r"\^\{?3\}?", " cubed"), (r" \+ ", " plus "), (r" - ", " minus "), (r" = ",
    " equals "),
    (r"\\cdot|\\times", "times"), (r"\\leq", "is at most"), (r"\$", ""), (r"\\left|\\right", ""),
]  # fmt: skip


def spoken(text: str, rng: random.Random) -> str | None:
    """A formula read aloud."""
    if "$" not in text or "\\int" in text or "\\log" in text:
        return None
    for pattern, new in _SPOKEN:
        text = re.sub(pattern, new, text)
    return text if "\\" not in text else None


def units(text: str, rng: random.Random) -> str | None:
    """Units and money by their signs."""
    if "\\" in text or "$" in text:
        return None
    before = text
    text = re.sub(r"(\d+(?:\.\d+)?) dollars", r"$\1", text)
    for long, short in (
        (" kilometres", " km"),
        (" centimetres", " cm"),
        (" millilitres", " ml"),
        (" grams", " g"),
        (" percent", "%"),
    ):
        text = re.sub(rf"(\d){long}", rf"\1{short}", text)
    text = re.sub(r"(\d) (hours?|minutes?)\b", lambda m: f"{m[1]}{'h' if m[2][0] == 'h' else 'min'}", text)
    return text if text != before else None


def mixed(text: str, rng: random.Random) -> str | None:
    """One change of these and one or two of the others."""
    first = rng.choice([chat, phone, units, spoken])
    changed = None
    for name in rng.sample(list(_OTHERS), len(_OTHERS)):
        changed = _OTHERS[name](text, rng)
        if changed is not None:
            break
    return None if changed is None else first(changed, rng)


_OTHERS: dict[str, Variant] = {
    name: change
    for name, change in (variants.TUNED | more_variants.MORE).items()
    if name not in ("other numbers", "three changes at once", "inside a prompt")
}

THIRD: dict[str, Variant] = {
    "rewritten by hand": by_hand,
    "inside other prompts": chat,
    "typed in haste": phone,
    "formulas read aloud": spoken,
    "units by their signs": units,
    "two changes at once": mixed,
}
