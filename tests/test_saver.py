"""The state by name, exactly; and saves beside the loop, which neither wait nor end a run."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ottava.errors import CheckpointError, ResourceError
from ottava.trainer import generations, saver
from ottava.trainer.loop import Trainer
from ottava.trainer.saver import STATE, Saver
from ottava.trainer.start import make_trainer

from .durable import RUN, make
from .test_trainer import base, spec, train

pytestmark = pytest.mark.device


@pytest.fixture
def trainer(dataset: Path) -> Trainer:
    made = make_trainer(base(dataset, spec()))
    train(made, 3)
    return made


def bits(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()


# ---------------------------------------------------------------- the state by name


def test_a_state_comes_back_bit_by_bit(trainer: Trainer, dataset: Path, tmp_path: Path) -> None:
    """Through a generation, into a trainer that did something else: the digest, and the run's end."""
    state = trainer.state
    before = state.digest()
    generations.write(tmp_path, {STATE: state.tensors()}, step=state.step, run=RUN, epoch=1, state=before)
    found, _ = generations.newest(tmp_path, RUN)
    assert found is not None
    other = make_trainer(base(dataset, spec(), seed=4))
    train(other, 5)
    assert other.state.digest() != before
    other.state.take(generations.load(found, STATE))
    assert (other.state.digest(), other.state.step) == (found.state, 3)
    again = make_trainer(base(dataset, spec()))
    again.state.take(generations.load(found, STATE))
    assert train(again, 9) == train(trainer, 9)


def test_names_mean_what_they_say(dataset: Path) -> None:
    """Weights are the model's, moments are those of one step's gradient, biases are the routers' buffers."""
    trainer = make_trainer(base(dataset, spec()))
    initial = {name: p.clone() for name, p in make_trainer(base(dataset, spec())).state.tensors().items()}
    totals = []
    trainer.step(lambda total: totals.append(total) or total, range(2))  # type: ignore[func-returns-value]
    its, tensors = trainer.spec.optimiser, trainer.state.tensors()
    trainer.refresh()
    for slot in trainer.state.slots:
        gradient = slot.view(totals[0])
        assert torch.equal(tensors[f"weights.{slot.name}"], trainer.model.get_parameter(slot.name))
        assert not torch.equal(tensors[f"weights.{slot.name}"], initial[f"weights.{slot.name}"]) or not gradient.any()
        if slot.kind == "muon":
            expected = torch.zeros_like(gradient).lerp_(gradient, 1 - its.muon_momentum)
            assert torch.equal(tensors[f"momentum.{slot.name}"], expected)
        else:
            assert torch.equal(tensors[f"first.{slot.name}"], torch.zeros_like(gradient).add_(gradient, alpha=0.1))
            squares = torch.zeros_like(gradient).addcmul_(gradient, gradient, value=1 - its.beta2)
            assert torch.equal(tensors[f"second.{slot.name}"], squares)
    biases = [name for name in tensors if name.startswith("bias.")]
    assert biases == ["bias.model.layers.1.mlp.gate.e_score_correction_bias"]
    for name in biases:
        assert tensors[name].any()
        assert torch.equal(tensors[name], trainer.model.get_buffer(name.removeprefix("bias.")))
    assert tensors["step"].item() == 1
    muon = sum(slot.kind == "muon" for slot in trainer.state.slots)
    assert len(tensors) == 1 + 2 * muon + 3 * (len(trainer.state.slots) - muon) + len(biases)


def test_names_and_padding_are_all_there_is(trainer: Trainer) -> None:
    """Every number of the arena belongs to one tensor, or is padding: zero, and less than a line for each."""
    state = trainer.state
    owners = torch.zeros(state.arena.numel(), dtype=torch.int32, device=state.arena.device)
    for place in state.places:
        place.view(owners).add_(1)
    owners[state.padding] += 1
    assert owners.eq(1).all()
    assert len(state.padding) < 16 * len(state.places)
    assert len(state.padding) > 0, "this model shows nothing"


def test_odd_bits_survive(trainer: Trainer, tmp_path: Path) -> None:
    """NaNs with a payload, quiet and signalling, -0 and the smallest numbers: bits, not values."""
    state = trainer.state
    odd = torch.tensor([0x7FC01234, 0x7F800001, -0x7FFFFF, -0x80000000, 1, 0x7F800000], dtype=torch.int64)
    view = state.places[0].view(state.arena).flatten()
    view.view(torch.int32)[: len(odd)] = odd.to(torch.int32)
    before = state.digest()
    made = generations.write(tmp_path, {STATE: state.tensors()}, step=3, run=RUN, epoch=1)
    state.arena.fill_(7.0)
    state.take(generations.load(made, STATE))
    assert state.digest() == before  # the padding too


def test_a_stray_write_between_tensors_is_found(trainer: Trainer) -> None:
    state = trainer.state
    for position in (state.padding[0], state.padding[len(state.padding) // 2], state.padding[-1]):
        for value in (1e-45, -0.0):  # -0 equals 0, and its bits do not
            kept = state.tensors()
            state.arena[position] = value
            with pytest.raises(CheckpointError, match="between two tensors") as caught:
                state.tensors()
            place = next(p for p in state.places if p.name == caught.value.tensor)
            assert place.start + place.size <= position < place.start + place.size + 16
            state.take(kept)
            assert not state.arena[state.padding].any()
    state.tensors()


def test_another_models_tensors_are_refused(trainer: Trainer) -> None:
    state = trainer.state
    good = {name: tensor.clone() for name, tensor in state.tensors().items()}
    name = state.places[4].name
    faults: dict[str, tuple[str, dict[str, Tensor]]] = {
        "missing tensor": (name, {k: v for k, v in good.items() if k != name}),
        "unknown tensor": ("weights.x", {**good, "weights.x": torch.ones(1)}),
        "other shape": (name, {**good, name: good[name].reshape(-1)[:-1]}),
        "other value": ("step", {**good, "step": torch.tensor(-1)}),
    }
    before = state.digest()
    for cause, (its, tensors) in faults.items():
        changed = {k: v + 1 if k != its and v.is_floating_point() else v for k, v in tensors.items()}
        with pytest.raises(CheckpointError) as caught:
            state.take(changed)
        assert (caught.value.cause, caught.value.tensor) == (cause, its)
        assert its in caught.value.what
    for its, wrong in ((name, good[name].double()), ("step", torch.tensor(3.0)), (name, good[name].reshape(1, -1))):
        with pytest.raises(CheckpointError) as caught:
            state.take({**good, its: wrong})
        assert (caught.value.cause, caught.value.tensor) == ("other shape", its)
    assert state.digest() == before


# ---------------------------------------------------------------- saves beside the loop


def tensors(value: int, size: int = 8) -> dict[str, Tensor]:
    return {"step": torch.tensor(value), "x": torch.full((size,), float(value))}


def saved(root: Path, step: int) -> dict[str, Tensor]:
    return generations.load(generations.verify(root / f"g-{step:09d}-e00001", RUN), STATE)


class Gate:
    """An `at` that holds the thread at a point until it is opened; the first time only."""

    def __init__(self, point: str = "payload"):
        self.point, self.reached, self.open = point, threading.Event(), threading.Event()

    def __call__(self, point: str) -> None:
        if point == self.point:
            self.reached.set()
            assert self.open.wait(60)


def test_what_is_saved_is_what_was_submitted(tmp_path: Path) -> None:
    """The loop goes on at once and changes its state while the thread has not yet written a byte."""
    gate = Gate()
    its, present = Saver(tmp_path, run=RUN, epoch=1, at=gate), tensors(1)
    assert its.submit(1, present, state="abc", extra={"loss": 2.0})
    assert gate.reached.wait(60)
    present["x"].fill_(99.0)
    assert its.poll() == []
    assert not its.submit(2, present), "one at a time: the second is skipped"
    gate.open.set()
    assert its.submit(3, tensors(3), wait=True)
    its.close()
    first, second = its.poll()
    assert (first.step, second.step) == (1, 3)
    assert first.saved is not None
    assert first.error is None
    assert (first.saved.state, first.saved.extra) == ("abc", {"loss": 2.0})
    assert its.poll() == []
    for step in (1, 3):
        assert {k: bits(v) for k, v in saved(tmp_path, step).items()} == {k: bits(v) for k, v in tensors(step).items()}
    assert [step for step, *_ in generations.listed(tmp_path)] == [3, 1]


def test_the_spare_buffer_is_used_again(tmp_path: Path) -> None:
    its = Saver(tmp_path, run=RUN, epoch=1)
    places = []
    for step, size in ((1, 8), (2, 8), (3, 9)):
        assert its.submit(step, tensors(step, size), wait=True)
        places.append({tensor.data_ptr() for tensor in its._spare.values()})
    its.close()
    assert places[0] == places[1]
    assert all(outcome.error is None for outcome in its.poll())
    assert saved(tmp_path, 3)["x"].tolist() == [3.0] * 9


def test_pruned_after_each_save(tmp_path: Path) -> None:
    make(tmp_path, 1)
    (tmp_path / "g-000000001-e00001" / STATE).unlink()
    its = Saver(tmp_path, run=RUN, epoch=1, keep=2)
    for step in range(2, 7):
        assert its.submit(step, tensors(step), pinned=frozenset([3]), wait=True)
    its.close()
    outcomes = its.poll()
    assert [step for step, *_ in generations.listed(tmp_path)] == [6, 5, 3]
    assert [[path.name[:11] for path in outcome.removed] for outcome in outcomes] == [
        [], ["g-000000001"], ["g-000000002"], [], ["g-000000004"],
    ]  # fmt: skip
    assert [item.cause for item in outcomes[0].rejected] == ["missing file"]


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), OSError(5, "I/O error"), KeyError("bug")])
def test_a_failed_save_is_an_outcome(tmp_path: Path, fault: Exception) -> None:
    """The disk's refusals, and this program's own faults: told, nothing left behind, and the next save is tried."""
    faults = [fault]

    def at(point: str) -> None:
        if point == "fsync:folder" and faults:
            raise faults.pop()

    its = Saver(tmp_path, run=RUN, epoch=1, at=at)
    for step in (1, 2):
        assert its.submit(step, tensors(step), wait=True)
    its.close()
    failed, good = its.poll()
    assert failed.saved is None
    assert isinstance(failed.error, ResourceError)
    assert failed.error.where == str(tmp_path)
    assert failed.error.__cause__ is fault
    assert good.error is None
    assert [path.name for path in tmp_path.iterdir()] == ["g-000000002-e00001"]


def test_what_the_dead_left_makes_room_first(tmp_path: Path) -> None:
    """Before there is asked for room, and not only after a save that found enough."""
    left = tmp_path / ".tmp-g-000000001-e00000-0123abcd" / "g-000000001-e00000"
    left.mkdir(parents=True)
    there = []
    its = Saver(tmp_path, run=RUN, epoch=1, at=lambda _: there.append(left.exists()))
    assert its.submit(1, tensors(1))
    its.close()
    assert there
    assert not any(there)


def test_a_failed_prune_leaves_the_save_good(tmp_path: Path) -> None:
    def at(point: str) -> None:
        if point == "trash":
            raise OSError(30, "Read-only file system")

    make(tmp_path, 1)
    its = Saver(tmp_path, run=RUN, epoch=1, keep=1, at=at)
    assert its.submit(2, tensors(2))
    its.close()
    (outcome,) = its.poll()
    assert outcome.saved is not None
    assert isinstance(outcome.error, ResourceError)
    assert "removing an old generation" in outcome.error.what


def test_no_memory_for_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    its = Saver(tmp_path, run=RUN, epoch=1)

    def refuse(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(saver.torch, "empty", refuse)
        assert not its.submit(1, tensors(1))
    assert its.submit(2, tensors(2))
    its.close()
    failed, good = its.poll()
    assert isinstance(failed.error, ResourceError)
    assert "no memory" in failed.error.what
    assert good.saved is not None


def test_closing_without_waiting(tmp_path: Path) -> None:
    gate = Gate("rename")
    its = Saver(tmp_path, run=RUN, epoch=1, at=gate)
    assert its.submit(1, tensors(1))
    assert gate.reached.wait(60)
    its.close(wait=False)
    with pytest.raises(AssertionError, match="closed"):
        its.submit(2, tensors(2))
    gate.open.set()
    its.close()
    assert saved(tmp_path, 1)["step"] == 1
