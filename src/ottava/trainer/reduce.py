"""A sum over virtual shards whose order does not depend on how many workers there are.

Floating-point addition is not associative: an all-reduce over two workers and one over four give
other bits. Here the shards' gradients are the leaves of a fixed binary tree. Each worker owns a
contiguous power-of-two block of leaves, sums its own subtree, and exchanges with the worker at
distance 1, 2, 4, ...: at every level both partners add the same two numbers, so all hold the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


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


def exchange_(value: Tensor, rank: int, world: int) -> Tensor:
    """Finish the tree over the workers' subtree sums, in place: every worker ends with the whole sum."""
    received = torch.empty_like(value)
    distance = 1
    while distance < world:
        peer = rank ^ distance
        sending = dist.isend(value, peer)
        dist.recv(received, peer)
        if sending is not None:
            sending.wait()
        value.add_(received)
        distance *= 2
    return value
