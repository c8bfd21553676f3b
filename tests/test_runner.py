"""The runner: what is done is not done again, what is stopped goes on, what is broken is said."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ottava import journal, runner, stages
from ottava.artifact import Artifact
from ottava.context import Context
from ottava.errors import ArtifactError, Busy, DataError, RecipeError, ResourceError, Verdict
from ottava.recipe import Recipe, Spec, load_recipe

FLEET = "name: f\npools:\n  - name: a\n  - name: b\n"


class FakeSpec(Spec):
    value: int = 1
    fail: str = ""


class FakeStage:
    """A stage in a few lines: counts its runs, reads its inputs, keeps a note in its work folder."""

    Spec = FakeSpec
    VERSION = "1"

    def __init__(self, name: str, inputs: tuple[str, ...]):
        self.name, self.INPUTS, self.runs, self.notes = name, inputs, 0, []  # type: ignore[var-annotated]

    def run(self, spec: Any, inputs: Mapping[str, Artifact], ctx: Context) -> Artifact:
        self.runs += 1
        note = ctx.work / "note"
        self.notes.append(note.read_text() if note.exists() else None)
        note.write_text(str(self.runs))
        (ctx.out / "value").write_text(f"{spec.value}" + "".join(a.digest for a in inputs.values()))
        ctx.progress(0.5, "half")
        if spec.fail == "interrupt":
            raise KeyboardInterrupt
        if spec.fail == "error":
            raise DataError("bad data")
        if spec.fail == "disk":
            raise OSError(28, "No space left on device", "/somewhere")
        passed = {"passed": ["b"]} if self.name == "qualify" else {}
        return ctx.commit({"pool": ctx.pool.name, **passed}, verdict=spec.fail != "verdict")


class Silent:
    def __init__(self) -> None:
        self.lines: list[tuple[Any, ...]] = []

    def start(self, *args: Any) -> None:
        self.lines.append(("start", *args))

    def progress(self, *args: Any) -> None:
        self.lines.append(("progress", *args))

    def done(self, stage: str, seconds: float, cached: bool, summary: Mapping[str, Any]) -> None:
        self.lines.append(("cached" if cached else "done", stage))

    def failed(self, *args: Any) -> None:
        self.lines.append(("failed", *args))

    def note(self, *args: Any) -> None:
        self.lines.append(("note", *args))


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeStage]:
    made = {
        "qualify": FakeStage("qualify", ()),
        "label": FakeStage("label", ()),
        "train": FakeStage("train", ("label",)),
        "serve": FakeStage("serve", ("train", "?label")),
    }
    monkeypatch.setattr(stages, "load", made.__getitem__)
    return made


def recipe(folder: Path, *sets: str, names: tuple[str, ...] = ("label", "train", "serve")) -> Recipe:
    (folder / "f.yaml").write_text(FLEET)
    (folder / "r.yaml").write_text("name: r\nfleet: f\nstages:\n" + "".join(f"  {name}: {{}}\n" for name in names))
    specs = dict.fromkeys(("qualify", "label", "train", "serve"), FakeSpec)
    return load_recipe(folder / "r.yaml", specs, sets)


def go(folder: Path, its: Recipe, **options: Any) -> tuple[dict[str, Artifact], list[tuple[Any, ...]]]:
    reporter = Silent()
    done = runner.run(its, folder / "run", contextlib.nullcontext, reporter, **options)  # type: ignore[arg-type]
    return done, reporter.lines


def test_done_is_not_done_again(tmp_path: Path, fakes: dict[str, FakeStage]) -> None:
    first, lines = go(tmp_path, recipe(tmp_path))
    assert [line for line in lines if line[0] == "done"] == [("done", "label"), ("done", "train"), ("done", "serve")]
    second, lines = go(tmp_path, recipe(tmp_path))
    assert [line[0] for line in lines] == ["cached"] * 3
    assert [stage.runs for stage in fakes.values()] == [0, 1, 1, 1]
    assert {n: a.digest for n, a in first.items()} == {n: a.digest for n, a in second.items()}
    assert not (tmp_path / "run" / "work" / "label").exists()


def test_what_a_change_reaches_is_done_again(tmp_path: Path, fakes: dict[str, FakeStage]) -> None:
    go(tmp_path, recipe(tmp_path))
    go(tmp_path, recipe(tmp_path, "train.value=2"))
    assert [stage.runs for stage in fakes.values()] == [0, 1, 2, 2]
    go(tmp_path, recipe(tmp_path))  # the old artifacts are still there
    assert [stage.runs for stage in fakes.values()] == [0, 1, 2, 2]
    go(tmp_path, recipe(tmp_path, "train.budget_s=999"))  # a budget changes nothing
    assert [stage.runs for stage in fakes.values()] == [0, 1, 2, 2]
    go(tmp_path, recipe(tmp_path, "seed=5"))
    assert [stage.runs for stage in fakes.values()] == [0, 2, 3, 3]
    fakes["label"].VERSION = "2"
    go(tmp_path, recipe(tmp_path))
    assert fakes["label"].runs == 3
    assert fakes["train"].runs == 3, "label's new version made the same bytes, so train's are still right"


def test_stopped_and_gone_on(tmp_path: Path, fakes: dict[str, FakeStage]) -> None:
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, recipe(tmp_path, "train.fail=interrupt"))
    state = journal.fold(journal.read(tmp_path / "run" / "journal.jsonl"))
    assert [s.status for s in state.stages.values()] == ["done", "interrupted", "waiting"]
    assert next(iter((tmp_path / "run" / "artifacts").iterdir())).name.startswith("label-")
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, recipe(tmp_path, "train.fail=interrupt"))
    assert fakes["train"].notes == [None, "1"], "the work folder of the same task is kept"
    go(tmp_path, recipe(tmp_path))
    assert fakes["train"].notes == [None, "1", None], "another task begins anew"
    assert fakes["label"].runs == 1


def test_work_goes_on_under_other_care_and_is_put_aside_for_another_task(
    tmp_path: Path, fakes: dict[str, FakeStage], monkeypatch: pytest.MonkeyPatch
) -> None:
    train, aside = fakes["train"], tmp_path / "run" / "work"
    monkeypatch.setattr(train, "CARE", frozenset({"fail"}), raising=False)
    for fail in ("interrupt", "error", "interrupt"):
        with pytest.raises((KeyboardInterrupt, DataError)):
            go(tmp_path, recipe(tmp_path, f"train.fail={fail}"))
    assert train.notes == [None, "1", "2"]
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, recipe(tmp_path, "train.fail=interrupt", "train.value=2"))
    assert train.notes == [None, "1", "2", None]
    assert (aside / "train-aside-1" / "work" / "note").read_text() == "3"
    (aside / "train" / "key").write_text("")  # as an older version might have left it
    _, lines = go(tmp_path, recipe(tmp_path, "train.value=2"))
    assert (aside / "train-aside-2" / "work" / "note").read_text() == "4"
    assert [line[0] for line in lines if "train" in line[1:2]] == ["note", "start", "progress", "done"]
    assert str(aside / "train-aside-2") in next(line[2] for line in lines if line[0] == "note")


def test_a_pool_may_join_while_a_stage_is_at_work(
    tmp_path: Path, fakes: dict[str, FakeStage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fakes["train"], "CARE", frozenset(), raising=False)
    for fleet in (FLEET, FLEET + "  - name: c\n"):
        monkeypatch.setattr("tests.test_runner.FLEET", fleet)
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path, recipe(tmp_path, "train.fail=interrupt"))
    assert fakes["train"].notes == [None, "1"]


def test_failures(tmp_path: Path, fakes: dict[str, FakeStage]) -> None:
    with pytest.raises(DataError):
        go(tmp_path, recipe(tmp_path, "train.fail=error"))
    with pytest.raises(ResourceError) as full:
        go(tmp_path, recipe(tmp_path, "train.fail=disk"))
    assert full.value.render() == (
        "error: disk full while running the stage 'train'\n  where: /somewhere\n"
        "  mend:  free some space or choose another place for the output, then run again"
    )
    assert not any("train" in path.name for path in (tmp_path / "run" / "artifacts").iterdir())
    for _ in range(2):  # a negative verdict stays one, without doing the work again
        with pytest.raises(Verdict, match="the stage 'train' says no"):
            go(tmp_path, recipe(tmp_path, "train.fail=verdict"))
    assert fakes["train"].runs == 3
    assert fakes["serve"].runs == 0


@pytest.mark.parametrize(
    ("sets", "names", "why"),
    [
        ((), ("label", "train", "serve"), None),
        (("label.value=2",), ("label", "train", "serve"), "that of 'label' which is there was made .* label.value"),
        (("train.value=2",), ("label", "train", "serve"), "the one that is there was made with another train.value"),
        (("train.value=2", "label.value=2"), ("label", "train", "serve"), "that of 'label' .* another label.value\\n"),
        (("seed=9",), ("label", "train", "serve"), "that of 'label' which is there was made with the seed 0, not 9"),
        (("serve.value=2",), ("qualify", "label", "train", "serve"), "that of 'qualify' .* for the recipe as it was"),
    ],
)  # fmt: skip
def test_one_stage_alone_says_whose_artifact_does_not_fit(
    tmp_path: Path, fakes: dict[str, FakeStage], sets: tuple[str, ...], names: tuple[str, ...], why: str | None
) -> None:
    go(tmp_path, recipe(tmp_path, names=names), until="train")
    if why is None:
        go(tmp_path, recipe(tmp_path, *sets, names=names), only="serve")
        return
    with pytest.raises(ArtifactError, match=f"'serve' needs the artifact of 'train', and {why}") as error:
        go(tmp_path, recipe(tmp_path, *sets, names=names), only="serve")
    assert error.value.exit_code == 2
    go(tmp_path, recipe(tmp_path, *sets, names=names), until="train")  # what it says to do
    go(tmp_path, recipe(tmp_path, *sets, names=names), only="serve")


def test_one_stage_alone_of_another_version_says_so(tmp_path: Path, fakes: dict[str, FakeStage]) -> None:
    go(tmp_path, recipe(tmp_path), until="train")
    fakes["label"].VERSION = "2"
    with pytest.raises(ArtifactError, match="that of 'label' which is there was made by another version of the stage"):
        go(tmp_path, recipe(tmp_path), only="serve")
    for path in (tmp_path / "run" / "artifacts").glob("label-*"):
        shutil.rmtree(path)
    with pytest.raises(ArtifactError, match="artifact of 'train', which is not there, as 'label' is not") as error:
        go(tmp_path, recipe(tmp_path), only="serve")
    assert "--only label" in str(error.value.fix)


def test_one_stage_alone_says_that_what_lies_outside_was_edited(
    tmp_path: Path, fakes: dict[str, FakeStage], monkeypatch: pytest.MonkeyPatch
) -> None:
    go(tmp_path, recipe(tmp_path), until="train")
    monkeypatch.setattr(FakeSpec, "outside", lambda self: {"task": "edited"})
    with pytest.raises(ArtifactError, match=r"'label' .* was made before what it names outside the recipe was edited"):
        go(tmp_path, recipe(tmp_path), only="serve")


def test_corrupt_artifact(tmp_path: Path, fakes: dict[str, FakeStage]) -> None:
    done, _ = go(tmp_path, recipe(tmp_path))
    (done["train"].path / "value").write_text("x")
    with pytest.raises(ArtifactError) as error:
        go(tmp_path, recipe(tmp_path))
    assert error.value.render() == (
        f"error: a file of the artifact was altered since it was written\n  where: {done['train'].path}/value\n"
        f"  mend:  delete {done['train'].path} and run again: the stage will be redone"
    )


def test_only_and_until(tmp_path: Path, fakes: dict[str, FakeStage]) -> None:
    with pytest.raises(ArtifactError, match="needs the artifact of 'label', which is not there"):
        go(tmp_path, recipe(tmp_path), only="train")
    go(tmp_path, recipe(tmp_path), until="label")
    go(tmp_path, recipe(tmp_path), only="train")
    assert [stage.runs for stage in fakes.values()] == [0, 1, 1, 0]
    with pytest.raises(RecipeError, match=r"--until names no stage of the recipe: 'qualify'"):
        go(tmp_path, recipe(tmp_path), until="qualify")


def test_a_recipe_without_a_needed_stage_is_refused_before_anything_is_written(
    tmp_path: Path, fakes: dict[str, FakeStage]
) -> None:
    for names, missing in ((("train",), "label"), (("label", "serve"), "train")):
        with pytest.raises(RecipeError, match=f"the stage '{names[-1]}' needs '{missing}'") as error:
            go(tmp_path, recipe(tmp_path, names=names))
        assert error.value.fix
    assert not (tmp_path / "run").exists()


def test_a_file_in_the_place_of_the_folder(tmp_path: Path, fakes: dict[str, FakeStage]) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ResourceError) as error:
        go(tmp_path, recipe(tmp_path))
    assert error.value.render() == (
        f"error: a file is where the folder would be\n  where: {tmp_path}/run\n  mend:  choose another --out"
    )


def test_a_refusal_tells_its_reasons() -> None:
    summaries = ({"reason": "a", "reasons": ["b"]}, {"reasons": ["b", "c"]}, {"x": 1})
    said = [runner._reason(Artifact(Path(), {"summary": summary})) for summary in summaries]
    assert said == ["a", "b; c", '{"x": 1}']


def test_an_event_that_was_not_written_whole_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = journal.Journal(tmp_path / "journal.jsonl")
    monkeypatch.setattr(journal.os, "write", lambda _, data: len(data) - 1)
    with pytest.raises(OSError, match="No space left"):
        told.append("x")


def test_pools(tmp_path: Path, fakes: dict[str, FakeStage]) -> None:
    done, _ = go(tmp_path, recipe(tmp_path))
    assert done["label"].summary["pool"] == "a"
    done, _ = go(tmp_path, recipe(tmp_path, "label.pool=b"))
    assert done["label"].summary["pool"] == "b"
    done, _ = go(tmp_path, recipe(tmp_path, names=("qualify", "label")))
    assert done["label"].summary["pool"] == "b", "a did not qualify"


def test_two_runs_in_one_folder(tmp_path: Path, fakes: dict[str, FakeStage]) -> None:
    (tmp_path / "run").mkdir()
    with runner.locked(tmp_path / "run"), pytest.raises(Busy, match="another process is at work"):
        go(tmp_path, recipe(tmp_path))
    go(tmp_path, recipe(tmp_path))
