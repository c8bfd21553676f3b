"""Writes down what the tests have shown about Ascend, for `ottava doctor` (ottava.platforms.ascend.evidence).

As a plugin of pytest (`-p tests.npu.record`) it adds the outcome of every test to the file that OTTAVA_OUTCOMES names;
`python -m tests.npu.record OUTCOMES RECORD` sums that up. A capability is shown where all of its tests ran and passed.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
from collections import defaultdict
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

SHOWS = {
    "tests/npu/test_operators.py": ("operators", "L0"),
    "tests/npu/test_shapes.py": ("mxfp8 operators", "L1"),
    "tests/npu/test_handoff.py": ("hand-off to vllm-ascend", "L0"),
    "tests/npu/test_streams.py": ("memory and streams", "L2"),
    "tests/npu/test_device.py": ("memory and streams", "L2"),
    "tests/npu/test_exchange.py": ("collectives", "L2"),
    "tests/npu/test_group.py": ("collectives", "L2"),
    "tests/npu/test_codes.py": ("error codes", "L2"),
    "tests/npu/test_faults.py": ("error codes", "L2"),
    "tests/npu/test_drills.py": ("fault drills", "L2"),
    "tests/test_platforms.py": ("platform", "L2"),
    "tests/test_trainer.py": ("training", "L2"),
    "tests/test_saver.py": ("exact state", "L2"),
    "tests/test_reduce.py": ("exchange", "L2"),
    "tests/test_supervisor.py": ("supervision", "L2"),
    "tests/test_device_chain.py": ("conversion and verification", "L2"),
}
"""What each file of tests shows, and at which level on host memory. Without the stand-in, L2 is L4."""


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """One line a test: its file, its name, and how it ended. With xdist the process that hands out the tests writes."""
    if "OTTAVA_OUTCOMES" not in os.environ or "PYTEST_XDIST_WORKER" in os.environ:
        return
    if report.when != "call" and report.passed:
        return
    with Path(os.environ["OTTAVA_OUTCOMES"]).open("a") as file:
        file.write(json.dumps([report.nodeid.split("::")[0], report.nodeid, report.outcome]) + "\n")


def summed(lines: list[list[str]], real: bool) -> dict[str, Any]:
    """Capability -> {level, tests, files}. real: no stand-in was there."""
    outcomes: dict[str, list[list[str]]] = defaultdict(list)
    for line in lines:
        if line[0] in SHOWS:
            outcomes[SHOWS[line[0]][0]].append(line)
    shown = {}
    for name, its in sorted(outcomes.items()):
        files = sorted({line[0] for line in its})
        wanted = {file for file, (capability, _) in SHOWS.items() if capability == name}
        if set(files) == wanted and {line[2] for line in its} == {"passed"}:
            level = SHOWS[files[0]][1]
            shown[name] = {"level": "L4" if real and level == "L2" else level, "tests": len(its), "files": files}
    return shown


def main(outcomes: Path, record: Path) -> int:
    """Write the record, unless it says the same already; its date is that of the first time."""
    shown = summed(
        [json.loads(line) for line in outcomes.read_text().splitlines()], "HOST_CANN_LIBRARIES" not in os.environ
    )
    versions = {name: metadata.version(name).split("+")[0] for name in ("torch", "torch_npu", "vllm-ascend")}
    fresh = {"versions": versions, "capabilities": shown}
    before = json.loads(record.read_text()) if record.is_file() else {}
    if {key: before.get(key) for key in fresh} != fresh:
        record.write_text(json.dumps({"date": datetime.date.today().isoformat(), **fresh}, indent=1) + "\n")
    missing = sorted({name for name, _ in SHOWS.values()} - set(shown))
    print(
        f"recorded in {record}: {len(shown)} capabilities" + (f"; not shown: {', '.join(missing)}" if missing else "")
    )
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
