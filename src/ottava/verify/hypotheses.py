"""What each fault would have made of a sound tensor, as predictions of the faulty one's values.

A prediction maps a band of 128 rows to the float64 values that a file with the fault would hold. The
faults are those that converters, loaders and packers have had (docs/format.md lists them).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ottava.fp8.spec import BLOCK
from ottava.verify import code_faults, scale_faults
from ottava.verify.case import PARTS, Case, Hypotheses
from ottava.verify.side import CODES, Form, Side, same, spread


def _zeroed(case: Case) -> Hypotheses:
    yield lambda band: torch.zeros_like(case.good.values(band))


def _transposed(case: Case) -> Hypotheses:
    """Elements stored column by column and read row by row, or the reverse: values, or codes below their scales."""
    if len(case.good.shape) < 2:
        return
    yield lambda band: _column_major(case.good, case.good.values, band)
    yield lambda band: _row_major(case.good, case.good.values, band)
    for form in case.forms:
        for gather in (_column_major, _row_major):
            yield lambda band, form=form, gather=gather: form.values(  # type: ignore[misc]
                band, codes=CODES[gather(case.good, form.codes, band).int()]
            )


def _column_major(side: Side, read: Callable[[int], Tensor], band: int) -> Tensor:
    """Rows of W.T.reshape(R, C): element p of the result is element (p % R, p // R) of W."""
    first, count = band * BLOCK * side.columns, min(BLOCK, side.rows - band * BLOCK) * side.columns
    left, right = first // side.rows, (first + count - 1) // side.rows + 1
    strip = torch.cat([read(i)[:, left:right] for i in range(side.bands)])
    return strip.T.flatten()[first - left * side.rows :][:count].reshape(-1, side.columns)


def _row_major(side: Side, read: Callable[[int], Tensor], band: int) -> Tensor:
    """Rows of W.reshape(C, R).T: element (r, c) of the result is element c * R + r of W."""
    rows = torch.arange(band * BLOCK, min(band * BLOCK + BLOCK, side.rows))
    places = torch.arange(side.columns)[None] * side.rows + rows[:, None]
    width = BLOCK * side.columns
    out: Tensor | None = None
    for i in range(side.bands):
        mine = places // width == i
        if bool(mine.any()):
            part = read(i)
            out = torch.zeros(places.shape, dtype=part.dtype) if out is None else out
            out[mine] = part.flatten()[places[mine] - i * width]
    assert out is not None
    return out


def _column_shards(case: Case) -> Hypotheses:
    """Equal parts of the columns in another order, with their scales or leaving them behind."""
    reads: list[tuple[Callable[[int], Tensor], Form | None]] = [(case.good.values, None)]
    if case.form is not None:
        reads.append((lambda i, form=case.form: CODES[form.codes(i).int()], case.form))  # type: ignore[misc]
    for parts in PARTS:
        width = case.good.columns // parts
        if case.good.columns % parts or len(case.good.shape) < 2:
            continue
        for read, form in reads:
            order = _order(case, read, form, parts, width)
            if order is not None:
                index = torch.cat([torch.arange(width) + part * width for part in order])
                yield lambda band, read=read, form=form, index=index: _ordered(read, form, index, band)  # type: ignore[misc]


def _order(case: Case, read: Callable[[int], Tensor], form: Form | None, parts: int, width: int) -> list[int] | None:
    """Which part of the sound columns each part of the faulty ones is, by the first band; None where one is none."""
    band = case.bands[0]
    there, here = torch.split(read(band), width, 1), torch.split(case.bad.values(band), width, 1)
    scale = None if form is None else spread(form.factors, form.block, band, *read(band).shape)
    order = []
    for number, part in enumerate(here):
        mine = 1.0 if scale is None else scale[:, number * width : (number + 1) * width]
        found = [i for i in range(parts) if same(there[i] * mine, part)]
        if not found:
            return None
        order.append(number if number in found else found[0])
    return order if sorted(order) == list(range(parts)) else None


def _ordered(read: Callable[[int], Tensor], form: Form | None, index: Tensor, band: int) -> Tensor:
    moved = read(band)[:, index]
    return moved if form is None else form.values(band, codes=moved)


HYPOTHESES: tuple[tuple[str, Callable[[Case], Hypotheses]], ...] = (
    ("zeroed tensor", _zeroed),
    ("rounded to BF16", code_faults.rounded),
    ("truncated to BF16", code_faults.truncated),
    ("-0 lost", code_faults.positive_zero),
    ("scales lost", scale_faults.lost),
    ("scale row lost", scale_faults.edge(0)),
    ("scale column lost", scale_faults.edge(1)),
    ("scale copied as number", scale_faults.as_number),
    ("scale cast to a byte", scale_faults.to_byte),
    ("scale byte 0 read as zero", scale_faults.byte_zero),
    ("scale inverted", scale_faults.inverted),
    ("scale applied twice", scale_faults.twice),
    ("scale grid transposed", scale_faults.grid_transposed),
    ("mn-major scale pack", scale_faults.mn_major),
    ("scale grid shifted", scale_faults.grid_shifted),
    ("scale bytes in the wrong order", scale_faults.pack_reversed),
    ("scale split off the block grid", scale_faults.off_grid),
    ("codes read as e5m2", code_faults.as_type(torch.float8_e5m2)),
    ("codes read as e4m3fnuz", code_faults.as_type(torch.float8_e4m3fnuz)),
    ("scale bias off by one", scale_faults.bias),
    ("codes read as int8", code_faults.as_type(torch.int8)),
    ("codes read as int8", code_faults.as_type(torch.uint8)),
    ("nibbles swapped", code_faults.nibbles),
    ("byte order swapped", code_faults.byte_order),
    ("transposed pack", _transposed),
    ("shards in the wrong order", _column_shards),
    ("sign lost", code_faults.unsigned),
    ("subnormals flushed to zero", code_faults.flushed),
    ("quantised without a scale", code_faults.unscaled),
    ("re-quantised through F32 scales", code_faults.rule("f32")),
    ("rounded onto the grid", code_faults.rule("464")),
    ("re-quantised by ceil-448", code_faults.rule("448")),
    ("re-quantised by floor", code_faults.rule("floor")),
    ("re-quantised with amax clamped to 1e-4", code_faults.rule("clamp")),
    ("scale rounded after quantising", code_faults.rule("late-up", "late-near", "late-down")),
    ("re-quantised in groups of 32", code_faults.rule("464", "448", "floor", "f32", groups=True)),
    ("cast to FP16", code_faults.half),
    ("bytes reinterpreted as another type", code_faults.reinterpreted),
    ("saturated", code_faults.saturated),
)
"""In the order in which they are tried: the first that fits is the cause."""
