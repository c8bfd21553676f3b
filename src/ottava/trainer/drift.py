"""How far a run drifts when it moves to chips that round differently, against what rounding alone explains.

A trajectory on another numerics class is not the same bits, so it needs a bound that was not chosen
to pass. At every step of the moved trajectory both classes compute the gradient of the same state on
the same batch; how much they differ, tensor by tensor, is the size of rounding. Replicas on one class
then have every element of every gradient multiplied by Gaussian noise of that size, step by step, so
that zeros stay zero as they do under rounding. How far the replicas scatter after the last step gives a
prediction limit for one more draw; the envelope is twice that, as the noise is only a model of rounding.
A part of the state that was lost or mixed up drifts hundreds of times further.

Functions here are started by name in a pool; `supervisor.drift` calls them in order.
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
from ottava.trainer.start import make_trainer

NOISE = 17  # the random stream of the replicas
CONFIDENCE = 0.99
MARGIN = 2.0  # the noise is a model: rounding is neither Gaussian nor independent from step to step


def follow(args: Mapping[str, Any]) -> dict[str, Any]:
    """Run `steps` steps from a state in one process; keep the last state and, if asked, every state and gradient.

    args: spec, seed, data, chat, platform; start, steps, out (file); trace (a folder for `state-I` and
    `gradient-POOL-I`, or None); pool (its name). Returns {step, digest}.
    """
    trainer = _at(args, args["start"])
    trace = None if args["trace"] is None else Path(args["trace"])
    for number in range(args["steps"]):
        if trace is None:
            _step(trainer)
            continue
        snapshot.save(trace / f"state-{number}", trainer.state.snapshot())
        _step(trainer, lambda g, n=number: _keep(trace, args["pool"], n, g))  # type: ignore[misc]
    snapshot.save(Path(args["out"]), trainer.state.snapshot())
    return {"step": trainer.state.step, "digest": trainer.state.digest()}


def gradients(args: Mapping[str, Any]) -> dict[str, Any]:
    """The gradient of every state that `follow` traced, computed on this pool. args: as `follow`."""
    trace = Path(args["trace"])
    trainer = _at(args, str(trace / "state-0"))
    for number in range(args["steps"]):
        trainer.state.restore(snapshot.load(trace / f"state-{number}"))
        _step(trainer, lambda g, n=number: _keep(trace, args["pool"], n, g))  # type: ignore[misc]
    return {}


def replicate(args: Mapping[str, Any]) -> dict[str, Any]:
    """One perturbed replica, numbered by RANK. args: as `follow`; pools: two names; out: "...{rank}"."""
    rank = int(os.environ["RANK"])
    trainer = _at(args, args["start"])
    for number in range(args["steps"]):
        _step(trainer, _noise(trainer, Path(args["trace"]), args["pools"], number, rank))
    snapshot.save(Path(args["out"].format(rank=rank)), trainer.state.snapshot())
    return {"step": trainer.state.step}


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


def envelope(replicas: Sequence[float]) -> float:
    """What a drift that rounding explains stays below: MARGIN times the replicas' prediction limit."""
    return MARGIN * prediction_limit(replicas)


def prediction_limit(replicas: Sequence[float], confidence: float = CONFIDENCE) -> float:
    """The upper limit for one more drift drawn as the replicas were, taken as log-normal.

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


def _noise(trainer: Trainer, trace: Path, pools: Sequence[str], number: int, replica: int) -> Callable[[Tensor], None]:
    a, b = (_read(trace, pool, number) for pool in pools)
    slots = trainer.state.slots
    sizes = [distance(slot.view(a), slot.view(b)) for slot in slots]

    def perturb(gradient: Tensor) -> None:
        key = [trainer.seed, NOISE]
        draw = np.random.Generator(np.random.Philox(key=key, counter=[0, trainer.state.step, replica, 0]))
        for slot, size in zip(slots, sizes, strict=True):
            noise = torch.from_numpy(draw.standard_normal(slot.size, dtype=np.float32)).view(slot.shape)
            part = slot.view(gradient)
            part.add_(part * noise.to(part.device), alpha=size)

    return perturb


def _at(args: Mapping[str, Any], state: str) -> Trainer:
    platforms.asked(args).open()
    trainer = make_trainer(args)
    trainer.state.restore(snapshot.load(Path(state)))
    return trainer


def _step(trainer: Trainer, perturb: Callable[[Tensor], None] | None = None) -> None:
    trainer.step(lambda total: total, reduce.owned(trainer.spec.virtual_shards, 0, 1), perturb)


def _keep(trace: Path, pool: str, number: int, gradient: Tensor) -> None:
    (trace / f"gradient-{pool}-{number}").write_bytes(gradient.cpu().numpy().tobytes())


def _read(trace: Path, pool: str, number: int) -> Tensor:
    return torch.frombuffer(bytearray((trace / f"gradient-{pool}-{number}").read_bytes()), dtype=torch.float32)


def _weights(trainer: Trainer, path: str) -> Tensor:
    trainer.state.restore(snapshot.load(Path(path)))
    return trainer.state.weights.clone()
