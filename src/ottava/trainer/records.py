"""Rollouts on disk, before anybody learns from them.

In process a rollout could be drawn again from (weights, seed, row), but after the first of a generation's updates the
weights that drew it are gone, on another class of chips other replies would come, and a verifier's verdict may not be
repeatable. So what a shard of a generation drew is written once, and from then on it is read:

    rollouts/e00003/g00000012-v01.safetensors      generation 12, virtual shard 1, drawn in epoch 3

An epoch writes into a folder of its own, and what was drawn after a step that a later epoch went back to counts no
longer, as with states: see `supervisor.record`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from ottava.checkpoint import safetensors
from ottava.engine.rollout import Rollouts
from ottava.errors import CheckpointError

_NAME = re.compile(r"g(\d{8})-v(\d{2,})\.safetensors\Z")
Usable = Callable[[int, int], bool]
"""(epoch, step) -> whether what was drawn then from the state after that step counts."""


@dataclass(frozen=True)
class Record:
    """What one virtual shard of a generation drew. N replies of T ids at most.

    step: the state's that drew it; policy: that state's digest; pool: whose chips drew it, which another kind of chip
    would have done otherwise; run: the run's id. old: float32 [N, T], the learner's own log-probabilities of the
    replies under that policy, 0 where nobody learns from a row; rewards: float32 [N], as they are learnt from, NaN
    where no verifier had a verdict; problems: the question of each group. facts: JSON. reference: as `old`, of the
    model that came in, where the loss keeps to it.
    """

    run: str
    generation: int
    shard: int
    step: int
    policy: str
    pool: str
    rollouts: Rollouts
    old: Tensor
    rewards: Tensor
    problems: tuple[str, ...]
    facts: Mapping[str, Any]
    reference: Tensor | None = None


def path_of(folder: Path, epoch: int, generation: int, shard: int) -> Path:
    """Where a record of this epoch lies."""
    return folder / f"e{epoch:05d}" / f"g{generation:08d}-v{shard:02d}.safetensors"


def write(path: Path, record: Record) -> None:
    """Write a record whole, flushed, under its name. Raises ResourceError."""
    tensors = {name: tensor.contiguous() for name, tensor in _tensors(record).items()}
    head = {
        "run": record.run, "generation": record.generation, "shard": record.shard, "step": record.step,
        "policy": record.policy, "pool": record.pool, "problems": record.problems, "facts": dict(record.facts),
    }  # fmt: skip
    head["digest"] = _digest(tensors, head)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = torch.frombuffer(bytearray(json.dumps(head, sort_keys=True).encode()), dtype=torch.uint8)
    safetensors.write(path, sorted({**tensors, "head": text}.items()))


def read(path: Path, run: str) -> Record:
    """Read what `write` wrote. Raises CheckpointError where it is missing, torn, altered or of another run."""
    tensors = {name: safetensors.load(entry) for name, entry in safetensors.read_header(path).items()}
    try:
        head = json.loads(bytes(tensors.pop("head").numpy()))
        whole = head.pop("digest") == _digest(tensors, head)
        parts: dict[str, Any] = {field.name: tensors.pop(field.name, None) for field in fields(Rollouts)}
        rollouts = Rollouts(**parts)
        record = Record(
            head["run"], head["generation"], head["shard"], head["step"], head["policy"], head["pool"], rollouts,
            tensors["old"], tensors["rewards"], tuple(head["problems"]), head["facts"], tensors.get("reference"),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"this is no record of rollouts: {error}", where=path) from None
    if not whole:
        raise CheckpointError("the rollouts were altered since they were written", where=path)
    if record.run != run:
        raise CheckpointError("the rollouts are of another run", where=path)
    return replace(record, rollouts=_bools(rollouts))


def found(folder: Path, generation: int, shard: int, usable: Usable, step: int) -> Iterator[Path]:
    """The records of a shard of a generation that count, the newest epoch's first. step: the generation's first."""
    for place in sorted(folder.glob("e*"), reverse=True):
        path = place / f"g{generation:08d}-v{shard:02d}.safetensors"
        if usable(int(place.name[1:]), step) and path.exists():
            yield path


def listed(folder: Path) -> list[tuple[int, int, int, Path]]:
    """(generation, shard, epoch, path) of all that lies there, in that order."""
    out = []
    for path in folder.glob("e*/*.safetensors"):
        match = _NAME.match(path.name)
        if match is not None:
            out.append((int(match[1]), int(match[2]), int(path.parent.name[1:]), path))
    return sorted(out)


def facts(folder: Path) -> dict[int, dict[int, Mapping[str, Any]]]:
    """By generation and shard, what the newest record says of itself: of a finished run those that counted, since what
    did not count was drawn anew. Read without the tensors, so nothing is verified."""
    return {number: {shard: its["facts"] for shard, its in shards.items()} for number, shards in _heads(folder).items()}


def questions(folder: Path) -> dict[int, dict[int, tuple[str, ...]]]:
    """By generation and shard, the question of each group of replies, as `facts` reads them."""
    heads = _heads(folder).items()
    return {number: {shard: tuple(its["problems"]) for shard, its in shards.items()} for number, shards in heads}


def _heads(folder: Path) -> dict[int, dict[int, dict[str, Any]]]:
    out: dict[int, dict[int, dict[str, Any]]] = {}
    for generation, shard, _, path in listed(folder):  # ascending epochs: the newest stays
        head = json.loads(bytes(safetensors.load(safetensors.read_header(path)["head"]).numpy()))
        out.setdefault(generation, {})[shard] = head
    return out


def _tensors(record: Record) -> dict[str, Tensor]:
    parts = {field.name: getattr(record.rollouts, field.name) for field in fields(Rollouts)}
    own = {name: part for name, part in parts.items() if part is not None}
    if record.reference is not None:
        own["reference"] = record.reference
    return {**own, "forced": own["forced"].to(torch.uint8), "old": record.old, "rewards": record.rewards}


def _bools(rollouts: Rollouts) -> Rollouts:
    return replace(rollouts, forced=rollouts.forced.bool())


def _digest(tensors: Mapping[str, Tensor], head: Mapping[str, Any]) -> str:
    whole = blake3(json.dumps(head, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(safetensors.raw(tensor))
    return whole.hexdigest()
