"""Hugging Face's and TRL's trainers under the supervisor: killed for real, and the callback's every promise by itself.

The oracle of a kill is the undisturbed run of the same command: equal bytes of the final weights, equal bits of
optimiser and schedule.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from ottava import journal, link
from ottava.errors import CheckpointError, RecipeError
from ottava.journal import Journal
from ottava.recipe import Pool
from ottava.supervisor.command import Care, Run, supervise
from ottava.supervisor.local import LocalLauncher
from ottava.trainer import generations, hf
from ottava.trainer.hf import OttavaCallback
from tests.hf_train import SAVE, examples, model, trainer

SCRIPT = Path(__file__).with_name("hf_train.py")
OFTEN = ("--save", "2")
POINTS = {
    "begin": 11, "update": 11, "write": 24, "load": 1, "end": 1, "seal:fsync:payload": 60, "seal:manifest": 6,
    "seal:fsync:manifest": 6, "seal:fsync:folder": 6, "seal:rename": 6, "seal:fsync:root": 6, "seal:trash": 3,
    "seal:remove": 3,
}  # fmt: skip
"""Where rank 0 may die, and how often it comes there in 11 steps that are saved every other one."""

OTHERS = {"begin": 11, "update": 11, "write": 6, "load": 1, "end": 1}
"""The same for another rank, which saves its random numbers and seals nothing."""


def same(one: Any, other: Any) -> bool:
    """Bitwise, through containers."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def check_equal(folder: Path, expected: Path) -> None:
    """Weights byte for byte; optimiser and schedule bit for bit (equal values may be spelled otherwise in a pickle)."""
    assert (folder / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    for name in ("optimizer.pt", "scheduler.pt"):
        one, other = (torch.load(path / name, weights_only=True) for path in (folder, expected))
        assert same(one, other), name


def last(state: Path, step: int = 11) -> Path:
    """The newest sound generation, which must be the last step's."""
    found, rejected = generations.newest(state, generations.peek(generations.listed(state)[0][2]).run)
    assert found is not None
    assert (found.step, rejected) == (step, [])
    return found.path


# ---------------------------------------------------------------- killed


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, launcher: LocalLauncher) -> Any:
    """(script's words, workers) -> the last checkpoint of a run that nobody disturbs; each is made once."""
    made: dict[tuple[tuple[str, ...], int], Path] = {}

    def get(words: tuple[str, ...], workers: int) -> Path:
        if (words, workers) not in made:
            folder = tmp_path_factory.mktemp("undisturbed")
            if workers == 1:  # without a supervisor: what it adds must change no bit
                subprocess.run(command(folder / "out", words), check=True, capture_output=True, env=environment())
                made[words, workers] = folder / "out" / "checkpoint-11"
            else:
                assert survive(folder, launcher, words, {}, workers)["starts"] == 1
                made[words, workers] = last(folder / "run" / "state")
        return made[words, workers]

    return get


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def command(out: Path, words: tuple[str, ...], plan: Any = None) -> list[str]:
    return [sys.executable, str(SCRIPT), str(out), *words, "--plan", json.dumps(plan or {})]


def survive(folder: Path, launcher: LocalLauncher, words: tuple[str, ...], plan: Any, workers: int) -> dict[str, Any]:
    """A supervised run that dies as planned; one pool a start, as a pool leaves a chip that was struck twice."""
    pools = tuple(Pool(name=f"pool{n}", workers=workers) for n in range(len(plan) + 1))
    out = folder / "run"
    run = Run(command(folder / "out", words, plan), pools, out, Journal(out / "journal.jsonl"), launcher, Care(0))
    found = supervise(run)
    assert [fault["kind"] for fault in found["faults"]] == ["killed"] * len(found["faults"])
    return found


@pytest.fixture(autouse=True)
def _paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the commands that are started: the same packages as here."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(SCRIPT.parent.parent), *filter(None, sys.path)]))


def test_an_sft_run_survives_a_kill_inside_a_save(tmp_path: Path, launcher: LocalLauncher) -> None:
    pytest.importorskip("trl")
    with subprocess.Popen(command(tmp_path / "theirs", ("--trl",)), env=environment()) as undisturbed:
        found = survive(tmp_path, launcher, ("--trl",), {"1": ["write", 5, 0]}, 1)
    assert undisturbed.returncode == 0
    assert (found["starts"], found["steps"], found["lost_steps"]) == (2, 11, 4)
    check_equal(last(tmp_path / "run" / "state"), tmp_path / "theirs" / "checkpoint-11")
    ours, theirs = (tmp_path / name / "model.safetensors" for name in ("out", "theirs"))
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("words", [OFTEN, (*OFTEN, "--trl")])
def test_a_run_survives_kills_at_random(
    seed: int, workers: int, words: tuple[str, ...], tmp_path: Path, launcher: LocalLauncher, undisturbed: Any
) -> None:
    if "--trl" in words:
        pytest.importorskip("trl")
    draw, plan = random.Random(100 * workers + seed), {}
    for epoch in (1, 2, 3):
        rank = draw.randrange(workers)
        points = OTHERS if rank else POINTS
        place = draw.choice([point for point in points if epoch > 1 or point != "load"])
        plan[str(epoch)] = [place, draw.randint(1, points[place]), rank]
    found = survive(tmp_path, launcher, words, plan, workers)
    assert found["steps"] == 11, plan
    assert found["starts"] >= 2, "it was not killed"
    check_equal(last(tmp_path / "run" / "state"), undisturbed(words, workers))


@pytest.mark.slow
@pytest.mark.parametrize("place", sorted(POINTS))
def test_a_run_survives_a_kill_at_every_place(
    place: str, tmp_path: Path, launcher: LocalLauncher, undisturbed: Any
) -> None:
    plan = {"1": ["begin", 7, 0], "2": ["load", 1, 0]} if place == "load" else {"1": [place, min(POINTS[place], 6), 0]}
    found = survive(tmp_path, launcher, OFTEN, plan, 1)
    assert found["starts"] == len(plan) + 1, "it was not killed"
    check_equal(last(tmp_path / "run" / "state"), undisturbed(OFTEN, 1))


@pytest.mark.slow
def test_a_run_survives_its_supervisor(tmp_path: Path, undisturbed: Any) -> None:
    words = command(tmp_path / "out", ())
    line = [sys.executable, "-m", "ottava.cli", "supervise", "--out", str(tmp_path / "run"), "--json", "--", *words]
    first = subprocess.Popen(line, stdout=subprocess.DEVNULL)
    told = tmp_path / "run" / "journal.jsonl"
    deadline = time.monotonic() + 120
    while not any(e["event"] == "train.saved" for e in journal.read(told)):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    first.kill()
    first.wait()
    again = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["starts"] == 2
    check_equal(last(tmp_path / "run" / "state"), undisturbed((), 1))


# ---------------------------------------------------------------- by itself


class Line(link.Link):
    """A line to nobody that notes what is said. stop_at: it asks for an end after this step; expired: its lease is."""

    def __init__(self, epoch: int = 1):
        self.rank, self.epoch, self.phase, self.said = 0, epoch, "start", []
        self.stop_at, self.expired = -1, False

    @property
    def stopping(self) -> bool:
        return any(kind == "step" and fields["step"] == self.stop_at for kind, fields in self.said)

    def say(self, what: str, **fields: Any) -> None:
        self.said.append((what, fields | {"phase": self.phase}))

    def join(self, **facts: Any) -> None:
        self.say("join", **facts)

    def step(self, step: int, **facts: Any) -> None:
        self.say("step", step=step, **facts)

    def check(self) -> None:
        if self.expired:
            raise link.LeaseLost("it ran out")

    def bye(self, step: int, **facts: Any) -> None:
        self.say("bye", step=step, **facts)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [fields for what, fields in self.said if what == kind]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """start(epoch, ...) -> (callback, its line, trainer): one start of the same run, in this process."""
    return starter(tmp_path, monkeypatch)


def starter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """As the fixture `start`, with everything under a folder."""
    monkeypatch.setenv(link.STATE, str(folder / "state"))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def make(epoch: int = 1, callbacks: tuple[TrainerCallback, ...] = (), run: str = "toy", **more: Any) -> Any:
        line = Line(epoch)
        monkeypatch.setattr(hf.link, "connect", lambda: line)
        supervised = OttavaCallback(run)
        return supervised, line, trainer([supervised, *callbacks], folder / "out", **more)

    return make


def train(supervised: OttavaCallback, made: Any) -> Any:
    return made.train(resume_from_checkpoint=supervised.resume_from(made.args))


def steps(root: Path) -> list[tuple[int, int]]:
    """(step, epoch) of the generations, the newest first."""
    return [(step, epoch) for step, epoch, _ in generations.listed(root)]


def test_what_is_told_and_what_is_left(start: Any, tmp_path: Path) -> None:
    supervised, line, made = start()
    train(supervised, made)
    made.save_model()
    assert [kind for kind, _ in line.said if kind != "step"] == ["join", "saved", "saved", "saved", "bye"]
    assert [fields["step"] for fields in line.of("step")] == list(range(1, 12))
    assert [fields["step"] for fields in line.of("step") if "loss" in fields] == [3, 6, 9]
    assert all(fields["seconds"] > 0 for fields in line.of("step"))
    assert line.of("join")[0] | {"pid": 0, "phase": ""} == {"step": 0, "world": 1, "pid": 0, "phase": ""}
    assert {fields["phase"] for fields in line.of("saved")} == {"save"}
    assert steps(tmp_path / "state") == [(11, 1), (8, 1), (4, 1)]
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_the_oldest_generations_go(start: Any, tmp_path: Path) -> None:
    supervised, _, made = start(save_steps=2)
    train(supervised, made)
    assert [step for step, _ in steps(tmp_path / "state")] == [11, 10, 8]


def test_save_total_limit_may_keep_more(start: Any, tmp_path: Path) -> None:
    supervised, _, made = start(save_steps=2, save_total_limit=5)
    train(supervised, made)
    assert [step for step, _ in steps(tmp_path / "state")] == [11, 10, 8, 6, 4]


class Dies(TrainerCallback):  # type: ignore[misc]
    """Ends train() by an exception, as a death would, at one step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def died(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`state` of a first start that died after step 9, beside `theirs` of a run without our callback."""
    folder = tmp_path_factory.mktemp("died")
    with pytest.MonkeyPatch.context() as monkeypatch:
        supervised, _, made = starter(folder, monkeypatch)(1, (Dies(9),))
        with pytest.raises(KeyboardInterrupt):
            train(supervised, made)
        trainer([], folder / "theirs").train()
    assert steps(folder / "state") == [(8, 1), (4, 1)]
    return folder


@pytest.fixture
def broken(died: Path, tmp_path: Path) -> Path:
    """A copy of `died`; returns its `state`."""
    shutil.copytree(died, tmp_path, dirs_exist_ok=True)
    return tmp_path / "state"


def test_without_a_supervisor_all_is_as_without(died: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (link.ADDRESS, link.STATE, "RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    supervised = OttavaCallback("toy")
    ours = trainer([supervised], tmp_path / "ours")
    assert supervised.resume_from(ours.args) is None
    ours.train()
    for step in (4, 8, 11):
        check_equal(tmp_path / "ours" / f"checkpoint-{step}", died / "theirs" / f"checkpoint-{step}")
    names = [{path.relative_to(root) for path in root.rglob("*")} for root in (tmp_path / "ours", died / "theirs")]
    assert names[0] == names[1]


def test_a_second_start_goes_on(broken: Path, start: Any, tmp_path: Path) -> None:
    supervised, line, made = start(2)
    train(supervised, made)
    assert line.of("join")[0]["step"] == 8
    check_equal(last(broken), tmp_path / "theirs" / "checkpoint-11")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "manifest.json"])
def test_an_altered_generation_is_passed_over_and_told_of(name: str, broken: Path, start: Any, tmp_path: Path) -> None:
    path = broken / "g-000000008-e00001" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    supervised, line, made = start(2)
    train(supervised, made)
    assert line.of("join")[0]["step"] == 4
    assert [fields["step"] for fields in line.of("rejected")] == [8]
    check_equal(last(broken), tmp_path / "theirs" / "checkpoint-11")


def test_where_all_are_lost_nothing_begins_anew_in_silence(broken: Path, start: Any) -> None:
    for _, _, path in generations.listed(broken):
        (path / "optimizer.pt").unlink()
    supervised, line, made = start(2)
    with pytest.raises(CheckpointError, match="none of the 2 generations can be used"):
        supervised.resume_from(made.args)
    assert "none of the 2" in line.of("alarm")[0]["message"]


def test_what_a_stale_worker_sealed_is_not_gone_on_from(broken: Path, start: Any, tmp_path: Path) -> None:
    supervised, _, made = start(2, (Dies(10),))
    (broken / "g-000000008-e00001").rename(tmp_path / "later")
    with pytest.raises(KeyboardInterrupt):
        train(supervised, made)  # from step 4
    shutil.rmtree(broken / "g-000000008-e00002")
    (tmp_path / "later").rename(broken / "g-000000008-e00001")  # a worker of the first start woke up
    supervised, _, made = start(3)
    assert str(supervised.resume_from(made.args)).endswith("g-000000004-e00001")


def test_the_end_within_an_epoch_is_gone_back_from(start: Any, tmp_path: Path) -> None:
    """Hugging Face would do a twelfth step, as the test's second half shows."""
    supervised, _, made = start(1)
    train(supervised, made)
    end = last(tmp_path / "state")
    supervised, line, made = start(2)
    train(supervised, made)
    assert line.of("join")[0]["step"] == 8
    check_equal(last(tmp_path / "state"), end)
    theirs = trainer([], tmp_path / "theirs")
    theirs.train(resume_from_checkpoint=str(end))
    assert theirs.state.global_step == 12


def test_the_end_of_an_epoch_is_the_end(start: Any) -> None:
    for epoch in (1, 2):
        supervised, line, made = start(epoch, max_steps=10)
        train(supervised, made)
    assert line.of("join")[0]["step"] == 10
    assert line.of("step") == []


def test_a_half_written_checkpoint_is_neither_used_nor_in_the_way(broken: Path, start: Any, tmp_path: Path) -> None:
    half = broken / "e00001" / "out" / "checkpoint-8"
    half.mkdir(parents=True)
    (half / "optimizer.pt").write_bytes(b"half")
    (half / "rng_state_1.pth").write_bytes(b"another world's")
    (tmp_path / "out" / "checkpoint-11").mkdir(parents=True)  # the user's own stays, and stays what it is
    shutil.rmtree(broken / "g-000000008-e00001")
    supervised, line, made = start(2)
    train(supervised, made)
    assert line.of("join")[0]["step"] == 4
    assert not half.exists()
    assert (8, 2) in steps(broken)
    assert not (broken / "g-000000008-e00002" / "rng_state_1.pth").exists()
    assert list((tmp_path / "out" / "checkpoint-11").iterdir()) == []
    check_equal(last(broken), tmp_path / "theirs" / "checkpoint-11")


def test_a_stop_saves_and_ends(start: Any, tmp_path: Path) -> None:
    supervised, line, made = start()
    line.stop_at = 5
    train(supervised, made)
    assert steps(tmp_path / "state") == [(5, 1), (4, 1)]
    assert line.of("bye")[0]["step"] == 5


def test_without_a_lease_nothing_is_written(start: Any, tmp_path: Path) -> None:
    class Expires(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            line.expired = state.global_step == 7

    supervised, line, made = start(1, (Expires(),))
    with pytest.raises(link.LeaseLost):
        train(supervised, made)
    assert steps(tmp_path / "state") == [(4, 1)]
    assert not list((tmp_path / "state").rglob("checkpoint-8"))


@pytest.mark.parametrize("point", ["fsync:payload", "manifest", "fsync:manifest", "fsync:folder", "rename"])
def test_a_lease_that_ends_in_a_save_seals_nothing(point: str, start: Any, tmp_path: Path) -> None:
    supervised, line, made = start(1)
    asked = supervised._may_write

    def may_write(where: str) -> None:
        line.expired = where == point
        asked(where)

    supervised._may_write = may_write
    with pytest.raises(link.LeaseLost):
        train(supervised, made)
    assert steps(tmp_path / "state") == []


def test_saved_at_a_step_and_at_its_epochs_end(start: Any, tmp_path: Path) -> None:
    class Saves(TrainerCallback):  # type: ignore[misc]
        def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_save = True

    supervised, _, made = start(1, (Saves(),), save_steps=5, max_steps=10)
    train(supervised, made)
    assert steps(tmp_path / "state") == [(10, 1), (5, 1)]
    assert not list((tmp_path / "state").rglob("checkpoint-*"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": SAVE}, "load_best_model_at_end"),
        ({"save_only_model": True}, "save_only_model"),
        ({"save_on_each_node": True}, "save_on_each_node"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"push_to_hub": True}, "push_to_hub"),
    ],
)
def test_what_cannot_work_is_refused(more: dict[str, Any], said: str, start: Any, tmp_path: Path) -> None:
    supervised, line, _ = start()
    args = trainer([], tmp_path / "args").args
    for name, value in more.items():
        setattr(args, name, value)
    with pytest.raises(RecipeError, match=said):
        supervised.resume_from(args)
    assert said in line.of("alarm")[0]["message"]
    state = SimpleNamespace(global_step=0, is_hyper_param_search=False)
    with pytest.raises(RecipeError, match=said):
        supervised.on_train_begin(args, state, None)


def test_other_misuse_is_refused(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="keep is 2"):
        OttavaCallback("toy", keep=2)
    supervised, _, made = start()
    with pytest.raises(RecipeError, match="hyperparameter search"):
        supervised.on_train_begin(made.args, SimpleNamespace(global_step=0, is_hyper_param_search=True), None)
    train(supervised, made)
    with pytest.raises(RecipeError, match="called twice"):
        made.train()
    monkeypatch.delenv(link.STATE)
    with pytest.raises(RecipeError, match="no place for states"):
        OttavaCallback("toy")


def test_another_run_or_batch_is_refused(broken: Path, start: Any) -> None:
    for more in ({"learning_rate": 2e-2}, {"run": "other"}, {"seed": 6}, {"max_steps": 12}):
        supervised, _, made = start(2, **more)
        with pytest.raises(CheckpointError, match="of the run"):
            supervised.resume_from(made.args)
    supervised, _, made = start(2, gradient_accumulation_steps=1)
    with pytest.raises(CheckpointError, match="was 8 examples and is 2 now"):
        supervised.resume_from(made.args)
    supervised, _, made = start(2, gradient_accumulation_steps=2, per_device_train_batch_size=4, logging_steps=1)
    assert supervised.resume_from(made.args) is not None


def test_files_of_another_machine_are_missed(start: Any, tmp_path: Path) -> None:
    supervised, _, made = start()
    folder = tmp_path / "out" / "checkpoint-4"
    folder.mkdir(parents=True)
    (folder / "rng_state_0.pth").touch()
    made.args.output_dir = str(tmp_path / "out")
    args = SimpleNamespace(**made.args.to_dict() | {"world_size": 2, "train_batch_size": 2})
    with pytest.raises(CheckpointError, match="the files of rank 1 are not here"):
        supervised._seal(args, 4)


def test_the_model_has_what_a_resume_could_get_wrong() -> None:
    assert sum(p.numel() for p in model().parameters()) == pytest.approx(1e5, rel=0.3)
    assert len({tuple(row["input_ids"]) for row in examples()}) == len(examples())
