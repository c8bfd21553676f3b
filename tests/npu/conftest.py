"""Tests of the stand-in itself. They are collected under `python -m host_cann run` alone (`make test-npu`).

Bit-equality with the CPU is circular here: what is shown is that state, streams, collectives and errors are handled
right, not Ascend's numerics (level L2 of docs/ascend.md).
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if "HOST_CANN_LIBRARIES" in os.environ else ["*"]
