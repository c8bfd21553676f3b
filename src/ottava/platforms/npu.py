"""Huawei Ascend chips through torch_npu and HCCL.

Evidence: written from torch_npu's public sources and documentation. Nothing here has run on an
Ascend chip in this project; the conformance suite skips it where there is none.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from typing import TYPE_CHECKING, Any

from ottava.platforms.base import FaultClass, Platform, libraries, pin_torch, worker_index

if TYPE_CHECKING:
    import torch

# Error numbers and their meaning: torch_npu, csrc/core/npu/NPUErrorCodes.h; 507054 from its documentation.
CODES = {
    FaultClass.OUT_OF_MEMORY: (200000, 207001, 207018, 300000),
    FaultClass.DEVICE_LOST: (207004, 507010, 507013, 507033, 507054, 507899, 507901),
    FaultClass.COLLECTIVE: (107020, 507022, 507046, 507047),  # waiting for a stream or an event: a peer is not coming
    FaultClass.TRANSIENT: (107019, 507014, 507015, 507017, 507018, 507034, 507035, 507048),
    FaultClass.NUMERIC: (207003,),
    FaultClass.BUG: (107000, 107001, 107002, 107003, 507016, 507036, 507042, 507043, 507044, 507045),
}
_FAULT_OF = {code: fault for fault, codes in CODES.items() for code in codes}


class Npu(Platform):
    """A worker is a process with one NPU (on a 910C: one die)."""

    name = "npu"
    visible = "ASCEND_RT_VISIBLE_DEVICES"
    signs = (
        (r"NPU out of memory|ERR\d{2}006", FaultClass.OUT_OF_MEMORY),
        (r"\bEI\d{4}\b|HCCL|ERR02\d{3}|ERR\d{2}200", FaultClass.COLLECTIVE),
        (r"ECC error|UCE", FaultClass.DEVICE_LOST),
    )

    def available(self) -> tuple[bool, str]:
        if importlib.util.find_spec("torch_npu") is None:
            return False, "torch_npu is not installed"
        try:
            npu = _torch_npu().npu
        except (ImportError, OSError, RuntimeError) as error:
            return False, f"torch_npu cannot be loaded: {error}"
        if not npu.is_available():
            return False, "torch_npu sees no NPU"
        return True, str(npu.get_device_name(0))

    def count(self) -> int:
        return int(_torch_npu().npu.device_count()) if self.available()[0] else 0

    def backend(self) -> str:
        return "hccl"

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

    def classify_error(self, error: BaseException) -> FaultClass:
        """As the base; a number in the text (`error code is N`) decides first, for all are plain RuntimeErrors."""
        for match in re.finditer(r"error code is (\d+)|\b([1235]0\d{4})\b", str(error)):
            fault = _FAULT_OF.get(int(match[1] or match[2]))
            if fault is not None:
                return fault
        return super().classify_error(error)

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
