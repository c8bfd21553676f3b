"""`ottava label serve`: the store's one writer, and the page on which people answer.

    POST /api/next       questions for the one whose key it is, and how far all is
    POST /api/votes      answers, skips, undos and decisions; acknowledged once they are on disk
    POST /api/conflict   for those who adjudicate: an item on which people differ
    POST /api/leave      what I hold may go to others

Answers of many people go to disk together (one wait for it, not twenty). What a client sends twice, because the
connection was cut before the answer came, is stored once: each vote has the client's own id.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TypeVar

import numpy as np
import uvicorn
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ottava.artifact import write_json
from ottava.errors import DataError, OttavaError, from_os_error
from ottava.labels import live, page, policy
from ottava.labels.forecast import Progress, told
from ottava.labels.queue import Queue
from ottava.labels.store import Decision, Known, Refusal, Store, Vote, now

LOOPBACK = "127.0.0.1"
BODY = 4 << 20
"""Bytes of one request; the page sends no more than half of it."""
BODY_SECONDS = 30.0
MOST = 200
"""Votes in one request."""
PREFETCH = 20
AHEAD_MS = 60_000
"""A client's clock may be so far ahead; a later time is not believed."""
RANK_AFTER = 50
"""Votes after which a new ranking begins, at once; one by one after RANK_SECONDS."""
RANK_SECONDS = 10.0
IDLE_S = 60.0
"""Who asked for a question in vain so lately is there: the page asks every few seconds."""
TARGET = 0.03
"""The share of labels believed wrong at which nothing more is asked, where no certificate is asked for."""

Model = TypeVar("Model", bound=BaseModel)


class Said(BaseModel):
    """One answer, skip, undo or decision as the page sends it."""

    model_config = ConfigDict(extra="forbid", strict=True)
    uid: str = Field(min_length=8, max_length=100)
    item: str
    kind: Literal["vote", "skip", "undo", "decide"]
    answer: str | list[str | None] | None = None
    undoes: str | None = None
    at: int | None = None
    ms: int | None = Field(None, ge=0)
    guideline: int | None = None


class Batch(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    votes: list[Said] = Field(max_length=MOST)


class Wish(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    want: int = Field(1, ge=0, le=PREFETCH)
    holding: list[str] = Field(default_factory=list, max_length=4 * PREFETCH)
    guideline: int | None = None


class Refused(Exception):
    """An HTTP error with a message for people."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status, self.message = status, message


class Desk:
    """One store being served. store: the writer; reader: another connection, for the questions themselves; votes: how
    many are wanted on each free text; runs: of the policy, to be followed (`live`), not waiting for who was not seen
    for away_hours."""

    def __init__(
        self,
        store: Store,
        reader: Store,
        votes: int = 1,
        suggestions: bool = False,
        runs: Sequence[int] = (),
        away_hours: float = live.AWAY_HOURS,
    ):
        self.store, self.reader, self.suggestions = store, reader, suggestions
        self.wanted, self.numbers_of_runs, self.away_hours = votes, runs, away_hours
        self.runs: list[dict[str, Any]] = []
        self.keys: list[Known] = reader.known()
        self.guideline = reader.guideline()
        self.queue = Queue()
        self._disk = ThreadPoolExecutor(1, "store")
        self._waiting: asyncio.Queue[tuple[Sequence[Vote | Decision], asyncio.Future[list[bool | Refusal]]]]
        self._waiting = asyncio.Queue()
        self._votes_since = 0
        self._ripe = asyncio.Event()
        self._given: dict[str, int] = {}
        self._idle: dict[str, float] = {}  # who asked for a question in vain, and when, by the queue's clock
        self._told: set[str] = set()
        self._fill()

    def _fill(self) -> None:
        """What people have done so far, and an order to begin with: as few votes as possible, in a mixed order."""
        db = self.reader.db
        self.numbers: dict[str, int] = dict(db.execute("SELECT id, seq FROM items").fetchall())
        self.names = {seq: name for name, seq in self.numbers.items()}
        rows = db.execute(
            "SELECT a.name, v.item, v.kind FROM votes v JOIN annotators a ON a.id = v.annotator WHERE v.kind != 'undo'"
            " AND NOT EXISTS (SELECT 1 FROM votes u WHERE u.undoes = v.seq)"
        )
        counts: dict[int, int] = {}
        for name, item, kind in rows:
            self.queue.done.setdefault(name, set()).add(item)
            if kind == "vote":
                counts[item] = counts.get(item, 0) + 1
                self._given[name] = self._given.get(name, 0) + 1
        self.total = sum(self._given.values())
        self.queue.settled = {row[0] for row in db.execute("SELECT item FROM decisions WHERE method = 'adjudicated'")}
        open_ = [row[0] for row in db.execute("SELECT seq FROM items WHERE gold IS NULL")]
        self.queue.gold = [row[0] for row in db.execute("SELECT seq FROM items WHERE gold IS NOT NULL")]
        order = np.random.default_rng(0).permutation(open_).tolist() if open_ and not self.numbers_of_runs else []
        self.queue.order = sorted(order, key=lambda item: counts.get(item, 0))

    # ---- HTTP

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/", self.show),
            Route("/health", self.health),
            Route("/api/next", self.next, methods=["POST"]),
            Route("/api/votes", self.votes, methods=["POST"]),
            Route("/api/conflict", self.conflict, methods=["POST"]),
            Route("/api/leave", self.leave, methods=["POST"]),
        ]
        handlers = {Refused: _refuse, OttavaError: _unable}
        return Starlette(routes=routes, exception_handlers=handlers, lifespan=self._life)  # type: ignore[arg-type]

    async def show(self, request: Request) -> Response:
        """GET /: the page, the same for everybody."""
        text, headers = page.whole()
        return Response(text, media_type="text/html; charset=utf-8", headers=headers)

    async def health(self, request: Request) -> Response:
        """GET /health."""
        return JSONResponse({"status": "ok"}, headers=page.PLAIN)

    async def next(self, request: Request) -> Response:
        """POST /api/next."""
        who = self._who(request)
        wish = await _body(request, Wish)
        holding = [self.numbers[name] for name in wish.holding if name in self.numbers]
        found = self.queue.next(who.name, wish.want, holding)
        self._idle.pop(who.name, None)
        if wish.want and not found:
            self._ripe.set()
            if not holding:
                self._idle[who.name] = self.queue.clock()
        version, text = self.guideline
        answer: dict[str, Any] = {
            "me": {"name": who.name, "lead": who.lead, "votes": self._given.get(who.name, 0)},
            "questions": [self._question(who.name, item) for item in found],
            "progress": self._progress(),
            "conflicts": self.queue.open_conflicts() if who.lead else 0,
        }
        if wish.guideline != version:
            answer["guideline"] = {"version": version, "text": text}
        return JSONResponse(answer, headers=page.PLAIN)

    async def votes(self, request: Request) -> Response:
        """POST /api/votes: what became of each, by its id; `stored` and `known` are on disk."""
        who = self._who(request)
        batch = await _body(request, Batch)
        rows = [self._row(said, who) for said in batch.votes]
        kept: list[Vote | Decision] = [row for row in rows if not isinstance(row, Refusal)]
        told = iter(await self._store(kept))
        acks = []
        for said, row in zip(batch.votes, rows, strict=True):
            became = row if isinstance(row, Refusal) else next(told)
            if became is True:
                self._count(who.name, said)
            if isinstance(became, Refusal):
                acks.append({"uid": said.uid, "status": "refused", "code": became.code, "why": became.what})
            else:
                acks.append({"uid": said.uid, "status": "stored" if became else "known"})
        return JSONResponse({"acks": acks}, headers=page.PLAIN)

    async def conflict(self, request: Request) -> Response:
        """POST /api/conflict: {"question"}, with what people said, how often, and not who; null: there is none."""
        who = self._who(request)
        if not who.lead:
            raise Refused(403, "this key may not adjudicate")
        item = self.queue.next_conflict(who.name)
        return JSONResponse({"question": item and self._dispute(item)}, headers=page.PLAIN)

    async def leave(self, request: Request) -> Response:
        """POST /api/leave."""
        self.queue.leave(self._who(request).name)
        return JSONResponse({}, headers=page.PLAIN)

    # ---- what is said

    def _question(self, who: str, number: int) -> dict[str, Any]:
        """What the page may know: no source, no known answer, and no opinion where the vote is to be blind."""
        item = self.reader.item(self.names[number])
        out: dict[str, Any] = {
            "item": item.id, "kind": item.kind, "content": item.content, "answers": item.answers(),
            "guideline": self.guideline[0],
        }  # fmt: skip
        if item.kind == "pair":  # who always reads A first has a taste for A
            out["swapped"] = hashlib.sha256(f"{who}\0{item.id}".encode()).digest()[0] % 2 == 1
        if self.suggestions:
            query = "SELECT who, answer FROM opinions WHERE item = ? ORDER BY seq"
            out["suggestions"] = {by: json.loads(said) for by, said in self.reader.db.execute(query, (number,))}
        return out

    def _progress(self) -> dict[str, Any]:
        """How far all is. With runs: how far each is, with votes, hours and dates to come as low, likely and high."""
        out = self.queue.progress() | {"votes": self.total, "items": len(self.numbers)}
        if not self.numbers_of_runs:
            return out
        a_day, clock, ahead = self.queue.pace() * 86_400, datetime.now(UTC), []
        for run in self.runs:
            shown = {key: value for key, value in run.items() if key != "progress"}
            if "progress" in run:
                shown |= told(Progress(**run["progress"]), self.queue.seconds, clock, a_day)
            ahead.append(shown)
        return out | {"left": None, "hours": None, "finish": None, "runs": ahead}

    def _dispute(self, number: int) -> dict[str, Any]:
        """A question and the votes on it, each answer with its count."""
        item = self.reader.item(self.names[number])
        query = "SELECT answer, count(*) FROM live WHERE item = ? GROUP BY answer ORDER BY count(*) DESC, answer"
        said = [
            {"answer": json.loads(text), "votes": count} for text, count in self.reader.db.execute(query, (number,))
        ]
        return {
            "item": item.id, "kind": item.kind, "content": item.content, "answers": item.answers(), "said": said,
            "guideline": self.guideline[0],
        }  # fmt: skip

    def _row(self, said: Said, who: Known) -> Vote | Decision | Refusal:
        at = now() if said.at is None or not 0 <= said.at <= now() + AHEAD_MS else said.at
        if said.kind == "undo" and self.numbers_of_runs and not live.can_undo(self.reader, said.undoes or "", now()):
            return Refusal("late", "it cannot be taken back any more: what is asked next rests on it")
        if said.kind != "decide":
            return Vote(
                said.uid, said.item, who.name, said.answer, said.kind, said.undoes, at, said.ms, said.guideline,
                not self.suggestions,
            )  # fmt: skip
        if not who.lead or said.answer is None:
            return Refusal("bad", "this key may not adjudicate" if not who.lead else "a decision has an answer")
        number = self.numbers.get(said.item, 0)
        uids = tuple(
            row[0] for row in self.reader.db.execute("SELECT uid FROM live WHERE item = ? ORDER BY seq", (number,))
        )
        return Decision(
            said.uid, said.item, said.answer, "adjudicated", who.name, None, uids, at, said.ms, said.guideline
        )

    def _count(self, who: str, said: Said) -> None:
        """A row is on disk: the queue and the counts follow."""
        self.queue.answered(who, self.numbers[said.item], said.kind)
        moved = {"vote": 1, "undo": -1}.get(said.kind, 0)
        if said.kind == "undo":  # of a skip, which was no vote
            undone = self.reader.db.execute("SELECT kind FROM votes WHERE uid = ?", (said.undoes,)).fetchone()
            moved = -1 if undone and undone[0] == "vote" else 0
        self._given[who] = self._given.get(who, 0) + moved
        self.total += moved
        self._votes_since += 1
        if self._votes_since >= RANK_AFTER:
            self._ripe.set()

    def _who(self, request: Request) -> Known:
        """Whose key it is. All digests are compared in full, so that the time taken says nothing."""
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        found = None
        for known in self.keys:
            if hmac.compare_digest(digest, known.digest):
                found = known
        if found is None or kind.lower() != "bearer":
            raise Refused(401, "no such key")
        return found

    # ---- disk and ranking

    async def _store(self, rows: Sequence[Vote | Decision]) -> list[bool | Refusal]:
        if not rows:
            return []
        future: asyncio.Future[list[bool | Refusal]] = asyncio.get_running_loop().create_future()
        await self._waiting.put((rows, future))
        return await asyncio.shield(future)

    async def _write(self) -> None:
        """All that waits goes to disk in one transaction; then all who wait are told."""
        loop = asyncio.get_running_loop()
        while True:
            jobs = [await self._waiting.get()]
            while not self._waiting.empty():
                jobs.append(self._waiting.get_nowait())
            rows = [row for job in jobs for row in job[0]]
            try:
                said = await loop.run_in_executor(self._disk, self.store.add_all, rows)
            except Exception as error:
                for _, future in jobs:
                    if not future.done():
                        future.set_exception(error)
                continue
            place = 0
            for job, future in jobs:
                if not future.done():
                    future.set_result(said[place : place + len(job)])
                place += len(job)

    async def _rank(self) -> None:
        """Keep a ranking process at work; where it dies, the last order stays, and another begins."""
        while True:
            child = await asyncio.create_subprocess_exec(
                sys.executable, "-m", *self._follower(), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
                env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}, limit=BODY,
                start_new_session=True,  # Ctrl-C is the server's: the child ends with its input
            )  # fmt: skip
            try:
                while True:
                    await self._one_ranking(child)
                    patient = None if not self._votes_since and self._over() else RANK_SECONDS
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._ripe.wait(), patient)
                    if not self._votes_since:
                        await asyncio.sleep(1.0)  # somebody asks although nothing is left: do not fit in circles
            except (asyncio.IncompleteReadError, ConnectionError, BrokenPipeError, ValueError) as error:
                print(f"the ranking process ended ({error!r}); another begins", file=sys.stderr, flush=True)
                await asyncio.sleep(5.0)
            finally:
                if child.returncode is None:
                    child.kill()
                    await child.wait()

    def _follower(self) -> list[str]:
        """The module that says in which order to ask, and its arguments."""
        if self.numbers_of_runs:
            names = [str(self.store.path), *map(str, self.numbers_of_runs)]
            return ["ottava.labels.live", *names, "--away-hours", str(self.away_hours)]
        return ["ottava.labels.ranking", str(self.store.path), "--target", str(TARGET), "--votes", str(self.wanted)]

    def _over(self) -> bool:
        """Whether nothing changes without another vote: runs take a vote when it has become old enough, too."""
        return all(run["phase"] == "done" for run in self.runs)

    async def _follow(self, runs: list[dict[str, Any]], close: list[dict[str, Any]]) -> None:
        """What runs have come to: rows to be written, and certificates of those that have ended."""
        loop = asyncio.get_running_loop()
        for row in close:
            await loop.run_in_executor(self._disk, self.store.add_run, row)
            self._ripe.set()
        for run in runs:
            held = {one["run"] for one in live.certificates(self.reader)}
            if run["phase"] == "done" and run["run"] not in held:
                ended = await asyncio.to_thread(live.follow, self.reader, run["run"])
                document = await loop.run_in_executor(self._disk, live.settle, self.store, ended)
                print(live.ended(document), file=sys.stderr, flush=True)
        self.runs = runs

    async def _one_ranking(self, child: asyncio.subprocess.Process) -> None:
        assert child.stdin
        assert child.stdout
        asked_at = self.queue.clock()
        self._votes_since = 0
        self._ripe.clear()
        idle = [name for name, when in self._idle.items() if when > asked_at - IDLE_S]
        child.stdin.write(json.dumps(idle).encode() + b"\n")
        await child.stdin.drain()
        line = await child.stdout.readline()
        if not line.endswith(b"\n"):
            raise asyncio.IncompleteReadError(line, None)
        head = json.loads(line)
        order, gold, conflicts = [
            np.frombuffer(await child.stdout.readexactly(8 * size), "<i8") for size in head["sizes"]
        ]
        self.queue.install(asked_at, order.tolist(), gold.tolist(), conflicts.tolist())
        self.queue.left, self.queue.seconds, self.queue.claim = head["left"], head["seconds"], head["claim"]
        for why in head["people"]:
            if why not in self._told:
                print(why, file=sys.stderr, flush=True)
        self._told.update(head["people"])
        await self._follow(head.get("runs", []), head.get("close", []))

    @asynccontextmanager
    async def _life(self, app: Starlette) -> AsyncIterator[None]:
        writer, ranker = asyncio.create_task(self._write()), asyncio.create_task(self._rank())
        try:
            yield
        finally:
            ranker.cancel()
            writer.cancel()
            await asyncio.gather(ranker, writer, return_exceptions=True)
            self._disk.shutdown()


def serve(args: Mapping[str, Any]) -> None:
    """Serve a store until SIGTERM or SIGINT.

    args: store (file), port (0: a free one), host, target (the share of wrong labels that is to be certified; None:
    the most useful questions first, without a certificate), most (votes at most of a certified run, as
    `policy.Policy` has it), away_hours (a certified run does not wait for who was not
    seen for so long), votes (answers to each question that cannot be fused),
    suggestions (show what machines say: such votes are not blind), ready: a file that gets {"port", "pid"} once the
    server listens. Raises Busy where another process writes to the store, ResourceError where the port is in use,
    DataError where nobody has a key, or nothing can be certified.
    """
    path, target = Path(args["store"]), args.get("target")
    if target is not None and args.get("suggestions"):
        fix = "leave one of the two out"
        raise DataError("a certificate rests on blind votes alone", where="--target-error, --suggestions", fix=fix)
    away = float(args.get("away_hours", live.AWAY_HOURS))
    if not away > 0:
        what = f"nobody would count as there, and everybody be waited for: {away:g} hours"
        raise DataError(what, where="--away-hours", fix="a number above 0")
    with Store.write(path) as store, Store.read(path) as reader:
        if not store.known():
            fix = f"give somebody one: ottava label key {path} NAME"
            raise DataError("nobody has a key to this store", where=path, fix=fix)
        listener = _listen(args.get("host", LOOPBACK), int(args.get("port", 8010)))
        with listener:
            runs = [] if target is None else live.begin(store, float(target), float(args.get("most", policy.MOST)))
            desk = Desk(store, reader, args.get("votes", 1), bool(args.get("suggestions")), runs, away)
            _Server(desk, listener, args).run(sockets=[listener])


class _Server(uvicorn.Server):
    """Uvicorn, that ends quietly at the first signal and at once at the second."""

    def __init__(self, desk: Desk, listener: socket.socket, args: Mapping[str, Any]):
        super().__init__(
            uvicorn.Config(
                desk.app(), log_level="warning", access_log=False, server_header=False, lifespan="on", loop="asyncio",
                http="h11", ws="none", timeout_graceful_shutdown=3, limit_concurrency=1000,
            )
        )  # fmt: skip
        self._args, self._address, self._path = args, listener.getsockname(), desk.store.path

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = self._address[:2]
        where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print(f"{self._path.name}: people answer at {where} (Ctrl-C stops it)", file=sys.stderr, flush=True)
        if self._args.get("ready"):
            write_json(Path(self._args["ready"]), {"port": port, "pid": os.getpid()})

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True


def _listen(host: str, port: int) -> socket.socket:
    # asyncio switches off Nagle's delay (40 ms an answer) only where a socket says that it is TCP
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise from_os_error(error, f"listening on {host}:{port}") from None
    return listener


async def _body(request: Request, model: type[Model]) -> Model:
    """The request's body, read up to BODY bytes and for BODY_SECONDS. Raises Refused."""
    read = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                read += part
                if len(read) > BODY:
                    raise Refused(413, f"more than {BODY} bytes")
        return model.model_validate_json(bytes(read))
    except (TimeoutError, ClientDisconnect):
        raise Refused(408, "the request did not come to its end") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise Refused(422, f"{'.'.join(map(str, first['loc'])) or 'body'}: {first['msg']}") from None


async def _refuse(request: Request, error: Refused) -> Response:
    headers = page.PLAIN | ({"WWW-Authenticate": "Bearer"} if error.status == 401 else {})
    return JSONResponse({"error": error.message}, error.status, headers)


async def _unable(request: Request, error: OttavaError) -> Response:
    """The disk is full, say: the client keeps its votes and comes again."""
    return JSONResponse({"error": error.what}, 503, page.PLAIN | {"Retry-After": "5"})
