"""Training on the grid: forward is the master's values, the gradient straight-through, the trainer's phase the same."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from ottava.checkpoint.convert import convert
from ottava.checkpoint.names import storage_of
from ottava.errors import FormatError
from ottava.fp8.codec import dequantise, project, quantise
from ottava.fp8.grid import GridLinear, held, on_grid, put_on_grid
from ottava.models.build import from_config
from ottava.models.load import load
from ottava.models.published import matrices
from ottava.trainer.loop import Trainer
from ottava.trainer.spec import TrainSpec
from ottava.trainer.start import make_trainer

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 40, "hidden_size": 96,
    "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "tie_word_embeddings": False, "dtype": "float32",
}  # fmt: skip


def grid_values(w: Tensor) -> Tensor:
    return dequantise(*quantise(w.detach()), w.dtype)


def in_master(name: str, _layer: nn.Linear) -> bool:
    return storage_of(f"{name}.weight", 2) == "fp8"


def layer(rows: int = 130, columns: int = 140, dtype: torch.dtype = torch.float32, bias: bool = True) -> GridLinear:
    torch.manual_seed(1)
    return GridLinear(columns, rows, bias=bias, dtype=dtype)


def llama(seed: int = 0) -> nn.Module:
    model = from_config(LLAMA).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) / 8 + (parameter.dim() == 1))
    return model


# ---------------------------------------------------------------- one layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(130, 140), (3, 5), (256, 128)])
def test_forward_is_a_product_with_the_masters_values(shape: tuple[int, int], bias: bool, dtype: torch.dtype) -> None:
    made = layer(*shape, dtype=dtype, bias=bias)
    x = torch.randn(2, 7, shape[1]).to(dtype)
    exact = dequantise(*made.master(), dtype)
    assert not torch.equal(exact, made.weight)
    assert torch.equal(made(x), F.linear(x, exact, made.bias))
    with torch.no_grad():
        assert torch.equal(made(x), F.linear(x, exact, made.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_a_plain_layer_at_the_grid_weight(dtype: torch.dtype) -> None:
    made = layer(dtype=dtype)
    plain = nn.Linear(140, 130, dtype=dtype)
    plain.load_state_dict({"weight": grid_values(made.weight), "bias": made.bias})
    x, upstream = torch.randn(9, 140).to(dtype), torch.randn(9, 130).to(dtype)
    inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
    for module, given_input in zip((made, plain), inputs, strict=True):
        module(given_input).backward(upstream)
    assert torch.equal(made.weight.grad, plain.weight.grad)  # type: ignore[arg-type]
    assert torch.equal(made.bias.grad, plain.bias.grad)  # type: ignore[arg-type]
    assert torch.equal(inputs[0].grad, inputs[1].grad)  # type: ignore[arg-type]
    assert not torch.equal(made.weight, plain.weight)


@pytest.mark.filterwarnings("ignore:Input #0 requires gradient and is not a double")
def test_gradient_of_the_input_by_finite_differences() -> None:
    """The layer is linear in its input, so large steps are as right as small ones, and survive float32."""
    made = layer(5, 7)
    x = torch.randn(3, 7, requires_grad=True)
    assert torch.autograd.gradcheck(made, (x,), eps=0.5, atol=1e-4, rtol=1e-4)


@settings(max_examples=30)
@given(st.integers(1, 3), st.integers(1, 150), st.integers(1, 150), st.integers(-30, 30))
def test_on_grid_is_projection_forward_and_identity_backward(batch: int, rows: int, columns: int, power: int) -> None:
    torch.manual_seed(rows * columns)
    w = (torch.randn(batch, rows, columns) * 2.0**power).requires_grad_()
    upstream = torch.randn(batch, rows, columns)
    out = on_grid(w)
    assert torch.equal(out, grid_values(w))
    out.backward(upstream)  # type: ignore[no-untyped-call]
    assert torch.equal(w.grad, upstream)  # type: ignore[arg-type]


def test_the_usual_way_to_write_straight_through_loses_the_sign_of_zeros() -> None:
    """Its two sums are exact, but for -0; the digest of a model tells -0 from 0."""
    w = torch.tensor([[300.0, 0.3, 1e-3, -1e-3, -1e-4]])
    usual = w + (project(w) - w)
    assert torch.equal(usual, on_grid(w))
    assert not usual.signbit()[0, 4]
    assert on_grid(w).signbit().tolist() == w.signbit().tolist()


def test_strided_and_tied_weights() -> None:
    made = layer()
    with torch.no_grad():
        strided = GridLinear.from_linear(made)
        strided.weight = nn.Parameter(made.weight.mT.contiguous().mT)
    assert not strided.weight.is_contiguous()
    x = torch.randn(4, 140)
    torch.testing.assert_close(strided(x), made(x))
    assert torch.equal(grid_values(strided.weight), grid_values(made.weight))
    one, two = nn.Linear(6, 6), nn.Linear(6, 6)
    two.weight = one.weight
    model = nn.Sequential(one, two)
    assert put_on_grid(model, lambda name, _: True) == ["0", "1"]
    assert model[0].weight is model[1].weight is one.weight
    model(torch.randn(2, 6)).sum().backward()
    assert one.weight.grad is not None
    assert len(list(model.parameters())) == 3


def test_autocast_to_bfloat16_casts_exactly() -> None:
    made = layer()
    x = torch.randn(4, 140)
    with torch.autocast("cpu", torch.bfloat16):
        out = made(x)
    exact = grid_values(made.weight)
    assert torch.equal(exact.to(torch.bfloat16).float(), exact)
    assert torch.equal(out, F.linear(x.bfloat16(), exact.bfloat16(), made.bias.bfloat16()))


def test_what_cannot_lie_on_the_grid_is_refused() -> None:
    with pytest.raises(FormatError, match="cannot hold the grid"):
        layer(dtype=torch.float16)(torch.zeros(1, 140, dtype=torch.float16))
    made = layer()
    made.weight.data[129, 139] = torch.inf
    with pytest.raises(FormatError, match="infinity or NaN"):
        made(torch.zeros(1, 140))


# ---------------------------------------------------------------- a changing weight


def test_every_way_to_change_a_weight_is_seen() -> None:
    """Also those that autograd's version counter misses, which is why nothing is cached behind the caller's back."""
    made, x = layer(), torch.randn(3, 140)
    flat = made.weight.detach().clone().flatten()
    made.weight.data = flat.view(130, 140)
    version = made.weight._version
    for change in (lambda: flat.mul_(3), lambda: made.weight.data.add_(1), lambda: made.weight.data.neg_()):
        before = made(x)
        change()
        assert made.weight._version == version
        assert not torch.equal(made(x), before)
        assert torch.equal(made(x), F.linear(x, grid_values(made.weight), made.bias))


def test_held_projects_once_with_the_same_bits_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(layer(), nn.ReLU(), layer(64, 130)), torch.randn(3, 140)
    expected = model(x)
    gradients = torch.autograd.grad(expected.sum(), list(model.parameters()))
    calls: list[Tensor] = []
    monkeypatch.setattr("ottava.fp8.grid.project", lambda w: calls.append(w) or project(w))
    with held(model):
        for _ in range(3):
            out = model(x)
            assert torch.equal(out, expected)
        again = torch.autograd.grad(out.sum(), list(model.parameters()))
        assert len(calls) == 2
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))
    calls.clear()
    model(x)
    assert len(calls) == 2


def test_a_weight_that_changes_while_held_is_found() -> None:
    made, x = layer(), torch.randn(3, 140)
    with pytest.raises(RuntimeError, match="changed while"), held(nn.Sequential(made)):
        made.weight.data.mul_(1.5)
    assert torch.equal(made(x), F.linear(x, grid_values(made.weight), made.bias))
    with pytest.raises(KeyError), held(made):
        raise KeyError
    assert made._held is None


# ---------------------------------------------------------------- whole models


def test_from_linear_shares_parameters_and_keeps_hooks_and_mode() -> None:
    linear = nn.Linear(5, 4).eval()
    linear.weight.requires_grad_(False)
    seen: list[Tensor] = []
    linear.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    made = GridLinear.from_linear(linear)
    assert made.weight is linear.weight
    assert made.bias is linear.bias
    assert not made.training
    assert torch.equal(made(torch.ones(1, 5)), seen[0])
    made.weight = nn.Parameter(torch.zeros(4, 5))
    assert linear.weight is not made.weight
    assert (made.in_features, made.out_features) == (5, 4)


def test_state_dict_is_that_of_the_plain_model() -> None:
    plain = llama()
    on = copy.deepcopy(plain)
    names = put_on_grid(on, in_master)
    assert len(names) == 14
    assert "lm_head" not in names
    assert [type(on.get_submodule(name)) for name in names] == [GridLinear] * 14
    ours, theirs = on.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert plain.load_state_dict(ours).missing_keys == []
    assert on.load_state_dict(llama(1).state_dict()).missing_keys == []
    assert put_on_grid(on, in_master) == []


def test_only_what_is_chosen_and_only_as_a_whole() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": Scaled(4, 4), "e": nn.Embedding(4, 4)})
    with pytest.raises(TypeError, match="b is a Scaled"):
        put_on_grid(model, lambda name, _: True)
    assert type(model["a"]) is nn.Linear
    model["a"].weight = model["e"].weight
    with pytest.raises(TypeError, match=r"e\.weight is tied"):
        put_on_grid(model, lambda name, _: name == "a")
    assert type(model["a"]) is nn.Linear
    shared = nn.Linear(4, 4)
    twice = nn.ModuleDict({"x": shared, "y": nn.Sequential(shared)})
    assert put_on_grid(twice, lambda name, _: True) == ["x", "y.0"]
    assert isinstance(twice["x"], GridLinear)
    assert twice["x"] is twice["y"][0]  # type: ignore[index]


@pytest.mark.parametrize("latent", [True, False], ids=["latent weights in F32", "values in BF16"])
def test_export_and_load_give_the_same_logits(tmp_path: Path, latent: bool) -> None:
    model = llama()
    names = put_on_grid(model, in_master)
    tensors = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.removesuffix(".weight") in names:
                tensors[name] = parameter.detach().clone() if latent else project(parameter).to(torch.bfloat16)
            else:
                parameter.copy_(parameter.to(torch.bfloat16))
                tensors[name] = parameter.detach().to(torch.bfloat16)
    (tmp_path / "source").mkdir()
    save_file(tensors, tmp_path / "source/model.safetensors")
    (tmp_path / "source/config.json").write_text(json.dumps(LLAMA))
    convert({"source": str(tmp_path / "source"), "out": str(tmp_path / "master")})
    found: dict[str, Tensor] = {}
    for file in (tmp_path / "master").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    for name in names:
        codes, scales = model.get_submodule(name).master()  # type: ignore[operator]
        assert torch.equal(found[f"{name}.weight"].view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(found[f"{name}.weight_scale_inv"].view(torch.uint8), scales)
    tokens = torch.arange(30).view(2, 15)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "master").eval()(input_ids=tokens).logits, model(input_ids=tokens).logits)


# ---------------------------------------------------------------- the trainer's own phase on the grid


class _Bf16(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, w: Tensor) -> Tensor:
        return w.to(torch.bfloat16).float()

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Latent(nn.Module):
    """A model that holds latent weights alone and takes them to what the master stores in each forward pass.

    Linear layers are GridLinear; fused experts go through `on_grid`; the rest is rounded to BF16.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.inner = model
        self.on_grid = {f"{name}.weight" for name in put_on_grid(model, in_master)}

    def forward(self, **inputs: Any) -> Any:
        stored = {}
        for name, parameter in self.inner.named_parameters():
            matrix, storage = matrices(name, parameter)
            if name not in self.on_grid:
                stored[name] = on_grid(matrix).view_as(parameter) if storage == "fp8" else _Bf16.apply(parameter)
        return functional_call(self.inner, stored, kwargs=inputs)


def trainer_of(dataset: Path, grid_from: float) -> Trainer:
    its = TrainSpec.model_validate({"steps": 12, "batch": 4, "direct": {"begin": 0.25}, "grid_from": grid_from})
    args = {"spec": its.model_dump(mode="json"), "seed": 3, "data": str(dataset), "chat": str(dataset / "chat")}
    return make_trainer(args)


def test_the_trainers_phase_on_the_grid_is_this_mechanism(dataset: Path) -> None:
    """Same forward bits, same gradients, and the same state after whole steps."""
    ours, theirs = trainer_of(dataset, 1.0), trainer_of(dataset, 0.0)
    model = Latent(ours.model)
    ours.model = model
    assert len(model.on_grid) > 8
    tokens = theirs.objective.data.thinking[3].tokens[:4]
    for _ in range(4):
        ours.refresh()
        theirs.refresh()
        assert torch.equal(ours.forward, ours.state.weights)
        assert not torch.equal(theirs.forward, theirs.state.weights)
        with torch.no_grad():
            assert torch.equal(ours.model(input_ids=tokens).logits, theirs.model(input_ids=tokens).logits)
        for shard in range(2):
            assert torch.equal(ours.shard(shard), theirs.shard(shard))
        for trainer in (ours, theirs):
            trainer.step(lambda total: total, range(2))
        assert ours.state.digest() == theirs.state.digest()
    ours.refresh()
    theirs.refresh()
    for name in model.on_grid:
        slot = next(slot for slot in theirs.state.slots if slot.name == name)
        module = model.inner.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(dequantise(*module.master()), slot.view(theirs.forward))  # type: ignore[operator]
