"""torch.distributed over the unmodified ProcessGroupHCCL, against gloo: 2 and 4 ranks, and a step of DDP."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REFUSED = re.compile(
    r"((all_reduce|overlapped|reduce)( \w+)? torch\.float64|reduce_scatter\w* torch\.(float64|uint8)) "
)
"""What ProcessGroupHCCL itself refuses: it moves these types, and does not reduce them."""


def group(words: list[str], ranks: int, seconds: float = 580, **env: str) -> list[subprocess.CompletedProcess[str]]:
    """One process a rank, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks), **env}
    workers = [
        subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        outputs = [worker.communicate(timeout=seconds) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    return [
        subprocess.CompletedProcess(words, worker.returncode, *output)
        for worker, output in zip(workers, outputs, strict=True)
    ]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("jitter", ["0", "300"], ids=["plain", "held up"])
def test_collectives_and_ddp_agree_with_gloo(ranks: int, jitter: str) -> None:
    done = group(["-m", "tests.npu.group"], ranks, HOST_CANN_JITTER_US=jitter)
    assert [process.returncode for process in done] == [0] * ranks, [process.stderr[-2000:] for process in done]
    for rank, process in enumerate(done):
        found = json.loads(process.stdout.splitlines()[-1])
        refused = {case for case, wrong in found.items() if wrong == "refused"}
        assert refused == {case for case in found if REFUSED.match(case)}
        assert {case: wrong for case, wrong in found.items() if wrong and case not in refused} == {}, f"rank {rank}"
        assert len(found) - len(refused) > 120
