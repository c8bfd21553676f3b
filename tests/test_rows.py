"""The kernels of fp8.rows: NumPy forms of the stated orders, bit for bit, and no row that feels its neighbours."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ottava.fp8 import rows
from ottava.fp8.codec import quantise
from ottava.fp8.linear import Fp8Linear

from .test_fp8_linear import fused

pytestmark = pytest.mark.skipif(not rows.levels(), reason="the extension is not built")
LEVELS = range(rows.BEST + 1)
F32 = npt.NDArray[np.float32]
SMALLEST = np.finfo(np.float32).tiny


def drawn(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32))


def flushed(x: npt.NDArray[np.floating]) -> F32:
    small = x.astype(np.float32)
    return np.where(np.abs(small) < SMALLEST, np.copysign(np.float32(0), small), small).astype(np.float32)


def plain_product(x: Tensor, weight: Tensor) -> Tensor:
    """As csrc/rows.h states it: pairs of columns, the odd one first, sums from +0, subnormal numbers flushed."""
    a, w = flushed(x.float().numpy()), flushed(weight.float().numpy())
    y = np.zeros((len(a), len(w)), dtype=np.float32)
    for j in range(0, a.shape[1], 2):
        for column in (j + 1, j):
            y = flushed(fused(a[:, column, None], w[None, :, column], y))
    return torch.from_numpy(y)


def plain_sum(lanes: F32) -> F32:
    """[..., 16] by the tree of rows.h."""
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def plain_squares(x: F32) -> F32:
    sums = np.zeros((*x.shape[:-1], 16), dtype=np.float32)
    for j in range(x.shape[-1]):
        sums[..., j % 16] = fused(x[..., j], x[..., j], sums[..., j % 16])
    return plain_sum(sums)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 150), st.integers(1, 150), st.integers(1, 9), st.booleans(), st.integers(0, 99))
def test_products_are_the_stated_sums(outputs: int, pairs: int, count: int, wide: bool, seed: int) -> None:
    weight = drawn(seed, outputs, 2 * pairs).bfloat16()
    x = drawn(seed + 1, count, 2 * pairs).to(torch.float32 if wide else torch.bfloat16)
    layer = Fp8Linear(*quantise(weight))
    expected = plain_product(x, weight), plain_product(x, layer.dequantised())
    for level in LEVELS:
        assert torch.equal(rows.Packed([weight])(x, level=level), expected[0])
        assert torch.equal(rows.Packed([layer])(x, level=level), expected[1])


@pytest.mark.parametrize("wide", [False, True])
def test_products_of_very_small_numbers_are_flushed(wide: bool) -> None:
    weight = (drawn(0, 32, 8) * 2.0**-70).bfloat16()
    x = torch.cat([drawn(1, 8, 8) * 2.0**-58, drawn(2, 8, 8) * 2.0**-130]).to(torch.float32 if wide else torch.bfloat16)
    weight[0] = torch.tensor(2.0**-130)
    expected = plain_product(x, weight)
    assert bool((expected == 0).any())
    assert bool((expected != 0).any())
    for level in LEVELS:
        assert torch.equal(rows.Packed([weight])(x, level=level), expected)
    assert float(torch.tensor(2.0**-130) * 1.0) == 2.0**-130  # and the mode is put back


def test_every_code_and_scale_counts_as_its_value() -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(64, 1)[:, torch.arange(256) & 0x7F != 0x7F]
    codes = torch.cat([codes, codes[:, :2]], 1)  # 256 columns
    for scale in (10, 127, 246):
        layer = Fp8Linear(codes, torch.full((1, 2), scale, dtype=torch.uint8))
        x = torch.eye(256)
        for level in LEVELS:
            assert torch.equal(rows.Packed([layer])(x, level=level).T, layer.dequantised(torch.float32))


@settings(deadline=None, max_examples=20)
@given(st.data(), st.booleans(), st.integers(1, 40), st.sampled_from([2, 130, 258, 576]))
def test_a_row_of_a_product_does_not_feel_the_others(data: st.DataObject, wide: bool, count: int, columns: int) -> None:
    packed = rows.Packed([drawn(0, 100, columns).bfloat16()])
    x = drawn(1, count, columns).to(torch.float32 if wide else torch.bfloat16)
    whole = packed(x)
    some = torch.tensor(data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=30)))
    for level in LEVELS:
        assert torch.equal(packed(x[some], level=level), whole[some])


@pytest.mark.parametrize("sizes", [(64, 128, 20), (192, 64), (10, 30), (128, 100)])
def test_stacked_layers_are_the_layers(sizes: tuple[int, ...]) -> None:
    layers = [Fp8Linear(*quantise(drawn(size, size, 130))) for size in sizes]
    packed, x = rows.Packed(layers), drawn(5, 3, 130).bfloat16()
    assert (packed.scales is not None) == all(size % 64 == 0 for size in sizes[:-1])
    assert torch.equal(packed(x), torch.cat([rows.Packed([layer])(x) for layer in layers], 1))


def test_a_table_gives_its_lines() -> None:
    for columns in (2, 128, 130, 300):
        table = drawn(0, 150, columns).bfloat16()
        ids = torch.tensor([0, 149, 63, 64, 15, 16, 64])
        assert torch.equal(rows.Packed([table]).lines(ids), table[ids].float())


def test_a_product_writes_its_own_columns_alone() -> None:
    packed, x, y = rows.Packed([drawn(0, 70, 6).bfloat16()]), drawn(1, 3, 6), torch.full((3, 90), 7.0)
    packed.into(x, y[:, 10:80], 2)
    assert torch.equal(y[:2, 10:80], packed(x[:2]))
    y[:2, 10:80] = 7.0
    assert torch.equal(y, torch.full_like(y, 7.0))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 70), st.integers(1, 3), st.booleans(), st.integers(0, 99))
def test_norms_are_the_stated_sums(width: int, heads: int, adds: bool, seed: int) -> None:
    x, add, weight = drawn(seed, 4, heads * width + 3), drawn(seed + 1, 4, heads * width), drawn(seed + 2, width)
    parts = x[:, : heads * width].reshape(4, heads, width).numpy()
    parts = parts + add.reshape(4, heads, width).numpy() if adds else parts
    mean = plain_squares(parts) / np.float32(width) + np.float32(1e-6)
    expected = parts * (np.float32(1) / np.sqrt(mean))[..., None] * weight.numpy()
    for level in LEVELS:
        y, out, narrow = x.clone(), torch.empty(4, heads * width), torch.empty(4, heads * width, dtype=torch.bfloat16)
        rows.norm(y, weight, 1e-6, out, 4, add=add if adds else None, heads=heads, level=level)
        assert torch.equal(y[:, : heads * width].reshape(4, heads, width), torch.from_numpy(parts))
        assert torch.equal(out.view(4, heads, width), torch.from_numpy(expected))
        assert torch.equal(y[:, heads * width :], x[:, heads * width :])
        rows.norm(y, weight, 1e-6, narrow, 4, heads=heads, level=level)
        assert torch.equal(narrow, out.bfloat16())


def test_gates_are_close_and_the_same_bits_everywhere() -> None:
    x = torch.cat([drawn(0, 5, 2 * 37, scale=4), torch.tensor([[-1e4, 1e4, 0.0, -88.0, 88.0] * 2 + [-0.0] * 64])])
    exact = (torch.nn.functional.silu(x[:, :37].double()) * x[:, 37:].double()).float()
    found = []
    for level in LEVELS:
        out = torch.empty(6, 37)
        rows.silu(x, out, 6, 37, level=level)
        assert torch.allclose(out, exact, rtol=1e-6, atol=1e-30)
        alone = torch.empty(1, 37)
        rows.silu(x[2:], alone, 1, 37, level=level)
        assert torch.equal(alone[0], out[2])
        found.append((out, rows.sigmoid(x.clone(), level=level)))
    sigmoid = torch.sigmoid(x.double())
    assert torch.allclose(found[0][1].double(), sigmoid, rtol=1e-6, atol=1e-37)
    assert all(torch.equal(one[i], found[0][i]) for one in found for i in (0, 1))
    for cut in (1, 5, 17):  # a number's place among others does not matter
        assert torch.equal(rows.sigmoid(x.view(-1)[cut : cut + 20].clone()), found[0][1].view(-1)[cut : cut + 20])


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 9), st.integers(1, 70), st.booleans(), st.integers(0, 99))
def test_attention_is_close_to_float64(n: int, heads: int, group: int, width: int, wide: bool, seed: int) -> None:
    value_width, size = max(1, width - 3), width + seed % 2
    kind = torch.float32 if wide else torch.bfloat16
    caches = [drawn(seed + i, 2 * heads, n + 2 + i, size).to(kind) for i in range(2)]
    lengths = torch.tensor([n + 2, n + 3])
    counts = torch.tensor([n, max(1, n // 2)])
    q = drawn(seed + 9, 2, heads * group * width)
    where = torch.tensor([cache.data_ptr() for cache in caches])

    def run(level: int, some: slice) -> Tensor:
        out = torch.empty(2, heads * group * value_width, dtype=kind)[some]
        rows.attend(
            q[some], out, where[some], lengths[some], counts[some], len(out), heads=heads, group=group, width=width,
            value_width=value_width, values=heads, size=size, scale=0.3, level=level,
        )  # fmt: skip
        return out

    found = run(rows.BEST, slice(None))
    for row, (cache, count) in enumerate(zip(caches, counts.tolist(), strict=True)):
        held = cache[:, :count].double()
        for head in range(heads):
            keys, values = held[head, :, :width], held[heads + head, :, :value_width]
            queries = q[row].double().view(heads, group, width)[head]
            exact = torch.softmax(queries @ keys.T * 0.3, -1) @ values
            mine = found[row].view(heads, group, value_width)[head].double()
            assert torch.allclose(mine, exact, rtol=1e-5 if wide else 1e-2, atol=2e-6 if wide else 1e-2)
    for level in LEVELS:
        assert torch.equal(run(level, slice(None)), found)
        assert torch.equal(run(level, slice(1, 2)), found[1:])


def test_attention_of_equal_keys_is_the_mean_in_order() -> None:
    """Where all shares are 1 the sum over keys can be written down: rising keys, then times 1 / n."""
    values = drawn(3, 21, 4)
    cache = torch.stack([torch.zeros(21, 4), values])
    out = torch.empty(1, 4)
    where, counts = torch.tensor([cache.data_ptr()]), torch.tensor([21])
    how = {"heads": 1, "group": 1, "width": 4, "value_width": 4, "values": 1, "size": 4}
    rows.attend(torch.ones(1, 4), out, where, counts, counts, 1, scale=1.0, **how)
    total = np.zeros(4, dtype=np.float32)
    for line in values.numpy():
        total = total + line
    assert torch.equal(out[0], torch.from_numpy(total * (np.float32(1) / np.float32(21))))


@pytest.mark.parametrize("interleaved", [False, True])
def test_turning_is_a_product_of_complex_numbers(interleaved: bool) -> None:
    x, angles = drawn(0, 3, 2 * 10 + 1), drawn(1, 7, 4)
    at = torch.tensor([6, 0, 3])
    y = x.clone()
    rows.turn(y, 3, 2, 10, angles.cos(), angles.sin(), at, interleaved)
    part = x[:, :20].view(3, 2, 10)[..., :8]
    a, b = (part[..., 0::2], part[..., 1::2]) if interleaved else (part[..., :4], part[..., 4:])
    turned = torch.complex(a, b) * torch.polar(torch.ones(3, 1, 4), angles[at][:, None])
    expected = x.clone()
    expected[:, :20].view(3, 2, 10)[..., :8] = torch.cat([turned.real, turned.imag], -1)
    assert torch.allclose(y, expected, atol=1e-6)
    assert torch.equal(y[:, 8:10], x[:, 8:10])


@pytest.mark.parametrize("wide", [False, True])
def test_what_is_put_is_rounded_to_the_cache(wide: bool) -> None:
    kind = torch.float32 if wide else torch.bfloat16
    caches = [torch.zeros(2, length, 3, dtype=kind) for length in (5, 4)]
    x = drawn(0, 3, 8)
    where = torch.tensor([caches[0].data_ptr(), caches[1].data_ptr(), caches[0].data_ptr()])
    rows.put(x, 3, 2, 3, where, torch.tensor([5, 4, 5]), torch.tensor([4, 0, 1]), wide)
    expected = [torch.zeros_like(cache) for cache in caches]
    for row, (cache, at) in enumerate([(0, 4), (1, 0), (0, 1)]):
        expected[cache][:, at] = x[row, :6].view(2, 3).to(kind)
    assert all(torch.equal(one, other) for one, other in zip(caches, expected, strict=True))


def test_a_plain_layer_and_its_weight_are_the_same() -> None:
    layer = nn.Linear(6, 5, bias=False)
    layer.weight.data = layer.weight.data.bfloat16().float()
    x = drawn(0, 2, 6)
    assert torch.equal(rows.Packed([layer])(x), rows.Packed([layer.weight])(x))
