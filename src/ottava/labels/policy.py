"""The whole policy: where to ask people, when to audit, when to stop. Pure: it asks by `yield` and is answered by
`send`.

    calibrate   a few items drawn at random get two votes each: the first fit of people and stacker
    label       the questions with the most information, until the believed error is low enough to be worth an audit
    audit       decisions are frozen, items are drawn, panels judge them blind; the bound falls with every panel

All questions are blind: who sees a suggestion tends to repeat it, and such votes would be no evidence.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ottava.errors import DataError
from ottava.labels import ask, certificate, panel, screens
from ottava.labels.evidence import Evidence
from ottava.labels.forecast import Phase, Progress
from ottava.labels.screens import Finding
from ottava.labels.world import NOTHING, World

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

ALPHA = 0.05
GOAL = 0.4
"""The believed error at which an audit begins, as a share of the target: labelling and audit together cost least
there."""
BETTER = 0.6
"""The same as a share of the error that the usual rule (two votes, a third on disagreement) would leave."""
TIGHT = 0.41
"""The bound is to lie within this share of the target above the estimate."""
WARY = 2.0
"""How many times more of the audited labels may still be wrong than is believed of them; where that is a handful,
chance alone may leave more (`certificate.likely_most`)."""
MOST = 0.95
"""Votes at most, where nothing else is said: less than the usual rule takes."""
LOOK = 20
"""Draws between two looks at the bound, at most."""
CONTRADICTED, FEWEST_VERIFIED = 0.4, 50
"""The share of so many votes on verified items from which on somebody is told that people and verifier differ."""
SHARE = 1.6
"""Nobody answers more than this many times an equal share while others could."""
LONGEST = 7
"""Votes on one item before its audit; of more than three people one at least is left for its panel."""
KNOCKS = 3
"""How often a panel asks one person who is away."""


@dataclass(frozen=True)
class Ask:
    """A question: item and person are places in the world's lists. blind: no suggestion may be shown."""

    item: int
    person: int
    blind: bool = True


@dataclass(frozen=True)
class Done:
    """decisions: [items], places in the classes. error: the estimate; upper: the bound, 95%. notes: what people
    should know."""

    decisions: Ints
    error: float
    upper: float
    asked: int
    votes: int
    audited: int
    reached: bool
    notes: tuple[str, ...] = ()
    found: tuple[Finding, ...] = ()
    """People whose votes were no evidence, or who drifted."""


Questions = Generator[Ask, int | None, Any]


class _Gone(Exception):
    """Nobody is left to ask."""


@dataclass
class Policy:
    """One run. target: the error that the bound must not exceed; seed: of the items drawn.

    most: votes at most, as a multiple of what two votes and a third on disagreement would take.
    """

    world: World
    target: float
    seed: int = 0
    most: float = MOST
    evidence: Evidence = field(init=False)
    notes: list[str] = field(default_factory=list)
    asked: int = 0
    found: dict[int, Finding] = field(default_factory=dict)
    phase: Phase = "calibrate"
    coming: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    """Items in the order in which they will be asked about, as far as that is settled, beginning with the present."""
    _nulls: int = 0
    _needs: float = 0.0
    _each: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.target < 1:
            raise DataError(f"the target is a share between 0 and 1: {self.target}")
        if not 0 < self.most < math.inf:
            raise DataError(f"votes at most are a number above 0, of times the usual rule: {self.most}")
        self.evidence = Evidence(self.world)
        self._rng = np.random.default_rng([self.seed, len(self.world)])
        count = len(self.world.annotators)
        self._given = np.zeros(count, np.int64)
        self._back_at = np.zeros(count, np.int64)
        self._patience = np.full(count, 25)
        self._worth: Floats = np.ones(count)
        self._weight: Floats = np.full(count, panel.weight(0.85))
        self._useful = np.ones(count, bool)
        self._seconds = np.ones(count) if self.world.seconds is None else self.world.seconds
        self._jitter = self._rng.random(len(self.world))
        self._upper, self._audited = 1.0, 0
        self._frozen: Ints | None = None
        self._claims: list[tuple[int, float]] = []
        self._learn()

    # ---- the story

    def run(self) -> Generator[Ask, int | None, Done]:
        """Ask (yield), be answered (send a class, or None: that person is away), and return what is decided."""
        reached = False
        try:
            yield from self._calibrate()
            yield from self._label()
            reached = yield from self._audit()
        except _Gone:
            self.notes.append("everybody is away: ended with what is known")
        return self._done(reached)

    def _calibrate(self) -> Questions:
        count = min(600, max(len(self.world) // 12, 10), len(self.world))
        drawn = self._rng.permutation(len(self.world))[:count]
        for number, item in enumerate(drawn):
            self.coming = drawn[number:]
            for _ in range(2):
                yield from self._vote(int(item))
        self._learn()

    def _label(self) -> Questions:
        """Vote by vote where most is learnt; ends at the goal, or where the votes that an audit needs are all that
        is left."""
        self.phase, self._claims = "label", []
        evidence, due = self.evidence, len(self.evidence) * 1.3 + 50
        batch = min(max(len(self.world) // 100, 4), 100, len(self.world))
        people = len(self.world.annotators)
        most = min(LONGEST, people - 1) if people > 3 else LONGEST
        claim = self._claim()
        while claim > self._goal and self._left() > self._reserve():
            gain = ask.gains(evidence.states, self._matrix) * (evidence.counts < most)
            gain *= 1 + 1e-6 * self._jitter
            best = np.argpartition(-gain, batch - 1)[:batch]
            best = best[gain[best] > 1e-9]
            before, self._gain = len(evidence), gain
            for number, item in enumerate(best):
                self.coming = best[number:]
                yield from self._vote(int(item))
            if len(evidence) == before:
                break
            claim = self._claim()
            if len(evidence) >= due or claim <= self._goal:  # the claim must hold with the best fit there is
                self._learn()
                claim, due = self._claim(), max(due, len(evidence) * 1.15 + 200)
            self._claims.append((len(evidence), claim))

    def _audit(self) -> Generator[Ask, int | None, bool]:
        """Freeze the decisions, draw, let panels judge. True: the certificate is reached."""
        self.phase, evidence = "audit", self.evidence
        risks = np.minimum(evidence.risks(), 0.9)
        frozen = evidence.decisions()
        self._frozen, self._upper, self._audited, self._each = frozen, 1.0, 0, 0.0
        self._judged = np.zeros(len(self.world), bool)
        self._risks, self._found, self._expected = risks, 0.0, 0.0
        self._needs, begun, weights = self._reserve(), len(evidence), certificate.weights(risks)
        bound = certificate.Bound(weights, ALPHA)
        missed = 1 - panel.misses(float(np.clip(self._good_accuracy(), 0.61, 0.999)))
        drawn, every = certificate.order(weights, self._rng), min(max(len(self.world) // 100, 1), LOOK)
        for number, item in enumerate(drawn, 1):
            self.coming = drawn[number - 1 :]
            refuted = yield from self._panel(int(item), int(frozen[item]))
            self._judged[item] = True
            bound.tell(int(item), refuted)
            self._audited = number
            wrong = 1 - float(evidence.believed_of(int(item))[frozen[item]])
            self._found += (refuted + wrong) / 2 / weights[item]
            spent = len(evidence) - begun
            self._expected += risks[item] / weights[item]
            if number % every and number < len(self.world) and self._left() > 0:
                continue
            # of labels that were not drawn, what panels would refute; drawn ones follow all votes, the panel's too
            rest, after = bound.rest() / missed, self._after()
            most = self._wary(after)
            self._upper = min(rest + most, 1.0)
            error = self._final()
            if self._upper <= self.target and self._upper - error <= TIGHT * self.target:
                return True
            self._each = spent / number
            room = max(self.target - error - (most - after), 1e-4)
            self._needs = max(self._draws(self._estimate(), room) - number, LOOK) * self._each
            if self._left() <= 0:
                break
        return self._upper <= self.target

    def _panel(self, item: int, label: int) -> Generator[Ask, int | None, float]:
        odds, answers = 0.0, 0
        while True:
            got = yield from self._vote(item, audit=True)
            if got is not None:
                person, said = got
                odds += self._weight[person] if said == label else -self._weight[person]
                answers += 1
            refuted = panel.verdict(odds, answers, got is not None and self._left() > -200)
            if refuted is not None:
                return refuted

    # ---- people

    def _vote(self, item: int, audit: bool = False) -> Generator[Ask, int | None, tuple[int, int] | None]:
        """One more vote on an item by somebody who has not voted on it: (person, label), or None if nobody can.

        While labelling, an item whose people are away is left for later. A panel waits: who is away is knocked at, so
        that nobody's absence counts against a label.
        """
        evidence = self.evidence
        able = self._useful & ~evidence.asked[item]
        knocks = np.zeros(len(able), np.int64)
        while True:
            there = self._back_at <= self.asked
            here = able & there
            if not here.any():
                if audit:
                    here = able & (knocks < KNOCKS)
                elif not there.any():
                    here = able
                if not here.any():
                    return None
                here = here & (self._back_at == self._back_at[here].min())
            person = ask.best_person(self._weight if audit else self._worth, self._seconds, self._given, here, SHARE)
            self.asked += 1
            label = yield Ask(item, person)
            if label is not None:
                self._nulls, self._patience[person] = 0, 25
                self._given[person] += 1
                evidence.add(item, person, label)
                return person, label
            self._nulls += 1
            knocks[person] += 1
            self._back_at[person] = self.asked + self._patience[person]
            self._patience[person] = min(2 * self._patience[person], 2000)
            if self._nulls >= max(4 * len(self.world.annotators), 20):
                raise _Gone

    # ---- what is known

    def _learn(self) -> None:
        """Fit anew, look at the people, and set goal and budget."""
        evidence, target = self.evidence, self.target
        if len(evidence):
            evidence.refit()
            if ignored := {found.person for found in self._look() if found.ignore}:
                evidence.ignored |= ignored
                evidence.refit()
        people, classes = evidence.people, evidence.classes()
        accuracy = people.accuracy(classes)
        usable = np.array([p not in self.found for p in range(len(accuracy))])
        # where nobody seems of use, everybody is asked: an honest bound will say what came of it
        weight = np.array([panel.weight(a) for a in accuracy]) * usable
        self._weight = weight if weight.any() else np.full(len(weight), panel.WEIGHTS[0])
        self._useful = self._weight > 0
        uniform = np.repeat(np.stack([classes, 0 * classes], 1)[None], len(accuracy), 0)
        self._worth = np.array([ask.gains(uniform[:1], matrix)[0] for matrix in people.matrices]) * usable
        good = self._worth >= np.median(self._worth[usable]) if usable.any() else usable
        self._matrix = people.matrices[good].mean(0) if good.any() else people.matrices.mean(0)
        error, votes = two_plus_one(people.both().mean(1), classes, people.hard)
        self._cap = int(self.most * votes * len(self.world))
        self._goal = max(min(GOAL * target, BETTER * error), 1e-4)

    def _good_accuracy(self) -> float:
        """The accuracy of those who sit in panels, two standard errors lower."""
        people = self.evidence.people
        accuracy = people.accuracy(self.evidence.classes())
        sit = self._weight > 0
        mean = float(np.average(accuracy[sit], weights=self._weight[sit]))
        return mean - self._slack(mean)

    def _slack(self, accuracy: float) -> float:
        """Two standard errors of how often people are right."""
        votes = self.evidence.people.votes[self._weight > 0].sum()
        return 2 * math.sqrt(accuracy * (1 - accuracy) / max(votes, 10))

    def _claim(self) -> float:
        return float(self.evidence.risks().mean())

    def _off(self) -> float:
        """How much more was found than was believed (few finds prove little)."""
        return (self._found + 4) / (self._expected + 4)

    def _estimate(self) -> float:
        """The error of the frozen decisions: what was believed, corrected by what the audit found.

        Of what panels refute some is false alarm; what the votes then make believe leans on the model. The truth of
        hard items lies between them, and the mean is taken."""
        return self._off() * float(self._risks.mean())

    def _after(self) -> float:
        """Of all labels, the share that was audited and is believed wrong all the same."""
        return float((self.evidence.risks() * self._judged).mean())

    def _wary(self, after: float) -> float:
        """The share that it may be, where `after` is believed: of few labels chance alone may leave more, and of few
        votes it is known badly how often people are right."""
        accuracy = self.evidence.people.accuracy(self.evidence.classes()).mean()
        doubted = float((self.evidence.doubts(self._slack(float(accuracy))) * self._judged).sum())
        return max(WARY * after, certificate.likely_most(doubted, ALPHA) / len(self.world))

    def _final(self) -> float:
        """The error of what is delivered: drawn labels follow all votes, the others stay as they were frozen."""
        return self._after() + self._off() * float((self._risks * ~self._judged).mean())

    def _left(self) -> int:
        return self._cap - len(self.evidence)

    def _reserve(self) -> float:
        """Votes that the next audit will need, at most a third of all."""
        rate = max(self._goal, self._claim(), 1e-4)
        draws = self._draws(rate, self.target - rate)
        each = panel.cost(min(max(self._good_accuracy(), 0.62), 0.99)) if len(self.evidence) else 3.0
        return min(draws * each, self._cap / 3)

    def _draws(self, rate: float, room: float) -> float:
        """Draws until the bound is low and tight enough, where a share `rate` is wrong and it may be `room` higher."""
        goal = rate + min(room, TIGHT * self.target)
        return min(certificate.draws_needed(rate, goal, ALPHA), len(self.world))

    def _pace(self) -> float:
        """How much the logarithm of the believed error fell with each vote of late."""
        later = self._claims[len(self._claims) // 2 :]
        if len(later) < 2 or later[-1][0] <= later[0][0]:
            return 0.0
        return max(math.log(later[0][1] / later[-1][1]) / (later[-1][0] - later[0][0]), 0.0)

    def progress(self) -> Progress:
        """Where the run stands, for `forecast`."""
        needs = self._needs if self.phase == "audit" else self._reserve()
        if self.phase == "audit" and self._each:
            rate = self._final()
            goal = min(self.target, rate + TIGHT * self.target)
            wide = (self._upper - rate) / max(goal - rate, 1e-9)  # between 1 / draws and 1 / root of draws
            needs = max(self._audited * (max(wide, 1.0) ** 1.5 - 1), LOOK) * self._each
        return Progress(self.phase, len(self.evidence), self._cap, self._claim(), self._goal, self._pace(), needs)

    def _look(self) -> list[Finding]:
        """Look at the people; who is found for the first time."""
        new = [found for found in screens.people(self.evidence) if found.person not in self.found]
        self.found |= {found.person: found for found in new}
        self.notes.extend(f"{self.world.annotators[found.person]}: {found.why}" for found in new)
        return new

    def _last_look(self) -> tuple[Finding, ...]:
        """Everybody who was found, with what an audit's votes tell, which nothing was decided on: for the next
        run. Who is right too seldom to be asked is told of too."""
        shut_out = self._weight <= 0
        if len(self.evidence):
            self.evidence.refit()
            self._look()
        accuracy, votes = self.evidence.people.accuracy(self.evidence.classes()), self.evidence.people.votes
        for person in np.flatnonzero(shut_out & (votes >= screens.FEWEST)).tolist():
            if person not in self.found:
                why = f"right on {accuracy[person]:.0%}: too seldom to be asked"
                self.found[person] = Finding(person, "guesses", False, why)
                self.notes.append(f"{self.world.annotators[person]}: {why}")
        return tuple(self.found.values())

    def _done(self, reached: bool) -> Done:
        evidence = self.evidence
        disputed = screens.conflicts(evidence)
        if len(disputed):
            names = ", ".join(str(self.world.ids[item]) for item in disputed[:5])
            some = f"{len(disputed)} items are" if len(disputed) > 1 else "an item is"
            self.notes.append(f"{some} disputed, for people to decide together: {names}")
        if self._frozen is None:  # people left before an audit could begin
            decisions = evidence.decisions()
            error = self._claim() if len(evidence) else 1 - 1 / len(self.world.classes)
            upper = 1.0
        else:
            # what was not audited stays as it was when the bound was come by; of the rest more is known now
            decisions = np.where(self._judged, evidence.decisions(), self._frozen)
            error = self._final()
            # with a handful of items an audit of all of them may believe less of itself than the estimate does
            upper = max(self._upper, error)
            if not reached:
                text = f"{self.target:.3g} is not certified: the bound is {self._upper:.4f}"
                spent = f"; the {self._cap:,} votes that are the most are spent (--most-votes {self.most:g})"
                self.notes.append(text + spent * (self._left() <= 0))
        said = evidence.votes()
        verified = self.world.verifier[said.items]
        spoke, against = (
            int((verified != NOTHING).sum()),
            int(((verified != NOTHING) & (verified != said.labels)).sum()),
        )
        if spoke >= FEWEST_VERIFIED and against > CONTRADICTED * spoke:
            text = (
                f"people contradict the verifier in {against:,} of {spoke:,} votes: the bound holds if they are right"
            )
            self.notes.append(text)
        found, votes = self._last_look(), len(evidence)
        notes = tuple(self.notes)
        return Done(decisions, error, upper, self.asked, votes, self._audited, reached, notes, found)


def two_plus_one(matrices: Floats, classes: Floats, hard: float) -> tuple[float, float]:
    """What the usual rule would do, two votes and a third where they differ: (share of wrong labels, votes an item).

    matrices: [2, classes, classes] of a person drawn at random, on ordinary and on hard items; of three different
    answers one is taken at random.
    """
    error = votes = 0.0
    for share, c in zip((1 - hard, hard), matrices, strict=True):
        same = (c**2).sum(1)
        right = np.diagonal(c)
        kept = right**2 * (3 - 2 * right) + right * ((1 - right) ** 2 - (same - right**2))
        error += share * float(classes @ (1 - kept))
        votes += share * float(classes @ (3 - same))
    return error, votes
