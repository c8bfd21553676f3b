"""Problems with verified answers and nothing more, of any task: what reinforcement learns from, and is tested on.

Training and test are drawn from the two sides of the task's own split; then whatever is in both all the same is taken
out of training, and at the end the files are read back and proven disjoint. The verifier is tried before anybody learns
from what it says.

    answers.jsonl      training problems
    test.jsonl         test problems, as many of every level
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, field_validator

from ottava import recipe, tasks
from ottava.artifact import Artifact
from ottava.errors import DataError, OttavaError
from ottava.labels.hygiene import Removed, decontaminate, deduplicate, require_disjoint
from ottava.tasks.base import generator, problem_of, read_lines, row, write_lines
from ottava.tasks.verify import canary

if TYPE_CHECKING:
    from ottava.context import Context

VERSION = "1"
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
        except OttavaError as error:  # pydantic wants a ValueError, and adds the place
            raise ValueError(f"{error.what}; {error.fix}") from None
        return name

    @field_validator("levels")
    @classmethod
    def _each_once(cls, levels: tuple[int, ...]) -> tuple[int, ...]:
        if list(levels) != sorted(set(levels)):
            raise ValueError("levels are named in ascending order, each once")
        return levels


def run(spec: Spec, inputs: Mapping[str, Artifact], ctx: Context) -> Artifact:
    """Draw, clean, try the verifier, prove disjoint. Raises DataError where the task has not so many problems, or its
    verifier must not be trusted."""
    task, removed = tasks.get(spec.task), Removed()
    test = [p for n in spec.levels for p in task.sample(generator(ctx.seed, "test", n), n, spec.test, "test")]
    ctx.progress(0.2, "test set drawn")
    answers = []
    for level in spec.levels:
        pool = task.sample(generator(ctx.seed, "train", level), level, spec.answers, "train", fewer=True)
        answers += decontaminate(deduplicate(pool, task.canonical, removed), test, task.family, removed)
    if not answers:
        raise DataError(f"{spec.task} has no training problem that is not in the test", fix="other levels or options")
    ctx.progress(0.7, "trying the verifier")
    if reasons := canary(task, answers):
        raise DataError(f"the verifier of {spec.task} must not be trusted: {'; '.join(reasons)}", fix="another task")
    order = generator(ctx.seed, "order").permutation(len(answers))
    for name, problems in (("answers", [answers[i] for i in order]), ("test", test)):
        write_lines(ctx.out / f"{name}.jsonl", (row(spec.task, problem) for problem in problems))
    train, held = ([problem_of(x) for x in read_lines(ctx.out / f"{name}.jsonl")] for name in ("answers", "test"))
    require_disjoint(train, held, task.family)
    return ctx.commit(
        {
            "task": spec.task,
            "answers": len(train),
            "test": len(held),
            "by_level": {str(level): count for level, count in sorted(Counter(p.steps for p in train).items())},
            "duplicates_removed": removed.exact + removed.near,
            "contaminated_removed": removed.contaminated,
            "disjoint": True,
            "verifier_tried": True,
        }
    )
