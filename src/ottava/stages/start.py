"""Begin from a model that is there: a Hugging Face folder, or one that an installed Python package carries.

Its files are copied into the artifact, so that a run can be repeated after the folder was changed. The stages after it
take it as the model so far, as they take one that was trained here.

    model/     the folder, or the unpacked file (see `checkpoint.packaged`)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field

from ottava import recipe
from ottava.artifact import Artifact
from ottava.checkpoint import source
from ottava.checkpoint.layouts import read_config
from ottava.context import Context
from ottava.errors import OttavaError, RecipeError
from ottava.models.chat import Chat

VERSION = "1"
INPUTS = ()
MODEL = True


class Spec(source.Source):
    """The start section of a recipe."""

    source: Annotated[str, Field(description="a Hugging Face folder, or package:NAME")]

    def unmet(self, name: str, stages: Mapping[str, recipe.Spec]) -> tuple[tuple[str, ...], str, str] | None:
        if self.package is not None:
            return None  # what is in a package is known when it is unpacked
        try:
            chat = Chat.load(Path(self.source).expanduser())
        except OttavaError:
            return None  # the stage says what is wrong with it
        found = _unable(chat, stages)
        return None if found is None else (("source",), *found)


def run(spec: Spec, inputs: Mapping[str, Artifact], ctx: Context) -> Artifact:
    """Copy or unpack the model, and see that it can be asked as later stages will. Raises CheckpointError,
    PlatformError, RecipeError."""
    model = ctx.out / "model"
    origin = source.bring(spec.source, model, ctx, "start.source")
    config, chat = read_config(model), Chat.load(model)
    if (found := _unable(chat, ctx.stages)) is not None:
        raise RecipeError(found[0], where=spec.source, fix=found[1])
    summary = {"source": origin, "model_type": config.get("model_type"), "thinking_switch": chat.thinking_key}
    return ctx.commit(summary)


def _unable(chat: Chat, stages: Mapping[str, recipe.Spec]) -> tuple[str, str] | None:
    """What is wrong, and how to mend it, where a stage asks for thinking and the model cannot be asked so."""
    asking = [name for name, stage in stages.items() if getattr(stage, "mode", "") == "thinking"]
    if not asking or chat.thinks:
        return None
    what = f"the model has no thinking switch, and {asking[0]!r} asks with thinking on"
    return what, "; ".join(f"set {name}.mode: direct" for name in asking)
