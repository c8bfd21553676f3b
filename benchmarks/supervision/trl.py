"""Our trainer's step beside that of TRL's SFTTrainer: the same DeepSeek-V3 architecture and initial weights, as many
tokens, as many micro-batches (gradient accumulation = V), one thread. Ratios are how many times TRL's tokens a second
ours trains on (seconds of CPU, in turn).

Not the same work in all: ours updates by Muon and AdamW and moves the router's biases, TRL's by AdamW alone, which is
cheaper; TRL computes entropy and accuracy of every token for its logs, which cannot be turned off. Token ids lie ready
at one length on both sides, and nothing is evaluated, saved, or printed.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import throughput
from benchmarks.turns import Turns

LENGTH = 64  # positions of an example that the model computes
EXAMPLES = 256
BLOCK = 3  # steps in one measurement


def rows(quick: bool = False) -> list[dict[str, Any]]:
    """One row for each number of micro-batches; none where TRL is not installed."""
    from ottava.supervisor.local import LocalLauncher

    if importlib.util.find_spec("trl") is None:
        print("trl is not installed, and is not measured: pip install -e '.[trl]'", file=sys.stderr)
        return []
    found = []
    with tempfile.TemporaryDirectory() as name, LocalLauncher() as launcher:
        for shards in (2, 8):
            work = {"shards": shards, "folder": name, "pairs": 3 if quick else 20}
            found += launcher.call("benchmarks.supervision.trl:steps", work, logs=Path(name))[0]["rows"]
    return found


def steps(args: Mapping[str, Any]) -> dict[str, Any]:
    """In a worker: one row."""
    import torch

    from ottava import platforms
    from ottava.trainer.data import Data, Examples
    from ottava.trainer.probe import VOCABULARY
    from ottava.trainer.sft import fresh_trainer
    from ottava.trainer.spec import Direct, TrainSpec
    from ottava.trainer.worker import join

    join(platforms.get("cpu"))
    spec = TrainSpec(virtual_shards=args["shards"], direct=Direct(begin=1.0), grid_from=1.0)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(6, VOCABULARY, (EXAMPLES, LENGTH + 1), generator=draw)
    trainer = fresh_trainer(spec, 0, Data({4: Examples(tokens, tokens[:, 1:].clone())}, {}), VOCABULARY)
    theirs = Theirs(spec, tokens[:, :LENGTH], VOCABULARY, args["folder"])

    def ours() -> float:
        trainer.state.step = 1
        begun = time.process_time()
        for _ in range(BLOCK):
            trainer.step(lambda total: total, range(spec.virtual_shards))
        return (time.process_time() - begun) / BLOCK

    title = (
        f"tokens a second, {spec.virtual_shards} micro-batches of {spec.batch} x {LENGTH}, ours (Muon, AdamW, router)"
    )
    found = throughput(f"{title} against TRL's SFTTrainer (AdamW)", ours, theirs.block, args["pairs"])
    theirs.end(spec.virtual_shards * spec.batch * LENGTH)
    return {"rows": [found]}


class Theirs:
    """TRL's SFTTrainer on the same initial model and tokens."""

    def __init__(self, spec: Any, tokens: Any, vocabulary: int, folder: str):
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # one process: it need not wrap its model
            os.environ.pop(name, None)
        from datasets import Dataset
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from transformers import PreTrainedTokenizerFast
        from trl import SFTConfig, SFTTrainer

        from ottava.models.build import from_config, initialise

        model = from_config(spec.shape.config(vocabulary)).train()
        initialise(model, 0)
        words = Tokenizer(WordLevel({f"w{number}": number for number in range(vocabulary)}, unk_token="w0"))
        its = spec.optimiser
        config = SFTConfig(
            output_dir=folder, max_steps=1_000_000, per_device_train_batch_size=spec.batch,
            gradient_accumulation_steps=spec.virtual_shards, learning_rate=its.adam, lr_scheduler_type="constant",
            adam_beta1=its.beta1, adam_beta2=its.beta2, max_grad_norm=its.clip, use_cpu=True, bf16=False,
            gradient_checkpointing=False, logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
            max_length=None, dataset_kwargs={"skip_prepare_dataset": True},
        )  # fmt: skip
        self._trainer = SFTTrainer(
            model, config,
            train_dataset=Dataset.from_list([{"input_ids": row, "labels": row} for row in tokens.tolist()]),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1"),
        )  # fmt: skip
        self._turns = Turns(self._trainer, BLOCK)

    def block(self) -> float:
        """Seconds a step, over BLOCK of them."""
        return self._turns.block() / BLOCK

    def end(self, tokens: int) -> None:
        """Stop it. tokens: a step's, which it must have trained on: a baseline that did less would be faster."""
        self._turns.end()
        done = self._trainer._total_train_tokens
        assert done == tokens * self._turns.steps, (done, tokens, self._turns.steps)
