"""Weights on their way from a learner to an engine: what was offered, what arrived, and which tensor is not the same.

Public failures of reinforcement began with an engine that held other weights than the learner: transposed, of an
earlier step, with one row of scales lost. Log-probabilities tell late and not which tensor. So both sides say the
digest of each tensor's exact values (`checkpoint.digest`), which is the same in every layout and in memory.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from ottava.artifact import write_json
from ottava.checkpoint import safetensors
from ottava.checkpoint.convert import convert
from ottava.checkpoint.digest import Digest, band_hashes, digests, model_digest
from ottava.errors import CheckpointError, from_os_error
from ottava.models.published import Published, published, stored
from ottava.verify import weights

Layout = Literal["bf16", "e8m0"]


@dataclass(frozen=True)
class Handoff:
    """What one side holds. tensors: published name -> digest, in hex; whole: the model's digest."""

    tensors: Mapping[str, str]
    whole: str

    @staticmethod
    def of(found: Mapping[str, Digest]) -> Handoff:
        return Handoff({name: item.hex for name, item in sorted(found.items())}, model_digest(found.values()))


def offer(model: nn.Module) -> Handoff:
    """What a model in memory holds: the digests that a folder with these values has."""
    return Handoff.of({name: _digest(name, item) for name, item in published(model).items()})


def held(folder: Path) -> Handoff:
    """What a model folder holds, in any layout. Raises CheckpointError."""
    return Handoff.of(digests(folder))


def compare(offered: Handoff, received: Handoff) -> tuple[str, ...]:
    """The tensors that are not the same on both sides, or only on one, by name."""
    if offered.whole == received.whole:
        return ()
    names = sorted(offered.tensors.keys() | received.tensors.keys())
    return tuple(name for name in names if offered.tensors.get(name) != received.tensors.get(name))


def write(folder: Path, model: nn.Module, layout: Layout = "bf16") -> Handoff:
    """Write the exact values of a model into a new folder, and return what lies there, as read back from it.

    bf16, or e8m0: the bytes of the grid. The folder appears whole or not at all. Raises CheckpointError where a value
    has no exact form in that layout, and ResourceError.
    """
    offered = offer(model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    try:
        plain = scratch / "bf16"
        plain.mkdir()
        _write(plain, model)
        wrong = compare(offered, held(plain))
        if wrong:
            what = f"{len(wrong)} tensors hold values that BF16 cannot, first {wrong[0]}"
            fix = "hand over weights on the grid: set grid_from to 0"
            raise CheckpointError(what, where=folder, fix=fix, tensor=wrong[0])
        out = plain
        if layout == "e8m0":
            out = scratch / "e8m0"
            convert({"source": plain, "out": out, "layout": layout, "exact": True, "workers": 1, "flush": False})
        try:
            out.rename(folder)
        except OSError as error:
            raise from_os_error(error, "handing over weights", folder) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return held(folder)


def cause(offered: nn.Module, received: nn.Module | Path) -> dict[str, Any]:
    """How the first tensor that differs came to: "tensor", "cause" and the rest of `verify.weights.compare`.

    received: a model in memory or a folder. Raises CheckpointError where nothing differs.
    """
    with tempfile.TemporaryDirectory() as place:
        sides = [Path(place) / "offered.safetensors", Path(place) / "received.safetensors"]
        for path, side in zip(sides, (offered, received), strict=True):
            if isinstance(side, nn.Module):
                tensors = {name: _values(item.tensor) for name, item in published(side).items()}
                safetensors.write(path, tensors.items())
        if isinstance(received, Path):
            sides[1] = received
        found: dict[str, Any] | None = weights.compare(*sides, workers=1)["first_bad"]
    if found is None:
        raise CheckpointError("the two hold the same values")
    return found


def _write(folder: Path, model: nn.Module) -> None:
    config: Any = model.config
    said = {"architectures": [type(model).__name__], **json.loads(config.to_json_string()), "dtype": "bfloat16"}
    write_json(folder / "config.json", said)  # without architectures vLLM serves no completions
    tensors = ((name, stored(item).cpu()) for name, item in published(model).items())
    safetensors.write(folder / safetensors.SINGLE, tensors)


def _digest(name: str, item: Published) -> Digest:
    values = _values(item.tensor)
    rows = values.reshape(-1, values.shape[-1]) if values.dim() > 1 else values.reshape(1, -1)
    return Digest(name, tuple(values.shape), band_hashes(rows))


def _values(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()
