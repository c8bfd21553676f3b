"""The migration probe: what a model or a code base needs on Ascend, against models and code that are known."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ottava import cli
from ottava.checkpoint.convert import convert
from ottava.errors import DataError, RecipeError
from ottava.models import migrate
from ottava.platforms import lockin
from ottava.platforms.ascend import chips

from .engines.models import build


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("migrate")
    build(root / "m", "deepseek_v3")
    convert({"source": str(root / "m"), "out": str(root / "master")})
    return root / "master"


@pytest.mark.parametrize(
    ("chip", "recommended", "fp8"),
    [("910B", "bf16", "emulated"), ("910C", "bf16", "emulated"), ("950PR", "mxfp8", "native"),
     ("950DT", "mxfp8", "native"), ("310P", "fp16", "lossy")],
)  # fmt: skip
def test_a_model_on_every_chip(master: Path, chip: str, recommended: str, fp8: str) -> None:
    found = migrate.probe(master, chip)
    assert (found["chip"], found["recommended"], found["level"]) == (chip, recommended, "L0")
    kinds = {entry["dtype"]: entry["status"] for entry in found["dtypes"]}
    assert kinds["F8_E4M3"] == kinds["F8_E8M0"] == fp8
    assert kinds["BF16"] == ("lossy" if chip == "310P" else "native")
    int8 = found["layouts"]["int8"]
    assert int8["serves"] in ("lossily", "no"), "INT8 is never exact"
    assert found["operators"]["missing"] == []
    assert found["operators"]["needed"] > 20
    assert all(answer["source"] for answer in found["layouts"].values())


def test_a_missing_operator_is_named(monkeypatch: pytest.MonkeyPatch, master: Path) -> None:
    """The oracle can fail: without softmax in the list, attention cannot be computed there."""
    listed = migrate.wheel.operators() - {"_softmax"}
    monkeypatch.setattr(migrate.wheel, "operators", lambda: listed)
    found = migrate.probe(master, "910B")
    assert found["operators"]["missing"] == ["aten::_softmax"]
    assert found["verdict"] == "incomplete"


def test_an_unknown_architecture_has_no_answer_about_operators() -> None:
    found = migrate.operators({"model_type": "mamba9"})
    assert found["needed"] is None
    assert "mamba9" in found["why"]
    assert "\n" not in found["why"]


def changed(master: Path, folder: Path, **fields: Any) -> Path:
    """The master with other fields in its config."""
    shutil.copytree(master, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


def test_nothing_is_called_exact_whose_operators_are_not_known(master: Path, tmp_path: Path) -> None:
    assert migrate.probe(changed(master, tmp_path / "m", model_type="mamba9"), "910B")["verdict"] == "incomplete"


@pytest.mark.parametrize("key", ["num_hidden_layers", "first_k_dense_replace"])
@pytest.mark.parametrize("value", ["many", -3, [1], 2.5])
def test_a_number_of_layers_that_is_none_is_named(key: str, value: Any) -> None:
    found = migrate.operators({"model_type": "deepseek_v3", "num_hidden_layers": 2, key: value})
    assert found["needed"] is None
    assert f"{key} in config.json is {value!r}" in found["why"]


def test_other_chips_are_refused(master: Path) -> None:
    with pytest.raises(RecipeError, match="no Ascend chip"):
        migrate.probe(master, "H100")
    with pytest.raises(RecipeError, match="a chip 'tpu'"):
        migrate.probe(master, "tpu")
    with pytest.raises(RecipeError, match="910Banana is no SoC"):
        migrate.probe(master, "910Banana")
    names = {"Ascend910_9391": "910C", "Ascend 910B": "910B", "ascend910b4": "910B", "ASCEND-910B2": "910B"}
    assert {name: migrate.probe(master, name)["chip"] for name in names} == names
    assert set(chips.CHIPS) == {"910B", "910C", "950PR", "950DT", "310P"}


LINES = {
    "CUDA kernel": ("k.cu", "__global__ void add(float* x) { x[threadIdx.x] += 1; }"),
    "CUDA extension": ("setup.py", "ext_modules=[CUDAExtension('x', ['x.cu'])]"),
    "inline PTX": ("k.cuh", 'asm volatile("mov.u32 %0, %laneid;" : "=r"(l));'),
    "CUDA library": ("g.cpp", "#include <cublas_v2.h>"),
    "CUDA runtime": ("g.cpp", "cudaMemcpyAsync(a, b, n, kind, stream);"),
    "Triton kernel": ("t.py", "@triton.jit"),
    "torch.cuda": ("a.py", "torch.cuda.synchronize()"),
    "autocast by vendor": ("a.py", "with torch.cuda.amp.autocast():"),
    "hard-coded device": ("a.py", 'x = torch.zeros(3, device="cuda:0")'),
    "NCCL": ("d.py", 'dist.init_process_group("nccl")'),
    "visible devices": ("run.sh", "export CUDA_VISIBLE_DEVICES=0"),
    "CUDA setting": ("run.sh", "export CUBLAS_WORKSPACE_CONFIG=:4096:8"),
    "CUDA graphs": ("a.py", "g = torch.cuda.CUDAGraph()"),
    "CUDA back end's switch": ("a.py", "torch.backends.cudnn.benchmark = True"),
    "DeepSpeed": ("t.py", "import deepspeed"),
    "CuPy": ("t.py", "import cupy as cp"),
    "FP8 type": ("q.py", "w.to(torch.float8_e4m3fn)"),
    "transformer_engine": ("m.py", "import transformer_engine.pytorch as te"),
    "flash-attn": ("m.py", "from flash_attn import flash_attn_func"),
    "xformers or apex": ("m.py", "from apex.normalization import FusedLayerNorm"),
    "bitsandbytes": ("m.py", "import bitsandbytes as bnb"),
    "DeepGEMM or DeepEP": ("m.py", "import deep_gemm"),
    "NVML": ("w.py", "import pynvml"),
    "vendor package": ("requirements.txt", "nvidia-cublas-cu12==12.4"),
    "float64 on the device": ("n.py", "x = x.double()"),
}
"""A line for every kind of tie, in a file where it belongs."""


def test_every_kind_has_a_line_that_shows_it() -> None:
    assert set(LINES) == {tie.kind for tie in lockin.TIES}


@pytest.mark.parametrize("kind", LINES)
def test_a_tie_is_found_where_it_is(kind: str, tmp_path: Path) -> None:
    name, line = LINES[kind]
    (tmp_path / name).write_text(f"\n{line}\n")
    finding = next(f for f in lockin.scan(tmp_path)["findings"] if f["kind"] == kind)
    assert finding["places"] == [{"file": name, "line": 2, "text": line.strip()}]
    assert finding["on_ascend"]


OTHERWISE = [
    ("CUDA extension", "a.py", "from numba import cuda"),
    ("CUDA library", "a.cu", "#include <cub/cub.cuh>"),
    ("CUDA runtime", "a.cpp", "#include <ATen/cuda/CUDAContext.h>"),
    ("Triton kernel", "a.py", "import torch, triton"),
    ("Triton kernel", "a.py", "from triton import jit"),
    ("torch.cuda", "a.py", "import torch.cuda as tc"),
    ("torch.cuda", "a.py", "from torch.cuda import Stream"),
    ("torch.cuda", "a.py", "from torch import cuda"),
    ("hard-coded device", "a.py", "x.to(f'cuda:{rank}')"),
    ("hard-coded device", "a.py", "if x.is_cuda:"),
    ("hard-coded device", "c.yaml", "device: cuda"),
    ("NCCL", "a.py", 'init_process_group("cpu:gloo,cuda:nccl")'),
    ("FP8 type", "a.py", "torch._scaled_mm(a, b)"),
    ("vendor package", "requirements.txt", "torch==2.4.0+cu121"),
    ("vendor package", "requirements.txt", "triton>=3"),
    ("vendor package", "requirements.txt", "bitsandbytes==0.43"),
]
"""The same ties, as they are also written."""


@pytest.mark.parametrize(("kind", "name", "line"), OTHERWISE)
def test_a_tie_is_found_as_it_is_also_written(kind: str, name: str, line: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(line + "\n")
    assert [finding["kind"] for finding in lockin.scan(tmp_path)["findings"]] == [kind]


PORTABLE = """
device = torch.accelerator.current_accelerator()
x = torch.zeros(3, device=device).to(torch.bfloat16)
dist.init_process_group(backend=backend)  # cudagraphs, nccl-like and barracuda are only words here
"""


def test_portable_code_has_no_ties(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(PORTABLE)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "b.py").write_text("import torch; torch.cuda.init()")
    found = lockin.scan(tmp_path)
    assert (found["findings"], found["files"], set(found["verdicts"].values())) == ([], 1, {0})


def test_worst_comes_first_and_places_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("import bitsandbytes\n" + 'x.to("cuda")\n' * 9)
    found = lockin.scan(tmp_path)
    assert [(f["kind"], f["count"], len(f["places"])) for f in found["findings"]] == [
        ("bitsandbytes", 1, 1), ("hard-coded device", 9, 5),
    ]  # fmt: skip
    assert found["verdicts"] == {"same": 0, "replace": 9, "rewrite": 0, "missing": 1}


def test_this_project_keeps_its_vendors_in_one_place() -> None:
    """By its own probe: what names a vendor's API stands in platforms/, and in text that is about it."""
    found = lockin.scan(Path(lockin.__file__).parents[1])
    calls = next(f for f in found["findings"] if f["kind"] == "torch.cuda")
    assert {place["file"].split("/")[0] for place in calls["places"]} == {"platforms"}


def test_nothing_to_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        lockin.scan(tmp_path / "none")
    with pytest.raises(DataError, match="no source files"):
        lockin.scan(tmp_path)
    os.mkfifo(tmp_path / "pipe.py")  # nobody will ever write into it
    for path in (tmp_path, tmp_path / "pipe.py"):
        with pytest.raises(DataError, match="no source files"):
            lockin.scan(path)


def told(*words: str) -> Any:
    return CliRunner().invoke(cli.app, ["doctor", *words])


def test_the_command_line(master: Path, tmp_path: Path) -> None:
    asked = ("--model", str(master), "--chip", "Ascend910B3")
    found = told(*asked, "--json")
    assert found.exit_code == 0
    said = json.loads(found.stdout)
    assert said["verdict"] == "exact"
    lines = told(*asked).stdout.splitlines()
    assert lines[-1] == "verdict    exact; recommended: bf16"
    assert sum(line.startswith("layout ") for line in lines) == len(said["layouts"])
    (tmp_path / "a.py").write_text('x.to("cuda")\n')
    assert "hard-coded device (1)" in told("--code", str(tmp_path)).stdout
    for words in (["--model", str(master)], ["--chip", "910B"], ["--code", "x", "--model", "y", "--chip", "z"]):
        assert isinstance(told(*words).exception, RecipeError)
