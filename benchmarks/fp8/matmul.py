"""Decoding with FP8 weights against the fastest that torch has for BF16 (and for float32, in its own rows).

A layer's weights are walked through several copies, as a model of many layers walks through its own, so that
they come from memory or the last cache. The baseline of a row is whichever of torch's ways was fastest just before.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache

from benchmarks.common import paired
from ottava.engine.generate import step
from ottava.fp8.linear import Fp8Linear, replace
from ottava.models.build import from_config

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008)]
BATCHES = (1, 16)
THREADS = (1, 2)
BYTES = 512 << 20  # of BF16 weights, over all copies
SECONDS = 0.03  # of one measurement
SMOLLM2_135M: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
TOKENS = 8

Timer = Callable[[], float]


def rows(quick: bool = False) -> list[dict[str, Any]]:
    """Ratios of torch's seconds to ours; above 1 is faster than torch. quick: a look, not a measurement."""
    pairs = 3 if quick else 7
    out = []
    for shape in SHAPES[:1] if quick else SHAPES:
        out += _layer(shape, pairs)
    out += _model(pairs)
    return out


def _layer(shape: tuple[int, int], pairs: int) -> list[dict[str, Any]]:
    rows, columns = shape
    copies = max(2, BYTES // (2 * rows * columns))
    weight = torch.randn(rows, columns) / columns**0.5
    bf16 = [weight.bfloat16() for _ in range(copies)]
    first = Fp8Linear.from_linear(_linear(weight))
    fp8 = [Fp8Linear(first.codes.clone(), first.scales) for _ in range(copies)]
    reordered = [torch.ops.mkldnn._reorder_linear_weight(w) for w in bf16[:8]] if _mkldnn() else []
    out = []
    for threads in THREADS:
        for batch in BATCHES:
            x = torch.randn(batch, columns).bfloat16()
            ways: dict[str, Timer] = {"F.linear": _timer(lambda w, x=x: functional.linear(x, w), bf16)}
            if batch == 1:
                ways["torch.mv"] = _timer(lambda w, x=x: torch.mv(w, x[0]), bf16)
            if reordered:
                ways["mkldnn, reordered"] = _timer(lambda w, x=x: _pointwise(x, w), reordered)
            ours = _timer(lambda layer, x=x: layer(x), fp8)
            with _threads(threads):
                best = min(ways, key=lambda way: min(ways[way]() for _ in range(3)))
                name = f"FP8 {rows}x{columns}, batch {batch}, threads {threads}, against BF16 {best}"
                out.append(_ratio(name, ours, ways[best], pairs))
    del bf16, reordered
    float32 = [weight.clone() for _ in range(max(2, copies // 2))]
    x = torch.randn(1, columns)
    ours, theirs = _timer(lambda layer: layer(x), fp8), _timer(lambda w: functional.linear(x, w), float32)
    with _threads(1):
        name = f"FP8 {rows}x{columns}, batch 1, threads 1, float32 activations, against F32 F.linear"
        out.append(_ratio(name, ours, theirs, pairs))
    return out


def _model(pairs: int) -> list[dict[str, Any]]:
    """A token at batch 1 through a Llama of SmolLM2-135M's size with random weights; the head stays as it is."""
    model = from_config(SMOLLM2_135M)
    out = []
    for dtype, label in ((torch.float32, "F32"), (torch.bfloat16, "BF16")):
        plain = model.to(dtype).eval()
        theirs = _decode(plain)
        quantised = copy.deepcopy(plain)
        replace(quantised, lambda name, linear: None if name == "lm_head" else Fp8Linear.from_linear(linear))
        ours = _decode(quantised)
        for threads in THREADS:
            with _threads(threads):
                name = f"Llama 135M decoding with FP8 weights, threads {threads}, against {label} F.linear"
                out.append(_ratio(name, ours, theirs, pairs))
    return out


def _decode(model: nn.Module) -> Timer:
    def run() -> float:
        with torch.no_grad():
            cache: Any = DynamicCache(config=model.config)
            token = step(model, torch.arange(16)[None], cache).argmax(-1, keepdim=True)
            start = time.perf_counter()
            for _ in range(TOKENS):
                token = step(model, token, cache).argmax(-1, keepdim=True)
            return (time.perf_counter() - start) / TOKENS

    return run


def _timer(product: Callable[[Any], Any], weights: list[Any]) -> Timer:
    """Seconds of one product, over as many as fill SECONDS, each with the next of the weights."""
    turns, repeats = count(), 0

    def run() -> float:
        nonlocal repeats
        with torch.no_grad():
            if not repeats:
                product(weights[0])
                start = time.perf_counter()
                product(weights[1])
                repeats = max(1, round(SECONDS / (time.perf_counter() - start)))
            start = time.perf_counter()
            for _ in range(repeats):
                product(weights[next(turns) % len(weights)])
            return (time.perf_counter() - start) / repeats

    return run


def _ratio(name: str, ours: Timer, baseline: Timer, pairs: int) -> dict[str, Any]:
    row = paired(name, baseline, ours, pairs)
    return row | {"ours": row["baseline"], "baseline": row["ours"]}


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return linear


def _pointwise(x: Tensor, weight: Tensor) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return out


def _mkldnn() -> bool:
    return bool(torch.backends.mkldnn.is_available())


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
