"""Teacher-forced log-probabilities of several model folders under vLLM on CPU; runs inside vLLM's own environment.

    python run_vllm.py REQUEST.json          the answers go to the paths that the request names

REQUEST.json: {"prompts": [[token, ...], ...] of equal lengths, "models": [{"folder", "out", "options": {...}}, ...]}.
Each model is loaded by a process of its own, forked after vLLM's slow import: what one leaves behind cannot
reach the next. An answer is an .npz: `batched` and `single` [prompts, tokens - 1, vocabulary], or `error` (str).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "KMP_BLOCKTIME": "0",
    "HF_HUB_OFFLINE": "1",
}
for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)

import numpy as np  # noqa: E402
import vllm  # noqa: E402


def log_probabilities(llm: Any, prompts: list[list[int]], vocabulary: int) -> np.ndarray:
    """Of every token of the vocabulary at every position but the first: [prompts, tokens - 1, vocabulary], float32."""
    asked = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=vocabulary)
    answers = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], asked, use_tqdm=False)
    out = np.full((len(prompts), len(prompts[0]) - 1, vocabulary), np.nan, dtype=np.float32)
    for row, answer in zip(out, answers, strict=True):
        for position, found in zip(row, answer.prompt_logprobs[1:], strict=True):
            for token, entry in found.items():
                position[token] = entry.logprob
    return out


def answer(model: dict[str, Any], prompts: list[list[int]]) -> None:
    """Load one folder, write its answer. Any exception is the answer: a refusal to load is a finding."""
    found: dict[str, Any]
    try:
        vocabulary = json.loads((Path(model["folder"]) / "config.json").read_text())["vocab_size"]
        options = {
            "max_model_len": 128,
            "max_num_batched_tokens": 512,
            "max_num_seqs": len(prompts),
            "enforce_eager": True,
            "dtype": "bfloat16",
        }
        llm = vllm.LLM(
            model["folder"], skip_tokenizer_init=True, enable_prefix_caching=False, max_logprobs=vocabulary, seed=0,
            disable_log_stats=True, **{**options, **model.get("options", {})},
        )  # fmt: skip
        batched = log_probabilities(llm, prompts, vocabulary)
        single = np.concatenate([log_probabilities(llm, [prompt], vocabulary) for prompt in prompts])
        found = {"batched": batched, "single": single}
    except BaseException as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    np.savez(model["out"], version=vllm.__version__, **found)


def main() -> None:
    """Answer the request named on the command line."""
    request = json.loads(Path(sys.argv[1]).read_text())
    forking = multiprocessing.get_context("fork")
    for model in request["models"]:
        child = forking.Process(target=answer, args=(model, request["prompts"]))
        child.start()
        child.join()


if __name__ == "__main__":
    main()
