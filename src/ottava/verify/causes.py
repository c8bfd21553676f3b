"""What is wrong with a tensor: hypotheses that are tried out, not guesses.

Each fault that has been seen in the field is written down as a prediction: from the sound tensor it
makes, band by band, the values that a file with this fault would hold. A cause is given only where
the prediction equals the faulty tensor bit for bit, over the whole tensor. The most specific are
tried first; where none fits, the cause is "unknown". Some faults leave the same bytes (`ALIKE`). A few
causes of last resort predict nothing and go by likeness (`BY_LIKENESS`): they are not certain, and never say which
side is faulty.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ottava.fp8.spec import BIAS, BLOCK, E2M1, MX_BLOCK
from ottava.verify.case import Case
from ottava.verify.hypotheses import HYPOTHESES
from ottava.verify.side import POWERS, Form, Side, bits, read_rows, same, spread

CAUSES = {
    # one place
    "flipped bit": "one bit of a weight or of a scale",
    "one scale changed": "one block has another scale (in F32 any number: 3, -1, 0, infinity) and the same codes",
    "one value overwritten": "one element differs in more than one bit",
    # scales
    "scales lost": "every scale was taken for 1: codes without their scales",
    "scale row lost": "the scales of the last row of blocks are missing, zero, one, or the row above's",
    "scale column lost": "the same for the last column of blocks",
    "scale copied as number": "an E8M0 byte b became the number b, not 2**(b - 127)",
    "scale cast to a byte": "the number 2**k was cast to uint8, not stored as its exponent",
    "scale byte 0 read as zero": "byte 0 is 2**-127; shifted into a float32's exponent it reads as 0",
    "scale bias off by one": "every scale is twice or half of what it should be",
    "scale inverted": "divided by the scale where it should be multiplied with",
    "scale applied twice": "multiplied by the scale a second time",
    "scale grid transposed": "rows and columns of a square grid of scales swapped",
    "mn-major scale pack": "a grid of scales stored column by column and read row by row",
    "scale grid shifted": "every scale belongs to the neighbouring block",
    "scale bytes in the wrong order": "packs of four scale bytes read from the other end",
    "scales of another tensor": "the codes are this tensor's, the scales another's",
    "scale split off the block grid": "a shard that is no multiple of 128 counted its scales from its own edge",
    "scale is not a number": "byte 255, or an F32 scale that is NaN",
    # codes
    "codes read as e5m2": "five bits of exponent",
    "codes read as e4m3fnuz": "AMD's E4M3: half of every value, and -0 is NaN",
    "codes read as int8": "two's complement integers",
    "nibbles swapped": "the halves of each byte",
    "byte order swapped": "the bytes of each two- or four-byte word",
    "sign lost": "absolute values",
    "-0 lost": "zeros lost their sign",
    "subnormals flushed to zero": "of E4M3, BF16 or FP16",
    "saturated": "magnitudes above a limit were replaced by the limit",
    "quantised without a scale": "values cast to E4M3 as they are",
    "NaN or infinity introduced": "every element that differs is no finite number",
    # rounding
    "re-quantised by floor": "the OCP rule: floor of the maximum's exponent, large values saturate",
    "re-quantised by ceil-448": "DeepSeek's rule",
    "re-quantised with amax clamped to 1e-4": "DeepGEMM's clamp spoils small blocks",
    "re-quantised in groups of 32": "a scale of its own for each 1x32 group",
    "re-quantised through F32 scales": "amax / 448 as the scale",
    "scale rounded after quantising": "codes made with an F32 scale that was then rounded to a power of two",
    "rounded onto the grid": "the 464 rule itself: the other side was never on the grid",
    "cast to FP16": "overflow and underflow of FP16",
    "rounded to BF16": "F32 values to the nearest BF16",
    "truncated to BF16": "F32 values cut to BF16",
    "bytes reinterpreted as another type": "BF16 read as FP16 or the reverse",
    # places
    "transposed pack": "stored column by column and read row by row",
    "rows permuted": "the same rows in another order",
    "shards in the wrong order": "equal parts of rows or columns in another order (tensor-parallel shards, halves)",
    "wrong fused split": "rows that belong to the tensor it was fused with: q, k, v or gate, up",
    "zeroed tensor": "all zero",
    "zeroed expert": "an expert's tensor, all zero",
    "zero-filled region": "a stretch of zeros in place of data",
    # between tensors
    "experts permuted": "an expert that stands in another's place, which is somewhere else too",
    "expert is another's copy": "an expert overwritten by a copy of another",
    "tensors swapped": "two tensors of one shape under each other's names",
    "copy of another tensor": "the values of another tensor, which is still in its place",
    "tied head forgotten": "the head is the embeddings, or is missing where it equals them",
    "rounded otherwise": "by likeness: only linear weights differ, nearly all values by one step of the grid at most: "
    "one source rounded in two ways (GPTQ and nearest, say), or a version of it a small step away",
    "stale tensor": "by likeness: small differences throughout, as another version of the tensor has",
    "stale shard": "by likeness: every tensor of one file differs, all of the other files are equal: an older file",
    # structure
    "missing tensor": "a name that only the other folder has",
    "extra tensor": "a name that the other folder lacks",
    "wrong shape": "another shape",
    "wrong type": "equal numbers as another kind of type: integers for floats",
    "truncated file": "the file ends before the tensor does",
    "lying header": "a header whose types, shapes and byte ranges do not agree",
    "index and shards disagree": "a tensor stands in another file than the index says, or in none",
    "trailing bytes": "a shard with bytes that belong to no tensor",
    "scales without codes": "scales whose weight is missing",
    "missing shard": "a file that the index names is not there",
    "scales missing": "FP8 codes without scales",
    "scales of the wrong shape": "a grid of scales that does not fit the blocks",
    "unknown": "no hypothesis gives these bytes",
}
"""Every cause that `verify` can name (so the reader of a result can rely on the words), and what it means."""

BY_LIKENESS = ("stale shard", "rounded otherwise", "stale tensor")
"""Causes that no prediction proves, in the order in which they are tried."""

ALIKE = (
    {
        "scale row lost",
        "scale column lost",
        "scales lost",
        "one scale changed",
        "flipped bit",
    },  # grids of one row, one byte
    {"scale row lost", "scale column lost", "zeroed tensor", "zero-filled region"},  # scales read as zero
    {"codes read as e4m3fnuz", "scale bias off by one"},  # half of every value
    {"scale grid transposed", "mn-major scale pack"},  # square grids
    {"wrong fused split", "tensors swapped"},
    {"experts permuted", "tensors swapped"},
)
"""Faults that can leave the same values: only one of each set is named."""


def certain(cause: str) -> bool:
    """Whether a cause is proven where it is named: by its prediction, or by what the reader found in the file."""
    return cause not in (*BY_LIKENESS, "unknown")


def diagnose(case: Case) -> Iterator[str | None]:
    """The causes by which `case.bad` came out of `case.good`: one of CAUSES a step, or None where it does not fit.

    Both sides have one shape. Looks at one tensor alone; `relations` knows what tensors do to each other. The
    first step says whether the tensor is all zero. Two cases can be tried in step.
    """
    (zeroed, predictions), *others = HYPOTHESES
    yield zeroed if any(case.fits(predict) for predict in predictions(case)) else None
    seen = observe(case)
    yield _single(case, seen)
    for cause, hypotheses in others:
        yield cause if any(case.fits(predict) for predict in hypotheses(case)) else None
    yield _regional(seen)


@dataclass
class Seen:
    """What differs: how many elements, where the first and last are in row-major order, and what is there."""

    count: int = 0
    first: int = 0
    last: int = 0
    zero: bool = True  # every element that differs is zero in the faulty tensor
    finite: bool = False  # some element that differs is finite there
    solid: bool = True  # and everything between the first and the last is zero
    signal: float = 0.0
    noise: float = 0.0


def observe(case: Case) -> Seen:
    """Go through the bands that differ."""
    seen = Seen(first=-1)
    for band in case.bands:
        good, bad = case.good.values(band), case.bad.values(band)
        places = (bits(good) != bits(bad)).flatten().nonzero().flatten()
        if not len(places):
            continue
        base = band * BLOCK * case.good.columns
        there = bad.flatten()[places]
        if seen.first < 0:
            seen.first = base + int(places[0])
        seen.last = base + int(places[-1])
        seen.count += len(places)
        seen.zero &= bool((there == 0).all())
        seen.finite |= bool(there.isfinite().any())
        seen.signal += float(good.square().sum())
        seen.noise += float((good - bad).square().sum())
    if seen.zero and seen.count > 1:
        seen.solid = _zeros_between(case.bad, seen.first, seen.last)
    return seen


def _zeros_between(side: Side, first: int, last: int) -> bool:
    width = BLOCK * side.columns
    for band in range(first // width, last // width + 1):
        flat = side.values(band).flatten()
        if bool((flat[max(first - band * width, 0) : last - band * width + 1] != 0).any()):
            return False
    return True


# One element or one scale.


def _single(case: Case, seen: Seen) -> str | None:
    scale = _one_scale(case) if case.bad.coded and case.form is not None else None
    if scale is not None:
        return scale
    if seen.count == 1:
        return _one_element(case, seen.first)
    return None if case.form is None or seen.zero else _one_block(case)


def _one_element(case: Case, place: int) -> str | None:
    row, column = divmod(place, case.good.columns)
    band, row = divmod(row, BLOCK)
    value, width = case.good.values(band)[row, column], 2 if case.bad.weight.packed else 1
    after = case.bad.raw(band)[row, column // width].reshape(1)
    if case.bad.weight.packed:
        return _one_nibble(case, value, case.bad.values(band)[row, column], band * BLOCK + row, column)
    if case.bad.coded:
        if case.good.coded and torch.equal(case.good.raw(band)[row, column].reshape(1), after):
            return None  # by its scale
        form = case.bad.own_form
        scale = spread(form.factors, form.block, band, *case.bad.values(band).shape).expand_as(case.bad.values(band))
        code = (value / scale[row, column]).float().to(torch.float8_e4m3fn)
        before = code.view(torch.uint8).reshape(1)
        if not same(code.double() * scale[row, column], value) or torch.equal(before, after):
            return None  # not by its code
    elif not after.is_floating_point():
        return None
    else:
        before = value.to(after.dtype).reshape(1)
    return "flipped bit" if one_bit(before, after) else "one value overwritten"


def _one_nibble(case: Case, before: Tensor, after: Tensor, row: int, column: int) -> str | None:
    """The same for a packed E2M1 code: its bits are those of the value divided by the scale."""
    assert case.bad.weight.scale is not None
    scale = read_rows(case.bad.weight.scale, row, row + 1)[0, column // MX_BLOCK[1]]
    codes = []
    for value in (before, after):
        magnitude = float(value.abs() / POWERS[int(scale)])
        if magnitude not in E2M1:
            return None
        codes.append(E2M1.index(magnitude) | int(value.signbit()) << 3)
    return "flipped bit" if (codes[0] ^ codes[1]).bit_count() == 1 else "one value overwritten"


def one_bit(before: Tensor, after: Tensor) -> bool:
    """Whether two tensors of one type and one element differ in exactly one bit."""
    pair = (int.from_bytes(bytes(t.contiguous().view(torch.uint8).tolist()), "little") for t in (before, after))
    return (next(pair) ^ next(pair)).bit_count() == 1


def _one_scale(case: Case) -> str | None:
    """A file whose codes are the sound ones and of whose scales one differs."""
    theirs = case.bad.own_form
    form = _at_block(case, theirs.block)
    if form is None or any(not torch.equal(form.codes(i), theirs.codes(i)) for i in case.bands):
        return None
    places = [
        place for place in (bits(form.factors) != bits(theirs.factors)).nonzero() if _tells(theirs, place.tolist())
    ]
    if len(places) != 1:
        return None
    scale = case.bad.weight.scale
    assert scale is not None
    row, column = places[0].tolist()
    before, after = form.factors[row, column], theirs.factors[row, column]
    if bool(after.isnan()):
        return "scale is not a number"
    if scale.dtype == "F32":
        return "flipped bit" if one_bit(before.float().reshape(1), after.float().reshape(1)) else "one scale changed"
    bytes_ = [(torch.log2(t) + BIAS).round().to(torch.uint8).reshape(1) for t in (before, after)]
    return "flipped bit" if one_bit(*bytes_) else "one scale changed"


def _tells(form: Form, place: list[int]) -> bool:
    """Whether a scale stands for anything: over zeros any scale does."""
    (tall, wide), (row, column) = form.block, place
    band, first = divmod(row * tall, BLOCK)
    return bool((form.codes(band)[first : first + tall, column * wide : (column + 1) * wide] & 0x7F).any())


def _at_block(case: Case, block: tuple[int, int]) -> Form | None:
    assert case.form is not None
    return case.form.fine(case.good.rows, case.good.columns) if block == MX_BLOCK else case.form.coarse()


def _one_block(case: Case) -> str | None:
    """Values that are 2**n times the sound ones inside one block, or one 1x32 group, and equal elsewhere."""
    for form in case.forms:
        scale = _ratio(case, form)
        if scale is None:
            continue
        before, after = scale
        flipped = 0 <= after <= 254 and (before ^ after).bit_count() == 1
        return "flipped bit" if flipped else "one scale changed"
    return None


def _ratio(case: Case, form: Form) -> tuple[int, int] | None:
    """The scale byte before and after, of the one block whose values differ."""
    if len(case.bands) != 1:
        return None
    band = case.bands[0]
    good, bad = case.good.values(band), case.bad.values(band)
    rows, columns = (bits(good) != bits(bad)).nonzero().unbind(1)
    first = (band * BLOCK + int(rows.min())) // form.block[0], int(columns.min()) // form.block[1]
    place = int(rows[0]), int(columns[0])
    ratio = bad[place] / good[place]
    mantissa, exponent = torch.frexp(ratio)
    factor = form.factors[first]
    if mantissa != 0.5 or torch.frexp(factor).mantissa != 0.5:
        return None
    changed = form.factors.clone()
    changed[first] = factor * ratio
    if not case.fits(lambda i: form.values(i, changed)):
        return None
    before = int(torch.log2(factor).round()) + BIAS
    return before, before + int(exponent) - 1


def _regional(seen: Seen) -> str | None:
    if not seen.finite:
        return "NaN or infinity introduced"
    if seen.zero and seen.solid and seen.count > 1:
        return "zero-filled region"
    return None
