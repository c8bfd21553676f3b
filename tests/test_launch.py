"""The choice of who starts the workers, as far as it needs no Ray: words, layouts, refusals."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ottava import cli
from ottava.errors import PlatformError, PoolMissing, RecipeError
from ottava.recipe import Pool
from ottava.supervisor import campaign, drill
from ottava.supervisor.launch import MOST_NODES, Where, cluster_for, launcher_for, machines
from ottava.supervisor.scenario import CLASSES, OUTSIDE, TWELVE, scenario

POOLS = (Pool(name="a", workers=4, nodes=2), Pool(name="b", workers=2))
LAID_OUT = {"a": {"x": 2, "y": 2}, "b": {"z": 2}}


def nothing(args: dict[str, object]) -> dict[str, object]:
    """For processes that are started by name."""
    return {"pid": os.getpid()}


def test_without_a_word_this_machine_starts_them(tmp_path: Path) -> None:
    with cluster_for(None, POOLS) as where, launcher_for(where.address, POOLS)() as launcher:
        assert where == Where()
        assert len({r["pid"] for r in launcher.call("tests.test_launch:nothing", {}, workers=2, logs=tmp_path)}) == 2


@pytest.mark.parametrize("word", ["", "head", "ray://head:10001", "head:", "http://head:8265", "Local"])
def test_words_that_name_no_cluster(word: str) -> None:
    with pytest.raises(RecipeError, match="names no Ray cluster") as error, cluster_for(word, POOLS):
        pass
    assert error.value.where == "--ray"


@pytest.mark.parametrize("word", ["auto", "local", "head:6379"])
@pytest.mark.parametrize(
    "words", [["drill", "recipes/tiny.yaml"], ["run", "recipes/tiny.yaml"], ["supervise", "--", "true"]]
)
def test_without_ray_a_command_says_how_to_get_it(
    word: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 2, nothing written, and the environment as it was."""
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(sys, "argv", ["ottava", words[0], "--ray", word, "--out", str(tmp_path / "run"), *words[1:]])
    before = dict(os.environ)
    assert cli.outcome() == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "ray is not installed" in told.err
    assert "pip install -e '.[ray]'" in told.err
    assert not (tmp_path / "run").exists()
    assert dict(os.environ) == before


@given(st.integers(0, 3), st.integers(1, 9))
def test_a_rehearsals_machines_have_all_workers(power: int, nodes: int) -> None:
    workers = 2**power
    found = machines([Pool(name="p", workers=workers, nodes=nodes)])
    counts = [resources["ottava:p"] for resources in found.values()]
    assert sum(counts) == workers
    assert len(counts) == min(nodes, workers)
    assert max(counts) - min(counts) <= 1
    assert list(found) == [f"p-{number}" for number in range(len(counts))]


def test_a_rehearsal_has_an_end() -> None:
    big = Pool(name="p", workers=64, nodes=MOST_NODES + 1)
    with pytest.raises(PlatformError, match="17 nodes does not fit one machine"):
        machines([big])


def test_a_drill_wants_its_pools_laid_out_as_they_are() -> None:
    assert machines(drill.POOLS) == {"a-0": {"ottava:a": 2}, "a-1": {"ottava:a": 2}, "b-0": {"ottava:b": 2}}
    campaign.fits(Where(), TWELVE)
    campaign.fits(Where("h:1", LAID_OUT), TWELVE)
    for chips in ({"x": 4}, {"x": 4, "y": 4}, {"x": 2}, {"x": 1, "y": 1, "z": 2}):
        with pytest.raises(PoolMissing, match="a drill needs pool 'a' on 2 nodes of 2"):
            campaign.fits(Where("h:1", {**LAID_OUT, "a": chips}), TWELVE)


def test_faults_from_outside_are_not_rehearsed_elsewhere() -> None:
    there = Where("h:1", LAID_OUT, away=("y",))
    with pytest.raises(
        RecipeError, match="cannot be rehearsed on other machines: supervisor, node, straggler"
    ) as error:
        campaign.fits(there, TWELVE)
    assert error.value.where == "not this machine: y"
    inside = (error.value.fix or "").split(";")[0].removeprefix("--faults ").split(",")
    assert inside == ["kill", "hang", "nan", "spike", "corruption", "system"]
    campaign.fits(there, inside)


@pytest.mark.parametrize("name", CLASSES)
def test_which_faults_come_from_outside(name: str) -> None:
    assert any(scenario(name, seed, 24).acts for seed in range(60)) == (name in OUTSIDE)
