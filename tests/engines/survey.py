"""Which shapes each engine loads right in which layout: found by loading them and comparing log-probabilities.

    python -m tests.engines.survey [--engine transformers|vllm] [--case NAME ...] [--layout NAME ...] [--json]

A case is a tiny model. On one engine, the log-probabilities of a layout are compared with those of the
`bf16` layout, which holds the same values; the unit is the engine's own arithmetic: the distance of its
`bf16` answers from Transformers in float32. `ratio` is the one over the other. A layout that is read right
stays near or below 1; a scale on wrong rows gives 10 and more.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ottava.checkpoint.convert import convert
from tests.engines.models import build, prompts, without_activations

ROOT = Path(__file__).parents[2]
INTERPRETERS = {
    "transformers": Path(sys.executable),
    "vllm": Path(os.environ.get("OTTAVA_VLLM_PYTHON", ROOT / ".venv-vllm/bin/python")),
}
"""The Python of each engine's environment."""

OPTIONS = {("vllm", "deepseek_v3"): {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}}
"""vLLM 0.32 rotates MLA's queries and keys wrongly on a CPU unless this operator is off: see rotary.py."""

LAYOUTS = ("deepseek", "e8m0", "mxfp8", "mxfp8-as-written")
"""`mxfp8` is loaded with its configuration's `input_activations` taken out, so that weights alone are compared."""

THRESHOLD = 2.0
"""Ratios below this are right, above it wrong. Measured: at most 0.6 where right, at least 3.1 where wrong."""

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-hidden-160": ("llama", {"hidden_size": 160}),
    "llama-hidden-192": ("llama", {"hidden_size": 192}),
    "llama-hidden-576": ("llama", {"hidden_size": 576}),
    "llama-hidden-80": ("llama", {"hidden_size": 80}),
    "llama-hidden-96": ("llama", {"hidden_size": 96}),
    "llama-qkv-192-64-64": ("llama", {"hidden_size": 384, "num_attention_heads": 3, "num_key_value_heads": 1}),
    "llama-qkv-256-64-64": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 1}),
    "llama-qkv-192-192-192": ("llama", {"hidden_size": 384, "num_attention_heads": 3, "num_key_value_heads": 3}),
    "llama-qkv-576-192-192": ("llama", {"hidden_size": 1152, "num_attention_heads": 9, "num_key_value_heads": 3}),
    "llama-mlp-160": ("llama", {"intermediate_size": 160}),
    "llama-mlp-192": ("llama", {"intermediate_size": 192}),
    "llama-mlp-224": ("llama", {"intermediate_size": 224}),
    "llama-mlp-576": ("llama", {"intermediate_size": 576}),
    "qwen3": ("qwen3", {}),
    "qwen3-hidden-576": ("qwen3", {"hidden_size": 576}),
    "qwen3-hidden-160": ("qwen3", {"hidden_size": 160}),
    "qwen3-qkv-576-192-192": ("qwen3", {"hidden_size": 1152, "num_attention_heads": 9, "num_key_value_heads": 3}),
    "qwen3-mlp-224": ("qwen3", {"intermediate_size": 224}),
    "deepseek": ("deepseek_v3", {}),
    "deepseek-heads-3": ("deepseek_v3", {"num_attention_heads": 3, "num_key_value_heads": 3}),
    "deepseek-hidden-160": ("deepseek_v3", {"hidden_size": 160}),
    "deepseek-hidden-576": ("deepseek_v3", {"hidden_size": 576}),
    "deepseek-q-rank-192": ("deepseek_v3", {"q_lora_rank": 192}),
    "deepseek-q-rank-224": ("deepseek_v3", {"q_lora_rank": 224}),
    "deepseek-no-q-rank": ("deepseek_v3", {"q_lora_rank": None}),
    "deepseek-kv-rank-128": ("deepseek_v3", {"kv_lora_rank": 128, "qk_rope_head_dim": 128}),
    "deepseek-experts-160": ("deepseek_v3", {"moe_intermediate_size": 160}),
    "deepseek-experts-192": ("deepseek_v3", {"moe_intermediate_size": 192}),
    "deepseek-experts-224": ("deepseek_v3", {"moe_intermediate_size": 224}),
    "deepseek-experts-192-unshared": ("deepseek_v3", {"moe_intermediate_size": 192, "n_shared_experts": 2}),
}
"""Name -> architecture and what differs from `models.ARCHITECTURES`, where every dimension is a multiple of 128."""


@dataclass(frozen=True)
class Finding:
    """What an engine did with one layout of one case. distance, unit: mean absolute difference of log-probabilities."""

    engine: str
    version: str
    case: str
    layout: str
    distance: float | None = None
    unit: float | None = None
    error: str | None = None

    @property
    def ratio(self) -> float | None:
        """distance / unit; None where the engine refused."""
        return None if self.distance is None or not self.unit else self.distance / self.unit

    @property
    def verdict(self) -> str:
        """right, wrong (silently), or raises."""
        if self.ratio is None:
            return "raises"
        return "right" if self.ratio < THRESHOLD else "wrong"


def folders(root: Path, case: str, layouts: Iterable[str] = LAYOUTS) -> dict[str, Path]:
    """Build a case and write its layouts under `root`; {"source", "bf16", layout...} -> folder."""
    architecture, changes = CASES[case]
    found = {"source": root / case / "source"}
    if not found["source"].exists():
        build(found["source"], architecture, **changes)
    for layout in ("bf16", *layouts):
        found[layout] = root / case / layout
        if not found[layout].exists():
            convert({"source": found["source"], "out": found[layout], "layout": layout.removesuffix("-as-written")})
            if layout == "mxfp8":
                without_activations(found[layout])
    return found


def ask(engine: str, models: Mapping[str, tuple[Path, Mapping[str, Any]]], work: Path) -> dict[str, dict[str, Any]]:
    """Load folders (with options) in an engine's own environment; what each answered, arrays or an error."""
    answers = {key: work / f"{engine}-{number}.npz" for number, key in enumerate(models)}
    request = work / f"{engine}.json"
    asked = [
        {"folder": str(folder), "out": str(answers[key]), "options": options}
        for key, (folder, options) in models.items()
    ]
    request.write_text(json.dumps({"prompts": prompts(), "models": asked}))
    script = Path(__file__).with_name(f"run_{engine}.py")
    done = subprocess.run([INTERPRETERS[engine], script, request], capture_output=True, text=True)
    missing = [key for key, path in answers.items() if not path.exists()]
    if missing:
        raise RuntimeError(f"{engine} did not answer for {missing}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    out: dict[str, dict[str, Any]] = {}
    for key, path in answers.items():
        with np.load(path) as file:
            out[key] = {name: file[name] if file[name].ndim else str(file[name]) for name in file.files}
    return out


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """The mean absolute difference of log-probabilities over prompts, positions and the vocabulary."""
    return float(np.abs(a.astype(np.float64) - b).mean())


def survey(engine: str, cases: Iterable[str], layouts: Iterable[str], root: Path) -> list[Finding]:
    """Findings for cases x (bf16 and layouts) on one engine; models and answers are kept under `root`."""
    models: dict[str, tuple[Path, Mapping[str, Any]]] = {}
    exact: dict[str, tuple[Path, Mapping[str, Any]]] = {}
    for case in cases:
        options = OPTIONS.get((engine, CASES[case][0]), {})
        written = folders(root, case, layouts)
        exact[case] = written["bf16"], {"dtype": "float32"}
        models |= {f"{case}/{name}": (path, options) for name, path in written.items() if name != "source"}
    truth, found = ask("transformers", exact, root), ask(engine, models, root)
    return [_judge(engine, *key.split("/"), found, truth) for key in found]


def _judge(
    engine: str, case: str, layout: str, found: Mapping[str, dict[str, Any]], truth: Mapping[str, dict[str, Any]]
) -> Finding:
    answer, bf16 = found[f"{case}/{layout}"], found[f"{case}/bf16"]
    about = {"engine": engine, "version": answer["version"], "case": case, "layout": layout}
    if "error" in answer:
        return Finding(**about, error=answer["error"])
    reference = truth[case] if layout == "bf16" else bf16
    unit = distance(bf16["batched"], truth[case]["batched"])
    return Finding(**about, distance=distance(answer["batched"], reference["batched"]), unit=unit)


def main() -> None:
    """Print one line, or one JSON object, for each finding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=sorted(INTERPRETERS), action="append")
    parser.add_argument("--case", choices=list(CASES), action="append")
    parser.add_argument("--layout", choices=LAYOUTS, action="append")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        for engine in args.engine or sorted(INTERPRETERS):
            for finding in survey(engine, args.case or CASES, args.layout or LAYOUTS, Path(root)):
                if args.json:
                    print(json.dumps({**asdict(finding), "ratio": finding.ratio, "verdict": finding.verdict}))
                    continue
                about = " ".join((finding.error or f"{finding.ratio:.2f} x {finding.unit:.4f}").split())[:160]
                print(f"{engine:13}{finding.case:32}{finding.layout:18}{finding.verdict:8}{about}", flush=True)


if __name__ == "__main__":
    main()
