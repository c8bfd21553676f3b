"""The report is a fold of a run's folder: tested on made-up runs whose every number is known."""

from __future__ import annotations

import fcntl
import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ottava import artifact
from ottava.console import charts, report, words
from ottava.console.history import Point, history
from ottava.errors import ArtifactError, OttavaError

DIGEST = "d" * 64
HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)>\x1b[31m{{ 7*7 }}'
ORDER = ("plan", "qualify", "label", "train", "convert", "verify", "serve")
SECONDS = {"plan": 4.0, "qualify": 6.5, "label": 3.0, "train": 96.0, "convert": 2.0, "verify": 8.0, "serve": 9.0}
STEPS, FAULT, GRID = 900, 560, 765


def entry(correct: int, n: int) -> dict[str, Any]:
    value = correct / n
    half = 1.96 * math.sqrt(value * (1 - value) / n)
    by_steps = {str(s): {"n": n // 5, "correct": correct // 5} for s in range(2, 7)}
    return {
        "n": n, "correct": correct, "value": value, "low": value - half, "high": value + half, "by_steps": by_steps,
        "digest": "e" * 64,
    }  # fmt: skip


ACCURACY = {"thinking": entry(555, 600), "direct": entry(126, 600), "direct_one_step": entry(56, 60)}
FALLBACK = {
    "from": "ascend", "to": "nvidia", "at_step": FAULT, "lost_steps": 0, "seconds_without_a_step": 2.61,
    "before": "1a" * 32, "after": ["1a" * 32], "handoff_identical": True, "replay_identical": True,
    "drift": 3.1e-6, "envelope": 8.4e-6, "inside": True, "window": 24, "replicas": [4e-6, 5e-6, 3e-6, 4e-6, 6e-6],
    "one_worker_identical": True,
}  # fmt: skip


class Made:
    """A run's folder, built stage by stage. clock: seconds; each stage is journaled as the runner does."""

    def __init__(self, folder: Path, stages: tuple[str, ...] = ORDER, digest: str = DIGEST):
        self.folder, self.clock, self.files = folder, 1000.0, dict(FILES)
        (folder / "artifacts").mkdir(parents=True)
        pools = [
            {"name": n, "platform": "cpu", "workers": 2, "stands_for": c}
            for n, c in (("ascend", "Ascend 910B"), ("nvidia", "H800"))
        ]
        self.asked: dict[str, Any] = {
            "name": "tiny", "description": "a served, proven checkpoint", "seed": 7, "digest": digest,
            "fleet": {"name": "laptop", "pools": pools},
            "stages": {n: {"budget_s": 60.0, "steps": STEPS} for n in stages},
        }  # fmt: skip
        self.start()

    def start(self) -> None:
        (self.folder / "run.json").write_text(json.dumps(self.asked))
        self.event("run.start", recipe="tiny", digest=self.asked["digest"], stages=list(self.asked["stages"]))

    def event(self, name: str, /, **fields: Any) -> None:
        with (self.folder / "journal.jsonl").open("a") as file:
            file.write(json.dumps({"t": round(self.clock, 4), "event": name, **fields}) + "\n")

    def begin(self, stage: str, key: str = "a" * 64, **more: str) -> None:
        pool = "ascend" if stage in ("train", "serve") else "nvidia"
        self.event("stage.start", stage=stage, pool=pool, key=key, **more)

    def done(self, stage: str, seconds: float | None = None, key: str = "a" * 64) -> None:
        taken = SECONDS[stage] if seconds is None else seconds
        self.clock += taken
        name = f"{stage}-{key[:12]}"
        self.event("stage.done", stage=stage, seconds=taken, artifact=name)

    def stage(self, stage: str, summary: Mapping[str, Any] | None = None, verdict: bool | None = None) -> None:
        self.begin(stage)
        if stage == "train":
            self.train_events(STEPS)
            self.clock -= 80
        self.commit(stage, SUMMARIES[stage] if summary is None else summary, verdict)
        self.done(stage)

    def commit(self, stage: str, summary: Mapping[str, Any], verdict: bool | None = None, key: str = "a" * 64) -> None:
        scratch = self.folder / "scratch"
        scratch.mkdir()
        for name, content in self.files.get(stage, {}).items():
            path = scratch / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        meta = {"stage": stage, "key": key, "version": "1", "inputs": {}, "spec": {}}
        artifact.commit(
            scratch, self.folder / "artifacts" / f"{stage}-{key[:12]}", **meta, summary=dict(summary), verdict=verdict
        )

    def train_events(self, until: int, phase: str = "main") -> None:
        self.event("train.begin")
        for step in range(1, until + 1):
            pool = "ascend" if step <= FAULT else "nvidia"
            if step in (1, FAULT + 1):
                where = {"phase": phase, "pool": pool, "attempt": 0}
                self.event("train.join", **where, rank=0, numerics_class=pool * 2, step=step - 1, digest="1a" * 32)
            self.clock += 80 / STEPS
            direct = {"direct_loss": round(2.4 * math.exp(-step / 900), 6)} if step > 270 else {}
            wave = 1 + 0.4 * math.sin(step * 12.9898)
            loss = round(2.5 * math.exp(-step / 150) * wave + 0.004, 6)
            fields = {"loss": loss, **direct, "on_grid": step >= GRID, "seconds": 0.09}
            self.event("train.step", phase=phase, pool=pool, step=step, **fields)
            if step == FAULT:
                self.event("train.injected", pool="ascend", kind="sigkill", rank=1, step=step)
                self.event("train.fault", phase=phase, pool="ascend", kind="killed", step=step, message="status -9")
                self.event("train.fallback", phase=phase, source="ascend", target="nvidia", at_step=FAULT, lost_steps=0,
                           digest="1a" * 32)  # fmt: skip


def describe(isa: str) -> dict[str, Any]:
    return {"chip": "Xeon", "instruction_set": isa, "python": "3.11.2", "libraries": {"torch": "2.13.0"}}


PLAN_ROWS: list[dict[str, Any]] = [
    {
        "name": name, "pool": "ascend" if name in ("train", "serve") else "nvidia", "fallback": [], "start_s": 10.0 * n,
        "end_s": 10.0 * n + SECONDS[name] * 1.1, "seconds": SECONDS[name] * 1.1, "low": SECONDS[name] * 0.8,
        "high": SECONDS[name] * 1.5, "usd": 0.0021, "reason": "a rule says so", "basis": "its budget",
    }
    for n, name in enumerate(ORDER[1:])
]  # fmt: skip
LEAST = {"low": 1e-6, "mid": None, "high": None}
REFERENCE = {
    "fleet": "reference",
    "works": {
        "train": {"parameters": 6e5, "tokens": 2e6, "flops": 1e13},
        "at_scale": {"parameters": 8e9, "tokens": 1.6e11, "flops": 1e22},
    },
    "pools": [
        {
            "pool": "ascend",
            "chip": "910B3",
            "workers": 64,
            "train": {"hours": LEAST, "usd": LEAST, "claim": "lower bound only"},
            "at_scale": {
                "hours": {"low": 90, "mid": 150, "high": 260},
                "usd": {"low": 4000, "mid": 9000, "high": 25000},
                "claim": "interval",
            },
        }
    ],
    "method": "extrapolation from published training runs",
    "not_priced": "every stage but training",
}
PLAN = {"stages": PLAN_ROWS, "makespan_s": 140.0, "usd": 0.01, "unavailable": {}, "reference": REFERENCE}
QUALIFIED = {
    "pools": {n: {"passed": True, "numerics_class": c * 12} for n, c in (("ascend", "b"), ("nvidia", "c"))},
    "passed": ["ascend", "nvidia"], "classes_differ": True, "reasons": [],
}  # fmt: skip
LAYOUTS = {"master": "7c" * 32, "mxfp8": "7c" * 32, "bf16": "7c" * 32}
EXAMPLE = {
    "question": "7 a +5 b *3 c -4 =",
    "thinking": {"reasoning": "7 a +5 2 b *3 6 c -4 2", "content": "2"},
    "direct": {"content": "8"},
}
SUMMARIES: dict[str, dict[str, Any]] = {
    "plan": {"makespan_s": 140.0},
    "qualify": QUALIFIED,
    "label": {
        "cold_start": 200, "answers": 8000, "test": 600, "test_one_step": 60, "audited": 100, "errors": 0,
        "error_upper_95": 0.029513, "annotator": "oracle standing in for a person",
        "teachers": "programs standing in for models", "rejected": {"wrong answer": 31, "no agreement": 12},
        "duplicates_removed": 5, "contaminated_removed": 9, "disjoint": True,
    },
    "train": {"steps": STEPS, "parameters": 123456, "pool": "nvidia", "accuracy": ACCURACY, "fallback": FALLBACK,
              "replay_identical": True, "on_grid_from_step": GRID, "state_digest": "2b" * 32},
    "convert": {"digest": "7c" * 32, "on_grid": True, "label": "on-grid", "sqnr_db": None, "bytes": 210_000},
    "verify": {"digest": "7c" * 32, "layouts": LAYOUTS, "digest_equal": True, "on_grid": True, "label": "on-grid",
               "accuracy": ACCURACY, "answers_identical": True, "weights_identical": True, "divergence": None},
    "serve": {"model_dir": "gone", "example": EXAMPLE, "thinking_ok": True, "direct_ok": True, "streamed": True,
              "drained": True, "correct": {"thinking": True, "direct": False}},
}  # fmt: skip
FILES: dict[str, dict[str, Any]] = {
    "plan": {"plan.json": PLAN},
    "qualify": {
        "qualification.json": {
            "pools": {"ascend": {"describe": describe("AVX2")}, "nvidia": {"describe": describe("AVX512")}}
        }
    },
    "label": {
        "certificate.json": {"population": 200, "sampling": "uniform", "bound": "Clopper-Pearson", "max_error": 0.1}
    },
    "train": {
        "evaluation.json": {**ACCURACY, "pools": {"ascend": ACCURACY, "nvidia": ACCURACY}},
        "proof.json": {"segments": [], "final": "2b" * 32, "replay": "2b" * 32, "replay_identical": True,
                       "classes": {"ascend": "b1" * 32, "nvidia": "c2" * 32}, "fallback": FALLBACK},
    },
    "convert": {"model/config.json": {}},
}  # fmt: skip


@pytest.fixture
def whole(tmp_path: Path) -> Made:
    made = Made(tmp_path / "run")
    for stage in ORDER:
        made.stage(stage)
    made.event("run.end")
    return made


def by_name(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {stage["name"]: stage for stage in content["stages"]}


def claims(content: Mapping[str, Any], part: str) -> list[dict[str, Any]]:
    return [row for row in content["evidence"] if part in row["claim"]]


# --- the object --------------------------------------------------------------------------------------------------


def test_a_whole_run_gives_every_key_that_was_promised(whole: Made) -> None:
    content = report.build(whole.folder)
    assert content["status"] == "done"
    assert [(s["name"], s["status"], s["seconds"]) for s in content["stages"]] == [
        (n, "done", SECONDS[n]) for n in ORDER
    ]
    assert by_name(content)["train"]["pool"] == "ascend"
    for mode, found in ACCURACY.items():
        assert {k: content["accuracy"][mode][k] for k in ("value", "n", "low", "high")} == {
            k: found[k] for k in ("value", "n", "low", "high")
        }
    assert content["fallback"] == FALLBACK
    fp8 = content["fp8"]
    assert (fp8["digest"], fp8["digest_equal"], fp8["on_grid"], fp8["label"]) == ("7c" * 32, True, True, "on-grid")
    assert fp8["accuracy"]["value"] == ACCURACY["thinking"]["value"]
    assert (content["labels"]["audited"], content["labels"]["error_upper_95"]) == (100, 0.029513)
    assert content["serve"]["example"] == EXAMPLE
    assert [content["serve"][k] for k in ("thinking_ok", "direct_ok", "streamed", "drained")] == [True] * 4
    assert content["versions"]["torch"] == "2.13.0"
    assert content["peak_memory_mb"] is None
    assert content["recipe"] == "tiny"
    assert content["seed"] == 7


def test_the_served_folder_is_absolute_and_exists_wherever_the_run_was_moved(whole: Made, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    whole.folder.rename(moved)
    folder = Path(report.build(moved)["serve"]["model_dir"])
    assert folder.is_absolute()
    assert folder == moved / "artifacts" / f"convert-{'a' * 12}" / "model"
    assert folder.is_dir()


def test_the_files_hold_what_json_prints_and_nothing_half_written(whole: Made) -> None:
    report.write(whole.folder)
    assert (whole.folder / "report.json").read_text() == json.dumps(report.build(whole.folder)) + "\n"
    assert not list(whole.folder.glob("*.part"))
    before = (whole.folder / "report.json").read_bytes(), (whole.folder / "report.html").read_bytes()
    report.write(whole.folder)
    assert before == ((whole.folder / "report.json").read_bytes(), (whole.folder / "report.html").read_bytes())


def test_the_command_prints_the_file(whole: Made) -> None:
    report.write(whole.folder)
    command = [sys.executable, "-m", "ottava.cli", "report", str(whole.folder)]
    said = subprocess.run([*command, "--json"], check=True, capture_output=True, timeout=300).stdout
    assert said == (whole.folder / "report.json").read_bytes()
    said = subprocess.run(command, check=True, capture_output=True, timeout=300).stdout
    assert said.decode().startswith(report.text(report.build(whole.folder)))


def test_json_has_no_infinity(tmp_path: Path) -> None:
    made = Made(tmp_path / "run", ("train",))
    made.stage("train", {**SUMMARIES["train"], "fallback": {**FALLBACK, "envelope": math.inf, "drift": math.nan}})
    content = report.build(made.folder)
    assert (content["fallback"]["envelope"], content["fallback"]["drift"]) == (None, None)
    json.dumps(content, allow_nan=False)


def test_planned_is_set_against_actual(whole: Made) -> None:
    rows = {row["stage"]: row for row in report.build(whole.folder)["plan"]["rows"]}
    assert list(rows) == list(ORDER[1:])
    assert (rows["train"]["planned_s"], rows["train"]["actual_s"]) == (pytest.approx(105.6), 96.0)
    assert rows["train"]["inside"] is True


@pytest.mark.parametrize("stage", ["verify", "convert", "label"])
def test_a_stage_that_is_not_in_the_recipe_gives_null(tmp_path: Path, stage: str) -> None:
    stages = tuple(name for name in ORDER if name != stage)
    made = Made(tmp_path / "run", stages)
    for name in stages:
        made.stage(name)
    content = report.build(made.folder)
    assert stage not in by_name(content)
    assert content[{"verify": "qualify", "convert": "fp8", "label": "labels"}[stage]] == (
        content["qualify"] if stage == "verify" else None
    )
    if stage == "verify":
        assert content["fp8"]["digest_equal"] is None
        assert content["fp8"]["accuracy"] is None
    assert report.text(content)
    report.write(made.folder)


@pytest.mark.parametrize("count", range(len(ORDER) + 1))
def test_a_run_can_be_told_after_every_stage(tmp_path: Path, count: int) -> None:
    made = Made(tmp_path / "run")
    for stage in ORDER[:count]:
        made.stage(stage)
    content = report.build(made.folder)
    assert content["status"] == ("done" if count == len(ORDER) else "unfinished")
    for key, stage in {
        "accuracy": "train",
        "fp8": "convert",
        "labels": "label",
        "serve": "serve",
        "plan": "plan",
    }.items():
        assert (content[key] is None) == (ORDER.index(stage) >= count), key
    assert report.text(content)
    report.write(made.folder)


# --- at any moment -----------------------------------------------------------------------------------------------


def test_a_killed_run_is_interrupted_and_a_living_one_runs(tmp_path: Path) -> None:
    made = Made(tmp_path / "run")
    made.stage("plan")
    made.begin("train")
    made.train_events(600)
    with (made.folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        living = report.build(made.folder)
    killed = report.build(made.folder)
    assert living["status"] == "running"
    assert killed["status"] == "interrupted"
    for content in (living, killed):
        train = by_name(content)["train"]
        assert train["seconds"] == pytest.approx(600 * 80 / STEPS, abs=0.01)
        assert content["fallback"]["at_step"] == FAULT
        assert content["fallback"]["handoff_identical"] is None
        assert content["training"]["steps"] == 600
        assert content["accuracy"] is None
    assert "The run is at train" in living["verdict"][0]
    assert "interrupted" in killed["verdict"][0]
    report.write(made.folder)


def test_looking_does_not_hold_the_lock(whole: Made) -> None:
    (whole.folder / "lock").touch()
    report.build(whole.folder)
    with (whole.folder / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_failed_stage_is_named_with_its_message(tmp_path: Path) -> None:
    made = Made(tmp_path / "run")
    made.begin("plan")
    made.clock += 2
    made.event("stage.failed", stage="plan", seconds=2.0, message="no pool can be used")
    content = report.build(made.folder)
    assert content["status"] == "failed"
    assert by_name(content)["plan"]["seconds"] == 2.0
    assert "no pool can be used" in content["verdict"][0]


def test_a_stage_that_says_no_is_the_verdict(tmp_path: Path) -> None:
    made = Made(tmp_path / "run", ("convert", "verify"))
    made.stage("convert")
    made.stage("verify", {**SUMMARIES["verify"], "digest_equal": False, "reason": "the layouts differ"}, verdict=False)
    content = report.build(made.folder)
    assert content["status"] == "refused"
    assert "the layouts differ" in content["verdict"][0]
    assert [row["holds"] for row in claims(content, "hold the same values")] == [False]
    assert "DOES NOT HOLD" in report.text(content)
    report.write(made.folder)
    assert "does not hold" in (made.folder / "report.html").read_text()


def test_what_was_altered_is_not_reported(whole: Made) -> None:
    path = whole.folder / "artifacts" / f"verify-{'a' * 12}" / "manifest.json"
    (path.parent / "extra").write_text("")
    manifest = json.loads(path.read_text())
    manifest["files"]["extra"] = {"sha256": "0" * 64, "bytes": 0}
    path.write_text(json.dumps(manifest))
    content = report.build(whole.folder)
    assert by_name(content)["verify"]["status"] == "altered"
    assert content["fp8"]["digest_equal"] is None
    assert content["status"] == "altered"


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "torn", "other"])
def test_a_folder_that_is_no_run_is_named(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "run"
    if kind == "file":
        folder.write_text("")
    elif kind != "missing":
        folder.mkdir()
    if kind in ("torn", "other"):
        (folder / "run.json").write_text('{"name": ' if kind == "torn" else "[]")
    with pytest.raises(OttavaError) as caught:
        report.build(folder)
    assert str(folder) in caught.value.render()
    assert caught.value.fix
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("stages", [["x"], "x", None])
def test_records_of_another_shape_are_an_error_that_names_the_file(tmp_path: Path, stages: Any) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"digest": "a", "stages": stages}))
    with pytest.raises(ArtifactError, match="records cannot be read") as caught:
        report.build(tmp_path)
    assert caught.value.where == str(tmp_path / "run.json")
    (tmp_path / "run.json").write_text(json.dumps({"digest": "a", "stages": {"x": []}}))
    with pytest.raises(ArtifactError, match="records cannot be read"):
        report.build(tmp_path)
    with pytest.raises(ArtifactError, match="records cannot be read"):
        report.write(tmp_path)


@pytest.mark.parametrize(
    "line",
    ["{}", "3", '{"t":1,"event":"stage.done"}', '{"t":1,"event":5}', '{"event":"stage.done","stage":"plan"}',
     '{"t":1,"event":"run.start"}', '{"t":1,"event":"stage.start","stage":"plan"}', '{"t":1,"event":"train.step"}',
     '{"t":1,"event":"stage.progress","stage":"plan","fraction":"x"}', '{"t":1,"event":"train.fallback"}'],
)  # fmt: skip
def test_one_bad_event_does_not_spoil_the_rest(whole: Made, line: str) -> None:
    before = report.build(whole.folder)
    with (whole.folder / "journal.jsonl").open("a") as file:
        file.write(line + "\n")
    assert report.build(whole.folder) == before


# --- the journal -------------------------------------------------------------------------------------------------


def test_seconds_of_every_attempt_count_even_of_killed_ones(tmp_path: Path) -> None:
    made = Made(tmp_path / "run", ("plan",))
    made.begin("plan")
    made.clock += 5
    made.event("stage.progress", stage="plan", fraction=0.5)
    made.clock += 1000  # killed; taken up again much later
    made.start()
    made.begin("plan")
    made.commit("plan", SUMMARIES["plan"])
    made.done("plan", 3.0)
    assert by_name(report.build(made.folder))["plan"]["seconds"] == 8.0


def test_a_run_that_went_on_under_other_care_is_told_whole(tmp_path: Path) -> None:
    """Two attempts at one piece of work, under two keys; work of a key that was done before is another piece."""
    made = Made(tmp_path / "run", ("train",))
    for key, first, last in (("c" * 64, 1, 30), ("b" * 64, 1, 20), ("a" * 64, 21, 40)):
        made.begin("train", key=key, work="w")
        if first == 1:
            made.event("train.begin")
        for step in range(first, last + 1):
            made.clock += 1
            made.event("train.step", phase="main", pool="ascend", step=step, loss=1.0)
        if key[0] == "c":
            made.done("train", 30.0, key=key)
    found = report.build(made.folder)
    assert found["training"]["steps"] == 40
    assert by_name(found)["train"]["seconds"] == 40.0, "both attempts, and not the one that was done"


def test_events_of_another_recipe_in_the_same_folder_do_not_count(tmp_path: Path) -> None:
    made = Made(tmp_path / "run", ("plan", "train"))
    made.stage("plan")
    made.stage("train")
    made.asked["digest"] = "f" * 64
    made.start()
    changed = report.build(made.folder)
    assert [s["status"] for s in changed["stages"]] == ["waiting", "waiting"]
    assert changed["accuracy"] is None
    assert changed["training"]["steps"] == 0
    made.event("stage.cached", stage="plan", pool="nvidia", artifact=f"plan-{'a' * 12}", seconds=0.0)
    made.begin("train", key="b" * 64)
    made.train_events(20)
    again = report.build(made.folder)
    assert next((s["status"], s["seconds"]) for s in again["stages"]) == ("done", SECONDS["plan"])
    assert again["training"]["steps"] == 20
    made.asked["digest"] = DIGEST
    made.start()
    assert report.build(made.folder)["status"] == "done"
    for stage in ("plan", "train"):
        made.event("stage.cached", stage=stage, pool="nvidia", artifact=f"{stage}-{'a' * 12}", seconds=0.0)
    back = report.build(made.folder)
    assert back["status"] == "done"
    assert back["training"]["steps"] == STEPS
    assert [s["seconds"] for s in back["stages"]] == [SECONDS["plan"], SECONDS["train"]]


def test_the_replay_is_not_the_run(tmp_path: Path) -> None:
    made = Made(tmp_path / "run", ("train",))
    made.begin("train")
    made.train_events(10)
    with (made.folder / "journal.jsonl").open("a") as file:
        step = {"t": made.clock, "event": "train.step", "phase": "replay", "pool": "ascend", "step": 5, "loss": 99.0}
        file.write(json.dumps(step) + "\n" + '{"torn')
    events = [json.loads(line) for line in (made.folder / "journal.jsonl").read_text().splitlines()[:-1]]
    told = history(events, DIGEST, False)
    assert len(told.curve) == 10
    assert max(point.loss for point in told.curve) < 99
    assert {bar.what for bar in told.bars} == {"", "main", "replay"}


def test_peak_memory_is_the_largest_that_was_journaled(whole: Made) -> None:
    whole.event("run.end", peak_memory_mb=900.0)
    whole.event("run.end", peak_memory_mb=1234.5)
    assert report.build(whole.folder)["peak_memory_mb"] == 1234.5


# --- claims ------------------------------------------------------------------------------------------------------


def test_evidence_has_a_level_and_rehearsals_are_never_proven(whole: Made) -> None:
    rows = report.build(whole.folder)["evidence"]
    assert {row["level"] for row in rows} == {"proven", "measured", "rehearsal", "extrapolated"}
    assert all(row["claim"] and row["how"] for row in rows)
    stand_ins = [row for row in rows if "stands for" in row["claim"]]
    assert len(stand_ins) == 2
    assert all(row["level"] == "rehearsal" and "L0 to L4: none" in row["how"] for row in stand_ins)
    assert all(row["level"] != "proven" for row in rows if "Ascend" in row["claim"])
    assert [row["level"] for row in rows if "traces are wrong" in row["claim"]] == ["rehearsal"]


def test_the_replay_can_be_looked_at_again(whole: Made) -> None:
    (row,) = claims(report.build(whole.folder), "Without the fault")
    said = subprocess.run(row["check"], shell=True, check=True, capture_output=True, text=True, cwd=whole.folder).stdout
    assert said.split() == ["2b" * 32, "2b" * 32]


def test_the_audit_speaks_of_the_traces_it_judged(whole: Made) -> None:
    (row,) = claims(report.build(whole.folder), "traces are wrong")
    assert row["claim"] == "At most 3.0% of the 200 cold-start traces are wrong (95% confidence)"


FALSE = [
    ("train", {"fallback": {**FALLBACK, "handoff_identical": False}}, "state that arrived"),
    ("train", {"fallback": {**FALLBACK, "inside": False}}, "drifts"),
    ("train", {"fallback": {**FALLBACK, "one_worker_identical": False}}, "One worker"),
    ("train", {"fallback": {**FALLBACK, "lost_steps": 3}}, "No step was lost"),
    (
        "train",
        {"proof.json": {"final": "2b" * 32, "replay": "3c" * 32, "replay_identical": False}},
        "Without the fault",
    ),
    ("verify", {"digest_equal": False}, "hold the same values"),
    ("verify", {"weights_identical": False}, "values that were trained"),
    ("verify", {"answers_identical": False}, "token by token"),
    *(("serve", {name: False}, "The server") for name in ("thinking_ok", "direct_ok", "streamed", "drained")),
    ("label", {"disjoint": False}, "No test problem"),
    ("label", {"error_upper_95": 0.11}, "traces are wrong"),
    ("qualify", {"passed": ["nvidia"]}, "Every pool"),
]


@pytest.mark.parametrize(("stage", "change", "part"), FALSE, ids=lambda value: value if isinstance(value, str) else "")
def test_a_claim_that_does_not_hold_says_so_and_it_alone(
    tmp_path: Path, stage: str, change: dict[str, Any], part: str
) -> None:
    made = Made(tmp_path / "run")
    made.files[stage] = {**FILES.get(stage, {}), **{k: v for k, v in change.items() if k.endswith(".json")}}
    for name in ORDER:
        made.stage(name, {**SUMMARIES[name], **(change if name == stage else {})})
    content = report.build(made.folder)
    falsified = [row["claim"] for row in content["evidence"] if row["holds"] is False]
    assert len(falsified) == 1
    assert part in falsified[0]
    assert f"DOES NOT HOLD: {falsified[0]}"[:60] in " ".join(report.text(content).split())
    assert f"✕ does not hold: {falsified[0]}" in " ".join(page(made).text.split())


def test_a_rounded_model_is_not_said_to_be_exact(tmp_path: Path) -> None:
    made = Made(tmp_path / "run", ("convert", "verify", "serve"))
    divergence = {"positions": 2048, "windows": 16, "kl": 0.0123, "top1": 0.95, "top1_low": 0.94, "top1_high": 0.96}
    made.stage("convert", {**SUMMARIES["convert"], "on_grid": False, "label": "rounded", "sqnr_db": 31.4})
    left = {"accuracy": None, "answers_identical": None, "on_grid": False, "label": "rounded", "divergence": divergence}
    made.stage("verify", {k: v for k, v in SUMMARIES["verify"].items() if k != "weights_identical"} | left)
    made.stage("serve", {**SUMMARIES["serve"], "thinking_ok": None, "correct": {"thinking": None, "direct": None},
                         "example": {"question": "Who?", "thinking": None, "direct": {"content": "I."}}})  # fmt: skip
    content = report.build(made.folder)
    assert not claims(content, "changed no weight")
    assert "95.0% (95%: 94.0% to 96.0%) of 2,048 positions" in claims(content, "rounded the weights")[0]["how"]
    assert "rounded" in " ".join(content["verdict"])
    assert "bit for bit" not in " ".join(content["verdict"])
    assert "KL 0.0123" in report.text(content)
    report.write(made.folder)


# --- words -------------------------------------------------------------------------------------------------------


def test_the_text_fits_a_terminal_and_says_it_all(whole: Made) -> None:
    said = report.text(report.build(whole.folder))
    assert max(map(len, said.splitlines())) <= 80
    for part in ("92.5%", "n 600", "0 steps lost", "1a1a1a1a1a1a", "3.0%", "stands for H800", "7 a +5 b *3 c -4 ="):
        assert part in said
    assert "DOES NOT HOLD" not in said


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.0, "0 s"), (0.314, "0.31 s"), (3.14159, "3.1 s"), (9.996, "10 s"), (59.6, "60 s"), (125, "2 min 05 s"),
     (3599.9, "1 h 00 min"), (7450, "2 h 04 min"), (None, "unknown")],
)  # fmt: skip
def test_durations(value: float | None, said: str) -> None:
    assert words.seconds(value) == said


def test_small_numbers() -> None:
    assert [words.scientific(v) for v in (0.0, 3.14e-6, 0.0123, 8.4e-12, None)] == [
        "0",
        "3.1e-6",
        "0.0123",
        "8.4e-12",
        "unknown",
    ]
    assert [words.plural(n, "step") for n in (0, 1, 1200)] == ["0 steps", "1 step", "1,200 steps"]
    assert [words.listed(list(x)) for x in ("", "a", "ab", "abc")] == ["", "a", "a and b", "a, b and c"]


# --- charts ------------------------------------------------------------------------------------------------------


def points(count: int, border: int) -> list[Point]:
    return [Point(s, 2.0 / s, None, "a" if s <= border else "b", s > count - 3) for s in range(1, count + 1)]


@given(st.integers(1, 400), st.integers(0, 400), st.integers(1, 60))
def test_bins_keep_every_step_and_never_mix_pools(count: int, border: int, wanted: int) -> None:
    made = points(count, border)
    found = charts.bins(made, wanted)
    assert [s for b in found for s in range(b.first, b.last + 1)] == list(range(1, count + 1))
    assert len(found) <= wanted + 1
    for one in found:
        inside = [p for p in made if one.first <= p.step <= one.last]
        assert {p.pool for p in inside} == {one.pool}
        assert one.low == min(p.loss for p in inside)
        assert one.low <= one.mean * (1 + 1e-12)
        assert one.mean <= one.high * (1 + 1e-12)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 10))
def test_ticks_are_round_and_inside(low: float, span: float, count: int) -> None:
    found = charts.ticks(low, low + span, count)
    assert 0.6 * count - 1 <= len(found) <= 1.6 * count + 1
    slack = 1e-6 * (abs(low) + span)
    assert all(low - slack <= value <= low + span + slack for value in found)


@given(st.floats(1e-9, 1e3), st.floats(1.5, 1e9))
def test_log_ticks_are_inside(low: float, ratio: float) -> None:
    found = charts.log_ticks(low, low * ratio)
    assert all(low * 0.998 <= value <= low * ratio * 1.002 for value in found)
    assert found == sorted(found)


def test_a_scale_maps_its_ends_and_holds_what_is_outside() -> None:
    x, y = charts.linear(1, 900, 50, 950), charts.logarithmic(1e-3, 10, 300, 20)
    assert (x(1), x(900)) == (50, 950)
    assert (y(1e-3), y(10), y(0.1), y(1e-9), y(1e9)) == pytest.approx((300, 20, 160, 300, 20))


def test_markup_is_escaped() -> None:
    assert charts.tag("text", '<b>&"', title='"><i>') == '<text title="&#34;&gt;&lt;i&gt;">&lt;b&gt;&amp;&#34;</text>'
    assert charts.tag("g", charts.tag("br")) == "<g><br></br></g>"


# --- the page ----------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Collects the page's elements and text, and checks that they close in order."""

    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attributes)))
        if name not in self.VOID:
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name, f"</{name}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        self.text += data


def page(made: Made) -> Reader:
    report.write(made.folder)
    reader = Reader()
    reader.feed((made.folder / "report.html").read_text())
    assert reader.open == []
    return reader


def test_the_page_needs_nothing_else_and_has_it_all(whole: Made) -> None:
    reader = page(whole)
    for name, attributes in reader.elements:
        assert name not in ("script", "link", "iframe", "img")
        for key, value in attributes.items():
            assert not key.startswith("on")
            assert not re.match(r"\s*(https?:)?//", value or ""), (name, key, value)
    said = " ".join(reader.text.split())
    for heading in (
        "Training", "What is shown, and how", "Accuracy", "Digests", "Planned and actual", "A served answer",
        "Certificate of the labels", "What is real, and what is a rehearsal",
    ):  # fmt: skip
        assert heading in said
    for part in ("ascend lost at step 560", "0 steps lost", "2.6 s without a step", "the FP8 grid", "training step",
                 "loss, nats per token", "92.5%", "n 600",
                 "7 a +5 2 b *3 6 c -4 2", "stands for Ascend 910B", "lower bound only", "1a" * 32):  # fmt: skip
        assert part in said, part
    assert all(a.get("aria-label") for name, a in reader.elements if name == "svg" and "aria-hidden" not in a)
    assert sum(name == "h1" for name, _ in reader.elements) == 1
    css = (whole.folder / "report.html").read_text().partition("<style>")[2].partition("</style>")[0]
    assert "url(http" not in css
    assert "@import" not in css


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    made = Made(tmp_path / "run", ("label", "train", "serve"))
    made.asked["description"] = HOSTILE
    made.start()
    made.stage("label", {**SUMMARIES["label"], "annotator": HOSTILE})
    made.stage("train")
    example = {
        "question": HOSTILE,
        "thinking": {"reasoning": HOSTILE, "content": HOSTILE},
        "direct": {"content": HOSTILE},
    }
    made.stage("serve", {**SUMMARIES["serve"], "example": example})
    reader = page(made)
    assert {"script", "img"}.isdisjoint(name for name, _ in reader.elements)
    assert reader.text.count('<script>alert("x")</script>') >= 6
    assert "{{ 7*7 }}" in reader.text
    assert "\x1b" not in report.text(report.build(made.folder))


def test_the_page_loads_no_torch(whole: Made) -> None:
    code = (
        "import sys; from pathlib import Path; from ottava.console import report\n"
        f"report.write(Path({str(whole.folder)!r})); report.text(report.build(Path({str(whole.folder)!r})))\n"
        "assert not {'torch', 'transformers', 'ray', 'scipy', 'numpy'} & set(sys.modules), 'slow imports'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def contrast(a: str, b: str) -> float:
    """The contrast ratio of two colours (WCAG 2.2)."""

    def luminance(colour: str) -> float:
        full = colour.lstrip("#")
        full = "".join(c * 2 for c in full) if len(full) == 3 else full
        parts = [int(full[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_text_can_be_read_in_light_and_dark() -> None:
    css = (Path(report.__file__).parent / "templates" / "report.css").read_text()
    themes = [
        dict(re.findall(r"--(\w[\w-]*): (#[0-9a-f]+)", block)) for block in re.findall(r":root \{(.*?)\}", css, re.S)
    ]
    assert len(themes) == 3
    assert contrast("#fff", "#000") == pytest.approx(21)
    for theme in themes:
        for colour in ("ink", "soft", "yes", "no", "warn", "p0", "p1", "p2", "p3"):
            for ground in ("paper", "card"):
                assert contrast(theme[colour], theme[ground]) >= 4.5, (colour, ground, theme)
        for pool in ("p0", "p1", "p2", "p3"):
            assert contrast(theme["on-pool"], theme[pool]) >= 4.5, (pool, theme)
