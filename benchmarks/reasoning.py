"""The campaign behind what is said of reinforcement and students: the main job on fresh seeds and fresh test problems.

    python -m benchmarks.reasoning --seeds 10 --out runs/campaign

Every seed is a whole run of recipes/tiny.yaml up to distillation, through its fault, with other families of problems
held out than while the recipe was made (`chains:salt=campaign`). A run that is there is not done again. Ours is the
accuracy after reinforcement, baseline the one before; students are held against their controls over seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import show
from ottava import platforms, runner, stages
from ottava.recipe import load_recipe
from ottava.supervisor.local import LocalLauncher
from ottava.tasks.statistics import t_interval

ROOT = Path(__file__).parent.parent
FIRST_SEED = 1000  # none of these was used while the recipe was made
TASK = "chains:salt=campaign"


def one_seed(seed: int, folder: Path, sets: Sequence[str]) -> dict[str, Any]:
    """What one run says."""
    asked = [f"seed={seed}", f"label.task={TASK}", *sets]
    recipe = load_recipe(ROOT / "recipes/tiny.yaml", stages.specs(), asked, platforms.names())
    done = runner.run(recipe, folder, LocalLauncher, runner.Quiet(), until="distill")
    learnt, taught = done["reinforce"].summary, done["distill"].summary
    found = learnt["reinforce"]
    print(f"seed {seed}: {found['before']:.3f} -> {found['after']:.3f};",
          *(f"{s['name']} {s['thinking']:.3f}/{s['control']:.3f}" for s in taught["students"]),
          f"steps right {taught['traces']['steps_right_share']}", file=sys.stderr, flush=True)  # fmt: skip
    return {
        "name": f"seed {seed}", "ours": found["after"], "baseline": found["before"],
        "ratio": found["after"] / max(found["before"], 1 / found["n"]), "low": found["low"], "high": found["high"],
        "n": found["n"], "replay_identical": learnt["replay_identical"], "students": taught["students"],
        "traces": taught["traces"],
    }  # fmt: skip


def over_seeds(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds with their t-intervals: the gain, and of each student what it keeps and has over its control."""
    gains = [row["ours"] - row["baseline"] for row in rows]
    students = []
    for index, first in enumerate(rows[0]["students"]):
        its = [row["students"][index] for row in rows]
        over = [one["thinking"] - one["control"] for one in its]
        students.append(
            {
                "name": first["name"], "params": first["params"], "thinking": _mean([one["thinking"] for one in its]),
                "control": _mean([one["control"] for one in its]), "kept": _mean([one["kept"] for one in its]),
                "least_kept": min(one["kept"] for one in its), "over": _mean(over), **_ends("over", over),
            }
        )  # fmt: skip
    return {
        "before": _mean([row["baseline"] for row in rows]), "after": _mean([row["ours"] for row in rows]),
        "least_after": min(row["ours"] for row in rows), "gain": _mean(gains), **_ends("gain", gains),
        "students": students, "seeds": len(rows),
        "steps_right_share": [row["traces"]["steps_right_share"] for row in rows],
        "replays_identical": all(row["replay_identical"] for row in rows),
    }  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _ends(name: str, values: Sequence[float]) -> dict[str, float | None]:
    low, high = t_interval(values) if len(values) > 1 else (None, None)
    return {f"{name}_low": low, f"{name}_high": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=FIRST_SEED)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/campaign")
    parser.add_argument("--set", action="append", default=[], dest="sets", help="as of ottava run, for a quick look")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = [one_seed(seed, args.out / str(seed), args.sets) for seed in range(args.first, args.first + args.seeds)]
    whole = over_seeds(rows)
    (args.out / "campaign.json").write_text(json.dumps({"rows": rows, "over_seeds": whole}, indent=1) + "\n")
    reached = {
        "gain_above_0": (whole["gain_low"] or 0.0) > 0,
        "every_seed_ends_at_95": whole["least_after"] >= 0.95,
        "students_that_keep_98": sum(one["kept"] >= 0.98 for one in whole["students"]),
        "students_above_their_controls": sum((one["over_low"] or 0.0) > 0 for one in whole["students"]),
    }
    show(rows, args.json, over_seeds=whole, reached=reached)


if __name__ == "__main__":
    main()
