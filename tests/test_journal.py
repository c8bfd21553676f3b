"""The journal: writers that die, writers that race, and the fold."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ottava.journal import Journal, RunState, fold, read


def test_round_trip(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a" / "j")
    journal.append("x", value=1)
    journal.append("y", text="ä\n")
    assert [(e["event"], e.get("value"), e.get("text")) for e in read(journal.path)] == [
        ("x", 1, None),
        ("y", None, "ä\n"),
    ]


def test_torn_line_is_skipped_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "j"
    Journal(path).append("a")
    path.write_bytes(path.read_bytes() + b'{"t":1,"eve')
    Journal(path).append("b")
    assert [e["event"] for e in read(path)] == ["a", "b"]


def test_a_full_disk_tears_one_line_and_names_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = tmp_path / "j", os.write
    journal = Journal(path)
    journal.append("a")
    with monkeypatch.context() as full:
        full.setattr("ottava.journal.os.write", lambda fd, data: real(fd, data[:9]))
        with pytest.raises(OSError, match="No space left") as error:
            journal.append("b")
    assert error.value.filename == str(path)
    journal.append("c")
    assert [e["event"] for e in read(path)] == ["a", "c"]


def _write(path: str, who: int) -> None:
    journal = Journal(path)
    for i in range(300):
        journal.append("w", who=who, i=i, pad="x" * 200)


def test_writers_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "j"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(str(path), who)) for who in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    events = list(read(path))
    assert len(events) == 900
    for who in range(3):
        assert [e["i"] for e in events if e["who"] == who] == list(range(300))


def test_missing_journal_is_empty(tmp_path: Path) -> None:
    assert list(read(tmp_path / "none")) == []


def _events(*pairs: tuple[str, dict[str, object]]) -> list[dict[str, object]]:
    return [{"t": float(i), "event": name, **fields} for i, (name, fields) in enumerate(pairs)]


def test_fold_of_a_run_that_was_stopped_and_went_on() -> None:
    state = fold(
        _events(
            ("run.start", {"recipe": "r", "stages": ["label", "train"]}),
            ("stage.start", {"stage": "label", "pool": "a"}),
            ("stage.interrupted", {"stage": "label", "seconds": 2.0}),
            ("run.start", {"recipe": "r", "stages": ["label", "train"]}),
            ("stage.start", {"stage": "label", "pool": "a"}),
            ("stage.progress", {"stage": "label", "fraction": 0.5}),
            ("stage.done", {"stage": "label", "seconds": 1.5, "artifact": "label-1"}),
            ("stage.start", {"stage": "train", "pool": "b"}),
        )
    )
    label, train = state.stages["label"], state.stages["train"]
    assert (label.status, label.seconds, label.artifact, label.pool) == ("done", 3.5, "label-1", "a")
    assert (train.status, train.pool, train.ended) == ("running", "b", None)


def test_a_stage_begun_anew_forgets_the_abandoned_steps() -> None:
    steps = [("train.step", {"step": i, "phase": "main"}) for i in (1, 2, 3)]
    state = fold(_events(*steps, ("train.fallback", {}), ("train.begin", {}), *steps[:1]))
    assert [s["step"] for s in state.steps] == [1]
    assert state.fallbacks == []


@given(st.lists(st.sampled_from(["unknown", "run.end", "train.step", "train.begin"]), max_size=20))
def test_fold_takes_any_order(names: list[str]) -> None:
    events = json.loads(json.dumps(_events(*((name, {"step": 1, "phase": "main"}) for name in names))))
    assert isinstance(fold(events), RunState)
