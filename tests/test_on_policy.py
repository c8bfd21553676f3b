"""On-policy distillation: the same bits for every number of workers, and a student that comes nearer to its teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ottava.errors import DataError
from ottava.models.load import load
from ottava.trainer.divergences import divergence
from ottava.trainer.rl_spec import OnPolicySpec
from ottava.trainer.start import make_trainer

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
    from ottava.trainer import snapshot
    from ottava.trainer.worker import export

    folder = tmp_path_factory.mktemp("weak")
    its = args(begun, dataset, folder / "rollouts")
    trainer = make_trainer(its)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        noise = torch.randn(trainer.state.weights.shape, generator=draw)
        trainer.state.weights.mul_(1 + 0.15 * noise)
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


def test_a_teacher_that_is_the_student_teaches_nothing(begun: Path, dataset: Path, tmp_path: Path) -> None:
    world = World(args(begun, dataset, tmp_path, begun, grid_from=1.0), 1)
    world.step()
    assert abs(world.report.told["loss"]) < 1e-6


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
