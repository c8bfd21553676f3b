"""The gateway under load and faults: python -m benchmarks.gateway [--quick] [--only storm,overhead,...] [--json].

A gateway in a process of its own with backends in theirs, asked over HTTP by this process. The model is the one of
recipes/tiny.yaml with random weights, so that the gateway's own share of the time is as large as it can be.
storm: replies under kills against those of an engine that nobody disturbed. overhead: what the gateway adds to one
request. idle: streams that are held. overload: four times what it can do. Leave the machine alone meanwhile; only the
counts of storm do not depend on it.
"""

from __future__ import annotations

from benchmarks.common import run_parts

PARTS = ("storm", "overhead", "idle", "overload")


if __name__ == "__main__":
    run_parts("benchmarks.gateway", PARTS, __doc__ or "")
