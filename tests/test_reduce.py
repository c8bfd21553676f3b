"""The exchange against the tree that it stands for: the same bits, whoever adds what, on any number of workers."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ottava import platforms
from ottava.supervisor.local import rendezvous
from ottava.trainer import reduce

from .conftest import PLATFORM

WORLDS = (1, 2, 4, 8)
ODD = np.array(  # NaNs of several payloads, infinities, both zeros, a subnormal, the largest numbers
    [0x7FC00001, 0xFFC12345, 0x7FFFFFFF, 0x7F800000, 0xFF800000, 0x80000000, 0, 1, 0x7F7FFFFF, 0xFF7FFFFF], np.uint32
)


def leaves(shards: int, length: int, seed: int) -> list[Tensor]:
    """Numbers of many sizes, so that the order matters, and one in eight of the odd ones."""
    rng = np.random.default_rng([seed, shards, length])
    values = rng.standard_normal((shards, length), np.float32)
    values *= np.logspace(-4, 4, 9, dtype=np.float32)[rng.integers(0, 9, (shards, length))]
    odd = rng.random((shards, length)) < 0.125
    values.view(np.uint32)[odd] = rng.choice(ODD, int(odd.sum()))
    return list(torch.from_numpy(values))


def bits(value: Tensor) -> bytes:
    return value.numpy().tobytes()


def subtree(parts: Sequence[Tensor], rank: int, world: int) -> Tensor:
    """What a worker brings to the exchange."""
    return reduce.tree_sum(parts[shard].clone() for shard in reduce.owned(len(parts), rank, world))


Algorithm = Callable[[Tensor, int, int, Tensor], reduce.Rounds]


def simulate(
    algorithm: Algorithm, values: Sequence[Tensor], late: bool, after: Callable[[int, int], None] = lambda *_: None
) -> int:
    """All workers' rounds in step, in this process; returns the largest number of elements that one of them sent.

    late: what is sent is read when the receiver waits for it, not before: nobody may change it on the way.
    after: called with (round, rank) when a worker has taken in what came.
    """
    world, sent = len(values), [0] * len(values)
    rooms = [torch.full_like(value, 7.0) for value in values]
    running = [algorithm(value, rank, world, rooms[rank]) for rank, value in enumerate(values)]
    number = 0
    while True:
        swaps = [next(rounds, None) for rounds in running]
        if number:
            for rank in range(world):
                after(number - 1, rank)
        if swaps[0] is None:
            assert swaps == [None] * world
            return max(sent)
        wire = [swap.outgoing if late else swap.outgoing.clone() for swap in swaps if swap is not None]
        for rank, swap in enumerate(swaps):
            assert swap is not None
            other = swaps[swap.peer]
            assert other is not None
            assert other.peer == rank
            swap.incoming.copy_(wire[swap.peer])  # raises where the sizes differ
            sent[rank] += swap.outgoing.numel()
        number += 1


# ---------------------------------------------------------------- who sums what


@pytest.mark.parametrize("world", [1, 2, 4, 8, 16])
def test_halvings_are_a_partition_and_partners_agree(world: int) -> None:
    for length in [*range(100), 127, 128, 129, 1000, 4096, 4099]:
        paths = [reduce.halvings(length, rank, world) for rank in range(world)]
        for rank, path in enumerate(paths):
            assert [part.peer for part in path] == [rank ^ 1 << level for level in range(len(path))]
            before = list(range(length))
            for level, part in enumerate(path):
                keep, give = list(range(length))[part.keep], list(range(length))[part.give]
                assert sorted(keep + give) == before
                assert (part.keep, part.give) == (paths[part.peer][level].give, paths[part.peer][level].keep)
                before = keep
        ends = [path[-1].keep for path in paths if path] or [slice(0, length)]
        assert sorted(i for end in ends for i in range(end.start, end.stop)) == list(range(length))


def test_worker_count_is_a_power_of_two() -> None:
    with pytest.raises(AssertionError, match="power of two"):
        reduce.exchange_(torch.zeros(4), 0, 3)


# ---------------------------------------------------------------- simulated workers


@given(st.sampled_from(WORLDS), st.integers(0, 3), st.integers(0, 200), st.integers(0, 99), st.booleans())
def test_both_ways_make_the_tree(world: int, more: int, length: int, seed: int, late: bool) -> None:
    parts = leaves(world << more, length, seed)
    expected = bits(reduce.tree_sum(part.clone() for part in parts))
    algorithms: tuple[Algorithm, ...] = (reduce.halving, reduce.doubling)
    for algorithm in algorithms:
        values = [subtree(parts, rank, world) for rank in range(world)]
        simulate(algorithm, values, late)
        assert {bits(value) for value in values} == {expected}


@pytest.mark.parametrize("world", [2, 4, 8])
def test_order_is_what_is_kept(world: int) -> None:
    """A sum in the order of the ranks gives other bits for the same numbers: the test above can fail."""
    parts = [torch.nan_to_num(part, 1.5, 2.5, -3.5).clamp(-1e6, 1e6) for part in leaves(8, 4096, 1)]
    straight = subtree(parts, 0, world)
    for rank in range(1, world):
        straight += subtree(parts, rank, world)
    whole = reduce.tree_sum(part.clone() for part in parts)
    assert (bits(straight) == bits(whole)) == (world == 2)  # of two there is one order
    torch.testing.assert_close(straight, whole, rtol=1e-3, atol=1.0)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_what_each_way_sends(world: int) -> None:
    """Halving: what a bandwidth-optimal all-reduce sends. Doubling: the array at every distance."""
    length = 64 * world * reduce.ALIGN
    sent = simulate(reduce.halving, [torch.zeros(length) for _ in range(world)], late=False)
    assert sent * world == 2 * length * (world - 1)
    sent = simulate(reduce.doubling, [torch.zeros(length) for _ in range(world)], late=False)
    assert sent == length * (world.bit_length() - 1)


def test_a_flipped_sum_shows_only_where_everybody_adds() -> None:
    """A bit flips in a sum of worker 2: with doubling the workers differ, with halving all are wrong alike."""
    ends = {}
    algorithms: tuple[Algorithm, ...] = (reduce.halving, reduce.doubling)
    for algorithm in algorithms:
        values = [torch.ones(256) for _ in range(8)]

        def flip(number: int, rank: int, values: list[Tensor] = values) -> None:
            if (number, rank) == (1, 2):
                values[2].view(torch.int32).bitwise_xor_(1 << 20)

        simulate(algorithm, values, False, flip)
        ends[algorithm] = {bits(value) for value in values}
    assert len(ends[reduce.doubling]) > 1
    assert ends[reduce.halving] != {bits(torch.full((256,), 8.0))}
    assert len(ends[reduce.halving]) == 1


# ---------------------------------------------------------------- real workers


def exchanges(args: dict[str, Any]) -> dict[str, Any]:
    """Started by name in every worker: the lengths whose bits are not those of the tree, and a digest of all bits."""
    from ottava.trainer.worker import join

    platform = platforms.get(PLATFORM)
    group, device = join(platform), platform.own()
    wrong, digest = [], hashlib.sha256()
    for small, stripe, length in args["cases"]:
        reduce.SMALL, reduce.STRIPE = small, stripe
        parts = leaves(8, length, 5)
        expected = bits(reduce.tree_sum(part.clone() for part in parts))
        for redundant in (False, True):
            value = subtree(parts, group.rank, group.world).to(device)
            assert reduce.exchange_(value, group.rank, group.world, redundant=redundant) is value
            digest.update(bits(value.cpu()))
            if bits(value.cpu()) != expected:
                wrong.append((small, stripe, length, redundant))
    return {"wrong": wrong, "digest": digest.hexdigest()}


@pytest.mark.device
@pytest.mark.parametrize("world", [2, 4, 8])
def test_real_workers_make_the_tree(launcher: Any, tmp_path: Path, world: int) -> None:
    """Small arrays, one stripe, many stripes with a short last one, and the sizes that ship."""
    cases = [(0, 1 << 20, n) for n in (0, 1, 2, 7, 15, 16, 17, 33, 1000, 65537)]
    cases += [(0, 64, n) for n in (63, 64, 65, 128, 1000, 4097)]
    edge = reduce.SMALL // (world // 2) ** 2
    cases += [(reduce.SMALL, reduce.STRIPE, n) for n in (1, 1000, edge, edge + 1)]
    found = launcher.call("tests.test_reduce:exchanges", {"cases": cases}, workers=world, logs=tmp_path)
    assert [result["wrong"] for result in found] == [[]] * world
    assert len({result["digest"] for result in found}) == 1


def lose_a_peer(args: dict[str, Any]) -> dict[str, Any]:
    """Started by name: exchange until somebody is gone."""
    from ottava.trainer.worker import join

    group = join(platforms.get("cpu"))
    value = torch.ones(args["length"])
    for number in range(1000):
        if number == 3 and group.rank == args["victim"]:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            reduce.exchange_(value, group.rank, group.world, redundant=args["redundant"])
        except RuntimeError as error:
            return {"raised": str(error)}
    return {"raised": None}


@pytest.mark.parametrize("redundant", [False, True])
def test_a_lost_peer_is_an_error_for_all(launcher: Any, tmp_path: Path, redundant: bool) -> None:
    """Those at a distance too: who raises ends, and so its own peers hear of it."""
    args = {"length": 3 * reduce.STRIPE // 2, "victim": 2, "redundant": redundant}
    workers = [
        launcher.spawn("tests.test_reduce:lose_a_peer", args, pool=None, logs=tmp_path, env=env)
        for env in rendezvous(4)
    ]
    try:
        for rank, worker in enumerate(workers):
            assert worker.wait(timeout=300) is not None, f"worker {rank} hangs"
            if rank != args["victim"]:
                assert worker.result()["raised"]
    finally:
        for worker in workers:
            worker.kill()
