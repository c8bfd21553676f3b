"""What a chip makes of a model: which form it can be given, exactly, or with how many blocks affected.

The theorem (`ottava.fp8.spec.EXACT`) speaks of all codes at once; a model holds some. So the model
itself is read: its values are looked at block by block, 128x128, and a block counts as affected where
a single value of it would change. What a chip takes is data with sources (`ottava.checkpoint.chips`),
and most of it was read in documents: every answer says how far it has been shown.

This is about values only. What a chip computes with them differs in the order of its sums; and an engine may refuse
or misread a layout of some shapes whatever the chip (`ottava.checkpoint.engines`): those are named beside the answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ottava.checkpoint import chips, engines
from ottava.checkpoint.ascend import ENGINE as ASCEND
from ottava.checkpoint.chips import FORMS, Form, Formats
from ottava.checkpoint.layouts import Weight, weights
from ottava.checkpoint.names import storage_of
from ottava.checkpoint.stream import Band, Reader, bands, exact_rows, matrix, read_scales
from ottava.fp8.codec import dequantise, quantise
from ottava.fp8.spec import BIAS, BLOCK, MX_BLOCK, grid

CAST = ("BF16", "F16")
"""Types of unquantised tensors that are cast to the type a chip computes in. Wider ones are kept as they are."""

_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def examine(folder: Path, chip: str | None = None, *, data: Path | None = None) -> dict[str, dict[str, Any]]:
    """For `chip`, or every chip of the data file, what it can be given of the model in `folder`, in any layout.

    Returns {chip: {"vendor", "evidence", "subnormals", "layouts": {form: answer}, "recommended"}}. An answer is
    {"serves": "exactly" | "lossily" | "no", "blocks_affected", "blocks", "why", "source", "date", "certainty",
    "refused_by"}; blocks_affected is None where the chip does not take the form; refused_by: the engines, on whatever
    chip, that are known to refuse or misread this model's shapes in this layout. `fp16` is answered for chips without
    BF16, and `recommended` is the first form that serves exactly, else the one with the fewest blocks affected, else
    None; it speaks of the chip, not of engines.

    Blocks are 128x128 pieces of the tensors seen as matrices, of those that are quantised or stored in BF16 or
    F16; F32 and integer tensors are kept as they are in every form. Where it is not known whether a chip keeps
    subnormal numbers, blocks that hold some count as affected, and `why` says so. Memory: one band of 128 rows.
    Raises RecipeError for an unknown chip, CheckpointError where the folder is not well-formed.
    """
    known = chips.formats(data)
    chosen = list(known) if chip is None else [chips.named(known, chip)]
    found = weights(folder)
    census = _count(found, half=any(not known[name].takes["bf16"].value for name in chosen))
    shapes = {weight.name: weight.shape for weight in found.values() if _quantised(weight)}
    refused = {form: engines.refusing(form, {}, shapes) for form in FORMS}  # one device divides nothing: no config
    return {chip or name: _of_chip(known[name], census, refused) for name in chosen}


def _quantised(weight: Weight) -> bool:
    """Whether a weight is FP8 or FP4, or a conversion would make it so."""
    return weight.scale is not None or storage_of(weight.name, len(weight.shape)) == "fp8"


@dataclass(frozen=True)
class _Census:
    """Blocks of a model, and how many of them each form changes. quantised: those of FP8 and FP4 and to-be-FP8."""

    blocks: int
    quantised: int
    changed: Counter[str]

    def affected(self, form: Form, half: str, flushes: bool) -> int:
        """Blocks that change in `form` on a chip that computes in `half` and may flush subnormal numbers."""
        ending = "-flushed" if flushes else ""
        plain = self.changed[f"plain-{half}{ending}"]
        if form in _HALVES:
            return plain + self.changed[f"quantised-{form}{ending}"]
        return plain + (self.quantised if form == "int8" else self.changed[form])


def _of_chip(formats: Formats, census: _Census, refused: Mapping[Form, list[str]]) -> dict[str, Any]:
    half = "bf16" if formats.takes["bf16"].value else "fp16"
    asked = [form for form in FORMS if form != "fp16" or half == "fp16"]
    ascend = formats.vendor == "Huawei"
    engine = {form: [name for name in refused[form] if ascend or name != ASCEND] for form in asked}
    answers = {form: {**_answer(form, half, formats, census), "refused_by": engine[form]} for form in asked}
    served = [form for form in answers if answers[form]["serves"] != "no"]
    best = min(served, key=lambda form: answers[form]["blocks_affected"], default=None)  # of equals the first
    return {
        "vendor": formats.vendor,
        "evidence": formats.evidence,
        "subnormals": formats.subnormals.value,
        "layouts": answers,
        "recommended": best,
    }


def _answer(form: Form, half: str, formats: Formats, census: _Census) -> dict[str, Any]:
    statement, subnormals = formats.takes[form], formats.subnormals.value
    affected: int | None = None
    if statement.value:
        affected = census.affected(form, half, flushes=subnormals != "kept")
        certain = census.affected(form, half, flushes=False)
        serves, why = _judged(form, affected, certain, subnormals)
    else:
        serves, why = "no", "the chip does not take it, as far as is known"
    provenance = {"source": statement.source, "date": statement.date, "certainty": statement.certainty}
    return {"serves": serves, "blocks_affected": affected, "blocks": census.blocks, "why": why, **provenance}


_CHANGES = {
    "e8m0": "hold values that are no E4M3 codes times one power of two",
    "deepseek": "hold values that are no E4M3 codes times one scale",
    "mxfp8": "hold a group of 32 whose values are no E4M3 codes times one power of two",
    "bf16": "hold values that BF16 has not",
    "fp16": "hold values that FP16 has not",
    "int8": "are rounded to integers, whatever they hold; activations are rounded too",
}


def _judged(form: Form, affected: int, certain: int, subnormals: str) -> tuple[str, str]:
    if not affected and form == "int8":  # no weight here has a name by which it is known for one that is rounded
        return "lossily", "which weights are rounded to integers is the engine's choice; activations are rounded too"
    if not affected:
        return "exactly", "every value is one that the form has, and none is a subnormal number"
    reasons = [f"{certain} blocks {_CHANGES[form]}"] if certain else []
    if affected > certain:
        doubt = "which this chip flushes to zero" if subnormals == "flushed" else "and whether it keeps them is unknown"
        reasons.append(f"{affected - certain} more hold subnormal numbers, {doubt}")
    return "lossily", "; ".join(reasons)


def _count(found: dict[str, Weight], *, half: bool) -> _Census:
    """half: look at FP16 too, which mostly needs the codes where BF16 needs the scales alone."""
    totals: Counter[str] = Counter()
    with Reader() as reader:
        for weight in found.values():
            quantised = _quantised(weight)
            if not quantised and weight.data.dtype not in CAST:
                continue
            kind = "quantised" if quantised else "plain"
            for band in bands(weight):
                totals[kind] += grid(band.last - band.first, matrix(weight.shape)[1])[1]
                if quantised:
                    totals.update(_spelled(reader, band))
                totals.update({f"{kind}-{name}": count for name, count in _halved(reader, band, half).items()})
    return _Census(totals["quantised"] + totals["plain"], totals["quantised"], totals)


def _spelled(reader: Reader, band: Band) -> dict[str, int]:
    """Blocks of a band of a quantised weight that have no spelling in each of the FP8 layouts."""
    weight = band.weight
    powers = weight.scale is not None and _powers_of_two(read_scales(reader, weight, band.first, band.last))
    whole = weight.block == (BLOCK, BLOCK)
    if powers and whole:
        return {}
    values = exact_rows(reader, weight, band.first, band.last)
    single = _columns(~_on_grid(values, whole_block=True))
    return {
        "e8m0": single,
        "deepseek": 0 if weight.scale is not None and whole else single,
        "mxfp8": 0 if powers else _columns(~_on_grid(values, whole_block=False)),
    }


def _powers_of_two(scales: Tensor) -> bool:
    if scales.dtype in (torch.float32, torch.bfloat16):
        bits = scales.float().view(torch.int32)
        return bool((((bits & 0x7FFFFF) == 0) & (bits > 0) & (bits < 0x7F800000)).all())
    return not bool((scales.view(torch.uint8) == 255).any())


def _on_grid(values: Tensor, *, whole_block: bool) -> Tensor:
    """Which of [rows, columns] values keep their value when their block, or group of 32, is quantised."""
    single = values.float()
    holds = single.isfinite() & (single.to(values.dtype) == values)
    single = torch.where(holds, single, 0.0)
    if whole_block:
        again = dequantise(*quantise(single))
    else:
        rows, columns = single.shape
        width = MX_BLOCK[1]
        groups = torch.nn.functional.pad(single, (0, -columns % width)).reshape(-1, 1, width)
        again = dequantise(*quantise(groups)).reshape(rows, -1)[:, :columns]
    return holds & (again == single)


def _halved(reader: Reader, band: Band, half: bool) -> dict[str, int]:
    """Blocks of a band that BF16 (and FP16) change, with and without the subnormal numbers they flush."""
    weight, wanted = band.weight, ("bf16", "fp16") if half else ("bf16",)
    if weight.scale is not None and weight.block == (BLOCK, BLOCK):
        scales = read_scales(reader, weight, band.first, band.last)
        if _powers_of_two(scales):
            return _by_code(reader, band, _bytes_of(scales)[0], wanted)
    values = exact_rows(reader, weight, band.first, band.last)
    values = values if values.dtype == torch.float64 else values.float()
    out: dict[str, int] = {}
    for name in wanted:
        lost, flushed = _fate(values, name)
        out[name] = _columns(lost)
        out[name + "-flushed"] = _columns(lost | flushed)
    return out


def _by_code(reader: Reader, band: Band, scales: list[int], wanted: tuple[str, ...]) -> dict[str, int]:
    """The same for E4M3 blocks with one power of two each: of each block, which codes it holds. Codes are
    read only where some code at that scale would change."""
    out: Counter[str] = Counter()
    doubtful = {name: [n for n, byte in enumerate(scales) if _fates(name)[byte].any()] for name in wanted}
    if not any(doubtful.values()):
        return out
    codes = reader.rows(band.weight.data, band.first, band.last, "data").view(torch.uint8).numpy()
    for name, numbers in doubtful.items():
        for number in numbers:
            worst = int(_fates(name)[scales[number]].take(codes[:, number * BLOCK : (number + 1) * BLOCK]).max())
            out[name] += worst == _LOST
            out[name + "-flushed"] += worst > 0
    return out


_FLUSHED, _LOST = 1, 2


@cache
def _fates(name: str) -> np.ndarray:
    """uint8 [255, 256]: what the type makes of each scale byte and code: nothing, flushes it, or changes it."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    scales = torch.tensor([2.0 ** (byte - BIAS) for byte in range(255)], dtype=torch.float64)
    lost, flushed = _fate(scales[:, None] * codes, name)
    return torch.where(lost, _LOST, torch.where(flushed, _FLUSHED, 0)).to(torch.uint8).numpy()


def _fate(values: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Which values the type has not, and which are subnormal in it. Every type has NaN."""
    dtype = _HALVES[name]
    lost = (values.to(dtype).to(values.dtype) != values) & ~values.isnan()
    return lost, (values.abs() < torch.finfo(dtype).smallest_normal) & (values != 0)


def _bytes_of(scales: Tensor) -> list[list[int]]:
    """Powers of two as E8M0 bytes."""
    wide = scales.dtype in (torch.float32, torch.bfloat16)
    stored = scales.float().view(torch.int32) >> 23 if wide else scales.view(torch.uint8)
    found: list[list[int]] = stored.tolist()
    return found


def _columns(marked: Tensor) -> int:
    """How many of a band's blocks hold a marked element."""
    columns = marked.any(0)
    return int(torch.nn.functional.pad(columns, (0, -len(columns) % BLOCK)).view(-1, BLOCK).any(1).sum())
