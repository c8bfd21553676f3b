"""The whole chain through the command line, as a user runs it: killed, gone on with, reported, asked."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SMALL = """\
name: small
seed: 11
fleet: laptop
stages:
  plan:
  qualify:
  label: {answers: 2000, cold_start: 100, audit: 80, test_per_length: 20, test_one_step: 20}
  train:
    steps: 90
    batch: 4
    direct: {begin: 0.3, batch: 4}
    fault: {pool: ascend, at_step: 45, rank: 1}
    restarts: 0
    drift: {window: 8, replicas: 3}
  reinforce:
    steps: 6
    lengths: [2, 3]
    rollout: {prompts: 4, group: 4, max_new: 24}
  distill:
    steps: 12
    batch: 4
    harvest: {asks: 300, samples: 4, temperature: 1.0}
    students:
      - {name: q, shape: {family: qwen3, hidden: 32, width: 48}}
      - {name: l, shape: {family: llama, hidden: 32, width: 48}}
    on_policy: {steps: 2, lengths: [2], rollout: {prompts: 2, group: 2, max_new: 24}}
  convert:
  verify:
  serve:
"""


def ottava(*args: str, cwd: Path, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ottava.cli", *args], cwd=cwd, capture_output=True, text=True, timeout=800, **more
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the small chain, which was killed twice on its way."""
    folder = tmp_path_factory.mktemp("chain")
    (folder / "small.yaml").write_text(SMALL)
    (folder / "fleets").symlink_to(ROOT / "fleets")
    command = [sys.executable, "-m", "ottava.cli", "run", "small.yaml"]
    journal = folder / "runs" / "small" / "journal.jsonl"
    for mark, how in (
        ('"phase":"main","pool":"ascend"', signal.SIGKILL),
        ('"phase":"main","pool":"nvidia"', signal.SIGINT),
    ):
        default = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it
        process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True, preexec_fn=default)
        deadline = time.monotonic() + 600
        while not (journal.exists() and f'"train.step",{mark}' in journal.read_text()):
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(how)
        process.wait()
        assert process.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 130)
    result = ottava("run", "small.yaml", "--json", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["recipe"] == "small"
    return folder


def test_the_report_has_what_is_promised(finished: Path) -> None:
    result = ottava("report", "runs/small", "--json", cwd=finished)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert [stage["name"] for stage in report["stages"]] == [
        "plan", "qualify", "label", "train", "reinforce", "distill", "convert", "verify", "serve",
    ]  # fmt: skip
    assert all(stage["status"] in ("done", "cached") and stage["seconds"] > 0 for stage in report["stages"])
    assert report["fallback"]["from"] == "ascend"
    assert report["fallback"]["to"] == "nvidia"
    assert report["fallback"]["lost_steps"] == 0
    assert report["fallback"]["handoff_identical"] is True
    assert report["fallback"]["replay_identical"] is True
    assert report["fallback"]["drift"] <= report["fallback"]["envelope"]
    assert report["fp8"]["digest_equal"] is True
    assert report["fp8"]["on_grid"] is True
    assert report["fp8"]["accuracy"]["value"] == report["accuracy"]["thinking"]["value"]
    for mode in ("thinking", "direct"):
        entry = report["accuracy"][mode]
        assert entry["n"] == 100
        assert 0 <= entry["low"] <= entry["value"] <= entry["high"] <= 1
    assert report["labels"]["audited"] == 80
    assert report["serve"]["streamed"] is True
    assert report["serve"]["thinking_ok"] is True
    assert report["serve"]["direct_ok"] is True
    assert Path(report["serve"]["model_dir"]).is_dir()
    assert json.loads((finished / "runs/small/report.json").read_text()) == report
    page = (finished / "runs/small/report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


def test_finished_is_finished(finished: Path) -> None:
    begun = time.monotonic()
    result = ottava("run", "small.yaml", cwd=finished)
    assert result.returncode == 0
    assert result.stderr.count("done before") == 9
    assert time.monotonic() - begun < 60


def test_the_killed_run_ends_in_the_undisturbed_bytes(finished: Path, tmp_path: Path) -> None:
    """The same recipe, never killed from outside: the same schedule, the same weights, the same answers."""
    (tmp_path / "small.yaml").write_text(SMALL)
    (tmp_path / "fleets").symlink_to(ROOT / "fleets")
    assert ottava("run", "small.yaml", "--until", "train", cwd=tmp_path).returncode == 0
    proofs = [
        json.loads(next(f.glob("runs/small/artifacts/train-*/proof.json")).read_text()) for f in (finished, tmp_path)
    ]
    assert all(proof["replay_identical"] for proof in proofs)
    assert [s["start"] for s in proofs[0]["segments"]] == [s["start"] for s in proofs[1]["segments"]] == [0, 45]
    assert proofs[0]["final"] == proofs[1]["final"]


def test_verify_command(finished: Path, tmp_path: Path) -> None:
    artifacts = finished / "runs/small/artifacts"
    train, master = next(artifacts.glob("reinforce-*/model")), next(artifacts.glob("convert-*/model"))
    good = ottava("verify", str(train), str(master), "--json", cwd=finished)
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout)["verdict"] == "identical"
    out = tmp_path / "again"
    made = ottava("convert", str(train), str(out), "--json", cwd=finished)
    assert json.loads(made.stdout)["on_grid"] is True
    weights = out / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    bad = ottava("verify", str(master), str(out), "--json", cwd=finished)
    assert bad.returncode == 1
    found = json.loads(bad.stdout)
    assert found["verdict"] == "different"
    assert found["first_bad"]["cause"] == "flipped bit"


def test_serve_and_chat(finished: Path) -> None:
    model = next((finished / "runs/small/artifacts").glob("convert-*/model"))
    server = subprocess.Popen(
        [sys.executable, "-m", "ottava.cli", "serve", str(model), "--port", "0"], stderr=subprocess.PIPE, text=True
    )
    assert server.stderr is not None
    url = ""
    for line in server.stderr:
        if "http://127.0.0.1:" in line:
            url = "http://127.0.0.1:" + line.split("http://127.0.0.1:")[1].split()[0].split("/")[0]
            break
    assert url
    asked = ottava("chat", "7 a +5 b *3 =", "--url", url, "--thinking", cwd=finished)
    assert asked.returncode == 0, asked.stderr
    assert "reasoning:" in asked.stdout
    taken = ottava("serve", str(model), "--port", url.rsplit(":", 1)[1], cwd=finished)
    assert taken.returncode == 2
    assert "port in use" in taken.stderr
    unknown = ottava("chat", "what is love", "--url", url, cwd=finished)
    assert unknown.returncode == 2
    assert "'what'" in unknown.stderr
    server.terminate()
    assert server.wait(30) == 0


# ---------------------------------------------------------------- bad input


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys, ottava.cli\n"
        "try: ottava.cli.app(['--help'], standalone_mode=False)\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'ray', 'transformers', 'numpy', 'scipy', 'pydantic') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("[]")


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("run", "none.yaml"), 2, "error: no such file\n  where: none.yaml\n  mend:  check the path\n"),
        (
            ("run", "bad.yaml"),
            2,
            "error: unknown key 'stesp'\n  where: bad.yaml:4:11\n  mend:  did you mean 'steps'?\n",
        ),
        (("report", "none"), 2, None),
        (("serve", "none"), 2, None),
        (("convert", "none", "out"), 2, None),
        (("verify", "none", "none"), 2, None),
        (("chat", "hi", "--url", "http://127.0.0.1:9"), 2, None),
        (("run",), 2, None),
        (("rnu",), 2, None),
        (("run", "bad.yaml", "--port"), 2, None),
    ],
)
def test_bad_input(args: tuple[str, ...], code: int, message: str | None, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("name: b\nfleet: laptop\nstages:\n  train: {stesp: 3}\n")
    before = sorted(tmp_path.rglob("*"))
    result = ottava(*args, cwd=tmp_path)
    assert result.returncode == code, result.stderr
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    if message is not None:
        assert result.stderr == message
    assert sorted(tmp_path.rglob("*")) == before, "something was written"


@pytest.mark.parametrize("size", ["64k", "400k", "2m"])
def test_full_disk(tmp_path: Path, size: str) -> None:
    """Runs on file systems that are too small, in a mount namespace of their own: where it ends, it ends well."""
    small = SMALL.replace("  plan:\n  qualify:\n", "")
    (tmp_path / "small.yaml").write_text(small)
    (tmp_path / "fleets").symlink_to(ROOT / "fleets")
    (tmp_path / "disk").mkdir()
    script = (
        f"mount -t tmpfs -o size={size} none disk || exit 77\n"
        f"{sys.executable} -m ottava.cli run small.yaml --until train --out disk/run; code=$?\n"
        "find disk -name manifest.json -o -name '*.part' >&2; exit $code"
    )
    result = subprocess.run(["unshare", "-m", "sh", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    if result.returncode in (1, 77) and "disk full" not in result.stderr:
        pytest.skip(f"no mount namespaces here: {result.stderr.strip()[:80]}")
    assert result.returncode == 2, result.stderr
    assert "error: disk full" in result.stderr
    assert "Traceback" not in result.stderr
    assert ".part" not in result.stderr
