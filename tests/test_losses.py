"""Policy losses, advantages and log-probabilities.

The oracle is TRL's own GRPOTrainer._compute_loss, run on fixed tensors without a trainer around it; where TRL has
nothing, numbers by hand, finite differences, and expectations over a vocabulary small enough to be enumerated.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from ottava.engine import logprobs
from ottava.engine.logprobs import log_probs
from ottava.errors import DataError, RecipeError
from ottava.trainer.advantages import advantages, mixed, overlong, without_truncated
from ottava.trainer.losses import (
    COLUMNS,
    Rows,
    Scale,
    correct,
    k3,
    off_policy_keep,
    policy_loss,
    summary,
)
from ottava.trainer.rl_spec import CorrectionSpec, PolicySpec

N, T = 16, 9
BOUND = {torch.float64: 1e-12, torch.float32: 1e-6}
NAN = float("nan")


class Alone:
    """What _compute_loss asks of an accelerator, in a world of one process."""

    num_processes, process_index, sync_gradients = 1, 0, True

    def gather(self, x: Tensor) -> Tensor:
        return x

    gather_for_metrics = gather

    def reduce(self, x: Tensor, reduction: str = "sum") -> Tensor:
        return x


Reference = Callable[[PolicySpec, Tensor, Rows, Scale], tuple[Tensor, dict[str, list[float]]]]


@pytest.fixture(scope="module")
def trl_loss() -> Reference:
    """(loss, metrics) of TRL for our arguments."""
    trl = pytest.importorskip("trl", reason="the oracle is TRL's own loss")

    def compute(policy: PolicySpec, live: Tensor, rows: Rows, scale: Scale) -> tuple[Tensor, dict[str, list[float]]]:
        trainer = object.__new__(trl.GRPOTrainer)
        trainer.args = SimpleNamespace(
            use_bias_correction_kl=policy.unbiased, delta=policy.two_sided, steps_per_generation=1,
            sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
        )  # fmt: skip
        trainer.loss_type = "grpo" if policy.loss == "gspo" else policy.loss
        trainer.importance_sampling_level = "sequence" if policy.loss == "gspo" else "token"
        trainer.epsilon_low = policy.clip_low
        trainer.epsilon_high = policy.cap if policy.loss == "cispo" else policy.clip_high
        trainer.beta, trainer.off_policy_mask_threshold = policy.beta, policy.off_policy_delta
        trainer.top_entropy_quantile, trainer.max_completion_length = 1.0, scale.longest
        trainer.use_vllm = trainer.vllm_importance_sampling_correction = rows.weights is not None
        trainer.current_gradient_accumulation_steps, trainer.aux_loss_enabled = 1, False
        trainer._entropy_bonus_enabled = False
        trainer.accelerator, trainer.model = Alone(), SimpleNamespace(training=True)
        trainer._metrics = {"train": defaultdict(list)}
        trainer._get_per_token_logps_and_entropies = lambda *_a, **_k: (live, torch.zeros_like(live), None)
        count, width = live.shape
        ids = torch.zeros(count, width, dtype=torch.long)
        inputs: dict[str, Any] = {
            "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids,
            "completion_mask": rows.mask.to(live.dtype), "advantages": rows.advantages,
            "num_items_in_batch": torch.tensor(scale.tokens, dtype=live.dtype),
            "old_per_token_logps": rows.old, "ref_per_token_logps": rows.reference,
            "sampling_per_token_logps": rows.sampler, "importance_sampling_ratio": rows.weights,
        }  # fmt: skip
        loss = trl.GRPOTrainer._compute_loss(trainer, None, {k: v for k, v in inputs.items() if v is not None})
        return loss, trainer._metrics["train"]

    return compute


def batch(dtype: torch.dtype, seed: int = 0, spread: float = 0.4) -> tuple[Tensor, Rows, Scale]:
    """Live log-probabilities and replies of lengths 0 to T, some past every clip, one row empty; padding is finite."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    old = -3 * torch.rand(N, T, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, T + 1, (N,), generator=generator)
    lengths[3], lengths[5] = 0, T
    mask = torch.arange(T) < lengths.unsqueeze(1)
    live, reference, sampler = (old + spread * normal(N, T) for _ in range(3))
    rows = Rows(mask, normal(N).to(dtype), old.to(dtype), reference.to(dtype), sampler.to(dtype))
    return live.to(dtype), rows, Scale(N, int(mask.sum()), T + 2)


def with_gradient(loss: Callable[[Tensor], Tensor], live: Tensor) -> tuple[Tensor, Tensor]:
    leaf = live.clone().requires_grad_()
    value = loss(leaf)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def counted(counts: Tensor) -> dict[str, float]:
    return dict(zip(COLUMNS, counts.tolist(), strict=True))


KL = {"beta": 0.1}
POLICIES = {
    "grpo": PolicySpec(loss="grpo"),
    "grpo, unbiased KL": PolicySpec(loss="grpo", **KL),
    "grpo, k3": PolicySpec(loss="grpo", unbiased=False, **KL),
    "grpo, two-sided": PolicySpec(loss="grpo", two_sided=1.4, unbiased=True, **KL),
    "grpo, off-policy mask": PolicySpec(loss="grpo", off_policy_delta=0.02, **KL),
    "dr_grpo": PolicySpec(loss="dr_grpo"),
    "dr_grpo, unbiased KL": PolicySpec(loss="dr_grpo", **KL),
    "dapo": PolicySpec(loss="dapo", clip_high=0.28),
    "dapo, off-policy mask": PolicySpec(loss="dapo", clip_high=0.28, off_policy_delta=0.02),
    "dapo, all of it": PolicySpec(loss="dapo", clip_low=0.1, clip_high=0.3, two_sided=1.5, off_policy_delta=0.02, **KL),
    "gspo": PolicySpec(loss="gspo", clip_low=0.03, clip_high=0.04),
    "gspo, as its paper": PolicySpec(loss="gspo", clip_low=3e-4, clip_high=4e-4),
    "gspo, KL": PolicySpec(loss="gspo", clip_low=0.03, clip_high=0.04, two_sided=1.1, **KL),
    "cispo": PolicySpec(loss="cispo", cap=5.0),
    "cispo, cap reached": PolicySpec(loss="cispo", cap=1.2, **KL),
    "cispo, off-policy mask": PolicySpec(loss="cispo", cap=1.5, off_policy_delta=0.02, unbiased=False, **KL),
}
ROWS: dict[str, Callable[[Rows], Rows]] = {
    "as they are": lambda rows: rows,
    "first update": lambda rows: replace(rows, old=None),
    "no sampler": lambda rows: replace(rows, sampler=None),
    "sampler with holes": lambda rows: replace(
        rows, sampler=torch.where(rows.mask & (rows.old < -2), NAN, rows.sampler)
    ),
    "token weights": lambda rows: replace(rows, weights=_weights(rows, "token_truncate")),
    "sequence weights": lambda rows: replace(rows, weights=_weights(rows, "sequence_mask")),
    "per-token advantages": lambda rows: replace(
        rows, advantages=(rows.advantages.unsqueeze(1) + rows.old).contiguous()
    ),
    "integer rewards": lambda rows: replace(rows, advantages=rows.advantages.sign()),
}
CASES = [
    (name, kind)
    for name, policy in POLICIES.items()
    for kind in ROWS
    if (policy.loss, kind) != ("gspo", "per-token advantages")  # refused
]


def _weights(rows: Rows, mode: Any) -> Tensor:
    assert rows.old is not None
    assert rows.sampler is not None
    return correct(CorrectionSpec(mode=mode, low=0.5, high=1.5), rows.old, rows.sampler, rows.mask).weights


@pytest.mark.parametrize("dtype", BOUND, ids=["float64", "float32"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_equals_trl(trl_loss: Reference, name: str, kind: str, dtype: torch.dtype) -> None:
    policy = POLICIES[name]
    live, rows, scale = batch(dtype)
    rows = ROWS[kind](rows)
    ours, gradient = with_gradient(lambda x: policy_loss(policy, x, rows, scale)[0], live)
    theirs, expected = with_gradient(lambda x: trl_loss(policy, x, rows, scale)[0], live)
    assert abs(float(ours - theirs)) <= BOUND[dtype]
    assert float((gradient - expected).abs().max()) <= BOUND[dtype]
    assert float(expected.abs().max()) > 1e-3 or policy.clip_low < 1e-3, "a gradient of nothing would prove nothing"


def test_the_paths_all_differ() -> None:
    """No two of the compared policies are one: each switch reaches the loss."""
    live, rows, scale = batch(torch.float64)
    values = [float(policy_loss(policy, live, rows, scale)[0]) for policy in POLICIES.values()]
    assert len({round(value, 9) for value in values}) == len(values)


def test_bnpo_is_dapo_of_one_batch(trl_loss: Reference) -> None:
    live, rows, scale = batch(torch.float64)
    bnpo = trl_loss(SimpleNamespace(**vars(PolicySpec(loss="dapo")) | {"loss": "bnpo"}), live, rows, scale)[0]
    assert abs(float(policy_loss(PolicySpec(loss="dapo"), live, rows, scale)[0] - bnpo)) <= 1e-12


@pytest.mark.parametrize("name", ["grpo, unbiased KL", "dapo", "dr_grpo, unbiased KL", "gspo"])
def test_counts_equal_trls_metrics(trl_loss: Reference, name: str) -> None:
    policy = POLICIES[name]
    live, rows, scale = batch(torch.float64)
    if policy.loss == "gspo":  # TRL counts an empty row among its sequences
        live, rows = live[8:], Rows(*(value[8:] for value in (rows.mask, rows.advantages, rows.old, rows.reference)))
    said = summary(policy_loss(policy, live, rows, scale)[1])
    _, metrics = trl_loss(policy, live, rows, scale)
    assert 0 < said["clipped_low"] == pytest.approx(metrics["clip_ratio/low_mean"][0])
    assert 0 < said["clipped_high"] == pytest.approx(metrics["clip_ratio/high_mean"][0])
    if policy.beta:
        assert said["kl"] == pytest.approx(metrics["kl"][0], abs=1e-12)


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
@pytest.mark.parametrize("name", POLICIES)
def test_shards_add(trl_loss: Reference, name: str, shards: int) -> None:
    """Loss, gradient and counts of V shards are those of the whole, and of TRL."""
    policy = POLICIES[name]
    live, rows, scale = batch(torch.float64)
    rows = replace(rows, weights=_weights(rows, "token_mask"))
    whole, counts = policy_loss(policy, live, rows, scale)
    _, gradient = with_gradient(lambda x: trl_loss(policy, x, rows, scale)[0], live)
    loss, columns, parts = torch.zeros(()).double(), torch.zeros(len(COLUMNS)).double(), []
    for v in range(shards):
        own = slice(v * N // shards, (v + 1) * N // shards)
        part = Rows(**{name: value[own] for name, value in vars(rows).items()})
        leaf = live[own].clone().requires_grad_()
        share, count = policy_loss(policy, leaf, part, scale)
        parts.append(torch.autograd.grad(share, leaf)[0])
        loss, columns = loss + share.detach(), columns + count
    assert abs(float(loss - whole)) <= 1e-12
    torch.testing.assert_close(columns, counts, rtol=1e-12, atol=1e-12)
    assert float((torch.cat(parts) - gradient).abs().max()) <= 1e-12


@pytest.mark.parametrize("name", ["gspo", "gspo, KL", "grpo, unbiased KL", "dapo, all of it"])
def test_gradient_by_finite_differences(name: str) -> None:
    """The kinks of min and clip are far from these ratios, or the differences would straddle them."""
    live, rows, scale = batch(torch.float64, seed=4)
    leaf = live.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: policy_loss(POLICIES[name], x, rows, scale)[0], (leaf,), eps=1e-7)


def test_gspo_by_hand() -> None:
    """Two tokens, ratios e^.1 and e^.3: s = e^.2, and both tokens get the same gradient, s A / (B n)."""
    live = torch.tensor([[-1.0, -0.8]], dtype=torch.float64, requires_grad=True)
    rows = Rows(
        torch.ones(1, 2, dtype=torch.bool), torch.tensor([2.0]).double(), live.detach() - torch.tensor([0.1, 0.3])
    )
    loss, counts = policy_loss(PolicySpec(loss="gspo", clip_low=0.5, clip_high=0.5), live, rows, Scale(4, 99, 99))
    (gradient,) = torch.autograd.grad(loss, live)
    s = math.exp(0.2)
    assert loss.item() == pytest.approx(-2 * s / 4, rel=1e-7)
    assert gradient.tolist() == [pytest.approx([-2 * s / 4 / 2] * 2, rel=1e-7)]
    assert (counted(counts)["ratios"], counted(counts)["tokens"]) == (1, 2)


def test_cispo_by_hand() -> None:
    """Every token keeps a gradient, capped: min(r, cap) A / T. Clipping would have left the first without one."""
    live = torch.tensor([[-1.0, -2.0, -3.0]], dtype=torch.float64, requires_grad=True)
    shift = torch.tensor([2.0, 0.5, -0.5]).double()
    rows = Rows(torch.ones(1, 3, dtype=torch.bool), torch.tensor([-1.5]).double(), live.detach() - shift)
    loss, counts = policy_loss(PolicySpec(loss="cispo", cap=3.0), live, rows, Scale(1, 10, 99))
    (gradient,) = torch.autograd.grad(loss, live)
    assert gradient.tolist() == [pytest.approx([0.45, 0.15 * math.exp(0.5), 0.15 * math.exp(-0.5)])]
    assert counted(counts)["clipped_high"] == 1
    assert counted(counts)["clipped_low"] == 0


def test_off_policy_mask_by_hand() -> None:
    """Drift .3 a token: kept with A >= 0, kept below the bound, else gone; the KL term stays."""
    live = torch.full((4, 2), -1.0, dtype=torch.float64)
    drift = torch.tensor([[0.3, 0.3], [0.3, 0.3], [0.1, 0.1], [0.6, NAN]])
    mask = torch.ones(4, 2, dtype=torch.bool)
    advantage = torch.tensor([[-1.0], [0.0], [-1.0], [-1.0]])
    kept = off_policy_keep(live, live + drift, advantage, mask, 0.2)
    assert kept.flatten().tolist() == [False, True, True, False]  # the last: (.6 + 0) / 2
    rows = Rows(mask, advantage.squeeze(1).double(), live, live - 0.5, live + drift)
    scale = Scale(4, 8, 2)
    loss, counts = policy_loss(PolicySpec(loss="grpo", off_policy_delta=0.2, beta=0.1), live, rows, scale)
    assert float(loss) == pytest.approx((0 + 0 + 1 + 0) / 4 + 0.1 * (math.exp(-0.5) + 0.5 - 1))
    assert counted(counts)["off_policy"] == 2
    assert counted(counts)["unscored"] == 1
    each = torch.tensor([[1.0, -1.0]]).expand(4, 2)  # by token: only the second is negative, and then not in the mask
    for width, touched in ((2, 3), (1, 0)):
        some = replace(rows, advantages=each.double(), mask=torch.arange(2).expand(4, 2) < width)
        _, counts = policy_loss(PolicySpec(off_policy_delta=0.29), live, some, scale)
        assert counted(counts)["off_policy"] == touched


VOCABULARY = 6


def _two_policies() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return tuple(torch.randn(VOCABULARY, generator=generator, dtype=torch.float64) for _ in range(3))


def test_unbiased_kl_has_the_gradient_of_the_kl() -> None:
    """E over the old policy's samples of r k is KL(policy, reference), value and gradient; without r it is neither."""
    logits, old, reference = _two_policies()
    old, reference = old.log_softmax(0), reference.log_softmax(0)

    def expected(z: Tensor, unbiased: bool) -> Tensor:
        """Each id is a row of one token, weighted by how often the old policy draws it."""
        live = z.log_softmax(0).unsqueeze(1)
        rows = Rows(torch.ones(VOCABULARY, 1, dtype=torch.bool), torch.zeros(VOCABULARY).double(), old[:, None])
        rows = replace(rows, reference=reference[:, None])
        losses = [
            policy_loss(
                PolicySpec(loss="dapo", beta=1.0, unbiased=unbiased), live[i : i + 1], _row(rows, i), Scale(1, 1, 1)
            )[0]
            for i in range(VOCABULARY)
        ]
        return (old.exp() * torch.stack(losses)).sum()

    def exact(z: Tensor) -> Tensor:
        live = z.log_softmax(0)
        return (live.exp() * (live - reference)).sum()

    (value, gradient), (truth, slope) = with_gradient(lambda z: expected(z, True), logits), with_gradient(exact, logits)
    assert float(value) == pytest.approx(float(truth), rel=1e-12)
    torch.testing.assert_close(gradient, slope, rtol=1e-11, atol=1e-12)
    biased = with_gradient(lambda z: expected(z, False), logits)[1]
    assert float((biased - slope).abs().max()) > 0.01


def _row(rows: Rows, i: int) -> Rows:
    return Rows(**{name: None if value is None else value[i : i + 1] for name, value in vars(rows).items()})


@given(st.lists(st.floats(-20, 0), min_size=2, max_size=2))
def test_k3_is_never_negative(pair: list[float]) -> None:
    live, reference = torch.tensor(pair, dtype=torch.float64)
    assert float(k3(live, reference)) >= -1e-12


# Bad input: handled and counted.


@pytest.mark.parametrize("name", POLICIES)
def test_padding_is_never_looked_at(name: str) -> None:
    """NaN and infinity outside the mask change nothing, in value, gradient and counts."""
    live, rows, scale = batch(torch.float64)
    policy = POLICIES[name]
    rows = replace(rows, weights=_weights(rows, "token_mask"))

    def spoilt(value: Tensor, by: float) -> Tensor:
        return torch.where(rows.mask, value, by)

    dirty = Rows(rows.mask, rows.advantages, spoilt(rows.old, NAN), spoilt(rows.reference, math.inf),
                 spoilt(rows.sampler, -math.inf), spoilt(rows.weights, NAN))  # fmt: skip
    clean, gradient = with_gradient(lambda x: policy_loss(policy, x, rows, scale)[0], live)
    value, slope = with_gradient(lambda x: policy_loss(policy, x, dirty, scale)[0], spoilt(live, NAN))
    assert torch.equal(value, clean)
    assert torch.equal(slope, gradient)
    assert torch.equal(policy_loss(policy, live, rows, scale)[1], policy_loss(policy, live, dirty, scale)[1])


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "gspo", "cispo"])
def test_nan_advantages_are_zero_and_counted(loss: Any) -> None:
    live, rows, scale = batch(torch.float64)
    bad = rows.advantages.clone()
    bad[1], bad[2] = NAN, math.inf
    zero = torch.where(bad.isfinite(), bad, 0.0)
    policy = PolicySpec(loss=loss, off_policy_delta=0.02)
    value, gradient = with_gradient(lambda x: policy_loss(policy, x, replace(rows, advantages=bad), scale)[0], live)
    expected, slope = with_gradient(lambda x: policy_loss(policy, x, replace(rows, advantages=zero), scale)[0], live)
    assert torch.equal(value, expected)
    assert torch.equal(gradient, slope)
    assert not gradient[1:3].any()
    counts = counted(policy_loss(policy, live, replace(rows, advantages=bad), scale)[1])
    assert counts["bad_advantages"] == 2
    assert summary(policy_loss(policy, live, replace(rows, advantages=bad), scale)[1])["bad_advantages"] == 2


def test_nan_per_token_advantages_count_inside_the_mask_only() -> None:
    live, rows, scale = batch(torch.float64)
    each = rows.advantages.unsqueeze(1).expand(N, T).clone()
    each[~rows.mask] = NAN
    counts = counted(policy_loss(PolicySpec(), live, replace(rows, advantages=each), scale)[1])
    assert counts["bad_advantages"] == 0
    each[5, 2] = NAN
    loss, found = policy_loss(PolicySpec(), live, replace(rows, advantages=each), scale)
    assert counted(found)["bad_advantages"] == 1
    assert loss.isfinite()


@pytest.mark.parametrize("which", ["live", "old", "reference"])
def test_the_learners_own_nan_stays_one(which: str) -> None:
    """A fault of the machine or the model must reach the guard, also where the row is masked as off-policy."""
    live, rows, scale = batch(torch.float64)
    rows = replace(rows, advantages=-rows.advantages.abs(), sampler=rows.old + 1)
    hole = torch.zeros(N, T, dtype=torch.bool)
    hole[5, 1] = True
    if which == "live":
        live = live.masked_fill(hole, NAN)
    else:
        rows = replace(rows, **{which: getattr(rows, which).masked_fill(hole, NAN)})
    policy = PolicySpec(beta=0.1 * (which == "reference"), off_policy_delta=0.02)
    assert policy_loss(policy, live, rows, scale)[0].isnan()
    assert policy_loss(policy.model_copy(update={"off_policy_delta": None}), live, rows, scale)[0].isnan()


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "gspo", "cispo"])
@pytest.mark.parametrize("count", [0, 3])
def test_nothing_to_learn_from(loss: Any, count: int) -> None:
    """A shard without rows, or only with empty ones: a zero with a graph, and the right columns."""
    live = torch.randn(count, T, requires_grad=True)
    rows = Rows(torch.zeros(count, T, dtype=torch.bool), torch.ones(count), reference=live.detach())
    value, counts = policy_loss(PolicySpec(loss=loss, beta=0.1, off_policy_delta=0.1), live, rows, Scale(0, 0, 0))
    assert value.item() == 0
    assert not torch.autograd.grad(value, live)[0].any()
    assert counted(counts) == {**dict.fromkeys(COLUMNS, 0.0), "rows": count, "empty": count}
    assert all(math.isfinite(value) for value in summary(counts).values())


def test_all_equal_rewards_give_no_gradient() -> None:
    live, rows, scale = batch(torch.float32)
    found = advantages(torch.full((2, 8), 0.1))
    value, gradient = with_gradient(
        lambda x: policy_loss(PolicySpec(), x, replace(rows, advantages=found.values.flatten()), scale)[0], live
    )
    assert float(value) == 0
    assert not gradient.any()
    assert (found.flat.tolist(), int(found.unscorable.sum())) == ([True, True], 0)


def test_refuses() -> None:
    live, rows, scale = batch(torch.float32)
    wrong: list[dict[str, Any]] = [
        {"loss": "ppo"}, {"clip_low": 1.5}, {"beta": NAN}, {"clip_high": -0.1}, {"off_policy_delta": math.inf},
        {"two_sided": 1.1}, {"loss": "cispo", "two_sided": 4.0},
    ]  # fmt: skip
    for fields in wrong:
        with pytest.raises(ValidationError):
            PolicySpec(**fields)
    for fields in ({"mode": "none"}, {"low": 2.0}, {"high": 0.5}, {"high": NAN}):
        with pytest.raises(ValidationError):
            CorrectionSpec(**fields)
    with pytest.raises(DataError, match="without a reference"):
        policy_loss(PolicySpec(beta=0.1), live, replace(rows, reference=None), scale)
    with pytest.raises(DataError, match=r"advantages of shape \[16, 1\]"):
        policy_loss(PolicySpec(), live, replace(rows, advantages=rows.advantages.unsqueeze(1)), scale)
    with pytest.raises(DataError, match="one ratio a reply"):
        policy_loss(PolicySpec(loss="gspo"), live, replace(rows, advantages=live), scale)


# The correction for an engine that is not the learner.


def test_correction_by_hand() -> None:
    """Ratios 2, 1/4 and 1 (not scored): product 1/2. The second row: 4, 2, with the third out of the mask."""
    log = torch.log(torch.tensor([[2.0, 0.25, 9.0], [4.0, 2.0, 9.0]]))
    sampler = -log
    sampler[0, 2] = NAN
    mask = torch.tensor([[True, True, True], [True, True, False]])
    old = torch.zeros(2, 3)

    def found(mode: Any, counted: bool = True) -> tuple[list[list[float]], list[list[bool]], list[int]]:
        result = correct(CorrectionSpec(mode=mode, low=0.5, high=3.0, counted=counted), old, sampler, mask)
        numbers = [int(result.truncated), int(result.rejected), int(result.unscored)]
        return [[round(w, 5) for w in row] for row in result.weights.tolist()], result.mask.tolist(), numbers

    same = mask.tolist()
    assert found("token_truncate") == ([[2, 0.5, 1], [3, 2, 1]], same, [2, 0, 1])
    assert found("token_mask") == ([[2, 0, 1], [0, 2, 1]], same, [0, 2, 1])
    assert found("token_mask", False) == (
        [[2, 0, 1], [0, 2, 1]],
        [[True, False, True], [False, True, False]],
        [0, 2, 1],
    )
    assert found("sequence_truncate") == ([[0.5], [3]], same, [2, 0, 1])
    assert found("sequence_mask") == ([[0.5], [0]], same, [0, 2, 1])
    assert found("sequence_mask", False)[1] == [[True] * 3, [False] * 3]


def test_an_exact_engine_is_not_corrected() -> None:
    live, rows, scale = batch(torch.float64)
    assert rows.old is not None
    for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"):
        result = correct(CorrectionSpec(mode=mode), rows.old, rows.old, rows.mask)
        assert torch.equal(result.weights, torch.ones_like(result.weights))
        assert int(result.rejected) == int(result.truncated) == 0
        corrected = policy_loss(PolicySpec(), live, replace(rows, weights=result.weights), scale)[0]
        assert torch.equal(corrected, policy_loss(PolicySpec(), live, rows, scale)[0])


def test_rejected_tokens_out_of_the_denominator() -> None:
    """counted=False is the loss of replies that never had those tokens."""
    live, rows, _ = batch(torch.float64)
    assert rows.old is not None
    assert rows.sampler is not None
    result = correct(
        CorrectionSpec(mode="token_mask", low=0.5, high=1.5, counted=False), rows.old, rows.sampler, rows.mask
    )
    left = Scale(N, int(result.mask.sum()), T)
    assert 0 < int(result.rejected) == int(rows.mask.sum()) - left.tokens
    without = replace(rows, mask=result.mask, weights=result.weights)
    value, counts = policy_loss(PolicySpec(loss="dapo", clip_high=0.2), live, without, left)
    kept = result.mask
    r = (live - rows.old).exp()[kept]
    a = rows.advantages.unsqueeze(1).expand(N, T)[kept]
    x = -torch.minimum(r * a, r.clamp(0.8, 1.2) * a) * result.weights[kept]
    assert float(value) == pytest.approx(float(x.mean()), rel=1e-12)
    assert counted(counts)["rejected"] == 0


# Advantages.


def trl_advantages(rewards: Tensor, scaling: str) -> Tensor:
    """The lines of TRL's _generate_and_score_completions, around its own nanstd."""
    utils = pytest.importorskip("trl.trainer.utils")
    groups, size = rewards.shape
    flat = rewards.flatten()
    mean = torch.nanmean(rewards, dim=1).repeat_interleave(size)
    if scaling == "batch":
        std = utils.nanstd(flat).expand_as(flat)
    else:
        std = utils.nanstd(rewards, dim=1).repeat_interleave(size)
    centred = flat - mean
    return torch.nan_to_num(centred if scaling == "none" else centred / (std + 1e-4), nan=0.0).view(groups, size)


@pytest.mark.parametrize("scaling", ["group", "batch", "none"])
@given(st.lists(st.lists(st.sampled_from([0.0, 1.0, 0.5, -1.0, NAN]), min_size=4, max_size=4), min_size=1, max_size=6))
def test_advantages_equal_trl(scaling: Any, rewards: list[list[float]]) -> None:
    tensor = torch.tensor(rewards, dtype=torch.float64)
    expected = trl_advantages(tensor, scaling)
    found = advantages(tensor, scaling)
    assert float((found.values - expected).abs().max()) <= 1e-6  # TRL's Bessel factor is float32
    assert torch.equal(found.unscorable, tensor.isnan())
    scored = [[r for r in row if not math.isnan(r)] for row in rewards]
    assert found.flat.tolist() == [len(set(row)) < 2 for row in scored]


@pytest.mark.parametrize("scaling", ["group", "batch", "none"])
def test_flat_groups_are_exactly_zero(scaling: Any) -> None:
    """The mean of seven equal .1's is not .1: a gradient made of rounding. TRL's lines would give one."""
    rewards = torch.stack([torch.full((7,), 0.1), torch.tensor([0.0, 0, 0, 0, 0, 0, 1])])
    found = advantages(rewards, scaling)
    assert torch.equal(found.values[0], torch.zeros(7))
    assert found.flat.tolist() == [True, False]
    assert found.values[1].abs().min() > 0
    if scaling == "group":
        assert trl_advantages(rewards, scaling)[0].abs().max() > 0


def test_advantages_by_hand() -> None:
    """Rewards 1 0 0 NaN: mean 1/3, std with Bessel .57735. A lone verdict is a flat group."""
    rewards = torch.tensor([[1.0, 0, 0, NAN], [NAN, NAN, 1.0, NAN], [math.inf, 1, 0, 1]])
    found = advantages(rewards)
    high, low = (2 / 3) / (3**-0.5 + 1e-4), (-1 / 3) / (3**-0.5 + 1e-4)
    assert found.values[0].tolist() == pytest.approx([high, low, low, 0])
    assert not found.values[1].any()
    assert found.values[2].tolist() == pytest.approx([0, -low, -high, -low])
    assert (len(found.flat), int(found.flat.sum()), int(found.unscorable.sum())) == (3, 1, 5)
    assert found.mean.tolist() == pytest.approx([1 / 3, 1, 2 / 3])
    with pytest.raises(RecipeError):
        advantages(rewards, "std")
    with pytest.raises(DataError):
        advantages(rewards.flatten())
    assert advantages(torch.zeros(0, 4)).values.shape == (0, 4)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(0, 30), st.integers(0, 10))
def test_overlong_equals_trl(lengths: list[int], longest: int, cache: int) -> None:
    rewards = pytest.importorskip("trl.rewards")
    if cache > longest:
        with pytest.raises(RecipeError):
            overlong(torch.tensor(lengths), longest, cache)
        return
    expected = rewards.get_soft_overlong_punishment(longest, cache)([[0] * n for n in lengths])
    assert overlong(torch.tensor(lengths), longest, cache).tolist() == pytest.approx(expected, abs=1e-6)


def test_truncated_rows_lose_their_tokens_and_still_count() -> None:
    live, rows, scale = batch(torch.float64)
    cut = torch.zeros(N, dtype=torch.bool)
    cut[5] = True
    left = replace(rows, mask=without_truncated(rows.mask, cut))
    value, counts = policy_loss(PolicySpec(), live, left, scale)
    r = (live - rows.old).exp()
    a = rows.advantages.unsqueeze(1)
    x = -torch.minimum(r * a, r.clamp(0.8, 1.2) * a)
    per_row = [float(x[i][rows.mask[i]].mean()) for i in range(N) if i != 5 and rows.mask[i].any()]
    assert float(value) == pytest.approx(sum(per_row) / N)
    assert counted(counts)["empty"] == 2


def test_dynamic_sampling_takes_the_first_mixed_groups() -> None:
    flat = advantages(torch.tensor([[1.0, 1], [0, 1], [NAN, NAN], [1, 0], [0, 1]])).flat
    assert mixed(flat, 2) == [1, 3]
    assert mixed(flat, 9) == [1, 3, 4]


def test_teacher_advantages_through_trl(trl_loss: Reference) -> None:
    """Reverse KL as a reward per token: TRL takes such advantages too."""
    live, rows, scale = batch(torch.float64)
    assert rows.old is not None
    assert rows.reference is not None
    each = 0.5 * (rows.reference - rows.old)
    rows = replace(rows, advantages=each)
    ours, gradient = with_gradient(lambda x: policy_loss(PolicySpec(loss="dapo"), x, rows, scale)[0], live)
    theirs, expected = with_gradient(lambda x: trl_loss(PolicySpec(loss="dapo"), x, rows, scale)[0], live)
    assert abs(float(ours - theirs)) <= 1e-12
    assert float((gradient - expected).abs().max()) <= 1e-12


# Log-probabilities.


def plain(logits: Tensor, ids: Tensor, temperature: float, kept: Tensor | None) -> Tensor:
    scaled = logits / temperature
    scaled = scaled if kept is None else scaled.masked_fill(~kept, -math.inf)
    return scaled.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("temperature", [1.0, 1.5, 0.6])
@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("chunk", [1, 40, 1 << 20])
def test_log_probs_and_their_gradient(
    monkeypatch: pytest.MonkeyPatch, temperature: float, truncated: bool, chunk: int
) -> None:
    monkeypatch.setattr(logprobs, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(3, 5, 11, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, 11, (3, 5), generator=generator)
    kept = None
    if truncated:
        kept = (torch.rand(3, 5, 11, generator=generator) < 0.4).scatter_(2, ids.unsqueeze(2), True)
    weight = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    ours, gradient = with_gradient(lambda z: (weight * log_probs(z, ids, temperature, kept)).sum(), logits)
    theirs, expected = with_gradient(lambda z: (weight * plain(z, ids, temperature, kept)).sum(), logits)
    assert abs(float(ours - theirs)) <= 1e-12
    assert float((gradient - expected).abs().max()) <= 1e-12
    utils = pytest.importorskip("trl.trainer.utils")
    if not truncated:
        other = utils.selective_log_softmax(logits, ids, temperature)
        assert float((log_probs(logits, ids, temperature) - other).abs().max()) <= 1e-12


def test_the_chunks_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, ids = torch.randn(64, 301), torch.randint(0, 301, (64,))
    whole = with_gradient(lambda z: log_probs(z, ids, 1.5).sum(), logits)
    monkeypatch.setattr(logprobs, "CHUNK", 301 * 8)
    parts = with_gradient(lambda z: log_probs(z, ids, 1.5).sum(), logits)
    assert all(map(torch.equal, whole, parts))


def test_log_probs_of_bfloat16_are_float32() -> None:
    logits = torch.randn(4, 33).bfloat16().requires_grad_()
    ids = torch.randint(0, 33, (4,))
    found = log_probs(logits, ids, 1.5)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain(logits.detach().float(), ids, 1.5, None))
    found.sum().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def test_without_the_kept_set_the_mean_ratio_is_the_kept_mass() -> None:
    """Keep-sampling-mask: with it a policy's ratio to itself is 1; without it, top-p biases every token."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(1, 12, generator=generator, dtype=torch.float64)
    p = logits.softmax(-1)[0]
    kept = (p >= p.sort(descending=True).values[4]).unsqueeze(0)
    mass = float(p[kept[0]].sum())
    ids = torch.nonzero(kept[0]).squeeze(1)
    rows, sets = logits.expand(len(ids), -1), kept.expand(len(ids), -1)
    sampled = log_probs(rows, ids, 1.0, sets).exp()
    assert float(sampled.sum()) == pytest.approx(1, rel=1e-12)
    assert float((sampled * (log_probs(rows, ids) - sampled.log()).exp()).sum()) == pytest.approx(mass, rel=1e-12)
    assert mass < 0.95


def test_log_probs_refuse() -> None:
    logits, ids = torch.randn(2, 5), torch.tensor([1, 4])
    kept = torch.zeros(2, 5, dtype=torch.bool)
    assert torch.equal(log_probs(logits, ids, 1.0, kept), log_probs(logits, ids))  # nothing recorded: not truncated
    kept[1, 0] = True
    with pytest.raises(DataError, match="1 of 2 sampled tokens"):
        log_probs(logits, ids, 1.0, kept)
    for temperature in (0.0, -1.0, NAN):
        with pytest.raises(RecipeError, match="temperature"):
            log_probs(logits, ids, temperature)
    assert log_probs(torch.randn(0, 5), torch.zeros(0, dtype=torch.long)).shape == (0,)
    assert log_probs(torch.full((1, 3), NAN), torch.tensor([0])).isnan().all()
