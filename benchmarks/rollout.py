"""Rollouts beside `model.generate` of Transformers and our own `generate()`: python -m benchmarks.rollout [--json].

The teacher of recipes/tiny.yaml (MLA and experts, 137,600 parameters, random weights), its longest problems: 15 ids of
prompt, 22 of reply, sampled, one thread. Ratios are how many times the other's tokens a second ours draws (seconds of
CPU, in turn). No id ends a row, so both sides read and draw the same number of ids; ours also records log-probabilities
and the experts' routes. Prompts differ, unless the row says "groups of 8": then ours reads each prompt once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import options, show, throughput
from ottava.engine.generate import generate
from ottava.engine.rollout import InProcess, Sampling
from ottava.models.build import from_config
from ottava.trainer.spec import Shape

VOCABULARY, PROMPT, REPLY, TEMPERATURE = 44, 15, 22, 1.5
BATCHES = (64, 128, 256)
NEVER = VOCABULARY  # an id that no model says


def rows(pairs: int) -> list[dict[str, Any]]:
    """Two rows for each batch, and one with groups."""
    torch.set_num_threads(1)
    model = teacher()
    draw = torch.Generator().manual_seed(0)
    found = []
    for batch in BATCHES:
        prompts = torch.randint(6, VOCABULARY, (batch, PROMPT), generator=draw)
        for name, baseline in (
            ("transformers' generate", theirs(model, prompts)),
            ("generate()", cached(model, prompts)),
        ):
            found.append(throughput(f"rollouts, {batch} rows, against {name}", ours(model, prompts), baseline, pairs))
    grouped = prompts[: batch // 8].repeat_interleave(8, 0)
    name = f"rollouts, {batch} rows in groups of 8, against transformers' generate"
    return [*found, throughput(name, ours(model, grouped), theirs(model, grouped), pairs)]


def teacher() -> Any:
    """The recipe's model with random weights: an untrained one would say the same id for ever."""
    model = from_config(Shape().config(VOCABULARY))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.0 if "embed" in name else 1.5 / parameter.shape[-1] ** 0.5)
    return model.eval()


def ours(model: Any, prompts: Tensor) -> Callable[[], float]:
    engine, how, ids = InProcess(model), Sampling(REPLY, (NEVER,), TEMPERATURE), prompts.tolist()
    return timed(lambda: engine.generate(ids, how, 1).replies, len(prompts))


def cached(model: Any, prompts: Tensor) -> Callable[[], float]:
    return timed(lambda: generate(model, prompts, REPLY, stop=NEVER, temperature=TEMPERATURE, seed=1), len(prompts))


def theirs(model: Any, prompts: Tensor) -> Callable[[], float]:
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=REPLY, do_sample=True, temperature=TEMPERATURE, top_k=0, eos_token_id=None, pad_token_id=0
    )
    mask = torch.ones_like(prompts)
    return timed(
        lambda: model.generate(prompts, generation_config=config, attention_mask=mask)[:, PROMPT:], len(prompts)
    )


def timed(replies: Callable[[], Tensor], count: int) -> Callable[[], float]:
    def run() -> float:
        begun = time.process_time()
        found = replies()
        seconds = time.process_time() - begun
        assert found.shape == (count, REPLY)
        return seconds

    return run


if __name__ == "__main__":
    asked = options(__doc__ or "", pairs=15)
    show(rows(asked.pairs), asked.json)
