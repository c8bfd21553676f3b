"""What a stage is given: its folders, its pool, and the ways to report and to run work on chips."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ottava import artifact
from ottava.artifact import Artifact
from ottava.journal import Journal
from ottava.recipe import Fleet, Pool, Spec


class Process(Protocol):
    """A process in a pool, started by name."""

    @property
    def pid(self) -> int: ...
    @property
    def log(self) -> Path: ...
    @property
    def node(self) -> str | None:
        """The machine that it is on, where the launcher knows several."""

    def alive(self) -> bool: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...

    def wait(self, timeout: float | None = None) -> int | None:
        """The exit status (negative: the signal), or None while it runs."""

    def result(self) -> dict[str, Any]:
        """What the function returned; raises the OttavaError that it raised."""


class Launcher(Protocol):
    """Starts functions by name in the processes of a pool."""

    @property
    def host(self) -> str:
        """The address under which its processes reach this one."""

    def call(
        self, target: str, args: Mapping[str, Any], *, pool: Pool | None = None, workers: int = 1, logs: Path
    ) -> list[dict[str, Any]]:
        """Run `package.module:function` with `args` in `workers` processes; their results by rank."""

    def spawn(
        self, target: str, args: Mapping[str, Any], *, pool: Pool | None, logs: Path, env: Mapping[str, str] = {}
    ) -> Process:
        """Start one process and return at once."""

    def rendezvous(self, pool: Pool | None, workers: int, chips: Sequence[int] = ()) -> list[dict[str, str]]:
        """The environment of each rank of a group that is about to be spawned on `pool`, in torchrun's variables.

        chips: the pool's that are to be used, by number; a number stays on its machine. None: any.
        """


@dataclass(frozen=True)
class Context:
    """One stage's surroundings. out: becomes the artifact; work: survives kills, for resumption.

    unchanged: raises where what the stage depends on outside the recipe is not what it was when the stage began.
    """

    stage: str
    seed: int
    recipe_name: str
    fleet: Fleet
    pool: Pool
    fallback: tuple[Pool, ...]
    stages: Mapping[str, Spec]
    out: Path
    work: Path
    journal: Journal
    launcher: Launcher
    destination: Path
    meta: Mapping[str, Any] = field(default_factory=dict)
    show: Callable[[float, str], None] = lambda fraction, message: None
    unchanged: Callable[[], None] = lambda: None

    def progress(self, fraction: float, message: str = "") -> None:
        """Say how far the stage is: 0 to 1."""
        self.journal.append("stage.progress", stage=self.stage, fraction=round(fraction, 4), message=message)
        self.show(fraction, message)

    def call(
        self, target: str, args: Mapping[str, Any], *, pool: Pool | None = None, workers: int = 1
    ) -> list[dict[str, Any]]:
        """Run `package.module:function` in `workers` processes of `pool` (default: the stage's own)."""
        return self.launcher.call(target, args, pool=pool or self.pool, workers=workers, logs=self.work)

    def spawn(
        self, target: str, args: Mapping[str, Any], *, pool: Pool | None = None, env: Mapping[str, str] = {}
    ) -> Process:
        """Start one process of `pool` (default: the stage's own) and return at once."""
        return self.launcher.spawn(target, args, pool=pool or self.pool, logs=self.work, env=env)

    def commit(self, summary: Mapping[str, Any], verdict: bool | None = None) -> Artifact:
        """Publish `out` as this stage's artifact. verdict False: the stage worked and its answer is no. Raises
        DataError where what it was judged by was edited meanwhile."""
        self.unchanged()
        return artifact.commit(
            self.out, self.destination, **self.meta, pool=self.pool.name, summary=dict(summary), verdict=verdict
        )
