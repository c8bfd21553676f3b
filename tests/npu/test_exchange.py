"""HCCL's calls between processes, byte for byte against numpy: every collective, type and reduction."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MISMATCH = """
import sys, time
from ctypes import c_uint64
import numpy as np
from tests.npu import raw
rank = int(sys.argv[2]); raw.device(rank)
comm, stream, place = raw.communicator(sys.argv[1].encode(), 2, rank), raw.stream(), raw.put(np.ones(4, np.float32))
if rank == 0:
    raw.hccl.HcclAllReduce(place, place, c_uint64(4), 4, 0, comm, stream)
elif sys.argv[3] == "other":
    raw.hccl.HcclAllGather(place, raw.allocate(64), c_uint64(4), 4, comm, stream)
elif sys.argv[3] == "longer":
    raw.hccl.HcclAllReduce(place, place, c_uint64(3), 4, 0, comm, stream)
else:
    time.sleep(4); sys.exit()
try:
    raw.acl.aclrtSynchronizeStream(stream); print("passed")
except raw.Failed as error:
    print(error.args[1], raw.last_message())
"""


def started(words: list[str], ranks: int, **env: str) -> list[str]:
    """The output of one process a rank."""
    name = f"host_cann_test_{os.getpid()}_{os.urandom(4).hex()}"
    workers = [
        subprocess.Popen(
            [sys.executable, *[word.format(name=name, rank=rank) for word in words]], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, env={**os.environ, "RANK": str(rank), **env},
        )
        for rank in range(ranks)
    ]  # fmt: skip
    outputs = [worker.communicate(timeout=600)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * ranks
    return outputs


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_collective_moves_and_sums_the_right_bytes(ranks: int) -> None:
    found = [json.loads(out) for out in started(["-m", "tests.npu.exchange", "{name}", str(ranks), "{rank}"], ranks)]
    wrong = [(rank, case) for rank, cases in enumerate(found) for case, right in cases.items() if not right]
    assert wrong == []
    assert len(found[0]) > 200
    assert all(cases.keys() == found[0].keys() for cases in found)


@pytest.mark.parametrize(
    ("what", "code", "said"),
    [("other", 507022, "in AllGather of 16"), ("longer", 507022, "of 8"), ("nobody", 507046, "EI0002")],
)
def test_ranks_that_do_not_do_the_same_fail(what: str, code: int, said: str) -> None:
    """The first to see it says what; the other waits in vain."""
    outputs = started(["-c", MISMATCH, "{name}", "{rank}", what], 2, HCCL_EXEC_TIMEOUT="2")
    assert not any("passed" in output for output in outputs)
    assert any(output.startswith(str(code)) and said in output for output in outputs), outputs
