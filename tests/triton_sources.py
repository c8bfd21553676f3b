"""The Triton kernels as a launch would give them to a compiler, for tests that compile without a chip."""

from __future__ import annotations

from typing import Any

from ottava.fp8 import triton as kernels


def sources(rows: int) -> dict[str, tuple[Any, dict[str, str], dict[str, int]]]:
    """Name -> (kernel, types of its pointers, its constants); all else is i32. rows: of a block, held at once."""
    quantise = {"w": "*i32", "codes": "*u8", "scales": "*u8"}
    project = {"w": "*i32", "out": "*i32", "scales": "*u8"}
    dequantise = {"codes": "*u8", "scales": "*u8", "out": "*i32"}
    ones = dict.fromkeys(("rows", "columns", "down", "across"), 1)  # a launch makes constants of arguments that are 1
    blocks = {"HEIGHT": 128, "WIDTH": 128, "FRACTION": 10, "OFFSET": 112}
    number = {**ones, "scales_down": 1, "scales_across": 1, "HEIGHT": 1, "WIDTH": 32, "FRACTION": 23, "OFFSET": 0}
    found = {
        "quantise": (kernels._quantise_kernel, quantise, {"FRACTION": 23}),
        "quantise bf16": (kernels._quantise_kernel, quantise | {"w": "*i16"}, {"FRACTION": 7}),
        "project": (kernels._project_kernel, project, {"FRACTION": 23}),
        "project bf16": (kernels._project_kernel, project | {"w": "*i16", "out": "*i16"}, {"FRACTION": 7}),
        "dequantise": (kernels._dequantise_kernel, dequantise | {"out": "*i16"}, blocks),
        "dequantise one number": (kernels._dequantise_kernel, dequantise, number),
        "project one number": (kernels._project_kernel, project, {**ones, "FRACTION": 23}),
    }
    return {name: (kernel, types, {**constants, "ROWS": rows}) for name, (kernel, types, constants) in found.items()}
