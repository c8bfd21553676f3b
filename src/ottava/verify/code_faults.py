"""Faults in codes and in rounding, as predictions: other codes below the same scales, or another grid."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ottava.fp8.spec import BIAS, BLOCK, BYTE_MAX, BYTE_MIN, CODE_MAX, MX_BLOCK
from ottava.verify.case import Case, Hypotheses
from ottava.verify.side import CODES, POWERS, Form, bits, spread


def _coded(case: Case, change: Callable[[Tensor], Tensor | None]) -> Hypotheses:
    """Predictions from changed codes: change(codes uint8) -> values of codes, float64; also written down again."""
    for form in case.forms[:1]:

        def plain(band: int, form: Form = form) -> Tensor | None:
            codes = change(form.codes(band))
            return None if codes is None else form.values(band, codes=codes)

        yield plain
        if case.bad.coded:
            yield lambda band: _written(plain(band), case.bad.weight.block)


def _written(values: Tensor | None, block: tuple[int, int]) -> Tensor | None:
    """Values that were put into FP8 again, by the 464 rule."""
    if values is None or not bool(values.isfinite().all()):
        return None
    return requantise(values, "464", block)


def as_type(dtype: torch.dtype) -> Callable[[Case], Hypotheses]:
    return lambda case: _coded(case, lambda codes: codes.contiguous().view(dtype).double())


def nibbles(case: Case) -> Hypotheses:
    return _coded(case, lambda codes: CODES[(codes << 4 | codes >> 4).int()])


def byte_order(case: Case) -> Hypotheses:
    for word in (2, 4):
        if case.good.columns % word == 0:
            yield from _coded(case, lambda codes, word=word: _swap(CODES[codes.int()], word))  # type: ignore[misc]
    if not case.bad.coded and case.bad.entry.dtype in ("BF16", "F16", "F32"):
        yield lambda band: _byte_swapped(case, band)


def _swap(values: Tensor, word: int) -> Tensor:
    return values.reshape(len(values), -1, word).flip(2).reshape(values.shape)


def _byte_swapped(case: Case, band: int) -> Tensor:
    stored = case.bad.raw(band)
    sound = case.good.values(band).float().to(stored.dtype)
    swapped = sound.view(torch.uint8).reshape(-1, stored.element_size()).flip(1).contiguous()
    return swapped.view(stored.dtype).reshape(sound.shape).double()


def unsigned(case: Case) -> Hypotheses:
    yield lambda band: case.good.values(band).abs()


def positive_zero(case: Case) -> Hypotheses:
    yield lambda band: case.good.values(band) + 0.0


def flushed(case: Case) -> Hypotheses:
    for keep in (True, False):
        yield from _coded(
            case,
            lambda codes, keep=keep: _without(CODES[codes.int()], 2.0**-6, keep),  # type: ignore[misc]
        )
        for least in (2.0**-126, 2.0**-14):
            yield lambda band, least=least, keep=keep: _without(case.good.values(band), least, keep)  # type: ignore[misc]


def _without(values: Tensor, least: float, keep_sign: bool) -> Tensor:
    zero = torch.copysign(torch.zeros_like(values), values) if keep_sign else torch.zeros_like(values)
    return torch.where(values.abs() < least, zero, values)


def saturated(case: Case) -> Hypotheses:
    band = case.bands[0]
    good, bad = case.good.values(band), case.bad.values(band)
    changed = bits(good) != bits(bad)
    if case.form is not None:
        form = case.form
        scale = spread(form.factors, form.block, band, *good.shape).expand_as(good)
        limit = float((bad / scale)[changed].abs().max())
        yield from _coded(case, lambda codes: CODES[codes.int()].clamp(-limit, limit))
    top = float(bad[changed].abs().max())
    yield lambda band: case.good.values(band).clamp(-top, top)


def unscaled(case: Case) -> Hypotheses:
    def cast(band: int) -> Tensor:
        values = case.good.values(band).float().clamp(-CODE_MAX, CODE_MAX)
        return values.to(torch.float8_e4m3fn).double()

    yield cast


def requantise(values: Tensor, rule: str, block: tuple[int, int]) -> Tensor:
    """A band of values on another grid: values float64 [rows, C] -> float64, exact.

    rule: "464" (this project's), "448" (ceil, DeepSeek's), "clamp" (the same, amax at least 1e-4), "floor" (OCP),
    "f32" (amax / 448 as the scale), "late-up", "late-near" or "late-down" (codes made with that scale, which is then
    rounded to a power of two).
    """
    rows, columns = values.shape
    width = block[1]
    padded = torch.nn.functional.pad(values, (0, -columns % width)).reshape(rows, -1, width)
    amax = padded.abs().amax((0, 2) if block[0] > 1 else 2, keepdim=True)
    used, kept = _scale(amax, rule)
    codes = (padded.float() / used.float()).clamp(-CODE_MAX, CODE_MAX).to(torch.float8_e4m3fn).double()
    return (codes * kept).reshape(rows, -1)[:, :columns]


def _scale(amax: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """The scale to divide by and the scale that is kept."""
    if rule == "clamp":
        amax = amax.clamp_min(1e-4)
    if rule == "f32" or rule.startswith("late"):
        used = (amax.float() / CODE_MAX).double()
        used = torch.where(amax == 0, torch.ones_like(used), used)
        rounding = {"late-up": torch.ceil, "late-near": torch.round, "late-down": torch.floor}.get(rule)
        return used, used if rounding is None else torch.exp2(rounding(torch.log2(used)))
    fraction, exponent = torch.frexp(amax)
    carry = {"464": 464 / 512, "floor": 1.0}.get(rule, 448 / 512)
    byte = exponent.double() - 9 + (fraction > carry) + BIAS
    least, most = (BYTE_MIN, BYTE_MAX) if rule == "464" else (0, 254)
    scale = POWERS[byte.clamp(least, most).long()]
    scale = torch.where(amax == 0, torch.ones_like(scale), scale)
    return scale, scale


def rule(*rules: str, groups: bool = False) -> Callable[[Case], Hypotheses]:
    def hypotheses(case: Case) -> Hypotheses:
        if len(case.good.shape) < 2:
            return
        for rule in rules:
            for block in [MX_BLOCK] if groups else [(BLOCK, BLOCK)]:
                yield lambda band, rule=rule, block=block: _requantised(case, band, rule, block)  # type: ignore[misc]

    return hypotheses


def _requantised(case: Case, band: int, rule: str, block: tuple[int, int]) -> Tensor | None:
    values = case.good.values(band)
    return requantise(values, rule, block) if bool(values.isfinite().all()) else None


def rounded(case: Case) -> Hypotheses:
    yield lambda band: case.good.values(band).float().bfloat16().double()


def truncated(case: Case) -> Hypotheses:
    yield lambda band: (case.good.values(band).float().view(torch.int32) & -65536).view(torch.float32).double()


def half(case: Case) -> Hypotheses:
    """Values that went through FP16 (saturating or not); for FP8 they are then written down again."""
    for most in (torch.inf, 65504.0):

        def cast(band: int, most: float = most) -> Tensor:
            return case.good.values(band).clamp(-most, most).float().half().double()

        yield cast
        if case.bad.coded:
            yield lambda band, cast=cast: _written(cast(band), case.bad.weight.block)  # type: ignore[misc]


def reinterpreted(case: Case) -> Hypotheses:
    yield lambda band: case.good.values(band).float().bfloat16().view(torch.float16).double()
    yield lambda band: case.good.values(band).float().half().view(torch.bfloat16).double()
