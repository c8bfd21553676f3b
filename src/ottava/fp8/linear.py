"""A linear layer whose weight stays FP8 in memory, for inference on the CPU.

Few rows of x (decoding) go through the kernels of `matmul`; many (a prompt) through torch, on weights
that are dequantised a band of rows at a time. No full-precision copy of the weight is ever kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from ottava.errors import FormatError
from ottava.fp8 import kernels, matmul
from ottava.fp8.codec import dequantise, quantise
from ottava.fp8.matmul import Order
from ottava.fp8.spec import BLOCK

_BAND = 8 * BLOCK
_FEW_FMA, _FEW_DOT, _FEW_AMX = 16, 4, 128  # rows of x up to which a kernel beats dequantising and torch


class Fp8Linear(nn.Module):
    """y = x w^T + bias for a weight in UE8M0-FP8, without autograd.

    codes: float8_e4m3fn [M, N]; scales: uint8 (or float8_e8m0fnu) [ceil(M/128), ceil(N/128)]; bias: [M] or None.
    Both are kept as bytes (buffers of uint8), which `.to(dtype)` leaves alone.
    order: one order of summation (see `matmul`) for any number of rows, so that a row of the result depends on
    its row of x alone. None: whatever is fastest for that number, where a prompt's rows may be summed by torch.
    Raises FormatError where shapes do not fit, a code is NaN or a scale byte lies outside [10, 246].
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None = None, *, order: Order | None = None):
        super().__init__()
        codes, scales = codes.detach().view(torch.uint8).contiguous(), scales.detach().view(torch.uint8).contiguous()
        if codes.dim() != 2 or codes.numel() == 0:
            raise FormatError(f"codes of shape {tuple(codes.shape)} are no matrix")
        self.out_features, self.in_features = codes.shape
        matmul.check_scales(scales, self.out_features, self.in_features)
        if any(bool(((band & 0x7F) == 0x7F).any()) for band in torch.split(codes, _BAND)):
            raise FormatError("a code of this weight is NaN")
        if order is not None and order not in matmul.orders():
            raise FormatError(f"no kernel sums in the order {order!r} here", fix=f"those that do: {matmul.orders()}")
        if bias is not None and bias.shape != (self.out_features,):
            raise FormatError(f"a bias of shape {tuple(bias.shape)} for {self.out_features} rows")
        self.order = order
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, order: Order | None = None) -> Fp8Linear:
        """The layer with its weight rounded to UE8M0-FP8 (`codec.quantise`); exact where it lies on the grid."""
        codes, scales = quantise(linear.weight.detach())
        return cls(codes, scales, linear.bias, order=order)

    def forward(self, x: Tensor) -> Tensor:
        """x: float32 or bfloat16 [..., N] on the CPU. Returns [..., M] in the type of x."""
        if x.requires_grad and torch.is_grad_enabled():
            raise FormatError("Fp8Linear has no gradient", fix="call it under torch.no_grad()")
        shape, dtype = x.shape, x.dtype
        if shape[-1] != self.in_features or dtype not in (torch.float32, torch.bfloat16):
            raise FormatError(
                f"x is {dtype} {tuple(shape)}; Fp8Linear takes float32 or bfloat16 [..., {self.in_features}]"
            )
        rows = x.reshape(-1, self.in_features).resolve_neg().contiguous()
        order = self.order_for(dtype, rows.shape[0])
        if order is None:
            y = self._through_torch(rows)
        else:
            if not kernels.fits(rows, self.codes, self.scales):
                raise FormatError("Fp8Linear takes plain tensors on the CPU", fix="move x and the layer there")
            y = matmul.run(rows, self.codes, self.scales, order)
            if self.bias is not None:
                y += self.bias
        return (y if y.dtype == dtype else y.to(dtype)).view(*shape[:-1], self.out_features)

    def order_for(self, dtype: torch.dtype, rows: int) -> Order | None:
        """The order in which `rows` rows of `dtype` are summed; None: by torch, on dequantised weights."""
        if self.order is not None:
            if dtype == torch.float32 and self.order != "fma":
                raise FormatError(
                    f"the order {self.order!r} takes no float32 activations", fix="use bfloat16, or the order 'fma'"
                )
            return self.order
        known = matmul.orders()
        if dtype == torch.bfloat16 and "dot" in known and rows <= _FEW_DOT:
            return "dot"
        if dtype == torch.bfloat16 and "amx" in known and rows <= _FEW_AMX:
            return "amx"
        if dtype == torch.bfloat16 and "dot" in known:
            return "dot" if rows <= _FEW_FMA else None
        return "fma" if "fma" in known and rows <= _FEW_FMA else None

    def dequantised(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The exact weight, [M, N]."""
        return dequantise(self.codes.view(torch.float8_e4m3fn), self.scales, dtype)

    def extra_repr(self) -> str:
        """As nn.Linear describes itself."""
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return text if self.order is None else f"{text}, order={self.order!r}"

    def _through_torch(self, rows: Tensor) -> Tensor:
        y = torch.empty(len(rows), self.out_features, dtype=rows.dtype)
        with torch.no_grad():
            for first in range(0, self.out_features, _BAND):
                codes = self.codes[first : first + _BAND].view(torch.float8_e4m3fn)
                scales = self.scales[first // BLOCK : (first + _BAND) // BLOCK]
                bias = None if self.bias is None else self.bias[first : first + _BAND].to(rows.dtype)
                weight = dequantise(codes, scales, rows.dtype)
                y[:, first : first + len(codes)] = functional.linear(rows, weight, bias)
        return y


def replace(model: nn.Module, choose: Callable[[str, nn.Linear], Fp8Linear | None]) -> list[str]:
    """Put an Fp8Linear wherever `choose(name, linear)` gives one; returns the names of the layers replaced.

    name: the layer's full name in `model`; `model` itself is not replaced. The weight of the nn.Linear is dropped
    unread. A layer that the model holds in several places is asked for under each name until one gives a layer,
    and that stays one layer in all of them.
    """
    linears = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name and isinstance(module, nn.Linear)
    }
    made: dict[nn.Linear, Fp8Linear] = {}
    for name, module in linears.items():
        layer = None if module in made else choose(name, module)
        if layer is not None:
            made[module] = layer
    replaced = [name for name, module in linears.items() if module in made]
    for name in replaced:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made[linears[name]])
    return replaced
