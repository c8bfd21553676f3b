"""Rollouts against `generate()` and against Hugging Face's forward pass in float64.

`Wide` makes Transformers compute in float64 throughout, where two ways of summing differ by 1e-14: there ids and
routes can be compared exactly on any machine. What float32 may do is measured against it, not chosen.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ottava.engine import bare, rollout
from ottava.engine.generate import ThinkBudget, generate
from ottava.engine.rollout import LENGTH, STOP, InProcess, Rollouts, Sampling
from ottava.engine.sampling import choose, sample, uniform
from ottava.errors import DataError, FormatError
from ottava.models.build import from_config
from tests.test_engine import CONFIG, END, ETHINK, VOCABULARY

DENSE = {k: v for k, v in CONFIG.items() if "expert" not in k and "rank" not in k and "group" not in k} | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 16,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mla": CONFIG,
    "llama": DENSE | {"model_type": "llama"},
    "qwen3": DENSE | {"model_type": "qwen3"},
}
VARIANTS: dict[str, dict[str, Any]] = FAMILIES | {
    "mla, query rank, groups, yarn": CONFIG
    | {"q_lora_rank": 12, "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
    | {"norm_topk_prob": False, "rope_parameters": YARN, "rms_norm_eps": 1e-3},
    "mla, halves, biases, tied": CONFIG
    | {"rope_interleave": False, "attention_bias": True, "tie_word_embeddings": True},
    "mla, many experts": CONFIG | {"n_routed_experts": bare.FEW_EXPERTS + 4, "n_shared_experts": 2},
    "llama, biases, llama3": FAMILIES["llama"]
    | {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3, "head_dim": 16},
    "qwen3, one key head, tied": FAMILIES["qwen3"] | {"num_key_value_heads": 1, "tie_word_embeddings": True},
}


def random_model(name: str, seed: int = 0) -> Any:
    """A model of VARIANTS whose every value is random, norms and biases too: at first none would tell a fault."""
    model = from_config(VARIANTS[name])
    torch.manual_seed(seed)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if "norm" in key or "bias" in key:
                tensor.normal_(1.0 if "norm" in key else 0.0, 0.2)
            else:
                tensor.normal_(0, 1.0 if "embed" in key or "head" in key else 1.5 / tensor.shape[-1] ** 0.5)
    return model.eval()


@cache
def built(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random model whose values float32 and float64 both hold."""
    model = random_model(name)
    if dtype == torch.float64:
        model = model.double()
        if hasattr(model.config, "n_routed_experts"):
            model.set_experts_implementation("eager")
    return model


class Wide(TorchFunctionMode):
    """Where code asks for float32 (norms, rotations, softmax, the gate), it gets float64. Models are built outside."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wider = [torch.float64 if value is torch.float32 else value for value in args]
        named = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return (Tensor.double if func is Tensor.float else func)(*wider, **named)


def ragged(count: int = 6, low: int = 3, high: int = 9) -> list[list[int]]:
    rng = np.random.default_rng(count)
    return [rng.integers(6, VOCABULARY, rng.integers(low, high + 1)).tolist() for _ in range(count)]


@torch.no_grad()
def exact_logits(name: str, ids: Sequence[int]) -> Tensor:
    """Hugging Face's forward pass of one sequence in float64: [L, V]."""
    model = built(name, torch.float64)
    with Wide():
        return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]


def rows_of(found: Rollouts) -> list[list[int]]:
    return [row[:n] for row, n in zip(found.replies.tolist(), found.reply_lengths.tolist(), strict=True)]


def by_generate(model: nn.Module, prompts: list[list[int]], how: Sampling, seed: int, rows: Sequence[int]) -> Any:
    """The replies of the present `generate()`, prompt by prompt."""
    out = []
    for prompt, row in zip(prompts, rows, strict=True):
        ids = generate(
            model,
            torch.tensor([prompt]),
            how.max_new,
            stop=how.stop,
            temperature=how.temperature,
            top_p=how.top_p,
            seed=seed,
            rows=[row],
            think=how.think,
        )
        out.append(ids[0].tolist())
    return out


# ---- the forward pass


@pytest.mark.parametrize("name", VARIANTS)
def test_the_forward_pass_is_hugging_faces(name: str) -> None:
    """In float64, within float32's own error on this model times the ratio of the two roundings, 2^-29."""
    prompts, more = ragged(), 5
    width = max(map(len, prompts))
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    tail = torch.from_numpy(np.random.default_rng(1).integers(6, VOCABULARY, (len(prompts), more)))
    whole = [prompt + row for prompt, row in zip(prompts, tail.tolist(), strict=True)]
    expected = [exact_logits(name, ids) for ids in whole]
    with torch.no_grad():
        narrow = [built(name)(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids in whole]
    floor = max(float((a - b).abs().max()) for a, b in zip(narrow, expected, strict=True))
    assert 0 < floor < 1e-3
    for dtype, bound in ((torch.float64, 16 * floor * 2.0**-29), (torch.float32, 4 * floor)):
        decoder = bare.decoder(built(name, dtype))
        assert decoder is not None
        with Wide() if dtype == torch.float64 else no_mode():
            decoder.start(len(prompts), width + more)
            padded = torch.tensor([prompt + [7] * (width - len(prompt)) for prompt in prompts])
            rows, steps = torch.arange(len(prompts)), [decoder.step(padded, lengths)]
            for position in range(more):
                if position == 2:
                    rows = torch.tensor([0, 2, 5])
                    decoder.select(rows)
                steps.append(decoder.step(tail[rows, position, None]))
        for position, logits in enumerate(steps):
            for row, found in zip([0, 2, 5] if position > 2 else range(6), logits, strict=True):
                gap = (found - expected[row][len(prompts[row]) - 1 + position]).abs().max()
                assert gap <= bound, (dtype, row, position)


@contextmanager
def no_mode() -> Iterator[None]:
    yield


@pytest.mark.parametrize("name", FAMILIES)
def test_steps_of_any_size_are_one_forward_pass(name: str) -> None:
    """A prompt read in pieces, rows of unequal length among them, gives what it gives in one."""
    ids = torch.tensor([prompt[:6] for prompt in ragged(4, 6, 6)])
    decoder = bare.decoder(built(name, torch.float64))
    assert decoder is not None
    with Wide():
        decoder.start(4, 9)
        decoder.step(ids[:, :2], torch.tensor([1, 2, 2, 1]))
        decoder.step(ids[:, 2:5], torch.tensor([3, 3, 1, 2]))
        last = decoder.step(ids[:, 5:])
    said = [[0, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [0, 1, 2, 5], [0, 2, 3, 5]]
    for row, columns in enumerate(said):
        assert torch.allclose(last[row], exact_logits(name, ids[row, columns].tolist())[-1], rtol=0, atol=1e-12)


# ---- the same ids as generate()


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_ids_are_generates(name: str) -> None:
    """Exactly in float64; in float32 except where the best two ids are nearer than its error."""
    prompts, how = ragged(8), Sampling(12, (END,), 0.0)
    for dtype in (torch.float64, torch.float32):
        model = built(name, dtype)
        with Wide() if dtype == torch.float64 else no_mode():
            expected = by_generate(model, prompts, how, 0, range(8))
            engine = InProcess(model)
            together = rows_of(engine.generate(prompts, how, 0))
            alone = [rows_of(engine.generate([prompt], how, 0))[0] for prompt in prompts]
        for found in (together, alone):
            for prompt, ours, theirs in zip(prompts, found, expected, strict=True):
                assert ours == theirs or (dtype == torch.float32 and a_tie(name, prompt, ours, theirs))
    assert len({i for row in expected for i in row}) > 12  # it does not just repeat itself


def a_tie(name: str, prompt: list[int], ours: list[int], theirs: list[int]) -> bool:
    at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    logits = exact_logits(name, prompt + ours[:at])[-1]
    return abs(float(logits[ours[at]] - logits[theirs[at]])) < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 0.8), (0.7, 0.4)])
def test_truncated_choices_are_generates(name: str, temperature: float, top_p: float) -> None:
    prompts, rows, how = ragged(6), [3, 0, 1000, 12, 5, 2**40], Sampling(10, (END, 9, 10), temperature, top_p)
    model = built(name, torch.float64)
    with Wide():
        assert rows_of(InProcess(model).generate(prompts, how, 77, rows)) == by_generate(model, prompts, how, 77, rows)


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_keep_their_choices_in_any_batch(name: str) -> None:
    """Against a second implementation: no cache, no batch, one draw at a time looked up in the order of ids."""
    prompts, rows, how = ragged(6), [3, 0, 1000, 12, 5, 7], Sampling(8, (END,), 1.3)
    engine = InProcess(built(name, torch.float64))
    with Wide():
        whole = engine.generate(prompts, how, 5, rows)
        for part in ([0], [4, 1], [2, 0, 1], [5, 4, 3]):
            some = engine.generate([prompts[i] for i in part], how, 5, [rows[i] for i in part])
            assert rows_of(some) == [rows_of(whole)[i] for i in part]
    for prompt, row, reply, logprobs in zip(prompts, rows, rows_of(whole), whole.logprobs, strict=True):
        for position, chosen in enumerate(reply):
            weights = torch.softmax(exact_logits(name, prompt + reply[:position])[-1] / 1.3, -1).tolist()
            target = float(uniform(5, [row], position)[0]) * sum(weights)
            assert chosen == next(i for i in range(VOCABULARY) if sum(weights[: i + 1]) > target)
            assert float(logprobs[position]) == pytest.approx(np.log(weights[chosen] / sum(weights)), rel=1e-6)
    other = InProcess(built(name)).generate(prompts, how, 6, rows)
    assert rows_of(other) != rows_of(whole)


@pytest.mark.parametrize("budget", [0, 1, 4, 30])
@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_budgets_and_stops_are_generates(budget: int, top_p: float) -> None:
    """Many ids stop a row, so that rows end all the time and leave the batch."""
    prompts, stops = ragged(24), (END, *range(8, 13))
    how = Sampling(12, stops, 0.0 if top_p == 1.0 else 1.0, top_p, ThinkBudget(ETHINK, budget))
    model = built("mla", torch.float64)
    sizes: list[int] = []
    with Wide(), watching(sizes):
        found = InProcess(model).generate(prompts, how, 3)
        expected = by_generate(model, prompts, how, 3, range(24))
    assert rows_of(found) == expected
    assert found.finish.tolist() == [STOP if row[-1] in stops else LENGTH for row in expected]
    assert len(set(sizes)) > 2  # the batch shrank more than once
    assert not bool(found.replies[~inside(found)].any())
    assert not bool(found.logprobs[~found.drawn()].any())
    for row, reply in enumerate(expected):
        closed = reply.index(ETHINK) if ETHINK in reply else None
        forced = [budget] if closed == budget else []
        assert found.forced[row].nonzero()[:, 0].tolist() == forced
        if forced and top_p < 1:
            sets = found.kept_sets(VOCABULARY)
            assert sets is not None
            assert sets[row, budget].nonzero()[:, 0].tolist() == [ETHINK]


def inside(found: Rollouts) -> Tensor:
    return torch.arange(found.replies.shape[1]) < found.reply_lengths[:, None]


@contextmanager
def watching(sizes: list[int]) -> Iterator[None]:
    """Notes how many ids each step of a decoder reads."""
    step = bare.Bare.step

    def noting(self: Any, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        sizes.append(ids.numel())
        return step(self, ids, lengths)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bare.Bare, "step", noting)
        yield


# ---- what is recorded


@pytest.mark.parametrize("name", FAMILIES)
def test_logprobs_are_within_the_learners_own_error(name: str) -> None:
    """The floor is measured: Hugging Face's float32 log-probs of the same ids against float64.

    Both sides sum the same products in other orders, so their errors have one distribution. Over four seeds and the
    three families the ratio of the means was 0.93 to 1.03, that of the maxima 0.6 to 1.6: a mean says more than a
    maximum, and gets the narrower bound.
    """
    prompts, how = ragged(64), Sampling(16, (END,), 1.5)
    found = InProcess(built(name)).generate(prompts, how, 1)
    ours, theirs = [], []
    for row, (prompt, reply) in enumerate(zip(prompts, rows_of(found), strict=True)):
        ids = prompt + reply
        with torch.no_grad():
            narrow = built(name)(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
        both = [(logits[len(prompt) - 1 : -1] / 1.5).log_softmax(-1) for logits in (exact_logits(name, ids), narrow)]
        exact, learner = (x.gather(-1, torch.tensor(reply)[:, None])[:, 0] for x in both)
        ours.append((found.logprobs[row, : len(reply)] - exact).abs())
        theirs.append((learner - exact).abs())
    a, b = torch.cat(ours), torch.cat(theirs)
    assert len(a) > 400
    assert float(b.mean()) > 0
    assert float(a.mean()) <= 1.25 * float(b.mean())
    assert float(a.max()) <= 4 * float(b.max())


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_errs_as_the_learner_does(name: str) -> None:
    """Against float32 of the same values; by the median, as an expert that a tie exchanges moves a token far."""
    narrow = copy.deepcopy(built(name)).bfloat16()
    for key, buffer in narrow.named_buffers():
        if key.endswith("e_score_correction_bias"):
            buffer.data = buffer.data.float()
    ids = [prompt + prompt for prompt in ragged(24)]
    exact, ours = InProcess(copy.deepcopy(narrow).float()).score(ids).logprobs, InProcess(narrow).score(ids).logprobs
    gaps = []
    for row, sequence in enumerate(ids):
        with torch.no_grad():
            said = narrow(input_ids=torch.tensor([sequence]), use_cache=False).logits[0, :-1].double().log_softmax(-1)
        learner = said.gather(-1, torch.tensor(sequence[1:])[:, None])[:, 0].float()
        expected = exact[row, : len(learner)]
        gaps.append(torch.stack([(ours[row, : len(learner)] - expected).abs(), (learner - expected).abs()]))
    a, b = torch.cat(gaps, 1).median(-1)[0].tolist()
    assert 0 < a <= 1.5 * b


def test_kept_sets_give_the_logprobs_back() -> None:
    prompts, how = ragged(8), Sampling(8, (END,), 1.2, 0.75)
    engine = InProcess(built("mla", torch.float64))
    with Wide():
        found = engine.generate(prompts, how, 2)
    sets = found.kept_sets(VOCABULARY)
    assert sets is not None
    assert sets.shape == (8, found.replies.shape[1], VOCABULARY)
    sizes = set()
    for row, (prompt, reply) in enumerate(zip(prompts, rows_of(found), strict=True)):
        scaled = exact_logits("mla", prompt + reply)[len(prompt) - 1 : -1] / 1.2
        kept = sets[row, : len(reply)]
        mass = scaled.masked_fill(~kept, -torch.inf).logsumexp(-1)
        expected = scaled.gather(-1, torch.tensor(reply)[:, None])[:, 0] - mass
        assert torch.allclose(found.logprobs[row, : len(reply)].double(), expected, atol=1e-6)
        p = scaled.softmax(-1)
        held, least = (p * kept).sum(-1), p.masked_fill(~kept, 2).amin(-1)
        assert bool(((held >= 0.75) & (held - least < 0.75)).all())  # enough, and not one more
        assert bool((p.masked_fill(kept, 0).amax(-1) <= least).all())
        sizes |= set(kept.sum(-1).tolist())
        assert not bool(sets[row, len(reply) :].any())
    assert len(sizes) > 3


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("mla")])
def test_routes_are_those_of_the_gate(name: str) -> None:
    """In every layer, at every id that was read: what Hugging Face's gate gives for the sequence, in its order."""
    model, prompts, how = built(name, torch.float64), ragged(10), Sampling(7, (END, *range(8, 12)), 1.0)
    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    seen: list[Tensor] = []
    handles = [gate.register_forward_hook(lambda module, inputs, output: seen.append(output[2])) for gate in gates]
    try:
        with Wide():
            found = InProcess(model).generate([*prompts, prompts[0]], how, 4)
            assert not seen  # a trainer that counts its tokens by hooks does not count these
            scored = InProcess(model).score([row[row != 0].tolist() for row in found.sequences()])
            assert found.routes is not None
            assert scored.routes is not None
            assert found.routes.shape == (11, found.sequences().shape[1] - 1, len(gates), 2)
            read = (found.prompt_lengths + found.reply_lengths - 1).tolist()
            for row, (ids, count) in enumerate(zip(found.sequences(), read, strict=True)):
                seen.clear()
                with torch.no_grad():
                    model(input_ids=ids[None, :count], use_cache=False)
                expected = torch.stack(seen, 1).short()
                assert torch.equal(found.routes[row, :count], expected)
                assert torch.equal(scored.routes[row, :count], expected)
                assert not bool(found.routes[row, count:].any())
                assert not bool(scored.routes[row, count:].any())
    finally:
        for handle in handles:
            handle.remove()
    assert len(found.routes.unique()) > 3
    assert InProcess(built("llama")).generate(prompts, how, 4).routes is None


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_the_rollouts_logprobs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, how = ragged(9), Sampling(8, (END,), 1.5)
    engine = InProcess(built(name, torch.float64))
    with Wide():
        found = engine.generate(prompts, how, 1)
        ids = [prompt + reply for prompt, reply in zip(prompts, rows_of(found), strict=True)]
        scored = [engine.score(ids, 1.5).logprobs]
        monkeypatch.setattr(rollout, "_SCORED_AT_ONCE", 4 * VOCABULARY * max(map(len, ids)))
        scored.append(engine.score(ids, 1.5).logprobs)
    for logprobs in scored:
        for row, prompt in enumerate(prompts):
            reply = int(found.reply_lengths[row])
            part = logprobs[row, len(prompt) - 1 : len(prompt) - 1 + reply]
            assert torch.allclose(part.float(), found.logprobs[row, :reply], atol=1e-6)
            assert not bool(logprobs[row, len(prompt) - 1 + reply :].any())
    assert (engine.score(ids).logprobs - scored[0]).abs().max() > 0.1  # the temperature matters


def test_a_shard_is_a_pure_function() -> None:
    """The same bits again, whatever was generated in between, and whoever asks."""
    prompts, how = ragged(12), Sampling(10, (END, *range(8, 12)), 1.0, 0.9)
    engine = InProcess(built("mla"))
    first = engine.generate(prompts, how, 9, range(100, 112))
    engine.generate(ragged(5), how, 1)
    for again in (engine, InProcess(built("mla"))):
        second = again.generate(prompts, how, 9, range(100, 112))
        for key, value in vars(first).items():
            assert torch.equal(value, getattr(second, key)), key


def test_equal_prompts_are_read_once() -> None:
    prompts, how = ragged(3), Sampling(6, (END,), 1.0)
    group = [prompt for prompt in prompts for _ in range(4)]
    engine, sizes = InProcess(built("mla", torch.float64)), list[int]()
    with Wide():
        with watching(sizes):
            found = engine.generate(group, how, 2)
        alone = [engine.generate([prompt], how, 2, [row]) for row, prompt in enumerate(group)]
    assert sizes[0] == 3 * max(map(len, prompts))
    assert rows_of(found) == [rows_of(one)[0] for one in alone]
    assert found.routes is not None
    for row, one in enumerate(alone):
        assert one.routes is not None
        assert torch.equal(found.routes[row, : one.routes.shape[1]], one.routes[0])


def test_the_models_own_parameters_are_read() -> None:
    """A changed weight is in the next rollouts; what is held of kv_b_proj lies inside of it."""
    model = from_config(CONFIG)
    model.load_state_dict(built("mla").state_dict())
    engine, how = InProcess(model.train()), Sampling(8, (END,), 0.0)
    before = engine.generate(ragged(), how, 0)
    assert model.training
    decoder = bare.decoder(model)
    assert decoder is not None
    decoder.start(2, 4)
    for attention in decoder._attentions:
        weight = attention.module.kv_b_proj.weight
        for part in (attention.up_key, attention.up_value):  # type: ignore[union-attr]
            assert part.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    weight = model.get_parameter("model.layers.1.self_attn.kv_b_proj.weight")
    with torch.no_grad():
        weight.mul_(-1)
    assert rows_of(engine.generate(ragged(), how, 0)) != rows_of(before)


def test_rollouts_may_enter_a_loss() -> None:
    found = InProcess(built("mla")).generate(ragged(), Sampling(4, (END,), 1.0, 0.9), 0)
    leaf = torch.zeros_like(found.logprobs, requires_grad=True)
    ((leaf - found.logprobs).exp() * found.drawn()).sum().backward()
    assert leaf.grad is not None
    assert all(not value.is_inference() for value in vars(found).values())


# ---- other models


def test_other_families_go_through_hugging_faces_cache() -> None:
    config = DENSE | {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    }
    model = from_config(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    model.double().set_experts_implementation("eager")  # type: ignore[operator]
    assert bare.decoder(model) is None
    prompts, how = ragged(12), Sampling(8, (END, *range(8, 12)), 1.0, 0.9)
    with Wide():
        found = InProcess(model).generate(prompts, how, 1)
        assert rows_of(found) == by_generate(model, prompts, how, 1, range(12))
        ids = [prompt + reply for prompt, reply in zip(prompts, rows_of(found), strict=True)]
        scores = InProcess(model).score(ids)
    assert found.routes is None
    assert scores.routes is None
    assert torch.isfinite(scores.logprobs).all()


def test_variants_that_are_not_computed_are_left_to_hugging_face() -> None:
    sliding = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
    dynamic = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    for config in (FAMILIES["qwen3"] | sliding, FAMILIES["llama"] | dynamic):
        assert bare.decoder(from_config(config)) is None
    odd = from_config(CONFIG)
    attention: Any = odd.get_submodule("model.layers.0.self_attn")
    attention.kv_b_proj = nn.Sequential(attention.kv_b_proj)
    assert bare.decoder(odd) is None
    wrapped: Any = nn.Module()
    wrapped.model, wrapped.config = built("llama"), built("llama").config
    assert bare.decoder(wrapped) is None
    assert bare.decoder(nn.Linear(2, 2)) is None


# ---- one choice


@given(st.lists(st.floats(-6, 6), min_size=2, max_size=9), st.floats(0.2, 3), st.floats(0.05, 1))
def test_sample_draws_each_id_by_its_share(values: list[float], temperature: float, top_p: float) -> None:
    draws = (np.arange(2000) + 0.5) / 2000
    logits = torch.tensor([values]).expand(2000, -1)
    found = sample(logits, temperature, top_p, draws)
    if top_p < 1:
        assert torch.equal(found.ids, choose(logits, temperature, top_p, draws))
    shares = torch.zeros(len(values), dtype=torch.float64).scatter_(0, found.ids, found.logprobs.exp())
    drawn = torch.bincount(found.ids, minlength=len(values)) / 2000
    assert float((shares - drawn).abs().max()) <= 1 / 2000 + 1e-9
    if found.kept is None:
        assert top_p == 1
    else:
        p = torch.softmax(logits[0].double() / temperature, -1)
        assert torch.allclose(
            p.masked_fill(~found.kept[0], 0)[found.ids] / p[found.kept[0]].sum(), found.logprobs.exp()
        )


@pytest.mark.parametrize("temperature", [5e-324, 1e-9])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_the_coldest_temperatures_are_greedy(temperature: float, top_p: float) -> None:
    logits = torch.tensor([[-3.0, 2.0, 1.9], [500.0, -torch.inf, 0.0]])
    for draw in (0.0, 0.5, 1 - 2**-53):
        found = sample(logits, temperature, top_p, np.array([draw, draw]))
        assert found.ids.tolist() == [1, 0]
        assert found.logprobs.tolist() == [0, 0]
    greedy = sample(logits, 0.0, top_p, None)
    assert greedy.ids.tolist() == [1, 0]
    assert torch.allclose(greedy.logprobs, logits.double().log_softmax(-1).amax(-1))


def test_ids_without_a_share_are_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]]).expand(3, -1)
    for top_p in (1.0, 0.999):
        found = sample(logits, 1.0, top_p, np.array([0.0, 0.1, 1 - 2**-53]))
        assert found.ids.tolist() == ([1, 1, 3] if top_p == 1.0 else [3, 3, 1])
        assert torch.isfinite(found.logprobs).all()


# ---- bad input


@pytest.mark.parametrize(
    ("prompts", "rows", "said"),
    [
        ([], None, "no prompt"),
        ([[7], []], None, "row 1 is empty"),
        ([[7], [7, VOCABULARY]], None, f"row 1 has the id {VOCABULARY}"),
        ([[-1, 7]], None, "row 0 has the id -1"),
        ([[7] * 509], None, "context holds 512"),
        ([[7], [8]], [1], "2 prompts and 1 different"),
        ([[7], [8]], [4, 4], "2 prompts and 1 different"),
        ([[7], [8]], [1, 2, 3], "2 prompts and 3 different"),
    ],
)
def test_prompts_that_cannot_be_are_refused(prompts: list[list[int]], rows: list[int] | None, said: str) -> None:
    with pytest.raises(DataError, match=said):
        InProcess(built("mla")).generate(prompts, Sampling(4, (END,)), 0, rows)


@pytest.mark.parametrize(
    "change",
    [
        {"max_new": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": float("nan")},
        {"think": ThinkBudget(ETHINK, -1)},
    ],
)
def test_sampling_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        Sampling(**{"max_new": 4, "stop": (END,)} | change)


def test_other_bad_input_is_refused() -> None:
    engine = InProcess(built("mla"))
    with pytest.raises(DataError, match="ends thinking"):
        engine.generate([[7]], Sampling(4, (END,), think=ThinkBudget(VOCABULARY, 1)), 0)
    for temperature in (0.0, float("nan")):
        with pytest.raises(DataError, match="temperature"):
            engine.score([[7, 8]], temperature)
    with pytest.raises(DataError, match="empty"):
        engine.score([[7, 8], []])


@pytest.mark.parametrize("top_p", [1.0, 0.5])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_are_refused(temperature: float, top_p: float) -> None:
    for bad in (torch.nan, torch.inf):
        with pytest.raises(FormatError, match="row 1 of 2"):
            sample(torch.tensor([[0.0, 1.0], [0.0, bad]]), temperature, top_p, np.array([0.5, 0.5]))
    model = from_config(CONFIG)
    model.load_state_dict(built("mla").state_dict())
    with torch.no_grad():
        model.get_parameter("model.layers.1.self_attn.o_proj.weight")[0, 0] = torch.nan
    with pytest.raises(FormatError):
        InProcess(model.train()).generate([[7, 8]], Sampling(4, (END,), temperature, top_p), 0)
    assert model.training
