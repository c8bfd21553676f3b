"""How far a run drifts when it moves to chips that round differently, against what rounding alone explains.

A trajectory on another numerics class is not the same bits, so it needs a bound that was not chosen
to pass. The two classes are measured to differ by so much, relatively, in the gradient of each
tensor, on the same state and batch. Replicas on one class then have every element of every gradient
multiplied by Gaussian noise of that size, so that zeros stay zero as they do under rounding; how far
they scatter after `window` steps, with a prediction limit for one more draw, is the envelope.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ottava import platforms
from ottava.trainer import reduce, snapshot
from ottava.trainer.loop import Trainer
from ottava.trainer.worker import make_trainer

NOISE = 17  # the random stream of the replicas
CONFIDENCE = 0.99


def gradient(args: Mapping[str, Any]) -> dict[str, Any]:
    """The summed gradient of one step from a state, written to a file. args: as `follow`, without steps."""
    platforms.get("cpu").pin_numerics()
    trainer = make_trainer(args)
    trainer.state.restore(snapshot.load(Path(args["start"])))
    kept: list[Tensor] = []
    trainer.step(lambda total: total, _all_shards(trainer), lambda g: kept.append(g.clone()))
    Path(args["out"]).write_bytes(kept[0].numpy().tobytes())
    return {"digest": trainer.state.digest()}


def follow(args: Mapping[str, Any]) -> dict[str, Any]:
    """Run `steps` steps from a state in one process and keep the last state.

    The process's RANK r chooses the noise: rank 0 has none; others multiply each element of a tensor's
    gradient by 1 + size * N(0, 1), where size is the relative distance of that tensor's part of the two
    files `gradients` (of two classes).
    args: spec, seed, data, chat; start; steps; out ("...{rank}..."); gradients: two paths or none.
    Returns {step, digest}.
    """
    platforms.get("cpu").pin_numerics()
    rank = int(os.environ.get("RANK", "0"))
    trainer = make_trainer(args)
    trainer.state.restore(snapshot.load(Path(args["start"])))
    perturb = _noise(trainer, args["gradients"], rank) if rank else None
    for _ in range(args["steps"]):
        trainer.step(lambda total: total, _all_shards(trainer), perturb)
    snapshot.save(Path(args["out"].format(rank=rank)), trainer.state.snapshot())
    return {"step": trainer.state.step, "digest": trainer.state.digest()}


def compare(args: Mapping[str, Any]) -> dict[str, Any]:
    """The drift of one state from another, the replicas' drifts, and the envelope.

    args: spec, seed, data, chat; moved, stayed: state files; replicas: state files. Drift is the
    relative distance of the weights, |a - b| / |b|, in float64.
    """
    trainer = make_trainer(args)
    moved = _weights(trainer, args["moved"])
    drift = distance(_weights(trainer, args["stayed"]), moved)
    replicas = [distance(_weights(trainer, path), moved) for path in args["replicas"]]
    return {"drift": drift, "replicas": replicas, "envelope": envelope(replicas)}


def distance(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b| in float64; zero where both are zero."""
    gap = float((a.double() - b.double()).norm())
    return gap / float(b.double().norm()) if gap else 0.0


def envelope(replicas: Sequence[float], confidence: float = CONFIDENCE) -> float:
    """The upper prediction limit for one more drift drawn as the replicas were, taken as log-normal.

    mean + t * s * sqrt(1 + 1/n) of the logarithms, t from Student's distribution with n - 1 degrees.
    Zero where every replica is zero: equal classes must not drift at all.
    """
    from scipy.stats import t

    if max(replicas) == 0.0:
        return 0.0
    logs = np.log(np.asarray(replicas))
    n = len(logs)
    limit = logs.mean() + t.ppf(confidence, n - 1) * logs.std(ddof=1) * math.sqrt(1 + 1 / n)
    return float(math.exp(limit))


def _noise(trainer: Trainer, gradients: Sequence[str], replica: int) -> Callable[[Tensor], None]:
    a, b = (torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=torch.float32) for path in gradients)
    slots = trainer.state.slots
    sizes = [distance(slot.view(a), slot.view(b)) for slot in slots]

    def perturb(gradient: Tensor) -> None:
        key = [trainer.seed, NOISE]
        draw = np.random.Generator(np.random.Philox(key=key, counter=[0, trainer.state.step, replica, 0]))
        for slot, size in zip(slots, sizes, strict=True):
            noise = torch.from_numpy(draw.standard_normal(slot.size, dtype=np.float32)).view(slot.shape)
            part = slot.view(gradient)
            part.add_(part * noise, alpha=size)

    return perturb


def _weights(trainer: Trainer, path: str) -> Tensor:
    trainer.state.restore(snapshot.load(Path(path)))
    return trainer.state.weights.clone()


def _all_shards(trainer: Trainer) -> range:
    return reduce.owned(trainer.spec.virtual_shards, 0, 1)
