"""What a model needs of an Ascend chip, and what of that is missing, emulated or lossy there: before anybody moves it.

Operators are those of one forward pass of the model's architecture, run on no memory (`meta`) and held against
torch_npu's own list, which does not tell chips apart. Types and layouts are statements with sources
(fleets/chips.json), and the model's own values decide what a layout changes (`ottava.checkpoint.targets`). All of it
was read: level L0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ottava.checkpoint import chips, targets
from ottava.checkpoint.layouts import read_config
from ottava.checkpoint.safetensors import entries
from ottava.errors import CheckpointError, PlatformError, RecipeError
from ottava.models.build import from_config
from ottava.platforms.ascend import wheel
from ottava.platforms.ascend.chips import CHIPS, chip_of

LAYERS = 2
"""So many layers of each kind are enough to meet every operator."""

TOKENS = 8
EIGHT_BITS = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4")


def probe(folder: Path, chip: str) -> dict[str, Any]:
    """{"chip", "model_type", "operators", "dtypes", "layouts", "recommended", "verdict", "level"} for the model in
    `folder` on `chip` (910B, 910C, 950PR, 950DT, 310P, or the name of a SoC, such as Ascend910_9391).

    verdict: "no" where no layout serves; "incomplete" where operators are missing or unknown; "lossy"; or "exact":
    every value can be served and nothing is missing. Raises RecipeError for another chip, CheckpointError where the
    folder is not well-formed.
    """
    known = chips.formats()
    name = _named(known, chip)
    config = read_config(folder)
    takes = {form: known[name].takes[form].value for form in chips.FORMS}
    said = targets.examine(folder, name)[name]
    ops = operators(config)
    best = said["recommended"]
    return {
        "chip": name,
        "model_type": config.get("model_type"),
        "operators": ops,
        "dtypes": dtypes(folder, takes),
        "layouts": {form: {key: answer[key] for key in ("serves", "blocks_affected", "blocks", "why", "source")}
                    for form, answer in said["layouts"].items()},
        "recommended": best,
        "verdict": _verdict(None if best is None else said["layouts"][best]["serves"], ops),
        "level": "L0",
    }  # fmt: skip


def _named(known: Mapping[str, chips.Formats], chip: str) -> str:
    """The Ascend chip that a name of a chip or a SoC means. A name that only begins like one is no SoC."""
    plain = chip.strip().upper().removeprefix("ASCEND").lstrip(" -")
    if plain in CHIPS:
        return plain
    try:
        return chip_of(plain)
    except PlatformError:
        name = chips.named(dict(known), chip)
        what = "no SoC that is known" if name in CHIPS else "no Ascend chip"
        raise RecipeError(f"{chip} is {what}", where="--chip", fix=f"name one of {', '.join(CHIPS)}") from None


def _verdict(serves: str | None, ops: Mapping[str, Any]) -> str:
    if serves is None:
        return "no"
    if ops["needed"] is None or ops["missing"]:
        return "incomplete"
    return {"exactly": "exact", "lossily": "lossy"}[serves]


def operators(config: Mapping[str, Any]) -> dict[str, Any]:
    """{"needed", "missing", "why"}: how many operators one forward pass calls, and those that torch_npu lacks and torch
    makes of no others: these it computes on the host. needed is None where the architecture is not known here."""
    try:
        with torch.device("meta"):
            model = from_config(_small(config)).eval().bfloat16()
            tokens, mask = torch.zeros(1, TOKENS, dtype=torch.int64), torch.zeros(1, 1, TOKENS, TOKENS).bfloat16()
        with _Called() as called, torch.no_grad():
            model(input_ids=tokens, attention_mask=mask, use_cache=False)  # a whole mask, as making one reads values
    except (CheckpointError, NotImplementedError, RuntimeError) as error:
        said = error.what if isinstance(error, CheckpointError) else " ".join(str(error).split())
        fix = f"; {error.fix}" if isinstance(error, CheckpointError) and error.fix else ""
        return {"needed": None, "missing": [], "why": f"the operators are not known: {said}{fix}"}
    listed = wheel.operators()
    missing = sorted(n for n in called.names if n.partition("::")[2] not in listed and not _composed(n))
    return {"needed": len(called.names), "missing": missing, "why": f"by the list of torch_npu {wheel.RELEASE}"}


def dtypes(folder: Path, takes: Mapping[chips.Form, bool]) -> list[dict[str, Any]]:
    """For every type that the model is stored in {"dtype", "tensors", "status", "why"}; status: native, emulated (held
    exactly in another type), or lossy."""
    counts = Counter(entry.dtype for entry in entries(folder).values())
    return [{"dtype": kind, "tensors": n, **_type(kind, takes)} for kind, n in sorted(counts.items())]


def _type(kind: str, takes: Mapping[chips.Form, bool]) -> dict[str, str]:
    if kind in EIGHT_BITS:
        if takes["mxfp8"]:
            return {"status": "native", "why": "as mxfp8: the same codes, the scale bytes repeated"}
        if takes["bf16"]:
            return {"status": "emulated", "why": "no FP8: BF16 holds the same values at twice the size"}
        return {"status": "lossy", "why": "neither FP8 nor BF16: FP16 has another range"}
    if kind == "BF16" and not takes["bf16"]:
        return {"status": "lossy", "why": "no BF16: FP16 has another range"}
    if kind == "F64":
        return {"status": "emulated", "why": "held, and slow; HCCL does not reduce it"}
    return {"status": "native", "why": ""}


def _small(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with as many layers as needed. Raises CheckpointError where their numbers are none."""
    dense = min(_count(config, "first_k_dense_replace", 0), 1)
    layers = min(_count(config, "num_hidden_layers", LAYERS), dense + LAYERS)
    return {**config, "num_hidden_layers": layers} | ({"first_k_dense_replace": dense} if dense else {})


def _count(config: Mapping[str, Any], key: str, default: int) -> int:
    """A number of layers. One that is not stated, or 0 of all layers, is the default."""
    number = config.get(key) or default
    if not isinstance(number, int) or number < 0:
        what, fix = f"{key} in config.json is {number!r}, which is no number of layers", "correct that field"
        raise CheckpointError(what, where="config.json", fix=fix)
    return number


class _Called(TorchDispatchMode):
    """The names of all operators that are called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def _composed(name: str) -> bool:
    """Whether torch makes an operator of others, on any device."""
    keys = ("CompositeExplicitAutograd", "CompositeImplicitAutograd")
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in keys)
