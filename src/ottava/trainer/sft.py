"""Supervised fine-tuning: cross-entropy of the replies' tokens, thinking and, later on, direct, or direct alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ottava.models.build import fresh
from ottava.trainer import schedule
from ottava.trainer.data import IGNORE, Data, Draws, Examples, draw, share
from ottava.trainer.loop import Trainer
from ottava.trainer.objective import Objective
from ottava.trainer.spec import TrainSpec


def fresh_trainer(
    spec: TrainSpec, seed: int, data: Data, vocabulary: int, device: torch.device | str = "cpu"
) -> Trainer:
    """A trainer of a fresh model of the spec's shape."""
    return Trainer(spec, seed, fresh(spec.shape.config(vocabulary), seed), Sft(spec, seed, data), device)


class Sft(Objective):
    """Losses are means over the step's target tokens, in nats."""

    columns = ("loss", "direct_loss")

    def __init__(self, spec: TrainSpec, seed: int, data: Data):
        self.spec, self.seed, self.data = spec, seed, data
        self._draws: Draws | None = None

    def loss(self, model: nn.Module, step: int, number: int) -> tuple[Tensor, Tensor]:
        work = share(self._drawn(step), number)
        thinking = _loss(model, work.thinking) / work.thinking_count
        loss, direct = thinking, None
        if work.direct is not None:
            direct = _loss(model, work.direct) / work.direct_count
            loss = thinking + self.spec.direct.weight * direct
        return loss, torch.stack([thinking.detach(), thinking.new_zeros(()) if direct is None else direct.detach()])

    def told(self, step: int, sums: Mapping[str, float]) -> dict[str, float]:
        names = self.columns if schedule.direct_joins(self.spec, step) else self.columns[:1]
        return {name: round(sums[name], 6) for name in names}

    def kind(self, step: int) -> int:
        """The length of the step's chains."""
        return schedule.thinking_length(self.spec, self.seed, step, sorted(self.data.main))

    def _drawn(self, step: int) -> Draws:
        """The step's draws, made at its first shard."""
        if self._draws is None or self._draws.step != step:
            self._draws = draw(self.data, self.spec, self.seed, step)
        return self._draws


def _loss(model: nn.Module, examples: Examples) -> Tensor:
    """Sum of cross-entropies over the reply's tokens."""
    width, device = examples.targets.shape[1], next(model.parameters()).device
    tokens, targets = examples.tokens[:, :width].to(device), examples.targets.reshape(-1).to(device)
    logits = model(input_ids=tokens, use_cache=False).logits.float()
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets, ignore_index=IGNORE, reduction="sum")
