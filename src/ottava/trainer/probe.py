"""Short measurements of what training stages consist of, for the plan.

A stage is more than its steps: processes start, states are exported, test problems are answered, and a replay proves
the run. Each function here says of a stage how often it does what, and what one of it takes on this pool. The seconds
of a start are the caller's to measure: only it knows when it asked.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ottava import platforms
from ottava.engine.generate import generate
from ottava.models.build import from_config
from ottava.platforms.base import Platform
from ottava.trainer import reduce, snapshot
from ottava.trainer.data import Data, Examples, batch
from ottava.trainer.guard import Group
from ottava.trainer.loop import Trainer
from ottava.trainer.sft import fresh_trainer
from ottava.trainer.spec import Shape, TrainSpec
from ottava.trainer.worker import join, numerics_class

VOCABULARY = 44
LENGTHS = range(2, 7)  # steps of the chains whose shapes the stand-in data has
ASKED = 128  # problems that are answered at once: a batch of an evaluation on the recipes' test sets

Part = tuple[str, float, float | None]
"""What, how often, and the seconds of one; None: a start."""


@dataclass(frozen=True)
class _Found:
    """Of one model on this pool. step: seconds of a step whose state is kept; answer: of one problem in both modes;
    tokens: of a step, all workers together; busy: seconds that finding out took."""

    trainer: Trainer
    step: float
    answer: float
    tokens: float
    busy: float


def throughput(args: Mapping[str, Any]) -> dict[str, Any]:
    """Of supervised fine-tuning: time steps from all over the run, on stand-in tokens of the data's shapes.

    args: {spec: the train section, seed, repeats, platform; tests: problems of the test set; pools: how many there
    are}. Runs in the pool's group: call it with the pool's workers. Returns parts (of the stage, see `Part`),
    busy_seconds (of the measurements alone; what the call took beside them is a start), step_seconds (mean),
    answer_seconds, tokens_per_s and tokens_per_step (all workers), steps (whole ones, of a run, its replay and the
    drift), parameters (total, active) and flops_per_token (forward and backward, 6 N_active).
    """
    platform = platforms.asked(args)
    group, spec = join(platform), TrainSpec.model_validate(args["spec"])
    found = _measure(spec, group, platform, int(args.get("repeats", 24)), int(args.get("seed", 0)))
    pools, moves = int(args.get("pools", 1)), 0 if spec.fault is None else 1
    alone = spec.drift.replicas + 3 if moves and spec.restarts == 0 and pools > 1 else 0
    slots, shape = found.trainer.state.slots, spec.shape
    total = sum(slot.size for slot in slots)
    experts = sum(slot.size for slot in slots if ".experts." in slot.name)
    active = total - experts + (experts * shape.active_experts // shape.experts if isinstance(shape, Shape) else 0)
    return {
        "parts": [
            ("steps, a run and its replay", 2 * spec.steps, found.step),
            *_drift(spec, alone, group.world, found.step),
            ("starts", 2 * (1 + moves) + 1 + pools, None),  # of both runs, of the export and of an evaluation a pool
            ("answers", pools * int(args.get("tests", 0)), found.answer),
        ],
        "busy_seconds": found.busy,
        "step_seconds": found.step,
        "answer_seconds": found.answer,
        "tokens_per_s": found.tokens / found.step,
        "tokens_per_step": found.tokens,
        "steps": 2 * spec.steps + spec.drift.window * alone,
        "parameters": total,
        "active_parameters": active,
        "flops_per_token": 6 * active,
    }


def _drift(spec: TrainSpec, alone: int, world: int, step: float) -> list[Part]:
    """Of a move between pools: so many trajectories by one worker each, of which the replicas run `world` at a time."""
    if not alone:
        return []
    turns = 3 + ceil((alone - 3) / world)
    return [
        ("steps by one worker, the drift", spec.drift.window * turns, world * step),
        ("starts of the drift", turns + 1, None),
    ]


def students(args: Mapping[str, Any]) -> dict[str, Any]:
    """Of a distillation: every student and its control by supervised fine-tuning, and the teacher's harvest.

    The smallest and the largest student are measured; a step of the others lies between, by their parameters.
    args: {specs: how each student is trained; asks: problems that the teacher is asked; teacher_answer_seconds; the
    rest as `throughput`}. Returns parts and busy_seconds.
    """
    platform = platforms.asked(args)
    group, specs = join(platform), [TrainSpec.model_validate(spec) for spec in args["specs"]]
    sizes = [size(spec) for spec in specs]
    ends = sorted({sizes.index(min(sizes)), sizes.index(max(sizes))}, key=sizes.__getitem__)
    found = [_measure(specs[i], group, platform, int(args.get("repeats", 12)), int(args.get("seed", 0))) for i in ends]

    def mean(measured: Sequence[float]) -> float:
        return float(np.interp(sizes, [sizes[i] for i in ends], measured).mean())

    both = 2 * len(specs)  # a student and its control
    parts: list[Part] = [
        ("steps", both * specs[0].steps, mean([one.step for one in found])),
        ("answers", both * int(args.get("tests", 0)), mean([one.answer for one in found])),
        ("answers of the teacher", args["asks"] / group.world, args["teacher_answer_seconds"]),
        ("starts", 1 + 3 * both, None),  # of the teacher; of a run, an export and an evaluation each
    ]
    return {"parts": parts, "busy_seconds": sum(one.busy for one in found)}


def size(spec: TrainSpec) -> int:
    """The parameters of the model that a `train` section describes, without making it."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in from_config(spec.shape.config(VOCABULARY)).parameters())


def _measure(spec: TrainSpec, group: Group, platform: Platform, repeats: int, seed: int) -> _Found:
    """Steps as a supervised worker takes them, each kept in a file, and answers by the model as it is then."""
    data = _stand_in()
    trainer = fresh_trainer(spec, seed, data, VOCABULARY, platform.own())
    numerics_class(trainer)  # as every worker does when it joins: part of a start
    shards = reduce.owned(spec.virtual_shards, group.rank, group.world)
    seconds, tokens, begun = [], [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        writer = snapshot.Writer(Path(folder) / "kept.snap", trainer.state.arena.numel() * 4)

        def step() -> None:
            trainer.step(lambda value: reduce.exchange_(value, group.rank, group.world), shards)
            kept = trainer.state.snapshot()
            group.digests(kept.digest)
            writer.write(kept, kept.digest)

        for number in [*range(repeats), *range(repeats)]:  # once to warm up: every shape is slow the first time
            trainer.state.step = number * spec.steps // repeats
            seconds.append(_timed(step, platform))
            tokens.append(_tokens(spec, trainer, data))
    seconds, tokens = seconds[repeats:], tokens[repeats:]
    answer = _answer_seconds(trainer, platform)
    return _Found(trainer, statistics.mean(seconds), answer, statistics.mean(tokens), time.perf_counter() - begun)


def _answer_seconds(trainer: Trainer, platform: Platform) -> float:
    """Of one problem, asked in both modes, in a batch as evaluations ask. Replies are as long as right ones are: the
    model has learnt nothing, and by itself would not end."""
    trainer.refresh()
    device = next(trainer.model.parameters()).device
    steps = statistics.mean(LENGTHS)
    prompts = torch.full((ASKED, int(2 * steps + 5)), 7, device=device)

    def ask() -> None:
        for length in (int(3 * steps + 4), 2):  # thinking, direct
            generate(trainer.model, prompts, length, stop=VOCABULARY)  # an id that no model says

    _timed(ask, platform)
    return _timed(ask, platform) / ASKED


def _timed(work: Callable[[], None], platform: Platform) -> float:
    begun = time.perf_counter()
    work()
    platform.synchronize()
    return time.perf_counter() - begun


def _stand_in() -> Data:
    """Data of the chains' shapes, so that the probe needs no dataset."""

    def examples(length: int) -> Examples:
        tokens = (torch.arange(32 * length).reshape(32, length) * 7) % (VOCABULARY - 6) + 6
        return Examples(tokens, tokens[:, 1:].clone())

    return Data({n: examples(5 * n + 9) for n in LENGTHS}, {n: examples(2 * n + 7) for n in range(1, 7)})


def _tokens(spec: Any, trainer: Trainer, data: Data) -> int:
    """Tokens that the step just done went through, all shards together."""
    work = batch(data, spec, trainer.seed, trainer.state.step - 1, 0)
    count = work.thinking.tokens.numel() + (work.direct.tokens.numel() if work.direct else 0)
    return int(count * spec.virtual_shards)
