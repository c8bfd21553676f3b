"""Every option of reinforcement: the same bits whoever computes them, and another result than without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ottava.engine.rollout import Rollouts
from ottava.errors import DataError
from ottava.models.build import fresh
from ottava.models.load import load
from ottava.tasks import Problem
from ottava.trainer import groups, records, snapshot
from ottava.trainer.advantages import advantages, overlong
from ottava.trainer.rl_spec import PRESETS, PolicySpec, ReinforceSpec
from ottava.trainer.routing import replay
from ottava.trainer.spec import Shape
from tests.test_grpo import World, base

STEPS, EVERY = 3, 2
SHORT: dict[str, Any] = {"rollout": {"max_new": 10}, "lengths": (2,)}
"""Room for a right reply to a question of two steps, and for none that is longer."""

OPTIONS: dict[str, dict[str, Any]] = {
    "dr_grpo": {"policy": {"loss": "dr_grpo"}},
    "dapo": {"policy": {"loss": "dapo"}},
    "gspo": {"policy": {"loss": "gspo"}},
    "cispo": {"policy": {"loss": "cispo", "cap": 1.001}},
    "batch scaling": {"policy": {"scaling": "batch"}},
    "two-sided": {"policy": {"two_sided": 1.01, "clip_high": 0.005}},
    "clip-higher": {"policy": {"clip_low": 0.003, "clip_high": 0.006}},
    "resampling": {"policy": {"resample": 2}},
    "overlong": {"policy": {"overlong": 0.6}},
    "overlong filter": {"policy": {"filter_overlong": True}, **SHORT},
    "kl": {"policy": {"beta": 0.5, "unbiased": False}},
    "unbiased kl": {"policy": {"beta": 0.5}},
    "off-policy mask": {"policy": {"off_policy_delta": 0.0}},
    "kept sets": {"rollout": {"top_p": 0.7}},
    "kept routes": {"policy": {"keep_routing": True}},
    "correction": {"policy": {"correction": {"mode": "token_truncate", "high": 1.0}}},
    "rejection": {"policy": {"correction": {"mode": "token_mask", "high": 1.0, "counted": False}}},
    "live routers": {"optimiser": {"router_bias": 0.01}},
    "minibatches": {"rollout": {"updates": 1, "minibatches": 2}, "policy": {"loss": "dapo", "beta": 0.1}},
}
WITHOUT: dict[str, dict[str, Any]] = {
    "clip-higher": {"policy": {"clip_low": 0.003, "clip_high": 0.003}},
    "overlong filter": SHORT,
    "unbiased kl": OPTIONS["kl"],
    "kept sets": {"policy": {"keep_mask": False}, "rollout": {"top_p": 0.7}},
    "rejection": {"policy": {"correction": {"mode": "token_mask", "high": 1.0}}},
    "minibatches": {"rollout": {"updates": 1, "minibatches": 2}},
}
"""What an option is compared with, where that is not the default."""


def small(**more: Any) -> ReinforceSpec:
    rollout = {"prompts": 4, "group": 4, "max_new": 24, "updates": EVERY, **more.pop("rollout", {})}
    fixed = {"steps": 4, "virtual_shards": 4, "lengths": (2, 3)}
    return ReinforceSpec.model_validate({**fixed, **more, "rollout": rollout})


@pytest.mark.parametrize("name", OPTIONS)
def test_workers_and_restarts_change_nothing(begun: Path, dataset: Path, tmp_path: Path, name: str) -> None:
    its = small(**OPTIONS[name])
    whole = World(base(begun, dataset, its, tmp_path / "one"), 1).run(STEPS)
    first = World(base(begun, dataset, its, tmp_path / "many"), 2)
    first.run(1)
    kept = first.workers[0].state.snapshot()
    kept = snapshot.Snapshot(kept.step, kept.layout, bytes(kept.payload))
    again = World(base(begun, dataset, its, tmp_path / "many"), 4)
    for worker in again.workers:
        worker.state.restore(kept)
    assert again.run(STEPS) == whole
    one, many = ([path.read_bytes() for *_, path in records.listed(tmp_path / folder)] for folder in ("one", "many"))
    assert one == many
    assert len(one) == 2 * 4


LEARNED: dict[str, torch.Tensor] = {}


def weights(begun: Path, dataset: Path, more: dict[str, Any]) -> torch.Tensor:
    """The state after a generation's two updates; computed once."""
    if str(more) not in LEARNED:
        world = World(base(begun, dataset, small(**more)), 1)
        world.run(EVERY)
        LEARNED[str(more)] = world.workers[0].state.arena.clone()
    return LEARNED[str(more)]


@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_learned_depends_on_it(begun: Path, dataset: Path, name: str) -> None:
    learned = weights(begun, dataset, OPTIONS[name])
    assert learned.isfinite().all()
    assert not torch.equal(learned, weights(begun, dataset, WITHOUT.get(name, {})))


def test_an_algorithm_brings_its_own_numbers() -> None:
    dapo = PolicySpec.model_validate({"loss": "dapo"})
    assert (dapo.clip_low, dapo.clip_high, dapo.resample, dapo.overlong) == (0.2, 0.28, 3, 0.2)
    own = PolicySpec.model_validate({"loss": "dapo", "clip_high": 0.2, "resample": 0})
    assert (own.clip_high, own.resample, own.overlong) == (0.2, 0, 0.2)
    assert PolicySpec.model_validate({"loss": "dr_grpo"}).scaling == "none"
    gspo = PolicySpec.model_validate({"loss": "gspo"})
    assert (gspo.clip_low, gspo.clip_high) == (3e-4, 4e-4)
    assert PolicySpec.model_validate({}) == PolicySpec() == PolicySpec.model_validate({"loss": "grpo"})
    for loss in PRESETS:
        its = PolicySpec.model_validate({"loss": loss, "clip_low": 0.1})
        assert PolicySpec.model_validate(its.model_dump(mode="json")) == its, "what is written down is read as it is"


# ------------------------------------------------------------ dynamic sampling


def fake(verdicts: list[list[float]]) -> tuple[list[range], Any, Any]:
    """A generator of groups of two whose replies are their row's number, of as many ids as the question says."""
    asked: list[range] = []

    def generate(problems: list[Problem], numbers: range) -> Rollouts:
        asked.append(numbers)
        width = max(problem.steps for problem in problems)
        lengths = torch.tensor([problem.steps for problem in problems for _ in range(2)])
        replies = torch.tensor(list(numbers))[:, None] * (torch.arange(width) < lengths[:, None])
        zeros = torch.zeros(len(lengths), width)
        routes = torch.ones(len(lengths), 1 + width - 1, 1, 1, dtype=torch.int16)
        prompt = torch.ones(len(lengths), 1, dtype=torch.int64)
        return Rollouts(
            prompt, prompt[:, 0], replies, lengths, zeros, zeros.bool(), zeros[:, 0].to(torch.uint8), None, routes
        )

    def judge(problem: Problem, ids: list[int]) -> float:
        return verdicts[ids[0] // 2 - 50][ids[0] % 2]

    return asked, generate, judge


def questions() -> Any:
    return (Problem(str(n), n + 1, str(n), "") for n in range(100))


def test_flat_groups_are_replaced_in_rounds() -> None:
    verdicts = [[1, 0], [1, 1], [0, 0], [0, 1], [1, 1], [0, 0], [0, 1], [1, 1]]
    asked, generate, judge = fake(verdicts)
    found = groups.draw(questions(), generate, judge, first=100, wanted=4, group=2, rounds=2)
    assert asked == [range(100, 108), range(108, 112), range(112, 116)], "two were flat, then both that came for them"
    assert [problem.id for problem in found.problems] == ["0", "1", "3", "6"], "one more was found, one stays flat"
    assert found.verdicts.tolist() == [[1, 0], [1, 1], [0, 1], [0, 1]]
    assert (found.rows, found.scored, found.right) == (16, 16, 9)
    assert found.ids == 2 * sum(range(1, 9))
    assert found.rollouts.replies[:, 0].tolist() == [100, 101, 102, 103, 106, 107, 112, 113]
    assert found.rollouts.reply_lengths.tolist() == [1, 1, 2, 2, 4, 4, 7, 7]
    assert found.rollouts.replies.shape == (8, 8), "as wide as the widest"
    assert found.rollouts.routes is not None
    assert found.rollouts.routes.shape == (8, 8, 1, 1)
    _, generate, judge = fake(verdicts)
    plain = groups.draw(questions(), generate, judge, first=100, wanted=4, group=2, rounds=0)
    assert plain.verdicts.tolist() == verdicts[:4]
    assert (plain.rows, plain.ids) == (8, 20)


def test_nothing_more_is_drawn_where_all_groups_teach() -> None:
    asked, generate, judge = fake([[1, 0]] * 4)
    found = groups.draw(questions(), generate, judge, first=100, wanted=4, group=2, rounds=5)
    assert asked == [range(100, 108)]
    assert found.rows == 8


def test_resampling_finds_more_to_learn_from_and_says_what_it_cost(begun: Path, dataset: Path) -> None:
    told = []
    for rounds in (0, 4):
        world = World(base(begun, dataset, small(policy={"resample": rounds})), 1)
        world.step()
        told.append(world.report.told)
    assert told[0]["drawn"] == 4 * 4 * 4 < told[1]["drawn"]
    assert told[0]["mixed"] < told[1]["mixed"]
    assert told[0]["drawn_ids"] < told[1]["drawn_ids"]


# ------------------------------------------------------------ length


def test_rewards_fall_towards_the_longest_reply(begun: Path, dataset: Path, tmp_path: Path) -> None:
    World(base(begun, dataset, small(policy={"overlong": 0.5}), tmp_path), 1).step()
    long = 0
    for *_, path in records.listed(tmp_path):
        record = records.read(path, "r")
        for length, reward in zip(record.rollouts.reply_lengths.tolist(), record.rewards.tolist(), strict=True):
            less = min(0.0, (12 - length) / 12) / 2
            assert reward in (pytest.approx(less), pytest.approx(1 + less))
            long += less < 0
    assert long > 0, "some replies are longer than half of max_new"


def test_length_weighs_as_much_beside_being_right_as_in_dapo(begun: Path, dataset: Path, tmp_path: Path) -> None:
    """There right and wrong are 1 and -1 (arXiv 2503.14476, eq. 7, 13), here 1 and 0: the advantages are the same."""
    World(base(begun, dataset, small(policy={"overlong": 0.5}), tmp_path), 1).step()
    lengths = torch.cat([records.read(path, "r").rollouts.reply_lengths for *_, path in records.listed(tmp_path)])
    rewards = torch.cat([records.read(path, "r").rewards for *_, path in records.listed(tmp_path)])
    less = overlong(lengths, 24, 12)
    right = (rewards - less / 2).round()
    published = advantages((2 * right - 1 + less).view(-1, 4)).values
    assert (right == 1).any()
    assert (right == 0).any()
    assert published.abs().max() > 0.5
    assert torch.allclose(advantages(rewards.view(-1, 4)).values, published, atol=1e-2), (
        "but for what is added to spreads"
    )


def test_replies_that_were_cut_off_can_be_left_out(begun: Path, dataset: Path) -> None:
    told = []
    for left_out in (False, True):
        world = World(base(begun, dataset, small(policy={"filter_overlong": left_out}, **SHORT)), 1)
        world.step()
        counts = {shard: its["tokens"] for shard, its in world.workers[0].objective._now.facts.items()}
        told.append((world.report.told, counts))
    (_, all_ids), (filtered, some) = told
    assert filtered["stopped"] < 1
    assert all(some[shard] <= all_ids[shard] for shard in some)
    assert some != all_ids
    assert filtered["empty"] > 0


# ------------------------------------------------------------ the reference


def test_the_kl_is_to_the_model_that_came_in(begun: Path, dataset: Path, tmp_path: Path) -> None:
    world = World(base(begun, dataset, small(policy={"beta": 0.1}), tmp_path), 1)
    world.step()
    assert world.report.told["kl"] == 0.0, "before the first update they are one model"
    world.step()
    assert world.report.told["kl"] > 0
    world.step()
    early, late = (records.read(records.path_of(tmp_path, 0, number, 0), "r") for number in (0, 1))
    assert early.reference is not None
    assert torch.equal(early.reference, early.old)
    assert late.reference is not None
    assert not torch.equal(late.reference, late.old)


def test_a_heavier_kl_keeps_the_model_nearer(begun: Path, dataset: Path) -> None:
    told = []
    for beta in (0.001, 5.0):
        world = World(base(begun, dataset, small(policy={"beta": beta}, steps=8)), 1)
        world.run(8)
        told.append(world.report.told["kl"])
    assert told[1] < told[0]


def test_the_off_policy_mask_counts_what_it_takes(begun: Path, dataset: Path) -> None:
    told = []
    for delta in (0.0, 100.0):
        world = World(base(begun, dataset, small(policy={"off_policy_delta": delta})), 1)
        world.run(2)
        told.append(world.report.told["off_policy"])
    assert told[0] > 0 == told[1]


def test_the_learner_takes_the_recorded_kept_sets(begun: Path, dataset: Path) -> None:
    """With them both sides give a reply the same probability; without, the learner's is lower by the kept mass."""
    gaps = []
    for keep in (True, False):
        world = World(base(begun, dataset, small(policy={"keep_mask": keep}, rollout={"top_p": 0.7})), 1)
        world.step()
        gaps.append(world.report.told["gap"])
    assert gaps[0] < 1e-5 < 1e-2 < gaps[1]


# ------------------------------------------------------------ routes

QWEN = {
    "model_type": "qwen3_moe", "vocab_size": 44, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "moe_intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_experts": 8,
    "num_experts_per_tok": 2, "norm_topk_prob": True, "max_position_embeddings": 64,
}  # fmt: skip


def mixture(family: str) -> Any:
    model: Any = fresh(Shape(layers=3).config(44) if family == "deepseek_v3" else QWEN, 3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj", "lm_head.weight")):
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))
        if family == "deepseek_v3":
            for layer in model.model.layers[1:]:
                layer.mlp.gate.e_score_correction_bias.copy_(torch.linspace(-0.1, 0.1, 8))
    return model


def chosen(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The model's own routes [N, L, layers, k]."""
    found: list[torch.Tensor] = []
    gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    handles = [gate.register_forward_hook(lambda _m, _i, out: found.append(out[2])) for gate in gates]
    model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return torch.stack([its.view(*ids.shape, -1) for its in found], 2)


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_replaying_the_models_own_routes_changes_no_bit(family: str) -> None:
    model = mixture(family)
    ids = torch.randint(0, 44, (5, 12), generator=torch.Generator().manual_seed(1))
    routes = chosen(model, ids).short()
    inside = torch.ones(ids.shape, dtype=torch.bool)
    inside[2:, 9:] = False
    routes[2:, 9:] = 0  # padding was never routed
    results = []
    for how in (None, inside):
        model.zero_grad()
        if how is None:
            logits = model(input_ids=ids).logits
        else:
            with replay(model, routes, how):
                logits = model(input_ids=ids).logits
        logits.square().mean().backward()
        results.append((logits, [None if p.grad is None else p.grad.clone() for p in model.parameters()]))
    (plain, before), (replayed, after) = results
    assert torch.equal(plain, replayed)
    for a, b in zip(before, after, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    assert not any(gate._forward_hooks for name, gate in model.named_modules() if name.endswith("mlp.gate"))


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_other_routes_are_taken_with_live_scores(family: str) -> None:
    model = mixture(family)
    ids = torch.randint(0, 44, (3, 7), generator=torch.Generator().manual_seed(2))
    routes = (chosen(model, ids) + 1) % 8
    seen = []
    gate = next(module for name, module in model.named_modules() if name.endswith("mlp.gate"))
    handle = gate.register_forward_hook(lambda _m, _i, out: seen.append(out))  # as the counter of expert loads is
    with replay(model, routes, torch.ones(ids.shape, dtype=torch.bool)):
        logits = model(input_ids=ids).logits
    handle.remove()
    router, weights, taken = seen[0]
    assert torch.equal(taken, routes[:, :, 0].flatten(0, 1)), "who counts loads counts what was computed"
    scores = router.sigmoid() if family == "deepseek_v3" else router.softmax(-1)
    picked = torch.stack([scores[row, taken[row]] for row in range(len(taken))])
    assert torch.allclose(weights, picked / picked.sum(-1, keepdim=True))
    assert not torch.equal(logits, model(input_ids=ids).logits)
    logits.mean().backward()
    assert gate.weight.grad.abs().sum() > 0, "the router learns through the recorded choice"


def test_routes_of_another_model_are_refused() -> None:
    model = mixture("deepseek_v3")
    ids = torch.ones(2, 3, dtype=torch.int64)
    routes, inside = chosen(model, ids), torch.ones(2, 3, dtype=torch.bool)
    with (
        pytest.raises(DataError, match="1 layers of experts, and the model has 2"),
        replay(model, routes[:, :, :1], inside),
    ):
        pass
    for wrong, words in ((routes[:, :2], "routes of"), (routes + 8, "none of the 8"), (routes[..., :1], "routes of")):
        with pytest.raises(DataError, match=words), replay(model, wrong, inside):
            model(input_ids=ids)


def test_the_learner_goes_where_the_record_says(begun: Path, dataset: Path, tmp_path: Path) -> None:
    args = base(begun, dataset, small(policy={"keep_routing": True}), tmp_path)
    first = World(args, 1)
    first.run(1)
    kept = first.workers[0].state.snapshot()
    for *_, path in records.listed(tmp_path):
        record = records.read(path, "r")
        assert record.rollouts.routes is not None
        record.rollouts.routes.copy_((record.rollouts.routes + 1) % 8)
        records.write(path, record)
    again = World(args, 1)
    again.workers[0].state.restore(kept)
    again.run(2)
    assert again.report.told["ratio_spread"] > 2 * first_spread(begun, dataset)


def first_spread(begun: Path, dataset: Path) -> float:
    """The spread of ratios in the second update where the records are as they were drawn."""
    world = World(base(begun, dataset, small(policy={"keep_routing": True})), 1)
    world.run(2)
    return float(world.report.told["ratio_spread"])


def test_a_dense_model_has_no_routes_to_keep(begun: Path, dataset: Path) -> None:
    world = World(base(begun, dataset, small(policy={"keep_routing": True})), 1)
    objective = world.workers[0].objective
    dense = fresh({**_dense(), "vocab_size": load(begun).config.vocab_size}, 1)  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="no routes to keep"):
        objective.canonical(dense)


def _dense() -> dict[str, Any]:
    from ottava.trainer.spec import Dense

    return Dense(family="qwen3", hidden=32, width=64).config(44)


@pytest.mark.parametrize(("rate", "moves"), [(0.0, []), (0.01, [2, 4])])
def test_a_routers_bias_moves_only_between_generations(
    begun: Path, dataset: Path, rate: float, moves: list[int]
) -> None:
    world = World(base(begun, dataset, small(optimiser={"router_bias": rate})), 1)
    state, moved = world.workers[0].state, []
    before = state.bias.clone()
    while state.step < 4:
        world.step()
        if not torch.equal(state.bias, before):
            moved.append(state.step)
        before = state.bias.clone()
    assert moved == moves
