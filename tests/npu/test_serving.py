"""vllm-ascend's launch line against the published package's own sources: nothing of it was run."""

from __future__ import annotations

import ast
import importlib.util
from importlib import metadata
from pathlib import Path

import pytest

from ottava.checkpoint.convert import convert
from ottava.gateway import engines
from tests.engines.models import build


def sources() -> Path:
    spec = importlib.util.find_spec("vllm_ascend")
    assert spec is not None
    assert spec.submodule_search_locations, "vllm-ascend is not installed: make .venv-npu/installed"
    return Path(spec.submodule_search_locations[0])


def constants(file: str) -> dict[str, object]:
    """The constants of a module of vllm-ascend, read from its text."""
    tree = ast.parse((sources() / file).read_text())
    return {
        target.id: node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def test_the_quantisation_that_the_line_names_is_the_packages_own(tmp_path: Path) -> None:
    build(tmp_path / "m", "llama")
    asked = {"source": str(tmp_path / "m"), "out": str(tmp_path / "950"), "layout": "mxfp8", "engine": "vllm-ascend"}
    convert(asked)
    chosen = engines.Choice("vllm-ascend", "python")
    line = engines.command(chosen, tmp_path / "950", Path("/s/vllm.sock"), 4)
    assert line[line.index("--quantization") + 1] == constants("utils.py")["ASCEND_QUANTIZATION_METHOD"]
    plain = engines.command(chosen, tmp_path / "m", Path("/s/vllm.sock"), 4)
    assert "--quantization" not in plain
    assert plain[plain.index("--dtype") + 1] == "bfloat16"


def test_log_probabilities_are_those_that_the_line_asks_for() -> None:
    """Its sampler takes vLLM's modes, and has the one of the line for its default."""
    line = engines.command(engines.Choice("vllm-ascend", "python"), Path(), Path("/s/vllm.sock"), 4)
    assert line[line.index("--logprobs-mode") + 1] == constants("sample/sampler.py")["DEFAULT_LOGPROBS_MODE"]


def test_the_package_is_a_plug_in_that_vllm_finds_by_itself() -> None:
    """So the command is vLLM's, and no option or setting names the platform."""
    groups = {entry.group for entry in metadata.distribution("vllm-ascend").entry_points}
    assert {"vllm.platform_plugins", "vllm.general_plugins"} <= groups
    assert engines.KINDS["vllm-ascend"].package == "vllm-ascend"


@pytest.mark.parametrize("name", sorted({*engines.PRIVATE, *engines.KINDS["vllm-ascend"].settings}))
def test_no_setting_of_ours_is_read_by_it_otherwise(name: str) -> None:
    """The environment variables of the line are vLLM's or Hugging Face's; where the package reads one, as vLLM does."""
    own = (sources() / "envs.py").read_text()
    assert f'"{name}"' not in own
