"""The whole state of a run in one flat float32 array, so that saving, hashing and moving it is one copy.

Weights, optimiser moments and the router's bias are views into the array. The step number is the
only other state there is: data order and randomness are functions of it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ottava.errors import CheckpointError
from ottava.trainer.snapshot import Snapshot

ALIGN = 16  # floats: every segment starts on a 64-byte boundary, as kernels may round differently off it


@dataclass(frozen=True)
class Slot:
    """Where one parameter lies in the flat weights. kind: which optimiser updates it."""

    name: str
    kind: str  # muon | adam | embedding
    start: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        size = 1
        for length in self.shape:
            size *= length
        return size

    def view(self, flat: Tensor) -> Tensor:
        """This parameter's part of a flat array, in its shape."""
        return flat[self.start : self.start + self.size].view(self.shape)


@dataclass
class State:
    """A run's state at the end of `step` steps. arena: every number of it, flat; the rest are views.

    weights [P]: the latent float32 weights; momentum [muon part of P]; first, second [P - muon part]:
    Adam's moments; bias: the routers' correction biases, layer by layer.
    """

    slots: tuple[Slot, ...]
    arena: Tensor
    weights: Tensor
    momentum: Tensor
    first: Tensor
    second: Tensor
    bias: Tensor
    bounds: dict[str, tuple[int, int]]
    step: int = 0
    layout: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.layout = _layout(self.slots)

    def snapshot(self) -> Snapshot:
        """This state as bytes: a view, valid until the next step."""
        return Snapshot(self.step, self.layout, memoryview(self.arena.numpy().data).cast("B"))

    def digest(self) -> str:
        """SHA-256 over the layout, the step and every byte of the arena."""
        return self.snapshot().digest

    def restore(self, snapshot: Snapshot) -> None:
        """Take over a snapshot's values. Raises CheckpointError where it is of another model."""
        if snapshot.layout != self.layout or len(snapshot.payload) != self.arena.numel() * 4:
            raise CheckpointError("the snapshot is of a model with other tensors", fix="use the recipe it was made by")
        self.arena.copy_(torch.frombuffer(bytearray(snapshot.payload), dtype=torch.float32))
        self.step = snapshot.step


def _layout(slots: tuple[Slot, ...]) -> bytes:
    """A digest of names, places and shapes, so that equal bytes mean equal tensors."""
    return hashlib.sha256(repr([(s.name, s.kind, s.start, s.shape) for s in slots]).encode()).digest()


def kind_of(name: str, dims: int) -> str:
    """Muon for hidden matrices; AdamW for norms, head and router; AdamW at its own rate for embeddings."""
    if "embed" in name:
        return "embedding"
    return "muon" if dims >= 2 and "lm_head" not in name and not name.endswith("mlp.gate.weight") else "adam"


def create(model: nn.Module) -> State:
    """A state with the model's present weights and zero moments."""
    order = {"muon": 0, "adam": 1, "embedding": 2}
    named = sorted(
        ((name, p, kind_of(name, p.dim())) for name, p in model.named_parameters()), key=lambda item: order[item[2]]
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
    biases = router_biases(model)
    bias = sum(-(-b.numel() // ALIGN) * ALIGN for b in biases)
    sizes = [position, muon, position - muon, position - muon, bias]
    arena = aligned(sum(sizes))
    weights, momentum, first, second, bias_view = torch.split(arena, sizes)
    state = State(tuple(slots), arena, weights, momentum, first, second, bias_view, bounds)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for slot in slots:
            slot.view(weights).copy_(parameters[slot.name])
    return state


def aligned(size: int) -> Tensor:
    """A zero float32 array of `size` whose first element lies on a 64-byte boundary."""
    raw = torch.zeros(size + ALIGN)
    offset = (-raw.data_ptr() % (4 * ALIGN)) // 4
    return raw[offset : offset + size]


def router_biases(model: nn.Module) -> list[Tensor]:
    """The routers' correction biases, in layer order."""
    return [b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]
