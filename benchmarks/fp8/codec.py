"""The codec against memcpy, against the torch reference, and against the quantisers of other libraries.

A ratio is a throughput ratio: the baseline's seconds over ours, larger is better. For BF16, both sides
handle the same tensor: memcpy copies its bytes, quantise reads and dequantise writes them. memcpy is
whichever is faster here, torch's copy_ on as many threads as ours has or the C library's memmove.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import throughput
from ottava.fp8 import kernels, reference
from ottava.fp8.spec import BLOCK, grid

LARGE = (4096, 4096)
BANDS = [(128, 4096), (512, 7168), (1024, 7168)]
APART = Path(__file__).parents[2] / ".venv-bench"  # Transformers imports torchao wherever it finds it
QUANTUM = 3e-3  # seconds for which a side is repeated within one timing


def timer(work: Callable[[], object]) -> Callable[[], float]:
    """Seconds of one call, as the mean over enough calls in a row to be seen by the clock."""
    work()
    start = time.perf_counter()
    work()
    calls = max(1, round(QUANTUM / max(time.perf_counter() - start, 1e-6)))

    def timed() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            work()
        return (time.perf_counter() - start) / calls

    return timed


def copier(source: Tensor) -> Callable[[], float]:
    """The faster way here to copy this tensor's bytes."""
    target = torch.empty_like(source)
    size = source.numel() * source.element_size()

    def move() -> None:
        ctypes.memmove(target.data_ptr(), source.data_ptr(), size)

    sides = [timer(lambda: target.copy_(source)), timer(move)]
    return min(sides, key=lambda side: min(side() for _ in range(5)))


def buffers(w: Tensor) -> tuple[Tensor, Tensor]:
    codes = torch.empty(w.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(grid(*w.shape), dtype=torch.uint8)
    kernels.quantise(w, codes, scales)
    return codes, scales


def against_memcpy(level: str, shape: tuple[int, int], threads: int, pairs: int) -> list[dict[str, Any]]:
    torch.set_num_threads(threads)
    w = torch.randn(shape).mul_(0.02).bfloat16()
    codes, scales = buffers(w)
    out = torch.empty_like(w)
    where = f"{level}, {shape[0]}x{shape[1]}, {threads} thread{'s' * (threads > 1)}"
    copy = copier(w)
    ours = timer(lambda: kernels.quantise(w, codes, scales, level=level))
    back = timer(lambda: kernels.dequantise(codes, scales, out, level=level))
    return [
        throughput(f"quantise over memcpy, {where}", ours, copy, pairs),
        throughput(f"dequantise over memcpy, {where}", back, copy, pairs),
    ]


def against_reference(pairs: int) -> list[dict[str, Any]]:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        w = torch.randn(1024, 1024).mul_(0.02).to(dtype)
        ours, theirs = w.clone(), w.clone()
        name = f"project in place over the reference, {reference.TYPE_NAMES[dtype]}, 1024x1024"
        mine = timer(lambda ours=ours: kernels.project(ours, ours))
        found.append(throughput(name, mine, timer(lambda theirs=theirs: reference.project(theirs, theirs)), pairs))
    w = torch.randn(1024, 1024).mul_(0.02).bfloat16()
    codes, scales = buffers(w)
    out = torch.empty_like(w)

    def separately() -> None:
        reference.measure(w, codes, scales)
        reference.dequantise(codes, scales, torch.bfloat16)

    ours_measure = timer(lambda: kernels.measure(w, codes, scales, out))
    found.append(throughput("measure over the reference, BF16, 1024x1024", ours_measure, timer(separately), pairs))
    return found


def against_torchao(w: Tensor, pairs: int) -> list[dict[str, Any]]:
    """Its blocks of 128x128 with one float32 scale each: the affine float8 primitives of its quantize_ API."""
    sys.path.append(str(APART))
    try:
        from torchao.quantization.quant_primitives import (
            _choose_scale_float8,
            _dequantize_affine_float8,
            _quantize_affine_float8,
        )
    except ImportError:
        print("torchao is not there: make .venv-bench/installed", file=sys.stderr)
        return []
    finally:
        sys.path.remove(str(APART))

    codes, scales = buffers(w)
    out = torch.empty_like(w)

    def theirs() -> tuple[Tensor, Tensor]:
        scale = _choose_scale_float8(w, [BLOCK, BLOCK])
        return _quantize_affine_float8(w, scale), scale

    data, scale = theirs()
    return [
        throughput("quantise over torchao", timer(lambda: kernels.quantise(w, codes, scales)), timer(theirs), pairs),
        throughput(
            "dequantise over torchao",
            timer(lambda: kernels.dequantise(codes, scales, out)),
            timer(lambda: _dequantize_affine_float8(data, scale, torch.bfloat16)),
            pairs,
        ),
    ]


def against_compressed_tensors(w: Tensor, pairs: int) -> list[dict[str, Any]]:
    """Its strategy `block` with 128x128 and float scales found by amax, as its own observers find them."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, QuantizationType
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize

    args = QuantizationArgs(
        num_bits=8,
        type=QuantizationType.FLOAT,
        strategy=QuantizationStrategy.BLOCK,
        block_structure=[BLOCK, BLOCK],
        symmetric=True,
    )
    codes, scales = buffers(w)
    out = torch.empty_like(w)
    down, across = grid(*w.shape)

    def theirs() -> tuple[Tensor, Tensor]:
        scale = w.view(down, BLOCK, across, BLOCK).abs().amax((1, 3)) / 448
        zero = torch.zeros_like(scale)
        return quantize(w, scale, zero, args, dtype=torch.float8_e4m3fn), scale

    data, scale = theirs()
    return [
        throughput(
            "quantise over compressed-tensors",
            timer(lambda: kernels.quantise(w, codes, scales)),
            timer(theirs),
            pairs,
        ),
        throughput(
            "dequantise over compressed-tensors",
            timer(lambda: kernels.dequantise(codes, scales, out)),
            timer(lambda: dequantize(data, scale, None, args, dtype=torch.bfloat16)),
            pairs,
        ),
    ]


def rows(quick: bool) -> list[dict[str, Any]]:
    """All rows; fewer repetitions where `quick`. Empty where the extension is not built."""
    before = torch.get_num_threads()
    pairs, few = (7, 5) if quick else (41, 15)
    found: list[dict[str, Any]] = []
    try:
        for level in [level for level in kernels.levels() if level != "portable"]:
            for threads in (1, 2):
                for shape in [LARGE] if quick or level != "avx512" else [LARGE, *BANDS]:
                    found += against_memcpy(level, shape, threads, pairs)
        if kernels.levels():
            torch.set_num_threads(before)
            w = torch.randn(2048, 2048).mul_(0.02).bfloat16()
            found += against_reference(pairs if quick else 15)
            found += against_torchao(w, few) + against_compressed_tensors(w, few)
    finally:
        torch.set_num_threads(before)
    return found
