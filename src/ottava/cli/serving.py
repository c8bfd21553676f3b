"""The commands of serving: the gateway, and a chat with what it serves."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ottava.cli.shared import AllowOther, Engines, VllmPython, folder


def serve(
    models: Annotated[list[Path], folder("MODEL...", "Folders of one model: BF16, UE8M0-FP8, other chips' layouts.")],
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
