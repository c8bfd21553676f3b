"""On-policy distillation: the student replies, and the teacher says at every id what it would have said.

Off-policy, a student never sees what becomes of its own mistakes. Here its replies are drawn, recorded and gone back
to as in reinforcement; what it learns from is the teacher's whole distribution at each place of them, with gradient
through the student's alone. Sources: arXiv 2306.13649 (GKD), 2505.09388, section 4.5 (Qwen3: off-policy, then this).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ottava.engine.rollout import Engine
from ottava.errors import DataError
from ottava.models.chat import Chat
from ottava.tasks import Problem
from ottava.tasks.base import Task
from ottava.trainer.divergences import gkd
from ottava.trainer.grpo import Grpo, Place
from ottava.trainer.losses import Scale
from ottava.trainer.records import Record
from ottava.trainer.rl_spec import OnPolicySpec


class OnPolicy(Grpo):
    """teacher: a model with the student's vocabulary, which nothing trains. `divergence` is told in nats an id."""

    columns = ("divergence",)

    def __init__(
        self,
        spec: OnPolicySpec,
        seed: int,
        chat: Chat,
        task: Task,
        problems: Mapping[int, Sequence[Problem]],
        place: Place | None,
        engine: Engine | None,
        teacher: nn.Module,
    ):
        super().__init__(spec, seed, chat, task, problems, place, engine)
        self._divergence = spec.divergence
        self._teacher = teacher.eval().requires_grad_(False)
        head: Any = self._teacher.get_output_embeddings()  # type: ignore[operator]
        if head.weight.shape[0] < chat.tokenizer.get_vocab_size():
            raise DataError(
                "the teacher has fewer ids than the student's tokenizer",
                fix="for two tokenizers learn from the teacher's traces as text (distill without on_policy)",
            )

    def told(self, step: int, sums: Mapping[str, float]) -> dict[str, float]:
        generation = {"generation": step // self.spec.every, **self._about()}
        return {"loss": round(sums["divergence"], 6), **generation}

    def _taught(self, flat: Tensor) -> Tensor:
        return torch.ones_like(flat).repeat_interleave(self.spec.rollout.group)

    def _loss(
        self, model: nn.Module, record: Record, rows: Tensor, values: Tensor, flat: Tensor, scale: Scale, first: bool
    ) -> tuple[Tensor, Tensor]:
        device = next(model.parameters()).device
        mask, _ = self._counted(record.rollouts, rows, record.old[rows])
        own = self._logits(model, record.rollouts, rows)
        with torch.no_grad():
            its = self._logits(self._teacher, record.rollouts, rows, own=False)[..., : own.shape[-1]]
        how = self._divergence
        loss = gkd(own, its, mask.to(device), scale.tokens, beta=how.beta, temperature=how.temperature)
        return loss, loss.detach()[None]
