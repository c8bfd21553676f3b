"""What a model computes in: the type of its weights and, for FP8, of its linear layers' products.

Nothing here touches master weights, optimisers or sums of gradients, which are the trainer's and stay float32.

    float32   as it was built
    bf16      weights, activations and their gradients in BF16; norms, softmax and routers compute in float32 inside
    fp8       as bf16, and the products of what the master holds in FP8 as `fp8.training` says: linear layers and the
              routed experts' matrices, one set of names with the grid (`models.published.matrices`)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ottava.checkpoint.names import Precision, storage_of
from ottava.fp8.training import Prepared, ScaledLinear, linear, native, prepare

EXPERTS = "ottava_fp8"
"""How Transformers knows `experts`."""


def dtype_of(precision: Precision) -> torch.dtype:
    """The type of weights and activations."""
    return torch.float32 if precision == "float32" else torch.bfloat16


def products(precision: Precision, device: torch.device) -> str:
    """How products are computed, in a word: float32, bf16, scaled_mm (by the chip's FP8 units) or emulated."""
    if precision != "fp8":
        return precision
    return "scaled_mm" if native(device) else "emulated"


def scale_products(model: nn.Module) -> list[str]:
    """Let what the master holds in FP8 multiply codes, in place; the names of the weights of which that is true.

    Raises TypeError where such a layer is of a subclass of nn.Linear, whose forward pass is another.
    """
    changed = []
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and storage_of(f"{name}.weight", 2) == "fp8":
            if type(module) is not nn.Linear:
                raise TypeError(f"{name} is a {type(module).__name__}: only nn.Linear itself can multiply codes")
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, ScaledLinear.from_linear(module))
            changed.append(f"{name}.weight")
        elif name.endswith("mlp.experts") and hasattr(module, "gate_up_proj"):
            module.prepared = Prepared()
            changed += [f"{name}.gate_up_proj", f"{name}.down_proj"]
    if any(name.endswith("gate_up_proj") for name in changed):
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        ALL_EXPERTS_FUNCTIONS.register(EXPERTS, experts)
        model.set_experts_implementation(EXPERTS)  # type: ignore[operator]
    return changed


def hold(model: nn.Module) -> None:
    """Make all weights ready as they are now. Until the next call they are taken as ready: call it at every change.

    A copy of the model holds nothing and makes its weights ready anew in each forward pass.
    """
    for module in model.modules():
        if isinstance(module, ScaledLinear):
            module.hold()
        elif isinstance(getattr(module, "prepared", None), Prepared):
            its: Any = module
            with torch.no_grad():
                its.prepared.ready = tuple(prepare(matrix) for matrix in _matrices(its))


def experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The routed experts' sum [T, D] for rows [T, D], ids and weights [T, k]: one expert after the other.

    A published matrix has blocks of its own, so that gate and up are two products. Every expert takes part, also with
    no row at all: its gradient is then zero.
    """
    count, chosen = self.num_experts, top_k_index.shape[-1]
    ids, order = torch.sort(top_k_index.reshape(-1), stable=True)
    sizes = torch.bincount(ids, minlength=count).tolist()
    ready = self.prepared.ready or (None,) * (3 * count)
    weights = _matrices(self)
    outputs = []
    for number, x in enumerate(torch.split(hidden_states[order // chosen], sizes)):
        at = range(3 * number, 3 * number + 3)
        gate, up = (linear(x, weights[place], ready[place]) for place in at[:2])
        outputs.append(linear(self.act_fn(gate) * up, weights[at[2]], ready[at[2]]))
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    summed: Tensor = (
        torch.cat(outputs)[back].view(-1, chosen, hidden_states.shape[-1]) * top_k_weights[..., None]
    ).sum(1)
    return summed.to(hidden_states.dtype)


def _matrices(layer: Any) -> list[Tensor]:
    """Gate, up and down of every expert, in turn."""
    count, twice, columns = layer.gate_up_proj.shape
    halves = layer.gate_up_proj.view(2 * count, twice // 2, columns).unbind()  # not sliced: one gradient, made once
    downs = layer.down_proj.unbind()
    return [matrix for number in range(count) for matrix in (*halves[2 * number : 2 * number + 2], downs[number])]
