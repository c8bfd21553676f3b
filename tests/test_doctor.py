"""The doctor may not flatter a machine: what it says is held against what is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ottava import platforms
from ottava.console.examined import machine_text
from ottava.platforms import doctor
from ottava.platforms.ascend import evidence, wheel

from .npu import record


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    code = "import json; from ottava.platforms.doctor import examine; print(json.dumps(examine(), allow_nan=False))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=300)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_it_is_one_json_object_with_what_was_promised(found: dict[str, Any]) -> None:
    assert list(found) == ["machine", "versions", "platforms", "ascend", "ascend_here", "extras"]
    assert {family["name"] for family in found["platforms"]} == {"cpu", "cuda", "npu"}
    assert {tuple(entry) for entry in found["ascend"]} == {("capability", "claim", "level", "evidence")}
    assert found["machine"]["cores"] == len(os.sched_getaffinity(0))
    memory = found["machine"]["memory_gb"]
    assert isinstance(memory, dict)
    assert 0 < memory["free"] <= memory["total"]


def test_people_are_told_the_level_and_evidence_of_every_capability(found: dict[str, Any]) -> None:
    text = machine_text(found)
    for entry in found["ascend"]:
        assert f"  {entry['level']:<5} {entry['capability']}: {entry['claim']}\n        {entry['evidence']}\n" in text
    assert all(family["reason"] in text for family in found["platforms"])
    assert not set(text) & set("{}")


def test_platforms_are_as_they_say_themselves(found: dict[str, Any]) -> None:
    for said in found["platforms"]:
        here, reason = platforms.get(str(said["name"])).available()
        assert (said["available"], said["reason"]) == (here, reason)
        assert (said["workers"] == 0) == (not here)


def test_versions_are_those_that_are_imported(found: dict[str, Any]) -> None:
    import torch

    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert doctor.versions(["no-such-distribution"]) == {"no-such-distribution": None}


def test_an_extra_is_installed_only_when_all_of_it_is() -> None:
    assert doctor.extra(["torch", "no-such-distribution"])["installed"] is False
    assert doctor.extra(["torch"])["installed"] is True


def test_without_an_npu_no_level_is_claimed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setattr(wheel, "schemas", lambda: None)
    assert doctor.here(npu_here=False)["level"] == "none"
    monkeypatch.delenv(doctor.STAND_IN, raising=False)
    assert doctor.here(npu_here=True)["level"] == "L4"
    monkeypatch.setenv(doctor.STAND_IN, "somewhere")  # an NPU of host memory is none
    assert doctor.here(npu_here=True)["level"] == "L2"


def test_the_wheel_of_torch_npu_gives_level_0_without_being_imported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "torch_npu"
    (package / "csrc" / "aten").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('libhccl.so')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert doctor.here(npu_here=False)["level"] == "none"
    (package / "csrc" / "aten" / wheel.SCHEMAS).write_text("")
    assert doctor.here(npu_here=False)["level"] == "L0"
    assert "torch_npu" not in sys.modules


def test_the_level_is_of_this_machine(found: dict[str, Any]) -> None:
    here = platforms.get("npu").available()[0]
    assert (found["ascend_here"]["level"] in ("L2", "L4")) == here
    assert found["ascend_here"]["levels"] == evidence.LEVELS


def test_what_is_recorded_has_its_level_and_the_rest_none(tmp_path: Path) -> None:
    """Never from hope: no record, a torn one or one of a level that is none shows nothing."""
    record = tmp_path / "evidence.json"
    for content in (None, "", "[]", "{", '{"capabilities": {"training": {"level": "L9"}}}'):
        if content is not None:
            record.write_text(content)
        assert {entry["level"] for entry in evidence.capabilities(record)} == {"none"}
    shown = {"training": {"level": "L2", "tests": 3, "files": ["tests/test_trainer.py"]}}
    record.write_text(json.dumps({"date": "2026-11-22", "versions": {"torch_npu": "2.13.0"}, "capabilities": shown}))
    found = {entry["capability"]: entry for entry in evidence.capabilities(record)}
    assert set(found) == set(evidence.CAPABILITIES)
    assert found["training"]["level"] == "L2"
    assert found["training"]["evidence"] == "3 tests passed (tests/test_trainer.py) on 2026-11-22: torch_npu 2.13.0"
    assert {entry["level"] for name, entry in found.items() if name != "training"} == {"none"}


def test_what_is_shipped_claims_no_chip() -> None:
    """No NPU was at hand: a record of L4 here would be a mistake, and so would one of numerics or speed."""
    found = {entry["capability"]: entry["level"] for entry in evidence.capabilities()}
    assert "L4" not in found.values()
    assert found["numerics"] == found["speed"] == "none"
    assert found["triton kernels"] in ("none", "L3")  # lowered, never run


def test_runs_of_both_kinds_keep_out_of_each_other_s_record() -> None:
    there = {"level": "L2", "tests": 3, "files": ["tests/test_trainer.py"]}
    lowered = {"level": "L3", "tests": 2, "files": ["tests/hivm/test_lowering.py"]}
    first = record.merged({}, {"training": there}, {"torch_npu": "1"}, lowering=False)
    both = record.merged(first, {"triton kernels": lowered}, {"triton-ascend": "2"}, lowering=True)
    assert both["versions"] == first["versions"]
    assert both["capabilities"]["training"] == there
    assert both["capabilities"]["triton kernels"]["versions"] == {"triton-ascend": "2"}
    assert record.merged(both, {"training": there}, {"torch_npu": "1"}, lowering=False) == both
    assert record.merged(both, {"triton kernels": lowered}, {"triton-ascend": "2"}, lowering=True) == both
    assert set(record.merged(both, {}, {"triton-ascend": "2"}, lowering=True)["capabilities"]) == {"training"}
    assert set(record.merged(both, {}, {"torch_npu": "1"}, lowering=False)["capabilities"]) == {"triton kernels"}


def test_a_capability_is_shown_by_all_of_its_tests_or_not_at_all() -> None:
    streams, device = "tests/npu/test_streams.py", "tests/npu/test_device.py"
    passed = [[streams, "a", "passed"], [device, "b", "passed"]]
    name = "memory and streams"
    assert record.summed(passed, real=False)[name] == {"level": "L2", "tests": 2, "files": [device, streams]}
    assert record.summed(passed, real=True)[name]["level"] == "L4"
    for broken in (passed[:1], [*passed, [streams, "c", "failed"]], [*passed, [device, "d", "skipped"]]):
        assert name not in record.summed(broken, real=False)
    assert {name for name, _ in record.SHOWS.values()} < set(evidence.CAPABILITIES)


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("processor : 0\nflags\t\t: fpu avx2 avx512f\n", {"fpu", "avx2", "avx512f"}),
        ("Features : asimd sve\n", {"asimd", "sve"}),
        ("", set()),
    ],
)
def test_flags_are_read_as_linux_writes_them(tmp_path: Path, text: str, flags: set[str]) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert doctor.cpu_flags(tmp_path / "cpuinfo") == flags
    assert doctor.cpu_flags(tmp_path / "missing") == set()


def test_two_classes_are_there_exactly_where_the_limited_pool_computes_other_bits(
    found: dict[str, Any],
) -> None:
    """The claim is checked by computing: the same layer with and without the limit of fleets/laptop.yaml."""
    code = "from ottava.platforms.probe import numerics_class as n; print(n({'platform': 'cpu'})['numerics_class'])"
    limit = yaml.safe_load(Path(__file__).parents[1].joinpath("fleets", "laptop.yaml").read_text())["pools"][0]["env"]
    classes = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **env},
            check=True,
            capture_output=True,
            text=True,
            timeout=300,
        ).stdout
        for env in ({}, limit)
    }
    assert (len(classes) == 2) == found["machine"]["two_classes"]
