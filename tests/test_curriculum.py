"""A curriculum in reinforcement: what is asked is a function of the records, follows the schedule, and turns away from
what is known."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from ottava.journal import Journal
from ottava.recipe import Pool
from ottava.supervisor.drill import spec_for
from ottava.supervisor.loop import Run, replay, supervise
from ottava.tasks import Problem
from ottava.tasks.base import generator, problem_of, read_lines
from ottava.trainer import curriculum, records
from ottava.trainer.curriculum import ASKED, Curriculum
from ottava.trainer.guard import Alarm
from ottava.trainer.rl_spec import ReinforceSpec
from ottava.trainer.supervised import Fault
from tests.test_grpo import STEPS, World, base, drawn, restarted, spec

STRETCHES = [{"until": 0.5, "levels": {1: 3, 2: 1}}, {"until": 1, "levels": {2: 1, 3: 1}}]


def taught(**more: Any) -> ReinforceSpec:
    """Three generations: the first two are of the first stretch."""
    return spec(lengths=(), curriculum={"stretches": STRETCHES, "floor": 0.01}, **more)


@pytest.fixture(scope="module")
def whole(begun: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """An undisturbed run by one worker: its final digest and its rollouts."""
    folder = tmp_path_factory.mktemp("whole")
    return World(base(begun, dataset, taught(), folder), 1).run(STEPS), folder


@pytest.mark.parametrize("count", [2, 4])
def test_the_number_of_workers_changes_nothing(
    begun: Path, dataset: Path, tmp_path: Path, whole: tuple[str, Path], count: int
) -> None:
    assert World(base(begun, dataset, taught(), tmp_path), count).run(STEPS) == whole[0]
    assert drawn(tmp_path) == drawn(whole[1])


@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_restart_changes_nothing(
    begun: Path, dataset: Path, tmp_path: Path, whole: tuple[str, Path], at: int
) -> None:
    """What earlier generations asked is read from their records, in the middle of one and at its beginning."""
    args = base(begun, dataset, taught(), tmp_path)
    first = World(args, 1)
    first.run(at)
    assert restarted(first, args, 2).run(STEPS) == whole[0]
    assert drawn(tmp_path) == drawn(whole[1])


def test_a_lost_record_of_an_earlier_generation_sends_the_run_back(begun: Path, dataset: Path, tmp_path: Path) -> None:
    args = base(begun, dataset, taught(), tmp_path)
    first = World(args, 1)
    first.run(4)
    records.path_of(tmp_path, 0, 0, 3).unlink()
    again = World(args, 1)
    again.workers[0].state.restore(first.workers[0].state.snapshot())
    with pytest.raises(Alarm) as alarm:
        again.step()
    assert (alarm.value.kind, alarm.value.step) == ("rollout", 0)


def test_the_questions_follow_from_the_records_alone(dataset: Path, whole: tuple[str, Path]) -> None:
    """Without a model: every question of the run, from the facts of the generations before."""
    from ottava.trainer.grpo import PROMPTS
    from ottava.trainer.schedule import rng

    its, facts = taught(), records.facts(whole[1])
    answers = [problem_of(line) for line in read_lines(dataset / "answers.jsonl")]
    problems = [problem for level in its.levels for problem in answers if problem.steps == level]
    again = Curriculum(its, problems, facts.__getitem__)
    assert sorted(facts) == [0, 1, 2]
    for number, shards in facts.items():
        for shard, said in shards.items():
            asked = again.questions(rng(5, PROMPTS, number, shard), number)
            assert [one[0] for one in said[ASKED]] == [next(asked).id for _ in said[ASKED]]
            assert len(said[ASKED]) == 4
            assert len({one[0] for one in said[ASKED]}) == 4, "each once in a shard"


@pytest.mark.parametrize("kind", ["sigkill", "lost"])
def test_a_supervised_run_survives_and_is_replayed(
    begun: Path, dataset: Path, launcher: Any, tmp_path: Path, kind: str
) -> None:
    """A worker is killed; or so, and a record of the first generation goes with it."""
    its = taught(restarts=3, checkpoint_every=2)
    args, pools, ends = base(begun, dataset, its), (Pool(name="a", workers=2),), []
    for name, faults in (("calm", []), ("hit", [Fault(at_step=3, rank=1, kind="sigkill")])):
        folder = tmp_path / name
        run = Run("main", its, pools, args, folder / "main", Journal(folder / "j"), launcher, folder / "logs")
        if name == "hit" and kind == "lost":
            run = Run(**{**vars(run), "progress": _losing(folder / "main/rollouts")})
        final, segments = supervise(run, faults)
        ends.append(final.digest)
    assert segments[0].failures == (2 if kind == "lost" else 1)
    assert ends[0] == ends[1]
    again = Run("again", its, pools, args, folder / "again", Journal(folder / "j"), launcher, folder / "logs",
                learn_from=run)  # fmt: skip
    assert replay(again, segments).digest == ends[0]


def _losing(rollouts: Path) -> Callable[[int], None]:
    """Once, after the third step."""
    left = [3]

    def progress(step: int) -> None:
        if step in left:
            left.remove(step)
            for path in rollouts.glob("e*/g00000000-v02*"):
                path.unlink()

    return progress


def test_shares_follow_the_schedule_and_the_known_is_asked_less() -> None:
    """Ten problems a level; one of level 2 is always right, and one always wrong."""
    problems = [Problem(f"{level}-{i}", level, "q", "1") for level in (1, 2, 3) for i in range(10)]
    its = taught(steps=40, rollout={"updates": 1})

    def told(number: int) -> dict[int, Any]:
        rows = [[p.id, 4, {"2-0": 4, "2-1": 0}.get(p.id, 2)] for p in problems]
        return {0: {ASKED: rows}}

    asked = Curriculum(its, problems, told)

    def drawn_at(number: int) -> Counter[str]:
        firsts = (next(asked.questions(generator(9, number, i), number)) for i in range(3000))
        return Counter(problem.id for problem in firsts)

    for number, shares in ((0, (0.75, 0.25, 0)), (19, (0.75, 0.25, 0)), (20, (0, 0.5, 0.5)), (39, (0, 0.5, 0.5))):
        found = drawn_at(number)
        by_level = [sum(found[f"{level}-{i}"] for i in range(10)) for level in (1, 2, 3)]
        for count, share in zip(by_level, shares, strict=True):
            assert stats.binomtest(count, 3000, share).pvalue > 1e-4 if 0 < share < 1 else count == 0
    late = drawn_at(39)
    others = np.mean([late[f"2-{i}"] for i in range(2, 10)])
    assert others > 100
    assert late["2-0"] < 0.2 * others
    assert late["2-1"] < 0.2 * others
    assert late["2-0"] + late["2-1"] > 0, "and not forgotten"


def test_what_was_done_is_told(begun: Path, dataset: Path, whole: tuple[str, Path]) -> None:
    found = curriculum.summary(taught(), whole[1], dataset / "answers.jsonl")
    facts = records.facts(whole[1])
    rows = [one for shards in facts.values() for said in shards.values() for one in said[ASKED]]
    assert found["groups"] == len(rows) == 3 * 4 * 4
    assert found["mixed"] == round(sum(0 < right < graded for _, graded, right in rows) / len(rows), 4)
    first, second = found["stretches"]
    assert (first["until"], second["until"]) == (0.5, 1.0)
    assert first["groups"] == 2 * second["groups"]
    assert {level: its["wanted"] for level, its in first["levels"].items()} == {"1": 0.75, "2": 0.25}
    for stretch in (first, second):
        assert sum(its["asked"] for its in stretch["levels"].values()) == pytest.approx(1, abs=1e-3)
    json.dumps(found)


def test_without_a_curriculum_a_run_keeps_its_name_and_records(begun: Path, dataset: Path, tmp_path: Path) -> None:
    assert "curriculum" not in spec().model_dump(mode="json")
    assert "curriculum" in taught().model_dump(mode="json")
    again = ReinforceSpec.model_validate(json.loads(json.dumps(taught().model_dump(mode="json"))))
    assert again == taught()
    World(base(begun, dataset, spec(), tmp_path), 1).step()
    assert all(ASKED not in said for shards in records.facts(tmp_path).values() for said in shards.values())
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"lengths": [2], "curriculum": {"stretches": [{"until": 1, "levels": {2: 1}}]}}, "leave lengths out"),
        ({"curriculum": {"by_rate": False}}, "no curriculum"),
        ({"curriculum": {"stretches": [{"until": 0.5, "levels": {2: 1}}]}}, "last is until 1"),
        (
            {"steps": 4, "curriculum": {"stretches": [{"until": u, "levels": {2: 1}} for u in (0.1, 0.2, 1)]}},
            "no generation begins in the stretch until 0.2",
        ),
        ({"curriculum": {"stretches": [{"until": 1, "levels": {2: 0}}]}}, "greater than or equal to"),
        ({"curriculum": {"forget": 0}}, "greater than 0"),
    ],
)
def test_a_curriculum_that_could_not_be_followed_is_refused(said: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        ReinforceSpec.model_validate(said)


def test_a_drill_rehearses_the_curriculum_on_its_own_levels() -> None:
    its = spec_for(taught(), 24)
    assert its.levels == (2, 3)
    assert its.curriculum is not None
    assert its.curriculum.floor == 0.01
