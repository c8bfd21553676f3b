"""What ties a code base to CUDA, and what each of these has on Ascend: read from its text, nothing is run.

The table is this project's reading of torch_npu's and CANN's public documents (level L0). It finds what has a name; a
kernel's speed, or numbers that come out otherwise, have none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ottava.errors import DataError

Verdict = Literal["same", "replace", "rewrite", "missing"]
"""same: works as it is once torch_npu is imported; replace: another name or setting; rewrite: work for a programmer;
missing: A2 and A3 have nothing for it."""

VERDICTS: tuple[Verdict, ...] = ("same", "replace", "rewrite", "missing")
SUFFIXES = (".py", ".pyx", ".cu", ".cuh", ".cpp", ".cc", ".h", ".hpp", ".sh", ".toml", ".cfg", ".txt", ".yaml", ".yml")
SKIPPED = {".git", ".venv", "venv", "node_modules", "__pycache__", "build", "dist", ".mypy_cache", "site-packages"}
MOST_BYTES = 2 << 20
SHOWN = 120


@dataclass(frozen=True)
class Tie:
    """A kind of lock-in. pattern: how it looks in a line; on_ascend: what there is instead."""

    kind: str
    pattern: str
    verdict: Verdict
    on_ascend: str
    suffixes: tuple[str, ...] = SUFFIXES


CODE = (".py", ".pyx")
NATIVE = (".cu", ".cuh", ".cpp", ".cc", ".h", ".hpp")

TIES = (
    Tie("CUDA kernel", r"__global__\s|<<<.+>>>|\bblockIdx\.|\bthreadIdx\.", "rewrite",
        "Ascend C, or a Triton kernel through triton-ascend", NATIVE),
    Tie("CUDA extension",
        r"\b(CUDAExtension|load_inline|cpp_extension\.load)\b|\b(import|from) (pycuda|numba\.cuda)\b"
        r"|\bfrom numba import cuda\b", "rewrite",
        "torch_npu.utils.cpp_extension.NpuExtension, with kernels written anew", CODE),
    Tie("inline PTX", r"\basm\s+volatile|\basm\s*\(\s*\"", "rewrite",
        "nothing reads PTX; write the kernel in Ascend C", NATIVE),
    Tie("CUDA library",
        r"\b(cublas|cudnn|cufft|cusparse|cutlass|nvshmem)\w*\.(h|hpp)\b|\b(cublas|cudnn)[A-Z]\w+\(|\b(cub|thrust)/",
        "rewrite", "CANN's aclnn operators", NATIVE),
    Tie("CUDA runtime", r"\bcuda[A-Z]\w+\(|\bcuda_runtime\w*\.h\b|\b(ATen|c10)/cuda/", "rewrite",
        "AscendCL (aclrt*) and torch_npu's C++ headers", NATIVE),
    Tie("Triton kernel", r"@triton\.(jit|autotune)|\bimport (\w+, )*triton\b|\bfrom triton\b", "replace",
        "triton-ascend takes most of the language; tile sizes are chosen anew, FP8 types only on the 950", CODE),
    Tie("torch.cuda",
        r"\btorch\.cuda\.(?!amp)\w+|\b(import|from) torch\.cuda\b(?!\.amp)|\bfrom torch import cuda\b", "replace",
        "torch.npu.* has the same names; torch_npu.contrib.transfer_to_npu redirects them at run time", CODE),
    Tie("autocast by vendor", r"\btorch\.cuda\.amp\b", "replace", "torch.amp.autocast(\"npu\")", CODE),
    Tie("hard-coded device",
        r"[\"']cuda(:\d+)?[\"']|[\"']cuda:\{|\.cuda\(|\.is_cuda\b|^\s*device\s*[:=]\s*cuda\b", "replace",
        "the device from one place: torch.accelerator.current_accelerator(), or \"npu\"",
        (*CODE, ".yaml", ".yml", ".cfg", ".toml")),
    Tie("CUDA back end's switch", r"\btorch\.backends\.(cuda|cudnn)\b", "replace",
        "torch.npu.matmul.allow_hf32 and torch.npu.conv.allow_hf32; torch.use_deterministic_algorithms", CODE),
    Tie("NCCL", r"[\"'](cpu:gloo,)?(cuda:)?nccl[\"']|\bNCCL_\w+", "replace",
        "backend \"hccl\" and HCCL_* variables; float64 is moved but not reduced"),
    Tie("visible devices", r"\bCUDA_VISIBLE_DEVICES\b", "replace", "ASCEND_RT_VISIBLE_DEVICES"),
    Tie("CUDA setting",
        r"\b(CUDA_LAUNCH_BLOCKING|CUBLAS_WORKSPACE_CONFIG|PYTORCH_CUDA_ALLOC_CONF|TORCH_CUDA_ARCH_LIST)\b",
        "replace", "ASCEND_LAUNCH_BLOCKING, HCCL_DETERMINISTIC, PYTORCH_NPU_ALLOC_CONF"),
    Tie("CUDA graphs", r"\bCUDAGraph\b|\bcuda_graph|\bmake_graphed_callables\b", "replace",
        "torch.npu.NPUGraph; what may be captured differs", CODE),
    Tie("FP8 type", r"\bfloat8_e(4m3|5m2)\w*|(\b|_)scaled_mm\b|\bDelayedScaling\b", "missing",
        "910B and 910C have no FP8: BF16 holds the same values; the 950 takes E4M3 with 1x32 scales (MXFP8)", CODE),
    Tie("transformer_engine", r"\bimport transformer_engine|\bfrom transformer_engine", "missing",
        "no port; MindSpeed has FP8 layers for the 950", CODE),
    Tie("flash-attn", r"\b(import|from) flash_attn", "replace",
        "scaled_dot_product_attention, or torch_npu.npu_fusion_attention, which rounds otherwise", CODE),
    Tie("xformers or apex", r"\b(import|from) (xformers|apex)\b", "replace",
        "torch's own, or Ascend's port of apex", CODE),
    Tie("DeepSpeed", r"\b(import|from) deepspeed\b", "replace",
        "NPUs are among its accelerators; which of its own operators are there, its ds_report says", CODE),
    Tie("CuPy", r"\b(import|from) cupy\b", "rewrite", "torch, or numpy on the host", CODE),
    Tie("bitsandbytes", r"\b(import|from) bitsandbytes\b", "missing", "no kernels for NPUs in its releases", CODE),
    Tie("DeepGEMM or DeepEP", r"\b(import|from) (deep_gemm|deep_ep)\b", "missing",
        "CANN's grouped matmul and HCCL's all-to-all", CODE),
    Tie("NVML", r"\b(import|from) (pynvml|py3nvml)\b|\bnvidia-smi\b", "replace", "npu-smi; torch.npu.mem_get_info"),
    Tie("vendor package",
        r"^\s*[\"']?(nvidia-|cupy|triton\b|flash[-_]attn|onnxruntime-gpu|bitsandbytes|xformers)[\w-]*"
        r"|\+cu\d\d|/whl/cu\d\d", "replace",
        "leave it out on Ascend: torch's CPU build and torch_npu", (".txt", ".toml", ".cfg")),
    Tie("float64 on the device", r"\.double\(\)|torch\.float64", "same",
        "computed, at a fraction of the speed; HCCL does not reduce it", CODE),
)  # fmt: skip


def scan(path: Path) -> dict[str, Any]:
    """What is found in a file or folder, worst first; of the places the first few.

    {"files", "findings": [{"kind", "verdict", "on_ascend", "places": [{"file", "line", "text"}], "count"}], "verdicts",
    "level"}. Raises DataError where there is nothing to read.
    """
    if not path.exists():
        raise DataError("there is no such file or folder", where=path, fix="name a code base")
    files = sorted(_files(path)) if path.is_dir() else [path]
    if not files or not (path.is_dir() or path.is_file()):  # a pipe would be waited for
        raise DataError(f"no source files ({', '.join(SUFFIXES[:7])}, ...)", where=path, fix="name a code base")
    found: dict[str, list[dict[str, Any]]] = {}
    for file in files:
        for tie, number, line in _ties(file):
            name = str(file.relative_to(path)) if path.is_dir() else file.name
            found.setdefault(tie.kind, []).append({"file": name, "line": number, "text": line.strip()[:SHOWN]})
    findings = [
        {"kind": tie.kind, "verdict": tie.verdict, "on_ascend": tie.on_ascend, "places": found[tie.kind][:5],
         "count": len(found[tie.kind])}
        for tie in sorted(TIES, key=lambda tie: -VERDICTS.index(tie.verdict)) if tie.kind in found
    ]  # fmt: skip
    counts = {
        verdict: sum(len(found.get(tie.kind, ())) for tie in TIES if tie.verdict == verdict) for verdict in VERDICTS
    }
    return {"files": len(files), "findings": findings, "verdicts": counts, "level": "L0"}


def _files(folder: Path) -> Iterator[Path]:
    for child in sorted(folder.iterdir()):
        if child.is_symlink() or child.name in SKIPPED:
            continue
        if child.is_dir():
            yield from _files(child)
        elif child.is_file() and child.suffix in SUFFIXES and child.stat().st_size <= MOST_BYTES:
            yield child


def _ties(file: Path) -> Iterator[tuple[Tie, int, str]]:
    """Every tie of every line; comments count too, as they often hold what is switched on later."""
    mine = [(tie, re.compile(tie.pattern)) for tie in TIES if file.suffix in tie.suffixes]
    for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1):
        yield from ((tie, number, line) for tie, pattern in mine if pattern.search(line))
