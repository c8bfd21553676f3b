"""Reading and writing safetensors against the library and against attacks; digests, layouts and their proof."""

from __future__ import annotations

import errno
import json
import os
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ottava.checkpoint import safetensors as st_files
from ottava.checkpoint import stream
from ottava.checkpoint.convert import convert
from ottava.checkpoint.digest import digests, model_digest, values_digest
from ottava.checkpoint.layouts import LAYOUTS, MASTER_CONFIG, exact, read_config, weights
from ottava.checkpoint.safetensors import DTYPES, SINGLE, entries, load, plan_of, read, read_header, write
from ottava.checkpoint.safetensors import write_folder as write_model
from ottava.errors import CheckpointError, OttavaError, ResourceError
from ottava.fp8.codec import quantise

UP, DOWN, NORM = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight", "model.norm.weight"
BIAS = "model.layers.0.mlp.gate.e_score_correction_bias"
EMBED = "model.embed_tokens.weight"


def as_bytes(t: Tensor) -> bytes:
    return bytes(st_files.raw(t))


def tensors_of_every_type() -> dict[str, Tensor]:
    torch.manual_seed(0)
    out = {name: torch.randint(0, 2, (3, 5)).to(dtype) for name, dtype in DTYPES.items() if name != "F8_E8M0"}
    out["F8_E8M0"] = torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu).reshape(16, 16)
    out |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "odd": torch.arange(7, dtype=torch.uint8)}
    return out


def tiny_master(folder: Path, seed: int = 0) -> Path:
    """A folder of two FP8 weights with ragged blocks, a zero block among them, and three others."""
    torch.manual_seed(seed)
    up = torch.randn(130, 200) * torch.exp(torch.randn(130, 1))
    up[:128, :128] = 0
    tensors = {
        NORM: torch.randn(7).bfloat16(),
        EMBED: torch.randn(9, 4).bfloat16(),
        BIAS: torch.randn(4),
    }
    for name, w in ((UP, up), (DOWN, torch.randn(3, 40) * 1e-3)):
        tensors[name], scales = quantise(w)
        tensors[name + "_scale_inv"] = scales.view(torch.float8_e8m0fnu)
    save(folder, tensors, {"model_type": "llama", "torch_dtype": "bfloat16", "quantization_config": MASTER_CONFIG})
    (folder / "tokenizer.json").write_text("{}")
    return folder


def save(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    write(folder / SINGLE, tensors.items())
    (folder / "config.json").write_text(json.dumps(config or {}))
    return folder


def rewrite(folder: Path, **changes: Tensor) -> None:
    """Replace tensors of a folder; dots in names are written as '__'."""
    tensors = {name: load(entry) for name, entry in entries(folder).items()}
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    write(folder / SINGLE, tensors.items())


# The format, against the library.


def test_what_is_written_is_read(tmp_path: Path) -> None:
    tensors = tensors_of_every_type()
    write(tmp_path / "a.safetensors", tensors.items())
    found = read_header(tmp_path / "a.safetensors")
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        again = load(found[name])
        assert (again.dtype, again.shape) == (tensor.dtype, tensor.shape)
        assert as_bytes(again) == as_bytes(tensor)
        assert found[name].start % tensor.dtype.itemsize == 0


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    tensors = tensors_of_every_type()
    path = tmp_path / "a.safetensors"
    write(path, tensors.items())
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            again = file.get_tensor(name)
            assert (again.dtype, again.shape, as_bytes(again)) == (tensor.dtype, tensor.shape, as_bytes(tensor))


def test_we_read_what_the_library_writes(tmp_path: Path) -> None:
    tensors = tensors_of_every_type()
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(tensors, path, {"note": "ours is ignored"})
    for name, tensor in tensors.items():
        again = read(path, name)
        assert (again.dtype, again.shape, as_bytes(again)) == (tensor.dtype, tensor.shape, as_bytes(tensor))


def test_scale_bytes_are_reinterpreted_and_never_cast(tmp_path: Path) -> None:
    scales = torch.arange(256, dtype=torch.uint8).reshape(4, 64)
    write(tmp_path / "a.safetensors", [("s", scales)], {"s": ("F8_E8M0", (4, 64))})
    assert torch.equal(read(tmp_path / "a.safetensors", "s").view(torch.uint8), scales)


def test_equal_tensors_make_equal_files_in_any_order(tmp_path: Path) -> None:
    tensors = tensors_of_every_type()
    write(tmp_path / "a", tensors.items())
    write(tmp_path / "b", reversed(tensors.items()), plan_of(tensors))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_shards(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(7)}
    write_model(tmp_path, plan_of(tensors), reversed(tensors.items()), shard_bytes=100)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [*(f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)), st_files.INDEX]
    assert {name: as_bytes(load(entry)) for name, entry in entries(tmp_path).items()} == {
        name: as_bytes(tensor) for name, tensor in tensors.items()
    }
    weight_map = json.loads((tmp_path / st_files.INDEX).read_text())["weight_map"]
    for name, tensor in tensors.items():
        with safetensors.safe_open(tmp_path / weight_map[name], framework="pt") as file:
            assert torch.equal(file.get_tensor(name), tensor)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        yield "a", torch.zeros(3)
        raise CheckpointError("the source is damaged")

    plan = {"a": ("F32", (3,)), "b": ("F32", (3,))}
    with pytest.raises(CheckpointError):
        write_model(tmp_path, plan, broken(), shard_bytes=12)
    assert list(tmp_path.iterdir()) == []

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="disk full"):
        write(tmp_path / "a", [("a", torch.zeros(3))])
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_was_not_planned_is_a_programmers_mistake(tmp_path: Path) -> None:
    for wrong in (torch.zeros(4), torch.zeros(3, dtype=torch.float16)):
        with pytest.raises(AssertionError):
            write(tmp_path / "a", [("a", wrong)], {"a": ("F32", (3,))})
    with pytest.raises(AssertionError, match="never given"):
        write(tmp_path / "a", [], {"a": ("F32", (3,))})


# Attacks on the reader. Each case is a header and the data behind it; the library must refuse it, too.


def packed(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def item(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


FOUR = b"abcd"
TRUNCATED = "truncated file"
ATTACKS = {
    "empty file": b"",
    "half a length": b"\1\0\0",
    "length beyond the file": packed({"a": item()}, FOUR, length=10**6),
    "huge length": packed({"a": item()}, FOUR, length=2**63),
    "length of all ones": b"\xff" * 8,
    "no JSON": packed(b"{'a': 1}"),
    "not UTF-8": packed(b'{"\xff": 1}'),
    "deep nesting": packed(b"[" * 100_000),
    "a list": packed([1]),
    "a number of many digits": packed(b'{"a": ' + b"9" * 5000 + b"}"),
    "duplicate keys": packed(b'{"a":{"dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4]}}', FOUR),
    "entry is a number": packed({"a": 1}),
    "entry without shape": packed({"a": {"dtype": "U8", "data_offsets": [0, 4]}}, FOUR),
    "unknown type": packed({"a": item("F7")}, FOUR),
    "type is a list": packed({"a": item(["U8"])}, FOUR),
    "negative size": packed({"a": item(shape=[-4])}, FOUR),
    "negative sizes whose product is right": packed({"a": item(shape=[-1, -4])}, FOUR),
    "fractional size": packed({"a": item(shape=[4.0])}, FOUR),
    "size true": packed({"a": item(shape=[True, 4])}, FOUR),
    "size null": packed({"a": item(shape=None)}, FOUR),
    "sizes that overflow": packed({"a": item(shape=[2**32, 2**32, 0], offsets=[0, 0])}),
    "negative offset": packed({"a": item(offsets=[-4, 0])}, FOUR),
    "three offsets": packed({"a": item(offsets=[0, 4, 4])}, FOUR),
    "offsets reversed": packed({"a": item(offsets=[4, 0])}, FOUR),
    "range too short": packed({"a": item("F32", [2], [0, 4])}, FOUR),
    "range too long": packed({"a": item("U8", [2], [0, 4])}, FOUR),
    "out of range": packed({"a": item(shape=[8], offsets=[0, 8])}, FOUR),
    "far out of range": packed({"a": item(offsets=[2**62, 2**62 + 4])}, FOUR),
    "overlap": packed({"a": item(), "b": item(shape=[3], offsets=[1, 4])}, FOUR),
    "same bytes twice": packed({"a": item(), "b": item()}, FOUR),
    "hole": packed({"a": item(shape=[1], offsets=[0, 1]), "b": item(shape=[2], offsets=[2, 4])}, FOUR),
    "hole at the start": packed({"a": item(shape=[2], offsets=[2, 4])}, FOUR),
    "bytes of no tensor": packed({"a": item()}, FOUR + b"#!/bin/sh"),
    "cut short": packed({"a": item()}, FOUR[:3]),
    "no tensors but data": packed({}, FOUR),
    "metadata is a number": packed({"__metadata__": 7, "a": item()}, FOUR),
    "metadata of numbers": packed({"__metadata__": {"x": 7}, "a": item()}, FOUR),
}
OURS_ALONE = {  # the library believes these
    "duplicate names": packed(
        b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
        FOUR,
    ),
    "more keys": packed({"a": item(more=1)}, FOUR),
    "a name that cannot be printed": packed({"a\x00b": item()}, FOUR),
    "half a surrogate": packed(b'{"\\ud800":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', FOUR),
    "too many dimensions": packed({"a": item(shape=[1] * 99 + [4])}, FOUR),
    "more elements than memory": packed({"a": item(shape=[2**61, 2, 0], offsets=[0, 0])}),
}


@pytest.mark.parametrize("name", [*ATTACKS, *OURS_ALONE])
def test_attack_on_a_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    path.write_bytes({**ATTACKS, **OURS_ALONE}[name])
    for reader in (read_header, entries, values_digest):
        with pytest.raises(CheckpointError) as caught:
            reader(path)
        assert str(path) in str(caught.value)
    if name in ATTACKS:
        with pytest.raises(Exception, match=r".+"), safetensors.safe_open(path, framework="pt"):
            pass


def test_attacks_name_the_tensor(tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    for name in ("unknown type", "range too short", "hole at the start"):
        path.write_bytes(ATTACKS[name])
        with pytest.raises(CheckpointError, match=f"{SINGLE}: '?a"):
            entries(tmp_path)


def test_header_larger_than_the_limit(tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    with path.open("wb") as file:
        file.write(struct.pack("<Q", st_files.HEADER_LIMIT + 1))
        file.truncate(st_files.HEADER_LIMIT + 100)
    with pytest.raises(CheckpointError, match="100 MB"):
        read_header(path)


def test_file_cut_short_after_its_header_was_read(tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    path.write_bytes(packed({"a": item()}, FOUR))
    entry = read_header(path)["a"]
    path.write_bytes(packed({"a": item()}, FOUR[:2]))
    with pytest.raises(CheckpointError, match="cut short while"):
        load(entry)


VALID = packed({"a": item(), "bb": item("BF16", [1, 2], [4, 8])}, FOUR + FOUR)


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=3))
def test_a_damaged_file_is_read_inside_its_bounds_or_refused(tmp_path: Path, flips: list[tuple[int, int]]) -> None:
    data = bytearray(VALID)
    for place, value in flips:
        data[place] = value
    path = tmp_path / SINGLE
    path.write_bytes(data)
    try:
        found = read_header(path)
    except CheckpointError:
        return
    assert sum(len(st_files.read_bytes(entry)) for entry in found.values()) <= 8
    for entry in found.values():
        load(entry)


def index_of(weight_map: Any) -> str:
    return json.dumps({"metadata": {}, "weight_map": weight_map})


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "no JSON"),
        ("[]", "no mapping"),
        ("{}", "no weight_map"),
        (index_of({}), "no weight_map"),
        (index_of([]), "no weight_map"),
        (index_of({"a": "../outside.safetensors"}), "no plain name"),
        (index_of({"a": "/etc/passwd"}), "no plain name"),
        (index_of({"a": "sub/one.safetensors"}), "no plain name"),
        (index_of({"a": "..\\one.safetensors"}), "no plain name"),
        (index_of({"a": "c:one.safetensors"}), "no plain name"),
        (index_of({"a": "one.safetensors\0"}), "no plain name"),
        (index_of({"a": "pytorch_model.bin"}), "no plain name"),
        (index_of({"a": 7}), "no plain name"),
        (index_of({"a": "one.safetensors", "b": "one.safetensors", "c": "three.safetensors"}), "no such file"),
        (index_of({"a": "one.safetensors"}), "places this tensor in 'no shard'"),
        (index_of({"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}), "does not hold"),
        (index_of({"a": "two.safetensors", "b": "one.safetensors", "c": "two.safetensors"}), "places this tensor in"),
        ('{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}', "twice"),
    ],
)
def test_attack_on_an_index(index: str, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write(tmp_path / "outside.safetensors", [("a", torch.zeros(1))])
    write(folder / "one.safetensors", [("a", torch.zeros(1)), ("b", torch.zeros(1))])
    write(folder / "two.safetensors", [("c", torch.zeros(1))])
    if message == "does not hold":
        write(folder / "two.safetensors", [])
    (folder / st_files.INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=message):
        entries(folder)


def test_a_shard_that_the_index_does_not_name(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(7)}
    write_model(tmp_path, plan_of(tensors), tensors.items(), shard_bytes=100)
    for name in ("adapter_model.safetensors", "model.fp16-00001-of-00002.safetensors", "extra.safetensors"):
        write(tmp_path / name, [("extra", torch.zeros(1))])
    assert set(entries(tmp_path)) == set(tensors)
    for name in ("model-00005-of-00004.safetensors", "model-00001-of-00009.safetensors"):
        write(tmp_path / name, [("extra", torch.zeros(1))])
        with pytest.raises(CheckpointError, match=f"(?s)index and shards disagree.*{name}") as caught:
            entries(tmp_path)
        assert (caught.value.cause, caught.value.exit_code) == ("lying index", 2)
        (tmp_path / name).unlink()


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    master = tiny_master(tmp_path / "master")
    for name in (SINGLE, "config.json", st_files.INDEX):
        kept = (master / name).read_bytes() if (master / name).exists() else None
        (master / name).unlink(missing_ok=True)
        os.mkfifo(master / name)
        if name == st_files.INDEX:
            (master / SINGLE).unlink()
        with pytest.raises(CheckpointError, match="no regular file"):
            read_config(master) if name == "config.json" else entries(master)
        (master / name).unlink()
        if kept is not None:
            (tmp_path / "blob").write_bytes(kept)
            (master / name).symlink_to(tmp_path / "blob")
            assert read_config(master) if name == "config.json" else entries(master)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="no regular file"):
        entries(tmp_path / "pipe")
    (tmp_path / SINGLE).mkdir()
    with pytest.raises(CheckpointError, match="no regular file"):
        entries(tmp_path)


def test_a_folder_without_safetensors_is_told_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"(?s)pickles are never read.*safetensors"):
        entries(tmp_path)
    write(tmp_path / "model-00001-of-00002.safetensors", [("a", torch.zeros(1))])
    with pytest.raises(CheckpointError, match=r"(?s)no model\.safetensors\.index\.json.*fetch the index"):
        entries(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / f"{name}.safetensors", [("a", torch.zeros(1)), (name, torch.zeros(1))])
    shards = {"a": "one.safetensors", "one": "one.safetensors", "two": "two.safetensors"}
    (tmp_path / st_files.INDEX).write_text(index_of(shards))
    with pytest.raises(CheckpointError, match=r"two\.safetensors: a"):
        entries(tmp_path)


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    for read_it in (entries, read_config):
        with pytest.raises(CheckpointError, match="no model in this folder") as caught:
            read_it(tmp_path)
        assert (caught.value.where, bool(caught.value.fix)) == (str(tmp_path), True)
        with pytest.raises(CheckpointError, match="no such folder") as caught:
            read_it(tmp_path / "nowhere")
        assert (caught.value.where, bool(caught.value.fix)) == (str(tmp_path / "nowhere"), True)
    with pytest.raises(CheckpointError, match="no such file"):
        entries(tmp_path / "nowhere.safetensors")
    (tmp_path / "dangling").mkdir()
    (tmp_path / "dangling" / SINGLE).symlink_to(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="no such file"):
        entries(tmp_path / "dangling")
    (tmp_path / "named.safetensors").mkdir()
    write(tmp_path / "named.safetensors" / SINGLE, [("a", torch.zeros(1))])
    assert list(entries(tmp_path / "named.safetensors")) == ["a"]
    with pytest.raises(CheckpointError, match="this is a file"):
        read_config(tmp_path / "named.safetensors" / SINGLE)
    write(tmp_path / SINGLE, [("a", torch.zeros(1))])
    (tmp_path / st_files.INDEX).write_text(index_of({"a": SINGLE}))
    with pytest.raises(CheckpointError, match="both a single file and an index"):
        entries(tmp_path)
    with pytest.raises(CheckpointError, match="no tensor 'b'"):
        read(tmp_path / SINGLE, "b")


# The digest.


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
KINDS = {"BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "I16": np.int16, "U16": np.uint16, "I32": np.int32}
KINDS |= {"U32": np.uint32, "I64": np.int64, "U64": np.uint64, "F16": np.float16, "F32": np.float32, "F64": np.float64}
KINDS |= {"BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn}


def numpy_digests(folder: Path) -> dict[str, list[bytes]]:
    """The definition by another way: NumPy's own reading and arithmetic in float64, ml_dtypes' types.

    Weight -> [tensor hash, band hashes...].
    """
    data = (folder / SINGLE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    raw = {n: data[8 + length :][slice(*item["data_offsets"])] for n, item in header.items()}
    owners = {n: o for n in header for o in [owner_of(n, header)] if o}
    out: dict[str, list[bytes]] = {}
    for name in sorted(set(header) - set(owners)):
        kind, shape = header[name]["dtype"], header[name]["shape"]
        scale = next((n for n, owner in owners.items() if owner == name), None)
        value = np.frombuffer(raw[name], KINDS[kind]).reshape(shape)
        if scale is not None:
            value = scaled(value, header[scale], raw[scale])
            shape = list(value.shape)
        rows = value.reshape(-1, shape[-1] if shape else 1)
        bands = [spelled(rows[i : i + 128]) for i in range(0, len(rows), 128)] if rows.size else []
        head = json.dumps([name, shape], separators=(",", ":"), ensure_ascii=False).encode() + b"\n"
        out[name] = [blake3(head + b"".join(bands)).digest(), *bands]
    return out


def owner_of(name: str, header: dict[str, Any]) -> str | None:
    for suffix in ("_scale_inv", "_scale"):
        if name.endswith(".weight" + suffix):
            return name.removesuffix(suffix)
    owner = name.removesuffix("scale") + "weight"
    return owner if name.endswith(".scale") and header.get(owner, {}).get("dtype") in ("F8_E4M3", "I8") else None


def scaled(codes: Any, head: dict[str, Any], data: bytes) -> Any:
    if head["dtype"] in ("U8", "F8_E8M0"):
        bytes_ = np.frombuffer(data, np.uint8)
        scales = np.where(bytes_ == 255, np.nan, np.ldexp(1.0, bytes_.astype(int) - 127))
    else:
        scales = np.frombuffer(data, KINDS[head["dtype"]]).astype(np.float64)
    scales = scales.reshape(head["shape"])
    if codes.dtype == np.int8:
        pairs = np.stack([codes.view(np.uint8) & 15, codes.view(np.uint8) >> 4], -1).reshape(len(codes), -1)
        value = np.array([*E2M1, *(-x for x in E2M1)])[pairs]
    else:
        value = codes.astype(np.float64)
    rows, columns = value.shape
    fits = [block for block in ((128, 128), (32, 32), (1, 32))
            if scales.shape == (-(-rows // block[0]), -(-columns // block[1]))]  # fmt: skip
    height, width = fits[0]
    with np.errstate(invalid="ignore", over="ignore"):
        out = value * scales[np.arange(rows) // height][:, np.arange(columns) // width]
    out[np.isnan(out)] = np.nan
    return out


def spelled(band: Any) -> bytes:
    names = {np.dtype(kind): name for name, kind in KINDS.items()}
    if band.dtype == np.float16:
        band = np.where(np.isnan(band), np.float32(np.nan), band.astype(np.float32))
    if band.dtype in (np.float32, np.float64) and not np.isnan(band).any():
        for kind in (ml_dtypes.bfloat16, np.float32):
            with np.errstate(over="ignore"):
                narrow = band.astype(kind)
            if narrow.astype(band.dtype).tobytes() == band.tobytes():
                band = narrow
                break
    return blake3(names[band.dtype].encode() + b"\n" + band.tobytes()).digest()


def numpy_digest(folder: Path) -> str:
    found = numpy_digests(folder)
    return blake3(b"".join(found[name][0] for name in sorted(found))).hexdigest()


def check_digest(folder: Path) -> str:
    """The digest, after it was found to be what the second implementation says, band by band."""
    found = digests(folder)
    assert {name: [item.hash, *item.bands] for name, item in found.items()} == numpy_digests(folder)
    assert list(found) == sorted(found)
    assert model_digest(found.values()) == numpy_digest(folder) == values_digest(folder, workers=3)
    return values_digest(folder)


def relaid(source: Path, out: Path, layout: str) -> Path:
    """`source` in another layout, never rounded."""
    convert({"source": str(source), "out": str(out), "layout": layout, "exact": True})
    return out


def test_the_digest_is_what_it_is_said_to_be(tmp_path: Path) -> None:
    master = tiny_master(tmp_path / "master")
    found = {check_digest(relaid(master, tmp_path / layout, layout)) for layout in LAYOUTS}
    assert found == {check_digest(master)}


def test_the_digest_of_every_type(tmp_path: Path) -> None:
    tensors = {n: t for n, t in tensors_of_every_type().items() if not n.startswith("F8_")}
    torch.manual_seed(0)
    for rows in (1, 127, 128, 129, 576):
        tensors[f"f32 {rows}"] = torch.randn(rows, 3)
        tensors[f"narrow {rows}"] = torch.randn(rows, 3).bfloat16().float()
        tensors[f"f64 {rows}"] = torch.randn(rows, 3).double()
        tensors[f"half {rows}"] = torch.randn(2, rows, 3).half()
    mixed = torch.zeros(300, 2, dtype=torch.float64)  # a band in each type
    mixed[130, 1], mixed[299, 0] = 0.1, torch.tensor(0.1, dtype=torch.float32).double()
    nans = torch.tensor([[1.0, torch.nan]])
    tensors |= {"mixed": mixed, "nan": nans, "nan16": nans.half(), "nan64": nans.double(), "name with ü": mixed[0]}
    check_digest(save(tmp_path / "m", tensors))


def fp8_of_any_scales() -> dict[str, Tensor]:
    torch.manual_seed(1)
    codes = torch.arange(256, dtype=torch.uint8).repeat(150).reshape(150, 256)
    codes = torch.where((codes & 0x7F) == 0x7F, 0, codes)
    nan = codes.clone()
    nan[140, 9] = 0xFF
    any_bytes = torch.randint(0, 256, (150, 8), dtype=torch.uint8)
    f8 = torch.float8_e4m3fn
    return {
        "a.weight": codes.view(f8), "a.weight_scale_inv": torch.rand(2, 2),
        "b.weight": codes.view(f8), "b.weight_scale_inv": torch.tensor([[0.25, -3.0], [torch.inf, 1e-45]]),
        "c.weight": codes.view(f8), "c.weight_scale": any_bytes,
        "d.weight": nan.view(f8), "d.weight_scale_inv": torch.full((2, 2), 120, dtype=torch.uint8),
        "e.weight": codes.view(f8), "e.scale": torch.randint(3, 246, (5, 8), dtype=torch.uint8),
        "f.weight": torch.arange(256, dtype=torch.uint8).view(torch.int8).reshape(2, 128), "f.scale": any_bytes[:2],
        "g.weight": codes.view(f8)[:, :200], "g.weight_scale_inv": torch.tensor([[0.5, 1.0], [2.0, 1.3]]).bfloat16(),
        "h.weight": codes.view(f8), "h.weight_scale_inv": torch.tensor([[2, 0], [247, 255]], dtype=torch.uint8),
    }  # fmt: skip


def in_pieces_of(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make bands of more than `size` bytes too large to be read at once."""
    monkeypatch.setattr("ottava.checkpoint.digest.LARGEST", size)
    monkeypatch.setattr(stream, "LARGEST", size)
    monkeypatch.setattr(stream, "UNIT", size)


def test_the_digest_exists_whatever_the_scales_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path / "m", {name: t.contiguous() for name, t in fp8_of_any_scales().items()})
    digest = check_digest(folder)
    in_pieces_of(12_000, monkeypatch)
    assert check_digest(folder) == digest


def test_bands_larger_than_memory_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    wide = torch.randn(1, 5000)
    narrow = wide.bfloat16().float()
    late = narrow.clone()
    late[0, -1] = 0.1
    tensors = {"wide": wide, "narrow": narrow, "late": late, "half": wide.half(), "line": wide[0].bfloat16()}
    tensors |= {
        "many": torch.randn(3, 5000).double(),
        "int": torch.arange(5000),
        "nan": torch.where(late == 0.1, torch.nan, late),
    }
    folder = save(tmp_path / "m", tensors)
    digest = check_digest(folder)
    in_pieces_of(1000, monkeypatch)
    assert check_digest(folder) == digest


def test_values_of_a_band_are_those_that_are_hashed(tmp_path: Path) -> None:
    tensors = {name: t.contiguous() for name, t in fp8_of_any_scales().items()} | {"x": torch.randn(200, 3)}
    folder = save(tmp_path / "m", tensors)
    found = digests(folder)
    for name, weight in weights(folder).items():
        for band in stream.bands(weight):
            value = stream.values(band)
            head = st_files.NAMES[value.dtype].encode() + b"\n"
            assert blake3(head + as_bytes(value)).digest() == found[name].bands[band.index]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([1, 2, 31, 127, 128, 129, 255, 300, 576]), st.sampled_from([1, 31, 32, 33, 128, 160, 257]))
def test_the_digest_over_shapes(tmp_path: Path, rows: int, columns: int) -> None:
    codes, scales = quantise(torch.randn(rows, columns))
    folder = save(tmp_path / "m", {UP: codes, UP + "_scale_inv": scales, "x": torch.randn(rows, columns)})
    check_digest(folder)


def test_scales_may_be_spelt_three_ways(tmp_path: Path) -> None:
    master = tiny_master(tmp_path / "m")
    digest = values_digest(master)
    for name in (UP, DOWN):
        scales = read(master, name + "_scale_inv").view(torch.uint8)
        for spelling in (scales, torch.ldexp(torch.ones(scales.shape), scales.int() - 127)):
            rewrite(master, **{name + "_scale_inv": spelling})
            assert read(master, name + "_scale_inv").dtype == spelling.dtype
            assert values_digest(master) == digest


def test_sharded_and_single_folders_have_one_digest(tmp_path: Path) -> None:
    master = tiny_master(tmp_path / "m")
    tensors = {name: load(entry) for name, entry in entries(master).items()}
    (tmp_path / "s").mkdir()
    write_model(tmp_path / "s", plan_of(tensors), tensors.items(), shard_bytes=10_000)
    assert len(list((tmp_path / "s").glob("*.safetensors"))) > 1
    assert values_digest(tmp_path / "s") == values_digest(master)


def test_the_digest_tells_zero_from_minus_zero_and_names_from_names(tmp_path: Path) -> None:
    plus, minus = {NORM: torch.zeros(2).bfloat16()}, {NORM: -torch.zeros(2).bfloat16()}
    renamed, reshaped = {NORM + "2": plus[NORM]}, {NORM: plus[NORM][:, None]}
    seen = {values_digest(save(tmp_path / str(i), t)) for i, t in enumerate((plus, minus, renamed, reshaped))}
    assert len(seen) == 4
    assert values_digest(save(tmp_path / "i32", {NORM: torch.zeros(2).int()})) not in seen
    assert values_digest(save(tmp_path / "f32", {NORM: torch.zeros(2)})) == values_digest(tmp_path / "0")


def f32_scales(value: float) -> Tensor:
    out = torch.full((2, 2), 0.25)
    out[1, 0] = value
    return out


def byte_scales(value: int, dtype: torch.dtype = torch.float8_e8m0fnu) -> Tensor:
    out = torch.full((2, 2), 120, dtype=torch.uint8)
    out[1, 0] = value
    return out.view(dtype)


NOT_POWERS = (0.0, -0.0, -0.25, 1.32288, 0.3, 0.25 + 2**-25, torch.inf, -torch.inf, torch.nan, 1e-45)


@pytest.mark.parametrize(
    ("scales", "good"),
    [
        *((byte_scales(b), 3 <= b <= 246) for b in (0, 2, 3, 246, 247, 254, 255)),
        *((byte_scales(b, torch.uint8), 3 <= b <= 246) for b in (2, 3, 246, 247, 255)),
        *((f32_scales(2.0**k), -124 <= k <= 119) for k in (-140, -127, -126, -125, -124, 119, 120, 127)),
        *((f32_scales(bad), False) for bad in NOT_POWERS),
        (f32_scales(0.25).bfloat16(), True),
    ],
)
def test_only_exact_scales_are_believed(scales: Tensor, good: bool, tmp_path: Path) -> None:
    master = tiny_master(tmp_path / "m")
    rewrite(master, **{UP + "_scale_inv": scales})
    check_digest(master)
    weight = weights(master)[UP]
    if good:
        exact(weight)
    else:
        with pytest.raises(CheckpointError, match="quantise from the BF16/FP32 master") as caught:
            exact(weight)
        assert UP in str(caught.value)
        assert caught.value.tensor == UP


@pytest.mark.parametrize(
    "scales",
    [f32_scales(0.25)[:1], f32_scales(0.25).flatten(), f32_scales(0.25)[None], f32_scales(0.25).half()],
    ids=["short", "flat", "deep", "half"],
)
def test_scales_of_another_shape_or_type(scales: Tensor, tmp_path: Path) -> None:
    master = tiny_master(tmp_path / "m")
    rewrite(master, **{UP + "_scale_inv": scales})
    with pytest.raises(CheckpointError, match="quantise from the BF16/FP32 master") as caught:
        weights(master)
    assert caught.value.tensor == UP


def test_a_bad_scale_is_pointed_at(tmp_path: Path) -> None:
    master = tiny_master(tmp_path / "m")
    rewrite(master, **{UP + "_scale_inv": f32_scales(1.5)})
    with pytest.raises(CheckpointError, match=r"(?s)scale of block \(1, 0\) is 1\.5.*mend:.*--allow-lossy"):
        exact(weights(master)[UP])


def test_codes_without_scales_and_scales_without_codes(tmp_path: Path) -> None:
    codes, scales = quantise(torch.randn(4, 4))
    cases: list[tuple[dict[str, Tensor], str]] = [
        ({UP: codes}, "without scales"),
        ({UP + "_scale_inv": scales}, "scales of no FP8 weight"),
        ({UP: torch.ones(4, 4), UP + "_scale_inv": scales}, "scales of no FP8 weight"),
        ({UP: codes, UP + "_scale_inv": scales, UP + "_scale": scales}, "one that has others"),
        ({UP: codes.float().to(torch.float8_e5m2), UP + "_scale_inv": scales}, "scales of no FP8 weight"),
    ]
    for i, (tensors, message) in enumerate(cases):
        with pytest.raises(CheckpointError, match=message) as caught:
            values_digest(save(tmp_path / str(i), tensors))
        assert caught.value.tensor == UP
    nan = {UP: torch.full((4, 4), torch.nan).to(torch.float8_e4m3fn), UP + "_scale_inv": scales}
    with pytest.raises(CheckpointError, match="is NaN"):
        exact(weights(save(tmp_path / "nan", nan))[UP])


def test_faults_are_laid_at_one_tensors_door(tmp_path: Path) -> None:
    tensors = {name: torch.full((40,), float(i)) for i, name in enumerate("abcd")}
    write_model(tmp_path, plan_of(tensors), tensors.items(), shard_bytes=320)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    whole = second.read_bytes()
    for size, tensor, cause in (
        (len(whole) - 1, "d", TRUNCATED),
        (len(whole) - 161, "c", TRUNCATED),
        (9, "c", TRUNCATED),
    ):
        second.write_bytes(whole[:size])
        with pytest.raises(CheckpointError) as caught:
            entries(tmp_path)
        assert (caught.value.tensor, caught.value.cause) == (tensor, cause)
    second.unlink()
    with pytest.raises(CheckpointError) as caught:
        entries(tmp_path)
    assert (caught.value.tensor, caught.value.cause) == ("c", "missing shard")
    second.write_bytes(whole.replace(b'"shape":[40]', b'"shape":[41]', 1))
    with pytest.raises(CheckpointError) as caught:
        entries(tmp_path)
    assert (caught.value.tensor, caught.value.cause) == ("c", "lying header")
    with pytest.raises(CheckpointError) as caught:
        read_header(first.with_name("none.safetensors"))
    assert (caught.value.tensor, caught.value.cause) == (None, "missing file")


def test_symbolic_links_to_blobs_are_followed(tmp_path: Path) -> None:
    """The cache of the Hugging Face hub keeps files elsewhere, under their hashes."""
    master = tiny_master(tmp_path / "m")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for number, path in enumerate(sorted(master.iterdir())):
        (tmp_path / "blobs" / str(number)).write_bytes(path.read_bytes())
        (tmp_path / "snapshot" / path.name).symlink_to(f"../blobs/{number}")
    assert check_digest(tmp_path / "snapshot") == check_digest(master)
    a, b = (relaid(tmp_path / name, tmp_path / f"{name}.out", "mxfp8") for name in ("m", "snapshot"))
    assert [(p.name, p.read_bytes()) for p in sorted(a.iterdir())] == [
        (p.name, p.read_bytes()) for p in sorted(b.iterdir())
    ]


def flip(path: Path, place: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_flipped_bit_changes_the_digest_and_names_the_tensor(layout: str, tmp_path: Path) -> None:
    good, bad = tiny_master(tmp_path / "good"), tmp_path / "bad"
    relaid(good, bad, layout)
    wanted = digests(good)
    assert wanted == digests(bad)
    for name, entry in entries(bad).items():
        owner = name.removesuffix("_inv").removesuffix("_scale")
        size = entry.end - entry.start
        for place in {entry.start, entry.start + size // 2, entry.end - 1}:
            if name == UP + "_scale_inv" and place - entry.start < size // 4:
                continue  # no value of the zero block depends on its scale
            if name == UP + "_scale" and (place - entry.start) // 7 < 128 and (place - entry.start) % 7 < 4:
                continue  # the same zero block, written as 1x32 blocks
            for bit in (0, 3, 7):
                flip(bad / SINGLE, place, bit)
                found = digests(bad)
                assert [n for n in wanted if wanted[n] != found[n]] == [owner], (name, place, bit)
                assert model_digest(found.values()) != model_digest(wanted.values())
                flip(bad / SINGLE, place, bit)
    assert wanted == digests(bad)


# The layouts.


def test_mxfp8_repeats_the_scale_and_keeps_the_codes(tmp_path: Path) -> None:
    master = tiny_master(tmp_path / "master")
    relaid(master, tmp_path / "mx", "mxfp8")
    for name in (UP, DOWN):
        codes, scales = read(tmp_path / "mx", name), read(tmp_path / "mx", name + "_scale")
        assert as_bytes(codes) == as_bytes(read(master, name))
        assert scales.dtype == torch.uint8
        assert tuple(scales.shape) == (codes.shape[0], -(-codes.shape[1] // 32))
        kept = read(master, name + "_scale_inv").view(torch.uint8)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                assert scales[i, j] == kept[i // 128, j * 32 // 128]
    assert not any(name.endswith("_inv") for name in entries(tmp_path / "mx"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_leads_back_to_the_same_files(layout: str, tmp_path: Path) -> None:
    master = tiny_master(tmp_path / "master")
    relaid(relaid(master, tmp_path / "a", layout), tmp_path / "b", "e8m0")
    assert (tmp_path / "b" / SINGLE).read_bytes() == (master / SINGLE).read_bytes()
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == json.loads((master / "config.json").read_text())
    for other in LAYOUTS:
        one, two = (relaid(tmp_path / name, tmp_path / f"{name} {other}", other) for name in ("a", "b"))
        assert (one / SINGLE).read_bytes() == (two / SINGLE).read_bytes()
        assert (one / "config.json").read_bytes() == (two / "config.json").read_bytes()


def test_deepseek_scales_are_the_powers_that_the_bytes_name(tmp_path: Path) -> None:
    master = tiny_master(tmp_path / "master")
    scales = torch.tensor([[3, 10], [127, 246]], dtype=torch.uint8)
    rewrite(master, **{UP + "_scale_inv": scales.view(torch.float8_e8m0fnu)})
    relaid(master, tmp_path / "d", "deepseek")
    stored = read(tmp_path / "d", UP + "_scale_inv")
    assert stored.dtype == torch.float32
    assert stored.tolist() == [[2.0**-124, 2.0**-117], [1.0, 2.0**119]]
    assert as_bytes(read(tmp_path / "d", UP)) == as_bytes(read(master, UP))


def test_foreign_masters_keep_their_codes(tmp_path: Path) -> None:
    """A master made by ceil-448 keeps its codes and scale bytes wherever there are blocks; BF16 has no such choice."""
    torch.manual_seed(3)
    codes = torch.randn(128, 256).mul(10).clamp(-60, 60).to(torch.float8_e4m3fn)
    foreign = save(tmp_path / "f", {UP: codes, UP + "_scale_inv": torch.tensor([[120, 121]], dtype=torch.uint8)})
    seen = {check_digest(foreign)}
    for layout in LAYOUTS:
        back = relaid(relaid(foreign, tmp_path / layout, layout), tmp_path / f"{layout} back", "e8m0")
        assert (as_bytes(read(back, UP)) == as_bytes(codes)) == (layout != "bf16")
        seen |= {check_digest(tmp_path / layout), check_digest(back)}
    assert len(seen) == 1


def test_configs_of_the_layouts(tmp_path: Path) -> None:
    master = tiny_master(tmp_path / "master")
    for layout in LAYOUTS:
        assert (relaid(master, tmp_path / layout, layout) / "tokenizer.json").exists()
    configs = {layout: json.loads((tmp_path / layout / "config.json").read_text()) for layout in LAYOUTS}
    assert "quantization_config" not in configs["bf16"]
    for layout in ("e8m0", "deepseek"):
        assert configs[layout]["quantization_config"] == {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "scale_fmt": "ue8m0",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        }
    mx = configs["mxfp8"]["quantization_config"]
    assert (mx["quant_method"], mx["format"]) == ("compressed-tensors", "mxfp8-quantized")
    assert mx["config_groups"]["group_0"]["weights"]["group_size"] == 32
    assert mx["config_groups"]["group_0"]["weights"]["scale_dtype"] == "torch.uint8"
    assert "lm_head" in mx["ignore"]
    assert not any("mlp" in name for name in mx["ignore"])


def test_what_is_off_the_grid_has_no_exact_layout(tmp_path: Path) -> None:
    off = save(tmp_path / "off", {UP: torch.randn(4, 4).bfloat16()})
    for layout in LAYOUTS:
        with pytest.raises(CheckpointError, match="not lie on the grid") as caught:
            relaid(off, tmp_path / "out", layout)
        assert caught.value.tensor == UP
    on = {UP: torch.ones(4, 4).bfloat16(), NORM: torch.full((4,), 1 / 3)}
    with pytest.raises(CheckpointError, match="BF16 does not"):
        relaid(save(tmp_path / "norm", on), tmp_path / "out", "e8m0")
    infinite = save(tmp_path / "infinite", {UP: torch.full((4, 4), torch.inf)})
    with pytest.raises(OttavaError, match="infinity or NaN"):
        relaid(infinite, tmp_path / "out", "e8m0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["infinite", "norm", "off"]


def test_an_output_folder_is_never_overwritten(tmp_path: Path) -> None:
    master = tiny_master(tmp_path / "master")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(CheckpointError, match="not empty"):
        relaid(master, tmp_path / "out", "bf16")
    assert (tmp_path / "out" / "precious").read_text() == "x"
    (tmp_path / "out" / "precious").unlink()
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "conversion.log").write_text("{}")
    relaid(master, tmp_path / "out", "bf16")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["config.json", "conversion.json", SINGLE, "tokenizer.json"]


def test_folders_without_a_config_are_refused(tmp_path: Path) -> None:
    master = tiny_master(tmp_path / "master")
    for text in (None, "{", "[]", "\xff", '{"a": ' + "[" * 100_000):
        (master / "config.json").unlink(missing_ok=True)
        if text is not None:
            (master / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(OttavaError, match=r"config\.json"):
            relaid(master, tmp_path / "out", "bf16")
