"""The commands of model folders: convert, prove equal, sign, say what a chip can serve, which students fit."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ottava.cli.shared import AllowOther, Engines, Json, VllmPython, folder, printed, show


class Layout(StrEnum):
    """How the weights are written down; the values are the same."""

    e8m0 = "e8m0"
    deepseek = "deepseek"
    mxfp8 = "mxfp8"
    bf16 = "bf16"


class Rounding(StrEnum):
    """How values off the grid are put on it."""

    nearest = "nearest"
    gptq = "gptq"


def convert(
    source: Annotated[Path, folder("SOURCE", "A Hugging Face folder: BF16, FP16, FP32 or FP8.")],
    out: Annotated[Path, folder("OUT", "The folder to write.")],
    layout: Annotated[Layout, typer.Option(help="How the same values are written down.")] = Layout.e8m0,
    rounding: Annotated[Rounding, typer.Option(help="gptq: fewer errors, from calibration text.")] = Rounding.nearest,
    calibration: Annotated[
        Path | None, typer.Option(help="Text for --rounding gptq; built-in texts by default.")
    ] = None,
    for_: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="An engine; refuse what it would load wrongly, write what it wants: "
            "transformers, vllm, vllm-cpu, vllm-ascend.",
        ),
    ] = None,
    allow_lossy: Annotated[bool, typer.Option("--allow-lossy", help="Round FP8 again, and mark the result.")] = False,
    kl: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Measure the KL from the source on this text.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads; by default one a core, at most 4.")] = None,
    as_json: Json = False,
) -> None:
    """Write a model as UE8M0 FP8, in any layout, and say whether that rounded it; stopped, it goes on where it was."""
    from ottava.console.terminal import BYTES, work_bar
    from ottava.errors import RecipeError

    args: dict[str, Any] = {"source": str(source), "out": str(out), "layout": layout.value, "allow_lossy": allow_lossy}
    args |= {"engine": for_, "workers": workers}
    if kl is not None:
        from ottava.verify.numerics import windows_of

        windows_of(source, kl)  # what is wrong with the text is told before the work
    parts = [("rounding", "layers")] if rounding is Rounding.gptq else []
    with work_bar(*parts, ("converting", BYTES)) as (*layers, progress):
        if rounding is Rounding.gptq:
            from ottava.models.calibrate import convert_calibrated

            result = convert_calibrated(
                args | {"text": None if calibration is None else str(calibration)}, progress, *layers
            )
        elif calibration is not None:
            raise RecipeError(
                "calibration text is for --rounding gptq", where="--calibration", fix="add --rounding gptq"
            )
        else:
            from ottava.checkpoint.convert import convert as convert_folder

            result = convert_folder(args, progress)
    if kl is not None:
        from ottava.verify.numerics import record_divergence

        result = record_divergence(source, out, kl)
    for warning in result["warnings"]:
        typer.echo(f"warning: {warning}", err=True)
    show(result if as_json else {key: value for key, value in result.items() if key != "warnings"}, as_json)


def verify(
    first: Annotated[Path, folder("FIRST", "A model folder, in any layout.")],
    second: Annotated[Path, folder("SECOND", "Another, in any layout.")],
    certificate: Annotated[Path | None, typer.Option(help="Write a signed certificate here if they are equal.")] = None,
    key: Annotated[Path | None, typer.Option(help="The private key to sign with; see ottava keygen.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads; by default one a core, at most 4.")] = None,
    as_json: Json = False,
) -> None:
    """Prove that two folders hold the same values, or name the first faulty tensor, its block and the likely cause."""
    from ottava.console.terminal import BYTES, comparison, work_bar
    from ottava.errors import RecipeError
    from ottava.verify.weights import compare

    if (certificate is None) != (key is None):
        raise RecipeError(
            "a certificate needs a file to be written to and a key to be signed with",
            where="--certificate, --key",
            fix="give both; ottava keygen FILE makes a key",
        )
    if certificate is not None and not certificate.resolve().parent.is_dir():
        raise RecipeError("there is no folder to write the certificate to", where=certificate, fix="make it first")
    with work_bar(("comparing", BYTES)) as (progress,):
        result = compare(first, second, workers=workers, progress=progress)
    identical = result["verdict"] == "identical"
    if identical and certificate is not None and key is not None:
        from ottava.verify import certificate as certificates

        certificates.write(certificate, certificates.sign(result, key, folders=(first, second)))
    if as_json:
        printed(result)
    else:
        typer.echo(comparison(result))
    if not identical:
        raise typer.Exit(1)


def parity(
    models: Annotated[list[Path], folder("MODEL...", "Folders of one model.")],
    reference: Annotated[
        Path | None, typer.Option(help="The folder that they are held against; by default the first.")
    ] = None,
    allow_other_values: AllowOther = False,
    engine: Engines = None,
    vllm_python: VllmPython = None,
    as_json: Json = False,
) -> None:
    """Say of each folder whether a backend of it may serve beside the reference, and if not, what differs."""
    from ottava.gateway.parity import certify, text

    result = certify(models, reference, other_values=allow_other_values, engines=engine or (), vllm_python=vllm_python)
    if as_json:
        printed(result)
    else:
        typer.echo(text(result))
    if not all(row["passed"] for row in result["backends"]):
        raise typer.Exit(1)


def keygen(
    path: Annotated[Path, typer.Argument(help="Where to write the private key (PEM, readable by you only).")],
) -> None:
    """Make an Ed25519 key for certificates; prints the public key, which ottava serve --trust takes."""
    from ottava.verify.certificate import new_key

    typer.echo(new_key(path))


def targets(
    model: Annotated[Path, folder("MODEL", "A UE8M0 FP8 folder.")],
    chip: Annotated[str | None, typer.Option(help="One chip by name; by default all.")] = None,
    as_json: Json = False,
) -> None:
    """Which layout each chip can serve, exactly or lossily, and how many blocks of this model that touches."""
    from ottava.checkpoint.targets import examine
    from ottava.console.terminal import targets_table

    result = examine(model, chip)
    if as_json:
        printed(result)
    else:
        typer.echo(targets_table(result))


def students(
    chips: Annotated[str, typer.Option(help="A file of chips' figures.")] = "chips.json",
    work: Annotated[str, typer.Option(help="A file of students and of what they are trained on.")] = "students.json",
    as_json: Json = False,
) -> None:
    """R1's six students at their real sizes: memory, chips, hours and cost of training each, extrapolated."""
    from ottava.console.terminal import students_table
    from ottava.planner import chips as catalogue
    from ottava.planner import students as planner

    rows = planner.plan(planner.load(catalogue.locate(work)), catalogue.load(catalogue.locate(chips)))
    if as_json:
        printed({"students": rows})
    else:
        typer.echo(students_table(rows))
