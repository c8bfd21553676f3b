"""A sum over virtual shards whose order does not depend on how many workers there are.

Floating-point addition is not associative: an all-reduce over two workers and one over four give
other bits. Here the shards' gradients are the leaves of a fixed binary tree. Each worker owns a
contiguous power-of-two block of leaves, sums its own subtree, and exchanges with the worker at
distance 1, 2, 4, ...: that is the tree's next level, whoever adds it.

Two ways to add it give the same bits. Halving (a recursive-halving reduce-scatter, then an all-gather
backwards) sends and adds as little as any all-reduce can: at every distance a worker hands over half of
what it still sums. Doubling swaps the whole array at every distance, so that every worker makes every
sum of its path by itself: a bit flipped in one worker's addition then shows as a difference between
workers, where halving would hand the wrong sum to all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# Measured with gloo on loopback. A round costs 50 us or more and doubling has half as many, but it sends more than
# halving from 4 workers on: it is the faster up to about 1M elements (4 MB) for 2 workers, 256k for 4 (8: by that law).
# A stripe (8 MB) is long beside a round's cost, and short enough for one to be added while another is on the wire.
SMALL = 1 << 20
STRIPE = 1 << 21  # elements that go through the rounds together
AHEAD = 2  # stripes under way at once
ALIGN = 16  # elements: 64 bytes, so that no two workers' slices share a cache line

Place = tuple[torch.dtype, torch.device]
_KEPT: dict[Place, Tensor] = {}  # the last call's buffer: the first touch of fresh pages costs as much as a round


@dataclass(frozen=True)
class Halving:
    """One worker's part at one distance: it sums `keep` from now on, and its peer sums `give`."""

    peer: int
    keep: slice
    give: slice


@dataclass(frozen=True)
class Swap:
    """One exchange with a peer, as views: what is sent, and where to put what comes. Either may be empty."""

    peer: int
    outgoing: Tensor
    incoming: Tensor


Rounds = Iterator[Swap]


def tree_sum(leaves: Iterable[Tensor]) -> Tensor:
    """The binary-tree sum of a power of two of equal arrays, with log2(n) of them alive at a time.

    The sum is made in the first array of each pair: leaves are used up.
    """
    stack: list[tuple[int, Tensor]] = []
    for leaf in leaves:
        level, value = 0, leaf
        while stack and stack[-1][0] == level:
            value = stack.pop()[1].add_(value)
            level += 1
        stack.append((level, value))
    assert len(stack) == 1, "the number of leaves is not a power of two"
    return stack[0][1]


def owned(shards: int, rank: int, world: int) -> range:
    """The virtual shards that `rank` of `world` computes: a contiguous block."""
    assert shards % world == 0, "there must be at least as many virtual shards as workers"
    share = shards // world
    return range(rank * share, (rank + 1) * share)


def exchange_(value: Tensor, rank: int, world: int, *, redundant: bool = False) -> Tensor:
    """Finish the tree over the workers' subtree sums, in place: every worker ends with the whole sum.

    value: contiguous, the same shape on every worker; world: a power of two. redundant: every worker makes
    every sum by itself (doubling), for steps whose sums are compared. The bits are the same either way.
    Beside `value` it needs 8 MB at most, 16 MB with `redundant`, which it keeps for the next call. Raises what the
    backend raises when a peer is gone; the group is of no use then.
    """
    assert world & (world - 1) == 0, "the number of workers is not a power of two"
    flat = value.view(-1)
    if world == 1 or flat.numel() == 0:
        return value
    if redundant or flat.numel() <= SMALL // (world // 2) ** 2:
        _run(flat, rank, world, doubling, min(STRIPE, flat.numel()))
    else:
        _run(flat, rank, world, halving, _middle(0, min(STRIPE, flat.numel())))
    return value


def halvings(length: int, rank: int, world: int) -> list[Halving]:
    """Who sums which slice of an array at distance 1, 2, 4, ...: the lower worker of a pair keeps the lower half."""
    begin, end, distance = 0, length, 1
    found = []
    while distance < world:
        middle = _middle(begin, end)
        lower, upper = slice(begin, middle), slice(middle, end)
        keep, give = (upper, lower) if rank & distance else (lower, upper)
        found.append(Halving(rank ^ distance, keep, give))
        begin, end, distance = keep.start, keep.stop, 2 * distance
    return found


def halving(value: Tensor, rank: int, world: int, room: Tensor) -> Rounds:
    """The rounds of one array [n], near-first halving and back. room: at least the lower half's size."""
    path = halvings(value.numel(), rank, world)
    for part in path:
        mine = value[part.keep]
        theirs = room[: mine.numel()]
        yield Swap(part.peer, value[part.give], theirs)
        _add(mine, theirs, mine_first=rank < part.peer)
    for part in reversed(path):
        yield Swap(part.peer, value[part.keep], value[part.give])


def doubling(value: Tensor, rank: int, world: int, room: Tensor) -> Rounds:
    """The rounds of one array [n] where every worker makes every sum. room: at least [n]."""
    theirs, distance = room[: value.numel()], 1
    while distance < world:
        yield Swap(rank ^ distance, value, theirs)
        _add(value, theirs, mine_first=not rank & distance)
        distance *= 2


def _add(mine: Tensor, theirs: Tensor, *, mine_first: bool) -> None:
    """Lower shards + higher shards, as tree_sum adds them: of two NaNs the order decides which payload stays."""
    torch.add(*((mine, theirs) if mine_first else (theirs, mine)), out=mine)


def _middle(begin: int, end: int) -> int:
    """Where [begin, end) is cut in two, the lower part the larger one."""
    half = -(-(end - begin) // 2)
    return min(begin + -(-half // ALIGN) * ALIGN, end)


def _run(flat: Tensor, rank: int, world: int, algorithm: Callable[..., Rounds], size: int) -> None:
    """Drive the rounds of all stripes, AHEAD of them at once, each with a buffer [size] of its own.

    Deadlock-free: which stripe comes next depends on counts alone, so every worker posts and waits in the
    same order, and the first wait that is open anywhere is for something that its peer has posted.
    """
    stripes = iter(torch.split(flat, STRIPE))
    needed = size * min(AHEAD, -(-flat.numel() // STRIPE))
    room = _take(flat, needed)
    spare = list(torch.split(room[:needed], size))
    waiting: deque[tuple[Rounds, list[dist.Work], Tensor]] = deque()
    while True:
        if spare and (stripe := next(stripes, None)) is not None:
            part = spare.pop()
            rounds = algorithm(stripe, rank, world, part)
        elif waiting:
            rounds, works, part = waiting.popleft()
            for work in works:
                work.wait()
        else:
            break
        swap = next(rounds, None)
        if swap is None:
            spare.append(part)
        else:
            waiting.append((rounds, _post(swap), part))
    _KEPT[flat.dtype, flat.device] = room  # not after an error: something may still be on its way into it


def _take(like: Tensor, size: int) -> Tensor:
    """A buffer of at least `size`, the last call's where that is enough. Until it is put back nobody else gets it."""
    kept = _KEPT.pop((like.dtype, like.device), None)
    return like.new_empty(size) if kept is None or kept.numel() < size else kept


def _post(swap: Swap) -> list[dist.Work]:
    """Start an exchange. One batch, as on NCCL and HCCL a send and a receive apart could wait for each other."""
    send = [dist.P2POp(dist.isend, swap.outgoing, swap.peer)] if swap.outgoing.numel() else []
    receive = [dist.P2POp(dist.irecv, swap.incoming, swap.peer)] if swap.incoming.numel() else []
    return dist.batch_isend_irecv(send + receive) if send or receive else []
