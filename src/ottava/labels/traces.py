"""Which traces may be delivered, by the policy of `ottava label replay`: people only where machines disagree.

Every distinct trace that a teacher proposed is an item of two classes: right or wrong in its steps. Its form and final
answer are the verifier; the teachers are judges, each of which calls its own trace right and the others wrong. The
policy asks people, blind, and audits its decisions; a trace is delivered if it was decided right: of each problem the
one that the teachers agree on, and in the place of one that people refuted another that they found right. **In the
recipe programs stand in for people**: they know the truth and err at documented rates, and the certificate says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ottava.labels.fusion import RIGHT, Label, grade
from ottava.tasks.base import generator

if TYPE_CHECKING:
    from ottava.labels.policy import Done
    from ottava.labels.teachers import Proposal
    from ottava.tasks import Problem, Traced

VOTES = "votes.jsonl"
"""Of a label artifact: a line for every trace that was judged."""
CLASSES = ("right", "wrong")
PEOPLE = 8
MISSES, ALARMS = 0.08, 0.03
"""How often a stand-in calls a wrong trace right, and a right one wrong."""
MOST = 1.5
"""Votes at most, as a share of two and a third on disagreement for every item: some hundred traces must pay for a whole
audit."""

Shown = Sequence[tuple["Problem", Sequence["Proposal"]]]
Place = tuple[str, str]  # a problem's id, a trace


@dataclass(frozen=True)
class Decided:
    """labels: what to deliver; refuted: ids of problems whose agreed trace people refuted; items: all traces judged;
    judged: each of them, with what the machines said, who voted what, and what was decided."""

    labels: tuple[Label, ...]
    refuted: tuple[str, ...]
    items: int
    done: Done
    judged: tuple[dict[str, Any], ...]

    @property
    def error_upper(self) -> float:
        """With 95% confidence no larger share of `labels` is wrong: all errors of the decisions may be among them."""
        return min(self.done.upper * self.items / max(len(self.labels), 1), 1.0)

    def certificate(self, annotator: str) -> dict[str, Any]:
        """As JSON. annotator: who judged, in words."""
        return {
            "audited": self.done.audited,
            "errors": len(self.refuted),
            "error_upper_95": round(self.error_upper + 5e-7, 6),
            "annotator": annotator,
            "people": PEOPLE,
            "votes": self.done.votes,
            "questions": self.done.asked,
            "blind": True,
            "sampling": "without replacement, weighted by the believed risk, of all traces proposed",
            "population": self.items,
            "delivered": len(self.labels),
            "bound": "a martingale of bets, one-sided 95% at all looks together; all errors of the decisions are "
            "counted against the traces delivered",
            "wrong": list(self.refuted),
            "notes": list(self.done.notes),
        }


def decide(
    task: Traced, labels: Sequence[Label], shown: Shown, right: Callable[[Problem, str], bool], target: float, seed: int
) -> Decided:
    """Run the policy on all proposals. labels: what the teachers agree on; shown: all that they were asked; right:
    knows
    the truth, for the stand-ins; target: the bound wanted of what is delivered; seed: of the draws and of their
    errors."""
    items, truth, places = _items(task, shown, right)
    done, votes = _run(items, truth, target * len(labels) / len(items), seed)
    good = {place: int(done.decisions[at]) == 0 for place, at in places.items()}
    kept = [label for label in labels if good[label.problem.id, label.trace]]
    refuted = tuple(label.problem.id for label in labels if not good[label.problem.id, label.trace])
    for label in labels:
        if label.problem.id in refuted:
            kept += _instead(label, kept, shown, good)
    order = {label.problem.steps: at for at, label in reversed(list(enumerate(labels)))}
    kept.sort(key=lambda label: order[label.problem.steps])  # stable: by length, as they came
    judged = tuple(
        {"id": problem, "trace": trace, "verifier": items[at]["verifier"], "judges": items[at]["judges"],
         "votes": votes.get(at, []), "decision": CLASSES[int(done.decisions[at])]}
        for (problem, trace), at in places.items()
    )  # fmt: skip
    return Decided(tuple(kept), refuted, len(items), done, judged)


def _items(
    task: Traced, shown: Shown, right: Callable[[Problem, str], bool]
) -> tuple[list[dict[str, Any]], list[bool], dict[Place, int]]:
    """Items of a world, whether each is right, and where each trace is among them."""
    items: list[dict[str, Any]] = []
    truth: list[bool] = []
    places: dict[Place, int] = {}
    for problem, proposals in shown:
        for proposal in {proposal.trace: proposal for proposal in reversed(proposals)}.values():
            places[problem.id, proposal.trace] = len(items)
            verified = grade(task, problem, proposal) == RIGHT
            judges = ["right" if other.trace == proposal.trace else "wrong" for other in proposals]
            items.append(
                {
                    "id": f"{problem.id}/{len(items)}",
                    "verifier": "right" if verified else "wrong",
                    "judges": judges,
                }
            )
            truth.append(right(problem, proposal.trace))
    return items, truth, places


def _run(
    items: Sequence[Mapping[str, Any]], truth: Sequence[bool], target: float, seed: int
) -> tuple[Done, dict[int, list[dict[str, Any]]]]:
    """The policy, answered by stand-ins, and their votes on each item in the order in which they were asked."""
    from ottava.labels import world
    from ottava.labels.policy import Policy

    people = [f"person {k + 1}" for k in range(PEOPLE)]
    here = world.parse({"classes": list(CLASSES), "annotators": people, "items": list(items)})
    run = Policy(here, target, seed, most=MOST).run()
    votes: dict[int, list[dict[str, Any]]] = {}
    try:
        question = next(run)
        while True:
            said = vote(truth[question.item], items[question.item]["id"], question.person, seed)
            votes.setdefault(question.item, []).append({"who": people[question.person], "says": CLASSES[said]})
            question = run.send(said)
    except StopIteration as end:
        done: Done = end.value
    return done, votes


def vote(right: bool, item: str, person: int, seed: int) -> int:
    """What a stand-in says, 0: right, 1: wrong; the same for the same item, person and seed."""
    errs = generator(seed, "person", person, item).random() < (ALARMS if right else MISSES)
    return int(right == errs)


def _instead(label: Label, kept: Sequence[Label], shown: Shown, good: Mapping[Place, bool]) -> list[Label]:
    """Another trace of as many steps, of a problem that is not among `kept`, which people found right."""
    taken = {other.problem.id for other in kept}
    for problem, proposals in shown:
        if problem.steps == label.problem.steps and problem.id not in taken:
            for proposal in proposals:
                if good[problem.id, proposal.trace]:
                    sources = tuple(other.teacher for other in proposals if other.trace == proposal.trace)
                    right = sum(other.answer == problem.answer for other in proposals)
                    return [Label(problem, proposal.trace, sources, right, len(proposals))]
    return []
