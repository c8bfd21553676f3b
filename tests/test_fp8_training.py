"""Products of FP8 codes in training: the rounding against the codec, products against float64, gradients against
autograd through the straight-through definition, and what is handed to scaled_mm against torch's own checks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ottava.errors import FormatError
from ottava.fp8 import training
from ottava.fp8.codec import project, quantise
from ottava.fp8.spec import BLOCK
from ottava.fp8.training import Rows, ScaledLinear, linear, prepare, rows

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
SHAPES = [(5, 128, 128), (16, 256, 384), (3, 40, 24), (33, 320, 200), (0, 64, 32)]  # rows, inputs, outputs


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, spread: int = 6) -> Tensor:
    """Numbers whose rows differ in size by powers of two, as gradients do."""
    source = torch.Generator().manual_seed(seed)
    sizes = torch.randint(-spread, spread + 1, (shape[0], 1), generator=source).float()
    return (torch.randn(*shape, generator=source) * torch.exp2(sizes)).to(dtype)


# ------------------------------------------------------------ rounding


@given(st.integers(1, 6), st.integers(1, 300), st.integers(0, 2**32 - 1), st.integers(-140, 120), st.booleans())
def test_a_row_is_rounded_as_the_codec_rounds_a_block(high: int, wide: int, seed: int, size: int, half: bool) -> None:
    x = (draw(high, wide, seed=seed, spread=8).double() * 2.0**size).clamp(-3e38, 3e38).float()
    x[0] = 0.0
    x[-1, 0] = -0.0
    x = x.bfloat16() if half else x
    found = rows(x)
    blocks = F.pad(x.float(), (0, -wide % BLOCK)).view(high, -1, 1, BLOCK)
    codes, scales = quantise(blocks)
    assert torch.equal(found.codes.view(torch.uint8), codes.view(torch.uint8).view(high, -1))
    assert torch.equal(found.scales, torch.exp2(scales.view(high, -1).double() - 127).float())
    exact = found.codes.double().view(high, -1, BLOCK) * found.scales.double()[..., None]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert torch.equal(found.values(dtype).double(), exact.view(high, -1)[:, :wide])


def test_ties_and_the_largest_code() -> None:
    x = torch.zeros(2, BLOCK)
    x[0, :4] = torch.tensor([464.0, 448.0, -17.0, 2.0**-10])
    x[1, :2] = torch.tensor([464.5, 240.0])
    found = rows(x)
    assert found.values(torch.float32)[0, :4].tolist() == [448.0, 448.0, -16.0, 0.0]
    assert found.scales[:, 0].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_no_number_stays_none(bad: float) -> None:
    """Its block alone, so that the loss is no number and the supervisor's check sees it."""
    x = torch.ones(2, 256)
    x[1, 130] = bad
    found = rows(x).values(torch.float32)
    assert found[1, 128:].isnan().all()
    assert torch.equal(found[0], x[0])
    assert torch.equal(found[1, :128], x[1, :128])
    assert linear(x, torch.ones(4, 256))[1].isnan().all()


# ------------------------------------------------------------ products


def bound(left: Tensor, right: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """Higham's: |computed - exact| <= gamma_k |A||B|, products summed in float32, and one rounding of the result."""
    ku = left.shape[1] * 2.0**-24
    limit = ku / (1 - ku) * (left.abs() @ right.abs())
    return limit + (UNIT[dtype] * y.double().abs() if dtype != torch.float32 else 0.0) + 1e-300


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "inputs", "outputs"), SHAPES)
def test_products_are_those_of_the_codes(count: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    """Forward and for the input's gradient, against float64 arithmetic on what the codec's codes stand for."""
    x, dy = draw(count, inputs, seed=1, dtype=dtype), draw(count, outputs, seed=2, dtype=dtype)
    w = draw(outputs, inputs, seed=3, dtype=dtype)
    ready = prepare(w)
    exact = [decoded(x), decoded(dy), project(w.float()).double()]
    y, dx = ready.forward(x), ready.backward(dy)
    assert (y.dtype, dx.dtype) == (dtype, dtype)
    assert ((y.double() - exact[0] @ exact[2].mT).abs() <= bound(exact[0], exact[2].mT, y, dtype)).all()
    assert ((dx.double() - exact[1] @ exact[2]).abs() <= bound(exact[1], exact[2], dx, dtype)).all()


def decoded(x: Tensor) -> Tensor:
    """What the codec's codes of x by rows of 128 stand for, float64."""
    if not len(x):
        return x.double()
    blocks = F.pad(x.float(), (0, -x.shape[1] % BLOCK)).view(len(x), -1, 1, BLOCK)
    codes, scales = quantise(blocks)
    return (codes.double() * torch.exp2(scales.double() - 127)).view(len(x), -1)[:, : x.shape[1]]


class _Through(torch.autograd.Function):
    """A rounding with the gradient of the identity; or the identity, whose gradient is rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(gradients[0]), None, None


@pytest.mark.parametrize(("count", "inputs", "outputs"), [(5, 128, 128), (3, 40, 24), (9, 200, 320)])
def test_gradients_are_those_of_the_definition(count: int, inputs: int, outputs: int) -> None:
    """Autograd in float64 of y = Q(x) P(w)^T, straight through, with what is said of gradients put in place of its own:
    Q(dy) before it meets w, and x as it came where w's gradient is made."""

    def same(t: Tensor) -> Tensor:
        return t

    x, w = draw(count, inputs, seed=4), draw(outputs, inputs, seed=5)
    pull = draw(count, outputs, seed=6)
    mine = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    y = linear(*mine)
    got = torch.autograd.grad((y * pull).sum(), mine)

    theirs = [x.double().requires_grad_(), w.double().requires_grad_()]
    of_x = _Through.apply(theirs[0], lambda t: decoded(t.float()), same)
    of_w = _Through.apply(theirs[1], lambda t: project(t.float()).double(), same)
    first = _Through.apply(of_x @ of_w.detach().mT, same, lambda g: decoded(g.float()))  # its gradient reaches x
    second = theirs[0].detach() @ of_w.mT  # its gradient reaches w
    whole = first + second - second.detach()
    wanted = torch.autograd.grad((whole * pull.double()).sum(), theirs)
    for a, b in zip((y, *got), (whole, *wanted), strict=True):
        assert torch.allclose(a.double(), b, rtol=1e-5, atol=1e-5 * float(b.detach().abs().max()))
    assert not torch.allclose(got[0].double(), (pull @ project(w)).double(), rtol=1e-3), "dy was rounded"


def test_a_layer_with_a_bias_and_more_dimensions() -> None:
    plain = nn.Linear(96, 48)
    layer = ScaledLinear.from_linear(plain)
    assert layer.weight is plain.weight
    assert layer.state_dict().keys() == plain.state_dict().keys()
    x = draw(6, 96, seed=7).view(2, 3, 96)
    y = layer(x)
    assert y.shape == (2, 3, 48)
    assert torch.equal(y.view(6, 48), prepare(plain.weight).forward(x.view(6, 96)) + plain.bias)
    wide = copy.deepcopy(layer).double()
    exact = F.linear(x.double(), wide.weight, wide.bias)  # it may add the bias inside of the product
    assert torch.allclose(wide(x.double()), exact, rtol=1e-12, atol=1e-12), "in float64 nothing is rounded to FP8"
    with pytest.raises(FormatError, match="no product"):
        layer(torch.ones(2, 95))


def test_what_is_held_is_used_and_a_copy_holds_nothing() -> None:
    layer = ScaledLinear.from_linear(nn.Linear(64, 64, bias=False))
    x = draw(4, 64, seed=8)
    layer.hold()
    before = layer(x)
    with torch.no_grad():
        layer.weight.mul_(3.0)
    assert torch.equal(layer(x), before), "held until the next hold"
    assert not torch.equal(copy.deepcopy(layer)(x), before)
    layer.hold()
    assert torch.equal(layer(x), copy.deepcopy(layer)(x))
    with torch.no_grad():
        layer.weight[3, 3] = torch.nan
    with pytest.raises(FormatError):
        layer.hold()


# ------------------------------------------------------------ by the chip's own units


class Chip:
    """scaled_mm on a chip that multiplies codes: takes what torch's own checks let through, computes in float64.

    wrong: what it takes the second operand's scales for.
    """

    wrong: Callable[[Tensor], Tensor]

    def __init__(self) -> None:
        self.real, self.calls = F.scaled_mm, 0  # type: ignore[attr-defined]
        self.wrong = lambda scales: scales

    def __call__(
        self,
        a: Tensor,
        b: Tensor,
        scale_a: Tensor,
        kind_a: Any,
        scale_b: Tensor,
        kind_b: Any,
        output_dtype: torch.dtype,
    ) -> Tensor:
        self.calls += 1
        kinds: Any = F.ScalingType  # type: ignore[attr-defined]
        assert (kind_a, kind_b) == (kinds.BlockWise1x128, kinds.BlockWise128x128)
        assert a.dtype == b.dtype == torch.float8_e4m3fn
        like = [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in (a, b, scale_a, scale_b)
        ]
        checked = self.real(like[0], like[1], like[2], kind_a, like[3], kind_b, output_dtype=output_dtype)
        assert checked.shape == (a.shape[0], b.shape[1])
        assert len(a) % 16 == 0
        left = a.double() * scale_a.double().repeat_interleave(BLOCK, 1)
        blocks = self.wrong(scale_b[: a.shape[1] // BLOCK])
        right = b.double() * blocks.double().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        return (left @ right).to(output_dtype)


@pytest.fixture
def chip(monkeypatch: pytest.MonkeyPatch) -> Chip:
    made = Chip()
    monkeypatch.setattr(F, "scaled_mm", made)
    monkeypatch.setattr(training, "native", lambda device: True)
    return made


def test_torchs_checks_can_refuse(chip: Chip) -> None:
    """Otherwise passing them says nothing."""
    a, b, _ = training.trial()
    kinds: Any = F.ScalingType  # type: ignore[attr-defined]
    for scales in (a.scales, a.scales[:, :2].t().contiguous().t()):  # by rows; one block too few
        with pytest.raises(RuntimeError, match="1x128 x 128x128"):
            chip(
                a.codes, b.codes.t(), scales, kinds.BlockWise1x128, b.scales.t(), kinds.BlockWise128x128, torch.bfloat16
            )
    good = a.scales.t().contiguous().t()
    with pytest.raises(RuntimeError, match="1x128 x 128x128"):
        chip(
            a.codes,
            b.codes.t(),
            good,
            kinds.BlockWise1x128,
            b.scales[:, :3].t(),
            kinds.BlockWise128x128,
            torch.bfloat16,
        )
    with pytest.raises(RuntimeError, match="col_major"):
        chip(a.codes, b.codes.t().contiguous(), good, kinds.BlockWise1x128, b.scales.t(), kinds.BlockWise128x128,
             torch.bfloat16)  # fmt: skip


@pytest.mark.parametrize(("count", "inputs", "outputs"), [*SHAPES, (17, 640, 1100)])
def test_the_chips_way_gives_what_the_emulation_gives(chip: Chip, count: int, inputs: int, outputs: int) -> None:
    """Forward and both gradients; every layout goes through torch's own checks on its way."""
    x, w, pull = draw(count, inputs, seed=1), draw(outputs, inputs, seed=2), draw(count, outputs, seed=3)
    x, w, pull = x.bfloat16(), w.bfloat16(), pull.bfloat16()
    found = []
    for native in (True, False):
        training.native = lambda device, native=native: native  # type: ignore[assignment]
        mine = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        y = linear(*mine)
        found.append([y.detach(), *torch.autograd.grad((y * pull).sum(), mine)])
    assert chip.calls == (2 if count else 0)
    for by_chip, emulated in zip(*found, strict=True):
        assert by_chip.dtype == emulated.dtype == torch.bfloat16
        assert torch.allclose(by_chip.double(), emulated.double(), rtol=2.0**-7, atol=1e-4)
    assert torch.equal(found[0][2], found[1][2]), "the weight's gradient is no product of codes"


def test_a_chip_is_tried_before_it_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    here, made = torch.device("cpu"), Chip()
    monkeypatch.setattr(F, "scaled_mm", made)
    for wrong, trusted in (
        (lambda s: s, True),
        (lambda s: s.flip(0), False),
        (lambda s: s.flip(1), False),
        (lambda s: s.t().reshape(s.shape), False),
        (lambda s: torch.ones_like(s), False),
    ):
        made.wrong = wrong
        assert training.agrees(here) == trusted

    def refuses(*_: Any, **__: Any) -> Tensor:
        raise NotImplementedError("DeepSeek style (1x128, 128x128) scaling only supported in CUDA for SM90")

    monkeypatch.setattr(F, "scaled_mm", refuses)
    assert not training.agrees(here)
    assert not training.native(here), "a core has no such units"


def test_the_trials_product_is_exact() -> None:
    a, b, exact = training.trial()
    left = a.values(torch.float64)
    right = b.codes.double() * b.scales[:, :3].double().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    assert torch.equal((left @ right.mT).bfloat16(), exact)
    assert torch.equal(exact.double(), left @ right.mT)
    assert isinstance(a, Rows)
