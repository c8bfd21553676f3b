"""The training loop of one worker: gradients of its virtual shards in, one exact step out.

Each virtual shard is its own forward and backward pass, never batched with another, and gradients
never accumulate in `.grad`: what a shard contributes is the same bits wherever it is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ottava.fp8.codec import project
from ottava.models import precision
from ottava.models.published import matrices
from ottava.trainer import optimiser, schedule, state
from ottava.trainer.objective import Objective
from ottava.trainer.reduce import tree_sum
from ottava.trainer.state import ALIGN, State
from ottava.trainer.supervised import Supervised

Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Report:
    """What one step did. told: what its objective says of it."""

    step: int
    told: dict[str, float]
    norm: float
    on_grid: bool


class Trainer:
    """A model whose parameters are views of one flat array, and the state that they come from.

    forward [P]: what the passes run through: the latent weights, or their projection on the grid, in the type of the
    precision that is asked for. All of it lies on `device`; draws and initial weights are made on the host, so that
    they are the same for every device. products: how the passes multiply (`models.precision.products`).
    """

    def __init__(
        self, spec: Supervised, seed: int, model: nn.Module, objective: Objective, device: torch.device | str = "cpu"
    ):
        self.spec, self.seed, self.objective = spec, seed, objective
        self.device = torch.device(device)
        self.model = model.train().to(self.device)
        self.state: State = state.create(self.model, self.device, spec.optimiser.matrices)
        dtype = precision.dtype_of(spec.precision)
        self.forward = state.aligned(self.state.weights.numel(), self.device, dtype)
        self.products = precision.products(spec.precision, self.device)
        parameters = dict(self.model.named_parameters())
        for slot in self.state.slots:
            parameters[slot.name].data = slot.view(self.forward)
        self._parameters = [parameters[slot.name] for slot in self.state.slots]
        ends = [slot.start for slot in self.state.slots[1:]] + [self.state.weights.numel()]
        gaps = [end - slot.start - slot.size for slot, end in zip(self.state.slots, ends, strict=True)]
        self._gaps = [torch.zeros(gap, device=self.device) for gap in gaps]
        self._biases = self._alias_biases()
        self._counts = [torch.zeros(len(bias), device=self.device) for bias in self._biases]
        self._watch_routers()
        self._projections = [(slot, *matrices(slot.name, slot.view(self.forward))) for slot in self.state.slots]
        if spec.precision == "fp8":
            precision.scale_products(self.model)

    @property
    def width(self) -> int:
        """Floats in a gradient buffer: weights, then expert loads, then the objective's columns."""
        return self.forward.numel() + sum(len(counts) for counts in self._counts) + len(self.objective.columns)

    def refresh(self) -> None:
        """Bring the forward weights up to date with the state, on the grid where the schedule says so."""
        self.forward.copy_(self.state.weights)
        if schedule.on_grid(self.spec, self.state.step):
            self.put_on_grid()
        if self.spec.precision == "fp8":
            precision.hold(self.model)

    def put_on_grid(self) -> None:
        """Round the forward weights to what the master stores: E4M3 + UE8M0, or BF16. Call `refresh` before."""
        for slot, view, storage in self._projections:
            if storage == "fp8" and view.dtype == torch.float32:
                project(view, out=view)
            elif storage == "fp8":  # from the latent weights, so that they are rounded once; BF16 holds all of the grid
                view.copy_(project(matrices(slot.name, slot.view(self.state.weights))[0]))
            elif storage == "bf16":
                view.copy_(view.to(torch.bfloat16))

    def shard(self, number: int) -> Tensor:
        """The contribution of virtual shard `number` to the present step: [width], to be summed over shards."""
        return self._gradient(lambda: self.objective.loss(self.model, self.state.step, number))

    def canonical(self) -> Tensor:
        """The contribution of a step that is the same for every run of this kind: two chips that agree on it compute
        alike."""
        return self._gradient(lambda: self.objective.canonical(self.model))

    def _gradient(self, compute: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
        for counts in self._counts:
            counts.zero_()
        loss, columns = compute()
        learns = loss.requires_grad  # a shard may have nothing to learn from
        gradients = torch.autograd.grad(loss, self._parameters) if learns else map(torch.zeros_like, self._parameters)
        parts = [p for g, gap in zip(gradients, self._gaps, strict=True) for p in (g.reshape(-1).float(), gap)]
        return torch.cat([*parts, *self._counts, columns])

    def gate(self) -> Mapping[str, Any] | None:
        """Before the first step of a start, once the state is there."""
        self.refresh()
        return self.objective.gate(self.model)

    def prepare(self, shards: range, gather: Callable[[Any], list[Any]] = lambda mine: [mine]) -> None:
        """Before the contributions of a step, after `refresh`: what all workers must know of each other's shards."""
        mine = self.objective.prepare(self.model, self.state.step, shards, self.state.digest)
        if mine is not None:
            self.objective.settle(self.state.step, gather(mine))

    def contribution(self, shards: range) -> Tensor:
        """What these shards add to the present step: [width], their subtree's sum. Call `prepare` before."""
        return tree_sum(self.shard(v) for v in shards)

    def sums(self, total: Tensor) -> dict[str, float]:
        """The objective's columns in a sum over shards."""
        names = self.objective.columns
        return dict(zip(names, total[-len(names) :].tolist(), strict=True))

    def update(self, total: Tensor, norm: float) -> Report:
        """End the step with the sum over all shards, whose gradient was clipped. Changes the state."""
        now, size = self.state.step, self.forward.numel()
        optimiser.update(self.state, total[:size], self.spec.optimiser, schedule.rate(self.spec, now))
        loads = torch.split(total[size : -len(self.objective.columns)], [len(counts) for counts in self._counts])
        rate = self.spec.optimiser.router_bias if self.objective.balances(now) else 0.0
        for bias, load in zip(self._biases, loads, strict=True):
            optimiser.router_step_(bias, load, rate)
        self.state.step = now + 1
        return Report(now + 1, self.objective.told(now, self.sums(total)), norm, schedule.on_grid(self.spec, now))

    def clip(self, total: Tensor) -> float:
        """Clip a sum's gradient in place; its norm before."""
        return optimiser.clip_(total[: self.forward.numel()], self.spec.optimiser.clip)

    def step(self, reduce: Reduce, shards: range, perturb: Callable[[Tensor], None] | None = None) -> Report:
        """One whole step. reduce: turns this worker's subtree sum into the sum over all shards.

        perturb: changes the summed gradient [P] in place; the drift measurement's noise.
        """
        self.refresh()
        self.prepare(shards)
        total = reduce(self.contribution(shards))
        if perturb is not None:
            perturb(total[: self.forward.numel()])
        return self.update(total, self.clip(total))

    @contextmanager
    def looking(self) -> Iterator[nn.Module]:
        """The model as the next step's forward pass will use it, to be run without gradients; no state changes."""
        self.refresh()
        loads = [counts.clone() for counts in self._counts]
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                yield self.model.eval()
        finally:
            self.model.train()
            for counts, load in zip(self._counts, loads, strict=True):
                counts.copy_(load)

    def _alias_biases(self) -> list[Tensor]:
        views, start = [], 0
        for buffer in state.router_biases(self.model):
            view = self.state.bias[start : start + buffer.numel()]
            view.copy_(buffer)
            buffer.data = view
            views.append(view)
            start += -(-buffer.numel() // ALIGN) * ALIGN
        return views

    def _watch_routers(self) -> None:
        gates = [m for name, m in self.model.named_modules() if name.endswith("mlp.gate")]
        for gate, counts in zip(gates, self._counts, strict=True):
            gate.register_forward_hook(_count_into(counts))


def _count_into(counts: Tensor) -> Callable[..., None]:
    def hook(_module: nn.Module, _inputs: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
        counts.add_(torch.bincount(output[2].flatten(), minlength=len(counts)).float())

    return hook
