"""The examination of a pool: starts its workers, hears what they find, and outlives their deaths and hangs.

The workers do one part after the other together. Whoever dies, hangs or fails is named and left out, and the others go
on with the part that was not finished. Whoever is slow is measured again by fresh processes: only who is slow both
times is accused. The verdict on what was found is `verdict`'s.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ottava.context import Launcher, Process
from ottava.errors import LauncherGone, OttavaError
from ottava.recipe import Pool
from ottava.supervisor.hub import Hub

TARGET = "ottava.qualify.worker:run"
PARTS = ("numbers", "collectives", "links", "speed", "repeat", "soak")
COMPARED = ("links", "speed")  # parts whose accusations are made again by fresh processes
COMPARISONS = 6  # two of links, up to four works
GRACE_S = 2.0  # for the others' last words after the first has failed
LEASE_S = 60.0  # a worker that hears nothing for so long ends by itself; a busy machine must not end it

STACKS_S = 1.5  # for all workers to write where they stand
MINE, EXCHANGES = "qualify/worker.py", ("torch/distributed/", "trainer/reduce.py")
"""In a stack: of the thread that does the parts; of one that waits for others."""

Data = dict[str, dict[int, dict[str, Any]]]
"""Of each part, each chip's findings; ranks in them have become chips."""


@dataclass(frozen=True)
class Terms:
    """How a pool is examined. factor, link_factor: by how much a worker or link may be slower than the others; alpha:
    of accusing anybody of slowness when all are alike, in one measurement (two are made before a chip is named)."""

    soak_s: float = 60.0
    hang_s: float = 30.0
    start_s: float = 180.0
    seed: int = 0
    alpha: float = 1e-3
    factor: float = 1.25
    link_factor: float = 2.0
    most: int = 1 << 25
    spec: Mapping[str, Any] | None = None
    plants: Sequence[Mapping[str, Any]] = ()
    parts: Sequence[str] = PARTS


@dataclass(frozen=True)
class Failure:
    """A chip that could not go on. kind: died, hangs, error, no start, or unnamed: nobody could be told."""

    chip: int | None
    kind: str
    at: str
    reason: str


@dataclass
class Found:
    """What an examination found. soaked_s: seconds of workers under soak; start_s: of a group, until all were there."""

    chips: tuple[int, ...]
    data: Data = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    soaked_s: float = 0.0
    start_s: float = 0.0
    again: Data = field(default_factory=dict)
    changed: set[int] = field(default_factory=set)

    @property
    def left(self) -> tuple[int, ...]:
        """The chips that have not failed."""
        gone = {failure.chip for failure in self.failures}
        return tuple(chip for chip in self.chips if chip not in gone)


Told = Callable[[float, str], None]


def examine(launcher: Launcher, pool: Pool, terms: Terms, logs: Path, told: Told = lambda share, said: None) -> Found:
    """Examine all workers of a pool. told: hears how far it is (0 to 1) and what is being done.

    Raises LauncherGone, ResourceError and what else is no verdict on the pool.
    """
    found = Found(tuple(range(pool.workers)))
    with Hub(launcher.host, LEASE_S) as hub:
        epochs = itertools.count(1)

        def group(parts: Sequence[str], changed: Mapping[str, Any]) -> _Group:
            return _Group(launcher, hub, next(epochs), pool, terms, found, parts, changed, logs, told)

        while (parts := [part for part in terms.parts if part not in found.data]) and found.left:
            one = group(parts, {})
            one.run()
            if one.failure is None:
                break
            found.failures.append(one.failure)
            if one.failure.chip is None:
                break
        if found.left and (suspected := [part for part in COMPARED if accusing(found.data.get(part, {}))]):
            one = group(suspected, {"seed": terms.seed + 1})
            one.into = found.again
            one.run()
            if one.failure is not None:
                found.failures.append(one.failure)
    told(1.0, "")
    return found


def accusing(part: Mapping[int, Mapping[str, Any]]) -> bool:
    """Whether anybody is called slow in a part."""
    return any(
        data.get("slow") or any(w.get("accused") for w in data.values() if isinstance(w, dict))
        for data in part.values()
    )


class _Group:
    """One start of the workers that are left. failure: what ended it, None: they did all parts."""

    def __init__(
        self, launcher: Launcher, hub: Hub, epoch: int, pool: Pool, terms: Terms, found: Found,
        parts: Sequence[str], changed: Mapping[str, Any], logs: Path, told: Told,
    ):  # fmt: skip
        self.failure: Failure | None = None
        self.into = found.data
        self._launcher, self._hub, self._epoch, self._pool, self._terms = launcher, hub, epoch, pool, terms
        self._found, self._parts, self._changed, self._logs, self._told = found, parts, changed, logs, told
        self._chips = found.left
        self._processes: list[Process] = []
        self._at = dict.fromkeys(range(len(self._chips)), "start")
        self._count = dict.fromkeys(self._at, 0)
        self._heard: dict[int, float] = {}
        self._alarms: dict[int, tuple[str, str]] = {}
        self._parts_of: dict[str, dict[int, dict[str, Any]]] = {}
        self._soak_begun: float | None = None

    def run(self) -> None:
        """Start, hear, end; nothing is left alive."""
        self._told(self._share(), "starting workers")
        begun = time.monotonic()
        try:
            self._start()
            self._watch(begun)
        finally:
            if self._soak_begun is not None:
                self._found.soaked_s += len(self._chips) * (self._last - self._soak_begun)
            for process in self._processes:
                if process.alive():
                    process.kill()
            for process in self._processes:
                process.wait()

    def _start(self) -> None:
        terms = self._terms
        args = {
            "platform": self._pool.platform, "chips": list(self._chips), "parts": list(self._parts), "seed": terms.seed,
            "alpha": terms.alpha / COMPARISONS, "factor": terms.factor, "link_factor": terms.link_factor,
            "soak_s": terms.soak_s, "hang_s": terms.hang_s, "plants": list(terms.plants), "spec": terms.spec,
            "most": terms.most, **self._changed,
        }  # fmt: skip
        line = self._hub.admit(self._epoch, len(self._chips))
        for env in self._launcher.rendezvous(self._pool, len(self._chips), self._chips):
            self._processes.append(
                self._launcher.spawn(TARGET, args, pool=self._pool, logs=self._logs, env={**env, **line})
            )

    def _watch(self, begun: float) -> None:
        self._last, joined, failed = begun, set(), None
        while True:
            for message in self._hub.hear(0.05):
                self._hear(message)
                if message["say"] == "join":
                    joined.add(message["rank"])
                    if len(joined) == len(self._chips):
                        self._found.start_s = self._found.start_s or time.monotonic() - begun
                        self._hub.tell("go")
            statuses = [process.wait(0) for process in self._processes]
            if all(status == 0 for status in statuses):
                for message in self._hub.hear(0.2):
                    self._hear(message)
                self._close_parts()
                return
            now = time.monotonic()
            if failed is None and (self._alarms or any(status not in (None, 0) for status in statuses)):
                failed = now
            if failed is not None and (now - failed > GRACE_S or None not in statuses):
                self.failure = self._ended(statuses)
            elif failed is None:
                here = len(joined) == len(self._chips)
                if now - self._last > (self._terms.hang_s if here else self._terms.start_s):
                    self.failure = self._hangs(now, joined)
            if self.failure is not None:
                self._close_parts()
                return

    def _hear(self, message: Mapping[str, Any]) -> None:
        rank, say = message["rank"], message["say"]
        self._heard[rank] = message["t"]
        if say in ("at", "found", "join", "bye", "changed"):
            self._last = message["t"]
            self._count[rank] += 1
        if say == "at":
            self._at[rank] = message["at"]
            if message["at"].startswith("soak:") and self._soak_begun is None:
                self._soak_begun = message["t"]
            self._told(self._share(), self._said())
        elif say == "found":
            self._parts_of.setdefault(message["part"], {})[rank] = message["data"]
        elif say == "changed":
            self._found.changed.add(self._chips[rank])
        elif say == "alarm":
            self._alarms[rank] = message["kind"], message["message"]

    def _close_parts(self) -> None:
        """Keep the parts that all have finished, by chip."""
        for part, by_rank in self._parts_of.items():
            if len(by_rank) == len(self._chips):
                self.into[part] = {self._chips[r]: _by_chip(data, self._chips) for r, data in by_rank.items()}

    def _ended(self, statuses: Sequence[int | None]) -> Failure:
        """Whom a failure speaks against: who was killed, else who ended without a word or with an error of its own;
        the others only lost a peer."""
        killed = [rank for rank, status in enumerate(statuses) if status is not None and status < 0]
        silent = [r for r, status in enumerate(statuses) if status not in (None, 0) and r not in self._alarms]
        own = [rank for rank, (kind, _) in self._alarms.items() if kind != "collective"]
        for ranks, kind in ((killed, "died"), (silent, "died"), (own, "error")):
            if ranks:
                rank = ranks[0]
                return Failure(self._chips[rank], kind, self._at[rank], self._last_words(rank))
        said = next(iter(self._alarms.values()), ("", "nothing was said"))[1]
        return Failure(None, "unnamed", self._at[0], f"the workers cannot exchange data: {said}")

    def _last_words(self, rank: int) -> str:
        if rank in self._alarms:
            return self._alarms[rank][1]
        try:
            self._processes[rank].result()
        except LauncherGone:
            raise
        except OttavaError as error:
            return error.what
        return "a worker ended without an answer"

    def _hangs(self, now: float, joined: set[int]) -> Failure:
        """Who hangs: who does not even beat, else who came less far than the others."""
        missing = [rank for rank in self._at if rank not in joined]
        if missing:
            rank = missing[0]
            return Failure(self._chips[rank], "no start", "start", f"not there after {self._terms.start_s:g} s")
        quiet = [r for r in self._at if now - self._heard.get(r, 0.0) > self._terms.hang_s / 2]
        least = min(self._count.values())
        behind = [rank for rank, count in self._count.items() if count == least]
        suspects: tuple[tuple[Callable[[], list[int]], str], ...] = (
            (lambda: quiet, "is stopped: not a sign of life"),
            (lambda: behind, "does not go on, and the others wait"),
            (self._elsewhere, "stands in code of its own, and the others wait"),
        )
        for who, how in suspects:
            ranks = who()
            if 0 < len(ranks) < len(self._chips) or len(self._chips) == 1:
                rank = ranks[0]
                return Failure(self._chips[rank], "hangs", self._at[rank], f"{how} for {self._terms.hang_s:g} s")
        return Failure(None, "unnamed", self._at[0], f"all wait for each other for {self._terms.hang_s:g} s")

    def _elsewhere(self) -> list[int]:
        """Who came as far as the others and does not wait for them: all others stand in an exchange (their stacks)."""
        paths = {rank: (self._logs / f"stacks-epoch{self._epoch}-rank{rank}.txt").resolve() for rank in self._at}
        for rank, path in paths.items():
            self._hub.tell("stacks", rank, path=str(path))
        time.sleep(STACKS_S)
        standing = {rank: path.read_text(errors="replace") if path.exists() else "" for rank, path in paths.items()}
        if not all(MINE in text for text in standing.values()):
            return []
        own = [rank for rank, text in standing.items() if not _exchanges(text)]
        return own if len(own) == 1 else []

    def _share(self) -> float:
        """How much of the examination is done: parts count alike, but the soak for its time beside 3 s each."""
        weights = {part: 3.0 if part != "soak" else max(1.0, self._terms.soak_s) for part in self._terms.parts}
        place, _, number = min(self._at.values(), key=_order).partition(":")
        done = sum(weight for part, weight in weights.items() if part in self._found.data)
        if place in weights and place not in self._found.data:
            before = itertools.takewhile(lambda part: part != place, self._parts)
            done += sum(weights[part] for part in before if part not in self._found.data)
            within = min(1.0, int(number or 0) / 16)
            if place == "soak" and self._soak_begun is not None:
                within = min(1.0, (self._last - self._soak_begun) / max(1e-9, self._terms.soak_s))
            done += within * weights[place]
        return done / sum(weights.values())

    def _said(self) -> str:
        place = min(self._at.values(), key=_order).partition(":")[0]
        if place != "soak" or self._soak_begun is None:
            return place
        from ottava.qualify.completion import rate

        soaked = self._found.soaked_s + len(self._chips) * max(1.0, self._last - self._soak_begun)
        failed = len({f.chip for f in self._found.failures} | self._found.changed)
        shown = rate(failed, soaked).per_worker_hour
        return f"soak: {failed} failures, {shown['low']:.3g} to {shown['high']:.3g} a worker hour"


def _exchanges(stacks: str) -> bool:
    """Whether the thread that does the parts stands in a call that exchanges data (a dump of faulthandler)."""
    own = next(thread for thread in stacks.split("\n\n") if MINE in thread)
    return any(place in own for place in EXCHANGES)


def _order(place: str) -> tuple[int, int]:
    part, _, number = place.partition(":")
    with suppress(ValueError):
        return PARTS.index(part), int(number or 0)
    return -1, 0


def _by_chip(data: dict[str, Any], chips: Sequence[int]) -> dict[str, Any]:
    """Findings whose ranks have become chips."""
    out = dict(data)
    for name in ("slow", "wrong"):
        if name in out:
            out[name] = [[chips[a], chips[b]] for a, b in out[name]]
    if "map" in out:
        out["map"] = [{**link, "from": chips[link["from"]], "to": chips[link["to"]]} for link in out["map"]]
    for name, work in out.items():
        if isinstance(work, dict) and "accused" in work:
            out[name] = {**work, "accused": [chips[rank] for rank in work["accused"]]}
    return out
