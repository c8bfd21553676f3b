"""The stages of the chain, one file each, in the order in which they run.

A new stage is a new file with VERSION, INPUTS, Spec and run, and its name in ORDER. Reinforcement
and distillation will stand between `train` and `convert`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol, cast

from ottava.artifact import Artifact
from ottava.context import Context
from ottava.recipe import Spec

ORDER = ("plan", "qualify", "label", "train", "convert", "verify", "serve")


class Stage(Protocol):
    """What a stage's module offers. INPUTS: stages whose artifacts it needs; `?name` only if in the recipe.

    A stage that takes long may have CARE, too: see `care`.
    """

    VERSION: str
    INPUTS: tuple[str, ...]
    Spec: type[Spec]

    def run(self, spec: Any, inputs: Mapping[str, Artifact], ctx: Context) -> Artifact: ...


def load(name: str) -> Stage:
    """The module of a stage in ORDER."""
    return cast(Stage, importlib.import_module(f"ottava.stages.{name}"))


def care(name: str) -> frozenset[str] | None:
    """The fields of a stage's section that may change while its work goes on, as may its pools; None: none may."""
    found: frozenset[str] | None = getattr(load(name), "CARE", None)
    return found


def specs() -> dict[str, type[Spec]]:
    """The Spec of every stage, in order."""
    return {name: load(name).Spec for name in ORDER}
