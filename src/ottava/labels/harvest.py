"""A teacher's own solutions that were found right: rejection sampling, as R1 made its second training set.

A right answer does not prove right steps; where the task knows its traces, the right ones are counted, and those that
do the same steps in another writing.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from ottava import platforms, tasks
from ottava.artifact import Artifact, write_json
from ottava.context import Context
from ottava.engine.evaluate import well_formed
from ottava.engine.rollout import InProcess, Sampling
from ottava.errors import DataError
from ottava.labels.hygiene import normals, require_disjoint
from ottava.models.chat import Chat
from ottava.models.load import load
from ottava.tasks import Problem, Task
from ottava.tasks.base import Traced, problem_of, read_lines, row, write_lines
from ottava.tasks.verify import grade
from ottava.trainer import verdicts
from ottava.trainer.data import REPLIES
from ottava.trainer.spec import FineTuning, Harvest

BATCH = 256


ONE_STEP = "test_one_step.jsonl"
"""Of a label artifact whose one-step problems stand apart, as they are asked directly alone."""


def collect(
    asked: Harvest, teacher: Artifact, label: Artifact, ctx: Context, out: Path, how: FineTuning | None = None
) -> dict[str, Any]:
    """Fill the folder `out` with a data set as the label artifact's is, with the teacher's traces in the place of the
    cold start's: {asked, right, graded, unscorable, checked, steps_right, steps_respelt, steps_right_share}. In direct
    mode the teacher's replies are kept instead (`trainer.data.REPLIES`). how: the mode, and the ids that a reply may
    have; without it as a model of the main job is asked.

    Asked once: what is in the stage's work folder is not asked again. Raises DataError where the teacher is right in
    nothing, or a problem is of the test set.
    """
    how = how or FineTuning()
    parts, counted = ctx.work / "harvest", ctx.work / "harvest" / "counts.json"
    if not counted.exists():
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
        write_json(counted, _collected(how, asked, teacher, label, ctx, parts))
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(parts / kept_in(how.mode), out / kept_in(how.mode))
    shutil.copyfile(label.file("answers.jsonl"), out / "answers.jsonl")
    found: dict[str, Any] = json.loads(counted.read_text())
    return found


def kept_in(mode: str) -> str:
    """The file with what a teacher said in a mode."""
    return REPLIES if mode == "direct" else "cold_start.jsonl"


def _collected(
    how: FineTuning, asked: Harvest, teacher: Artifact, label: Artifact, ctx: Context, parts: Path
) -> dict[str, Any]:
    task, apart = tasks.get(label.manifest["spec"]["task"]), ONE_STEP in label.manifest["files"]
    args = {
        **asked.model_dump(), "model": str(teacher.file("model")), "data": str(label.path), "task": task.NAME,
        "seed": ctx.seed, "out": str(parts), "platform": ctx.pool.platform, "mode": how.mode, "max_new": how.limit,
        "apart": apart and how.mode == "thinking", "verbatim": not apart or how.mode == "direct",
    }  # fmt: skip
    told = ctx.call("ottava.labels.harvest:ask", args, workers=ctx.pool.workers)
    counts: dict[str, Any] = {name: sum(one[name] for one in told) for name in told[0]}
    if not counts["right"]:
        lost = "".join(f"; {remark}" for remark in verdicts.of_harvest(counts))
        raise DataError(
            f"the teacher has no right answer to {counts['asked']} problems: there is nothing to learn from{lost}",
            fix="a teacher that was trained for longer, or more harvest.samples at a temperature above 0",
        )
    lines = [line for part in sorted(parts.glob("part-*.jsonl")) for line in read_lines(part)]
    names = ["test.jsonl", *([ONE_STEP] if apart else [])]
    tests = [problem_of(line) for name in names for line in read_lines(label.file(name))]
    require_disjoint([problem_of(line) for line in lines], tests, normals(task))
    write_lines(parts / kept_in(how.mode), sorted(lines, key=lambda line: int(line["number"])))
    return {**counts, "steps_right_share": _share(counts["steps_right"], counts["checked"])}


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def ask(args: Mapping[str, Any]) -> dict[str, int]:
    """Ask a model this worker's part of the problems, and write what was right as `part-RANK.jsonl`, in order.

    args: model and data (folders), task, asks (how many problems), samples, temperature, seed, out (a folder),
    platform; mode (default: thinking), max_new (ids of a reply; default: by the prompt's length), apart (whether
    problems with one step are left out, as is the default), verbatim (what was said is what is learnt, not the answer
    as the task writes it; default: no). Returns asked, right, checked, steps_right and steps_respelt: of the `checked`
    right answers, so many have right steps, and so many more are right but for how their steps are written; and of the
    `graded` replies, the well-formed ones, how many are unscorable.
    """
    device = platforms.asked(args).open()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    folder, task = Path(args["model"]), tasks.get(args["task"])
    everything = (problem_of(line) for line in read_lines(Path(args["data"]) / "answers.jsonl"))
    asked = [problem for problem in everything if problem.steps > 1 or not args.get("apart", True)][: args["asks"]]
    own = list(enumerate(asked))[rank::world]
    chat, engine = Chat.load(folder), InProcess(load(folder).to(device))
    lines, steps, grades = [], Counter[str](), Counter[str]()
    for start in range(0, len(own), BATCH):
        chunk = own[start : start + BATCH]
        for (number, problem), found in zip(chunk, _solutions(engine, chat, task, chunk, args, grades), strict=True):
            if found is None:
                continue
            trace, answer = found
            kind = "unknown" if trace is None else _steps(task, problem, trace)
            steps[kind] += 1
            evidence = {"verified": True, "steps": kind}
            more = ({} if trace is None else {"trace": trace}) | ({"reply": answer} if args.get("verbatim") else {})
            lines.append(
                row(task.NAME, problem, **more, sources=["teacher"], number=number, said=answer, evidence=evidence)
            )
    write_lines(Path(args["out"]) / f"part-{rank}.jsonl", lines)
    return {
        "asked": len(own), "right": len(lines), "graded": grades.total(), "unscorable": grades["unscorable"],
        "checked": len(lines) - steps["unknown"],
        "steps_right": steps["right"], "steps_respelt": steps["respelt"],
    }  # fmt: skip


def _steps(task: Task, problem: Problem, trace: str) -> Literal["right", "respelt", "wrong", "unknown"]:
    """What the steps of a trace with a right answer are, as far as the task can tell."""
    if not hasattr(task, "check_trace"):
        return "unknown"
    knows = cast(Traced, task)
    if not knows.check_trace(problem, trace):
        return "right"
    return "respelt" if knows.equivalent(problem, trace) else "wrong"


def _solutions(
    engine: InProcess,
    chat: Chat,
    task: Task,
    chunk: Sequence[tuple[int, Problem]],
    args: Mapping[str, Any],
    grades: Counter[str],
) -> list[tuple[str | None, str] | None]:
    """(trace, content) of the first reply to each problem that is well formed and right; None where none is. Direct
    replies have no trace. grades: counts what was graded, by its kind."""
    thinking = args.get("mode", "thinking") == "thinking"
    prompts = chat.prompts([task.prompt(problem) for _, problem in chunk], thinking)
    found: list[tuple[str | None, str] | None] = [None] * len(chunk)
    longest = args.get("max_new") or 2 * max(map(len, prompts)) + 16
    how = Sampling(longest, chat.stop_ids, args["temperature"])
    for sample in range(args["samples"]):
        left = [index for index, one in enumerate(found) if one is None]
        if not left:
            break
        numbers = [sample * args["asks"] + chunk[index][0] for index in left]
        drawn = engine.generate([prompts[index] for index in left], how, args["seed"], numbers)
        for index, ids in zip(left, drawn.ids(), strict=True):
            found[index] = _right(chat, task, chunk[index][1], ids, thinking, grades)
    return found


def _right(
    chat: Chat, task: Task, problem: Problem, ids: list[int], thinking: bool, grades: Counter[str]
) -> tuple[str | None, str] | None:
    if not well_formed(chat, ids, thinking):
        return None
    trace, content = chat.split(ids, thinking)
    found = grade(task, problem, content)
    grades[found.kind] += 1
    if not found.right:
        return None
    return (trace or "" if thinking else None), content
