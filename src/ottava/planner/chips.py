"""What is known of each chip, every figure with its source, date and certainty.

A plan is an argument about money; a figure without a source is an opinion. The data live in
fleets/chips.json; nothing in code knows a chip's speed or price.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from ottava import document
from ottava.checkpoint.chips import DATA, Formats, Provenance, locate
from ottava.errors import RecipeError
from ottava.recipe import Frozen

__all__ = ["Catalogue", "Chip", "Family", "Figure", "Provenance", "Range", "Span", "load", "locate"]

Positive = Annotated[float, Field(gt=0)]


class Figure(Provenance):
    """One number."""

    value: Positive


class Span(Provenance):
    """The ends of a range."""

    low: Positive
    high: Positive


class Range(Span):
    """Low, middle and high of a number that varies."""

    mid: Positive

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.low <= self.mid <= self.high:
            raise ValueError("low, mid and high must rise")
        return self


class Words(Provenance):
    """A statement that is no number."""

    value: str


class Chip(Frozen):
    """One model of chip, as it is sold (a package, where it has several dies).

    bf16_tflops, fp8_tflops, int8_tops: dense peaks, 1e12 operations/s; memory_gb: 1e9 bytes; memory_tbs: 1e12 bytes/s;
    scaleup_gbs: 1e9 bytes/s of one chip in one direction to the scaleup_chips it is linked with; network_gbps: 1e9
    bits/s of one chip beyond them in the cluster it is usually sold in (a cluster's own figure comes before it);
    usd_per_hour: rent of one. What is None is not known, or not there.
    """

    vendor: str
    family: str
    bf16_tflops: Figure | None = None
    fp8_tflops: Figure | None = None
    int8_tops: Figure | None = None
    memory_gb: Figure
    memory_tbs: Figure | None = None
    scaleup_gbs: Figure | None = None
    scaleup_chips: Figure | None = None
    network_gbps: Figure | None = None
    watts: Figure | None = None
    usd_per_hour: Range | None = None
    export: Words | None = None
    note: str | None = None

    def peak(self) -> float:
        """Dense BF16 FLOP/s. Raises RecipeError where it is not known."""
        return need(self.bf16_tflops, "BF16 speed") * 1e12

    def rent(self) -> Range:
        """Dollars an hour. Raises RecipeError where no price is known."""
        if self.usd_per_hour is None:
            raise RecipeError("the price of this chip is not known", fix="add usd_per_hour to its entry in chips.json")
        return self.usd_per_hour


def need(figure: Figure | None, what: str) -> float:
    """The value of a figure that a calculation cannot do without; RecipeError where it is not known."""
    if figure is None:
        raise RecipeError(f"the {what} of this chip is not known", fix="measure it, and add it to chips.json")
    return figure.value


class Family(Frozen):
    """What training on a family of chips reached, as shares of the peak.

    matmul_efficiency: of the matrix products alone, so no run as a whole is faster; utilisation: of whole published
    runs; parameters: the active parameters these runs had, outside of which nothing is known.
    """

    matmul_efficiency: Figure
    utilisation: Range
    parameters: Span


class Catalogue(Frozen):
    """All chips and families of a data file, and which formats chips take (`ottava.checkpoint.targets`).

    A family of which no published run is known is None.
    """

    chips: dict[str, Chip]
    families: dict[str, Family | None]
    formats: dict[str, Formats]

    @model_validator(mode="after")
    def _families_known(self) -> Catalogue:
        for name, chip in self.chips.items():
            if chip.family not in self.families:
                raise ValueError(f"the chip {name!r} is of the family {chip.family!r}, which has no entry")
        return self

    def chip(self, name: str) -> Chip:
        """The chip called `name`; RecipeError where there is none."""
        if name not in self.chips:
            raise RecipeError(f"no figures for a chip {name!r}", fix=document.suggest(name, self.chips))
        return self.chips[name]

    def family(self, chip: Chip) -> Family:
        """What the chip's family reached; RecipeError where no published run of it is known."""
        found = self.families[chip.family]
        if found is None:
            raise RecipeError(f"no published run on chips of the family {chip.family!r} is known", where=DATA)
        return found


def load(path: Path) -> Catalogue:
    """Read and check a file of chips; RecipeError with file, line and column where it is wrong."""
    return document.read(path).parse(Catalogue)
