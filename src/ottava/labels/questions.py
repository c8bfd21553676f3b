"""The kinds of questions that people are asked, and what counts as an answer to each.

    right_wrong   content {question, answer}            "right" or "wrong"
    choice        content {question}, classes [...]     one of the classes
    pair          content {question, a, b}              "a", "b", "tie" or "both bad"
    text          content {question}                    a text
    steps         content {question, steps [...]}       a list as long as the steps: "right", "wrong", or null for one
                                                        that was not judged. Who only marks the first wrong step says
                                                        "right" up to it, "wrong" there, and null behind

Content may have more texts (a reference, a title): they are shown as they are. An answer is plain JSON, so that it can
be stored, compared and exchanged as text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ottava.artifact import canonical
from ottava.errors import DataError

KINDS = ("right_wrong", "choice", "pair", "text", "steps")
FIXED = {"right_wrong": ("right", "wrong"), "pair": ("a", "b", "tie", "both bad"), "steps": ("right", "wrong")}
NEEDED = {
    "right_wrong": ("question", "answer"), "choice": ("question",), "pair": ("question", "a", "b"),
    "text": ("question",), "steps": ("question", "steps"),
}  # fmt: skip
LONGEST_NAME = 200
"""Characters of an item's id, a class, an annotator's name or a vote's id."""
LONGEST_TEXT = 100_000
"""Characters of an answer in free text."""

Answer = str | list[str | None]
Content = dict[str, str | list[str]]


@dataclass(frozen=True)
class Item:
    """What is asked about. source: where it is from; gold: the answer, where it is known; opinions: what machines say
    of it, by their names (`verifier`, and any others: judges)."""

    id: str
    kind: str
    content: Content
    classes: tuple[str, ...] = ()
    source: str = ""
    gold: Answer | None = None
    opinions: dict[str, Answer] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 of what people see: two items of one id with different digests are different questions."""
        return digest(self.kind, self.content, self.classes)

    def answers(self) -> tuple[str, ...]:
        """The answers to choose from; none for free text."""
        return self.classes if self.kind == "choice" else FIXED.get(self.kind, ())


def digest(kind: str, content: Content, classes: Sequence[str]) -> str:
    """As `Item.digest`."""
    return hashlib.sha256(canonical({"kind": kind, "content": content, "classes": list(classes)})).hexdigest()


def parse(document: Any, where: str = "") -> Item:
    """An item from JSON {"id", "kind", "content", "classes", "source", "gold", "opinions"}. Raises DataError."""
    if not isinstance(document, dict):
        raise DataError("an item is a JSON object", where=where)
    kind, content = document.get("kind"), document.get("content")
    if kind not in KINDS:
        raise DataError(f"{kind!r} is no kind of question", where=where, fix=f"one of {', '.join(KINDS)}")
    name = check_name(document.get("id"), "id", where)
    classes = _classes(document.get("classes"), kind, where)
    source = "" if document.get("source") is None else document["source"]
    if not isinstance(source, str) or not writable(source):
        raise DataError("source must be a text", where=where)
    item = Item(name, kind, _content(content, kind, where), classes, source)
    gold = document.get("gold")
    opinions = document.get("opinions") or {}
    if not isinstance(opinions, dict):
        raise DataError("opinions are an object: who says what", where=where)
    return Item(
        item.id, item.kind, item.content, item.classes, item.source,
        None if gold is None else check(item, gold, f"{where} gold"),
        {check_name(who, "who", where): check(item, said, f"{where} opinions.{who}") for who, said in opinions.items()},
    )  # fmt: skip


def check(item: Item, answer: Any, where: str = "") -> Answer:
    """The answer itself, if it is one to this item. Raises DataError."""
    if item.kind == "steps":
        steps = item.content["steps"]
        if not isinstance(answer, list) or len(answer) != len(steps):
            raise DataError(f"an answer marks each of the {len(steps)} steps", where=where)
        if any(mark not in ("right", "wrong", None) for mark in answer) or not any(answer):
            raise DataError("a step is right, wrong or null, and one at least is judged", where=where)
        return answer
    if not isinstance(answer, str) or not writable(answer):
        raise DataError(f"an answer to {item.kind} is a text", where=where)
    if item.kind == "text":
        if not answer.strip() or len(answer) > LONGEST_TEXT:
            raise DataError(f"an answer has 1 to {LONGEST_TEXT} characters", where=where)
    elif answer not in item.answers():
        raise DataError(f"{answer!r} is none of {', '.join(item.answers())}", where=where)
    return answer


def fused_classes(item: Item) -> tuple[str, ...]:
    """The classes by which votes on items of this kind are fused; none where they cannot be.

    Traces are fused as a whole: right, or wrong somewhere.
    """
    return item.answers()


def fused_class(item: Item, answer: Answer) -> int | None:
    """The place of an answer among `fused_classes`; None: it says nothing there (free text, a trace judged in part)."""
    if isinstance(answer, list):
        return 1 if "wrong" in answer else None if None in answer else 0
    return item.answers().index(answer) if item.answers() else None


def first_wrong(marks: Sequence[str | None]) -> int | None:
    """The first step that is wrong, from 0, or None."""
    return next((k for k, mark in enumerate(marks) if mark == "wrong"), None)


def check_name(name: Any, what: str, where: str = "") -> str:
    """A name that is one. Raises DataError."""
    if not isinstance(name, str) or not name.strip() or len(name) > LONGEST_NAME or not writable(name):
        raise DataError(f"{what} must be a text of 1 to {LONGEST_NAME} characters, not {str(name)[:60]!r}", where=where)
    return name


def writable(text: str) -> bool:
    """Whether a text can be stored: no lone surrogates, and no NUL (at which other programs end a text)."""
    return "\0" not in text and not any("\ud800" <= letter <= "\udfff" for letter in text)


def written(answer: Answer) -> str:
    """An answer as it is stored."""
    return json.dumps(answer, ensure_ascii=False)


def _content(content: Any, kind: str, where: str) -> Content:
    if not isinstance(content, dict):
        raise DataError("content is an object of texts", where=where)
    for key in NEEDED[kind]:
        if key not in content:
            raise DataError(f"content of {kind} has no {key!r}", where=where)
    for key, value in content.items():
        texts = value if key == "steps" else [value]
        if (
            not isinstance(texts, list)
            or not texts
            or not all(isinstance(t, str) and writable(t) for t in [*texts, key])
        ):
            raise DataError(f"content.{key} must be {'a list of texts' if key == 'steps' else 'a text'}", where=where)
    return content


def _classes(classes: Any, kind: str, where: str) -> tuple[str, ...]:
    if kind != "choice":
        if classes:
            raise DataError(f"{kind} has its own answers, and takes no classes", where=where)
        return ()
    if not isinstance(classes, list) or len(classes) < 2:
        raise DataError("a choice has a list of at least two classes", where=where)
    names = tuple(check_name(name, "a class", where) for name in classes)
    if len(set(names)) < len(names):
        raise DataError("classes has the same name twice", where=where)
    return names
