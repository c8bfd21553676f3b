"""One rank of a process group through torch_npu, started by test_group.py: the same calls over HCCL and over gloo.

Prints {case: what was wrong, or ""}. Inputs are functions of the rank. A group of "cpu:gloo,npu:hccl" sends a tensor by
its device, so the oracle is the same call with the tensor on the host; where gloo does not have it, a formula.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
import torch_npu  # noqa: F401  (registers the device and HCCL)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8)
SUM, PROD, MAX, MIN = dist.ReduceOp.SUM, dist.ReduceOp.PRODUCT, dist.ReduceOp.MAX, dist.ReduceOp.MIN
Call = Callable[[Tensor], "Tensor | list[Tensor]"]


def brought(rank: int, length: int, dtype: torch.dtype) -> Tensor:
    """Small whole numbers: their sums and products are exact in every type and in any order."""
    return (torch.arange(length) * (rank + 1) % 3 + 1).to(dtype)


def calls(rank: int, world: int) -> dict[str, Call]:
    """What a group can do with a tensor whose length the number of ranks divides."""

    def all_reduce(operation: Any) -> Call:
        def call(x: Tensor) -> Tensor:
            dist.all_reduce(x, operation)
            return x

        return call

    def overlapped(x: Tensor) -> list[Tensor]:
        """Three sums under way at a time."""
        parts = [x.clone(), x * 2, x * 3]
        works = [dist.all_reduce(part, async_op=True) for part in parts]
        for work in works:
            work.wait()
        return parts

    def broadcast(x: Tensor) -> Tensor:
        dist.broadcast(x, world - 1)
        return x

    def all_gather(x: Tensor) -> list[Tensor]:
        found = [torch.zeros_like(x) for _ in range(world)]
        dist.all_gather(found, x)
        return found

    def all_gather_tensor(x: Tensor) -> Tensor:
        found = x.new_zeros(len(x) * world)
        dist.all_gather_into_tensor(found, x)
        return found

    def reduce_(x: Tensor) -> Tensor:
        dist.reduce(x, 0)
        return x if rank == 0 else x * 0

    def scatter(x: Tensor) -> Tensor:
        found = torch.zeros_like(x)
        dist.scatter(found, [x + r for r in range(world)] if rank == 0 else None, 0)
        return found

    def send_and_receive(x: Tensor) -> Tensor:
        found = torch.zeros_like(x)
        if rank % 2 == 0:
            dist.send(x, (rank + 1) % world)
            dist.recv(found, (rank + 1) % world)
        else:
            dist.recv(found, (rank - 1) % world)
            dist.send(x, (rank - 1) % world)
        return found

    def batch(x: Tensor) -> Tensor:
        found = torch.zeros_like(x)
        peer = rank ^ 1
        for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, x, peer), dist.P2POp(dist.irecv, found, peer)]):
            work.wait()
        return found

    return {
        "all_reduce sum": all_reduce(SUM), "all_reduce max": all_reduce(MAX), "all_reduce min": all_reduce(MIN),
        "all_reduce prod": all_reduce(PROD), "overlapped": overlapped, "broadcast": broadcast,
        "all_gather": all_gather, "all_gather_into_tensor": all_gather_tensor, "reduce": reduce_,
        "scatter": scatter, "send_recv": send_and_receive, "batch_isend_irecv": batch,
    }  # fmt: skip


def without_gloo(rank: int, world: int) -> dict[str, tuple[Call, Callable[[list[Tensor]], Any]]]:
    """Calls with the formula of their result from everybody's input."""

    def own(values: Tensor) -> Tensor:
        return values.view(world, -1)[rank]

    def reduce_scatter(x: Tensor) -> Tensor:
        found = x.new_zeros(len(x) // world)
        dist.reduce_scatter_tensor(found, x)
        return found

    def reduce_scatter_list(x: Tensor) -> Tensor:
        found = x.new_zeros(len(x) // world)
        dist.reduce_scatter(found, list(x.view(world, -1)))
        return found

    def all_to_all(x: Tensor) -> Tensor:
        found = torch.zeros_like(x)
        dist.all_to_all_single(found, x)
        return found

    def all_to_all_list(x: Tensor) -> list[Tensor]:
        parts = list(x.view(world, -1))
        found = [torch.zeros_like(part) for part in parts]
        dist.all_to_all(found, parts)
        return found

    def uneven(x: Tensor) -> Tensor:
        """Rank r keeps nothing for itself but sends r + s elements to rank s."""
        out = [0 if s == rank else rank + s for s in range(world)]
        found = x.new_zeros(sum(out))
        dist.all_to_all_single(found, x[: sum(out)], out, out)
        return found

    def uneven_formula(parts: list[Tensor]) -> Tensor:
        pieces = []
        for r in range(world):
            sizes = [0 if s == r else r + s for s in range(world)]
            pieces.append(parts[r][sum(sizes[:rank]) : sum(sizes[: rank + 1])])
        return torch.cat(pieces)

    def total(parts: list[Tensor]) -> Tensor:
        return own(reduce(torch.add, parts))

    return {
        "reduce_scatter_tensor": (reduce_scatter, total),
        "reduce_scatter": (reduce_scatter_list, total),
        "all_to_all_single": (all_to_all, lambda parts: torch.cat([own(part) for part in parts])),
        "all_to_all": (all_to_all_list, lambda parts: [own(part) for part in parts]),
        "all_to_all_single uneven": (uneven, uneven_formula),
    }


def same(found: Any, expected: Any) -> str:
    """ "" where two results agree in every bit."""
    pairs = zip(found, expected, strict=True) if isinstance(found, list) else [(found, expected)]
    for a, b in pairs:
        if a.dtype != b.dtype or not torch.equal(a.cpu(), b):
            return f"{a.cpu().tolist()[:8]} for {b.tolist()[:8]}"
    return ""


def attempt(call: Call, mine: Tensor, expected: Callable[[], Any]) -> str:
    """What was wrong, or "refused" where torch_npu says that HCCL has not the type."""
    try:
        found = call(mine)
    except RuntimeError as error:
        if "Unsupported data type" not in str(error):
            raise
        return "refused"
    return same(found, expected())


def collectives(rank: int, world: int, device: torch.device) -> dict[str, str]:
    found = {}
    for dtype in DTYPES:
        for length in (24, 240_000) if dtype in (torch.float32, torch.bfloat16) else (24,):
            mine = brought(rank, length, dtype)
            for name, call in calls(rank, world).items():
                if "prod" in name and dtype == torch.uint8:
                    continue
                found[f"{name} {dtype} {length}"] = attempt(
                    call, mine.to(device), lambda call=call, mine=mine: call(mine.clone())
                )
            everyone = [brought(r, length, dtype) for r in range(world)]
            for name, (call, formula) in without_gloo(rank, world).items():
                found[f"{name} {dtype} {length}"] = attempt(
                    call, mine.to(device), lambda formula=formula, everyone=everyone: formula(everyone)
                )
    return found


def order_of_sums(rank: int, world: int, device: torch.device) -> dict[str, str]:
    """Sums are taken in the order of ranks: numbers whose sum depends on it, twice."""
    rows = [torch.from_numpy(_numbers(r)) for r in range(world)]
    expected = reduce(torch.add, rows)
    found = {}
    for attempt in range(2):
        mine = rows[rank].to(device)
        dist.all_reduce(mine)
        found[f"order of ranks {attempt}"] = same(mine, expected)
    return found


def used_at_once(rank: int, world: int, device: torch.device) -> dict[str, str]:
    """What arrives is used without a wait of the host, also where another device is the current one."""
    found = {}
    for current in (rank, world):
        torch.npu.set_device(current)
        wrong = ""
        for step in range(10):
            value, theirs = (
                torch.full((400_000,), rank + step + 1.0, device=device),
                torch.zeros(400_000, device=device),
            )
            for distance in (1, 2)[: world // 2]:
                peer = rank ^ distance
                swap = [dist.P2POp(dist.isend, value, peer), dist.P2POp(dist.irecv, theirs, peer)]
                for work in dist.batch_isend_irecv(swap):
                    work.wait()
                torch.add(value, theirs, out=value)
            expected = sum(r + step + 1.0 for r in range(world))
            wrong = wrong or same(value * 2, torch.full((400_000,), 2 * expected))
        found["used at once" if current == rank else "used at once on another device"] = wrong
    torch.npu.set_device(rank)
    return found


def _numbers(rank: int) -> Any:
    import numpy as np

    rng = np.random.default_rng(rank)
    return (rng.standard_normal(5000) * 10.0 ** rng.integers(-4, 5, 5000)).astype(np.float32)


def ddp(rank: int, world: int, device: torch.device) -> dict[str, str]:
    """Steps of DistributedDataParallel: equal bits over gloo where two numbers are summed, and on all ranks always."""

    def stepped(where: torch.device) -> list[Tensor]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)).to(where)
        wrapped = DistributedDataParallel(
            model, device_ids=[where] if where.type == "npu" else None, bucket_cap_mb=0.01
        )
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(3):
            draw = torch.Generator().manual_seed(100 * step + rank)
            x = torch.randn(8, 16, generator=draw).to(where)
            wrapped(x).square().mean().backward()
            optimiser.step()
            optimiser.zero_grad()
        return [parameter.detach().cpu() for parameter in model.parameters()]

    mine = stepped(device)
    flat = torch.cat([part.flatten() for part in mine])
    everyone = [torch.zeros_like(flat) for _ in range(world)]
    dist.all_gather(everyone, flat)
    found = {"ddp: all ranks": same([flat] * world, everyone)}
    theirs = stepped(torch.device("cpu"))
    close = all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(mine, theirs, strict=True))
    found["ddp: close to gloo"] = "" if close else "far"
    if world == 2:
        found["ddp: bits of gloo"] = same(mine, theirs)
    return found


if __name__ == "__main__":
    dist.init_process_group("cpu:gloo,npu:hccl")
    me, world = dist.get_rank(), dist.get_world_size()
    torch.npu.set_device(me)
    where = torch.device("npu", me)
    result: dict[str, str] = {}
    for part in (collectives, order_of_sums, used_at_once, ddp):
        result |= part(me, world, where)
    dist.barrier()
    pair = dist.new_group([0, 1])
    if me < 2:
        value = torch.ones(3, device=where)
        dist.all_reduce(value, group=pair)
        result["a group of some ranks"] = same(value, torch.full((3,), 2.0))
    dist.destroy_process_group()
    print(json.dumps(result))
    sys.stdout.flush()
