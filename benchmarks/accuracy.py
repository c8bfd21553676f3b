"""The campaign behind the accuracies: fresh seeds on each instruction set, with the drift between them.

    python -m benchmarks.accuracy --seeds 10

For every seed: labels made anew, the demo's model trained alone and whole on each pool of fleets/laptop.yaml, evaluated
there on the held-out problems; and from the state at the demo's fault, the drift against staying beside its
envelope. Training is a plain loop in one process, two of them at a time: neither the number of workers nor a
supervisor changes a bit. Ours is thinking, baseline is direct answers.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.common import options, show
from ottava import platforms, runner, stages
from ottava.models.chat import write_tiny
from ottava.recipe import Pool, Recipe, load_recipe
from ottava.supervisor.drift import measure
from ottava.supervisor.local import LocalLauncher
from ottava.trainer import snapshot
from ottava.trainer.start import make_trainer

ROOT = Path(__file__).parent.parent
ALONE = ["label.cold_start=200", "train.steps=900", "train.fault.at_step=560"]  # as without reinforcement after it
FIRST_SEED = 1000  # none of these was used while the recipe was made


def trained(args: Mapping[str, Any]) -> dict[str, Any]:
    """Train to the end, keeping the state after `at` steps and the last one. args: as `make_trainer`, at, folder."""
    platforms.asked(args).open()
    trainer, folder = make_trainer(args), Path(args["folder"])
    while trainer.state.step < trainer.spec.steps:
        if trainer.state.step == args["at"]:
            snapshot.save(folder / "at", trainer.state.snapshot())
        trainer.step(lambda total: total, range(trainer.spec.virtual_shards))
    snapshot.save(folder / "end", trainer.state.snapshot())
    return {"step": trainer.state.step}


def train(launcher: LocalLauncher, base: dict[str, Any], pool: Pool, folder: Path, at: int) -> dict[str, Any]:
    """Train whole on one pool, keep the state at step `at`, export and evaluate."""
    model = folder / "model"
    shutil.copytree(base["chat"], model)
    args = {**base, "platform": pool.platform, "at": at, "folder": str(folder)}
    launcher.call("benchmarks.accuracy:trained", args, pool=pool, logs=folder)
    export = {**base, "state": str(folder / "end"), "model": str(model), "latent": str(folder / "latent.safetensors")}
    launcher.call("ottava.trainer.worker:export", export, pool=pool, logs=folder)
    evaluate = {"model": str(model), "data": base["data"], "task": "chains"}
    return launcher.call("ottava.engine.evaluate:evaluate_folder", evaluate, pool=pool, logs=folder)[0]


def one_seed(launcher: LocalLauncher, recipe: Recipe, folder: Path) -> list[dict[str, Any]]:
    """All rows of one seed."""
    label = runner.run(recipe, folder / "run", contextlib.nullcontext, runner.Quiet(), only="label")["label"]
    spec = recipe.stages["train"].model_dump(mode="json")
    base = {"spec": spec, "seed": recipe.seed, "data": str(label.path), "chat": str(folder / "chat")}
    write_tiny(folder / "chat", label.json("vocabulary.json"))
    rows = []
    for pool in recipe.fleet.pools:
        (folder / pool.name).mkdir()
        found = train(launcher, base, pool, folder / pool.name, spec["fault"]["at_step"])
        thinking, direct, one_step = (found[mode] for mode in ("thinking", "direct", "direct_one_step"))
        rows.append(
            {
                "name": f"seed {recipe.seed} on {pool.name}",
                "ours": thinking["value"],
                "baseline": direct["value"],
                "ratio": thinking["value"] / max(direct["value"], 1 / direct["n"]),
                "low": thinking["low"],
                "high": thinking["high"],
                "n": thinking["n"],
                "one_step": one_step["value"],
                "one_step_low": one_step["low"],
                "one_step_n": one_step["n"],
            }
        )
    old, new = recipe.fleet.pools[:2]
    start, its = folder / old.name / "at", recipe.stages["train"].drift  # type: ignore[attr-defined]
    moved = measure(launcher, base, old, new, start, its, folder / "drift")
    for row in rows:
        row |= {"drift": moved["drift"], "envelope": moved["envelope"], "replicas": moved["replicas"]}
    print(f"seed {recipe.seed}:", *(f"{r['ours']:.3f}/{r['baseline']:.3f}/{r['one_step']:.3f}" for r in rows),
          f"drift {moved['drift']:.3g} of {moved['envelope']:.3g}", file=sys.stderr, flush=True)  # fmt: skip
    return rows


def main() -> None:
    args = options(__doc__ or "", seeds=10, first=FIRST_SEED)
    seeds = range(args.first, args.first + args.seeds)
    with tempfile.TemporaryDirectory() as name, LocalLauncher() as launcher, ThreadPoolExecutor(2) as threads:

        def work(seed: int) -> list[dict[str, Any]]:
            recipe = load_recipe(ROOT / "recipes/tiny.yaml", stages.specs(), [f"seed={seed}", *ALONE])
            return one_seed(launcher, recipe, Path(name) / str(seed))

        rows = [row for found in threads.map(work, seeds) for row in found]
    reached = {
        "thinking_at_least_80": all(row["ours"] >= 0.8 for row in rows),
        "forty_points_above_direct": all(row["ours"] - row["baseline"] >= 0.4 for row in rows),
        "lowest_one_step": min(row["one_step"] for row in rows),
        "drift_inside": sum(row["drift"] <= row["envelope"] for row in rows) // 2,
        "seeds": args.seeds,
    }
    show(rows, args.json, reached=reached)


if __name__ == "__main__":
    main()
