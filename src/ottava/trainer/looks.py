"""A look, in the worker: what the run as it stands and its baseline lose on the same held-out examples.

Looking changes no state: a run ends in the same bytes however often it was looked at.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ottava.errors import DataError
from ottava.models.chat import Chat
from ottava.models.load import load
from ottava.trainer import heldout
from ottava.trainer.data import IGNORE, pack
from ottava.trainer.guard import Alarm
from ottava.trainer.loop import Trainer

BATCH = 64
DIGITS = 6  # of a loss, as it is told

Pair = tuple[list[int], list[int]]


class Looker:
    """Compares a run with its baseline, which is loaded at the first look, once.

    data: a label artifact's files; chat: the tokenizer's folder; baseline: a model's folder. Raises what
    `heldout.check` does.
    """

    def __init__(self, trainer: Trainer, data: Path, chat: Path, baseline: Path):
        heldout.check(trainer.spec, data, chat)
        self._trainer, self._baseline, self._model = trainer, baseline, None
        self._chat, self._examples = Chat.load(chat), heldout.read(data)

    _model: nn.Module | None

    def look(self) -> dict[str, Any]:
        """The look at the present state: {step, ids, run, baseline}, scores in nats a token.

        Raises Alarm where the run's losses are no numbers, DataError where the baseline's are none.
        """
        trainer, step = self._trainer, self._trainer.state.step
        ids = heldout.of_look(trainer.spec, self._examples, trainer.seed, step)
        pairs = self._pairs(ids)
        with trainer.looking() as model:
            run = losses(model, pairs)
            self._model = self._model or load(self._baseline).to(trainer.device)
            baseline = losses(self._model, pairs)
        if not all(map(math.isfinite, run)):
            raise Alarm("nan", f"a held-out loss after step {step} is not finite")
        if not all(map(math.isfinite, baseline)):
            raise DataError("the baseline's loss on a held-out example is not finite", where=self._baseline)
        return {"step": step, "ids": ids, "run": run, "baseline": baseline}

    def _pairs(self, ids: Sequence[str]) -> list[Pair]:
        """Prompt and reply of every question, as ids of tokens."""
        prompts = self._chat.prompts(ids, thinking=True)
        found = [self._examples[name] for name in ids]
        replies = [self._chat.reply(example.problem.answer, example.trace) for example in found]
        return list(zip(prompts, replies, strict=True))


def losses(model: nn.Module, pairs: Sequence[Pair]) -> list[float]:
    """The mean cross-entropy of each reply's tokens in nats, rounded. Only examples of one length share a batch."""
    by_length: defaultdict[int, list[int]] = defaultdict(list)
    for number, (prompt, reply) in enumerate(pairs):
        by_length[len(prompt) + len(reply)].append(number)
    found = [0.0] * len(pairs)
    for _, numbers in sorted(by_length.items()):
        for start in range(0, len(numbers), BATCH):
            chunk = numbers[start : start + BATCH]
            for number, loss in zip(chunk, _losses(model, [pairs[n] for n in chunk]), strict=True):
                found[number] = round(max(loss, 0.0), DIGITS)
    return found


@torch.no_grad()
def _losses(model: nn.Module, pairs: Sequence[Pair]) -> list[float]:
    examples, device = pack(pairs), next(model.parameters()).device
    targets = examples.targets.to(device)
    logits = model(input_ids=examples.tokens[:, :-1].to(device), use_cache=False).logits.float()
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none")
    found: list[float] = (each.view_as(targets).double().sum(1) / (targets != IGNORE).sum(1)).tolist()
    return found
