"""Injected codes come out of torch_npu as its own exceptions, on the rank and at the call that were chosen."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ottava.platforms import FaultClass
from ottava.platforms.ascend import codes
from ottava.platforms.npu import Npu

from .test_group import ROOT, group

SYNCHRONISE = "aclrtSynchronizeDeviceWithTimeout"


def alone(rules: str) -> dict[str, Any]:
    """What one rank says under these rules."""
    return run(1, rules)[0]


def run(ranks: int, rules: str) -> list[dict[str, Any]]:
    done = group(["-m", "tests.npu.faults"], ranks, HOST_CANN_FAULTS=rules, HCCL_EXEC_TIMEOUT="20")
    assert [process.returncode for process in done] == [0] * ranks, [process.stderr[-2000:] for process in done]
    return [json.loads(process.stdout.splitlines()[-1]) for process in done]


def test_without_rules_nothing_is_raised() -> None:
    assert alone("") == {"raised": None, "text": "", "done": 6}


@pytest.mark.parametrize(
    ("rules", "code", "done"),
    [
        (f"call={SYNCHRONISE} code=507054 nth=3", 507054, 2),
        ("call=aclrtMemcpyAsync code=507015 later=1", 507015, 0),
        ("call=aclrtMalloc code=507899 times=0", 507899, 0),  # torch_npu tries a second time
    ],
)
def test_a_code_comes_out_with_its_number(rules: str, code: int, done: int) -> None:
    found = alone(rules)
    assert found["raised"] == "RuntimeError"
    assert f"error code is {code}" in found["text"]
    assert found["done"] == done


def test_no_memory_is_an_error_of_its_own() -> None:
    found = alone("call=aclrtMalloc code=207001 times=0")
    assert found["raised"] == "OutOfMemoryError"


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_that_fails_in_a_collective(ranks: int) -> None:
    """It says the code; the others wait for it as long as they are told to, and then say so."""
    found = run(ranks, "call=HcclAllReduce code=507899 nth=3 rank=1 later=1")
    assert "error code is 507899" in found[1]["text"]
    assert found[1]["done"] == 2
    for rank in set(range(ranks)) - {1}:
        assert found[rank]["raised"] == "RuntimeError"
        assert found[rank]["done"] == 2
        assert Npu().classify_error(RuntimeError(found[rank]["text"])) is FaultClass.COLLECTIVE, found[rank]


def test_an_error_of_hccl_itself() -> None:
    found = run(2, "call=HcclAllReduce code=21 nth=2 rank=0")
    assert found[0]["raised"] == "RuntimeError"
    assert "injected 21 in HcclAllReduce" in found[0]["text"]  # by its task queue, which says no number of its own
    assert Npu().classify_error(RuntimeError(found[0]["text"])) is FaultClass.COLLECTIVE


@pytest.mark.parametrize("name", ["HOST_CANN_DEVICES", "HOST_CANN_MEMORY_MB", "HOST_CANN_JITTER_US"])
def test_a_setting_that_is_no_number_ends_the_process(name: str) -> None:
    code = "from tests.npu import raw; raw.device(0); raw.allocate(64); raw.stream()"
    for value in ("x", "-4", "5us"):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env={**os.environ, name: value}
        )
        assert done.returncode != 0
        assert f"{name}={value} is no number" in done.stderr


ONLY_LOOKS = "from tests.npu import raw; raw.device(0)"
UNPLANTED = [
    ("call=aclrtSetDevice", "needs call= and code="),
    ("code=207001", "needs call= and code="),
    ("call=aclrtMalloc code=five", "cannot read code=five"),
    ("call=aclrtMalloc code=207001 when=now", "cannot read when=now"),
    ("call=aclrtMaloc code=207001", "no call is named aclrtMaloc"),
    ("call=aclrtMaloc code=207001", "did you mean aclrtMalloc?"),
    ("call=aclrtMapMem code=207001", "no call is named aclrtMapMem"),  # the stand-in has it only to refuse it
    ("call=aclopGelu code=207001", "no call is named aclopGelu"),
    ("call=aclrtMalloc code=207099", "207099 is no code"),
    ("call=aclrtMalloc code=207001 nth=0", "no call would ever fail"),
    ("call=aclrtMalloc code=207001 times=-1", "no call would ever fail"),
    ("call=aclrtMalloc code=207001 rank=-1", "cannot read rank=-1"),
    ("call=aclrtMalloc code=207001 later=1", "gives no stream work"),
    ("call=aclrtMalloc code=207001; call=HcclAllRed code=21", "did you mean HcclAllReduce?"),
    ("@/no/such/file", "no such file"),
    (f"@{ROOT}", "no such file"),
]


@pytest.mark.parametrize(("rules", "what"), UNPLANTED)
def test_a_fault_that_could_never_be_planted_is_refused(rules: str, what: str) -> None:
    """A drill whose fault is not planted would pass for no reason: before it starts, and at its first call."""
    env = {**os.environ, "HOST_CANN_FAULTS": rules}
    for words, status in (
        (["-m", "host_cann", "run", "--", "echo", "began"], 2),
        (["-c", ONLY_LOOKS], -signal.SIGABRT),
    ):
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, env=env)
        assert done.returncode == status
        assert "began" not in done.stdout
        assert done.stderr.count("HOST_CANN_FAULTS") == 1
        assert what in done.stderr
        assert "mend: " in done.stderr


def test_a_file_of_faults_that_goes_away_ends_the_process(tmp_path: Path) -> None:
    file = tmp_path / "faults"
    code = f"import os; from tests.npu import raw; raw.device(0); os.unlink({str(file)!r}); raw.device(0)"
    file.write_text("call=aclrtMalloc code=207001\n")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "HOST_CANN_FAULTS": f"@{file}"},
    )  # fmt: skip
    assert done.returncode == -signal.SIGABRT
    assert f"where: {file}" in done.stderr


def test_every_code_of_the_table_can_be_planted() -> None:
    """Each with a call of each library."""
    calls = ("aclrtMalloc", "HcclAllReduce", "aclopCast")
    rules = ";".join(f"call={calls[code % 3]} code={code}" for code in codes.TABLE)
    done = subprocess.run(
        [sys.executable, "-m", "host_cann", "run", "--", "echo", "began"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "HOST_CANN_FAULTS": rules},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "began\n"), done.stderr
