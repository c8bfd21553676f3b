"""The whole state of a run in one flat float32 array, so that saving, hashing and moving it is one copy.

Weights, optimiser moments and the router's bias are views into the array, which lies on the worker's device. The step
number is the only other state there is: data order and randomness are functions of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import NoReturn

import torch
from torch import Tensor, nn

from ottava.errors import CheckpointError
from ottava.trainer.snapshot import Snapshot

ALIGN = 16  # floats: every segment starts on a 64-byte boundary, as kernels may round differently off it


@dataclass(frozen=True)
class Slot:
    """Where one tensor lies in a flat array. kind: which optimiser updates it, or "bias" (the router's rule)."""

    name: str
    kind: str  # muon | adam | embedding | bias
    start: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        size = 1
        for length in self.shape:
            size *= length
        return size

    def view(self, flat: Tensor) -> Tensor:
        """Its part of a flat array, in its shape."""
        return flat[self.start : self.start + self.size].view(self.shape)


@dataclass
class State:
    """A run's state at the end of `step` steps. arena: every number of it, flat; the rest are views.

    weights [P]: the latent float32 weights; momentum [muon part of P]; first, second [P - muon part]:
    Adam's moments; bias: the routers' correction biases, layer by layer. places: every tensor of the state
    by its published name, and where it lies in the arena.
    """

    slots: tuple[Slot, ...]
    arena: Tensor
    weights: Tensor
    momentum: Tensor
    first: Tensor
    second: Tensor
    bias: Tensor
    bounds: dict[str, tuple[int, int]]
    places: tuple[Slot, ...]
    step: int = 0
    layout: bytes = field(init=False)
    padding: Tensor = field(init=False)
    host: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.layout = _layout(self.slots)
        self.padding = _padding(self.places, self.arena.numel()).to(self.arena.device)
        self.host = self.arena if self.arena.device.type == "cpu" else torch.empty(self.arena.shape)

    def snapshot(self) -> Snapshot:
        """This state as bytes of the host's memory: a view, valid until the next step or snapshot."""
        if self.host is not self.arena:
            self.host.copy_(self.arena)
        return Snapshot(self.step, self.layout, memoryview(self.host.numpy().data).cast("B"))

    def digest(self) -> str:
        """BLAKE3 over the layout, the step and every byte of the arena."""
        return self.snapshot().digest

    def restore(self, snapshot: Snapshot) -> None:
        """Take over a snapshot's values. Raises CheckpointError where it is of another model."""
        if snapshot.layout != self.layout or len(snapshot.payload) != self.arena.numel() * 4:
            raise CheckpointError("the snapshot is of a model with other tensors", fix="use the recipe it was made by")
        self.arena.copy_(torch.frombuffer(bytearray(snapshot.payload), dtype=torch.float32))
        self.step = snapshot.step

    def tensors(self) -> dict[str, Tensor]:
        """The whole state under names that others can read; the values are views, valid until the next step.

        `step` (int64, no dimensions); `weights.NAME` for every parameter, `momentum.NAME` for those that Muon updates,
        `first.NAME` and `second.NAME` for the others, in the parameter's shape; `bias.NAME` for every router's buffer.
        Raises CheckpointError where the padding between tensors is not zero: names cannot carry it, and nothing
        but a fault writes there.
        """
        wrong = self.padding[self.arena.view(torch.int32)[self.padding] != 0]
        if len(wrong):
            where = int(wrong[0])
            last = max((place for place in self.places if place.start <= where), key=lambda place: place.start)
            raise CheckpointError(
                "the state was written to between two tensors: a fault of memory or of a kernel",
                where=f"the padding after {last.name}",
                fix="go back to an earlier state",
                tensor=last.name,
                cause="padding not zero",
            )
        return {"step": torch.tensor(self.step), **{place.name: place.view(self.arena) for place in self.places}}

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` gave, bit by bit.

        Raises CheckpointError, before anything is changed, where a tensor is missing, unknown, or of another
        type or shape.
        """
        expected = {place.name: (torch.float32, place.shape) for place in self.places}
        expected["step"] = (torch.int64, ())
        for name in sorted(expected.keys() | tensors.keys()):
            if name not in tensors:
                _refuse(name, "is missing", "missing tensor")
            if name not in expected:
                _refuse(name, "is none of this model's", "unknown tensor")
            given = (tensors[name].dtype, tuple(tensors[name].shape))
            if given != expected[name]:
                (its_type, its_shape), (dtype, shape) = given, expected[name]
                _refuse(name, f"is {its_type} {list(its_shape)}, the model's {dtype} {list(shape)}", "other shape")
        step = int(tensors["step"])
        if step < 0:
            _refuse("step", f"is {step}: a run has no such step", "other value")
        for place in self.places:
            place.view(self.arena).copy_(tensors[place.name])
        self.arena[self.padding] = 0.0
        self.step = step


def _refuse(name: str, what: str, cause: str) -> NoReturn:
    fix = "use the recipe that the state was made by"
    raise CheckpointError(f"the tensor {name!r} of the saved state {what}", fix=fix, tensor=name, cause=cause)


def _places(slots: tuple[Slot, ...], biases: Mapping[str, Tensor], sizes: list[int]) -> tuple[Slot, ...]:
    """Every tensor of an arena of weights, momentum, first, second and bias, which have these sizes."""
    weights, momentum, first, second, bias, _ = accumulate(sizes, initial=0)
    muon = sizes[1]
    found = []
    for slot in slots:
        moments = {"momentum": momentum} if slot.kind == "muon" else {"first": first - muon, "second": second - muon}
        for part, start in {"weights": weights, **moments}.items():
            found.append(Slot(f"{part}.{slot.name}", slot.kind, start + slot.start, slot.shape))
    for name, buffer in biases.items():
        found.append(Slot(f"bias.{name}", "bias", bias, tuple(buffer.shape)))
        bias += -(-buffer.numel() // ALIGN) * ALIGN
    return tuple(found)


def _padding(places: tuple[Slot, ...], size: int) -> Tensor:
    """The positions of an arena of `size` that belong to no tensor."""
    spans = sorted((place.start, place.start + place.size) for place in places)
    edges = [(0, 0), *spans, (size, size)]
    gaps = [torch.arange(end, start) for (_, end), (start, _) in pairwise(edges) if start > end]
    return torch.cat(gaps) if gaps else torch.empty(0, dtype=torch.int64)


def _layout(slots: tuple[Slot, ...]) -> bytes:
    """A digest of names, places and shapes, so that equal bytes mean equal tensors."""
    return hashlib.sha256(repr([(s.name, s.kind, s.start, s.shape) for s in slots]).encode()).digest()


def kind_of(name: str, dims: int, matrices: str = "muon") -> str:
    """Muon for hidden matrices; AdamW for norms, head and router; AdamW at its own rate for embeddings."""
    if "embed" in name:
        return "embedding"
    return matrices if dims >= 2 and "lm_head" not in name and not name.endswith("mlp.gate.weight") else "adam"


def create(model: nn.Module, device: torch.device | str = "cpu", matrices: str = "muon") -> State:
    """A state on `device` of the weights that are trained (requires_grad), with zero moments.

    matrices: who updates them."""
    order = {"muon": 0, "adam": 1, "embedding": 2}
    trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    named = sorted(
        ((name, p, kind_of(name, p.dim(), matrices)) for name, p in trained),
        key=lambda item: order[item[2]],
    )
    slots, bounds, position = [], {}, 0
    for kind in order:
        begin = position
        for name, parameter, its_kind in named:
            if its_kind == kind:
                slots.append(Slot(name, kind, position, tuple(parameter.shape)))
                position += -(-parameter.numel() // ALIGN) * ALIGN
        bounds[kind] = (begin, position)
    muon = bounds["muon"][1]
    biases = named_router_biases(model)
    bias = sum(-(-b.numel() // ALIGN) * ALIGN for b in biases.values())
    sizes = [position, muon, position - muon, position - muon, bias]
    arena = aligned(sum(sizes), device)
    weights, momentum, first, second, bias_view = torch.split(arena, sizes)
    places = _places(tuple(slots), biases, sizes)
    state = State(tuple(slots), arena, weights, momentum, first, second, bias_view, bounds, places)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for slot in slots:
            slot.view(weights).copy_(parameters[slot.name])
    return state


def aligned(size: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """A zero array of `size` whose first element lies on a 64-byte boundary."""
    raw = torch.zeros(size + 4 * ALIGN // dtype.itemsize, device=device, dtype=dtype)
    offset = (-raw.data_ptr() % (4 * ALIGN)) // dtype.itemsize
    return raw[offset : offset + size]


def named_router_biases(model: nn.Module) -> dict[str, Tensor]:
    """The routers' correction biases by name, in layer order."""
    return {name: b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")}


def router_biases(model: nn.Module) -> list[Tensor]:
    """The routers' correction biases, in layer order."""
    return list(named_router_biases(model).values())
