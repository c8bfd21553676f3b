"""Fine-tunes a small model with TRL, so that a kill costs only the steps since the last checkpoint.

    ottava supervise --out runs/sft -- python examples/sft.py

Kill any of its processes meanwhile: the same weights come out. Needs the extra `trl`; CPU, no network, less than a
minute. The task is a toy: the last digit of a sum.
"""

from __future__ import annotations

import argparse
import os
import random

from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

from ottava.trainer.hf import OttavaCallback

BATCH = 32  # examples a step, over all workers
SPECIAL = ["<pad>", "<end>", "<unk>"]


def questions(count: int) -> Dataset:
    """Sums of two digits and their last digit, as prompt and completion."""
    draw = random.Random(0)
    pairs = [(draw.randrange(10), draw.randrange(10)) for _ in range(count)]
    return Dataset.from_list([{"prompt": f"{a} + {b} =", "completion": f" {(a + b) % 10}"} for a, b in pairs])


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    words = [*SPECIAL, *map(str, range(10)), "+", "="]
    made = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>", unk_token="<unk>")


def model(words: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """About 100,000 parameters."""
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, pad_token_id=0, eos_token_id=1, bos_token_id=None, dtype="float32",
    )  # fmt: skip
    return LlamaForCausalLM(config)


def main() -> None:
    """Train, and save the model in the folder `--out`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/sft-model", help="where the trained model goes")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    args = SFTConfig(
        output_dir=options.out, max_steps=options.steps, save_steps=25, logging_steps=25, learning_rate=3e-3,
        per_device_train_batch_size=8, gradient_accumulation_steps=BATCH // 8 // int(os.environ.get("WORLD_SIZE", "1")),
        use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    set_seed(args.seed)
    words = tokenizer()
    supervised = OttavaCallback("sums")
    trainer = SFTTrainer(
        model(words), args, train_dataset=questions(2000), processing_class=words, callbacks=[supervised]
    )
    trainer.train(resume_from_checkpoint=supervised.resume_from(trainer.args))
    trainer.save_model()


if __name__ == "__main__":
    main()
