"""One rank of the collectives by ctypes, started by test_exchange.py: every case with its oracle in numpy.

    python -m tests.npu.exchange NAME RANKS RANK

Prints {case: 1 where every byte is right}. The inputs of a rank are a function of its number, so that each rank knows
what all of them brought.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable
from ctypes import c_int, c_uint32, c_uint64
from functools import reduce
from typing import Any

import numpy as np

from . import raw
from .raw import Array, hccl

TYPES = {
    "int8": (0, np.int8), "int16": (1, np.int16), "int32": (2, np.int32), "float16": (3, np.float16),
    "float32": (4, np.float32), "int64": (5, np.int64), "uint64": (6, np.uint64), "uint8": (7, np.uint8),
    "uint16": (8, np.uint16), "uint32": (9, np.uint32), "float64": (10, np.float64),
}  # fmt: skip
OPERATIONS: dict[str, tuple[int, Callable[[Array, Array], Array]]] = {
    "sum": (0, np.add), "prod": (1, np.multiply), "max": (2, np.maximum), "min": (3, np.minimum)
}  # fmt: skip
LENGTHS = (0, 1, 3, 1000, 300_001)  # the last does not fit into the ring between two ranks


def brought(rank: int, length: int, dtype: type, salt: int = 0) -> Array:
    """What a rank brings: numbers of many sizes, so that the order of a sum matters."""
    rng = np.random.default_rng([rank, length, salt])
    if np.issubdtype(dtype, np.integer):
        return rng.integers(0, 7, length).astype(dtype)
    return (rng.standard_normal(length) * 10.0 ** rng.integers(-3, 4, length)).astype(dtype)


def fold(parts: list[Array], operation: Callable[[Array, Array], Array]) -> Array:
    """In the order of ranks; half precision in float32, rounded once."""
    wide = [part.astype(np.float32) if part.dtype == np.float16 else part for part in parts]
    return reduce(operation, wide).astype(parts[0].dtype)


class Rank:
    def __init__(self, name: str, ranks: int, rank: int):
        self.ranks, self.rank = ranks, rank
        raw.device(rank)
        self.stream = raw.stream()
        self.comm = raw.communicator(name.encode(), ranks, rank)
        self.found: dict[str, int] = {}

    def check(self, case: str, call: Callable[..., None], mine: Array, expected: Array, *words: Any) -> None:
        """Queue `call(in, out, *words, communicator, stream)`, then compare its output."""
        source, target = raw.put(mine), raw.put(np.full_like(expected, 77))
        call(source, target, *words, self.comm, self.stream)
        raw.acl.aclrtSynchronizeStream(self.stream)
        got = raw.fetch(target, expected)
        self.found[case] = int(got.tobytes() == expected.tobytes())
        for place in (source, target):
            raw.acl.aclrtFree(place)

    def everyone(self, length: int, dtype: type, salt: int = 0) -> list[Array]:
        return [brought(r, length, dtype, salt) for r in range(self.ranks)]

    def reductions(self) -> None:
        with np.errstate(all="ignore"):
            for kind, (code, dtype) in TYPES.items():
                for operation, (number, function) in OPERATIONS.items():
                    for length in LENGTHS if kind in ("float32", "float16") else (5,):
                        self._reduce(f"{operation} {kind} {length}", code, dtype, number, function, length)

    def _reduce(
        self, name: str, code: int, dtype: type, number: int, function: Callable[[Array, Array], Array], length: int
    ) -> None:
        parts, words = self.everyone(length, dtype), (c_uint64(length), c_int(code), c_int(number))
        whole = fold(parts, function)
        self.check(f"all_reduce {name}", hccl.HcclAllReduce, parts[self.rank], whole, *words)
        root = self.ranks - 1
        kept = whole if self.rank == root else np.full_like(whole, 77)
        self.check(f"reduce {name}", hccl.HcclReduce, parts[self.rank], kept, *words, c_uint32(root))
        wide = self.everyone(length * self.ranks, dtype)
        own = slice(self.rank * length, (self.rank + 1) * length)
        self.check(f"reduce_scatter {name}", hccl.HcclReduceScatter, wide[self.rank], fold(wide, function)[own], *words)

    def movements(self) -> None:
        me, n = self.rank, self.ranks
        for length in LENGTHS:
            parts = self.everyone(length, np.int16)
            word = (c_uint64(length), c_int(1))
            whole = np.concatenate(parts)
            self.check(f"all_gather {length}", hccl.HcclAllGather, parts[me], whole, *word)
            root = c_uint32(n - 1)
            wide = brought(n - 1, length * n, np.int16)
            self.check(f"scatter {length}", hccl.HcclScatter, wide, wide[me * length : (me + 1) * length], *word, root)
            slices = [brought(r, length * n, np.int16).reshape(n, length)[me] for r in range(n)]

            def swap(source: Any, target: Any, count: Any, kind: Any, *ends: Any) -> None:
                hccl.HcclAlltoAll(source, count, kind, target, count, kind, *ends)

            self.check(
                f"all_to_all {length}", swap, brought(me, length * n, np.int16), np.concatenate(slices), *word
            )  # fmt: skip

            def broadcast(_: Any, target: Any, *words: Any) -> None:
                if me == n - 1:  # in place: the sender's buffer is its output
                    raw.acl.aclrtMemcpy(target, words[0].value * 2, _, words[0].value * 2, raw.ON_DEVICE)
                hccl.HcclBroadcast(target, *words)

            self.check(f"broadcast {length}", broadcast, parts[me], parts[n - 1], *word, root)

    def uneven(self) -> None:
        """Rank r sends (r + 2 s) elements to rank s; 0 among them."""
        me, n = self.rank, self.ranks
        sizes = np.array([[r + 2 * s for s in range(n)] for r in range(n)])
        rows = [brought(r, int(sizes[r].sum()), np.float32, 9) for r in range(n)]
        starts = np.concatenate([np.zeros((n, 1), int), sizes.cumsum(1)[:, :-1]], 1)
        expected = np.concatenate([rows[r][starts[r][me] : starts[r][me] + sizes[r][me]] for r in range(n)])
        come = np.concatenate([[0], sizes[:, me].cumsum()[:-1]])

        def call(source: Any, target: Any, comm: Any, stream: Any) -> None:
            hccl.HcclAlltoAllV(
                source, raw.counts(*sizes[me]), raw.counts(*starts[me]), 4,
                target, raw.counts(*sizes[:, me]), raw.counts(*come), 4, comm, stream,
            )  # fmt: skip

        self.check("all_to_all_v", call, rows[me], expected)
        parts = [brought(r, r + 1, np.float32, 8) for r in range(n)]

        def gather(source: Any, target: Any, comm: Any, stream: Any) -> None:
            lengths = raw.counts(*(r + 1 for r in range(n)))
            places = raw.counts(*(r * (r + 1) // 2 for r in range(n)))
            hccl.HcclAllGatherV(source, c_uint64(me + 1), target, lengths, places, 4, comm, stream)

        self.check("all_gather_v", gather, parts[me], np.concatenate(parts))

    def pairs(self) -> None:
        """To the next, from the one before, in one batch: large, so that a send that waits for its turn would hang."""
        me, n = self.rank, self.ranks
        length = 300_001
        mine, theirs = brought(me, length, np.float32, 5), brought((me - 1) % n, length, np.float32, 5)

        class Item(ctypes.Structure):
            _fields_ = (
                ("receives", c_int), ("buffer", ctypes.c_void_p), ("count", c_uint64), ("type", c_int),
                ("peer", c_uint32),
            )  # fmt: skip

        def batch(source: Any, target: Any, comm: Any, stream: Any) -> None:
            items = (Item * 2)(
                Item(0, source, length, 4, (me + 1) % n), Item(1, target, length, 4, (me - 1) % n)
            )  # fmt: skip
            hccl.HcclBatchSendRecv(items, c_uint32(2), comm, stream)

        self.check("batch_send_recv", batch, mine, theirs)

        def relay(source: Any, target: Any, comm: Any, stream: Any) -> None:
            words = (c_uint64(length), c_int(4))
            if me == 0:
                hccl.HcclSend(source, *words, c_uint32(1), comm, stream)
                hccl.HcclRecv(target, *words, c_uint32(n - 1), comm, stream)
            else:
                hccl.HcclRecv(target, *words, c_uint32(me - 1), comm, stream)
                hccl.HcclSend(target, *words, c_uint32((me + 1) % n), comm, stream)

        self.check("send_recv", relay, mine, brought(0, length, np.float32, 5))

    def order(self) -> None:
        """Twenty sums in one buffer, one after the other, without a wait between: the stream keeps them apart."""
        place = raw.put(np.ones(1, np.int64))
        for _ in range(20):
            hccl.HcclAllReduce(place, place, c_uint64(1), 5, 0, self.comm, self.stream)
        other = raw.stream()  # of one communicator on two streams, in the order of the calls
        event = raw.event()
        raw.acl.aclrtRecordEvent(event, self.stream)
        raw.acl.aclrtStreamWaitEvent(other, event)
        hccl.HcclAllReduce(place, place, c_uint64(1), 5, 0, self.comm, other)
        raw.acl.aclrtSynchronizeStream(other)
        self.found["order"] = int(raw.fetch(place, np.ones(1, np.int64))[0] == self.ranks**21)
        hccl.HcclBarrier(self.comm, self.stream)
        raw.acl.aclrtSynchronizeStream(self.stream)


if __name__ == "__main__":
    rank = Rank(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    for part in (rank.reductions, rank.movements, rank.uneven, rank.pairs, rank.order):
        part()
    print(json.dumps(rank.found))
