"""Finds a parallel layout for work that names none: the fastest of those that fit into memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ottava.planner import memory
from ottava.planner.chips import Chip
from ottava.planner.steptime import Machine, Step, Terms, step
from ottava.planner.workload import Layout, Workload

USABLE = 0.92
"""Share of a chip's memory that a layout may fill. Assumed: the rest is the runtime's."""


@dataclass(frozen=True)
class Found:
    """A layout with its step and its bytes (1e9) on the fullest chip. fits: into the chip's memory."""

    layout: Layout
    step: Step
    memory_gb: float
    fits: bool


def best(work: Workload, chip: Chip, machine: Machine, terms: Terms) -> Found:
    """The layout given, or the fastest one that fits; where none fits, the one that needs least."""
    given = (work.layout,) if work.layout is not None else tuple(candidates(work, machine))
    found = []
    for layout in given:
        needed = memory.total_gb(work, layout)
        found.append((needed > chip.memory_gb.value * USABLE, layout, needed))
    fitting = [one for one in found if not one[0]]
    if not fitting:
        fitting = [min(found, key=lambda one: one[2])]
    timed = [Found(layout, step(work, layout, machine, terms), needed, not big) for big, layout, needed in fitting]
    return min(timed, key=lambda one: one.step.seconds)


def candidates(work: Workload, machine: Machine) -> Iterator[Layout]:
    """Layouts that divide the chips, the heads, the layers (nearly) and the batch."""
    model, chips = work.model, work.chips
    near = max(1, min(machine.linked, 8))
    if work.stack == "fsdp":
        for micro in (1, 2, 4, 8):
            if micro == 1 or work.batch >= chips * micro:
                yield Layout(tensor=1, micro=micro)
        return
    experts = [1, 4, 8, 16, 32, 64] if model.experts else [1]
    for tensor in (t for t in (1, 2, 4, 8) if t <= near and model.heads % t == 0):
        for pipeline in (p for p in (1, 2, 4, 8, 16, 32) if p <= model.layers):
            size = tensor * pipeline
            if chips % size or chips // size > work.batch:
                continue
            for expert in experts:
                if chips // pipeline % expert or (model.experts and model.experts.count % expert):
                    continue
                for micro in (m for m in (1, 2, 4) if m == 1 or work.batch >= m * (chips // size)):
                    for virtual in {1, *(v for v in (2, 4) if pipeline > 1 and model.layers >= pipeline * v)}:
                        yield Layout(tensor=tensor, pipeline=pipeline, virtual=virtual, expert=expert, micro=micro)
    yield Layout()  # where nothing else divides the work; it seldom fits
