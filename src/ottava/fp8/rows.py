"""Kernels for rows of tokens whose results do not depend on the rows beside them, on threads or the instruction set.

What a server needs so that an answer is the same whoever else asks, however its prompt was cut: a matrix product in
one order of summation that is fast for one row (it reads FP8 codes) and for hundreds, attention over a row's own cache,
norms and gates. csrc/rows.h defines each sum; tests/test_rows.py holds them against plain NumPy, bit for bit.

Functions take tensors that the caller made for them and check nothing but what is cheap: `engine.rows` is the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ottava.fp8 import kernels
from ottava.fp8.codec import dequantise
from ottava.fp8.linear import Fp8Linear
from ottava.fp8.spec import BLOCK

GROUP, PANEL = 64, 16
_KERNELS: Any = kernels.extension
LEVELS = ("portable", "avx2", "avx512", "avx512_bf16")
BEST = int(_KERNELS.rows_best()) if hasattr(_KERNELS, "rows_best") else -1
_SMALL = 1 << 16  # weights below which a second thread costs more than it gives


def levels() -> tuple[str, ...]:
    """The instruction sets here, best first; none where the extension was not built."""
    return LEVELS[: BEST + 1][::-1]


class Packed:
    """Matrices [M, N] with the same N, one below the other, laid out for `product`; FP8 where they were.

    layers: nn.Linear or Fp8Linear without bias, or bfloat16 tensors. Codes stay codes where each scale's 128 rows fall
    into groups of 64 of the whole; else the values are kept in BF16, which holds them exactly, with the same results.
    """

    def __init__(self, layers: Sequence[nn.Module | Tensor]):
        first = 0
        held = all(isinstance(layer, Fp8Linear) for layer in layers)
        for layer in layers[:-1]:
            first += _shape(layer)[0]
            held = held and first % GROUP == 0
        self.outputs, self.columns = sum(_shape(layer)[0] for layer in layers), _shape(layers[0])[1]
        assert self.columns % 2 == 0, "columns come in pairs"
        self.scales: Tensor | None = None
        if held:
            codes: list[Any] = [layer.codes for layer in layers]  # type: ignore[union-attr]
            self.weight = _panels(torch.cat(codes))
            self.scales = torch.cat([_by_group(layer) for layer in layers])
        else:
            self.weight = _panels(torch.cat([_bf16(layer) for layer in layers]))
        self._fixed = (self.weight.data_ptr(), 0 if self.scales is None else self.scales.data_ptr())

    def into(self, x: Tensor, y: Tensor, rows: int, *, level: int = BEST) -> None:
        """y[:rows] = x[:rows] w^T. x: bfloat16 or float32 [>= rows, N]; y: float32 [>= rows, M]; last strides 1."""
        _KERNELS.rows_product(
            level, kernels.threads_for(self.outputs * self.columns, _SMALL), x.data_ptr(), x.stride(0),
            x.dtype == torch.float32, *self._fixed, y.data_ptr(), y.stride(0), rows, self.outputs, self.columns,
        )  # fmt: skip

    def __call__(self, x: Tensor, *, level: int = BEST) -> Tensor:
        """x [B, N] times the matrices transposed: float32 [B, M]."""
        y = torch.empty(len(x), self.outputs)
        if len(x):
            self.into(x, y, len(x), level=level)
        return y

    def lines(self, ids: Tensor) -> Tensor:
        """These rows of the matrix, as a table of embeddings: float32 [B, N]. Only of BF16 values."""
        assert self.scales is None, "a table of embeddings is BF16"
        column = torch.arange(self.columns)
        block = column // BLOCK
        pairs = (self.columns - block * BLOCK).clamp(max=BLOCK) // 2
        within = block * BLOCK * GROUP + column % BLOCK // 2 * 2 * PANEL + column % 2
        group, line = (ids // GROUP)[:, None], (ids % GROUP)[:, None]
        at = group * GROUP * self.columns + within + line // PANEL * pairs * 2 * PANEL + line % PANEL * 2
        return self.weight.view(-1)[at].float()


def norm(
    x: Tensor, weight: Tensor, epsilon: float, out: Tensor, rows: int,
    *, add: Tensor | None = None, heads: int = 1, level: int = BEST,
) -> None:  # fmt: skip
    """x += add; out = x / rms(x) * weight for each of the first `heads` parts of each row; out may be x."""
    _KERNELS.rows_norm(
        level, _threads(rows * heads * len(weight)), x.data_ptr(), x.stride(0),
        0 if add is None else add.data_ptr(), 0 if add is None else add.stride(0), weight.data_ptr(),
        out.data_ptr(), out.stride(0), out.dtype == torch.float32, rows, heads, len(weight), epsilon,
    )  # fmt: skip


def silu(x: Tensor, out: Tensor, rows: int, width: int, *, level: int = BEST) -> None:
    """out = silu(x[:, :width]) * x[:, width:2 * width]."""
    _KERNELS.rows_silu(
        level, _threads(rows * width), x.data_ptr(), x.stride(0), out.data_ptr(), out.stride(0),
        out.dtype == torch.float32, rows, width,
    )  # fmt: skip


def sigmoid(x: Tensor, *, level: int = BEST) -> Tensor:
    """Of a contiguous float32 tensor, in place."""
    _KERNELS.rows_sigmoid(level, x.data_ptr(), x.numel())
    return x


def turn(x: Tensor, rows: int, heads: int, head: int, cos: Tensor, sin: Tensor, at: Tensor, interleaved: bool) -> None:
    """Rotary embedding of the first numbers of each of `heads` parts of `head` numbers, in place.

    cos, sin: float32 [positions, half]; at: int64 [rows]. The pairs are neighbours or half apart, the result is halves.
    """
    _KERNELS.rows_turn(
        x.data_ptr(), x.stride(0), rows, heads, head, cos.shape[1], cos.data_ptr(), sin.data_ptr(), at.data_ptr(),
        interleaved,
    )  # fmt: skip


def put(
    x: Tensor, rows: int, pieces: int, size: int, caches: Tensor, lengths: Tensor, at: Tensor, wide: bool
) -> None:  # fmt: skip
    """A row's numbers, `size` for each piece, to position at[row] of the pieces of its cache (see `attend`)."""
    _KERNELS.rows_put(
        x.data_ptr(), x.stride(0), rows, pieces, size, caches.data_ptr(), lengths.data_ptr(), at.data_ptr(), wide
    )  # fmt: skip


def attend(
    q: Tensor, out: Tensor, caches: Tensor, lengths: Tensor, counts: Tensor, rows: int,
    *, heads: int, group: int, width: int, value_width: int, values: int, size: int, scale: float,
    level: int = BEST,
) -> None:  # fmt: skip
    """Attention of each row over the first counts[row] positions of its cache.

    q: float32, `heads * group` queries of `width` a row; out: as many values of `value_width`, in the cache's type.
    caches, lengths, counts: int64 [rows]; a cache lies at its address as pieces of [length, size] numbers: head h has
    its keys in piece h, its values in piece `values + h`.
    """
    _KERNELS.rows_attention(
        level, kernels.threads_for(rows * heads, 2), q.data_ptr(), q.stride(0), out.data_ptr(), out.stride(0),
        out.dtype == torch.float32, caches.data_ptr(), lengths.data_ptr(), counts.data_ptr(), rows, heads, group, width,
        value_width, values, size, scale,
    )  # fmt: skip


def _threads(elements: int) -> int:
    return kernels.threads_for(elements, _SMALL)


def _shape(layer: nn.Module | Tensor) -> tuple[int, int]:
    if isinstance(layer, Fp8Linear):
        return layer.out_features, layer.in_features
    weight: Any = layer.weight if isinstance(layer, nn.Module) else layer
    return weight.shape[0], weight.shape[1]


def _bf16(layer: nn.Module | Tensor) -> Tensor:
    if isinstance(layer, Fp8Linear):
        return dequantise(layer.codes.view(torch.float8_e4m3fn), layer.scales, torch.bfloat16)
    weight: Any = layer.weight if isinstance(layer, nn.Module) else layer
    rounded: Tensor = weight.detach().to(torch.bfloat16)
    return rounded


def _panels(weight: Tensor) -> Tensor:
    """[M, N] as [groups, 64 * N]: blocks of columns, in each [4 panels][pairs][16 outputs][2]."""
    rows, columns = weight.shape
    padded = torch.zeros(-(-rows // GROUP) * GROUP, columns, dtype=weight.dtype)
    padded[:rows] = weight
    groups = padded.view(-1, GROUP // PANEL, PANEL, columns)
    blocks = [
        part.reshape(*part.shape[:3], -1, 2).permute(0, 1, 3, 2, 4).flatten(1)
        for part in torch.split(groups, BLOCK, -1)
    ]
    return torch.cat(blocks, 1)


def _by_group(layer: Any) -> Tensor:
    """Its scales, a line for each group of 64 outputs."""
    groups = -(-layer.out_features // GROUP)
    lines: Tensor = layer.scales.repeat_interleave(BLOCK // GROUP, 0)[:groups]
    return lines.contiguous()
