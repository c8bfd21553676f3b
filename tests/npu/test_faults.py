"""Injected codes come out of torch_npu as its own exceptions, on the rank and at the call that were chosen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from ottava.platforms import FaultClass
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


def test_a_rule_that_cannot_be_read_ends_the_process() -> None:
    """A drill whose fault is not planted would pass for no reason."""
    code = "from tests.npu import raw; raw.device(0)"
    for rules in ("call=aclrtSetDevice", "code=5", "call=x code=five", "call=x code=5 when=now"):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
            env={**os.environ, "HOST_CANN_FAULTS": rules},
        )  # fmt: skip
        assert done.returncode != 0
        assert "HOST_CANN_FAULTS" in done.stderr
