"""Random choices that do not depend on who shares the batch, and the probabilities they were made with.

A sampled rollout must be a function of the seed, the row and the position alone, or the same problem
gets another answer when the batch is cut differently. So torch's generators are not used: every
choice takes one number from a counter on the host. `choose` serves the gateway and evaluation; `sample`
serves reinforcement, which also has to know how probable each choice was, and among which ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ottava.errors import FormatError

_MASK = (1 << 64) - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Chosen:
    """One choice a row.

    ids: int64 [B]. logprobs: float64 [B], of the distribution that was drawn from: after temperature and
    truncation. kept: bool [B, V], the ids that were drawn from; None: all.
    """

    ids: Tensor
    logprobs: Tensor
    kept: Tensor | None


def sample(logits: Tensor, temperature: float, top_p: float, draws: npt.NDArray[np.float64] | None) -> Chosen:
    """The next ids for logits [B, V], with their log-probabilities and, with top_p < 1, the kept sets.

    draws: one number in [0, 1) a row. With top_p < 1 a draw means the id that it means to `choose`. With
    top_p = 1 it is looked up in the order of ids, which needs no sort: the same draw then means another id.
    Temperature 0 is greedy, and log-probabilities are those of temperature 1. Computed in float64.
    Raises FormatError where a row has a NaN or no finite maximum.
    """
    logits = logits.double()
    top = logits.amax(-1, keepdim=True)
    if not bool(top.isfinite().all()):
        row = int((~top.isfinite()).nonzero()[0, 0])
        raise FormatError(f"the model's logits have a NaN or an infinity in row {row} of {len(logits)}")
    below = logits - top  # first, so that no temperature overflows
    if temperature == 0.0 or draws is None:
        ids = below.argmax(-1)
        return Chosen(ids, _logprobs(below, ids, below.exp().sum(-1)), None)
    below /= temperature
    if top_p < 1.0:
        order, cumulative, count = _nucleus(torch.softmax(below, -1), top_p)
        ids = _drawn(order, cumulative, count, draws)
        ranks = torch.arange(logits.shape[-1], device=logits.device)
        kept = torch.zeros_like(below, dtype=torch.bool).scatter_(-1, order, ranks < count)
        return Chosen(ids, _logprobs(below, ids, below.exp().mul_(kept).sum(-1)), kept)
    cumulative = below.exp().cumsum(-1)
    target = torch.from_numpy(draws).to(cumulative)[:, None] * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, target, right=True)[:, 0]  # the first whose cumulative weight is above
    return Chosen(ids, _logprobs(below, ids, cumulative[:, -1]), None)


def choose(logits: Tensor, temperature: float, top_p: float, draws: npt.NDArray[np.float64] | None) -> Tensor:
    """The next ids [B] for logits [B, V]: the largest at temperature 0, else by inverse distribution.

    draws: one number in [0, 1) a row. top_p keeps the fewest most probable ids that hold that mass
    (Holtzman et al. 2020, arXiv 1904.09751). Computed in float64, so a draw means the same id on any chip.
    """
    if temperature == 0.0 or draws is None:
        return logits.argmax(-1)
    below = logits.double() - logits.double().amax(-1, keepdim=True)  # first, so that no temperature overflows
    return _drawn(*_nucleus(torch.softmax(below / temperature, -1), top_p), draws)


def uniform(seed: int, rows: npt.ArrayLike, position: int) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1), a pure function of (seed, row, position).

    SplitMix64's mixing function (Steele, Lea, Flood 2014, doi 10.1145/2660193.2660195) over the three
    in turn; the top 53 bits become the fraction.
    """
    bits = np.asarray(rows).astype(np.uint64)
    bits = _mix(np.full_like(bits, seed & _MASK)) ^ bits
    bits = _mix(_mix(bits) ^ np.uint64(position))
    fractions: npt.NDArray[np.float64] = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return fractions


def _nucleus(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor, Tensor]:
    """Ids by falling probability [B, V], their cumulative mass, and how many of the first are kept [B, 1]."""
    ordered, order = torch.sort(probabilities, descending=True, stable=True, dim=-1)
    cumulative = ordered.cumsum(-1)
    return order, cumulative, (cumulative - ordered < top_p).sum(-1, keepdim=True)


def _drawn(order: Tensor, cumulative: Tensor, count: Tensor, draws: npt.NDArray[np.float64]) -> Tensor:
    mass = cumulative.gather(-1, count - 1)
    target = torch.from_numpy(draws).to(mass)[:, None] * mass
    index = (cumulative <= target).sum(-1, keepdim=True).clamp(max=count - 1)
    return order.gather(-1, index)[:, 0]


def _logprobs(below: Tensor, ids: Tensor, mass: Tensor) -> Tensor:
    return below.gather(-1, ids[:, None])[:, 0] - mass.log()


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
