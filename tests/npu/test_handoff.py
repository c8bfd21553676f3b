"""What is handed to vllm-ascend, by the published package's own functions.

The package itself imports vLLM and CANN's operators. The functions that read a description and allot a layer's
parameters need neither: they are taken out of its files and called. Still no Ascend chip has loaded such a folder.
"""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ottava.checkpoint.ascend import DESCRIPTION
from ottava.checkpoint.convert import convert
from ottava.checkpoint.safetensors import entries, load
from tests.engines.models import build

PACKED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"],
}
"""As vLLM's own classes of Llama and DeepSeek have it (packed_modules_mapping)."""


def published(file: str, function: str, **names: Any) -> Callable[..., Any]:
    """A function of vllm-ascend, out of its file; names: what it uses of its module."""
    spec = importlib.util.find_spec("vllm_ascend")
    assert spec is not None
    assert spec.submodule_search_locations, "vllm-ascend is not installed: make .venv-npu/installed"
    tree = ast.parse((Path(spec.submodule_search_locations[0]) / "quantization" / file).read_text())
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == function]
    namespace: dict[str, Any] = {"Any": Any, "torch": torch, **names}
    exec(compile(ast.Module(found[:1], []), file, "exec"), namespace)
    made: Callable[..., Any] = namespace[function]
    return made


@pytest.fixture(scope="module", params=["llama", "deepseek_v3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("handed")
    build(root / "m", request.param)
    convert({"source": str(root / "m"), "out": str(root / "950"), "layout": "mxfp8", "engine": "vllm-ascend"})
    return root / "950"


def layers(folder: Path) -> set[str]:
    """Linear layers as vLLM names them, stacked ones as one."""
    modules = {name.removesuffix(".weight") for name, entry in entries(folder).items() if len(entry.shape) == 2}
    modules = {module for module in modules if not module.endswith("_scale") and ".experts." not in module}
    stacked = {part: whole for whole, parts in PACKED.items() for part in parts}
    split = (module.rpartition(".") for module in modules)
    return {f"{parent}{dot}{stacked.get(last, last)}" for parent, dot, last in split}


def test_every_layer_gets_its_type(folder: Path) -> None:
    read = published("modelslim_config.py", "get_linear_quant_type", logger=SimpleNamespace(error=print))
    description = json.loads((folder / DESCRIPTION).read_text())
    types = {layer: read(description, layer, PACKED) for layer in layers(folder)}
    plain = {layer.rpartition(".")[2] for layer, kind in types.items() if kind == "FLOAT"}
    assert plain <= {"embed_tokens", "lm_head", "gate"}
    assert set(types.values()) == {"FLOAT", "W8A8_MXFP8"}
    if any(".experts." in name for name in description):
        experts = {"experts": [f"experts.0.{part}_proj" for part in ("gate", "up", "down")]}
        assert read(description, "model.layers.1.mlp.experts", experts) == "W8A8_MXFP8"


def test_every_tensor_fits_what_is_allotted_for_it(folder: Path) -> None:
    file = "methods/w8a8_mxfp8.py"
    group = SimpleNamespace(group_size=json.loads((folder / DESCRIPTION).read_text())["group_size"])
    weight = published(file, "get_weight")
    scale = published(file, "get_pergroup_param", cdiv=lambda a, b: -(-a // b))
    its = entries(folder)
    checked = 0
    for name in its:
        if name + "_scale" in its:
            rows, columns = its[name].shape
            for suffix, allotted in (
                ("", weight(group, columns, rows, torch.bfloat16)["weight"]),
                ("_scale", scale(group, columns, rows, torch.bfloat16)["weight_scale"]),
            ):
                there = load(its[name + suffix])
                assert (there.dtype, there.shape) == (allotted.dtype, allotted.shape), name + suffix
                checked += 1
    assert checked
