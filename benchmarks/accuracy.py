"""The campaign behind the accuracies: fresh seeds on each instruction set, with the drift between them.

    python -m benchmarks.accuracy --seeds 10

For every seed: labels made anew, the demo's model trained whole on each pool of fleets/laptop.yaml, evaluated
there on the held-out problems; and from the state at the demo's fault, the drift against staying beside its
envelope. Training runs as one worker a run, two runs at a time: the number of workers changes no bit.
Ours is thinking, baseline is direct answers.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.common import options, show
from ottava import runner, stages
from ottava.models.chat import write_tiny
from ottava.recipe import Pool, Recipe, load_recipe
from ottava.supervisor.drift import measure
from ottava.supervisor.local import LocalLauncher

ROOT = Path(__file__).parent.parent
FIRST_SEED = 1000  # none of these was used while the recipe was made


class Quiet:
    """A reporter that says nothing."""

    def start(self, *args: Any) -> None: ...
    def progress(self, *args: Any) -> None: ...
    def done(self, *args: Any) -> None: ...
    def failed(self, *args: Any) -> None: ...


def train(launcher: LocalLauncher, base: dict[str, Any], pool: Pool, folder: Path, at: int) -> dict[str, Any]:
    """Train whole on one pool, keep the state at step `at`, export and evaluate."""
    steps = base["spec"]["steps"]
    model = folder / "model"
    shutil.copytree(base["chat"], model)
    args = {
        **base, "phase": "main", "pool": pool.name, "attempt": 0, "folder": str(folder), "start": str(folder),
        "until": steps, "keep": {at: str(folder / "at"), steps: str(folder / "end")}, "journal": str(folder / "j"),
        "fault": None,
    }  # fmt: skip
    launcher.call("ottava.trainer.worker:run", args, pool=pool, logs=folder)
    export = {**base, "state": str(folder / "end"), "model": str(model), "latent": str(folder / "latent.safetensors")}
    launcher.call("ottava.trainer.worker:export", export, pool=pool, logs=folder)
    evaluate = {"model": str(model), "data": base["data"], "task": "chains"}
    return launcher.call("ottava.engine.evaluate:evaluate_folder", evaluate, pool=pool, logs=folder)[0]


def one_seed(launcher: LocalLauncher, recipe: Recipe, folder: Path) -> list[dict[str, Any]]:
    """All rows of one seed."""
    label = runner.run(recipe, folder / "run", contextlib.nullcontext, Quiet(), only="label")["label"]
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
            recipe = load_recipe(ROOT / "recipes/tiny.yaml", stages.specs(), [f"seed={seed}"])
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
