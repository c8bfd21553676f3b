"""The label stage by its audit and by the policy: wrong traces delivered, bounds, judgements, over seeds.

`python -m benchmarks.labels.traces --json` (--seeds 12).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.common import options, show
from ottava import tasks
from ottava.stages import label
from ottava.tasks.base import problem_of, read_lines


def run(policy: str, seed: int) -> dict[str, Any]:
    """One stage of 150 traces: how many were delivered, how many of them are wrong, the bound, the judgements."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        ctx: Any = SimpleNamespace(
            seed=seed,
            out=out,
            progress=lambda fraction, message="": None,
            commit=lambda summary, verdict=None: SimpleNamespace(summary=summary),
        )
        spec = label.Spec(cold_start=150, answers=600, test_per_length=20, test_one_step=20, policy=policy)
        summary = label.run(spec, {}, ctx).summary
        rows = read_lines(out / "cold_start.jsonl")
    task = tasks.traced("chains")
    wrong = sum(bool(task.check_trace(problem_of(row), row["trace"])) for row in rows)
    judged = summary.get("votes", summary["audited"])
    return {"delivered": len(rows), "wrong": wrong, "bound": summary["error_upper_95"], "judgements": judged}


def main() -> None:
    asked = options(__doc__ or "", seeds=12)
    found = {policy: [run(policy, seed) for seed in range(1, asked.seeds + 1)] for policy in ("replay", "audit")}
    rows = []
    for what in ("delivered", "wrong", "bound", "judgements"):
        ours, base = ([one[what] for one in found[policy]] for policy in ("replay", "audit"))
        ratio = sum(ours) / sum(base) if sum(base) else None
        means = {"ours": sum(ours) / len(ours), "baseline": sum(base) / len(base)}
        rows.append(
            {"name": f"{what}: the policy, the audit", **means, "ratio": ratio, "low": min(ours), "high": max(ours)}
        )
    show(rows, asked.json)


if __name__ == "__main__":
    main()
