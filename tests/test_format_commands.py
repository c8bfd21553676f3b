"""convert, verify, keygen, targets and serve --certificate through the command line, as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ottava import cli
from ottava.checkpoint.layouts import LAYOUTS
from ottava.checkpoint.safetensors import write_folder

UP, NORM = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"


def ottava(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ottava.cli", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def said(*args: object, code: int = 0) -> dict[str, Any]:
    """The one JSON object on standard output."""
    done = ottava(*args, "--json")
    assert done.returncode == code, done.stderr
    (line,) = done.stdout.splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A BF16 folder off the grid, ragged."""
    folder = tmp_path / "source"
    folder.mkdir()
    tensors = {UP: torch.randn(192, 160).bfloat16(), NORM: torch.ones(160).bfloat16()}
    plan = {UP: ("BF16", (192, 160)), NORM: ("BF16", (160,))}
    write_folder(folder, plan, tensors.items())
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def test_from_conversion_to_certificate(source: Path, tmp_path: Path) -> None:
    made = said("convert", source, tmp_path / "a", "--layout", "mxfp8")
    assert (made["label"], made["layout"]) == ("rounded", "mxfp8")
    assert said("convert", tmp_path / "a", tmp_path / "b", "--layout", "deepseek")["label"] == "on-grid"
    key = tmp_path / "key.pem"
    assert ottava("keygen", key).returncode == 0
    certificate = tmp_path / "certificate.json"
    found = said("verify", tmp_path / "a", tmp_path / "b", "--certificate", certificate, "--key", key)
    assert found["verdict"] == "identical"
    assert found["digest_a"] == found["digest_b"] == made["digest"] == json.loads(certificate.read_text())["digest"]
    assert said("targets", tmp_path / "b", "--chip", "H100")["H100"]["recommended"] == "deepseek"

    refused = ottava("serve", tmp_path / "a", "--certificate", certificate)  # anybody could have signed
    assert (refused.returncode, "--trust" in refused.stderr) == (2, True)
    weights = tmp_path / "b" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    bad = said("verify", tmp_path / "a", tmp_path / "b", code=1)
    assert bad["first_bad"]["cause"] == "flipped bit"
    stopped = ottava("serve", tmp_path / "b", "--port", 0, "--certificate", certificate, "--trust", f"{key}.pub")
    assert (stopped.returncode, "for other values" in stopped.stderr) == (1, True)


def test_layouts_that_can_be_asked_for() -> None:
    """cli.py spells them again, since it must not import torch."""
    assert [layout.value for layout in cli.Layout] == list(LAYOUTS)


def test_mistakes_are_told_before_the_work(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(b"\xff\xfe")
    for args in (
        ("convert", source, tmp_path / "out", "--calibration", text),
        ("convert", source, tmp_path / "out", "--kl", text),
        ("convert", source, tmp_path / "out", "--for", "nonsense"),
        ("convert", source, tmp_path / "out", "--for", "vllm-cpu", "--layout", "mxfp8"),
        ("convert", source, tmp_path / "out", "--layout", "nonsense"),
        ("verify", source, source, "--certificate", tmp_path / "c.json"),
        ("verify", source, tmp_path / "nowhere"),
    ):
        done = ottava(*args)
        assert (done.returncode, done.stdout) == (2, ""), (args, done.stderr)
        assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "text.txt"]
