"""Linear layers whose products are of FP8 codes, forward and for the input's gradient, while they learn.

A weight [N, K] lies on the UE8M0 grid, one scale for each 128x128 block, as the master stores it. A row of
activations, and of the output's gradient, is rounded to E4M3 codes just before its product, with one power of two for
each 128 neighbours (1x128). With Q for that rounding and P for the grid:

    y = Q(x) P(w)^T        gradient of x: Q(dy) P(w)        gradient of w: dy^T x, not rounded

The gradient is straight through both roundings. What products read is exact; how they are summed is the chip's.

How this differs from DeepSeek-V3's recipe (arXiv 2412.19437, section 3.3): there the weight's gradient is a product of
codes too, with x rounded a second time in blocks of 128x1, and activations are kept as codes for the backward pass;
here dy and x are multiplied as they came, in BF16 within our trainer. There most scales are any float32 and some are
powers of two; here all are powers of two (as in V3.1), by the rule of the weights (`spec.scale_byte`). There partial
sums leave the tensor cores every 128 products; here that is the library's affair. There the optimiser's moments are
BF16; here they are float32. What stays wide is the same: embeddings, head, routers, norms, attention's own products.

On chips where `native` finds it, products go through torch.nn.functional.scaled_mm (Hopper, CUDA 12.9 or newer).
Elsewhere the codes are turned into numbers, which is exact, and multiplied in the type of x: same operands, no gain in
speed. Level of evidence: no chip has run the first way yet; its layouts are those that torch's own checks ask for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ottava.errors import FormatError
from ottava.fp8.codec import project, quantise
from ottava.fp8.spec import BIAS, BLOCK, BYTE_MAX, BYTE_MIN, BYTE_ZERO, CODE_MAX

_ROUND_464 = (
    0x7FFFFF - 0x680000 - (8 << 23)
)  # on a float32's bits: carries where the fraction exceeds 464's, then / 2**8
_INFINITY = 0x7F800000
_VANISHES = 0x00400000  # 2**-127: at the smallest scale this and everything below rounds to zero
_ROWS = 16  # scaled_mm takes rows by the dozen and more; missing ones are zeros


@dataclass(frozen=True)
class Rows:
    """Activations in FP8. codes: float8_e4m3fn [R, K']; scales: float32 [R, K' / 128], powers of two.

    columns: K; those up to K', the next multiple of 128, are zeros.
    """

    codes: Tensor
    scales: Tensor
    columns: int

    def values(self, dtype: torch.dtype) -> Tensor:
        """The exact numbers [R, K], in bfloat16, float32 or float64."""
        blocks = self.codes.to(dtype).view(*self.scales.shape, BLOCK) * self.scales.to(dtype).unsqueeze(-1)
        return blocks.flatten(-2)[:, : self.columns]


def rows(x: Tensor) -> Rows:
    """x, float32 or bfloat16 [R, K], rounded by rows of 128: the codes of `codec.quantise` on [R, K / 128, 1, 128].

    Nothing waits for the device, so infinity and NaN are no error here: their block's codes are NaN.
    """
    wide = F.pad(x.float(), (0, -x.shape[-1] % BLOCK)).view(len(x), -(-x.shape[-1] // BLOCK), BLOCK)
    top = wide.abs().amax(-1).view(torch.int32)
    byte = ((top + _ROUND_464) >> 23).clamp(BYTE_MIN, BYTE_MAX)
    shrink = _power(2 * BIAS - byte).masked_fill(top >= _INFINITY, torch.nan)
    codes = (wide * shrink.unsqueeze(-1)).clamp(-CODE_MAX, CODE_MAX).to(torch.float8_e4m3fn).flatten(-2)
    return Rows(codes, _power(byte.masked_fill(top <= _VANISHES, BYTE_ZERO)), x.shape[-1])


def _power(byte: Tensor) -> Tensor:
    """2 ** (byte - 127) in float32, for bytes (int32) in [1, 254]."""
    return (byte << 23).view(torch.float32)


# ---------------------------------------------------------------- weights


@dataclass(frozen=True)
class _Codes:
    """One operand of scaled_mm. codes: float8_e4m3fn [N', K'], row by row; scales: float32 [N' / 128, L], L the
    blocks of K' and zeros up to a multiple of 4. As scaled_mm wants it, both are handed over transposed."""

    codes: Tensor
    scales: Tensor

    @staticmethod
    def of(codes: Tensor, scales: Tensor) -> _Codes:
        return _Codes(codes.contiguous(), F.pad(scales, (0, -scales.shape[-1] % 4)).contiguous())


@dataclass(frozen=True)
class Weight:
    """A weight on the grid, ready for products. shape: [N, K].

    values: its numbers [N, K] in the weight's own type, where products are emulated; else None, and there are `there`
    for the forward pass and `back`, transposed, for the backward one.
    """

    shape: tuple[int, int]
    values: Tensor | None
    there: _Codes | None = None
    back: _Codes | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Q(x) P(w)^T: [R, K] -> [R, N], in the type of x."""
        if self.values is not None:
            return rows(x).values(x.dtype) @ self.values.to(x.dtype).mT
        assert self.there is not None
        return _scaled_mm(rows(x), self.there)[:, : self.shape[0]].to(x.dtype)

    def backward(self, gradient: Tensor) -> Tensor:
        """Q(dy) P(w): [R, N] -> [R, K], in the type of dy."""
        if self.values is not None:
            return rows(gradient).values(gradient.dtype) @ self.values.to(gradient.dtype)
        assert self.back is not None
        return _scaled_mm(rows(gradient), self.back)[:, : self.shape[1]].to(gradient.dtype)


@torch.no_grad()
def prepare(weight: Tensor) -> Weight:
    """A weight, float32 or bfloat16 [N, K], as products read it. Raises FormatError where it is not finite."""
    shape = (weight.shape[0], weight.shape[1])
    if not native(weight.device):
        return Weight(shape, project(weight))
    codes, scales = quantise(weight)
    high, wide = (-size % BLOCK for size in shape)
    codes = F.pad(codes.view(torch.uint8), (0, wide, 0, high)).view(torch.float8_e4m3fn)  # byte 0 is the code of 0
    powers = _power(scales.int())
    turned = codes.view(torch.uint8).mT.contiguous().view(torch.float8_e4m3fn)
    return Weight(shape, None, _Codes.of(codes, powers), _Codes.of(turned, powers.mT))


# ---------------------------------------------------------------- products


def _scaled_mm(a: Rows, b: _Codes) -> Tensor:
    """a [R, K'] times b [N', K'] transposed, by the chip: bfloat16 [R, N'].

    torch asks for: a by rows; its scales [R, K' / 128] by columns; b by columns; its scales [L, N' / 128] by columns,
    L a multiple of 4; K' and N' multiples of 16 (here of 128).
    """
    count = len(a.codes)
    if count == 0:
        return a.scales.new_zeros(0, len(b.codes), dtype=torch.bfloat16)
    more = -count % _ROWS
    codes = F.pad(a.codes.view(torch.uint8), (0, 0, 0, more)).view(torch.float8_e4m3fn)
    scales = F.pad(a.scales, (0, 0, 0, more), value=1.0)
    kinds: Any = F.ScalingType  # type: ignore[attr-defined]
    y: Tensor = F.scaled_mm(  # type: ignore[attr-defined]
        codes, b.codes.t(), scales.t().contiguous().t(), kinds.BlockWise1x128, b.scales.t(), kinds.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )  # fmt: skip
    return y[:count]


@cache
def native(device: torch.device) -> bool:
    """Whether this device multiplies codes itself: a product with a known result is tried, once in a process."""
    return device.type == "cuda" and hasattr(F, "scaled_mm") and agrees(device)


def agrees(device: torch.device) -> bool:
    """Whether scaled_mm gives on this device what it has to give.

    The terms are so few and small that every order of summation gives the same: another result means that codes or
    scales are read in another layout.
    """
    a, b, exact = trial()
    moved = (Rows(a.codes.to(device), a.scales.to(device), a.columns), _Codes(b.codes.to(device), b.scales.to(device)))
    try:
        return torch.equal(_scaled_mm(*moved).cpu(), exact)
    except (RuntimeError, ValueError, AttributeError, TypeError):  # no such kind of scaling in this torch, or chip
        return False


def trial() -> tuple[Rows, _Codes, Tensor]:
    """Codes [32, 384] and [256, 384], three in a row, with scales of their own, and their product [32, 256]."""
    a, b = torch.zeros(32, 3 * BLOCK), torch.zeros(256, 3 * BLOCK)
    for block in range(3):
        place = torch.arange(32) + BLOCK * block
        a[torch.arange(32), place] = 1.0 + block
        b[torch.arange(256), place.repeat(8)] = -1.0
    down = torch.tensor([1.0, 2.0, 4.0]) * torch.tensor([1.0, 0.5]).repeat(16)[:, None]
    across = torch.tensor([[1.0, 2.0, 0.5], [4.0, 1.0, 0.25]])
    left = a * down.repeat_interleave(BLOCK, 1)
    right = b * across.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    code = torch.float8_e4m3fn
    return Rows(a.to(code), down, 3 * BLOCK), _Codes.of(b.to(code), across), (left @ right.mT).bfloat16()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ready: Weight) -> Tensor:
        ctx.save_for_backward(x)
        ctx.ready, ctx.dtype = ready, weight.dtype
        return ready.forward(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x,), gradient = ctx.saved_tensors, gradients[0]
        wanted = ctx.needs_input_grad
        return (
            ctx.ready.backward(gradient) if wanted[0] else None,
            (gradient.mT @ x).to(ctx.dtype) if wanted[1] else None,
            None,
        )


def linear(x: Tensor, weight: Tensor, ready: Weight | None = None) -> Tensor:
    """Q(x) P(w)^T with the gradients above. x: float32 or bfloat16 [..., K]; weight: latent, [N, K]; returns [..., N].

    ready: `prepare(weight)`, where it is at hand. In float64, by which the others are judged, nothing is rounded.
    Raises FormatError where shapes do not fit.
    """
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[-1:]:
        raise FormatError(f"no product of {tuple(x.shape)} and {tuple(weight.shape)} transposed")
    if x.dtype == torch.float64:
        return F.linear(x, weight.to(x.dtype))
    flat: Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
        x.reshape(-1, x.shape[-1]), weight, ready or prepare(weight)
    )
    return flat.view(*x.shape[:-1], weight.shape[0])


class Prepared:
    """Weights made ready for a span in which they stand still (`models.precision.hold`); a copy of it has none."""

    def __init__(self) -> None:
        self.ready: tuple[Weight, ...] | None = None

    def __deepcopy__(self, _: dict[int, Any]) -> Prepared:
        return Prepared()


class ScaledLinear(nn.Linear):
    """nn.Linear by `linear`: same parameters, same state_dict. bias: added as it is, after the product."""

    prepared: Prepared

    @classmethod
    def from_linear(cls, layer: nn.Linear) -> ScaledLinear:
        """The same layer with products of codes: it shares `layer`'s parameters, and keeps its hooks and its mode."""
        made = cls.__new__(cls)
        made.__dict__ = {k: v.copy() if isinstance(v, dict) else v for k, v in layer.__dict__.items()}
        made.prepared = Prepared()
        return made

    def forward(self, input: Tensor) -> Tensor:
        ready = self.prepared.ready
        y = linear(input, self.weight, None if ready is None else ready[0])
        return y if self.bias is None else y + self.bias

    def hold(self) -> None:
        """Make the weight ready as it is now, until the next call."""
        self.prepared.ready = (prepare(self.weight.detach()),)
