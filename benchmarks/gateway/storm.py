"""Thousands of requests while backends are killed and stopped at random: none may fail, none may differ.

The oracle is an engine of this process that nobody disturbs: it answers every request first, and of each reply the
SHA-256 of ids and log-probabilities is kept. The gateway's answers are read back into ids word by word, so an id that
is lost, doubled or another one is another digest.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from numpy.random import default_rng

from benchmarks.common import share
from benchmarks.gateway.bed import Answer, Connection, Server, folder, serving
from ottava.engine.generate import ThinkBudget
from ottava.engine.session import Engine, Sampling, Token
from ottava.models.chat import Chat
from ottava.tasks import chains

SILENT = (0, 2, 3, 4, 5)  # it may end its reply, but says no other control token: those do not show in a text
REQUESTS, STREAMS, REPLICAS, SLOTS, EVERY = 10_000, 64, 3, 24, 200


@dataclass(frozen=True)
class Case:
    """A request as a client writes it, and as the engine is to understand it."""

    body: Mapping[str, Any]
    ids: Sequence[int]
    how: Sampling


@dataclass
class Outcome:
    """What became of a storm. wrong: a sentence on each reply that is not the undisturbed one, or that failed."""

    runs: int
    wrong: list[str]
    kinds: Counter[str]
    killed: int
    stopped: int
    failovers: float
    moved: int  # replies that went on at another backend after their first id


def cases(chat: Chat, count: int, seed: int) -> Iterator[Case]:
    """Requests of every kind: greedy and sampled, both modes, budgets, log-probabilities, turns, two lengths."""
    dice = random.Random(seed)
    problems = {n: chains.sample(default_rng(seed + n), n, 100, "train") for n in range(1, 5)}
    for _ in range(count):
        turns = [dice.choice(problems[dice.randrange(1, 5)]) for _ in range(dice.choice((1, 1, 1, 2, 5)))]
        messages = []
        for turn in turns:
            messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
        limit = dice.randrange(1, 48) if dice.random() < 0.95 else dice.randrange(200, 400)
        thinking, greedy = dice.random() < 0.5, dice.random() < 0.5
        budget = dice.randrange(0, 30) if thinking and dice.random() < 0.7 else None
        body: dict[str, Any] = {"messages": messages[:-1], "max_tokens": limit, "stream": dice.random() < 0.5}
        body |= {"thinking": {"type": "enabled" if thinking else "disabled", "budget_tokens": budget}}
        body |= {
            "logprobs": dice.random() < 0.25,
            "stream_options": {"include_usage": True} if body["stream"] else None,
        }
        if not greedy:
            body |= {
                "temperature": dice.choice((0.7, 1.0)),
                "top_p": dice.choice((0.9, 1.0)),
                "seed": dice.getrandbits(40),
            }
        think = None if budget is None else ThinkBudget(chat.think_end or 0, budget)
        drawn = (body["temperature"], body["top_p"], body["seed"]) if not greedy else ()
        yield Case(body, chat.render(messages[:-1], thinking), Sampling(limit, *drawn, think=think))


def digest(ids: Sequence[int], logprobs: Sequence[float] = ()) -> str:
    """The SHA-256 of a reply."""
    return hashlib.sha256(repr((list(ids), list(logprobs))).encode()).hexdigest()


def undisturbed(model: Path, asked: Sequence[Case]) -> list[tuple[str, str, int]]:
    """Of each request: the digest of its ids, of them with the log-probabilities of its content; how many ids."""
    engine = Engine.load(model, slots=16, queue=len(asked))
    try:
        replies: list[SimpleQueue[Token | Exception | None]] = [SimpleQueue() for _ in asked]
        for case, reply in zip(asked, replies, strict=True):
            engine.submit(case.ids, case.how, reply.put)
        return [_digests(engine.chat, case, _all(reply)) for case, reply in zip(asked, replies, strict=True)]
    finally:
        engine.close()


def _all(reply: SimpleQueue[Token | Exception | None]) -> list[Token]:
    found: list[Token] = []
    while (item := reply.get()) is not None:
        if isinstance(item, Exception):
            raise item
        found.append(item)
    return found


def _digests(chat: Chat, case: Case, tokens: Sequence[Token]) -> tuple[str, str, int]:
    ids = [token.id for token in tokens]
    thinking = case.body["thinking"]["type"] == "enabled"
    start = 0 if not thinking else ids.index(chat.think_end) + 1 if chat.think_end in ids else len(ids)
    content = [token.logprob for token in tokens[start:] if token.id not in chat.stop_ids]
    return digest(ids), digest(ids, content), len(ids)


def read(chat: Chat, words: Mapping[str, int], answer: Answer) -> tuple[list[int], list[float], dict[str, Any]]:
    """The ids of an answer, its log-probabilities, and its trailer. Raises KeyError where a word is none."""
    reasoning, content, finish, usage, trailer, numbers = answer.message()
    thought, said = ([words[word] for word in text.split()] for text in (reasoning, content))
    total, ends = usage["completion_tokens"], [chat.stop_ids[0]] if finish == "stop" else []
    closed = [chat.think_end or 0] if total > len(thought) + len(said) + len(ends) else []
    return [*thought, *closed, *said, *ends], numbers, trailer


async def storm(
    model: Path,
    server: Server,
    asked: Sequence[Case],
    wanted: Sequence[tuple[str, str, int]],
    *,
    streams: int,
    every: int,
    seed: int,
) -> Outcome:
    """Ask all, so many at a time; a random backend is killed or stopped after about `every` answers."""
    chat = Chat.load(model)
    words = {chat.decode([i]): i for i in range(6, 6 + len(chains.vocabulary()))}
    outcome = Outcome(len(asked), [], Counter(), 0, 0, 0.0, 0)
    left, done = list(enumerate(asked))[::-1], [0]

    async def client() -> None:
        async with Connection(server.port) as connection:
            while left:
                number, case = left.pop()
                try:
                    answer = await connection.ask(case.body)
                    if not answer.good:
                        raise ValueError(f"status {answer.status}: {answer.body[:200]!r} {answer.events[-1:]}")
                    ids, numbers, trailer = read(chat, words, answer)
                except (OSError, EOFError, ValueError, KeyError) as error:
                    outcome.wrong.append(f"request {number} failed: {type(error).__name__}: {error}")
                    if isinstance(error, OSError | EOFError):
                        raise
                    continue
                finally:
                    done[0] += 1
                    if done[0] % 500 == 0:
                        print(f"{done[0]} answered, {len(outcome.wrong)} wrong", file=sys.stderr, flush=True)
                told = case.body["logprobs"]
                if digest(ids, numbers if told else ()) != wanted[number][told]:
                    outcome.wrong.append(f"request {number}: {len(ids)} ids for {wanted[number][2]}: {case.body} {ids}")
                outcome.kinds.update(_kinds(case))
                outcome.moved += any(move["from"] for move in trailer["path"][1:])

    killer = asyncio.create_task(_kill(server, outcome, done, every, random.Random(seed)))
    await asyncio.gather(*(client() for _ in range(streams)))
    killer.cancel()
    outcome.failovers = await server.metric("ottava_failovers")
    return outcome


async def _kill(server: Server, outcome: Outcome, done: list[int], every: int, dice: random.Random) -> None:
    """SIGKILL three times of four, else SIGSTOP, to any backend, whether it is ready, loads, or was stopped."""
    while True:
        until = done[0] + dice.expovariate(1 / every)
        while done[0] < until:
            await asyncio.sleep(0.01)
        await asyncio.sleep(dice.uniform(0, 0.2))  # not only where an answer ends
        alive = sorted(server.backends())
        if not alive:
            continue
        stop = dice.random() < 0.25
        with suppress(ProcessLookupError):
            os.kill(dice.choice(alive), signal.SIGSTOP if stop else signal.SIGKILL)
            outcome.stopped += stop
            outcome.killed += not stop


def _kinds(case: Case) -> list[str]:
    how = case.how
    return [
        "greedy" if how.temperature == 0 else "sampled",
        *(["with a thinking budget"] if how.think else []),
        "streamed" if case.body["stream"] else "plain",
    ]


def run(place: Path, requests: int, streams: int, replicas: int, slots: int, every: int, seed: int) -> Outcome:
    """A whole storm."""
    model = folder(place / "model", silent=SILENT)
    asked = list(cases(Chat.load(model), requests, seed))
    wanted = undisturbed(model, asked)
    with serving([model], replicas=replicas, slots=slots, queue=streams) as server:
        return asyncio.run(storm(model, server, asked, wanted, streams=streams, every=every, seed=seed))


def rows(quick: bool) -> list[dict[str, Any]]:
    """Shares of requests that were answered as the undisturbed engine does, by kind; and what was done to them."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        seed = int(os.environ.get("OTTAVA_SEED", 0))
        outcome = run(Path(place), 500 if quick else REQUESTS, STREAMS, REPLICAS, SLOTS, EVERY, seed)
    for sentence in outcome.wrong[:10]:
        print(sentence, file=sys.stderr)
    more = {
        "wrong": len(outcome.wrong), "streams": STREAMS, "backends": REPLICAS, "killed": outcome.killed,
        "stopped": outcome.stopped, "failovers": outcome.failovers, "moved in mid-reply": outcome.moved,
        "seconds": time.monotonic() - began,
    }  # fmt: skip
    good = outcome.runs - len(outcome.wrong)
    first = share("requests answered as by an undisturbed engine, backends killed at random", good, outcome.runs)
    counts = dict(sorted(outcome.kinds.items()))
    return [{**first, **more, **counts}]
