"""On-policy distillation: the same bits for every number of workers, and a student that comes nearer to its teacher."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ottava.errors import DataError, TrainingFailed
from ottava.journal import Journal, read
from ottava.models.load import load
from ottava.recipe import Pool
from ottava.supervisor.loop import Run, supervise
from ottava.trainer import snapshot
from ottava.trainer.divergences import divergence, furthest
from ottava.trainer.rl_spec import OnPolicySpec
from ottava.trainer.start import make_trainer
from ottava.trainer.supervised import Fault
from ottava.trainer.worker import export

from .test_grpo import World

STEPS = 6


def args(begun: Path, dataset: Path, folder: Path, teacher: Path | None = None, **more: Any) -> dict[str, Any]:
    rollout = {"prompts": 4, "group": 2, "max_new": 24, "updates": 2, "temperature": 1.0}
    spec = {"steps": STEPS, "virtual_shards": 4, "rollout": rollout, "lengths": (2, 3), **more}
    return {
        "spec": OnPolicySpec.model_validate(spec).model_dump(mode="json"), "seed": 5, "data": str(dataset),
        "chat": str(dataset / "chat"), "objective": "on_policy", "start_model": str(begun),
        "teacher": str(teacher or begun), "rollouts": str(folder), "run": "r", "seals": [],
    }  # fmt: skip


@pytest.fixture(scope="module")
def weak(begun: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher with noise on its weights: a student of its architecture that says other things."""

    def noisy(weights: torch.Tensor, _: torch.Tensor) -> None:
        weights.mul_(1 + 0.15 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(1)))

    return changed(begun, dataset, tmp_path_factory.mktemp("weak"), noisy)


@pytest.fixture(scope="module")
def stranger(begun: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher with its words exchanged: a student that is sure of what its teacher would never say."""
    return changed(begun, dataset, tmp_path_factory.mktemp("stranger"), lambda _, head: head.copy_(head.roll(1, 0)))


def changed(begun: Path, dataset: Path, folder: Path, change: Callable[[torch.Tensor, torch.Tensor], object]) -> Path:
    """The folder of a model whose weights were changed. change: of all of them [P], and the head [V, H]."""
    its = args(begun, dataset, folder / "rollouts")
    trainer = make_trainer(its)
    head = next(slot for slot in trainer.state.slots if slot.name == "lm_head.weight")
    with torch.no_grad():
        change(trainer.state.weights, head.view(trainer.state.weights))
    (folder / "model").mkdir()
    for path in begun.iterdir():
        if path.name not in ("model.safetensors", "config.json"):
            (folder / "model" / path.name).write_bytes(path.read_bytes())
    snapshot.save(folder / "state", trainer.state.snapshot())
    export({**its, "state": str(folder / "state"), "model": str(folder / "model"), "latent": None})
    return folder / "model"


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_number_of_workers_changes_nothing(
    begun: Path, weak: Path, dataset: Path, tmp_path: Path, beta: float
) -> None:
    ends = {
        World(args(weak, dataset, tmp_path / str(world), begun, divergence={"beta": beta}), world).run(STEPS)
        for world in (1, 2, 4)
    }
    assert len(ends) == 1


def test_the_loss_is_the_mean_divergence_of_the_replies(begun: Path, weak: Path, dataset: Path, tmp_path: Path) -> None:
    """Computed again from the records alone, one row at a time, by both models."""
    from ottava.trainer import records

    world = World(args(weak, dataset, tmp_path, begun, grid_from=1.0), 1)
    student, teacher = load(weak), load(begun)
    world.step()
    total, count = 0.0, 0
    for *_, path in records.listed(tmp_path):
        rollouts = records.read(path, "r").rollouts
        for row, ids in enumerate(rollouts.ids()):
            start = int(rollouts.prompt_lengths[row])
            whole = rollouts.sequences()[row : row + 1, : start + len(ids)]
            with torch.no_grad():
                said = [m(input_ids=whole).logits[0, start - 1 : -1] for m in (student, teacher)]
            total, count = total + float(divergence(said[0], said[1], 1.0).sum()), count + len(ids)
    assert world.report.told["loss"] == pytest.approx(total / count, rel=1e-4)


def test_a_student_comes_nearer_to_its_teacher(begun: Path, weak: Path, dataset: Path, tmp_path: Path) -> None:
    world = World(args(weak, dataset, tmp_path, begun, steps=24), 1)
    told = []
    while world.workers[0].state.step < 24:
        world.step()
        told.append(world.report.told["loss"])
    assert sum(told[-4:]) < 0.5 * sum(told[:4])


def test_a_student_made_here_can_go_on_with_adapters(begun: Path, weak: Path, dataset: Path, tmp_path: Path) -> None:
    """By then it is a model like any other: it learns, and to the same bits whatever the workers."""
    lora = {"rank": 8, "targets": ["q_proj", "o_proj", "kv_b_proj"]}
    more = {"lora": lora, "grid_from": 1.0, "optimiser": {"adam": 1e-2}, "steps": 12}
    ends, told = set(), []
    for count in (1, 2):
        world = World(args(weak, dataset, tmp_path / str(count), begun, **more), count)
        while world.workers[0].state.step < 12:
            world.step()
            told.append(world.report.told["loss"])
        ends |= {worker.state.digest() for worker in world.workers}
    assert len(ends) == 1
    assert all(again < first for first, again in zip(told[::2], told[1::2], strict=True)), "the same replies, once more"


def test_a_teacher_that_is_the_student_teaches_nothing(begun: Path, dataset: Path, tmp_path: Path) -> None:
    world = World(args(begun, dataset, tmp_path, begun, grid_from=1.0), 1)
    world.step()
    assert abs(world.report.told["loss"]) < 1e-6


@given(st.integers(0, 2**32), st.floats(0.01, 30.0), st.floats(0.2, 3.0))
def test_no_student_is_further_from_its_teacher_than_the_teacher_says(seed: int, scale: float, heat: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(50, 17, generator=draw, dtype=torch.float64) for _ in range(2))
    assert (divergence(student, teacher, 1.0, heat) <= furthest(teacher, heat) + 1e-9).all()
    worst = torch.full_like(teacher, -1e9).scatter(1, teacher.argmin(1, keepdim=True), 0.0)  # sure of the least likely
    torch.testing.assert_close(divergence(worst, teacher, 1.0, heat), furthest(teacher, heat), rtol=1e-9, atol=1e-9)


def judged(
    student: Path, teacher: Path, dataset: Path, folder: Path, launcher: Any, fault: Fault | None = None, **more: Any
) -> list[float]:
    """The losses of a supervised run."""
    its = args(student, dataset, folder / "rollouts", teacher, hang_s=60.0, **{"steps": 12, **more})
    del its["rollouts"], its["run"], its["seals"]
    journal = Journal(folder / "journal.jsonl")
    spec = OnPolicySpec.model_validate(its["spec"])
    run = Run("main", spec, (Pool(name="a", workers=2),), its, folder / "main", journal, launcher, folder / "logs")
    try:
        supervise(run, [] if fault is None else [fault])
    finally:
        found = [event["loss"] for event in read(journal.path) if event["event"] == "train.step"]
    return found


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_a_student_may_begin_as_far_from_its_teacher_as_it_likes(
    begun: Path, stranger: Path, dataset: Path, tmp_path: Path, launcher: Any, beta: float
) -> None:
    """Further than guessing, which bounds the surprise at a text that is given and nothing else."""
    told = judged(stranger, begun, dataset, tmp_path, launcher, divergence={"beta": beta}, spike={"window": 4})
    words = load(begun).get_input_embeddings().num_embeddings  # type: ignore[operator]
    assert told[0] > math.log(words) + 2.0
    assert len(told) == 12


@pytest.mark.parametrize("divergence", [{"beta": 1.0}, {"beta": 0.5}, {"kind": "uld"}])
def test_a_loss_that_no_student_can_have_is_found_in_its_step(
    begun: Path, weak: Path, dataset: Path, tmp_path: Path, launcher: Any, divergence: dict[str, Any]
) -> None:
    fault = Fault(at_step=2, kind="spike", phase="forward", sticky=True)
    with pytest.raises(TrainingFailed, match="no student can have more"):
        judged(weak, begun, dataset, tmp_path, launcher, fault, divergence=divergence, restarts=0)
    told = [event for event in read(tmp_path / "journal.jsonl") if event["event"] == "train.fault"]
    assert told
    assert all("no student can have more" in event["message"] and event["step"] == 2 for event in told)


def test_a_student_that_runs_away_from_its_teacher_is_stopped(
    begun: Path, dataset: Path, tmp_path: Path, launcher: Any
) -> None:
    """It begins as its teacher, and its rate is a thousand times too large."""
    rates = {"adam": 0.5, "embedding": 0.5}
    with pytest.raises(TrainingFailed, match="the median loss of the 16 steps up to step 17"):
        judged(begun, begun, dataset, tmp_path, launcher, optimiser=rates, steps=24)


def test_a_teacher_of_another_vocabulary_is_refused(begun: Path, dataset: Path, tmp_path: Path) -> None:
    import json

    from ottava.checkpoint.safetensors import write
    from ottava.models.build import fresh
    from ottava.models.published import published, stored
    from ottava.trainer.spec import Dense

    small = Dense(family="llama", hidden=32, width=48).config(20)
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_text(json.dumps(small))
    tensors = ((name, stored(item)) for name, item in published(fresh(small, 0)).items())
    write(tmp_path / "small" / "model.safetensors", tensors)
    with pytest.raises(DataError, match="fewer ids"):
        make_trainer(args(begun, dataset, tmp_path, tmp_path / "small"))
