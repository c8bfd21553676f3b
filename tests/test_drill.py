"""Drills: every class of fault against real processes, and scenarios against what they promise."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ottava import cli, journal, runner
from ottava.errors import Busy, DataError, RecipeError
from ottava.supervisor import campaign, drill, outcome
from ottava.supervisor.decide import KINDS
from ottava.supervisor.drill import Drill, Stage
from ottava.supervisor.outcome import Outcome, bundled, goodput, latencies, remarks, summary
from ottava.supervisor.scenario import CHIPS, CLASSES, DAMAGES, EVERY, SAVING, TWELVE, WINDOW, Act, Scenario, scenario
from ottava.trainer.faults import Injector
from ottava.trainer.spec import TrainSpec
from ottava.trainer.supervised import Fault


@pytest.fixture(scope="module")
def stage(dataset: Path, launcher: Any, tmp_path_factory: pytest.TempPathFactory) -> Drill:
    spec = drill.spec_for(TrainSpec.model_validate({"batch": 2, "direct": {"begin": 0.3, "batch": 2}}))
    base = {"seed": 3, "data": str(dataset), "chat": str(dataset / "chat")}
    return Drill(spec, base, tmp_path_factory.mktemp("drill"), launcher)


def check(found: Outcome) -> None:
    assert found.wrong == (), (found, found.wrong)
    assert found.struck
    if found.ended == "finished":
        assert found.identical


@pytest.mark.parametrize(("name", "seed"), [(name, index) for index, name in enumerate(TWELVE)])
def test_every_class_of_fault(stage: Drill, name: str, seed: int) -> None:
    found = drill.rehearse(stage, scenario(name, seed, drill.STEPS))
    check(found)
    assert name != "node" or found.seen, "the machine's workers were to be killed"
    assert (found.disk is not None) == (name == "disk")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "seed"), [(name, seed) for seed in range(20, 24) for name in TWELVE])
def test_every_class_again(stage: Drill, name: str, seed: int) -> None:
    check(drill.rehearse(stage, scenario(name, seed, drill.STEPS)))


def test_a_drill_can_fail(stage: Drill, monkeypatch: pytest.MonkeyPatch) -> None:
    """A supervisor that goes on from a state that is one bit off is caught: by its end, and by who loaded it."""
    scene = scenario("kill", 1, drill.STEPS)
    found = drill.rehearse(stage, scene)
    assert found.wrong == ()
    oracle = next(iter(stage.oracles.values()))
    spoiled = {"digest": "0" * 64, "states": dict.fromkeys(oracle["states"], "0" * 16)}
    monkeypatch.setattr(drill, "_oracle", lambda *_: spoiled)
    found = drill.rehearse(stage, scene)
    assert any("other bytes" in reason for reason in found.wrong)
    assert any("never was" in reason for reason in found.wrong)
    assert (stage.folder / "kill-1").is_dir(), "what went wrong is kept"


@pytest.mark.parametrize("seed", [48, 82])
def test_an_audit_never_takes_a_run_back_to_what_wrong_gradients_made(stage: Drill, seed: int) -> None:
    """All memory and the newest states are lost, and a chip computes wrong gradients on steps that an audit had vouched
    for: what it had vouched for is gone. Here an audit finds it when wrong states of such steps are already kept."""
    scene = scenario("shard", seed, drill.STEPS)
    assert [fault.sticky for fault in scene.later] == [True]
    found = drill.rehearse(stage, scene)
    check(found)
    assert "gradient" in found.seen
    assert found.corrupt_loads == 0


@pytest.fixture
def no_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What whoever is not root has: a mount that refuses."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "mount").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin" / "mount").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")


def carried(stage: Drill, scene: Scenario, folder: Path) -> tuple[Stage, tuple[str, dict[str, Any] | None, str]]:
    """A run that is over, and how it ended; its folder stays."""
    folder.mkdir()
    play = Stage(stage, scene, folder)
    try:
        return play, play.play()
    finally:
        play.clear()


@pytest.mark.parametrize(("seed", "ended"), [(0, "stopped"), (2, "finished")])
@pytest.mark.usefixtures("no_mount")
def test_without_a_small_disk_none_is_filled(stage: Drill, tmp_path: Path, seed: int, ended: str) -> None:
    """Saves fail as on a full disk instead. One that stays full stops the run; after two that fail it goes on."""
    scene = scenario("disk", seed, drill.STEPS)
    assert scene.instead[0].sticky == (ended == "stopped")
    play, end = carried(stage, scene, tmp_path / "run")
    found = drill.judge(play, *end, 1.0)
    check(found)
    assert (found.ended, found.disk) == (ended, "injected")
    events = list(journal.read(play.journal))
    assert {e["kind"] for e in events if e["event"] == "train.injected"} == {"full"}
    unsaved = [e["message"] for e in events if e["event"] == "train.unsaved"]
    assert len(unsaved) >= 3 if ended == "stopped" else len(unsaved) == len(scene.instead) == 2
    assert all("disk full" in message for message in unsaved)
    assert not list(play.folder.rglob("filler"))
    if ended == "stopped":
        _needs_its_bundle(play, end)


def _needs_its_bundle(play: Stage, end: tuple[str, dict[str, Any] | None, str]) -> None:
    (bundle,) = (play.main / "diagnosis").iterdir()
    (bundle / "diagnosis.json").unlink()
    assert any("without a diagnosis" in reason for reason in drill.judge(play, *end, 1.0).wrong)


def test_no_disk_is_filled_beyond_the_small_ones_size(stage: Drill, tmp_path: Path) -> None:
    play = Stage(stage, scenario("kill", 0, drill.STEPS), tmp_path)
    play.durable.mkdir(parents=True)
    play._fill(Act("fill", 1), ())
    assert (play.durable / "filler").stat().st_size == drill.SMALL_DISK
    play._free(Act("free", 2), ())
    assert not list(play.durable.iterdir())


def test_a_machine_without_mount_has_no_small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not drill._mount(tmp_path / "disk")


@pytest.mark.parametrize(("sticky", "count", "fails"), [(True, 1, 10), (False, 1, 1), (False, 2, 2)])
def test_a_full_disk_lasts_or_passes(sticky: bool, count: int, fails: int) -> None:
    """It strikes at every save from its step on, or at as many as there are faults, whichever steps are saved."""
    told: list[int] = []
    fault = Fault(at_step=4, kind="full", phase="save:manifest", sticky=sticky)
    faults = Injector(dict(enumerate([fault] * count)), 0, "a", lambda _, number, **__: told.append(number))
    for step in range(1, 14):
        faults.at("save:payload", step)
        if 4 <= step < 4 + fails:
            with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
                faults.at("save:manifest", step)
        else:
            faults.at("save:manifest", step)
    assert told == list(range(count))


def test_a_fault_of_a_save_waits_for_one() -> None:
    """A state is not saved while the one before still is, so the step that a fault names may have no save."""
    faults = Injector({0: Fault(at_step=20, kind="error", phase="save:rename")}, 0, "a", lambda *_, **__: None)
    faults.at("save:rename", 19)
    faults.at("kept", 24)
    with pytest.raises(RuntimeError, match="injected"):
        faults.at("save:rename", 24)
    faults.at("save:rename", 28)


def test_a_wreck_loses_the_newest_states_and_damages_the_next(tmp_path: Path) -> None:
    for step in (4, 7, 8):
        (tmp_path / f"g-{step:09d}-e00001").mkdir()
        (tmp_path / f"g-{step:09d}-e00001" / "state.safetensors").write_bytes(bytes(64))
    drill.damage(tmp_path, "flip", 3, lost=1)
    left = {path.parent.name: path.read_bytes() == bytes(64) for path in tmp_path.glob("g-*/*")}
    assert left == {"g-000000004-e00001": True, "g-000000007-e00001": False}
    drill.damage(tmp_path, "flip", 3, lost=9)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", CLASSES)
def test_scenarios_are_sound(name: str) -> None:
    seen = Counter[str]()
    for seed in range(200):
        scene = scenario(name, seed, 24)
        assert scene == scenario(name, seed, 24)
        assert scene.faults or scene.acts
        assert scene.kinds <= set(KINDS)
        for fault in (*scene.faults, *scene.later, *scene.instead):
            assert 0 <= fault.at_step < 23
            assert fault.rank < CHIPS
            if fault.kind == "spike":
                assert fault.at_step > WINDOW
            if fault.phase.startswith("save:"):
                assert fault.at_step % EVERY == 0 or fault.kind == "full"
                assert fault.rank == 0
            seen[fault.phase] += 1
        for act in scene.acts:
            assert 0 <= act.at_step < 24
            seen[act.kind] += 1
    if name == "kill":
        assert set(seen) == {"join", "load", "forward", "reduce", "update", "snapshot", "kept"}
    if name == "torn":
        assert len([phase for phase in seen if phase.startswith("save:")]) == 7


def test_a_campaign_meets_every_variant() -> None:
    """Its seeds of one class are 12 apart, so nothing may hang on a seed's remainder."""
    scenes = [scenario(TWELVE[seed % 12], seed, 24) for seed in range(240)]
    of = {name: [scene for scene in scenes if scene.name == name] for name in TWELVE}
    assert {len(scene.faults) for scene in of["kill"]} == {1, 2}
    assert {(len(scene.acts), len(scene.faults)) for scene in of["supervisor"]} == {(1, 0), (1, 1), (2, 0), (2, 1)}
    assert {(fault.kind, fault.sticky) for scene in of["corruption"] for fault in scene.faults} == {
        ("flip", False), ("gradient", True),
    }  # fmt: skip
    assert {min(fault.bits, 2) for scene in of["corruption"] for fault in scene.faults} == {1, 2}
    assert {scene.faults[0].kind for scene in of["system"]} == {"memory", "clock", "sleep"}
    assert {scene.faults[0].phase for scene in of["torn"]} == set(SAVING)
    assert {scene.acts[0].damage for scene in of["shard"]} == set(DAMAGES)
    assert {scene.faults[0].sticky for scene in of["nan"]} == {True, False}
    assert {(len(scene.later), scene.acts[0].lost) for scene in of["shard"]} == {(0, 0), (1, 0), (1, 1)}
    disks = {(len(scene.acts), len(scene.instead), scene.instead[0].sticky) for scene in of["disk"]}
    assert disks == {(1, 1, True), (2, 1, False), (2, 2, False)}, "as it stays full or not, so do the saves fail"
    for name in ("kill", "node", "hang", "nan", "spike", "corruption", "system"):
        assert {scene.restarts for scene in of[name]} >= {0, 4}, name


def test_a_summary_counts() -> None:
    base = Outcome("kill", 0, "finished", ("killed",), True, 0.1, 1.0, 0, 0, 0, True, 5.0, ("a",))
    stopped = Outcome("disk", 1, "stopped", ("disk",), None, 2.0, None, 0, 0, 0, True, 5.0, ("a",))
    broken = Outcome("kill", 2, "finished", ("killed",), False, 0.3, 3.0, 1, 0, 2, True, 5.0, ("a",), wrong=("bad",))
    found = summary([base, stopped, broken])
    whole = {name: found[name] for name in ("runs", "finished", "diagnosed", "bit_identical", "broken")}
    assert whole == {"runs": 3, "finished": 2, "diagnosed": 1, "bit_identical": 1, "broken": 1}
    assert (found["lost_steps_max"], found["corrupt_loads"], found["mttr_p50_s"]) == (1, 2, 2.0)
    assert set(found["by_fault"]) == {"kill", "disk"}
    json.dumps(found)


def ran(name: str, seed: int, ended: str = "finished", disk: str | None = None) -> Outcome:
    same = True if ended == "finished" else None
    return Outcome(name, seed, ended, (), same, None, None, 0, 0, 0, True, 5.0, ("a",), disk=disk)


@pytest.mark.parametrize(
    ("runs", "finished", "enough"), [(12, 10, True), (12, 9, False), (20, 16, True), (20, 15, False)]
)
def test_a_campaign_of_all_classes_finishes_four_fifths(runs: int, finished: int, enough: bool) -> None:
    """However good each stop was. 16 of 20 is four fifths exactly."""
    names = [TWELVE[seed % 12] for seed in range(runs)]
    found = summary([ran(name, n, "finished" if n < finished else "stopped") for n, name in enumerate(names)])
    assert (found["broken"], found["finished_due"]) == (not enough, 0.8)
    assert found["finished_share"] == round(finished / runs, 4)
    assert list(remarks(found)) == [f"{finished} of {runs} runs finished: {finished / runs:.1%}, and at least 80% must"]


def test_a_class_alone_may_stop_as_often_as_it_must() -> None:
    disks = [ran("disk", n, "stopped" if n < 14 else "finished", ("mounted", "injected")[n == 0]) for n in range(20)]
    found = summary([*disks, *(ran(name, 99) for name in TWELVE[:7])])
    assert (found["broken"], found["finished_due"], found["disk"]) == (0, None, "injected and mounted")
    assert [line.partition(" (")[0] for line in remarks(found)] == [
        "13 of 27 runs finished: 48.1%", "disk: injected and mounted",
    ]  # fmt: skip
    assert list(remarks(summary([]))) == []
    assert list(remarks(summary([ran("disk", 1, disk="mounted")])))[-1] == "disk: mounted"


def test_a_stop_needs_a_diagnosis_that_was_written(tmp_path: Path) -> None:
    fault, stop = {"event": "train.fault", "kind": "disk"}, {"event": "train.stop"}
    (tmp_path / "diagnosis.json").write_text("{}")
    written = {"event": "train.diagnosis", "folder": str(tmp_path)}
    assert bundled([fault, written, stop])
    assert not bundled([fault, stop])
    assert not bundled([fault, written | {"folder": None}, stop]), "the disk refused even that"
    assert not bundled([fault, written | {"folder": str(tmp_path / "gone")}, stop])
    assert not bundled([fault, written, fault, stop]), "that was another failure's"
    assert not bundled([fault, written]), "it ended by an error that nobody decided on"
    stopped = replace(ran("disk", 0, "stopped"), seen=("disk",))
    scene = scenario("disk", 0, 24)
    assert list(outcome.broken(scene, stopped, [fault, written, stop])) == []
    assert list(outcome.broken(scene, stopped, [fault, stop])) == ["it stopped without a diagnosis: "]


def test_a_wrong_gradient_goes_unseen_only_where_no_audit_fell_on_it() -> None:
    """An audit that falls on it must see it, so an end in other bytes is chance only without one."""
    lasting = Fault(pool="a", at_step=2, kind="gradient", sticky=True)
    struck = {"event": "train.injected", "kind": "gradient", "step": 2, "epoch": 1}

    def said(faults: Sequence[Fault], later: Sequence[Fault], *audited: int, epoch: int = 1) -> list[str]:
        steps = [{"event": "train.step", "step": n, "attempt": epoch, "audited": n in audited} for n in range(1, 6)]
        scene = replace(scenario("gradient", 0, 24), faults=tuple(faults), later=tuple(later))
        return list(outcome.broken(scene, replace(ran("gradient", 0), identical=False), [struck, *steps]))

    once = lasting.model_copy(update={"sticky": False})
    seen = "an audit passed over a wrong gradient"
    other = "it ended in other bytes than the same schedule without a fault"
    for right in (said([once], ()), said([once], (), 2, 4), said([lasting], (), 1, 2), said((), [lasting], 1, 2)):
        assert right == []
    for wrong in (said([once], (), 3), said([lasting], (), 5), said((), [lasting], 4)):
        assert wrong == [seen, other]
    assert said([lasting], (), 4, epoch=2) == [], "the chip was left by then"


def test_a_fault_is_seen_so_long_after_the_last_that_struck_before() -> None:
    times = [("train.injected", 1.0), ("train.start", 2.0), ("train.step", 2.5), ("train.injected", 4.0)]
    events = [{"event": event, "t": t} for event, t in [*times, ("train.fault", 4.5), ("train.injected", 5.0)]]
    assert latencies(events) == (0.5, 1.5)
    assert latencies(events[:3]) == (None, 1.5)
    assert latencies(events[1:3]) == (None, None)


def test_wrong_gradients_are_counted_against_chance() -> None:
    """Of 40 that are audited with probability 1/4, 99% of all counts lie between 4 and 17."""
    found = Outcome("gradient", 0, "finished", ("gradient",), True, 0.1, 1.0, 0, 3, 0, True, 5.0, ("a",), "", 2)
    missed = Outcome("gradient", 1, "finished", (), False, None, None, 0, 0, 0, True, 5.0, ("a",))
    for count, inside in ((3, False), (4, True), (10, True), (17, True), (18, False)):
        whole = summary([found] * count + [missed] * (40 - count))
        told = whole["by_fault"]["gradient"]
        assert (told["found"], told["interval"], told["inside"]) == (count, [4, 17], inside)
        assert whole["broken"] == (not inside)
        assert told["found_after_max"] == 2


def test_goodput_is_the_time_of_steps_that_count() -> None:
    events = [
        {"event": "train.start", "t": 100.0},
        {"event": "train.step", "step": 1, "seconds": 1.0, "t": 102.0},
        {"event": "train.step", "step": 2, "seconds": 1.0, "t": 103.0},
        {"event": "train.start", "t": 105.0},
        {"event": "train.step", "step": 2, "seconds": 2.0, "t": 108.0},
        {"event": "train.step", "step": 3, "seconds": 1.0, "t": 110.0},
    ]
    assert goodput(events) == 0.4
    assert goodput(events[:1]) is None


@pytest.mark.parametrize(
    "text",
    ["3", "3:3", "5:1", "a:b", "-1:4", "-4:-1", "", ":", "0:", " 0:4", "0:1:2", "1e3:2e3", "0:٣",
     "0:99999999999999999999999999", "0:" + 5000 * "9"],
)  # fmt: skip
def test_seeds_that_are_none(text: str, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="no range of seeds"):
        campaign.seeds_of(text)
    words = ["ottava", "drill", "recipes/tiny.yaml", "--seeds", text, "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    assert cli.outcome() == 2
    said = capsys.readouterr().err
    assert "is no range of seeds" in said
    assert len(said) < 400
    assert not (tmp_path / "out").exists()


def test_seeds_that_are_some() -> None:
    assert campaign.seeds_of("0:12") == range(12)
    assert campaign.seeds_of("7:8") == range(7, 8)
    last = campaign.seeds_of("999999998:999999999")[0]
    assert {name: scenario(name, last, 24).seed for name in CLASSES} == dict.fromkeys(CLASSES, last)


def test_two_drills_do_not_share_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second is told so at any time of the first, before it touches anything; afterwards the folder is free."""
    out, times = tmp_path / "out", []
    monkeypatch.setattr(sys, "argv", ["ottava", "drill", "recipes/tiny.yaml", "--seeds", "0:1", "--out", str(out)])

    def second(*_: Any) -> dict[str, Any]:
        before = sorted(out.rglob("*"))
        times.append(len(before))
        if len(times) < 3:
            assert cli.outcome() == 2
            assert sorted(out.rglob("*")) == before
        return summary([])

    monkeypatch.setattr(runner, "one_stage", second)
    monkeypatch.setattr(campaign, "run", second)
    assert cli.outcome() == 0
    assert len(times) == 2, "the second drill went no further than the lock"
    assert capsys.readouterr().err.count("another drill is at work in this folder") == 2
    with campaign.alone(out), pytest.raises(Busy), campaign.alone(out):
        pass


def test_classes_that_are_none() -> None:
    assert campaign.names_of("all") == TWELVE
    assert campaign.names_of("nan,kill") == ("nan", "kill")
    with pytest.raises(RecipeError, match="no class of fault is called 'kil'"):
        campaign.names_of("kil")
