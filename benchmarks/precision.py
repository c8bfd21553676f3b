"""float32, bf16 and fp8 on the same data and steps, in turn: python -m benchmarks.precision [--device cuda] [--small]

Each measurement is a process of its own, so that its peak of memory is its own. Tokens a second: all that went through
the model, over the seconds of whole steps (forward, backward, fixed sum, clip, optimisers), without keeping states;
the first steps are not counted. Loss: of the same steps on the same batches, from the same first weights; apart: the
mean of its distance from float32's over the last half. Ratios of speed are medians over rounds, low and high their
range; memory on cores is the process's, above what it had before the model was made.

Without --small the model and the batches are those of recipes/gpu.yaml. On cores fp8 is emulated (codes are turned into
numbers and multiplied in BF16) and few cores have fast BF16 products: there, speeds say nothing of a GPU.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.common import show

ROOT = Path(__file__).parent.parent
PRECISIONS = ("float32", "bf16", "fp8")
WARM = 3  # steps that are not timed: every shape is slow the first time
SMALL: dict[str, Any] = {"batch": 16, "direct": {"begin": 0.3, "batch": 8}}
WORDS = {
    "cpu": "on cores: fp8 is emulated, and its speed tells nothing of a GPU",
    "emulated": "no block-scaled FP8 product of this device passed its trial: fp8 is emulated, its speed no measure",
}


def spec_of(small: bool, steps: int, precision: str) -> dict[str, Any]:
    """The train section that is measured."""
    from ottava import platforms, stages
    from ottava.recipe import load_recipe
    from ottava.trainer.spec import TrainSpec

    if small:
        said = SMALL
    else:
        recipe = load_recipe(ROOT / "recipes/gpu.yaml", stages.specs(), (), platforms.names())
        said = {**recipe.stages["train"].model_dump(), "grid_from": 1.0}
    own = {"precision": precision, "steps": steps, "grid_from": 0.0 if precision == "fp8" else 1.0}
    return TrainSpec.model_validate({**said, **own}).model_dump(mode="json")


def measure(args: Mapping[str, Any]) -> dict[str, Any]:
    """In a process of its own: so many steps, as args say (`start.make_trainer`, and device); what was seen."""
    from ottava import platforms
    from ottava.trainer.sft import Sft
    from ottava.trainer.start import make_trainer

    platform = platforms.get(args["device"])
    platform.open()
    before = platform.peak_memory()
    trainer = make_trainer({**args, "platform": args["device"]})
    assert isinstance(trainer.objective, Sft)
    shards = range(trainer.spec.virtual_shards)
    losses, seconds, tokens = [], 0.0, 0
    for step in range(trainer.spec.steps):
        begun = time.perf_counter()
        losses.append(trainer.step(lambda total: total, shards).told["loss"])
        platform.synchronize()
        if step >= WARM:
            draws = trainer.objective._drawn(step)
            parts = [draws.thinking] if draws.direct is None else [draws.thinking, draws.direct]
            tokens += sum(part.rows.numel() * part.pool.targets.shape[1] for part in parts)
            seconds += time.perf_counter() - begun
    return {
        "tokens_per_s": tokens / seconds,
        "peak_mb": round((platform.peak_memory() - before) / 1e6, 1),
        "losses": losses,
        "digest": trainer.state.digest(),
        "device": platform.describe().get("chip", args["device"]),
        "products": trainer.products,
        "parameters": sum(slot.size for slot in trainer.state.slots),
    }


def dataset(folder: Path) -> dict[str, str]:
    """Chains with gold traces, and the tokenizer: the same for all."""
    import numpy as np

    from ottava.models.chat import write_tiny
    from ottava.tasks import chains
    from ottava.tasks.base import row, write_lines

    rng = np.random.default_rng(1)
    cold = [p for n in range(2, 7) for p in chains.sample(rng, n, 200, "train")]
    answers = [p for n in range(1, 7) for p in chains.sample(rng, n, 60, "train")]
    write_lines(folder / "cold_start.jsonl", (row("chains", p, trace=chains.trace(p)) for p in cold))
    write_lines(folder / "answers.jsonl", (row("chains", p) for p in answers))
    write_tiny(folder / "chat", chains.vocabulary())
    return {"data": str(folder), "chat": str(folder / "chat")}


def rows(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """bf16 against float32, and fp8 against bf16."""
    exact = found["float32"][0]["losses"]
    half = len(exact) // 2
    out = []
    for name, against in (("bf16", "float32"), ("fp8", "bf16")):
        pairs = list(zip(found[name], found[against], strict=True))
        ratios = [ours["tokens_per_s"] / theirs["tokens_per_s"] for ours, theirs in pairs]
        its = found[name][0]
        apart = [abs(a - b) for a, b in zip(its["losses"], exact, strict=True)]
        out.append(
            {
                "name": f"tokens a second, {name} against {against}",
                "ours": statistics.median(ours["tokens_per_s"] for ours, _ in pairs),
                "baseline": statistics.median(theirs["tokens_per_s"] for _, theirs in pairs),
                "ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios),
                "peak_mb": its["peak_mb"], "baseline_peak_mb": found[against][0]["peak_mb"],
                "loss": its["losses"][-1], "float32_loss": exact[-1], "apart": statistics.mean(apart[half:]),
                "most_apart": max(apart), "products": its["products"],
            }
        )  # fmt: skip
    return out


def main() -> None:
    from ottava import platforms

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = [name for name in ("cuda", "npu", "cpu") if platforms.get(name).available()[0]]
    parser.add_argument("--device", choices=here, default=here[0], help="default: the best there is")
    parser.add_argument("--small", action="store_true", help="the tiny model, for cores")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.steps <= WARM:
        parser.error(f"--steps: more than the {WARM} that are not timed")
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in PRECISIONS}
    fresh = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        base = {**dataset(Path(folder)), "seed": 0, "device": args.device}
        for number in range(args.rounds):
            for name in PRECISIONS:
                print(f"round {number + 1}: {name} ...", file=sys.stderr, flush=True)
                asked = {**base, "spec": spec_of(args.small, args.steps, name)}
                with ProcessPoolExecutor(1, fresh) as one:
                    found[name].append(one.submit(measure, asked).result())
    first = found["fp8"][0]
    words = WORDS.get("cpu" if args.device == "cpu" else first["products"], "")
    if words:
        print(words, file=sys.stderr)
    every = max(1, args.steps // 10)
    show(
        rows(found),
        args.json,
        device=first["device"],
        parameters=first["parameters"],
        steps=args.steps,
        curve={name: its[0]["losses"][::every] for name, its in found.items()},
        repeats=None
        if args.rounds == 1
        else {name: len({one["digest"] for one in its}) == 1 for name, its in found.items()},
        note=words,
    )


if __name__ == "__main__":
    main()
