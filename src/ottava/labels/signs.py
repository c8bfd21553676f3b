r"""Mark-up, LaTeX and Unicode as one set of plain signs: \dfrac{1}{2}, \frac12, ½ and 1/2 are the same text.

The first step of `normal`. Pure, and no judgement: what is the same *token* is decided in `normal`.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable


def listed(text: str) -> list[str]:
    """The words of a text: tables that can be read."""
    return text.split()


_END = r"(?![a-zA-Z])"
_ARGUMENT = r"\s*(?:\{([^{}]*)\}|(\\[a-zA-Z]+|[0-9a-zA-Z]))"  # in braces, or one sign


def _fraction(match: re.Match[str]) -> str:
    above, below = match[1] or match[2], match[3] or match[4]
    return f" ({above})/({below}) "


def _root(match: re.Match[str]) -> str:
    return f" sqrt({match[1] or match[2]}) "


_LATEX: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [  # order matters: the longest form first
    (r"\\\\(?:\[[^]]*\])?|\\[()\[\]]", " "),  # a new line; where mathematics begins and ends
    (r"\\begin\{array\}\{[^{}]*\}", " "),
    (r"\\(?:begin|end)\{[a-zA-Z]+\*?\}(?:\[[^]]*\])?", " "),
    (r"\\(?:left|right|middle|[bB]igg?[lrm]?|displaystyle|textstyle|limits|nolimits)" + _END, " "),
    (r"\\(?:text|textbf|textit|textrm|math[a-z]+|boldsymbol|operatorname\*?|mbox|emph"
     r"|boxed|ensuremath|underline)\s*\{([^{}]*)\}", r" \1 "),
    (r"\\(?:ensuremath|rm|bf|it|cal)" + _END, " "),
    (r"\\(?:hspace|vspace|label|tag|phantom)\*?\{[^{}]*\}", " "),
    (r"\{([^{}]*)\\over" + _END + r"([^{}]*)\}", r" (\1)/(\2) "),
    (r"\{([^{}]*)\\choose" + _END + r"([^{}]*)\}", r" binom \1 \2 "),
    (r"\\[dt]?binom" + 2 * _ARGUMENT, lambda m: f" binom {m[1] or m[2]} {m[3] or m[4]} "),
    (r"\{,\}", ""),
    (r"\\[dtc]?frac" + 2 * _ARGUMENT, _fraction),
    (r"\\sqrt\s*\[([^]]*)\]\s*\{([^{}]*)\}", r" root(\1)(\2) "),
    (r"\\sqrt" + _ARGUMENT, _root),
    (r"√\s*\(([^()]*)\)", r" sqrt(\1) "),
    (r"√\s*([0-9a-zA-Z]+)", r" sqrt(\1) "),
    (r"∛\s*\(?([0-9a-zA-Z]+)\)?", r" root(3)(\1) "),
    (r"\\(?:overline|bar|widebar)" + _ARGUMENT, lambda m: f" bar {m[1] or m[2]} "),
    (r"\\(?:vec|overrightarrow)" + _ARGUMENT, lambda m: f" {m[1] or m[2]} "),
    (r"\^\s*\(?\s*(?:\\circ|◦|°)\s*\)?", " degrees "),
    (r"\^\s*\{\s*(?:\\circ|◦|°)\s*\}", " degrees "),
    (r"\^\s*\{\s*(?:\\prime|′|')\s*\}|\^\s*\\prime" + _END, "'"),
    (r"\^\s*\{([^{}]*)\}", r"^(\1)"),
    (r"_\s*\{([^{}]*)\}", r"_\1"),
    (r"\\(?:cdot|times|ast|bullet)" + _END, " * "),
    (r"\\(?:div)" + _END, " / "),
    (r"\\pmod\s*\{([^{}]*)\}|\\pmod\s+(\w+)", lambda m: f" mod {m[1] or m[2]} "),
    (r"\\(?:bmod|mod)" + _END, " mod "),
    (r"\\(?:leqslant|leqq|leq|le)" + _END, " <= "),
    (r"\\(?:geqslant|geqq|geq|ge)" + _END, " >= "),
    (r"\\(?:neq|ne)" + _END + r"|\\not\s*=", " != "),
    (r"\\lt" + _END, " < "),
    (r"\\gt" + _END, " > "),
    (r"\\(?:dots|ldots|cdots|dotsc|dotsb|vdots|ddots)" + _END, " ... "),
    (r"\\(?:lvert|rvert|vert|mid)" + _END, "|"),
    (r"\\(?:\||lVert|rVert|Vert)" + _END, "|"),
    (r"\\(?:qquad|quad|enspace|,|;|!|:|>| |\\)", " "),
    (r"\\(?:to|rightarrow|longrightarrow)" + _END, " -> "),
    (r"\\(?:measured|spherical)angle", " angle "),
    (r"\\(?:land|wedge)" + _END, "∧"),
    (r"\\(?:lor|vee)" + _END, "∨"),
    (r"\\(?:neg|lnot)" + _END, "¬"),
    (r"\\(?:emptyset|varnothing)" + _END, " emptyset "),
    (r"\\infty" + _END, " infinity "),
    (r"\\[lr]angle" + _END + "|[⟨⟩]", " "),
    (r"\b(sum|prod|lim|log|int|max|min)_", r"\1 "),
    (r"\bC\s*\(\s*(\w+)\s*,\s*(\w+)\s*\)", r" binom \1 \2 "),
    (r"\b(\w+) choose (\w+)\b", r" binom \1 \2 "),
    (r"\\var(epsilon|phi|theta|rho|sigma)" + _END, r" \1 "),
    (r"\\degree" + _END, " degrees "),
]  # fmt: skip
_NAMES = [(r"\\([%$#&_{}])", r"\1"), (r"\\([a-zA-Z]+)", r" \1 ")]
_SPOKEN = [
    (r"\bsquared\b", "^2"),
    (r"\bcubed\b", "^3"),
    (r"\b(?:the )?square root of (\w+)", r"sqrt(\1)"),
    (r"\b(?:the )?cube root of (\w+)", r"root(3)(\1)"),
    (r"(?<=\w) over (?=\(|\d|[a-z]\b)", " / "),
    (r"\b(?:is )?(?:at most|no more than)\b", "<="),
    (r"\b(?:is )?(?:at least|no less than)\b", ">="),
]
_RULES = [(re.compile(pattern), new) for pattern, new in [*_LATEX, *_SPOKEN]]
_LAST = [(re.compile(pattern), new) for pattern, new in _NAMES]
_MARKED = re.compile(
    r"[\\√∛^_{⟨]|squared|cubed|square root|over|most|least|than|choose|C *\("
)  # what a rule begins with
_DEEP = 8  # braces inside braces

_SIGNS = str.maketrans({
    "−": "-", "–": "-", "—": " - ", "‐": "-", "‑": "-", "·": "*", "×": "*", "⋅": "*", "∗": "*", "÷": "/", "∕": "/",
    "⁄": "/", "∣": "|", "∥": " parallel ", "⟂": " perp ", "⊥": " perp ", "≡": " equiv ", "≈": " approx ", "≅": " cong ",
    "∈": " in ", "∪": " cup ", "∩": " cap ", "⊂": " subset ", "⊆": " subseteq ", "∅": " emptyset ", "∑": " sum ",
    "∏": " prod ", "∫": " int ", "±": " pm ", "⌊": " lfloor ", "⌋": " rfloor ", "⌈": " lceil ", "⌉": " rceil ",
    "≤": "<=", "≥": ">=", "⩽": "<=", "⩾": ">=", "∙": "*", "≠": "!=", "→": "->", "…": "...", "⋯": "...",
    "“": '"', "”": '"', "‘": "'", "’": "'", "„": '"', "«": '"', "′": "'",
    "»": '"', "∞": " infinity ", "∠": " angle ", "△": " triangle ", "°": " degrees ",
    "\u200b": "", "\u200c": "", "\u200d": "", "\ufeff": "", "\u00ad": "", "\u2060": "",
    **{chr(code): f" {unicodedata.name(chr(code)).split()[-1].lower()} "
       for code in [*range(0x391, 0x3AA), *range(0x3B1, 0x3CA)] if code not in (0x3A2, 0x3C2)},
})  # fmt: skip
_POWERS = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻ⁿ]+")
_LOW = re.compile("[₀₁₂₃₄₅₆₇₈₉ₙ]+")
_VULGAR = re.compile("(\\d?)([¼½¾⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞])")
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_SUPERSCRIPT = re.compile(r"<sup>([^<>]*)</sup>")
_ZERO = re.compile(r"(?<=[^\W\d_])0+(?=[^\W\d_])|\b0(?=[^\W\d_]{2,})")  # a scanner's O
_PER_CENT = re.compile(r"\bper\s+cent\b", re.IGNORECASE)
_LABEL = re.compile(
    r"(?m)(?:^|(?<=\s))(?:\(?[A-Ha-h]|\(\d{1,2}|\([ivx]{1,4})\)\s+|^[ \t]*\d{1,2}\)\s+|"
    r"^[ \t]*(?:[A-H]|\d{1,2})[.:](?=\s)"
)
_BULLET = re.compile(r"(?m)^[ \t]*[-*•][ \t]+(?=\S)")
_OPENING = re.compile(
    r"(?im)^\s*(?:#+\s*)?(?:question|problem|exercise|task|example|q)\s*(?:no\.?\s*)?#?[\d.]*\s*(?:\([^()\n]*\)\s*)?(?:[.:)]|$)"
)
_MARK = re.compile(r"<\|[^|<>]*\|>|\[/?INST\]|^\s*[-=_*#~]{3,}\s*$", re.MULTILINE)  # of a chat's turns, and rules
_LIST = re.compile(r"(?<=[a-zA-Z])\s*\(\d+(?:,\d+)+\)|[{\[]\d+(?:,\d+)+\\?[}\]]")  # gcd(252,198): no thousands
_RATIO = re.compile(r"(?<=\d)\s?:\s?(?=\d(?!\d))")  # 5:3, and not 12:30
_LENGTH = "km|kilometers?|kilometres?|meters?|metres?|miles?|mi|ft|feet|liters?|litres?|gallons?|pages|words"
_SPEED = re.compile(
    rf"\b(?:({_LENGTH})\s*/\s*(h|hr|hrs|hour|min|minute|s|sec|second|day)|m\s*/\s*(s)|(mph)|(kmh|kph))\b"
)
_PACE = {"h": "hour", "hr": "hour", "hrs": "hour", "min": "minute", "s": "second", "sec": "second"}


def flat(text: str) -> str:
    """Characters in one writing; LaTeX as plain signs."""
    text = _POWERS.sub(lambda m: "^" + unicodedata.normalize("NFKC", m[0]).replace("−", "-"), text)
    text = _LOW.sub(lambda m: "_" + unicodedata.normalize("NFKC", m[0]), text)
    text = _VULGAR.sub(lambda m: (m[1] + " " if m[1] else "") + unicodedata.normalize("NFKC", m[2]), text)
    text = _MARK.sub(" ; ", text)
    if "<" in text or "&" in text:
        text = html.unescape(_TAG.sub(" ", _SUPERSCRIPT.sub(r"^{\1}", text)))
    text = _PER_CENT.sub("percent", _ZERO.sub(lambda m: "o" * len(m[0]), text))
    text = unicodedata.normalize("NFKC", text).translate(_SIGNS)
    text = _LABEL.sub(" ; ", _OPENING.sub(" ; ", text, count=1))
    if len(_BULLET.findall(text)) > 1:  # one alone is a minus where a line was broken
        text = _BULLET.sub(" ; ", text)
    text = " ".join(text.split())
    if _MARKED.search(text):
        text = _without_latex(text)
    text = _RATIO.sub(" ", _LIST.sub(lambda m: m[0].replace(",", ", "), text))
    text = text.replace("**", "^" if re.search(r"\w\*\*\d", text) else " ").replace("$", " ").replace("`", " ")
    text = _SPEED.sub(_spoken_speed, re.sub(r"\(\s*(-?(?:[\d.]+|[^\W\d]\w*))\s*\)", r" \1 ", text))
    return text.casefold()


def _without_latex(text: str) -> str:
    for _ in range(_DEEP):
        before = text
        for pattern, new in _RULES:
            text = pattern.sub(new, text)
        if text == before:
            break
    for pattern, new in _LAST:  # not before what stood inside of other braces has been read
        text = pattern.sub(new, text)
    return text


def _spoken_speed(match: re.Match[str]) -> str:
    length, pace, second, miles, _ = match.groups()
    if length:
        return f"{length} per {_PACE.get(pace, pace)}"
    return "m per second" if second else "mile per hour" if miles else "km per hour"
