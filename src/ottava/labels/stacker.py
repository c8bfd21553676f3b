"""What machines say, as far as people have borne it out: a calibrated stacker.

Verifiers and judges are features, never voters. Four judges that share a training set err together; counted as four
independent witnesses they make a claim of 98% where the truth is 3 to 26 points lower. So the probability of a class
given everything that machines say of an item is *fitted on human labels*:

1. a conditional logit, score of class k = sum of weights x features(k): which judges say k, how many, whether the
   verifier does (a weight for each class: one that misses right answers errs on one side only) and both at once;
2. items on which the machines say the very same things are one *pattern*; the frequencies seen in a pattern correct the
   logit by KAPPA pseudo-observations, so that one that was seen often is calibrated whatever the logit can express.

The labels are soft: the posterior that includes people's votes (expectation and maximisation; Raykar et al., JMLR 11
(2010) 1297). Items without a vote teach nothing and do not enter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ottava.labels.world import World

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]
    Floats = NDArray[np.float64]

RIDGE = 0.15
KAPPA = 25.0
UNSEEN = 0.3
"""Errors that a pattern starts with. Without them, a pattern whose first votes were right by luck is believed,
hence never asked
about again, and the claim is too good."""


@dataclass(frozen=True)
class Patterns:
    """The different things that machines say. of: [items], the pattern of each; features: [patterns, classes,
    features]."""

    of: Ints
    features: Floats


def patterns(world: World) -> Patterns:
    """Group items by what machines say of them."""
    rows = np.concatenate([world.verifier[:, None], world.judges], 1)
    unique, of = np.unique(rows, axis=0, return_inverse=True)
    classes = np.arange(len(world.classes))
    verified = (unique[:, :1] == classes)[..., None].astype(np.float64)
    judged = (unique[:, 1:, None] == classes).transpose(0, 2, 1).astype(np.float64)  # [patterns, classes, judges]
    count = judged.sum(-1, keepdims=True)
    levels = np.arange(2, judged.shape[-1] + 1)
    own = np.broadcast_to(np.eye(len(classes)), (len(unique), len(classes), len(classes)))
    silent = (unique[:, :1] < 0)[:, None, :]
    features = [own, judged, (count >= levels).astype(np.float64), verified * own, verified * count, silent * count]
    return Patterns(of.reshape(-1).astype(np.int64), np.concatenate(features, -1))


def fit(found: Patterns, counts: Floats, weights: Floats | None = None, rounds: int = 8) -> tuple[Floats, Floats]:
    """(P(class | pattern) [patterns, classes], weights) from soft counts [patterns, classes]; weights: where to start.

    Newton's method on the ridge-penalised likelihood, which is concave; steps are halved where they overshoot.
    """
    x = found.features
    w = np.zeros(x.shape[-1]) if weights is None else weights
    seen = counts.sum(1) > 0
    here, mass = x[seen], counts[seen]
    total = mass.sum(1)

    def value(w: Floats) -> float:
        scores = here @ w
        top = scores.max(1)
        logs = top + np.log(np.exp(scores - top[:, None]).sum(1))
        return float((mass * scores).sum() - (total * logs).sum() - RIDGE / 2 * (w @ w))

    now = value(w)
    for _ in range(rounds):
        p = _softmax(here @ w)
        gradient = np.einsum("pk,pkf->f", mass - total[:, None] * p, here) - RIDGE * w
        centre = np.einsum("pk,pkf->pf", p, here)
        hessian = np.einsum("pk,pkf,pkg->fg", total[:, None] * p, here, here, optimize=True)
        hessian -= np.einsum("p,pf,pg->fg", total, centre, centre, optimize=True)
        step = np.linalg.solve(hessian + RIDGE * np.eye(len(w)), gradient)
        size = 1.0
        while (new := value(w + size * step)) < now and size > 1e-3:
            size /= 2
        if new - now < 1e-3:
            break
        w, now = w + size * step, new
    logit = _softmax(x @ w)
    smoothed = counts + KAPPA * logit + UNSEEN / (x.shape[1] - 1)
    smoothed /= smoothed.sum(1, keepdims=True)
    return smoothed, w


def _softmax(scores: Floats) -> Floats:
    out: Floats = np.exp(scores - scores.max(-1, keepdims=True))
    out /= out.sum(-1, keepdims=True)
    return out
