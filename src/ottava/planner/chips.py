"""What is known of each chip, every figure with its source, date and certainty.

A plan is an argument about money; a figure without a source is an opinion. The data live in
fleets/chips.json; nothing in code knows a chip's speed or price.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from ottava import document
from ottava.checkpoint.chips import Formats, Provenance, locate
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


class Chip(Frozen):
    """One model of chip. bf16_tflops: dense peak, 1e12 FLOP/s; memory_gb: 1e9 bytes; usd_per_hour: rent of one."""

    vendor: str
    family: str
    bf16_tflops: Figure
    memory_gb: Figure
    usd_per_hour: Range


class Family(Frozen):
    """What training on a family of chips reached, as shares of the peak.

    matmul_efficiency: of the matrix products alone, so no run as a whole is faster; utilisation: of whole published
    runs; parameters: the active parameters these runs had, outside of which nothing is known.
    """

    matmul_efficiency: Figure
    utilisation: Range
    parameters: Span


class Catalogue(Frozen):
    """All chips and families of a data file, and which formats chips take (`ottava.checkpoint.targets`)."""

    chips: dict[str, Chip]
    families: dict[str, Family]
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
        """What the chip's family reached."""
        return self.families[chip.family]


def load(path: Path) -> Catalogue:
    """Read and check a file of chips; RecipeError with file, line and column where it is wrong."""
    return document.read(path).parse(Catalogue)
