"""What the supervisor starts, one process a device: join, check the class, load, step, keep, report.

Functions here take and return plain data, because they are started by name in another process.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ottava import platforms
from ottava.errors import PlatformError, TrainingFailed
from ottava.journal import Journal
from ottava.models.chat import Chat
from ottava.trainer import data, reduce, snapshot
from ottava.trainer.loop import Report, Trainer, finite
from ottava.trainer.spec import Fault, TrainSpec


@dataclass(frozen=True)
class Group:
    """This worker's place among the workers."""

    rank: int
    world: int

    def reduce(self, value: torch.Tensor) -> torch.Tensor:
        return reduce.exchange_(value, self.rank, self.world) if self.world > 1 else value


def join() -> Group:
    """Pin the numerics and join the process group that the environment names."""
    platforms.get("cpu").pin_numerics()
    group = Group(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    if group.world > 1:
        dist.init_process_group("gloo")
    return group


def make_trainer(args: Mapping[str, Any]) -> Trainer:
    """A trainer from plain data: spec, seed, data and chat folders."""
    spec = TrainSpec.model_validate(args["spec"])
    chat = Chat.load(Path(args["chat"]))
    vocabulary = chat.tokenizer.get_vocab_size()
    return Trainer(spec, int(args["seed"]), data.load(Path(args["data"]), chat), vocabulary)


def numerics_class(trainer: Trainer) -> str:
    """The hash of loss and gradients of a canonical shard: workers with equal hashes compute equal bits.

    Shard 0 of the present step on the initial weights: call before a state is loaded.
    """
    trainer.refresh()
    return hashlib.sha256(trainer.shard(0).numpy().tobytes()).hexdigest()


def run(args: Mapping[str, Any]) -> dict[str, Any]:
    """Train from a state to step `until`, keeping every step. The supervisor's worker.

    args: spec, seed, data, chat; phase, pool, attempt; folder (snapshots, one file a rank); start
    (a folder with snapshots, or a state file, or None); until; keep: {step: path}; journal; fault: one to
    commit, or None.
    Returns {step, digest}. Raises TrainingFailed on a loss that is not finite.
    """
    group = join()
    journal = Journal(args["journal"])
    trainer = make_trainer(args)
    its_class = numerics_class(trainer)
    _same_class(group, its_class)
    _load(trainer, args["start"])
    folder = Path(args["folder"])
    writer = snapshot.Writer(folder / f"rank{group.rank}.snap", trainer.state.arena.numel() * 4)
    where = {"phase": args["phase"], "pool": args["pool"], "attempt": args["attempt"]}
    journal.append(
        "train.join", **where, rank=group.rank, world=group.world, pid=os.getpid(), numerics_class=its_class,
        step=trainer.state.step, digest=trainer.state.digest(),
    )  # fmt: skip
    keep = {int(step): Path(path) for step, path in args["keep"].items()}
    shards = reduce.owned(trainer.spec.virtual_shards, group.rank, group.world)
    begun = time.monotonic()
    while trainer.state.step < args["until"]:
        report = trainer.step(group.reduce, shards)
        if not finite(report):
            raise TrainingFailed(f"the loss of step {report.step} is not finite", where=f"pool {args['pool']}")
        value = writer.write(trainer.state.snapshot())
        if args["fault"] is not None:
            _commit_fault(Fault.model_validate(args["fault"]), report.step, group, journal, args["pool"])
        if group.rank == 0:
            _save(trainer, folder, keep)
            now = time.monotonic()
            journal.append("train.step", **where, **_event(report), digest=value[:16], seconds=round(now - begun, 4))
            begun = now
    if group.world > 1:
        dist.barrier()
        dist.destroy_process_group()
    return {"step": trainer.state.step, "digest": trainer.state.digest()}


def export(args: Mapping[str, Any]) -> dict[str, Any]:
    """Write the model of a state file as a BF16 folder on the grid, and the latent weights beside it.

    args: spec, seed, data, chat, state, model (folder with the tokenizer), latent (file).
    """
    from ottava.checkpoint.safetensors import write
    from ottava.models.published import published, stored

    join()
    trainer = make_trainer(args)
    trainer.state.restore(snapshot.load(Path(args["state"])))
    trainer.refresh()
    trainer.put_on_grid()
    model = Path(args["model"])
    config = trainer.spec.shape.config(int(trainer.model.get_input_embeddings().num_embeddings))  # type: ignore[operator]
    (model / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    write(model / "model.safetensors", ((name, stored(item)) for name, item in published(trainer.model).items()))
    latent = ((slot.name, slot.view(trainer.state.weights).contiguous()) for slot in trainer.state.slots)
    write(Path(args["latent"]), latent)
    return {"parameters": sum(slot.size for slot in trainer.state.slots), "step": trainer.state.step}


def _commit_fault(fault: Fault, step: int, group: Group, journal: Journal, pool: str) -> None:
    """Die or hang, if this is the worker and the step. The step itself is kept, so the fault is at a known place."""
    if step == fault.at_step and group.rank == fault.rank % group.world:
        journal.append("train.injected", pool=pool, kind=fault.kind, rank=group.rank, step=step)
        os.kill(os.getpid(), signal.SIGKILL if fault.kind == "sigkill" else signal.SIGSTOP)


def _save(trainer: Trainer, folder: Path, keep: Mapping[int, Path]) -> None:
    """Durable copies: the steps that were asked for, and regular checkpoints, of which the last three stay."""
    step = trainer.state.step
    if step in keep:
        snapshot.save(keep[step], trainer.state.snapshot())
    if step % trainer.spec.checkpoint_every == 0:
        snapshot.save(folder / f"checkpoint-{step:07d}.state", trainer.state.snapshot())
        for old in sorted(folder.glob("checkpoint-*.state"))[:-3]:
            old.unlink()


def _event(report: Report) -> dict[str, Any]:
    direct = {} if report.direct is None else {"direct_loss": round(report.direct, 6)}
    return {
        "step": report.step, "loss": round(report.thinking, 6), **direct,
        "norm": round(report.norm, 5), "on_grid": report.on_grid,
    }  # fmt: skip


def _load(trainer: Trainer, start: str | None) -> None:
    """Take over a state file, or the newest state of a folder; start anew where there is none."""
    if start is None:
        return
    path = Path(start)
    found = snapshot.newest(path) if path.is_dir() else snapshot.load(path)
    if found is not None:
        trainer.state.restore(found)


def _same_class(group: Group, its_class: str) -> None:
    """Raise PlatformError unless all workers of the group compute the same bits."""
    if group.world == 1:
        return
    classes: list[Any] = [None] * group.world
    dist.all_gather_object(classes, its_class)
    if len(set(classes)) > 1:
        raise PlatformError(
            f"the workers are of {len(set(classes))} numerics classes: {', '.join(c[:12] for c in classes)}",
            fix="a pool's workers must be of one chip, one library version and one instruction set",
        )
