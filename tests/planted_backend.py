"""A backend process with a fault: python -m tests.planted_backend ARGS FAULT, ARGS as `gateway.backend` has them.

FAULT is JSON: {"load": a folder whose weights it computes with, though it was told another; "prefix": true: it reads
the last id of a prompt, by which a mode is told, twice; "dtype": "float32": it computes in another precision;
"flag": a file: only once this exists}.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ottava.engine.session import Deliver, Engine, Job, Sampling
from ottava.gateway.backend import Backend


class Planted:
    """An engine that turns into another."""

    def __init__(self, sound: Engine, other: Engine, fault: dict[str, Any]):
        self._sound, self._other, self._fault = sound, other, fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sound, name)

    @property
    def load_now(self) -> int:
        return self._sound.load_now + (self._other.load_now if self._other is not self._sound else 0)

    def submit(self, ids: Sequence[int], sampling: Sampling, deliver: Deliver, forced: Sequence[int] = ()) -> Job:
        if "flag" in self._fault and not Path(self._fault["flag"]).exists():
            return self._sound.submit(ids, sampling, deliver, forced)
        if self._fault.get("prefix"):
            ids = [*ids, ids[-1]]
        return self._other.submit(ids, sampling, deliver, forced)


def main() -> None:
    args, fault = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(0)), daemon=True).start()
    bounds = {"slots": args["slots"], "queue": args["slots"]}
    dtype = torch.float32 if fault.get("dtype") == "float32" else None
    sound = Engine.load(args["model"], dtype=dtype, **bounds)
    other = Engine.load(fault["load"], dtype=dtype, **bounds) if "load" in fault else sound
    backend: Any = Backend(Planted(sound, other, fault))  # type: ignore[arg-type]
    asyncio.run(backend.run(Path(args["socket"])))


if __name__ == "__main__":
    main()
