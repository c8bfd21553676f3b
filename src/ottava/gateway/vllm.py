"""vLLM as a backend: its server as a child of this process, behind the face of our engine.

Token ids go in and token ids come out. vLLM could render prompts and part replies itself, and does so in the wrong mode
without a word (docs/serving.md), so it is never asked to. What our engine does at a token, this does with a request:
a thinking budget is a stream that is left at its last token, </think> forced as the only id allowed, and a stream from
there; ids that were said before are part of the prompt. Every id comes with the model's own log-probability.

It ends when its standard input or vLLM does, and nothing of vLLM is left then (`leash`).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx

from ottava.engine.room import lacking
from ottava.engine.session import Deliver, QueueFull, Sampling, Token
from ottava.errors import DataError, OttavaError, ResourceError
from ottava.gateway import backend, engines, leash
from ottava.gateway.door import Door
from ottava.models.chat import Chat

TELL = 10.0
"""Seconds between two lines about a server that is still loading."""
LINES = 30
"""Of vLLM's log, where it fails; otherwise nobody sees it."""
HEALTH = 5.0
"""Seconds that its answer on its health may take."""


def main() -> int:
    """Start vLLM on the folder that the arguments name (JSON: model, socket, slots, engine) and answer for it.

    host, digest: as `backend` takes them.
    """
    args = json.loads(sys.argv[1])
    door = backend.door_of(args)
    backend.outlive_nobody()
    choice = engines.Choice.read(args["engine"])
    try:
        with backend.breathing():
            if door is not None:
                backend.require(choice, args)
    except OttavaError as error:
        return backend.given_up(error, door, args)
    leash.adopt()  # were the leash itself killed, vLLM's processes come here
    asyncio.run(_serve(choice, args, door))
    return 1


async def _serve(choice: engines.Choice, args: Mapping[str, Any], door: Door | None) -> None:
    folder, scratch = Path(args["model"]), Path(tempfile.mkdtemp(prefix="ottava-vllm-"))  # open to this user alone
    socket, key, log = scratch / "vllm.sock", secrets.token_urlsafe(32), Path(args["socket"]).with_suffix(".log")
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-I", leash.__file__, str(scratch),
        *engines.command(choice, folder, socket, args["slots"]),
        stdin=asyncio.subprocess.PIPE,  # kept open: its end is vLLM's
        stdout=asyncio.subprocess.DEVNULL,
        stderr=log.open("wb"),
        env=engines.environment(choice, key, scratch, os.environ),
    )  # fmt: skip
    watch = asyncio.create_task(_ends_with(server, choice.kind, log, scratch))
    remote = Remote(Chat.load(folder), socket, key, args["slots"])
    await remote.ready(f"{choice.kind} on {folder}")
    await backend.Backend(remote).run(Path(args["socket"]), door)
    watch.cancel()


async def _ends_with(server: asyncio.subprocess.Process, kind: str, log: Path, scratch: Path) -> None:
    status = await server.wait()
    leash.end()
    shutil.rmtree(scratch, ignore_errors=True)
    last = "\n".join(log.read_text(errors="replace").splitlines()[-LINES:])
    _end(f"{kind} ended with status {status}; the end of its log:\n{last}")


def _end(why: str) -> None:
    """End this process, and vLLM with it. Whoever waits for an answer learns it from the closed socket."""
    print(why, file=sys.stderr, flush=True)
    os._exit(1)


class Run:
    """A request at vLLM. cancel() hangs up, which aborts it there."""

    def __init__(self, task: asyncio.Task[None]):
        self._task = task

    def cancel(self) -> None:
        self._task.cancel()


class Remote:
    """vLLM behind the face of an `Engine`, to be used on one event loop. slots: requests that it advances together."""

    invariant = False  # on a CPU its sums depend on the batch

    def __init__(self, chat: Chat, socket: Path, key: str, slots: int):
        self.chat, self.slots, self.context = chat, slots, 0
        self._socket = socket
        # a connection each: one that is kept may be closed just as it is used, which would look like a death
        how: dict[str, Any] = {"uds": str(socket), "verify": False, "limits": httpx.Limits(max_keepalive_connections=0)}
        more: dict[str, Any] = {"base_url": "http://vllm", "trust_env": False}
        more["headers"] = {"Authorization": f"Bearer {key}"}
        self._client = httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(**how), timeout=None, **more)
        self._probe = httpx.Client(transport=httpx.HTTPTransport(**how), timeout=HEALTH, **more)
        self._runs: set[asyncio.Task[None]] = set()

    async def ready(self, what: str) -> None:
        """Wait until it has loaded, and ask it the kinds of question that it will get: each first one compiles."""
        began = told = time.monotonic()
        while not await asyncio.to_thread(lambda: self.alive):
            os.write(1, b".")  # a sign of life
            if time.monotonic() > told + TELL:
                told = time.monotonic()
                print(f"{what} is loading: {told - began:.0f} s", file=sys.stderr, flush=True)
            await asyncio.sleep(0.5)
        self.context = int((await self._client.get("/v1/models")).json()["data"][0]["max_model_len"])
        async with aclosing(self._tokens([0], Sampling(4, temperature=1.0, top_p=0.9, seed=0, top=1), [0])) as tokens:
            async for _ in tokens:
                pass

    @property
    def alive(self) -> bool:
        """Whether vLLM says that it can answer."""
        try:
            return self._socket.exists() and self._probe.get("/health").status_code == 200
        except httpx.HTTPError:
            return False

    @property
    def load_now(self) -> int:
        """Requests that are generating or waiting."""
        return len(self._runs)

    def submit(self, ids: Sequence[int], sampling: Sampling, deliver: Deliver, forced: Sequence[int] = ()) -> Run:
        """As `Engine.submit`. A reply that goes on after given ids is one that vLLM would give there, not the same."""
        if not ids:
            raise DataError("the prompt is empty")
        if (wrong := lacking(1, self.context, len(ids))) is not None:
            raise DataError(wrong[0])
        if not 0 <= sampling.said < len(ids):
            raise DataError(f"of {len(ids)} ids, {sampling.said} cannot be the beginning of a reply")
        if self.load_now >= 2 * self.slots:
            raise QueueFull(f"{self.slots} requests are waiting already", fix="try again in a second")
        task = asyncio.create_task(self._answer(ids, sampling, deliver, forced))
        self._runs.add(task)
        task.add_done_callback(self._runs.discard)
        return Run(task)

    async def _answer(self, ids: Sequence[int], how: Sampling, deliver: Deliver, forced: Sequence[int]) -> None:
        try:
            async with aclosing(self._tokens(ids, how, forced)) as tokens:
                async for token in tokens:
                    deliver(token)
        except asyncio.CancelledError:
            deliver(None)
            raise
        except httpx.HTTPError as error:
            _end(f"vLLM broke off: {type(error).__name__}: {error}")
        except Exception as error:
            if not await asyncio.to_thread(lambda: self.alive):
                _end(f"vLLM is not well: {error}")
            deliver(error)
        else:
            deliver(None)

    async def _tokens(self, ids: Sequence[int], how: Sampling, forced: Sequence[int]) -> AsyncGenerator[Token, None]:
        """The tokens of a reply after those that were said: those given, then vLLM's."""
        prompt, said = list(ids[: len(ids) - how.said]), list(ids[len(ids) - how.said :])
        limit = min(how.max_new, self.context - len(prompt))
        if forced := list(forced[: limit - len(said)]):
            for token in await self._weighed([*prompt, *said, *forced], len(forced), how.top):
                yield token
        produced = [*said, *forced]
        budget = how.think
        thinking = budget is not None and budget.end not in produced
        while len(produced) < limit and not (produced and produced[-1] in self.chat.stop_ids):
            before, room = len(produced), limit - len(produced)
            cut = budget.tokens if thinking and budget is not None else limit
            asked = chosen_by(how, before)
            if thinking and budget is not None and before >= cut:
                asked, room = {"temperature": 0.0, "allowed_token_ids": [budget.end]}, 1
            async with aclosing(self._stream([*prompt, *produced], room, asked, how.top)) as tokens:
                async for token in tokens:
                    produced.append(token.id)
                    thinking = thinking and budget is not None and token.id != budget.end
                    yield token
                    if thinking and len(produced) >= cut:
                        break
            if len(produced) == before:
                raise ResourceError("vLLM ended a reply without a token")

    async def _stream(
        self, prompt: list[int], room: int, asked: Mapping[str, Any], top: int
    ) -> AsyncGenerator[Token, None]:
        """What vLLM says behind a prompt, up to a stop id or so many ids. Leaving it early aborts it there."""
        # its own end-of-text is off: the folder's stop ids are ours to know, and all are sent
        stops = {"ignore_eos": True, "stop_token_ids": list(self.chat.stop_ids)}
        body = {**self._body(prompt, room, top), **asked, **stops, "stream": True}
        async with self._client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise refusal(response.status_code, await response.aread())
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    return
                if line.startswith("data: "):
                    for token in tokens_of(json.loads(line.removeprefix("data: ")), top):
                        yield token
        raise httpx.RemoteProtocolError("a stream without its end")

    async def _weighed(self, ids: list[int], count: int, top: int) -> list[Token]:
        """The last `count` ids with the log-probabilities that the model gives them, read at once; the very last one is
        generated, as the only one allowed: so the ids may fill the context."""
        body = {**self._body(ids[:-1], 1, top), "temperature": 0.0, "allowed_token_ids": ids[-1:], "ignore_eos": True}
        response = await self._client.post("/v1/completions", json={**body, "prompt_logprobs": top})
        if response.status_code != 200:
            raise refusal(response.status_code, response.content)
        said = response.json()
        found = []
        for token, entries in zip(ids[:-1], said["choices"][0]["prompt_logprobs"], strict=True):
            if entries is not None:  # nothing stands before the first
                values = {int(other): float(entry["logprob"]) for other, entry in entries.items()}
                found.append(Token(token, values[token], best(values, top)))
        return [*found, *tokens_of(said, top)][-count:]

    def _body(self, prompt: list[int], room: int, top: int) -> dict[str, Any]:
        named = {"return_token_ids": True, "return_tokens_as_token_ids": True}
        return {"model": "model", "prompt": prompt, "max_tokens": room, "logprobs": top, **named}


def chosen_by(how: Sampling, position: int) -> dict[str, Any]:
    """How vLLM is to choose from a position of a reply on.

    It counts its draws from the beginning of each request. With one seed for all, a reply that goes on would repeat the
    draws of its beginning, so each position has a seed of its own. Not -1 either, which vLLM takes for none.
    """
    seed = None
    if how.seed is not None:
        mixed = hashlib.blake2b(f"{how.seed} {position}".encode(), digest_size=8).digest()
        seed = int.from_bytes(mixed, "little") >> 1
    return {"temperature": how.temperature, "top_p": how.top_p, "seed": seed}


def tokens_of(chunk: Mapping[str, Any], top: int) -> list[Token]:
    """The tokens in a piece of vLLM's stream. Raises ResourceError where it says that it failed."""
    if "error" in chunk:
        raise ResourceError(f"vLLM failed: {chunk['error'].get('message', '')}")
    found = []
    for choice in chunk["choices"]:
        told = choice["logprobs"]
        for token, value, others in zip(choice["token_ids"], told["token_logprobs"], told["top_logprobs"], strict=True):
            values = {int(name.removeprefix("token_id:")): float(other) for name, other in others.items()}
            found.append(Token(token, float(value), best(values, top)))
    return found


def best(values: Mapping[int, float], top: int) -> tuple[tuple[int, float], ...]:
    """The `top` likeliest: vLLM adds the one that was chosen."""
    return tuple(sorted(values.items(), key=lambda item: -item[1])[:top])


def refusal(status: int, body: bytes) -> DataError | ResourceError:
    """What vLLM said instead of an answer."""
    try:
        said = json.loads(body)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        said = body[:200].decode(errors="replace")
    return (
        DataError(f"vLLM refuses this: {said}") if status == 400 else ResourceError(f"vLLM failed ({status}): {said}")
    )


if __name__ == "__main__":
    sys.exit(main())
