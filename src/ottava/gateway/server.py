"""The server process: takes its port before it loads anything, says when it listens, drains on SIGTERM."""

from __future__ import annotations

import asyncio
import math
import os
import re
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from ottava.artifact import write_json
from ottava.checkpoint import layouts
from ottava.checkpoint.stream import default_workers
from ottava.engine.session import Engine
from ottava.errors import DataError, from_os_error
from ottava.gateway import engines
from ottava.gateway.app import Gateway
from ottava.gateway.canary import SHARE, Canary
from ottava.gateway.child import Patience
from ottava.gateway.keys import Keys, Turnstile
from ottava.gateway.parity import Parity
from ottava.gateway.patience import PatientProtocol
from ottava.gateway.pool import Pool, places, require_policy
from ottava.gateway.progress import loading
from ottava.gateway.ray import RayLauncher, resources
from ottava.models.chat import Chat
from ottava.verify.certificate import check

LOOPBACK = "127.0.0.1"


def serve(args: Mapping[str, Any]) -> dict[str, Any]:
    """Serve a model folder until SIGTERM or SIGINT, then let running requests finish.

    args: model (folder), or models (folders of one model, each for other chips); replicas: backends of each, in
    processes of their own (default: one engine in this process where there is one folder); labels, policy: see
    `pool`; ray: HOST:PORT of the head of a Ray cluster, on whose nodes the backends are then started, and
    ray_resources, what each takes there: see `ray`;
    engines, vllm_python: see `engines.choices`; patience, wait_s: see `child`, `Pool`; reference (folder,
    default the first): what backends are held against; other_values: one of other values may serve too; canary: the
    share of replies that is scored again (default `canary.SHARE`);
    name (default: the first folder's name); port (default 8000; 0 picks a free one);
    host (default loopback); slots, queue, queue_s (see Engine); max_body (bytes); deadline_s (of an answer);
    keys: a file (see `keys`); at_once, a_minute: requests of one key (0: no limit); drain_s (default 60: what
    still runs then is cut off); ready: a file that gets {"port", "pid"} once the server listens;
    announce: say the address on stderr then; certificate (file) and trust (public keys): serve only a
    folder whose values the certificate names, signed with one of these keys.
    Returns {"port", "drained"}; drained False: something was cut off. Raises ResourceError where the
    port is in use, and Verdict where the certificate does not fit, before anything is loaded.
    """
    keys = Keys.read(Path(args["keys"]) if args.get("keys") else None)
    listener = _listen(args.get("host", LOOPBACK), int(args.get("port", 8000)))
    with listener:
        port = listener.getsockname()[1]
        folders = [Path(folder) for folder in args.get("models") or [args["model"]]]
        for folder in folders:
            _certified(folder, args)
        engine = _engine(folders, args)
        gateway = Gateway(
            engine,
            args.get("name") or folders[0].resolve().name,
            args.get("max_body", 1 << 20),
            args.get("deadline_s", 3600.0),
            keys,
            Turnstile(args.get("at_once", 0), args.get("a_minute", 0)),
        )
        server = _Server(gateway, listener, args)
        try:
            server.run(sockets=[listener])
        finally:
            if isinstance(engine, Engine):
                engine.close()
        if server.failed is not None:
            raise server.failed
    return {"port": port, "drained": not server.cut}


def _engine(folders: Sequence[Path], args: Mapping[str, Any]) -> Engine | Pool:
    """One engine in this process, or backends in processes of their own."""
    limit = args.get("queue_s")
    bounds = {"slots": args.get("slots", 4), "queue": args.get("queue", 16)}
    bounds["queue_s"] = math.inf if limit is None else limit
    replicas, policy, ray = args.get("replicas"), args.get("policy", "balanced"), args.get("ray")
    require_policy(policy)
    if args.get("ray_resources") and not ray:
        raise DataError(
            "no Ray cluster is to be used", where="--ray-resources", fix="add --ray ADDRESS, or leave it out"
        )
    chosen = engines.choices(args.get("engines") or (), folders, args.get("vllm_python"), here=not ray)
    ours = all(choice.kind == engines.EMBEDDED for choice in chosen)
    if replicas is None and len(folders) == 1 and not args.get("labels") and ours and not ray:
        _require_alone(args)
        layouts.read_config(folders[0])  # what is no model is said before anything is announced
        with loading(folders[0].name) if args.get("announce") else nullcontext():
            return Engine.load(folders[0], **bounds)
    if args.get("announce"):
        print("\n".join(engines.told(chosen)), end="" if ours else "\n", file=sys.stderr, flush=True)
    found = places(folders, 1 if replicas is None else replicas, args.get("labels") or (), chosen)
    patience = Patience(**args.get("patience") or {})
    reference = Path(args.get("reference") or folders[0])
    check = Parity(reference, args.get("other_values", False), patience)
    wait_s = args.get("wait_s", 60.0)
    chat = Chat.load(reference)
    launcher = None
    if ray:
        each = resources(args.get("ray_resources") or (), chosen)
        taken = {place.name: each[number * len(each) // len(found)] for number, place in enumerate(found)}
        launcher = RayLauncher(ray, taken, check.digest)
    how: dict[str, Any] = {"policy": policy, "patience": patience, "wait_s": wait_s, "launcher": launcher}
    pool = Pool(found, **bounds, **how, check=check, chat=chat)
    pool.parity = check
    share = SHARE if args.get("canary") is None else args["canary"]
    if share:
        pool.canary = Canary(pool, check, share)
    return pool


ALONE = (("reference", "--reference"), ("other_values", "--allow-other-values"), ("canary", "--canary"))


def _require_alone(args: Mapping[str, Any]) -> None:
    """Raise DataError where something was asked for that one engine in this process has no part in."""
    given = [option for name, option in ALONE if args.get(name) not in (None, False)]
    given += [f"--{name}-after" for name in args.get("patience") or {}]
    if given:
        what = "one engine in this process is held against nothing, and nobody watches it"
        fix = "add --replicas 1 or more; ottava verify compares two folders"
        raise DataError(what, where=", ".join(given), fix=fix)


def _certified(folder: Path, args: Mapping[str, Any]) -> None:
    certificate, trust = args.get("certificate"), args.get("trust")
    if (certificate is None) != (not trust):
        what = "a certificate says nothing without a key that is trusted, nor a key without a certificate"
        raise DataError(what, where="--certificate, --trust", fix="give both: --certificate FILE --trust KEY.pub")
    if certificate is None:
        return
    found = check(Path(certificate), folder, [_key(key) for key in trust or ()], workers=default_workers())
    if args.get("announce"):
        print(f"certified: {found['digest']}", file=sys.stderr, flush=True)


def _key(given: str) -> str:
    """A public key as `check` takes it: its digits in lower case, or a file's name. Raises DataError."""
    if re.fullmatch(r"[0-9a-fA-F]{64}", given):
        return given.lower()
    if not os.path.isfile(given):  # also where a name is too long for a file's
        text = "-----BEGIN" in given
        what = "the text of a PEM file" if text else "neither 64 hexadecimal digits nor a file"
        shown = given.strip().splitlines()[0][:80] if given.strip() else "empty"
        fix = "give the key's 64 hexadecimal digits, as ottava keygen prints them, or its PEM file: --trust KEY.pub"
        raise DataError(f"this is no public key: {what}", where=f"--trust {shown}", fix=fix)
    return given


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket; clients that come early wait in its backlog."""
    if not host.strip():  # the system would take it for every address of the machine
        raise DataError("an empty name is no address", where="--host", fix=f"name one, such as {LOOPBACK}")
    # The protocol is named, or asyncio leaves Nagle's algorithm on: 40 ms between a header and its body.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise from_os_error(error, f"listening on {host}:{port}") from None
    return listener


class _Server(uvicorn.Server):
    """Uvicorn, with a drain that answers newcomers instead of closing the door on them.

    The first signal ends admission; the listener closes once nothing runs, or at the deadline.
    A second signal ends the process at once.
    """

    def __init__(self, gateway: Gateway, listener: socket.socket, args: Mapping[str, Any]):
        config = uvicorn.Config(
            gateway.app(),
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            loop="asyncio",
            http=PatientProtocol,
            ws="none",
            timeout_graceful_shutdown=1,
        )
        super().__init__(config)
        self._gateway, self._args, self._address = gateway, args, listener.getsockname()
        self._deadline: float | None = None
        self.failed: BaseException | None = None  # no backend came up
        self.cut = False  # the deadline came before the last request was done

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if isinstance(self._gateway.engine, Pool):
            loading = asyncio.create_task(self._gateway.engine.start())
            while not loading.done() and not self._gateway.draining:  # it may be told to stop while it loads
                await asyncio.wait({loading}, timeout=0.1)
            failed = loading.exception() if loading.done() else None
            if failed is not None or not loading.done():
                loading.cancel()
                await self._gateway.engine.stop()
                self.failed, self.should_exit = failed, True
                return
        await super().startup(sockets)
        host, port = self._address[:2]
        if self._args.get("announce"):
            where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            print(f"{self._gateway.name} listens on {where} (Ctrl-C stops it)", file=sys.stderr, flush=True)
        if self._args.get("ready"):
            write_json(Path(self._args["ready"]), {"port": port, "pid": os.getpid()})

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if isinstance(self._gateway.engine, Pool):
            await self._gateway.engine.stop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._gateway.draining:
            super().handle_exit(sig, frame)
            self.force_exit = True
        self._gateway.draining = True
        self._deadline = time.monotonic() + float(self._args.get("drain_s", 60.0))

    async def on_tick(self, counter: int) -> bool:
        if self._deadline is not None and (not self._gateway.running or time.monotonic() > self._deadline):
            self.should_exit, self.cut = True, self._gateway.running > 0
        return await super().on_tick(counter)
