"""What is known of the model that a stage will be given, when nothing but the recipe has been read: its config.

A folder's config.json can be read at once, and that of a model that is made here follows from its shape. What a package
carries is known when it is unpacked; then the stage that begins from it asks the same questions of what came.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ottava.checkpoint.source import package_of
from ottava.engine.room import lacking
from ottava.errors import OttavaError, RecipeError
from ottava.models import layers
from ottava.recipe import Spec
from ottava.trainer.supervised import Lora

Config = Mapping[str, Any]
Unmet = tuple[tuple[str, ...], str, str]
"""The field, what is wrong, how to mend it: as `recipe.Spec.unmet` says it."""


def so_far(before: Mapping[str, Spec]) -> Config | None:
    """The config of the model that the stages before have made; None where it is not known yet, or there is none."""
    if (start := before.get("start")) is not None:
        return of_source(str(getattr(start, "source", "")))
    found: Config | None = None
    for name, spec in before.items():
        fresh = found is None or getattr(spec, "harvest", None) is not None
        if name.partition("-")[0] == "train" and fresh:
            found = spec.shape.config(0)  # type: ignore[attr-defined]
    return found


def of_source(source: str) -> Config | None:
    """The config of a folder; None of a package, and where it cannot be read: whoever begins from it says why."""
    from ottava.checkpoint.layouts import read_config  # loads torch, and sections of recipes are read without

    if package_of(source) is not None:
        return None
    try:
        return read_config(Path(source).expanduser())
    except OttavaError:
        return None


def context_of(config: Config | None) -> int | None:
    """Ids that a model holds; None where that is not known."""
    said = None if config is None else config.get("max_position_embeddings")
    return said if isinstance(said, int) else None


def unadaptable(lora: Lora | None, config: Config | None) -> Unmet | None:
    """What keeps adapters from a model: peft is not there, or the model has no such layers."""
    if lora is None:
        return None
    if find_spec("peft") is None:
        what = "adapters (lora) need the package peft, which is not installed"
        return ("lora",), what, "pip install -e '.[reason]'"
    known = None if config is None else layers.linear(config)
    wrong = None if known is None else layers.missing(lora.targets, known)
    return wrong and (("lora", "targets"), *wrong)


def too_long(reply: int | None, config: Config | None, field: tuple[str, ...] = ("max_new",)) -> Unmet | None:
    """A reply of so many ids that does not fit into a model's context behind any question. field: who says so many."""
    context = context_of(config)
    wrong = None if reply is None or context is None else lacking(reply, context)
    return wrong and (field, *wrong)


def require(found: Unmet | None, key: str) -> None:
    """The same of a model that is there, where a stage starts. key: the section. Raises RecipeError."""
    if found is not None:
        field, what, fix = found
        raise RecipeError(what, where=".".join((key, *field)), fix=fix)
