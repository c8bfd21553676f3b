"""A short measurement of the training step itself, for the plan."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch

from ottava import platforms
from ottava.trainer.guard import Group
from ottava.trainer.loop import Trainer
from ottava.trainer.sft import fresh_trainer
from ottava.trainer.worker import join


def throughput(args: Mapping[str, Any]) -> dict[str, Any]:
    """Time steps from all over the run, on stand-in tokens of the data's shapes.

    args: {spec: the train section, seed, repeats, platform}. Runs in the pool's group: call it with the pool's
    workers. Returns tokens_per_s (all workers), step_seconds (mean), parameters (total, active) and
    flops_per_token (forward and backward, 6 N_active).
    """
    from ottava.trainer import reduce
    from ottava.trainer.spec import Shape, TrainSpec

    platform = platforms.asked(args)
    group: Group = join(platform)
    spec = TrainSpec.model_validate(args["spec"])
    trainer = fresh_trainer(spec, int(args.get("seed", 0)), _stand_in(), VOCABULARY, platform.own())
    shards = reduce.owned(spec.virtual_shards, group.rank, group.world)
    repeats = int(args.get("repeats", 24))
    seconds, tokens = [], []
    for number in [*range(repeats), *range(repeats)]:  # once to warm up: every shape is slow the first time
        trainer.state.step = number * spec.steps // repeats
        begun = time.perf_counter()
        trainer.step(lambda value: reduce.exchange_(value, group.rank, group.world), shards)
        platform.synchronize()
        seconds.append(time.perf_counter() - begun)
        tokens.append(_tokens(spec, trainer))
    seconds, tokens = seconds[repeats:], tokens[repeats:]
    total = sum(slot.size for slot in trainer.state.slots)
    experts = sum(s.size for s in trainer.state.slots if ".experts." in s.name)
    shape = spec.shape
    active = total - experts + (experts * shape.active_experts // shape.experts if isinstance(shape, Shape) else 0)
    return {
        "tokens_per_s": sum(tokens) / sum(seconds),
        "tokens_per_step": statistics.mean(tokens),
        "step_seconds": statistics.mean(seconds),
        "steps": 2 * spec.steps + spec.drift.window * (spec.drift.replicas + 2),  # the run, its replay, the drift
        "parameters": total,
        "active_parameters": active,
        "flops_per_token": 6 * active,
    }


VOCABULARY = 44


def _stand_in() -> Any:
    """Data of the chains' shapes, so that the probe needs no dataset."""
    from ottava.trainer.data import Data, Examples

    def examples(length: int) -> Examples:
        tokens = (torch.arange(32 * length).reshape(32, length) * 7) % (VOCABULARY - 6) + 6
        return Examples(tokens, tokens[:, 1:].clone())

    return Data({n: examples(5 * n + 9) for n in range(2, 7)}, {n: examples(2 * n + 7) for n in range(1, 7)})


def _tokens(spec: Any, trainer: Trainer) -> int:
    """Tokens that the step just done went through, all shards together."""
    from ottava.trainer.data import batch

    work = batch(_stand_in(), spec, trainer.seed, trainer.state.step - 1, 0)
    count = work.thinking.tokens.numel() + (work.direct.tokens.numel() if work.direct else 0)
    return int(count * spec.virtual_shards)
