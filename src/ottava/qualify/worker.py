"""One worker of an examination: takes its place, does the parts that it is given, and says what it found."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ottava import link, platforms
from ottava.platforms.base import FaultClass
from ottava.qualify import measure, plants
from ottava.qualify.measure import Bench
from ottava.trainer.guard import Group
from ottava.trainer.probe import size
from ottava.trainer.spec import Shape, TrainSpec

COLUMNS = 2  # losses that travel with a gradient


def run(args: Mapping[str, Any]) -> dict[str, Any]:
    """Do args["parts"] in the group that the environment names, and say each one's findings over the line.

    args: platform, chips (by rank), parts, seed, alpha, factor, link_factor, soak_s, hang_s, plants, spec: the recipe's
    `train` section or None, most: bytes of the largest message. A failure is said, with its class, before it ends this.
    """
    line, platform = link.connect(), platforms.asked(args)
    group = Group(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    try:
        device = platform.open()
        strike = plants.commit(args["plants"], args["chips"][group.rank])
        if group.world > 1:
            dist.init_process_group(platform.process_group(), timeout=timedelta(seconds=3 * args["hang_s"]))
        bench = Bench(platform, device, group, line, strike, args["seed"], args["alpha"])
        line.join()
        for part in args["parts"]:
            line.say("found", part=part, data=_part(part, bench, args))
        bench.meet()
        line.bye(0)
    except Exception as error:
        kind = platform.classify_error(error)
        line.alarm(kind.value, 0, " ".join(str(error).split())[:400] or type(error).__name__)
        if kind is FaultClass.BUG:
            raise
        os._exit(1)  # not through a destructor that waits for a peer that is gone
    return {}


def _part(part: str, bench: Bench, args: Mapping[str, Any]) -> dict[str, Any]:
    floats = _floats(args["spec"])
    sizes = measure.messages(floats, bench.group.world)
    if part == "numbers":
        return measure.numbers(bench)
    if part == "collectives":
        return measure.collectives(bench, sizes, args["most"])
    if part == "links":
        largest = max((n for name, n in sizes.items() if name.startswith("tree")), default=sizes["gradient"])
        return measure.links(bench, max(4096, min(largest, args["most"])) // 4 * 4, args["link_factor"])
    if part == "speed":
        return measure.speed(bench, args["factor"])
    if part == "repeat":
        return measure.repeat(bench)
    assert part == "soak", part
    return measure.soak(bench, args["soak_s"], min(sizes["gradient"], args["most"]))


def _floats(section: Mapping[str, Any] | None) -> int:
    """Floats that a step's sum has: weights, expert loads, losses; without a recipe those of 1 MiB."""
    if section is None:
        return 1 << 18
    spec = TrainSpec.model_validate(section)
    loads = (spec.shape.layers - 1) * spec.shape.experts if isinstance(spec.shape, Shape) else 0
    return size(spec) + loads + COLUMNS
