"""Votes, error, bound and coverage of the labelling policy: python -m benchmarks.labels --json

For each kind of world (`worlds.KINDS`): votes an item against two votes and a third on disagreement, simulated on the
same worlds; then the true error, the claim, the bound, in how many worlds the bound held; who was found among people
that are no evidence; and how often forecasts held. `--only NAME,...` picks kinds, `--seeds` how many worlds of each,
`--first` the first seed, `--items` their size, `--set people=5` anything else of `worlds.Kind`. `--worlds FILE` keeps a
line of JSON for each world: what is there already is not played again, so that a long table can be made in parts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.common import show
from benchmarks.labels.fusion import fusion
from benchmarks.labels.worlds import KINDS, Kind, Truth, planted, two_plus_one
from ottava.labels.forecast import Progress, forecast
from ottava.labels.policy import MOST, Done, Policy

MOMENT = 500
"""A forecast is noted after every so many votes."""
Record = dict[str, Any]


def play(
    kind: Kind, seed: int, target: float, moments: list[Progress] | None = None, most: float = MOST
) -> tuple[Truth, Done]:
    """One world from the first question to the certificate. moments: gets where the run stood, every MOMENT votes."""
    truth = Truth(kind, seed)
    policy = Policy(truth.world, target, most=most)
    run = policy.run()
    question, due = next(run), MOMENT
    try:
        while True:
            question = run.send(truth.vote(question.item, question.person, question.blind))
            if moments is not None and truth.asked >= due:
                moments.append(policy.progress())
                due += MOMENT
    except StopIteration as end:
        done: Done = end.value
    return truth, done


def record(name: str, kind: Kind, seed: int, target: float, most: float = MOST) -> Record:
    """All that the table needs of one world."""
    moments: list[Progress] = []
    begun = time.process_time()
    truth, done = play(kind, seed, target, moments, most)
    seconds = time.process_time() - begun
    plain, plain_error = two_plus_one(kind, seed)
    right = planted(kind, truth.given)
    everybody = set().union(*right.values())
    return {
        "name": name,
        "seed": seed,
        "items": kind.items,
        "target": target,
        "votes": truth.asked / kind.items,
        "plain": plain,
        "error": truth.error(done.decisions),
        "plain_error": plain_error,
        "upper": done.upper,
        "claim": done.error,
        "reached": bool(done.reached),
        "seconds": seconds,
        "found": sum(one.person in right[one.kind] for one in done.found),
        "planted": len(everybody) - bool(right["copies"]),
        "accused": sum(one.person not in everybody for one in done.found),
        "honest": kind.people - len(everybody),
        "moments": [asdict(moment) for moment in moments],
        "total": done.votes,
    }


def row(name: str, worlds: list[Record]) -> dict[str, Any]:
    """One kind of world. ours and baseline are votes an item; ratio is baseline / ours, low and high over worlds."""

    def all_of(key: str) -> list[float]:
        return [world[key] for world in worlds]

    ratios = [world["plain"] / world["votes"] for world in worlds]
    slacks = [world["upper"] - world["error"] for world in worlds]
    held, moments = forecasts_held(worlds)
    ours, baseline = statistics.mean(all_of("votes")), statistics.mean(all_of("plain"))
    return {
        "name": name,
        "ours": ours,
        "baseline": baseline,
        "ratio": baseline / ours,
        "low": min(ratios),
        "high": max(ratios),
        "error": statistics.mean(all_of("error")),
        "error_2+1": statistics.mean(all_of("plain_error")),
        "no_worse": sum(world["error"] <= world["plain_error"] for world in worlds),
        "slack": statistics.mean(slacks),
        "slack_least": min(slacks),
        "slack_most": max(slacks),
        "slack_within": sum(slack <= 0.02 for slack in slacks),
        "claim_off_most": max(abs(world["claim"] - world["error"]) for world in worlds),
        "covered": sum(slack >= 0 for slack in slacks),
        "certified": sum(world["reached"] for world in worlds),
        "seeds": len(worlds),
        "found": sum(all_of("found")),
        "planted": sum(all_of("planted")),
        "accused": sum(all_of("accused")),
        "honest": sum(all_of("honest")),
        "forecasts_held": held,
        "forecasts": moments,
        "seconds_most": max(all_of("seconds")),
    }


def forecasts_held(worlds: Iterable[Record]) -> tuple[int, int]:
    """(how many forecasts held the votes that it then took, how many there were), from the first fit on."""
    held = count = 0
    for world in worlds:
        for moment in world["moments"]:
            now = Progress(**moment)
            if now.phase != "calibrate":
                low, _, high = forecast(now).votes
                held += low <= world["total"] - now.votes <= high
                count += 1
    return held, count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--only", default=",".join(KINDS), help="kinds of worlds, separated by commas")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--target", type=float, default=0.03)
    parser.add_argument("--most", type=float, default=MOST, help="votes at most, as a multiple of 2+1's")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="of all kinds; several times")
    parser.add_argument("--worlds", type=Path, help="a file of lines that is gone on with")
    parser.add_argument("--fusion", action="store_true", help="only the time to fuse 100,000 votes, beside crowd-kit")
    asked = parser.parse_args()
    if asked.fusion:
        show([fusion()], asked.json)
        return
    names = asked.only.split(",")
    if unknown := set(names) - set(KINDS):
        parser.error(f"no kind named {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    try:
        change = {name: json.loads(value) for name, value in (one.split("=", 1) for one in asked.set)}
        replace(Kind(), **change)
    except (TypeError, ValueError) as error:
        parser.error(f"--set wants NAME=VALUE of {', '.join(vars(Kind()))}: {error}")
    if (change or asked.most != MOST) and asked.worlds:
        parser.error("--worlds keeps kinds and votes as they are: leave --set and --most out")
    kept: dict[tuple[Any, ...], Record] = {}
    if asked.worlds and asked.worlds.exists():
        for line in asked.worlds.read_text().splitlines():
            world = json.loads(line)
            kept[world["name"], world["seed"], world["items"], world["target"]] = world
    table: dict[str, list[Record]] = {name: [] for name in names}
    for seed in range(asked.first, asked.first + asked.seeds):  # all kinds of a seed, so that a part is a table too
        print(f"seed {seed} ...", file=sys.stderr, flush=True)
        for name in names:
            kind = replace(KINDS[name], **{"items": asked.items} | change)
            world = kept.get((name, seed, asked.items, asked.target)) or record(
                name, kind, seed, asked.target, asked.most
            )
            table[name].append(world)
            if asked.worlds and (name, seed, asked.items, asked.target) not in kept:
                with asked.worlds.open("a") as file:
                    file.write(json.dumps(world) + "\n")
    show([row(name, worlds) for name, worlds in table.items()], asked.json)


if __name__ == "__main__":
    main()
