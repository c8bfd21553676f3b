"""vLLM's side of benchmarks.serving, run in vLLM's environment: python serving_vllm.py FOLDER.

Each line of standard input is [prompts, ids of a reply]; each answer is [CPU seconds, vLLM's version].
"""

from __future__ import annotations

import json
import os
import sys
import time

for name, value in {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "KMP_BLOCKTIME": "0",
}.items():
    os.environ.setdefault(name, value)

import vllm  # noqa: E402


def main() -> None:
    """Answer until standard input ends."""
    llm = vllm.LLM(
        sys.argv[1], skip_tokenizer_init=True, enable_prefix_caching=False, dtype="bfloat16", max_model_len=1024,
        max_num_seqs=16, max_num_batched_tokens=1024, seed=0, disable_log_stats=True,
    )  # fmt: skip
    for line in sys.stdin:
        prompts, new = json.loads(line)
        how = vllm.SamplingParams(max_tokens=new, min_tokens=new, temperature=0.0, ignore_eos=True, detokenize=False)
        begun = time.process_time()
        found = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], how, use_tqdm=False)
        seconds = time.process_time() - begun
        assert all(len(answer.outputs[0].token_ids) == new for answer in found)
        print(json.dumps([seconds, vllm.__version__]), flush=True)


if __name__ == "__main__":
    main()
