"""How long it takes to begin: python -m benchmarks.startup

help         `ottava --help` beside an interpreter that does nothing
warm start   a worker forked from the warm process, beside a fresh interpreter, to its first line
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import options, paired, show

FRESH = "import ottava.trainer.worker; from transformers.models.deepseek_v3 import DeepseekV3ForCausalLM"


def timed(*command: str) -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def nothing(args: Mapping[str, Any]) -> dict[str, Any]:
    """In a worker: import what a worker imports, do nothing."""
    import ottava.trainer.worker  # noqa: F401

    return {}


def main() -> None:
    args = options(__doc__ or "", pairs=10)
    from ottava.supervisor.local import LocalLauncher

    rows = [paired("help", lambda: timed("-m", "ottava.cli", "--help"), lambda: timed("-c", "pass"), args.pairs)]
    with tempfile.TemporaryDirectory() as name, LocalLauncher() as launcher:

        def warm() -> float:
            begun = time.perf_counter()
            launcher.call("benchmarks.startup:nothing", {}, logs=Path(name))
            return time.perf_counter() - begun

        rows.append(paired("warm start", warm, lambda: timed("-c", FRESH), min(args.pairs, 5)))
    show(rows, args.json)


if __name__ == "__main__":
    main()
