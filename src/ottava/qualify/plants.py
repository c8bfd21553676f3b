"""Faults that are planted on purpose, so that the gate's own findings can be checked.

A plant is data: what, on which chip, from where on. Its worker commits it against itself by putting something else in
the place of a function of torch; a worker that was given none runs not a line of this.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from ottava.errors import RecipeError
from ottava.qualify.gate import PARTS
from ottava.recipe import Frozen

Kind = Literal["slow", "throttled", "link", "flip", "numerics", "rounding", "dead", "hang", "stop"]
KINDS: dict[Kind, str] = {
    "slow": "its products take `factor` times as long, busy all the while",
    "throttled": "after each product it rests, so that it takes `factor` times as long",
    "link": "before it sends anything it waits `factor` times 0.2 ms and a nanosecond a byte",
    "flip": "the lowest bit of a number of a product flips, once in `every` products",
    "numerics": "its float32 products have the 8 significant bits of bfloat16",
    "rounding": "its exponentials are one unit in the last place too large, inside every bound",
    "dead": "it is killed at the place `at`",
    "hang": "it sleeps for ever at the place `at`",
    "stop": "it is stopped (SIGSTOP) at the place `at`",
}


class Plant(Frozen):
    """One fault. chip: of the pool; at: PART or PART:STEP of the examination, for those that strike once."""

    kind: Kind
    chip: Annotated[int, Field(ge=0)]
    factor: Annotated[float, Field(gt=1)] = 2.0
    every: Annotated[int, Field(ge=1)] = 40
    at: str = "speed:3"


def parse(text: str, workers: int | None = None) -> Plant:
    """KIND:CHIP[:FACTOR or :PLACE], as on the command line, for a pool of so many workers. Raises RecipeError where it
    could never strike."""
    kind, _, rest = text.partition(":")
    chip, _, more = rest.partition(":")
    try:
        fields: dict[str, Any] = {"kind": kind, "chip": int(chip)}
        if more:
            fields |= (
                {"at": more}
                if kind in ("dead", "hang", "stop")
                else {"every": int(more)}
                if kind == "flip"
                else {"factor": float(more)}
            )
        plant = Plant(**fields)
    except ValueError:
        raise RecipeError(
            f"{text!r} is no fault to plant", where="--plant", fix=f"KIND:CHIP, KIND one of {', '.join(KINDS)}"
        ) from None
    if workers is not None and plant.chip >= workers:
        raise RecipeError(f"{text!r}: there is no chip {plant.chip}", where="--plant", fix=f"one of 0 to {workers - 1}")
    if plant.at.partition(":")[0] not in PARTS:
        raise RecipeError(f"{text!r}: no such place", where="--plant", fix=f"PART or PART:STEP of {', '.join(PARTS)}")
    return plant


def commit(plants: Sequence[Mapping[str, Any]], chip: int) -> Callable[[str], None]:
    """Spoil this worker as the plants for its chip say. Returns what is to be called at every place."""
    own = [Plant.model_validate(plant) for plant in plants if plant["chip"] == chip]
    for plant in own:
        if plant.kind in _SPOIL:
            _SPOIL[plant.kind](plant)

    def at(place: str) -> None:
        for plant in own:
            if plant.at in (place, place.partition(":")[0]):
                _strike(plant.kind)

    return at


def _strike(kind: Kind) -> None:
    if kind == "dead":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "hang":
        while True:
            time.sleep(60)


def _slow(plant: Plant) -> None:
    import torch

    whole: Callable[..., Any] = torch.matmul

    def matmul(*args: Any, **options: Any) -> Any:
        begun = time.thread_time()
        product = whole(*args, **options)
        until = begun + plant.factor * (time.thread_time() - begun)
        while time.thread_time() < until:
            pass
        return product

    torch.matmul = matmul  # type: ignore[assignment]


def _throttled(plant: Plant) -> None:
    import torch

    whole: Callable[..., Any] = torch.matmul

    def matmul(*args: Any, **options: Any) -> Any:
        begun = time.perf_counter()
        product = whole(*args, **options)
        time.sleep((plant.factor - 1) * (time.perf_counter() - begun))
        return product

    torch.matmul = matmul  # type: ignore[assignment]


def _link(plant: Plant) -> None:
    import torch.distributed as dist

    whole: Callable[..., Any] = dist.send

    def late(tensor: Any, *args: Any, **options: Any) -> Any:
        time.sleep(plant.factor * (2e-4 + tensor.numel() * tensor.element_size() / 1e9))
        return whole(tensor, *args, **options)

    dist.send = late


def _flip(plant: Plant) -> None:
    import torch

    whole: Callable[..., Any] = torch.matmul
    calls = 0

    def matmul(*args: Any, **options: Any) -> Any:
        nonlocal calls
        product = whole(*args, **options)
        if product.requires_grad:
            return product
        calls += 1
        if calls % plant.every == 0:
            bits = product.view({4: torch.int32, 2: torch.int16, 8: torch.int64}[product.element_size()])
            bits.view(-1)[calls * 7919 % bits.numel()] ^= 1
        return product

    torch.matmul = matmul  # type: ignore[assignment]


def _numerics(plant: Plant) -> None:
    import torch

    whole: Callable[..., Any] = torch.matmul

    def matmul(a: Any, b: Any, **options: Any) -> Any:
        if a.dtype == torch.float32:
            return whole(a.bfloat16().float(), b.bfloat16().float(), **options)
        return whole(a, b, **options)

    torch.matmul = matmul  # type: ignore[assignment]


def _rounding(plant: Plant) -> None:
    import torch

    whole: Callable[..., Any] = torch.exp
    torch.exp = lambda x: whole(x) * (1 + 2.0**-23)  # type: ignore[assignment,misc]


_SPOIL: dict[str, Callable[[Plant], None]] = {
    "slow": _slow, "throttled": _throttled, "link": _link, "flip": _flip, "numerics": _numerics, "rounding": _rounding,
}  # fmt: skip
