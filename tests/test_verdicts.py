"""What is said of verdicts, and which problems of a file are asked: each against a count by hand."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ottava.console import reasoning
from ottava.console.history import Generation, History
from ottava.console.source import Source
from ottava.engine.measure import choose
from ottava.errors import DataError
from ottava.journal import RunState
from ottava.tasks import Problem
from ottava.trainer import verdicts

YES, NO, LOST = 1.0, 0.0, None
Group = list[float | None]


def told(groups: list[Group]) -> dict[str, Any]:
    """One generation, as its steps' events tell of it, counted from its verdicts."""
    every = [verdict for group in groups for verdict in group]
    scored = [verdict for verdict in every if verdict is not None]
    mixed = [len({verdict for verdict in group if verdict is not None}) > 1 for group in groups]
    return {
        "drawn": len(every), "unscorable": len(every) - len(scored), "reward": sum(scored) / max(len(scored), 1),
        "mixed": sum(mixed) / len(groups), "why": Counter(deadline=len(every) - len(scored)),
    }  # fmt: skip


VERDICTS = st.sampled_from([YES, NO, LOST])
RUN = st.lists(st.lists(st.lists(VERDICTS, min_size=3, max_size=3), min_size=1, max_size=3), min_size=1, max_size=4)


@given(RUN)
def test_nothing_was_learnt_where_no_group_has_two_verdicts(run: list[list[Group]]) -> None:
    every = [verdict for groups in run for group in groups for verdict in group]
    teaches = any(YES in group and NO in group for groups in run for group in groups)
    said = verdicts.of_generations([told(groups) for groups in run])
    learnt = [remark for remark in said if remark.startswith("nothing was learnt from rewards")]
    assert len(learnt) == (not teaches)
    assert all(("found right" in remark) == (set(every) - {LOST} == {YES}) for remark in learnt)
    assert all(("found wrong" in remark) == (set(every) - {LOST} == {NO}) for remark in learnt)
    assert all(("no reply could" in remark) == (set(every) == {LOST}) for remark in learnt)
    lost = every.count(LOST)
    remark = f"{lost} of {len(every)} replies could not be graded (deadline: {lost}): nothing was learnt from them"
    assert (remark in said) == (lost > 0)
    assert len(said) == len(learnt) + (lost > 0)


def test_what_evaluations_and_harvests_say() -> None:
    entry = {"n": 50, "correct": 1}
    assert verdicts.of_evaluation({"thinking": entry, "direct": entry, "max_new": 3}) == []
    lost = {"direct_one_step": {**entry, "unscorable": {"deadline": 2, "raised KeyError": 3}}}
    assert verdicts.of_evaluation(lost, "the teacher") == [
        "5 of 50 direct one step test replies of the teacher could not be graded (raised KeyError: 3, deadline: 2): "
        "they count as wrong"
    ]
    assert verdicts.of_harvest({"asked": 9}) == verdicts.of_harvest({"graded": 9, "unscorable": 0}) == []
    (remark,) = verdicts.of_harvest({"graded": 9, "unscorable": 4})
    assert remark == "4 of 9 harvested replies could not be graded: none of them was kept"
    assert verdicts.said([], [remark], [remark]) == {"remarks": [remark]}
    assert verdicts.said([]) == {}


def test_a_run_that_is_not_done_is_told_by_the_same_rule(tmp_path: Path) -> None:
    """`ottava report` of a running stage: its generations so far."""
    flat = [
        Generation(n, 1.0, 0.0, 0.0, 0.0, "a", n, drawn=8, unscorable=n, round="reinforce") for n in range(2)
    ]  # fmt: skip
    source = Source(tmp_path, {"stages": {"reinforce": {}}}, History(RunState(), generations=flat), {}, {})
    assert [one["remark"] for one in reasoning.remarks(source)] == [
        "so far, 1 of 16 replies could not be graded: nothing was learnt from them",
        "so far, nothing was learnt from rewards in all 2 generations: every reply was found right",
    ]


# ---- of a file


FILE = [Problem(f"p{i}", steps, f"q{i}", "a") for i, steps in enumerate([1] * 3 + [4] * 10 + [2] * 7)]
WHERE = Path("test.jsonl")


@given(st.integers(1, 20), st.integers(0, 5), st.sets(st.sampled_from([1, 2, 4])))
def test_as_many_of_each_level_as_can_be(n: int, seed: int, levels: set[int]) -> None:
    asked = sorted(levels)
    there = {level: sum(p.steps == level for p in FILE) for level in asked or (1, 2, 4)}
    if n > sum(there.values()):
        with pytest.raises(DataError, match="are to be asked, and the file has"):
            choose(FILE, WHERE, n, seed, asked)
        return
    found = choose(FILE, WHERE, n, seed, asked)
    assert found == [p for p in FILE if p in found], "in the file's order, each once"
    assert len(found) == n
    counts = {level: sum(p.steps == level for p in found) for level in there}
    assert sum(counts.values()) == n
    least = min(count for count in counts.values())
    for level, count in counts.items():  # nobody has two more than one that had more to give
        assert all(count <= other + 1 or other == there[its] for its, other in counts.items()), (level, least)
    assert found == choose(FILE, WHERE, n, seed, asked)


def test_all_of_a_file_or_of_its_levels() -> None:
    assert choose(FILE, WHERE, None, 0) == FILE
    assert choose(FILE, WHERE, None, 0, [2]) == FILE[13:]
    with pytest.raises(DataError, match="no problem of level 3"):
        choose(FILE, WHERE, 1, 0, [2, 3])
    assert choose(FILE, WHERE, 5, 0) != choose(FILE, WHERE, 5, 1)
