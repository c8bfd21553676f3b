"""What is to be labelled, and what machines already say about it.

A world is the JSON file of `ottava label replay`: {"classes": [label...], "annotators": [name...], "items": [{"id",
"verifier": label|null, "judges": [label|null...]}]}, and, where known, "seconds": {annotator: how long an answer takes
them}. It holds no truth and no votes: those are asked for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ottava.errors import DataError, check_file

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]
    Floats = NDArray[np.float64]

Label = str | int
LONGEST_S = 1e9
"""Seconds of an answer, beyond which a number is a slip and sums overflow."""
NOTHING = -1
"""Where a verifier or a judge says nothing."""


@dataclass(frozen=True)
class World:
    """verifier: [items], judges: [items, judges]; both hold places in `classes`, or NOTHING. seconds: [annotators], how
    long each takes for an answer, where that is known."""

    classes: tuple[Label, ...]
    annotators: tuple[Label, ...]
    ids: tuple[Label, ...]
    verifier: Ints
    judges: Ints
    seconds: Floats | None = None

    def __len__(self) -> int:
        return len(self.ids)


def read(path: Path) -> World:
    """The world in a file. Raises DataError naming the place of what is wrong."""
    if not path.exists() or path.is_dir():  # a pipe is read
        check_file(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # also bytes that are no text, and numbers without end
        raise DataError(f"this is not JSON: {error}", where=path) from None
    try:
        return parse(document)
    except DataError as error:
        place = f"{path}: {error.where}" if error.where else str(path)
        raise DataError(error.what, where=place, fix=error.fix) from None


def parse(document: Any) -> World:
    """Check a world and number its labels. Raises DataError."""
    import numpy as np

    if not isinstance(document, dict):
        raise DataError("a world is a JSON object with classes, annotators and items")
    classes = _names(document, "classes", 2)
    annotators = _names(document, "annotators", 1)
    items = document.get("items")
    if not isinstance(items, list) or not items:
        raise DataError("there must be a list of at least one item", where="items")
    places = {label: k for k, label in enumerate(classes)}
    verifier = np.full(len(items), NOTHING, np.int64)
    ids: dict[str, int] = {}
    said: list[list[int]] = []
    for i, item in enumerate(items):
        where = f"items[{i}]"
        if not isinstance(item, dict) or not _name(item.get("id")):
            raise DataError("an item is an object with an id (text or a whole number)", where=where)
        name = str(item["id"])
        if name in ids:
            raise DataError(f"the id {name!r} is already that of items[{ids[name]}]", where=where)
        ids[name] = i
        verifier[i] = _place(item.get("verifier"), places, f"{where}.verifier")
        opinions = [] if item.get("judges") is None else item["judges"]
        if not isinstance(opinions, list):
            raise DataError("judges is a list with a label, or null, of each judge", where=f"{where}.judges")
        said.append([_place(label, places, f"{where}.judges[{j}]") for j, label in enumerate(opinions)])
    count = len(said[0])
    for i, row in enumerate(said):
        if len(row) != count:
            raise DataError(
                f"{len(row)} judges here, and {count} at items[0]: which judge is missing cannot be told",
                where=f"items[{i}].judges",
                fix="write null where a judge said nothing",
            )
    judges = np.asarray(said, np.int64).reshape(len(items), count)
    seconds = _seconds(document.get("seconds"), annotators)
    return World(classes, annotators, tuple(item["id"] for item in items), verifier, judges, seconds)


def _seconds(given: Any, annotators: tuple[Label, ...]) -> Floats | None:
    """How long each takes, [annotators]; who is not named takes as long as the others on average."""
    import numpy as np

    if given is None:
        return None
    names = {str(name): a for a, name in enumerate(annotators)}
    if not isinstance(given, dict) or not given or set(given) - set(names):
        raise DataError("seconds is an object with a number for annotators that there are", where="seconds")
    out = np.full(len(annotators), np.nan)
    for name, value in given.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < LONGEST_S:
            what = f"a number above 0 is wanted, not {repr(value)[:40]}"
            raise DataError(what, where=f"seconds.{name}", fix="seconds, fewer than a thousand million")
        out[names[name]] = value
    return np.where(np.isnan(out), np.nanmean(out), out)


def _name(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


def _names(document: dict[str, Any], key: str, least: int) -> tuple[Label, ...]:
    names = document.get(key)
    if not isinstance(names, list) or len(names) < least or not all(_name(name) for name in names):
        raise DataError(f"{key} must be a list of at least {least} (texts or whole numbers)", where=key)
    if len({str(name) for name in names}) < len(names):
        raise DataError(f"{key} has the same name twice", where=key)
    return tuple(names)


def _place(label: Any, places: dict[Label, int], where: str) -> int:
    if label is None:
        return NOTHING
    if not _name(label) or label not in places:
        raise DataError(f"{label!r} is none of the classes ({', '.join(map(repr, places))})", where=where)
    return places[label]
