"""Faults in scales, as predictions: the codes are the sound ones, the grid of scales is another."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ottava.fp8.spec import BIAS, BLOCK, MX_BLOCK
from ottava.verify.case import PARTS, Case, Hypotheses
from ottava.verify.side import CODES, POWERS, Form

LOST = (1.0, 0.0, 2.0**-BIAS)
"""What is read where a scale is not there: nothing to multiply with, a zero, the byte 0."""


def _scaled(case: Case, change: Callable[[Tensor], Iterator[Tensor | None]]) -> Hypotheses:
    """Predictions from changed grids of scales. change: the grid as float64 -> grids of the same shape."""
    for form in case.forms:
        for factors in change(form.factors):
            if factors is not None and factors.shape == form.factors.shape:
                yield lambda band, form=form, factors=factors: form.values(band, factors)  # type: ignore[misc]


def _bytes(factors: Tensor) -> Tensor | None:
    """The E8M0 bytes of a grid (int64); None where a scale is no power of two."""
    mantissa, exponent = torch.frexp(factors)
    return exponent.long() - 1 + BIAS if bool((mantissa == 0.5).all()) else None


def lost(case: Case) -> Hypotheses:
    return _scaled(case, lambda g: iter([torch.ones_like(g)]))


def edge(axis: int) -> Callable[[Case], Hypotheses]:
    """The last row (axis 0) or column (axis 1) of scales lost: one, zero, byte 0, or its neighbour's."""

    def change(g: Tensor) -> Iterator[Tensor]:
        last = g.shape[axis] - 1
        neighbours = [g.select(axis, last - 1)] if last else []
        for value in [torch.tensor(lost) for lost in LOST] + neighbours:
            out = g.clone()
            out.select(axis, last).copy_(value)
            yield out

    def hypotheses(case: Case) -> Hypotheses:
        yield from _scaled(case, change)
        for form in case.forms:  # in 1x32 blocks a row of 128x128 blocks is many rows
            if form.block == MX_BLOCK:
                step = BLOCK if axis == 0 else BLOCK // MX_BLOCK[1]
                start = (form.factors.shape[axis] - 1) // step * step
                for lost in LOST:
                    out = form.factors.clone()
                    out.narrow(axis, start, out.shape[axis] - start)[:] = lost
                    yield lambda band, form=form, out=out: form.values(band, out)  # type: ignore[misc]

    return hypotheses


def as_number(case: Case) -> Hypotheses:
    def change(g: Tensor) -> Iterator[Tensor | None]:
        number = _bytes(g)
        if number is None:
            return
        yield number.double()
        if bool((number >= 0).all()):  # where the target holds powers of two only
            nearest = number.float().to(torch.float8_e8m0fnu).view(torch.uint8)
            yield POWERS[nearest.int()]
            yield torch.exp2(number.clamp_min(1).double().log2().floor())

    return _scaled(case, change)


def to_byte(case: Case) -> Hypotheses:
    def change(g: Tensor) -> Iterator[Tensor]:
        for byte in (g.clamp(0, 255).floor().long(), g.clamp(0, 2.0**62).floor().long() & 0xFF):
            yield POWERS[byte]
            yield torch.where(byte == 0, 0.0, POWERS[byte])

    return _scaled(case, change)


def byte_zero(case: Case) -> Hypotheses:
    return _scaled(case, lambda g: iter([torch.where(g == POWERS[0], 0.0, g)]))


def bias(case: Case) -> Hypotheses:
    return _scaled(case, lambda g: iter([g * 2, g / 2]))


def inverted(case: Case) -> Hypotheses:
    return _scaled(case, lambda g: iter([1 / g]))


def twice(case: Case) -> Hypotheses:
    return _scaled(case, lambda g: iter([g * g]))


def grid_transposed(case: Case) -> Hypotheses:
    return _scaled(case, lambda g: iter([g.T]))  # of another shape unless the grid is square


def mn_major(case: Case) -> Hypotheses:
    return _scaled(case, lambda g: iter([g.T.reshape(g.shape), g.reshape(g.T.shape).T]))


def grid_shifted(case: Case) -> Hypotheses:
    def change(g: Tensor) -> Iterator[Tensor]:
        for axis in (0, 1):
            n = g.shape[axis]
            if n < 2:
                continue
            for step in (1, -1):
                yield g.roll(step, axis)
                index = (torch.arange(n) - step).clamp(0, n - 1)
                yield g.index_select(axis, index)
                for edge in (1.0, 0.0):
                    out = g.roll(step, axis)
                    out.select(axis, 0 if step == 1 else n - 1)[:] = edge
                    yield out
        yield from (g.flatten().roll(step).reshape(g.shape) for step in (1, -1))

    return _scaled(case, change)


def pack_reversed(case: Case) -> Hypotheses:
    def change(g: Tensor) -> Iterator[Tensor]:
        for word in (4, 2):
            if g.shape[1] % word == 0 or g.numel() % word == 0:
                yield g.reshape(-1, word).flip(1).reshape(g.shape)

    return _scaled(case, change)


def off_grid(case: Case) -> Hypotheses:
    """Shards of rows or columns, no multiple of 128, that took their scales counted from their own edge."""
    for form in case.forms:
        if form.block != (BLOCK, BLOCK):
            continue
        for axis, size in ((0, case.good.rows), (1, case.good.columns)):
            for parts in PARTS:
                width = size // parts
                if size % parts or width % BLOCK == 0 or width < 2:
                    continue
                place = torch.arange(size)
                shard, inside = place // width, (place % width) // BLOCK
                last = form.factors.shape[axis] - 1
                for start in (
                    (shard * width) // BLOCK,
                    shard * -(-width // BLOCK),
                    (shard * width + BLOCK // 2) // BLOCK,
                ):
                    index = (start + inside).clamp_max(last)
                    yield lambda band, form=form, axis=axis, index=index: _indexed(form, axis, index, band)  # type: ignore[misc]


def _indexed(form: Form, axis: int, index: Tensor, band: int) -> Tensor:
    """A band whose elements take the scale of block `index` along one axis."""
    codes = CODES[form.codes(band).int()]
    if axis == 1:
        return codes * form.factors[band : band + 1].index_select(1, index)
    mine = form.factors[index[band * BLOCK : band * BLOCK + len(codes)]]
    return codes * mine.repeat_interleave(BLOCK, 1)[:, : codes.shape[1]]
