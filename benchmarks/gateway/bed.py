"""What the parts share: a folder, a gateway in a process of its own, and a client that costs little.

The client speaks HTTP/1.1 on bare sockets: a client library would take more time than the gateway that it measures.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ottava.checkpoint import safetensors
from ottava.models.build import from_config
from ottava.models.chat import write_tiny
from ottava.models.published import published, stored
from ottava.tasks import chains
from ottava.trainer.spec import Shape

PATH = "/v1/chat/completions"
PATIENCE = {"every": 0.5, "hung": 10.0, "still": 120.0}
WAIT = 600.0  # seconds that a request waits while every backend is away: starts are slow where cores are busy
_SERVE = "import json, sys; from ottava.gateway.server import serve; serve(json.loads(sys.argv[1]))"


def folder(place: Path, *, silent: Sequence[int] = (), context: int = 2048, **shape: int) -> Path:
    """A BF16 folder of the tiny recipe's model with random weights. silent: ids that it never says."""
    words = chains.vocabulary()
    write_tiny(place, words)
    config = Shape(**shape).config(6 + len(words)) | {"max_position_embeddings": context}
    model = from_config(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.0 if "embed" in name else 1.5 / parameter.shape[-1] ** 0.5)
            parameter.copy_(parameter.bfloat16())
        table: Any = model.get_submodule("model.embed_tokens")
        head: Any = model.get_submodule("lm_head")
        table.weight[:, 0] = 8.0  # whatever was read, this number is large behind the last layer
        head.weight[:, 0] = 0.0
        head.weight[list(silent), 0] = -1000.0
    (place / "config.json").write_text(json.dumps(config))
    safetensors.write(place / "model.safetensors", [(name, stored(item)) for name, item in published(model).items()])
    return place


@dataclass
class Server:
    """A gateway's process, and the port on which it listens."""

    pid: int
    port: int

    def backends(self) -> dict[int, dict[str, Any]]:
        """Its backends that live: what each was told, by process."""
        found = {}
        for place in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, IndexError, ValueError):
                parent = (place / "stat").read_text().rpartition(")")[2].split()[1]
                words = (place / "cmdline").read_bytes().split(b"\0")
                if int(parent) == self.pid and b"ottava.gateway.backend" in words:
                    found[int(place.name)] = json.loads(words[-2])
        return found

    def memory(self) -> int:
        """Bytes that the gateway's process holds."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    async def metric(self, name: str) -> float:
        """One number of /metrics."""
        async with Connection(self.port) as connection:
            text = (await connection.ask(None, "/metrics")).body.decode()
        return float(next(line for line in text.splitlines() if line.startswith(f"{name} ")).split()[1])


@contextmanager
def serving(models: Sequence[Path], **args: Any) -> Iterator[Server]:
    """A gateway over backends (`gateway.server.serve`), drained and gone afterwards."""
    with tempfile.TemporaryDirectory() as place:
        ready = Path(place) / "ready.json"
        args = {"patience": PATIENCE, "wait_s": WAIT, "name": "tiny", "replicas": 1, **args}
        told = {"models": [str(model) for model in models], "port": 0, "ready": str(ready), "drain_s": 5, **args}
        with (Path(place) / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", _SERVE, json.dumps(told)], stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
        try:
            while not ready.exists():
                if process.poll() is not None:
                    raise SystemExit((Path(place) / "log").read_text())
                time.sleep(0.02)
            yield Server(process.pid, json.loads(ready.read_text())["port"])
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


async def all_ready(server: Server, count: int) -> None:
    """Wait until so many backends take work."""
    while True:
        async with Connection(server.port) as connection:
            lines = (await connection.ask(None, "/metrics")).body.decode().splitlines()
        if sum(line.startswith("ottava_backend_ready") and line.endswith(" 1.0") for line in lines) >= count:
            return
        await asyncio.sleep(0.05)


@dataclass
class Answer:
    """What came back. first, whole: seconds from the question to the first event with text, and to the end."""

    status: int
    headers: dict[str, str]
    body: bytes = b""
    events: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False  # a stream that ended with [DONE]
    first: float = 0.0
    whole: float = 0.0

    @property
    def good(self) -> bool:
        """Whether it is a whole answer without an error."""
        if self.status != 200:
            return False
        return self.finished and not any("error" in event for event in self.events) if self.events else bool(self.body)

    def message(self) -> tuple[str, str, str, dict[str, Any], dict[str, Any], list[float]]:
        """Reasoning, content, finish reason, usage, trailer and log-probabilities, of a stream or of a plain answer."""
        chunks = self.events or [json.loads(self.body)]
        parts = {"reasoning": "", "content": ""}
        finish, usage, trailer, numbers = "", {}, {}, []
        for chunk in chunks:
            usage, trailer = chunk.get("usage") or usage, chunk.get("ottava") or trailer
            for choice in chunk["choices"]:
                said = choice.get("delta") or choice.get("message") or {}
                for part in parts:
                    parts[part] += said.get(part) or ""
                finish = choice["finish_reason"] or finish
                numbers += [token["logprob"] for token in (choice["logprobs"] or {"content": []})["content"]]
        return parts["reasoning"], parts["content"], finish, usage, trailer, numbers


class Connection:
    """One connection that is kept, as a client's pool does. receive: the bytes that the system may hold for it."""

    def __init__(self, port: int, *, receive: int = 0):
        self._port, self._receive = port, receive

    async def __aenter__(self) -> Connection:
        plain = socket.socket()
        if self._receive:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive)
        plain.setblocking(False)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(plain, ("127.0.0.1", self._port))
        limit = {"limit": self._receive} if self._receive else {}
        self.reader, self.writer = await asyncio.open_connection(sock=plain, **limit)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.transport.abort()

    def send(self, body: dict[str, Any] | None, path: str = PATH) -> None:
        """A question without waiting for its answer. body None: GET."""
        text = b"" if body is None else json.dumps(body).encode()
        head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        self.writer.write(f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text)

    async def ask(self, body: dict[str, Any] | None, path: str = PATH) -> Answer:
        """A question and its whole answer. Raises OSError or EOFError where the connection breaks."""
        began = time.perf_counter()
        self.send(body, path)
        answer = await self.head()
        if "content-length" in answer.headers:
            answer.body = await self.reader.readexactly(int(answer.headers["content-length"]))
            answer.first = answer.whole = time.perf_counter() - began
            return answer
        return await self.rest(answer, began)

    async def rest(self, head: Answer, began: float = 0.0) -> Answer:
        """A stream after its header, to its end."""
        answer = Answer(head.status, head.headers)
        async with aclosing(self._chunks()) as chunks:
            async for chunk in chunks:
                for text in chunk.split(b"\n\n"):
                    event = text.removeprefix(b"data: ")
                    if event == b"[DONE]":
                        answer.finished = True
                    elif event:
                        answer.events.append(json.loads(event))
                if len(answer.events) > 1 and not answer.first:  # the one before only says that it was admitted
                    answer.first = time.perf_counter() - began
        answer.whole = time.perf_counter() - began
        return answer

    async def head(self) -> Answer:
        """Status and headers."""
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        return Answer(int(lines[0].split()[1]), headers)

    async def _chunks(self) -> AsyncGenerator[bytes, None]:
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            yield (await self.reader.readexactly(size + 2))[:-2]
        await self.reader.readexactly(2)
