"""What a worker measures about itself before it is trusted: bits, accuracy, links and speed.

Each public function runs in a worker process and takes `{"platform": name, ...}`; it returns JSON. Inputs are
derived from integers, so that no random generator stands between two machines that are compared. Where
WORLD_SIZE is above 1 the functions expect torchrun's variables and form a process group.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ottava import platforms
from ottava.errors import PlatformError
from ottava.platforms.base import FaultClass, Platform

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float64: 2.0**-53}
MATMUL_SHAPES = ((48, 16, 32), (64, 64, 64), (33, 129, 65), (32, 1024, 48))  # (m, k, n): full tiles, tails, long sums
TIMEOUT = timedelta(seconds=30)


def numerics_class(args: Mapping[str, Any]) -> dict[str, Any]:
    """Hash of the loss and the gradients of one small attention layer: equal where training repeats bit for bit.

    Returns {"numerics_class": hex, "parts": {name: hex}, "loss": float, "describe": the platform's}. `parts` are
    hashes of intermediate results: between two classes they tell which operation differs first.
    """
    platform, device = _open(args)
    weights = {
        name: pattern(shape, salt, device).mul_(0.125).requires_grad_()
        for salt, (name, shape) in enumerate(
            {
                "embedding": (67, 96), "query": (96, 96), "key": (96, 96), "value": (96, 96), "output": (96, 96),
                "gate": (96, 264), "up": (96, 264), "down": (264, 96), "head": (96, 67),
            }.items()
        )
    }  # fmt: skip
    tokens = (torch.arange(4 * 25).view(4, 25) * 29 % 67).to(device)
    parts, loss = _layer(weights, tokens)
    loss.backward()  # type: ignore[no-untyped-call]
    platform.synchronize()
    gradients = [weight.grad for weight in weights.values() if weight.grad is not None]
    assert len(gradients) == len(weights)
    hashes = {name: digest([part]) for name, part in parts.items()}
    return {
        "numerics_class": digest([loss, *gradients]),
        "parts": {**hashes, "loss": digest([loss]), "gradients": digest(gradients)},
        "loss": loss.item(),
        "describe": platform.describe(),
    }


def _layer(w: Mapping[str, torch.Tensor], tokens: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Embedding, attention, gated unit, cross-entropy, plus a term of exp. tokens: [batch, time + 1]."""
    x = w["embedding"][tokens[:, :-1]]
    normed = F.layer_norm(x, (96,))
    q, k, v = (torch.matmul(normed, w[name]) for name in ("query", "key", "value"))
    scores = torch.matmul(q, k.transpose(1, 2)) * 0.125
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    weights = torch.softmax(scores.masked_fill(future, float("-inf")), -1)
    x = x + torch.matmul(torch.matmul(weights, v), w["output"])
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 2.0**-20)
    gated = F.silu(torch.matmul(x, w["gate"])) * torch.matmul(x, w["up"])
    x = x + torch.matmul(gated, w["down"])
    decay = torch.exp(-x.abs())
    logits = torch.matmul(x, w["head"])
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) + decay.mean()
    parts = {"layer_norm": normed, "matmul": q, "softmax": weights, "silu": gated, "exp": decay, "logits": logits}
    return parts, loss


def matmul_error(args: Mapping[str, Any]) -> dict[str, Any]:
    """Error of float32 and bfloat16 matrix products against float64.

    The bound is Higham's for a sum of k products in any order, with or without fused multiply-add:
    |computed - exact| <= gamma_k |A||B|, gamma_k = k u / (1 - k u), u = 2^-24 (Accuracy and Stability of
    Numerical Algorithms, 2nd ed., section 3.5). For bfloat16 the products are to be summed in float32 and rounded
    once, u' = 2^-8: gamma_k |A||B| + u' |computed|. Nothing is tuned.

    Returns {"max_error", "rms_error": relative to (|A||B|), float32, worst shape; "max_ratio": worst error over its
    bound, both types; "ok": max_ratio <= 1; "cases": [...]}.
    """
    platform, device = _open(args)
    cases = [_matmul_case(shape, dtype, device) for shape in MATMUL_SHAPES for dtype in (torch.float32, torch.bfloat16)]
    platform.synchronize()
    single = [case for case in cases if case["dtype"] == "float32"]
    ratio = max(case["max_ratio"] for case in cases)
    return {
        "max_error": max(case["max_error"] for case in single),
        "rms_error": max(case["rms_error"] for case in single),
        "max_ratio": ratio,
        "ok": ratio <= 1,
        "cases": cases,
    }


def _matmul_case(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    m, k, n = shape
    a, b = pattern((m, k), 101, device).to(dtype), pattern((k, n), 202, device).to(dtype)
    computed = torch.matmul(a, b).cpu().double()
    exact = torch.matmul(a.cpu().double(), b.cpu().double())
    size = torch.matmul(a.cpu().double().abs(), b.cpu().double().abs())
    bound = (gamma(k, torch.float32) + gamma(k, torch.float64)) * size
    if dtype != torch.float32:
        bound = bound + UNIT_ROUNDOFF[dtype] * computed.abs()
    error = (computed - exact).abs()
    worst = (error / bound).max().item()
    return {
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "max_error": (error / size).max().item(),
        "rms_error": (error / size).square().mean().sqrt().item(),
        "max_ratio": worst if worst == worst else float("inf"),
    }


def gamma(k: int, dtype: torch.dtype) -> float:
    """k u / (1 - k u), with the unit roundoff u of `dtype`."""
    ku = k * UNIT_ROUNDOFF[dtype]
    assert ku < 1, "the bound holds for k u < 1"
    return ku / (1 - ku)


def collectives(args: Mapping[str, Any]) -> dict[str, Any]:
    """all_reduce between all workers: exact on integers, and its bandwidth.

    args: sizes in bytes, repeats. Returns {"rank", "world", "exact": every element of every size was right,
    "bandwidth_gb_s": best size's median, or None for one worker, "sizes": [{bytes, seconds, bandwidth_gb_s}]}.
    Bandwidth is the bus bandwidth 2 (n-1)/n x bytes / seconds of nccl-tests, 1 GB = 1e9 bytes.
    """
    platform, device = _open(args)
    with group(platform) as (rank, world):
        results, exact = [], True
        for size in args.get("sizes", (1 << 16, 1 << 20, 1 << 23)):
            base = torch.arange(size // 4, device=device, dtype=torch.float32) % 251
            expected, seconds = base * (world * (world + 1) // 2), []
            for _ in range(args.get("repeats", 5)):
                values = base * (rank + 1)
                _barrier(device)
                platform.synchronize()
                start = time.perf_counter()
                _all_reduce(values)
                platform.synchronize()
                seconds.append(time.perf_counter() - start)
                exact = exact and torch.equal(values, expected)
            middle = statistics.median(seconds)
            bandwidth = 2 * (world - 1) / world * size / middle / 1e9
            results.append({"bytes": size, "seconds": middle, "bandwidth_gb_s": bandwidth})
    best = max(result["bandwidth_gb_s"] for result in results) if world > 1 else None
    return {"rank": rank, "world": world, "exact": exact, "bandwidth_gb_s": best, "sizes": results}


def throughput(args: Mapping[str, Any]) -> dict[str, Any]:
    """Sustained float32 matmul speed of each worker: alone, taking turns, and all at once.

    Turns go round and round, so that a load that comes and goes falls on all workers alike; medians are reported.
    args: size of the square matrices, seconds of one measurement, repeats. Returns {"rank", "gflops": alone,
    "together_gflops", "samples": [GFLOP/s alone], "instruction_set": the platform's}.
    """
    platform, device = _open(args)
    size, seconds, repeats = args.get("size", 128), args.get("seconds", 0.04), args.get("repeats", 5)
    a, b = pattern((size, size), 1, device), pattern((size, size), 2, device)
    alone, together = [], []
    with group(platform) as (rank, world):
        _gflops(a, b, seconds / 2, platform)
        for _ in range(repeats):
            for turn in range(world):
                _barrier(device)
                if turn == rank:
                    alone.append(_gflops(a, b, seconds, platform))
            _barrier(device)
            together.append(_gflops(a, b, seconds, platform))
    return {
        "rank": rank,
        "gflops": statistics.median(alone),
        "together_gflops": statistics.median(together),
        "samples": alone,
        "instruction_set": platform.describe()["instruction_set"],
    }


def _gflops(a: torch.Tensor, b: torch.Tensor, seconds: float, platform: Platform) -> float:
    """GFLOP/s of repeated products of two square matrices, over at least `seconds`."""
    count, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds or count == 0:
        for _ in range(8):
            torch.matmul(a, b)
        platform.synchronize()
        count += 8
    return 2 * a.shape[0] ** 3 * count / passed / 1e9


def resources(args: Mapping[str, Any]) -> dict[str, Any]:
    """{"memory_used", "memory_total": bytes of this worker's device, "shared_memory": with the other workers}."""
    platform, device = _open(args)
    used, total = platform.memory(device.index or 0)
    return {"memory_used": used, "memory_total": total, "shared_memory": platform.shared_memory}


@contextmanager
def group(platform: Platform) -> Iterator[tuple[int, int]]:
    """A process group over torchrun's variables: yields (rank, world). A fault of the links is a PlatformError.

    One that the worker has opened already is used, and left open.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if dist.is_initialized():
        yield rank, world
        return
    try:
        if world > 1:
            dist.init_process_group(platform.backend(), timeout=TIMEOUT)
        yield rank, world
    except Exception as error:
        if platform.classify_error(error) is not FaultClass.COLLECTIVE:
            raise
        raise PlatformError(
            f"worker {rank} of {world} cannot exchange data: {error}", fix="check the links between the workers"
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def pattern(shape: tuple[int, ...], salt: int, device: torch.device) -> torch.Tensor:
    """Float32 values in [-1, 1) with 24 significant bits, from a multiplicative hash of their indices."""
    count = torch.Size(shape).numel()
    index = torch.arange(1, count + 1, dtype=torch.int64) + 7919 * salt
    bits = (index * 2654435761 % (1 << 32)) >> 8
    return ((bits - (1 << 23)).to(torch.float32) / (1 << 23)).view(shape).to(device)


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """SHA-256 over the bytes of tensors, in hex."""
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def _open(args: Mapping[str, Any]) -> tuple[Platform, torch.device]:
    """The platform with its numerics pinned, and this worker's device."""
    platform = platforms.asked(args)
    return platform, platform.open()


def _barrier(device: torch.device) -> None:
    _all_reduce(torch.zeros(1, device=device))


def _all_reduce(tensor: torch.Tensor) -> None:
    if dist.is_initialized():
        dist.all_reduce(tensor)
