"""The HTTP application: requests in, streams out, and nothing that a client sends may break it.

What endpoints have in common is here: keys, limits, bodies, the decision on thinking, errors. Every end of a request
(finished, refused, client gone, server draining) cancels its generation and leaves the count of running requests
right, because the drain waits for that count.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import prometheus_client as prometheus
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ottava.engine.session import Engine, QueueFull
from ottava.errors import DataError, OttavaError
from ottava.gateway import chat, completions, modes, openapi, responses, schema
from ottava.gateway.keys import Keys, Turnstile
from ottava.gateway.metrics import Metrics
from ottava.gateway.pool import Pool
from ottava.gateway.reply import Endpoint, Events, Reply, plain, refusal
from ottava.gateway.schema import ApiError, Asked

ENDPOINTS = (chat.ENDPOINT, completions.ENDPOINT, responses.ENDPOINT)
BODY_SECONDS = 30.0  # a client that sends its body slower than this is let go


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
        self._document = openapi.document(ENDPOINTS)

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            *(Route(one.path, partial(self.answer, one), methods=["POST"]) for one in ENDPOINTS),
            Route("/v1/models", self.models),
            Route("/v1/models/{id:path}", self.model),
            Route("/health", self.health),
            Route("/parity", self.parity),
            Route("/metrics", self.show_metrics),
            Route("/openapi.json", self.describe),
        ]
        handlers = {ApiError: _refuse, HTTPException: _refuse_http, Exception: _fault}
        return Starlette(routes=routes, exception_handlers=handlers)  # type: ignore[arg-type]

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        self._owner(request)
        names = modes.served_names(self.name, self.switch)
        return JSONResponse({"object": "list", "data": [self._model(name) for name in names]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{id}."""
        self._owner(request)
        self._require_model(request.path_params["id"])
        return JSONResponse(self._model(request.path_params["id"]))

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.created, "owned_by": "ottava"}

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

    async def describe(self, request: Request) -> Response:
        """GET /openapi.json."""
        self._owner(request)
        return JSONResponse(self._document)

    async def answer(self, endpoint: Endpoint, request: Request) -> Response:
        """POST to an endpoint."""
        self.running += 1
        handed_over = False
        status = 500
        entered: list[str] = []  # whose key was let in, once for each job
        try:
            name = self._owner(request)
            self.turnstile.enter(name)
            entered.append(name)
            asked, reply = await self._admit(endpoint, request, entered)
            shape = endpoint.shape(asked, reply, asked.model or self.name)
            if asked.stream:
                handed_over, status = True, 200
                return Events(reply, shape, lambda: self._finished(entered))
            answer = await plain(reply, shape, request)
            status = answer.status_code
            return answer
        except ApiError as error:
            status = error.status
            raise
        except OttavaError as error:
            told = refusal(error)
            status = told.status
            raise told from None
        except ClientDisconnect:
            status = 499
            return Response(status_code=499)
        finally:
            self.metrics.requests.labels(status).inc()
            if not handed_over:
                self._finished(entered)

    def _owner(self, request: Request) -> str:
        """Whose key the request holds. Raises ApiError 401."""
        return self.keys.owner(request.headers.get("authorization"))

    def _finished(self, entered: Sequence[str]) -> None:
        self.running -= 1
        for owner in entered:
            self.turnstile.leave(owner)

    async def _admit(self, endpoint: Endpoint, request: Request, entered: list[str]) -> tuple[Asked, Reply]:
        """Check a request and queue it. Raises ApiError."""
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="draining", retry=1)
        if self.engine.load_now >= self.engine.capacity:  # before it is read: under overload most are sent away
            raise _full(QueueFull(f"{self.engine.queue} requests are waiting already"))
        asked = schema.parse(endpoint.request, await _body(request, self.max_body))
        if asked.model is not None:
            self._require_model(asked.model)
        try:
            wishes = modes.wishes(asked, self.name)
            thinking = modes.decide(wishes, self.switch)
            terms = await run_in_threadpool(endpoint.terms, asked, self.engine.chat, thinking if wishes else None)
            self._count(terms.jobs, entered)
            return asked, Reply(self.engine, terms, self.metrics, self.deadline_s)
        except modes.Conflict as error:
            raise ApiError(400, str(error), code="thinking_conflict") from None
        except QueueFull as error:
            raise _full(error) from None
        except DataError as error:
            message = "\n".join(filter(None, (error.what, error.fix)))
            raise ApiError(400, message, param=endpoint.param) from None

    def _count(self, jobs: int, entered: list[str]) -> None:
        """Let each further job of a request in as if it came by itself. Raises ApiError 400 where it never could."""
        most = self.engine.capacity
        if self.turnstile.at_once:
            most = min(most, self.turnstile.at_once)
        if jobs > most:
            raise ApiError(400, f"{jobs} choices were asked for; {most} may be at work here", code="too_many_choices")
        for _ in range(jobs - 1):
            self.turnstile.enter(entered[0])
            entered.append(entered[0])

    def _require_model(self, model: str) -> None:
        """Raises ApiError 404."""
        served = modes.served_names(self.name, self.switch)
        if model not in served:
            message = f"no model {model!r}; served: {', '.join(served)}"
            raise ApiError(404, message, param="model", code="model_not_found")


def _full(error: QueueFull) -> ApiError:
    return ApiError(503, error.what, code="queue_full", retry=1)


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
