"""Reinforcement: the same bytes for every number of workers and after every interruption, and rewards that rise."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ottava.engine import handoff
from ottava.engine.rollout import InProcess, Rollouts
from ottava.errors import CheckpointError, TrainingFailed
from ottava.journal import Journal, read
from ottava.models.load import load
from ottava.recipe import Pool
from ottava.supervisor.loop import Run, supervise
from ottava.trainer import grpo, mismatch, records, reduce, snapshot
from ottava.trainer.advantages import advantages
from ottava.trainer.grpo import Grpo
from ottava.trainer.guard import Alarm
from ottava.trainer.rl_spec import ReinforceSpec
from ottava.trainer.spec import Shape
from ottava.trainer.start import make_trainer
from ottava.trainer.supervised import Fault
from tests.test_mismatch import Server, serving

STEPS = 6


def spec(**more: Any) -> ReinforceSpec:
    rollout = {"prompts": 4, "group": 4, "max_new": 24, "updates": 2, **more.pop("rollout", {})}
    return ReinforceSpec.model_validate(
        {"steps": STEPS, "virtual_shards": 4, "rollout": rollout, "lengths": (2, 3), "hang_s": 60.0, **more}
    )


def base(begun: Path, dataset: Path, its: ReinforceSpec, folder: Path | None = None) -> dict[str, Any]:
    where = {} if folder is None else {"rollouts": str(folder), "run": "r", "seals": []}
    return {
        "spec": its.model_dump(mode="json"), "seed": 5, "data": str(dataset), "chat": str(dataset / "chat"),
        "objective": "grpo", "start_model": str(begun), **where,
    }  # fmt: skip


class World:
    """Workers of one group, one after the other in this process."""

    def __init__(self, args: Mapping[str, Any], count: int):
        self.workers = [make_trainer(args) for _ in range(count)]
        self.shards = [reduce.owned(self.workers[0].spec.virtual_shards, rank, count) for rank in range(count)]

    def run(self, until: int) -> str:
        while self.workers[0].state.step < until:
            self.step()
        digests = {worker.state.digest() for worker in self.workers}
        assert len(digests) == 1
        return digests.pop()

    def step(self) -> None:
        facts: list[Any] = []
        for worker, shards in zip(self.workers, self.shards, strict=True):
            worker.refresh()
            mine = worker.objective.prepare(worker.model, worker.state.step, shards, worker.state.digest)
            facts += [] if mine is None else [json.loads(json.dumps(mine))]
        if facts:
            for worker in self.workers:
                worker.objective.settle(worker.state.step, facts)
        parts = [w.contribution(s) for w, s in zip(self.workers, self.shards, strict=True)]
        total = reduce.tree_sum(parts)
        for worker in self.workers:
            own = total.clone()
            self.report = worker.update(own, worker.clip(own))


def restarted(before: World, args: dict[str, Any], count: int) -> World:
    """New workers, so many, with the state that those before had kept."""
    kept = before.workers[0].state.snapshot()
    again = World(args, count)
    for worker in again.workers:
        worker.state.restore(snapshot.Snapshot(kept.step, kept.layout, bytes(kept.payload)))
    return again


def drawn(folder: Path) -> list[bytes]:
    """What every record of a run holds."""
    return [path.read_bytes() for *_, path in records.listed(folder)]


@pytest.fixture(scope="module")
def whole(begun: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """An undisturbed run by one worker: its final digest and its rollouts."""
    folder = tmp_path_factory.mktemp("whole")
    world = World(base(begun, dataset, spec(), folder), 1)
    digest = world.run(STEPS)
    assert world.report.told["mixed"] > 0
    return digest, folder


@pytest.mark.parametrize("count", [2, 4])
def test_the_number_of_workers_changes_nothing(
    begun: Path, dataset: Path, tmp_path: Path, whole: tuple[str, Path], count: int
) -> None:
    assert World(base(begun, dataset, spec(), tmp_path), count).run(STEPS) == whole[0]
    assert drawn(tmp_path) == drawn(whole[1])
    assert len(drawn(whole[1])) == 3 * 4, "three generations of four shards"


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_restart_changes_nothing(
    begun: Path, dataset: Path, tmp_path: Path, whole: tuple[str, Path], at: int
) -> None:
    """In the middle of a generation its replies are read; at its beginning they are drawn again, to the bit."""
    args = base(begun, dataset, spec(), tmp_path)
    first = World(args, 1)
    first.run(at)
    before = {path: path.stat().st_mtime_ns for *_, path in records.listed(tmp_path)}
    assert restarted(first, args, 2).run(STEPS) == whole[0]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_what_a_minibatch_is_worth_is_found_once(begun: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by each of the four shards, and not again in the second pass over the same replies."""
    counted, found = [], advantages

    def counting(rewards: torch.Tensor, *how: Any) -> Any:
        counted.append(tuple(rewards.shape))
        return found(rewards, *how)

    monkeypatch.setattr(grpo, "advantages", counting)
    world = World(base(begun, dataset, spec(rollout={"minibatches": 2})), 1)
    for _ in range(4):
        world.step()
    assert counted.count((4 * 2, 4)) == 2, "two minibatches of two groups of each shard"
    world.step()
    assert counted.count((4 * 2, 4)) == 3, "other replies"


def test_replies_that_are_gone_send_the_run_back(begun: Path, dataset: Path, tmp_path: Path) -> None:
    args = base(begun, dataset, spec(), tmp_path)
    first = World(args, 1)
    first.run(3)
    lost = records.path_of(tmp_path, 0, 1, 2)
    data = bytearray(lost.read_bytes())
    data[-5] ^= 4
    lost.write_bytes(data)
    again = World(args, 1)
    again.workers[0].state.restore(first.workers[0].state.snapshot())
    with pytest.raises(Alarm) as alarm:
        again.step()
    assert (alarm.value.kind, alarm.value.step) == ("rollout", 2)


def test_replies_of_another_policy_are_not_taken(begun: Path, dataset: Path, tmp_path: Path) -> None:
    args = base(begun, dataset, spec(), tmp_path)
    first = World(args, 1)
    first.run(1)
    again = World({**args, "seed": 5}, 1)
    again.workers[0].state.weights.mul_(1.01)
    again.run(1)
    policies = {records.read(path, "r").policy for *_, path in records.listed(tmp_path)}
    assert policies != {first.workers[0].state.digest()}
    assert len(policies) == 1, "those that were there were of another policy, and were replaced"


def test_a_record_is_what_was_written(whole: tuple[str, Path], tmp_path: Path) -> None:
    path = records.listed(whole[1])[5][-1]
    record = records.read(path, "r")
    records.write(tmp_path / "again", record)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    with pytest.raises(CheckpointError, match="of another run"):
        records.read(path, "s")
    with pytest.raises(CheckpointError):
        records.read(tmp_path / "none", "r")
    whole = path.read_bytes()
    for place in range(0, len(whole), 97):
        (tmp_path / "again").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CheckpointError):
            records.read(tmp_path / "again", "r")
        (tmp_path / "again").write_bytes(whole[:place])
        with pytest.raises(CheckpointError):
            records.read(tmp_path / "again", "r")


def test_first_ratios_are_one_and_the_learner_agrees_with_the_sampler(
    begun: Path, dataset: Path, tmp_path: Path
) -> None:
    world = World(base(begun, dataset, spec(), tmp_path), 1)
    world.step()
    assert world.report.told["ratio"] == 1.0
    assert world.report.told["ratio_spread"] == 0.0
    assert 0 < world.report.told["gap_max"] < 1e-4
    world.step()
    assert world.report.told["ratio_spread"] > 0


def test_a_generation_without_a_lesson_changes_no_weight(begun: Path, dataset: Path, tmp_path: Path) -> None:
    """All replies alike, as greedy ones nearly are: nothing to learn, and the moments stay as they are."""
    its = spec(rollout={"temperature": 1e-6})
    world = World(base(begun, dataset, its, tmp_path), 1)
    before = world.workers[0].state.weights.clone()
    world.step()
    assert world.report.told["mixed"] == 0.0
    assert torch.equal(world.workers[0].state.weights, before)


@pytest.mark.parametrize("kind", ["sigkill", "flip"])
def test_a_supervised_run_survives(begun: Path, dataset: Path, launcher: Any, tmp_path: Path, kind: Any) -> None:
    its = spec(restarts=2, checkpoint_every=2)
    pools = (Pool(name="a", workers=2),)
    args = base(begun, dataset, its)
    ends = []
    for name, faults in (("calm", []), ("hit", [Fault(at_step=3, rank=1, kind=kind, bits=3)])):
        folder = tmp_path / name
        run = Run("main", its, pools, args, folder / "main", Journal(folder / "j"), launcher, folder / "logs")
        final, segments = supervise(run, faults)
        ends.append(final.digest)
    assert segments[0].failures == 1
    assert ends[0] == ends[1]


@pytest.mark.slow
def test_rewards_rise(begun: Path, dataset: Path, tmp_path: Path) -> None:
    its = spec(steps=60, rollout={"prompts": 8, "group": 8})
    world = World(base(begun, dataset, its, tmp_path), 1)
    rewards = []
    while world.workers[0].state.step < 60:
        world.step()
        rewards.append(world.report.told["reward"])
    assert sum(rewards[-10:]) > sum(rewards[:10]) + 0.5


# ---- engine and learner


def test_the_gate_tells_its_floor_and_the_watch_stays_still(begun: Path, dataset: Path, tmp_path: Path) -> None:
    world = World(base(begun, dataset, spec(), tmp_path), 1)
    told = world.workers[0].gate()
    assert told is not None
    assert 0 < told["gap_max"] <= 8 * told["floor_high"] < 1e-3
    world.run(STEPS)
    assert world.report.told["gap_max"] <= 8 * told["floor_high"]
    assert world.report.told["gap_bound"] == 8 * told["floor_high"], "of replies that were drawn above temperature 1"
    assert mismatch.HIGH == 8, "as the report says"


def test_the_gate_can_load_the_model_that_came_in(
    begun: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(mismatch, "gate", lambda *its: (asked.append(its), (mismatch.Floor(0.0, 0.0, 0.0), {}))[1])
    args = base(begun, dataset, spec(), tmp_path)
    World(args, 1).workers[0].gate()
    came = asked[0][3]()
    expected = load(Path(args["start_model"])).state_dict()
    assert all(torch.equal(its, expected[name]) for name, its in came.state_dict().items())


def test_a_gate_changes_no_bit(begun: Path, dataset: Path, tmp_path: Path, whole: tuple[str, Path]) -> None:
    world = World(base(begun, dataset, spec(), tmp_path), 2)
    for worker in world.workers:
        worker.gate()
    assert world.run(STEPS) == whole[0]


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("later", [0, 2])
def test_an_engine_that_says_otherwise_is_stopped_before_anybody_learns(
    begun: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: int, flat: bool
) -> None:
    """In the first generation or a later one; also where all rewards are alike, as a broken engine's may be."""
    world = World(base(begun, dataset, spec(), tmp_path), 2)
    for worker in world.workers:
        worker.gate()
    for _ in range(later):
        world.step()
    draw = InProcess.generate

    def raw(self: InProcess, *args: Any) -> Rollouts:
        """Log-probabilities from before the temperature."""
        out = draw(self, *args)
        return replace(out, logprobs=out.logprobs * 1.01)

    monkeypatch.setattr(InProcess, "generate", raw)
    if flat:
        monkeypatch.setattr(Grpo, "_reward", lambda *_: 0.0)
    before = [worker.state.digest() for worker in world.workers]
    with pytest.raises(Alarm, match=f"generation {later // 2}") as alarm:
        world.step()
    assert alarm.value.kind == "mismatch"
    assert [worker.state.digest() for worker in world.workers] == before


def test_an_engine_of_its_own_draws_and_a_restart_reads(begun: Path, dataset: Path, tmp_path: Path) -> None:
    """The same bytes for two workers and for four, since only the records count."""
    digests = []
    server = Server(begun)
    with serving(server) as url:
        engine = {"url": url, "folder": str(tmp_path / "handed"), "dtype": "float32"}
        its = spec(rollout={"engine": engine}, grid_from=0.0, steps=4)
        for count in (2, 4):
            args = base(begun, dataset, its, tmp_path / "rollouts")
            world = World(args, count)
            if count == 2:
                for worker in world.workers:
                    worker.gate()
            digests.append(world.run(4))
            drew = len(server.seeds)
            assert world.report.told["gap_max"] < 1e-3
    assert digests[0] == digests[1]
    assert drew == len(server.seeds)
    assert len(server.loaded) == 2, "one hand-over for each generation, however many workers"


def test_a_run_with_a_wrong_engine_stops_and_names_the_tensor(
    begun: Path, dataset: Path, tmp_path: Path, launcher: Any
) -> None:
    """Supervised, with an engine that goes on with the weights it was started with."""
    other = load(begun)
    with torch.no_grad():
        other.get_parameter("model.layers.1.self_attn.o_proj.weight").mul_(2)
    handoff.write(tmp_path / "other", other)
    with serving(Server(tmp_path / "other", deaf=True)) as url:
        its = spec(restarts=2, rollout={"engine": {"url": url, "folder": str(tmp_path / "h"), "dtype": "float32"}})
        journal = Journal(tmp_path / "j")
        pools = (Pool(name="a", workers=2), Pool(name="b", workers=2))
        run = Run("main", its, pools, base(begun, dataset, its), tmp_path / "main", journal, launcher, tmp_path / "l")
        with pytest.raises(TrainingFailed, match=r"layers\.1\.self_attn\.o_proj"):
            supervise(run)
    told = [event["event"] for event in read(tmp_path / "j")]
    assert "train.step" not in told
    assert told.count("train.fault") == 1, "no chip is to blame, so nothing is started again"


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"policy": {"two_sided": 1.1}}, "two_sided"),
        ({"policy": {"loss": "cispo", "two_sided": 9.0}}, "two_sided"),
        (
            {
                "policy": {"keep_routing": True},
                "grid_from": 0,
                "rollout": {"engine": {"url": "http://h", "folder": "f"}},
            },
            "routes",
        ),
        ({"optimiser": {"adam": 0.0}}, "greater than 0"),
        ({"optimiser": {"embedding": -3.0}}, "greater than 0"),
    ],
)
def test_what_could_not_be_carried_out_is_refused_when_the_recipe_is_read(said: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        ReinforceSpec.model_validate(said)


def test_no_more_experts_are_active_than_there_are() -> None:
    with pytest.raises(ValueError, match="9 active experts of 8"):
        Shape(active_experts=9)
