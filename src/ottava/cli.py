"""The command line: parses, calls, prints. Exit 0 good, 1 the answer is no, 2 a user's mistake, 3 an internal fault."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
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

Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on standard output.")]


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as recipes/tiny.yaml.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a value: train.steps=300.")] = None,
    only: Annotated[str | None, typer.Option(help="Do just this stage.")] = None,
    until: Annotated[str | None, typer.Option(help="Stop after this stage.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; by default runs/NAME.")] = None,
    as_json: Json = False,
) -> None:
    """Carry out a recipe; stopped at any moment, the same command goes on where it was."""
    from ottava import platforms, runner, stages
    from ottava.console import report
    from ottava.console.terminal import Terminal
    from ottava.errors import OttavaError
    from ottava.recipe import load_recipe
    from ottava.supervisor.local import LocalLauncher

    loaded = load_recipe(recipe, stages.specs(), set_ or (), platforms.names())
    folder = out or Path("runs") / loaded.name
    with Terminal(list(loaded.stages)) as terminal:
        try:
            runner.run(loaded, folder, LocalLauncher, terminal, only=only, until=until)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                terminal.console.print("stopped; the same command goes on where it was")
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
    source: Annotated[Path, typer.Argument(help="A Hugging Face folder in BF16 or FP32.")],
    out: Annotated[Path, typer.Argument(help="Where to write the UE8M0-FP8 master.")],
    as_json: Json = False,
) -> None:
    """Turn a model into the UE8M0-FP8 master, and say whether that rounded it."""
    from ottava.checkpoint.convert import convert as convert_folder

    result = convert_folder({"source": str(source), "out": str(out)})
    _show(result, as_json)


@app.command()
def verify(
    first: Annotated[Path, typer.Argument(help="A model folder, in any layout.")],
    second: Annotated[Path, typer.Argument(help="Another, in any layout.")],
    as_json: Json = False,
) -> None:
    """Prove that two folders hold the same values, or name the tensors that differ."""
    from ottava.verify.weights import compare

    result = compare(first, second)
    _show(result, as_json)
    if not result["equal"]:
        raise typer.Exit(1)


@app.command()
def serve(
    model: Annotated[Path, typer.Argument(help="A model folder: BF16 or UE8M0-FP8.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free one.")] = 8000,
    host: Annotated[str, typer.Option(help="Loopback by default.")] = "127.0.0.1",
    name: Annotated[str | None, typer.Option(help="The model's name; by default the folder's.")] = None,
) -> None:
    """Serve a model over the OpenAI API, thinking on or off; SIGTERM drains."""
    from ottava.gateway.server import serve as serve_folder

    serve_folder({"model": str(model), "port": port, "host": host, "name": name, "announce": True})


@app.command()
def chat(
    question: Annotated[str, typer.Argument(help="What to ask.")],
    url: Annotated[str, typer.Option(help="A server started with ottava serve.")] = "http://127.0.0.1:8000",
    thinking: Annotated[bool | None, typer.Option("--thinking/--direct", help="Reason first or not.")] = None,
) -> None:
    """Ask a server and print the answer as it comes, reasoning first."""
    from ottava.gateway.client import ask

    last = None
    for part, text in ask(url, question, thinking):
        if part != last:
            typer.echo(("" if last is None else "\n") + f"{part}: ", nl=False)
            last = part
        typer.echo(text, nl=False)
    typer.echo()


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine can do, and at which level of evidence."""
    from ottava.platforms.doctor import examine

    _show(examine(), as_json)


def _print(content: Any) -> None:
    sys.stdout.write(json.dumps(content) + "\n")


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print(result)
        return
    for key, value in result.items():
        typer.echo(f"{key:>16}  {value if isinstance(value, str) else json.dumps(value)}")


def main() -> NoReturn:
    """Entry point: every outcome becomes one message and an exit code."""
    from ottava.errors import OttavaError, from_os_error

    try:
        code = app(standalone_mode=False) or 0  # click hands back the code of an Exit
    except OttavaError as error:
        code = _say(error.render(), error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        mended = from_os_error(error, "working")
        code = _say(mended.render(), mended.exit_code)
    except Exception as error:
        code = _unexpected(error)
    sys.exit(code)


def _unexpected(error: Exception) -> int:
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
