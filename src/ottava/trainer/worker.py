"""What the supervisor starts, one process a device: join, check the class, load, step, check, keep, report.

Functions here take and return plain data, because they are started by name in another process.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ottava import link, platforms
from ottava.errors import CheckpointError, OttavaError, TrainingFailed
from ottava.platforms.base import FaultClass, Platform
from ottava.trainer import audit, envelope, guard, reduce, snapshot
from ottava.trainer.faults import Injector
from ottava.trainer.guard import Alarm, Group
from ottava.trainer.looks import Looker
from ottava.trainer.loop import Report, Trainer
from ottava.trainer.saver import STATE, Saver
from ottava.trainer.start import config_of, make_trainer
from ottava.trainer.supervised import Fault


def join(platform: Platform) -> Group:
    """Open this worker's device and join the process group that the environment names."""
    platform.open()
    group = Group(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    if group.world > 1:
        dist.init_process_group(platform.process_group())
    return group


def numerics_class(trainer: Trainer) -> str:
    """The hash of loss and gradients of a canonical shard: workers with equal hashes compute equal bits.

    On the initial weights: call before a state is loaded.
    """
    trainer.refresh()
    return audit.hashed(trainer.canonical())


def run(args: Mapping[str, Any]) -> dict[str, Any]:
    """Train from a state to step `until`, keeping every step. The supervisor's worker.

    args: spec, seed, data, chat, platform; run: its id; start: {"path", "step", "digest"} of a state, or None; until;
    memory: the folder of this start's snapshots; keep: {step: path} of states to save; durable: the folder of
    generations; vouched: the last step that an audit vouches for; recent: [step, loss] of the steps before; chips: the
    chip of each rank; pool; faults: {number: fault} to commit; looks, baseline: after which steps the run is still to
    be held against which model, if at all.
    Returns {step, digest}. Raises TrainingFailed where something is wrong with this worker's chip or its numbers.
    """
    line = link.connect()
    worker = None
    try:
        group = join(platforms.asked(args))
        chip = int(args["chips"][group.rank])
        faults = {int(number): Fault.model_validate(fault) for number, fault in args["faults"].items()}
        worker = Worker(args, group, line, Injector(faults, chip, args["pool"], line.say))
        return worker.run()
    except Alarm as alarm:
        step = alarm.step if alarm.step is not None else -1 if worker is None else worker.trainer.state.step
        line.alarm(alarm.kind, step, alarm.message, ranks=list(alarm.ranks))
        raise TrainingFailed(f"{alarm.kind}: {alarm.message}", where=f"pool {args['pool']}") from alarm
    except OttavaError as error:
        step = -1 if worker is None else worker.trainer.state.step
        if getattr(error, "cause", None) == "padding not zero":
            line.alarm("corrupt", step, error.what, ranks=[int(os.environ.get("RANK", "0"))])
        raise
    except Exception as error:
        step = -1 if worker is None else worker.trainer.state.step
        platform = platforms.asked(args)
        kind = _KIND_OF.get(platform.classify_error(error), "error")
        against = range(len(args["chips"])) if kind == "pool" else [int(os.environ.get("RANK", "0"))]
        line.alarm(kind, step, f"{type(error).__name__}: {platform.words(error)}", ranks=list(against))
        raise


_KIND_OF = {
    FaultClass.OUT_OF_MEMORY: "memory",
    FaultClass.COLLECTIVE: "peer",
    FaultClass.DEVICE_STUCK: "stuck",
    FaultClass.DEVICE_LOST: "lost",
    FaultClass.UNUSABLE: "pool",
}
"""What an exception is told as; a lost peer is a consequence and no failure of its own."""


class Worker:
    """One worker of a group, from joining to the last step."""

    def __init__(self, args: Mapping[str, Any], group: Group, line: link.Link, faults: Injector):
        self.args, self.group, self.line, self.faults = args, group, line, faults
        self.trainer = make_trainer(args, line.check)
        self.spec, self.seed = self.trainer.spec, self.trainer.seed
        self.shards = reduce.owned(self.spec.virtual_shards, group.rank, group.world)
        self.recent: dict[Hashable, deque[float]] = {}
        for step, loss in args.get("recent", ()):
            self._like(step).append(loss)
        self.words = int(self.trainer.model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
        self.keep = {int(step): Path(path) for step, path in args["keep"].items()}
        self.digest = ""
        self.vouched, self.saving = int(args["vouched"]), -1
        self.looks, self.looker = frozenset(args.get("looks", ())), None

    looker: Looker | None

    def run(self) -> dict[str, Any]:
        self._begin()
        self._look()
        while self.trainer.state.step < self.args["until"] and not self.line.stopping:
            self._step()
        self.line.phase = "end"
        if self.group.rank == 0:
            self.saver.close()
            self._tell_saved()
        if self.group.world > 1:
            dist.barrier()
            dist.destroy_process_group()
        step, digest = self.trainer.state.step, self.trainer.state.digest()
        self.line.bye(step, digest=digest)
        return {"step": step, "digest": digest}

    def _begin(self) -> None:
        """Check the class, load the state, join, and wait for the others."""
        state, start = self.trainer.state, self.args["start"]
        self._enter("join")
        its_class = numerics_class(self.trainer)
        facts = json.dumps(platforms.asked(self.args).describe(), sort_keys=True)
        guard.check_class(self.group.gather([its_class, numerics_class(self.trainer), facts]))
        self._enter("load")
        if start is not None:
            try:
                _restore(self.trainer, start, self.args["run"])
            except CheckpointError as error:  # whole a moment ago: the next start looks at it again, and before it
                raise Alarm("error", f"the state could not be loaded: {error.what}") from error
        began = self.trainer.gate()
        if began is not None and self.group.rank == 0:
            self.line.say("gate", **began)
        if self.spec.precision != "float32" and self.group.rank == 0:
            self.line.say("precision", precision=self.spec.precision, products=self.trainer.products)
        self.digest = state.digest()
        path = Path(self.args["memory"]) / os.environ.get(link.NODE, "node0") / f"rank{self.group.rank}.snap"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.writer = snapshot.Writer(path, state.arena.numel() * 4, self.args["run"])
        self.writer.write(state.snapshot(), self.digest)  # so that the step before any other is always at hand
        if self.group.rank == 0:
            durable, run, epoch = Path(self.args["durable"]), self.args["run"], self.line.epoch
            self.saver = Saver(durable, run=run, epoch=epoch, at=self._in_save)
            if state.step in self.keep:
                snapshot.save(self.keep[state.step], state.snapshot())
            if self.looks:
                places = (Path(self.args[name]) for name in ("data", "chat", "baseline"))
                self.looker = Looker(self.trainer, *places)
        self.line.join(
            step=state.step, digest=self.digest, numerics_class=its_class, world=self.group.world, pid=os.getpid()
        )

    def _enter(self, phase: str) -> None:
        self.line.phase = phase
        self.faults.at(phase, self.trainer.state.step)
        self.faults.state(self.trainer.state, self.trainer.state.step, phase)

    def _step(self) -> None:
        """One step: compute, exchange, check, update, check, keep, tell."""
        trainer, step, begun = self.trainer, self.trainer.state.step, time.monotonic()
        if self.group.world == 1 and step > 0 and trainer.state.digest() != self.digest:
            raise Alarm("corrupt", f"the state after step {step} changed in memory", [0])
        if trainer.objective.begins(step):
            self._enter("rollout")
            trainer.refresh()
            trainer.prepare(self.shards, self.group.gather)
        self._enter("forward")
        trainer.refresh()
        own = trainer.contribution(self.shards)
        computed = time.monotonic() - begun
        self.faults.contribution(own, step, len(trainer.objective.columns))
        sound, mine = bool(own.sum().isfinite()), trainer.sums(own)
        audited = audit.due(self.spec.audit.share, self.seed, step, self.spec.audit.seed)
        hashed = audit.hashed(own) if audited else ""
        self._enter("reduce")
        total = reduce.exchange_(own, self.group.rank, self.group.world, redundant=audited)
        self._enter("update")
        norm = trainer.clip(total)
        self._check_losses(total, norm, sound, mine)
        if audited:
            audit.check(trainer, self.group, hashed)
        report = trainer.update(total, norm)
        self._keep(report, audited)
        where = {"digest": self.digest[:16], "seconds": round(time.monotonic() - begun, 4)}
        self.line.step(report.step, **_event(report), **where, compute_s=round(computed, 4), audited=audited)
        self._enter("kept")
        self._look()

    def _look(self) -> None:
        """At a checkpoint: the first worker compares the kept state with the baseline, all wait for the verdict."""
        step = self.trainer.state.step
        if step not in self.looks:
            return
        self._enter("look")
        if self.looker is not None:
            self.line.say("look", **self.looker.look())
        self.line.phase = "verdict"
        self.line.clearance(step)

    def _check_losses(self, total: Any, norm: float, sound: bool, mine: Mapping[str, float]) -> None:
        """Before the update: are the numbers numbers, is the loss like those before? Others are asked only if not."""
        sums, step, objective = self.trainer.sums(total), self.trainer.state.step + 1, self.trainer.objective
        judged, check = objective.columns[0], guard.check_drawn if objective.drawn else guard.check_spike
        try:
            guard.check_finite([*sums.values(), norm], [sound], f"step {step}")
            most = objective.most(sums, self.words)
            check(sums[judged], self._like(step), self.spec.spike, f"step {step}", most)
        except Alarm as alarm:
            everyone = self.group.gather([sound, mine[judged]])
            guard.check_finite([*sums.values(), norm], [good for good, _ in everyone], f"step {step}")
            raise Alarm(alarm.kind, alarm.message, guard.outliers([loss for _, loss in everyone])) from None
        self._like(step).append(sums[judged])

    def _like(self, step: int) -> deque[float]:
        """The last losses of steps of this one's kind: two windows."""
        return self.recent.setdefault(self.trainer.objective.kind(step - 1), deque(maxlen=2 * self.spec.spike.window))

    def _keep(self, report: Report, audited: bool) -> None:
        """Compare the new state with the other workers' and keep it. What differs is not kept."""
        self.faults.state(self.trainer.state, report.step - 1, "snapshot")
        kept = self.trainer.state.snapshot()
        self.digest = kept.digest
        found = self.group.digests(self.digest)
        if len(set(found)) > 1:
            odd = guard.minority(found) or self._redo(report.step)
            raise Alarm("corrupt", f"after step {report.step} the workers hold different bits", odd)
        self._enter_snapshot(report.step - 1)
        self.line.check()
        self.writer.write(kept, self.digest)
        if self.group.rank == 0:
            self._save(report.step, audited)

    def _enter_snapshot(self, step: int) -> None:
        self.line.phase = "snapshot"
        self.faults.at("snapshot", step)

    def _redo(self, step: int) -> tuple[int, ...]:
        """The step once more from the state that was kept before: wrong is who now finds something else."""
        before = [s for s in snapshot.states(self.writer.path, self.args["run"]) if s.step == step - 1]
        if not all(self.group.gather(bool(before))):
            return ()
        first = self.digest
        self.trainer.state.restore(before[0])
        self.trainer.refresh()
        total = reduce.exchange_(self.trainer.contribution(self.shards), self.group.rank, self.group.world)
        self.trainer.update(total, self.trainer.clip(total))
        again = self.group.gather([first, self.trainer.state.digest()])
        if len({second for _, second in again}) > 1:
            return ()
        return tuple(rank for rank, (one, two) in enumerate(again) if one != two)

    def _save(self, step: int, audited: bool) -> None:
        """Make the state durable beside the next steps, now and then; one that an audit vouches for stays longer."""
        if step in self.keep:
            snapshot.save(self.keep[step], self.trainer.state.snapshot())
        if audited or step % self.spec.checkpoint_every == 0:
            self.vouched = step if audited else self.vouched
            self.saving = step
            pinned = frozenset({self.vouched})
            tensors = self.trainer.state.tensors()
            self.saver.submit(step, tensors, state=self.digest, pinned=pinned, wait=audited)
        self._tell_saved()

    def _tell_saved(self) -> None:
        for done in self.saver.poll():
            for item in done.rejected:
                self.line.say("rejected", path=str(item.path), step=item.step, message=f"{item.cause}: {item.what}")
            if done.saved is None:
                what = "nothing was saved" if done.error is None else done.error.what
                self.line.say("unsaved", step=done.step, message=what)
            else:
                self.line.say("saved", step=done.step, path=str(done.saved.path), seconds=round(done.seconds, 4))

    def _in_save(self, point: str) -> None:
        """Called before each durable operation, in the saver's thread."""
        self.faults.at(f"save:{point}", self.saving)
        if point == "rename":
            self.line.check()


def _restore(trainer: Trainer, start: Mapping[str, Any], run: str) -> None:
    """Load the state that the supervisor chose: a step of a two-slot file, or a generation."""
    path = Path(start["path"])
    if path.is_dir():
        generation = envelope.verify(path, run)
        trainer.state.take(envelope.load(generation, STATE))
    else:
        trainer.state.restore(snapshot.load(path, start["step"], run))
    if trainer.state.digest() != start["digest"]:
        raise CheckpointError("the state that was loaded is not the one that was chosen", where=path)


def export(args: Mapping[str, Any]) -> dict[str, Any]:
    """Write the model of a state file as a BF16 folder on the grid, and the latent weights beside it.

    Adapters are merged: then the folder holds their sum with the matrices as it is, in F32 where BF16 would round it.
    args: spec, seed, data, chat, state, model (folder with the tokenizer), latent (a file, or None). Returns
    {parameters: of the whole model, trained: of them, or of the adapters; step}.
    """
    from ottava.checkpoint.safetensors import write
    from ottava.models.lora import merged
    from ottava.models.published import published, stored, unrounded

    platforms.asked(args).open()
    trainer = make_trainer(args)
    trainer.state.restore(snapshot.load(Path(args["state"])))
    trainer.refresh()
    adapted = trainer.spec.lora is not None
    if not adapted:
        trainer.put_on_grid()
    model = Path(args["model"])
    config = config_of(args, trainer) | ({"dtype": "float32"} if adapted else {})
    (model / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    spelt = unrounded if adapted else stored
    with merged(trainer.model) as whole:
        write(model / "model.safetensors", ((name, spelt(item)) for name, item in published(whole).items()))
        parameters = sum(parameter.numel() for parameter in whole.parameters())
    if args.get("latent"):
        latent = ((slot.name, slot.view(trainer.state.weights).contiguous()) for slot in trainer.state.slots)
        write(Path(args["latent"]), latent)
    trained = sum(slot.size for slot in trainer.state.slots)
    return {"parameters": parameters, "trained": trained, "step": trainer.state.step}


def _event(report: Report) -> dict[str, Any]:
    return {**report.told, "norm": round(report.norm, 5), "on_grid": report.on_grid}
