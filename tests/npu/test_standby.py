"""Workers of NPUs as Ottava starts them: fresh processes, of which some wait with their device open.

The other tests take forks of a warm process (zygote.py), for the sake of time.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ottava.recipe import Pool
from ottava.supervisor.local import LocalLauncher

ABOUT = "tests.npu.test_standby:about"
POOL = Pool(name="n", platform="npu", workers=1)


def about(args: Any) -> dict[str, Any]:
    """What a worker is, and whether its device was open before it was asked for anything."""
    import torch

    opened = bool(torch.npu.is_initialized())
    return {
        "pid": os.getpid(),
        "command": Path("/proc/self/cmdline").read_text().split("\0"),
        "opened": opened,
        "sum": torch.arange(args["count"], device="npu").sum().item(),
        "visible": os.environ["ASCEND_RT_VISIBLE_DEVICES"],
    }


def test_a_worker_is_fresh_and_its_successor_waits(tmp_path: Path) -> None:
    with LocalLauncher() as launcher:
        assert launcher._zygote is not None
        zygote = launcher._zygote.pid
        (first,) = launcher.call(ABOUT, {"count": 5}, pool=POOL, logs=tmp_path)
        waiting = Path(f"/proc/{zygote}/task/{zygote}/children").read_text().split()
        (second,) = launcher.call(ABOUT, {"count": 6}, pool=POOL, logs=tmp_path)
    assert [str(second["pid"])] == waiting
    assert (first["sum"], second["sum"]) == (10, 15)
    for worker in (first, second):
        assert "ottava.supervisor.standby" in worker["command"]
        assert worker["opened"]
        assert worker["visible"] == "0"
