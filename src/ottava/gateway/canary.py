"""A share of what backends said is asked again elsewhere, and a backend that has drifted is taken out.

A certificate says what a backend was when it started; memory and chips go bad later. A sampled reply that has ended is
re-scored by another certified backend that holds the same values, while that has a slot to spare. Backends that were
certified by bits are asked the same again, and must say the same ids and log-probabilities: one that differs is enough.
All others are scored teacher-forced, and `verify.drift` weighs the scores of each.

Two that differ do not say who is wrong. So before anybody is taken out, a process that has loaded the reference just
now is asked too: whoever differs from it is refused. Where it cannot be asked, the backend under test is. Scores may
also grow because of what is asked, in words that the certificate's texts lack. Those of the control then grow as well:
unless the backend's have grown against the control's, on the same texts, the evidence is dropped.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections import deque
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ottava.engine.session import Sampling, Token
from ottava.errors import OttavaError
from ottava.gateway.child import Child, Lost
from ottava.gateway.parity import Certificate, Parity
from ottava.verify.drift import ALPHA, ALTERNATIVES, Drift, Seen, against, scores, shared

if TYPE_CHECKING:
    from ottava.gateway.pool import Deliver, Item, Pool

SHARE = 0.02
"""Of the replies. Every id that is scored costs what it cost to say, so this is also the share of the machine."""
BACKLOG = 16
"""Replies that wait to be scored; the oldest goes when another comes."""
RECENT = 64
"""Replies of a backend that the control is asked about."""


@dataclass
class Reply:
    """What was said to a prompt, id by id, and which backend said it. held: the certificates that these had then.

    forced: the client's own beginning of it, which nobody chose.
    """

    ids: Sequence[int]
    sampling: Sampling
    forced: Sequence[int] = ()
    tokens: list[Token] = field(default_factory=list)
    speakers: list[str] = field(default_factory=list)
    held: dict[str, Certificate | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Weighed:
    """Ids of a reply that were scored. text: those of prompt and reply."""

    text: Sequence[int]
    seen: Sequence[Seen]


@dataclass
class Record:
    """What is known of one backend. tokens: of its that were scored; mismatched: of these, that were not the bits."""

    drift: Drift
    certificate: Certificate
    tokens: int = 0
    mismatched: int = 0
    recent: deque[Weighed] = field(default_factory=lambda: deque(maxlen=RECENT))


class Canary:
    """Watches the backends of a pool. share: of the replies that are scored again; alpha: of one false alarm, ever."""

    def __init__(self, pool: Pool, parity: Parity, share: float = SHARE, alpha: float = ALPHA, seed: int | None = None):
        self.share, self.alpha = share, alpha
        self.events: list[dict[str, Any]] = []
        self.dropped = 0
        self._pool, self._parity, self._dice = pool, parity, random.Random(seed)
        self._waiting: deque[Reply] = deque(maxlen=BACKLOG)
        self._come = asyncio.Event()
        self._records: dict[str, Record] = {}

    def tap(
        self, ids: Sequence[int], sampling: Sampling, deliver: Deliver, forced: Sequence[int] = ()
    ) -> tuple[Sampling, Deliver]:
        """How to ask, and where to deliver to: what passes of a sampled request is kept. sampling: with its seed."""
        if self._dice.random() >= self.share:
            return sampling, deliver
        asked, reply, speaker = sampling.top, Reply(ids, sampling, forced), ""
        if not all(one.bits for one in self._parity.certificates.values()):
            sampling = replace(sampling, top=max(asked, ALTERNATIVES))

        def both(item: Item) -> object:
            nonlocal speaker
            if isinstance(item, Token):
                reply.tokens.append(item)
                reply.speakers.append(speaker)
                if sampling.top > asked:
                    item = replace(item, top=item.top[:asked])
            elif item is None or isinstance(item, Exception):
                self._ended(reply)
            else:
                speaker = item.backend
                reply.held[speaker] = self._parity.certificates.get(speaker)
            return deliver(item)

        return sampling, both

    def _ended(self, reply: Reply) -> None:
        if reply.tokens:
            self.dropped += len(self._waiting) == BACKLOG
            self._waiting.append(reply)
            self._come.set()

    async def work(self) -> None:
        """Score what comes, one reply at a time, for ever."""
        while True:
            self._come.clear()
            while self._waiting:
                reply = self._waiting.popleft()
                try:
                    await self.look(reply)
                except Lost:  # whoever was to score it died: another reply will come
                    self.dropped += 1
                except Exception as error:  # the watch goes on
                    self.dropped += 1
                    print(f"canary: a reply could not be scored: {error!r}", file=sys.stderr, flush=True)
            await self._come.wait()

    async def look(self, reply: Reply) -> None:
        """Re-score one reply, and refuse who has drifted. Does nothing where nobody can be asked."""
        scorer = await self._scorer(reply)
        if scorer is None:
            self.dropped += 1
            return
        exact = self._exact(reply)
        try:
            said = await _said_again(scorer, reply, exact)
        finally:
            self._pool.release(scorer)
        at = _first_apart(reply.tokens, said)
        if exact and at is not None:  # what comes behind follows from other ids
            reply, said = (
                replace(reply, tokens=reply.tokens[: at + 1], speakers=reply.speakers[: at + 1]),
                said[: at + 1],
            )
        for name in dict.fromkeys(reply.speakers):
            if self._parity.certificates.get(name) is reply.held[name] and self._weigh(name, reply, said):
                await self._settle(name, scorer, reply, said, exact)

    def _exact(self, reply: Reply) -> bool:
        """Whether all that spoke owe the same bits, so that asking again tests the choice of ids too."""
        return all(one is not None and one.bits for one in reply.held.values())

    async def _scorer(self, reply: Reply) -> Child | None:
        """Another backend of the same values, with a slot to spare; one certified by bits where there is one."""
        names = set(reply.speakers)
        digests = {None if one is None else one.digest for one in reply.held.values()}
        if len(digests) != 1 or None in digests:
            return None
        while True:
            able = [
                (one.bits, child)
                for child in self._pool.children
                if child.state == "ready"
                and child.place.name not in names
                and (one := self._parity.certificates.get(child.place.name)) is not None
                and one.digest in digests
                and (one.bits or one.reference.numerics is None)
            ]
            if not able:
                return None
            free = [child for bits, child in sorted(able, key=lambda pair: not pair[0]) if child.free]
            if free and not self._pool.waiting:
                free[0].busy += 1
                return free[0]
            await asyncio.sleep(0.05)

    def _weigh(self, name: str, reply: Reply, said: Sequence[Token]) -> bool:
        """Add one backend's part of a reply to its record; whether that is enough against it."""
        record = self._record(name)
        mine = [i for i, speaker in enumerate(reply.speakers) if speaker == name]
        record.tokens += len(mine)
        if record.certificate.bits:
            differ = [i for i in mine if i >= len(said) or not _equal(reply.tokens[i], said[i])]
            record.mismatched += len(differ)
            return bool(differ)
        seen = [_seen(reply, i, said[i]) for i in mine if i < len(said)]
        record.recent.append(Weighed([*reply.ids, *(token.id for token in reply.tokens)], seen))
        return record.drift.add(scores(seen))

    def _record(self, name: str) -> Record:
        """Of a backend since its certificate: a new one begins anew, except that bits keep no memory."""
        certificate = self._parity.certificates[name]
        held = self._records.get(name)
        if held is None or held.certificate.digest != certificate.digest:
            drift = Drift(random.Random(self._dice.random()), self.alpha)
            if not certificate.bits:
                drift.calibrate(one for reply in certified(certificate) for one in scores(reply.seen))
            held = self._records[name] = Record(drift, certificate)
        return held

    async def _settle(self, name: str, scorer: Child, reply: Reply, said: Sequence[Token], exact: bool) -> None:
        """Ask a process that has just loaded the reference, and refuse whoever differs from it."""
        record, other = self._records[name], scorer.place.name
        bits, judged = record.certificate.bits, self._parity.certificates.get(other)
        why = "it said other bits than it was certified for"
        if not bits:
            why = (
                f"its log-probabilities are no longer those of its certificate, evidence e^{record.drift.evidence:.1f}"
            )
        try:
            async with self._parity.fresh(record.certificate.reference.folder) as fresh:
                truth = await _said_again(fresh, reply, exact)
        except (OttavaError, Lost, TimeoutError):
            self._refuse(name, why, f"{other} said otherwise, and nobody else could be asked")
            return
        by = "so said a process that had just loaded the reference"
        mine = [i for i, speaker in enumerate(reply.speakers) if speaker == name]
        scorer_wrong = judged is not None and judged.bits and _first_apart(said, truth) is not None
        if scorer_wrong:
            self._refuse(other, "it said other bits than it was certified for", by)
        if not bits and scorer_wrong:
            del self._records[name]  # it was weighed on a faulty scale
        elif not bits and not await self._parted(record):
            print(
                f"canary: {name}: the control has drifted as it did: it is what is asked", file=sys.stderr, flush=True
            )
            self.events.append(
                {"backend": name, "why": "traffic unlike the certificate's texts", "tokens": record.tokens}
            )
            record.drift.begin_again()
        elif not bits or any(i >= len(truth) or not _equal(reply.tokens[i], truth[i]) for i in mine):
            self._refuse(name, why, by)

    async def _parted(self, record: Record) -> bool:
        """Whether in its last replies it has parted from the control, which reads the same texts."""
        before, last = certified(record.certificate), [*record.recent]
        try:
            control = await self._controlled(record.certificate.reference.folder, [*before, *last])
        except (OttavaError, OSError):
            return True
        pairs = zip([*before, *last], control, strict=True)
        ratios = [against(scores(one.seen), scores(other)) for one, other in pairs]
        drift = Drift(random.Random(self._dice.random()), self.alpha)
        drift.calibrate(score for reply in ratios[: len(before)] for score in reply)
        return any(drift.add(reply) for reply in ratios[len(before) :])

    async def _controlled(self, folder: Path, replies: Sequence[Weighed]) -> list[list[Seen]]:
        """The same ids as the control would have served them."""
        asked: list[list[list[int]]] = [[[] for _ in one.text[1:]] for one in replies]
        for one, row in zip(replies, asked, strict=True):
            for seen in one.seen:
                row[seen.at - 1] = [other for other, *_ in seen.others]
        said = await self._parity.control(folder, [one.text for one in replies], asked)
        found = []
        for one, rows in zip(replies, said, strict=True):
            found.append([_served(seen, rows[seen.at - 1]) for seen in one.seen])
        return found

    def _refuse(self, name: str, why: str, by: str) -> None:
        scored = self._records[name].tokens if name in self._records else 0
        child = next(child for child in self._pool.children if child.place.name == name)
        self.events.append({"backend": name, "why": why, "by": by, "tokens": scored})
        print(f"canary: {name}: {why}; {scored} of its ids were scored; {by}", file=sys.stderr, flush=True)
        self._parity.certificates.pop(name, None)
        self._parity.refused[name] = why
        child.refuse(why)

    def report(self) -> dict[str, Any]:
        """{"share", "alpha", "dropped": replies that were not scored, "backends": a row for each, "events"}."""
        rows = [
            {
                "backend": name,
                "tokens": record.tokens,
                "mismatched": record.mismatched,
                "evidence": record.drift.evidence,
            }
            for name, record in self._records.items()
        ]
        return {
            "share": self.share, "alpha": self.alpha, "dropped": self.dropped, "backends": rows, "events": self.events,
        }  # fmt: skip

    def tokens(self, name: str) -> float:
        """Ids of a backend that were scored, for the metrics."""
        return float(self._records[name].tokens) if name in self._records else 0.0


def certified(certificate: Certificate) -> list[Weighed]:
    """What a backend said of the reference's replies, for its certificate."""
    reference = certificate.reference
    rows = zip(reference.texts, reference.starts, certificate.said, reference.said, strict=False)
    return [
        Weighed(text, [_pair(start + at, *pair) for at, pair in enumerate(zip(mine, theirs, strict=True))])
        for text, start, mine, theirs in rows
    ]


def _pair(at: int, served: Token, scorer: Token, margin: float = 0.0) -> Seen:
    return Seen(at, served.logprob, scorer.logprob, margin, shared(served.top, scorer.top))


def _served(seen: Seen, values: Sequence[float]) -> Seen:
    """The same id, served with these log-probabilities: its own first."""
    others = tuple((other, value, scorer) for (other, _, scorer), value in zip(seen.others, values[1:], strict=True))
    return Seen(seen.at, values[0], seen.scorer, 0.0, others)


async def _said_again(child: Child, reply: Reply, exact: bool) -> list[Token]:
    """What another says: exact: to the same question; else of the ids that were said. At most as many as were."""
    if not exact:
        text = [*reply.ids, *(token.id for token in reply.tokens)]
        return await child.forced(text, len(reply.ids), ALTERNATIVES)
    found: list[Token] = []
    async with aclosing(child.generate(reply.ids, reply.sampling, [], reply.forced)) as tokens:
        async for token in tokens:
            found.append(token)
            if len(found) == len(reply.tokens):
                break
    return found


def _seen(reply: Reply, at: int, said: Token) -> Seen:
    how, token = reply.sampling, reply.tokens[at]
    forced = how.think is not None and token.id == how.think.end  # by the budget, perhaps, and not by choice
    free = how.temperature == 0 and how.grammar is None and at >= len(reply.forced) and not forced
    margin = said.top[0][1] - said.logprob if said.top and free else 0.0
    return _pair(len(reply.ids) + at, token, said, margin)


def _equal(a: Token, b: Token) -> bool:
    return a.id == b.id and a.logprob == b.logprob


def _first_apart(a: Sequence[Token], b: Sequence[Token]) -> int | None:
    """The first place in which they differ."""
    pairs = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if not _equal(x, y))
    return next(pairs, None if len(a) == len(b) else min(len(a), len(b)))
