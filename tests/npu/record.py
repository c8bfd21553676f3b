"""Writes down what the tests have shown about Ascend, for `ottava doctor` (ottava.platforms.ascend.evidence).

As a plugin of pytest (`-p tests.npu.record`) it adds the outcome of every test to the file that OTTAVA_OUTCOMES names;
`python -m tests.npu.record OUTCOMES RECORD` sums that up. A capability is shown where all of its tests ran and passed.
With --lowering the outcomes are those of `make test-hivm`, whose environment, and so date and versions, are its own:
each of the two runs writes its own capabilities and leaves the other's as they are.
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
    "tests/npu/test_standby.py": ("supervision", "L2"),
    "tests/test_device_chain.py": ("conversion and verification", "L2"),
    "tests/hivm/test_lowering.py": ("triton kernels", "L3"),
}
"""What each file of tests shows, and at which level on host memory. Without the stand-in, L2 is L4."""


LOWERS_WITH = ("triton-ascend", "ascendnpu-ir")


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


def main(outcomes: Path, record: Path, lowering: bool = False) -> int:
    """Write the record, unless it says the same already; its dates are those of the first time."""
    found = summed(
        [json.loads(line) for line in outcomes.read_text().splitlines()], "HOST_CANN_LIBRARIES" not in os.environ
    )
    wanted = {name for name, level in SHOWS.values() if (level == "L3") == lowering}
    before = json.loads(record.read_text()) if record.is_file() else {}
    names = LOWERS_WITH if lowering else ("torch", "torch_npu", "vllm-ascend")
    versions = {name: metadata.version(name).split("+")[0] for name in names}
    after = merged(before, {name: found[name] for name in sorted(wanted & set(found))}, versions, lowering)
    if after != before:
        record.write_text(json.dumps(after, indent=1) + "\n")
    missing = sorted(wanted - set(found))
    shown = len(wanted) - len(missing)
    print(f"recorded in {record}: {shown} capabilities" + (f"; not shown: {', '.join(missing)}" if missing else ""))
    return 1 if missing else 0


def merged(before: dict[str, Any], shown: dict[str, Any], versions: dict[str, str], lowering: bool) -> dict[str, Any]:
    """The record after a run of one kind: its capabilities replaced, those of the other kind untouched."""
    today = datetime.date.today().isoformat()
    theirs = {name for name, level in SHOWS.values() if (level == "L3") != lowering}
    recorded = before.get("capabilities", {})
    kept = {name: entry for name, entry in recorded.items() if name in theirs}
    if not lowering:
        fresh = {"versions": versions, "capabilities": dict(sorted({**kept, **shown}.items()))}
        same = {key: before.get(key) for key in fresh} == fresh
        return {"date": before["date"] if same else today, **fresh}
    for name, entry in shown.items():
        old = recorded.get(name, {})
        same = {**entry, "versions": versions} == {key: old[key] for key in old if key != "date"}
        kept[name] = {**entry, "date": old["date"] if same else today, "versions": versions}
    return {"date": today, "versions": {}, **before, "capabilities": dict(sorted(kept.items()))}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), "--lowering" in sys.argv[3:]))
