"""The conformance suite: what every chip family must show, on whatever devices this machine has.

A new family passes these tests unchanged: `OTTAVA_TEST_PLATFORM=NAME pytest -m device tests/test_platforms.py`.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from ottava import platforms
from ottava.errors import FormatError, PlatformError, ResourceError
from ottava.platforms import FaultClass, Platform, base, probe
from ottava.recipe import load_fleet
from ottava.trainer.snapshot import Snapshot
from ottava.trainer.spec import TrainSpec
from ottava.trainer.start import make_trainer

from .conftest import PLATFORM

FLEETS = Path(__file__).parents[1] / "fleets"
DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool)


@pytest.fixture
def platform() -> Platform:
    """The platform that is tested, with its device: where it is missing the tests fail and say why."""
    found = platforms.get(PLATFORM)
    found.require()
    found.pin_numerics()
    return found


@pytest.fixture(params=platforms.names())
def any_platform(request: pytest.FixtureRequest) -> Platform:
    """A platform whether or not its device is here: what must work without one."""
    return platforms.get(request.param)


# --- with a device -----------------------------------------------------------------------------------------------


@pytest.mark.device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_survive_the_way_to_the_device_and_back(platform: Platform, dtype: torch.dtype) -> None:
    raw = torch.arange(4096, dtype=torch.int64).mul(37).remainder(256).to(torch.uint8)
    values = raw.remainder(2).to(torch.bool) if dtype == torch.bool else raw.view(dtype)
    returned = values.to(platform.device()).clone().cpu()
    platform.synchronize()
    assert torch.equal(returned.view(torch.uint8), values.view(torch.uint8))


@pytest.mark.device
def test_devices_are_counted_and_bounded(platform: Platform) -> None:
    assert platform.count() >= 1
    assert isinstance(platform.device(platform.count() - 1), torch.device)
    for index in (-1, platform.count()):
        with pytest.raises(PlatformError, match="there is no"):
            platform.device(index)


@pytest.mark.device
def test_memory_is_in_bytes_and_grows_with_use(platform: Platform) -> None:
    grown = []
    for attempt in range(10 if platform.shared_memory else 1):  # other processes may free memory in the same moment
        before, total = platform.memory(0)
        assert 0 <= before <= total
        assert total > 1 << 28
        held = torch.ones((attempt + 1) << 26, device=platform.device())  # 256 MiB, and more where that was not seen
        platform.synchronize()
        for _ in range(20):  # some systems bring their count up to date only now and then
            grown.append(platform.memory(0)[0] - before)
            if grown[-1] > (1 << 28) - (1 << 26) or not platform.shared_memory:
                break
            time.sleep(0.1)
        del held
        if grown[-1] > (1 << 28) - (1 << 26):
            break
    assert max(grown) > (1 << 28) - (1 << 26)  # the system keeps its count in batches
    assert platform.peak_memory() >= 1 << 28, "also once it is given back"


@pytest.mark.device
def test_pinned_numerics_repeat_bit_for_bit_and_draw_nothing(platform: Platform) -> None:
    state = torch.get_rng_state()
    first = probe.numerics_class({"platform": platform.name})
    platform.pin_numerics()
    torch.ones(129, 129, device=platform.device()) @ torch.ones(129, 129, device=platform.device())
    second = probe.numerics_class({"platform": platform.name})
    assert first["numerics_class"] == second["numerics_class"]
    assert first["parts"] == second["parts"]
    assert math.isfinite(first["loss"])
    assert torch.equal(state, torch.get_rng_state())
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_num_threads() == 1


@pytest.mark.device
def test_training_on_the_device_repeats_and_goes_on_from_a_snapshot(platform: Platform, dataset: Path) -> None:
    spec = TrainSpec.model_validate({"steps": 12, "batch": 2, "direct": {"begin": 0.3, "batch": 2}})
    args = {
        "spec": spec.model_dump(mode="json"), "seed": 3, "data": str(dataset), "chat": str(dataset / "chat"),
        "platform": platform.name,
    }  # fmt: skip

    def trained(steps: int, start: Snapshot | None = None) -> Snapshot:
        trainer = make_trainer(args)
        assert trainer.state.arena.device == platform.own()
        if start is not None:
            trainer.state.restore(start)
        while trainer.state.step < steps:
            trainer.step(lambda total: total, range(spec.virtual_shards))
        kept = trainer.state.snapshot()
        return replace(kept, payload=bytes(kept.payload))

    half, whole = trained(3), trained(6)
    assert whole.digest == trained(6).digest == trained(6, half).digest != half.digest


@pytest.mark.device
def test_products_lie_inside_the_error_bound(platform: Platform) -> None:
    report = probe.matmul_error({"platform": platform.name})
    assert report["ok"], report
    assert 0 < report["rms_error"] <= report["max_error"] < 1e-5


@pytest.mark.device
def test_huge_allocations_are_classified_as_out_of_memory(platform: Platform) -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8, device=platform.device())
    assert platform.classify_error(caught.value) is FaultClass.OUT_OF_MEMORY


@pytest.mark.device
def test_wrong_shapes_are_classified_as_bugs(platform: Platform) -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2, 3, device=platform.device()) @ torch.ones(2, 3, device=platform.device())
    assert platform.classify_error(caught.value) is FaultClass.BUG


@pytest.mark.device
def test_a_description_is_json_and_names_what_decides_the_bits(platform: Platform) -> None:
    about = json.loads(json.dumps(platform.describe()))
    assert about["available"]
    assert about["platform"] == platform.name
    assert about["chip"]
    assert about["instruction_set"]
    assert about["libraries"]["torch"] == torch.__version__


@pytest.mark.device
def test_speed_is_positive_and_in_the_range_of_computers(platform: Platform) -> None:
    report = probe.throughput({"platform": platform.name, "seconds": 0.01, "repeats": 3})
    assert 0.1 < report["gflops"] < 1e7
    assert len(report["samples"]) == 3


# --- without a device --------------------------------------------------------------------------------------------


def test_the_interface_holds_without_a_device(any_platform: Platform) -> None:
    assert any_platform.name in platforms.names()
    assert any_platform.backend() in ("gloo", "nccl", "hccl")
    here, reason = any_platform.available()
    assert reason
    assert (any_platform.count() > 0) == here
    assert json.loads(json.dumps(any_platform.describe()))["available"] == here
    env = any_platform.visible_env([1, 3])
    assert env == ({any_platform.visible: "1,3"} if any_platform.visible else {})


def test_host_and_device_tensors_both_find_a_backend(any_platform: Platform) -> None:
    found = any_platform.process_group()
    assert (
        found == "gloo"
        if any_platform.name == "cpu"
        else found == f"cpu:gloo,{any_platform.name}:{any_platform.backend()}"
    )


def test_a_missing_device_is_a_clear_error(any_platform: Platform) -> None:
    if any_platform.available()[0]:
        pytest.skip(f"{any_platform.name} is here")
    its = any_platform
    for use in (its.device, its.pin_numerics, its.memory, its.peak_memory, its.synchronize):
        with pytest.raises(PlatformError, match="cannot be used here"):
            use()
    with pytest.raises(PlatformError, match="cannot be used here"):
        probe.resources({"platform": any_platform.name})


def test_an_unknown_platform_is_refused_with_a_suggestion() -> None:
    with pytest.raises(PlatformError, match="did you mean 'cuda'"):
        platforms.get("cudaa")
    with pytest.raises(PlatformError, match="unknown platform 'probe'"):
        platforms.get("probe")


def test_every_file_of_the_package_is_a_platform_or_a_tool() -> None:
    assert {"cpu", "cuda", "npu"} <= set(platforms.names())
    assert [platforms.get(name).name for name in platforms.names()] == platforms.names()


def test_asking_a_platform_does_not_import_torch() -> None:
    code = (
        "import sys; from ottava import platforms\n"
        "for name in platforms.names():\n"
        "    p = platforms.get(name); p.backend(); p.visible_env([0]); p.classify_error(RuntimeError('x'))\n"
        "assert 'torch' not in sys.modules and 'torch_npu' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


class DistBackendError(RuntimeError):
    """Stands for torch's error of the same name."""


FAULTS = [
    ("cpu", MemoryError(), FaultClass.OUT_OF_MEMORY),
    ("cpu", RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), FaultClass.OUT_OF_MEMORY),
    ("cpu", RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:5"), "collective"),
    ("cpu", ConnectionResetError(104, "reset"), FaultClass.COLLECTIVE),
    ("cpu", DistBackendError("x"), FaultClass.COLLECTIVE),
    ("cpu", FloatingPointError("overflow"), FaultClass.NUMERIC),
    ("cpu", FormatError("inf has no form"), FaultClass.NUMERIC),
    ("cpu", RuntimeError("Function 'MulBackward0' returned nan values in its 0th output."), FaultClass.NUMERIC),
    ("cpu", InterruptedError(4, "interrupted"), FaultClass.TRANSIENT),
    ("cpu", FileNotFoundError(2, "no such file"), FaultClass.BUG),
    ("cpu", KeyError("x"), FaultClass.BUG),
    ("cpu", RuntimeError("mat1 and mat2 shapes cannot be multiplied"), FaultClass.BUG),
    ("cpu", ResourceError("disk full"), FaultClass.BUG),
    ("cuda", RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), FaultClass.OUT_OF_MEMORY),
    ("cuda", RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), FaultClass.OUT_OF_MEMORY),
    ("cuda", RuntimeError("CUDA error: uncorrectable ECC error encountered"), FaultClass.DEVICE_LOST),
    ("cuda", RuntimeError("NCCL error: remote process exited or there was a network error"), FaultClass.COLLECTIVE),
    ("cuda", RuntimeError("[Rank 3] Watchdog caught collective operation timeout"), FaultClass.COLLECTIVE),
    ("cuda", RuntimeError("CUDA error: device-side assert triggered"), FaultClass.BUG),
    ("npu", RuntimeError("NPU out of memory. Tried to allocate 1.00 GiB"), FaultClass.OUT_OF_MEMORY),
    ("npu", RuntimeError("ERR00100 PTA call acl api failed, error code is 507054"), FaultClass.DEVICE_LOST),
    ("npu", RuntimeError("aclrtSynchronizeStream: the error code is 507014, aicore timeout"), FaultClass.TRANSIENT),
    ("npu", RuntimeError("ACL stream synchronize failed, error code is 507046"), FaultClass.COLLECTIVE),
    ("npu", RuntimeError("EI0002: notify wait timed out"), FaultClass.COLLECTIVE),
    ("npu", RuntimeError("ERR02200 DIST call hccl api failed."), FaultClass.COLLECTIVE),
    ("npu", RuntimeError("error code is 207003: overflow"), FaultClass.NUMERIC),
    ("npu", RuntimeError("error code is 507043: out-of-bounds write"), FaultClass.BUG),
    ("npu", RuntimeError("took 5070460 ns"), FaultClass.BUG),
]


@pytest.mark.parametrize(("name", "error", "fault"), FAULTS, ids=lambda value: str(value)[:40])
def test_faults_are_classified_from_their_text_and_type(name: str, error: Exception, fault: str) -> None:
    assert platforms.get(name).classify_error(error) == fault


def test_the_cause_of_an_error_is_looked_at_too() -> None:
    outer = RuntimeError("a step failed")
    outer.__cause__ = MemoryError()
    assert platforms.get("cpu").classify_error(outer) is FaultClass.OUT_OF_MEMORY
    outer.__cause__ = outer
    assert platforms.get("cpu").classify_error(outer) is FaultClass.BUG


# --- the probes catch what they are for --------------------------------------------------------------------------


def test_the_pattern_is_what_its_formula_says_and_exact_in_float32() -> None:
    values = probe.pattern((5, 7), salt=3, device=torch.device("cpu")).flatten().tolist()
    for i, value in enumerate(values):
        bits = ((i + 1 + 7919 * 3) * 2654435761 % 2**32) >> 8
        assert Fraction(value) == Fraction(bits - 2**23, 2**23)


def test_the_bound_holds_for_exact_rational_sums() -> None:
    """A second oracle for one product: rational arithmetic instead of float64."""
    a, b = (probe.pattern(shape, salt, torch.device("cpu")) for shape, salt in (((3, 16), 101), ((16, 2), 202)))
    computed = (a @ b).tolist()
    gamma = Fraction(16, 2**24) / (1 - Fraction(16, 2**24))
    for i in range(3):
        for j in range(2):
            terms = [Fraction(x) * Fraction(y) for x, y in zip(a[i].tolist(), b[:, j].tolist(), strict=True)]
            assert abs(Fraction(computed[i][j]) - sum(terms)) <= gamma * sum(map(abs, terms))


def _lossy(bits: int) -> object:
    """A matmul whose float32 inputs keep only `bits` significant bits, as TF32 (11) and BF16 (8) units do."""

    def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if a.dtype != torch.float32:
            return a @ b
        drop = 24 - bits
        a, b = ((x.contiguous().view(torch.int32) >> drop << drop).view(torch.float32) for x in (a, b))
        return a @ b

    return matmul


@pytest.mark.parametrize("bits", [11, 8], ids=["tf32", "bf16"])
def test_reduced_precision_products_are_caught(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    clean = probe.matmul_error({})
    monkeypatch.setattr(torch, "matmul", _lossy(bits))
    report = probe.matmul_error({})
    assert clean["ok"]
    assert not report["ok"]
    assert report["max_ratio"] > 10


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.5])
def test_one_wrong_element_is_caught(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        product = a @ b
        if a.dtype == torch.float32:
            product[-1, -1] += value
        return product

    monkeypatch.setattr(torch, "matmul", matmul)
    assert not probe.matmul_error({})["ok"]


def test_one_changed_bit_is_another_numerics_class(monkeypatch: pytest.MonkeyPatch) -> None:
    clean = probe.numerics_class({})
    exp = torch.exp
    monkeypatch.setattr(torch, "exp", lambda x: exp(x) * (1 + 2.0**-23))
    broken = probe.numerics_class({})
    assert broken["numerics_class"] != clean["numerics_class"]
    assert next(name for name in clean["parts"] if clean["parts"][name] != broken["parts"][name]) == "exp"


def _class_in(env: dict[str, str]) -> dict[str, object]:
    code = "import json; from ottava.platforms import probe; print(json.dumps(probe.numerics_class({})))"
    clean = {key: value for key, value in os.environ.items() if key not in ("ATEN_CPU_CAPABILITY",)}
    output = subprocess.run(
        [sys.executable, "-c", code], env={**clean, **env}, check=True, timeout=300, capture_output=True, text=True
    ).stdout
    return json.loads(output)


def test_the_laptop_pools_are_two_numerics_classes_and_each_repeats() -> None:
    fleet = load_fleet(FLEETS / "laptop.yaml")
    classes = {pool.name: _class_in(pool.env) for pool in fleet.pools}
    nvidia, ascend = classes["nvidia"], classes["ascend"]
    assert _class_in({**fleet.pool("ascend").env, "OMP_NUM_THREADS": "2"})["numerics_class"] == ascend["numerics_class"]
    if "AVX512" not in nvidia["describe"]["instruction_set"]:  # type: ignore[index]
        pytest.skip("this CPU has no AVX-512: both pools run the same kernels")
    assert ascend["describe"]["instruction_set"] == "AVX2"  # type: ignore[index]
    assert nvidia["numerics_class"] != ascend["numerics_class"]
    assert nvidia["loss"] == pytest.approx(ascend["loss"], rel=1e-5)


def test_late_pinning_is_refused() -> None:
    code = (
        "import torch; from ottava.errors import PlatformError; from ottava.platforms import get\n"
        "torch.set_num_interop_threads(3); torch.jit.wait(torch.jit.fork(torch.ones, 1))\n"
        "try: get('cpu').pin_numerics()\n"
        "except PlatformError as error: print(error)"
    )
    output = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert "after parallel work had started" in output.stdout, output.stderr


def test_worker_index_follows_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "RANK"):
        monkeypatch.delenv(name, raising=False)
    assert base.worker_index() == 0
    monkeypatch.setenv("RANK", "5")
    assert base.worker_index() == 5
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert base.worker_index() == 1
