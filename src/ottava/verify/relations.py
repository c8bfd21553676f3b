"""What tensors do to each other: swapped, copied, cut at the wrong row, or all of one file at once.

A tensor's band hashes are its contents whatever its name, so most of this is looking up hashes. Only
fused tensors (q, k, v; gate, up) are read again, row by row.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import torch

from ottava.checkpoint.digest import Digest
from ottava.checkpoint.layouts import Weight
from ottava.checkpoint.names import storage_of
from ottava.verify.case import PARTS, Case
from ottava.verify.causes import Seen
from ottava.verify.side import CODES, Form, Side, bits, spread

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("q_a_proj", "kv_a_proj_with_mqa"))
"""Projections that engines keep in one tensor."""

_EXPERT = re.compile(r"^(.*\.experts\.)\d+(\..*)$")

FAR, APART = 0.15, 0.6
"""Of two roundings of one source, how many values may be more than a step apart, and how many apart at all. GPTQ and
rounding to nearest were at 0.03 to 0.10 and 0.2 to 0.35, over layers of SmolLM2 and dampings from 0.001 to 0.5;
rounding toward zero and to nearest are at 0 and 0.5."""

Contents = tuple[tuple[int, ...], bytes]


@dataclass
class Model:
    """One folder: its weights, and their digests."""

    weights: Mapping[str, Weight]
    digests: Mapping[str, Digest]

    def contents(self, name: str) -> Contents:
        """What a tensor holds, whatever its name."""
        return self.digests[name].shape, self.digests[name].joined

    @cached_property
    def holders(self) -> Mapping[Contents, list[str]]:
        """The names under which the same contents stand."""
        found: defaultdict[Contents, list[str]] = defaultdict(list)
        for name in self.digests:
            found[self.contents(name)].append(name)
        return found

    def linear(self, name: str) -> bool:
        """Whether a converter rounds this weight."""
        weight = self.weights[name]
        return weight.scale is not None or storage_of(name, len(weight.shape)) == "fp8"

    def file(self, name: str) -> Path:
        """Where a tensor lies."""
        return self.weights[name].data.path


def borrowed(name: str, good: Model, bad: Model) -> str | None:
    """The cause where the faulty tensor holds exactly what another sound one does; None where it does not."""
    others = [other for other in good.holders.get(bad.contents(name), []) if other != name]
    if not others:
        return None
    kin = [other for other in others if _kind(other) == _kind(name)]
    moved = good.contents(name) in bad.holders  # what should stand here stands elsewhere
    if _EXPERT.match(name) and kin:
        return "experts permuted" if moved else "expert is another's copy"
    if any(bad.contents(other) == good.contents(name) for other in others if other in bad.digests):
        return "tensors swapped"  # each in the other's place
    if name.endswith("lm_head.weight") and any(other.endswith("embed_tokens.weight") for other in others):
        return "tied head forgotten"
    if moved and any(other in others for other in fused_with(name)):
        return "wrong fused split"
    return "tensors swapped" if moved else "copy of another tensor"


def _kind(name: str) -> str:
    """A tensor's name without the number of its expert."""
    return _EXPERT.sub(r"\1*\2", name)


def is_expert(name: str) -> bool:
    """Whether a tensor belongs to a routed expert."""
    return _EXPERT.match(name) is not None


def tied_head(name: str, having: Model) -> bool:
    """Whether a tensor that only one folder has is a head that equals that folder's embeddings."""
    if not name.endswith("lm_head.weight"):
        return False
    same = having.holders[having.contents(name)]
    return any(other.endswith("embed_tokens.weight") for other in same)


def fused_with(name: str) -> list[str]:
    """The names of the tensors with which an engine fuses this one, in order, itself among them; else none."""
    parts = name.split(".")
    if len(parts) < 2:
        return []
    for group in FUSED:
        if parts[-2] in group:
            return [".".join([*parts[:-2], other, parts[-1]]) for other in group]
    return []


def whole_file(name: str, good: Model, bad: Model) -> bool:
    """Whether exactly the tensors of one of the faulty folder's files differ, and there are several files."""
    file = bad.file(name)
    inside = {other for other in bad.weights if bad.file(other) == file}
    differ = _differing(good, bad)
    return len(inside) > 1 and inside == differ and len(differ) < len(bad.digests)


def _differing(good: Model, bad: Model) -> set[str]:
    """The names under which the faulty folder holds other values than the sound one, or the only ones."""
    return {
        name for name in bad.digests if name not in good.digests or bad.digests[name].hash != good.digests[name].hash
    }


def rows(name: str, case: Case, good: Model) -> str | None:
    """The cause where every row of the faulty tensor is a row of the sound one, or of those that it is fused with."""
    if case.good.rows < 2 or len(case.good.shape) < 2:
        return None
    group = [other for other in fused_with(name) if other in good.weights] or [name]
    sides = {other: case.good if other == name else Side(good.weights[other]) for other in group}
    sides = {other: side for other, side in sides.items() if side.columns == case.good.columns}
    found = _sources(name, _keys_of_values(case.bad), {n: _keys_of_values(side) for n, side in sides.items()})
    if found is None:
        found = _sources_of_codes(name, case, sides)
    if found is None:
        return _codes_in_parts(case)
    if any(source != name for source, _ in found):
        return "wrong fused split"
    order = [row for _, row in found]
    if sorted(order) != list(range(len(order))):
        return None  # rows of its own, some of them twice: nothing that is known
    return "shards in the wrong order" if _in_parts(order) else "rows permuted"


def _keys_of_values(side: Side) -> list[bytes]:
    return [key for band in range(side.bands) for key in _keys(bits(side.values(band)))]


def _keys_of_codes(form: Form, bands: int) -> list[bytes]:
    return [key for band in range(bands) for key in _keys(form.codes(band))]


def _keys(matrix: torch.Tensor) -> Iterator[bytes]:
    for row in matrix.contiguous().view(torch.uint8).numpy():
        yield blake2b(row.data, digest_size=16).digest()


def _sources(name: str, keys: list[bytes], known: Mapping[str, list[bytes]]) -> list[tuple[str, int]] | None:
    """Which tensor's row each row is; None where one is nobody's."""
    places: dict[bytes, list[tuple[str, int]]] = defaultdict(list)
    for source, theirs in known.items():
        for row, key in enumerate(theirs):
            places[key].append((source, row))
    out: list[tuple[str, int]] = []
    for row, key in enumerate(keys):
        if key not in places:
            return None
        here = places[key]
        mine = [place for place in here if place[0] == name]
        out.append((name, row) if (name, row) in here else (mine or here)[0])
    return out


def _sources_of_codes(name: str, case: Case, sides: Mapping[str, Side]) -> list[tuple[str, int]] | None:
    """The same for codes that moved while the scales stayed where they were."""
    if not case.bad.coded or case.form is None:
        return None
    mine = case.form.coarse()
    theirs = case.bad.own_form.coarse()
    if mine is None or theirs is None or not torch.equal(mine.factors, theirs.factors):
        return None
    forms = {other: mine if other == name else side.form() for other, side in sides.items()}
    known = {other: _keys_of_codes(form, sides[other].bands) for other, form in forms.items() if form is not None}
    return _sources(name, _keys_of_codes(theirs, case.bad.bands), known)


def _in_parts(order: list[int]) -> bool:
    """Whether an order of rows moves equal contiguous parts, or interleaves them."""
    total = len(order)
    for parts in PARTS:
        width = total // parts
        if total % parts:
            continue
        if all(order[i] == order[i // width * width] + i % width for i in range(total)):
            return True
        if order in ([i % parts * width + i // parts for i in range(total)], _dealt(total, parts)):
            return True
    return False


def _dealt(total: int, parts: int) -> list[int]:
    return [row for part in range(parts) for row in range(part, total, parts)]


def _codes_in_parts(case: Case) -> str | None:
    """Equal parts of the rows of codes in another order below scales that stayed, in a file that holds values."""
    if case.form is None:
        return None
    form, total = case.form, case.good.rows
    for parts in PARTS:
        width = total // parts
        if total % parts:
            continue
        for order in (list(range(parts))[::-1], [*range(1, parts), 0], [parts - 1, *range(parts - 1)]):
            index = torch.cat([torch.arange(width) + part * width for part in order])

            def moved(band: int, index: torch.Tensor = index) -> torch.Tensor:
                wanted = index[band * 128 : band * 128 + 128]
                pieces = torch.empty(len(wanted), case.good.columns, dtype=torch.uint8)
                for source in sorted(set((wanted // 128).tolist())):
                    mine = wanted // 128 == source
                    pieces[mine] = form.codes(source)[wanted[mine] - source * 128]
                return form.values(band, codes=CODES[pieces.int()])

            if case.fits(moved):
                return "shards in the wrong order"
    return None


def foreign_scales(name: str, case: Case, good: Model) -> bool:
    """Whether the faulty tensor is this one's codes times the scales of another of the sound folder's."""
    form = case.form
    if form is None:
        return False
    layer = name.split(".")[:3]
    for other, weight in good.weights.items():
        near = (
            _kind(other) == _kind(name) or other.split(".")[:3] == layer or other.split(".")[3:] == name.split(".")[3:]
        )
        if other == name or weight.scale is None or not near or weight.block != form.block:
            continue
        theirs = Side(weight).own_form if Side(weight).coded else None
        if theirs is None or theirs.factors.shape != form.factors.shape or torch.equal(theirs.factors, form.factors):
            continue
        if case.fits(lambda band, factors=theirs.factors: form.values(band, factors)):  # type: ignore[misc]
            return True
    return False


def rounded_otherwise(seen: Seen, case: Case, good: Model, bad: Model) -> bool:
    """Whether two models look like one source that was rounded to the grid in two ways (or not at all, on one side).

    Rounding leaves everything but linear weights alone, and no value that is rounded up here and down there is more
    than a step of the grid apart. GPTQ moves small values further, to make good of large ones' errors: so some are.
    One linear weight of many is no model that was rounded otherwise, nor are a few values of a tensor.
    """
    if not _everywhere(seen, case):
        return False
    linear = {name for name in good.digests if good.linear(name) or (name in bad.weights and bad.linear(name))}
    differ = _differing(good, bad)
    if good.digests.keys() != bad.digests.keys() or not differ <= linear or len(differ) == 1 < len(linear):
        return False
    forms = [form for form in (case.form, case.bad.form(case.good)) if form is not None]
    if not forms:
        return False
    total, far = case.good.rows * case.good.columns, 0
    for band in case.bands:
        a, b = case.good.values(band), case.bad.values(band)
        scales = [spread(form.factors, form.block, band, *a.shape) for form in forms]
        coarse = torch.maximum(scales[0], scales[-1])
        size = torch.maximum(a.abs(), b.abs()) / coarse
        step = torch.exp2(torch.frexp(size).exponent.double().sub(4).clamp_min(-9)) * coarse  # E4M3: 3 bits of fraction
        near = ((a - b).abs() <= step) & (coarse <= 2 * torch.minimum(scales[0], scales[-1]))
        far += int((~near).sum())
    return far <= FAR * total and (len(forms) == 1 or seen.count <= APART * total)


def resembles(seen: Seen, case: Case) -> bool:
    """Whether the tensors differ a little nearly everywhere, as two versions of one tensor do."""
    return _everywhere(seen, case) and seen.noise < seen.signal / 4


def _everywhere(seen: Seen, case: Case) -> bool:
    return len(case.bands) == case.good.bands and seen.count > case.good.rows * case.good.columns / 20
