"""What surviving costs and what it saves: python -m benchmarks.supervision [--quick] [--only trainer] [--json].

Ratios are against a baseline measured in turn in the same run. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from benchmarks.common import show

PARTS = ("trainer", "watched")  # modules of this package, each with rows(quick)


def main() -> None:
    """Run the parts and print {"results": [...]}."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions: a look, not a measurement")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, separated by commas: {', '.join(PARTS)}")
    options = parser.parse_args()
    chosen = options.only.split(",")
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"no part named {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    results = []
    for part in chosen:
        print(f"measuring {part} ...", file=sys.stderr, flush=True)
        results += importlib.import_module(f"benchmarks.supervision.{part}").rows(options.quick)
    show(results, options.json)


if __name__ == "__main__":
    main()
