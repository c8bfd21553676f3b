"""The commands of planning: fleets, dossiers, forecasts, prices."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ottava.cli.shared import Json, printed


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
        printed(result)
    else:
        typer.echo(planning.plan_text(result, why=why))
    if not result["assignments"]:
        raise typer.Exit(1)


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
        printed(result)
    else:
        typer.echo(text)


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
        printed(result)
    else:
        typer.echo(planning.forecast_text(result))


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
        printed(result)
    else:
        typer.echo(planning.pick_text(result))
    if not result["choice"]:
        raise typer.Exit(1)


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
        printed({"rows": told})
    else:
        typer.echo(estimates.table(told))


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
        printed({"runs": made.runs, "sigma": made.sigma, "accuracy": made.accuracy, "out": str(out)})
    else:
        typer.echo(estimates.accuracy_table(made.accuracy))


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
        printed(result)
    else:
        typer.echo(estimates.bill_text(result))
