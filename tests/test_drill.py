"""Drills: every class of fault against real processes, and scenarios against what they promise."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ottava.errors import DataError, RecipeError
from ottava.supervisor import campaign, drill
from ottava.supervisor.decide import KINDS
from ottava.supervisor.drill import Drill
from ottava.supervisor.outcome import Outcome, goodput, summary
from ottava.supervisor.scenario import CHIPS, CLASSES, DAMAGES, EVERY, SAVING, TWELVE, WINDOW, scenario
from ottava.trainer.spec import TrainSpec


@pytest.fixture(scope="module")
def stage(dataset: Path, launcher: Any, tmp_path_factory: pytest.TempPathFactory) -> Drill:
    spec = drill.spec_for(TrainSpec.model_validate({"batch": 2, "direct": {"begin": 0.3, "batch": 2}}))
    base = {"seed": 3, "data": str(dataset), "chat": str(dataset / "chat")}
    return Drill(spec, base, tmp_path_factory.mktemp("drill"), launcher)


def check(outcome: Outcome) -> None:
    assert outcome.wrong == (), (outcome, outcome.wrong)
    assert outcome.struck
    if outcome.ended == "finished":
        assert outcome.identical


@pytest.mark.parametrize(("name", "seed"), [(name, index) for index, name in enumerate(TWELVE)])
def test_every_class_of_fault(stage: Drill, name: str, seed: int) -> None:
    outcome = drill.rehearse(stage, scenario(name, seed, drill.STEPS))
    check(outcome)
    assert name != "node" or outcome.seen, "the machine's workers were to be killed"


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


@pytest.mark.parametrize("name", CLASSES)
def test_scenarios_are_sound(name: str) -> None:
    seen = Counter[str]()
    for seed in range(200):
        scene = scenario(name, seed, 24)
        assert scene == scenario(name, seed, 24)
        assert scene.faults or scene.acts
        assert scene.kinds <= set(KINDS)
        for fault in scene.faults:
            assert 0 <= fault.at_step < 23
            assert fault.rank < CHIPS
            if fault.kind == "spike":
                assert fault.at_step > WINDOW
            if fault.phase.startswith("save:"):
                assert fault.at_step % EVERY == 0
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
    assert {len(scene.acts) for scene in of["disk"]} == {1, 2}
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


@pytest.mark.parametrize("text", ["3", "3:3", "5:1", "a:b", "-1:4", ""])
def test_seeds_that_are_none(text: str) -> None:
    with pytest.raises(DataError, match="no range of seeds"):
        campaign.seeds_of(text)


def test_classes_that_are_none() -> None:
    assert campaign.names_of("all") == TWELVE
    assert campaign.names_of("nan,kill") == ("nan", "kill")
    with pytest.raises(RecipeError, match="no class of fault is called 'kil'"):
        campaign.names_of("kil")
