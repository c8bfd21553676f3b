"""What a run computes in: the same bits for every number of workers, one set of weights on the grid, and a loss that
stays near float32's. And the recipe for a GPU, run small on cores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from ottava import platforms, runner, stages
from ottava.engine.rollout import InProcess
from ottava.fp8.codec import project
from ottava.models import precision
from ottava.models.build import fresh, from_config
from ottava.models.load import load
from ottava.models.published import matrices, published
from ottava.recipe import load_recipe
from ottava.stages.distill import Spec as DistillSpec
from ottava.trainer import mismatch, snapshot
from ottava.trainer.guard import Alarm
from ottava.trainer.probe import VOCABULARY, _stand_in
from ottava.trainer.rl_spec import ReinforceSpec
from ottava.trainer.sft import fresh_trainer
from ottava.trainer.spec import Dense, Shape, TrainSpec
from ottava.trainer.start import make_trainer
from ottava.trainer.worker import export
from tests.test_grpo import World
from tests.test_grpo import base as rl
from tests.test_grpo import spec as rl_spec

ROOT = Path(__file__).parent.parent
NARROW = ("bf16", "fp8")


def args(dataset: Path, **more: Any) -> dict[str, Any]:
    said = {"steps": 12, "batch": 4, "virtual_shards": 2, "direct": {"begin": 0.3, "batch": 2}, **more}
    its = TrainSpec.model_validate(said)
    return {"spec": its.model_dump(mode="json"), "seed": 3, "data": str(dataset), "chat": str(dataset / "chat")}


# ------------------------------------------------------------ what may be asked for


def test_fp8_is_on_the_grid_from_the_first_step() -> None:
    assert TrainSpec(precision="fp8").grid_from == 0.0
    assert TrainSpec().grid_from == 0.85
    assert TrainSpec.model_validate(TrainSpec(precision="fp8").model_dump()) == TrainSpec(precision="fp8")
    with pytest.raises(ValidationError, match="leave grid_from out"):
        TrainSpec(precision="fp8", grid_from=0.85)
    with pytest.raises(ValidationError, match="adapters"):
        ReinforceSpec(precision="bf16", grid_from=1.0, lora={})  # type: ignore[arg-type]
    assert DistillSpec(precision="fp8").training(DistillSpec().students[0]).precision == "fp8"


@pytest.mark.parametrize(
    "shape", [Shape(), Dense(family="qwen3", hidden=32, width=48), Dense(family="llama", hidden=32, width=48)]
)
def test_the_products_are_those_whose_weights_the_grid_holds(shape: Shape | Dense) -> None:
    model = fresh(shape.config(44), 0)
    held = {name for name, tensor in model.named_parameters() if matrices(name, tensor)[1] == "fp8"}
    before = {name: id(tensor) for name, tensor in model.named_parameters()}
    names = list(published(model))
    assert set(precision.scale_products(model)) == held
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == before, "parameters are shared"
    assert list(published(model)) == names
    assert len(held) >= 14

    class Other(nn.Linear):
        pass

    other: Any = fresh(shape.config(44), 0)
    other.model.layers[0].self_attn.o_proj = Other(8, 8)
    with pytest.raises(TypeError, match=r"o_proj is a Other"):
        precision.scale_products(other)


def test_experts_compute_what_each_of_them_would() -> None:
    """Against a loop over tokens and their experts; also where an expert gets no token."""
    model = fresh(Shape().config(44), 0)
    layer: Any = model.model.layers[1].mlp.experts  # type: ignore[union-attr,index]
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in (layer.gate_up_proj, layer.down_proj):
            tensor.normal_()
    precision.scale_products(model)
    x, ids = torch.randn(9, 64), torch.tensor([[0, 1], [1, 2], [5, 0]] * 3)  # 3, 4, 6 and 7 get nothing
    weights = torch.rand(9, 2)
    twin = x.clone().requires_grad_()
    y = layer(twin, ids, weights)
    for row in range(9):
        exact = torch.zeros(64)
        for place, number in enumerate(ids[row].tolist()):
            gate, up, down = precision._matrices(layer)[3 * number : 3 * number + 3]
            one = x[row : row + 1]
            inner = layer.act_fn(precision.linear(one, gate)) * precision.linear(one, up)
            exact += weights[row, place] * precision.linear(inner, down)[0]
        assert torch.allclose(y[row], exact, rtol=1e-4, atol=1e-4)
    of_up, of_down = torch.autograd.grad(y.sum(), [layer.gate_up_proj, layer.down_proj])
    for gradient in (of_up, of_down):
        assert [bool(gradient[number].any()) for number in range(8)] == [
            True,
            True,
            True,
            *[False] * 2,
            True,
            *[False] * 2,
        ]


# ------------------------------------------------------------ training


@pytest.mark.parametrize("narrow", NARROW)
def test_one_two_and_four_workers_and_a_restart_give_the_same_bits(
    dataset: Path, launcher: Any, tmp_path: Path, narrow: str
) -> None:
    its = args(dataset, steps=6, virtual_shards=4, batch=2, precision=narrow)
    digests = {}

    def work(name: str, world: int, until: int = 6, start: Any = None) -> str:
        folder = tmp_path / name
        folder.mkdir()
        asked = {
            **its, "pool": "p", "chips": list(range(world)), "start": start, "until": until,
            "keep": {3: str(folder / "third")}, "memory": str(folder), "durable": str(folder / "durable"), "faults": {},
            "run": "r", "vouched": 0,
        }  # fmt: skip
        results = launcher.call("ottava.trainer.worker:run", asked, workers=world, logs=tmp_path / "logs")
        assert len({result["digest"] for result in results}) == 1
        return str(results[0]["digest"])

    for world in (1, 2, 4):
        digests[world] = work(str(world), world)
    half = snapshot.load(tmp_path / "2" / "third")
    start = {"path": str(tmp_path / "2" / "third"), "step": 3, "digest": half.digest}
    digests[0] = work("again", 2, start=start)
    assert len(set(digests.values())) == 1
    plain = make_trainer(args(dataset, steps=6, virtual_shards=4, batch=2))
    for _ in range(6):
        plain.step(lambda total: total, range(4))
    assert plain.state.digest() not in digests.values()


def test_the_state_and_the_sums_stay_float32_and_the_losses_near(dataset: Path) -> None:
    losses: dict[str, list[float]] = {}
    for name in ("float32", *NARROW):
        trainer = make_trainer(args(dataset, precision=name))
        assert trainer.state.arena.dtype == torch.float32
        assert trainer.products == {"float32": "float32", "bf16": "bf16", "fp8": "emulated"}[name]
        wanted = torch.float32 if name == "float32" else torch.bfloat16
        assert {p.dtype for p in trainer.model.parameters()} == {wanted}
        assert all(b.dtype == torch.float32 for b in trainer._biases)
        trainer.refresh()
        assert trainer.shard(0).dtype == torch.float32
        losses[name] = [trainer.step(lambda total: total, range(2)).told["loss"] for _ in range(12)]
    for name in NARROW:
        assert losses[name] != losses["float32"]
        assert max(abs(a - b) for a, b in zip(losses[name], losses["float32"], strict=True)) < 0.02
    assert losses["float32"][-1] < losses["float32"][0] - 0.1, "otherwise near says nothing"
    assert losses["bf16"] != losses["fp8"]


@pytest.mark.parametrize("narrow", NARROW)
def test_what_is_exported_is_the_grid_of_the_latent_weights(dataset: Path, tmp_path: Path, narrow: str) -> None:
    """Rounded once, from float32, also where passes run in BF16; and it is what the last passes ran through."""
    its = args(dataset, steps=4, precision=narrow, **({} if narrow == "fp8" else {"grid_from": 0.5}))
    trainer = make_trainer(its)
    for step in range(4):
        assert trainer.step(lambda total: total, range(2)).on_grid == (narrow == "fp8" or step >= 2)
    trainer.refresh()
    for slot in trainer.state.slots:
        latent, storage = matrices(slot.name, slot.view(trainer.state.weights))
        on_grid = project(latent) if storage == "fp8" else latent.bfloat16().float()
        assert torch.equal(matrices(slot.name, slot.view(trainer.forward))[0].float(), on_grid), slot.name
    snapshot.save(tmp_path / "state", trainer.state.snapshot())
    (tmp_path / "model").mkdir()
    export({**its, "state": str(tmp_path / "state"), "model": str(tmp_path / "model"), "latent": None})
    read = published(load(tmp_path / "model"))
    for name, item in published(trainer.model).items():
        assert torch.equal(read[name].tensor, item.tensor.float()), name


# ------------------------------------------------------------ reinforcement


@pytest.mark.parametrize("narrow", NARROW)
def test_reinforcement_draws_and_learns_alike_on_any_number_of_workers(
    begun: Path, dataset: Path, tmp_path: Path, narrow: str
) -> None:
    its = rl_spec(precision=narrow, virtual_shards=2, steps=4)
    found = [World(rl(begun, dataset, its, tmp_path / str(count)), count).run(4) for count in (1, 2)]
    assert found[0] == found[1]
    again = World({**rl(begun, dataset, its, tmp_path / "1"), "replay": True}, 1)
    assert again.run(4) == found[0], "from the records"


@pytest.mark.parametrize("narrow", NARROW)
def test_the_gate_lets_the_policy_through_and_no_other(begun: Path, dataset: Path, tmp_path: Path, narrow: str) -> None:
    trainer = make_trainer(rl(begun, dataset, rl_spec(precision=narrow, virtual_shards=2), tmp_path))
    told = trainer.gate()
    assert told is not None
    assert told["gap"] <= mismatch.MEAN * told["floor"]
    assert InProcess(trainer.model).dtype == torch.bfloat16
    twin = make_trainer(rl(begun, dataset, rl_spec(precision=narrow, virtual_shards=2), tmp_path))
    twin.refresh()
    other = twin.model
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.zero_()  # type: ignore[union-attr,index]

    class Stale(InProcess):
        def take(self, model: nn.Module) -> Any:
            return super().take(other)

    with pytest.raises(Alarm, match=r"layers.0.mlp.down_proj"):
        mismatch.gate(Stale(other), trainer.model, [])


def test_a_floor_is_measured_also_where_every_choice_of_experts_is_near_a_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh(Shape().config(44), 0)
    with torch.no_grad():
        model.lm_head.weight.normal_()  # type: ignore[union-attr]
    sequences = mismatch.probes(model, [])
    monkeypatch.setattr(mismatch, "TIE", 0.0)
    everywhere = mismatch.measure(model, sequences, torch.bfloat16)
    monkeypatch.setattr(mismatch, "TIE", 1e9)
    nowhere_clear = mismatch.measure(model, sequences, torch.bfloat16)
    assert (nowhere_clear.mean, nowhere_clear.high) == (everywhere.mean, everywhere.high)
    assert everywhere.high > everywhere.mean > 0


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_a_dense_student_learns_in_fp8(family: str) -> None:
    shape = {"family": family, "hidden": 64, "width": 128, "layers": 2}
    its = {"steps": 6, "batch": 4, "precision": "fp8", "direct": {"batch": 2}, "shape": shape}
    trainer = fresh_trainer(TrainSpec.model_validate(its), 3, _stand_in(), VOCABULARY)
    reports = [trainer.step(lambda total: total, range(2)) for _ in range(6)]
    assert trainer.products == "emulated"
    assert all(report.on_grid for report in reports)
    assert reports[-1].told["loss"] < reports[0].told["loss"] - 0.05


# ------------------------------------------------------------ the recipe for a GPU

SMALL = (
    "fleet=cpu",
    "label={task: chains, cold_start: 60, answers: 300, steps: [2, 3], test_per_length: 4, test_one_step: 4, "
    "audit: 60}",
    "train.shape={hidden: 32, layers: 2, heads: 2, dense_width: 48, expert_width: 16, latent_rank: 16, nope_dim: 8, "
    "rope_dim: 8, value_dim: 8}",
    "train.steps=4", "train.batch=2", "train.direct.batch=2", "train.min_thinking=0", "train.drift.window=1",
    "reinforce.steps=2", "reinforce.lengths=[2]", "reinforce.rollout.prompts=2", "reinforce.rollout.group=2",
    "reinforce.rollout.max_new=12", "reinforce.min_thinking=0", "reinforce.drift.window=1",
)  # fmt: skip


def gpu(*sets: str) -> Any:
    return load_recipe(ROOT / "recipes/gpu.yaml", stages.specs(), sets, platforms.names())


def test_the_recipe_has_the_size_that_it_says() -> None:
    its = gpu()
    assert list(its.stages) == ["label", "train", "reinforce", "distill", "convert", "verify"]
    assert [pool.platform for pool in its.fleet.pools] == ["cuda"]
    assert sum(stage.budget_s for stage in its.stages.values()) <= 1200
    train: Any = its.stages["train"]
    students: Any = its.stages["distill"]
    sizes = []
    for shape in (train.shape, *(student.shape for student in students.students)):
        with torch.device("meta"):
            model = from_config(shape.config(44))
        sizes.append(sum(parameter.numel() for parameter in model.parameters()))
        blocks = {n % 128 for name, p in model.named_parameters() if "proj" in name for n in p.shape[-2:]}
        assert blocks <= {0, 64}, "hardly any product has to be padded"
    assert 50e6 <= sizes[0] <= 100e6
    assert max(sizes[1:]) < sizes[0]
    said = (ROOT / "recipes/gpu.yaml").read_text()
    assert all(f"{size / 1e6:.1f}M" in said for size in sizes)
    assert {its.stages[name].precision for name in ("train", "reinforce", "distill")} == {"bf16"}  # type: ignore[attr-defined]
    second: Any = gpu("train.precision=fp8", "reinforce.precision=fp8", "distill.precision=fp8").stages
    assert [second[name].grid_from for name in ("train", "reinforce", "distill")] == [0.0] * 3


@pytest.mark.parametrize("narrow", NARROW)
def test_the_recipe_runs_small_on_cores(tmp_path: Path, launcher: Any, narrow: str) -> None:
    class Again:
        def __enter__(self) -> Any:
            return launcher

        def __exit__(self, *_: object) -> None:
            pass

    its = gpu(*SMALL, f"train.precision={narrow}", f"reinforce.precision={narrow}")
    done = runner.run(its, tmp_path / "run", Again, runner.Quiet(), until="reinforce")
    assert done["train"].summary["replay_identical"]
    assert done["reinforce"].summary["replay_identical"]
    assert done["train"].summary["on_grid_from_step"] == (0 if narrow == "fp8" else 3)
    told = (tmp_path / "run" / "journal.jsonl").read_text()
    products = {"bf16": "bf16", "fp8": "emulated"}[narrow]
    assert told.count(f'"precision":"{narrow}","products":"{products}"') >= 4, "the runs and their replays"
