"""A small training with transformers' or TRL's trainer that kills itself where its plan says so; see test_hf.py.

python tests/hf_train.py OUT [--trl] [--save STEPS] [--plan '{"EPOCH": ["POINT", NUMBER, RANK]}']

POINT is `begin` or `update` (of step NUMBER), `write` (half of the NUMBERth file that torch.save writes), `seal:X` (the
NUMBERth durable operation X), `load` (in the middle of resuming), `end` (after train()).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from ottava.trainer.hf import OttavaCallback

WORDS, LENGTH, EXAMPLES, BATCH = 32, 12, 40, 8
SAVE = 4


def arguments(out: Path | str, **more: Any) -> dict[str, Any]:
    """Training arguments: 5 steps an epoch, dropout in the model, everything that a resume could get wrong."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    base = {
        "output_dir": str(out), "max_steps": 11, "save_steps": SAVE, "logging_steps": 3, "learning_rate": 1e-2,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": BATCH // 2 // world, "use_cpu": True,
        "report_to": [], "disable_tqdm": True, "seed": 5, "warmup_steps": 2,
    }  # fmt: skip
    return base | more


def model() -> LlamaForCausalLM:
    """About 100,000 parameters, the same ones every time."""
    set_seed(3)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=WORDS, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, attention_dropout=0.1, bos_token_id=None, eos_token_id=1, pad_token_id=0,
        dtype="float32", attn_implementation="eager",
    ))  # fmt: skip


def examples() -> list[dict[str, list[int]]]:
    """Token ids, each example another."""
    tokens = torch.randint(2, WORDS, (EXAMPLES, LENGTH), generator=torch.Generator().manual_seed(7)).tolist()
    return [{"input_ids": row, "labels": row} for row in tokens]


def trainer(callbacks: list[TrainerCallback], out: Path | str, **more: Any) -> Trainer:
    """transformers' own."""
    args = TrainingArguments(**arguments(out, **more))
    return Trainer(model(), args, train_dataset=examples(), callbacks=callbacks)


def trl_trainer(callbacks: list[TrainerCallback], out: Path | str, **more: Any) -> Trainer:
    """TRL's, on a dataset of token ids."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = {"<pad>": 0, "<end>": 1} | {f"w{number}": number for number in range(2, WORDS)}
    made = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokens = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>")
    args = SFTConfig(**arguments(out, **more), bf16=False, gradient_checkpointing=False)
    data = Dataset.from_list([{"input_ids": row["input_ids"]} for row in examples()])
    return SFTTrainer(model(), args, train_dataset=data, processing_class=tokens, callbacks=callbacks)


class Killer(TrainerCallback):  # type: ignore[misc]
    """Ends this process by SIGKILL at one point."""

    def __init__(self, point: str, number: int):
        self.point, self.number = point, number
        saving, loading = torch.save, Trainer._load_optimizer_and_scheduler

        def save(value: Any, path: Any, *rest: Any, **more: Any) -> None:
            saving(value, path, *rest, **more)
            if point == "write" and self.last():
                os.truncate(path, Path(path).stat().st_size // 2)
                self.die()

        def load(its: Trainer, checkpoint: str | None) -> None:
            loading(its, checkpoint)
            if point == "load" and checkpoint is not None and self.last():
                self.die()

        torch.save, Trainer._load_optimizer_and_scheduler = save, load

    def last(self) -> bool:
        self.number -= 1
        return self.number <= 0

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.point == "begin" and state.global_step + 1 >= self.number:
            self.die()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.point == "update" and state.global_step + 1 >= self.number:
            self.die()


def main() -> None:
    """Train, with the death that the plan has for this start and rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--trl", action="store_true")
    parser.add_argument("--save", type=int, default=SAVE, help="a checkpoint after every so many steps")
    parser.add_argument("--plan", type=json.loads, default={})
    options = parser.parse_args()
    supervised = OttavaCallback("toy")
    point, number, rank = options.plan.get(os.environ.get("OTTAVA_EPOCH", "0"), ("never", 0, -1))
    killer = Killer(point if int(os.environ.get("RANK", "0")) == rank else "never", number)
    may_write = supervised._may_write

    def tell(where: str) -> None:
        may_write(where)
        if killer.point == f"seal:{where}" and killer.last():
            killer.die()

    supervised._may_write = tell
    make = trl_trainer if options.trl else trainer
    made = make([supervised, killer], options.out, save_steps=options.save)
    made.train(resume_from_checkpoint=supervised.resume_from(made.args))
    if killer.point == "end":
        killer.die()
    made.save_model()


if __name__ == "__main__":
    main()
