"""Faults that the reader meets before any value."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.attacks.folders import LAYOUTS, Model, Plain, Stored, Written, from_bf16, written
from tests.attacks.plant import (
    EMBED,
    NORM,
    OUT,
    UP,
    Q,
    add,
    gone,
    put,
    stored,
    suffix,
)


def _cut(folder: Path) -> None:
    """The file ends in the middle of the data of its last tensor."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-100])


def _no_shard(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()


def _lying_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][EMBED] = "model-00002-of-00003.safetensors"
    path.write_text(json.dumps(index))


def _last(model: Model, layout: str) -> Written:
    """The tensor to be damaged stands last in the file."""
    out = written(model, layout)
    out.stored[UP] = out.stored.pop(UP)
    return out


add("a truncated file", "llama", UP, "truncated file", _last, damage=_cut, sure=True)
add(
    "a shard that is not there",
    "llama",
    "model.layers.0.input_layernorm.weight",
    "missing shard",
    lambda m, y: written(m, y, 3),
    damage=_no_shard,
    shards=3,
    sure=True,
)
add(
    "an index that places a tensor elsewhere",
    "llama",
    EMBED,
    "index and shards disagree",
    lambda m, y: written(m, y, 3),
    damage=_lying_index,
    shards=3,
    sure=True,
)
add("a tensor left out", "llama", OUT, "missing tensor", gone(OUT))
add(
    "a tensor too many",
    "llama",
    "model.layers.0.extra.weight",
    "extra tensor",
    lambda m, y: written(put(m, **{"model.layers.0.extra.weight": Plain(np.ones((3, 4)))}), y),
)


def _reshaped(out: Written, _: str) -> None:
    out.stored[EMBED].data = out.stored[EMBED].data.reshape(192, 200)


add("another shape", "llama", EMBED, "wrong shape", stored(_reshaped))


def _integers(out: Written, _: str) -> None:
    data = out.stored[NORM].data
    out.stored[NORM] = Stored("I64", from_bf16(data).astype(np.int64))


add(
    "integers for floats",
    "llama",
    NORM,
    "wrong type",
    stored(_integers),
    source=lambda m: put(m, **{NORM: Plain(np.arange(192.0) - 90)}),
)


def _mislabelled(dtype: str) -> Callable[[Written, str], None]:
    def change(out: Written, layout: str) -> None:
        suffix(layout)
        out.stored[Q].dtype = dtype

    return change


for dtype in ("F8_E5M2", "U8", "I8"):
    add(
        f"codes said to be {dtype}",
        "llama",
        Q,
        "wrong type",
        stored(_mislabelled(dtype)),
        layouts=LAYOUTS[:2],
        sure=True,
    )
