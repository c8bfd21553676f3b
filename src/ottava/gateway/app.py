"""The HTTP application: requests in, streams out, and nothing that a client sends may break it.

A plain answer is the stream's pieces joined, so the two can never differ. Every end of a request
(finished, refused, client gone, server draining) cancels its generation and leaves the count of
running requests right, because the drain waits for that count.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial

import prometheus_client as prometheus
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ottava.engine.generate import ThinkBudget
from ottava.engine.session import Engine, Piece, QueueFull, Reader, Sampling
from ottava.errors import DataError, OttavaError
from ottava.gateway import modes, schema
from ottava.gateway.child import Child
from ottava.gateway.keys import Keys, Turnstile
from ottava.gateway.pool import Item, Moved, Pool
from ottava.gateway.schema import ApiError, ChatRequest

DEFAULT_LIMIT = 1024  # ids of a reply where the client sets no limit
BODY_SECONDS = 30.0  # a client that sends its body slower than this is let go


class Metrics:
    """Prometheus' view of one gateway, in a registry of its own."""

    def __init__(self, engine: Engine | Pool) -> None:
        registry = self.registry = prometheus.CollectorRegistry()
        self.requests = prometheus.Counter("ottava_requests", "chat requests by status", ["status"], registry=registry)
        self.tokens = prometheus.Counter("ottava_tokens", "ids by kind", ["kind"], registry=registry)
        self.cancelled = prometheus.Counter("ottava_cancelled", "answers given up half-way", registry=registry)
        self.first = prometheus.Histogram("ottava_first_token_seconds", "request to first id", registry=registry)
        load = prometheus.Gauge("ottava_load", "requests generating or waiting", registry=registry)
        load.set_function(lambda: engine.load_now)
        if isinstance(engine, Pool):
            ready = prometheus.Gauge("ottava_backend_ready", "1: takes work", ["backend"], registry=registry)
            starts = prometheus.Gauge("ottava_backend_starts", "starts so far", ["backend"], registry=registry)
            lost = prometheus.Gauge("ottava_failovers", "answers taken over from a lost backend", registry=registry)
            lost.set_function(lambda: engine.failovers)
            refused = prometheus.Gauge("ottava_backend_refused", "1: not the reference", ["backend"], registry=registry)
            scored = prometheus.Gauge("ottava_canary_tokens", "ids scored again", ["backend"], registry=registry)
            for child in engine.children:
                refused.labels(child.place.name).set_function(partial(_refused, child))
                if engine.canary is not None:
                    scored.labels(child.place.name).set_function(partial(engine.canary.tokens, child.place.name))
                ready.labels(child.place.name).set_function(partial(_ready, child))
                starts.labels(child.place.name).set_function(partial(_starts, child))


def _ready(child: Child) -> float:
    return float(child.state == "ready")


def _refused(child: Child) -> float:
    return float(child.state == "refused")


def _starts(child: Child) -> float:
    return float(child.starts)


@dataclass
class Gateway:
    """A served model. running: requests between their first byte and their last; draining: no new ones are taken.

    max_body: bytes; deadline_s: seconds that an answer may take.
    """

    engine: Engine | Pool
    name: str
    max_body: int = 1 << 20
    deadline_s: float = 3600.0
    keys: Keys = field(default_factory=Keys)
    turnstile: Turnstile = field(default_factory=Turnstile)
    running: int = 0
    draining: bool = False

    def __post_init__(self) -> None:
        self.switch = self.engine.chat.thinking_key is not None
        self.metrics = Metrics(self.engine)
        self.created = int(time.time())

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/health", self.health),
            Route("/parity", self.parity),
            Route("/metrics", self.show_metrics),
        ]
        handlers = {ApiError: _refuse, HTTPException: _refuse_http, Exception: _fault}
        return Starlette(routes=routes, exception_handlers=handlers)  # type: ignore[arg-type]

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        self._owner(request)
        entry = {"object": "model", "created": self.created, "owned_by": "ottava"}
        return JSONResponse(
            {"object": "list", "data": [{"id": n, **entry} for n in modes.served_names(self.name, self.switch)]}
        )

    async def health(self, request: Request) -> Response:
        """GET /health: 200 while new requests are taken."""
        status = "draining" if self.draining else "ok" if self.engine.alive else "dead"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    async def parity(self, request: Request) -> Response:
        """GET /parity: which backends were held against the reference, and what the canary has seen since."""
        self._owner(request)
        pool = self.engine if isinstance(self.engine, Pool) else None
        told = pool.parity.report() if pool and pool.parity else {"backends": []}
        return JSONResponse({**told, "canary": pool.canary.report() if pool and pool.canary else None})

    async def show_metrics(self, request: Request) -> Response:
        """GET /metrics."""
        self._owner(request)
        return Response(prometheus.generate_latest(self.metrics.registry), media_type="text/plain; version=0.0.4")

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        self.running += 1
        handed_over = False
        status = 500
        owner: str | None = None
        try:
            name = self._owner(request)
            self.turnstile.enter(name)
            owner = name
            reply = await self._admit(request)
            if reply.request.stream:
                handed_over, status = True, 200
                return _Events(reply, lambda: self._finished(name))
            answer = await reply.whole(request)
            status = answer.status_code
            return answer
        except ApiError as error:
            status = error.status
            raise
        except OttavaError as error:
            status = 503
            raise ApiError(503, error.what, retry=1) from None
        except ClientDisconnect:
            status = 499
            return Response(status_code=499)
        finally:
            self.metrics.requests.labels(status).inc()
            if not handed_over:
                self._finished(owner)

    def _owner(self, request: Request) -> str:
        """Whose key the request holds. Raises ApiError 401."""
        return self.keys.owner(request.headers.get("authorization"))

    def _finished(self, owner: str | None) -> None:
        """owner None: it was not let in."""
        self.running -= 1
        if owner is not None:
            self.turnstile.leave(owner)

    async def _admit(self, request: Request) -> _Reply:
        """Check a request and queue it. Raises ApiError."""
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="draining", retry=1)
        asked = schema.parse(await _body(request, self.max_body))
        if asked.model is not None and asked.model not in modes.served_names(self.name, self.switch):
            served = ", ".join(modes.served_names(self.name, self.switch))
            raise ApiError(404, f"no model {asked.model!r}; served: {served}", param="model", code="model_not_found")
        try:
            thinking = modes.decide(modes.wishes(asked, self.name), self.switch)
            messages = [message.plain() for message in asked.messages]
            ids = await run_in_threadpool(self.engine.chat.render, messages, thinking)
            return _Reply(self, asked, ids, thinking)
        except modes.Conflict as error:
            raise ApiError(400, str(error), code="thinking_conflict") from None
        except QueueFull as error:
            raise ApiError(503, error.what, code="queue_full", retry=1) from None
        except DataError as error:
            raise ApiError(400, "\n".join(filter(None, (error.what, error.fix))), param="messages") from None


class _Reply:
    """One admitted request: the tokens on their way from the engine, and the answer made of them."""

    def __init__(self, gateway: Gateway, request: ChatRequest, ids: list[int], thinking: bool):
        self.gateway, self.request, self.prompt = gateway, request, len(ids)
        self.chat = gateway.engine.chat
        self.reader = Reader(self.chat, thinking, request.stops)
        self.head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": request.model or gateway.name,
        }
        self._began, self._complete = time.monotonic(), False
        self.moves: list[Moved] = []
        self._arrived: asyncio.Queue[Item] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(item: Item) -> None:
            loop.call_soon_threadsafe(self._arrived.put_nowait, item)

        sampling = _sampling(request, thinking, self.chat.think_end)
        self.job = gateway.engine.submit(ids, sampling, deliver)

    def close(self) -> None:
        """End the generation, wherever it is. To be called once, however the request ends."""
        self.job.cancel()
        metrics, reader = self.gateway.metrics, self.reader
        counts = {"prompt": self.prompt, "reasoning": reader.reasoning, "content": reader.total - reader.reasoning}
        for kind, count in counts.items():
            metrics.tokens.labels(kind).inc(count)
        if not self._complete:
            metrics.cancelled.inc()

    async def pieces(self) -> AsyncIterator[Piece]:
        """The reply as it comes."""
        while self.reader.finish != "stop" and (token := await self._next()) is not None:
            if isinstance(token, Exception):
                raise token
            if isinstance(token, Moved):
                self.moves.append(token)
                continue
            if self.reader.total == 0:
                self.gateway.metrics.first.observe(time.monotonic() - self._began)
            for piece in self.reader.add(token):
                yield piece
        for piece in self.reader.end():
            yield piece
        self._complete = True

    async def _next(self) -> Item:
        """What comes next. Raises ApiError 504 at the deadline."""
        seconds = self.gateway.deadline_s
        try:
            async with asyncio.timeout(self._began + seconds - time.monotonic()):
                return await self._arrived.get()
        except TimeoutError:
            raise ApiError(504, f"the answer took longer than {seconds:g} seconds", code="deadline") from None

    def usage(self) -> dict[str, object]:
        return schema.usage(self.prompt, self.reader.total, self.reader.reasoning)

    def trailer(self) -> dict[str, object]:
        """Where the reply came from, where there are several backends: which, from which of its ids on."""
        if not self.moves:
            return {}
        path = [{"backend": move.backend, "from": move.at} for move in self.moves]
        return {"ottava": {"failovers": len(path) - 1, "path": path}}

    async def whole(self, request: Request) -> Response:
        """The plain answer. Raises ClientDisconnect when nobody is there to take it."""
        work = asyncio.create_task(self._collect())
        try:
            while not work.done():
                await asyncio.wait({work}, timeout=0.1)
                if not work.done() and await request.is_disconnected():
                    raise ClientDisconnect
            pieces = work.result()
        finally:
            work.cancel()
            self.close()
        texts = {part: [p.text for p in pieces if p.part == part] for part in ("reasoning", "content")}
        reasoning = "".join(texts["reasoning"]) if self.reader.thought else None
        message = {"role": "assistant", "content": "".join(texts["content"]), "refusal": None}
        message |= {"reasoning": reasoning, "reasoning_content": reasoning}
        tokens = [token for piece in pieces for token in piece.tokens]
        told = schema.logprobs(self.chat, tokens) if self.request.logprobs else None
        choice = {"index": 0, "message": message, "logprobs": told, "finish_reason": self.reader.finish}
        head = {**self.head, **self.trailer(), "object": "chat.completion"}
        return JSONResponse({**head, "choices": [choice], "usage": self.usage()})

    async def _collect(self) -> list[Piece]:
        return [piece async for piece in self.pieces()]

    async def events(self) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        begun = {"reasoning": "", "reasoning_content": ""} if self.reader.thought else {}
        yield self._event({"role": "assistant", "content": "", **begun})
        try:
            async for piece in self.pieces():
                keys = ("content",) if piece.part == "content" else ("reasoning", "reasoning_content")
                told = schema.logprobs(self.chat, list(piece.tokens)) if self.request.logprobs else None
                yield self._event(dict.fromkeys(keys, piece.text), logprobs=told)
        except OttavaError as error:
            yield _failed(ApiError(503, error.what))
            return
        except ApiError as error:
            yield _failed(error)
            return
        yield self._event({}, finish=self.reader.finish, **self.trailer())
        if self.request.stream_options is not None and self.request.stream_options.include_usage:
            data = {**self.head, "object": "chat.completion.chunk", "choices": [], "usage": self.usage()}
            yield f"data: {json.dumps(data)}\n\n"
        yield "data: [DONE]\n\n"

    def _event(
        self, delta: dict[str, str], *, finish: str | None = None, logprobs: object = None, **more: object
    ) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        chunk = {**self.head, **more, "object": "chat.completion.chunk", "choices": [choice]}
        return f"data: {json.dumps(chunk)}\n\n"


def _failed(error: ApiError) -> str:
    return f"data: {json.dumps(error.body())}\n\n"


class _Events(StreamingResponse):
    """A stream that says when it is over, also when the client went away in the middle."""

    def __init__(self, reply: _Reply, finished: Callable[[], None]):
        super().__init__(reply.events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._reply, self._finished = reply, finished

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._reply.close()
            self._finished()


def _sampling(request: ChatRequest, thinking: bool, think_end: int | None) -> Sampling:
    """The engine's terms for a request. A budget needs thinking: it is a mistake without."""
    budget = request.thinking.budget_tokens if request.thinking else None
    if budget is not None and not thinking:
        raise ApiError(400, "budget_tokens needs thinking to be enabled", param="thinking.budget_tokens")
    think = ThinkBudget(think_end, budget) if budget is not None and think_end is not None else None
    return Sampling(
        max_new=request.limit or DEFAULT_LIMIT,
        temperature=request.temperature or 0.0,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=request.seed,
        think=think,
        top=request.top_logprobs or 0,
    )


async def _body(request: Request, cap: int) -> bytes:
    """The body, up to `cap` bytes. Raises ApiError 408, 413 or 415."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "send the header 'content-type: application/json'")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > cap:
                    raise ApiError(413, f"the body is larger than {cap} bytes")
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:.0f} seconds") from None
    return bytes(body)


async def _refuse(request: Request, error: ApiError) -> Response:
    headers = {} if error.retry is None else {"Retry-After": str(error.retry)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers)


async def _refuse_http(request: Request, error: HTTPException) -> Response:
    message = {404: f"no such path: {request.url.path}", 405: f"{request.method} is not allowed here"}
    refusal = ApiError(error.status_code, message.get(error.status_code, error.detail))
    return JSONResponse(refusal.body(), error.status_code, dict(error.headers or {}))


async def _fault(request: Request, error: Exception) -> Response:
    return JSONResponse(ApiError(500, "internal fault; the server's log has the details").body(), 500)
