"""The whole policy over a store that people answer: audit, certificate and forecast, as `policy` has them.

`policy` asks for one vote after another and waits for it; many people answer at once, in any order. Both go together
because nothing here depends on time. What is said of an item is a list, in the order in which it came to disk, and the
policy takes the next of it when it wants a vote on that item, or waits until there is one. So a run is a function of
its beginning and of these lists, whoever was asked first and however often the server died: `follow` comes to the
same end from the rows alone, which is how a certificate is checked (`certify`).

People are kept busy with what the policy will ask next (`Policy.coming`). The certificate allows it: items are drawn by
dice that were thrown when the run began, before anybody had said anything, and answers are blind, so which votes are
there already has no part in which items are drawn, nor in what panels say of them. The bound is told the verdicts in
the order of the draw, and only those that it waits for.

What a run has taken may not be taken back: an answer is open for `UNDO_S`, or until the same person has given another
one. Nobody is waited for who was not seen for long; that is a row of the store too (`runs`), as the run depends on it.

    python -m ottava.labels.live STORE RUN...   as `labels.ranking`: a line "go" in; a JSON line and its arrays out
"""

from __future__ import annotations

import argparse
import json
import math
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ottava.errors import DataError, Verdict
from ottava.labels import bound, panel, questions, ranking
from ottava.labels.policy import MOST, Ask, Done, Policy, Questions
from ottava.labels.ranking import Group, Live, Ranker, Ranking
from ottava.labels.store import Decision, Store, now

KIND = "ottava label run 1"
METHOD = "certified run"
HOLD_S = 12.0
"""An answer is taken once it is so old, or its giver has answered again."""
UNDO_S = 8.0
"""And can be taken back until then: a little shorter, so that no undo comes to disk too late."""
AWAY_HOURS = 24.0
"""Who was not seen for so long is not waited for."""
SEATS = 50
"""People who may join while a run is on, beyond those who have a key when it begins."""
BUSY = 60, 1 / 200
"""Items that may not be needed, at most, with which people are kept busy, or this share of all, if that is more: the
rest of a run is not known yet."""
ANYBODY = -1
WAITING = "waiting"


@dataclass(frozen=True)
class Said:
    """One blind vote: its number in the store, who (a seat), which class, and whether it can no longer be undone."""

    seq: int
    uid: str
    person: int
    label: int
    settled: bool


@dataclass
class Book:
    """What was said of a run's items, by place, in order. closed: items that nobody is waited for, and the vote up to
    which they count."""

    said: dict[int, list[Said]] = field(default_factory=dict)
    closed: dict[int, int] = field(default_factory=dict)

    def next(self, item: int, taken: int) -> Said | str | None:
        """The vote on an item behind those that were taken; WAITING; None: there will be none."""
        said, end = self.said.get(item, ()), self.closed.get(item)
        if taken < len(said) and (end is None or said[taken].seq <= end):
            return said[taken] if said[taken].settled else WAITING
        return WAITING if end is None else None


@dataclass
class Following(Policy):
    """The policy, with votes from a book: whoever has answered was asked. It yields where it has to wait."""

    book: Book = field(default_factory=Book)
    taken: dict[int, int] = field(default_factory=dict)
    used: list[tuple[int, Said]] = field(default_factory=list)

    def _vote(self, item: int, audit: bool = False) -> Questions:
        while True:
            found = self.book.next(item, self.taken.get(item, 0))
            if found is None:
                return None
            if isinstance(found, str):
                yield Ask(item, ANYBODY)
                continue
            self.taken[item] = self.taken.get(item, 0) + 1
            self.used.append((item, found))
            self.asked += 1
            if self._useful[found.person]:
                self._given[found.person] += 1
                self.evidence.add(item, found.person, found.label)
                return found.person, found.label

    def wanted(self) -> list[int]:
        """Items on which votes are wanted, the next first, as far as nobody has given them."""
        coming = [int(item) for item in self.coming]
        busy = max(BUSY[0], int(BUSY[1] * len(self.world)))
        ahead = coming[:busy] if self.phase == "audit" else coming
        if self.phase == "label":  # what is likely to follow
            rest = np.argsort(-self._gain, kind="stable")[: len(ahead) + busy]
            ahead += [int(item) for item in rest if self._gain[item] > 1e-9]
        out: dict[int, None] = dict.fromkeys(ahead[:1])
        for item in ahead[1:]:
            if item not in self.book.closed and self._short(item):
                out[item] = None
        return list(out)

    def _short(self, item: int) -> bool:
        """Whether more votes will be wanted on an item than are there, as far as they tell."""
        there = self.book.said.get(item, [])[self.taken.get(item, 0) :]
        if self.phase == "calibrate":
            return len(there) + int(self.evidence.counts[item]) < 2
        if self.phase == "label":
            return not there
        assert self._frozen is not None
        agree = [1 if one.label == self._frozen[item] else -1 for one in there]
        odds = np.cumsum([sign * self._weight[one.person] for sign, one in zip(agree, there, strict=True)])
        return all(panel.verdict(at, answers, True) is None for answers, at in enumerate(odds.tolist(), 1))


@dataclass
class Run:
    """One run of the policy over one group. begun: its row; number: of that row; ids: of items, by place; rows: their
    numbers in the store."""

    number: int
    begun: Mapping[str, Any]
    group: Group
    policy: Following
    done: Done | None = None

    def __post_init__(self) -> None:
        self._steps = self.policy.run()

    @property
    def rows(self) -> Sequence[int]:
        return self.group.rows

    def wake(self, book: Book) -> None:
        """Go on as far as the book goes."""
        self.policy.book = book
        try:
            if self.done is None:
                next(self._steps)
        except StopIteration as end:
            self.done = end.value

    def certificate(self) -> dict[str, Any]:
        """What the run has proven, of which votes and which decisions."""
        done = self.done
        assert done is not None
        names = [item.id for item in self.group.items]
        said = [[names[item], one.uid, one.person, one.label] for item, one in self.policy.used]
        return {
            "kind": KIND, "run": self.number, "items": len(names), "answers": list(self.group.classes),
            "target": self.begun["target"], "reached": done.reached, "error": round(done.error, 6),
            "error_upper_95": round(min(done.upper + 5e-7, 1.0), 6), "audited": done.audited, "votes": done.votes,
            "bound": "weighted audit, anytime-valid", "annotator": "people",
            "votes_sha256": bound.digest(said),
            "decisions_sha256": bound.digest(zip(names, self._labels(), strict=True)),
            "notes": list(done.notes),
        }  # fmt: skip

    def decisions(self) -> list[tuple[str, str, float]]:
        """(item's id, label, believed error)."""
        risks = self.policy.evidence.risks().tolist()
        return [
            (item.id, label, risk) for item, label, risk in zip(self.group.items, self._labels(), risks, strict=True)
        ]

    def _labels(self) -> list[str]:
        assert self.done is not None
        return [self.group.classes[k] for k in self.done.decisions.tolist()]


# ---- beginnings, which the writer writes


def begin(store: Store, target: float, most: float = MOST) -> list[int]:
    """Begin a run of each group of items that can be certified, or go on with the one that is on: their numbers.

    most: votes at most, as `Policy` has it. A new one begins where there is none, where the last one has ended and
    there is more to do (new items), and where another target or another most is asked for. Raises
    DataError where nothing can be certified.
    """
    if not 0 < target < 1:
        raise DataError(f"the target is a share between 0 and 1: {target}", where="--target-error")
    if not 0 < most < math.inf:
        raise DataError(f"a number above 0, of times the usual rule: {most}", where="--most-votes")
    ranker = Ranker(store, target)
    ranker._read_items()
    groups = [group for group in ranker.groups.values() if certifiable(group)]
    if not groups:
        fix = "leave --target-error out: free text and marked steps are asked without a certificate"
        raise DataError("no questions here have answers that can be certified", where=store.path, fix=fix)
    before = {tuple(row["group"]): (number, row) for number, row in runs(store)}
    ended = {one["run"] for one in certificates(store)}
    numbers = []
    for group in groups:
        number, row = before.get(_name(group), (0, {}))
        last = group.rows[-1]
        if row and (row["target"], row["most"]) == (target, most) and (number not in ended or row["items"] >= last):
            numbers.append(number)
            continue
        opinions = store.db.execute("SELECT max(seq) FROM opinions").fetchone()[0] or 0
        document = {
            "group": list(_name(group)), "target": target, "most": most, "seed": secrets.randbits(32), "items": last,
            "opinions": opinions, "seats": store.count("annotators") + SEATS,
        }  # fmt: skip
        numbers.append(store.add_run({"begin": document}))
    return numbers


def certifiable(group: Group) -> bool:
    """Whether the policy can fuse what people say of these items to one label each."""
    return group.kind != "steps" and len(group.classes) > 1


def _name(group: Group) -> tuple[str, ...]:
    return (group.kind, *group.classes)


def runs(store: Store) -> list[tuple[int, dict[str, Any]]]:
    """The beginnings, with their numbers, the newest last."""
    rows = store.db.execute("SELECT seq, document FROM runs ORDER BY seq")
    found = [(int(seq), json.loads(text)) for seq, text in rows]
    return [(seq, {"most": MOST} | document["begin"]) for seq, document in found if "begin" in document]


def certificates(store: Store) -> list[dict[str, Any]]:
    """Those of runs, the newest last."""
    rows = store.db.execute("SELECT document FROM certificates ORDER BY seq")
    found = [json.loads(text) for (text,) in rows]
    return [one for one in found if isinstance(one, dict) and one.get("kind") == KIND]


def ended(certificate: Mapping[str, Any]) -> str:
    """What a run has come to, in words."""
    one = certificate
    words = "certified" if one["reached"] else f"not certified to {one['target']:.2%}"
    return (
        f"run {one['run']} has ended, {words}: of {one['items']:,} labels no more than {one['error_upper_95']:.2%} "
        f"are wrong, at 95% confidence ({one['votes']:,} votes, {one['audited']:,} labels audited)"
    )


# ---- following the rows


class Follower(Ranker):
    """Ranks as `Ranker` does, but where a run is on, what the run waits for comes first, and nothing else of its
    group. numbers: of the runs to follow; away_hours: who was not seen for so long is not waited for."""

    def __init__(
        self, store: Store, numbers: Sequence[int], clock_ms: int | None = None, away_hours: float = AWAY_HOURS
    ):
        beginnings = dict(runs(store))
        missing = [number for number in numbers if number not in beginnings]
        if missing:
            raise DataError(f"the store has no run {missing[0]}", where=store.path)
        super().__init__(store, max(beginnings[number]["target"] for number in numbers))
        self._begun = {tuple(beginnings[n]["group"]): (n, beginnings[n]) for n in numbers}
        self._clock, self._away_ms = clock_ms, away_hours * 3_600_000
        self.runs: dict[int, Run] = {}

    def rank(self) -> Ranking:
        """As `Ranker.rank`, without known questions: a run has its own ways to see who guesses."""
        return replace(super().rank(), gold=np.empty(0, np.int64))

    def _group(
        self, group: Group, live: dict[int, list[Live]], people: list[str], decided: set[int], fresh: bool
    ) -> tuple[Any, list[int], list[int], int, float | None, list[str]]:
        if _name(group) not in self._begun:
            return super()._group(group, live, people, decided, fresh)
        number, begun = self._begun[_name(group)]
        run = self.runs.get(number) or self._open(number, begun, group)
        run.wake(self.book(run))
        score = np.zeros(len(group.rows))
        if run.done is None:
            wanted = run.policy.wanted()
            score[wanted] = 100.0 - np.arange(len(wanted)) / max(len(group.rows), 1)
        claim, left = run.policy._claim(), 0
        why = [f"{people[one]}: {run.policy.found[one].why}" for one in run.policy.found if one < len(people)]
        return score, [], [], left, claim, why

    def _open(self, number: int, begun: Mapping[str, Any], group: Group) -> Run:
        """The run as it began: with the items, opinions and people of that moment."""
        size = int(np.searchsorted(group.rows, begun["items"], side="right"))
        said: dict[int, dict[str, Any]] = {}
        query = "SELECT item, who, answer FROM opinions WHERE seq <= ? ORDER BY seq"
        for row, who, answer in self.store.db.execute(query, (begun["opinions"],)):
            said.setdefault(row, {})[who] = json.loads(answer)
        items = [
            replace(item, opinions=said.get(row, {}))
            for item, row in zip(group.items[:size], group.rows[:size], strict=True)
        ]
        then = Group(group.kind, group.classes, items, group.rows[:size], dict(group.where))
        world = ranking._world(then, [f"seat {k}" for k in range(begun["seats"])])
        run = self.runs[number] = Run(
            number, begun, then, Following(world, begun["target"], begun["seed"], begun["most"])
        )
        return run

    def book(self, run: Run) -> Book:
        """What was said of its items so far. Not blind, or from beyond the last seat: no evidence."""
        db, book, size = self.store.db, Book(), len(run.rows)
        last = dict(db.execute("SELECT annotator, max(seq) FROM votes GROUP BY annotator"))
        old = (now() if self._clock is None else self._clock) - HOLD_S * 1000
        for seq, uid, row, person, answer, stored in db.execute(
            "SELECT seq, uid, item, annotator, answer, stored FROM live WHERE blind ORDER BY seq"
        ):
            place = run.group.where.get(row, size)
            if place >= size or person > run.begun["seats"]:
                continue
            label = questions.fused_class(run.group.items[place], json.loads(answer))
            assert label is not None
            settled = last[person] > seq or stored <= old
            book.said.setdefault(place, []).append(Said(seq, uid, person - 1, label, settled))
        for (text,) in db.execute("SELECT document FROM runs ORDER BY seq"):
            closed = json.loads(text).get("close")
            if closed and closed["run"] == run.number:
                book.closed[run.group.where[closed["item"]]] = closed["after"]
        return book

    def stuck(self, run: Run, idle: Sequence[str] = ()) -> dict[str, Any] | None:
        """The row that ends the wait for an item on which everybody who was seen lately has had their say. idle: names
        of those who ask for a question and get none: who has answered all that there is gives no vote to be seen by.
        """
        if run.done is not None or not len(run.policy.coming):
            return None
        item = int(run.policy.coming[0])
        if run.policy.book.next(item, run.policy.taken.get(item, 0)) != WAITING or any(
            not one.settled for one in run.policy.book.said.get(item, ())
        ):
            return None
        db, since, row = self.store.db, now() - self._away_ms, run.rows[item]
        newest = "SELECT annotator, max(seq), digest, stored FROM keys GROUP BY annotator"
        keys = {who: stored for who, _, digest, stored in db.execute(newest) if digest is not None}
        seen = {who for who, stored in keys.items() if stored > since}
        seen |= {who for (who,) in db.execute("SELECT DISTINCT annotator FROM votes WHERE stored > ?", (since,))}
        seen |= {who for who, name in db.execute("SELECT id, name FROM annotators") if name in idle}
        seen &= keys.keys()  # nobody else can answer
        had = {who for (who,) in db.execute(_HAD, (row,))}
        if not seen or seen - had:
            return None
        after = db.execute("SELECT max(seq) FROM votes").fetchone()[0] or 0
        return {"close": {"run": run.number, "item": row, "after": after}}


_HAD = """SELECT v.annotator FROM votes v WHERE v.item = ? AND v.kind != 'undo'
  AND NOT EXISTS (SELECT 1 FROM votes u WHERE u.undoes = v.seq)"""


def can_undo(store: Store, uid: str, when_ms: int) -> bool:
    """Whether a vote may still be taken back while a run is on: no run has taken it."""
    row = store.db.execute("SELECT seq, annotator, stored FROM votes WHERE uid = ?", (uid,)).fetchone()
    if row is None:
        return True  # it is not on disk yet
    later = store.db.execute("SELECT 1 FROM votes WHERE annotator = ? AND seq > ?", (row[1], row[0])).fetchone()
    return later is None and row[2] > when_ms - UNDO_S * 1000


def settle(store: Store, run: Run) -> dict[str, Any]:
    """Write what a run that has ended decided, and its certificate. People's adjudications stay."""
    document, at = run.certificate(), now()
    adjudicated = {
        row[0] for row in store.db.execute("SELECT item FROM decisions WHERE method = 'adjudicated'")
    }  # fmt: skip
    votes: dict[int, list[str]] = {}
    for item, said in run.policy.used:
        votes.setdefault(item, []).append(said.uid)
    with store.together():
        for place, (name, label, risk) in enumerate(run.decisions()):
            if run.rows[place] not in adjudicated:
                uid, uids = f"run-{run.number}-{run.rows[place]}", tuple(votes.get(place, ()))
                store.add_decision(Decision(uid, name, label, METHOD, None, risk, uids, at, origin=METHOD))
        store.add_certificate(document)
    return document


def follow(store: Store, number: int) -> Run:
    """A run from the rows alone, as far as they go."""
    follower = Follower(store, [number], clock_ms=1 << 62)  # nobody takes anything back any more
    follower.rank()
    return follower.runs[number]


def certify(path: Path) -> list[dict[str, Any]]:
    """Work out every run's certificate anew from votes and machines' opinions. Raises Verdict where one is not what
    the store has."""
    with Store.read(path) as store:
        held = certificates(store)
        if not held:
            raise DataError("no run has ended here", where=path, fix="ottava label serve STORE --target-error 0.03")
        for one in held:
            run = follow(store, one["run"])
            if run.done is None or (mine := run.certificate()) != one:
                differs = "it does not end" if run.done is None else ", ".join(k for k in mine if mine[k] != one.get(k))
                raise Verdict(
                    f"the votes of run {one['run']} do not give its certificate: {differs}", where=path,
                    fix="the store was changed; or another version of Ottava ended this run, or another kind of "
                    "processor, whose rounding differs",
                )  # fmt: skip
    return held


# ---- the process


def state(run: Run) -> dict[str, Any]:
    """Where a run stands, for the page and the server."""
    policy = run.policy
    told: dict[str, Any] = {"run": run.number, "target": run.begun["target"], "items": len(run.rows)}
    if run.done is not None:
        return told | {"phase": "done", "reached": run.done.reached, "upper": run.done.upper, "error": run.done.error}
    upper = policy._upper if policy.phase == "audit" else None
    return told | {"phase": policy.phase, "upper": upper, "progress": asdict(policy.progress())}


def main() -> None:
    """Follow a store: each line on standard input, a list of those who ask for a question in vain, asks for a
    ranking; the end of input ends the process.

    The head has two more keys than that of `ranking`: runs (see `state`), and close: rows that the writer is to add.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("store", type=Path)
    parser.add_argument("runs", type=int, nargs="+")
    parser.add_argument("--away-hours", type=float, default=AWAY_HOURS)
    options = parser.parse_args()
    os.nice(15)  # it gives way to answers
    with Store.read(options.store) as store:
        follower = Follower(store, options.runs, away_hours=options.away_hours)
        for line in sys.stdin.buffer:
            order, idle = follower.rank(), json.loads(line)
            close = [row for run in follower.runs.values() if (row := follower.stuck(run, idle)) is not None]
            more = {"runs": [state(run) for run in follower.runs.values()], "close": close}
            ranking.tell(order, sys.stdout.buffer, more)


if __name__ == "__main__":
    main()
