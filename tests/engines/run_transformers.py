"""Teacher-forced log-probabilities of several model folders under Transformers on CPU: `run_vllm.py`'s twin.

    python run_transformers.py REQUEST.json

The same request, the same answers; `options` are arguments of `from_pretrained`. FP8 folders go through
Transformers' own loader, which on a CPU writes the weights out in BF16; no activation is quantised.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers


@torch.inference_mode()
def log_probabilities(model: Any, prompts: list[list[int]]) -> np.ndarray:
    """Of every token of the vocabulary at every position but the first: [prompts, tokens - 1, vocabulary], float32."""
    logits = model(torch.tensor(prompts), use_cache=False).logits[:, :-1]
    return torch.log_softmax(logits.float(), -1).numpy()


class Reasons(logging.Handler):
    """Keeps the errors that Transformers logs before it raises one that says less."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the lines of a record that name an error."""
        self.found += re.findall(r"^(?:\w+Error|Error): .*$", record.getMessage(), re.MULTILINE)


def answer(request: dict[str, Any], prompts: list[list[int]]) -> None:
    """Load one folder, write its answer. Any exception is the answer: a refusal to load is a finding."""
    found: dict[str, Any]
    reasons = Reasons()
    logging.getLogger("transformers").addHandler(reasons)
    try:
        options = {"dtype": torch.bfloat16, "attn_implementation": "eager"} | request.get("options", {})
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            request["folder"], output_loading_info=True, **options
        )
        strange = {key: sorted(map(str, names)) for key, names in loading.items() if names}
        if strange:
            raise ValueError(f"the folder's tensors are not the model's: {strange}")
        batched = log_probabilities(model.eval(), prompts)
        found = {"batched": batched, "single": np.concatenate([log_probabilities(model, [p]) for p in prompts])}
    except Exception as error:
        found = {"error": " | ".join([*reasons.found[:2], f"{type(error).__name__}: {error}"])}
    logging.getLogger("transformers").removeHandler(reasons)
    np.savez(request["out"], version=transformers.__version__, **found)


def main() -> None:
    """Answer the request named on the command line."""
    torch.set_num_threads(1)
    request = json.loads(Path(sys.argv[1]).read_text())
    for model in request["models"]:
        answer(model, request["prompts"])


if __name__ == "__main__":
    main()
