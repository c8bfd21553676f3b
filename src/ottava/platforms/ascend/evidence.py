"""How far each thing that Ottava says about Ascend has been shown: read from recorded results, never supposed.

`make test-npu` and `make test-hivm` write evidence.json beside this file (tests/npu/record.py). A capability has the
level at which all of its tests passed and none was skipped; without such a record its level is none. What nobody has
tested is listed too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LEVELS = {
    "none": "not shown",
    "L0": "read: the operator exists, with that signature, or those who read our files do it by these rules",
    "L1": "its shapes and types are accepted, without computing",
    "L2": "Huawei's own torch_npu runs the code, on host memory: state, streams, collectives and errors, not numerics",
    "L3": "the kernel lowers to HIVM; what makes instructions of that is not published",
    "L4": "it ran on an NPU",
}

CAPABILITIES = {
    "operators": "torch_npu has every function and operator that training and generation call",
    "mxfp8 operators": "torch_npu's shapes of MXFP8 are those of the layout mxfp8, scales in pairs",
    "hand-off to vllm-ascend": "the folders of `convert --for vllm-ascend` are what vllm-ascend reads",
    "memory and streams": "copies, streams, events and memory mean what this project takes them for",
    "collectives": "HCCL groups of 2 and 4 ranks make the sums and moves that are asked for",
    "error codes": "every code of torch_npu's table comes out with its class",
    "fault drills": "after a code of every class the run goes on on another pool, without a step or a bit lost",
    "platform": "the conformance suite of platforms",
    "training": "the trainer, on any number of workers",
    "exact state": "states are saved, found again and gone on from, bit for bit",
    "exchange": "the workers' tree of sums",
    "supervision": "faults, restarts, fallback to another pool, replay",
    "conversion and verification": "what was trained there is exported, converted to every layout, proven and loaded",
    "triton kernels": "the FP8 kernels in Triton lower for the chip",
    "numerics": "what the chip computes, against the project's error bounds",
    "speed": "steps and tokens a second",
}
"""What could be claimed, in words. The last two were shown nowhere."""

RECORD = Path(__file__).with_name("evidence.json")


def capabilities(record: Path = RECORD) -> list[dict[str, Any]]:
    """For every capability {"capability", "claim", "level", "evidence"}; evidence: what was recorded, in words."""
    found = read(record)
    return [
        {"capability": name, "claim": claim, **_shown(found.get("capabilities", {}).get(name), found)}
        for name, claim in CAPABILITIES.items()
    ]


def read(record: Path = RECORD) -> dict[str, Any]:
    """The record, or nothing where there is none or it cannot be read: then nothing is shown."""
    try:
        content = json.loads(record.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _shown(entry: dict[str, Any] | None, record: dict[str, Any]) -> dict[str, str]:
    if entry is None or entry.get("level") not in LEVELS:
        return {"level": "none", "evidence": "nothing is recorded"}
    versions = ", ".join(f"{name} {version}" for name, version in entry.get("versions", record["versions"]).items())
    where = ", ".join(entry["files"])
    return {
        "level": entry["level"],
        "evidence": f"{entry['tests']} tests passed ({where}) on {entry.get('date', record['date'])}: {versions}",
    }
