"""What several commands share: options, arguments that name folders, and how results are printed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Start workers on a Ray cluster: HOST:PORT of its head, auto: this machine's, local: one that is started "
        "here, for a rehearsal. See docs/ray.md.",
    ),
]
AllowOther = Annotated[
    bool,
    typer.Option("--allow-other-values", help="A folder of other values, as FP8 rounded from BF16, may serve too."),
]
Engines = Annotated[
    list[str] | None,
    typer.Option(help="For all folders, or of each in order: embedded, vllm-cpu, vllm, vllm-ascend."),
]
VllmPython = Annotated[
    str | None, typer.Option(help="Python of vLLM's environment; else OTTAVA_VLLM_PYTHON, else .venv-vllm here.")
]
Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on standard output.")]


def folder(metavar: str, help: str) -> Any:
    """An argument that names a folder: a name that is empty would be taken for the working folder."""

    def read(text: str) -> Path:
        if not text.strip():
            from ottava.errors import RecipeError

            raise RecipeError("an empty name names no folder", where=metavar, fix="name a folder; this one is .")
        return Path(text)

    return typer.Argument(metavar=metavar, help=help, parser=read)


def printed(content: Any) -> None:
    sys.stdout.write(json.dumps(content) + "\n")


def show(result: dict[str, Any], as_json: bool) -> None:
    from ottava.console.terminal import listed

    if as_json:
        printed(result)
    else:
        typer.echo(listed(result))
