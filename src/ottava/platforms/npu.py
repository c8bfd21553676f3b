"""Huawei Ascend chips through torch_npu and HCCL.

Evidence: the unmodified torch_npu runs this, with everything above it, on host memory (docs/ascend.md, level L2).
Nothing here has run on an Ascend chip in this project.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from ottava.errors import PlatformError
from ottava.platforms.ascend import chips, codes, setup
from ottava.platforms.base import FaultClass, Platform, libraries, pin_torch, worker_index

if TYPE_CHECKING:
    import torch


class Npu(Platform):
    """A worker is a process with one NPU (on a 910C: one die)."""

    name = "npu"
    visible = "ASCEND_RT_VISIBLE_DEVICES"
    signs = (
        (r"NPU out of memory|ERR\d{2}006", FaultClass.OUT_OF_MEMORY),
        (r"\bE[IJ]\d{4}\b|HCCL|ERR02\d{3}|ERR\d{2}200", FaultClass.COLLECTIVE),
        (r"\bECC error|\bUCE\b", FaultClass.DEVICE_LOST),
    )

    def available(self) -> tuple[bool, str]:
        wrong = setup.missing()
        if wrong is not None:
            return False, wrong
        try:
            npu = _torch_npu().npu
        except (ImportError, OSError, RuntimeError) as error:
            return False, f"torch_npu cannot be loaded: {error}"
        if not npu.is_available():
            return False, "torch_npu sees no NPU: see `npu-smi info`, and what ASCEND_RT_VISIBLE_DEVICES names"
        soc = str(npu.get_device_name(0))
        try:
            return True, f"{soc} ({chips.chip_of(soc)})"
        except PlatformError as error:
            return False, f"{error.what}: {error.fix}"

    def count(self) -> int:
        return int(_torch_npu().npu.device_count()) if self.available()[0] else 0

    def backend(self) -> str:
        return "hccl"

    def process_group(self) -> str:
        wrong = setup.group(os.environ, self.count())
        if wrong is not None:
            raise PlatformError(f"no HCCL group can be opened: {wrong}")
        return super().process_group()

    def memory(self, index: int = 0) -> tuple[int, int]:
        device = self.device(index)
        free, total = _torch_npu().npu.mem_get_info(device)
        return int(total - free), int(total)

    def peak_memory(self) -> int:
        device = self.own()
        return int(_torch_npu().npu.max_memory_allocated(device))

    def synchronize(self) -> None:
        device = self.device(worker_index() % max(1, self.count()))
        _torch_npu().npu.synchronize(device)

    def pin_numerics(self) -> None:
        self.require()
        os.environ["HCCL_DETERMINISTIC"] = "true"
        os.environ["LCCL_DETERMINISTIC"] = "1"
        os.environ["CLOSE_MATMUL_K_SHIFT"] = "1"
        pin_torch()
        npu = _torch_npu().npu
        npu.set_compile_mode(jit_compile=False)
        npu.config.allow_internal_format = False
        npu.matmul.allow_hf32 = False
        npu.conv.allow_hf32 = False

    def open(self) -> torch.device:
        """As the base, and makes the device the current one: torch_npu empties the queue of that device alone."""
        device = super().open()
        _torch_npu().npu.set_device(device)
        return device

    def words(self, error: BaseException) -> str:
        return codes.words(str(error))

    def classify_error(self, error: BaseException) -> FaultClass:
        """As the base; a number in the text (`error code is N`) decides first, for all are plain RuntimeErrors."""
        number = codes.number(str(error))
        return super().classify_error(error) if number is None else codes.TABLE[number]

    def _device(self, index: int) -> torch.device:
        import torch

        return torch.device("npu", index)

    def _describe(self) -> dict[str, Any]:
        torch_npu = _torch_npu()
        return {
            "chip": str(torch_npu.npu.get_device_name(0)),
            "instruction_set": str(torch_npu.npu.get_device_name(0)),
            "libraries": {**libraries(), "torch_npu": str(torch_npu.__version__)},
        }


def _torch_npu() -> Any:
    """torch_npu, imported on first use; it registers the `npu` device with torch."""
    return importlib.import_module("torch_npu")


PLATFORM = Npu()
