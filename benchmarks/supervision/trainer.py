"""What exactness costs while nothing fails: ratios are how many times the baseline's speed ours has.

tree     the fixed-order sum over workers, both ways of adding it, beside gloo's all_reduce (seconds by the clock)
step     the trainer's step beside the loop that anybody would write: the same model, batches, micro-batches, optimiser
         and router, with gradients accumulated in `.grad` (seconds of CPU, as both sides are one thread)
kept     the same with every step's state kept in mapped memory
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import throughput

SIZES = ((125_000, 40), (1_000_000, 10), (16_000_000, 1))  # floats; repeats in one measurement
FIRST = 400  # of the recipe's 900 steps: both modes train and the weights are not yet on the grid
BLOCK = 4  # steps in one measurement


def rows(quick: bool = False) -> list[dict[str, Any]]:
    """All rows; needs as many idle cores as workers to mean anything."""
    from ottava.supervisor.local import LocalLauncher

    found = []
    with tempfile.TemporaryDirectory() as name, LocalLauncher() as launcher:
        work = {"sizes": SIZES, "pairs": 5 if quick else 25}
        for workers in (2, 4):
            ranks = launcher.call("benchmarks.supervision.trainer:trees", work, workers=workers, logs=Path(name))
            found += ranks[0]["rows"]
        for shards in (2, 8):
            step = {"shards": shards, "folder": name, "pairs": 4 if quick else 20}
            found += launcher.call("benchmarks.supervision.trainer:steps", step, logs=Path(name))[0]["rows"]
    return found


def trees(args: Mapping[str, Any]) -> dict[str, Any]:
    """In every worker: the rows of each size, from this rank's clock."""
    import torch
    import torch.distributed as dist

    from ottava import platforms
    from ottava.trainer.reduce import exchange_
    from ottava.trainer.worker import join

    group = join(platforms.get("cpu"))
    found = []
    for floats, repeats in args["sizes"]:
        value = torch.zeros(floats).fill_(0.0)  # zeros stay zeros, and cost what other numbers cost

        def block(redundant: bool | None, value: torch.Tensor = value, repeats: int = repeats) -> float:
            dist.barrier()
            begun = time.perf_counter()
            for _ in range(repeats):
                if redundant is None:
                    dist.all_reduce(value)
                else:
                    exchange_(value, group.rank, group.world, redundant=redundant)
            return (time.perf_counter() - begun) / repeats

        for redundant, name in ((False, "tree"), (True, "tree, redundant")):
            title = f"{name}, {floats * 4 / 1e6:.2g} MB, {group.world} workers, against all_reduce"
            found.append(throughput(title, lambda r=redundant: block(r), lambda: block(None), args["pairs"]))  # type: ignore[misc]
    return {"rows": found}


class Bare:
    """The loop that anybody would write, with no thought of exactness. Its batches lie ready."""

    def __init__(self, spec: Any, seed: int, data: Any, vocabulary: int):
        import torch

        from ottava.models.build import from_config, initialise
        from ottava.trainer.data import batch
        from ottava.trainer.state import kind_of, router_biases

        self.spec = spec
        self.model = from_config(spec.shape.config(vocabulary)).train()
        initialise(self.model, seed)
        kinds: dict[str, list[torch.nn.Parameter]] = {"muon": [], "adam": [], "embedding": []}
        for name, parameter in self.model.named_parameters():
            kinds[kind_of(name, parameter.dim())].append(parameter)
        its = spec.optimiser
        self.adam = torch.optim.AdamW(
            [{"params": kinds["adam"], "peak": its.adam}, {"params": kinds["embedding"], "peak": its.embedding}],
            betas=(its.beta1, its.beta2), eps=its.eps, weight_decay=0.0,
        )  # fmt: skip
        shapes: dict[tuple[int, int], list[torch.nn.Parameter]] = {}
        for parameter in kinds["muon"]:
            shapes.setdefault((parameter.shape[-2], parameter.shape[-1]), []).append(parameter)
        self.muon = [(shape, group, [torch.zeros_like(p) for p in group]) for shape, group in shapes.items()]
        self.biases = router_biases(self.model)
        self.loads = [torch.zeros_like(bias) for bias in self.biases]
        gates = [module for name, module in self.model.named_modules() if name.endswith("mlp.gate")]
        for gate, load in zip(gates, self.loads, strict=True):
            gate.register_forward_hook(_count_into(load))
        self.batches = {
            step: [batch(data, spec, seed, step, shard) for shard in range(spec.virtual_shards)]
            for step in range(FIRST, FIRST + BLOCK)
        }

    def step(self, number: int) -> None:
        """One step on the global batch of step `number`."""
        import torch

        from ottava.trainer import optimiser, schedule

        rate, its = schedule.rate(self.spec, number), self.spec.optimiser
        for load in self.loads:
            load.zero_()
        self.model.zero_grad()
        for work in self.batches[number]:
            loss = self.loss(work.thinking) / work.thinking_count
            if work.direct is not None:
                loss = loss + self.spec.direct.weight * self.loss(work.direct) / work.direct_count
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), its.clip)
        for group in self.adam.param_groups:
            group["lr"] = group["peak"] * rate
        self.adam.step()
        with torch.no_grad():
            for shape, parameters, moments in self.muon:
                self.orthogonal_step(shape, parameters, moments, its.muon * rate)
            for bias, load in zip(self.biases, self.loads, strict=True):
                optimiser.router_step_(bias, load, its.router_bias)

    def orthogonal_step(self, shape: tuple[int, int], parameters: list[Any], moments: list[Any], size: float) -> None:
        """Muon on the parameters whose matrices are of one shape, orthogonalised together as ours are."""
        import torch

        from ottava.trainer import optimiser

        its = self.spec.optimiser
        for parameter, moment in zip(parameters, moments, strict=True):
            moment.lerp_(parameter.grad, 1 - its.muon_momentum)
        nesterov = [
            p.grad.lerp(m, its.muon_momentum).reshape(-1, *shape) for p, m in zip(parameters, moments, strict=True)
        ]
        found = optimiser.orthogonalise(torch.cat(nesterov)).split([len(part) for part in nesterov])
        for parameter, direction in zip(parameters, found, strict=True):
            parameter.mul_(1 - size * its.muon_decay)
            parameter.add_(direction.view_as(parameter), alpha=-size * math.sqrt(max(1.0, shape[0] / shape[1])))

    def loss(self, examples: Any) -> Any:
        """Sum of cross-entropies over the reply's tokens."""
        import torch

        from ottava.trainer.data import IGNORE

        logits = self.model(input_ids=examples.tokens[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), examples.targets.flatten(), ignore_index=IGNORE, reduction="sum"
        )


def _count_into(load: Any) -> Callable[..., None]:
    def hook(_module: Any, _inputs: Any, output: Any) -> None:
        load.add_(output[2].flatten().bincount(minlength=len(load)))

    return hook


def steps(args: Mapping[str, Any]) -> dict[str, Any]:
    """In a worker: the trainer's step, kept and not, beside the bare loop's."""
    import torch

    from ottava import platforms
    from ottava.trainer import snapshot
    from ottava.trainer.probe import VOCABULARY, _stand_in
    from ottava.trainer.sft import fresh_trainer
    from ottava.trainer.spec import TrainSpec
    from ottava.trainer.worker import join

    join(platforms.get("cpu"))
    spec = TrainSpec(virtual_shards=args["shards"])
    trainer, bare = fresh_trainer(spec, 0, _stand_in(), VOCABULARY), Bare(spec, 0, _stand_in(), VOCABULARY)
    writer = snapshot.Writer(Path(args["folder"]) / "b.snap", trainer.state.arena.numel() * 4)

    def ours(keep: bool) -> float:
        trainer.state.step = FIRST
        begun = time.process_time()
        for _ in range(BLOCK):
            trainer.step(lambda total: total, range(spec.virtual_shards))
            if keep:
                writer.write(trainer.state.snapshot())
        return (time.process_time() - begun) / BLOCK

    def theirs() -> float:
        # AdamW counts its own steps; ours follow the run's: put both where the block begins
        for state in bare.adam.state.values():
            state["step"].fill_(FIRST)
        begun = time.process_time()
        for number in range(FIRST, FIRST + BLOCK):
            bare.step(number)
        return (time.process_time() - begun) / BLOCK

    for parameter in bare.adam.param_groups[0]["params"] + bare.adam.param_groups[1]["params"]:
        zero = torch.zeros_like(parameter)
        bare.adam.state[parameter] = {"step": torch.tensor(0.0), "exp_avg": zero, "exp_avg_sq": zero.clone()}
    ours(False), theirs()
    trained = dict(bare.model.named_parameters())
    for slot in trainer.state.slots:  # a baseline that did less work would train otherwise
        torch.testing.assert_close(slot.view(trainer.state.weights), trained[slot.name].detach(), rtol=1e-3, atol=1e-4)
    title = f"{spec.virtual_shards} shards on 1 worker, against a bare loop"
    return {
        "rows": [
            throughput(f"step, {title}", lambda: ours(False), theirs, args["pairs"]),
            throughput(f"kept step, {title}", lambda: ours(True), theirs, args["pairs"]),
        ]
    }
