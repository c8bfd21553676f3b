"""Policy losses behind one switch: GRPO, Dr. GRPO, DAPO, GSPO, CISPO, each beside its formula and source.

Pure functions on tensors. A shard computes its own rows; what it divides by (rows, tokens, longest reply) are
integers of the whole update, known before the backward pass, so that the contributions of shards simply add and the
number of shards changes nothing. Losses are minimised.

Notation: reply i of N rows, its tokens t with mask m_it (end of sequence in, prompt and padding out), n_i tokens,
advantage A, l = log pi_theta, l_old, l_ref, l_sampler, r = exp(l - l_old), sg = no gradient. All log-probabilities
are of what was sampled from: after temperature and truncation (engine/logprobs.py).

    loss     per token x_it                                          sum over rows and tokens of m x c, with c
    grpo     -min(r A, clip(r, 1 - low, 1 + high) A)                 1 / (B n_i)
    dr_grpo  the same; A without the standard deviation              1 / (B longest)
    dapo     the same, high > low ("clip-higher")                    1 / T
    gspo     the same with s_i = exp(mean over t of l - l_old)       1 / (B n_i)
    cispo    -sg(min(r, cap)) A l                                    1 / T
    B, T: rows and tokens of the whole update.

Sources: GRPO arXiv 2402.03300 eq. 3 and 2501.12948; Dr. GRPO 2503.20783 sec. 3.2; DAPO 2503.14476 eq. 8 to 10;
GSPO 2507.18071 eq. 5 and 7; CISPO 2506.13585 eq. 4 and 5. As TRL 1.16's GRPOTrainer in each of them (gspo is its
importance_sampling_level="sequence", cap its epsilon_high under "cispo"). TRL's bnpo is dapo with T of one
micro-batch: nothing of its own where T is global. To x is added, or x is multiplied by, in this order:

    off-policy sequence mask   x = 0 where A < 0 and the mean over t of l_sampler - sg l > off_policy_delta
                               (DeepSeek-V3.2, 2512.02556 sec. 3.1); the row still counts in B and T
    sampler correction         x *= w, w from `correct`: what the engine sampled from is not what the learner holds
    KL to a reference          x += beta k, k = exp(l_ref - l) - (l_ref - l) - 1 (Schulman's k3, 2020), or, unbiased,
                               beta r k with a gradient through r: that of the exact KL (V3.2, sec. 3.1). With gspo
                               r is s_i, as in TRL; the estimate is exact for token ratios alone
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ottava.errors import DataError
from ottava.trainer.rl_spec import CorrectionSpec, Loss, PolicySpec

COLUMNS = (
    "rows",  # all, the empty ones too
    "empty",  # rows without a token
    "bad_advantages",  # rows in which an advantage was NaN or infinite, and was taken as 0
    "tokens",
    "ratios",  # one a token; with gspo one a row that is not empty
    "ratio",  # sum of the ratios
    "ratio_squared",
    "clipped_low",  # ratios below 1 - low with A < 0: no gradient
    "clipped_high",  # ratios above 1 + high with A > 0: no gradient; cispo: above the cap, whatever A
    "off_policy",  # rows of which the off-policy mask took tokens
    "unscored",  # tokens without the sampler's log-probability
    "rejected",  # tokens whose sampler correction is 0
    "kl",  # sum over tokens of the KL term, before beta
)
"""What a policy loss counts: sums, so that those of shards add."""


@dataclass(frozen=True)
class Scale:
    """What the whole update is divided by, over all shards: rows, tokens in their masks, longest reply allowed."""

    rows: int
    tokens: int
    longest: int

    def __post_init__(self) -> None:
        assert min(self.rows, self.tokens, self.longest) >= 0, "counts are not negative"


@dataclass(frozen=True)
class Rows:
    """One shard's replies. What stands outside the mask is never looked at: padding may hold anything, NaN too.

    mask: bool [N, T]. advantages: [N], or [N, T] for a reward per token. old: [N, T], the learner's log-probabilities
    when the replies were made; none in their first update, where they are the live ones. reference: [N, T], needed
    with beta. sampler: [N, T], the engine's own log-probabilities, NaN where it gave none; without it the off-policy
    mask takes `old`. weights: [N, T] or [N, 1] of `correct`.
    """

    mask: Tensor
    advantages: Tensor
    old: Tensor | None = None
    reference: Tensor | None = None
    sampler: Tensor | None = None
    weights: Tensor | None = None


def policy_loss(policy: PolicySpec, live: Tensor, rows: Rows, scale: Scale) -> tuple[Tensor, Tensor]:
    """One shard's share of the update's loss (a scalar to differentiate), and its counts [len(COLUMNS)].

    live: the policy's log-probabilities [N, T] of the replies' tokens, float32 or float64, with a graph; N may be 0.
    An advantage that is NaN or infinite counts as 0 and is counted. NaN in live, old or reference inside the mask is
    a fault of the learner, not of the data: the loss is NaN, for the guard of the training loop to see.
    Raises DataError where a tensor that the policy needs is missing or has another shape.
    """
    mask = _check(policy, live, rows)
    sizes = mask.sum(1, keepdim=True)
    advantage, bad = _finite_advantages(rows)
    live = torch.where(mask, live, 0.0)
    old = live.detach() if rows.old is None else torch.where(mask, rows.old, 0.0)
    log_ratio = live - old
    if policy.loss == "gspo":
        log_ratio = log_ratio.sum(1, keepdim=True) / sizes.clamp(min=1)
    ratio = log_ratio.exp()
    terms, low, high = _surrogate(policy, ratio, live, advantage)
    counts = {
        "rows": torch.ones_like(sizes),
        "empty": sizes == 0,
        "bad_advantages": bad,
        "tokens": mask,
        **_ratio_counts(ratio.detach(), low, high, sizes > 0 if policy.loss == "gspo" else mask),
    }
    if rows.sampler is not None:
        counts["unscored"] = mask & rows.sampler.isnan()
    if policy.off_policy_delta is not None:
        sampler = old if rows.sampler is None else rows.sampler
        keep = off_policy_keep(live, sampler, advantage, mask, policy.off_policy_delta)
        terms = terms * keep
        counts["off_policy"] = (~keep & mask).any(1)
    if rows.weights is not None:
        terms = terms * torch.where(mask, rows.weights, 0.0)
        counts["rejected"] = mask & (rows.weights == 0)
    if policy.beta:
        assert rows.reference is not None
        divergence = k3(live, torch.where(mask, rows.reference, 0.0))
        divergence = divergence * ratio if policy.unbiased else divergence
        terms = terms + policy.beta * divergence
        counts["kl"] = torch.where(mask, divergence, 0.0)
    return _reduce(policy.loss, torch.where(mask, terms, 0.0), sizes, scale), _columns(counts, live)


def k3(live: Tensor, reference: Tensor) -> Tensor:
    """Per token exp(d) - d - 1 with d = l_ref - l: never negative; its mean over the policy's samples is the KL.

    Its gradient is not that of the KL, whence `unbiased`. Schulman, Approximating KL Divergence, 2020.
    """
    distance = reference - live
    return distance.exp() - distance - 1


def off_policy_keep(live: Tensor, sampler: Tensor, advantage: Tensor, mask: Tensor, delta: float) -> Tensor:
    """DeepSeek-V3.2's off-policy sequence mask: False where A < 0 and the row drifted by more than `delta` a token.

    live, sampler: [N, T]; advantage: [N, 1] or [N, T], whose shape the answer has; mask: bool [N, T]. A row's drift
    is the mean over its tokens of l_sampler - l; a token that the sampler did not score (NaN) says nothing: 0.
    """
    drift = torch.where(mask, sampler - live.detach(), 0.0)
    drift = torch.where(sampler.isnan(), 0.0, drift).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return (advantage >= 0) | (drift <= delta)


@dataclass(frozen=True)
class Corrected:
    """weights: [N, T], or [N, 1] of a sequence; mask: bool [N, T]; how many tokens were touched and how, as scalars."""

    weights: Tensor
    mask: Tensor
    truncated: Tensor
    rejected: Tensor
    unscored: Tensor


def correct(correction: CorrectionSpec, old: Tensor, sampler: Tensor, mask: Tensor) -> Corrected:
    """The weights of a generation's replies, computed once, before its first update. No gradient.

    old: the learner's log-probabilities when the replies were made [N, T]; sampler: the engine's, NaN where it gave
    none (then w = 1 for the token); mask: bool [N, T].
    """
    unscored = mask & sampler.isnan()
    gap = torch.where(mask & ~unscored, old - sampler, 0.0).detach()
    weights = (gap.sum(1, keepdim=True) if correction.mode.startswith("sequence") else gap).exp()
    inside = (weights >= correction.low) & (weights <= correction.high)
    rejected = truncated = torch.zeros_like(mask)
    if correction.mode.endswith("mask"):
        weights, rejected = torch.where(inside, weights, 0.0), mask & ~inside
    else:
        weights, truncated = weights.clamp(correction.low, correction.high), mask & ~inside
    left = mask if correction.counted else mask & (weights != 0)
    return Corrected(weights, left, truncated.sum(), rejected.sum(), unscored.sum())


def summary(counts: Tensor) -> dict[str, float]:
    """What the summed counts of an update say: shares and means, 0 where there was nothing to take them over."""
    value = dict(zip(COLUMNS, counts.double().tolist(), strict=True))
    ratios, tokens = max(value["ratios"], 1.0), max(value["tokens"], 1.0)
    mean = value["ratio"] / ratios
    return {
        **{
            name: value[name]
            for name in ("rows", "empty", "bad_advantages", "tokens", "off_policy", "unscored", "rejected")
        },
        "clipped_low": value["clipped_low"] / ratios,
        "clipped_high": value["clipped_high"] / ratios,
        "ratio": mean,
        "ratio_spread": math.sqrt(max(value["ratio_squared"] / ratios - mean * mean, 0.0)),
        "kl": value["kl"] / tokens,
    }


def _surrogate(policy: PolicySpec, ratio: Tensor, live: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x before masks, weights and KL, and where the ratio was clipped below and above."""
    if policy.loss == "cispo":
        high = (ratio > policy.cap).expand_as(live)
        return -ratio.clamp(max=policy.cap).detach() * advantage * live, torch.zeros_like(high), high
    clipped = ratio.clamp(1 - policy.clip_low, 1 + policy.clip_high)
    bounded = ratio if policy.two_sided is None else ratio.clamp(max=policy.two_sided)
    low = (ratio < 1 - policy.clip_low) & (advantage < 0)
    high = (ratio > 1 + policy.clip_high) & (advantage > 0)
    return -torch.minimum(bounded * advantage, clipped * advantage), low, high


def _ratio_counts(ratio: Tensor, low: Tensor, high: Tensor, there: Tensor) -> dict[str, Tensor]:
    return {
        "ratios": there,
        "ratio": torch.where(there, ratio, 0.0),
        "ratio_squared": torch.where(there, ratio * ratio, 0.0),
        "clipped_low": low & there,
        "clipped_high": high & there,
    }


def _reduce(loss: Loss, terms: Tensor, sizes: Tensor, scale: Scale) -> Tensor:
    """The last column of the table in this module's head. terms: [N, T], 0 outside the mask; sizes: [N, 1]."""
    if loss in ("grpo", "gspo"):
        return (terms / sizes.clamp(min=1)).sum() / max(scale.rows, 1)
    if loss == "dr_grpo":
        return terms.sum() / max(scale.rows * scale.longest, 1)
    return terms.sum() / max(scale.tokens, 1)


def _finite_advantages(rows: Rows) -> tuple[Tensor, Tensor]:
    """[N, 1] or [N, T] without NaN or infinity, and the rows [N] that had one inside the mask, or as their own."""
    value = rows.advantages.unsqueeze(1) if rows.advantages.ndim == 1 else rows.advantages
    wrong = ~value.isfinite()
    bad = (wrong & rows.mask).any(1) if rows.advantages.ndim == 2 else wrong.squeeze(1)
    return torch.where(wrong, 0.0, value), bad


def _columns(counts: Mapping[str, Tensor], live: Tensor) -> Tensor:
    assert counts.keys() <= set(COLUMNS)
    zero = live.new_zeros(())
    return torch.stack([counts[name].detach().sum().to(live.dtype) if name in counts else zero for name in COLUMNS])


def _check(policy: PolicySpec, live: Tensor, rows: Rows) -> Tensor:
    """The mask, after everything that is needed was found to be there."""
    assert live.dtype in (torch.float32, torch.float64), "log-probabilities are float32 or wider"
    assert rows.mask.dtype == torch.bool
    if policy.beta and rows.reference is None:
        raise DataError("a KL term without a reference", fix="score the replies with the reference model, or beta: 0")
    if policy.loss == "gspo" and rows.advantages.ndim == 2:
        raise DataError("gspo has one ratio a reply, and here is an advantage a token", fix="grpo, dapo or cispo")
    count, width = live.shape
    shapes: dict[str, tuple[tuple[int, ...], ...]] = {
        "mask": ((count, width),),
        "advantages": ((count,), (count, width)),
        "old": ((count, width),),
        "reference": ((count, width),),
        "sampler": ((count, width),),
        "weights": ((count, width), (count, 1)),
    }
    for name, allowed in shapes.items():
        value = getattr(rows, name)
        if value is not None and tuple(value.shape) not in allowed:
            raise DataError(f"{name} of shape {list(value.shape)} beside log-probabilities of {list(live.shape)}")
    return rows.mask
