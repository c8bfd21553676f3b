"""The schedule by OR-Tools: columns (`planner.search`) where there are few enough, else intervals (`planner.model`).

It runs in a process of its own, which gets an instance on standard input and answers on standard output: ortools
and highspy (which SciPy carries) share symbols and must not meet in one process, and a solver that takes all memory
must not take the command with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ottava.errors import OttavaError, PlatformError
from ottava.planner.instance import Chosen, Instance, of

GRACE_S = 120.0
RELAXED = 10**7
"""What relaxing one constraint counts against what it costs by `scale`: the fewest first, then the cheapest."""


@dataclass(frozen=True)
class Slack:
    """What may be relaxed, by name, each with what one unit of it costs (dollars)."""

    rules: Mapping[str, int]
    deadlines: Mapping[str, int]
    pools: Mapping[int, int]
    budget: int | None = None
    tasks: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Answer:
    """status: optimal, feasible, infeasible or unknown; schedule: one entry a task (empty where there is none); bound:
    no schedule costs less; relaxed: constraint -> by how much (rules 1, deadlines slots, pools chips, budget USD)."""

    status: str
    schedule: list[Chosen | None]
    objective: float | None
    bound: float | None
    relaxed: dict[str, int]
    seconds: float


def solve(
    instance: Instance,
    *,
    seconds: float = 30.0,
    workers: int = 0,
    hint: Sequence[Chosen | None] | None = None,
    slack: Slack | None = None,
    gap: float = 1e-4,
    seed: int = 0,
) -> Answer:
    """Solve an instance in a child process, in `seconds` with its start. workers: threads, 0: one a core, at most 8.
    hint: a schedule to begin from; it may leave out what it must not.

    slack: constraints that may be relaxed; the answer then has the fewest relaxations, and among these the cheapest.
    Raises PlatformError where ortools is not installed.
    """
    asked = {
        "instance": instance.json(),
        "seconds": seconds,
        "sent": time.time(),
        "workers": workers or min(8, os.cpu_count() or 1),
        "hint": None if hint is None else [None if c is None else [c.option, c.start] for c in hint],
        "slack": None if slack is None else _slack_json(slack),
        "gap": gap,
        "seed": seed,
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", "ottava.planner.solver"],
            input=json.dumps(asked), capture_output=True, text=True, timeout=seconds + GRACE_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise PlatformError("the solver did not end in time", fix="give it more time, or plan fewer jobs") from None
    if done.returncode == MISSING:
        raise PlatformError("OR-Tools is not installed", fix="pip install 'ottava[plan]'")
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit {done.returncode}"]
        raise OttavaError(f"the solver ended without an answer: {last[0]}", fix="plan fewer jobs, or report this")
    told = json.loads(done.stdout)
    schedule = [None if one is None else Chosen(*one) for one in told["schedule"]]
    return Answer(told["status"], schedule, told["objective"], told["bound"], told["relaxed"], told["seconds"])


def _slack_json(slack: Slack) -> dict[str, Any]:
    return {
        "rules": dict(slack.rules), "deadlines": dict(slack.deadlines), "budget": slack.budget,
        "pools": {str(pool): cost for pool, cost in slack.pools.items()}, "tasks": dict(slack.tasks or {}),
    }  # fmt: skip


MISSING = 64


def _main() -> int:
    """The child: one question on standard input, one answer on standard output."""
    try:
        import ortools.sat.python.cp_model  # noqa: F401
    except ImportError:
        return MISSING
    from ottava.planner.model import answer

    asked = json.load(sys.stdin)
    asked["seconds"] = max(1.0, asked["seconds"] - max(0.0, time.time() - asked.pop("sent")))  # what the start took
    if "highspy" in sys.modules:
        raise RuntimeError("highspy and ortools must not meet in one process")
    json.dump(answer(of(asked["instance"]), asked), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(_main())
