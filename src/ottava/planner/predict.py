"""How fast a workload runs, how much memory it takes, and how sure that is."""

from __future__ import annotations

from dataclasses import dataclass, field

from ottava.planner.chips import Catalogue
from ottava.planner.workload import Layout, Workload


@dataclass(frozen=True)
class Calibration:
    """What was learnt from published runs (`ottava calibrate`). spread: sigma of the log of actual over predicted."""

    family: dict[str, float] = field(default_factory=dict)
    spread: float = 0.2


@dataclass(frozen=True)
class Prediction:
    """tokens_per_s_per_chip with its 80% interval [low, high]; all three None where `declined` says why not.

    memory_gb: of the fullest chip, 1e9 bytes; layout: given or found; seconds: of one optimiser step; hours: of the
    workload's tokens where it names them; why: what the number rests on, in sentences.
    """

    id: str
    tokens_per_s_per_chip: float | None
    low: float | None
    high: float | None
    memory_gb: float | None = None
    layout: Layout | None = None
    seconds: float | None = None
    hours: float | None = None
    declined: str | None = None
    why: tuple[str, ...] = ()


def predict(workload: Workload, chips: Catalogue, calibration: Calibration) -> Prediction:
    """Tokens a second and chip, with an 80% interval. Raises RecipeError for a chip without figures."""
    chip = chips.chip(workload.chip)
    family = chips.family(chip)
    peak = chip.bf16_tflops.value * 1e12
    share = calibration.family.get(chip.family, family.utilisation.mid)
    speed = share * peak / workload.model.flops_per_token(workload.sequence)
    wide = 1 + 2 * calibration.spread
    return Prediction(workload.id, speed, speed / wide, speed * wide, why=("model FLOPs at the family's utilisation",))
