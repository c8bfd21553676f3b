"""convert, verify, keygen, targets and serve --certificate through the command line, as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress

from ottava.checkpoint.convert import convert
from ottava.checkpoint.layouts import LAYOUTS
from ottava.checkpoint.safetensors import write_folder
from ottava.cli import checkpoints, outcome
from ottava.console import terminal
from ottava.console.terminal import BYTES, comparison, work_bar
from ottava.verify.weights import compare

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


def in_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str]:
    """The same without a process of its own: exit code and standard error."""
    monkeypatch.setattr(sys, "argv", ["ottava", *map(str, args)])
    return outcome(), capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "lines"),
    [
        (("verify", "nope", "source"), ["error: no such folder", "where: nope", "mend:"]),
        (("verify", "source", "empty"), ["error: there is no model in this folder", "where: empty", "mend:"]),
        (("targets", "nope"), ["error: no such folder", "where: nope", "mend:"]),
        (("targets", "empty"), ["error: there is no model in this folder", "where: empty", "mend:"]),
        (("convert", "nope", "out"), ["error: no such folder", "where: nope", "mend:"]),
        (("convert", "empty", "out"), ["error: there is no model in this folder", "where: empty", "mend:"]),
        (("convert", "nope", "out", "--kl", "text"), ["error: no such folder", "where: nope", "mend:"]),
        (("convert", "source", "out", "--kl", "text"), ["no tokenizer.json", "source/tokenizer.json", "mend:"]),
        (("serve", "nope", "--port", "0"), ["error: no such folder", "where: nope", "mend:"]),
        (("serve", "empty", "--port", "0"), ["error: there is no model in this folder", "where: empty", "mend:"]),
        (("convert", "", "out"), ["error: an empty name names no folder", "where: SOURCE", "mend:"]),
        (("convert", "source", ""), ["error: an empty name names no folder", "where: OUT", "mend:"]),
        (("convert", "source", "text"), ["error: a file is where the output", "where: text", "mend:  name another"]),
        (("convert", "source", "source", "--rounding", "gptq"), ["the output is the source", "where: source", "mend:"]),
        (("convert", "source", "out", "--rounding", "gptq"), ["no tokenizer.json", "source/tokenizer.json", "mend:"]),
        (("convert", "source", "source/sub"), ["inside the source folder", "where: source/sub", "mend:"]),
        (("chat", ""), ["error: the question is empty", "where: QUESTION", "mend:"]),
        (("chat", " \n"), ["error: the question is empty", "where: QUESTION", "mend:"]),
    ],
)
def test_mistakes_about_folders_and_questions(
    args: tuple[str, ...],
    lines: list[str],
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(source.parent)
    Path("empty").mkdir()
    Path("text").write_text("Words.")
    code, said = in_process(monkeypatch, capsys, *args)
    assert code == 2
    for line, wanted in zip(said.splitlines(), lines, strict=True):
        assert wanted in line
    assert sorted(path.name for path in Path().iterdir()) == ["empty", "source", "text"]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA\n-----END PUBLIC KEY-----", "the text of a PEM file"),
        ("ab" * 31, "neither 64 hexadecimal digits nor a file"),
        ("ab" * 400, "neither 64 hexadecimal digits nor a file"),
        ("", "neither 64 hexadecimal digits nor a file"),
        ("AB" * 32, "cannot be read"),  # a key: what is missing is the certificate
    ],
)
def test_what_is_no_key_is_told(
    key: str, message: str, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = in_process(
        monkeypatch, capsys, "serve", source, "--port", 0, "--certificate", source / "nowhere.json", "--trust", key
    )
    assert (code, message in said, "mend:" in said) == (2, True, True), said
    assert max(map(len, said.splitlines())) < 200


def test_a_source_without_tokenizer_is_converted_with_a_warning(source: Path, tmp_path: Path) -> None:
    done = ottava("convert", source, tmp_path / "out", "--json")
    assert (done.returncode, len(json.loads(done.stdout)["warnings"])) == (0, 1)
    (line,) = done.stderr.splitlines()
    assert line.startswith("warning: the source has no tokenizer.json")
    plain = ottava("convert", source, tmp_path / "plain")
    assert ("warning" in plain.stdout, plain.stderr) == (False, done.stderr)


class Eager(Progress):
    """Draws whatever it is told at once."""

    def update(self, *args: Any, **fields: Any) -> None:
        super().update(*args, **fields)
        self.refresh()


def test_the_bar_tells_the_unit_of_each_part(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """GPTQ counts layers, and the conversion after it bytes."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(terminal, "Progress", Eager)
    drawn = []
    with work_bar(("rounding", "layers"), ("converting", BYTES)) as (layers, progress):
        for told, done, total in (
            (layers, 1, 30),
            (layers, 30, 30),
            (progress, 10**6, 10**9),
            (progress, 10**9, 10**9),
        ):
            told(done, total)
            drawn.append(capsys.readouterr().err.rpartition("\r")[2])
    for line, doing, amount in zip(
        drawn, ["rounding"] * 2 + ["converting"] * 2, ["1/30 layers", "30/30 layers", "1.0 MB/1.0 GB", "1.0 GB/1.0 GB"],
        strict=True,
    ):  # fmt: skip
        assert doing in line
        assert amount in line
        assert ("layers" in line) == (doing == "rounding")


def test_a_part_that_is_left_out_lends_nobody_its_unit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A source on the grid has nothing to round: its bytes are told first."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(terminal, "Progress", Eager)
    with work_bar(("rounding", "layers"), ("converting", BYTES)) as (_, progress):
        progress(10**6, 10**9)
        line = capsys.readouterr().err.rpartition("\r")[2]
    assert "converting" in line
    assert "1.0 MB/1.0 GB" in line


def test_a_verdict_in_words(source: Path, tmp_path: Path) -> None:
    for out, layout in (("a", "e8m0"), ("b", "bf16")):
        convert({"source": str(source), "out": str(tmp_path / out), "layout": layout})
    same = comparison(compare(tmp_path / "a", tmp_path / "b"))
    assert [line.split()[0] for line in same.splitlines()] == ["verdict", "digest_a", "digest_b", "tensors"]
    found = compare(source, tmp_path / "a")
    said = dict(line.split(maxsplit=1) for line in comparison(found).splitlines())
    assert said["cause"].startswith("rounded onto the grid (the 464 rule")
    assert (said["certain"], said["faulty"], said["where"]) == ("yes", "b", str(tmp_path / "a" / "model.safetensors"))
    found["first_bad"] |= {"cause": "stale tensor", "certain": False, "faulty": None, "where": None}
    said = dict(line.split(maxsplit=1) for line in comparison(found).splitlines())
    assert said["cause"].startswith("stale tensor (by likeness")
    assert said["certain"].startswith("no")
    assert said["faulty"] == "neither looks the worse"
    assert said["where"] == f"a: {source / 'model.safetensors'}; b: {tmp_path / 'a' / 'model.safetensors'}"


def test_layouts_that_can_be_asked_for() -> None:
    """The command line spells them again, since it must not import torch."""
    assert [layout.value for layout in checkpoints.Layout] == list(LAYOUTS)


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
