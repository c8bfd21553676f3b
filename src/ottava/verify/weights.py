"""The proof that two folders hold the same values, and that every layout of a master does."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ottava.checkpoint.digest import combine, tensor_digests
from ottava.checkpoint.layouts import to_bf16, to_mxfp8


def compare(folder_a: Path, folder_b: Path, *, limit: int = 10) -> dict[str, Any]:
    """Whether two folders, in any layouts, hold the same values.

    {"equal", "digests": [a, b], "different", "only_a", "only_b"}: sorted names of weights, at most `limit`
    of each. Raises CheckpointError where a folder's values are not exact in BF16.
    """
    a, b = tensor_digests(folder_a), tensor_digests(folder_b)
    return {
        "equal": a == b,
        "digests": [combine(a), combine(b)],
        "different": sorted(name for name in a.keys() & b.keys() if a[name] != b[name])[:limit],
        "only_a": sorted(a.keys() - b.keys())[:limit],
        "only_b": sorted(b.keys() - a.keys())[:limit],
    }


def prove_layouts(args: Mapping[str, Any]) -> dict[str, Any]:
    """Write the other layouts of the master folder args["folder"] under args["scratch"], and digest all three.

    {"digest", "layouts": {"master", "mxfp8", "bf16": digest}, "equal"}. Each layout is read back from
    disk and removed. Raises CheckpointError.
    """
    folder, scratch = Path(args["folder"]), Path(args["scratch"])
    digests = {"master": combine(tensor_digests(folder))}
    for layout, make in {"mxfp8": to_mxfp8, "bf16": to_bf16}.items():
        out = scratch / layout
        make(folder, out)
        digests[layout] = combine(tensor_digests(out))
        shutil.rmtree(out)
    return {"digest": digests["master"], "layouts": digests, "equal": len(set(digests.values())) == 1}


def compare_folders(args: Mapping[str, Any]) -> dict[str, Any]:
    """`compare` of the folders args["a"] and args["b"], for a stage's worker."""
    return compare(Path(args["a"]), Path(args["b"]))
