"""Cores as devices: the platform of the rehearsal, of every test, and of machines without an accelerator."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ottava.platforms.base import Platform, libraries, pin_torch

if TYPE_CHECKING:
    import torch

OTHER_KERNELS = {
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",  # heeded on Intel's processors only
    "MKL_CBWR": "COMPATIBLE",  # heeded on every processor: products of small models differ on AMD's too
}
"""The environment of a pool whose processes round differently from those that may use all of the same processor."""

ISA_VARIABLES = tuple(OTHER_KERNELS)


class Cpu(Platform):
    """A worker is a process on one core. Pools differ by the instruction set their environment allows."""

    name = "cpu"
    shared_memory = True
    forks = True

    def available(self) -> tuple[bool, str]:
        return True, _model_name()

    def count(self) -> int:
        return len(os.sched_getaffinity(0))

    def backend(self) -> str:
        return "gloo"

    def memory(self, index: int = 0) -> tuple[int, int]:
        """The machine's memory, or the control group's where that is smaller; all cores share it."""
        facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        total, free = (1024 * int(facts[key].split()[0]) for key in ("MemTotal", "MemAvailable"))
        used, limit = _control_group()
        return (used, limit) if limit < total else (total - free, total)

    def peak_memory(self) -> int:
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def synchronize(self) -> None:
        """Nothing to wait for: CPU operations are done when they return."""

    def pin_numerics(self) -> None:
        import torch

        pin_torch()
        torch.backends.mkldnn.deterministic = True  # type: ignore[assignment]

    def _device(self, index: int) -> torch.device:
        import torch

        return torch.device("cpu")

    def _describe(self) -> dict[str, Any]:
        import torch

        return {
            "chip": _model_name(),
            "instruction_set": torch.backends.cpu.get_cpu_capability(),
            "limits": {name: os.environ[name] for name in ISA_VARIABLES if name in os.environ},
            "threads": torch.get_num_threads(),
            "libraries": libraries(),
        }


def _model_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "Model", "CPU part")):
            return line.partition(":")[2].strip()
    return "unknown CPU"


def _control_group() -> tuple[int, int]:
    """(used without page cache, limit) of the process's control group, v2 or v1; no limit reads as 2**62."""
    for folder, used, limit, cache in (
        ("/sys/fs/cgroup", "memory.current", "memory.max", "inactive_file"),
        ("/sys/fs/cgroup/memory", "memory.usage_in_bytes", "memory.limit_in_bytes", "total_inactive_file"),
    ):
        try:
            bound = (Path(folder) / limit).read_text().strip()
            now = int((Path(folder) / used).read_text())
            stat = dict(line.split() for line in (Path(folder) / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if bound != "max":
            return max(0, now - int(stat.get(cache, 0))), int(bound)
    return 0, 1 << 62


PLATFORM = Cpu()
