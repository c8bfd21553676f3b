"""The training loop of one worker: gradients of its virtual shards in, one exact step out.

Each virtual shard is its own forward and backward pass, never batched with another, and gradients
never accumulate in `.grad`: what a shard contributes is the same bits wherever it is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ottava.fp8.codec import project
from ottava.models.build import from_config, initialise
from ottava.models.published import matrices
from ottava.trainer import optimiser, schedule, state
from ottava.trainer.data import IGNORE, Data, Draws, Examples, draw, share
from ottava.trainer.reduce import tree_sum
from ottava.trainer.spec import TrainSpec
from ottava.trainer.state import ALIGN, State

Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Report:
    """What one step did. Losses are means over the step's target tokens, in nats."""

    step: int
    thinking: float
    direct: float | None
    norm: float
    on_grid: bool


class Trainer:
    """A model whose parameters are views of one flat array, and the state that they come from.

    forward [P]: what the passes run through: the latent weights, or their projection on the grid. All of it lies on
    `device`; draws and initial weights are made on the host, so that they are the same for every device.
    """

    def __init__(self, spec: TrainSpec, seed: int, data: Data, vocabulary: int, device: torch.device | str = "cpu"):
        self.spec, self.seed, self.data = spec, seed, data
        self.device = torch.device(device)
        self.model: nn.Module = from_config(spec.shape.config(vocabulary)).train()
        initialise(self.model, seed)
        self.model.to(self.device)
        self.state: State = state.create(self.model, self.device)
        self.forward = state.aligned(self.state.weights.numel(), self.device)
        parameters = dict(self.model.named_parameters())
        for slot in self.state.slots:
            parameters[slot.name].data = slot.view(self.forward)
        self._parameters = [parameters[slot.name] for slot in self.state.slots]
        ends = [slot.start for slot in self.state.slots[1:]] + [self.state.weights.numel()]
        gaps = [end - slot.start - slot.size for slot, end in zip(self.state.slots, ends, strict=True)]
        self._gaps = [torch.zeros(gap, device=self.device) for gap in gaps]
        self._draws: Draws | None = None
        self._biases = self._alias_biases()
        self._counts = [torch.zeros(spec.shape.experts, device=self.device) for _ in self._biases]
        self._watch_routers()
        self._projections = [(slot, *matrices(slot.name, slot.view(self.forward))) for slot in self.state.slots]

    @property
    def width(self) -> int:
        """Floats in a gradient buffer: weights, then expert loads, then the two losses."""
        return self.forward.numel() + len(self._counts) * self.spec.shape.experts + 2

    def refresh(self) -> None:
        """Bring the forward weights up to date with the state, on the grid where the schedule says so."""
        self.forward.copy_(self.state.weights)
        if schedule.on_grid(self.spec, self.state.step):
            self.put_on_grid()

    def put_on_grid(self) -> None:
        """Round the forward weights to what the master stores: E4M3 + UE8M0, or BF16."""
        for _, view, storage in self._projections:
            if storage == "fp8":
                project(view, out=view)
            elif storage == "bf16":
                view.copy_(view.to(torch.bfloat16))

    def shard(self, number: int) -> Tensor:
        """The contribution of virtual shard `number` to the present step: [width], to be summed over shards."""
        work = share(self._drawn(), number)
        for counts in self._counts:
            counts.zero_()
        thinking = self._loss(work.thinking) / work.thinking_count
        loss, direct = thinking, None
        if work.direct is not None:
            direct = self._loss(work.direct) / work.direct_count
            loss = thinking + self.spec.direct.weight * direct
        gradients = torch.autograd.grad(loss, self._parameters)
        parts = [part for g, gap in zip(gradients, self._gaps, strict=True) for part in (g.reshape(-1), gap)]
        losses = torch.stack([thinking.detach(), thinking.new_zeros(()) if direct is None else direct.detach()])
        return torch.cat([*parts, *self._counts, losses])

    def contribution(self, shards: range) -> Tensor:
        """What these shards add to the present step: [width], their subtree's sum. Call `refresh` before."""
        return tree_sum(self.shard(v) for v in shards)

    def losses(self, total: Tensor) -> tuple[float, float]:
        """The thinking and direct loss in a sum over shards."""
        thinking, direct = total[-2:].tolist()
        return thinking, direct

    def update(self, total: Tensor, norm: float) -> Report:
        """End the step with the sum over all shards, whose gradient was clipped. Changes the state."""
        now, size = self.state.step, self.forward.numel()
        optimiser.update(self.state, total[:size], self.spec.optimiser, schedule.rate(self.spec, now))
        for bias, load in zip(self._biases, torch.split(total[size:-2], self.spec.shape.experts), strict=True):
            optimiser.router_step_(bias, load, self.spec.optimiser.router_bias)
        self.state.step = now + 1
        thinking, direct = self.losses(total)
        joined = schedule.direct_joins(self.spec, now)
        return Report(now + 1, thinking, direct if joined else None, norm, schedule.on_grid(self.spec, now))

    def clip(self, total: Tensor) -> float:
        """Clip a sum's gradient in place; its norm before."""
        return optimiser.clip_(total[: self.forward.numel()], self.spec.optimiser.clip)

    def step(self, reduce: Reduce, shards: range, perturb: Callable[[Tensor], None] | None = None) -> Report:
        """One whole step. reduce: turns this worker's subtree sum into the sum over all shards.

        perturb: changes the summed gradient [P] in place; the drift measurement's noise.
        """
        self.refresh()
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

    def _drawn(self) -> Draws:
        """The present step's draws, made at its first shard."""
        if self._draws is None or self._draws.step != self.state.step:
            self._draws = draw(self.data, self.spec, self.seed, self.state.step)
        return self._draws

    def _loss(self, examples: Examples) -> Tensor:
        """Sum of cross-entropies over the reply's tokens."""
        width = examples.targets.shape[1]
        tokens, targets = examples.tokens[:, :width].to(self.device), examples.targets.reshape(-1).to(self.device)
        logits = self.model(input_ids=tokens, use_cache=False).logits
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets, ignore_index=IGNORE, reduction="sum")

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
