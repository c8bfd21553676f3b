"""The Triton kernels equal the torch reference bit for bit: through the interpreter, and on a GPU where one is present.

Whether triton interprets is settled when it is first imported, so the interpreter has a process of its own; this
one compiles. A machine without a GPU shows that the arithmetic is right and that it compiles, not that a chip runs it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ottava import platforms
from ottava.errors import FormatError
from ottava.fp8 import reference, spec

triton = pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[triton]'")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from ottava.fp8 import triton as kernels  # noqa: E402

from .triton_sources import sources  # noqa: E402

F8 = torch.float8_e4m3fn
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
TILE = 4096

Run = Callable[..., Any]


@triton.jit
def _pairs(maxima, elements, codes, scales, exact, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The kernels' arithmetic without their blocks: one element for each maximum."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    top = tl.load(maxima + place)
    byte = kernels._scale(top)
    code = kernels._encode(tl.load(elements + place), byte)
    tl.store(codes + place, code.to(tl.uint8))
    tl.store(scales + place, kernels._stored(top, byte).to(tl.uint8))
    tl.store(exact + place, kernels._decode(code, byte, 23, 0))


def pairs(maxima: Tensor, elements: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and exact values of float32 elements, each in a block with the maximum beside it."""
    codes, scales = (torch.empty(maxima.shape, dtype=torch.uint8, device=maxima.device) for _ in range(2))
    exact = torch.empty_like(maxima)
    words = maxima.view(torch.int32), elements.view(torch.int32)
    _pairs[(maxima.numel() // TILE,)](*words, codes, scales, exact.view(torch.int32), BLOCK=TILE)
    return codes.view(F8), scales, exact


def here(name: str, *args: Any, **kwargs: Any) -> Any:
    return (globals() if name in ("pairs", "in_strips") else vars(kernels))[name](*args, **kwargs)


def in_strips(rows: int, name: str, *args: Any, **kwargs: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "STRIP", rows)
        return here(name, *args, **kwargs)


def on_device(device: torch.device) -> Run:
    def move(value: Any, to: torch.device) -> Any:
        if isinstance(value, tuple):
            return tuple(move(item, to) for item in value)
        return value.to(to) if isinstance(value, Tensor) else value

    def run(name: str, *args: Any, **kwargs: Any) -> Any:
        return move(here(name, *move(args, device), **kwargs), torch.device("cpu"))

    return run


@pytest.fixture(scope="module", params=["interpreter", "cuda"])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Calls a function of the kernels' module by name, on CPU tensors, wherever it runs."""
    if request.param == "cuda":
        platform = platforms.get("cuda")
        found, reason = platform.available()
        if not found:
            pytest.skip(f"no chip ran the kernels: {reason}")
        yield on_device(platform.device())
        return
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            assert pool.submit(here, "supports", torch.zeros(1)).result()  # the process starts here
        yield lambda name, *args, **kwargs: pool.submit(here, name, *args, **kwargs).result()


def same_bits(a: Tensor, b: Tensor) -> bool:
    word = WORDS[a.element_size()]
    return (
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.contiguous().view(word), b.contiguous().view(word))
    )


def assert_as_reference(run: Run, w: Tensor) -> None:
    codes, scales = run("quantise", w)
    expected_codes, expected_scales = reference.quantise(w)
    assert same_bits(codes, expected_codes)
    assert same_bits(scales, expected_scales)
    if w.dtype != torch.float16:
        exact = reference.dequantise(expected_codes, expected_scales, w.dtype)
        assert same_bits(run("dequantise", codes, scales, w.dtype), exact)
        assert same_bits(run("project", w), exact)


# ---------------------------------------------------------------- quantise, dequantise, project


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (129, 3), (3, 257), (128, 256), (130, 131), (2, 3, 40, 130)])
def test_random_and_ragged(run: Run, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    for spread in (0.5, 4.0, 12.0):
        w = torch.randn(shape) * torch.exp(spread * torch.randn(shape))
        assert_as_reference(run, w.clamp(-6e4, 6e4).to(dtype))


def test_strided(run: Run) -> None:
    torch.manual_seed(2)
    w = torch.randn(2, 140, 3, 200) * torch.exp(3 * torch.randn(2, 140, 3, 200))
    assert_as_reference(run, w.transpose(1, 2))
    assert_as_reference(run, w[0, :, 1].mT)
    assert_as_reference(run, w[1, ::2, 2, 1::3])


@settings(max_examples=20)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=12),
    st.integers(-149, 127),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_block(run: Run, values: list[float], shift: int, dtype: torch.dtype) -> None:
    assert_as_reference(run, torch.tensor([values]).clamp(-3e38, 3e38).to(dtype))
    assert_as_reference(
        run, torch.tensor([values], dtype=torch.float64).clamp(-1, 1).ldexp(torch.tensor(shift)).to(dtype)
    )


def test_every_float16_value(run: Run) -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    every = every[every.isfinite()]
    for w in (every, every[every.abs() < 2.0**-13], every[every.abs() < 2.0**-20]):
        assert_as_reference(run, w.view(62 if len(w) % 62 == 0 else 1, -1))


def test_edges_of_the_scale(run: Run) -> None:
    """One block for each: vanishing, smallest, tied, largest and saturated maxima, beside small values and zeros."""
    maxima = [2.0**-149, 2.0**-127, 2.0**-127 + 2.0**-149, 2.0**-126, 1.5 * 2.0**-126, 464 * 2.0**-117, 448.0, 464.0]
    maxima += [464 + 2.0**-15, 480.0, 464 * 2.0**118, 464 * 2.0**119, 3.4e38, 0.0, -0.0]
    fractions = [1.0, -1.0, 0.5, 1 / 3, -(2.0**-16), 2.0**-17, 1.5 * 2.0**-17, 2.0**-18, -(2.0**-19), 0.0, -0.0]
    w = torch.tensor(maxima, dtype=torch.float64)[:, None, None] * torch.tensor(fractions, dtype=torch.float64)
    assert_as_reference(run, w.float())
    assert_as_reference(run, w.float().to(torch.bfloat16).clamp(-3.3e38, 3.3e38))


def test_every_bf16_value_as_maximum(run: Run) -> None:
    """All 32,640 of them, each with elements at random, next to it, on ties between codes, and far below."""
    maxima = torch.arange(0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    maxima = torch.cat([maxima, torch.ones(-len(maxima) % TILE)])
    torch.manual_seed(3)
    scales = torch.exp2(reference.quantise(maxima[:, None, None])[1].flatten().double() - spec.BIAS)
    ties = torch.randint(1, 0x7E, maxima.shape, dtype=torch.uint8)
    halves = (ties.view(F8).double() + (ties + 1).view(F8).double()) / 2 * scales
    for element in (
        maxima,
        -maxima * torch.rand(maxima.shape),
        maxima * torch.exp2(-20 * torch.rand(maxima.shape)),
        torch.minimum(halves, maxima.double()).float(),
        torch.nextafter(torch.minimum(halves, maxima.double()).float(), torch.tensor(0.0)),
    ):
        codes, scales_found, exact = run("pairs", maxima, element)
        expected_codes, expected_scales = reference.quantise(torch.stack([maxima, element], -1)[:, None])
        assert same_bits(codes, expected_codes[:, 0, 1])
        assert same_bits(scales_found, expected_scales.flatten())
        assert same_bits(exact, reference.dequantise(expected_codes, expected_scales)[:, 0, 1])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_code_at_every_scale(run: Run, dtype: torch.dtype) -> None:
    lowest, highest = (k + spec.BIAS for k in spec.EXACT[reference.TYPE_NAMES[dtype]])
    scales = torch.arange(lowest, highest + 1, dtype=torch.uint8)[:, None]
    codes = torch.arange(256, dtype=torch.uint8).view(F8).expand(len(scales), -1)
    scales = scales.expand(-1, 256 // spec.MX_BLOCK[1])
    found = run("dequantise", codes, scales, dtype, block=spec.MX_BLOCK)
    expected = reference.dequantise(codes, scales, dtype, block=spec.MX_BLOCK)
    finite = expected.isfinite()
    assert int(finite.sum()) == 254 * len(scales)
    assert found[~finite].isnan().all()
    assert same_bits(found[finite], expected[finite])


def test_mx_blocks(run: Run) -> None:
    torch.manual_seed(4)
    codes = torch.randint(0, 0x7F, (2, 130, 140), dtype=torch.uint8).view(F8)
    scales = torch.randint(10, 247, (2, 130, 5), dtype=torch.uint8)
    expected = reference.dequantise(codes, scales, block=spec.MX_BLOCK)
    assert same_bits(run("dequantise", codes, scales, block=spec.MX_BLOCK), expected)
    assert same_bits(run("dequantise", codes, scales.view(torch.float8_e8m0fnu), block=spec.MX_BLOCK), expected)


def test_project_in_place(run: Run) -> None:
    torch.manual_seed(5)
    w = torch.randn(130, 140).mT
    out = torch.empty(140, 130)
    assert same_bits(run("project", w, out), reference.project(w))


def test_strips_of_a_block_give_its_bytes(run: Run) -> None:
    """As the kernels are lowered for Ascend (tests/hivm), whose buffers do not hold 128 rows: the largest value of a
    block stands in its last strip, or in its first, or the block ends within a strip."""
    torch.manual_seed(6)
    w = torch.randn(2, 133, 140)
    w[0, 127, 3], w[0, 130, 3], w[1, 0, 3] = 3000.0, 0.001, 3000.0
    for dtype in (torch.float32, torch.bfloat16):
        assert_as_reference(lambda name, *args: run("in_strips", 16, name, *args), w.to(dtype))


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_infinity_and_nan_are_refused(run: Run, bad: float, dtype: torch.dtype) -> None:
    w = torch.ones(2, 130, 129, dtype=dtype)
    w[1, 129, 128] = bad
    for name in ("quantise", "project") if dtype != torch.float16 else ("quantise",):
        with pytest.raises(FormatError, match="infinity or NaN"):
            run(name, w)


def test_what_does_not_fit_is_refused(run: Run) -> None:
    codes, scales = torch.zeros(130, 4, dtype=F8), torch.full((2, 1), 127, dtype=torch.uint8)
    with pytest.raises(FormatError, match="no matrix"):
        run("quantise", torch.zeros(4))
    with pytest.raises(FormatError, match="cannot hold the grid"):
        run("project", torch.zeros(4, 4, dtype=torch.float16))
    with pytest.raises(FormatError, match="where blocks of"):
        run("dequantise", codes, scales[:1])
    run("dequantise", codes, scales + 7, torch.float16)
    with pytest.raises(FormatError, match="values are exact"):
        run("dequantise", codes, scales + 8, torch.float16)


# ---------------------------------------------------------------- how it is reached, and compiled


def test_nothing_imports_triton_unasked() -> None:
    script = "import sys, ottava.fp8.codec; sys.exit('triton' in sys.modules or 'ottava.fp8.triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_what_is_supported_where_triton_compiles() -> None:
    assert not triton.knobs.runtime.interpret
    assert not kernels.supports(torch.zeros(2, 2))


SOURCES = sources(kernels.STRIP)
FLOATING_POINT = re.compile(r"\.(?:f16|f32|f64|bf16|tf32|e4m3|e5m2|ue8m0)\w*\b")


def compiled(name: str, target: GPUTarget) -> dict[str, Any]:
    """A kernel's machine code and its stages, made without a chip."""
    function, pointers, constants = SOURCES[name]
    signature = {arg: pointers.get(arg, "constexpr" if arg in constants else "i32") for arg in function.arg_names}
    source = triton.compiler.ASTSource(function, signature, constants)
    asm: dict[str, Any] = triton.compile(source, target=target, options=dict(kernels._OPTIONS)).asm
    return asm


@pytest.fixture
def fresh_cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize("name", SOURCES)
def test_compiles_for_ampere_without_floating_point(name: str) -> None:
    """The bytes cannot depend on a chip's conversions or on contraction if no such instruction is there."""
    asm = compiled(name, GPUTarget("cuda", 80, 32))
    assert len(asm["cubin"]) > 1000
    assert "st.global" in asm["ptx"]
    assert not FLOATING_POINT.findall(asm["ptx"])


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize("name", SOURCES)
def test_compiles_for_other_chips(name: str) -> None:
    for architecture in (90, 100):
        assert not FLOATING_POINT.findall(compiled(name, GPUTarget("cuda", architecture, 32))["ptx"])
    assert len(compiled(name, GPUTarget("hip", "gfx942", 64))["hsaco"]) > 1000  # its integer division uses v_rcp_f32
