"""Many drills on one recipe: its own label stage makes the data, then every seed is one run of one class of fault."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ottava.artifact import Artifact, held, make_folder, write_json
from ottava.document import suggest
from ottava.errors import DataError, PoolMissing, RecipeError
from ottava.models.chat import write_tiny
from ottava.recipe import Recipe
from ottava.supervisor import drill
from ottava.supervisor.drill import Drill
from ottava.supervisor.launch import Where
from ottava.supervisor.local import LocalLauncher
from ottava.supervisor.outcome import Outcome, summary
from ottava.supervisor.scenario import CLASSES, OUTSIDE, TWELVE, scenario
from ottava.trainer.spec import TrainSpec

Progress = Callable[[int, int, Outcome | None], object]
"""Called with the runs that are done, of how many, and the last one."""


def check(recipe: Recipe) -> None:
    """Raise RecipeError where a recipe has nothing to drill."""
    for name in ("label", "train"):
        if name not in recipe.stages:
            what = f"a drill needs a recipe with a {name} stage"
            raise RecipeError(what, where=recipe.path, fix="name a recipe that trains, such as recipes/tiny.yaml")


def fits(where: Where, names: Sequence[str]) -> None:
    """Raise PoolMissing where a Ray cluster is not laid out as the drill's pools are, RecipeError where faults are
    to come from outside and its nodes are other machines."""
    if where.address is None:
        return
    for pool in drill.POOLS:
        each = [pool.workers // pool.nodes] * pool.nodes
        if sorted(where.chips[pool.name].values()) != each:
            raise PoolMissing(
                f"a drill needs pool {pool.name!r} on {pool.nodes} node{'s' * (pool.nodes > 1)} of {each[0]}",
                where="; ".join(f"{node} has {count}" for node, count in where.chips[pool.name].items()),
                fix="`--ray local` starts such a cluster; for another one see docs/ray.md",
            )
    beyond = [name for name in names if name in OUTSIDE]
    if where.away and beyond:
        raise RecipeError(
            f"faults that come from outside cannot be rehearsed on other machines: {', '.join(beyond)}",
            where=f"not this machine: {', '.join(where.away)}",
            fix=f"--faults {','.join(n for n in names if n not in OUTSIDE) or 'kill'}; all of them with --ray local",
        )


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a campaign's folder, made if need be, against a second one. Raises Busy."""
    with held(make_folder(folder), "another drill is at work in this folder", "wait for it or choose another --out"):
        yield


def run(
    recipe: Recipe,
    label: Artifact,
    steps: int,
    seeds: range,
    names: Sequence[str],
    folder: Path,
    progress: Progress,
    ray: str | None = None,
) -> dict[str, Any]:
    """All drills of a campaign on a recipe and its label artifact; the summary, which is also kept as drill.json.

    Every seed is one run; it is of the class names[seed % len(names)]. ray: the cluster that starts the workers.
    """
    train = recipe.stages["train"]
    assert isinstance(train, TrainSpec)
    spec, chat = drill.spec_for(train, steps), folder / "chat"
    chat.mkdir(parents=True, exist_ok=True)
    write_tiny(chat, label.json("vocabulary.json"))
    base = {"seed": recipe.seed, "data": str(label.path), "chat": str(chat)}
    outcomes: list[Outcome] = []
    with LocalLauncher() as launcher:
        where = Drill(spec, base, folder, launcher, ray)
        progress(0, len(seeds), None)
        for seed in seeds:
            outcomes.append(drill.rehearse(where, scenario(names[seed % len(names)], seed, spec.steps)))
            progress(len(outcomes), len(seeds), outcomes[-1])
    result = summary(outcomes) | {"rehearsal": True, "launcher": "local" if ray is None else "ray"}
    result |= {"cores": len(os.sched_getaffinity(0)), "steps": spec.steps}
    write_json(folder / "drill.json", result | {"outcomes": [vars(outcome) for outcome in outcomes]})
    return result


def seeds_of(text: str) -> range:
    """FIRST:END as a range, not empty, of numbers of nine digits at most. Raises DataError."""
    if not re.fullmatch(r"[0-9]{1,9}:[0-9]{1,9}", text) or not (found := range(*map(int, text.split(":")))):
        what = f"{text if len(text) < 80 else text[:77] + '...'!r} is no range of seeds"
        fix = "FIRST:END, where END is greater and has nine digits at most, e.g. --seeds 0:24"
        raise DataError(what, where="--seeds", fix=fix)
    return found


def names_of(text: str) -> tuple[str, ...]:
    """The classes that are asked for. Raises RecipeError."""
    if text == "all":
        return TWELVE
    names = tuple(text.split(","))
    for name in names:
        if name not in CLASSES:
            raise RecipeError(f"no class of fault is called {name!r}", where="--faults", fix=suggest(name, CLASSES))
    return names
