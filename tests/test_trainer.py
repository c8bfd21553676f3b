"""Exactness by construction: the same bits for any number of workers, any restart, any grouping."""

from __future__ import annotations

import itertools
import json
import math
import platform
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ottava.errors import CheckpointError, DataError
from ottava.fp8.codec import dequantise, project, quantise
from ottava.models.chat import Chat
from ottava.models.published import published
from ottava.platforms.cpu import OTHER_KERNELS
from ottava.recipe import Pool
from ottava.supervisor.drift import measure
from ottava.trainer import data, drift, optimiser, reduce, schedule, snapshot
from ottava.trainer.loop import Trainer
from ottava.trainer.spec import TrainSpec
from ottava.trainer.start import make_trainer
from ottava.trainer.supervised import Drift, Optimiser
from ottava.trainer.worker import numerics_class

from .conftest import PLATFORM

pytestmark = pytest.mark.device


def spec(**more: Any) -> TrainSpec:
    return TrainSpec.model_validate(
        {"steps": 12, "batch": 4, "virtual_shards": 2, "direct": {"begin": 0.25, "batch": 3}, **more}
    )


def base(dataset: Path, its: TrainSpec, seed: int = 3) -> dict[str, Any]:
    return {
        "spec": its.model_dump(mode="json"), "seed": seed, "data": str(dataset), "chat": str(dataset / "chat"),
        "platform": PLATFORM,
    }  # fmt: skip


def train(trainer: Trainer, steps: int) -> str:
    for _ in range(steps):
        trainer.step(lambda total: total, range(trainer.spec.virtual_shards))
    return trainer.state.digest()


# ---------------------------------------------------------------- schedule


@given(st.integers(1, 2000), st.floats(0, 1), st.integers(1, 50), st.floats(0, 1))
def test_rate_is_bounded_and_ends_low(steps: int, decay: float, warmup: int, floor: float) -> None:
    its = spec(steps=steps + 100, optimiser={"decay_from": decay, "warmup": warmup, "floor": floor})
    rates = [schedule.rate(its, step) for step in range(its.steps)]
    assert all(0 < rate <= 1 or floor == 0 for rate in rates)
    if decay < 1:
        tail = rates[max(warmup, math.ceil(decay * its.steps)) :]
        assert all(a >= b for a, b in itertools.pairwise(tail))


def test_curriculum_opens_length_by_length() -> None:
    its = spec(steps=600, curriculum={"start": 3, "open_at": 0.5})
    lengths = [schedule.thinking_length(its, 0, step, [2, 3, 4, 5, 6]) for step in range(600)]
    for first, top in ((0, 3), (75, 4), (150, 5), (225, 6)):
        assert max(lengths[first : first + 75]) == top
    assert set(lengths[300:]) == {2, 3, 4, 5, 6}


def test_direct_share_of_one_step_problems() -> None:
    its = spec(direct={"one_step": 0.75})
    drawn = [schedule.direct_length(its, 1, step, [1, 2, 3]) for step in range(2000)]
    assert abs(drawn.count(1) / 2000 - 0.75) < 0.04
    assert set(drawn) == {1, 2, 3}


# ---------------------------------------------------------------- data


def test_batches_are_pure_and_counts_are_global(dataset: Path) -> None:
    its, chat = spec(virtual_shards=4), Chat.load(dataset / "chat")
    loaded = data.load(dataset, chat)
    for step in (0, 5, 11):
        shards = [data.batch(loaded, its, 3, step, v) for v in range(4)]
        again = data.batch(data.load(dataset, chat), its, 3, step, 2)
        assert torch.equal(again.thinking.tokens, shards[2].thinking.tokens)
        total = sum(int((shard.thinking.targets != data.IGNORE).sum()) for shard in shards)
        assert {shard.thinking_count for shard in shards} == {total}
        if schedule.direct_joins(its, step):
            total = sum(int((s.direct.targets != data.IGNORE).sum()) for s in shards if s.direct is not None)
            assert {shard.direct_count for shard in shards} == {total}
    assert not torch.equal(shards[0].thinking.tokens, shards[1].thinking.tokens)


def test_every_shard_draws_by_itself(dataset: Path) -> None:
    """What the shards of a step share is only made once: each draws by (seed, stream, step, shard) alone."""
    its = spec(virtual_shards=4)
    loaded = data.load(dataset, Chat.load(dataset / "chat"))
    draws = data.draw(loaded, its, 3, 5)
    assert draws.direct is not None
    for stream, drawn, size in ((schedule.THINKING, draws.thinking, 4), (schedule.DIRECT, draws.direct, 3)):
        for shard in range(4):
            rows = torch.from_numpy(schedule.rng(3, stream, 5, shard).integers(0, len(drawn.pool.tokens), size))
            assert torch.equal(drawn.examples(shard).tokens, drawn.pool.tokens[rows])
            assert torch.equal(drawn.examples(shard).targets, drawn.pool.targets[rows])


def test_targets_are_the_reply(dataset: Path) -> None:
    chat = Chat.load(dataset / "chat")
    loaded = data.load(dataset, chat)
    row = json.loads((dataset / "cold_start.jsonl").read_text().splitlines()[0])
    examples = loaded.thinking[row["steps"]]
    prompt = chat.render([{"role": "user", "content": row["question"]}], thinking=True)
    reply = chat.reply(row["answer"], row["trace"])
    assert examples.tokens[0].tolist()[: len(prompt + reply)] == prompt + reply
    kept = [t for t in examples.targets[0].tolist() if t != data.IGNORE]
    assert kept == reply
    assert examples.targets[0, len(prompt) - 1] == reply[0]


def test_data_messages(dataset: Path, tmp_path: Path) -> None:
    chat = Chat.load(dataset / "chat")
    with pytest.raises(DataError, match="no such dataset file"):
        data.load(tmp_path, chat)
    (tmp_path / "answers.jsonl").write_text("")
    (tmp_path / "cold_start.jsonl").write_text('{"question": "7 a +5 ="}\n')
    with pytest.raises(
        DataError, match=r"needs the keys question, answer, steps, trace\n  where: .*cold_start.jsonl:1"
    ):
        data.load(tmp_path, chat)


# ---------------------------------------------------------------- reduction


@given(st.integers(0, 5), st.integers(1, 40))
def test_tree_sum_is_the_fixed_binary_tree(levels: int, width: int) -> None:
    leaves = torch.from_numpy(np.random.default_rng(levels * 100 + width).standard_normal((2**levels, width)))

    def tree(part: Tensor) -> Tensor:
        half = len(part) // 2
        return part[0] if half == 0 else tree(part[:half]) + tree(part[half:])

    assert torch.equal(reduce.tree_sum(leaf.clone() for leaf in leaves), tree(leaves))


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ownership_is_contiguous_and_complete(world: int) -> None:
    parts = [reduce.owned(8, rank, world) for rank in range(world)]
    assert [v for part in parts for v in part] == list(range(8))


def test_order_matters_at_all() -> None:
    """Otherwise the tree proves nothing."""
    leaves = torch.from_numpy(np.random.default_rng(0).standard_normal((8, 1000)).astype(np.float32))
    straight = leaves[0].clone()
    for leaf in leaves[1:]:
        straight += leaf
    assert not torch.equal(straight, reduce.tree_sum(leaf.clone() for leaf in leaves))


def test_world_size_does_not_change_a_bit(dataset: Path, launcher: Any, tmp_path: Path) -> None:
    """V = 8 on 1, 2, 4 and 8 workers, MoE with router bias, Muon and AdamW, both modes, on the grid at the end."""
    its = spec(steps=6, virtual_shards=8, batch=2, direct={"begin": 0.3, "batch": 2}, grid_from=0.6)
    digests = {}
    for world in (1, 2, 4, 8):
        folder = tmp_path / str(world)
        folder.mkdir()
        args = {
            **base(dataset, its), "pool": "p", "chips": list(range(world)), "start": None, "until": 6, "keep": {},
            "memory": str(folder), "durable": str(folder / "durable"), "faults": {}, "run": "r", "vouched": 0,
        }  # fmt: skip
        results = launcher.call("ottava.trainer.worker:run", args, workers=world, logs=tmp_path / "logs")
        digests[world] = {result["digest"] for result in results}
    assert digests[1] == digests[2] == digests[4] == digests[8]
    assert len(digests[1]) == 1


# ---------------------------------------------------------------- gradients


def test_shards_add_up_to_the_batch(dataset: Path) -> None:
    """The sum over virtual shards is the gradient of the mean loss over all of them."""
    trainer = make_trainer(base(dataset, spec(optimiser={"router_bias": 0.0})))
    trainer.state.step = 5
    trainer.refresh()
    total = reduce.tree_sum(trainer.shard(v) for v in range(2))
    loaded = data.load(dataset, Chat.load(dataset / "chat"))
    batches = [data.batch(loaded, trainer.spec, 3, 5, v) for v in range(2)]

    def mean(parts: list[data.Examples]) -> Tensor:
        tokens, targets = (
            torch.cat([getattr(p, name) for p in parts]).to(trainer.device) for name in ("tokens", "targets")
        )
        logits = trainer.model(input_ids=tokens[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=data.IGNORE)

    thinking = mean([b.thinking for b in batches])
    direct = mean([b.direct for b in batches if b.direct is not None])
    loss = thinking + trainer.spec.direct.weight * direct
    parameters = dict(trainer.model.named_parameters())
    gradients = torch.autograd.grad(loss, [parameters[slot.name] for slot in trainer.state.slots])
    for slot, expected in zip(trainer.state.slots, gradients, strict=True):
        torch.testing.assert_close(slot.view(total), expected, rtol=2e-4, atol=1e-6)
    torch.testing.assert_close(total[-2:], torch.stack([thinking, direct]).detach())


def test_expert_loads_count_every_token(dataset: Path) -> None:
    trainer = make_trainer(base(dataset, spec()))
    trainer.state.step = 5
    trainer.refresh()
    out = trainer.shard(1)
    loaded = data.load(dataset, Chat.load(dataset / "chat"))
    work = data.batch(loaded, trainer.spec, 3, 5, 1)
    assert work.direct is not None
    tokens = sum(e.tokens.shape[0] * e.targets.shape[1] for e in (work.thinking, work.direct))
    loads = out[trainer.forward.numel() : -2]
    assert loads.sum() == 2 * tokens
    assert torch.equal(loads, loads.round())


def test_router_bias_moves_towards_idle_experts() -> None:
    bias = torch.zeros(4)
    optimiser.router_step_(bias, torch.tensor([10.0, 2.0, 4.0, 0.0]), 0.5)
    assert bias.tolist() == [-0.5, 0.5, 0.0, 0.5]


# ---------------------------------------------------------------- optimisers


def test_adam_against_torch(dataset: Path) -> None:
    trainer = make_trainer(base(dataset, spec()))
    state, settings_ = trainer.state, Optimiser()
    muon, adam, embedding = (state.bounds[kind] for kind in ("muon", "adam", "embedding"))
    twins = [torch.nn.Parameter(state.weights[a:b].clone()) for a, b in (adam, embedding)]
    library = torch.optim.AdamW(
        [{"params": [twins[0]], "lr": settings_.adam}, {"params": [twins[1]], "lr": settings_.embedding}],
        betas=(settings_.beta1, settings_.beta2), eps=settings_.eps, weight_decay=0.0, foreach=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        gradient = torch.randn(state.weights.numel(), generator=generator).to(trainer.device)
        for twin, (a, b) in zip(twins, (adam, embedding), strict=True):
            twin.grad = gradient[a:b].clone()
        library.step()
        optimiser.update(state, gradient, settings_, 1.0)
        state.step += 1
    for twin, (a, b) in zip(twins, (adam, embedding), strict=True):
        torch.testing.assert_close(state.weights[a:b], twin.detach(), rtol=1e-5, atol=1e-6)
    assert muon[1] > 0


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (32, 32)])
def test_orthogonalise_against_the_svd(shape: tuple[int, int]) -> None:
    stack = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    u, _, v = torch.linalg.svd(stack, full_matrices=False)
    found = optimiser.orthogonalise(stack)
    assert found.shape == stack.shape
    singular = torch.linalg.svdvals(found)
    assert float(singular.min()) > 0.7
    assert float(singular.max()) < 1.25
    cosine = (found * (u @ v)).sum((-2, -1)) / (found.norm(dim=(-2, -1)) * (u @ v).norm(dim=(-2, -1)))
    assert float(cosine.min()) > 0.98


def test_clip_in_float64() -> None:
    gradient = torch.full((200_000,), 3.0)
    norm = optimiser.clip_(gradient, 1.0)
    assert norm == math.sqrt(9.0 * 200_000)
    assert float(gradient.double().norm()) == pytest.approx(1.0, abs=1e-6)
    small = torch.full((4,), 0.1)
    before = small.clone()
    optimiser.clip_(small, 1.0)
    assert torch.equal(small, before)


# ---------------------------------------------------------------- state and snapshots


def test_restart_at_any_step_ends_in_the_same_bytes(dataset: Path) -> None:
    its = base(dataset, spec())
    whole = train(make_trainer(its), 12)
    for at in (1, 4, 11):
        first = make_trainer(its)
        train(first, at)
        kept = first.state.snapshot()
        kept = snapshot.Snapshot(kept.step, kept.layout, bytes(kept.payload))
        second = make_trainer(its)
        train(second, 2)  # whatever it did before must not matter
        second.state.restore(kept)
        assert second.state.digest() == kept.digest
        assert train(second, 12 - at) == whole
    assert train(make_trainer(base(dataset, spec(), seed=4)), 12) != whole


def test_every_part_of_the_state_matters(dataset: Path) -> None:
    """Each segment, changed at step 6, changes the end: none is dead weight, none is left out of the digest."""
    its = base(dataset, spec())
    whole = train(make_trainer(its), 12)
    for name in ("weights", "momentum", "first", "second", "bias"):
        trainer = make_trainer(its)
        before = train(trainer, 6)
        segment = getattr(trainer.state, name)
        index = int(segment.abs().argmax())
        segment[index] += 0.25
        assert trainer.state.digest() != before, name
        assert train(trainer, 6) != whole, name


def test_a_snapshot_of_another_model_is_refused(dataset: Path) -> None:
    small = make_trainer(base(dataset, spec()))
    large = make_trainer(base(dataset, spec(shape={"hidden": 32})))
    with pytest.raises(CheckpointError, match="other tensors"):
        large.state.restore(small.state.snapshot())


def _snapshot(step: int, size: int = 4096) -> snapshot.Snapshot:
    return snapshot.Snapshot(step, b"L" * 32, bytes([step % 251]) * size)


def test_two_slots_and_torn_writes(tmp_path: Path) -> None:
    path = tmp_path / "r.snap"
    writer = snapshot.Writer(path, 4096)
    assert snapshot.states(path) == []
    for step in (1, 2, 3):
        writer.write(_snapshot(step))
    assert snapshot.states(path) == [_snapshot(3), _snapshot(2)]
    assert sorted(snapshot.steps(path)) == [2, 3]
    assert snapshot.load(path, 2) == _snapshot(2)
    whole = path.read_bytes()
    half = len(whole) // 2
    for position in (half + 3, half + 20, half + 200, half + 4000):  # slot of step 3: head, digest, payload
        torn = bytearray(whole)
        torn[position] ^= 1
        path.write_bytes(torn)
        assert snapshot.states(path) == [_snapshot(2)]


def test_saved_states_are_whole_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.state"
    snapshot.save(path, _snapshot(7))
    assert snapshot.load(path) == _snapshot(7)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="torn or was altered"):
        snapshot.load(path)
    with pytest.raises(CheckpointError, match="no such state file"):
        snapshot.load(tmp_path / "none")


def write_for_ever(args: dict[str, Any]) -> dict[str, Any]:
    """Started by name: writes snapshots until it is killed."""
    writer = snapshot.Writer(Path(args["path"]), 1 << 20)
    for step in itertools.count(1):
        writer.write(snapshot.Snapshot(step, b"L" * 32, step.to_bytes(8, "little") * (1 << 17)))
    raise AssertionError


def test_killed_writers_leave_a_whole_state(launcher: Any, tmp_path: Path) -> None:
    path = tmp_path / "k.snap"
    rng = np.random.default_rng(0)
    for _ in range(12):
        path.unlink(missing_ok=True)
        process = launcher.spawn(
            "tests.test_trainer:write_for_ever", {"path": str(path)}, pool=None, logs=tmp_path, env={}
        )
        while not snapshot.states(path):
            assert process.alive()
        assert process.wait(float(rng.uniform(0, 0.05))) is None
        process.kill()
        process.wait()
        found = snapshot.states(path)[0]
        assert bytes(found.payload[:8]) == found.step.to_bytes(8, "little")


# ---------------------------------------------------------------- grid, classes, drift


def test_forward_weights_lie_on_the_grid(dataset: Path) -> None:
    trainer = make_trainer(base(dataset, spec(grid_from=0.5)))
    train(trainer, 8)
    trainer.refresh()
    assert schedule.on_grid(trainer.spec, 8)
    for name, item in published(trainer.model).items():
        if item.storage == "fp8":
            assert torch.equal(dequantise(*quantise(item.tensor)), item.tensor), name
        elif item.storage == "bf16":
            assert torch.equal(item.tensor.to(torch.bfloat16).float(), item.tensor), name
    latent = trainer.state.weights
    assert not torch.equal(latent, trainer.forward)


def test_gradient_on_the_grid_is_straight_through(dataset: Path) -> None:
    """The gradient taken at the grid weights is applied to the latent ones, unchanged."""
    trainer = make_trainer(base(dataset, spec(grid_from=0.0)))
    trainer.refresh()
    at_grid = trainer.shard(0)
    twin = make_trainer(base(dataset, spec(grid_from=1.0)))
    twin.state.weights.copy_(trainer.forward)
    twin.refresh()
    assert torch.equal(twin.shard(0), at_grid)
    name = "model.layers.0.mlp.gate_proj.weight"
    slot = next(s for s in trainer.state.slots if s.name == name)
    assert torch.equal(project(slot.view(trainer.state.weights)), slot.view(trainer.forward))


def class_of(args: dict[str, Any]) -> dict[str, Any]:
    """Started by name in another pool."""
    return {"class": numerics_class(make_trainer(args)), "weights": make_trainer(args).state.digest()}


def test_pools_differ_in_class_but_start_from_the_same_bits(dataset: Path, launcher: Any, tmp_path: Path) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("pools of cores differ in the kernels of x86 processors only")
    args, results = base(dataset, spec()), []
    for env in ({}, OTHER_KERNELS, {}):
        pool = Pool(name="p", platform=PLATFORM, env=env)
        results += launcher.call("tests.test_trainer:class_of", args, pool=pool, logs=tmp_path)
    plain, narrow, again = results
    assert plain == again
    assert plain["class"] != narrow["class"]
    assert plain["weights"] == narrow["weights"]


def test_prediction_limit() -> None:
    assert drift.prediction_limit([0.0, 0.0, 0.0]) == drift.envelope([0.0, 0.0, 0.0]) == 0.0
    assert drift.prediction_limit([2.0, 2.0, 2.0]) == pytest.approx(2.0)
    logs = [1.0, 1.2, 0.8]  # mean 1, s 0.2, t(0.99, 2) = 6.9646
    expected = math.exp(1.0 + 6.9646 * 0.2 * math.sqrt(4 / 3))
    assert drift.prediction_limit([math.exp(v) for v in logs]) == pytest.approx(expected, rel=1e-4)
    assert drift.envelope([math.exp(v) for v in logs]) == pytest.approx(2 * expected, rel=1e-4)


@settings(deadline=None, max_examples=5)
@given(st.integers(0, 1000))
def test_prediction_limit_covers_a_new_draw(seed: int) -> None:
    """Of draws from one log-normal law, the limit from five covers a sixth 99 times in 100."""
    rng = np.random.default_rng(seed)
    draws = np.exp(rng.normal(-10, 0.3, (2000, 6)))
    covered = np.mean([row[5] <= drift.prediction_limit(row[:5].tolist()) for row in draws])
    assert 0.975 <= covered <= 1.0


@pytest.mark.parametrize("lost", [None, "momentum", "first", "second", "bias"])
def test_what_the_envelope_lets_through_and_what_not(
    dataset: Path, launcher: Any, tmp_path: Path, lost: str | None
) -> None:
    """A sound move lies inside; a move that lost one part of the state lies far outside."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("both pools are of one instruction set on this machine: no AVX-512")
    its = spec(steps=80, optimiser={"router_bias": 0.05})
    trainer = make_trainer(base(dataset, its))
    train(trainer, 30)
    snapshot.save(tmp_path / "start", trainer.state.snapshot())
    pools = [Pool(name="old", env=OTHER_KERNELS), Pool(name="new")]
    sizes = Drift(window=8, replicas=4)
    sound = measure(launcher, base(dataset, its), pools[0], pools[1], tmp_path / "start", sizes, tmp_path / "drift")
    assert 0 < sound["drift"] <= sound["envelope"]
    if lost is None:
        return
    moved = make_trainer(base(dataset, its))
    moved.state.restore(snapshot.load(tmp_path / "start"))
    whole = make_trainer(base(dataset, its))
    whole.state.restore(snapshot.load(tmp_path / "start"))
    getattr(moved.state, lost).zero_()
    train(moved, 8)
    train(whole, 8)
    assert drift.distance(whole.state.weights, moved.state.weights) > 30 * sound["envelope"]


def test_distance() -> None:
    assert drift.distance(torch.zeros(3), torch.zeros(3)) == 0.0
    assert drift.distance(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0])) == pytest.approx(4 / 3)
