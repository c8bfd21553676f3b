"""Training on the grid: the forward pass runs through the weights the master will hold, bit for bit.

A latent weight in float32 or bfloat16 collects the small steps of training. What every forward pass
multiplies with is its projection, and the gradient taken there is applied to the latent weight
unchanged (the straight-through estimator, arXiv 1308.3432). Writing the master is then no rounding:
the bytes that `GridLinear.master` returns stand for the very values that were trained, evaluated
and rolled out.

The projection is made anew in each forward pass. Whether a weight has changed cannot be told
reliably: autograd's version counter misses what is written through `.data`, through an alias that
became a parameter's `.data`, and through the flat buffers of sharded optimisers, and a stale
projection would train on in silence. A caller who knows that the weights stand still says so with
`held`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ottava.fp8.codec import project, quantise


class _OnGrid(torch.autograd.Function):
    """The projection, with the gradient of the identity; `w + (project(w) - w).detach()` would turn -0 into 0."""

    @staticmethod
    def forward(_ctx: object, w: Tensor, ready: Tensor | None) -> Tensor:
        return project(w) if ready is None else ready.view_as(ready)

    @staticmethod
    def backward(_ctx: object, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def on_grid(w: Tensor) -> Tensor:
    """w on the grid, for use in a forward pass; its gradient is passed to w unchanged.

    w: float32 or bfloat16 [..., M, N], leading dimensions a batch of matrices, each with its own 128x128 blocks. A
    parameter in which several published matrices are fused has to be viewed as that batch first.
    Raises FormatError where w holds infinity or NaN, is of another type, or is no matrix.
    """
    out: Tensor = _OnGrid.apply(w, None)  # type: ignore[no-untyped-call]
    return out


class GridLinear(nn.Linear):
    """nn.Linear whose products are with the weight on the grid; same parameters, same state_dict.

    weight: latent, float32 or bfloat16 [out, in]; bias: used as it is. Under autocast to bfloat16 the cast
    of the weight is exact, since every value on the grid is a BF16 number.
    """

    _held: Tensor | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> GridLinear:
        """The same layer on the grid: it shares `linear`'s parameters, and keeps its hooks and its mode."""
        made = cls.__new__(cls)
        made.__dict__ = {k: v.copy() if isinstance(v, dict) else v for k, v in linear.__dict__.items()}
        return made

    def forward(self, input: Tensor) -> Tensor:
        weight: Tensor = _OnGrid.apply(self.weight, self._held)  # type: ignore[no-untyped-call]
        return F.linear(input, weight, self.bias)

    def master(self) -> tuple[Tensor, Tensor]:
        """The bytes whose values forward multiplies with: codes [out, in] and scales, as `quantise` returns them."""
        return quantise(self.weight.detach())


def put_on_grid(model: nn.Module, chosen: Callable[[str, nn.Linear], bool]) -> list[str]:
    """Replace the chosen nn.Linear modules inside `model` by GridLinear with the same parameters, in place.

    chosen: called with each linear layer's qualified name and the layer. A layer that the model holds in two
    places stays one layer. Returns the names of the layers replaced.
    Raises TypeError, with nothing replaced, where a chosen layer is of a subclass (its forward pass is another) or
    its weight also belongs to a layer that is not chosen (which would go on computing with other values).
    """
    linears = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name and isinstance(module, nn.Linear) and not isinstance(module, GridLinear) and chosen(name, module)
    }
    owners = {id(module.weight) for module in linears.values()}
    for name, module in linears.items():
        if type(module) is not nn.Linear:
            raise TypeError(f"{name} is a {type(module).__name__}: only nn.Linear itself can be put on the grid")
    for name, module in model.named_modules(remove_duplicate=False):
        others = [] if name in linears or isinstance(module, GridLinear) else module._parameters.items()
        for parameter, value in others:
            if id(value) in owners:
                raise TypeError(f"{name}.{parameter} is tied to a layer chosen for the grid, and is not chosen itself")
    made = {id(module): GridLinear.from_linear(module) for module in linears.values()}
    for name, module in linears.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made[id(module)])
    return list(linears)


@contextmanager
def held(model: nn.Module) -> Iterator[None]:
    """Project the weights of every GridLinear in `model` once, for a span in which they do not change.

    For rollouts, evaluation, and the forward passes between two optimiser steps: the values are those that each
    forward pass would have made, and gradients still reach the latent weights.
    Raises RuntimeError at the end of the span where a weight's projection has changed inside it.
    """
    layers = [module for module in model.modules() if isinstance(module, GridLinear)]
    for layer in layers:
        layer._held = project(layer.weight.detach())
    try:
        yield
        for layer in layers:
            if layer._held is None or not torch.equal(project(layer.weight.detach()), layer._held):
                raise RuntimeError("a weight changed while its projection was held: forward passes used the old one")
    finally:
        for layer in layers:
            layer._held = None
