"""One admitted request: its jobs in the engine, the pieces as they come, and the answer that an endpoint makes of them.

A request has one choice or several, and each choice is a job of its own. An endpoint is a `Shape`: it says the same
pieces plainly or as a stream. A plain answer is the stream's pieces joined, so the two can never differ. Whatever ends
a request (finished, refused, client gone, server draining) ends its jobs.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from typing_extensions import TypedDict

from ottava.engine.generate import ThinkBudget
from ottava.engine.session import Engine, Job, Offer, Overdue, Piece, Reader, Sampling, Token
from ottava.errors import DataError, OttavaError
from ottava.gateway.metrics import Metrics
from ottava.gateway.pool import Item, Moved, Pool, Run
from ottava.gateway.schema import ApiError, Asked, Step, Trailer
from ottava.models.chat import Chat

DEFAULT_LIMIT = 1024  # ids of a reply where the client sets no limit


@dataclass(frozen=True)
class Terms:
    """What a request asks of the engine: `n` replies to each prompt; none where they may have no ids.

    stop: texts that end the content. raw: the prompts are no turns, and replies go on behind them. scored: the ids of
    the prompts are wanted with their log-probabilities. offer: the tools that may be called.
    """

    prompts: Sequence[Sequence[int]]
    thinking: bool
    sampling: Sampling
    stop: Sequence[str] = ()
    n: int = 1
    raw: bool = False
    scored: bool = False
    offer: Offer | None = None

    @property
    def jobs(self) -> int:
        """How many the engine gets."""
        return len(self.prompts) * (self.n * bool(self.sampling.max_new) + self.scored)


@dataclass
class Choice:
    """One reply: a job in the engine and what it has said. over: nothing follows."""

    prompt: Sequence[int]
    reader: Reader
    job: Job | Run | None = None
    moves: list[Moved] = field(default_factory=list)
    over: bool = False

    def take(self, item: Item) -> Iterator[Piece]:
        """The text that an item of the engine completes. Raises what the engine raised."""
        if isinstance(item, Exception):
            raise item
        if isinstance(item, Moved):
            self.moves.append(item)
            return
        if isinstance(item, Token):
            yield from self.reader.add(item)
        if item is None or self.reader.finish == "stop":
            self.over = True
            self.cancel()
            yield from self.reader.end()

    def cancel(self) -> None:
        """End the job, where there is one."""
        if self.job is not None:
            self.job.cancel()


class Reply:
    """An admitted request. Raises what `submit` raises, and then nothing of it is left in the engine."""

    def __init__(self, engine: Engine | Pool, terms: Terms, metrics: Metrics, deadline_s: float):
        self.terms, self.chat = terms, engine.chat
        self.id, self.created = uuid.uuid4().hex, int(time.time())
        self.choices: list[Choice] = []
        self._metrics, self._deadline_s, self._began = metrics, deadline_s, time.monotonic()
        self._arrived: asyncio.Queue[tuple[int, Item]] = asyncio.Queue()
        self._scores: list[tuple[Job | Run, asyncio.Queue[tuple[int, Item]]]] = []
        self.scored: list[list[Token | None]] = []  # once `score` has returned, of each prompt; the first has none
        try:
            for prompt in terms.prompts if terms.scored else ():
                self._submit_score(engine, prompt)
            for prompt in terms.prompts:
                for index in range(terms.n):
                    self._submit(engine, prompt, index)
        except BaseException:
            self._cancel()
            raise

    def _submit(self, engine: Engine | Pool, prompt: Sequence[int], index: int) -> None:
        how, after = self.terms.sampling, prompt if self.terms.raw else None
        choice = Choice(prompt, Reader(self.chat, self.terms.thinking, self.terms.stop, after, self.terms.offer))
        if how.max_new:
            deliver = _into(self._arrived, len(self.choices))
            choice.job = engine.submit(prompt, replace(how, seed=seed_of(how.seed, index)), deliver)
        else:
            self._arrived.put_nowait((len(self.choices), None))
        self.choices.append(choice)

    def _submit_score(self, engine: Engine | Pool, prompt: Sequence[int]) -> None:
        """The prompt as a reply to its first id, whose words are given."""
        if engine.context and len(prompt) > engine.context:
            raise DataError(f"a prompt of {len(prompt)} ids does not fit: the model's context holds {engine.context}")
        arrived: asyncio.Queue[tuple[int, Item]] = asyncio.Queue()
        given = prompt[1:]
        how = Sampling(max_new=max(1, len(given)), top=self.terms.sampling.top)
        self._scores.append((engine.submit(prompt[:1], how, _into(arrived, 0), given), arrived))

    async def score(self) -> None:
        """Wait for the log-probabilities of the prompts, where they were asked for. To be called before `pieces`."""
        for prompt, (job, arrived) in zip(self.terms.prompts, self._scores, strict=False):
            found: list[Token | None] = [None]
            while len(found) < len(prompt) and (item := (await self._next(arrived))[1]) is not None:
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, Token):
                    found.append(item)
            job.cancel()
            self.scored.append(found)

    async def pieces(self) -> AsyncIterator[tuple[int, Piece | None]]:
        """The text of every choice as it comes, by the choice's number; None where a choice is over."""
        left = len(self.choices)
        while left:
            number, item = await self._next(self._arrived)
            choice = self.choices[number]
            if choice.over:
                continue  # it was on its way when a stop text ended the choice
            if isinstance(item, Token) and choice.reader.total == 0:
                self._metrics.first.observe(time.monotonic() - self._began)
            for piece in choice.take(item):
                yield number, piece
            if choice.over:
                left -= 1
                yield number, None

    async def _next(self, arrived: asyncio.Queue[tuple[int, Item]]) -> tuple[int, Item]:
        """What comes next. Raises ApiError 504 at the deadline."""
        seconds = self._deadline_s
        try:
            async with asyncio.timeout(max(0.0, self._began + seconds - time.monotonic())):
                return await arrived.get()
        except TimeoutError:
            raise ApiError(504, f"the answer took longer than {seconds:g} seconds", code="deadline") from None

    def close(self) -> None:
        """End the generation, wherever it is. To be called once, however the request ends."""
        self._cancel()
        for choice in self.choices:
            reader = choice.reader
            counts = {
                "prompt": len(choice.prompt),
                "reasoning": reader.reasoning,
                "content": reader.total - reader.reasoning,
            }
            for kind, count in counts.items():
                self._metrics.tokens.labels(kind).inc(count)
        if not all(choice.over for choice in self.choices):
            self._metrics.cancelled.inc()

    def _cancel(self) -> None:
        for job, _ in self._scores:
            job.cancel()
        for choice in self.choices:
            choice.cancel()

    @property
    def counts(self) -> tuple[int, int, int]:
        """Ids of the prompts (each once, however many choices it has), of the replies, and of their reasoning."""
        readers = [choice.reader for choice in self.choices]
        prompt = sum(map(len, self.terms.prompts))
        return prompt, sum(reader.total for reader in readers), sum(reader.reasoning for reader in readers)

    def trailer(self) -> Trailer | None:
        """Where the reply came from, where there are several backends."""
        path: list[Step] = []
        for number, choice in enumerate(self.choices):
            for move in choice.moves:
                step: Step = {"backend": move.backend, "from": move.at}
                path.append({**step, "choice": number} if len(self.choices) > 1 else step)
        begun = sum(bool(choice.moves) for choice in self.choices)
        exact = all(move.exact for choice in self.choices for move in choice.moves)
        return {"failovers": len(path) - begun, "exact": exact, "path": path} if path else None


class Shape(Protocol):
    """How an endpoint says a reply: plainly, or as the data of a stream's events, in this order of calls."""

    def whole(self, said: Sequence[Sequence[Piece]]) -> Mapping[str, Any]:
        """The plain answer. said: the pieces of each choice."""

    def begin(self) -> Iterable[str]:
        """Before the first piece."""

    def piece(self, number: int, piece: Piece) -> Iterable[str]:
        """More of a choice."""

    def finish(self, number: int) -> Iterable[str]:
        """A choice is over."""

    def end(self) -> Iterable[str]:
        """All are."""

    def failed(self, error: ApiError) -> Iterable[str]:
        """It ends here, by a fault."""


@dataclass(frozen=True)
class Endpoint:
    """A path and all that is its own: what it takes, what it asks of the engine, how it says the reply.

    terms(request, chat, thinking): thinking is None where nobody asked; raises ApiError, and DataError where `param` is
    at fault. shape(request, reply, the model's name). answer, event: the types of a plain answer, of a stream's data.
    """

    path: str
    summary: str
    param: str
    request: type[Asked]
    answer: Any
    event: Any
    terms: Callable[[Any, Chat, bool | None], Terms]
    shape: Callable[[Any, Reply, str], Shape]


def sampling(request: Asked, chat: Chat, thinking: bool, limit: int | None, top: int) -> Sampling:
    """The engine's terms for a request. A budget needs thinking: it is a mistake without. Raises ApiError."""
    budget = request.thinking.budget_tokens if request.thinking else None
    if budget is not None and not thinking:
        raise ApiError(400, "budget_tokens needs thinking to be enabled", param="thinking.budget_tokens")
    think = ThinkBudget(chat.think_end, budget) if budget is not None and chat.think_end is not None else None
    return Sampling(
        max_new=DEFAULT_LIMIT if limit is None else limit,
        temperature=request.temperature or 0.0,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=request.seed,
        think=think,
        top=top,
    )


def event(data: Any, name: str | None = None) -> str:
    """A server-sent event."""
    return (f"event: {name}\n" if name else "") + f"data: {json.dumps(data)}\n\n"


def text_of(chat: Chat, token: int) -> str:
    """The text of one id, control tokens too."""
    return str(chat.tokenizer.decode([token], skip_special_tokens=False))


def finite(logprob: float) -> float:
    """JSON has no infinity: what is impossible is -9999, as in OpenAI's API."""
    return max(logprob, -9999.0)


class Logprob(TypedDict):
    """A token and its log-probability at temperature 1. bytes: the token's own, which need not be whole characters."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Logprob):
    """A token of the content, and the likeliest ones in its place."""

    top_logprobs: list[Logprob]


def told(chat: Chat, token: Token) -> TokenLogprob:
    """What an answer says of a token where log-probabilities were asked for."""
    top = [_logprob(chat, *other) for other in token.top]
    return {**_logprob(chat, token.id, token.logprob), "top_logprobs": top}


def _logprob(chat: Chat, token: int, value: float) -> Logprob:
    text, pieces = text_of(chat, token), chat.pieces
    spelt = pieces[token] if pieces is not None and token < len(pieces) else text.encode()
    return {"token": text, "logprob": finite(value), "bytes": list(spelt)}


def refusal(error: OttavaError) -> ApiError:
    """What a client is told of a fault after its request was admitted."""
    if isinstance(error, DataError):  # what no check could foresee: a schema that became too much in the middle
        return ApiError(400, error.what)
    return ApiError(503, error.what, code="queue_timeout" if isinstance(error, Overdue) else None, retry=1)


async def plain(reply: Reply, shape: Shape, request: Request) -> Response:
    """The plain answer; the reply is closed. Raises ClientDisconnect when nobody is there to take it."""
    work = asyncio.create_task(_collect(reply))
    try:
        while not work.done():
            await asyncio.wait({work}, timeout=0.1)
            if not work.done() and await request.is_disconnected():
                raise ClientDisconnect
        return JSONResponse(shape.whole(work.result()))
    finally:
        work.cancel()
        reply.close()


def _into(arrived: asyncio.Queue[tuple[int, Item]], number: int) -> Callable[[Item], None]:
    """What puts an engine's items into a queue, from whatever thread."""
    loop, home = asyncio.get_running_loop(), threading.get_ident()

    def deliver(item: Item) -> None:
        if threading.get_ident() == home:
            arrived.put_nowait((number, item))
        else:
            loop.call_soon_threadsafe(arrived.put_nowait, (number, item))

    return deliver


async def _collect(reply: Reply) -> list[list[Piece]]:
    await reply.score()
    said: list[list[Piece]] = [[] for _ in reply.choices]
    async for number, piece in reply.pieces():
        if piece is not None:
            said[number].append(piece)
    return said


class Events(StreamingResponse):
    """The answer as server-sent events. It says when it is over, also when the client went away in the middle."""

    def __init__(self, reply: Reply, shape: Shape, finished: Callable[[], None]):
        super().__init__(_events(reply, shape), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._reply, self._finished = reply, finished

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._reply.close()
            self._finished()


async def _events(reply: Reply, shape: Shape) -> AsyncIterator[str]:
    try:
        await reply.score()
        for event in shape.begin():
            yield event
        async for number, piece in reply.pieces():
            for event in shape.finish(number) if piece is None else shape.piece(number, piece):
                yield event
    except (OttavaError, ApiError) as error:
        for event in shape.failed(error if isinstance(error, ApiError) else refusal(error)):
            yield event
        return
    for event in shape.end():
        yield event


def seed_of(seed: int | None, index: int) -> int | None:
    """The seed of a prompt's choice: the request's own for the first, SHA-256 of "SEED INDEX" for the others.

    Of the digest, the first 63 bits, high ones first; so a choice can be asked for again by itself. None: fresh.
    """
    if seed is None or index == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed} {index}".encode()).digest()[:8], "big") >> 1
