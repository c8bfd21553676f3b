"""The command line: parses, calls, prints. Exit 0 good, 1 the answer is no, 2 a user's mistake, 3 an internal fault."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

app = typer.Typer(
    name="ottava",
    help="Train where it is stable, serve where you must: one model, two chip families, the same bits.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


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


class Split(StrEnum):
    """The side of a task's problems."""

    test = "test"
    train = "train"
    all = "all"


def _folder(metavar: str, help: str) -> Any:
    """An argument that names a folder: a name that is empty would be taken for the working folder."""

    def read(text: str) -> Path:
        if not text.strip():
            from ottava.errors import RecipeError

            raise RecipeError("an empty name names no folder", where=metavar, fix="name a folder; this one is .")
        return Path(text)

    return typer.Argument(metavar=metavar, help=help, parser=read)


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


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as recipes/tiny.yaml.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a value: train.steps=300.")] = None,
    only: Annotated[str | None, typer.Option(help="Do just this stage.")] = None,
    until: Annotated[str | None, typer.Option(help="Stop after this stage.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; by default runs/NAME.")] = None,
    ray: Ray = None,
    as_json: Json = False,
) -> None:
    """Carry out a recipe; stopped at any moment, the same command goes on where it was."""
    from ottava import platforms, runner, stages
    from ottava.console import report
    from ottava.console.terminal import Terminal
    from ottava.errors import OttavaError
    from ottava.recipe import load_recipe
    from ottava.supervisor.launch import cluster_for, launcher_for

    loaded = load_recipe(recipe, stages.specs(), set_ or (), platforms.names())
    folder, pools = out or Path("runs") / loaded.name, loaded.fleet.pools
    with cluster_for(ray, pools) as where, Terminal(list(loaded.stages)) as terminal:
        try:
            runner.run(loaded, folder, launcher_for(where.address, pools), terminal, only=only, until=until)
        except BaseException:
            with suppress(OttavaError):  # the first error is the one to tell
                report.write(folder)
            raise
    report.write(folder)
    content = report.build(folder)
    if as_json:
        _print(content)
    else:
        terminal.console.print(report.text(content), markup=False)
        terminal.console.print(f"report: {folder / 'report.html'}", markup=False)


@app.command("report")
def report_command(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, such as runs/tiny.")],
    as_json: Json = False,
) -> None:
    """Sum up a run: what was proven, how, and what was a rehearsal."""
    from ottava.console import report

    content = report.build(run_folder)
    if as_json:
        _print(content)
    else:
        report.write(run_folder)
        typer.echo(report.text(content))
        typer.echo(f"report: {run_folder / 'report.html'}")


@app.command()
def convert(
    source: Annotated[Path, _folder("SOURCE", "A Hugging Face folder: BF16, FP16, FP32 or FP8.")],
    out: Annotated[Path, _folder("OUT", "The folder to write.")],
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
    _show(result if as_json else {key: value for key, value in result.items() if key != "warnings"}, as_json)


@app.command()
def verify(
    first: Annotated[Path, _folder("FIRST", "A model folder, in any layout.")],
    second: Annotated[Path, _folder("SECOND", "Another, in any layout.")],
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
        _print(result)
    else:
        typer.echo(comparison(result))
    if not identical:
        raise typer.Exit(1)


@app.command()
def drill(
    recipe: Annotated[Path, typer.Argument(help="A recipe with a label and a train stage.")],
    seeds: Annotated[
        str, typer.Option(help="FIRST:END; every seed is one run, and chooses its class of fault.")
    ] = "0:12",
    faults: Annotated[str, typer.Option(help="all, or classes by name with commas; see docs/faults.md.")] = "all",
    stage: Annotated[str, typer.Option(help="Which stage is rehearsed: train, reinforce or distill.")] = "train",
    steps: Annotated[int, typer.Option(min=16, help="Steps of each run.")] = 24,
    out: Annotated[
        Path, typer.Option(help="Where to run; a run that broke a guarantee leaves its folder here.")
    ] = Path("runs/drill"),
    ray: Ray = None,
    as_json: Json = False,
) -> None:
    """Rehearse faults on a recipe before the real run; exit 1 if any guarantee breaks."""
    from ottava import platforms, runner, stages
    from ottava.console.terminal import drill_bar, drill_table
    from ottava.recipe import load_recipe
    from ottava.supervisor import campaign
    from ottava.supervisor.drill import POOLS
    from ottava.supervisor.launch import cluster_for, launcher_for
    from ottava.supervisor.outcome import remarks

    loaded = load_recipe(recipe, stages.specs(), (), platforms.names())
    campaign.check(loaded, stage)
    asked, names = campaign.seeds_of(seeds), campaign.names_of(faults, stage)
    with cluster_for(ray, POOLS) as where:
        campaign.fits(where, names)
        with campaign.alone(out):
            label = runner.one_stage(loaded, "label", out / "data", launcher_for(None))
            with drill_bar() as progress:
                result = campaign.run(loaded, label, steps, asked, names, out, progress, where.address, stage)
    if as_json:
        _print(result)
    else:
        typer.echo("\n".join([drill_table(result), *remarks(result)]))
    if result["broken"]:
        raise typer.Exit(1)


@app.command()
def supervise(
    command: Annotated[list[str], typer.Argument(help="What to run, after --: python train.py.")],
    out: Annotated[Path, typer.Option(help="Where its states, logs, journal and diagnoses go.")],
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes to start, with torchrun's variables; 1 by default.")
    ] = None,
    fleet: Annotated[
        Path | None, typer.Option(help="A fleet, whose pools are tried in turn; instead of --workers.")
    ] = None,
    restarts: Annotated[int, typer.Option(min=0, help="Failures that a pool may have.")] = 3,
    hang: Annotated[float, typer.Option(help="Seconds without a step that are a hang at first; inf: never.")] = 600.0,
    hang_least: Annotated[
        float, typer.Option(min=0, help="Later 3 times the slowest steps' time, but no less than this.")
    ] = 60.0,
    ray: Ray = None,
    as_json: Json = False,
) -> None:
    """Run any training command under supervision; it starts again after a fault. See docs/protocol.md."""
    from ottava import platforms
    from ottava.artifact import make_folder
    from ottava.errors import RecipeError
    from ottava.journal import Journal
    from ottava.recipe import Pool, load_fleet
    from ottava.supervisor import command as commands
    from ottava.supervisor.launch import cluster_for, launcher_for

    count = workers or 1
    if count & (count - 1):
        raise RecipeError("workers come in powers of two", where="--workers", fix="take 1, 2, 4, 8, ...")
    if workers is not None and fleet is not None:
        raise RecipeError("a fleet says how many workers each pool has", where="--workers", fix="leave out one of both")
    if not hang > 0:
        raise RecipeError(f"{hang} is no time", where="--hang", fix="give seconds above 0, or inf for never")
    pools = (Pool(name="local", workers=count),) if fleet is None else load_fleet(fleet, platforms.names()).pools
    commands.check(command)
    care = commands.Care(restarts=restarts, hang_s=hang, hang_least_s=min(hang, hang_least))
    with cluster_for(ray, pools) as where, launcher_for(where.address, pools)() as launcher:
        make_folder(out)
        run = commands.Run(command, pools, out, Journal(out / "journal.jsonl"), launcher, care)
        _show(commands.supervise(run), as_json)


@app.command()
def qualify(
    fleet: Annotated[Path, typer.Option(help="A fleet file, such as fleets/laptop.yaml.")],
    pool: Annotated[str, typer.Option(help="The pool to examine.")],
    recipe: Annotated[Path | None, typer.Option(help="A recipe, whose message sizes are sent.")] = None,
    soak: Annotated[str, typer.Option(help="How long all work at once: 60s, 5m, 2h.")] = "60s",
    hours: Annotated[float | None, typer.Option(help="Of the planned run; by default the recipe's budget.")] = None,
    hang: Annotated[str, typer.Option(help="After how long without a step a worker hangs.")] = "30s",
    out: Annotated[Path | None, typer.Option(help="Write qualification.json and calibration.json here.")] = None,
    ray: Ray = None,
    plant: Annotated[list[str] | None, typer.Option(hidden=True, help="A fault to plant: KIND:CHIP.")] = None,
    as_json: Json = False,
) -> None:
    """Examine a pool before a run: which of its workers may run, how fast, and will it last; exit 1 if one fails."""
    from ottava import platforms, stages
    from ottava.artifact import make_folder, write_json
    from ottava.console.qualified import qualify_bar, table
    from ottava.qualify import command, plants
    from ottava.qualify.gate import Terms
    from ottava.recipe import load_fleet, load_recipe
    from ottava.supervisor.launch import cluster_for, launcher_for

    loaded = load_fleet(fleet, platforms.names())
    chosen = loaded.pool(pool)
    asked = None if recipe is None else load_recipe(recipe, stages.specs(), (), platforms.names())
    planted = tuple(plants.parse(text, chosen.workers).model_dump() for text in plant or ())
    terms = Terms(command.seconds_of(soak, "--soak"), command.seconds_of(hang, "--hang"), plants=planted)
    command.check_hours(hours)
    if out is not None:
        make_folder(out)
    with (
        cluster_for(ray, (chosen,)) as where,
        launcher_for(where.address, (chosen,))() as launcher,
        qualify_bar(pool) as told,
    ):
        report = command.qualify(launcher, loaded, chosen, terms, asked, hours, told)
    if out is not None:
        write_json(out / "qualification.json", report)
        write_json(out / "calibration.json", {"train": [], "qualify": [report["calibration"]]})
    if as_json:
        _print(report)
    else:
        typer.echo(table(report))
    if not report["passed"]:
        raise typer.Exit(1)


@app.command()
def keygen(
    path: Annotated[Path, typer.Argument(help="Where to write the private key (PEM, readable by you only).")],
) -> None:
    """Make an Ed25519 key for certificates; prints the public key, which ottava serve --trust takes."""
    from ottava.verify.certificate import new_key

    typer.echo(new_key(path))


@app.command()
def targets(
    model: Annotated[Path, _folder("MODEL", "A UE8M0 FP8 folder.")],
    chip: Annotated[str | None, typer.Option(help="One chip by name; by default all.")] = None,
    as_json: Json = False,
) -> None:
    """Which layout each chip can serve, exactly or lossily, and how many blocks of this model that touches."""
    from ottava.checkpoint.targets import examine
    from ottava.console.terminal import targets_table

    result = examine(model, chip)
    if as_json:
        _print(result)
    else:
        typer.echo(targets_table(result))


@app.command()
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
        _print({"students": rows})
    else:
        typer.echo(students_table(rows))


@app.command()
def plan(
    jobs: Annotated[Path, typer.Argument(help="A portfolio of jobs, such as fleets/r2-jobs.yaml.")],
    fleet: Annotated[Path, typer.Option(help="An inventory of chips, such as fleets/deepseek.yaml.")],
    seconds: Annotated[float, typer.Option(min=1, help="How long the solver may search.")] = 30.0,
    workers: Annotated[int, typer.Option(min=0, help="Threads of the solver; 0: one a core, at most 8.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write plan.json and plan.html into this folder.")] = None,
    points: Annotated[int, typer.Option(min=0, help="Points of the cost/time curve in plan.html.")] = 5,
    why: Annotated[bool, typer.Option("--why", help="Also print the reason for every decision.")] = False,
    as_json: Json = False,
) -> None:
    """Place a portfolio of jobs on a fleet over weeks; a recipe's own stages are planned by ottava run --only plan."""
    from ottava.console import planning

    result = planning.plan(jobs, fleet, seconds=seconds, workers=workers, out=out, points=points)
    if as_json:
        _print(result)
    else:
        typer.echo(planning.plan_text(result, why=why))
    if not result["assignments"]:
        raise typer.Exit(1)


@app.command()
def dossier(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.json of ottava plan --out or --json.")],
    out: Annotated[Path | None, typer.Option(help="Write dossier.md and dossier.html into this folder.")] = None,
    evidence: Annotated[list[Path] | None, typer.Option(help="What qualify measured: qualification.json.")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="How long each question may be searched.")] = 10.0,
    as_json: Json = False,
) -> None:
    """For every foreign chip that a plan asks for: why no domestic one does it, and what would have to change."""
    from ottava.console import planning

    result, text = planning.dossier(plan, out=out, evidence=evidence or (), seconds=seconds)
    if as_json:
        _print(result)
    else:
        typer.echo(text)


@app.command()
def forecast(
    run: Annotated[Path, typer.Argument(help="A run to forecast, such as fleets/r2-run.yaml.")],
    by: Annotated[str | None, typer.Option(help="Another date than the file's: 2025-08-31.")] = None,
    draws: Annotated[int, typer.Option(min=100, help="Simulated runs.")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="Of the simulation.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write forecast.html into this folder.")] = None,
    as_json: Json = False,
) -> None:
    """The probability that a run, and the release behind it, is there by a date; what makes it late; the fallback's
    price."""
    from ottava.console import planning

    result = planning.forecast(run, by=by, draws=draws, seed=seed, out=out)
    if as_json:
        _print(result)
    else:
        typer.echo(planning.forecast_text(result))


@app.command()
def pick(
    memory: Annotated[str | None, typer.Option(help="Of the machine: '24 GB'; for a chip, its own.")] = None,
    speed: Annotated[str | None, typer.Option(help="What one reader is to get: '20 tokens/s'.")] = None,
    chip: Annotated[str | None, typer.Option(help="A chip of chips.json; by default all.")] = None,
    bandwidth: Annotated[str | None, typer.Option(help="Of a machine that is in no file: '100 GB/s'.")] = None,
    chips: Annotated[int, typer.Option(min=1, help="How many of them hold one copy.")] = 1,
    context: Annotated[int, typer.Option(min=1, help="Tokens that a request holds.")] = 8192,
    as_json: Json = False,
) -> None:
    """Which of R1's six students fits a memory and a speed, on which chip, in which layout."""
    from ottava.console import planning

    result = planning.pick(memory, speed, chip, bandwidth, chips, context)
    if as_json:
        _print(result)
    else:
        typer.echo(planning.pick_text(result))
    if not result["choice"]:
        raise typer.Exit(1)


@app.command()
def predict(
    rows: Annotated[Path, typer.Argument(metavar="ROWS", help="Work, in the shape of fleets/published_runs.json.")],
    chips: Annotated[str, typer.Option(help="A file of chips' figures.")] = "chips.json",
    calibration: Annotated[Path | None, typer.Option(help="What ottava calibrate wrote; fleets/ by default.")] = None,
    as_json: Json = False,
) -> None:
    """Speed of training, reinforcement, distillation or serving, with its 80% interval and memory; or why not."""
    from ottava.console import estimates
    from ottava.planner.predict import predict_file

    found, warnings = predict_file(rows, chips, calibration)
    told = [estimates.row(prediction, ignored) for prediction, ignored in found]
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)
    if as_json:
        _print({"rows": told})
    else:
        typer.echo(estimates.table(told))


@app.command()
def calibrate(
    rows: Annotated[
        list[Path] | None, typer.Argument(metavar="[ROWS]...", help="Files of runs of your own, with their speeds.")
    ] = None,
    chips: Annotated[str, typer.Option(help="A file of chips' figures.")] = "chips.json",
    out: Annotated[Path, typer.Option(help="The calibration to write.")] = Path("fleets/calibration.json"),
    plot: Annotated[Path | None, typer.Option(help="Also draw prediction against actual here, as SVG.")] = None,
    as_json: Json = False,
) -> None:
    """Fit the prediction to published runs and your own; print how good it is on sources it has not seen."""
    from ottava.artifact import replacing
    from ottava.console import estimates
    from ottava.console.terminal import work_bar
    from ottava.errors import RecipeError
    from ottava.planner.calibrate import calibrate_files

    for place in (out, plot):
        if place is not None and not place.absolute().parent.is_dir():
            raise RecipeError("there is no folder to write to", where=place, fix="make it first")
    with work_bar(("sources left out", "share")) as (told,):
        made, guesses = calibrate_files(rows or [], chips, out, lambda share: told(int(100 * share), 100))
    if plot is not None:
        with replacing(plot) as scratch:
            scratch.write_text(str(estimates.against_actual(guesses)), encoding="utf-8")
    if as_json:
        _print({"runs": made.runs, "sigma": made.sigma, "accuracy": made.accuracy, "out": str(out)})
    else:
        typer.echo(estimates.accuracy_table(made.accuracy))


@app.command()
def cost(
    name: Annotated[str, typer.Argument(help="A bill by name: deepseek-v3, deepseek-r1-rl.")],
    bills: Annotated[str, typer.Option(help="A file of bills and of the fleet that paid them.")] = "bills.json",
    as_json: Json = False,
) -> None:
    """What a published run cost: its hours at a rent, beside its share of the fleet that was bought."""
    from ottava.console import estimates
    from ottava.planner.bills import bill

    result = bill(name, bills)
    if as_json:
        _print(result)
    else:
        typer.echo(estimates.bill_text(result))


@app.command()
def serve(
    models: Annotated[list[Path], _folder("MODEL...", "Folders of one model: BF16, UE8M0-FP8, other chips' layouts.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free one.")] = 8000,
    host: Annotated[str, typer.Option(help="Loopback by default.")] = "127.0.0.1",
    name: Annotated[str | None, typer.Option(help="The model's name; by default the first folder's.")] = None,
    replicas: Annotated[
        int | None,
        typer.Option(min=1, help="Backends of each folder, in processes that are watched; by default one, in this."),
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="Of each folder, in order: vendor=ascend,price=1.5 (of a million ids).")
    ] = None,
    engine: Engines = None,
    vllm_python: VllmPython = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Start the backends on nodes of a Ray cluster: HOST:PORT of its head, auto: this machine's, local: "
            "one of two nodes that is started here, for a rehearsal. See docs/ray.md.",
        ),
    ] = None,
    ray_resources: Annotated[
        list[str] | None,
        typer.Option(
            help="What a backend takes of its node, for all folders or of each in order: GPU=8, NPU=8,CPU=4, ...; by "
            "default a CPU, or a chip for each of its parallel ranks."
        ),
    ] = None,
    policy: Annotated[
        str, typer.Option(help="Which backend is asked: balanced, domestic, cheapest, fastest.")
    ] = "balanced",
    reference: Annotated[
        Path | None, typer.Option(help="The folder that backends are held against; by default the first.")
    ] = None,
    canary: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share of the replies that another backend scores again; by default 0.02."),
    ] = None,
    allow_other_values: AllowOther = False,
    slots: Annotated[int, typer.Option(min=1, help="Requests at a time of each backend.")] = 4,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; the next gets 503.")] = 16,
    queue_wait: Annotated[
        float | None,
        typer.Option(
            min=0, help="Seconds that a request may wait for a slot, then it gets 503; by default --deadline."
        ),
    ] = None,
    backend_wait: Annotated[
        float, typer.Option(min=0, help="Seconds that a request waits for a backend while none runs, then it gets 503.")
    ] = 60.0,
    keys: Annotated[Path | None, typer.Option(help="A file of NAME SHA256 lines: who may ask.")] = None,
    at_once: Annotated[int, typer.Option(min=0, help="Requests at a time of one key; 0: no limit.")] = 0,
    a_minute: Annotated[int, typer.Option(min=0, help="Requests a minute of one key; 0: no limit.")] = 0,
    deadline: Annotated[float, typer.Option(min=1, help="Seconds that an answer may take.")] = 3600.0,
    hung_after: Annotated[
        float | None,
        typer.Option(min=0.1, help="Seconds after which a backend that does not answer is started anew; 10."),
    ] = None,
    still_after: Annotated[
        float | None,
        typer.Option(
            min=1, help="The same of one that has work and says no id, 300: its longest prompt must take less."
        ),
    ] = None,
    certificate: Annotated[Path | None, typer.Option(help="Serve only the values that this certificate names.")] = None,
    trust: Annotated[
        list[str] | None,
        typer.Option(help="A public key that may have signed: its 64 hexadecimal digits, or its PEM file (KEY.pub)."),
    ] = None,
) -> None:
    """Serve a model over the OpenAI API, thinking on or off; SIGTERM drains."""
    from ottava.gateway.server import serve as serve_folders
    from ottava.supervisor.launch import LOCAL, cluster_for, room

    args = {"models": [str(model) for model in models], "port": port, "host": host, "name": name, "announce": True}
    args |= {"replicas": replicas, "labels": label or [], "policy": policy, "slots": slots, "queue": queue}
    args |= {"queue_s": queue_wait, "wait_s": backend_wait}
    args |= {"reference": reference and str(reference), "canary": canary, "other_values": allow_other_values}
    args |= {"engines": engine or [], "vllm_python": vllm_python}
    args |= {"keys": keys and str(keys), "at_once": at_once, "a_minute": a_minute, "deadline_s": deadline}
    patience = {"hung": hung_after, "still": still_after}
    args |= {"patience": {name: seconds for name, seconds in patience.items() if seconds is not None}}
    args |= {"certificate": None if certificate is None else str(certificate), "trust": trust or []}
    if ray == LOCAL:
        pools, ray_resources = room(len(models) * (replicas or 1), ray_resources)
    else:
        pools = []
    with cluster_for(ray, pools) as where:
        serve_folders(args | {"ray": where.address, "ray_resources": ray_resources or []})


@app.command()
def parity(
    models: Annotated[list[Path], _folder("MODEL...", "Folders of one model.")],
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
        _print(result)
    else:
        typer.echo(text(result))
    if not all(row["passed"] for row in result["backends"]):
        raise typer.Exit(1)


@app.command()
def chat(
    question: Annotated[
        str | None, typer.Argument(help="What to ask; by default a conversation, or what is piped in.")
    ] = None,
    url: Annotated[str, typer.Option(help="A server started with ottava serve.")] = "http://127.0.0.1:8000",
    thinking: Annotated[bool | None, typer.Option("--thinking/--direct", help="Reason first or not.")] = None,
) -> None:
    """Ask a server and print the answer as it comes, reasoning first; without a QUESTION, talk with it.

    The server's key, where it wants one, is read from the environment variable OTTAVA_API_KEY.
    """
    from ottava.errors import DataError
    from ottava.gateway.client import ask

    if question is None and sys.stdin.isatty():
        from ottava.gateway.terminal import converse

        return converse(url, thinking)
    if question is None:
        question = sys.stdin.read()
    if not question.strip():
        raise DataError("the question is empty", where="QUESTION", fix='ask something: ottava chat "7 a +5 b *3 ="')
    last = None
    for part, text in ask(url, question, thinking):
        if part != last:
            typer.echo(("" if last is None else "\n") + f"{part}: ", nl=False)
            last = part
        typer.echo(text, nl=False)
    typer.echo()


@app.command()
def evaluate(
    model: Annotated[Path, _folder("MODEL", "A model folder.")],
    other: Annotated[Path | None, _folder("[OTHER]", "Another, to compare with it, problem by problem.")] = None,
    task: Annotated[
        str | None, typer.Option(help="chains, gym:chain_sum, maths:FILE, code:FILE; by default that of --problems.")
    ] = None,
    problems: Annotated[Path | None, typer.Option(help="Ask all problems of this data set (test.jsonl).")] = None,
    n: Annotated[
        int | None,
        typer.Option(
            min=1, help="Problems to ask; by default 500 of a task, fewer where it has no more, and all of --problems."
        ),
    ] = None,
    levels: Annotated[str | None, typer.Option(help="Their numbers of steps: 2,3,4; by default all.")] = None,
    split: Annotated[
        Split | None, typer.Option(help="The side of the task's split, by default test: no training saw it.")
    ] = None,
    k: Annotated[int | None, typer.Option(min=1, help="Of pass@k; 4 by default, with 8 samples or more.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Replies drawn to each problem; 8 by default.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="Of these replies; 0: greedy ones only.")] = 1.0,
    thinking: Annotated[bool | None, typer.Option("--thinking/--direct", help="One mode; by default both.")] = None,
    budgets: Annotated[str | None, typer.Option(help="Ids of thinking allowed, for a curve: 8,16,32.")] = None,
    max_new: Annotated[int | None, typer.Option(min=1, help="Ids of a reply; at most 1024 by default.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the problems and of the samples.")] = 0,
    platform: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, npu.")] = "cpu",
    harness: Annotated[
        str | None, typer.Option(help="Ask lm-evaluation-harness too: ottava (these problems), or tasks of its own.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the result here, with a row for each problem.")] = None,
    as_json: Json = False,
) -> None:
    """Measure a model: pass@1 and pass@k, thinking and direct, with intervals; or two, by a paired test."""
    from ottava.artifact import write_json
    from ottava.console import measures
    from ottava.errors import RecipeError, check_file, check_folder
    from ottava.tasks import content, get

    if task is None and problems is None:
        raise RecipeError("there is nothing to ask", where="--task", fix="name a task, such as --task chains")
    if out is not None and not out.absolute().parent.is_dir():
        raise RecipeError("there is no folder to write the result to", where=out, fix="make it first")
    for folder in (model, other):
        if folder is not None:
            check_folder(folder)
    if problems is not None:
        check_file(problems)
        if split is not None:
            raise RecipeError("the problems of a file have no sides", where="--split", fix="leave --split out")

    from ottava.console.terminal import work_bar  # only now what takes seconds to import
    from ottava.engine import measure
    from ottava.gateway import harness as harnesses

    drawn = samples or (8 if temperature else 1)
    terms = measure.Terms(
        samples=drawn, k=k or max(1, min(4, drawn // 2)), temperature=temperature, seed=seed, thinking=thinking,
        budgets=tuple(measures.numbers(budgets, "--budgets")), max_new=max_new,
    )  # fmt: skip
    chosen = measures.numbers(levels, "--levels")
    if problems is None:
        asked_of = get(task or "")
        asked = measure.draw(asked_of, n or 500, seed, (split or Split.test).value, chosen)
    else:
        asked_of, asked = measure.read(problems, task)
        asked = measure.choose(asked, problems, n, seed, chosen)
    names = [] if harness is None else harness.split(",")
    if harness is not None:
        harnesses.check(names, asked_of)
    with work_bar(("asking", "replies")) as (told,):
        folders = [model] if other is None else [model, other]
        result = measure.measure_folders(folders, asked_of, asked, terms, platform, told)
    if (made_of := content.of(asked_of.NAME)) is not None:
        result["task_content"] = made_of
    if harness is not None:
        limits = {mode: figures["max_new"] for mode, figures in result["modes"].items()}
        result["harness"] = harnesses.run(model, names, asked_of, asked, limits, result["rows"])
    if out is not None:
        write_json(out, result)
    shown = measures.without_rows(result)
    if as_json:
        _print(shown)
    else:
        typer.echo(measures.text(shown))


@app.command()
def doctor(
    model: Annotated[Path | None, typer.Option(help="What this model needs of an Ascend chip; with --chip.")] = None,
    chip: Annotated[str | None, typer.Option(help="910B, 910C, 950PR, 950DT or 310P.")] = None,
    code: Annotated[Path | None, typer.Option(help="What ties this code base to CUDA, and what Ascend has.")] = None,
    as_json: Json = False,
) -> None:
    """What this machine can do, and at which level of evidence; or what a model or a code base needs on Ascend."""
    from ottava.errors import RecipeError
    from ottava.platforms.ascend.setup import AUTOLOAD

    os.environ.setdefault(AUTOLOAD, "0")  # a broken plug-in of torch is told of here, and must not stop the telling
    if (model is None) != (chip is None) or (model is not None and code is not None):
        raise RecipeError(
            "a model is held against a chip", where="--model, --chip, --code", fix="give --model and --chip, or --code"
        )
    if model is not None and chip is not None:
        from ottava.console.examined import model_text
        from ottava.models.migrate import probe

        result = probe(model, chip)
        _print(result) if as_json else typer.echo(model_text(result))
        if result["verdict"] == "no":
            raise typer.Exit(1)
    elif code is not None:
        from ottava.console.terminal import ties_table
        from ottava.platforms.lockin import scan

        found = scan(code)
        if as_json:
            _print(found)
        else:
            typer.echo(ties_table(found))
    else:
        from ottava.console.examined import machine_text
        from ottava.platforms.doctor import examine

        about = examine()
        _print(about) if as_json else typer.echo(machine_text(about))


def _print(content: Any) -> None:
    sys.stdout.write(json.dumps(content) + "\n")


def _show(result: dict[str, Any], as_json: bool) -> None:
    from ottava.console.terminal import listed

    if as_json:
        _print(result)
    else:
        typer.echo(listed(result))


label_app = typer.Typer(
    help="Labels: people only where machines disagree, and a certified error.", no_args_is_help=True
)
app.add_typer(label_app, name="label")


def _aside(line: str) -> None:
    typer.echo(line, err=True)


@label_app.command("replay")
def label_replay(
    world: Annotated[Path, typer.Argument(metavar="WORLD", help="A world.json: classes, annotators, items.")],
    target_error: Annotated[float, typer.Option(help="The 95% bound of the share of wrong labels is to reach this.")],
    seed: Annotated[int, typer.Option(min=0, help="Of the items that are drawn.")] = 0,
) -> None:
    """Run the labelling policy on a world: asks for votes on standard output, reads them from standard input.

    See docs/labels.md for the lines."""
    from ottava.errors import DataError
    from ottava.labels import replay
    from ottava.labels import world as worlds

    def say(line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    try:
        done = replay.replay(worlds.read(world), target_error, sys.stdin.buffer.readline, say, seed, _aside)
    except BrokenPipeError:  # elsewhere a reader may have had enough; here nothing is decided without one
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        what = "nobody reads the questions any more: nothing is decided"
        raise DataError(what, where="standard output", fix="keep both ends open until the line with 'done'") from None
    typer.echo(replay.told(done), err=True)


@label_app.command("clean")
def label_clean(
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="JSON Lines: question, problem, prompt, text or messages.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to make: data.jsonl, removed.jsonl, report.json.")],
    against: Annotated[
        list[Path] | None, typer.Option(help="A test set, JSON Lines, that must not be in the data; several times.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Take out what is there twice, and the test questions, however they are written (docs/labels.md)."""
    from ottava.labels.clean import clean

    _show(clean(data, against or [], out), as_json)


class Judged(StrEnum):
    """What is judged of a line."""

    right = "right"
    classes = "classes"
    pair = "pair"
    steps = "steps"


@label_app.command("evidence")
def label_evidence(
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="JSON Lines: question, response (or responses, steps), answer.")
    ],
    out: Annotated[Path, typer.Option(help="The world.json to write.")],
    annotator: Annotated[list[str], typer.Option(help="A person who can be asked; several times.")],
    kind: Annotated[
        Judged, typer.Option(help="right: right or wrong; classes: one of --class; pair: A or B; steps: each.")
    ] = Judged.right,
    name: Annotated[
        list[str] | None, typer.Option("--class", help="A class, with --kind classes; several times.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="The task whose verifier is asked, such as maths:DATA.")] = None,
    judge: Annotated[
        list[str] | None, typer.Option(help="An OpenAI-compatible address, http://HOST/v1; several times.")
    ] = None,
    model: Annotated[list[str] | None, typer.Option(help="The model of each judge, in order.")] = None,
    key_from: Annotated[str | None, typer.Option(help="The environment variable with the judges' key.")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="A folder that keeps answers, so that a stopped run goes on.")
    ] = None,
    at_once: Annotated[int, typer.Option(min=1, help="Questions under way at each judge.")] = 8,
    price: Annotated[
        list[str] | None, typer.Option(help="IN:OUT, of a million tokens, in any currency; one, or one for each judge.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(min=0.0, help="In the same currency: asking ends there; a higher one goes on.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Ask verifiers and machine judges about a data set, and write what they say for `ottava label replay`."""
    from ottava.errors import DataError
    from ottava.labels import gather

    urls, models = judge or [], model or []
    if len(urls) != len(models):
        raise DataError(
            f"{len(urls)} judges and {len(models)} models", where="--model", fix="name the model of each judge"
        )
    counts = gather.gather(
        data, out, kind.value, annotator, classes=name or (), task=task, judges=list(zip(urls, models, strict=True)),
        prices=price or (), budget=budget, key_from=key_from, cache=cache, at_once=at_once,
    )  # fmt: skip
    _show(counts, as_json)


@label_app.command("require")
def label_require(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A data set's folder, or a file in it.")],
    max_error: Annotated[float, typer.Option(min=0.0, max=1.0, help="The bound that is allowed.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Refuse a data set whose certificate bounds the share of wrong labels above a limit, or that has none: exit 2.

    Before any training command: ottava label require DATA --max-error 0.03 && ottava supervise -- ..."""
    from ottava.labels import bound

    found = bound.require(data, max_error)
    assert found is not None
    _show(vars(found), as_json)


_STORE = _folder("STORE", "The file that holds all: items, votes, decisions.")
_FORM = "jsonl, parquet, hf, labelstudio, argilla; by default what the name says."


@label_app.command("import")
def label_import(
    store: Annotated[Path, _STORE],
    file: Annotated[Path, _folder("FILE", "Items, with or without votes (docs/labels.md).")],
    form: Annotated[str | None, typer.Option("--format", help=_FORM)] = None,
    guideline: Annotated[Path | None, typer.Option(help="A text file: from now on people answer by it.")] = None,
    as_json: Json = False,
) -> None:
    """Add what is new in a file to a store (made if need be), all of it or nothing."""
    from ottava.labels import commands

    _show(commands.take(store, file, form, guideline), as_json)


@label_app.command("export")
def label_export(
    store: Annotated[Path, _STORE],
    out: Annotated[Path, _folder("OUT", "The file (for hf the folder) to write.")],
    form: Annotated[str | None, typer.Option("--format", help=_FORM)] = None,
    certificate: Annotated[Path | None, typer.Option(help="A certificate's JSON; it goes into store and card.")] = None,
    as_json: Json = False,
) -> None:
    """Write all that a store holds, also while it is served."""
    from ottava.labels import commands

    _show(commands.give(store, out, form, certificate), as_json)


@label_app.command("key")
def label_key(
    store: Annotated[Path, _STORE],
    name: Annotated[str, typer.Argument(help="Whose.")],
    lead: Annotated[bool, typer.Option("--lead", help="May adjudicate conflicts.")] = False,
    end: Annotated[bool, typer.Option("--end", help="End this person's key; what they said stays.")] = False,
) -> None:
    """Print a new key for a person, once: the store keeps only its SHA-256. The old one ends."""
    from ottava.labels import commands

    typer.echo(commands.key(store, name, lead, end))


@label_app.command("decide")
def label_decide(store: Annotated[Path, _STORE], as_json: Json = False) -> None:
    """Fuse all evidence to labels, and write down which votes each rests on."""
    from ottava.labels import commands

    _show(commands.decide(store), as_json)


@label_app.command("certify")
def label_certify(store: Annotated[Path, _STORE], as_json: Json = False) -> None:
    """Work out every certificate of `label serve --target-error` anew, from the votes in the store."""
    from ottava.labels import live

    found = live.certify(store)
    if as_json:
        _print({"certificates": found})
    else:
        typer.echo("\n".join(map(live.ended, found)))


@label_app.command("trace")
def label_trace(
    where: Annotated[Path, _folder("STORE|RUN", "A store, or the folder of a run.")],
    item: Annotated[str | None, typer.Argument(help="An item's id; of a run, a line's.")] = None,
    step: Annotated[int | None, typer.Option(help="Of a run: the lines that this training step learnt from.")] = None,
    stage: Annotated[str | None, typer.Option(help="Of a run: the stage that learnt.")] = None,
    as_json: Json = False,
) -> None:
    """Everything that made one label, and the training steps that learnt from it; or the lines of a step."""
    from ottava.errors import DataError
    from ottava.labels import commands

    if (item is None) == (step is None):
        raise DataError("name a line or a step", where="ITEM, --step", fix="ITEM, or of a run --step N; not both")
    if where.is_dir():
        from ottava.console import lineage

        its = lineage.Lineage(where, stage)
        found = its.line(item) if item is not None else its.step(step or 0)
        text = lineage.told(found)
    elif item is None or stage is not None:
        raise DataError("a store has no training steps", where=where, fix="name the folder of a run")
    else:
        found = commands.trace(where, item)
        text = commands.told(found)
    _print(found) if as_json else typer.echo(text)


@label_app.command("serve")
def label_serve(
    store: Annotated[Path, _STORE],
    port: Annotated[int, typer.Option(help="0 picks a free one.")] = 8010,
    host: Annotated[str, typer.Option(help="Loopback by default.")] = "127.0.0.1",
    target_error: Annotated[
        float | None, typer.Option(help="Ask and audit until it is certified that no more labels are wrong.")
    ] = None,
    votes: Annotated[int, typer.Option(min=1, help="Answers to each question in free text.")] = 1,
    suggestions: Annotated[
        bool, typer.Option("--suggestions", help="Show what machines say; such votes are not blind.")
    ] = False,
) -> None:
    """Serve the page on which people answer, by keyboard; Ctrl-C stops it."""
    from ottava.labels.serve import serve as serve_store

    args = {"store": str(store), "port": port, "host": host, "target": target_error, "votes": votes}
    serve_store(args | {"suggestions": suggestions})


STOPPED = 130
GO_ON = "stopped; the same command goes on where there is work to go on with"


def main() -> NoReturn:
    """Entry point."""
    _leave(outcome())


def outcome() -> int:
    """Do what the command line says: every outcome becomes one message and an exit code."""
    from ottava.errors import OttavaError, from_os_error

    try:
        code = app(standalone_mode=False) or 0  # click hands back the code of an Exit
        if code == STOPPED:  # typer's own word for Ctrl-C
            _say(GO_ON, STOPPED)
    except OttavaError as error:
        code = _say(error.render(), error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        code = _say(GO_ON, STOPPED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        mended = from_os_error(error, "working")
        code = _say(mended.render(), mended.exit_code)
    except Exception as error:
        code = _unexpected(error)
    return int(code)


def _leave(code: int) -> NoReturn:
    """End the process. Triton, which Transformers imports where it finds it, tells at the end of an interpreter of what
    its own bindings leaked: the user cannot mend that, so the interpreter's end is left out then."""
    if "triton" in sys.modules:
        import atexit

        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _unexpected(error: Exception) -> int:
    if isinstance(error, RuntimeError) and "Failed to load the backend extension" in str(error):
        from ottava.platforms.ascend.setup import broken_plugin

        return _say(broken_plugin(error).render(), 2)
    usage = getattr(error, "format_message", None)  # click's own errors
    if usage is not None:
        return _say(f"error: {usage()}\n  mend:  see ottava --help", 2)
    import traceback

    traceback.print_exc()
    return _say(f"internal fault: {error!r}\n  mend:  this is a defect of ottava; please report the lines above", 3)


def _say(message: str, code: int) -> int:
    sys.stderr.write(message + "\n")
    return code


if __name__ == "__main__":
    main()
