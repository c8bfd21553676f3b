"""Many proposals, one trace: keep what the final answer confirms and independent teachers agree on.

The answer to each problem is known, so every proposal is graded by its final answer (as DeepSeek-R1
graded, arXiv 2501.12948) and by its form. That says nothing about the steps between: for them there
is only agreement. The step-by-step oracle is never asked here, for it would not exist for real
traces; what slips through is what the audit measures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from ottava.labels.teachers import Proposal
from ottava.tasks import Problem, Traced, verify

MALFORMED, WRONG, RIGHT = "malformed", "wrong answer", "right answer"
NO_ANSWER, NO_AGREEMENT, TIE = "no right answer", "too few agree", "tie"


@dataclass(frozen=True, slots=True)
class Label:
    """An accepted trace. sources: the teachers that gave it. right: how many of the `asked` gave the right answer."""

    problem: Problem
    trace: str
    sources: tuple[str, ...]
    right: int
    asked: int


@dataclass
class Tally:
    """What became of every problem and proposal, counted.

    rejected: problems by reason. proposals: (teacher, grade). shared_mistakes: pairs of teachers
    ("a+b") that gave the same trace to the same wrong answer, by which a shared bias shows. shown: every problem with
    all that was proposed.
    """

    accepted: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    proposals: Counter[tuple[str, str]] = field(default_factory=Counter)
    shared_mistakes: Counter[str] = field(default_factory=Counter)
    shown: list[tuple[Problem, Sequence[Proposal]]] = field(default_factory=list)

    def by_teacher(self) -> dict[str, dict[str, int]]:
        """How many proposals of each teacher got each grade."""
        teachers = dict.fromkeys(teacher for teacher, _ in self.proposals)
        return {t: {g: self.proposals[t, g] for g in (RIGHT, WRONG, MALFORMED)} for t in teachers}


def grade(task: Traced, problem: Problem, proposal: Proposal) -> str:
    """MALFORMED, WRONG or RIGHT, by the form and the final answer alone."""
    if not task.well_formed(problem, proposal.trace, proposal.answer):
        return MALFORMED
    return RIGHT if verify.grade(task, problem, proposal.answer).right else WRONG


def fuse(task: Traced, problem: Problem, proposals: Sequence[Proposal], agree: int, tally: Tally) -> Label | None:
    """The trace that most teachers with the right answer give, if at least `agree` give it; else None, counted."""
    graded = [(grade(task, problem, proposal), proposal) for proposal in proposals]
    tally.proposals.update((proposal.teacher, verdict) for verdict, proposal in graded)
    wrong = [proposal for verdict, proposal in graded if verdict == WRONG]
    tally.shared_mistakes.update(f"{a.teacher}+{b.teacher}" for a, b in combinations(wrong, 2) if a.trace == b.trace)
    right = [proposal for verdict, proposal in graded if verdict == RIGHT]
    votes = Counter(proposal.trace for proposal in right).most_common(2)
    if not votes:
        tally.rejected[NO_ANSWER] += 1
    elif len(votes) == 2 and votes[0][1] == votes[1][1]:
        tally.rejected[TIE] += 1
    elif votes[0][1] < agree:
        tally.rejected[NO_AGREEMENT] += 1
    else:
        tally.accepted += 1
        trace = votes[0][0]
        sources = tuple(proposal.teacher for proposal in right if proposal.trace == trace)
        return Label(problem, trace, sources, len(right), len(proposals))
    return None


def collect(
    task: Traced,
    problems: Iterable[Problem],
    ask: Callable[[Problem], Sequence[Proposal]],
    wanted: int,
    agree: int,
    tally: Tally,
) -> list[Label]:
    """Ask the teachers problem by problem until `wanted` labels are accepted, or the problems run out."""
    labels: list[Label] = []
    for problem in problems:
        if len(labels) == wanted:
            break
        proposals = ask(problem)
        tally.shown.append((problem, proposals))
        label = fuse(task, problem, proposals, agree, tally)
        if label is not None:
            labels.append(label)
    return labels
