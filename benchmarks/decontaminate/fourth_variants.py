"""Variants that were held out at first, and that the detector has been tuned on since: see docs/labels.md."""

from __future__ import annotations

import random
import re

from benchmarks.decontaminate import sources, variants
from benchmarks.decontaminate.variants import Variant

WORDS_BY_HAND = {
    8: "Around a rectangular garden of 14 by 9 metres there is a path on the outside that is 1 metre wide all the "
    "way. How many "
    "square metres does the path cover?",
    10: "Pencils are sold in boxes of 12 and erasers in packets of 5. Mr Lopez took 7 boxes of pencils home, and 9 "
    "packets of "
    "erasers. What is the total number of objects that he bought?",
    11: "The price of a jacket is 80 dollars. It is lowered by 25 percent in a sale, and there is a coupon for "
    "another 10 dollars "
    "off. How much does a customer pay for the jacket?",
    13: "It takes a cyclist 45 minutes to ride 18 kilometres on a flat road. How many kilometres does she ride in 2 "
    "hours at the "
    "same speed?",
    16: "Of the 240 workers of a company 60 percent are in the factory. A quarter of the other workers drive "
    "lorries. How many "
    "are the workers who drive lorries?",
    21: "A job has 1800 pages. One printer makes 35 pages in a minute, another, newer one 55 pages in a minute, and "
    "both work at "
    "the same time. For how many minutes do they work?",
    22: "There are 8 rows of 15 tulips in a garden. After a frost one fifth of them are dead. How many tulips have "
    "survived the "
    "frost?",
    24: "Nadia pours a drink of 300 millilitres of juice and 700 millilitres of water into glasses that hold 125 "
    "millilitres. How "
    "many glasses does she fill?",
    26: "Last week a worker worked 46 hours. He is paid 14 dollars for each of the first 40 hours of a week, and 21 "
    "dollars for "
    "every further hour. What did he earn last week?",
    28: "In 4 days the students of a school plant 560 trees, every day 20 trees more than the day before. What "
    "number of trees do "
    "they plant on the last day?",
    31: "In an orchard the ratio of apple trees to pear trees is 7 to 3, and the apple trees are 64 more than the "
    "pear trees. How "
    "many trees does the orchard have?",
    34: "Ten years ago 1250 people lived in a village. The population has grown by 8 percent since then. What is the "
    "population "
    "of the village today?",
}
LATEX_BY_HAND = {
    0: r"For which real numbers $x$ does $x^2-5x+6=0$ hold?",
    2: r"What is $f(5)$ if $f(x) = (2x+1)/(x-3)$?",
    4: r"Find the largest integer $x$ that satisfies $3x+7 \le 25$.",
    6: r"A triangle has its vertices at $(0,0)$, $(6,0)$ and $(2,5)$. Determine the area of the triangle.",
    8: r"Find $x$ and $y$ such that $2x+y=11$ and $x-3y=-12$.",
    10: r"Find the remainder of $7^{100}$ on division by $13$.",
    11: r"What is the sum of the positive divisors of $360$?",
    13: r"What is the radius of the circle $x^2+y^2-4x+6y=12$?",
    15: r"Angle $A$ of triangle $ABC$ is $40^\circ$ and angle $B$ is $75^\circ$. What is angle $C$ in degrees?",
    19: r"What is the probability of getting exactly $3$ heads when a fair coin is tossed $8$ times?",
    20: r"What is the distance from $(-2,3)$ to $(4,11)$?",
    21: r"In the expansion of $(2x-3)^6$, what is the coefficient of $x^4$?",
}


def words_by_hand(text: str, rng: random.Random) -> str | None:
    """A person's rewriting of word problems."""
    return WORDS_BY_HAND.get(sources.WORD_PROBLEMS.index(text)) if text in sources.WORD_PROBLEMS else None


def latex_by_hand(text: str, rng: random.Random) -> str | None:
    """A person's rewriting of problems in LaTeX."""
    return LATEX_BY_HAND.get(sources.LATEX.index(text)) if text in sources.LATEX else None


_PROMPTS = (
    "Here's a question from my exam: {}", "USER: {}\nASSISTANT:", "<question>{}</question>", "Task 3 (5 points)\n{}",
    "{}\n\nRemember to box your final result.", "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    "You will be given a question. Reason first, then answer.\n\nQuestion:\n{}", "# Problem\n\n{}\n\n# Solution\n",
    "```\n{}\n```\nWhat is the answer?",
)  # fmt: skip


def prompts(text: str, rng: random.Random) -> str:
    """Inside prompts of other makers."""
    return rng.choice(_PROMPTS).format(text)


def typeset(text: str, rng: random.Random) -> str | None:
    """A formula by a careful typesetter, who spaces and groups otherwise."""
    if "$" not in text:
        return None
    text = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"\\dfrac{\\,\1\\,}{\\,\2\\,}", text)
    text = re.sub(r"\^\{(\w+)\}", rng.choice([r"^{{\1}}", r"^{\\mathrm{\1}}", r"^\1"]), text)
    text = re.sub(r" ([=+-]) ", rng.choice([r"{} \1 {}", r"\\;\1\\;", r" \\mathbin{\1} "]), text)
    text = re.sub(r"\b([a-z])\b(?=[^$]*\$)(?=(?:[^$]*\$[^$]*\$)*[^$]*\$[^$]*$)", r"\1", text)
    return re.sub(r"\$([^$]*)\$", rng.choice([r"$\\textstyle \1$", r"\\(\\displaystyle{\1}\\)", r"$ \1 $"]), text)


def twice(text: str, rng: random.Random) -> str | None:
    """A prompt around a question whose numbers and order are changed."""
    for name in rng.sample(["numbers written otherwise", "sentences in another order", "clauses in another order"], 3):
        changed = variants.TUNED[name](text, rng)
        if changed is not None:
            return prompts(changed, rng)
    return None


FOURTH: dict[str, Variant] = {
    "word problems rewritten by hand": words_by_hand,
    "formulas rewritten by hand": latex_by_hand,
    "inside prompts of other makers": prompts,
    "typeset otherwise": typeset,
    "a prompt and another order": twice,
}
