"""What surviving costs and what it saves: python -m benchmarks.supervision [--quick] [--only trainer] [--json].

Ratios are against a baseline measured in turn in the same run. Leave the machine alone meanwhile.
"""

from __future__ import annotations

from benchmarks.common import run_parts

PARTS = ("trainer", "watched", "trl", "restart")  # modules of this package, each with rows(quick)


if __name__ == "__main__":
    run_parts("benchmarks.supervision", PARTS, __doc__ or "")
