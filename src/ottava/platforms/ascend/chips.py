"""Which chip a SoC name means: CANN speaks of `Ascend910_9391`, people and fleet files of 910C."""

from __future__ import annotations

import re

from ottava.errors import PlatformError

_SOCS = (
    (r"910_?93\d\d", "910C"),  # two dies a card: each is a device
    (r"910B[1-4](C|-1|_1)?", "910B"),
    (r"950PR(_\w+)?", "950PR"),
    (r"950DT(_\w+)?", "950DT"),
    (r"310P[1-7]?", "310P"),
)
"""SoC names that libtorch_npu.so 2.13.0 knows, by family. Not among them, as torch_npu's present releases or this
project's data leave them out: 910A, 910B (the first 910's second version), 910Pro, 910Premium, 310B."""

CHIPS = tuple(chip for _, chip in _SOCS)

COMPUTES = {"910B": "bf16", "910C": "bf16", "950PR": "mxfp8", "950DT": "mxfp8", "310P": "fp16"}
"""The layout that a chip computes with as it is: without rounding, and with no conversion at load. fleets/chips.json
has every statement with its source; tests/test_ascend.py holds this table against it."""


def chip_of(soc: str) -> str:
    """The chip of a SoC name, such as 910B of Ascend910B3. Raises PlatformError where nothing is known of it."""
    plain = soc.strip().removeprefix("Ascend")
    for pattern, chip in _SOCS:
        if re.fullmatch(pattern, plain, re.IGNORECASE):
            return chip
    raise PlatformError(
        f"nothing is known of the SoC {soc!r}",
        fix=f"known are {', '.join(CHIPS)}; a new chip is a line in platforms/ascend/chips.py and its statements in "
        "fleets/chips.json",
    )
