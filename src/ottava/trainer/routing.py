"""The learner sends each id to the experts that the engine chose when it was sampled ("keep routing").

Two computations of one router round differently, and where two experts are nearly alike a last bit picks another
expert: the id then has another log-probability by far more than rounding, and the ratio of a policy to itself is not
1. So the choice is recorded and repeated (DeepSeek-V3.2, arXiv 2512.02556, sec. 3.1; R3, 2510.11370). Only the choice:
scores, their normalisation and the gradient into the router are of the router as it is now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ottava.errors import DataError

Output = tuple[Tensor, Tensor, Tensor]


@contextmanager
def replay(model: nn.Module, routes: Tensor, inside: Tensor) -> Iterator[None]:
    """While the block runs, forward passes of [N, L] ids take these experts.

    model: DeepSeek-V3 or Qwen3-MoE of Hugging Face. routes: integers [N, L, expert layers, k], in the order of the
    gates; inside: bool [N, L], where a route is recorded: elsewhere (padding) the gates choose. The order of the k
    experts is kept, too: it is the order of a sum. Hooks that look at a gate's output see the recorded experts.
    Raises DataError where the routes are of another model.
    """
    gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    if len(gates) != routes.shape[2] or not gates:
        raise DataError(f"routes through {routes.shape[2]} layers of experts, and the model has {len(gates)}")
    rows = inside.reshape(-1, 1)
    handles = [
        gate.register_forward_hook(_follow(rows, routes[:, :, layer].flatten(0, 1).long()), prepend=True)
        for layer, gate in enumerate(gates)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _follow(inside: Tensor, recorded: Tensor) -> Callable[[nn.Module, object, Output], Output]:
    def hook(gate: nn.Module, _inputs: object, output: Output) -> Output:
        logits, weights, chosen = output
        if recorded.shape != chosen.shape:
            raise DataError(f"routes of {list(recorded.shape)} where the gate chooses {list(chosen.shape)}")
        ids = torch.where(inside, recorded, chosen)
        if int(ids.max()) >= logits.shape[-1] or int(ids.min()) < 0:
            raise DataError(f"a route leads to an expert that is none of the {logits.shape[-1]}")
        return logits, _weights(gate, logits, ids).to(weights.dtype), ids

    return hook


def _weights(gate: Any, logits: Tensor, ids: Tensor) -> Tensor:
    """The weights [M, k] of given experts, from live logits [M, E], as the family's own gate computes them."""
    if hasattr(gate, "e_score_correction_bias"):  # DeepSeek-V3, arXiv 2412.19437, eq. 13 to 15
        weights = logits.sigmoid().gather(1, ids)
        if gate.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        scaled: Tensor = weights * gate.routed_scaling_factor
        return scaled
    weights = torch.softmax(logits, -1, dtype=torch.float).gather(1, ids)  # Qwen3-MoE
    return weights / weights.sum(-1, keepdim=True) if gate.norm_topk_prob else weights
