"""Engines that are not ours, as far as it takes no vLLM: who is refused and why, launch lines, mapping, the leash."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ottava.checkpoint.ascend import DESCRIPTION
from ottava.checkpoint.convert import convert
from ottava.checkpoint.layouts import weights
from ottava.cli import outcome
from ottava.engine.generate import ThinkBudget
from ottava.engine.session import Sampling
from ottava.errors import CheckpointError, DataError, OttavaError, PlatformError
from ottava.gateway import engines, leash, vllm
from ottava.gateway.engines import KINDS, OURS, PASSED, PYTHON, Choice, choice, choices
from ottava.gateway.pool import places
from tests.engines.models import build


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model in every layout, and DeepSeek's architecture."""
    root = tmp_path_factory.mktemp("folders")
    found = {"bf16": build(root / "bf16", "llama"), "deepseek_v3": build(root / "deepseek_v3", "deepseek_v3")}
    for layout in ("deepseek", "e8m0", "mxfp8"):
        found[layout] = root / layout
        convert({"source": str(found["bf16"]), "out": str(found[layout]), "layout": layout})
    found["ascend"] = root / "ascend"
    asked = {"source": str(found["bf16"]), "out": str(found["ascend"]), "layout": "mxfp8", "engine": "vllm-ascend"}
    convert(asked)
    return found


def test_an_engine_is_a_kind_and_options_that_may_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choice("embedded") == OURS
    found = choice("vllm --tensor-parallel-size=8 --enforce-eager --max-model-len 4096", "/x/python")
    assert found.extra == ("--tensor-parallel-size", "8", "--enforce-eager", "--max-model-len", "4096")
    assert (found.kind, found.python, found.tensor_parallel) == ("vllm", "/x/python", 8)
    assert choice("vllm-cpu").python == os.path.abspath(".venv-vllm/bin/python")
    monkeypatch.setenv(PYTHON, "/y/python")
    assert choice("vllm-cpu").python == "/y/python"
    assert choice("vllm-cpu", "/x/python").python == "/x/python"


@pytest.mark.parametrize(
    "said",
    ["", "sglang", "embedded --enforce-eager", "vllm --api-key x", "vllm --reasoning-parser deepseek_v3",
     "vllm --chat-template x", "vllm --tensor-parallel-size", "vllm --tensor-parallel-size --enforce-eager",
     "vllm --tensor-parallel-size two", "vllm --tensor-parallel-size 0", "vllm 8", 'vllm "', "vllm --trust-remote-code",
     "vllm --enforce-eager=1"],
)  # fmt: skip
def test_what_is_no_engine_is_said(said: str) -> None:
    with pytest.raises(DataError) as caught:
        choice(said, sys.executable)
    assert caught.value.where == "--engine"


def test_one_engine_for_all_or_one_for_each(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    three = [folders["bf16"]] * 3
    monkeypatch.setattr(engines, "startable", lambda choice: None)
    assert choices([], three) == [OURS] * 3
    assert [one.kind for one in choices(["vllm-cpu"], three)] == ["vllm-cpu"] * 3
    assert [one.kind for one in choices(["embedded", "vllm-cpu", "vllm"], three)] == ["embedded", "vllm-cpu", "vllm"]
    with pytest.raises(DataError, match="2 engines and 3 folders"):
        choices(["embedded", "vllm-cpu"], three)


def test_backends_are_named_by_their_engine(folders: dict[str, Path]) -> None:
    chosen = [OURS, Choice("vllm-cpu", "p"), Choice("vllm", "p"), Choice("vllm-ascend", "p")]
    found = places([folders["bf16"]] * 4, 1, (), chosen)
    assert [place.name for place in found] == [
        "cpu-0-0",
        "cpu-vllm-cpu-1-0",
        "nvidia-vllm-2-0",
        "ascend-vllm-ascend-3-0",
    ]
    assert [place.vendor for place in found] == ["cpu", "cpu", "nvidia", "ascend"]
    labelled = places([folders["bf16"]] * 2, 1, ["price=1", "vendor=other"], chosen[2:])
    assert [(place.vendor, place.price) for place in labelled] == [("nvidia", 1.0), ("other", 0.0)]


def test_no_environment_no_package_no_device(tmp_path: Path) -> None:
    with pytest.raises(PlatformError, match="no environment here"):
        engines.startable(Choice("vllm-cpu", str(tmp_path / "python")))
    with pytest.raises(PlatformError, match="no environment here"):
        engines.startable(Choice("vllm-cpu", str(tmp_path)))
    with pytest.raises(PlatformError, match="has no vllm-ascend"):
        engines.startable(Choice("vllm-ascend", sys.executable))
    engines.startable(OURS)


@pytest.mark.parametrize("kind", ["vllm", "vllm-ascend"])
def test_a_device_that_is_not_there(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if any(Path(device).exists() for device in KINDS[kind].devices):
        pytest.skip("this machine has one")
    monkeypatch.setattr(engines, "_version", lambda python, package: "1")
    with pytest.raises(PlatformError, match="device that this machine lacks"):
        engines.startable(Choice(kind, sys.executable))


def test_the_command_line_refuses_before_it_loads(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["serve", str(folders["bf16"]), "--port", "0", "--engine"]
    missing = ["--vllm-python", str(tmp_path / "python")]
    for more, words in ((["vllm-cpu", *missing], "no environment here"), (["sglang"], "no such engine: 'sglang'")):
        monkeypatch.setattr(sys, "argv", ["ottava", *asked, *more])
        assert outcome() == 2
        said = capsys.readouterr().err
        assert words in said
        assert "mend:" in said


@pytest.mark.parametrize(
    ("kind", "layout", "words"),
    [
        ("vllm-cpu", "bf16", None), ("vllm-cpu", "deepseek", None), ("vllm-cpu", "e8m0", None),
        ("vllm-cpu", "mxfp8", "no MXFP8 kernel"), ("vllm-cpu", "ascend", "written for vllm-ascend"),
        ("vllm", "deepseek", None), ("vllm", "mxfp8", None), ("vllm", "ascend", "written for vllm-ascend"),
        ("vllm-ascend", "bf16", None),
        ("vllm-ascend", "deepseek", "no 128x128 blocks"), ("vllm-ascend", "ascend", None),
        ("embedded", "mxfp8", None),
    ],
)  # fmt: skip
def test_folders_that_an_engine_cannot_read_are_refused(
    folders: dict[str, Path], kind: str, layout: str, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "cpu_flags", lambda path: {"amx_tile"})
    chosen = Choice(kind, "p")
    if words is None:
        engines.loadable(chosen, folders[layout])
        return
    with pytest.raises(CheckpointError, match=words) as caught:
        engines.loadable(chosen, folders[layout])
    assert caught.value.fix


def test_blocks_on_a_processor_without_amx(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "cpu_flags", lambda path: {"avx512f"})
    engines.loadable(Choice("vllm-cpu", "p"), folders["bf16"])
    for layout in ("deepseek", "e8m0"):
        with pytest.raises(CheckpointError, match="AMX"):
            engines.loadable(Choice("vllm-cpu", "p"), folders[layout])
        engines.loadable(Choice("vllm", "p"), folders[layout])


def test_a_router_that_vllm_would_not_know(folders: dict[str, Path], tmp_path: Path) -> None:
    """As save_pretrained leaves it, vLLM ends with a KeyError while it loads; as the converter writes it, not."""
    for kind in KINDS:
        with pytest.raises(CheckpointError, match="topk_method"):
            engines.loadable(Choice(kind, "p"), folders["deepseek_v3"])
    engines.loadable(OURS, folders["deepseek_v3"])
    convert({"source": str(folders["deepseek_v3"]), "out": str(tmp_path / "out"), "layout": "bf16"})
    engines.loadable(Choice("vllm-cpu", "p"), tmp_path / "out")


def test_the_tensor_parallel_group_counts(folders: dict[str, Path]) -> None:
    engines.loadable(choice("vllm"), folders["deepseek"])
    with pytest.raises(CheckpointError, match="inside a block"):
        engines.loadable(choice("vllm --tensor-parallel-size 4"), folders["deepseek"])


def test_layouts_are_told_apart(folders: dict[str, Path]) -> None:
    for layout in ("deepseek", "e8m0", "mxfp8"):
        found = [weight for weight in weights(folders[layout]).values() if weight.scale is not None]
        assert engines.layout_of(found) == layout
    mixed = [w for layout in ("e8m0", "mxfp8") for w in weights(folders[layout]).values() if w.scale is not None]
    assert engines.layout_of(mixed) is None


def line(kind: str, folder: Path, *extra: str) -> list[str]:
    return engines.command(Choice(kind, "python", extra), folder, Path("/s/vllm.sock"), 4)


@pytest.mark.parametrize("kind", list(KINDS))
def test_launch_lines(kind: str, folders: dict[str, Path]) -> None:
    said = line(kind, folders["bf16"], "--enforce-eager")
    assert said[:3] == ["python", "-m", "vllm.entrypoints.openai.api_server"]
    pairs = dict(pairwise(said))
    assert pairs["--model"] == str(folders["bf16"])
    assert pairs["--uds"] == "/s/vllm.sock"  # no port
    assert pairs["--max-num-seqs"] == "4"
    assert pairs["--generation-config"] == "vllm"
    assert said[-1] == "--enforce-eager"
    forbidden = ("reasoning", "tool", "template", "api-key", "trust", "host", "port")
    assert not [word for word in said if word.startswith("--") and any(part in word for part in forbidden)]
    assert not [word for word in PASSED if any(part in word for part in forbidden)]


def test_what_a_folder_adds_to_the_line(folders: dict[str, Path]) -> None:
    off = json.dumps({"custom_ops": ["-rotary_embedding"]})
    assert off in line("vllm-cpu", folders["deepseek_v3"])
    assert off not in line("vllm", folders["deepseek_v3"])
    assert off not in line("vllm-cpu", folders["bf16"])
    assert (folders["ascend"] / DESCRIPTION).is_file()
    assert line("vllm-ascend", folders["ascend"])[-2:] == ["--quantization", "ascend"]
    assert "--quantization" not in line("vllm-ascend", folders["bf16"])


def test_the_environment_of_vllm() -> None:
    base = {"PATH": "/bin", "PYTHONPATH": "/ours", "VLLM_CPU_KVCACHE_SPACE": "7", "VLLM_SERVER_DEV_MODE": "1"}
    found = engines.environment(choice("vllm-cpu"), "secret", Path("/s"), base)
    assert found["VLLM_CPU_KVCACHE_SPACE"] == "7"  # the caller's
    assert found["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert found["VLLM_SERVER_DEV_MODE"] == "0"  # nobody's
    assert (found["VLLM_API_KEY"], found["TMPDIR"], found["PATH"]) == ("secret", "/s", "/bin")
    assert "PYTHONPATH" not in found


def test_how_much_is_known_is_said() -> None:
    assert engines.told([OURS]) == []
    said = engines.told([OURS, choice("vllm"), choice("vllm"), choice("vllm-ascend")])
    assert [text.split(":")[:2] for text in said] == [
        ["engine vllm", " evidence not run"], ["engine vllm-ascend", " evidence L0"],
    ]  # fmt: skip


# ---- mapping


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 10_000))
def test_seeds_are_vllms_and_each_position_has_its_own(seed: int, position: int) -> None:
    how = Sampling(9, temperature=0.5, top_p=0.9, seed=seed, think=ThinkBudget(1, 2), top=3)
    found = vllm.chosen_by(how, position)
    assert (found["temperature"], found["top_p"]) == (0.5, 0.9)
    assert 0 <= found["seed"] < 2**63  # never -1, which vLLM takes for no seed
    assert found == vllm.chosen_by(how, position)
    assert found["seed"] != vllm.chosen_by(how, position + 1)["seed"]


def test_no_seed_is_none() -> None:
    assert vllm.chosen_by(Sampling(1), 5)["seed"] is None


def chunk(ids: Sequence[int], values: Sequence[dict[int, float]]) -> dict[str, Any]:
    told = {
        "token_logprobs": [value[token] for token, value in zip(ids, values, strict=True)],
        "top_logprobs": [{f"token_id:{other}": number for other, number in value.items()} for value in values],
    }
    return {"choices": [{"token_ids": list(ids), "logprobs": told}]}


@settings(max_examples=50)
@given(st.data(), st.integers(0, 5))
def test_tokens_come_with_the_likeliest_in_order(data: st.DataObject, top: int) -> None:
    """vLLM's own: the chosen id first, then the `top` likeliest; ours: the `top` likeliest in order."""
    ids, values, wanted = [], [], []
    for _ in range(data.draw(st.integers(0, 3))):
        numbers = data.draw(st.lists(st.floats(-50, 0), min_size=6, max_size=6, unique=True))
        order = sorted(range(6), key=lambda number: -numbers[number])
        chosen = data.draw(st.integers(0, 5))
        ids.append(chosen)
        values.append({number: numbers[number] for number in dict.fromkeys([chosen, *order[:top]])})
        wanted.append((chosen, numbers[chosen], tuple((number, numbers[number]) for number in order[:top])))
    found = vllm.tokens_of(chunk(ids, values), top)
    assert [(token.id, token.logprob, token.top) for token in found] == wanted


@pytest.mark.parametrize(
    ("status", "body", "kind", "words"),
    [
        (400, b'{"error": {"message": "too long"}}', "DataError", "too long"),
        (500, b'{"error": {"message": "dead"}}', "ResourceError", "dead"),
        (502, b"<html>", "ResourceError", "<html>"),
        (500, b"[1]", "ResourceError", "500"),
    ],
)
def test_refusals(status: int, body: bytes, kind: str, words: str) -> None:
    error = vllm.refusal(status, body)
    assert isinstance(error, OttavaError)
    assert type(error).__name__ == kind
    assert words in error.what


# ---- the leash

TREE = """
import os, signal, sys, time
from multiprocessing import shared_memory
memory = shared_memory.SharedMemory(create=True, size=64)
print(memory._name.lstrip("/"), flush=True)
for depth in range(2):
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if depth:
            os.setsid()
        mine = shared_memory.SharedMemory(name=memory.name)
        print(os.getpid(), flush=True)
        time.sleep(600)
print("there", flush=True)
time.sleep(600)
"""
"""A server with two stubborn children, one in a session of its own, and shared memory that nobody unlinks."""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("how", ["hang up", "kill the command", "ask the command to end"])
def test_nothing_outlives_the_leash(how: str, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    told = tmp_path / "told"
    with told.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-I", leash.__file__, str(scratch), sys.executable, "-c", TREE],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=out,
        )  # fmt: skip
    deadline = time.monotonic() + 60
    while (said := told.read_text().split()).count("there") < 1 or len(said) < 4:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    segment, pids = Path("/dev/shm") / said[0], [int(word) for word in said if word.isdigit()]
    assert segment.exists()
    assert all(map(alive, pids))
    command = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
    assert process.stdin is not None
    if how == "hang up":
        process.stdin.close()
    else:
        os.kill(command, signal.SIGKILL if how == "kill the command" else signal.SIGTERM)
    process.wait(60)
    assert not any(map(alive, [command, *pids]))
    assert not segment.exists()
    assert not scratch.exists()
    process.stdin.close()


def test_the_command_dies_with_a_leash_that_is_killed(tmp_path: Path) -> None:
    sleeping = [sys.executable, "-c", "import time; time.sleep(600)"]
    process = subprocess.Popen(
        [sys.executable, "-I", leash.__file__, str(tmp_path / "s"), *sleeping], stdin=subprocess.PIPE
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 60
    while (
        not (found := children.read_text().split())
        or b"time.sleep" not in Path(f"/proc/{found[0]}/cmdline").read_bytes()
    ):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait(60)
    while alive(int(found[0])):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert process.stdin is not None
    process.stdin.close()
