"""Matrix products on the CPU with FP8 weights, held at half the memory of BF16.

Decoding one token reads every weight once, so it goes as fast as memory gives them: codes are read and
turned into BF16 numbers in registers. A scale is a power of two, so those are the very numbers that the
codes stand for, and the result is, bit for bit, that of the same kernel on the dequantised weights.

There are three orders of summation; csrc/matmul.h defines each exactly. Within one order a row of the
result depends on its row of x and on the weights alone: not on the batch, the threads or, where several
have it, the instruction set. Different orders differ, within float32 rounding.

    fma   float32 or bfloat16 activations, any machine (AVX-512, AVX2, portable C: the same bits)
    dot   bfloat16 activations, AVX-512 BF16
    amx   bfloat16 activations, AMX
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ottava.errors import FormatError
from ottava.fp8 import kernels
from ottava.fp8.kernels import LEVELS, levels
from ottava.fp8.spec import BYTE_MAX, BYTE_MIN, grid

Order = Literal["fma", "dot", "amx"]
_ORDERS: tuple[Order, ...] = get_args(Order)
_NUMBER = {order: number for number, order in enumerate(_ORDERS)}
_BITS = 0 if kernels.extension is None else int(kernels.extension.matmul_orders())
_HERE: tuple[Order, ...] = tuple(order for bit, order in enumerate(_ORDERS) if _BITS >> bit & 1)
_BEST = 0 if kernels.extension is None else int(kernels.extension.best())
_SMALL = 1 << 16  # weights below which a second thread costs more than it gives


def orders() -> tuple[Order, ...]:
    """The orders of summation that this machine has; none where the extension was not built."""
    return _HERE


def product(
    x: Tensor, weight: Tensor, scales: Tensor | None = None, *, order: Order = "fma", level: str | None = None
) -> Tensor:
    """x [B, N] times weight [M, N] transposed: float32 [B, M], summed in `order`.

    x: float32 (order fma) or bfloat16 (any order). weight: float8_e4m3fn codes or their bytes (uint8) with
    scales uint8 [ceil(M/128), ceil(N/128)], or bfloat16 without scales. No code may be NaN (that is not looked
    for). level: the instruction set of fma, one of `kernels.levels()`, the best by default. Makes no autograd graph.
    Raises FormatError where shapes or types do not fit, or scale bytes lie outside [10, 246].
    """
    x, weight, scales = x.resolve_neg(), weight.resolve_neg(), None if scales is None else scales.resolve_neg()
    if scales is None:
        fits = weight.dtype == torch.bfloat16
    else:
        fits = weight.dtype in (torch.float8_e4m3fn, torch.uint8) and scales.dtype == torch.uint8
    if not fits or x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or weight.numel() == 0:
        raise FormatError(
            f"no product of {x.dtype} {tuple(x.shape)} and {weight.dtype} {tuple(weight.shape)} "
            f"with {'no' if scales is None else scales.dtype} scales"
        )
    if scales is not None:
        check_scales(scales, weight.shape[0], weight.shape[1])
    if order not in orders() or not kernels.fits(x, weight, *([] if scales is None else [scales])):
        raise FormatError(
            f"no kernel sums these tensors in the order {order!r} here",
            fix=f"give plain tensors on the CPU and one of {orders()}",
        )
    if x.dtype != torch.bfloat16 and (order != "fma" or x.dtype != torch.float32):
        raise FormatError(f"the order {order!r} takes no {x.dtype} activations")
    if level is not None and level not in levels():
        raise FormatError(f"no instruction set {level!r} here", fix=f"those here: {levels()}")
    scales = None if scales is None else scales.contiguous()
    return run(x.contiguous(), weight.contiguous(), scales, order, _BEST if level is None else LEVELS.index(level))


def check_scales(scales: Tensor, rows: int, columns: int) -> None:
    """Raise FormatError unless scales (uint8) are a grid of bytes under which every code is normal in BF16, or zero."""
    if scales.device.type != "cpu" or tuple(scales.shape) != grid(rows, columns):
        raise FormatError(
            f"scales of shape {tuple(scales.shape)} where a weight of shape {(rows, columns)} needs "
            f"{grid(rows, columns)} on the CPU"
        )
    least, most = (int(bound) for bound in torch.aminmax(scales))
    if least < BYTE_MIN or most > BYTE_MAX:
        raise FormatError(f"scale bytes from {least} to {most}: the kernels take those from {BYTE_MIN} to {BYTE_MAX}")


def run(x: Tensor, weight: Tensor, scales: Tensor | None, order: Order, level: int = _BEST) -> Tensor:
    """`product` without its checks, for callers that have made them: all tensors contiguous, and `kernels.fits`."""
    (batch, columns), rows = x.shape, weight.shape[0]
    y = torch.empty((batch, rows), dtype=torch.float32)
    if batch:
        threads = kernels.threads_for(rows * columns, _SMALL)
        kernels.extension.matmul(  # type: ignore[union-attr]
            _NUMBER[order], level, x.data_ptr(), x.dtype == torch.bfloat16, weight.data_ptr(),
            0 if scales is None else scales.data_ptr(), y.data_ptr(), batch, rows, columns, threads,
        )  # fmt: skip
    return y
