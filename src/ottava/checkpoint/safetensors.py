"""The safetensors format, read and written tensor by tensor.

The safetensors library knows F8_E8M0 in some of its loaders and not in others (in 0.8 `safe_open`
and `load_file` for torch do, `load` and the NumPy loader do not), and its writer wants the whole
model in memory. Here a tensor is a range of bytes in a file: it is read when it is asked for,
written when it is made, and never converted; scales are reinterpreted, not cast.

A file is an 8-byte little-endian length, a JSON header of that length, and the data (the format's
description is at https://github.com/huggingface/safetensors). A header comes from strangers, so
everything in it is checked before a byte of data is believed: `read_header` lists what can be wrong.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from ottava.errors import CheckpointError, check_folder, from_os_error

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEADER_LIMIT = 100_000_000
SHARD_BYTES = 5_000_000_000
DIMENSIONS = 16
LYING = "lying header"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

_SHARD = re.compile(r"model-.*-of-.*\.safetensors")
"""How a model's shards are called, and the stale ones of an earlier writing with them."""

Plan = Mapping[str, tuple[str, tuple[int, ...]]]
"""What a file will hold: name -> (dtype as the format calls it, shape)."""

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""What the format calls a type."""


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: bytes start..end of the file at path."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def where(self) -> str:
        """For messages: the file and the tensor."""
        return f"{self.path}: {self.name}"


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one file, by name, in the order in which they lie.

    Raises CheckpointError where the file is missing, no regular file or cut short, its header is larger than
    100 MB, is no JSON or names a tensor twice; where a tensor's type is unknown, or its shape and its
    byte range disagree; and where the ranges overlap, leave holes, or do not end with the file.
    """
    try:
        check_regular(path)
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, HEADER_LIMIT):
                what = f"the file has {size} bytes and claims a header of {length}; the limit is 100 MB"
                _reject(path, what, cause="truncated file" if length < HEADER_LIMIT else LYING)
            text = file.read(length)
    except FileNotFoundError:
        raise CheckpointError("no such file", where=path, fix="check the path", cause="missing file") from None
    except OSError as error:
        raise from_os_error(error, "reading a checkpoint") from error
    entries = [_entry(path, 8 + length, name, item) for name, item in _parse(path, text).items()]
    entries.sort(key=lambda entry: (entry.start, entry.end))
    reached = 8 + length
    for entry in entries:
        if entry.start != reached:
            what = f"its bytes start at {entry.start}, the tensor before it ends at {reached}"
            _reject(entry.where, what, tensor=entry.name)
        reached = entry.end
    if reached > size:
        lost = next(entry for entry in entries if entry.end > size)
        what = f"its bytes end at {lost.end}, the file at {size}: it is cut short"
        _reject(lost.where, what, tensor=lost.name, cause="truncated file")
    if reached < size:
        _reject(path, f"its tensors end at byte {reached}, the file at {size}: more was added", cause="trailing bytes")
    return {entry.name: entry for entry in entries}


def check_regular(path: Path) -> None:
    """Raise CheckpointError where `path` is no regular file, nor a link to one: opening a pipe would wait for ever.

    Raises OSError where there is nothing.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise CheckpointError("this is no regular file", where=path, fix="name a file on a disk, or a link to one")


def entries(folder: Path) -> dict[str, Entry]:
    """The tensors of a model folder (one file, or shards and their index) or of a single file, by name.

    Beside an index, a file that is called as shards are (model-*-of-*.safetensors) must be named in it. Other
    files (adapters, a second spelling of the weights under another name) are no part of the model and are not read.

    Raises CheckpointError, also where index and shards do not agree tensor for tensor, or the index
    names a file outside the folder.
    """
    if not folder.is_dir() and (folder.exists() or folder.suffix == ".safetensors"):
        return read_header(folder)
    check_folder(folder)
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() and index.exists():
        raise CheckpointError(
            "the folder has both a single file and an index of shards", where=folder, fix=f"remove {SINGLE} or {INDEX}"
        )
    if not index.exists():
        if not os.path.lexists(single):
            raise _absent(folder)
        return read_header(single)
    weight_map = _read_index(index)
    for path in sorted(folder.glob("*.safetensors")):
        if _SHARD.fullmatch(path.name) and path.name not in weight_map.values():
            what = "index and shards disagree: the index does not name this file, which is called as a shard is"
            _reject(path, what, cause="lying index")
    found: dict[str, Entry] = {}
    for shard in sorted(set(weight_map.values())):
        for name, entry in _read_shard(folder / shard, weight_map).items():
            if weight_map.get(name) != shard:
                what = f"the index places this tensor in {weight_map.get(name, 'no shard')!r}"
                _reject(entry.where, what, tensor=name, cause="index and shards disagree")
            found[name] = entry
    for name, shard in sorted(weight_map.items()):
        if name not in found:
            what = "the index names a tensor that the shard does not hold"
            _reject(f"{folder / shard}: {name}", what, tensor=name, cause="index and shards disagree")
    return found


def _absent(folder: Path) -> CheckpointError:
    """The error of a folder without safetensors; it tells what looks like a model there."""
    names = sorted(path.name for path in folder.glob("*"))
    pickles = [name for name in names if name.endswith(PICKLES)]
    what = f"there is no model in this folder: neither {SINGLE} nor {INDEX}"
    fix = "name a Hugging Face model folder"
    if any(_SHARD.fullmatch(name) for name in names):
        what = f"there are shards and no {INDEX}, which says which of them belong to the model"
        fix = "fetch the index as well"
    elif pickles:
        what = f"there are no safetensors here, only pickles ({pickles[0]}), and pickles are never read"
        fix = "fetch the model's safetensors, or have its publisher's library write them"
    return CheckpointError(what, where=folder, fix=fix, cause="missing file")


def _read_shard(path: Path, weight_map: Mapping[str, str]) -> dict[str, Entry]:
    """`read_header` of a shard; faults of the file as a whole are laid at its first tensor by name."""
    try:
        return read_header(path)
    except CheckpointError as error:
        if error.tensor is None:
            error.tensor = min(name for name, shard in weight_map.items() if shard == path.name)
            error.cause = "missing shard" if error.cause == "missing file" else error.cause
        raise


def read_bytes(entry: Entry) -> bytearray:
    """The bytes of one tensor, in memory of their own."""
    data = bytearray(entry.end - entry.start)
    view, done = memoryview(data), 0
    try:
        with entry.path.open("rb", buffering=0) as file:
            file.seek(entry.start)
            while done < len(data):
                count = file.readinto(view[done:])
                if not count:
                    cut_short(entry)
                done += count
    except OSError as error:
        raise from_os_error(error, "reading a checkpoint") from error
    return data


def cut_short(entry: Entry) -> NoReturn:
    """Say that a file lost bytes after its header was read."""
    _reject(entry.where, "the file was cut short while it was read", tensor=entry.name, cause="truncated file")


def load(entry: Entry) -> Tensor:
    """One tensor, in its own type (F8_E8M0 as float8_e8m0fnu), in memory of its own."""
    data = read_bytes(entry)
    if not data:
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    return torch.frombuffer(data, dtype=torch.uint8).view(DTYPES[entry.dtype]).reshape(entry.shape)


def read(folder: Path, name: str) -> Tensor:
    """The tensor `name` of a model folder or of a file; to read many, take `entries` once and `load` each."""
    found = entries(folder)
    if name not in found:
        raise CheckpointError(f"there is no tensor {name!r}", where=folder)
    return load(found[name])


def plan_of(tensors: Mapping[str, Tensor]) -> Plan:
    """The plan of a file that holds these tensors as they are."""
    return {name: (NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


def write(path: Path, tensors: Iterable[tuple[str, Tensor]], plan: Plan | None = None) -> None:
    """Write one file, complete or not at all.

    tensors: names and CPU tensors. With a plan they may come in any order and each is written as it
    comes; without one they are gathered first. uint8 stands for F8_E8M0 where the plan says so.
    Equal tensors make equal files. Raises ResourceError where the disk refuses.
    """
    if plan is None:
        gathered = dict(tensors)
        plan, tensors = plan_of(gathered), gathered.items()
    _write({path: plan}, tensors)


def write_folder(
    folder: Path, plan: Plan, tensors: Iterable[tuple[str, Tensor]], *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a model's tensors into a folder: one file, or shards of at most `shard_bytes` and their index.

    tensors come in any order, each is written as it comes. A tensor larger than a shard gets one to itself.
    """
    files, index = split(plan, shard_bytes)
    _write({folder / name: shard for name, shard in files.items()}, tensors)
    if index is not None:
        _replace(folder / INDEX, lambda file: file.write_text(index))


def split(plan: Plan, shard_bytes: int = SHARD_BYTES) -> tuple[dict[str, Plan], str | None]:
    """A model's files, name -> plan, and the text of their index (None where one file holds all of it)."""
    shards: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    filled = 0
    for name in sorted(plan):
        size = nbytes(*plan[name])
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = plan[name]
        filled += size
    if len(shards) == 1:
        return {SINGLE: shards[0]}, None
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    index = {
        "metadata": {"total_size": sum(nbytes(*item) for item in plan.values())},
        "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
    }
    return dict(zip(names, shards, strict=True)), json.dumps(index, indent=1) + "\n"


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; those of a device are copied to the host first."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write(files: Mapping[Path, Plan], tensors: Iterable[tuple[str, Tensor]]) -> None:
    parts = {path: path.with_name(path.name + ".part") for path in files}
    places: dict[str, tuple[Any, int]] = {}
    expected = {name: item for plan in files.values() for name, item in plan.items()}
    try:
        with ExitStack() as stack:
            opened = [stack.enter_context(parts[path].open("wb")) for path in files]
            for file, plan in zip(opened, files.values(), strict=True):
                header, offsets = head_of(plan)
                file.write(header)
                places.update((name, (file, offset)) for name, offset in offsets.items())
            for name, tensor in tensors:
                file, offset = places.pop(name)
                _check_planned(name, tensor, expected[name])
                file.seek(offset)
                file.write(raw(tensor))
            assert not places, f"planned and never given: {sorted(places)}"
            for file in opened:
                file.flush()
                os.fsync(file.fileno())
        for path, part in parts.items():
            os.replace(part, path)
    except OSError as error:
        raise from_os_error(error, "writing a checkpoint") from error
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def _replace(path: Path, fill: Callable[[Path], Any]) -> None:
    part = path.with_name(path.name + ".part")
    try:
        fill(part)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise from_os_error(error, "writing a checkpoint") from error


def head_of(plan: Plan) -> tuple[bytes, dict[str, int]]:
    """The head of a file, and every tensor's offset in it; wide types come first, so that all are aligned."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    reached = 0
    for name in sorted(plan, key=lambda name: (-DTYPES[plan[name][0]].itemsize, name)):
        dtype, shape = plan[name]
        start, reached = reached, reached + nbytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, reached]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + item["data_offsets"][0] for name, item in header.items() if name in plan}


def _check_planned(name: str, tensor: Tensor, planned: tuple[str, tuple[int, ...]]) -> None:
    given = NAMES[tensor.dtype], tuple(tensor.shape)
    bytes_of_e8m0 = given[0] == "U8" and planned[0] == "F8_E8M0"
    assert given == planned or (bytes_of_e8m0 and given[1] == planned[1]), f"{name}: {given}, planned {planned}"


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """The size of a tensor of this type and shape."""
    return DTYPES[dtype].itemsize * math.prod(shape)


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    header = _json(path, text)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _reject(path, "its metadata is no mapping of strings to strings")
    return header


def _json(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            _reject(path, f"it names {name!r} twice")
        return dict(pairs)

    try:
        data = json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        _reject(path, f"it holds no JSON: {error}")
    if not isinstance(data, dict):
        _reject(path, "its JSON is no mapping")
    return data


def _entry(path: Path, base: int, name: str, item: Any) -> Entry:
    where = f"{path}: {name!r}"

    def lies(what: str) -> NoReturn:
        _reject(where, what, tensor=name)

    if not name.isprintable():
        lies("its name holds characters that cannot be printed")
    if not isinstance(item, dict) or set(item) != {"dtype", "shape", "data_offsets"}:
        lies("its entry does not hold exactly dtype, shape and data_offsets")
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        lies(f"unknown type {dtype!r}; known: {', '.join(DTYPES)}")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        lies(f"shape {shape!r} and data_offsets {offsets!r} must be lists of whole numbers, not negative")
    if len(shape) > DIMENSIONS or math.prod(max(size, 1) for size in shape) >= 2**62:
        lies(f"a shape of {len(shape)} dimensions or more elements than any memory holds")
    start, end = offsets
    if end - start != nbytes(dtype, tuple(shape)):
        lies(f"{dtype} of shape {shape} has {nbytes(dtype, tuple(shape))} bytes, its range {end - start}")
    return Entry(path, name, dtype, tuple(shape), base + start, base + end)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _read_index(index: Path) -> dict[str, str]:
    try:
        check_regular(index)
        data = _json(index, index.read_bytes())
    except OSError as error:
        raise from_os_error(error, "reading a checkpoint") from error
    weight_map = data.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        _reject(index, "it has no weight_map", cause="lying index")
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and shard.endswith(".safetensors") and not set(shard) & set("/\\:\0")
        if not plain:
            what = f"{shard!r} is no plain name of a safetensors file beside the index"
            _reject(f"{index}: {name}", what, tensor=name, cause="lying index")
    return weight_map


def _reject(where: str | Path, what: str, *, tensor: str | None = None, cause: str = LYING) -> NoReturn:
    fix = "fetch or write the checkpoint again"
    raise CheckpointError(f"this is no sound checkpoint: {what}", where=where, fix=fix, tensor=tensor, cause=cause)
