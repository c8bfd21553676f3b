"""Ascend without a chip and without torch_npu: codes and what is done about them, SoC names, installations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from ottava.checkpoint import chips as formats
from ottava.errors import PlatformError
from ottava.platforms import ACTIONS, Action, FaultClass
from ottava.platforms.ascend import chips, codes, setup
from ottava.platforms.npu import Npu
from ottava.recipe import Pool
from ottava.supervisor.decide import Exclude, Failure, FallBack, Start, Stop, decide, standing
from ottava.trainer.worker import _KIND_OF

POOLS = (Pool(name="npu", platform="npu", workers=4), Pool(name="cpu", workers=2))


# --- codes -------------------------------------------------------------------------------------------------------


def test_no_number_has_two_classes() -> None:
    said = [n for table in (codes.ACL, codes.HCCL) for numbers in table.values() for n in numbers]
    assert len(said) == len(set(said)) == len(codes.TABLE)


def test_each_class_has_an_action_and_each_action_a_code() -> None:
    assert set(ACTIONS) == set(FaultClass)
    assert {ACTIONS[fault] for fault in codes.TABLE.values()} == set(Action)


@pytest.mark.parametrize("fault", FaultClass)
def test_the_supervisor_does_what_the_action_says(fault: FaultClass) -> None:
    """On a pool of four with restarts left, then again and again until it is left."""
    kind = {FaultClass.COLLECTIVE: "collective"}.get(fault, _KIND_OF.get(fault, "error"))
    blamed = {"collective": (), "pool": (0, 1, 2, 3)}.get(kind, (1,))
    now, first = decide(standing(POOLS, 3, 4), Failure("npu", kind, 7, "error code is N", blamed))
    wanted = {
        Action.RETRY: Start("npu", (0, 2, 3, 1) if blamed else (0, 1, 2, 3)),
        Action.RESTART_DEVICE: Start("npu", (0, 2, 3, 1)),
        Action.EXCLUDE: Start("npu", (0, 2)),
        Action.FALL_BACK: FallBack("npu", "cpu", (0, 1)),
        Action.STOP: Start("npu", (0, 2, 3, 1)),  # once more, on other chips: then it is known for a bug
    }[ACTIONS[fault]]
    assert first[-1] == wanted
    excludes = ACTIONS[fault] in (Action.EXCLUDE, Action.FALL_BACK)
    assert [action.chips for action in first if isinstance(action, Exclude)] == ([blamed] if excludes else [])
    if ACTIONS[fault] is Action.STOP:
        assert isinstance(decide(now, Failure("npu", kind, 7, "error code is N", (0,)))[1][-1], Stop)


def test_a_chip_that_stays_stuck_ends_the_pool_and_not_the_run() -> None:
    """The same words at the same step are a bug where a program says them, and not where a driver does."""
    now = standing((Pool(name="npu", platform="npu"), POOLS[1]), 2, 4)
    for last in (Start, Start, FallBack):
        now, actions = decide(now, Failure("npu", "stuck", 7, "error code is 507000", (0,)))
        assert isinstance(actions[-1], last)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("NPU function error: AclrtSynchronizeDevice, error code is 507015", 507015),
        ("EZ9999: the error code is 107002", 107002),
        ("HCCL function error: HcclAllReduce(...), error code is 9", 9),
        ("ret code: 507899", 507899),
        ("call failed, 507046", 507046),
        ("step 100000 of 200000", None),
        ("error code is 999999", None),
        ("the mirror answered with HTTP error code: 21", None),
        ("curl: return code 7", None),
        ("took 5070460 ns", None),
        ("batch 9", None),
    ],
)
def test_numbers_are_found_where_they_are_said(text: str, number: int | None) -> None:
    assert codes.number(text) == number


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("HBM MULTI BIT ECC ERROR", FaultClass.DEVICE_LOST),
        ("UCE ERROR", FaultClass.DEVICE_LOST),
        ("cannot reduce an empty tensor", FaultClass.BUG),  # a chip is not left for a word that holds UCE
        ("the graph would produce no output", FaultClass.BUG),
    ],
)
def test_texts_without_a_number(text: str, fault: FaultClass) -> None:
    assert Npu().classify_error(RuntimeError(text)) is fault


def test_the_same_error_has_the_same_words_in_every_process() -> None:
    """Otherwise a bug would not be known again when it comes back, and burn every pool."""
    call = "synchronize:NPUStream.cpp:466 NPU function error: X(stream()), error code is 507042\n"
    said = [
        f"{call}[ERROR] 2026-11-{day}-19:58:0{day} (PID:{pid}, Device:0, RankID:{rank}) ERR00100 PTA call acl api\n"
        f"[Error]: at 0x7f{pid}"
        for day, pid, rank in ((21, 28589, -1), (22, 31, 3))
    ]
    first, second = (Npu().words(RuntimeError(text)) for text in said)
    assert first == second
    assert "error code is 507042" in first
    assert "ERR00100" in first


# --- chips -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("soc", "chip"),
    [
        ("Ascend910B1", "910B"), ("Ascend910B2C", "910B"), ("Ascend910B4-1", "910B"), ("Ascend910_9391", "910C"),
        ("Ascend910_9362", "910C"), ("Ascend950PR_957b", "950PR"), ("Ascend950DT_95A1", "950DT"),
        ("Ascend310P3", "310P"),
    ],
)  # fmt: skip
def test_socs_have_their_chip(soc: str, chip: str) -> None:
    assert chips.chip_of(soc) == chip


@pytest.mark.parametrize("soc", ["Ascend910A", "Ascend910B", "Ascend310B1", "Ascend960", "", "H100"])
def test_an_unknown_soc_is_refused(soc: str) -> None:
    with pytest.raises(PlatformError, match="nothing is known of the SoC"):
        chips.chip_of(soc)


def test_what_a_chip_computes_with_is_what_the_data_say() -> None:
    """The preferred form of those that a chip takes, where that is exact; INT8 is never called exact."""
    known = formats.formats()
    for chip in chips.CHIPS:
        takes = [form for form in formats.FORMS if known[chip].takes[form].value]
        assert takes[0] == chips.COMPUTES[chip] != "int8"


# --- installations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("versions", "said"),
    [
        (("2.13.0+cpu", "2.13.0", None), None),
        (("2.13.0", "2.13.0.post2", "9.1.RC1"), None),
        (("2.12.0", "2.12.0", "9.1.0"), None),
        (("2.13.0", setup.UNKNOWN, None), None),
        (("2.12.0", "2.12.0", "unreadable"), None),
        (("2.14.0", "2.13.0", None), "was built for torch 2.13, and torch 2.14.0 is installed: install torch_npu 2.14"),
        (("2.12.0", "2.12.0", "8.5.0"), "wants CANN 9.1 or later, and CANN 8.5.0 is installed"),
    ],
)
def test_versions_that_do_not_fit(versions: tuple[str, str, str | None], said: str | None) -> None:
    found = setup.mismatch(*versions)
    assert (found is None) == (said is None)
    assert said is None or said in str(found)


def test_the_version_of_cann_is_read_where_its_installer_leaves_it(tmp_path: Path) -> None:
    folder = tmp_path / "x86_64-linux"
    folder.mkdir()
    (folder / "ascend_toolkit_install.info").write_text("package_name=Ascend-cann-toolkit\nversion=9.1.RC1\n")
    assert setup.cann({"ASCEND_HOME_PATH": str(tmp_path)}) == "9.1.RC1"
    assert setup.cann({"ASCEND_HOME_PATH": str(folder / "none")}) is None
    assert setup.cann({}) is None


WHOLE = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({}, None),
        (WHOLE, None),
        (WHOLE | {"HCCL_SOCKET_IFNAME": "^docker", "HCCL_EXEC_TIMEOUT": "600"}, None),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK, WORLD_SIZE without MASTER_ADDR, MASTER_PORT"),
        (WHOLE | {"RANK": "x"}, "RANK=x is no number"),
        (WHOLE | {"MASTER_PORT": "http"}, "MASTER_PORT=http is no number"),
        (WHOLE | {"RANK": "2"}, "RANK=2 is none of the 2 ranks"),
        (WHOLE | {"RANK_TABLE_FILE": "/nowhere/table.json"}, "RANK_TABLE_FILE names /nowhere/table.json"),
        (WHOLE | {"HCCL_SOCKET_IFNAME": "enp99"}, "names no interface of this machine"),
        (WHOLE | {"HCCL_EXEC_TIMEOUT": "10s"}, "HCCL_EXEC_TIMEOUT=10s is no number"),
        (WHOLE | {"LOCAL_WORLD_SIZE": "8"}, "8 workers on this machine and 4 NPUs"),
        (WHOLE | {"LOCAL_WORLD_SIZE": "8", "ASCEND_RT_VISIBLE_DEVICES": "3"}, None),  # each sees its own
    ],
)
def test_an_environment_that_is_half_there(environ: dict[str, str], said: str | None) -> None:
    found = setup.group(environ, 4)
    assert (found is None) == (said is None)
    assert said is None or said in str(found)


WITHOUT_CANN = """
import sys
from ottava import platforms
here, why = platforms.get("npu").available()
print(why)
sys.exit(here or "torch_npu" in sys.modules)
"""


def without_cann(tmp_path: Path) -> dict[str, str]:
    """An environment with a torch_npu that torch loads by itself, and that ends in a missing library."""
    release = metadata.version("torch").split("+")[0]
    package, about = tmp_path / "torch_npu", tmp_path / f"torch_npu-{release}.dist-info"
    for folder in (package, about):
        folder.mkdir()
    (package / "__init__.py").write_text("raise ImportError('libhccl.so')")
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {release}\n")
    (about / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    return {k: v for k, v in os.environ.items() if k not in ("LD_LIBRARY_PATH", setup.AUTOLOAD)} | {"PYTHONPATH": path}


def test_torch_npu_without_cann_is_one_message_with_the_remedy(tmp_path: Path) -> None:
    """And nothing of it is imported, which would end in a missing library."""
    env = without_cann(tmp_path)
    done = subprocess.run([sys.executable, "-c", WITHOUT_CANN], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done
    assert "torch_npu is installed and CANN is not" in done.stdout
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in done.stdout
    assert done.stderr == ""


def test_a_torch_that_cannot_be_imported_is_no_defect_of_ottava(tmp_path: Path) -> None:
    """torch loads torch_npu by itself, which fails without CANN: the doctor tells, every other command is refused."""
    env, ottava = without_cann(tmp_path), [sys.executable, "-m", "ottava.cli"]
    doctor = subprocess.run([*ottava, "doctor", "--json"], capture_output=True, text=True, env=env)
    assert doctor.returncode == 0, doctor.stderr
    npu = next(family for family in json.loads(doctor.stdout)["platforms"] if family["name"] == "npu")
    assert "torch_npu is installed and CANN is not" in npu["reason"]
    other = subprocess.run([*ottava, "targets", str(tmp_path)], capture_output=True, text=True, env=env)
    assert other.returncode == 2
    assert other.stderr.startswith("error: torch cannot be imported, as it loads torch_npu by itself: ")
    assert "CANN is not" in other.stderr
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in other.stderr
    assert "Traceback" not in other.stderr
