"""Four times what the gateway can do: who is let in waits no longer for it, and who is not is told when to come back.

First its capacity: answers a second where every slot and every place of the queue is always taken. Then requests come
by themselves at random moments (a Poisson process) and nobody waits for another's answer: as many a second as the
capacity, and four times as many.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gateway.bed import Answer, Connection, Server, folder, serving

SLOTS, QUEUE, TIMES = 4, 12, 4
BODY = {"messages": [{"role": "user", "content": "7 a +5 b *3 ="}], "max_tokens": 32, "stream": True}
SILENT = (0, 1, 2, 3, 4, 5)
WIDE = {"hidden": 192, "dense_width": 768}  # the engine is to be what is short, not the gateway


async def capacity(server: Server, count: int) -> float:
    """Answers a second with as many clients as there is room for, each asking again at once."""
    done = 0

    async def client() -> None:
        nonlocal done
        async with Connection(server.port) as connection:
            while done < count:
                assert (await connection.ask(BODY)).good
                done += 1

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(SLOTS + QUEUE)))
    return done / (time.perf_counter() - began)


async def offered(server: Server, rate: float, count: int, seed: int) -> list[Answer]:
    """What became of so many requests that come so often a second, each on a connection of its own."""
    dice, asking = random.Random(seed), []

    async def client() -> Answer:
        async with Connection(server.port) as connection:
            return await connection.ask(BODY)

    began, due = time.perf_counter(), 0.0
    for _ in range(count):
        asking.append(asyncio.create_task(client()))
        due += dice.expovariate(rate)
        await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
    return await asyncio.gather(*asking)


def admitted(answers: Sequence[Answer]) -> list[float]:
    """Seconds of those that were let in. All others were told when to come back, or it is an error."""
    for answer in answers:
        if answer.status != 200:
            assert answer.status in (429, 503)
            assert int(answer.headers["retry-after"]) >= 1
        else:
            assert answer.good
    return [answer.whole for answer in answers if answer.status == 200]


def rows(quick: bool) -> list[dict[str, Any]]:
    """The 99th percentile of admitted requests at four times the capacity against that at the capacity.

    low, high: 95% interval of the ratio by resampling requests.
    """
    count = 150 if quick else 1500
    with tempfile.TemporaryDirectory() as place:
        model = folder(Path(place) / "model", silent=SILENT, **WIDE)
        with serving([model], slots=SLOTS, queue=QUEUE) as server:
            most = asyncio.run(capacity(server, count // 2))
            one = asyncio.run(offered(server, most, count, 1))
            four = asyncio.run(offered(server, TIMES * most, TIMES * count, 2))
    calm, busy = np.array(admitted(one)), np.array(admitted(four))
    draw = np.random.default_rng(0)
    ratios = [_p99(draw.choice(busy, len(busy))) / _p99(draw.choice(calm, len(calm))) for _ in range(2000)]
    low, high = np.quantile(ratios, (0.025, 0.975))
    return [
        {
            "name": f"p99 of admitted requests at {TIMES} times the capacity, against at capacity", "ours": _p99(busy),
            "baseline": _p99(calm), "ratio": _p99(busy) / _p99(calm), "low": float(low), "high": float(high),
            "capacity_a_second": most, "admitted": len(busy), "offered": len(four), "admitted_at_capacity": len(calm),
            "offered_at_capacity": len(one), "refused": dict(Counter(a.status for a in four if a.status != 200)),
        }
    ]  # fmt: skip


def _p99(seconds: Any) -> float:
    return float(np.quantile(seconds, 0.99))
