"""One folder's version of a weight, read a band of 128 rows at a time, for whoever looks into a difference.

A digest says that two tensors differ; to say how, their codes and scales have to be taken apart. A
tensor that is stored in BF16 has codes and scales too, if its values lie on the grid: they are found
again here, so that a fault in scales is recognised after the values were multiplied out.

Everything is float64, in which every value of every layout is exact. Shapes: a tensor is a matrix
[R, C], C its last dimension (1-D: one row).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ottava.checkpoint.layouts import Weight
from ottava.checkpoint.safetensors import Entry
from ottava.checkpoint.stream import Band, Reader, matrix, values
from ottava.errors import FormatError
from ottava.fp8.codec import quantise
from ottava.fp8.spec import BIAS, BLOCK, MX_BLOCK

CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
"""The value of every E4M3 code."""

POWERS = torch.tensor([2.0 ** (byte - BIAS) for byte in range(255)] + [math.nan], dtype=torch.float64)
"""The value of every E8M0 byte."""

KEPT = 32 << 20
"""Bytes of a tensor that are kept at once, for each kind of thing that is kept."""

FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class Form:
    """A weight as codes and scales. codes(i): uint8 [rows of band i, C]; factors: float64, one for each block."""

    codes: Callable[[int], Tensor]
    factors: Tensor
    block: tuple[int, int]

    def values(self, band: int, factors: Tensor | None = None, codes: Tensor | None = None) -> Tensor:
        """A band's values, with other factors or other codes (as values, float64) if given."""
        value = CODES[self.codes(band).int()] if codes is None else codes
        return value * spread(self.factors if factors is None else factors, self.block, band, *value.shape)

    def coarse(self) -> Form | None:
        """The same in 128x128 blocks; None where scales differ inside one."""
        tall, wide = self._ratio((BLOCK, BLOCK), self.block)
        factors = self.factors[::tall, ::wide].contiguous()
        again = factors.repeat_interleave(tall, 0)[: self.factors.shape[0]]
        again = again.repeat_interleave(wide, 1)[:, : self.factors.shape[1]]
        return Form(self.codes, factors, (BLOCK, BLOCK)) if same(again, self.factors) else None

    def fine(self, rows: int, columns: int) -> Form:
        """The same in 1x32 blocks, each scale repeated."""
        tall, wide = self._ratio(self.block, MX_BLOCK)
        factors = self.factors.repeat_interleave(tall, 0)[:rows]
        factors = factors.repeat_interleave(wide, 1)[:, : -(-columns // MX_BLOCK[1])]
        return Form(self.codes, factors.contiguous(), MX_BLOCK)

    @staticmethod
    def _ratio(large: tuple[int, int], small: tuple[int, int]) -> tuple[int, int]:
        return large[0] // small[0], large[1] // small[1]


class Side:
    """A weight of one folder. columns, rows: of its matrix; bands: how many times 128 rows it has."""

    def __init__(self, weight: Weight):
        self.weight, self.entry = weight, weight.data
        self.shape = weight.shape
        self.rows, self.columns = matrix(self.shape)
        self.bands = -(-self.rows // BLOCK) if self.columns else 0
        self.coded = weight.scale is not None and weight.data.dtype == "F8_E4M3"
        self.kept = max(KEPT // max(BLOCK * self.columns * 8, 1), 2)
        self.raw = lru_cache(self.kept)(self._raw)
        self.values = lru_cache(self.kept)(self._values)

    def _raw(self, band: int) -> Tensor:
        """A band's elements as they are stored (FP8 as uint8)."""
        return read_rows(self.entry, band * BLOCK, min(band * BLOCK + BLOCK, self.rows))

    def _values(self, band: int) -> Tensor:
        """A band's exact values, float64 [rows, C]."""
        first = band * BLOCK
        return values(Band(self.weight, band, first, min(first + BLOCK, self.rows))).double()

    @cached_property
    def own_form(self) -> Form:
        """Codes and scales as they are stored. Only for a side that is `coded`."""
        scale = self.weight.scale
        assert scale is not None
        stored = read_rows(scale, 0, scale.shape[0])
        factors = POWERS[stored.int()] if stored.dtype == torch.uint8 else stored.double()
        return Form(self.raw, factors, self.weight.block)

    def form(self, other: Side | None = None) -> Form | None:
        """Codes and scales: as stored, else found again (with the scales of `other` where they fit its codes).

        None where the values lie on no grid that is known.
        """
        if self.coded:
            return self.own_form
        if not (self.weight.packed or self.entry.dtype in FLOATS) or len(self.shape) != 2 or 0 in self.shape:
            return None
        hint = other.own_form.coarse() if other is not None and other.coded else None
        rows: list[Tensor] = []
        for band in range(self.bands):
            found = _on_grid(self.values(band), hint.codes(band) if hint is not None else None)
            if found is None:
                return None
            rows.append(found[1])

        @lru_cache(self.kept)
        def codes(band: int) -> Tensor:
            again = _on_grid(self.values(band), hint.codes(band) if hint is not None else None)
            assert again is not None
            return again[0]

        return Form(codes, torch.cat(rows), (BLOCK, BLOCK))

    def held(self, values: Tensor) -> Tensor:
        """What this side's file would hold of `values`: its own type's nearest; FP8 must hold them exactly."""
        dtype = FLOATS.get(self.entry.dtype)
        return values if dtype is None else values.float().to(dtype).double()


def bits(values: Tensor) -> Tensor:
    """float64 as integers, for comparison bit by bit; every NaN is the same."""
    return torch.where(values.isnan(), torch.full_like(values, math.nan), values).view(torch.int64)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether float64 values are equal bit by bit; every NaN is the same."""
    if torch.equal(a.contiguous().view(torch.int64), b.contiguous().view(torch.int64)):
        return True
    return bool(a.isnan().any()) and torch.equal(bits(a), bits(b))


def spread(factors: Tensor, block: tuple[int, int], band: int, rows: int, columns: int) -> Tensor:
    """The scale of each element of a band: [rows or 1, columns]."""
    if block[0] == BLOCK:
        mine = factors[band : band + 1]
    else:
        first = band * BLOCK
        mine = factors[first // block[0] : -(-(first + rows) // block[0])].repeat_interleave(block[0], 0)[:rows]
    return mine.repeat_interleave(block[1], 1)[:, :columns]


def read_rows(entry: Entry, first: int, last: int) -> Tensor:
    """Rows first..last of a tensor as it is stored, in memory of their own; 8-bit floats as uint8."""
    with Reader() as reader:
        stored = reader.rows(entry, first, last, "rows").clone()
    return stored.view(torch.uint8) if entry.dtype.startswith("F8_") else stored


def _on_grid(values: Tensor, hint: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Codes (uint8) and factors [1, blocks] of a band of values; None where they have none."""
    if hint is not None:
        found = _fitted(values, hint)
        if found is not None:
            return found
    try:
        codes, scales = quantise(values.float())
    except FormatError:
        return None
    bytes_, factors = codes.view(torch.uint8), POWERS[scales.int()]
    again = CODES[bytes_.int()] * spread(factors, (BLOCK, BLOCK), 0, *values.shape)
    return (bytes_, factors) if same(again, values) else None


def _fitted(values: Tensor, hint: Tensor) -> tuple[Tensor, Tensor] | None:
    """The factors by which most of the codes in `hint` become `values`, and the codes that do so exactly.

    A block's scale is not a function of its values (rounding with calibration leaves other maxima
    than plain rounding does), so that the other side's codes tell which scale was meant.
    """
    columns = values.shape[1]
    factors = torch.ones(1, -(-columns // BLOCK), dtype=torch.float64)
    ratios = values.abs() / CODES[hint.int()].abs()
    for block in range(factors.shape[1]):
        inside = ratios[:, block * BLOCK : (block + 1) * BLOCK]
        known = inside[inside.isfinite() & (inside > 0)]
        known = known[torch.frexp(known).mantissa == 0.5]  # powers of two
        if len(known):
            factors[0, block] = known.mode().values
    codes = (values / spread(factors, (BLOCK, BLOCK), 0, *values.shape)).float().to(torch.float8_e4m3fn)
    bytes_ = codes.view(torch.uint8)
    again = CODES[bytes_.int()] * spread(factors, (BLOCK, BLOCK), 0, *values.shape)
    return (bytes_, factors) if same(again, values) else None
