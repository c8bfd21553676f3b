"""Batched generation with any model of Hugging Face, through its own cache.

Evaluation and serving use it, and rollouts of models that `bare` does not know. Choices come from `sampling`,
so a row keeps its choices whoever shares its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ottava.engine.sampling import choose, uniform

PAD = 0


@dataclass(frozen=True)
class ThinkBudget:
    """At most `tokens` ids of thinking; then the id `end` of </think> is forced."""

    end: int
    tokens: int


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Tensor,
    max_new: int,
    *,
    stop: int | Sequence[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    rows: Sequence[int] | None = None,
    think: ThinkBudget | None = None,
) -> Tensor:
    """Continue prompts of one length.

    prompts: int64 [B, T]. stop: ids that end a row; what follows them is PAD. temperature 0 is greedy;
    above 0, `seed` is needed and `rows` (default 0..B-1) are the numbers by which rows draw their
    choices, so a row keeps its choices in any batch. think: the prompts end where thinking begins.
    Returns int64 [B, N], N <= max_new, the stop id included.
    """
    assert temperature == 0.0 or seed is not None, "sampling needs a seed"
    stops = torch.tensor([stop] if isinstance(stop, int) else list(stop), device=prompts.device)
    numbers = np.arange(len(prompts)) if rows is None else np.asarray(rows)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=prompts.device)
    thinking = torch.full_like(done, think is not None)
    cache, inputs, out = DynamicCache(config=model.config), prompts, []
    training = model.training
    model.eval()
    try:
        for position in range(max_new):
            logits = step(model, inputs, cache)
            draws = uniform(seed, numbers, position) if temperature and seed is not None else None
            ids = choose(logits, temperature, top_p, draws)
            if think is not None:
                if position >= think.tokens:
                    ids = torch.where(thinking, think.end, ids)
                thinking &= ids != think.end
            ids = torch.where(done, PAD, ids)
            out.append(ids)
            done |= torch.isin(ids, stops)
            if bool(done.all()):
                break
            inputs = ids[:, None]
    finally:
        model.train(training)
    return torch.stack(out, 1) if out else prompts[:, :0]


def step(model: nn.Module, inputs: Tensor, cache: DynamicCache) -> Tensor:
    """One forward pass: logits [B, V] after the last of `inputs` [B, T]; `cache` grows by T."""
    output = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits: Tensor = output.logits[:, -1]
    return logits


class Cached:
    """A `bare.Decoder` of any model of Hugging Face, by `step` above. Prompts of one batch have one length."""

    ragged = False

    def __init__(self, model: nn.Module):
        self.model: Any = model
        self._cache = DynamicCache(config=self.model.config)

    def start(self, rows: int, width: int) -> None:
        self._cache = DynamicCache(config=self.model.config)

    @torch.no_grad()
    def step(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        assert lengths is None, "this cache holds rows of one length"
        return step(self.model, ids, self._cache)

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, past_key_values=self._cache, use_cache=True).logits
        return logits

    def select(self, rows: Tensor) -> None:
        self._cache.batch_select_indices(rows)

    def routes(self) -> Tensor | None:
        return None
