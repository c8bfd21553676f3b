"""Log-probabilities of given tokens, computed one way for engine and learner.

A policy's ratio compares two log-probabilities of one token, so both sides must divide by the temperature that
was sampled with, and renormalise over the ids that could be sampled. Where one of them forgets, training looks
healthy and learns something else. Vocabularies are large: the rows are taken in chunks whose size depends on the
vocabulary alone, never on the memory that is free, and no second copy of the logits is kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ottava.errors import DataError, RecipeError

CHUNK = 1 << 20  # elements of the logits that are worked on together


def log_probs(logits: Tensor, ids: Tensor, temperature: float = 1.0, kept: Tensor | None = None) -> Tensor:
    """log p(id) = z_id / T - logsumexp over j in K of z_j / T, differentiable in the logits z.

    logits: [..., V], at the positions that predict the ids; ids: int64 [...]; temperature: T > 0.
    kept: bool [..., V], the set K that top-p or top-k left when the id was drawn, as recorded (keep-sampling-mask,
    DeepSeek-V3.2, arXiv 2512.02556 sec. 3.1); a position where it is empty was not truncated, nor is any without it.
    Without K the mean ratio of a truncated policy to itself is the kept mass instead of 1.
    Returns [...], float64 for float64 logits, otherwise float32. NaN logits give NaN.
    Raises RecipeError for a temperature that is not positive, DataError for an id outside its own kept set.
    """
    if not temperature > 0:
        raise RecipeError(f"log-probabilities at temperature {temperature}", fix="score at the sampling temperature")
    assert ids.shape == logits.shape[:-1], "one id a position"
    assert kept is None or kept.shape == logits.shape, "one kept set a position"
    width = logits.shape[-1]
    flat_kept = None if kept is None else _or_all(kept.reshape(-1, width))
    flat_ids = ids.reshape(-1, 1)
    if flat_kept is not None and (outside := int((~flat_kept.gather(1, flat_ids)).sum())):
        raise DataError(
            f"{outside} of {len(flat_ids)} sampled tokens are not in the set that is recorded as kept for them",
            fix="the record's ids and kept sets belong to different positions or samplings",
        )
    out: Tensor = _LogProbs.apply(  # type: ignore[no-untyped-call]
        logits.reshape(-1, width), flat_ids, temperature, flat_kept
    )
    return out.reshape(ids.shape)


class _LogProbs(torch.autograd.Function):
    """[M, V], [M, 1] -> [M]. Autograd's own path would keep a scaled float32 copy of the logits for the backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, temperature: float, kept: Tensor | None) -> Tensor:
        total = logits.new_empty(len(logits), dtype=_wide(logits))
        for part in _chunks(logits):
            total[part] = _scaled(logits[part], temperature, None if kept is None else kept[part]).logsumexp(-1)
        ctx.temperature = temperature
        ctx.save_for_backward(logits, ids, total, kept)
        return logits.gather(1, ids).squeeze(1).to(total.dtype) / temperature - total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        logits, ids, total, kept = ctx.saved_tensors
        rows = gradients[0].to(total.dtype).unsqueeze(1) / ctx.temperature
        out = torch.empty_like(logits)
        for part in _chunks(logits):
            scaled = _scaled(logits[part], ctx.temperature, None if kept is None else kept[part])
            piece = scaled.sub_(total[part].unsqueeze(1)).exp_().mul_(-rows[part])
            piece.scatter_add_(1, ids[part], rows[part])  # one id a row: no two additions meet
            out[part] = piece
        return out, None, None, None


def _scaled(logits: Tensor, temperature: float, kept: Tensor | None) -> Tensor:
    """A fresh copy, divided by the temperature; -inf where not kept."""
    scaled = logits.to(_wide(logits)) / temperature
    return scaled if kept is None else scaled.masked_fill_(~kept, float("-inf"))


def _or_all(kept: Tensor) -> Tensor:
    """Every id where none is marked: an empty set would give 0 / 0, in padding too."""
    return kept | ~kept.any(-1, keepdim=True)


def _wide(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _chunks(logits: Tensor) -> Iterator[slice]:
    size = max(1, CHUNK // max(1, logits.shape[-1]))
    return (slice(start, start + size) for start in range(0, len(logits), size))
