"""`ottava label replay` as somebody outside sees it: lines in, lines out, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks.labels.worlds import KINDS, Kind, Truth

from ottava.errors import DataError
from ottava.labels import world as worlds

COMMAND = [sys.executable, "-m", "ottava.cli", "label", "replay"]


def document(truth: Truth) -> dict[str, Any]:
    world = truth.world

    def label(k: int) -> Any:
        return None if k < 0 else world.classes[k]

    items = [
        {"id": name, "verifier": label(verifier), "judges": [label(k) for k in judges]}
        for name, verifier, judges in zip(world.ids, world.verifier, world.judges, strict=True)
    ]
    return {"classes": list(world.classes), "annotators": list(world.annotators), "items": items}


def write(folder: Path, content: Any) -> Path:
    path = folder / "world.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("world"), document(Truth(Kind(items=30), 0)))


def converse(path: Path, truth: Truth) -> tuple[list[dict[str, Any]], int]:
    """Answer every question; (the lines, the exit code)."""
    items = {name: i for i, name in enumerate(truth.world.ids)}
    people = {name: i for i, name in enumerate(truth.world.annotators)}
    with subprocess.Popen(
        [*COMMAND, str(path), "--target-error", "0.05"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin
        assert process.stdout
        lines = []
        for line in process.stdout:
            lines.append(json.loads(line))
            if "done" in lines[-1]:
                continue
            ask = lines[-1]["ask"]
            vote = truth.vote(items[ask["item"]], people[ask["annotator"]], ask["blind"])
            process.stdin.write(json.dumps({"vote": None if vote is None else truth.world.classes[vote]}) + "\n")
            process.stdin.flush()
        process.stdin.close()
        return lines, process.wait()


def test_a_replay_over_pipes(tmp_path: Path) -> None:
    truth = Truth(Kind(items=800, classes=3, away=0.05, missed=0.38), 1)
    lines, code = converse(write(tmp_path, document(truth)), truth)
    assert code == 0
    assert all(set(line) == {"ask"} and set(line["ask"]) == {"item", "annotator", "blind"} for line in lines[:-1])
    done = lines[-1]["done"]
    assert done["asked"] == len(lines) - 1
    assert set(done["decisions"]) == set(truth.world.ids)
    wrong = sum(
        done["decisions"][n] != truth.world.classes[k] for n, k in zip(truth.world.ids, truth.truth, strict=True)
    )
    assert wrong / 800 <= done["error_upper_95"] <= 1
    assert truth.asked < 2.13 * 800


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (b"", "the answers ended in mid-run: nothing is decided"),
        (b'{"vote": "c0"}\n', "where: answer 2 (item"),
        (b'{"vote": "zz"}\n', "'zz' is none of the classes ('c0', 'c1')"),
        (b'{"vote": 0}\n', "0 is none of the classes"),
        (b'{"vote": true}\n', "True is none of the classes"),
        (b'{"vote": ["c0"]}\n', "is none of the classes"),
        (b'{"vote": "c0"\n', "this is not a line of JSON"),
        (b"\n", "this is not a line of JSON"),
        (b"\xff\xfe\n", "this is not a line of JSON"),
        (b"[" * 70_000, "the line is too long"),
        (b"[" * 60_000 + b"\n", "this is not a line of JSON"),
        (b'"c0"\n', "an answer is"),
        (b'{"ask": 1}\n', "an answer is"),
    ],
)
def test_a_bad_answer_is_one_message_and_exit_2(small: Path, answers: bytes, message: str) -> None:
    done = subprocess.run([*COMMAND, str(small), "--target-error", "0.05"], input=answers, capture_output=True)
    error = done.stderr.decode()
    assert done.returncode == 2, error
    assert message in error
    assert error.count("error:") == 1
    assert "Traceback" not in error
    assert all("ask" in json.loads(line) for line in done.stdout.splitlines()), "no decision is printed"


GOOD: dict[str, Any] = {
    "classes": ["a", "b"],
    "annotators": ["x"],
    "items": [{"id": 1, "verifier": None, "judges": ["a"]}],
}


@pytest.mark.parametrize(
    ("change", "message", "where"),
    [
        ({"classes": ["a"]}, "classes must be a list of at least 2", "classes"),
        ({"classes": ["a", "a"]}, "classes has the same name twice", "classes"),
        ({"classes": "ab"}, "classes must be a list", "classes"),
        ({"annotators": []}, "annotators must be a list of at least 1", "annotators"),
        ({"items": []}, "at least one item", "items"),
        ({"items": [3]}, "an item is an object with an id", "items[0]"),
        ({"items": [{"id": True}]}, "an item is an object with an id", "items[0]"),
        ({"items": [{"id": 1}, {"id": "1"}]}, "the id '1' is already that of items[0]", "items[1]"),
        ({"items": [{"id": 1, "verifier": "c"}]}, "'c' is none of the classes", "items[0].verifier"),
        ({"items": [{"id": 1, "judges": ["a", "c"]}]}, "'c' is none of the classes", "items[0].judges[1]"),
        ({"items": [{"id": 1, "judges": ["a"]}, {"id": 2, "judges": []}]}, "0 judges here, and 1", "items[1].judges"),
        ({"items": [{"id": 1, "judges": "a"}]}, "judges is a list", "items[0].judges"),
        ({"items": [{"id": 1, "judges": 0}]}, "judges is a list", "items[0].judges"),
    ],
)
def test_a_bad_world_is_refused_with_its_place(change: dict[str, Any], message: str, where: str) -> None:
    with pytest.raises(DataError) as caught:
        worlds.parse({**GOOD, **change})
    assert message in caught.value.what
    assert caught.value.where == where


def test_files_that_are_no_world(tmp_path: Path) -> None:
    assert len(worlds.parse(GOOD)) == 1
    marked = tmp_path / "marked.json"
    marked.write_text(json.dumps(GOOD), encoding="utf-8-sig")  # as some programs begin a file
    assert len(worlds.read(marked)) == 1
    for text, message in (
        ("{", "this is not JSON"),
        ("[]", "a world is a JSON object"),
        ("[" * 100_000, "this is not JSON"),
    ):
        with pytest.raises(DataError, match=message):
            worlds.read(write(tmp_path, text))
    missing = subprocess.run(
        [*COMMAND, str(tmp_path / "no.json"), "--target-error", "0.05"], capture_output=True, text=True
    )
    assert missing.returncode == 2
    assert "Traceback" not in missing.stderr
    wild = subprocess.run([*COMMAND, str(write(tmp_path, GOOD)), "--target-error", "2"], capture_output=True, text=True)
    assert wild.returncode == 2
    assert "the target is a share between 0 and 1" in wild.stderr


@pytest.mark.slow
def test_a_replay_at_full_size_over_pipes(tmp_path: Path) -> None:
    truth = Truth(KINDS["notes"], 7)
    lines, code = converse(write(tmp_path, document(truth)), truth)
    assert code == 0
    assert len(lines) < 1.0 * len(truth.world)


def test_forecasts_go_to_standard_error_and_change_nothing(tmp_path: Path) -> None:
    """Oracle: the same run without anybody to listen to them."""
    from ottava.labels.replay import replay

    kind = Kind(items=700, verifiable=0.0)
    outs: list[list[str]] = []
    asides: list[str] = []
    for aside in (None, asides.append):
        truth, out = Truth(kind, 5), []
        items = {name: i for i, name in enumerate(truth.world.ids)}
        people = {name: i for i, name in enumerate(truth.world.annotators)}

        def hear(limit: int, truth: Truth = truth, out: list[str] = out) -> bytes:
            ask = json.loads(out[-1])["ask"]
            vote = truth.vote(items[ask["item"]], people[ask["annotator"]], True)  # noqa: B023
            return json.dumps({"vote": truth.world.classes[vote or 0]}).encode()

        replay(truth.world, 0.05, hear, out.append, aside=aside)
        outs.append(out)
    assert outs[0] == outs[1]
    found = [json.loads(line)["forecast"] for line in asides]
    assert found
    assert {one["phase"] for one in found} >= {"label", "audit"}
    for one in found:
        assert sorted(one["votes"]) == one["votes"]
        assert sorted(one["hours"]) == one["hours"]
        assert sorted(one["date"]) == one["date"]


def test_who_holds_the_truth_dies(small: Path) -> None:
    """Nothing was decided, and the exit code says so: 0 is for a run that came to its end."""
    with subprocess.Popen(
        [*COMMAND, str(small), "--target-error", "0.05"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdin
        assert process.stdout
        assert process.stderr
        process.stdout.readline()
        process.stdout.close()
        process.stdin.write(b'{"vote": null}\n' * 10)
        process.stdin.flush()
        said = process.stderr.read().decode()
        assert process.wait(60) == 2
    assert "nothing is decided" in said
    assert "Traceback" not in said
    assert "Exception ignored" not in said


def test_null_votes_for_ever_end_the_run(small: Path) -> None:
    done = subprocess.run(
        [*COMMAND, str(small), "--target-error", "0.05"], input=b'{"vote": null}\n' * 1000, capture_output=True
    )
    assert done.returncode == 0
    last = json.loads(done.stdout.splitlines()[-1])["done"]
    assert last["error_upper_95"] == 1
    assert last["asked"] <= 48
    assert b"everybody is away" in done.stderr


@pytest.mark.parametrize(
    ("seconds", "message"),
    [
        ([1.0], "seconds is an object"),
        ({}, "seconds is an object"),
        ({"nobody": 3}, "seconds is an object"),
        ({"x": 0}, "a number above 0 is wanted, not 0"),
        ({"x": "3"}, "a number above 0 is wanted"),
        ({"x": 10**400}, "a number above 0 is wanted"),
        ({"x": 1e308}, "a number above 0 is wanted"),
        ({"x": True}, "a number above 0 is wanted"),
    ],
)
def test_seconds_that_are_none(seconds: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        worlds.parse({**GOOD, "seconds": seconds})
    assert message in caught.value.what
    assert str(caught.value.where).startswith("seconds")


def test_seconds_of_who_is_not_named_are_those_of_the_others() -> None:
    world = worlds.parse({**GOOD, "annotators": ["x", 2, "z"], "seconds": {"x": 10, "2": 20}})
    assert world.seconds is not None
    assert world.seconds.tolist() == [10, 20, 15]


@pytest.mark.slow
def test_a_hundred_thousand_items_fit_in_half_a_gigabyte() -> None:
    """Everything that the policy does at this size: calibration, labelling, audit. Memory is NumPy's own."""
    import tracemalloc

    from ottava.labels.policy import Policy

    truth = Truth(Kind(items=100_000), 0)
    tracemalloc.start()
    run = Policy(truth.world, 0.03).run()
    question = next(run)
    try:
        while True:
            question = run.send(truth.vote(question.item, question.person, True))
    except StopIteration as end:
        done = end.value
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 512 << 20
    assert truth.error(done.decisions) <= done.upper <= 0.03
