"""Tests of the stand-in itself. They are collected under `python -m host_cann run` alone (`make test-npu`).

Bit-equality with the CPU is circular here: what is shown is that state, streams, collectives and errors are handled
right, not Ascend's numerics (level L2 of docs/ascend.md).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

collect_ignore_glob = [] if "HOST_CANN_LIBRARIES" in os.environ else ["*"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies here, so that one run can ask for it and for the tests of the marker `device` at once."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.stand_in)
