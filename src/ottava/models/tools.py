"""How model families write calls of tools into their text, and how such text is read back as it streams.

A call that is half understood is worse than none: an agent would run it. So text is a call only where it is one
whole, of a tool that was offered, with a JSON object of arguments; whatever else was written stays content, to the
last letter. What a family does differently is data (`FORMS`); which form a checkpoint's template uses is found out
by having it render a call and reading that back, never by the model's name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple, NoReturn


@dataclass(frozen=True)
class Form:
    """The text of calls: opening, then for each call begin, name and arguments, end; then closing.

    between: what parts the name from the arguments; None: both are in one JSON object, as `name` and `arguments`.
    padding: what stands inside a call at both ends, gap: between two calls, as the family's templates write them.
    """

    name: str
    begin: str
    end: str
    between: str | None = None
    opening: str = ""
    closing: str = ""
    padding: str = ""
    gap: str = ""

    @property
    def marks(self) -> tuple[str, ...]:
        """The texts that mark calls; in some tokenizers each is a token of its own."""
        found = (self.opening, self.begin, self.between, self.end, self.closing)
        return tuple(mark for mark in found if mark)

    def write(self, calls: Collection[Call]) -> str:
        """The text of calls."""
        return self.opening + self.gap.join(map(self._one, calls)) + self.closing

    def _one(self, call: Call) -> str:
        name = json.dumps(call.name, ensure_ascii=False)
        joined = f'{{"name": {name}, "arguments": {call.arguments}}}'
        body = joined if self.between is None else call.name + self.between + call.arguments
        return self.begin + self.padding + body + self.padding + self.end


FORMS = (
    Form("qwen", "<tool_call>", "</tool_call>", padding="\n", gap="\n"),
    Form(
        "deepseek",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
    ),
)
"""qwen: Hermes, Qwen2.5 and Qwen3. deepseek: DeepSeek-V3.1, whose marks have fullwidth bars (U+FF5C) and U+2581."""


class Call(NamedTuple):
    """A call of a tool. arguments: the JSON text of an object, as the model wrote it."""

    name: str
    arguments: str


class State(NamedTuple):
    """What of a reply is still undecided. held: text that may be part of a call; after: what was read last."""

    held: str = ""
    after: str = ""  # "": content, or nothing; "call"; "closing"


def step(form: Form, offered: Collection[str], state: State, text: str, final: bool) -> tuple[State, list[str | Call]]:
    """Read further text: the new state, and the content and calls that are certain now, in their order.

    White space before a call, and behind the last one, is layout and left out, and so are opening and closing around
    calls. final: nothing follows. A pure function; the pieces of any cut of a text join to those of the whole text.
    """
    held, after = state.held + text, state.after
    out: list[str | Call] = []
    while True:
        if after == "call" and form.closing and held.lstrip().startswith(form.closing):
            held, after = held.lstrip()[len(form.closing) :], "closing"
        at = held.find(form.begin)
        if at < 0:
            break
        lead = _lead(form, held[:at])
        end = _end(form, held, at + len(form.begin))
        if end is None and not final:
            return State(_give(out, held, lead), "" if lead else after), out
        call = None if end is None else _read(form, offered, held[at + len(form.begin) : end])
        if call is None or end is None:  # no call: its first mark is content like any other text
            held, after = _give(out, held, at + len(form.begin)), ""
            continue
        held = _give(out, held, lead)[at - lead + end - at + len(form.end) :]
        out.append(call)
        after = "call"
    keep = len(held) if final else _open(form, held, after)
    if final and after and not held.strip():
        return State(), out
    rest = _give(out, held, keep)
    return State(rest, "" if keep and held[:keep].strip() else after), out


def read(form: Form, offered: Collection[str], text: str) -> tuple[str, list[Call]]:
    """The content and the calls of a whole text."""
    _, found = step(form, offered, State(), text, True)
    return "".join(item for item in found if isinstance(item, str)), [i for i in found if isinstance(i, Call)]


def _give(out: list[str | Call], held: str, count: int) -> str:
    """Let the first `count` characters go as content; what is left."""
    if count:
        out.append(held[:count])
    return held[count:]


def _lead(form: Form, before: str) -> int:
    """Where the layout in front of a call begins."""
    bare = before.rstrip()
    if form.opening and bare.endswith(form.opening):
        bare = bare[: -len(form.opening)].rstrip()
    return len(bare)


def _open(form: Form, held: str, after: str) -> int:
    """How much of a text without a call's beginning cannot belong to one, whatever follows."""
    if after == "call" and form.closing.startswith(held.strip()):
        return 0
    bare = held[: len(held) - _overlap(held, form.begin)]
    starts = [_lead(form, bare)]
    if form.opening:
        starts.append(len(held[: len(held) - _overlap(held, form.opening)].rstrip()))
    return min(starts)


def _overlap(text: str, mark: str) -> int:
    """The longest end of a text with which the mark may begin, short of the whole mark."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)


_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"', re.DOTALL)


def _end(form: Form, held: str, start: int) -> int | None:
    """Where the mark stands that ends a call: the first one that is not inside a JSON string."""
    at = held.find(form.end, start)
    while at >= 0 and '"' in _STRING.sub("", held[start:at]):
        at = held.find(form.end, at + 1)
    return None if at < 0 else at


def _read(form: Form, offered: Collection[str], body: str) -> Call | None:
    if form.between is None:
        found = _members(body) or {}
        name = found.get("name", "null")
        call = Call(json.loads(name), found.get("arguments", "")) if found.keys() == {"name", "arguments"} else None
    else:
        name, mark, arguments = body.partition(form.between)
        call = Call(name.strip(), arguments.strip()) if mark else None
    if call is None or not isinstance(call.name, str) or call.name not in offered:
        return None
    return call if _members(call.arguments) is not None else None


def _members(text: str) -> dict[str, str] | None:
    """The members of a JSON object as they are written; None where the text is none, or a member stands there twice."""
    try:
        if not isinstance(_DECODER.decode(text), dict):
            return None
    except (ValueError, RecursionError):
        return None
    found: dict[str, str] = {}
    at = _skip(text, text.index("{") + 1)
    while text[at] != "}":
        key, at = _DECODER.raw_decode(text, at)
        start = _skip(text, _skip(text, at) + 1)  # behind the colon
        _, at = _DECODER.raw_decode(text, start)
        if key in found:
            return None
        found[key] = text[start:at]
        at = _skip(text, at)
        at = _skip(text, at + 1) if text[at] == "," else at
    return found


def _skip(text: str, at: int) -> int:
    while text[at] in " \t\n\r":
        at += 1
    return at


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_constant)
