"""How far a converted model's computation is from its source's, on text: agreement and divergence.

Weights are compared byte by byte elsewhere; this is the other claim, about what comes out. It is
computed teacher-forced, position by position, so that a model which merely sounds right is told
from one that is right: a corrupted load still answers "Paris".
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ottava.artifact import file_digest, write_json

Model = Callable[[Tensor], Tensor]


def divergence(reference: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Per position: KL(reference || other) in nats, and whether the likeliest token is the same.

    reference, other: logits [T, V]. Computed in float64.
    """
    p = torch.log_softmax(reference.double(), -1)
    q = torch.log_softmax(other.double(), -1)
    kl = (p.exp() * (p - q)).sum(-1).clamp_min(0)
    return kl, reference.argmax(-1) == other.argmax(-1)


def compare(reference: Model, other: Model, windows: Sequence[Tensor]) -> dict[str, Any]:
    """KL and top-1 agreement of two models over windows of token ids, each [1, T].

    Returns positions, kl (mean), kl_low, kl_high (95% over windows, Student's t), top1, top1_low,
    top1_high (the same over windows: positions of one window are not independent).
    """
    kls, agreements, positions = [], [], 0
    with torch.no_grad():
        for window in windows:
            kl, same = divergence(reference(window)[0], other(window)[0])
            kls.append(float(kl.mean()))
            agreements.append(float(same.double().mean()))
            positions += len(kl)
    return {"positions": positions, "windows": len(windows), **_interval("kl", kls), **_interval("top1", agreements)}


def _interval(name: str, values: Sequence[float]) -> dict[str, float]:
    from scipy.stats import t

    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return {name: mean}
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    half = float(t.ppf(0.975, n - 1)) * spread / math.sqrt(n)
    top = 1.0 if name == "top1" else math.inf
    return {name: mean, f"{name}_low": max(0.0, mean - half), f"{name}_high": min(top, mean + half)}


def compare_folders(args: Mapping[str, Any]) -> dict[str, Any]:
    """Compare two model folders on a text file. args: reference, other, text; window (tokens), limit (windows)."""
    from ottava.models.load import load

    torch.set_num_threads(int(args.get("threads", 1)))
    windows = windows_of(Path(args["reference"]), Path(args["text"]), int(args["window"]), int(args["limit"]))
    reference, other = (_logits(load(Path(args[key]))) for key in ("reference", "other"))
    return compare(reference, other, windows)


def windows_of(folder: Path, text: Path, width: int = 128, limit: int = 16) -> list[Tensor]:
    """The first `limit` windows of a UTF-8 text, [1, width] ids each, as a model folder's tokenizer cuts it.

    Raises DataError where the text is none or shorter than a window, CheckpointError where there is no tokenizer.
    """
    from ottava.errors import DataError, from_os_error
    from ottava.models.chat import read_tokenizer

    try:
        content = text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 text, byte {error.start}", where=text, fix="name a text file") from None
    except OSError as error:
        raise from_os_error(error, "reading a text") from error
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    try:
        ids = torch.tensor(tokenizer.encode(content, add_special_tokens=False).ids)
    except Exception as error:  # the library raises bare Exception
        fix = "name a text in words that this model knows"
        raise DataError(f"the text has words that the tokenizer lacks: {error}", where=text, fix=fix) from None
    windows = [w[None] for w in torch.split(ids, width) if len(w) == width][:limit]
    if not windows:
        raise DataError(
            f"the text has {len(ids)} tokens, fewer than one window of {width}",
            where=text,
            fix="name a longer text",
        )
    return windows


def record_divergence(source: Path, out: Path, text: Path) -> dict[str, Any]:
    """Measure the folder `out` against the one it was converted from, and keep that in its conversion.json.

    Adds {"kl", "kl_low", "kl_high", "top1", "top1_low", "top1_high", "positions", "windows", "text": {"name",
    "sha256"}} and returns the whole record. Both models are held in memory.
    """
    args = {"reference": str(source), "other": str(out), "text": str(text), "window": 128, "limit": 16}
    found = compare_folders(args) | {"text": {"name": text.name, "sha256": file_digest(text)}}
    record: dict[str, Any] = json.loads((out / "conversion.json").read_text()) | found
    write_json(out / "conversion.json", record)
    return record


def _logits(model: Any) -> Model:
    return lambda ids: model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]
