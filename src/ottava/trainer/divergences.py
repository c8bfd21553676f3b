"""Distillation: how far a student's distribution is from a teacher's, with one tokenizer or with two.

Everywhere logits[:, t] and log-probabilities[:, t] belong to target t, the token that they predict: the shift by one
is done before, once, on both sides. Sums are divided by integers of the whole update (tokens, rows, chunks), so that
the contributions of shards add. The teacher gets no gradient.

    gkd          beta 0: KL(T, S), forward; beta 1: KL(S, T), reverse; between: beta KL(T, M) + (1 - beta) KL(S, M) with
                 M = beta T + (1 - beta) S. Full vocabulary, temperature on both sides, no factor of its square.
                 GKD, arXiv 2306.13649 eq. 1; the direction of beta is TRL's.
    uld          sum over ranks of |sorted p_S - sorted p_T|: vocabularies that share nothing. ULD, arXiv 2402.12030. At
                 the last token of each chunk that covers the same bytes, after the chunk's other tokens:
                 p(earlier tokens) p(. | them) on both sides. TRL's GOLD (uld_token_merge_strategy "bayesian").
    alm          binary KL of the likelihoods of chunks that cover the same bytes. ALM, arXiv 2503.20083 (f = KL,
                 without its debiasing of outcomes).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ottava.engine.logprobs import log_probs
from ottava.errors import DataError, RecipeError


def gkd(
    student: Tensor, teacher: Tensor, mask: Tensor, tokens: int, *, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """The generalised Jensen-Shannon divergence, summed over the masked positions and divided by `tokens`.

    student, teacher: logits [N, T, V] of one vocabulary; mask: bool [N, T]; tokens: masked positions of the whole
    update. An id that the teacher gives no probability (-inf) adds nothing to KL(T, .) and makes KL(S, T) infinite.
    A scalar. Raises DataError where the vocabularies' sizes differ, RecipeError for beta or temperature.
    """
    if student.shape != teacher.shape:
        raise DataError(
            f"logits of {list(student.shape)} and {list(teacher.shape)}",
            fix="cut both to the tokenizer's size; for two tokenizers: uld or alm",
        )
    return divergence(student[mask], teacher[mask], beta, temperature).sum() / max(tokens, 1)


def divergence(student: Tensor, teacher: Tensor, beta: float, temperature: float = 1.0) -> Tensor:
    """Per position, in nats: logits [..., V] twice -> [...]. See `gkd`."""
    if not 0 <= beta <= 1:
        raise RecipeError(f"beta is {beta}", fix="0 is KL(teacher, student), 1 is KL(student, teacher)")
    ours, theirs = (_log_softmax(logits, temperature) for logits in (student, teacher.detach()))
    if beta == 0:
        return _kl(theirs, ours)
    if beta == 1:
        return _kl(ours, theirs)
    weights = torch.tensor([beta, 1 - beta], dtype=torch.float64).log().tolist()
    mixture = torch.logaddexp(theirs + weights[0], ours + weights[1])
    return beta * _kl(theirs, mixture) + (1 - beta) * _kl(ours, mixture)


def furthest(teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """What KL(S, T) of no student is above, in nats: logits [..., V] -> [...], -log of the teacher's least probability.

    KL(S, T) is a mean over S of -log T, less the entropy of S.
    """
    return -_log_softmax(teacher, temperature).amin(-1)


def uld(
    student: Tensor,
    teacher: Tensor,
    student_ids: Tensor,
    teacher_ids: Tensor,
    chunks: Sequence[Sequence[Chunk]],
    rows: int,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """Universal logit distillation: the L1 distance of the sorted probabilities.

    student: logits [N, T, V], teacher: [N, T', V'], with the ids that they predict, int64 [N, T] and [N, T']; chunks:
    of `align`, a sequence a row; rows: of the whole update. A row counts the mean over its chunks, one without any 0. A
    scalar; the gradient goes through the chunk's earlier tokens, too. NB both sides are the logits that *predict* the
    token: TRL's default for its ULD loss ("observed") is one position later.
    """
    assert len(student) == len(teacher) == len(chunks), "one sequence of chunks a row"
    sizes = torch.tensor([len(row) for row in chunks], device=student.device)
    ours, theirs = (
        _merged(logits, ids, [[getattr(chunk, side) for chunk in row] for row in chunks], temperature)
        for logits, ids, side in ((student, student_ids, "student"), (teacher.detach(), teacher_ids, "teacher"))
    )
    distance = _ranked_distance(ours, theirs)
    return (distance / sizes.repeat_interleave(sizes)).sum() / max(rows, 1)


def _merged(logits: Tensor, ids: Tensor, slices: Sequence[Sequence[slice]], temperature: float) -> Tensor:
    """[C, V]: the probabilities of a slice's tokens before the last, times those of what may come last."""
    said = log_probs(logits, ids, temperature)
    earlier = _sums(said, [[slice(part.start, part.stop - 1) for part in row] for row in slices])
    places = [(number, part.stop - 1) for number, row in enumerate(slices) for part in row]
    row, column = torch.tensor(places, dtype=torch.int64, device=logits.device).view(-1, 2).unbind(1)
    return (_log_softmax(logits[row, column], temperature) + earlier.unsqueeze(1)).exp()


def _ranked_distance(ours: Tensor, theirs: Tensor) -> Tensor:
    """Per position, the L1 distance of [C, V] from [C, V'], each in descending order, the shorter one with zeros."""
    ours, theirs = (value.sort(dim=-1, descending=True, stable=True).values for value in (ours, theirs))
    width = max(ours.shape[-1], theirs.shape[-1])
    ours, theirs = (F.pad(value, (0, width - value.shape[-1])) for value in (ours, theirs))
    return (ours - theirs).abs().sum(-1)


@dataclass(frozen=True)
class Chunk:
    """Tokens of both sides that cover the same bytes: student[begin:end] and teacher[begin:end]."""

    student: slice
    teacher: slice


def align(student: Sequence[bytes], teacher: Sequence[bytes]) -> tuple[Chunk, ...]:
    """The smallest chunks at whose ends both tokenizers agree, in order, each with a token of either side at least.

    student, teacher: the bytes of every token; a token without bytes (the end of a reply) joins the chunk that it
    stands in, or is one with the other side's. A tail that only one side has (a reply that was cut off) is in no
    chunk. Raises DataError where the two texts differ before either ends.
    """
    ours, theirs = b"".join(student), b"".join(teacher)
    common = min(len(ours), len(theirs))
    if ours[:common] != theirs[:common]:
        at = next(i for i in range(common) if ours[i] != theirs[i])
        raise DataError(
            f"student and teacher do not say the same: they differ at byte {at}",
            fix="both sides score one text; templates and special tokens have to be left out or be empty",
        )
    ends = [list(itertools.accumulate(map(len, tokens))) for tokens in (student, teacher)]
    chunks, begin, end = [], (0, 0), [0, 0]  # end: tokens taken so far
    while end[0] < len(student) and end[1] < len(teacher):
        here = (ends[0][end[0]], ends[1][end[1]])
        if here[0] <= here[1]:
            end[0] += 1
        if here[1] <= here[0]:
            end[1] += 1
        if here[0] == here[1]:
            chunks.append(Chunk(slice(begin[0], end[0]), slice(begin[1], end[1])))
            begin = (end[0], end[1])
    return tuple(chunks)


def alm(
    student: Tensor, teacher: Tensor, chunks: Sequence[Sequence[Chunk]], total: int, *, temperature: float = 1.0
) -> Tensor:
    """Approximate likelihood matching: KL of a coin with p_T^(1/temperature) from one with p_S^(1/temperature).

    student: log-probabilities [N, T] of its tokens, with a graph; teacher: [N, T'] of its own; chunks: of `align`, a
    sequence a row; total: chunks of the whole update. p is the product over the chunk's tokens. Large temperatures
    weigh unlikely chunks more; times the temperature the loss goes to b - a + a log(a / b) with a, b = -log p_T,
    -log p_S. A scalar.
    """
    if not temperature > 0:
        raise RecipeError(f"likelihoods at temperature {temperature}", fix="above 0")
    assert len(student) == len(teacher) == len(chunks), "one sequence of chunks a row"
    ours = _sums(student, [[chunk.student for chunk in row] for row in chunks]) / temperature
    theirs = _sums(teacher.detach(), [[chunk.teacher for chunk in row] for row in chunks]) / temperature
    # A probability of 1 leaves the coin no other side: log(1 - p) of one rounding below it is finite, with a gradient.
    ours, theirs = (value - torch.finfo(value.dtype).eps for value in (ours, theirs))
    heads = theirs.exp() * (theirs - ours)
    tails = -theirs.expm1() * (_log1mexp(theirs) - _log1mexp(ours))
    return (heads + tails).sum() / max(total, 1)


def _sums(values: Tensor, slices: Sequence[Sequence[slice]]) -> Tensor:
    """The sums [C] of slices of the rows of [N, T]. By a padded gather: no additions whose order is anybody's guess."""
    spans = [(number, part) for number, row in enumerate(slices) for part in row]
    if not spans:
        return values.sum(1)[:0]
    longest = max(part.stop - part.start for _, part in spans)
    start = torch.tensor([number * values.shape[1] + part.start for number, part in spans], device=values.device)
    length = torch.tensor([part.stop - part.start for _, part in spans], device=values.device)
    offset = torch.arange(longest, device=values.device)
    inside = offset < length.unsqueeze(1)
    index = torch.where(inside, start.unsqueeze(1) + offset, start.unsqueeze(1))
    return torch.where(inside, values.reshape(-1)[index], 0.0).sum(1)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0. Good to one rounding of 1; its gradient to one of itself."""
    return (-x.expm1()).log()


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    if not temperature > 0:
        raise RecipeError(f"distributions at temperature {temperature}", fix="above 0")
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(wide / temperature, -1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p, q) from log-probabilities [..., V]; what has no probability in p adds nothing, whatever q says of it."""
    weight = p.exp()
    return (weight * torch.where(weight > 0, p - q, 0.0)).sum(-1)
