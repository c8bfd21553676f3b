"""Backends are killed and stopped at random tokens, and no client notices: the stream is the undisturbed one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import stat
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import httpx
import pytest
from benchmarks.gateway.bed import serving

from ottava.engine import session
from ottava.engine.generate import ThinkBudget
from ottava.engine.session import Engine, Job, Overdue, QueueFull, Sampling, Token
from ottava.errors import DataError, ResourceError
from ottava.gateway.app import Gateway
from ottava.gateway.backend import Backend
from ottava.gateway.child import Child, Lost, Patience
from ottava.gateway.door import Address
from ottava.gateway.engines import Choice
from ottava.gateway.keys import VARIABLE
from ottava.gateway.launch import Local
from ottava.gateway.pool import Item, Moved, Place, Policy, Pool, places
from ottava.models.chat import Chat
from ottava.supervisor.local import LocalLauncher

from .test_engine import END, ETHINK, random_model, write_folder
from .test_gateway import NAME, URL, USER, official, start

QUICK = Patience(every=0.2, hung=3.0, still=60.0)
"""A busy machine takes a while to answer: what is taken for hung must be."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that never ends by itself."""
    return write_folder(tmp_path_factory.mktemp("served") / "model", random_model(quiet=[0, END, 2, 3, 4, ETHINK]))


def undisturbed(folder: Path, ids: Sequence[int], how: Sampling) -> list[Token]:
    """What an engine that nobody kills says."""
    engine = Engine.load(folder)
    try:
        return list(engine.stream(ids, how))
    finally:
        engine.close()


@contextlib.asynccontextmanager
async def pool_of(folder: Path, count: int, **more: Any) -> AsyncIterator[Pool]:
    found = Pool(places([folder], count), threads=1, **{"patience": QUICK, **more})
    try:
        await found.start()
        yield found
    finally:
        await found.stop()


async def all_ready(pool: Pool, count: int | None = None) -> None:
    async with asyncio.timeout(240):
        while sum(child.state == "ready" for child in pool.children) < (count or len(pool.children)):
            await asyncio.sleep(0.02)


async def items(
    pool: Pool, ids: Sequence[int], how: Sampling, at: dict[int, Any] | None = None, forced: Sequence[int] = ()
) -> list[Item]:
    """Everything that the pool delivers. at: what to do after so many tokens, given the child that is at work."""
    arrived: asyncio.Queue[Item] = asyncio.Queue()
    pool.submit(ids, how, arrived.put_nowait, forced)
    found: list[Item] = []
    while (item := await asyncio.wait_for(arrived.get(), 300)) is not None:
        if isinstance(item, Exception):
            raise item
        found.append(item)
        said = sum(isinstance(one, Token) for one in found)
        if isinstance(item, Token) and at and said in at:
            name = next(move.backend for move in reversed(found) if isinstance(move, Moved))
            at[said](next(child for child in pool.children if child.place.name == name))
    return found


def kill(child: Child, number: int = signal.SIGKILL) -> None:
    assert child.pid is not None
    os.kill(child.pid, number)


def tokens(found: Sequence[Item]) -> list[Token]:
    return [item for item in found if isinstance(item, Token)]


def moves(found: Sequence[Item]) -> list[Moved]:
    return [item for item in found if isinstance(item, Moved)]


HOW = [
    Sampling(120),
    Sampling(120, temperature=1.0, seed=7, top=2),
    Sampling(120, temperature=0.7, top_p=0.9, seed=-3),
    Sampling(120, temperature=1.0, seed=11, think=ThinkBudget(ETHINK, 60)),
]


def test_a_reply_that_begins_with_given_ids_goes_on_as_if_they_had_been_chosen(folder: Path) -> None:
    engine, ids = Engine.load(folder), Chat.load(folder).render(USER, True)
    for how in HOW:
        whole = list(engine.stream(ids, how))
        for cut in (1, 59, 60, 61, 119, 120):
            arrived: SimpleQueue[Any] = SimpleQueue()
            engine.submit(ids, how, arrived.put, [token.id for token in whole[:cut]])
            assert list(iter(arrived.get, None)) == whole
    engine.close()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("invariant", "steps"), [(True, 3), (False, 503)])
def test_what_was_said_is_read_at_once(how: Sampling, invariant: bool, steps: int, folder: Path) -> None:
    """A reply that is taken over at its id 500: steps of the model, not time."""
    engine, how = Engine.load(folder), replace(how, max_new=502)
    ids = engine.chat.render(USER, how.think is not None)[:5]
    whole = list(engine.stream(ids, how))
    taken = count_steps(engine)

    async def ask(emitted: list[Token]) -> list[Token]:
        async with served(engine, invariant) as child:
            return [token async for token in child.generate(ids, how, [token.id for token in emitted])]

    assert asyncio.run(ask(whole[:500])) == whole[500:]
    assert sum(taken) <= steps
    assert (sum(taken) <= 3) is invariant  # the other one replays
    taken.clear()
    assert asyncio.run(ask(whole)) == []  # killed between its last id and its end
    engine.context = len(ids) + len(whole)
    assert asyncio.run(ask(whole)) == []  # it fills the context
    assert sum(taken) <= (0 if invariant else 2 * 502)
    engine.close()


def count_steps(engine: Engine) -> list[int]:
    """A 1 for every step that its model takes from now on."""
    taken, step = [], engine._runner.step

    def counted(parts: Any) -> Any:
        taken.append(1)
        return step(parts)

    engine._runner.step = counted  # type: ignore[method-assign]
    return taken


@contextlib.asynccontextmanager
async def served(engine: Engine, invariant: bool) -> AsyncIterator[Child]:
    """An engine of this process behind a real socket, as a child sees it."""
    with tempfile.TemporaryDirectory() as place:
        launcher = Local()
        child = Child(Place("a", Path(place)), 1, launcher, QUICK, lambda: None, state="ready", invariant=invariant)
        path = Path(place) / "a.sock"
        child._address = Address(path)
        serving = asyncio.create_task(Backend(engine).run(path))
        while not path.exists():
            await asyncio.sleep(0.01)
        assert (await child.ask(op="hello"))["invariant"] is engine.invariant
        yield child
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await launcher.close()


def test_the_trailer_does_not_promise_what_nobody_knows(folder: Path) -> None:
    """Backends that are not invariant: the reply goes on, and it is said that it may not be the same one."""
    ids, how = Chat.load(folder).render(USER, False), Sampling(400)

    async def main() -> None:
        async with pool_of(folder, 2) as pool:
            await all_ready(pool)
            for invariant in (True, False):
                for child in pool.children:
                    child.invariant = invariant
                exact: list[bool] = []
                while not exact[1:]:  # a backend may be done before it is killed
                    found = await items(pool, ids, how, {5: kill})
                    assert len(tokens(found)) == 400
                    exact = [move.exact for move in moves(found)]
                    await all_ready(pool)
                assert exact[0]
                assert set(exact[1:]) == {invariant}


def test_ids_that_are_scored_survive_a_lost_backend_too(folder: Path) -> None:
    """Given words, and words behind them, with a death among the first and one among the second."""
    ids, how = Chat.load(folder).render(USER), Sampling(400, temperature=1.0, seed=5, top=2)
    whole = undisturbed(folder, ids, how)
    given = [token.id for token in whole[:200]]

    async def main() -> None:
        async with pool_of(folder, 2) as pool:
            assert tokens(await items(pool, ids, how, forced=given)) == whole
            await all_ready(pool)
            assert tokens(await items(pool, ids, how, {70: kill}, given)) == whole
            await all_ready(pool)
            assert tokens(await items(pool, ids, how, {230: kill}, given)) == whole

    asyncio.run(main())


def test_killed_and_stopped_at_random_tokens_the_stream_is_the_undisturbed_one(folder: Path) -> None:
    chat = Chat.load(folder)
    dice = random.Random(os.environ.get("OTTAVA_SEED", time.time_ns()))
    long = [replace(how, max_new=400) for how in HOW]
    cases = [(how, chat.render(USER, how.think is not None)) for how in long]
    wanted = [undisturbed(folder, ids, how) for how, ids in cases]

    async def main() -> None:
        async with pool_of(folder, 2) as pool:
            for (how, ids), whole in zip(cases, wanted, strict=True):
                number, path, cut = signal.SIGKILL if how.think is None else signal.SIGSTOP, list[Moved](), 0
                while not any(move.at >= cut for move in path[1:]):  # done before it is killed, its death is seen late
                    cut = dice.randrange(1, 80)
                    found = await items(pool, ids, how, {cut: lambda child, number=number: kill(child, number)})
                    assert tokens(found) == whole, (how, cut)
                    path = moves(found)
                    await all_ready(pool)
                assert path[0].at == 0
                assert all(move.at <= 400 for move in path)  # 400: all was said but that it was all
            assert pool.load_now == 0

    asyncio.run(main())


def test_many_streams_while_backends_die(folder: Path) -> None:
    """0 failed, 0 lost, 0 doubled: every one of the streams is the one that an undisturbed engine gives."""
    chat = Chat.load(folder)
    ids = chat.render(USER, False)
    hows = [Sampling(40, temperature=1.0, seed=seed) for seed in range(8)]
    engine = Engine.load(folder)
    wanted = [list(engine.stream(ids, how)) for how in hows]
    engine.close()

    async def main() -> None:
        async with pool_of(folder, 2, slots=4, queue=100) as pool:
            await all_ready(pool)

            async def reap() -> None:
                for _ in range(2):
                    await asyncio.sleep(random.uniform(0.05, 0.6))
                    alive = [child for child in pool.children if child.state == "ready"]
                    if alive:
                        kill(random.choice(alive))

            reaper = asyncio.create_task(reap())
            found = await asyncio.gather(*(items(pool, ids, how) for how in hows))
            await reaper
            assert [tokens(one) for one in found] == wanted

    asyncio.run(main())


def test_admission_of_the_pool_is_bounded(folder: Path) -> None:
    ids = Chat.load(folder).render(USER, False)

    async def main() -> None:
        async with pool_of(folder, 1, slots=1, queue=1) as pool:
            runs = [pool.submit(ids, Sampling(200), lambda item: None) for _ in range(2)]
            with pytest.raises(QueueFull):
                pool.submit(ids, Sampling(1), lambda item: None)
            with pytest.raises(DataError, match="empty"):
                pool.submit([], Sampling(1), lambda item: None)
            with pytest.raises(DataError, match="does not fit"):
                pool.submit([9] * 600, Sampling(1), lambda item: None)
            for run in runs:
                run.cancel()
            await asyncio.sleep(0.05)
            assert pool.load_now == 0
            async with asyncio.timeout(60):
                while (await pool.children[0].ask(op="health"))["load"]:  # hanging up ended them there too
                    await asyncio.sleep(0.02)
            assert len(tokens(await items(pool, ids, Sampling(3)))) == 3

    asyncio.run(main())


def test_who_waits_too_long_for_a_slot_is_sent_away(folder: Path) -> None:
    ids = Chat.load(folder).render(USER, False)

    async def main() -> None:
        async with pool_of(folder, 1, slots=1, queue=2, queue_s=0.1) as pool:
            child = pool.children[0]
            child.busy += 1  # the slot is taken until the test gives it back
            with pytest.raises(Overdue, match="no slot came free"):
                await items(pool, ids, Sampling(1))
            speakers = await asyncio.gather(*(items(pool, ids, Sampling(1)) for _ in range(2)), return_exceptions=True)
            assert [type(one) for one in speakers] == [Overdue] * 2
            assert (pool.load_now, pool.waiting) == (0, False)
            pool.release(child)
            pool.queue_s = 0.0  # who need not wait never waits too long
            assert len(tokens(await items(pool, ids, Sampling(3)))) == 3

    asyncio.run(main())


def test_a_request_that_kills_every_backend_is_given_up() -> None:
    class Deadly(Child):
        async def generate(self, *_: Any) -> AsyncIterator[Token]:  # type: ignore[override]
            raise Lost("again")
            yield

    pool = Pool.__new__(Pool)
    Pool.__init__(pool, [Place("a", TINY())])
    child = pool.children[0]
    pool.children[0] = Deadly(child.place, 1, child.launcher, QUICK, pool._wake, state="ready")

    async def main() -> None:
        with pytest.raises(ResourceError, match="5 backends were lost"):
            await items(pool, [9], Sampling(2))
        assert pool.children[0].busy == 0
        await pool.stop()

    asyncio.run(main())


def TINY() -> Path:
    import tempfile

    from ottava.models.chat import write_tiny
    from ottava.tasks import chains

    place = Path(tempfile.mkdtemp())
    write_tiny(place, chains.vocabulary())
    return place


@pytest.mark.parametrize(
    ("policy", "rates", "wanted"),
    [
        ("cheapest", {}, "bbcc"),
        ("domestic", {}, "acacb"),  # the domestic ones share, and then the other
        ("balanced", {}, "abca"),
        ("fastest", {"a": 5.0, "b": 9.0, "c": 7.0}, "bbcc"),
        ("fastest", {"a": 5.0, "b": 9.0}, "ccbb"),  # what nobody has measured is tried first
    ],
)
def test_policies(policy: Policy, rates: dict[str, float], wanted: str) -> None:
    """Who is asked, one after the other, while nobody has finished; two slots each."""
    tiny = TINY()
    pool = Pool(
        [Place("a", tiny, "ascend", 3.0), Place("b", tiny, "nvidia", 1.0), Place("c", tiny, "ascend", 2.0)],
        slots=2,
        policy=policy,
    )
    for child in pool.children:
        child.state, child.rate = "ready", rates.get(child.place.name)

    async def main() -> list[str]:
        return [(await pool._place(Sampling(1), False)).place.name for _ in wanted]

    assert "".join(asyncio.run(main())) == wanted


def test_a_reply_held_to_a_grammar_goes_only_to_engines_that_can_hold_it() -> None:
    """By policy vLLM would come first; where there is nothing else, the request is refused."""
    tiny, held, alien = TINY(), Sampling(1, grammar="{}"), Choice("vllm-cpu", sys.executable)
    other = Place("a", tiny, "cpu", 1.0, alien)
    pool = Pool([other, Place("b", tiny, "cpu", 2.0)], slots=2, policy="cheapest")
    for child in pool.children:
        child.state = "ready"

    async def main() -> None:
        assert [(await pool._place(how, False)).place.name for how in (held, Sampling(1), held)] == ["b", "a", "b"]
        with pytest.raises(DataError, match="no backend here"):
            Pool([other]).submit([1], held, lambda item: None)

    asyncio.run(main())


@pytest.mark.parametrize("label", ["vendor", "price=x", "price=-1", "price=nan", "colour=red", "vendor=a/b"])
def test_what_is_no_label_is_said(label: str, folder: Path) -> None:
    with pytest.raises(DataError) as caught:
        places([folder], 1, [label])
    assert caught.value.where == "--label"


def test_labels_and_replicas(folder: Path) -> None:
    found = places([folder, folder], 2, ["vendor=ascend,price=2", "vendor=nvidia"])
    assert [(place.name, place.vendor, place.price) for place in found] == [
        ("ascend-0-0", "ascend", 2.0),
        ("ascend-0-1", "ascend", 2.0),
        ("nvidia-1-0", "nvidia", 0.0),
        ("nvidia-1-1", "nvidia", 0.0),
    ]
    with pytest.raises(DataError, match="1 labels and 2 folders"):
        places([folder, folder], 1, ["vendor=ascend"])
    with pytest.raises(DataError, match="no such policy"):
        Pool(found, policy="best")  # type: ignore[arg-type]


def test_the_server_with_two_backends_over_http(launcher: LocalLauncher, folder: Path, tmp_path: Path) -> None:
    process, url = start(launcher, folder, tmp_path, replicas=2, patience=vars(QUICK))
    request: dict[str, Any] = {"messages": USER, "max_tokens": 300}
    plain = httpx.post(f"{url}{URL}", json=request, trust_env=False, timeout=120).json()
    assert plain["ottava"]["failovers"] == 0
    backends = children_of(process.pid)
    assert len(backends) == 2
    text, last = "", {}
    with (
        httpx.Client(trust_env=False, timeout=120) as client,
        client.stream("POST", f"{url}{URL}", json={**request, "stream": True}) as response,
    ):
        for number, line in enumerate(line for line in response.iter_lines() if line.startswith("data: {")):
            last = json.loads(line.removeprefix("data: "))
            text += last["choices"][0]["delta"].get("content") or ""
            if number == 10:
                for pid in backends:  # both: the stream waits for one to come back
                    os.kill(pid, signal.SIGKILL)
    assert text == plain["choices"][0]["message"]["content"]
    assert last["choices"][0]["finish_reason"] == "length"
    assert last["ottava"]["failovers"] >= 1
    assert last["ottava"]["exact"] is True
    assert last["ottava"]["path"][0]["from"] == 0
    assert last["ottava"]["path"][-1]["from"] > 5
    metrics = httpx.get(f"{url}/metrics", trust_env=False).text
    assert 'ottava_backend_starts{backend="cpu-0-0"} 2.0' in metrics
    official(url).models.list()
    process.terminate()
    assert process.wait(30) == 0
    assert all(not Path(f"/proc/{pid}").exists() for pid in children_of(process.pid))


def test_a_backend_that_is_stopped_while_it_loads_is_started_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def main() -> None:
        pool = Pool(places([folder], 1), threads=1, patience=QUICK)
        child = pool.children[0]
        starting = asyncio.create_task(pool.start())
        async with asyncio.timeout(60):
            while child.phase != "loading":
                await asyncio.sleep(0.001)
        kill(child, signal.SIGSTOP)
        child.patience = replace(QUICK, still=4.0)
        async with asyncio.timeout(240):
            while child.starts < 2:
                await asyncio.sleep(0.01)
        assert child.fault == "it gave no sign of life for 4 seconds while loading"
        starting.cancel()
        await pool.stop()

    asyncio.run(main())
    said = capsys.readouterr().err
    assert said.startswith("cpu-0-0: starting\ncpu-0-0: loading after ")


def test_a_gateway_that_was_stopped_itself_does_not_blame_its_backends(folder: Path) -> None:
    """A look at a backend is under way when everything here stands still for longer than a backend may."""

    async def main() -> None:
        async with pool_of(folder, 1) as pool:
            child = pool.children[0]
            kill(child, signal.SIGSTOP)
            while not child._opened:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.05)
            kill(child, signal.SIGCONT)
            time.sleep(QUICK.hung + 0.5)
            await asyncio.sleep(2 * QUICK.every)
            assert (child.state, child.starts) == ("ready", 1)

    asyncio.run(main())


@pytest.mark.parametrize("stage", ["queued", "reading", "streaming"])
def test_a_client_that_hangs_up_costs_one_more_step_at_most(
    stage: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of the model are let through one by one: none but the one under way may be taken for who is gone."""
    monkeypatch.setattr(session, "CHUNK", 8)
    monkeypatch.setattr(session, "ALONE", 8)
    engine = Engine.load(folder, slots=1)
    allowed, steps, step = threading.Semaphore(0), list[list[Any]](), engine._runner.step

    def gated(parts: Any) -> Any:
        assert allowed.acquire(timeout=300)
        steps.append([part.cache for part in parts])
        return step(parts)

    engine._runner.step = gated  # type: ignore[method-assign]
    if stage == "queued":
        engine.submit([9], Sampling(5), lambda item: None)
    before = {"queued": 2, "reading": 3, "streaming": 8 + 3}[stage]

    async def main() -> Job:
        async with served(engine, True) as child:

            async def ask() -> None:
                async for _ in child.generate([9] * 64, Sampling(100), []):
                    pass

            asking = asyncio.create_task(ask())
            allowed.release(before)
            while len(steps) < before or not [*engine._waiting, *engine._active]:
                await asyncio.sleep(0.005)
            while not (jobs := [job for job in [*engine._waiting, *engine._active] if len(job.ids) == 64]):
                await asyncio.sleep(0.005)
            asking.cancel()
            while not jobs[0].cancelled:
                await asyncio.sleep(0.005)
            return jobs[0]

    gone = asyncio.run(asyncio.wait_for(main(), 300))
    taken = len(steps)
    allowed.release(1000)
    while engine.load_now:
        time.sleep(0.005)
    engine.close()
    assert sum(any(cache is gone.cache for cache in caches) for caches in steps[taken:]) <= (gone.cache is not None)
    assert (gone.cache is None) is (stage == "queued")
    assert len(gone.pending) == {"queued": 64, "reading": 64 - 8 * 4, "streaming": 1}[stage]


def test_a_drain_survives_the_loss_of_every_backend(launcher: LocalLauncher, folder: Path, tmp_path: Path) -> None:
    process, url = start(launcher, folder, tmp_path, replicas=2, patience=vars(QUICK), drain_s=600, wait_s=600)
    request: dict[str, Any] = {"messages": USER, "max_tokens": 300}
    plain = httpx.post(f"{url}{URL}", json=request, trust_env=False, timeout=600).json()
    text = ""
    with (
        httpx.Client(trust_env=False, timeout=600) as client,
        client.stream("POST", f"{url}{URL}", json={**request, "stream": True}) as response,
    ):
        for number, line in enumerate(line for line in response.iter_lines() if line.startswith("data: {")):
            text += json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content") or ""
            if number == 10:
                process.terminate()
                while httpx.get(f"{url}/health", trust_env=False).json() != {"status": "draining"}:
                    time.sleep(0.01)
                for pid in children_of(process.pid):
                    os.kill(pid, signal.SIGKILL)
    assert text == plain["choices"][0]["message"]["content"]
    assert process.wait(60) == 0
    assert process.result()["drained"] is True


def test_no_secret_and_no_stranger_reaches_a_backend(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither environment nor command line of any process shows a key; the sockets' folder is its owner's alone."""
    secret = "sk-" + "s" * 20
    monkeypatch.setenv(VARIABLE, secret)
    with serving([folder], replicas=1) as server:
        monkeypatch.delenv(VARIABLE)
        body = {"messages": USER, "max_tokens": 2}
        asked = [
            httpx.post(f"http://127.0.0.1:{server.port}{URL}", json=body, headers=headers, trust_env=False, timeout=120)
            for headers in ({}, {"authorization": f"Bearer {secret}"})
        ]
        assert [answer.status_code for answer in asked] == [401, 200]
        ((backend, told),) = server.backends().items()
        assert secret.encode() in Path(f"/proc/{server.pid}/environ").read_bytes()  # so it can be seen at all
        assert secret.encode() not in Path(f"/proc/{backend}/environ").read_bytes()
        for pid in (server.pid, backend):
            assert secret.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
        place = Path(told["socket"]).parent.stat()
        assert (stat.S_IMODE(place.st_mode), place.st_uid) == (0o700, os.getuid())
        inside = {line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines() if "ottava-" in line}
        assert told["socket"].replace(".sock", ".new") in inside  # bound before it was renamed
        listening = Path(f"/proc/{backend}/net/tcp").read_text().splitlines()[1:]
        inodes = {os.readlink(link) for link in Path(f"/proc/{backend}/fd").iterdir() if link.is_symlink()}
        assert not [line for line in listening if f"socket:[{line.split()[9]}]" in inodes]  # no port of its own


def test_backends_do_not_outlive_a_gateway_that_was_killed(
    launcher: LocalLauncher, folder: Path, tmp_path: Path
) -> None:
    process, _ = start(launcher, folder, tmp_path, replicas=1)
    (backend,) = children_of(process.pid)
    process.kill()
    process.wait(10)
    deadline = time.monotonic() + 30
    while Path(f"/proc/{backend}/cmdline").exists() and Path(f"/proc/{backend}/cmdline").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_folder_that_no_backend_can_load_ends_the_server(
    launcher: LocalLauncher, folder: Path, tmp_path: Path
) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "model.safetensors").write_bytes(b"")
    args = {"model": str(broken), "port": 0, "replicas": 1}
    process = launcher.spawn("ottava.gateway.server:serve", args, pool=None, logs=tmp_path)
    assert process.wait(120) not in (0, None)
    assert "no backend came up" in process.log.read_text()


def children_of(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = entry.read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid and b"ottava.gateway.backend" in (entry.parent / "cmdline").read_bytes():
                found.append(int(entry.parent.name))
    return found


def test_the_gateway_answers_while_every_backend_is_away(folder: Path) -> None:
    """A request that comes while none runs waits for one; /health says so meanwhile."""

    async def main() -> None:
        async with pool_of(folder, 1) as pool:
            gateway = Gateway(pool, NAME)
            transport = httpx.ASGITransport(gateway.app())
            async with httpx.AsyncClient(transport=transport, base_url="http://server", timeout=120) as client:
                kill(pool.children[0])
                async with asyncio.timeout(60):
                    while pool.alive:
                        await asyncio.sleep(0.01)
                assert (await client.get("/health")).status_code == 503
                answer = await client.post(URL, json={"messages": USER, "max_tokens": 5})
                assert answer.status_code == 200
                assert answer.json()["usage"]["completion_tokens"] == 5
                assert (await client.get("/health")).status_code == 200

    asyncio.run(main())
