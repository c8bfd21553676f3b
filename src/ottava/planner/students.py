"""R1's six students at their real sizes: what training each of them asks of the chips of the catalogue.

Memory is arithmetic on shapes; time is an extrapolation from published runs, as everywhere in the planner.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ottava import document
from ottava.planner import cost
from ottava.planner.chips import Catalogue, Figure, Range
from ottava.planner.cost import Estimate
from ottava.planner.quantity import Count
from ottava.recipe import Frozen

STATE_BYTES = 16
"""Of one parameter in mixed-precision training with Adam: BF16 weight and gradient, FP32 weight and two moments.
Source: arXiv 1910.02054, section 3.1."""

USABLE = 0.8
"""Share of a chip's memory for the state; the rest is for activations (recomputed) and buffers. Assumed."""


class Shape(Frozen):
    """A published dense model with grouped-query attention."""

    name: str
    begins_from: str
    family: Literal["qwen2", "llama"]
    layers: Count
    hidden: Count
    width: Count
    heads: Count
    kv_heads: Count
    vocabulary: Count
    tied: bool

    def parameters(self) -> int:
        """All parameters."""
        return self.active() + (0 if self.tied else self.vocabulary * self.hidden)

    def active(self) -> int:
        """Those that a token passes: all but the embedding, of which it reads one row."""
        keys = self.hidden // self.heads * self.kv_heads
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * keys
        biases = self.hidden + 2 * keys if self.family == "qwen2" else 0
        layer = attention + biases + 3 * self.hidden * self.width + 2 * self.hidden
        return self.layers * layer + self.hidden + self.vocabulary * self.hidden


class Distillation(Frozen):
    """The students, what they are trained on, and the chips that are compared."""

    source: str
    date: str
    samples: Figure
    tokens_per_sample: Range
    epochs: Figure
    chips: Annotated[tuple[str, ...], Field(min_length=1)]
    students: Annotated[tuple[Shape, ...], Field(min_length=1)]


def load(path: Path) -> Distillation:
    """Read and check a file such as fleets/students.json. Raises RecipeError."""
    return document.read(path).parse(Distillation)


def plan(work: Distillation, catalogue: Catalogue) -> list[dict[str, Any]]:
    """For every student and chip what training it asks for.

    Rows {name, begins_from, parameters, memory_gb, served_gb (in FP8), chip, vendor, chips, hours, usd, claim}.
    chips: the smallest power of two whose memory holds the training state; hours and usd: {low, mid, high}.
    """
    return [_row(work, shape, name, catalogue) for shape in work.students for name in work.chips]


def _row(work: Distillation, shape: Shape, name: str, catalogue: Catalogue) -> dict[str, Any]:
    chip = catalogue.chip(name)
    memory, chips = STATE_BYTES * shape.parameters() / 1e9, 1
    while chips * chip.memory_gb.value * USABLE < memory:
        chips *= 2
    seconds = _seconds(work, shape, name, catalogue, chips)
    rent = chip.rent()
    price = Estimate(rent.low, rent.mid, rent.high)
    known = "extrapolated from published runs"
    return {
        "name": shape.name, "begins_from": shape.begins_from, "parameters": shape.parameters(),
        "memory_gb": round(memory, 1), "served_gb": round(shape.parameters() / 1e9, 1), "chip": name,
        "vendor": chip.vendor, "chips": chips, "hours": seconds.map(lambda s: s / 3600).json(),
        "usd": cost.usd(seconds, chips, price).json(),
        "claim": known if seconds.mid else "a lower bound: smaller than any published run",
    }  # fmt: skip


def _seconds(work: Distillation, shape: Shape, name: str, catalogue: Catalogue, chips: int) -> Estimate:
    """The fewest tokens at the best speed to the most at the slowest."""
    chip = catalogue.chips[name]
    family, each = catalogue.family(chip), work.tokens_per_sample

    def on(tokens: float) -> Estimate:
        flops = cost.training_flops(shape.active(), tokens * work.samples.value * work.epochs.value)
        return cost.reference_seconds(flops, shape.active(), chip, family, chips)

    return Estimate(on(each.low).low, on(each.mid).mid, on(each.high).high)
