"""On-policy distillation: the student replies, and the teacher says at every id what it would have said.

Off-policy, a student never sees what becomes of its own mistakes. Here its replies are drawn, recorded and gone back
to as in reinforcement; what it learns from is the teacher's whole distribution at each place of them, with gradient
through the student's alone. Sources: arXiv 2306.13649 (GKD), 2505.09388, section 4.5 (Qwen3: off-policy, then this).
A teacher with another tokenizer is asked at the same text in its own ids (`crossing`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ottava.engine.logprobs import log_probs
from ottava.engine.rollout import Engine, Rollouts
from ottava.errors import DataError
from ottava.models.chat import Chat
from ottava.tasks import Problem
from ottava.tasks.base import Task
from ottava.trainer import crossing
from ottava.trainer.crossing import Reading
from ottava.trainer.curriculum import begins
from ottava.trainer.divergences import Chunk, alm, furthest, gkd, uld
from ottava.trainer.groups import Groups
from ottava.trainer.grpo import Grpo, Place
from ottava.trainer.losses import Scale
from ottava.trainer.records import Record
from ottava.trainer.rl_spec import OnPolicySpec


class OnPolicy(Grpo):
    """teacher: a model which nothing trains. reader: its tokenizer and template, or None where they are the student's.

    `divergence` is told in nats an id (gkd) or a chunk (alm), or as the mean distance of replies (uld); `most` is what
    it cannot be above where the teacher alone says so (`divergences.furthest`), else 0.
    """

    columns = ("divergence", "most")
    drawn = True

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
        reader: Chat | None = None,
    ):
        super().__init__(spec, seed, chat, task, problems, place, engine)
        self._divergence, self._reader = spec.divergence, reader or chat
        self.unit = "chunks" if spec.divergence.kind == "alm" else "tokens"
        self._asked = {p.question: p for _, pool in self._problems for p in pool}
        self._readings: dict[int, tuple[Rollouts, Reading]] = {}  # of one generation, by the rollouts' identity
        self._teacher = teacher.eval().requires_grad_(False)
        head: Any = self._teacher.get_output_embeddings()  # type: ignore[operator]
        if head.weight.shape[0] < self._reader.tokenizer.get_vocab_size():
            raise DataError(
                f"the teacher has fewer ids than the {'student' if reader is None else 'teacher'}'s tokenizer",
                fix="for two tokenizers: divergence.kind uld or alm, or the teacher's traces alone, without on_policy",
            )

    def prepare(
        self, model: nn.Module, step: int, shards: range, policy: Callable[[], str]
    ) -> Mapping[str, Any] | None:
        if self.begins(step):
            self._readings.clear()
        return super().prepare(model, step, shards, policy)

    def told(self, step: int, sums: Mapping[str, float]) -> dict[str, float]:
        generation = {"generation": step // self.spec.every, **self._about()}
        return {"loss": round(sums["divergence"], 6), **generation, **self._covered()}

    def kind(self, step: int) -> Hashable:
        """Losses of one stretch of the curriculum are compared: another asks for other replies."""
        curriculum = self.spec.curriculum
        done = begins(self.spec, step // self.spec.every)
        return None if curriculum is None else next((s.until for s in curriculum.stretches if done < s.until), None)

    def most(self, sums: Mapping[str, float], words: int) -> float:
        how = self._divergence
        if how.kind == "uld":
            return 2.0  # the L1 distance of two distributions
        if how.kind == "alm" or how.beta == 0:
            return math.inf  # it is large where the student gives no probability, and nothing bounds that
        if how.beta == 1:
            return sums["most"]
        return -how.beta * math.log(how.beta) - (1 - how.beta) * math.log1p(-how.beta)  # entropy of the mixture's coin

    def _covered(self) -> dict[str, float]:
        """The share of the generation's ids that the teacher could be asked about, where it has a tokenizer."""
        facts = self._now.facts.values()
        if self._divergence.kind == "gkd":
            return {}
        ids = sum(sum(its["tokens"]) for its in facts)
        return {"covered": round(sum(its["covered"] for its in facts) / max(ids, 1), 5)}

    def _taught(self, flat: Tensor) -> Tensor:
        return torch.ones_like(flat).repeat_interleave(self.spec.rollout.group)

    def _loss(
        self, model: nn.Module, record: Record, rows: Tensor, values: Tensor, flat: Tensor, scale: Scale, first: bool
    ) -> tuple[Tensor, Tensor]:
        mask, _ = self._counted(record.rollouts, rows, record.old[rows])
        if self._divergence.kind == "gkd":
            loss, most = self._of_ids(model, record.rollouts, rows, mask, scale)
        else:
            loss = self._of_text(model, record, rows, mask, scale)
            most = torch.zeros_like(loss)
        return loss, torch.stack([loss.detach(), most])

    def _of_ids(
        self, model: nn.Module, rollouts: Rollouts, rows: Tensor, mask: Tensor, scale: Scale
    ) -> tuple[Tensor, Tensor]:
        own, how = self._logits(model, rollouts, rows), self._divergence
        with torch.no_grad():
            its = self._logits(self._teacher, rollouts, rows, own=False)[..., : own.shape[-1]]
            counting = mask.to(own.device)
            most = furthest(its[counting], how.temperature).sum() / max(scale.tokens, 1)
        return gkd(own, its, counting, scale.tokens, beta=how.beta, temperature=how.temperature), most

    def _of_text(self, model: nn.Module, record: Record, rows: Tensor, mask: Tensor, scale: Scale) -> Tensor:
        reading, how = self._reading(record.rollouts, record.problems), self._divergence
        chunks = _counting(reading, rows, mask)
        own = self._logits(model, record.rollouts, rows)
        with torch.no_grad():
            its = self._logits(self._teacher, reading.rollouts, rows, own=False)
        ids = (record.rollouts.replies[rows].to(own.device), reading.rollouts.replies[rows].to(own.device))
        if how.kind == "uld":
            return uld(own, its, *ids, chunks, scale.rows, temperature=how.temperature)
        return alm(log_probs(own, ids[0]), log_probs(its, ids[1]), chunks, scale.tokens, temperature=how.temperature)

    def _reading(self, rollouts: Rollouts, questions: Sequence[str]) -> Reading:
        """The replies to these questions, `group` to each, as the teacher reads them."""
        held = self._readings.get(id(rollouts))
        if held is None:
            asked = [self._task.prompt(self._asked[question]) for question in questions]
            prompts = [p for p in self._reader.prompts(asked, self._thinking) for _ in range(self.spec.rollout.group)]
            context = int(self._teacher.config.max_position_embeddings)  # type: ignore[union-attr, arg-type]
            found = crossing.read(self._chat, self._reader, prompts, rollouts.ids(), context)
            held = self._readings[id(rollouts)] = (rollouts, found)
        return held[1]

    def _facts(self, drawn: Groups, rewards: Tensor, taught: Tensor, old: Tensor) -> dict[str, Any]:
        facts = super()._facts(drawn, rewards, taught, old)
        if self._divergence.kind == "gkd":
            return facts
        reading = self._reading(drawn.rollouts, [problem.question for problem in drawn.problems])
        rows = torch.arange(len(taught))
        chunks = _counting(reading, rows, self._counted(drawn.rollouts, rows, old)[0])
        covered = sum(chunk.student.stop - chunk.student.start for row in chunks for chunk in row)
        return {**facts, "chunks": self._by_part(torch.tensor([len(row) for row in chunks])), "covered": covered}


def _counting(reading: Reading, rows: Tensor, mask: Tensor) -> list[list[Chunk]]:
    """Of some rows, the chunks whose ids all count. mask: bool [N, T], of these rows."""
    return [
        [chunk for chunk in reading.chunks[row] if bool(marked[chunk.student].all())]
        for row, marked in zip(rows.tolist(), mask, strict=True)
    ]
