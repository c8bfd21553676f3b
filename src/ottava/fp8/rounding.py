"""Rounding that looks at what a layer computes: fewer decibels of noise in its output, at equal bytes.

Rounding every weight to its nearest code makes the smallest error in the weights, not in the layer's output. Where
inputs are correlated, the error of one column can be undone by others: GPTQ (arXiv 2210.17323) goes from column to
column and feeds each error forward. Here the grid is fixed, by the scales that the 464 rule gives the original
weights; nothing but the choice of codes differs from plain rounding, and the columns may be taken in any order.

A block's largest value may come out lower than it was. The rule then spells that block with a smaller scale, on whose
finer grid the same values lie: the result is its own projection, and a converter writes it down without rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ottava.errors import FormatError
from ottava.fp8.codec import quantise
from ottava.fp8.spec import BLOCK, BYTE_MIN, CODE_MAX, grid

STRIDE = 128
"""Columns whose errors are fed forward one by one; the errors of all columns before them come in one product."""

SHRINKAGE = 4.0
"""How far sampled correlations are distrusted, for each input dimension and token (`damping_for`)."""

_FLOOR = 1e-6  # of the mean of the diagonal: inputs that were never active
_RETRIES = 8  # each with ten times the damping


def damping_for(columns: int, tokens: int) -> float:
    """The damping for a Hessian of N inputs over n tokens: 4 N / n.

    Correlations measured on few tokens are mostly chance, and feeding errors along them does harm on other text. The
    noise of a sampled covariance goes with N / n; the factor was chosen on documents that are neither calibration's
    nor any benchmark's, and is flat: 2 and 8 are within 0.2 dB of it.
    """
    return SHRINKAGE * columns / max(tokens, 1)


@torch.no_grad()
def grid_scale(w: Tensor) -> Tensor:
    """Every element's scale under the 464 rule: float32 in w's shape [..., M, N].

    A block that rounds to zeros has the smallest scale of a master, so that nothing can be moved into it.
    Raises FormatError where w holds infinity or NaN, or is no matrix.
    """
    codes, scales = quantise(w)
    rows, columns = w.shape[-2:]
    down, across = grid(rows, columns)
    padding = (0, across * BLOCK - columns, 0, down * BLOCK - rows)
    magnitudes = torch.nn.functional.pad(codes.view(torch.uint8) & 0x7F, padding)
    blocks = magnitudes.reshape(*w.shape[:-2], down, BLOCK, across, BLOCK)
    bits = scales.int().masked_fill_(blocks.amax((-3, -1)) == 0, BYTE_MIN) << 23
    return (
        bits.view(torch.float32).repeat_interleave(BLOCK, -2)[..., :rows, :].repeat_interleave(BLOCK, -1)[..., :columns]
    )


def nearest(w: Tensor, scale: Tensor) -> Tensor:
    """The nearest values on the grid of the given scales, float32; ties to even; what is too large saturates.

    w: float32 [..., M, N]; scale: powers of two that broadcast to it.
    """
    return (w / scale).clamp_(-CODE_MAX, CODE_MAX).to(torch.float8_e4m3fn).float().mul_(scale)


def output_error(w: Tensor, rounded: Tensor, hessian: Tensor) -> Tensor:
    """The squared error of the outputs over the tokens of a Hessian: tr((w - r) H (w - r)^T), float64 [...].

    w, rounded: [..., M, N]; hessian: [..., N, N], the sum of x x^T over inputs x.
    """
    error = w.double() - rounded.double()
    return ((error @ hessian.double()) * error).sum((-2, -1))


@torch.no_grad()
def gptq(
    w: Tensor,
    hessian: Tensor,
    scale: Tensor | None = None,
    *,
    damping: float = 0.1,
    act_order: bool = True,
    sweeps: int = 3,
) -> Tensor:
    """Values on w's grid, float32 [..., M, N], that keep the outputs w @ x closer than the nearest ones do.

    w: [..., M, N], floating point; leading dimensions are a batch. hessian: [..., N, N] or [N, N] for all, the sum of
    x x^T over the calibration's inputs. scale: `grid_scale(w)` where it is known, or where matrices with the same
    inputs are stacked (their blocks start anew with each matrix). damping: what is added to the Hessian's diagonal, as
    a share of it; ten times as much is tried where the matrix is not positive definite. act_order: columns with large
    inputs first. sweeps: passes of coordinate descent afterwards; none raises the damped error.
    `project` leaves the result as it is. Raises FormatError where w or the Hessian holds infinity or NaN.
    """
    rows, columns = w.shape[-2:]
    scale = grid_scale(w) if scale is None else scale
    weights, scales = (t.float().reshape(-1, rows, columns).mT.contiguous() for t in (w, scale))
    h = hessian.double().expand(*w.shape[:-2], columns, columns).reshape(-1, columns, columns)
    if not bool(h.isfinite().all()):
        raise FormatError("infinity or NaN among a layer's inputs", fix="calibrate with a model that computes numbers")
    order = h.diagonal(dim1=-2, dim2=-1).argsort(descending=True, stable=True)
    if not act_order:
        order = torch.arange(columns).expand_as(order)
    along = order[..., None].expand_as(weights)
    weights, scales = weights.gather(1, along), scales.gather(1, along)
    h = h.gather(1, order[..., None].expand_as(h)).gather(2, order[:, None].expand_as(h))
    damped, factor = _factor(h, damping)
    rounded = _feed_forward(weights, scales, _unit(factor))
    for _ in range(sweeps):
        _descend(weights, scales, rounded, _unit(damped))
    out = torch.empty_like(weights).scatter_(1, along, rounded).mT.reshape(w.shape)
    return torch.where(
        out == 0, torch.copysign(out, w.float()), out
    ).contiguous()  # as plain rounding keeps zeros' signs


def _factor(h: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The damped Hessian and its factor L, lower triangular, with damped = L^T L. float64 [B, N, N] both.

    GPTQ is usually written with a Cholesky factor of the inverse. Row j of L, divided by its diagonal, holds the same
    coefficients (how much column j should make good of the errors before it), and nothing is inverted.
    """
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    floor = _FLOOR * diagonal.mean(-1, keepdim=True)
    floor = torch.where(floor > 0, floor, 1.0)
    for attempt in range(_RETRIES):
        damped = h + torch.diag_embed(10.0**attempt * (damping * diagonal + floor))
        factor, failed = torch.linalg.cholesky_ex(damped.flip(-2, -1))
        if not bool(failed.any()):
            return damped, factor.flip(-2, -1).mT
    raise FormatError("the Hessian is not positive semidefinite", fix="sum x x^T over the layer's inputs")


def _unit(matrix: Tensor) -> Tensor:
    """Rows divided by their diagonal, float32."""
    return (matrix / matrix.diagonal(dim1=-2, dim2=-1)[..., None]).float().contiguous()


def _feed_forward(w: Tensor, scale: Tensor, share: Tensor) -> Tensor:
    """Column j rounded at w_j + sum over i < j of share_ji (w_i - rounded_i).

    w, scale: [B, N, M], transposed so that a column is contiguous; share: [B, N, N].
    """
    rounded, error = torch.empty_like(w), torch.empty_like(w)
    for start in range(0, w.shape[1], STRIDE):
        stop = min(start + STRIDE, w.shape[1])
        targets = torch.baddbmm(w[:, start:stop], share[:, start:stop, :start], error[:, :start])
        for j in range(start, stop):
            here, target = slice(j, j + 1), targets[:, j - start : j - start + 1]
            target = torch.baddbmm(target, share[:, here, start:j], error[:, start:j])
            rounded[:, here] = nearest(target, scale[:, here])
            error[:, here] = w[:, here] - rounded[:, here]
    return rounded


def _descend(w: Tensor, scale: Tensor, rounded: Tensor, share: Tensor) -> None:
    """One pass of coordinate descent, in place: each column in turn to the best values, all others held.

    Along one column the error is a parabola, so the best value on the grid is the one nearest to its minimum.
    """
    error = w - rounded
    for start in range(0, w.shape[1], STRIDE):
        stop = min(start + STRIDE, w.shape[1])
        targets = torch.baddbmm(w[:, start:stop], share[:, start:stop], error).sub_(error[:, start:stop])
        moved = torch.zeros_like(targets)
        for j in range(start, stop):
            here, k = slice(j, j + 1), j - start
            target = torch.baddbmm(targets[:, k : k + 1], share[:, here, start:j], moved[:, :k])
            rounded[:, here] = nearest(target, scale[:, here])
            moved[:, k : k + 1] = w[:, here] - rounded[:, here] - error[:, here]
            error[:, here] += moved[:, k : k + 1]
