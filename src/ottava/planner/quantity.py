"""Numbers with their units, as people write them: `12 weeks`, `5.6e6 USD`, `80 GB`.

A plan mixes hours, weeks, dollars and bytes; a bare number is refused, because what it counts is a guess.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

_WRITTEN = re.compile(r"\s*([-+]?(?:\d[\d_,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*([A-Za-z%$].*?)\s*\Z")

TIME = {"h": 1.0, "hour": 1.0, "hours": 1.0, "day": 24.0, "days": 24.0, "week": 168.0, "weeks": 168.0}
SECONDS = {"s": 1.0, "min": 60.0, **{unit: 3600 * hours for unit, hours in TIME.items()}}
CHIP_TIME = {"chip-hours": 1.0, "chip-days": 24.0, "chip-weeks": 168.0}
MONEY = {"USD": 1.0}
PER_CHIP_HOUR = {"USD/chip-hour": 1.0}
PER_WEEK = {"USD/week": 1 / 168}
MEMORY = {"MB": 1e-3, "GB": 1.0, "TB": 1e3}
LINK = {"Gb/s": 1.0, "GB/s": 8.0}
CHIPS = {"chip": 1.0, "chips": 1.0}
PARAMETERS = {"parameters": 1.0}
PER_DAY = {"tokens/day": 1.0, "tokens/s": 86400.0}
PER_CHIP = {"tokens/s/chip": 1.0}
SHARE = {"%": 0.01}
LARGEST = 1e18
"""Of any quantity, in its base unit: more is a slip of the pen, and would leave the solver's 64 bits."""

MOST = 10**9
"""Of anything that is counted, chips or layers or sequences."""

SPEED = {"tokens/s": 1.0}
TOKENS = {"tokens": 1.0}


def read(text: Any, units: Mapping[str, float], *, least: float = 0.0) -> float:
    """`text` in the first of `units` (whose factor is the base). ValueError: no unit, another unit, or below least."""
    first = next(unit for unit, factor in units.items() if factor == 1.0 or len(units) == 1)
    if isinstance(text, bool) or not isinstance(text, str | int | float):
        raise ValueError(f"a number with its unit is wanted, such as '12 {first}'")
    found = _WRITTEN.match(str(text))
    if found is None:
        bare = isinstance(text, int | float) or re.fullmatch(r"\s*[-+]?[\d.,_eE+-]+\s*", text)
        wrong = "this number has no unit" if bare else "this is no number with a unit"
        raise ValueError(f"{wrong}; write it as '12 {first}' (units: {', '.join(units)})")
    number, unit = float(found[1].replace(",", "").replace("_", "")), found[2]
    if unit not in units:
        raise ValueError(f"the unit {unit!r} is not one of {', '.join(units)}")
    if number < least:
        raise ValueError(f"this must not be below {least:g}")
    if number * units[unit] > LARGEST:
        raise ValueError(f"this is beyond {LARGEST:g} {first}, more than there can be")
    return number * units[unit]


def plain(number: Any) -> Any:
    """A bare number as it is. ValueError for true, false and words, which pydantic would take for numbers."""
    if isinstance(number, bool | str):
        raise ValueError("a plain number is wanted here, without quotes")
    return number


def _in(units: Mapping[str, float]) -> BeforeValidator:
    return BeforeValidator(lambda text: read(text, units))


Hours = Annotated[float, _in(TIME)]
Seconds = Annotated[float, _in(SECONDS)]
ChipHours = Annotated[float, _in(CHIP_TIME)]
Usd = Annotated[float, _in(MONEY)]
UsdPerChipHour = Annotated[float, _in(PER_CHIP_HOUR)]
UsdPerHour = Annotated[float, _in(PER_WEEK)]
Gigabytes = Annotated[float, _in(MEMORY)]
GigabitsPerSecond = Annotated[float, _in(LINK)]
Chips = Annotated[float, _in(CHIPS)]
Parameters = Annotated[float, _in(PARAMETERS)]
TokensPerDay = Annotated[float, _in(PER_DAY)]
TokensPerSecondChip = Annotated[float, _in(PER_CHIP)]
TokensPerSecond = Annotated[float, _in(SPEED)]
Tokens = Annotated[float, _in(TOKENS)]
Share = Annotated[float, _in(SHARE)]
Chance = Annotated[float, _in(SHARE), Field(le=1)]
Number = Annotated[int, BeforeValidator(plain), Field(ge=0, le=MOST)]
Count = Annotated[int, BeforeValidator(plain), Field(ge=1, le=MOST)]
Positive = Annotated[float, BeforeValidator(plain), Field(gt=0)]


def dollars(value: float) -> str:
    """Whole dollars, as a sentence has them: $1,234, -$5."""
    return f"{'-' if value < 0 else ''}${abs(value):,.0f}"
