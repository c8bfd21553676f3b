"""Which formats each chip takes, every statement with its source, date and certainty.

The data live in fleets/chips.json, beside the figures that plans are made of (`ottava.planner.chips`,
which checks the whole file); nothing in code knows what a chip can do.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from ottava import document
from ottava.errors import RecipeError
from ottava.recipe import Frozen

Form = Literal["e8m0", "deepseek", "mxfp8", "bf16", "fp16", "int8"]
"""Forms in which a chip may be given a model: the four layouts, FP16 for chips without BF16, and INT8 W8A8."""

FORMS: tuple[Form, ...] = get_args(Form)
"""In order of preference: fewest bytes first, and the forms of which this project keeps digests before others."""

DATA = "chips.json"


class Provenance(Frozen):
    """Where a figure is from, when it was read, and how sure it is."""

    source: str
    date: str
    certainty: str

    @field_validator("date")
    @classmethod
    def _day(cls, text: str) -> str:
        parts = text.split("-")
        shape = len(parts) <= 3 and [len(part) for part in parts] == [4, 2, 2][: len(parts)]
        try:
            if not shape:
                raise ValueError
            datetime.date(*([int(part) for part in parts] + [1, 1])[:3])
        except ValueError:
            raise ValueError("a date is written as '2025', '2025-08' or '2025-08-31'") from None
        return text


class Statement(Provenance):
    """Whether a chip takes a form."""

    value: bool


class Subnormals(Provenance):
    """What the chip's matrix products make of subnormal numbers."""

    value: Literal["kept", "flushed", "unknown"]


class Formats(Frozen):
    """The forms one chip takes. evidence: how far the statements have been shown (for Ascend, levels L0 to L4)."""

    vendor: str
    evidence: str
    subnormals: Subnormals
    takes: dict[Form, Statement]

    @model_validator(mode="after")
    def _complete(self) -> Formats:
        missing = [form for form in FORMS if form not in self.takes]
        if missing:
            raise ValueError(f"nothing is said of {', '.join(missing)}")
        return self


class _File(BaseModel):
    """The part of the data file that is read here; `ottava.planner.chips` refuses keys that nobody knows."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    formats: dict[str, Formats]


def formats(path: Path | None = None) -> dict[str, Formats]:
    """What every chip takes, from a file of chips (fleets/chips.json). Raises RecipeError where it is wrong."""
    return document.read(path or locate(DATA)).parse(_File).formats


def named(known: dict[str, Formats], name: str) -> str:
    """The entry of `known` that speaks for the chip `name`: 910B also speaks for 910B1 to 910B4, in any case.

    Raises RecipeError where there is none.
    """
    plain = name.casefold().removeprefix("ascend").removeprefix("nvidia").strip(" -")
    fitting = [chip for chip in known if plain.startswith(chip.casefold())]
    if not fitting:
        raise RecipeError(f"nothing is known of the formats of a chip {name!r}", fix=document.suggest(name, known))
    return max(fitting, key=len)


def locate(name: str) -> Path:
    """A file of fleets/: `name` as a path, in ./fleets, or in the fleets folder beside this source tree."""
    places = [Path(name), Path("fleets") / name, Path(__file__).parents[3] / "fleets" / name]
    for place in places:
        for candidate in (place, place.with_name(place.name + ".yaml")):
            if candidate.is_file():
                return candidate
    raise RecipeError(f"no such file {name!r}", fix="give its path, or put it in fleets/")
