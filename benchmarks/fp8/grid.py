"""What training on the grid costs, and what it does to the loss: equal data with and without, several seeds.

    python -m benchmarks.fp8.grid [--quick 1] [--json]

hybrid   the demo's DeepSeek-V3 (recipes/tiny.yaml), by the trainer itself, which projects a copy of the weights
llama    a small dense Llama whose linear layers are GridLinear, by AdamW on the same examples
layer    one GridLinear of 1024 x 1024 beside nn.Linear, also with its projection held

Losses are nats a target token on held-out problems, through the weights as the master holds them for the runs on
the grid, through the latent ones for the baseline. The ratio and its 95% interval come from the pairs of runs of
one seed; `difference` is ours minus baseline, with its interval. Times are CPU seconds of one thread.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import t as student
from torch import Tensor, nn

from benchmarks.common import options, paired, show
from ottava import stages
from ottava.artifact import write_json
from ottava.checkpoint.names import storage_of
from ottava.fp8.grid import GridLinear, held, put_on_grid
from ottava.models.build import from_config, initialise
from ottava.models.chat import Chat, write_tiny
from ottava.recipe import load_recipe
from ottava.tasks import chains
from ottava.tasks.base import row, write_lines
from ottava.trainer import data, schedule
from ottava.trainer.data import IGNORE, Data, Examples
from ottava.trainer.loop import Trainer
from ottava.trainer.sft import fresh_trainer
from ottava.trainer.spec import TrainSpec

ROOT = Path(__file__).parents[2]
SEEDS = (2000, 2001, 2002)
LENGTHS = range(2, 5)


def dataset(folder: Path) -> tuple[Data, Data, int]:
    """Training data, held-out data, and the number of ids of the vocabulary; the same for every run."""
    write_tiny(folder, chains.vocabulary())
    write_json(folder / "vocabulary.json", chains.vocabulary())
    chat, found = Chat.load(folder), []
    for split, traces, answers in (("train", 200, 1000), ("test", 60, 60)):
        rng = np.random.default_rng(1)
        cold = [p for n in LENGTHS for p in chains.sample(rng, n, traces, split)]
        plain = [p for n in (1, *LENGTHS) for p in chains.sample(rng, n, answers, split, fewer=True)]
        write_lines(folder / "cold_start.jsonl", (row("chains", p, trace=chains.trace(p)) for p in cold))
        write_lines(folder / "answers.jsonl", (row("chains", p) for p in plain))
        found.append(data.load(folder, chat))
    return found[0], found[1], chat.tokenizer.get_vocab_size()


def loss_of(model: nn.Module, examples: Examples) -> Tensor:
    """Sum of cross-entropies over the targets."""
    logits = model(input_ids=examples.tokens[:, : examples.targets.shape[1]], use_cache=False).logits
    flat = logits.reshape(-1, logits.shape[-1])
    return F.cross_entropy(flat, examples.targets.reshape(-1), ignore_index=IGNORE, reduction="sum")


@torch.no_grad()
def held_out(model: nn.Module, test: Data) -> float:
    """Nats a target token over the held-out reasoning traces."""
    total = sum(float(loss_of(model, part)) for part in test.thinking.values())
    return total / sum(int((part.targets != IGNORE).sum()) for part in test.thinking.values())


def compared(name: str, ours: Sequence[float], baseline: Sequence[float], **more: Any) -> dict[str, Any]:
    """A row from one pair of losses a seed."""
    pairs = list(zip(ours, baseline, strict=True))
    ratio = interval([math.log(a / b) for a, b in pairs])
    difference, low, high = interval([a - b for a, b in pairs])
    return {
        "name": name, "ours": statistics.mean(ours), "baseline": statistics.mean(baseline),
        **dict(zip(("ratio", "low", "high"), map(math.exp, ratio), strict=True)),
        "difference": difference, "difference_low": low, "difference_high": high, "seeds": len(pairs), **more,
    }  # fmt: skip


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean and its 95% interval by Student's t."""
    centre = statistics.mean(values)
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return centre, centre - half, centre + half


def advance(trainer: Trainer, until: int) -> None:
    """Train to the end of step `until`, all shards in this process."""
    while trainer.state.step < until:
        trainer.step(lambda total: total, range(trainer.spec.virtual_shards))


def hybrid(seed: int, spec: TrainSpec, train: Data, test: Data, vocabulary: int) -> dict[str, float]:
    """Held-out losses: never on the grid; that model rounded; the recipe's last part on the grid; all of it."""

    def trainer(grid_from: float) -> Trainer:
        return fresh_trainer(spec.model_copy(update={"grid_from": grid_from}), seed, train, vocabulary)

    without, late, whole = trainer(1.0), trainer(spec.grid_from), trainer(0.0)
    advance(without, math.ceil(spec.grid_from * spec.steps))
    late.state.arena.copy_(without.state.arena)  # up to here the two runs are the same
    late.state.step = without.state.step
    for each in (without, late, whole):
        advance(each, spec.steps)
        each.refresh()  # all are on the grid now: `without` has ended where its grid would begin
    losses = {
        name: held_out(each.model, test) for name, each in (("rounded", without), ("late", late), ("whole", whole))
    }
    without.forward.copy_(without.state.weights)
    return {**losses, "without": held_out(without.model, test)}


def hybrid_step(spec: TrainSpec, train: Data, vocabulary: int, pairs: int) -> dict[str, Any]:
    """The seconds of four steps on the grid, beside four that are not."""
    sides = [fresh_trainer(spec.model_copy(update={"grid_from": g}), 0, train, vocabulary) for g in (0.0, 1.0)]

    def block(trainer: Trainer) -> float:
        trainer.state.step = spec.steps // 2
        begun = time.process_time()
        advance(trainer, spec.steps // 2 + 4)
        return time.process_time() - begun

    return paired("hybrid: time of a step on the grid", lambda: block(sides[0]), lambda: block(sides[1]), pairs)


class Dense:
    """A Llama of about the hybrid's size under AdamW. on_grid: its linear layers are GridLinear."""

    def __init__(self, seed: int, spec: TrainSpec, train: Data, vocabulary: int, on_grid: bool):
        self.seed, self.spec, self.train = seed, spec, train
        self.model = from_config(
            {
                "model_type": "llama", "vocab_size": vocabulary, "hidden_size": 64, "intermediate_size": 192,
                "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
                "max_position_embeddings": 128, "tie_word_embeddings": False,
            }
        )  # fmt: skip
        initialise(self.model, seed)
        if on_grid:
            assert put_on_grid(self.model, lambda name, _: storage_of(f"{name}.weight", 2) == "fp8")
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)

    def step(self, number: int) -> None:
        work = data.batch(self.train, self.spec, self.seed, number, 0)
        for group in self.optimiser.param_groups:
            group["lr"] = 3e-3 * schedule.rate(self.spec, number)
        loss = loss_of(self.model, work.thinking) / int((work.thinking.targets != IGNORE).sum())
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()

    def timed(self, steps: int) -> float:
        begun = time.process_time()
        for _ in range(steps):
            self.step(self.spec.steps // 2)
        return time.process_time() - begun


def dense(seed: int, spec: TrainSpec, train: Data, test: Data, vocabulary: int, on_grid: bool) -> float:
    """The held-out loss of a Llama trained for the spec's steps."""
    run = Dense(seed, spec, train, vocabulary, on_grid)
    for number in range(spec.steps):
        run.step(number)
    return held_out(run.model, test)


def layers(pairs: int) -> list[dict[str, Any]]:
    """One layer of 1024 x 1024, GridLinear beside nn.Linear: a training pass over 1024 tokens, and one token."""
    plain = nn.Linear(1024, 1024, bias=False)
    on = GridLinear.from_linear(plain)
    many, one = torch.randn(1024, 1024), torch.randn(1, 1024)

    def training(layer: nn.Linear) -> float:
        begun = time.process_time()
        layer(many).sum().backward()
        return time.process_time() - begun

    @torch.no_grad()
    def token(layer: nn.Linear) -> float:
        begun = time.process_time()
        for _ in range(20):
            layer(one)
        return time.process_time() - begun

    found = [
        paired("layer: 1024 tokens, forward and backward", lambda: training(on), lambda: training(plain), pairs),
        paired("layer: one token", lambda: token(on), lambda: token(plain), pairs),
    ]
    with held(on):
        found.append(paired("layer: one token, held", lambda: token(on), lambda: token(plain), pairs))
    return found


def rows(quick: bool) -> list[dict[str, Any]]:
    """All rows, on one thread. quick: runs of 60 steps, which show the cost but say little about the loss."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as name:
            train, test, vocabulary = dataset(Path(name))
        spec = load_recipe(ROOT / "recipes/tiny.yaml", stages.specs(), []).stages["train"]
        assert isinstance(spec, TrainSpec)
        spec = spec.model_copy(update={"steps": 60 if quick else 200, "fault": None})
        return _rows(spec, train, test, vocabulary, pairs=3 if quick else 8)
    finally:
        torch.set_num_threads(threads)


def _rows(spec: TrainSpec, train: Data, test: Data, vocabulary: int, pairs: int) -> list[dict[str, Any]]:
    runs = [hybrid(seed, spec, train, test, vocabulary) for seed in SEEDS]
    without = [run["without"] for run in runs]
    names = {
        "whole": "hybrid: held-out loss, all steps on the grid",
        "late": f"hybrid: held-out loss, on the grid from {spec.grid_from:.0%} of the steps",
        "rounded": "hybrid: held-out loss, rounded after training",
    }
    found = [compared(name, [run[key] for run in runs], without, steps=spec.steps) for key, name in names.items()]
    found.append(hybrid_step(spec, train, vocabulary, pairs))
    ours, baseline = ([dense(s, spec, train, test, vocabulary, on) for s in SEEDS] for on in (True, False))
    found.append(compared("llama: held-out loss, GridLinear in all steps", ours, baseline, steps=spec.steps))
    sides = [Dense(0, spec, train, vocabulary, on) for on in (True, False)]
    found.append(paired("llama: time of a step", lambda: sides[0].timed(8), lambda: sides[1].timed(8), pairs))
    return found + layers(pairs)


def main() -> None:
    args = options(__doc__ or "", quick=0)
    show(rows(bool(args.quick)), args.json)


if __name__ == "__main__":
    main()
