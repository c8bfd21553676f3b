"""Muon and AdamW on flat arrays: plain tensor operations in a fixed order, so that bits do not depend on grouping.

The library's optimisers choose fused or foreach paths by device and version; here the path is pinned.
AdamW follows Loshchilov and Hutter (arXiv 1711.05101); Muon follows Jordan (2024): Nesterov momentum,
orthogonalised by a quintic Newton-Schulz iteration, scaled by sqrt(max(1, rows/columns)).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ottava.trainer.state import Slot, State
from ottava.trainer.supervised import Optimiser

# Five odd quintics a x + b x^3 + c x^5 that drive singular values in (0, 1] towards 1 (You Jiacheng, 2025).
QUINTICS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
CHUNK = 1 << 16  # elements of a gradient whose squares are summed together


def clip_(gradient: Tensor, limit: float) -> float:
    """Scale a flat gradient to norm `limit` at most, in place; returns the norm before.

    The norm is summed in float64 over fixed chunks, so it is the same for every number of workers.
    """
    squares = torch.stack([part.double().square_().sum() for part in torch.split(gradient, CHUNK)])
    norm = math.sqrt(sum(squares.tolist()))
    if norm > limit:
        gradient.mul_(limit / norm)
    return norm


def update(state: State, gradient: Tensor, spec: Optimiser, rate: float) -> None:
    """One step of every optimiser on `state`, in place. gradient: flat [P]; rate: the schedule's factor."""
    muon = state.bounds["muon"][1]
    _adam(state, gradient[muon:], spec, rate, muon)
    _muon(state, gradient[:muon], spec, rate)


def _adam(state: State, gradient: Tensor, spec: Optimiser, rate: float, offset: int) -> None:
    t = state.step + 1
    state.first.mul_(spec.beta1).add_(gradient, alpha=1 - spec.beta1)
    state.second.mul_(spec.beta2).addcmul_(gradient, gradient, value=1 - spec.beta2)
    denominator = state.second.sqrt().div_(math.sqrt(1 - spec.beta2**t)).add_(spec.eps)
    for kind, peak in (("adam", spec.adam), ("embedding", spec.embedding)):
        begin, end = (bound - offset for bound in state.bounds[kind])
        step_size = peak * rate / (1 - spec.beta1**t)
        weights = state.weights[begin + offset : end + offset]
        weights.addcdiv_(state.first[begin:end], denominator[begin:end], value=-step_size)


def _muon(state: State, gradient: Tensor, spec: Optimiser, rate: float) -> None:
    state.momentum.lerp_(gradient, 1 - spec.muon_momentum)
    nesterov = gradient.lerp(state.momentum, spec.muon_momentum)
    for shape, slots in _by_shape(state.slots).items():
        stack = torch.cat([slot.view(nesterov).reshape(-1, *shape) for slot in slots])
        direction = orthogonalise(stack)
        step_size = spec.muon * rate
        first = 0
        for slot in slots:
            weights = slot.view(state.weights)
            count = slot.size // (shape[0] * shape[1])
            weights.mul_(1 - step_size * spec.muon_decay)
            scale = -step_size * math.sqrt(max(1.0, shape[0] / shape[1]))
            weights.add_(direction[first : first + count].view(slot.shape), alpha=scale)
            first += count


def orthogonalise(stack: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix of each of [B, M, N], approximately: singular values go towards 1."""
    wide = stack.shape[-2] <= stack.shape[-1]
    x = stack if wide else stack.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in QUINTICS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x if wide else torch.transpose(x, -2, -1)


def _by_shape(slots: tuple[Slot, ...]) -> dict[tuple[int, int], list[Slot]]:
    groups: dict[tuple[int, int], list[Slot]] = {}
    for slot in slots:
        if slot.kind == "muon":
            groups.setdefault((slot.shape[-2], slot.shape[-1]), []).append(slot)
    return groups


def router_step_(bias: Tensor, counts: Tensor, rate: float) -> None:
    """Move a router's bias towards the experts that got too few tokens (DeepSeek-V3, arXiv 2412.19437, 2.1.2).

    counts: integer loads [E] of the whole step, as exact floats; compared as integers, so the result
    does not depend on how the sum was made.
    """
    load = counts.long()
    bias.add_(torch.sign(load.sum() - load * len(load)).float(), alpha=rate)
