"""What workers measure of each other: speed in turns, links pair by pair, sums at the run's own sizes, repeatability.

Everything that is compared is done in rounds, in an order that is drawn anew in each, until `bets` has decided. All
workers gather all times, so that all come to the same decision and stop together.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ottava.fp8 import codec, matmul, reference, training
from ottava.link import Link
from ottava.platforms import probe
from ottava.platforms.base import Platform
from ottava.qualify.bets import Bets
from ottava.trainer import reduce
from ottava.trainer.guard import Group

SMALL = 64  # bytes of a message that measures latency
TRIES = 3  # messages of which the quickest counts: who is interrupted once is not who is slow
TURN_S = 0.004  # of one piece of work, on the fastest worker
REPEATS = 8
LARGEST = 1 << 13  # side of a matrix
COPIED = {True: 1 << 24, False: 1 << 29}  # bytes; by whether the memory is the machine's

Work = Callable[[], object]


@dataclass(frozen=True)
class Bench:
    """One worker at its place. at: where planted faults strike; alpha: of one comparison's accusing anybody."""

    platform: Platform
    device: torch.device
    group: Group
    link: Link
    strike: Callable[[str], None]
    seed: int
    alpha: float

    def at(self, place: str) -> None:
        """Say where this worker is: whoever hangs is told by how far it came."""
        self.link.phase = place
        self.link.say("at", at=place)
        self.strike(place)

    def meet(self) -> None:
        """Wait for the others, without the device's links."""
        if self.group.world > 1:
            dist.all_reduce(torch.zeros(1))

    def seconds(self, work: Work, count: int = 1) -> float:
        """Of `count` times the work."""
        self.platform.synchronize()
        begun = time.perf_counter()
        for _ in range(count):
            work()
        self.platform.synchronize()
        return time.perf_counter() - begun

    @contextmanager
    def alike(self, number: int) -> Iterator[None]:
        """Round `number` under the same conditions for all: workers that share cores are all put on the same one.

        Else a load that sits on one core would be taken for the fault of the worker that the system has put there.
        """
        cores = sorted(os.sched_getaffinity(0))
        if not self.platform.shared_memory or len(cores) == 1:
            yield
            return
        _stay_on({cores[number % len(cores)]})
        try:
            yield
        finally:
            _stay_on(set(cores))


def _stay_on(cores: set[int]) -> None:
    """All threads of this process, the ones that carry its messages too."""
    for thread in os.listdir("/proc/self/task"):
        try:
            os.sched_setaffinity(int(thread), cores)
        except ProcessLookupError:  # it ended meanwhile
            continue


def shuffled(items: Sequence[Any], *key: object) -> list[Any]:
    """In an order that is drawn from a key: the same on every worker."""
    out = list(items)
    random.Random(repr(key)).shuffle(out)
    return out


# ---------------------------------------------------------------- one worker's own numbers


def numbers(bench: Bench) -> dict[str, Any]:
    """The numerics class, twice; products against float64; the FP8 grid against its reference; memory."""
    args = {"platform": bench.platform.name}
    bench.at("numbers:0")
    first, again = probe.numerics_class(args), probe.numerics_class(args)
    bench.at("numbers:1")
    values = probe.pattern((256, 384), 17, bench.device)
    put = codec.project(values).cpu()
    return {
        "class": first["numerics_class"],
        "again": again["numerics_class"],
        "describe": first["describe"],
        "matmul": probe.matmul_error(args),
        "fp8_exact": torch.equal(put, reference.project(values.cpu())),
        "fp8_product": _fp8_error(bench),
        "resources": probe.resources(args),
    }


def _fp8_error(bench: Bench) -> float | None:
    """The largest error of an FP8 product, as a share of its a-priori bound; None where the platform has none."""
    if bench.device.type != "cpu":
        return (0.0 if training.agrees(bench.device) else float("inf")) if training.native(bench.device) else None
    if not matmul.orders():
        return None
    x, weight = probe.pattern((16, 256), 5, bench.device), probe.pattern((128, 256), 6, bench.device)
    codes, scales = codec.quantise(weight)
    exact = x.double() @ reference.dequantise(codes, scales, torch.float32).double().T
    size = x.double().abs() @ reference.dequantise(codes, scales, torch.float32).double().abs().T
    bound = (probe.gamma(256, torch.float32) + probe.gamma(256, torch.float64)) * size
    return float(((matmul.product(x, codes, scales).double() - exact).abs() / bound).max())


def stress(bench: Bench) -> str:
    """The digest of a gradient and of products in both formats: the same each time, on a chip that is sound."""
    side = 96 if bench.platform.shared_memory else 2048
    whole = hashlib.sha256(probe.numerics_class({"platform": bench.platform.name})["numerics_class"].encode())
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (probe.pattern((side, side), salt, bench.device).to(dtype) for salt in (31, 32))
        whole.update(probe.digest([torch.matmul(a, b)]).encode())
    return whole.hexdigest()


def repeat(bench: Bench) -> dict[str, Any]:
    """The same work again and again: the first digest, and at which repetitions another one came."""
    digests = []
    for number in range(REPEATS):
        bench.at(f"repeat:{number}")
        digests.append(stress(bench))
    return {"first": digests[0], "changed": [n for n, found in enumerate(digests) if found != digests[0]]}


# ---------------------------------------------------------------- speed


def works(bench: Bench) -> dict[str, tuple[Work, float]]:
    """What is timed: name -> (the work, FLOPs or bytes of one)."""
    side = min(bench.group.gather(_side(bench)))
    a, b = probe.pattern((side, side), 1, bench.device), probe.pattern((side, side), 2, bench.device)
    half = a.bfloat16(), b.bfloat16()
    source = torch.zeros(COPIED[bench.platform.shared_memory], dtype=torch.uint8, device=bench.device)
    target, flops = torch.empty_like(source), 2.0 * side**3
    found: dict[str, tuple[Work, float]] = {
        "float32": (lambda: torch.matmul(a, b), flops),
        "bfloat16": (lambda: torch.matmul(*half), flops),
        "memory": (lambda: target.copy_(source), 2.0 * source.numel()),
    }
    fp8 = _fp8_work(bench, a, b)
    return found if fp8 is None else {**found, "fp8": (fp8, flops)}


def _fp8_work(bench: Bench, a: torch.Tensor, b: torch.Tensor) -> Work | None:
    """A product with a weight of FP8 codes: the chip's own, or this machine's kernel that reads codes."""
    if training.native(bench.device):
        ready = training.prepare(b)
        return lambda: training.linear(a, b, ready)
    if bench.device.type != "cpu" or not matmul.orders():
        return None
    codes, scales = codec.quantise(b)
    return lambda: matmul.product(a, codes, scales)


def _side(bench: Bench) -> int:
    """Of square matrices whose product takes long enough to be timed."""
    side, least = 128, 1e-4 if bench.platform.shared_memory else 2e-3
    while side < LARGEST:
        a = probe.pattern((side, side), 1, bench.device)
        if min(bench.seconds(lambda a=a: torch.matmul(a, a)) for _ in range(4)) >= least:  # type: ignore[misc]
            break
        side *= 2
    return side


def speed(bench: Bench, factor: float) -> dict[str, Any]:
    """Everybody's rate of every work, in turns: {name: {"rate": of this worker, "ratio", "accused": by rank, ...}}."""
    bench.at("speed:0")
    todo = works(bench)
    counts = {}
    for name, (work, _) in todo.items():
        bench.seconds(work)
        once = min(bench.group.gather(min(bench.seconds(work) for _ in range(3))))
        counts[name] = max(1, round(TURN_S / once))
    bets = {name: Bets(bench.group.world, factor, bench.alpha) for name in todo}
    for number in itertools.count():
        bench.at(f"speed:{number + 1}")
        with bench.alike(number):
            own = {}
            for turn in shuffled(range(bench.group.world), bench.seed, number):
                bench.meet()
                if turn == bench.group.rank:
                    open_ = [name for name in todo if not bets[name].done]
                    own = {name: bench.seconds(todo[name][0], counts[name]) for name in open_}
        everybody = bench.group.gather(own)
        for name in own:
            bets[name].add([times[name] for times in everybody])
        if all(bet.done for bet in bets.values()):
            break
    rank = bench.group.rank
    found = {}
    for name, bet in bets.items():
        seconds = sorted(times[rank] for times in bet.rounds)
        amount = todo[name][1] * counts[name]
        found[name] = {
            "rate": amount / statistics.median(seconds),
            "best": amount / seconds[0],
            "ratio": bet.ratio(rank),
            "rounds": len(bet.rounds),
            "accused": list(bet.accused),
        }
    return found


# ---------------------------------------------------------------- links


def links(bench: Bench, size: int, factor: float) -> dict[str, Any]:
    """The map of all directed pairs: latency of SMALL bytes, bandwidth of `size` bytes.

    Returns {"map": [{from, to, latency_s, seconds, ratio, ...}], "slow": [[from, to]], "wrong": [[from, to]]: what
    this worker received other than it was sent}, by ranks.
    """
    pairs: list[tuple[int, int]] = list(itertools.permutations(range(bench.group.world), 2))
    if not pairs:
        return {"map": [], "slow": [], "wrong": [], "bytes": size}
    bets = {SMALL: Bets(len(pairs), factor, bench.alpha), size: Bets(len(pairs), factor, bench.alpha)}
    loads = {length: _load(length, bench.device) for length in bets}
    wrong: set[tuple[int, int]] = set()
    for number in itertools.count():
        bench.at(f"links:{number}")
        own: dict[int, dict[int, float]] = {length: {} for length in bets}
        with bench.alike(number):
            for index in shuffled(range(len(pairs)), bench.seed, number):
                for length, load in loads.items():
                    sent = [_send(bench, pairs[index], load) for _ in range(TRIES)]
                    if bench.group.rank == pairs[index][1]:
                        own[length][index] = min(seconds for seconds, _ in sent)
                        if not all(right for _, right in sent):
                            wrong.add(pairs[index])
        everybody = bench.group.gather({length: list(times.items()) for length, times in own.items()})
        for length, bet in bets.items():
            times = dict(entry for part in everybody for entry in part[length])
            bet.add([times[index] for index in range(len(pairs))])
        if all(bet.done for bet in bets.values()):
            break
    slow = sorted({pairs[unit] for bet in bets.values() for unit in bet.accused})
    shown = [_link(index, pair, bets[SMALL], bets[size], size) for index, pair in enumerate(pairs)]
    return {"map": shown, "slow": list(map(list, slow)), "wrong": sorted(map(list, wrong)), "bytes": size}


def _link(index: int, pair: tuple[int, int], small: Bets, large: Bets, size: int) -> dict[str, Any]:
    latency = statistics.median(times[index] for times in small.rounds)
    seconds = sorted(times[index] for times in large.rounds)
    return {
        "from": pair[0],
        "to": pair[1],
        "latency_s": latency / 2,  # of the word that asks for it, and of the message
        "bandwidth_gb_s": size / statistics.median(seconds) / 1e9,
        "best_gb_s": size / seconds[0] / 1e9,
        "ratio": max(small.ratio(index), large.ratio(index)),
        "rounds": len(large.rounds),
    }


def _load(size: int, device: torch.device) -> torch.Tensor:
    return (torch.arange(size // 4, dtype=torch.int32) * 7919 % 65521).to(device)


def _send(bench: Bench, pair: tuple[int, int], load: torch.Tensor) -> tuple[float, bool]:
    """One message: the receiver's seconds, and whether it got what was sent; of others, nothing.

    The receiver's clock starts when its word that it waits is on its way: what it takes to send that word is left out,
    so that a worker that is slow in sending is so on its own links alone, also where there are only two.
    """
    (sender, receiver), rank = pair, bench.group.rank
    word = torch.zeros(1, dtype=torch.int32, device=bench.device)
    if rank == sender:
        dist.recv(word, receiver)
        dist.send(load, receiver)
        bench.platform.synchronize()
    elif rank == receiver:
        got = torch.empty_like(load)
        dist.send(word, sender)
        bench.platform.synchronize()
        begun = time.perf_counter()
        dist.recv(got, sender)
        bench.platform.synchronize()
        return time.perf_counter() - begun, torch.equal(got, load)
    return 0.0, True


# ---------------------------------------------------------------- sums, at the run's own sizes


def messages(parameters: int, world: int) -> dict[str, int]:
    """What a step of a run sends, in bytes, by name: the gradient, the tree's messages, and the digests of states.

    parameters: floats that travel; world: workers, a power of two. As `trainer.reduce` cuts them.
    """
    stripe = min(parameters, reduce.STRIPE)
    sizes = {"gradient": 4 * parameters, "digest": 32}
    if world < 2:
        return sizes
    if parameters <= reduce.SMALL // (world // 2) ** 2:
        return {**sizes, "tree, every distance": 4 * stripe}
    parts = reduce.halvings(stripe, 0, world)
    return {**sizes, **{f"tree, distance {1 << n}": 4 * (p.give.stop - p.give.start) for n, p in enumerate(parts)}}


def collectives(bench: Bench, sizes: dict[str, int], most: int) -> dict[str, Any]:
    """all_reduce at every size, exact on integers, and the run's own tree sum of the gradient. most: bytes."""
    bench.at("collectives:0")
    wanted = sorted({max(4, min(size, most)) // 4 * 4 for size in sizes.values()})
    found = probe.collectives({"platform": bench.platform.name, "sizes": wanted, "repeats": 5})
    bench.at("collectives:1")
    length = min(sizes["gradient"], most) // 4
    return {**found, "named": sizes, "cut": max(sizes.values()) > most, "tree": _tree(bench, length)}


def _tree(bench: Bench, length: int) -> dict[str, Any] | None:
    rank, world = bench.group.rank, bench.group.world
    if world & (world - 1) or world == 1:
        return None
    base, seconds, exact = torch.arange(length, device=bench.device, dtype=torch.float32) % 251, [], True
    for _ in range(5):
        value = base * (rank + 1)
        bench.meet()
        seconds.append(bench.seconds(lambda value=value: reduce.exchange_(value, rank, world)))  # type: ignore[misc]
        exact = exact and torch.equal(value, base * (world * (world + 1) // 2))
    return {"bytes": 4 * length, "seconds": statistics.median(seconds), "exact": exact}


# ---------------------------------------------------------------- soak


def soak(bench: Bench, seconds: float, gradient: int) -> dict[str, Any]:
    """All at once, for so long and REPEATS rounds at least: digests of work and of the run's sum, compared each time.

    Returns {"rounds", "seconds", "first": digest, "changed": rounds in which this worker contradicted itself, "sums":
    rounds in which it ended with another sum than most}. What is found is said at once.
    """
    begun, first, changed, sums = time.monotonic(), "", [], []
    world, rank = bench.group.world, bench.group.rank
    length = max(16, gradient // 4)
    for number in itertools.count():
        bench.at(f"soak:{number}")
        digest = stress(bench)
        first = first or digest
        total = probe.pattern((length,), 40 + rank, bench.device)
        if world & (world - 1) == 0 and world > 1:
            reduce.exchange_(total, rank, world, redundant=True)
            whole = bench.group.gather(probe.digest([total]))
            if whole[rank] != statistics.mode(whole):
                sums.append(number)
        if digest != first:
            changed.append(number)
        if changed[-1:] == [number] or sums[-1:] == [number]:
            bench.link.say("changed", at=f"soak:{number}")
        enough = bench.group.gather(time.monotonic() - begun)[0] >= seconds
        if enough and number + 1 >= REPEATS:
            break
    return {
        "rounds": number + 1, "seconds": time.monotonic() - begun, "first": first, "changed": changed, "sums": sums,
    }  # fmt: skip
