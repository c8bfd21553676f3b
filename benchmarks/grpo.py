"""Our step of reinforcement beside that of TRL's GRPOTrainer: python -m benchmarks.grpo [--pairs 10] [--json].

The same DeepSeek-V3 architecture and weights, the same prompts, as many replies to each, as long, one update a
generation, one thread. A step is whole: replies, rewards, update. Ratios are how many times TRL's reply ids a second
ours draws and learns from (seconds of CPU, in turn).

Not the same work in all: ours writes what was drawn to disk before it learns, records the experts' routes and compares
the sampler's log-probabilities with the learner's; TRL pads prompts on the left and computes the entropy of every id
for its logs. The reward is the parity of a reply's ids, on both sides, so that nearly every group teaches something;
no verifier is asked. Nothing is evaluated, saved, or printed.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import options, show, throughput
from benchmarks.rollout import VOCABULARY, teacher
from benchmarks.turns import Turns

PROMPTS, GROUP, REPLY, TEMPERATURE = 32, 8, 22, 1.5
BLOCK = 2  # steps in one measurement
RATE = 1e-9  # so small that the model stays what it is, and replies as long as they are on both sides


def main() -> None:
    args = options(__doc__ or "", pairs=10)
    with tempfile.TemporaryDirectory() as name:
        ours, theirs = Ours(Path(name)), Theirs(Path(name))
        title = f"reply ids a second, {PROMPTS} x {GROUP} replies of at most {REPLY} ids, against TRL's GRPOTrainer"
        found = throughput(title, ours.block, theirs.block, args.pairs)
        theirs.end()
    print(f"ids a reply: ours {ours.mean:.1f}, TRL's {theirs.mean:.1f}", file=sys.stderr)
    found |= {"ids_a_reply": ours.mean, "ids_a_reply_trl": theirs.mean}
    show([found], args.json)


def parity(ids: Sequence[int]) -> float:
    """The reward."""
    return float(sum(ids) % 2)


class Ours:
    """Our trainer on one virtual shard, with its records on disk."""

    def __init__(self, folder: Path):
        import numpy as np

        from ottava import platforms
        from ottava.checkpoint.safetensors import write
        from ottava.models.chat import write_tiny
        from ottava.models.published import published, stored
        from ottava.tasks import chains
        from ottava.tasks.base import row, write_lines
        from ottava.trainer.rl_spec import ReinforceSpec
        from ottava.trainer.spec import Shape
        from ottava.trainer.start import make_trainer

        platforms.get("cpu").pin_numerics()
        model = folder / "model"
        write_tiny(model, chains.vocabulary())
        import json

        (model / "config.json").write_text(json.dumps(Shape().config(VOCABULARY)))
        source = teacher()
        write(model / "model.safetensors", ((name, stored(item)) for name, item in published(source).items()))
        problems = chains.sample(np.random.default_rng(0), chains.MAX_STEPS, 512, "train")
        write_lines(folder / "answers.jsonl", [row("chains", problem) for problem in problems])
        rollout = {
            "prompts": PROMPTS, "group": GROUP, "updates": 1, "max_new": REPLY, "temperature": TEMPERATURE,
        }  # fmt: skip
        plain = {"virtual_shards": 1, "steps": 100_000, "grid_from": 1, "optimiser": {"adam": RATE, "embedding": RATE}}
        spec = ReinforceSpec.model_validate({**plain, "rollout": rollout})
        self.trainer = make_trainer(
            {
                "spec": spec.model_dump(mode="json"), "seed": 0, "data": str(folder), "chat": str(model),
                "objective": "grpo", "start_model": str(model), "rollouts": str(folder / "rollouts"), "run": "r",
            }
        )  # fmt: skip
        objective: Any = self.trainer.objective
        objective._reward = self._reward
        self.trainer.gate()
        self.ids = self.replies = 0

    def _reward(self, _: Any, ids: list[int]) -> float:
        self.ids, self.replies = self.ids + len(ids), self.replies + 1
        return parity(ids)

    @property
    def mean(self) -> float:
        return self.ids / self.replies

    def block(self) -> float:
        """Seconds an id."""
        begun, before = time.process_time(), self.ids
        for _ in range(BLOCK):
            self.trainer.step(lambda total: total, range(1))
        return (time.process_time() - begun) / (self.ids - before)


class Theirs:
    """TRL's GRPOTrainer on the same model and prompts."""

    def __init__(self, folder: Path):
        from datasets import Dataset
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from tokenizers.pre_tokenizers import WhitespaceSplit
        from transformers import PreTrainedTokenizerFast
        from trl import GRPOConfig, GRPOTrainer

        from ottava.models.chat import Chat
        from ottava.models.load import load
        from ottava.tasks.base import problem_of, read_lines

        self.ids = self.replies = 0
        chat = Chat.load(folder / "model")
        words = Tokenizer(WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w0"))
        words.pre_tokenizer = WhitespaceSplit()
        asked = [problem_of(line).question for line in read_lines(folder / "answers.jsonl")]
        prompts = [" ".join(f"w{number}" for number in ids) for ids in chat.prompts(asked, thinking=True)]

        def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
            self.ids, self.replies = self.ids + sum(map(len, completion_ids)), self.replies + len(completion_ids)
            return [parity(ids) for ids in completion_ids]

        config = GRPOConfig(
            output_dir=str(folder / "trl"), max_steps=1_000_000, per_device_train_batch_size=PROMPTS * GROUP,
            num_generations=GROUP, gradient_accumulation_steps=1, steps_per_generation=1, num_iterations=1,
            max_completion_length=REPLY, temperature=TEMPERATURE, beta=0.0, loss_type="grpo", learning_rate=RATE,
            lr_scheduler_type="constant", adam_beta2=0.95, max_grad_norm=1.0, use_cpu=True, bf16=False,
            gradient_checkpointing=False, logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip
        stop = f"w{chat.stop_ids[0]}"
        trainer = GRPOTrainer(
            load(folder / "model").train(), reward, config,
            train_dataset=Dataset.from_list([{"prompt": text} for text in prompts]),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token=stop),
        )  # fmt: skip
        self._turns = Turns(trainer, BLOCK)
        self.end = self._turns.end

    @property
    def mean(self) -> float:
        return self.ids / self.replies

    def block(self) -> float:
        """Seconds an id."""
        before, seconds = self.ids, self._turns.block()
        return seconds / (self.ids - before)


if __name__ == "__main__":
    main()
