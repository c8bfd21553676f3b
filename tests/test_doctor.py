"""The doctor may not flatter a machine: what it says is held against what is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ottava import platforms
from ottava.platforms import doctor


@pytest.fixture(scope="module")
def found() -> dict[str, object]:
    code = "import json; from ottava.platforms.doctor import examine; print(json.dumps(examine(), allow_nan=False))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=300)
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def test_it_is_one_json_object_with_what_was_promised(found: dict[str, dict[str, object]]) -> None:
    assert list(found) == ["machine", "versions", "platforms", "ascend", "extras"]
    assert set(found["platforms"]) == {"cpu", "cuda", "npu"}
    assert found["machine"]["cores"] == len(os.sched_getaffinity(0))
    memory = found["machine"]["memory_gb"]
    assert isinstance(memory, dict)
    assert 0 < memory["free"] <= memory["total"]


def test_platforms_are_as_they_say_themselves(found: dict[str, dict[str, dict[str, object]]]) -> None:
    for name, said in found["platforms"].items():
        here, reason = platforms.get(name).available()
        assert (said["available"], said["reason"]) == (here, reason)
        assert (said["workers"] == 0) == (not here)


def test_versions_are_those_that_are_imported(found: dict[str, dict[str, object]]) -> None:
    import torch

    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert doctor.versions(["no-such-distribution"]) == {"no-such-distribution": None}


def test_an_extra_is_installed_only_when_all_of_it_is() -> None:
    assert doctor.extra(["torch", "no-such-distribution"])["installed"] is False
    assert doctor.extra(["torch"])["installed"] is True


def test_without_an_npu_no_level_is_claimed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setattr(doctor, "schemas", lambda: None)
    assert doctor.ascend(npu_here=False)["level"] == "none"
    monkeypatch.delenv(doctor.STAND_IN, raising=False)
    assert doctor.ascend(npu_here=True)["level"] == "L4"
    monkeypatch.setenv(doctor.STAND_IN, "somewhere")  # an NPU of host memory is none
    assert doctor.ascend(npu_here=True)["level"] == "L2"


def test_the_wheel_of_torch_npu_gives_level_0_without_being_imported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "torch_npu"
    (package / "csrc" / "aten").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('libhccl.so')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert doctor.ascend(npu_here=False)["level"] == "none"
    (package / "csrc" / "aten" / doctor.SCHEMAS).write_text("")
    assert doctor.ascend(npu_here=False)["level"] == "L0"
    assert "torch_npu" not in sys.modules


def test_the_level_is_of_this_machine(found: dict[str, dict[str, object]]) -> None:
    here = platforms.get("npu").available()[0]
    assert (found["ascend"]["level"] == "L4") == here
    assert found["ascend"]["levels"] == doctor.LEVELS


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
    found: dict[str, dict[str, object]],
) -> None:
    """The claim is checked by computing: the same layer with and without the limit of fleets/laptop.yaml."""
    code = "from ottava.platforms.probe import numerics_class as n; print(n({'platform': 'cpu'})['numerics_class'])"
    limit = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
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
