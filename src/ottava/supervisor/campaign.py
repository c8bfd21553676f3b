"""Many drills on one recipe: its own label stage makes the data, then every seed is one run of one class of fault."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ottava.artifact import Artifact, held, make_folder, write_json
from ottava.document import suggest
from ottava.errors import DataError, PoolMissing, RecipeError
from ottava.models.chat import Cut, write_tiny
from ottava.recipe import Recipe, Spec
from ottava.supervisor import drill
from ottava.supervisor.drill import Drill
from ottava.supervisor.launch import Where
from ottava.supervisor.local import LocalLauncher
from ottava.supervisor.outcome import Outcome, summary
from ottava.supervisor.scenario import CLASSES, LEARNING, OUTSIDE, TWELVE, scenario
from ottava.trainer import snapshot, worker
from ottava.trainer.spec import Direct, TrainSpec
from ottava.trainer.start import make_trainer
from ottava.trainer.supervised import Supervised

Progress = Callable[[int, int, Outcome | None], object]
"""Called with the runs that are done, of how many, and the last one."""


STAGES = ("train", "reinforce", "distill")
"""The stages whose runs can be drilled; of distillation, its first student's."""


def check(recipe: Recipe, stage: str = "train") -> None:
    """Raise RecipeError where a recipe has nothing to drill."""
    if stage not in STAGES:
        raise RecipeError(f"no stage {stage!r} can be drilled", where="--stage", fix=suggest(stage, STAGES))
    for name in ("label", stage):
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
    stage: str = "train",
) -> dict[str, Any]:
    """All drills of a campaign on a recipe and its label artifact; the summary, which is also kept as drill.json.

    Every seed is one run; it is of the class names[seed % len(names)]. ray: the cluster that starts the workers.
    """
    chat = folder / "chat"
    chat.mkdir(parents=True, exist_ok=True)
    write_tiny(chat, label.json("vocabulary.json"), _cut(recipe.stages[stage]))
    base: dict[str, Any] = {"seed": recipe.seed, "data": str(label.path), "chat": str(chat)}
    outcomes: list[Outcome] = []
    with LocalLauncher() as launcher:
        spec = drill.spec_for(_section(recipe.stages[stage]), steps)
        if stage == "reinforce":
            begun = folder / "begun"
            launcher.call("ottava.supervisor.campaign:begin", {**base, "folder": str(begun)}, logs=folder / "logs")
            base |= {"objective": "grpo", "start_model": str(begun)}
        where = Drill(spec, base, folder, launcher, ray)
        progress(0, len(seeds), None)
        for seed in seeds:
            outcomes.append(drill.rehearse(where, scenario(names[seed % len(names)], seed, spec.steps)))
            progress(len(outcomes), len(seeds), outcomes[-1])
    result = summary(outcomes) | {"rehearsal": True, "launcher": "local" if ray is None else "ray"}
    result |= {"cores": len(os.sched_getaffinity(0)), "steps": spec.steps, "stage": stage}
    write_json(folder / "drill.json", result | {"outcomes": [vars(outcome) for outcome in outcomes]})
    return result


def _section(section: Spec) -> Supervised:
    """What is trained in a stage."""
    training = getattr(section, "training", None)  # distillation's: of each student
    found = section if training is None else training(section.students[0])  # type: ignore[attr-defined]
    assert isinstance(found, Supervised)
    return found


def _cut(section: Spec) -> Cut:
    """How the tokenizer of what is trained in a stage cuts text."""
    students = getattr(section, "students", ())
    return (students[0].tokenizer if students else None) or "words"


BEGUN = TrainSpec(steps=160, grid_from=0.9, direct=Direct(weight=0.0))


def begin(args: Mapping[str, Any]) -> dict[str, Any]:
    """Train a model that solves some problems and not others, so that there is something to learn from its replies.

    args: seed, data, chat, folder (the model's, to be made).
    """
    args, folder = {**args, "spec": BEGUN.model_dump(mode="json")}, Path(args["folder"])
    trainer = make_trainer(args)
    while trainer.state.step < BEGUN.steps:
        trainer.step(lambda total: total, range(BEGUN.virtual_shards))
    shutil.copytree(args["chat"], folder, dirs_exist_ok=True)
    snapshot.save(folder / "begun.state", trainer.state.snapshot())
    return worker.export({**args, "state": str(folder / "begun.state"), "model": str(folder)})


def seeds_of(text: str) -> range:
    """FIRST:END as a range, not empty, of numbers of nine digits at most. Raises DataError."""
    if not re.fullmatch(r"[0-9]{1,9}:[0-9]{1,9}", text) or not (found := range(*map(int, text.split(":")))):
        what = f"{text if len(text) < 80 else text[:77] + '...'!r} is no range of seeds"
        fix = "FIRST:END, where END is greater and has nine digits at most, e.g. --seeds 0:24"
        raise DataError(what, where="--seeds", fix=fix)
    return found


def names_of(text: str, stage: str = "train") -> tuple[str, ...]:
    """The classes that are asked for. Raises RecipeError."""
    further = tuple(LEARNING) if stage == "reinforce" else ()
    if text == "all":
        return (*TWELVE, *further)
    names, known = tuple(text.split(",")), (*CLASSES, *further)
    for name in names:
        if name not in known:
            what = f"no class of fault is called {name!r}" + (f" in {stage}" if name in LEARNING else "")
            raise RecipeError(what, where="--faults", fix=suggest(name, known))
    return names
