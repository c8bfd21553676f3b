"""From any model folder that can be read to any layout of UE8M0-FP8, saying what it cost.

Weights that were trained on the grid lie there already: conversion only writes them down, and the
result is labelled `on-grid`. Any other model is rounded once, here, and labelled `rounded` with the
number of tensors that changed and the signal-to-noise ratio. FP8 and FP4 sources are respelled
exactly; where they cannot be, they are refused, since rounding a second time loses 3 dB that a BF16
source would keep, unless the caller insists: then the label is `lossy`. The same values come out
whatever the layout.

Tensors are read, rounded, hashed and written in units of a few bands by several threads, each with
its own buffers: memory does not depend on the model. A conversion that is killed goes on where it was.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from ottava.artifact import write_json
from ottava.checkpoint import ascend, engines
from ottava.checkpoint.digest import Digest, Progress
from ottava.checkpoint.layouts import (
    LAYOUTS,
    NEEDS_MASTER,
    Weight,
    finish,
    quantisation_of,
    read_config,
    tensors_of,
    weights,
)
from ottava.checkpoint.names import COMPANIONS, Storage, storage_of
from ottava.checkpoint.resume import Part, Record, check_free, part_of
from ottava.checkpoint.safetensors import INDEX, SHARD_BYTES, head_of, nbytes, read_header, split
from ottava.checkpoint.spelling import WIDEST, Done, Place, Task, convert_unit
from ottava.checkpoint.stream import Reader, Unit, default_workers, shared_out, units
from ottava.errors import CheckpointError

FLOATS = ("BF16", "F16", "F32")
GROUP_BYTES, GROUP_SECONDS = 128 << 20, 3.0
"""How much may be written before it is flushed and noted as done."""

OVERLAY_NOTE = "rounding.json"


@dataclass(frozen=True)
class Options:
    """What is asked for; see `convert`."""

    source: Path
    out: Path
    layout: str = "e8m0"
    overlay: Path | None = None
    workers: int | None = None
    allow_lossy: bool = False
    engine: str | None = None
    tp: int = 1
    exact: bool = False
    flush: bool = True
    shard_bytes: int = SHARD_BYTES
    notes: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(args: Mapping[str, Any]) -> Options:
        """From plain values; None means the default."""
        given: dict[str, Any] = dict(filter(lambda item: item[1] is not None, args.items()))
        for name in {"source", "out", "overlay"} & given.keys():
            given[name] = Path(given[name])
        options = Options(**given)
        if options.layout not in LAYOUTS:
            what = f"unknown layout {options.layout!r}"
            raise CheckpointError(what, where=options.out, fix=f"choose one of {', '.join(LAYOUTS)}")
        check_apart(options.source, options.out)
        return options


def check_apart(source: Path, out: Path) -> None:
    """Raise CheckpointError where one of the two folders is the other, or lies inside it."""
    inner, outer = out.resolve(), source.resolve()
    if inner.is_relative_to(outer):
        what = "the output is the source folder" if inner == outer else "the output lies inside the source folder"
        raise CheckpointError(what, where=out, fix="name a folder beside the source: nothing is written into it")
    if outer.is_relative_to(inner):
        what = "the source lies inside the output folder"
        raise CheckpointError(what, where=out, fix="name a folder beside the source")


@dataclass(frozen=True)
class Plan:
    """What will be written. tensors: by weight, the tensors that spell it; storage: by weight."""

    found: Mapping[str, Weight]
    overlay: Mapping[str, Weight]
    storage: Mapping[str, Storage]
    tensors: Mapping[str, Mapping[str, tuple[str, tuple[int, ...]]]]

    @property
    def quantised(self) -> set[str]:
        return {name for name, storage in self.storage.items() if storage == "fp8"}


@dataclass
class Tally:
    """What became of one weight, or of all. signal, noise: sums of squares over linear weights and their errors."""

    changed: int = 0
    signal: float = 0.0
    noise: float = 0.0

    def add(self, more: Done | Tally) -> None:
        self.changed += more.changed
        self.signal += more.signal
        self.noise += more.noise

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantisation noise, in dB; None where there is no noise."""
        return 10 * math.log10(self.signal / self.noise) if self.noise and self.signal else None


def convert(args: Mapping[str, Any], progress: Progress | None = None) -> dict[str, Any]:
    """Write the model folder args["source"] to the new folder args["out"]; return its conversion.json.

    args, all but the first two optional:
        source, out    folders; layout: one of LAYOUTS, "e8m0" by default
        overlay        a folder of *.safetensors files with BF16 tensors on the grid, under published names: they
                       take the place of the source's linear weights; errors are measured against the source
        workers        threads; allow_lossy: round FP8 and FP4 sources that have no exact form
        engine, tp     refuse shapes that this engine is known to corrupt on so many tensor-parallel devices; for
                       vllm-ascend, write the file by which it knows MXFP8
        exact          refuse to round anything
        flush          False leaves it to the operating system when the bytes reach the disk: for what is soon deleted
        notes          facts for conversion.json that the caller knows
    progress: called with the bytes of source that are done, and all of them.

    Returns {"on_grid", "label": "on-grid" | "rounded" | "lossy", "layout", "digest", "tensors", "quantised",
    "rounded", "sqnr_db", "bytes", "rounding", "warnings"} and the notes: tensors, quantised and rounded count published
    weights, bytes is the size of the folder's tensor files, warnings are sentences about what the source lacks and, for
    vllm-ascend, what rounding lost. An overlay's rounding.json goes with the result.
    Raises CheckpointError or FormatError, naming file and tensor, ResourceError where the disk is too small, Busy
    where `out` is being written; `out` is complete or not there.
    """
    options = Options.of(args)
    config = read_config(options.source)
    before = _state_of(options)
    plan = _plan(options, config)
    with part_of(options.out, flush=options.flush) as part:
        tallies, digests = _write(part, options, plan, before, progress)
        if _state_of(options) != before:
            raise CheckpointError(
                "the source changed while it was read: a folder that is being written",
                where=options.source,
                fix="convert it when it is complete",
            )
        described = options.engine == ascend.ENGINE and options.layout == "mxfp8"
        quantisation = None if described else quantisation_of(options.layout, plan.found, plan.quantised)
        finish(part.folder, options.source, config, quantisation)
        if described:
            write_json(part.folder / ascend.DESCRIPTION, ascend.description(plan.tensors, plan.quantised))
        report = _report(options, plan, tallies, digests)
        report["warnings"] = _warnings(options.source, config)
        report["bytes"] = sum(os.fstat(descriptor).st_size for descriptor in part.files.values())
        if options.engine == ascend.ENGINE:
            report["serve"] = ascend.SERVE[options.layout]
            if report["rounded"]:
                dtypes = {plan.found[name].data.dtype for name in plan.quantised}
                lost = ascend.rounding_cost(report["rounded"], report["tensors"], report["sqnr_db"], dtypes)
                report["warnings"].append(lost)
        report |= options.notes
        if options.overlay is not None and (options.overlay / OVERLAY_NOTE).is_file():
            shutil.copyfile(options.overlay / OVERLAY_NOTE, part.folder / OVERLAY_NOTE)
        write_json(part.folder / "conversion.json", report)
    return report


def check(args: Mapping[str, Any]) -> dict[str, Weight]:
    """Raise what `convert(args)` would raise before its first byte, but for Busy; the source's linear weights.

    For work that is done before a conversion and would be in vain. What only the values tell comes later.
    """
    options = Options.of(args)
    check_free(options.out)
    plan = _plan(options, read_config(options.source))
    return {name: plan.found[name] for name in sorted(plan.quantised)}


def _state_of(options: Options) -> list[list[Any]]:
    """Names, sizes and times of all that is read: a change of any of it makes another task."""
    out = []
    for folder in filter(None, (options.source, options.overlay)):
        names = {path.name for path in folder.glob("*.safetensors")} | {INDEX, "config.json", OVERLAY_NOTE, *COMPANIONS}
        for name in sorted(names):
            if (folder / name).exists():
                found = (folder / name).stat()
                out.append([str(folder.resolve()), name, found.st_size, found.st_mtime_ns])
    return out


def _plan(options: Options, config: Mapping[str, Any]) -> Plan:
    found = weights(options.source)
    storage: dict[str, Storage] = {}
    tensors: dict[str, Mapping[str, tuple[str, tuple[int, ...]]]] = {}
    for name, weight in found.items():
        shape, dtype = weight.shape, weight.data.dtype
        storage[name] = "fp8" if weight.scale is not None else storage_of(name, len(shape))
        if storage[name] == "fp8":
            _check_linear(weight)
            tensors[name] = tensors_of(options.layout, name, (shape[0], shape[1]))
        elif len(shape) > 2 and ".experts." in name:
            raise CheckpointError(
                f"experts fused into one tensor of shape {list(shape)}: a master holds one matrix an expert",
                where=weight.data.where,
                fix="save the model under its published names (save_pretrained does)",
                tensor=name,
            )
        else:
            tensors[name] = {name: (storage[name].upper() if dtype in FLOATS else dtype, shape)}
    plan = Plan(found, _overlay(options.overlay, found, storage), storage, tensors)
    if not plan.quantised:
        raise CheckpointError(
            "no linear weights under published names (model.layers.0.mlp.up_proj.weight, one matrix an expert)",
            where=options.source,
            fix="save the model with save_pretrained, or name another folder",
        )
    if options.engine is not None:
        shapes = {name: (found[name].shape[0], found[name].shape[1]) for name in sorted(plan.quantised)}
        engines.refuse(options.engine, options.layout, config, shapes, options.tp)
    return plan


def _check_linear(weight: Weight) -> None:
    what = None
    if weight.scale is None and weight.data.dtype not in FLOATS:
        what = f"a linear weight of type {weight.data.dtype}"
    elif 0 in weight.shape:
        what = f"a linear weight of shape {list(weight.shape)} is no matrix"
    elif weight.shape[1] > WIDEST:
        what = f"a linear weight of {weight.shape[1]} columns; at most {WIDEST} are read"
    if what is not None:
        raise CheckpointError(what, where=weight.data.where, fix=NEEDS_MASTER, tensor=weight.name)


def _overlay(folder: Path | None, found: Mapping[str, Weight], storage: Mapping[str, Storage]) -> dict[str, Weight]:
    if folder is None:
        return {}
    out: dict[str, Weight] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, entry in read_header(path).items():
            fits = name in found and storage[name] == "fp8" and entry.shape == found[name].shape
            if not fits or entry.dtype != "BF16" or name in out:
                what = "an overlay holds BF16 values of the model's linear weights, each once and in its shape"
                raise CheckpointError(what, where=entry.where, fix="make the overlay from this model", tensor=name)
            out[name] = Weight(entry)
    if not out:
        raise CheckpointError("an overlay without *.safetensors files", where=folder, fix="name another folder")
    return out


def _write(
    part: Part, options: Options, plan: Plan, before: list[list[Any]], progress: Progress | None
) -> tuple[dict[str, Tally], dict[str, bytes]]:
    """Write all tensor files; what became of each weight, and its hash."""
    flat = {name: item for group in plan.tensors.values() for name, item in group.items()}
    files, index = split(flat, options.shard_bytes)
    heads = {file: head_of(tensors) for file, tensors in files.items()}
    sizes = {
        file: (head, len(head) + sum(nbytes(*t) for t in files[file].values())) for file, (head, _) in heads.items()
    }
    kind = {"layout": options.layout, "allow_lossy": options.allow_lossy, "exact": options.exact}
    layout_digest = blake3(b"".join(head for head, _ in heads.values())).hexdigest()
    part.begin({"version": 1, "source": before, "options": kind, "heads": layout_digest}, sizes)
    if index is not None:
        (part.folder / INDEX).write_text(index)
    places = {name: Place(part.files[file], at) for file, (_, offsets) in heads.items() for name, at in offsets.items()}
    tasks = {name: _task(options, plan, name, places) for name in plan.found if name not in part.done}
    for record in _converted(part, tasks, options, plan, progress):
        part.done[record.name] = record
    records = [part.done[name] for name in plan.found]
    tallies = {item.name: Tally(item.changed, item.signal, item.noise) for item in records}
    return tallies, {item.name: bytes.fromhex(item.hash) for item in records}


def _task(options: Options, plan: Plan, name: str, places: Mapping[str, Place]) -> Task:
    return Task(
        plan.found[name],
        plan.storage[name],
        options.layout,
        tuple(places[tensor] for tensor in plan.tensors[name]),
        plan.tensors[name][name][0],
        plan.overlay.get(name),
        not options.exact,
        options.allow_lossy,
    )


def _converted(
    part: Part, tasks: Mapping[str, Task], options: Options, plan: Plan, progress: Progress | None
) -> Iterator[Record]:
    """Convert; the records of the weights, each once its bytes are on disk."""
    total = sum(weight.data.end - weight.data.start for weight in plan.found.values())
    done = total - sum(task.weight.data.end - task.weight.data.start for task in tasks.values())
    results: dict[str, dict[int, Done]] = {name: {} for name in tasks}
    ready: list[Record] = []
    noted, since = done, time.monotonic()

    def work(reader: Reader, unit: Unit) -> tuple[Unit, Done]:
        return unit, convert_unit(reader, tasks[unit.weight.name], unit)

    jobs = (unit for task in tasks.values() for unit in units(task.weight))
    for _, (unit, result) in shared_out(work, jobs, options.workers or default_workers()):
        name = unit.weight.name
        results[name][unit.first] = result
        done += unit.nbytes
        if unit.complete(len(results[name])):
            ready.append(_record(unit.weight, results.pop(name)))
        if ready and (done - noted > GROUP_BYTES or time.monotonic() - since > GROUP_SECONDS):
            part.record(ready)
            yield from ready
            ready, noted, since = [], done, time.monotonic()
        if progress is not None:
            progress(done, total)
    yield from ready  # the files are flushed when the folder is published


def _record(weight: Weight, found: Mapping[int, Done]) -> Record:
    """A weight's line in the log. Units are summed in order, whoever was first."""
    tally, parts = Tally(), [found[index] for index in sorted(found)]
    for done in parts:
        tally.add(done)
    digest = Digest(weight.name, weight.shape, b"".join(done.hashes for done in parts))
    return Record(weight.name, digest.hex, tally.changed, tally.signal, tally.noise)


def _report(options: Options, plan: Plan, tallies: Mapping[str, Tally], digests: Mapping[str, bytes]) -> dict[str, Any]:
    total = Tally()
    for name in plan.found:
        total.add(tallies[name])
    rounded = [name for name in plan.found if tallies[name].changed]
    lossy = any(plan.found[name].scale is not None for name in rounded)
    return {
        "on_grid": not rounded,
        "label": "lossy" if lossy else "rounded" if rounded else "on-grid",
        "layout": options.layout,
        "digest": blake3(b"".join(digests[name] for name in plan.found)).hexdigest(),
        "tensors": len(plan.found),
        "quantised": len(plan.quantised),
        "rounded": len(rounded),
        "sqnr_db": None if total.sqnr_db is None else round(total.sqnr_db, 3),
        "bytes": 0,
        "rounding": _rounding(options.overlay),
    }


def _warnings(source: Path, config: Mapping[str, Any]) -> list[str]:
    """What a folder lacks that is no fault of its values, and that whoever serves it will miss."""
    out = []
    if not (source / "tokenizer.json").is_file():
        out.append("the source has no tokenizer.json: the result cannot be served before one is put beside it")
    if not isinstance(config.get("model_type"), str):
        out.append("the source's config.json names no model_type: engines will not know what model this is")
    return out


def _rounding(overlay: Path | None) -> str:
    if overlay is None:
        return "nearest"
    note = overlay / OVERLAY_NOTE
    return str(read_config(overlay, OVERLAY_NOTE).get("method", "overlay")) if note.exists() else "overlay"
