"""The table of codes against the wheel's own, and every code through torch_npu's own exceptions, in one process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from host_cann.build import DOCUMENTED, wheel_codes

from ottava.platforms.ascend import codes
from ottava.platforms.npu import Npu

from .test_group import ROOT

SILENT = {207000}
"""What torch_npu lets pass with a warning where it waits for a device."""


def test_every_code_of_the_wheel_is_classified_and_no_other() -> None:
    assert len(wheel_codes()) > 180
    assert set(codes.TABLE) == wheel_codes() | set(codes.OUTSIDE)
    assert set(DOCUMENTED) == set(codes.OUTSIDE)


EVERY_CODE = """
import json, os, sys
from pathlib import Path
import torch, torch_npu
file, found = Path(os.environ["HOST_CANN_FAULTS"][1:]), {}
torch.ones(1, device="npu")
for code in map(int, sys.argv[1:]):
    file.write_text(f"call=aclrtSynchronizeDeviceWithTimeout code={code}\\n")
    try:
        torch.npu.synchronize()
        found[code] = None
    except Exception as error:
        found[code] = str(error)
    file.write_text("")
    torch.npu.synchronize()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str | None]:
    """What torch_npu says of every code. The rules lie in a file that changes while the process runs."""
    file = tmp_path_factory.mktemp("codes") / "faults"
    file.write_text("")
    done = subprocess.run(
        [sys.executable, "-c", EVERY_CODE, *map(str, sorted(codes.TABLE))], cwd=ROOT, capture_output=True, text=True,
        check=True, env={**os.environ, "HOST_CANN_FAULTS": f"@{file}"},
    )  # fmt: skip
    return {int(code): text for code, text in json.loads(done.stdout.splitlines()[-1]).items()}


def test_every_code_comes_out_with_its_number_and_class(said: dict[int, str | None]) -> None:
    assert {code for code, text in said.items() if text is None} == SILENT
    for code, text in said.items():
        if code in SILENT:
            continue
        assert f"error code is {code}" in str(text)
        assert Npu().classify_error(RuntimeError(text)) is codes.TABLE[code], text


def test_words_are_the_same_for_the_same_code_alone(said: dict[int, str | None]) -> None:
    words = {Npu().words(RuntimeError(text)) for text in said.values() if text is not None}
    assert len(words) == len(said) - len(SILENT)
    assert not any(re.search(r"PID:|20\d\d-\d\d-\d\d", line) for line in words)
