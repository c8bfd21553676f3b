"""The commands of labels: world to certificate, store, queue."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ottava.cli.shared import Json, folder, printed, show

app = typer.Typer(help="Labels: people only where machines disagree, and a certified error.", no_args_is_help=True)


def _aside(line: str) -> None:
    typer.echo(line, err=True)


_MOST = typer.Option(help="Votes at most, as a multiple of two on every item and a third where they differ.")


@app.command("replay")
def replay(
    world: Annotated[Path, typer.Argument(metavar="WORLD", help="A world.json: classes, annotators, items.")],
    target_error: Annotated[float, typer.Option(help="The 95% bound of the share of wrong labels is to reach this.")],
    seed: Annotated[int, typer.Option(min=0, help="Of the items that are drawn.")] = 0,
    most_votes: Annotated[float, _MOST] = 0.95,
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
        done = replay.replay(worlds.read(world), target_error, sys.stdin.buffer.readline, say, seed, most_votes, _aside)
    except BrokenPipeError:  # elsewhere a reader may have had enough; here nothing is decided without one
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        what = "nobody reads the questions any more: nothing is decided"
        raise DataError(what, where="standard output", fix="keep both ends open until the line with 'done'") from None
    typer.echo(replay.told(done), err=True)


@app.command("clean")
def clean(
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

    show(clean(data, against or [], out), as_json)


class Judged(StrEnum):
    """What is judged of a line."""

    right = "right"
    classes = "classes"
    pair = "pair"
    steps = "steps"


@app.command("evidence")
def evidence(
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
    show(counts, as_json)


@app.command("require")
def require(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A data set's folder, or a file in it.")],
    max_error: Annotated[float, typer.Option(min=0.0, max=1.0, help="The bound that is allowed.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Refuse a data set whose certificate bounds the share of wrong labels above a limit, or that has none: exit 2.

    Before any training command: ottava label require DATA --max-error 0.03 && ottava supervise -- ..."""
    from ottava.labels import bound

    found = bound.require(data, max_error)
    assert found is not None
    show(vars(found), as_json)


_STORE = folder("STORE", "The file that holds all: items, votes, decisions.")
_FORM = "jsonl, parquet, hf, labelstudio, argilla; by default what the name says."


@app.command("import")
def take(
    store: Annotated[Path, _STORE],
    file: Annotated[Path, folder("FILE", "Items, with or without votes (docs/labels.md).")],
    form: Annotated[str | None, typer.Option("--format", help=_FORM)] = None,
    guideline: Annotated[Path | None, typer.Option(help="A text file: from now on people answer by it.")] = None,
    as_json: Json = False,
) -> None:
    """Add what is new in a file to a store (made if need be), all of it or nothing."""
    from ottava.labels import commands

    show(commands.take(store, file, form, guideline), as_json)


@app.command("export")
def export(
    store: Annotated[Path, _STORE],
    out: Annotated[Path, folder("OUT", "The file (for hf the folder) to write.")],
    form: Annotated[str | None, typer.Option("--format", help=_FORM)] = None,
    certificate: Annotated[Path | None, typer.Option(help="A certificate's JSON; it goes into store and card.")] = None,
    as_json: Json = False,
) -> None:
    """Write all that a store holds, also while it is served."""
    from ottava.labels import commands

    show(commands.give(store, out, form, certificate), as_json)


@app.command("key")
def key(
    store: Annotated[Path, _STORE],
    name: Annotated[str, typer.Argument(help="Whose.")],
    lead: Annotated[bool, typer.Option("--lead", help="May adjudicate conflicts.")] = False,
    end: Annotated[bool, typer.Option("--end", help="End this person's key; what they said stays.")] = False,
    as_json: Json = False,
) -> None:
    """Print a new key for a person, once: the store keeps only its SHA-256. The old one ends."""
    from ottava.labels import commands

    made = commands.key(store, name, lead, end)
    if as_json:
        printed({"name": name, "key": made})
    else:
        typer.echo(made or f"{name} has no key any more")


@app.command("decide")
def decide(store: Annotated[Path, _STORE], as_json: Json = False) -> None:
    """Fuse all evidence to labels, and write down which votes each rests on."""
    from ottava.labels import commands

    show(commands.decide(store), as_json)


@app.command("certify")
def certify(store: Annotated[Path, _STORE], as_json: Json = False) -> None:
    """Work out every certificate of `label serve --target-error` anew, from the votes in the store."""
    from ottava.labels import live

    found = live.certify(store)
    if as_json:
        printed({"certificates": found})
    else:
        typer.echo("\n".join(map(live.ended, found)))


@app.command("trace")
def trace(
    where: Annotated[Path, folder("STORE|RUN", "A store, or the folder of a run.")],
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
    printed(found) if as_json else typer.echo(text)


@app.command("serve")
def serve(
    store: Annotated[Path, _STORE],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free one.")] = 8010,
    host: Annotated[str, typer.Option(help="Loopback by default.")] = "127.0.0.1",
    target_error: Annotated[
        float | None,
        typer.Option(help="Ask and audit until no more labels are certified to be wrong, or --most-votes are spent."),
    ] = None,
    most_votes: Annotated[float, _MOST] = 0.95,
    away_hours: Annotated[
        float, typer.Option(min=0.0, help="With --target-error: who was not seen for so long is not waited for.")
    ] = 24.0,
    votes: Annotated[int, typer.Option(min=1, help="Answers to each question in free text.")] = 1,
    suggestions: Annotated[
        bool, typer.Option("--suggestions", help="Show what machines say; such votes are not blind.")
    ] = False,
) -> None:
    """Serve the page on which people answer, by keyboard; Ctrl-C stops it."""
    from ottava.labels.serve import serve as serve_store

    args = {"store": str(store), "port": port, "host": host, "target": target_error, "votes": votes,
            "most": most_votes}  # fmt: skip
    serve_store(args | {"suggestions": suggestions, "away_hours": away_hours})
