"""Backends die while many streams run, and the gateway's replies are those of an engine that nobody disturbs."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest
from benchmarks.gateway import storm
from benchmarks.gateway.bed import Answer, Connection, folder, serving

from ottava.models.chat import Chat

SPOILT = 7


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("storm") / "model", silent=storm.SILENT)


def test_three_hundred_requests_while_backends_die(model: Path) -> None:
    """One digest is spoilt on purpose: that request alone must be found wrong."""
    seed = int(os.environ.get("OTTAVA_SEED", time.time_ns() % 2**32))
    asked = list(storm.cases(Chat.load(model), 300, seed))
    wanted = storm.undisturbed(model, asked)
    wanted[SPOILT] = (storm.digest([0]), storm.digest([0]), 1)
    with serving([model], replicas=2, slots=8, queue=16) as server:
        outcome = asyncio.run(storm.storm(model, server, asked, wanted, streams=16, every=40, seed=seed))
    assert [sentence.partition(":")[0] for sentence in outcome.wrong] == [f"request {SPOILT}"], (seed, outcome.wrong)
    assert outcome.killed + outcome.stopped >= 1
    assert set(outcome.kinds) == {"greedy", "sampled", "with a thinking budget", "streamed", "plain"}


def test_a_word_that_is_lost_doubled_or_moved_is_another_digest(model: Path) -> None:
    chat = Chat.load(model)
    words = {chat.decode([i]): i for i in range(6, 44)}
    assert len(words) == 38
    (case,) = [case for case in storm.cases(chat, 60, 5) if case.how.max_new > 20 and not case.body["stream"]][:1]
    ((wanted, _, count),) = storm.undisturbed(model, [case])

    async def ask(port: int) -> Answer:
        async with Connection(port) as connection:
            return await connection.ask(case.body)

    with serving([model]) as server:
        ids = storm.read(chat, words, asyncio.run(ask(server.port)))[0]
    assert len(ids) == count > 1
    assert storm.digest(ids) == wanted
    for spoilt in (ids[:-1], [*ids, ids[-1]], ids[1:] + ids[:1]):
        assert storm.digest(spoilt) != wanted
