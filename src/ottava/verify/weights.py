"""The proof that two folders hold the same values and, where they do not, what is wrong with which tensor.

Equal digests are the proof; everything after that serves the person who has to mend the folder. A
verdict is only ever made of digests and of faults that the reader found in a file: whatever else goes
wrong leaves `compare` as an exception.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ottava.checkpoint.convert import convert
from ottava.checkpoint.digest import Digest, digests, model_digest, values_digest
from ottava.checkpoint.layouts import LAYOUTS, PACKED, Weight, weights
from ottava.checkpoint.safetensors import entries
from ottava.checkpoint.stream import default_workers
from ottava.errors import CheckpointError
from ottava.fp8.spec import BLOCK, MX_BLOCK, grid
from ottava.verify import code_faults, relations
from ottava.verify.case import Case
from ottava.verify.causes import BY_LIKENESS, CAUSES, certain, diagnose, observe
from ottava.verify.relations import Model
from ottava.verify.side import Side, bits

Progress = Callable[[int, int], object]

NOBODY = ("lying index",)
"""Causes that name a tensor and are still no fault of that tensor: the folder is not to be trusted at all."""


EITHER_WAY = (
    "flipped bit", "one value overwritten", "one scale changed", "codes read as e4m3fnuz", "scale bias off by one",
)  # fmt: skip
"""Causes that fit both ways, or by accident of a layout only one: they do not tell the sides apart."""


@dataclass
class Opened:
    """One folder as far as it could be read. fault: what the reader found, at one tensor's door."""

    folder: Path
    weights: Mapping[str, Weight] | None = None
    digests: Mapping[str, Digest] | None = None
    fault: CheckpointError | None = None

    @property
    def digest(self) -> str | None:
        """The model's digest; None where the folder could not be read through."""
        return None if self.digests is None else model_digest(self.digests.values())


def compare(
    a: Path | str, b: Path | str, *, workers: int | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Whether two model folders or files, in any layouts, hold the same values.

    Returns {"verdict": "identical" | "different", "digest_a", "digest_b": hex, or None of a folder that is
    damaged, "tensors": how many names the two have, "first_bad": None, or of the first faulty tensor in order of
    name {"tensor": its weight's name, "block": [row, column] of its first bad 128x128 block (None for a vector and
    for a damaged file), "cause": one of `causes.CAUSES`, "certain": whether it is proven (`causes.certain`),
    "faulty": "a" | "b" | None where neither looks the worse, "where": the faulty side's file (None where no side is
    faulty, or has it), "files": {"a", "b": its file there, or None}}}. Names are in order of code point.

    workers: threads. progress: called with bytes done and bytes in all. Memory does not grow with the model; of a
    tensor that differs a few bands are held at a time. Raises CheckpointError where a folder is no checkpoint.
    """
    before_all = [_state(Path(folder)) for folder in (a, b)]
    sides = [_open(Path(a)), _open(Path(b))]
    total = sum(_size(side) for side in sides)
    before = 0
    for side in sides:
        _digest(side, workers or default_workers(), progress and partial(_report, progress, before, total))
        before += _size(side)
    names = {name for side in sides for name in side.weights or ()}
    result: dict[str, Any] = {
        "verdict": "identical",
        "digest_a": sides[0].digest,
        "digest_b": sides[1].digest,
        "tensors": len(names),
        "first_bad": None,
    }
    if any(side.fault for side in sides):
        result |= {"verdict": "different", "first_bad": _damage(sides)}
    elif result["digest_a"] != result["digest_b"]:
        result |= {"verdict": "different", "first_bad": _first_bad(*sides)}
    for side, state in zip(sides, before_all, strict=True):
        if _state(side.folder) != state:
            what = "the folder changed while it was read: something is writing it"
            raise CheckpointError(what, where=side.folder, fix="verify it when it is complete")
    return result


def _state(folder: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the files that matter."""
    files = [folder] if folder.is_file() else sorted([*folder.glob("*.safetensors"), *folder.glob("*.index.json")])
    found = [(path.name, path.stat()) for path in files if path.exists()]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]


def _open(folder: Path) -> Opened:
    try:
        return Opened(folder, weights(folder))
    except CheckpointError as error:
        return Opened(folder, fault=_at_a_tensor(error))


def _at_a_tensor(error: CheckpointError) -> CheckpointError:
    if error.tensor is None or error.cause in NOBODY:
        raise error
    return error


def _size(side: Opened) -> int:
    return sum(weight.data.end - weight.data.start for weight in (side.weights or {}).values())


def _report(progress: Progress, before: int, total: int, done: int, _: int) -> None:
    progress(before + done, total)


def _digest(side: Opened, workers: int, progress: Progress | None) -> None:
    if side.weights is None:
        return
    try:
        side.digests = digests(side.weights, workers, progress)
    except CheckpointError as error:
        side.fault = _at_a_tensor(error)


def _damage(sides: Sequence[Opened]) -> dict[str, Any]:
    """What the reader found, of the first tensor by name."""
    found = [
        (_owner(side.fault.tensor or ""), letter, side)
        for letter, side in zip("ab", sides, strict=True)
        if side.fault is not None
    ]
    tensor, letter, side = min(found, key=lambda item: item[:2])
    assert side.fault is not None
    held = {one: (other.weights or {}).get(tensor) for one, other in zip("ab", sides, strict=True)}
    files = {one: None if weight is None else str(weight.data.path) for one, weight in held.items()}
    files[letter] = (side.fault.where or str(side.folder)).partition(": ")[0]
    return _found(tensor, None, _structural(side.folder, tensor, side.fault), letter, files)


def _owner(name: str) -> str:
    """The weight whose scales a stored tensor holds, or itself."""
    for suffix in ("_scale_inv", "_scale"):
        if name.endswith(".weight" + suffix):
            return name.removesuffix(suffix)
    return name


def _structural(folder: Path, tensor: str, fault: CheckpointError) -> str:
    """The cause of damage; scales that do not fit are looked at again, for what is missing."""
    cause = fault.cause or "unknown"
    if cause not in ("scales of the wrong shape", "scales without codes"):
        return cause
    found = entries(folder)
    scale = next((found[tensor + suffix] for suffix in ("_scale_inv", "_scale") if tensor + suffix in found), None)
    if scale is None or tensor not in found:
        return cause
    data = found[tensor]
    block = MX_BLOCK if scale.name.endswith("_scale") else (BLOCK, BLOCK)
    if len(data.shape) != 2 or len(scale.shape) != 2:
        return cause
    rows, columns = grid(*data.shape, block)
    if scale.shape == (rows, columns):  # the scales fit, so the codes are not what their type says
        return "wrong type" if data.dtype in PACKED or data.dtype != "F8_E4M3" else cause
    known = {(rows - 1, columns): "scale row lost", (rows, columns - 1): "scale column lost"}
    known |= {(columns, rows): "scale grid transposed"}
    if block == MX_BLOCK:
        known[(data.shape[0] // BLOCK * BLOCK, columns)] = "scale row lost"
    return known.get(scale.shape, cause)


def _first_bad(a: Opened, b: Opened) -> dict[str, Any]:
    """The first tensor that differs: where, why, and which side looks faulty."""
    models = [Model(side.weights or {}, side.digests or {}) for side in (a, b)]
    name = next(
        name
        for name in sorted(models[0].digests.keys() | models[1].digests.keys())
        if not all(name in model.digests for model in models)
        or models[0].digests[name].hash != models[1].digests[name].hash
    )
    known, rounding = _recorded(a, b)
    if not all(name in model.digests for model in models):
        return _only_one(name, models, known)
    if models[0].digests[name].shape != models[1].digests[name].shape:
        return _answer(name, models, "wrong shape", known, None)
    bands = _differing(models[0].digests[name], models[1].digests[name])
    sides = [Side(model.weights[name]) for model in models]
    directions = {"b": (0, 1), "a": (1, 0)} if known is None else {known: (0, 1) if known == "b" else (1, 0)}
    cases = {letter: Case(sides[good], sides[bad], bands) for letter, (good, bad) in directions.items()}
    if rounding is not None and _is_rounding(cases[rounding]):
        return _answer(name, models, "rounded onto the grid", rounding, _block(cases[rounding]))
    tries = {
        letter: _hypotheses(name, models[good], models[bad], cases[letter])
        for letter, (good, bad) in directions.items()
    }
    cause, faulty = "unknown", known
    for step in zip(*tries.values(), strict=True):
        found = {letter: one for letter, one in zip(tries, step, strict=True) if one is not None}
        if found:
            cause = min(found.values(), key=list(CAUSES).index)
            by = [letter for letter in found if found[letter] == cause]
            faulty = known or _blamed(cause, by, sides, rounding)
            break
    return _answer(name, models, cause, faulty, _block(next(iter(cases.values()))))


def _blamed(cause: str, by: Sequence[str], sides: Sequence[Side], rounding: str | None) -> str | None:
    """The side that a cause tells to be faulty. by: the sides that it fits.

    Of a rounding and a model off the grid, the model off the grid is not the worse one.
    """
    if cause in BY_LIKENESS:
        return None
    if len(by) == 1 and cause not in EITHER_WAY:
        return by[0]
    return _off_grid(sides) if rounding is None else None


def _is_rounding(case: Case) -> bool:
    """Whether the faulty tensor is the sound one, rounded as the converter rounds."""
    return any(case.fits(predict) for predict in code_faults.rule("464")(case))


def _hypotheses(name: str, good: Model, bad: Model, case: Case) -> Iterator[str | None]:
    """The causes that make the faulty tensor out of the sound one, step by step from the most specific."""
    tried = diagnose(case)
    yield _equal_numbers(case)
    yield _expert(name, next(tried))
    yield relations.borrowed(name, good, bad)
    yield from (_expert(name, cause) for cause in tried)
    yield "scales of another tensor" if relations.foreign_scales(name, case, good) else None
    yield relations.rows(name, case, good)
    yield "stale shard" if relations.whole_file(name, good, bad) else None
    yield "rounded otherwise" if relations.rounded_otherwise(observe(case), case, good, bad) else None
    yield "stale tensor" if relations.resembles(observe(case), case) else None


def _expert(name: str, cause: str | None) -> str | None:
    return "zeroed expert" if cause == "zeroed tensor" and relations.is_expert(name) else cause


def _equal_numbers(case: Case) -> str | None:
    """Hashes that differ over equal numbers: the types are of another kind."""
    floats = [side.weight.scale is not None or side.raw(0).is_floating_point() for side in (case.good, case.bad)]
    return "wrong type" if floats[0] != floats[1] and observe(case).count == 0 else None


def _off_grid(sides: Sequence[Side]) -> str | None:
    """The one side whose values lie off the grid while the other's lie on it."""
    on = [side.form(other) is not None for side, other in (sides, sides[::-1])]
    return None if on[0] == on[1] else "b" if on[0] else "a"


def _only_one(name: str, models: Sequence[Model], known: str | None) -> dict[str, Any]:
    """A tensor of one folder alone. Unless the digests on record say otherwise, a is what b should be."""
    having = next(model for model in models if name in model.digests)
    missing = (having is models[0]) != (known == "a")
    cause = "missing tensor" if missing else "extra tensor"
    return _answer(name, models, "tied head forgotten" if relations.tied_head(name, having) else cause, known, None)


def _answer(
    name: str, models: Sequence[Model], cause: str, faulty: str | None, block: list[int] | None
) -> dict[str, Any]:
    both = zip("ab", models, strict=True)
    files = {letter: str(model.file(name)) if name in model.weights else None for letter, model in both}
    return _found(name, block, cause, faulty, files)


def _found(
    tensor: str, block: list[int] | None, cause: str, faulty: str | None, files: Mapping[str, str | None]
) -> dict[str, Any]:
    where = None if faulty is None else files[faulty]
    found = {"tensor": tensor, "block": block, "cause": cause, "certain": certain(cause), "faulty": faulty}
    return {**found, "where": where, "files": dict(files)}


def _differing(a: Digest, b: Digest) -> list[int]:
    return [band for band, (one, other) in enumerate(zip(a.bands, b.bands, strict=True)) if one != other]


def _block(case: Case) -> list[int] | None:
    """The first 128x128 block, in order of rows and then columns, in which values differ; None for a vector."""
    if len(case.good.shape) < 2:
        return None
    band = case.bands[0]
    columns = (bits(case.good.values(band)) != bits(case.bad.values(band))).any(0).nonzero()
    return [band, int(columns[0]) // BLOCK if len(columns) else 0]


def _recorded(a: Opened, b: Opened) -> tuple[str | None, str | None]:
    """What conversion.json tells: the faulty side; or the side that is a rounding, of what may be the other side.

    A folder whose digest is on record is what the converter wrote. The other is faulty where the conversion
    changed no value, or where the other carries this record as well and so should hold the same values.
    """
    sides = (a, b)
    records = [_record(side.folder / "conversion.json") for side in sides]
    on_record = [any(side.digest == record["digest"] for record in records if record) for side in sides]
    if on_record[0] == on_record[1]:
        return None, None
    sound, other = (0, 1) if on_record[0] else (1, 0)
    mine, theirs = records[sound], records[other]
    claims = theirs is not None and theirs["digest"] == sides[sound].digest
    if claims or mine is None or mine.get("label") not in ("rounded", "lossy"):
        return "ab"[other], None
    return None, "ab"[sound]


def _record(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text()) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("digest"), str) else None


def prove_layouts(args: Mapping[str, Any]) -> dict[str, Any]:
    """Write every layout of the master folder args["folder"] under args["scratch"], and digest what was written.

    {"digest": the master's, "layouts": {layout: digest}, "equal"}. Nothing is rounded; each layout is read back from
    disk and removed. Raises CheckpointError.
    """
    folder, scratch = Path(args["folder"]), Path(args["scratch"])
    scratch.mkdir(parents=True, exist_ok=True)
    digest, found = values_digest(folder), {}
    for layout in LAYOUTS:
        out = scratch / layout
        convert({"source": str(folder), "out": str(out), "layout": layout, "exact": True})
        found[layout] = values_digest(out)
        shutil.rmtree(out)
    return {"digest": digest, "layouts": found, "equal": {digest} == set(found.values())}


def compare_folders(args: Mapping[str, Any]) -> dict[str, Any]:
    """`compare` of the folders args["a"] and args["b"], for a stage's worker.

    With {"equal", "different": the name of the first tensor that differs, in a list} beside what it returns.
    """
    result = compare(args["a"], args["b"])
    first = result["first_bad"]
    return {**result, "equal": first is None, "different": [] if first is None else [first["tensor"]]}
