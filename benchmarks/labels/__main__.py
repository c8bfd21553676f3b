"""Votes, error, bound and coverage of the labelling policy: python -m benchmarks.labels --json

For each kind of world (`worlds.KINDS`): votes an item against two votes and a third on disagreement, simulated on the
same worlds; then the true error, the claim, the bound, and in how many worlds the bound held. `--only NAME,...` picks
kinds, `--seeds` how many worlds of each, `--first` the first seed, `--items` their size.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import replace
from typing import Any

from benchmarks.common import show
from benchmarks.labels.worlds import KINDS, Kind, Truth, two_plus_one
from ottava.labels.policy import Done, Policy


def play(kind: Kind, seed: int, target: float) -> tuple[Truth, Done]:
    """One world from the first question to the certificate."""
    truth = Truth(kind, seed)
    run = Policy(truth.world, target).run()
    question = next(run)
    try:
        while True:
            question = run.send(truth.vote(question.item, question.person, question.blind))
    except StopIteration as end:
        done: Done = end.value
    return truth, done


def row(name: str, kind: Kind, seeds: range, target: float) -> dict[str, Any]:
    """One kind of world. ours and baseline are votes an item; ratio is baseline / ours, low and high over seeds."""
    votes, base, ratios, errors, base_errors, slacks, claims, seconds = ([] for _ in range(8))
    covered = reached = 0
    for seed in seeds:
        begun = time.perf_counter()
        truth, done = play(kind, seed, target)
        seconds.append(time.perf_counter() - begun)
        plain, plain_error = two_plus_one(kind, seed)
        error = truth.error(done.decisions)
        votes.append(truth.asked / kind.items)
        base.append(plain)
        ratios.append(plain / votes[-1])
        errors.append(error)
        base_errors.append(plain_error)
        slacks.append(done.upper - error)
        claims.append(abs(done.error - error))
        covered += bool(done.upper >= error)
        reached += bool(done.reached)
    return {
        "name": name,
        "ours": statistics.mean(votes),
        "baseline": statistics.mean(base),
        "ratio": statistics.mean(base) / statistics.mean(votes),
        "low": min(ratios),
        "high": max(ratios),
        "error": statistics.mean(errors),
        "error_2+1": statistics.mean(base_errors),
        "no_worse": sum(bool(e <= b) for e, b in zip(errors, base_errors, strict=True)),
        "slack": statistics.mean(slacks),
        "slack_most": max(slacks),
        "claim_off_most": max(claims),
        "covered": covered,
        "certified": reached,
        "seeds": len(seeds),
        "seconds_most": max(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--only", default=",".join(KINDS), help="kinds of worlds, separated by commas")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--target", type=float, default=0.03)
    asked = parser.parse_args()
    if unknown := set(asked.only.split(",")) - set(KINDS):
        parser.error(f"no kind named {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    results = []
    for name in asked.only.split(","):
        print(f"{name} ...", file=sys.stderr, flush=True)
        kind = replace(KINDS[name], items=asked.items)
        results.append(row(name, kind, range(asked.first, asked.first + asked.seeds), asked.target))
    show(results, asked.json)


if __name__ == "__main__":
    main()
