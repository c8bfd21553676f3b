"""Nvidia chips through torch.cuda and NCCL."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ottava.errors import PlatformError
from ottava.platforms.base import FaultClass, Platform, libraries, pin_torch, worker_index

if TYPE_CHECKING:
    import torch

WORKSPACE = ":4096:8"  # cuBLAS repeats its bits only with a fixed workspace (docs.nvidia.com/cuda/cublas)


class Cuda(Platform):
    """A worker is a process with one GPU."""

    name = "cuda"
    visible = "CUDA_VISIBLE_DEVICES"
    signs = (
        (r"CUDA out of memory|cudaErrorMemoryAllocation|CUBLAS_STATUS_ALLOC_FAILED", FaultClass.OUT_OF_MEMORY),
        (r"uncorrectable (ECC|NVLink)|fallen off the bus|no CUDA-capable device", FaultClass.DEVICE_LOST),
        (r"unspecified launch failure|hardware stack error|devices? .*unavailable", FaultClass.DEVICE_LOST),
        (r"NCCL|watchdog caught collective", FaultClass.COLLECTIVE),
        (r"launch timed out|system not yet initialized", FaultClass.TRANSIENT),
        (r"device-side assert|illegal memory access|misaligned address", FaultClass.BUG),
    )

    def available(self) -> tuple[bool, str]:
        import torch

        if torch.version.cuda is None:
            return False, "this build of torch has no CUDA"
        if not torch.cuda.is_available():
            return False, "torch sees no CUDA device"
        return True, torch.cuda.get_device_name(0)

    def count(self) -> int:
        import torch

        return torch.cuda.device_count() if self.available()[0] else 0

    def backend(self) -> str:
        return "nccl"

    def memory(self, index: int = 0) -> tuple[int, int]:
        import torch

        free, total = torch.cuda.mem_get_info(self.device(index))
        return total - free, total

    def peak_memory(self) -> int:
        import torch

        return torch.cuda.max_memory_allocated(self.own())

    def synchronize(self) -> None:
        import torch

        torch.cuda.synchronize(self.device(worker_index() % max(1, self.count())))

    def pin_numerics(self) -> None:
        import torch

        self.require()
        workspace = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACE)
        if workspace not in (":4096:8", ":16:8"):
            raise PlatformError(
                f"CUBLAS_WORKSPACE_CONFIG is {workspace!r}, with which cuBLAS may change bits",
                fix=f"unset it or set it to {WORKSPACE}",
            )
        pin_torch()
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cuda.enable_math_sdp(True)

    def _device(self, index: int) -> torch.device:
        import torch

        return torch.device("cuda", index)

    def _describe(self) -> dict[str, Any]:
        import torch

        major, minor = torch.cuda.get_device_capability(0)
        cudnn, nccl = torch.backends.cudnn.version(), torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        versions = {"cuda": str(torch.version.cuda), "cudnn": str(cudnn), "nccl": ".".join(map(str, nccl))}
        return {
            "chip": torch.cuda.get_device_name(0),
            "instruction_set": f"sm_{major}{minor}",
            "libraries": {**libraries(), **versions},
        }


PLATFORM = Cuda()
