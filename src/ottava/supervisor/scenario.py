"""The classes of fault that a drill rehearses, and what each seed makes of them. Pure: seed in, scenario out.

What a worker can do to itself (`trainer.faults`) it commits at a named place; what comes from outside (a dead
supervisor, a lost machine, a slow chip, a full disk, damaged files) the drill does when a step is reported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ottava.trainer.schedule import rng
from ottava.trainer.supervised import Fault

DRILL = 41  # the random stream of scenarios
FIRST, SECOND = "a", "b"
CHIPS, NODES = 4, 2  # of the first pool; the second has half of them on one node
EVERY = 4  # steps between durable states

INSIDE = ("forward", "reduce", "update", "snapshot", "kept")
RECOVERY = ("join", "load")
SAVING = ("save:payload", "save:fsync:payload", "save:manifest", "save:fsync:manifest", "save:fsync:folder",
          "save:rename", "save:fsync:root")  # fmt: skip
DAMAGES = ("flip", "truncate", "swap", "manifest", "missing")

Kind = Literal["supervisor", "node", "slow", "fill", "free", "wreck", "rollouts"]


@dataclass(frozen=True)
class Act:
    """What is done from outside once step `at_step` was reported. In a wreck, lost: how many of the newest durable
    states are gone; damage: what happens to the newest one that is left."""

    kind: Kind
    at_step: int
    chip: int = 0
    damage: str = ""
    lost: int = 0


@dataclass(frozen=True)
class Scenario:
    """One drill. kinds: the right names of what it will see; lost: the most steps it may lose, None: not bounded;
    restarts: failures that a pool may have; later: faults that begin once a wreck is past; instead: the faults that
    stand for its acts where no small disk can be mounted for them."""

    name: str
    seed: int
    faults: tuple[Fault, ...] = ()
    acts: tuple[Act, ...] = ()
    kinds: frozenset[str] = frozenset()
    lost: int | None = 0
    restarts: int = 0
    later: tuple[Fault, ...] = ()
    instead: tuple[Fault, ...] = ()


def scenario(name: str, seed: int, steps: int) -> Scenario:
    """The scenario of a class and a seed, in a run of `steps` steps."""
    if name in LEARNING:
        return LEARNING[name](name, seed, rng(seed, DRILL, len(CLASSES) + list(LEARNING).index(name), 0), steps)
    draw = rng(seed, DRILL, sorted(CLASSES).index(name), 0)
    return CLASSES[name](name, seed, draw, steps)


def _when(draw: np.random.Generator, steps: int, first: int = 1) -> int:
    return int(draw.integers(first, steps - 2))


def _chip(draw: np.random.Generator, first: int = 0) -> int:
    return int(draw.integers(first, CHIPS))


def _restarts(draw: np.random.Generator) -> int:
    return int(draw.choice([0, 2, 4]))  # 0: the first failure moves the run to the other pool


def _kill(name: str, seed: int, draw: np.random.Generator, steps: int) -> Scenario:
    phase = str(draw.choice([*INSIDE, *RECOVERY]))
    at = 0 if phase in RECOVERY else _when(draw, steps)
    faults = [Fault(pool=FIRST, at_step=at, rank=_chip(draw), phase=phase)]  # type: ignore[arg-type]
    if draw.random() < 1 / 3:  # and again while it recovers, or another one in the same step
        again = str(draw.choice(RECOVERY)) if draw.random() < 0.7 else phase
        faults.append(Fault(at_step=at, rank=_chip(draw) % 2, phase=again))  # type: ignore[arg-type]
    return Scenario(name, seed, tuple(faults), kinds=frozenset({"killed", "node"}), restarts=_restarts(draw))


def _supervisor(name: str, seed: int, draw: np.random.Generator, steps: int) -> Scenario:
    acts = [Act("supervisor", _when(draw, steps)) for _ in range(int(draw.integers(1, 3)))]
    faults = []
    if draw.random() < 1 / 3:  # a worker dies at the same time
        faults.append(Fault(pool=FIRST, at_step=acts[0].at_step, rank=_chip(draw), phase="forward"))
    kinds = frozenset({"killed"}) if faults else frozenset[str]()
    return Scenario(name, seed, tuple(faults), tuple(acts), kinds, restarts=4)


def _node(name: str, seed: int, draw: np.random.Generator, steps: int) -> Scenario:
    act = Act("node", _when(draw, steps), _chip(draw))
    return Scenario(name, seed, acts=(act,), kinds=frozenset({"node", "killed"}), lost=1, restarts=_restarts(draw))


def _hang(name: str, seed: int, draw: np.random.Generator, steps: int) -> Scenario:
    kind = "sigstop" if draw.random() < 0.5 else "sleep"
    phase = str(draw.choice(["forward", "reduce", "snapshot"]))
    fault = Fault(pool=FIRST, at_step=_when(draw, steps), rank=_chip(draw), kind=kind, phase=phase)  # type: ignore[arg-type]
    return Scenario(name, seed, (fault,), kinds=frozenset({"hang"}), restarts=_restarts(draw))


def _nan(name: str, seed: int, draw: np.random.Generator, steps: int) -> Scenario:
    fault = Fault(
        pool=FIRST, at_step=_when(draw, steps), rank=_chip(draw, 1), kind="nan", sticky=bool(draw.random() < 0.3)
    )
    return Scenario(name, seed, (fault,), kinds=frozenset({"nan"}), restarts=4 if fault.sticky else _restarts(draw))


def _spike(name: str, seed: int, draw: np.random.Generator, steps: int) -> Scenario:
    fault = Fault(pool=FIRST, at_step=_when(draw, steps, WINDOW + 1), rank=_chip(draw), kind="spike")
    return Scenario(name, seed, (fault,), kinds=frozenset({"spike"}), restarts=_restarts(draw))


def _corruption(name: str, seed: int, draw: np.random.Generator, steps: int) -> Scenario:
    bits = int(draw.choice([1, 1, 2, 8, 64]))
    if draw.random() < 1 / 3:  # a chip that computes wrong gradients from some step on
        fault = Fault(
            pool=FIRST, at_step=_when(draw, steps // 3), rank=_chip(draw), kind="gradient", bits=bits, sticky=True
        )
        return Scenario(name, seed, (fault,), kinds=frozenset({"gradient"}), lost=None, restarts=4)
    target = str(draw.choice(["weights", "momentum", "first", "second", "bias"]))
    phase = str(draw.choice(["forward", "update", "snapshot"]))
    bits = min(bits, 8) if target == "bias" else bits
    fault = Fault(
        pool=FIRST, at_step=_when(draw, steps), rank=_chip(draw), kind="flip", bits=bits,
        target=target, phase=phase,  # type: ignore[arg-type]
    )  # fmt: skip
    return Scenario(
        name, seed, (fault,), kinds=frozenset({"corrupt", "nan", "spike", "gradient"}), restarts=_restarts(draw)
    )


def _once(name: str, seed: int, draw: np.random.Generator, steps: int) -> Scenario:
    fault = Fault(
        pool=FIRST, at_step=_when(draw, steps), rank=_chip(draw), kind="gradient", bits=int(draw.choice([1, 2, 64]))
    )
    kinds = frozenset({"gradient"})
    return Scenario(name, seed, (fault,), kinds=kinds, lost=None, restarts=4)


def _straggler(name: str, seed: int, draw: np.random.Generator, steps: int) -> Scenario:
    act = Act("slow", _when(draw, steps // 3), _chip(draw))
    return Scenario(name, seed, acts=(act,), kinds=frozenset({"straggler", "hang"}), restarts=4)


def _disk(name: str, seed: int, draw: np.random.Generator, steps: int) -> Scenario:
    full = _when(draw, steps // 2)
    acts, passes = [Act("fill", full)], draw.random() < 0.5
    if passes:
        acts.append(Act("free", min(full + EVERY + 2, steps - 2)))
    phase, fails = str(draw.choice(SAVING)), int(draw.integers(1, 3)) if passes else 1
    fault = Fault(at_step=full, kind="full", phase=phase, sticky=not passes)  # type: ignore[arg-type]
    return Scenario(
        name, seed, acts=tuple(acts), kinds=frozenset({"disk"}), restarts=2, instead=(fault,) * fails
    )  # fmt: skip


def _torn(name: str, seed: int, draw: np.random.Generator, steps: int) -> Scenario:
    at = EVERY * int(draw.integers(1, steps // EVERY))
    fault = Fault(pool=FIRST, at_step=at, rank=0, phase=str(draw.choice(SAVING)))  # type: ignore[arg-type]
    acts = (Act("wreck", at),) if draw.random() < 0.7 else ()  # and all memory is lost
    lost = EVERY + 2 if acts else 0  # saving goes on beside the steps
    return Scenario(name, seed, (fault,), acts, frozenset({"killed"}), lost, restarts=4)


def _shard(name: str, seed: int, draw: np.random.Generator, steps: int) -> Scenario:
    act = Act("wreck", _when(draw, steps, 2 * EVERY + 2), damage=str(draw.choice(DAMAGES)))
    kinds, lost, later = {"killed"}, 2 * EVERY + 2, []
    if draw.random() < 1 / 3:  # and a chip computes wrong gradients from then on, on steps that were audited before
        act = replace(act, lost=int(draw.integers(0, 2)))
        kinds, lost = kinds | {"gradient"}, lost + act.lost * EVERY
        later.append(
            Fault(
                pool=FIRST, at_step=act.at_step - int(draw.integers(EVERY, 2 * EVERY + 3)), rank=_chip(draw),
                kind="gradient", bits=int(draw.choice([1, 2, 64])), sticky=True,
            )
        )  # fmt: skip
    return Scenario(name, seed, acts=(act,), kinds=frozenset(kinds), lost=lost, restarts=4, later=tuple(later))


def _system(name: str, seed: int, draw: np.random.Generator, steps: int) -> Scenario:
    kind = str(draw.choice(["memory", "clock", "sleep"]))
    jump = float(draw.choice([-86400.0, -3600.0, 3600.0])) if kind == "clock" else 3600.0
    phase = "reduce" if kind == "sleep" else str(draw.choice(["forward", "update"]))
    fault = Fault(
        pool=FIRST, at_step=_when(draw, steps), rank=_chip(draw), kind=kind, seconds=jump, phase=phase  # type: ignore[arg-type]
    )  # fmt: skip
    kinds = {"memory": {"memory"}, "clock": set[str](), "sleep": {"hang"}}[kind]
    return Scenario(name, seed, (fault,), kinds=frozenset(kinds), restarts=_restarts(draw))


def _rollout(name: str, seed: int, draw: np.random.Generator, steps: int) -> Scenario:
    """A worker dies while it draws; or what was drawn is damaged, and a worker dies that had read it."""
    if draw.random() < 0.4:
        at = UPDATES * int(draw.integers(1, steps // UPDATES - 1))
        fault = Fault(pool=FIRST, at_step=at, rank=_chip(draw), phase="rollout")
        return Scenario(name, seed, (fault,), kinds=frozenset({"killed", "node"}), restarts=_restarts(draw))
    act = Act("rollouts", _when(draw, steps), _chip(draw), damage=str(draw.choice(["flip", "truncate", "missing"])))
    return Scenario(name, seed, acts=(act,), kinds=frozenset({"killed", "rollout"}), lost=UPDATES, restarts=4)


UPDATES = 4  # of a generation's replies, in a drill of reinforcement
SHARE = 0.25  # of the steps that are audited, in a drill
WINDOW = 6  # losses that a spike is judged by, in a drill

Maker = Callable[[str, int, np.random.Generator, int], Scenario]

CLASSES: dict[str, Maker] = {
    "kill": _kill,
    "supervisor": _supervisor,
    "node": _node,
    "hang": _hang,
    "nan": _nan,
    "spike": _spike,
    "corruption": _corruption,
    "straggler": _straggler,
    "disk": _disk,
    "torn": _torn,
    "shard": _shard,
    "system": _system,
    "gradient": _once,
}
"""By name; the last is measured apart: a gradient that is wrong once is found with the audited share's probability."""

LEARNING: dict[str, Maker] = {"rollout": _rollout}
"""Further classes, of runs that learn from their own replies."""

TWELVE, ONCE = tuple(CLASSES)[:-1], tuple(CLASSES)[-1]

OUTSIDE = frozenset({"supervisor", "node", "straggler", "disk", "torn", "shard", "rollout"})
"""The classes whose faults come from outside: the drill has to be where the processes and the files are."""
