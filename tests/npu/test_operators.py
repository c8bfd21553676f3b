"""Level L0: what Ottava calls is in the wheel's own list of functions. Whether it computes right is not asked."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ottava.models.load import load
from ottava.platforms import npu
from ottava.platforms.ascend import wheel
from ottava.trainer.start import make_trainer
from tests.engines.models import build
from tests.test_trainer import base, spec

LACKING = {"aten::copysign.out"}
"""Operators that torch_npu has not: it copies their operands to the host, computes there and says so (a warning)."""


class Called(TorchDispatchMode):
    """The names of all operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def lacking(names: set[str]) -> set[str]:
    """Those that are neither in the wheel's list nor made by torch of others."""
    path = wheel.schemas()
    assert path is not None
    there = wheel.listed(path)

    def composed(name: str) -> bool:
        keys = ("CompositeExplicitAutograd", "CompositeImplicitAutograd")
        return any(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in keys)

    return {name for name in names if name.partition("::")[2] not in there and not composed(name)}


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp8"])
def test_a_step_of_training(dataset: Path, precision: str) -> None:
    args = base(dataset, spec(precision=precision, grid_from=0.0)) | {"platform": "npu"}
    with Called() as called:
        trainer = make_trainer(args)
        trainer.step(lambda total: total, range(trainer.spec.virtual_shards))
        trainer.state.snapshot()
    assert len(called.names) > 60
    assert lacking(called.names) <= LACKING


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "deepseek_v3"])
def test_a_forward_pass(tmp_path: Path, architecture: str) -> None:
    model = load(build(tmp_path / "m", architecture)).to("npu")
    with Called() as called, torch.no_grad():
        model(input_ids=torch.arange(8, device="npu")[None])
    assert len(called.names) > 20
    assert lacking(called.names) == set()


def test_the_oracle_can_fail() -> None:
    assert lacking({"aten::_cslt_sparse_mm", "aten::add.Tensor"}) == {"aten::_cslt_sparse_mm"}


def test_functions_that_the_platform_calls_are_exported() -> None:
    """By the text of both sides: `_torch_npu().npu.X`, and X in what torch_npu/npu/__init__.py binds."""
    tree = ast.parse(Path(npu.__file__).read_text())
    called = set()
    for node in ast.walk(tree):
        chain = []
        while isinstance(node, ast.Attribute):
            chain.append(node.attr)
            node = node.value
        known = isinstance(node, ast.Name) and node.id in ("npu", "torch_npu")
        known = known or (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "_torch_npu")
        parts = [part for part in reversed(chain) if part != "npu"]
        if known and parts and parts[0] != "__version__":
            called.add(parts[0])
    found = importlib.util.find_spec("torch_npu")
    assert found is not None
    assert found.submodule_search_locations
    source = ast.parse((Path(found.submodule_search_locations[0]) / "npu/__init__.py").read_text())
    bound = {alias.asname or alias.name for n in ast.walk(source) if isinstance(n, ast.ImportFrom) for alias in n.names}
    bound |= {n.name for n in ast.walk(source) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    bound |= {t.id for n in ast.walk(source) if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
    assigned = [(ast.unparse(n.targets[0]), n.value) for n in ast.walk(source) if isinstance(n, ast.Assign)]
    exported = [value for name, value in assigned if name == "__all__"]
    bound |= {name for names in exported for name in ast.literal_eval(names)}
    assert len(called) > 8
    assert called <= bound


def test_the_kept_names_are_the_wheels() -> None:
    path = wheel.schemas()
    assert path is not None
    assert wheel.operators() == wheel.listed(path)
