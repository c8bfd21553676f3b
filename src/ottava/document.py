"""YAML that remembers where everything stood.

A message that says "line 14, column 5" saves a user more time than any other kindness. PyYAML's
`safe_load` forgets positions, reads `1e-5` as a string and `no` as False; so the document is
composed to nodes, scalars are resolved by YAML 1.2's core rules, and every key and value keeps its
position until pydantic has accepted it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from ottava.errors import RecipeError

Key = tuple[str | int, ...]
Model = TypeVar("Model", bound=BaseModel)

DEPTH = 50  # of nesting; no recipe needs more, and an alias inside itself has no end
_INT = re.compile(r"[-+]?[0-9]{1,1000}\Z")  # longer ones are infinite, as floats
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
_WORDS = {"": None, "~": None, "null": None, "true": True, "True": True, "false": False, "False": False}


@dataclass(frozen=True)
class Part:
    """Says of a mapping (in `Annotated`) that its keys are those of `model`, some of them: for messages."""

    model: type[BaseModel]


@dataclass
class Document:
    """Plain data and, for every path in it, where it stood (`file:line:column`)."""

    source: str
    data: Any
    keys: dict[Key, str] = field(default_factory=dict)
    values: dict[Key, str] = field(default_factory=dict)

    def where(self, path: Key, *, key: bool = False) -> str:
        """The position of the value at `path` (or of its key), or of its nearest known parent."""
        for end in range(len(path), -1, -1):
            table = self.keys if key and end == len(path) else self.values
            if path[:end] in table:
                return table[path[:end]]
        return self.source

    def get(self, path: Key) -> Any:
        """The data at `path`; KeyError where there is none."""
        data = self.data
        for part in path:
            data = data[part]
        return data

    def set(self, assignment: str, under: Key = ()) -> None:
        """Apply one `a.b=c` to the mapping at `under`; the value is YAML. Raises RecipeError."""
        where = f"--set {assignment}"
        name, equals, text = assignment.partition("=")
        parts = tuple(int(p) if p.isdecimal() else p for p in name.split("."))
        parts = (*under, *parts)
        if not equals or "" in parts:
            raise RecipeError("an assignment is written key.key=value", where=where, fix="e.g. --set train.steps=200")
        node = self.data
        for i, part in enumerate(parts[:-1]):
            if isinstance(node, dict) and part not in node:
                node[part] = {}
                self.keys[parts[: i + 1]] = self.values[parts[: i + 1]] = where
            try:
                node = node[part]
            except (KeyError, IndexError, TypeError):
                raise RecipeError(
                    f"there is no {'.'.join(map(str, parts[len(under) : i + 1]))!r} to set", where=where
                ) from None
        try:
            node[parts[-1]] = _plain(_compose(text, where), where, {}, {}, ())
        except (IndexError, TypeError):
            raise RecipeError(f"there is no {name!r} to set", where=where) from None
        for table in (self.keys, self.values):
            for stale in [k for k in table if k[: len(parts)] == parts]:
                del table[stale]
            table[parts] = where

    def parse(self, model: type[Model], path: Key = (), extra: dict[str, Any] | None = None) -> Model:
        """Validate the mapping at `path` as `model`; the first fault becomes a RecipeError with its position."""
        data = self.get(path)
        if data is None:
            data = {}
        if not isinstance(data, dict):
            raise RecipeError(f"expected a mapping, found {data!r}", where=self.where(path))
        try:
            return model.model_validate({**data, **(extra or {})})
        except ValidationError as error:
            raise self._explain(error, model, path) from None

    def _explain(self, error: ValidationError, model: type[BaseModel], path: Key) -> RecipeError:
        first = error.errors()[0]
        inner = tuple(part for part in first["loc"] if not (isinstance(part, str) and part.startswith("function-")))
        full = path + inner
        name = ".".join(map(str, inner)) or str(path[-1] if path else "document")
        if first["type"] == "extra_forbidden":
            known = _fields_at(model, inner[:-1])
            return RecipeError(
                f"unknown key {str(inner[-1])!r}", where=self.where(full, key=True), fix=suggest(str(inner[-1]), known)
            )
        if first["type"] == "missing":
            return RecipeError(
                f"the key {name!r} is missing", where=self.where(full[:-1]), fix=f"add {inner[-1]!r} with its value"
            )
        message = first["msg"].removeprefix("Value error, ")
        found = "" if isinstance(first["input"], dict) else f", found {first['input']!r}"
        return RecipeError(f"{name}: {message[0].lower() + message[1:]}{found}", where=self.where(full))


def suggest(word: str, known: Iterable[str]) -> str:
    """A sentence naming the nearest of `known`, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def read(path: Path | str, listed: str | None = None) -> Document:
    """Read a YAML file. Raises RecipeError where it is missing, unreadable or no mapping.

    listed: where the file is a list, the key under which it stands in the document.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError("no such file", where=path, fix="check the path") from None
    except IsADirectoryError:
        raise RecipeError("this is a folder, not a file", where=path, fix="name a file in it") from None
    except UnicodeDecodeError:
        raise RecipeError("the file is not text in UTF-8", where=path, fix="save it as UTF-8") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"cannot be read: {error}", where=path, fix="check the path and its permissions") from None
    node = _compose(text, str(path))
    keys: dict[Key, str] = {}
    values: dict[Key, str] = {}
    bare = listed is not None and isinstance(node, yaml.SequenceNode)
    data = _plain(node, str(path), keys, values, (listed,) if bare and listed else ())
    if bare and listed:
        data = {listed: data}
    if not isinstance(data, dict):
        what = "the file is empty" if data is None else "the file is not a mapping of keys to values"
        shape = "a JSON object" if path.suffix == ".json" else "`key: value` lines, as in recipes/tiny.yaml"
        raise RecipeError(what, where=path, fix=f"write {shape}")
    return Document(str(path), data, keys, values)


def _compose(text: str, source: str) -> yaml.Node | None:
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEPTH:
                raise _too_deep(_at(source, event.start_mark))
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        where = _at(source, error.problem_mark) if error.problem_mark else source
        raise RecipeError(f"not valid YAML: {error.problem}", where=where) from None
    except yaml.YAMLError as error:
        raise RecipeError(f"not valid YAML: {error}", where=source) from None


def _at(source: str, mark: Any) -> str:
    return f"{source}:{mark.line + 1}:{mark.column + 1}"


def _too_deep(where: str) -> RecipeError:
    return RecipeError(
        f"nested more than {DEPTH} deep", where=where, fix="nest less, and put no alias (*x) inside what it names (&x)"
    )


def _plain(node: yaml.Node | None, source: str, keys: dict[Key, str], values: dict[Key, str], path: Key) -> Any:
    if node is None:
        return None
    values[path] = _at(source, node.start_mark)
    if len(path) > DEPTH:
        raise _too_deep(values[path])
    if isinstance(node, yaml.MappingNode):
        out: dict[str, Any] = {}
        for key_node, value_node in node.value:
            at = _at(source, key_node.start_mark)
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError("a key is a list or a mapping", where=at, fix="write a word as the key")
            key = str(key_node.value)
            if key in out:
                raise RecipeError(f"the key {key!r} stands twice", where=at, fix="keep one of them")
            keys[(*path, key)] = at
            out[key] = _plain(value_node, source, keys, values, (*path, key))
        return out
    if isinstance(node, yaml.SequenceNode):
        return [_plain(child, source, keys, values, (*path, i)) for i, child in enumerate(node.value)]
    return _scalar(node)


def _scalar(node: yaml.Node) -> Any:
    text = str(node.value)
    if getattr(node, "style", None) in ("'", '"', "|", ">"):
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _INT.match(text):
        return int(text)
    return float(text) if _FLOAT.match(text) else text


def _fields_at(model: type[BaseModel], path: Key) -> list[str]:
    """The field names that are allowed at `path` inside `model`."""
    current: Any = model
    for part in path:
        fields = getattr(current, "model_fields", None)
        if fields is not None and part in fields:
            said = [known for known in fields[part].metadata if isinstance(known, Part)]
            current = said[0] if said else fields[part].annotation
        current = _unwrap(current)
    return list(getattr(current, "model_fields", {}))


def _unwrap(annotation: Any) -> Any:
    """The pydantic model inside Optional, list, tuple or dict annotations, or that a mapping is a part of."""
    if isinstance(annotation, Part):
        return annotation.model
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in reversed(get_args(annotation)):
        found = _unwrap(inner)
        if isinstance(found, type) and issubclass(found, BaseModel):
            return found
    return annotation
