"""The stages of the chain, one file each, in the order in which they run.

A new stage is a new file with VERSION, INPUTS, Spec and run, and its name in ORDER.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

from ottava.artifact import Artifact
from ottava.context import Context
from ottava.recipe import Spec

ORDER = (
    "plan", "qualify", "label", "problems", "start", "train", "reinforce", "train-2", "reinforce-2", "distill",
    "compare", "convert", "verify", "serve",
)  # fmt: skip
"""A name with a number is another round of the stage before the dash, in the same run."""

SO_FAR = {"@model": "a stage that makes a model", "@label": "a stage that gives problems"}
"""Inputs that are the artifact of the last stage before that made such a thing: one whose module has MODEL, or LABEL.
A stage gets them as `model` and `label`."""


class Stage(Protocol):
    """What a stage's module offers. INPUTS: stages whose artifacts it needs, or SO_FAR; `?name` only if in the recipe.

    A stage that makes a model has MODEL = True, one that gives problems LABEL = True. A stage that takes long may have
    CARE, too: see `care`.
    """

    VERSION: str
    INPUTS: tuple[str, ...]
    Spec: type[Spec]

    def run(self, spec: Any, inputs: Mapping[str, Artifact], ctx: Context) -> Artifact: ...


def load(name: str) -> Stage:
    """The module of a stage in ORDER."""
    return cast(Stage, importlib.import_module(f"ottava.stages.{name.partition('-')[0]}"))


def care(name: str) -> frozenset[str] | None:
    """The fields of a stage's section that may change while its work goes on, as may its pools; None: none may."""
    found: frozenset[str] | None = getattr(load(name), "CARE", None)
    return found


def resolve(wanted: str, name: str, names: Sequence[str]) -> tuple[str | None, str]:
    """The stage that the input `wanted` of stage `name` stands for, in a recipe with `names` in order; and what the
    input is called. None where the recipe has no such stage."""
    plain = wanted.removeprefix("?")
    if plain not in SO_FAR:
        return (plain if plain in names else None), plain
    called = plain.removeprefix("@")
    makers = [other for other in names[: names.index(name)] if getattr(load(other), called.upper(), False)]
    return (makers[-1] if makers else None), called


def specs() -> dict[str, type[Spec]]:
    """The Spec of every stage, in order."""
    return {name: load(name).Spec for name in ORDER}
