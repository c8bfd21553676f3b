"""Whole short runs by one worker each: a cold start, or one algorithm from it. What a comparison is made of.

They have no supervisor: a trial that was cut off is done again from its beginning. Workers take trials from a list,
each the next that nobody has done or is at; so what is done stays done, whoever stops in between.

    FOLDER/trial.json     what is asked      FOLDER/result.json     what came out, complete or not there
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ottava import platforms, tasks
from ottava.artifact import hold, write_json
from ottava.engine.evaluate import evaluate
from ottava.errors import Busy
from ottava.models.chat import Chat
from ottava.models.load import load
from ottava.tasks.base import problem_of, read_lines
from ottava.tasks.verify import grade
from ottava.trainer import snapshot, verdicts, worker
from ottava.trainer.loop import Trainer
from ottava.trainer.rl_spec import ReinforceSpec
from ottava.trainer.start import make_trainer

TRIAL, RESULT = "trial.json", "result.json"
_WAIT_S = 0.2


def work(args: Mapping[str, Any]) -> dict[str, int]:
    """Do trials until all have a result; how many were done here.

    args: trials, their folders in order; platform. A trial: kind (start | arm), data (a folder with test.jsonl),
    task, and what `make_trainer` takes; of an arm also rows: how many replies it may draw, or None.
    """
    platforms.asked(args).open()
    done, left = 0, [Path(folder) for folder in args["trials"]]
    while left:
        before = done
        for folder in left:
            done += _attempt(folder, args["platform"])
        left = [folder for folder in left if not (folder / RESULT).exists()]
        if left and done == before:
            time.sleep(_WAIT_S)  # others are at them
    return {"done": done}


def _attempt(folder: Path, platform: str) -> bool:
    """Do a trial that nobody did or is at; whether it was done here."""
    if (folder / RESULT).exists():
        return False
    try:
        descriptor = hold(folder, "another worker is at this trial", "wait for it")
    except Busy:
        return False
    try:
        if (folder / RESULT).exists():
            return False
        asked = json.loads((folder / TRIAL).read_text()) | {"platform": platform}
        write_json(folder / RESULT, _start(asked, folder) if asked["kind"] == "start" else _arm(asked))
    finally:
        os.close(descriptor)
    return True


def _start(args: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Supervised fine-tuning on the cold start; the model lies in the folder."""
    model = folder / "model"
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(args["chat"], model)
    trainer = make_trainer(args)
    stopped = _train(trainer, None)[1]
    state = folder / "final.state"
    snapshot.save(state, trainer.state.snapshot())
    worker.export({**args, "state": str(state), "model": str(model)})
    state.unlink()
    device = platforms.asked(args).own()
    return {"thinking": _accuracy(load(model).to(device), args), "stopped": stopped}


def _arm(args: Mapping[str, Any]) -> dict[str, Any]:
    """One algorithm from a start. updates, rows, ids, cpu_s: what training took; rewards, mixed: by generation."""
    begun, trainer = time.process_time(), make_trainer(args)
    told, stopped = _train(trainer, args["rows"])
    seconds = time.process_time() - begun
    with trainer.looking() as model:
        thinking = _accuracy(model, args)
    return {
        "thinking": thinking,
        "updates": trainer.state.step,
        "cpu_s": round(seconds, 2),
        "rows": sum(one["drawn"] for one in told),
        "ids": sum(one["drawn_ids"] for one in told),
        "rewards": [one["reward"] for one in told],
        "mixed": [one["mixed"] for one in told],
        "digest": trainer.state.digest(),
        "stopped": stopped,
        **verdicts.said(verdicts.of_generations(told)),
    }


def _train(trainer: Trainer, rows: int | None) -> tuple[list[dict[str, float]], str | None]:
    """Train to the end, or until the next generation would draw more replies than `rows` in all, if it is as the last.

    What was told at the first update of each generation; and why the run ended early, where its numbers were no
    numbers any more: the state is then that of the step before.
    """
    spec, shards = trainer.spec, range(trainer.spec.virtual_shards)
    every = spec.every if isinstance(spec, ReinforceSpec) else spec.steps
    told: list[dict[str, float]] = []
    while (step := trainer.state.step) < spec.steps:
        opens = step % every == 0
        if rows is not None and told and opens and sum(one["drawn"] for one in told) + told[-1]["drawn"] > rows:
            break
        trainer.refresh()
        trainer.prepare(shards)
        total = trainer.contribution(shards)
        norm = trainer.clip(total)
        if not all(map(math.isfinite, (norm, *trainer.sums(total).values()))):
            return told, f"the loss or its gradient is not a number in step {step + 1}"
        report = trainer.update(total, norm)
        told += [report.told] if opens else []
    return told, None


def _accuracy(model: Any, args: Mapping[str, Any]) -> dict[str, Any]:
    """The thinking accuracy on the trial's test: n, value, low, high, right; and unscorable, as `evaluate` says.

    Graded as in training: apart, with a deadline.
    """
    test = [problem_of(line) for line in read_lines(Path(args["data"]) / "test.jsonl")]
    task = tasks.get(args["task"])
    found = evaluate(model, Chat.load(Path(args["chat"])), test, True, partial(grade, task), prompt=task.prompt)
    return {name: found[name] for name in ("n", "value", "low", "high", "right", "unscorable") if name in found}
