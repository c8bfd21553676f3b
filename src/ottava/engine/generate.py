"""Batched generation whose random choices do not depend on who shares the batch.

A sampled rollout must be a function of the seed, the row and the position alone, or the same problem
gets another answer when the batch is cut differently. So torch's generators are not used: every
choice takes one number from a counter on the host. The same `choose` serves the gateway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import DynamicCache

PAD = 0
_MASK = (1 << 64) - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


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


def choose(logits: Tensor, temperature: float, top_p: float, draws: npt.NDArray[np.float64] | None) -> Tensor:
    """The next ids [B] for logits [B, V]: the largest at temperature 0, else by inverse distribution.

    draws: one number in [0, 1) a row. top_p keeps the fewest most probable ids that hold that mass
    (Holtzman et al. 2020, arXiv 1904.09751). Computed in float64, so a draw means the same id on any chip.
    """
    if temperature == 0.0 or draws is None:
        return logits.argmax(-1)
    below = logits.double() - logits.double().amax(-1, keepdim=True)  # first, so that no temperature overflows
    probabilities = torch.softmax(below / temperature, -1)
    ordered, order = torch.sort(probabilities, descending=True, stable=True, dim=-1)
    cumulative = ordered.cumsum(-1)
    kept = (cumulative - ordered < top_p).sum(-1, keepdim=True)
    mass = cumulative.gather(-1, kept - 1)
    target = torch.from_numpy(draws).to(mass)[:, None] * mass
    index = (cumulative <= target).sum(-1, keepdim=True).clamp(max=kept - 1)
    return order.gather(-1, index)[:, 0]


def uniform(seed: int, rows: npt.ArrayLike, position: int) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1), a pure function of (seed, row, position).

    SplitMix64's mixing function (Steele, Lea, Flood 2014, doi 10.1145/2660193.2660195) over the three
    in turn; the top 53 bits become the fraction.
    """
    bits = np.asarray(rows).astype(np.uint64)
    bits = _mix(np.full_like(bits, seed & _MASK)) ^ bits
    bits = _mix(_mix(bits) ^ np.uint64(position))
    fractions: npt.NDArray[np.float64] = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return fractions


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
