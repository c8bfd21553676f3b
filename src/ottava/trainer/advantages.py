"""From rewards to advantages: what each reply is worth beside its siblings.

A group is the G replies to one prompt. Three things must not pass in silence here: a reply that no verifier could
score, a group whose replies all got the same (it teaches nothing, but its floating-point spread is not 0), and a
reply that was cut off. All are counted. Rewards come from every shard, so these are functions of the whole update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ottava.errors import DataError, RecipeError

Scaling = Literal["group", "batch", "none"]
"""What a reward's distance from its group's mean is divided by."""

EPSILON = 1e-4
"""Added to the spread, as TRL does: a spread of nothing divides nothing by it."""


@dataclass(frozen=True)
class Advantages:
    """Of Q groups of G replies. values: [Q, G], finite, 0 for unscorable replies and flat groups.

    unscorable: bool [Q, G], the reward was NaN or infinite; flat: bool [Q], all scorable rewards equal, or fewer
    than two of them: with KL off such a group can be left out of the backward pass without changing the gradient.
    mean: [Q], NaN where nothing was scorable.
    """

    values: Tensor
    unscorable: Tensor
    flat: Tensor
    mean: Tensor


def advantages(rewards: Tensor, scaling: Scaling = "group") -> Advantages:
    """A = (R - mean of the group) / (std + 1e-4).

    rewards: [Q, G], NaN where no verifier gave a verdict. scaling: what the std is taken over, with Bessel's
    correction: "group" (GRPO, arXiv 2402.03300 sec. 4.1.2), "batch" (all of `rewards`: pass every shard's), or
    "none", no division (Dr. GRPO, arXiv 2503.20783 sec. 3.2; DeepSeek-V3.2, arXiv 2512.02556 sec. 3.1).
    As TRL's GRPOTrainer, but that a flat group is told by max == min and is exactly 0: the mean of eight equal
    0.1's is not 0.1 in floating point, and a spread of 1e-9 over 1e-4 would be a gradient made of rounding.
    Computed in float64 and returned in the rewards' type. Raises DataError where `rewards` is not [Q, G].
    """
    if scaling not in get_args(Scaling):
        raise RecipeError(
            f"no way to scale rewards is called {scaling!r}", fix=f"one of {', '.join(get_args(Scaling))}"
        )
    if rewards.ndim != 2:
        raise DataError(f"rewards of shape {list(rewards.shape)}", fix="[groups, replies to a prompt]")
    scorable = rewards.isfinite()
    values = torch.where(scorable, rewards, 0.0).double()
    mean = values.sum(1, keepdim=True) / scorable.sum(1, keepdim=True)  # NaN for a group without a verdict
    flat = _flat(rewards, scorable)
    centred = torch.where(scorable & ~flat.unsqueeze(1), values - mean, 0.0)
    if scaling == "group":
        centred = centred / (_std(values, scorable, dim=1) + EPSILON)
    elif scaling == "batch":
        centred = centred / (_std(values.reshape(1, -1), scorable.reshape(1, -1), dim=1) + EPSILON)
    return Advantages(centred.to(rewards.dtype), ~scorable, flat, mean.squeeze(1).to(rewards.dtype))


def overlong(lengths: Tensor, longest: int, cache: int) -> Tensor:
    """DAPO's soft punishment for length, to be added to the reward (arXiv 2503.14476 eq. 13).

    0 up to longest - cache tokens, then falling linearly to -1 at `longest`, and -1 beyond. lengths: tokens of the
    replies, any shape; cache: width of the slope, 0 for a step. Returns float32 of the same shape.
    """
    if not 0 <= cache <= longest:
        raise RecipeError(f"a soft punishment over the last {cache} of {longest} tokens", fix="0 <= cache <= longest")
    return ((longest - cache - lengths).float() / max(cache, 1)).clamp(-1.0, 0.0)


def without_truncated(mask: Tensor, truncated: Tensor) -> Tensor:
    """DAPO's overlong filtering: rows that were cut off lose their tokens, and still count as rows.

    mask: bool [N, T]; truncated: bool [N]. Returns bool [N, T].
    """
    return mask & ~truncated.unsqueeze(1)


def mixed(flat: Tensor, wanted: int) -> Sequence[int]:
    """DAPO's dynamic sampling (arXiv 2503.14476 sec. 3.2): the first `wanted` groups with something to learn from.

    flat: bool [Q], in the order in which the groups were drawn. Returns at most `wanted` indices in that order, so
    the choice does not depend on which reply was done first; fewer mean that more prompts must be drawn.
    """
    chosen: list[int] = torch.nonzero(~flat).squeeze(1)[:wanted].tolist()
    return chosen


def _flat(rewards: Tensor, scorable: Tensor) -> Tensor:
    """Whether a group's scorable rewards are all equal: compared, not computed with."""
    infinity = float("inf")
    highest = torch.where(scorable, rewards, -infinity).amax(1)
    lowest = torch.where(scorable, rewards, infinity).amin(1)
    return highest <= lowest  # none scorable: -inf <= inf


def _std(values: Tensor, scorable: Tensor, dim: int) -> Tensor:
    """With Bessel's correction over scorable values, keepdim; 0 where there are fewer than two."""
    count = scorable.sum(dim, keepdim=True)
    mean = values.sum(dim, keepdim=True) / count.clamp(min=1)
    squares = torch.where(scorable, (values - mean) ** 2, 0.0).sum(dim, keepdim=True)
    return (squares / (count - 1).clamp(min=1)).sqrt()
