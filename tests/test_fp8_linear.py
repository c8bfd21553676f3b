"""FP8-weight products against emulations of their orders, ml_dtypes and dequantised weights; the layer; loading."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache

from ottava.engine.generate import generate, step
from ottava.errors import CheckpointError, FormatError
from ottava.fp8 import kernels as extension
from ottava.fp8 import matmul
from ottava.fp8.codec import dequantise, project, quantise
from ottava.fp8.kernels import LEVELS, levels
from ottava.fp8.linear import Fp8Linear, replace
from ottava.fp8.matmul import Order, orders, product
from ottava.models.build import from_config, initialise
from ottava.models.load import _Undrawn, load
from ottava.models.published import published, stored

pytestmark = pytest.mark.skipif(not orders(), reason="the extension was not built")

Floats = npt.NDArray[np.float32]
RAGGED = [(1, 1), (1, 65), (2, 31), (33, 64), (130, 200), (160, 129), (192, 577), (576, 576)]


def needs(order: Order) -> None:
    if order not in orders():
        pytest.skip(f"this machine has no {order}")


def weight(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales that differ from block to block, and the BF16 values."""
    torch.manual_seed(seed)
    w = torch.randn(rows, columns) * torch.exp2(torch.randint(-9, 3, (rows, columns)))  # subnormal codes too
    if columns > 128:
        w[:, 128:] *= 64
    codes, scales = quantise(w)
    return codes, scales, dequantise(codes, scales, torch.bfloat16)


def activations(batch: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    torch.manual_seed(1000 + seed)
    return torch.randn(batch, columns).to(dtype)


def bits(t: Tensor) -> Tensor:
    return t.view(torch.int32)


def kernels() -> list[tuple[Order, torch.dtype, str | None]]:
    """Every kernel of every machine: the ones that are missing here are skipped."""
    fma: list[tuple[Order, torch.dtype, str | None]] = [("fma", torch.float32, level) for level in LEVELS]
    return [*fma, ("fma", torch.bfloat16, None), ("dot", torch.bfloat16, None), ("amx", torch.bfloat16, None)]


@pytest.fixture(params=kernels(), ids=lambda k: f"{k[0]}-{'f32' if k[1] == torch.float32 else 'bf16'}-{k[2] or 'best'}")
def kernel(request: pytest.FixtureRequest) -> tuple[Order, torch.dtype, str | None]:
    order, dtype, level = request.param
    needs(order)
    if level is not None and level not in levels():
        pytest.skip(f"this machine has no {level}")
    return order, dtype, level


# --- Values and orders ---


def test_every_code_at_every_scale_is_the_number_it_stands_for(kernel: tuple[Order, torch.dtype, str | None]) -> None:
    order, dtype, level = kernel
    codes = torch.arange(256, dtype=torch.uint8)
    codes[[0x7F, 0xFF]] = 0
    scales = torch.arange(10, 247, dtype=torch.uint8)
    rows = 256 * len(scales)
    column = torch.arange(rows) * 7 % 65  # each code alone in its row; column 64 is read by the ragged end
    matrix = torch.zeros(rows, 65, dtype=torch.uint8)
    matrix[torch.arange(rows), column] = codes.repeat(len(scales))
    y = product(torch.ones(1, 65, dtype=dtype), matrix, scales.repeat_interleave(2)[:, None], order=order, level=level)
    values = codes.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    expected = np.ldexp(values, scales.numpy().astype(int)[:, None] - 127).reshape(1, -1)
    assert np.array_equal(y.numpy().astype(np.float64), expected)


def fused(a: Floats, b: Floats, c: Floats) -> Floats:
    """a * b + c, rounded once: the product of 24 bits each is exact in float64, the sum is rounded there to odd."""
    p, c64 = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = p + c64
    part = total - p
    error = (p - (total - part)) + (c64 - part)
    inexact, odd = error != 0, (total.view(np.int64) & 1) == 1
    toward = np.where(error > 0, np.inf, -np.inf)
    return np.where(inexact & ~odd, np.nextafter(total, toward), total).astype(np.float32)


def tree(sums: Floats) -> Floats:
    """The last step of fma and dot: halves of 16 sums, over the last axis."""
    for half in (8, 4, 2, 1):
        sums = sums[..., :half] + sums[..., half : 2 * half]
    return sums[..., 0]


def emulate(order: Order, x: Tensor, w: Tensor) -> Floats:
    """The orders as csrc/matmul.h states them, in NumPy: [B, M]. Products of BF16 numbers are exact in float32."""
    columns = -(-x.shape[1] // 64) * 64
    a = np.zeros((len(x), 1, columns), np.float32)
    b = np.zeros((1, len(w), columns), np.float32)
    a[:, 0, : x.shape[1]], b[0, :, : x.shape[1]] = x.float().numpy(), w.float().numpy()
    shape = (len(x), len(w))
    if order == "fma":
        lanes = np.zeros((*shape, 32), np.float32)
        for j in range(0, columns, 32):
            lanes = fused(b[..., j : j + 32], a[..., j : j + 32], lanes)
        return tree(lanes[..., 0::2] + lanes[..., 1::2])
    if order == "dot":
        lanes = np.zeros((*shape, 2, 16), np.float32)
        for j in range(0, columns, 64):
            products = (a[..., j : j + 64] * b[..., j : j + 64]).reshape(*shape, 2, 16, 2)
            lanes = (lanes + products[..., 1]) + products[..., 0]
        return tree(lanes[..., 0, :] + lanes[..., 1, :])
    y = np.zeros(shape, np.float32)
    for j in range(0, columns, 32):
        products = a[..., j : j + 32] * b[..., j : j + 32]
        pair = np.zeros((*shape, 2), np.float32)
        for k in range(0, 32, 2):
            pair += products[..., k : k + 2]
        y += pair[..., 0] + pair[..., 1]
    return y


@pytest.mark.parametrize("shape", RAGGED[:-1], ids=str)
def test_the_order_of_summation_is_the_one_stated(
    kernel: tuple[Order, torch.dtype, str | None], shape: tuple[int, int]
) -> None:
    order, dtype, level = kernel
    codes, scales, exact = weight(*shape)
    x = activations(3, shape[1], dtype)
    y = product(x, codes, scales, order=order, level=level)
    assert np.array_equal(y.numpy(), emulate(order, x, exact))


@given(
    order=st.sampled_from(["fma", "dot", "amx"]),
    rows=st.integers(1, 300),
    columns=st.integers(1, 400),
    batch=st.integers(1, 40),
    seed=st.integers(0, 999),
)
def test_fp8_gives_the_bits_of_bf16_in_any_batch(order: Order, rows: int, columns: int, batch: int, seed: int) -> None:
    if order not in orders():
        return
    codes, scales, exact = weight(rows, columns, seed)
    x = activations(batch, columns, torch.float32 if order == "fma" else torch.bfloat16, seed)
    y = product(x, codes, scales, order=order)
    assert torch.equal(bits(y), bits(product(x, exact, order=order)))
    row = seed % batch
    assert torch.equal(bits(y[row : row + 1]), bits(product(x[row : row + 1], codes, scales, order=order)))
    if order == "fma":
        for level in levels():
            assert torch.equal(bits(y), bits(product(x, codes, scales, level=level)))


@pytest.mark.parametrize("batch", [1, 4, 5, 16, 33])
def test_extreme_scales_and_activations_keep_fp8_and_bf16_equal(
    kernel: tuple[Order, torch.dtype, str | None], batch: int
) -> None:
    order, dtype, level = kernel
    torch.manual_seed(batch)
    codes = torch.randint(0, 0x7F, (200, 300), dtype=torch.uint8) | torch.randint(0, 2, (200, 300)).byte() * 128
    scales = torch.tensor([[10, 246, 127], [246, 10, 20]], dtype=torch.uint8)
    x = (torch.randn(batch, 300) * torch.exp2(torch.randint(-126, 120, (batch, 300)).float())).to(dtype)
    exact = dequantise(codes.view(torch.float8_e4m3fn), scales, torch.bfloat16)
    ours, twin = (product(x, *w, order=order, level=level) for w in ((codes, scales), (exact,)))
    assert torch.equal(bits(ours), bits(twin))
    assert not torch.isfinite(ours).all()  # the data do overflow
    assert torch.isfinite(product(x * 0, codes, scales, order=order, level=level)).all()


@pytest.mark.parametrize("batch", [1, 2, 7, 20])
def test_threads_do_not_change_a_bit(kernel: tuple[Order, torch.dtype, str | None], batch: int) -> None:
    order, dtype, level = kernel
    codes, scales, _ = weight(576, 577)
    x = activations(batch, 577, dtype)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            found.append(product(x, codes, scales, order=order, level=level))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(bits(found[0]), bits(other)) for other in found[1:])


def test_the_error_is_inside_its_bound(kernel: tuple[Order, torch.dtype, str | None]) -> None:
    """Higham, Accuracy and Stability, eq. 3.5: n roundings on any path give at most n u / (1 - n u) of sum |w x|."""
    order, dtype, level = kernel
    codes, scales, exact = weight(64, 11008)
    x = activations(2, 11008, dtype)
    y = product(x, codes, scales, order=order, level=level).double()
    roundings = {"fma": 11008 // 32 + 5, "dot": 11008 // 64 * 2 + 5, "amx": 16 + 1 + 11008 // 32}[order] * 2.0**-24
    magnitude = x.double().abs() @ exact.double().abs().T
    difference = (y - x.double() @ exact.double().T).abs()
    assert bool((difference <= roundings / (1 - roundings) * magnitude).all())


# --- What is refused ---


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_forked_child_of_a_threaded_parent() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        codes, scales, _ = weight(576, 576)
        x = activations(1, 576, torch.float32)
        wanted = product(x, codes, scales).numpy().tobytes()  # wakes the parent's threads
        child = os.fork()
        if child == 0:  # torch's own parallel loops would hang here, so nothing but the kernel may run
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # no handler of ours runs while C waits
            signal.alarm(60)
            os._exit(0 if product(x, codes, scales).numpy().tobytes() == wanted else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(before)


def test_a_conjugates_lazy_negation_is_not_lost() -> None:
    codes, scales, exact = weight(130, 200)
    x = torch.complex(activations(2, 200, torch.float32, 1), activations(2, 200, torch.float32)).conj().imag
    assert x.is_neg()
    wanted = product(x.resolve_neg().contiguous(), codes, scales)
    assert torch.equal(product(x, codes, scales), wanted)
    assert torch.equal(Fp8Linear(codes, scales)(x), wanted)
    lazy = torch._neg_view(activations(2, 200, torch.float32))
    assert torch.equal(Fp8Linear(codes, scales)(lazy), wanted)
    assert torch.equal(product(lazy, torch._neg_view(exact)), -wanted)


def test_products_that_do_not_fit_are_refused() -> None:
    codes, scales, exact = weight(130, 200)
    x = activations(2, 200, torch.float32)
    for bad in (
        lambda: product(x[:, :199], codes, scales),
        lambda: product(x[0], codes, scales),
        lambda: product(x.double(), codes, scales),
        lambda: product(x, codes),
        lambda: product(x, exact, scales),
        lambda: product(x, exact.float()),
        lambda: product(x, codes, scales[:1]),
        lambda: product(x, codes, scales, level="neon"),
        lambda: product(x, codes, scales, order="dot"),
        lambda: product(x, codes, scales, order="pairwise"),  # type: ignore[arg-type]
        lambda: product(x.to("meta"), codes, scales),
        lambda: product(x, codes.to("meta"), scales),
        lambda: product(x.to_sparse(), codes, scales),
    ):
        with pytest.raises(FormatError):
            bad()
    for byte in (0, 9, 247, 255):
        with pytest.raises(FormatError, match="scale bytes"):
            product(x, codes, scales.clone().fill_(byte))


def test_layers_that_cannot_be_are_refused() -> None:
    codes, scales, _ = weight(130, 200)
    nan = codes.view(torch.uint8).clone()
    nan[129, 199] = 0xFF
    for bad in (
        lambda: Fp8Linear(nan, scales),
        lambda: Fp8Linear(codes[0], scales),
        lambda: Fp8Linear(codes, scales[:, :1]),
        lambda: Fp8Linear(codes, scales.clone().fill_(9)),
        lambda: Fp8Linear(codes, scales, torch.zeros(200)),
        lambda: Fp8Linear(codes, scales, order="pairwise"),  # type: ignore[arg-type]
    ):
        with pytest.raises(FormatError):
            bad()
    layer = Fp8Linear(codes, scales)
    wrong = torch.zeros(3, 199), torch.zeros(3, 200).double(), torch.zeros(3, 200, requires_grad=True)
    for x in (*wrong, torch.zeros(3, 200, device="meta")):
        with pytest.raises(FormatError):
            layer(x)


# --- The layer ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 4, 5, 17, 140])
def test_a_layer_is_its_kernel_and_its_bias(dtype: torch.dtype, rows: int) -> None:
    codes, scales, exact = weight(1200, 200)  # more than one band of rows for the path through torch
    bias = torch.randn(1200).to(dtype)
    layer, x = Fp8Linear(codes, scales, bias), activations(rows, 200, dtype)
    order = layer.order_for(dtype, rows)
    y = layer(x)
    assert y.dtype == dtype
    assert y.shape == (rows, 1200)
    if order is not None:
        assert torch.equal(y, (product(x, codes, scales, order=order) + bias).to(dtype))
    expected = functional.linear(x.double(), exact.double(), bias.double())
    assert torch.allclose(y.double(), expected, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-3)


def test_one_order_makes_a_row_independent_of_the_batch() -> None:
    codes, scales, _ = weight(192, 320)
    for order in orders():
        dtype = torch.float32 if order == "fma" else torch.bfloat16
        layer, x = Fp8Linear(codes, scales, order=order), activations(150, 320, dtype)
        whole = layer(x.view(3, 50, 320))
        assert whole.shape == (3, 50, 192)
        for row in (0, 77, 149):
            assert torch.equal(whole.view(150, 192)[row], layer(x[row]))
        if order != "fma":
            with pytest.raises(FormatError):
                layer(x.float())


def test_casting_and_saving_a_layer_leave_its_bytes_alone() -> None:
    codes, scales, _ = weight(130, 200)
    layer = Fp8Linear(codes, scales, torch.randn(130))
    state = {name: t.clone() for name, t in layer.state_dict().items()}
    layer = layer.to(torch.bfloat16)
    assert layer.bias is not None
    assert layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.codes, codes.view(torch.uint8))
    assert torch.equal(layer.scales, scales)
    other = Fp8Linear(torch.zeros_like(layer.codes), scales, torch.zeros(130))
    other.load_state_dict(state)
    assert torch.equal(other.codes, layer.codes)


def test_from_linear_rounds_as_the_codec_does() -> None:
    linear = nn.Linear(200, 130)
    layer = Fp8Linear.from_linear(linear)
    assert torch.equal(layer.dequantised(torch.float32), project(linear.weight.detach()))
    model = nn.Sequential(linear, nn.ReLU(), nn.Linear(130, 4))
    assert replace(model, lambda name, module: Fp8Linear.from_linear(module) if name == "0" else None) == ["0"]
    assert isinstance(model[0], Fp8Linear)
    assert isinstance(model[2], nn.Linear)


def test_replace_leaves_the_root_and_keeps_a_layer_in_two_places_one() -> None:
    assert replace(nn.Linear(3, 4), lambda name, module: Fp8Linear.from_linear(module)) == []
    shared, block = nn.Linear(130, 130), nn.Sequential(nn.Linear(130, 130))
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(nn.ReLU(), shared), "c": block, "d": block})
    asked = []

    def choose(name: str, module: nn.Linear) -> Fp8Linear | None:
        asked.append(name)
        return None if name == "a" else Fp8Linear.from_linear(module)  # a folder may hold it under its second name

    assert replace(model, choose) == ["a", "b.1", "c.0", "d.0"]
    assert asked == ["a", "b.1", "c.0"]
    assert isinstance(model["a"], Fp8Linear)
    assert model["a"] is model.get_submodule("b.1")
    assert model["c"] is model["d"]
    assert not any(isinstance(module, nn.Linear) for module in model.modules())


def test_without_the_extension_there_are_no_orders_and_torch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_HERE", ())
    monkeypatch.setattr(extension, "extension", None)
    codes, scales, exact = weight(130, 200)
    x = activations(1, 200, torch.float32)
    assert orders() == levels() == ()
    assert torch.allclose(Fp8Linear(codes, scales)(x), functional.linear(x, exact.float()), atol=1e-3)
    with pytest.raises(FormatError):
        product(x, codes, scales)


# --- Models ---

COMMON: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 192, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 48, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1,
    "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**COMMON, "attention_bias": True},
    "qwen3": {**COMMON, "tie_word_embeddings": True},
    "deepseek_v3": {
        **COMMON, "num_key_value_heads": 4, "moe_intermediate_size": 64, "n_shared_experts": 1, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "kv_lora_rank": 32, "q_lora_rank": 40, "qk_rope_head_dim": 16, "n_group": 1,
        "qk_nope_head_dim": 32, "v_head_dim": 48, "topk_group": 1, "first_k_dense_replace": 1,
    },
}  # fmt: skip


def write(folder: Path, family: str, layout: str = "e8m0") -> dict[str, Tensor]:
    """A folder with FP8 weights, by the safetensors library. Returns its tensors."""
    config = {"model_type": family, **FAMILIES[family]}
    config.pop("head_dim" if family == "deepseek_v3" else "", None)
    model = from_config(config)
    initialise(model, 5)
    tensors: dict[str, Tensor] = {}
    torch.manual_seed(7)
    for name, item in published(model).items():
        value = stored(item)
        if item.storage != "fp8":
            tensors[name] = torch.randn_like(value) * 0.3 if "bias" in name or "lm_head" in name else value
            continue
        tensors[name], scales = quantise(torch.randn(value.shape) / value.shape[1] ** 0.5)
        if layout == "mxfp8":
            wide = scales.repeat_interleave(128, 0)[: value.shape[0]].repeat_interleave(4, 1)
            tensors[name + "_scale"] = wide[:, : -(-value.shape[1] // 32)].contiguous()
        elif layout == "deepseek":
            tensors[name + "_scale_inv"] = torch.exp2(scales.float() - 127)
        else:
            tensors[name + "_scale_inv"] = scales.view(torch.float8_e8m0fnu)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


class Twin(nn.Module):
    """The same kernel, fed the dequantised BF16 weight."""

    def __init__(self, layer: Fp8Linear):
        super().__init__()
        self.layer, self.weight = layer, layer.dequantised()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        order = self.layer.order_for(x.dtype, len(rows))
        if order is None:  # too many rows: what torch makes of the values
            y = functional.linear(rows, self.weight.to(x.dtype), self.layer.bias)
        else:
            y = product(rows, self.weight, order=order)
            if self.layer.bias is not None:
                y = y + self.layer.bias
        return y.to(x.dtype).view(*x.shape[:-1], -1)


def fp8_layers(model: nn.Module) -> Iterator[tuple[str, Fp8Linear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Fp8Linear))


def run_through(model: nn.Module, prompts: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Ids by greedy generation, and the logits of a plain decode of those ids."""
    ids = generate(model, prompts, 8, stop=[])
    cache, logits = DynamicCache(config=model.config), []
    with torch.no_grad():
        logits.append(step(model, prompts, cache))
        for position in range(ids.shape[1] - 1):
            logits.append(step(model, ids[:, position : position + 1], cache))
    return ids, logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "order"),
    [(torch.float32, None), (torch.float32, "fma"), (torch.bfloat16, None), (torch.bfloat16, "dot"),
     (torch.bfloat16, "amx")],
    ids=["f32-any", "f32-fma", "bf16-any", "bf16-dot", "bf16-amx"],
)  # fmt: skip
def test_generation_with_fp8_weights_is_that_of_bf16_weights(
    tmp_path: Path, family: str, dtype: torch.dtype, order: Order | None
) -> None:
    if order is not None:
        needs(order)
    tensors = write(tmp_path, family)
    model = load(tmp_path, dtype, weights="fp8", order=order)
    held = {f"{name}.weight" for name, _ in fp8_layers(model)}
    assert held == {name for name, t in tensors.items() if t.dtype == torch.float8_e4m3fn and ".experts." not in name}
    assert held.isdisjoint(dict(model.named_parameters()))
    prompts = torch.tensor([[3, 7, 2, 30], [9, 9, 4, 11]])
    ids, logits = run_through(model, prompts)
    plain = load(tmp_path, dtype)
    with torch.no_grad():
        expected = step(plain, prompts, DynamicCache(config=plain.config))
    spread = float(expected.float().std())
    assert torch.allclose(logits[0].float(), expected.float(), atol=spread * (2e-5 if dtype == torch.float32 else 0.1))
    for name, layer in list(fp8_layers(model)):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Twin(layer))
    twin_ids, twin_logits = run_through(model, prompts)
    assert torch.equal(ids, twin_ids)
    assert all(torch.equal(a, b) for a, b in zip(logits, twin_logits, strict=True))
    assert len(set(ids.flatten().tolist())) > 2  # not a model that says one thing


@pytest.mark.parametrize("layout", ["deepseek", "mxfp8"])
def test_every_fp8_layout_loads_as_the_same_layers(tmp_path: Path, layout: str) -> None:
    write(tmp_path / "a", "llama")
    write(tmp_path / "b", "llama", layout)
    ours, theirs = (dict(fp8_layers(load(tmp_path / name, weights="fp8"))) for name in "ab")
    assert len(ours) == len(theirs) == 14
    for name, layer in ours.items():
        assert torch.equal(layer.codes, theirs[name].codes)
        assert torch.equal(layer.scales, theirs[name].scales)


def test_values_without_a_kernel_are_dequantised(tmp_path: Path) -> None:
    """A scale that varies inside a 128x128 block, and one under which values are subnormal in BF16."""
    varied, small = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"
    tensors = write(tmp_path, "llama", "mxfp8")
    tensors[f"{varied}.weight_scale"][3, 1] += 1
    tensors[f"{small}.weight_scale"].fill_(5)
    save_file(tensors, tmp_path / "model.safetensors")
    model = load(tmp_path, weights="fp8")
    exact = load(tmp_path)
    for name in (varied, small):
        assert isinstance(model.get_submodule(name), nn.Linear)
        assert torch.equal(model.get_parameter(f"{name}.weight"), exact.get_parameter(f"{name}.weight"))
    assert len(dict(fp8_layers(model))) == 12


def test_faulty_folders_are_refused_with_the_tensor_named(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    tensors = write(tmp_path, "qwen3")
    faults = {
        "NaN": tensors | {name: torch.full_like(tensors[name].view(torch.uint8), 0x7F).view(torch.float8_e4m3fn)},
        "shape": tensors | {name: tensors[name][:, :128].contiguous(), name + "_scale_inv": torch.ones(2, 1)},
        "missing": {key: t for key, t in tensors.items() if not key.startswith(name)},
    }
    for said, faulty in faults.items():
        save_file(faulty, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=said) as caught:
            load(tmp_path, weights="fp8")
        assert "down_proj" in str(caught.value)


def test_weights_that_will_be_read_are_not_written_first() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc here")
    before = resident()
    with _Undrawn():
        layer = nn.Linear(6000, 6000)
    assert resident() - before < 36_000_000
    assert layer.weight.numel() * 4 == 144_000_000
