"""The hand-off to vllm-ascend: what is written against the rules of those who read it, quoted with their source.

Not one of them ran here: the rules are read in documents and sources (level L0). tests/npu/test_handoff.py asks the
published package's own functions.
"""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from ottava.checkpoint.ascend import DESCRIPTION
from ottava.checkpoint.convert import convert
from ottava.checkpoint.engines import refuse
from ottava.checkpoint.safetensors import Entry, entries
from ottava.errors import CheckpointError
from ottava.models.load import load
from ottava.verify.weights import compare

from .engines.models import build


@pytest.fixture(scope="module", params=["llama", "deepseek_v3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in BF16."""
    return build(tmp_path_factory.mktemp("model") / "m", request.param)


@pytest.fixture(scope="module")
def handed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is handed over for a 950."""
    out = tmp_path_factory.mktemp("handed") / "950"
    convert({"source": str(model), "out": str(out), "layout": "mxfp8", "engine": "vllm-ascend"})
    return out


def described(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text())
    return found


def tensors(folder: Path) -> dict[str, Entry]:
    return entries(folder)


def test_every_tensor_has_its_type(handed: Path) -> None:
    """ascendv1.md: each tensor's name is a key of the description, and its quantisation type the value."""
    names = {key for key in described(handed) if key not in ("model_quant_type", "version", "group_size")}
    assert names == set(tensors(handed))


def test_the_parameters_of_one_layer_have_one_type(handed: Path) -> None:
    """ascendv1.md: all parameters of a linear layer (weight, scale and others) share one type."""
    found = described(handed)
    for name in tensors(handed):
        if name.endswith("_scale"):
            assert found[name] == found[name.removesuffix("_scale")] == "W8A8_MXFP8"
        elif name + "_scale" not in tensors(handed):
            assert found[name] == "FLOAT"


def test_the_facts_about_the_whole_are_there(handed: Path) -> None:
    """ascendv1.md: `model_quant_type` (the strongest of the model), `version` (now 1.0.0), `group_size`."""
    assert {key: described(handed)[key] for key in ("model_quant_type", "version", "group_size")} == {
        "model_quant_type": "W8A8_MXFP8", "version": "1.0.0", "group_size": 32,
    }  # fmt: skip


def test_the_configuration_says_nothing_of_quantisation(handed: Path, model: Path) -> None:
    """ascendv1.md: config.json is Hugging Face's without `quantization_config`; with a `quant_method` in it vllm-ascend
    0.23.0 (modelslim_config.py, override_quantization_method) leaves the folder to another reader."""
    config = json.loads((handed / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["architectures"] == json.loads((model / "config.json").read_text())["architectures"]


def test_shapes_and_types_are_those_that_the_loader_allots(handed: Path) -> None:
    """w8a8_mxfp8.py, get_weight and get_pergroup_param: float8_e4m3fn [out, in], uint8 [out, ceil(in / group_size)]."""
    its, found = tensors(handed), described(handed)
    quantised = [name for name in its if found[name] == "W8A8_MXFP8" and not name.endswith("_scale")]
    assert quantised
    for name in quantised:
        rows, columns = its[name].shape
        assert (its[name].dtype, its[name + "_scale"].dtype) == ("F8_E4M3", "U8")
        assert its[name + "_scale"].shape == (rows, -(-columns // 32))


STACKED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("q_a_proj", "kv_a_proj_with_mqa"))


def test_what_is_stacked_has_one_type(handed: Path) -> None:
    """modelslim_config.py, get_linear_quant_type: shards of one stacked layer with different types raise; one that is
    not described is a KeyError. Experts are shards of one layer too."""
    found = described(handed)
    for name in (name for name in found if name.endswith(".weight")):
        module, _, part = name.removesuffix(".weight").rpartition(".")
        for stack in (stack for stack in STACKED if part in stack):
            there = [f"{module}.{one}.weight" for one in stack if f"{module}.{one}.weight" in found]
            assert len({found[one] for one in there}) == 1
        if ".experts." in module:
            assert found[name] == "W8A8_MXFP8"


def test_the_values_are_the_masters(handed: Path, model: Path, tmp_path: Path) -> None:
    """Nothing is rounded for the hand-off that the master is not: one set of bits."""
    convert({"source": str(model), "out": str(tmp_path / "master")})
    assert compare(tmp_path / "master", handed, workers=1)["verdict"] == "identical"
    convert({"source": str(model), "out": str(tmp_path / "a2"), "layout": "bf16", "engine": "vllm-ascend"})
    assert compare(tmp_path / "master", tmp_path / "a2", workers=1)["verdict"] == "identical"
    assert not (tmp_path / "a2" / DESCRIPTION).exists()
    assert load(handed) is not None  # this project reads it as it reads every layout


@pytest.fixture(scope="module")
def off_grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in BF16 that no training brought to the grid."""
    folder = build(tmp_path_factory.mktemp("off") / "m", "llama")
    values = load_file(folder / "model.safetensors")
    for value in values.values():
        if value.ndim == 2:
            value.mul_(1.0 + 2**-6)
    save_file(values, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("layout", ["mxfp8", "bf16"])
def test_rounding_is_said_with_what_it_costs_and_how_to_keep_all(layout: str, off_grid: Path, tmp_path: Path) -> None:
    """In the terminal and in --json: a team that asks for bf16 does not expect other values than its own."""
    words = [sys.executable, "-m", "ottava.cli", "convert", off_grid, tmp_path / "out", "--layout", layout]
    done = subprocess.run([*words, "--for", "vllm-ascend", "--json"], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert (report["label"], report["rounded"]) == ("rounded", report["quantised"])
    (said,) = [text for text in report["warnings"] if "rounded" in text]
    assert said.startswith(f"{report['rounded']} of {report['tensors']} tensors were rounded")
    assert f"{report['sqnr_db']:.1f} dB" in said
    assert "serve the source" in said
    assert "grid_from" in said
    assert f"warning: {said}" in done.stderr.splitlines()
    assert json.loads((tmp_path / "out/conversion.json").read_text())["warnings"] == report["warnings"]


@pytest.mark.parametrize("layout", ["mxfp8", "bf16"])
def test_nothing_is_said_where_nothing_was_rounded(layout: str, model: Path, tmp_path: Path) -> None:
    report = convert({"source": str(model), "out": str(tmp_path / "a"), "layout": layout, "engine": "vllm-ascend"})
    assert report["rounded"] == 0
    assert not any("rounded" in text for text in report["warnings"])


def test_a_source_that_no_chip_takes_as_it_is_is_not_recommended(off_grid: Path, tmp_path: Path) -> None:
    """In float32 the source would be rounded too, when it is loaded."""
    wide = tmp_path / "wide"
    shutil.copytree(off_grid, wide)
    values = {name: value.float() for name, value in load_file(wide / "model.safetensors").items()}
    save_file(values, wide / "model.safetensors", {"format": "pt"})
    report = convert({"source": str(wide), "out": str(tmp_path / "out"), "layout": "bf16", "engine": "vllm-ascend"})
    (said,) = [text for text in report["warnings"] if "rounded" in text]
    assert "grid_from" in said
    assert "serve the source" not in said


@pytest.mark.parametrize("layout", ["e8m0", "deepseek"])
def test_what_would_be_quantised_anew_is_refused(layout: str, model: Path, tmp_path: Path) -> None:
    """vllm-ascend's pull request 14852: block FP8 is turned into MXFP8 at load, on other bits."""
    with pytest.raises(CheckpointError, match="quantises what they hold anew"):
        convert({"source": str(model), "out": str(tmp_path / "no"), "layout": layout, "engine": "vllm-ascend"})


def test_an_odd_number_of_scales_is_refused_for_experts_alone() -> None:
    """w8a8_mxfp8.py: a linear layer's scales are padded to pairs; experts' are reshaped to (k // 2, 2), and raise."""
    for columns, tp in itertools.product((32, 64, 96, 128, 192, 256), (1, 2, 4)):
        expert = {"model.layers.1.mlp.experts.0.down_proj.weight": (64, columns)}
        groups = columns / tp / 32
        fits = groups == int(groups) and groups % 2 == 0
        if fits:
            refuse("vllm-ascend", "mxfp8", {}, expert, tp)
        else:
            with pytest.raises(CheckpointError, match="odd number"):
                refuse("vllm-ascend", "mxfp8", {}, expert, tp)
        refuse("vllm-ascend", "mxfp8", {}, {"model.layers.1.mlp.down_proj.weight": (64, columns)}, tp)
