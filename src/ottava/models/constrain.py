"""What a reply may be, as a mask over the next id: JSON of a schema, or calls of the tools that were offered.

llguidance does the work: it has no dependencies, refuses what it cannot enforce, and counts its own steps, so that no
schema, however hostile, holds a thread for long. The state is a pure function of the spec and the ids that were said,
so that another engine can go on with a reply. What travels is the spec, as JSON text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ottava.errors import DataError
from ottava.models.tools import FORMS, Form

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ottava.models.chat import Chat

LARGEST = 1 << 16
"""Characters that a spec may have as JSON."""
LIMITS = {
    "max_items_in_row": 2_000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
"""Of llguidance: what compiling a grammar and computing one mask may take, in its own counts."""
WRITTEN = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False, "lenient": False}
"""How JSON is written: as json.dumps does, so no reply goes astray in white space. What is not known is a fault."""
_QUOTED = re.compile(r"^ *\d+ \||^ *\^+ *$")
_PLACE = re.compile(r"^at \d+\(\d+\): ")
EXTRA = "pip install 'ottava[serve]'"


def spec_of_json(schema: Mapping[str, Any], after: int | None = None) -> str:
    """The spec of content that is JSON of a schema. after: the id behind which content begins; None: at once."""
    return _spec({"after": after, "json": schema})


def spec_of_calls(
    form: Form, tools: Mapping[str, Mapping[str, Any]], *, many: bool, free: bool = False, after: int | None = None
) -> str:
    """The spec of content that is calls. tools: each name's schema of arguments; many: several calls may follow each
    other; free: text may stand before them, or instead of them."""
    return _spec({"after": after, "form": form.name, "calls": tools, "many": many, "free": free})


def _spec(said: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(said, ensure_ascii=False)
    except RecursionError:
        raise DataError("the schema is nested too deep") from None
    if len(text) > LARGEST:
        raise DataError(f"the schema has {len(text)} characters as JSON; {LARGEST} are allowed")
    return text


class Constraint:
    """The state of one reply under a spec. Not for several threads at once.

    Raises DataError where the spec cannot be enforced, or llguidance is missing.
    """

    def __init__(self, chat: Chat, spec: str):
        llguidance = _library()
        said = json.loads(spec)
        self._after: int | None = said["after"]
        self._stops = list(chat.stop_ids)
        limits = llguidance.LLParserLimits(**LIMITS)
        self._matcher = llguidance.LLMatcher(chat.constrained, _grammar(said, chat), log_level=0, limits=limits)
        self._check()

    def add(self, token: int) -> None:
        """The reply goes on with this id. Raises DataError where it may not."""
        if self._after is not None:
            self._after = None if token == self._after else self._after
        elif not self._matcher.consume_token(token):
            raise DataError(f"the id {token} may not stand here: {self._reason()}")

    def mask(self, logits: Tensor) -> Tensor:
        """Logits [V] with minus infinity in place of those that may not come next. Before content, only an end may not.

        Raises DataError where nothing may, or where the schema takes more work than `LIMITS` allow.
        """
        if self._after is not None:
            refused = torch.zeros_like(logits, dtype=torch.bool)
            refused[self._stops] = True
            return logits.masked_fill(refused, -torch.inf)
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        bits = torch.from_numpy(np.unpackbits(packed, bitorder="little")[: len(logits)]).bool()
        allowed = torch.zeros(len(logits), dtype=torch.bool)
        allowed[: len(bits)] = bits
        if not bool(allowed.any()):
            raise DataError("no reply of this model's vocabulary can satisfy the schema")
        return logits.masked_fill(~allowed.to(logits.device), -torch.inf)

    def _check(self) -> None:
        if "NoExtension" in self._reason():
            raise DataError("no reply of this model's vocabulary can satisfy the schema")
        if self._matcher.is_error():
            raise DataError(f"the schema cannot be enforced: {self._reason()}", fix="make it simpler")

    def _reason(self) -> str:
        """What llguidance says, without the lines of the grammar that it points at."""
        said = str(self._matcher.get_error()).removesuffix("<non-verbose/>")
        lines = [line.strip() for line in said.splitlines() if not _QUOTED.match(line)]
        return _PLACE.sub("", " ".join(filter(None, lines)))[:300]


def check(chat: Chat, spec: str) -> None:
    """Raises DataError where a reply cannot be constrained so."""
    at_once = json.dumps({**json.loads(spec), "after": None})
    Constraint(chat, at_once).mask(torch.zeros(len(token_bytes(chat))))


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise DataError("structured output needs llguidance, which is not installed", fix=EXTRA) from None
    return llguidance


# ---- grammars


def _grammar(said: Mapping[str, Any], chat: Chat) -> str:
    """In llguidance's form of Lark: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md"""
    if "json" in said:
        return f"start: {_json(said['json'])}"
    form = next(form for form in FORMS if form.name == said["form"])
    mark = {text: _mark(text, chat) for text in form.marks}
    lines = []
    for number, (name, schema) in enumerate(said["calls"].items()):
        if form.between is None:
            before, after = [_text(f'{form.padding}{{"name": {json.dumps(name)}, "arguments": ')], "}"
        else:
            before, after = [_text(form.padding + name), mark[form.between]], ""
        parts = [*before, f"args_{number}", _text(after + form.padding), mark[form.end]]
        lines += [f"body_{number}: {_joined(parts)}", f"args_{number}: {_json(schema)}"]
    lines.append("body: " + " | ".join(f"body_{number}" for number in range(len(said["calls"]))))
    lines.append(f"call: {mark[form.begin]} body")
    rest = [f"({_joined([_text(form.gap), 'call'])})*" if said["many"] else "", mark.get(form.closing, "")]
    calls = _joined([mark.get(form.opening, ""), "call", *rest])
    first = form.opening or form.begin
    if not said["free"]:
        lines.append(f"start: {calls}")
    elif mark[first].startswith("<["):
        lines += [f"start: TEXT ({calls})?", "TEXT: /(?s:.*)/"]
    else:  # a mark of several tokens ends the text wherever it comes to stand in it
        within = "/(?s:.*)" + "".join(f"\\x{{{ord(c):x}}}" for c in first)
        lines.append(f"start: TEXT | head {_joined(['call' if form.opening else 'body', *rest])}")
        lines += [f"head[lazy]: {within}/", f"TEXT: ~{within}(?s:.*)/"]
    return "\n".join(lines)


def _json(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": WRITTEN})


def _mark(text: str, chat: Chat) -> str:
    number = chat.control.get(text)
    return _text(text) if number is None else f"<[{number}]>"


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _joined(parts: Iterable[str]) -> str:
    return " ".join(part for part in parts if part)


# ---- vocabularies


def vocabulary(chat: Chat) -> Any:
    """A model's vocabulary as llguidance takes it. Raises DataError. About 0.2 s for 50,000 tokens: to be kept."""
    wrapped = _Vocabulary(chat)
    return _library().LLTokenizer(wrapped, n_vocab=len(wrapped.tokens), eos_token=list(chat.stop_ids))


class _Vocabulary:
    """The attributes that llguidance reads. Control tokens are special: no text is written with them."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, chat: Chat):
        self._chat = chat
        self.eos_token_id = chat.stop
        self.tokens = token_bytes(chat)
        self.special_token_ids = sorted({*chat.control.values(), *chat.stop_ids})
        self._special = set(self.special_token_ids)
        self._plain = {piece: i for i, piece in enumerate(self.tokens) if piece and i not in self._special}
        self._longest = max(map(len, self._plain), default=0)

    def __call__(self, text: str) -> list[int]:
        """How text that has to come is cut: as the tokenizer does, unless that has a control token or adds a space."""
        with suppress(DataError):
            ids = self._chat.encode(text)
            if self._special.isdisjoint(ids) and self._joined(ids) == text.encode():
                return ids
        return self._greedy(text.encode())

    def _joined(self, ids: Iterable[int]) -> bytes:
        return b"".join(self.tokens[i] for i in ids)

    def _greedy(self, text: bytes) -> list[int]:
        """The longest token each time; up to where there is none."""
        ids, at = list[int](), 0
        while at < len(text):
            sizes = range(min(self._longest, len(text) - at), 0, -1)
            found = next((self._plain[text[at : at + n]] for n in sizes if text[at : at + n] in self._plain), None)
            if found is None:
                break
            ids.append(found)
            at += len(self.tokens[found])
        return ids


def token_bytes(chat: Chat) -> list[bytes]:
    """`chat.pieces`. Raises DataError where there are none."""
    if chat.pieces is None:
        raise DataError(
            "structured output is not possible with this model's tokenizer: its tokens are not pieces of text"
        )
    return chat.pieces


def pieces(tokenizer: Tokenizer) -> list[bytes] | None:
    """What each id adds to a text; None where that depends on the ids around it. To be kept: see `Chat.pieces`."""
    decoder = json.loads(tokenizer.to_str())["decoder"] or {}
    kinds = {part["type"] for part in decoder.get("decoders", [decoder]) if "type" in part}
    if not kinds or kinds - {"ByteLevel", "Fuse", "ByteFallback", "Replace", "Strip", "Metaspace"}:
        return None
    words = tokenizer.get_vocab(with_added_tokens=True)
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    found = [b""] * (max(words.values()) + 1)
    for word, number in words.items():
        if "ByteLevel" in kinds:
            found[number] = _byte_level(word)
        elif word in added or kinds == {"Fuse"}:
            found[number] = word.encode()
        else:
            found[number] = _sentence_piece(word)
    return found


def _byte_level(word: str) -> bytes:
    letters = _letters()
    return bytes(letters[c] for c in word) if all(c in letters for c in word) else word.encode()


def _sentence_piece(word: str) -> bytes:
    if len(word) == 6 and word.startswith("<0x") and word.endswith(">"):
        return bytes([int(word[3:5], 16)])
    return word.replace("▁", " ").encode()


@cache
def _letters() -> dict[str, int]:
    """The letters with which byte-level vocabularies write bytes (Radford et al. 2019, GPT-2's `bytes_to_unicode`)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}
