"""In which order a store's items are worth asking about, worked out beside the server, in a process of its own.

The server answers people in milliseconds; fitting people and machines to a hundred thousand items takes seconds. So a
process of low priority reads the store, as any reader may, fits, and hands back an order:

    python -m ottava.labels.ranking STORE --target 0.03      a line "go" in; a JSON line and its arrays out

Items are fused in groups of one kind and one list of classes (`evidence`). The first votes go to items drawn at random,
then to those of which an answer teaches most per second (`ask`), until a group's believed error is low enough. Free
text cannot be fused: it is asked until it has `votes` answers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from ottava.labels import ask, questions, screens
from ottava.labels.evidence import Evidence
from ottava.labels.policy import BETTER, GOAL, LONGEST, two_plus_one
from ottava.labels.questions import Item
from ottava.labels.store import Store
from ottava.labels.world import NOTHING, World

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]
    Floats = NDArray[np.float64]

SECONDS = 20.0
"""How long an answer is taken to last before anybody has given one."""
VERIFIER = "verifier"
"""The opinion that is a check and no judge."""


@dataclass
class Group:
    """Items that are fused together. rows: their numbers in the store, in order; where: place by number."""

    kind: str
    classes: tuple[str, ...]
    items: list[Item] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    where: dict[int, int] = field(default_factory=dict)
    evidence: Evidence | None = None


@dataclass(frozen=True)
class Live:
    """A vote that counts: numbers of item and person, its class there (None: no class), and how long it took."""

    item: int
    person: int
    said: str
    place: int | None
    ms: int | None


@dataclass(frozen=True)
class Ranking:
    """order: numbers of items, the most useful first; gold: known ones, to check people with; conflicts: for
    adjudication. left: votes that are still to be given, by forecast; seconds: how long one takes; claim: the believed
    share of wrong labels; people: what is found about them."""

    order: Ints
    gold: Ints
    conflicts: Ints
    left: int
    seconds: float
    claim: float | None
    people: tuple[str, ...]


class Ranker:
    """Follows one store. target: the share of wrong labels that is wanted; votes: answers wanted where nothing can be
    fused; seed: of the first random draw."""

    def __init__(self, store: Store, target: float, votes: int = 1, seed: int = 0):
        self.store, self.target, self.votes, self.seed = store, target, votes, seed
        self.groups: dict[tuple[Any, ...], Group] = {}
        self._group_of: dict[int, Group] = {}
        self._known: dict[int, Item] = {}

    def rank(self) -> Ranking:
        """What the store says now."""
        fresh = self._read_items()
        live, people = self._votes()
        decided = {row[0] for row in self.store.db.execute("SELECT item FROM decisions WHERE method = 'adjudicated'")}
        parts = [self._group(group, live, people, decided, fresh) for group in self.groups.values()]
        score = np.concatenate([part[0] for part in parts]) if parts else np.empty(0)
        rows = np.concatenate(
            [np.asarray(group.rows, np.int64) for group in self.groups.values()] or [np.empty(0, np.int64)]
        )
        wanted = score > 0
        order = rows[wanted][np.argsort(-score[wanted], kind="stable")]
        ms = sorted(vote.ms for votes in live.values() for vote in votes if vote.ms is not None)
        fused = [part for part in parts if part[4] is not None]
        size = sum(len(part[0]) for part in fused)
        claim = sum(part[4] * len(part[0]) for part in fused if part[4] is not None) / size if size else None
        gold = [seq for seq, item in self._known.items() if item.gold is not None]
        return Ranking(
            order, np.asarray(gold + [int(seq) for part in parts for seq in part[1]], np.int64),
            np.asarray([int(seq) for part in parts for seq in part[2]], np.int64), sum(part[3] for part in parts),
            ms[len(ms) // 2] / 1000 if ms else SECONDS, claim,
            tuple(dict.fromkeys(why for part in parts for why in part[5])),
        )  # fmt: skip

    def _read_items(self) -> bool:
        """Take in what came since; True where a group's world has changed."""
        last = max(self._known, default=0)
        opinions: dict[int, dict[str, Any]] = {}
        for seq, who, said in self.store.db.execute("SELECT item, who, answer FROM opinions WHERE item > ?", (last,)):
            opinions.setdefault(seq, {})[who] = json.loads(said)
        fresh = False
        for seq, item in self.store.items(last):
            item.opinions.update(opinions.get(seq, {}))
            self._known[seq], fresh = item, True
            if item.gold is None:
                key = (item.kind, questions.fused_classes(item))
                group = self.groups.setdefault(key, Group(*key))
                group.where[seq] = len(group.items)
                group.items.append(item)
                group.rows.append(seq)
                self._group_of[seq] = group
        return fresh

    def _votes(self) -> tuple[dict[int, list[Live]], list[str]]:
        """Votes by group's id, and the names of all people."""
        people = [row[0] for row in self.store.db.execute("SELECT name FROM annotators ORDER BY id")]
        found: dict[int, list[Live]] = {}
        for item, person, answer, ms in self.store.db.execute(
            "SELECT item, annotator, answer, ms FROM live ORDER BY seq"
        ):
            group = self._group_of.get(item)
            if group is not None:
                place = questions.fused_class(self._known[item], json.loads(answer))
                found.setdefault(id(group), []).append(Live(item, person - 1, answer, place, ms))
        return found, people

    def _group(
        self, group: Group, live: dict[int, list[Live]], people: list[str], decided: set[int], fresh: bool
    ) -> tuple[Floats, list[int], list[int], int, float | None, list[str]]:
        """(score of each item, gold, conflicts, votes left, believed error, what is found of people)."""
        votes = live.get(id(group), [])
        done = np.array([row in decided for row in group.rows], bool)
        differ = _differ(votes)
        if len(group.classes) < 2:
            counts = np.bincount([group.where[vote.item] for vote in votes], minlength=len(group.rows))
            need = np.where(done, 0, np.maximum(self.votes - counts, 0))
            score = np.where(need > 0, 1e-3 * need - 1e-9 * np.arange(len(need)), 0.0)
            return score, [], sorted(differ - decided), int(need.sum()), None, []
        evidence = group.evidence = self._evidence(group, votes, people, fresh)
        found = screens.people(evidence) if votes else []
        for one in found:
            if one.ignore:
                evidence.ignored.add(one.person)
        if found:
            evidence.refit()
        score, left = self._worth(evidence, done)
        unsure = screens.conflicts(evidence) if group.kind != "steps" else [group.where[row] for row in sorted(differ)]
        conflicts = [group.rows[k] for k in unsure if not done[k] and group.rows[k] in differ]
        gold = [group.rows[k] for k in np.flatnonzero((evidence.counts >= 2) & (evidence.risks() <= 0.005))[:200]]
        why = [f"{people[one.person]}: {one.why}" for one in found]
        return score, gold, conflicts, left, float(evidence.risks()[~done].mean()) if (~done).any() else 0.0, why

    def _evidence(self, group: Group, votes: list[Live], people: list[str], fresh: bool) -> Evidence:
        """Fitted to all votes. The fit goes on from the last one where the world is the same."""
        old = group.evidence
        if old is None or fresh or len(old.world.annotators) != max(len(people), 1):
            evidence = Evidence(_world(group, people))
        else:
            evidence = Evidence(old.world)
            evidence.people, evidence.prior = old.people, old.prior
            evidence._reset()
        for vote in votes:
            if vote.place is not None:
                evidence.add(group.where[vote.item], vote.person, vote.place)
        if len(evidence):
            evidence.refit()
        return evidence

    def _worth(self, evidence: Evidence, done: NDArray[np.bool_]) -> tuple[Floats, int]:
        """(What a question on each item is worth, votes that are left by forecast)."""
        count, counts = len(evidence.world), evidence.counts
        drawn = np.random.default_rng([self.seed, count]).permutation(count)[: min(600, max(count // 12, 10), count)]
        first = np.zeros(count, bool)
        first[drawn] = True
        first &= (counts < 2) & ~done
        people, classes = evidence.people, evidence.classes()
        error, _ = two_plus_one(people.both().mean(1), classes, people.hard)
        goal = max(min(GOAL * self.target, BETTER * error), 1e-4)
        risks = np.where(done, 0.0, evidence.risks())
        usable = [k for k in range(len(people.matrices)) if k not in evidence.ignored]
        matrix = people.matrices[usable or slice(None)].mean(0)
        gain = ask.gains(evidence.states, matrix) * (counts < LONGEST) * ~done
        if risks.mean() <= goal:
            gain = np.zeros(count)
        gain *= 1 + 1e-6 * np.random.default_rng(self.seed).random(count)
        left = votes_left(evidence.believed, matrix, goal, done) + int((2 - counts)[first].clip(0).sum())
        return np.where(first, 10.0 + np.where(counts > 0, 1.0, 0.0), gain), left


def _differ(votes: list[Live]) -> set[int]:
    """Items on which people said different things."""
    first: dict[int, str] = {}
    return {vote.item for vote in votes if first.setdefault(vote.item, vote.said) != vote.said}


def votes_left(believed: Floats, matrix: Floats, goal: float, done: NDArray[np.bool_]) -> int:
    """A forecast: answers until the mean risk is at most `goal`, the riskiest items first.

    On an item whose likeliest class has probability p, each answer adds on average as much to the log odds as a
    person's answers differ between classes (Wald, Ann. Math. Statist. 16 (1945) 117); it is to reach the odds of goal.
    """
    top = np.where(done, 1.0, believed.max(1))
    risks = 1 - top
    order = np.argsort(-risks)
    over = risks.sum() - goal * len(risks)
    if over <= 0:
        return 0
    gone = np.cumsum(np.maximum(risks[order] - goal / 2, 0.0))
    chosen = order[: int(np.searchsorted(gone, over)) + 1]
    p = np.clip(matrix, 1e-6, 1.0)
    apart = [(p[a] * np.log(p[a] / p[b])).sum() for a in range(len(p)) for b in range(len(p)) if a != b]
    step = max(float(np.mean(apart)), 1e-3)
    need = (math.log(2 / goal) - np.log(np.maximum(top[chosen], 1e-9) / np.maximum(risks[chosen], 1e-9))) / step
    return int(np.ceil(np.clip(need, 1, LONGEST)).sum())


def _world(group: Group, people: list[str]) -> World:
    judges = sorted({who for item in group.items for who in item.opinions} - {VERIFIER})

    def place(item: Item, who: str) -> int:
        said = item.opinions.get(who)
        found = None if said is None else questions.fused_class(item, said)
        return NOTHING if found is None else found

    verifier = np.array([place(item, VERIFIER) for item in group.items], np.int64)
    said = np.array([[place(item, who) for who in judges] for item in group.items], np.int64)
    names = tuple(people) or ("nobody",)
    return World(group.classes, names, tuple(group.rows), verifier, said.reshape(len(group.items), len(judges)))


# ---- the process


def tell(ranking: Ranking, out: BinaryIO, more: Mapping[str, Any] | None = None) -> None:
    """A JSON line with the numbers and the lengths of the arrays, which follow as 64-bit integers. more: goes into the
    line too."""
    arrays = [ranking.order, ranking.gold, ranking.conflicts]
    head = {
        "sizes": [len(array) for array in arrays], "left": ranking.left, "seconds": ranking.seconds,
        "claim": ranking.claim, "people": ranking.people, **(more or {}),
    }  # fmt: skip
    out.write(json.dumps(head).encode() + b"\n" + b"".join(array.astype("<i8").tobytes() for array in arrays))
    out.flush()


def main() -> None:
    """Follow a store: each line on standard input asks for a ranking; the end of input ends the process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("store", type=Path)
    parser.add_argument("--target", type=float, required=True)
    parser.add_argument("--votes", type=int, default=1)
    options = parser.parse_args()
    os.nice(15)  # it gives way to answers
    with Store.read(options.store) as store:
        ranker = Ranker(store, options.target, options.votes)
        for _ in sys.stdin.buffer:
            tell(ranker.rank(), sys.stdout.buffer)


if __name__ == "__main__":
    main()
