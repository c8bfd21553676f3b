"""Where does the data stand, and how wrong may it be? Test sets, answers, and a few certified traces.

The order matters: the test sets are drawn first, training problems are cleaned against them, only
then are teachers asked, and the audit judges the very traces that are delivered. At the end the
files are read back and proven disjoint.

    cold_start.jsonl      traces, proposed by several imperfect teachers, fused and audited
    answers.jsonl         problems with answers only
    test.jsonl            multi-step test problems, as many of every length
    test_one_step.jsonl   one-step test problems, for the direct mode
    vocabulary.json       the task's tokens
    certificate.json      the audit: how many, how wrong, judged by whom
    votes.jsonl           with policy: replay, who said what of every trace that was judged
    report.json           what was proposed, rejected and removed, and why
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ottava import recipe, tasks
from ottava.artifact import Artifact, write_json
from ottava.errors import DataError, OttavaError
from ottava.labels import traces
from ottava.labels.audit import Audit, audit, clopper_pearson_upper, require
from ottava.labels.fusion import Label, Tally, collect
from ottava.labels.hygiene import Removed, decontaminate, deduplicate, normals, require_disjoint
from ottava.labels.teachers import TEACHERS, propose
from ottava.labels.traces import VOTES
from ottava.tasks import Problem, Traced, content
from ottava.tasks.base import generator, problem_of, read_lines, row, write_lines

if TYPE_CHECKING:
    from ottava.context import Context

VERSION = "1"
INPUTS = ()
LABEL = True

ANNOTATOR = "oracle standing in for a person"
PEOPLE = (
    f"{traces.PEOPLE} programs standing in for people: an oracle that calls {traces.MISSES:.0%} of wrong traces "
    f"right and "
    f"{traces.ALARMS:.0%} of right ones wrong"
)

Count = Annotated[int, Field(ge=1)]


class Spec(recipe.Spec):
    """What to label and how sure to be of it."""

    budget_s: Annotated[float, Field(gt=0, description="wall seconds planned for this stage")] = 10.0
    task: str = "chains"
    steps: Annotated[tuple[int, int], Field(description="shortest and longest of the multi-step problems")] = (2, 6)
    cold_start: Annotated[Count, Field(le=100_000, description="traces to deliver, as many of every length")] = 200
    answers: Annotated[Count, Field(le=1_000_000, description="problems with answers only to deliver")] = 20000
    one_step_share: Annotated[
        float, Field(ge=0, le=1, description="of `answers`, with one step; fewer where there are not so many")
    ] = 0.05
    test_per_length: Annotated[Count, Field(description="test problems of each number of steps")] = 120
    test_one_step: Count = 60
    teachers: Annotated[tuple[str, ...], Field(min_length=1, description="who proposes traces")] = tuple(TEACHERS)
    agree: Annotated[Count, Field(description="teachers that must give the same trace")] = 2
    audit: Annotated[Count, Field(description="traces judged in the audit")] = 100
    max_error: Annotated[
        float, Field(gt=0, le=1, description="the stage fails if the 95% bound of the share of wrong traces is above")
    ] = 0.10
    policy: Annotated[
        Literal["audit", "replay"],
        Field(
            description="audit: traces are drawn alike and judged once; replay: people are asked where teachers "
            "disagree, and what they refute is not delivered",
            exclude_if=lambda policy: policy == "audit",  # so that recipes of before keep their digests
        ),
    ] = "audit"

    @field_validator("task")
    @classmethod
    def _known_task(cls, name: str) -> str:
        try:
            tasks.traced(name)
        except OttavaError as error:  # pydantic wants a ValueError, and adds the place
            there = f"there is {', '.join(tasks.names(traced=True))}; for answers alone there is the stage 'problems'"
            raise ValueError(f"{content.placed(error)}; {there}") from None
        return name

    @field_validator("teachers")
    @classmethod
    def _known_teachers(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in TEACHERS:
                raise ValueError(f"there is no teacher {name!r}; there are {', '.join(TEACHERS)}")
        if len(set(names)) != len(names):
            raise ValueError("a teacher is named twice: its votes would count twice")
        return names

    @field_validator("steps")
    @classmethod
    def _multi_step(cls, steps: tuple[int, int]) -> tuple[int, int]:
        if not 2 <= steps[0] <= steps[1]:
            raise ValueError("the shortest problem has at least 2 steps, and the longest no fewer than the shortest")
        return steps

    @model_validator(mode="after")
    def _possible(self) -> Spec:
        longest = tasks.get(self.task).MAX_STEPS
        if self.steps[1] > longest:
            raise ValueError(f"the longest problems of {self.task} have {longest} steps, not {self.steps[1]}")
        if self.agree > len(self.teachers):
            raise ValueError(f"{self.agree} teachers cannot agree where {len(self.teachers)} are asked")
        if self.audit > self.cold_start:
            raise ValueError(f"audit is {self.audit}, and there are only {self.cold_start} traces (cold_start)")
        if self.policy == "replay":
            if "audit" in self.model_fields_set:
                raise ValueError("audit would be ignored: with policy: replay the policy says how many are judged")
            return self
        best = clopper_pearson_upper(0, self.audit)
        if best > self.max_error:
            raise ValueError(
                f"an audit of {self.audit} traces cannot show an error under {best:.1%}, even if all are right: "
                f"raise audit, or max_error ({self.max_error:.1%})"
            )
        return self

    def outside(self) -> Mapping[str, str]:
        return content.key(self.task)

    @property
    def levels(self) -> tuple[int, ...]:
        """The numbers of steps of the problems with answers only."""
        return (*((1,) if self.one_step_share else ()), *self.lengths)

    @property
    def lengths(self) -> range:
        return range(self.steps[0], self.steps[1] + 1)


def run(spec: Spec, inputs: Mapping[str, Artifact], ctx: Context) -> Artifact:
    """Draw, clean, label, audit, prove disjoint. Raises DataError where the spec cannot be met."""
    task = tasks.traced(spec.task)
    one_step_test = task.sample(generator(ctx.seed, "test", 1), 1, spec.test_one_step, "test")
    test = [
        p for n in spec.lengths for p in task.sample(generator(ctx.seed, "test", n), n, spec.test_per_length, "test")
    ]
    ctx.progress(0.1, "test sets drawn")
    removed, tally = Removed(), Tally()
    labels, answers = _training(spec, task, one_step_test + test, ctx, removed, tally)
    ctx.progress(0.8, "audit")
    labels, findings, judged = _certify(spec, task, labels, tally, ctx.seed)
    if judged:
        write_lines(ctx.out / VOTES, judged)
    _write(spec, task, ctx, labels, answers, test, one_step_test)
    write_json(ctx.out / "certificate.json", findings | {"max_error": spec.max_error})
    write_json(ctx.out / "report.json", _report(spec, labels, answers, test, removed, tally))
    _prove_disjoint(task, ctx)
    return ctx.commit(
        {
            "cold_start": len(labels),
            "answers": len(answers),
            "test": len(test),
            "test_one_step": len(one_step_test),
            **{key: findings[key] for key in ("audited", "errors", "error_upper_95", "annotator")},
            **({"votes": findings["votes"]} if spec.policy == "replay" else {}),
            "teachers": "programs standing in for models",
            "rejected": dict(tally.rejected),
            "duplicates_removed": removed.exact + removed.near,
            "contaminated_removed": removed.contaminated,
            "disjoint": True,
        }
    )


def _training(
    spec: Spec, task: Traced, tests: list[Problem], ctx: Context, removed: Removed, tally: Tally
) -> tuple[list[Label], list[Problem]]:
    """Labelled traces and problems with answers only, length by length: what a short length lacks, longer ones give."""
    labels: list[Label] = []
    answers: list[Problem] = []
    lengths = [1, *spec.lengths]
    for done, steps in enumerate(lengths):
        share = -(-(spec.answers - len(answers)) // (len(lengths) - done))
        quota = 0
        if steps == 1:
            share = round(spec.answers * spec.one_step_share)
        else:
            quota = -(-(spec.cold_start - len(labels)) // (len(lengths) - done))
        candidates = 2 * quota + 32 if quota else 0
        rng = generator(ctx.seed, "train", steps)
        pool = task.sample(rng, steps, share + candidates, "train", fewer=True)
        pool = decontaminate(deduplicate(pool, task.canonical, removed), tests, normals(task), removed)
        got, used = _labels(spec, task, pool[:candidates], quota, ctx.seed, removed, tally)
        labels += got
        answers += [problem for problem in pool if problem.id not in used][:share]
        ctx.progress(0.1 + 0.7 * (done + 1) / len(lengths), f"problems of {steps} steps")
    if len(answers) < spec.answers:
        raise DataError(
            f"{spec.answers} problems with answers were asked for, and only {len(answers)} are left of 1 and "
            f"{spec.steps[0]} to {spec.steps[1]} steps once the test problems and traces are taken out",
            fix="lower `answers` or allow longer problems in `steps`",
        )
    order = generator(ctx.seed, "order").permutation(len(answers))
    return labels, [answers[i] for i in order]


def _labels(
    spec: Spec, task: Traced, candidates: list[Problem], quota: int, seed: int, removed: Removed, tally: Tally
) -> tuple[list[Label], set[str]]:
    """`quota` labels of one length, and the ids of all problems that the teachers saw."""
    seen: set[str] = set()

    def ask(problem: Problem) -> list[Any]:
        seen.add(problem.id)
        return [propose(TEACHERS[name], problem, seed) for name in spec.teachers]

    labels = collect(task, deduplicate(candidates, task.family, removed), ask, quota, spec.agree, tally)
    if len(labels) < quota:
        raise DataError(
            f"the teachers gave only {len(labels)} of {quota} traces on {len(seen)} problems of "
            f"{candidates[0].steps if candidates else 'this number of'} steps "
            f"(rejected so far: {', '.join(f'{n} {reason}' for reason, n in tally.rejected.items()) or 'none'})",
            fix="lower `cold_start` or `agree`, or name more teachers",
        )
    return labels, seen


def _certify(
    spec: Spec, task: Traced, labels: list[Label], tally: Tally, seed: int
) -> tuple[list[Label], dict[str, Any], tuple[dict[str, Any], ...]]:
    """The traces to deliver, their certificate, and the votes on all that were judged, where they are kept. Raises
    DataError where the bound is above `max_error`."""
    if spec.policy == "audit":
        return labels, _audit(spec, task, labels, seed).certificate(ANNOTATOR), ()

    def oracle(problem: Problem, trace: str) -> bool:
        return not task.check_trace(problem, trace)

    found = traces.decide(task, labels, tally.shown, oracle, spec.max_error, seed)
    if found.error_upper > spec.max_error:
        raise DataError(
            f"people found {len(found.labels)} of {len(labels)} traces right, of which at 95% confidence up to "
            f"{found.error_upper:.1%} may be wrong, and {spec.max_error:.1%} is allowed ({found.done.votes} votes)",
            fix="ask better or more independent teachers, require more of them to agree, or label more traces",
        )
    return list(found.labels), found.certificate(PEOPLE), found.judged


def _audit(spec: Spec, task: Traced, labels: list[Label], seed: int) -> Audit:
    by_question = {label.problem.question: label.problem for label in labels}

    def oracle(question: str, trace: str) -> bool:
        return not task.check_trace(by_question[question], trace)

    findings = audit(labels, spec.audit, generator(seed, "audit"), oracle)
    require(findings, spec.max_error)
    return findings


def _write(
    spec: Spec,
    task: Traced,
    ctx: Context,
    labels: list[Label],
    answers: list[Problem],
    test: list[Problem],
    one_step_test: list[Problem],
) -> None:
    write_lines(
        ctx.out / "cold_start.jsonl",
        (
            row(
                spec.task,
                label.problem,
                trace=label.trace,
                sources=list(label.sources),
                evidence={"asked": label.asked, "right_answer": label.right, "same_trace": len(label.sources)},
            )
            for label in labels
        ),
    )
    for name, problems in (("answers", answers), ("test", test), ("test_one_step", one_step_test)):
        write_lines(ctx.out / f"{name}.jsonl", (row(spec.task, problem) for problem in problems))
    write_json(ctx.out / "vocabulary.json", task.vocabulary())
    content.record(ctx.out, spec.task)


def _report(
    spec: Spec, labels: list[Label], answers: list[Problem], test: list[Problem], removed: Removed, tally: Tally
) -> dict[str, Any]:
    sets = {"cold_start": [label.problem for label in labels], "answers": answers, "test": test}
    return {
        "teachers": "programs with documented error modes standing in for models (a rehearsal)",
        "annotator": ANNOTATOR if spec.policy == "audit" else PEOPLE,
        "agree": spec.agree,
        "by_steps": {name: dict(sorted(Counter(p.steps for p in problems).items())) for name, problems in sets.items()},
        "asked": tally.accepted + tally.rejected.total(),
        "accepted": tally.accepted,
        "rejected": dict(tally.rejected),
        "proposals": tally.by_teacher(),
        "shared_mistakes": dict(tally.shared_mistakes),
        "removed": {
            "exact_duplicates": removed.exact,
            "near_duplicates": removed.near,
            "contaminated": removed.contaminated,
        },
    }


def _prove_disjoint(task: Traced, ctx: Context) -> None:
    """Read the files back: no test problem, nor a sibling of one, is in what a model will be trained on."""

    def problems(*names: str) -> list[Problem]:
        return [problem_of(line) for name in names for line in read_lines(ctx.out / f"{name}.jsonl")]

    require_disjoint(problems("cold_start", "answers"), problems("test", "test_one_step"), normals(task))
