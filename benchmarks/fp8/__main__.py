"""Every measured figure of the format: python -m benchmarks.fp8 [--quick] [--only codec,convert] [--json].

Ratios are ours against a baseline measured in turn in the same run. Leave the machine alone meanwhile.
"""

from __future__ import annotations

from benchmarks.common import run_parts

PARTS = ("codec", "convert", "matmul", "rounding", "grid")


if __name__ == "__main__":
    run_parts("benchmarks.fp8", PARTS, __doc__ or "")
