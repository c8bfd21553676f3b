"""One rank of a small training run, started by test_faults.py: says what was raised, as one JSON object.

    python -m tests.npu.faults

Each step: a copy to the device, a computation, a sum over the ranks, a number read on the host.
"""

from __future__ import annotations

import json
import os

import torch
import torch.distributed as dist
import torch_npu  # noqa: F401  (registers the device and HCCL)

STEPS = 6


def main() -> dict[str, object]:
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    torch.npu.set_device(rank)
    if world > 1:
        dist.init_process_group("cpu:gloo,npu:hccl")
    done = 0
    try:
        weights = torch.ones(64, device="npu")
        for step in range(STEPS):
            values = (torch.full((64,), float(step)).pin_memory().to("npu", non_blocking=True) * weights).square()
            if world > 1:
                dist.all_reduce(values)
            torch.npu.synchronize()
            assert values.sum().item() == 64.0 * world * step**2
            done += 1
    except Exception as error:
        return {"raised": type(error).__name__, "text": str(error), "done": done}
    return {"raised": None, "text": "", "done": done}


if __name__ == "__main__":
    print(json.dumps(main()), flush=True)
    os._exit(0)  # a failed device has nothing to tidy up
