"""Problems with verified answers and nothing more, of any task: what reinforcement learns from, and is tested on.

Training and test are drawn from the two sides of the task's own split, and no task is believed: every problem must be
of the level and the side that were asked for, questions that are there twice are taken out, then whatever is on both
sides all the same is taken out of training, and at the end the files are read back and proven disjoint, by the text of
the questions too. The verifier is tried before anybody learns from what it says.

    answers.jsonl      training problems
    test.jsonl         test problems, as many of every level
    task.json          of a task that is not built in: what it was made of
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, field_validator

from ottava import recipe, tasks
from ottava.artifact import Artifact
from ottava.errors import DataError, OttavaError
from ottava.labels.hygiene import Removed, decontaminate, deduplicate, normals, require_disjoint
from ottava.tasks import Problem, Task, content
from ottava.tasks.base import Split, generator, plain, problem_of, read_lines, row, write_lines
from ottava.tasks.verify import require_trusted
from ottava.trainer import verdicts

if TYPE_CHECKING:
    from ottava.context import Context

VERSION = "2"
INPUTS = ()
LABEL = True

Count = Annotated[int, Field(ge=1, le=1_000_000)]


class Spec(recipe.Spec):
    """The problems section of a recipe."""

    task: str
    levels: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1, description="of difficulty")] = (1,)
    answers: Annotated[Count, Field(description="training problems of each level; fewer where there are not so many")]
    test: Annotated[Count, Field(description="test problems of each level")] = 100

    @field_validator("task")
    @classmethod
    def _known_task(cls, name: str) -> str:
        try:
            tasks.get(name)
            content.of(name)
        except OttavaError as error:  # pydantic wants a ValueError, and adds the place
            raise ValueError("; ".join(filter(None, (content.placed(error), error.fix)))) from None
        return name

    @field_validator("levels")
    @classmethod
    def _each_once(cls, levels: tuple[int, ...]) -> tuple[int, ...]:
        if list(levels) != sorted(set(levels)):
            raise ValueError("levels are named in ascending order, each once")
        return levels

    def outside(self) -> Mapping[str, str]:
        return content.key(self.task)

    def unmet(self, name: str, stages: Mapping[str, recipe.Spec]) -> tuple[tuple[str, ...], str, str] | None:
        task = tasks.get(self.task)
        above = [level for level in self.levels if level > task.MAX_STEPS]
        if above:
            what = f"{self.task} has levels 1 to {task.MAX_STEPS}, and level {above[0]} names nothing"
            return ("levels",), what, "ask for other levels"
        if self.task.startswith("gym:"):
            return None  # to draw one may take long; the stage is the first to run and says it
        for level in self.levels:
            sides: tuple[Split, ...] = ("train", "test")
            if not any(task.sample(generator(0, "levels", level), level, 1, side, fewer=True) for side in sides):
                return ("levels",), f"{self.task} has no problem of level {level}", "ask for other levels, or add some"
        return None


def run(spec: Spec, inputs: Mapping[str, Artifact], ctx: Context) -> Artifact:
    """Draw, clean, try the verifier, prove disjoint. Raises DataError where the task has not so many problems, gives
    others than it was asked for, or its verifier must not be trusted."""
    task, removed, twice = tasks.get(spec.task), Removed(), Removed()
    drawn = [p for level in spec.levels for p in _drawn(task, ctx.seed, level, spec.test, "test")]
    test = _each_once(task, drawn, twice)
    _of_side(task, test, "test")
    ctx.progress(0.2, "test set drawn")
    pools = [p for level in spec.levels for p in _drawn(task, ctx.seed, level, spec.answers, "train")]
    answers = decontaminate(_each_once(task, pools, removed), test, normals(task), removed)
    if not answers:
        raise DataError(f"{spec.task} has no training problem that is not in the test", fix="other levels or options")
    _of_side(task, answers, "train")
    ctx.progress(0.7, "trying the verifier")
    require_trusted(task, answers)
    order = generator(ctx.seed, "order").permutation(len(answers))
    for name, problems in (("answers", [answers[i] for i in order]), ("test", test)):
        write_lines(ctx.out / f"{name}.jsonl", (row(spec.task, problem) for problem in problems))
    train, held = ([problem_of(x) for x in read_lines(ctx.out / f"{name}.jsonl")] for name in ("answers", "test"))
    require_disjoint(train, held, normals(task))
    content.record(ctx.out, spec.task)
    return ctx.commit(
        {
            "task": spec.task,
            "answers": len(train),
            "test": len(held),
            "by_level": _by_level(train),
            "test_by_level": _by_level(held),
            "duplicates_removed": removed.exact + removed.near,
            "test_duplicates_removed": twice.exact + twice.near,
            "contaminated_removed": removed.contaminated,
            "disjoint": True,
            "verifier_tried": True,
            **verdicts.said(verdicts.repeated(len(drawn), len(held))),
        }
    )


def _drawn(task: Task, seed: int, level: int, count: int, split: Split) -> list[Problem]:
    """Problems of one level and side, fewer than `count` only of training. Raises DataError where the task gives others
    than it was asked for."""
    found = task.sample(generator(seed, split, level), level, count, split, fewer=split == "train")
    for problem in found:
        if not isinstance(problem, Problem) or problem.steps != level:
            has = f"one of level {problem.steps}" if isinstance(problem, Problem) else f"{problem!r:.80}"
            raise DataError(
                f"the task {task.NAME} was asked for problems of level {level}, and gave {has}",
                where=task.NAME,
                fix="let sample(rng, steps, ...) give Problems whose `steps` is the level that was asked for",
            )
    if len(found) > count or (len(found) < count and split == "test"):
        what = f"the task {task.NAME} was asked for {count} {split} problems of level {level}, and gave {len(found)}"
        raise DataError(what, where=task.NAME, fix="ask for as many as there are, or let sample raise DataError")
    return found


def _each_once(task: Task, problems: list[Problem], removed: Removed) -> list[Problem]:
    """Without the questions that are there twice, by the text alone or by the task's own writing of it."""
    return deduplicate(deduplicate(problems, plain, removed), task.canonical, removed)


def _of_side(task: Task, problems: Sequence[Problem], split: Split) -> None:
    """Raise DataError where the task says of a problem of one side that it is of the other."""
    for problem in problems:
        if bool(task.held_out(problem.question)) != (split == "test"):
            raise DataError(
                f"the task {task.NAME} gave {problem.question!r:.200} for the {split} side, and held_out says that it "
                "is of the other: a model could be tested on what it learnt",
                where=task.NAME,
                fix="let `sample` and `held_out` go by the same rule, such as tasks.base.in_test of the family",
            )


def _by_level(problems: Sequence[Problem]) -> dict[str, int]:
    return {str(level): count for level, count in sorted(Counter(p.steps for p in problems).items())}
