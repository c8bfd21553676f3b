"""The commands of runs: carry one out, drill, supervise, admit a chip, measure a model, look at this machine."""

from __future__ import annotations

import os
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ottava.cli.shared import Json, Ray, folder, printed, show


class Split(StrEnum):
    """The side of a task's problems."""

    test = "test"
    train = "train"
    all = "all"


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
        printed(content)
    else:
        terminal.console.print(report.text(content), markup=False)
        terminal.console.print(f"report: {folder / 'report.html'}", markup=False)


def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, such as runs/tiny.")],
    as_json: Json = False,
) -> None:
    """Sum up a run: what was proven, how, and what was a rehearsal."""
    from ottava.console import report

    content = report.build(run_folder)
    if as_json:
        printed(content)
    else:
        report.write(run_folder)
        typer.echo(report.text(content))
        typer.echo(f"report: {run_folder / 'report.html'}")


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
        printed(result)
    else:
        typer.echo("\n".join([drill_table(result), *remarks(result)]))
    if result["broken"]:
        raise typer.Exit(1)


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
        show(commands.supervise(run), as_json)


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
        printed(report)
    else:
        typer.echo(table(report))
    if not report["passed"]:
        raise typer.Exit(1)


def evaluate(
    model: Annotated[Path, folder("MODEL", "A model folder.")],
    other: Annotated[Path | None, folder("[OTHER]", "Another, to compare with it, problem by problem.")] = None,
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
    for one in (model, other):
        if one is not None:
            check_folder(one)
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
        printed(shown)
    else:
        typer.echo(measures.text(shown))


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
        printed(result) if as_json else typer.echo(model_text(result))
        if result["verdict"] == "no":
            raise typer.Exit(1)
    elif code is not None:
        from ottava.console.terminal import ties_table
        from ottava.platforms.lockin import scan

        found = scan(code)
        if as_json:
            printed(found)
        else:
            typer.echo(ties_table(found))
    else:
        from ottava.console.examined import machine_text
        from ottava.platforms.doctor import examine

        about = examine()
        printed(about) if as_json else typer.echo(machine_text(about))
