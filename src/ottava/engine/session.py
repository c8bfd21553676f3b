"""One model serving many requests, each exactly as if it were alone.

All active requests advance together, a step of the model at a time: a token for each that is generating, and a chunk
of a prompt for those that are not yet. On the kernels of `batched` the ids and log-probabilities of an answer depend
neither on who else is asking nor on how the prompt was cut, so an answer can also be taken up in its middle
(`Sampling.said`). Other models take turns, with a cache each. Admission is bounded: a request beyond the bound is
refused at once, not kept waiting for ever.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ottava import __version__
from ottava.checkpoint import layouts
from ottava.engine.batched import FAMILIES, Part, Runner, runner
from ottava.engine.generate import ThinkBudget
from ottava.engine.room import lacking
from ottava.engine.sampling import choose, uniform
from ottava.errors import DataError, ResourceError
from ottava.fp8 import rows
from ottava.models.chat import THINK_END, THINK_START, Chat, Detokeniser
from ottava.models.constrain import Constraint
from ottava.models.tools import Call, Form, State, step

CHUNK = 128
"""Rows of prompts that a step takes while others generate: at most so much later does their next token come."""

ALONE = 512
"""Rows of prompts that a step takes while nobody generates."""


CONTEXT = 8
"""Ids of a text that tell how it is joined to what follows: a space, or none."""


@dataclass(frozen=True)
class Sampling:
    """How to choose ids. max_new: at most so many; temperature 0: greedy; seed None: a fresh one; top: alternatives.

    said: so many of the prompt's last ids are the beginning of this reply, which then goes on as it would have: they
    count towards max_new, the thinking budget and the draws of the seed. Exact where the engine is `invariant`.
    grammar: what the reply may be, a spec of `models.constrain`; ids are chosen among those that it allows, while
    log-probabilities stay those of the model.
    """

    max_new: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    think: ThinkBudget | None = None
    top: int = 0
    said: int = 0
    grammar: str | None = None


@dataclass(frozen=True)
class Token:
    """One generated id with its log-probability under the model (temperature 1), and the `top` likeliest ids."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """New text of one part of a reply, or a call of a tool, and the tokens of content that it finishes."""

    part: Literal["reasoning", "content", "call"]
    text: str
    tokens: tuple[Token, ...] = ()
    call: Call | None = None


@dataclass(frozen=True)
class Offer:
    """The tools of a request by name, and how the model writes calls of them."""

    form: Form
    names: frozenset[str]


class Reader:
    """Turns the tokens of one reply into pieces of reasoning and content as they arrive.

    stop: texts that end the content and are not part of it; text that may become one is held back.
    finish: "stop" once the model or a stop text ended the reply, else "length". thought: the reply has reasoning.
    called: calls of tools so far.
    """

    def __init__(
        self,
        chat: Chat,
        thinking: bool,
        stop: Sequence[str] = (),
        after: Sequence[int] | None = None,
        offer: Offer | None = None,
    ):
        """after: ids behind which the reply goes on as text, not as a turn: <think> and </think> are words of it.
        offer: the tools whose calls are to be told from content."""
        self.finish: Literal["stop", "length"] = "length"
        self.total = self.reasoning = 0  # ids so far; of these, before </think>
        self.thought = thinking and chat.think_end is not None
        self.called, self._offer, self._undecided = 0, offer, State()
        self._chat, self._stop, self._held = chat, stop, ""
        self._text = Detokeniser(chat, marks=offer is not None)
        self._tokens: list[Token] = []
        self._thinking = self.thought
        self._marks: dict[int | None, str] = {}
        if after is not None:
            self._marks = {chat.think_start: THINK_START, chat.think_end: THINK_END}
            self._text = Detokeniser(chat, _tail(chat, after))

    def add(self, token: Token) -> list[Piece]:
        """The text that this token completes: no piece, or one."""
        self.total += 1
        if token.id in self._chat.stop_ids:
            self.finish = "stop"
            return self.end()
        if not self._thinking:
            self._tokens.append(token)
            return self._content(self._added(token.id), final=False)
        if token.id == self._chat.think_end:
            rest = self.end()
            self._thinking, self._text = False, Detokeniser(self._chat, marks=self._offer is not None)
            return rest
        self.reasoning += 1
        return _piece("reasoning", self._text.add(token.id))

    def end(self) -> list[Piece]:
        """What was held back; to be called once after the last token."""
        rest = self._text.end()
        return _piece("reasoning", rest) if self._thinking else self._content(rest, final=True)

    def _added(self, token: int) -> str:
        if token not in self._marks:
            return self._text.add(token)
        rest, self._text = self._text.end(), Detokeniser(self._chat)
        return rest + self._marks[token]

    def _content(self, text: str, *, final: bool) -> list[Piece]:
        self._held += text
        cuts = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if cuts:
            self.finish, keep = "stop", len(self._held) - min(cuts)
        else:
            open_ends = (n for stop in self._stop for n in range(1, len(stop)) if self._held.endswith(stop[:n]))
            keep = 0 if final else max(open_ends, default=0)
        out, self._held = self._held[: len(self._held) - keep], "" if cuts else self._held[len(self._held) - keep :]
        return self._parted(out, final=final or bool(cuts))

    def _parted(self, text: str, *, final: bool) -> list[Piece]:
        """Text as content and calls. What the tokens said goes with the first piece that they finish."""
        found: list[str | Call] = [text] if text else []
        if self._offer is not None:
            self._undecided, found = step(self._offer.form, self._offer.names, self._undecided, text, final)
        pieces = []
        for item in found:
            call = item if isinstance(item, Call) else None
            tokens, self._tokens = tuple(self._tokens), []
            self.called += call is not None
            pieces.append(Piece("call", "", tokens, call) if call else Piece("content", str(item), tokens))
        return pieces


def _tail(chat: Chat, ids: Sequence[int]) -> list[int]:
    """The last ids of a text, up to a control token: behind one, text begins anew."""
    control, kept = set(chat.control.values()), list(ids[-CONTEXT:])
    return list(takewhile(lambda one: one not in control, reversed(kept)))[::-1]


def _piece(part: Literal["reasoning", "content"], text: str) -> list[Piece]:
    return [Piece(part, text)] if text else []


class QueueFull(ResourceError):
    """As many requests are waiting as may wait."""


class Overdue(ResourceError):
    """The request has waited as long as one may."""

    def __init__(self, seconds: float):
        super().__init__(f"no slot came free within {seconds:g} seconds", fix="try again in a second")


Deliver = Callable[[Token | Exception | None], None]


@dataclass
class Job:
    """A request in the engine. cancel() may be called from any thread, at any time.

    pending: ids that the model has not read yet. forced: those with which the reply goes on, whatever would be chosen.
    produced: the reply's ids, those said before included. compiling: its grammar, which is made on a thread of its own.
    until: how long it may wait for a slot, by the monotonic clock.
    """

    ids: Sequence[int]
    sampling: Sampling
    deliver: Deliver
    seed: int
    pending: list[int]
    forced: Sequence[int] = ()
    cache: Any = None
    produced: list[int] = field(default_factory=list)
    thinking: bool = False
    cancelled: bool = False
    compiling: Future[Constraint] | None = None
    constraint: Constraint | None = None
    until: float = math.inf

    def cancel(self) -> None:
        """Stop generating; what was not yet generated never is."""
        self.cancelled = True


class Engine:
    """A model, its chat, and the one thread that runs it. slots: requests that advance together; queue: that may wait;
    queue_s: for so many seconds, then they get Overdue.

    invariant: whether the bits of an answer depend on its own ids alone (see `batched`); else requests take turns.
    """

    def __init__(
        self,
        model: nn.Module,
        chat: Chat,
        *,
        slots: int = 4,
        queue: int = 16,
        queue_s: float = math.inf,
        consume: bool = False,
    ):
        """consume: the engine may take the model's weights apart; the model is of no use afterwards."""
        config: Any = model.config
        self.chat, self.slots, self.queue, self.queue_s = chat, slots, queue, queue_s
        self.context = int(config.max_position_embeddings)
        self._runner: Runner = runner(model.eval(), consume=consume)
        self.invariant = self._runner.invariant
        self._waiting: deque[Job] = deque()
        self._active: list[Job] = []
        self._changed = threading.Condition()
        self._closed = False
        self._compiler = ThreadPoolExecutor(1, "grammar")  # begins its thread with the first grammar
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        slots: int = 4,
        queue: int = 16,
        queue_s: float = math.inf,
        dtype: torch.dtype | None = None,
    ) -> Engine:
        """Load a Hugging Face folder; weights that it holds in FP8 stay so.

        dtype: of activations and cache. None: bfloat16 where `batched` knows the model, which otherwise is computed by
        Hugging Face's classes in float32. Raises CheckpointError.
        """
        from ottava.models.load import load

        folder = Path(folder)
        batched = rows.levels() and layouts.read_config(folder).get("model_type") in FAMILIES
        if dtype is None:
            dtype = torch.bfloat16 if batched else torch.float32
        model = load(folder, dtype, "fp8" if batched else "exact")
        return cls(model, Chat.load(folder), slots=slots, queue=queue, queue_s=queue_s, consume=True)

    def submit(self, ids: Sequence[int], sampling: Sampling, deliver: Deliver, forced: Sequence[int] = ()) -> Job:
        """Queue a request. `deliver` gets every Token on the engine's thread, then None, or the exception.

        The stop id is delivered too. forced: ids that the reply begins with, whatever the model would choose: another
        engine said them before, or they are to be scored. They are delivered with their log-probabilities, count in
        `max_new` and in the budget, and what follows is what would have followed had they been chosen; a stop id among
        them ends the reply only where it is the last. Raises DataError where the prompt fills the context, QueueFull.
        """
        if not ids:
            raise DataError("the prompt is empty")
        if not 0 <= sampling.said < len(ids):
            raise DataError(f"of {len(ids)} ids, {sampling.said} cannot be the beginning of a reply")
        if (wrong := lacking(1, self.context, len(ids) - sampling.said)) is not None:
            raise DataError(wrong[0])  # a reply that was said to its end may well fill the context
        seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        said = list(ids[len(ids) - sampling.said :])
        thinking = sampling.think is not None and sampling.think.end not in said
        until = time.monotonic() + self.queue_s
        job = Job(ids, sampling, deliver, seed, list(ids), forced, produced=said, thinking=thinking, until=until)
        with self._changed:
            self._waiting = deque(other for other in self._waiting if not other.cancelled)
            if self._closed:
                raise ResourceError("the engine is closed")
            if self.load_now >= self.capacity:
                raise QueueFull(f"{self.queue} requests are waiting already", fix="try again in a second")
            if sampling.grammar is not None:
                job.compiling = self._compiler.submit(self._compiled, sampling.grammar, said)
                job.compiling.add_done_callback(self._wake)
            self._waiting.append(job)
            self._changed.notify()
        return job

    def _compiled(self, grammar: str, said: Sequence[int]) -> Constraint:
        constraint = Constraint(self.chat, grammar)
        for token in said:
            constraint.add(token)
        return constraint

    def _wake(self, _: object) -> None:
        with self._changed:
            self._changed.notify()

    def stream(self, ids: Sequence[int], sampling: Sampling) -> Generator[Token, None, None]:
        """Generate; leaving the iterator early cancels the request."""
        arrived: SimpleQueue[Token | Exception | None] = SimpleQueue()
        job = self.submit(ids, sampling, arrived.put)
        try:
            while (item := arrived.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            job.cancel()

    @property
    def capacity(self) -> int:
        """Requests that may generate or wait at a time."""
        return self.slots + self.queue

    @property
    def numerics(self) -> str | None:
        """What two engines of one model have in common whose answers are the same bits; None: nothing says so."""
        computed = self._runner.numerics
        return None if computed is None else f"ottava {__version__} {computed}"

    @property
    def load_now(self) -> int:
        """Requests that are generating or waiting."""
        with self._changed:
            return len(self._active) + len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether the engine's thread can still answer."""
        return self._thread.is_alive() and not self._closed

    def close(self) -> None:
        """Cancel everything and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        self._compiler.shutdown(cancel_futures=True)

    @torch.no_grad()
    def _work(self) -> None:
        while self._admit():
            self._active = [job for job in self._active if self._goes_on(job)]
            batches = [self._active] if self.invariant else [[job] for job in self._active]
            ended = {id(job) for batch in batches if batch for job in self._advance(batch)}
            self._active = [job for job in self._active if id(job) not in ended]
        for job in [*self._active, *self._waiting]:
            _give(job, ResourceError("the engine was closed"))

    def _admit(self) -> bool:
        """Fill free slots in order of arrival and send away who waits too long; sleeps while there is nothing to do.
        False: closed."""
        with self._changed:
            while not (self._active or self._closed or any(map(_ready, self._waiting))):
                self._changed.wait()
            for job in [job for job in self._waiting if _ready(job)][: self.slots - len(self._active)]:
                self._waiting.remove(job)
                self._active.append(job)
            now = time.monotonic()
            for job in [job for job in self._waiting if _ready(job) and now > job.until]:
                self._waiting.remove(job)
                _give(job, Overdue(self.queue_s))
            return not self._closed

    def _advance(self, jobs: list[Job]) -> list[Job]:
        """One step of the model for these requests; returns those that are over."""
        ended = []
        try:
            parts = self._parts(jobs)
            logits = iter(self._runner.step([part for _, part in parts]))
        except Exception as error:
            return [job for job in jobs if not _give(job, error)]
        for job, part in parts:
            del job.pending[: len(part.ids)]
            if part.wanted and not self._produce(job, next(logits)):
                ended.append(job)
        return ended

    def _goes_on(self, job: Job) -> bool:
        """Whether there is more to generate; opens the cache of a new request."""
        if job.cancelled or self._complete(job):
            return _give(job, None)
        try:
            if job.cache is None:
                job.constraint = None if job.compiling is None else job.compiling.result()
                job.cache = self._runner.open(len(job.ids) - job.sampling.said + self._limit(job))
        except Exception as error:
            return _give(job, error)
        return True

    def _complete(self, job: Job) -> bool:
        if not job.produced or len(job.produced) >= self._limit(job):
            return bool(job.produced)
        given = len(job.produced) - job.sampling.said >= len(job.forced)
        return given and job.produced[-1] in self.chat.stop_ids

    def _parts(self, jobs: list[Job]) -> list[tuple[Job, Part]]:
        """What each request reads next: the id it produced last, or of its prompt what there is room for."""
        room = CHUNK if any(len(job.pending) == 1 for job in jobs) else ALONE
        parts = []
        for job in jobs:
            count = len(job.pending)
            if self.invariant and count > 1:
                count = min(count, room)
                room -= count
            if count:
                parts.append((job, Part(job.cache, job.pending[:count], count == len(job.pending))))
        return parts

    def _limit(self, job: Job) -> int:
        """Ids of the whole reply."""
        return min(job.sampling.max_new, self.context - len(job.ids) + job.sampling.said)

    def _produce(self, job: Job, logits: Tensor) -> bool:
        """Choose and deliver the next token of a request; False when it is over."""
        try:
            token = self._next(job, logits)
        except Exception as error:
            return _give(job, error)
        job.produced.append(token.id)
        job.pending.append(token.id)
        alive = _give(job, token)
        return alive if not self._complete(job) else _give(job, None)

    def _next(self, job: Job, logits: Tensor) -> Token:
        how, position = job.sampling, len(job.produced)
        draws = uniform(job.seed, [0], position) if how.temperature else None
        allowed = logits if job.constraint is None else job.constraint.mask(logits)
        chosen = int(choose(allowed[None], how.temperature, how.top_p, draws))
        if job.thinking and how.think is not None and position >= how.think.tokens:
            chosen = how.think.end
        if position - how.said < len(job.forced):
            chosen = job.forced[position - how.said]
        if job.constraint is not None:
            job.constraint.add(chosen)
        if job.thinking and how.think is not None:
            job.thinking = chosen != how.think.end
        return _token(chosen, logits, how.top)


def _ready(job: Job) -> bool:
    return job.compiling is None or job.compiling.done()


def _token(chosen: int, logits: Tensor, top: int) -> Token:
    logprobs = torch.log_softmax(logits.float(), -1)
    best = torch.topk(logprobs, min(top, len(logprobs)))
    alternatives = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Token(chosen, float(logprobs[chosen]), alternatives)


def _give(job: Job, item: Token | Exception | None) -> bool:
    """Deliver; True while the job goes on. A receiver that is gone (its event loop has closed) ends it."""
    with suppress(RuntimeError):
        job.deliver(item)
        return isinstance(item, Token)
    return False
