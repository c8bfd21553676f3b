"""How long `ottava --help` takes, beside an interpreter that does nothing: python -m benchmarks.startup"""

from __future__ import annotations

import subprocess
import sys
import time

from benchmarks.common import options, paired, show


def timed(*command: str) -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def main() -> None:
    args = options(__doc__ or "", pairs=10)
    row = paired("help", lambda: timed("-m", "ottava.cli", "--help"), lambda: timed("-c", "pass"), args.pairs)
    show([row], args.json)


if __name__ == "__main__":
    main()
