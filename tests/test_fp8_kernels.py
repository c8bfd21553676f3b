"""The C kernels against the torch reference, bit for bit: every instruction set that this machine has, every type."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ottava.errors import FormatError, PlatformError
from ottava.fp8 import codec, kernels, reference, spec

F8 = torch.float8_e4m3fn
FLOATS = [torch.bfloat16, torch.float16, torch.float32]
GRIDS = [torch.bfloat16, torch.float32]
SHAPES = [
    *[(1, 1), (1, 31), (1, 200), (127, 3), (128, 128), (129, 129), (130, 64), (3, 576), (192, 160), (160, 192)],
    *[(576, 130), (2, 33, 65), (2, 3, 130, 70), (257, 96), (40, 512)],
]
CANARY = 0xA5

needs_kernels = pytest.mark.skipif(not kernels.levels(), reason="the extension is not built")
each_level = pytest.mark.parametrize("level", kernels.levels() or ["none"])
pytestmark = needs_kernels


def raw(t: Tensor) -> Tensor:
    """The bytes, so that NaN equals itself and -0 is not 0."""
    return t.contiguous().view(torch.uint8)


def framed(shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0) -> tuple[Tensor, Callable[[], bool]]:
    """A tensor inside a larger buffer, `offset` elements off alignment, and whether the rest is untouched."""
    size = torch.empty((), dtype=dtype).element_size()
    length = int(np.prod(shape)) * size
    buffer = torch.full((length + 2048,), CANARY, dtype=torch.uint8)
    start = 512 + -buffer.data_ptr() % 64 + offset * size  # offset 0 is a cache line's start
    inside = buffer[start : start + length].view(dtype).view(shape)
    return inside, lambda: bool((buffer[:start] == CANARY).all() and (buffer[start + length :] == CANARY).all())


def quantised(w: Tensor, level: str, offset: int = 0) -> tuple[Tensor, Tensor]:
    codes, codes_intact = framed(tuple(w.shape), F8, offset)
    scales, scales_intact = framed((*w.shape[:-2], *spec.grid(*w.shape[-2:])), torch.uint8, offset)
    kernels.quantise(w, codes, scales, level=level)
    assert codes_intact()
    assert scales_intact()
    return codes, scales


def assert_as_reference(w: Tensor, level: str, offset: int = 0) -> None:
    """All four functions on w."""
    codes, scales = quantised(w, level, offset)
    expected_codes, expected_scales = reference.quantise(w)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(raw(codes), raw(expected_codes))
    for dtype in GRIDS:
        out, intact = framed(tuple(w.shape), dtype, offset)
        kernels.dequantise(codes, scales, out, level=level)
        assert intact()
        assert torch.equal(raw(out), raw(reference.dequantise(codes, scales, dtype)))
    if w.dtype in GRIDS:
        out, intact = framed(tuple(w.shape), w.dtype, offset)
        kernels.project(w, out, level=level)
        assert intact()
        assert torch.equal(raw(out), raw(reference.project(w)))
    out, intact = framed(tuple(w.shape), torch.bfloat16, offset)
    assert kernels.measure(w, codes, scales, out, level=level) == reference.measure(w, codes, scales)
    assert intact()
    assert torch.equal(raw(out), raw(reference.dequantise(codes, scales, torch.bfloat16)))
    (again, codes_intact), (values, intact) = framed(tuple(w.shape), F8, offset), framed(tuple(w.shape), torch.bfloat16)
    scales_again = torch.empty_like(scales)
    errors = kernels.quantise_measured(w, again, scales_again, values, level=level)
    assert errors == reference.measure(w, codes, scales)
    assert codes_intact()
    assert intact()
    for found, expected in ((again, codes), (scales_again, scales), (values, out)):
        assert torch.equal(raw(found), raw(expected))


def wide(shape: tuple[int, ...], dtype: torch.dtype, seed: int, spread: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator) * torch.exp2(spread * torch.randn(shape, generator=generator))
    limit = torch.finfo(dtype).max
    return w.clamp(-limit, limit).to(dtype)


def some_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int, low: int, high: int) -> Tensor:
    """Finite values of any sign and fraction whose exponent field lies between low and high."""
    generator = torch.Generator().manual_seed(seed)
    width, fraction = (32, 23) if dtype == torch.float32 else (16, 10 if dtype == torch.float16 else 7)
    top = 30 if dtype == torch.float16 else 254
    exponent = torch.randint(min(low, top), min(high, top) + 1, shape, generator=generator)
    bits = exponent << fraction | torch.randint(0, 1 << fraction, shape, generator=generator)
    bits -= torch.randint(0, 2, shape, generator=generator) << (width - 1)
    return bits.to(torch.int32 if width == 32 else torch.int16).view(dtype)


@each_level
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(level: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert_as_reference(wide(shape, dtype, 1, 0.3), level)
    assert_as_reference(wide(shape, dtype, 2, 4.0), level, offset=1)
    assert_as_reference(torch.zeros(shape, dtype=dtype).neg(), level, offset=3)


@each_level
@pytest.mark.parametrize("dtype", FLOATS)
@settings(max_examples=40)
@given(
    rows=st.integers(1, 140),
    columns=st.integers(1, 300),
    offset=st.integers(0, 63),
    seed=st.integers(0, 1 << 30),
    low=st.integers(0, 254),
    span=st.integers(0, 40),
)
def test_any_shape_and_exponents(
    level: str, dtype: torch.dtype, rows: int, columns: int, offset: int, seed: int, low: int, span: int
) -> None:
    assert_as_reference(some_bits((rows, columns), dtype, seed, low, low + span), level, offset)


@each_level
@pytest.mark.parametrize("dtype", FLOATS)
def test_all_exponents_at_once(level: str, dtype: torch.dtype) -> None:
    for low in range(0, 256, 5):
        assert_as_reference(some_bits((64, 160), dtype, low, low, low + 14), level)
    assert_as_reference(some_bits((300, 300), dtype, 7, 0, 254), level)


@each_level
@pytest.mark.parametrize("dtype", GRIDS)
def test_every_bf16_value_as_the_maximum_of_its_block(level: str, dtype: torch.dtype) -> None:
    amax = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16).to(dtype).reshape(-1, 1, 1)
    assert_as_reference(amax, level)
    assert_as_reference(torch.cat([amax / 37, -amax, amax / 300, amax / 1024], -1), level)


@each_level
@pytest.mark.parametrize("dtype", GRIDS)
def test_every_bf16_value_under_many_maxima(level: str, dtype: torch.dtype) -> None:
    """All 65,280 finite patterns in four blocks; those above the maximum are cut to it."""
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    patterns = patterns[patterns.isfinite()]
    patterns = torch.cat([patterns, patterns.new_zeros(4 * 16384 - len(patterns))]).view(512, 128).to(dtype)
    for exponent in (-133, -127, -117, -116, -109, -108, 0, 8, 119, 127):
        amax = (torch.tensor(1.8125, dtype=torch.float64) * 2.0**exponent).clamp(max=3.38e38).to(dtype)
        cut = patterns.clamp(-amax, amax)
        cut[::128, 0] = amax
        assert_as_reference(cut, level)
        cut[::128, 0] = torch.nextafter(amax.float(), torch.tensor(torch.inf)).to(dtype) if dtype.itemsize > 2 else amax
        assert_as_reference(cut, level)


@each_level
@pytest.mark.parametrize("dtype", FLOATS)
def test_ties_and_their_neighbours(level: str, dtype: torch.dtype) -> None:
    codes = torch.arange(0x7F, dtype=torch.uint8).view(F8).double()
    between = (codes[1:] + codes[:-1]) / 2
    values = torch.cat([codes, between, torch.tensor([448.0, 456, 464])])
    exact = values.to(dtype)
    near = [exact.view(torch.int16 if dtype.itemsize == 2 else torch.int32) + step for step in (-2, -1, 0, 1, 2)]
    block = torch.cat([bits.view(dtype) for bits in near])
    block = block[block.isfinite() & (block.abs() <= 464)]
    block = torch.cat([block, -block, torch.tensor([464.0], dtype=dtype)]).reshape(1, -1)
    assert_as_reference(block[:, -128:], level)
    for start in range(0, block.shape[1], 100):
        part = torch.cat([block[:, start : start + 100], block[:, -1:]], 1)
        for scale in (1.0, 2.0**-7, 2.0**7) if dtype == torch.float16 else (1.0, 2.0**-117, 2.0**-116, 2.0**118):
            assert_as_reference((part.double() * scale).to(dtype), level)


@each_level
@pytest.mark.parametrize("dtype", FLOATS)
def test_all_64770_pairs_and_nan_by_two_oracles(level: str, dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    low, high = spec.EXACT[reference.TYPE_NAMES[dtype]]
    numpy = np.frombuffer(bytes(range(256)), dtype=ml_dtypes.float8_e4m3fn).astype(np.float64)
    target = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16, torch.float32: np.float32}[dtype]
    for k in range(low, high + 1):
        matrix = codes.view(F8).repeat(3, 1)
        for block in ((128, 128), spec.MX_BLOCK):
            scales = torch.full(spec.grid(3, 256, block), k + spec.BIAS, dtype=torch.uint8)
            out, intact = framed((3, 256), dtype)
            kernels.dequantise(matrix, scales, out, block=block, level=level)
            assert intact()
            value = out[1]
            assert value[[0x7F, 0xFF]].isnan().all()
            finite = codes & 0x7F != 0x7F
            expected = (codes.view(F8).double() * 2.0**k).to(dtype)
            assert torch.equal(raw(value[finite]), raw(expected[finite]))
            other = np.ldexp(numpy, k).astype(target)[finite.numpy()]
            assert raw(value[finite]).numpy().tobytes() == other.tobytes()
            assert torch.equal(out[0].view(torch.uint8), out[2].view(torch.uint8))


@each_level
@settings(max_examples=40)
@given(st.integers(1, 5), st.integers(1, 300), st.integers(0, 1 << 30), st.booleans(), st.sampled_from(FLOATS))
def test_narrow_blocks(level: str, rows: int, columns: int, seed: int, repeated: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 0x7F, (rows, columns), dtype=torch.uint8, generator=generator).view(F8)
    low, high = (k + spec.BIAS for k in spec.EXACT[reference.TYPE_NAMES[dtype]])
    shape = spec.grid(rows, columns, spec.MX_BLOCK)
    scales = torch.randint(low, high + 1, shape, dtype=torch.uint8, generator=generator)
    if repeated:
        scales = scales[:, :1].expand(shape).contiguous()
    out, intact = framed((rows, columns), dtype)
    kernels.dequantise(codes, scales, out, block=spec.MX_BLOCK, level=level)
    assert intact()
    assert torch.equal(raw(out), raw(reference.dequantise(codes, scales, dtype, block=spec.MX_BLOCK)))


@each_level
@pytest.mark.parametrize("dtype", FLOATS)
def test_small_square_blocks(level: str, dtype: torch.dtype) -> None:
    torch.manual_seed(20)
    codes = torch.randint(0, 0x7F, (70, 2, 97), dtype=torch.uint8).view(F8).transpose(0, 1).contiguous()
    scales = torch.randint(112, 135, (2, 3, 4), dtype=torch.uint8)
    out, intact = framed((2, 70, 97), dtype)
    kernels.dequantise(codes, scales, out, block=(32, 32), level=level)
    assert intact()
    rows = scales.repeat_interleave(32, 1)[:, :70]
    assert torch.equal(raw(out), raw(reference.dequantise(codes, rows, dtype, block=spec.MX_BLOCK)))
    assert torch.equal(raw(out), raw(codec.dequantise(codes, scales, dtype, block=(32, 32))))


@each_level
@pytest.mark.parametrize("dtype", FLOATS)
def test_errors_of_other_codes_are_measured(level: str, dtype: torch.dtype) -> None:
    """Codes that nearest rounding would not have chosen, at scales it would not have chosen."""
    w = wide((200, 333), dtype, 3, 2.0)
    codes = torch.randint(0, 0x7F, w.shape, dtype=torch.uint8).view(F8)
    scales = torch.randint(97, 158, spec.grid(*w.shape), dtype=torch.uint8)
    assert kernels.measure(w, codes, scales, level=level) == reference.measure(w, codes, scales)
    errors = reference.measure(w, codes, scales)
    values = reference.dequantise(codes, scales).double()
    assert errors.signal == pytest.approx(float(w.double().square().sum()), rel=1e-5)
    assert errors.noise == pytest.approx(float((w.double() - values).square().sum()), rel=1e-5)
    assert errors.changed == int((w.double() != values).sum())


@each_level
def test_minus_zero_is_a_change(level: str) -> None:
    codes = torch.zeros(1, 3, dtype=torch.uint8).view(F8)
    scales = torch.full((1, 1), 127, dtype=torch.uint8)
    assert kernels.measure(torch.tensor([[0.0, -0.0, 0.0]]), codes, scales, level=level) == (1, 0.0, 0.0)


@each_level
@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this machine cannot flush subnormals")
@pytest.mark.parametrize("dtype", FLOATS)
def test_flushing_subnormals_changes_only_the_sums(level: str, dtype: torch.dtype) -> None:
    """Subnormal elements, scales under which values are subnormal, and elements whose squares are."""
    w = torch.cat([some_bits((128, 300), dtype, 21, low, low + 3) for low in (0, 12, 40, 60, 110)])
    low, high = (k + spec.BIAS for k in spec.EXACT[reference.TYPE_NAMES[dtype]])
    codes = torch.arange(256, dtype=torch.uint8).view(F8).repeat(high - low + 1, 1)
    scales = torch.arange(low, high + 1, dtype=torch.uint8)[:, None].expand(-1, 8).contiguous()

    def everything() -> tuple[list[bytes], list[reference.Errors]]:
        out = torch.empty(codes.shape, dtype=dtype)
        kernels.dequantise(codes, scales, out, block=spec.MX_BLOCK, level=level)
        found, place, values = list(quantised(w, level)), w.clone(), torch.empty(w.shape, dtype=torch.bfloat16)
        if dtype in GRIDS:
            kernels.project(w, place, level=level)
        errors = [kernels.measure(part, *quantised(part, level), level=level) for part in w.split(128)]
        kernels.measure(w, *found, values, level=level)
        return [raw(t).numpy().tobytes() for t in (*found, out, place, values)], errors

    exact, sums = everything()
    assert torch.set_flush_denormal(True)
    try:
        flushed, flushed_sums = everything()
    finally:
        torch.set_flush_denormal(False)
    assert flushed == exact
    assert [e.changed for e in flushed_sums] == [e.changed for e in sums]
    assert dtype == torch.float16 or flushed_sums != sums  # so the exception that the docstrings make is needed


# Large tensors: streaming stores, threads.


@each_level
@pytest.mark.filterwarnings("ignore:.*fork.*")
@pytest.mark.parametrize("width", [16, 32, 48])
def test_blocks_that_begin_inside_a_cache_line(level: str, width: int) -> None:
    """The C function itself, whose stores past the caches fault where a block's first byte is not aligned to them."""
    rows, columns = 1024, 6144
    torch.manual_seed(22)
    codes = torch.randint(0, 0x7F, (rows, columns), dtype=torch.uint8)
    scales = torch.randint(100, 140, spec.grid(rows, columns, (1, width)), dtype=torch.uint8)
    powers = torch.exp2(scales.float() - spec.BIAS).repeat_interleave(width, 1)
    expected = (codes.view(F8).float() * powers).to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    out, intact = framed((rows, columns), torch.bfloat16)
    places = (codes.data_ptr(), 0, columns), scales.data_ptr(), (out.data_ptr(), 0, 2 * columns)
    child = os.fork()
    if child == 0:
        assert kernels.extension is not None
        kernels.extension.dequantise(kernels.LEVELS.index(level), 1, (1, rows, columns), 0, *places, 1, width)
        os._exit(0 if out.view(torch.int16).numpy().tobytes() == expected and intact() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@each_level
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", GRIDS)
def test_large_tensors_and_threads(level: str, threads: int, dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_as_reference(wide((300, 2112), dtype, 4, 1.0), level)
        base = wide((128, 4096), dtype, 5, 1.0)
        w = base.repeat(17, 1)
        codes, scales = quantised(w, level)
        out, intact = framed(tuple(w.shape), dtype)
        kernels.dequantise(codes, scales, out, level=level)
        assert intact()
        expected = reference.quantise(base)[0].view(torch.uint8)
        assert bool((codes.view(17, 128, 4096).view(torch.uint8) == expected).all())
        assert bool((out.view(17, 128, 4096) == reference.project(base)).all())
    finally:
        torch.set_num_threads(before)


def test_several_python_threads_at_once() -> None:
    w = wide((512, 1000), torch.bfloat16, 6, 1.0)
    codes = torch.empty(w.shape, dtype=F8)
    scales = torch.empty(spec.grid(*w.shape), dtype=torch.uint8)
    bands = [slice(i, i + 128) for i in range(0, 512, 128)]
    workers = [
        threading.Thread(target=codec.quantise, args=(w[b],), kwargs={"out": (codes[b], scales[b.start // 128, None])})
        for b in bands
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    expected = reference.quantise(w)
    assert torch.equal(raw(codes), raw(expected[0]))
    assert torch.equal(scales, expected[1])


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_forked_child_of_a_threaded_parent() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        w = wide((1024, 1024), torch.float32, 7, 1.0)
        expected = codec.project(w)  # wakes the parent's threads
        wanted = expected.numpy().tobytes()
        child = os.fork()
        if child == 0:  # torch's own parallel loops would hang here, so nothing but the kernel may run
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # no handler of ours runs while C waits
            signal.alarm(60)
            os._exit(0 if codec.project(w).numpy().tobytes() == wanted else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(before)


# Views and memory.


@pytest.mark.parametrize("dtype", GRIDS)
def test_views_as_the_trainer_has_them(dtype: torch.dtype) -> None:
    flat = wide((1, 4 * 2 * 96 * 130 + 64), dtype, 8, 1.0).flatten()
    view = flat[64:].view(4, 2 * 96, 130).view(4, 2, 96, 130)
    around, expected = flat[:64].clone(), reference.project(view.clone())
    version = view._version
    assert codec.project(view, out=view) is view
    assert view._version > version  # autograd must notice
    assert torch.equal(raw(view), raw(expected))
    assert torch.equal(raw(flat[:64]), raw(around))


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.mT,
    "every second column": lambda t: t[..., ::2],
    "every third row": lambda t: t[..., ::3, :],
    "columns of a wider matrix": lambda t: t[..., 5:150],
    "batch between rows and columns": lambda t: t.transpose(-3, -2),
    "one matrix many times": lambda t: t[:1].expand(3, -1, -1),
    "a batch of transposes": lambda t: t.permute(1, 2, 0),
    "a conjugate's lazy negation": lambda t: torch._neg_view(t),
    "a parameter": lambda t: torch.nn.Parameter(t),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
@pytest.mark.parametrize("dtype", GRIDS)
def test_views(view: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    w = view(wide((3, 200, 170), dtype, 9, 2.0))
    plain = w.detach().resolve_neg().contiguous()
    codes, scales = codec.quantise(w)
    expected_codes, expected_scales = reference.quantise(plain)
    assert torch.equal(raw(codes), raw(expected_codes))
    assert torch.equal(scales, expected_scales)
    assert torch.equal(raw(codec.project(w)), raw(reference.project(plain)))
    assert codec.measure(w, codes, scales) == reference.measure(plain, codes, scales)


def test_only_the_view_is_written() -> None:
    whole = torch.full((200, 300), 7.0)
    target = whole[10:150, 20:220]
    w = wide((140, 200), torch.float32, 10, 1.0)
    codec.project(w, out=target)
    assert torch.equal(target, reference.project(w))
    whole[10:150, 20:220] = 7.0
    assert (whole == 7.0).all()


def test_overlapping_memory_is_right_too() -> None:
    memory = wide((1, 40_000), torch.float32, 11, 1.0).flatten()
    w, shifted = memory[:39_000].view(130, 300), memory[17:39_017].view(130, 300)
    expected = reference.project(w.clone())
    assert torch.equal(codec.project(w, out=shifted), expected)


# What is refused, and what is left behind.


@each_level
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", FLOATS)
def test_infinity_and_nan(level: str, bad: float, dtype: torch.dtype) -> None:
    for place in ((0, 0), (129, 299), (64, 150), (128, 256)):
        w = wide((130, 300), dtype, 12, 1.0)
        w[place] = bad
        codes = torch.zeros(w.shape, dtype=torch.uint8).view(F8)
        scales = torch.zeros(spec.grid(*w.shape), dtype=torch.uint8)
        with pytest.raises(FormatError, match="infinity or NaN"):
            kernels.quantise(w, codes, scales, level=level)
        assert codes.float().isnan().all()
        assert (scales == 255).all()
        if dtype in GRIDS:
            before = w.clone()
            with pytest.raises(FormatError, match="infinity or NaN"):
                kernels.project(w, w, level=level)
            assert torch.equal(raw(w), raw(before))


def refusals() -> dict[str, Callable[[], Any]]:
    w = torch.ones(130, 140)
    codes, scales = torch.zeros(130, 140).to(F8), torch.full((2, 2), 127, dtype=torch.uint8)
    half = torch.ones(130, 140, dtype=torch.float16)
    return {
        "codes of another shape": lambda: kernels.quantise(w, codes[:129], scales),
        "codes of another type": lambda: kernels.quantise(w, codes.view(torch.uint8), scales),
        "too few scales": lambda: kernels.quantise(w, codes, scales[:1]),
        "scales of another type": lambda: kernels.quantise(w, codes, scales.int()),
        "scales with gaps": lambda: kernels.quantise(w, codes, torch.zeros(2, 4, dtype=torch.uint8)[:, ::2]),
        "float64": lambda: kernels.quantise(w.double(), codes, scales),
        "columns with gaps": lambda: kernels.quantise(torch.ones(130, 280)[:, ::2], codes, scales),
        "another device": lambda: kernels.quantise(w.to("meta"), codes, scales),
        "no matrix": lambda: kernels.quantise(torch.ones(3), torch.ones(3).to(F8), scales),
        "nothing": lambda: kernels.quantise(torch.ones(0, 3), torch.ones(0, 3).to(F8), scales[:0, :1]),
        "codes that are one element": lambda: kernels.quantise(w, codes[:1, :1].expand(130, 140), scales),
        "dequantised into another shape": lambda: kernels.dequantise(codes, scales, torch.empty(130, 139)),
        "dequantised into codes": lambda: kernels.dequantise(codes, scales, codes),
        "blocks that do not fit": lambda: kernels.dequantise(codes, scales, w.clone(), block=(1, 32)),
        "a window left below": lambda: kernels.dequantise(codes, scales - 125, half.bfloat16()),
        "a window left above": lambda: kernels.dequantise(codes, scales + 8, half),
        "projected FP16": lambda: kernels.project(half, half),
        "projected into another type": lambda: kernels.project(w, w.bfloat16()),
        "projected into another shape": lambda: codec.project(w, out=torch.empty(130, 139)),
        "measured against another shape": lambda: kernels.measure(w[:129], codes, scales),
        "measured into float32": lambda: codec.measure(w, codes, scales, out=torch.empty(130, 140)),
        "a codec's out of another type": lambda: codec.dequantise(codes, scales, out=half),
        "quantised float64": lambda: codec.quantise(w.double()),
        "dequantised float64": lambda: codec.dequantise(codes, scales, torch.float64),
    }


@pytest.mark.parametrize("name", list(refusals()))
def test_what_does_not_fit_is_refused(name: str) -> None:
    with pytest.raises(FormatError):
        refusals()[name]()


@pytest.mark.parametrize("block", [(1, 16), (1, 48), (1, 64), (32, 1), (128, 32), (0, 32), (1, 0), (-128, -128), (1,)])
def test_other_blocks_are_refused(block: Any) -> None:
    """Whatever their number of scales, and before a division by zero."""
    rows, columns = block[0], block[-1]
    codes = torch.zeros(96, 96).to(F8)
    scales = torch.full((-(-96 // (abs(rows) or 1)), -(-96 // (abs(columns) or 1))), 127, dtype=torch.uint8)
    out = torch.empty(96, 96)
    for dequantise in (
        lambda: codec.dequantise(codes, scales, block=block),
        lambda: reference.dequantise(codes, scales, block=block),
        lambda: kernels.dequantise(codes, scales, out, block=block),
    ):
        with pytest.raises(FormatError, match="for each block of"):
            dequantise()


def test_an_unknown_level() -> None:
    w = torch.ones(1, 1)
    with pytest.raises(PlatformError, match="no kernels for sve"):
        kernels.project(w, w, level="sve")


# Without the extension.


@pytest.mark.parametrize("dtype", GRIDS)
def test_the_same_without_the_extension(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    w = wide((2, 150, 140), dtype, 13, 3.0)

    def everything() -> list[Tensor]:
        codes, scales = codec.quantise(w)
        out = torch.empty(w.shape, dtype=torch.bfloat16)
        errors = codec.measure(w, codes, scales, out=out)
        given = codec.quantise(w, out=(torch.empty_like(codes), torch.empty_like(scales)))
        place = w.clone()
        codec.project(place, out=place)
        found = [codes, scales, *given, codec.dequantise(codes, scales, dtype), place, out]
        return [raw(t) for t in found] + [torch.tensor(errors, dtype=torch.float64)]

    with_kernels = everything()
    monkeypatch.setattr(kernels, "extension", None)
    assert kernels.levels() == ()
    without = everything()
    assert all(torch.equal(a, b) for a, b in zip(with_kernels, without, strict=True))
    with pytest.raises(PlatformError, match="no kernels"):
        kernels.project(w, w)
