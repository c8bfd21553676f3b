"""The drift of a move against staying, measured on both pools: see `trainer.drift` for what it means."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ottava.context import Launcher
from ottava.recipe import Pool
from ottava.trainer.supervised import Drift

HERE = "ottava.trainer.drift"


def measure(
    launcher: Launcher, base: Mapping[str, Any], old: Pool, new: Pool, start: Path, spec: Drift, folder: Path
) -> dict[str, Any]:
    """Follow the move, stay, replicate, compare.

    base: spec, seed, data, chat; start: the hand-off's state. Returns {drift, replicas, envelope,
    inside, window, moved: the digest of the followed move's last state}.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    common = {**base, "start": str(start), "steps": spec.window, "trace": str(folder)}

    def call(function: str, pool: Pool, workers: int = 1, **more: Any) -> list[dict[str, Any]]:
        args = {**common, "pool": pool.name, "platform": pool.platform, **more}
        return launcher.call(f"{HERE}:{function}", args, pool=pool, workers=workers, logs=folder)

    moved = call("follow", new, out=str(folder / "moved"))[0]
    call("gradients", old)
    call("follow", old, out=str(folder / "stayed"), trace=None)
    pools = [old.name, new.name]
    call("replicate", new, workers=spec.replicas, pools=pools, out=str(folder / "replica-{rank}"))
    replicas = [str(folder / f"replica-{rank}") for rank in range(spec.replicas)]
    compared = call("compare", new, moved=str(folder / "moved"), stayed=str(folder / "stayed"), replicas=replicas)[0]
    shutil.rmtree(folder)
    return {
        **compared,
        "inside": compared["drift"] <= compared["envelope"],
        "window": spec.window,
        "moved": moved["digest"],
    }
