"""Hugging Face's Trainer, and TRL's trainers on top of it, under our supervisor: a callback that speaks `ottava.link`.

    supervised = OttavaCallback("sft-chains")
    trainer = SFTTrainer(..., callbacks=[supervised])
    trainer.train(resume_from_checkpoint=supervised.resume_from(trainer.args))

Without a supervisor it does nothing at all. Under one (`ottava supervise`), every checkpoint becomes a verified
generation under OTTAVA_STATE. While it trains, checkpoints are written to a folder of this start's own, e00003/,
and not to `output_dir`: so one that a kill left half written is never mistaken for one, does not stand in the way of
the next of its name, and no process of an earlier start can write into the files that this one is about to seal.

What is in a checkpoint is Hugging Face's: safetensors for the weights, torch.save (pickle) for the optimiser, the
schedule and the random numbers. They read it back with `weights_only`. Nothing of it is loaded here.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from ottava import link
from ottava.artifact import digest_of, write_json
from ottava.errors import CheckpointError, OttavaError, RecipeError, ResourceError
from ottava.trainer import envelope, generations
from ottava.trainer.generations import Generation, Rejected

LEAST = 3
"""Generations that are always kept: disks lose some."""

DEFINING = (
    "seed", "data_seed", "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps",
    "weight_decay", "max_grad_norm", "optim", "adam_beta1", "adam_beta2", "adam_epsilon",
)  # fmt: skip
"""Training arguments that make one run: where one of them is another, its checkpoints are not gone on from."""

BEGUN = "begun.json"


class OttavaCallback(TrainerCallback):  # type: ignore[misc]
    """One call of `train()` under the supervisor. Make it once a process, before the trainer."""

    def __init__(self, run: str, keep: int = LEAST):
        """run: a name for what is trained, such as the model's and the data's; keep: how many generations stay.

        `save_total_limit` counts as `keep` where it is larger. Raises RecipeError where `keep` is less than 3, or a
        supervisor gives no place for states.
        """
        if keep < LEAST:
            raise RecipeError(f"keep is {keep}, and disks lose some", where="keep", fix=f"keep at least {LEAST}")
        self.line = link.connect()
        self._alone = isinstance(self.line, link.Alone)
        if not self._alone and link.STATE not in os.environ:
            raise RecipeError("there is no place for states", where=link.STATE, fix="start it by ottava supervise")
        self._root = Path(os.environ.get(link.STATE, ""))
        self._run, self._keep = run, keep
        self._home: str | None = None  # the user's output_dir, while another stands in its place
        self._clock = time.monotonic()
        self._untold: dict[str, Any] = {}
        self._rejected: set[Path] = set()

    # ---------------------------------------------------------------- where to go on from

    def resume_from(self, args: Any) -> str | None:
        """The folder of the newest generation that verifies, for `resume_from_checkpoint`; None for a fresh start.

        args: the TrainingArguments. To be called by all ranks: rank 0 looks, and the others are told.
        Raises CheckpointError where there are generations and none can be used, and where going on from this one
        would change the global batch; RecipeError where an argument cannot work here.
        """
        if self._alone:
            return None
        self.line.phase = "load"
        found = None
        with self._telling(-1):
            _check(args)
            if args.process_index == 0:
                found = self._newest(args)
        step, epoch = _from_rank_0([found.step, found.epoch] if found is not None else [-1, -1], args)
        return None if step < 0 else str(self._root / envelope.folder_name(step, epoch))

    def _newest(self, args: Any) -> Generation | None:
        """The generation to go on from, as rank 0 finds it."""
        begun = _begun(self._root)

        def usable(generation: Generation) -> bool:
            stale = any(generation.epoch < epoch and generation.step > step for epoch, step in begun.items())
            return not stale and not _ended_within_an_epoch(generation.path)

        found, rejected = generations.newest(self._root, _run_id(self._run, args), usable)
        self._tell_rejected(rejected)
        lost = [item for item in rejected if item.cause != "not usable"]
        if found is None and lost:
            what = f"none of the {len(rejected)} generations can be used; the newest: {lost[0].what}"
            raise CheckpointError(what, where=self._root, fix="start anew with another --out", cause=lost[0].cause)
        if found is not None and found.extra.get("batch") != _batch(args):
            what = f"the global batch was {found.extra.get('batch')} examples and is {_batch(args)} now"
            fix = "set gradient_accumulation_steps by WORLD_SIZE, so that the global batch stays what it was"
            raise CheckpointError(what, where=found.path, fix=fix, cause="other batch")
        return found

    # ---------------------------------------------------------------- the trainer's events

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Join, once this start has a folder of its own for what is not sealed yet."""
        if self._alone:
            return
        with self._telling(state.global_step):
            _check(args)
            if state.is_hyper_param_search:
                raise RecipeError("a hyperparameter search is many runs", where="trial", fix="supervise one at a time")
            if self._home is not None:
                what = "train() was called twice, and a callback carries one call of it"
                raise RecipeError(what, where="train()", fix="make each call a command of its own")
            own = self._root / f"e{self.line.epoch:05d}"
            self._home, args.output_dir = args.output_dir, str(own / Path(args.output_dir).resolve().name)
            if args.process_index == 0:
                for old in _epochs(self._root).values():  # what earlier starts left unsealed; their word stays
                    for folder in (item for item in old.iterdir() if item.is_dir()):
                        shutil.rmtree(folder, ignore_errors=True)
                own.mkdir(parents=True, exist_ok=True)
                write_json(own / BEGUN, {"step": state.global_step})
        self.line.join(step=state.global_step, world=args.world_size, pid=os.getpid())
        self._rest()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._tell_step()
        self.line.phase = "forward"

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.line.phase = "update"

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Note the step; what it is told with, its loss, is known in `on_log`, if at all."""
        if self._alone:
            return control
        self._untold = {"step": state.global_step, "seconds": round(time.monotonic() - self._clock, 6)}
        if not control.should_log:
            self._tell_step()
        if _any_rank(self.line.stopping, args):
            control.should_save = control.should_training_stop = True
        self._rest()
        self._announce(control)
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self._alone:
            self._announce(control)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        loss = (logs or {}).get("loss")
        if self._untold.get("step") == state.global_step and isinstance(loss, float) and math.isfinite(loss):
            self._untold["loss"] = loss
        self._tell_step()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.line.phase = "evaluate"

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.line.phase = "save"  # which comes next, if at all
        self._clock = time.monotonic()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Seal what all ranks have written. Hugging Face calls this on each rank when that rank has written its own."""
        if self._alone:
            return
        self._tell_step()
        self.line.phase = "save"
        if args.world_size > 1:
            dist.barrier()
        if args.process_index == 0:
            with self._telling(state.global_step):
                self._seal(args, state.global_step)
        self._rest()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._alone:
            return
        self._tell_step()
        self.line.phase = "end"
        if self._home is not None:
            args.output_dir = self._home
        self.line.bye(state.global_step)

    # ---------------------------------------------------------------- inside

    def _seal(self, args: Any, step: int) -> None:
        """Make this step's checkpoint a generation, and remove old ones. Rank 0 alone."""
        begun = time.monotonic()
        folder = Path(args.output_dir) / f"checkpoint-{step}"
        ranks = range(args.world_size) if args.world_size > 1 else ()
        if missing := [rank for rank in ranks if not (folder / f"rng_state_{rank}.pth").is_file()]:
            what = f"the files of rank {missing[0]} are not here"
            fix = "put OTTAVA_STATE (--out) on a disk that all machines share"
            raise CheckpointError(what, where=folder, fix=fix, cause="missing file")
        if (
            self._root / envelope.folder_name(step, self.line.epoch)
        ).exists():  # saved twice: at a step and its epoch's end
            shutil.rmtree(folder)
            return
        run, extra = _run_id(self._run, args), {"world": args.world_size, "batch": _batch(args)}
        sealed = generations.seal(
            folder, self._root, step=step, run=run, epoch=self.line.epoch, extra=extra, at=self._may_write
        )
        self.line.say("saved", step=step, path=str(sealed.path), seconds=round(time.monotonic() - begun, 4))
        keep = max(self._keep, args.save_total_limit or 0)
        _, rejected = generations.prune(self._root, run, keep, at=self._may_write)
        self._tell_rejected(rejected)

    def _may_write(self, _point: str) -> None:
        """Before each durable operation: one that lost its lease may rename nothing any more."""
        self.line.check()

    def _announce(self, control: Any) -> None:
        """Say what comes next. The supervisor waits longer in a save and in an evaluation than in a step."""
        if control.should_evaluate:
            self.line.phase = "evaluate"
        elif control.should_save:
            self.line.phase = "save"
        if control.should_save:
            self.line.check()

    def _tell_step(self) -> None:
        if self._untold:
            self.line.step(**self._untold)
            self._untold = {}

    def _tell_rejected(self, rejected: Sequence[Rejected]) -> None:
        """Each once: they are found again at every save."""
        for item in rejected:
            if item.path not in self._rejected:
                self._rejected.add(item.path)
                self.line.say("rejected", path=str(item.path), step=item.step, message=f"{item.cause}: {item.what}")

    def _rest(self) -> None:
        """Between two steps, whose seconds are counted from here: waiting for data is part of a step."""
        self.line.phase = "between"
        self._clock = time.monotonic()

    @contextmanager
    def _telling(self, step: int) -> Iterator[None]:
        """Tell the supervisor in words what ends this worker: of an exit status it would only know the number."""
        try:
            yield
        except OttavaError as error:
            self.line.alarm("disk" if isinstance(error, ResourceError) else "error", step, error.what)
            raise


def _check(args: Any) -> None:
    """Raise RecipeError where Hugging Face would look for checkpoints where they are no more."""
    wrong = {
        "load_best_model_at_end": "the best checkpoint is sealed elsewhere by then: load it from there afterwards",
        "save_only_model": "what has no optimiser state cannot be gone on from",
        "auto_find_batch_size": "it starts over inside train(), which the supervisor knows nothing of",
        "save_on_each_node": "one place holds a generation: save on a disk that all machines share",
    }
    for name, why in wrong.items():
        if getattr(args, name, False):
            raise RecipeError(f"{name} cannot be supervised: {why}", where=name, fix=f"set {name}=False")
    if args.push_to_hub and str(getattr(args.hub_strategy, "value", args.hub_strategy)) != "end":
        what = "push_to_hub cannot be supervised: checkpoints move as soon as they are written, uploaded or not"
        raise RecipeError(what, where="push_to_hub", fix='set hub_strategy="end", or push after train()')


def _run_id(name: str, args: Any) -> str:
    """The user's name for the run, and a digest of the arguments that make it this one."""
    said = {key: str(getattr(args, key, None)) for key in DEFINING}
    return f"{name}:{digest_of(said)[:16]}"


def _batch(args: Any) -> int:
    """Examples that one step learns from, over all ranks."""
    return int(args.train_batch_size * args.gradient_accumulation_steps * args.world_size)


def _epochs(root: Path) -> dict[int, Path]:
    """The folders of the starts so far, by their epoch."""
    return {int(path.name[1:]): path for path in root.glob("e[0-9]*") if path.name[1:].isdecimal() and path.is_dir()}


def _begun(root: Path) -> dict[int, int]:
    """Which step each start began from: what an earlier one saved beyond it is of a worker that should be dead."""
    files = {epoch: path / BEGUN for epoch, path in _epochs(root).items()}
    return {epoch: int(json.loads(path.read_text())["step"]) for epoch, path in files.items() if path.exists()}


def _ended_within_an_epoch(folder: Path) -> bool:
    """Whether a checkpoint is of a finished run whose last epoch is not whole.

    Hugging Face's loop (5.23) enters that epoch when it resumes, and does one step more before it sees that it is done.
    """
    state = json.loads((folder / "trainer_state.json").read_text())
    return bool(state["global_step"] >= state["max_steps"] and state["epoch"] % 1 != 0)


def _from_rank_0(numbers: list[int], args: Any) -> list[int]:
    """The numbers that rank 0 has, on every rank."""
    if args.world_size < 2:
        return numbers
    said = torch.tensor(numbers, dtype=torch.int64, device=args.device)
    dist.broadcast(said, 0)
    return [int(number) for number in said.tolist()]


def _any_rank(flag: bool, args: Any) -> bool:
    """Whether the flag is set on some rank: all must save and stop at one step."""
    if args.world_size < 2:
        return flag
    said = torch.tensor(int(flag), dtype=torch.int32, device=args.device)
    dist.all_reduce(said, dist.ReduceOp.MAX)
    return bool(said.item())
