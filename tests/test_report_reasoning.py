"""What a report tells of reinforcement, students and algorithms: made-up runs whose every number is known."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from ottava import stages as house
from ottava.console import dots, reasoning, report, source, students, terminal, words
from ottava.console.charts import Move
from ottava.console.history import Generation, generations
from ottava.errors import ArtifactError
from ottava.tasks.statistics import paired, wilson
from tests.test_report import ACCURACY, FALLBACK, FILES, HOSTILE, SECONDS, SUMMARIES, Made, claims, entry, page

STAGES = ("qualify", "label", "train", "reinforce", "distill", "convert", "verify")
N, EVERY, GENERATIONS = 600, 2, 40
WRONG_BEFORE, WRONG_AFTER = range(50), range(599, 600)  # 50 wrong before; all of them are right after, and one is not
GAPS = {"reinforce": 6.2e-6, "reinforce-replay": 0.5}
TOLD: dict[str, float] = {}  # more that every step tells


def evaluated(wrong: range) -> dict[str, Any]:
    right = [int(number not in wrong) for number in range(N)]
    direct = {**entry(60, N), "right": [int(number < 60) for number in range(N)]}
    return {"thinking": {**entry(sum(right), N), "right": right}, "direct": direct}


BEFORE, AFTER = evaluated(WRONG_BEFORE), evaluated(WRONG_AFTER)
FOUND = paired(BEFORE["thinking"]["right"], AFTER["thinking"]["right"])
GAIN = {"mode": "thinking", "before": 550 / N, "after": 599 / N, "low": FOUND.low, "high": FOUND.high, "n": N}
TEACHER = 599 / N


def student(name: str, right: int, control: int, low: float, high: float, params: int) -> dict[str, Any]:
    arch = "LlamaForCausalLM" if "llama" in name else "Qwen3ForCausalLM"
    return {
        "name": name, "arch": arch, "stands_for": f"R1-{name}", "params": params, "pool": "ascend",
        "thinking": right / N, "control": control / N, "low": low, "high": high,
        "kept": round(right / N / TEACHER, 4), "n": N, "direct": 0.1, "control_direct": 0.1,
    }  # fmt: skip


STUDENTS = [
    student("qwen-xs", 470, 480, -0.03, -0.002, 27584),
    student("qwen-s", 587, 360, 0.34, 0.42, 55200),  # 97.997% of the teacher: 0.98 in four digits, and not 98%
    student("llama-m", 588, 588, -0.02, 0.02, 72408),
    student("llama-l", 599, 420, 0.26, 0.34, 138000),
]
TRACES = {
    "asked": 600,
    "right": 599,
    "checked": 599,
    "steps_right": 407,
    "steps_respelt": 150,
    "steps_right_share": 0.6795,
}
ALGORITHMS = [
    {"name": "grpo", "gain": 0.083, "low": 0.06, "high": 0.106, "seeds": 5, "default": True},
    {"name": "gspo", "gain": -0.004, "low": -0.02, "high": 0.012, "seeds": 5, "default": False},
    {"name": "dapo", "gain": 0.085, "low": 0.05, "high": 0.12, "seeds": 5, "default": False},
]


def beside(cpu_s: float, updates: float, difference: float | None, low: float | None, high: float | None) -> Any:
    means = {"cpu_s": cpu_s, "rows": 6144.0, "updates": updates}
    return {**means, "difference": difference, "difference_low": low, "difference_high": high}


BESIDE = [
    beside(41.0, 48, None, None, None),
    beside(38.5, 48, -0.087, -0.1, -0.07),
    beside(55.0, 30, 0.002, -0.03, 0.03),
]
MORE: dict[str, dict[str, Any]] = {
    "reinforce": {
        "steps": EVERY * GENERATIONS, "pool": "nvidia", "replay_identical": True, "fallback": None,
        "fault_happened": None, "on_grid_from_step": 0, "state_digest": "5e" * 32, "parameters": 137600,
        "accuracy": {**AFTER, "direct_one_step": ACCURACY["direct_one_step"]}, "reinforce": GAIN,
    },
    "distill": {"steps": 60, "teacher": TEACHER, "traces": TRACES, "students": STUDENTS},
    "compare": {
        "algorithms": [{**one, **its} for one, its in zip(ALGORITHMS, BESIDE, strict=True)],
        "baseline": "grpo", "seeds": [1001, 1002], "equal": "rows", "rule": "The default is the baseline, unless.",
        "not_shown": ["dapo"],
    },
}  # fmt: skip
PROOF = {"segments": [], "final": "5e" * 32, "replay": "5e" * 32, "replay_identical": True, "classes": {}}
MORE_FILES: dict[str, dict[str, Any]] = {
    "reinforce": {"before.json": BEFORE, "evaluation.json": {**AFTER, "pools": {"nvidia": AFTER}}, "proof.json": PROOF},
    "distill": {
        "students.json": STUDENTS,
        "traces/cold_start.jsonl": "".join(
            f'{{"steps": "{"right" if n < 407 else "respelt" if n < 557 else "wrong"}"}}\n' for n in range(599)
        ),
    },
}


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in MORE:
        monkeypatch.setitem(SECONDS, name, 50.0)
        monkeypatch.setitem(SUMMARIES, name, MORE[name])
        monkeypatch.setitem(FILES, name, MORE_FILES.get(name, {}))


def generation_events(made: Made, phase: str, count: int = GENERATIONS, pools: tuple[str, ...] = ("nvidia",)) -> None:
    """Two steps a generation; the reward rises from 0.5, and every third group teaches."""
    for number in range(count):
        pool = pools[number * len(pools) // count]
        about = {"generation": number, "reward": 0.5 + 0.4 * number / GENERATIONS, "mixed": 0.333}
        for update in range(EVERY):
            gap = GAPS[phase] if number == 7 else 1e-6
            step = {"step": EVERY * number + update + 1, "loss": -0.001, "gap": 2e-7, "gap_max": gap, **TOLD}
            made.event("train.step", phase=phase, pool=pool, **about, **step)


def walk(made: Made, *stages: str, changed: Mapping[str, Mapping[str, Any]] | None = None) -> Made:
    for name in stages:
        made.begin(name)
        if name == "train":
            made.train_events(20)
        if name == "reinforce":
            made.event("train.begin", phases=list(GAPS))
            for phase in GAPS:
                generation_events(made, phase)
        made.commit(name, {**SUMMARIES[name], **(changed or {}).get(name, {})})
        made.done(name)
    return made


@pytest.fixture
def reasoned(tmp_path: Path) -> Made:
    return walk(Made(tmp_path / "run", STAGES), *STAGES)


# --- the object --------------------------------------------------------------------------------------------------


def test_the_object_has_what_was_promised(reasoned: Made) -> None:
    content = report.build(reasoned.folder)
    found = content["reinforce"]
    assert {key: found[key] for key in GAIN} == GAIN
    assert (found["algorithm"], found["steps"], found["generations"], found["pool"]) == (None, 80, 40, "nvidia")
    assert found["gap_max"] == 6.2e-6, "of the run itself, not of its replay"
    assert found["gap"] == pytest.approx(2e-7)
    assert (found["replay_identical"], found["final_state"], found["fallback"]) == (True, "5e" * 32, None)
    assert (found["modes"]["thinking"]["low"], found["modes"]["thinking"]["high"]) == (FOUND.low, FOUND.high)
    assert found["modes"]["direct"]["low"] < 0 < found["modes"]["direct"]["high"]
    assert [one["name"] for one in content["students"]] == [one["name"] for one in STUDENTS]
    promised = ("name", "arch", "params", "thinking", "control", "low", "high", "kept", "n", "stands_for", "pool")
    more = {"mode": "thinking", "control_mode": "thinking", "start": None, "before": None, "on_policy": None}
    assert content["students"] == [{key: one[key] for key in promised} | more for one in STUDENTS]
    low, high = wilson(407, 599)
    assert content["traces"] == {"teacher": TEACHER, **TRACES, "low": low, "high": high}
    assert content["algorithms"] is None
    assert content["model"] == {"stage": "reinforce", "parameters": 137600, "max_new": None}
    json.dumps(content, allow_nan=False)


@pytest.mark.parametrize("count", range(len(STAGES) + 1))
def test_it_can_be_told_after_every_stage(tmp_path: Path, count: int) -> None:
    made = walk(Made(tmp_path / "run", STAGES), *STAGES[:count])
    content = report.build(made.folder)
    for key, stage in {"reinforce": "reinforce", "students": "distill", "traces": "distill", "model": "train"}.items():
        assert (content[key] is None) == (STAGES.index(stage) >= count), key
    assert report.text(content)
    report.write(made.folder)


def test_reinforcement_that_goes_on_is_drawn_and_not_yet_told(tmp_path: Path) -> None:
    made = walk(Made(tmp_path / "run", ("train", "reinforce")), "train")
    made.begin("reinforce")
    made.event("train.begin", phases=list(GAPS))
    generation_events(made, "reinforce", 12)
    content = report.build(made.folder)
    assert content["reinforce"] is None
    assert content["model"]["stage"] == "train"
    said = page(made).text
    assert "generation of rollouts" in said
    assert "before the first step" not in said


def test_algorithms_come_from_the_stage_that_compares(tmp_path: Path) -> None:
    made = walk(Made(tmp_path / "run", ("compare",)), "compare")
    content = report.build(made.folder)
    assert content["algorithms"] == ALGORITHMS
    assert content["comparison"]["undecided"] == ["dapo"]
    assert [one["cpu_s"] for one in content["comparison"]["algorithms"]] == [41.0, 38.5, 55.0]
    (row,) = claims(content, "algorithms were compared")
    assert row["claim"] == "3 algorithms were compared at equal replies; grpo is the default"
    assert "dapo +8.5 (+5.0 to +12.0, 5 seeds, 55 s of CPU, undecided), grpo +8.3 (+6.0 to +10.6, 5" in row["how"]
    assert "gspo -0.4 (-2.0 to +1.2, 5 seeds, 38 s of CPU, worse)" in row["how"]
    text = report.text(content)
    for said in (
        "grpo        +8.3 points [+6.0, +10.6]  5 seeds  41 s CPU  default",
        "gspo        -0.4 points [-2.0, +1.2]  5 seeds  38 s CPU  worse",
        "dapo        +8.5 points [+5.0, +12.0]  5 seeds  55 s CPU  undecided",
        "At equal replies; a run took 38 s to 55 s of CPU in the mean.",
        "Undecided, as they could not be told from the baseline grpo: dapo.",
    ):
        assert said in text, text
        assert "equal compute" not in text
    for shown in (text, page(made).text):
        assert "The default is the baseline, unless." in shown
        assert "undecided" in shown
        assert "38 s" in shown


# --- the model so far --------------------------------------------------------------------------------------------


def test_the_stages_that_make_a_model_are_known_by_name() -> None:
    makers = tuple(name for name in house.ORDER if getattr(house.load(name), "MODEL", False))
    assert makers == source.MAKERS


def test_accuracy_and_commands_are_of_the_model_so_far(reasoned: Made) -> None:
    content = report.build(reasoned.folder)
    assert content["accuracy"]["thinking"]["correct"] == 599
    assert list(content["accuracy_by_pool"]) == ["nvidia"]
    assert content["training"]["final_state"] == "2b" * 32
    assert content["fallback"] == FALLBACK
    checks = [row["check"] for part in ("changed no weight", "values that were trained", "Thinking, the model solves")
              for row in claims(content, part)]  # fmt: skip
    assert len(checks) == 3
    assert all(f"artifacts/reinforce-{'a' * 12}/model" in check for check in checks)
    assert "Of the model after reinforcement" in page(reasoned).text


def test_without_reinforcement_the_model_is_that_of_training(tmp_path: Path) -> None:
    made = walk(Made(tmp_path / "run", ("train", "convert", "verify")), "train", "convert", "verify")
    content = report.build(made.folder)
    assert content["model"] == {"stage": "train", "parameters": 123456, "max_new": None}
    (row,) = claims(content, "values that were trained")
    assert row["check"] == f"ottava verify artifacts/train-{'a' * 12}/model artifacts/convert-{'a' * 12}/model"
    assert not {"Reinforcement", "Students", "Algorithms"} & set(page(made).text.split())


def test_no_other_model_stands_for_an_altered_one(reasoned: Made) -> None:
    (reasoned.folder / "artifacts" / f"reinforce-{'a' * 12}" / "before.json").write_text("{}")
    content = report.build(reasoned.folder)
    assert content["status"] == "altered"
    assert [content[key] for key in ("model", "accuracy", "accuracy_by_pool", "reinforce")] == [None] * 4
    assert all(f"train-{'a' * 12}/model" not in (row["check"] or "") for row in content["evidence"])
    report.write(reasoned.folder)


def test_answers_that_cannot_be_paired_are_records_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {**BEFORE, "thinking": {**BEFORE["thinking"], "right": BEFORE["thinking"]["right"][1:]}}
    monkeypatch.setitem(FILES, "reinforce", {**MORE_FILES["reinforce"], "before.json": short})
    made = walk(Made(tmp_path / "run", STAGES), *STAGES)
    with pytest.raises(ArtifactError, match="cannot be read") as error:
        report.build(made.folder)
    assert error.value.where == str(made.folder.resolve())


# --- claims ------------------------------------------------------------------------------------------------------


def shown(made: Made, check: str) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    how: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 300}
    env = {**os.environ, "PATH": path}
    return subprocess.run(check, shell=True, check=True, cwd=made.folder, env=env, **how).stdout


def test_each_claim_has_its_level_and_its_numbers(reasoned: Made) -> None:
    content = report.build(reasoned.folder)
    (gain,) = claims(content, "Reinforcement raises")
    assert (gain["level"], gain["holds"]) == ("measured", True)
    assert gain["claim"].startswith("Reinforcement raises thinking from 91.7% to 99.8%: +8.2 points (95%: +")
    assert "600 test problems" in gain["how"]
    assert "one seed" in gain["how"]
    (replay,) = claims(content, "rollouts that were recorded")
    assert (replay["level"], replay["holds"]) == ("proven", True)
    (gap,) = claims(content, "Sampler and learner")
    assert (gap["level"], gap["holds"]) == ("measured", None)
    assert "6.2e-6 nats" in gap["claim"]
    (kept,) = claims(content, "keep at least")
    assert kept["claim"] == "2 of 4 students keep at least 98% of the teacher's 99.8% thinking"
    (beside,) = claims(content, "than their controls")
    assert beside["claim"] == "2 of 4 students solve more thinking than their controls, and 1 less"
    assert "qwen-xs -1.7 (-3.0 to -0.2)" in beside["how"]
    (steps,) = claims(content, "right steps")
    assert steps["claim"] == (
        "Of the teacher's traces with a right answer, 67.9% have right steps (95%: 64.1% to 71.6%); "
        "25.0% more do the same steps in another writing"
    )
    (places,) = claims(content, "stand in for published ones")
    assert places["level"] == "rehearsal"
    assert "qwen-xs for R1-qwen-xs" in places["how"]


def test_the_commands_show_what_is_claimed(reasoned: Made) -> None:
    content = report.build(reasoned.folder)
    check: Callable[[str], str] = lambda part: shown(reasoned, claims(content, part)[0]["check"])  # noqa: E731
    assert check("Reinforcement raises").strip() == str(FOUND)
    assert check("rollouts that were recorded").split() == ["5e" * 32] * 2
    assert check("Sampler and learner").split() == ['"gap_max":', "6.2e-06"]
    assert json.loads(check("keep at least")) == STUDENTS
    assert check("right steps").split("\n")[:2] == ['    150 "steps": "respelt"', '    407 "steps": "right"']


@pytest.mark.parametrize(("bound", "holds"), [(7e-6, True), (6e-6, False)])
def test_the_largest_gap_is_held_against_what_rounding_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: float, holds: bool
) -> None:
    """Every generation against what was told with it; where one was told nothing, nothing is claimed of the whole."""
    made = Made(tmp_path / "run", STAGES[:4])
    monkeypatch.setitem(TOLD, "gap_bound", bound)
    walk(made, *STAGES[:4])
    content = report.build(made.folder)
    assert (content["reinforce"]["gap_bound"], content["reinforce"]["gap_within"]) == (bound, holds)
    (gap,) = claims(content, "Sampler and learner")
    assert gap["holds"] is holds
    assert f"held against {words.scientific(bound)} nats, 8 times" in gap["how"]
    said = f"within 6.2e-6 nats a token, {words.scientific(bound)} allowed"
    assert said in " ".join(report.text(content).split())
    drawn = [Generation(n, 0.5, 0.5, 1e-7, 1e-6, "a", n, bound) for n, bound in enumerate((1e-5, None))]
    assert reasoning._bounded(drawn) == {"gap_bound": None, "gap_within": None}


@pytest.mark.parametrize(
    ("low", "high", "after", "holds", "said"),
    [
        (0.01, 0.03, 0.94, True, "Reinforcement raises"),
        (-0.01, 0.03, 0.92, None, "Nothing shows that reinforcement changes"),
        (-0.05, -0.01, 0.89, False, "Reinforcement raises"),
    ],
)
def test_a_gain_that_is_not_shown_is_not_claimed(
    tmp_path: Path, low: float, high: float, after: float, holds: bool | None, said: str
) -> None:
    gain = {**GAIN, "low": low, "high": high, "after": after}
    made = walk(Made(tmp_path / "run", STAGES[:4]), *STAGES[:4], changed={"reinforce": {"reinforce": gain}})
    content = report.build(made.folder)
    (row,) = claims(content, said)
    assert row["holds"] is holds
    assert ("DOES NOT HOLD" in report.text(content)) == (holds is False)


def test_a_replay_that_ends_elsewhere_is_said_and_it_alone(tmp_path: Path) -> None:
    made = Made(tmp_path / "run", STAGES)
    made.files["reinforce"] = {
        **MORE_FILES["reinforce"],
        "proof.json": {**PROOF, "replay": "6f" * 32, "replay_identical": False},
    }
    walk(made, *STAGES)
    content = report.build(made.folder)
    (row,) = [row for row in content["evidence"] if row["holds"] is False]
    assert "rollouts that were recorded" in row["claim"]
    assert "replay from the records   DIFFERENT" in report.text(content)
    assert "✕ does not hold" in page(made).text


def test_a_move_within_reinforcement_is_its_own(tmp_path: Path) -> None:
    move = {**FALLBACK, "from": "nvidia", "to": "ascend", "at_step": 40, "before": "9c" * 32, "after": ["9c" * 32]}
    made = Made(tmp_path / "run", STAGES[:4])
    walk(made, *STAGES[:3])
    made.begin("reinforce")
    made.event("train.begin", phases=list(GAPS))
    generation_events(made, "reinforce", pools=("nvidia", "ascend"))
    made.event("train.injected", phase="reinforce", pool="nvidia", kind="sigkill", rank=0, step=40)
    fault = {"kind": "killed", "step": 40, "message": "status -9"}
    made.event("train.fault", phase="reinforce", pool="nvidia", **fault)
    made.commit("reinforce", {**MORE["reinforce"], "fallback": move})
    made.done("reinforce")
    content = report.build(made.folder)
    assert content["fallback"]["at_step"] == FALLBACK["at_step"]
    assert content["reinforce"]["fallback"] == move
    assert [one["kind"] for one in content["reinforce"]["faults"]] == ["killed"]
    assert all(one["phase"] == "main" for one in content["training"]["faults"])
    assert "The fault: SIGKILL to worker 0 of nvidia; its timing was planned" in content["standing"]["real"]
    (row,) = claims(content, "In reinforcement: the state that arrived on ascend")
    assert f"reinforce-{'a' * 12}/handoff.state" in row["check"]
    assert len(claims(content, "In reinforcement: ")) == 4
    assert len(claims(content, "tate that arrived on")) == 2
    assert "Reinforcement lost the pool nvidia at step 40" in " ".join(content["verdict"])
    assert "in reinforcement, nvidia -> ascend at step 40" in report.text(content)
    assert "Reinforcement, handed off" in page(made).text
    events = [json.loads(line) for line in (made.folder / "journal.jsonl").read_text().splitlines()]
    mark = Move(19, ["nvidia lost at step 40"])  # generation 19 taught steps 39 and 40
    drawn = dots.reward(generations(events), ["ascend", "nvidia"], mark, 940, 300)
    assert str(drawn) in (made.folder / "report.html").read_text()


# --- the journal -------------------------------------------------------------------------------------------------


def test_generations_are_those_of_the_run_and_as_last_told() -> None:
    told = {"event": "train.step", "phase": "reinforce", "pool": "a", "mixed": 0.5, "gap": 1e-7, "gap_max": 1e-6}
    events = [
        {**told, "step": 1, "generation": 0, "reward": 0.1},
        {**told, "step": 2, "generation": 0, "reward": 0.1},
        {**told, "step": 3, "generation": 1, "reward": 0.2},
        {**told, "step": 3, "generation": 1, "reward": 0.3, "pool": "b"},
        {**told, "step": 5, "generation": 2},
        {**told, "step": 5, "generation": 2, "reward": None},
        {**told, "step": 4, "generation": 9, "reward": 0.9, "phase": "reinforce-replay"},
        {"event": "train.step", "phase": "main", "pool": "a", "step": 1, "loss": 1.0},
    ]
    assert generations(events) == [
        Generation(0, 0.1, 0.5, 1e-7, 1e-6, "a", 2, round="reinforce"),
        Generation(1, 0.3, 0.5, 1e-7, 1e-6, "b", 3, round="reinforce"),
    ]


# --- words -------------------------------------------------------------------------------------------------------


def test_differences_have_a_sign_and_nought_has_none() -> None:
    assert [words.points(v) for v in (0.0833, -0.0233, 0.0, 0.0002, -0.0002, 0.1, None)] == [
        "+8.3", "-2.3", "0.0", "0.0", "0.0", "+10.0", "unknown",
    ]  # fmt: skip


def test_the_terminal_says_it_all_and_fits(reasoned: Made) -> None:
    said = report.text(report.build(reasoned.folder))
    assert max(map(len, said.splitlines())) <= 80
    for part in (
        "thinking         91.7% -> 99.8%", "replay from the records   identical", "within 6.2e-6 nats a token",
        "2 of 4 keep 98% of the teacher's 99.8%; n 600 each, one seed",
        "traces: 599 right of 600 asked; steps right in 67.9% [64.1%, 71.6%]",
    ):  # fmt: skip
        assert part in said


def test_headlines_of_the_stages() -> None:
    assert terminal.headline("reinforce", MORE["reinforce"]).startswith("thinking 91.7% -> 99.8% (+8.2 points [+")
    assert terminal.headline("reinforce", MORE["reinforce"]).endswith("], n 600)")
    said = "2 of 4 students keep 98% of the teacher"
    assert terminal.headline("distill", MORE["distill"]) == f"{said}; steps right in 68% of its traces, respelt in 25%"
    unchecked = {
        **MORE["distill"],
        "traces": {**TRACES, "checked": 0, "steps_right": 0, "steps_respelt": 0, "steps_right_share": None},
    }
    assert terminal.headline("distill", unchecked) == said


def test_a_share_is_kept_by_what_was_counted_and_not_by_its_rounding() -> None:
    assert [one["kept"] for one in STUDENTS[1:3]] == [0.98, 0.9816]
    assert students.keeping(STUDENTS[1:2], TEACHER) == 0
    assert students.keeping([{"thinking": 588 / N}], 1.0) == 1
    assert students.keeping([{"thinking": 587 / N}], 1.0) == 0


# --- the page ----------------------------------------------------------------------------------------------------


def test_the_page_shows_reward_gain_and_students(reasoned: Made) -> None:
    reader = page(reasoned)
    said = " ".join(reader.text.split())
    for part in ("Reinforcement", "mean reward", "nvidia, generations 0 to 39", "Thinking, before", "Thinking, after",
                 "Students", "the teacher, 99.8%", "138,000", "R1-llama-l", "thinking accuracy",
                 "The teacher has 137,600 parameters", "State after reinforcement"):  # fmt: skip
        assert part in said, part
    rings = [attributes for name, attributes in reader.elements if attributes.get("class") == "ring"]
    assert len(rings) == 3 * len(STUDENTS), "one a student, at each of three widths"
    assert all(a.get("aria-label") for name, a in reader.elements if name == "svg" and "aria-hidden" not in a)


@pytest.mark.parametrize("teacher", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("width", [330, 620, 940])
def test_dots_lie_where_the_axis_says(width: int, teacher: float) -> None:
    svg = str(dots.students(STUDENTS, teacher, width))
    ticks = {said: float(at) for at, said in re.findall(r'<text x="([\d.]+)"[^>]*class="tick">(\d+)%', svg)}
    zero, whole = ticks["0"], ticks["100"]
    assert 0 < zero < whole < width
    (line,) = re.findall(r'<line x1="([\d.]+)"[^>]*class="move"', svg)
    assert float(line) == pytest.approx(zero + teacher * (whole - zero), abs=0.11)
    for kind, key in (("dot", "thinking"), ("ring", "control")):
        places = [float(at) for at in re.findall(rf'<circle cx="([\d.]+)"[^>]*class="{kind}"', svg)]
        assert places == pytest.approx([zero + one[key] * (whole - zero) for one in STUDENTS], abs=0.11)


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    made = Made(tmp_path / "run", STAGES[:5])
    made.asked["stages"]["reinforce"]["policy"] = {"loss": HOSTILE}
    made.start()
    rows = [{**STUDENTS[0], "name": HOSTILE, "stands_for": HOSTILE, "arch": HOSTILE}, *STUDENTS[1:]]
    walk(made, *STAGES[:5], changed={"distill": {"students": rows}})
    reader = page(made)
    assert {"script", "img"}.isdisjoint(name for name, _ in reader.elements)
    assert reader.text.count('<script>alert("x")</script>') >= 6
    assert "\x1b" not in report.text(report.build(made.folder))


def test_a_model_without_a_thinking_switch_has_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A published model that was reinforced: one mode, and replies as long as the recipe says."""
    only = {"direct": AFTER["direct"], "max_new": 32}
    files = {**MORE_FILES["reinforce"], "before.json": {"direct": BEFORE["direct"]}}
    monkeypatch.setitem(FILES, "reinforce", {**files, "evaluation.json": {**only, "pools": {"cpu": only}}})
    summary = {"reinforce": {"accuracy": {"direct": AFTER["direct"]}}}
    made = walk(Made(tmp_path / "run", ("label", "reinforce")), "label", "reinforce", changed=summary)
    report.write(made.folder)
    page, content = (made.folder / "report.html").read_text(), report.build(made.folder)
    assert "<dt>Direct</dt>" in page
    assert "<dt>Thinking</dt>" not in page
    assert content["accuracy"]["thinking"] is None
    (solved,) = claims(content, "Answering directly, the model solves")
    assert "'max_new': 32" in solved["check"]


def test_a_remark_is_in_the_object_the_text_the_page_and_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remark = "3 of 16 replies could not be graded: <b>nothing</b>"
    made = walk(Made(tmp_path / "run", STAGES[:4]), *STAGES[:4], changed={"reinforce": {"remarks": [remark]}})
    content = report.build(made.folder)
    assert content["remarks"] == [{"stage": "reinforce", "remark": remark}]
    assert f"reinforce: {remark}" in " ".join(report.text(content).split())
    assert remark in " ".join(page(made).text.split()), "as text, whatever it has in it"
    with terminal.Terminal(["reinforce"]) as drawn:
        drawn.done("reinforce", 1.0, False, {**MORE["reinforce"], "remarks": [remark]})
    assert remark in " ".join(capsys.readouterr().err.split())
    quiet = walk(Made(tmp_path / "other", STAGES[:4]), *STAGES[:4])
    assert report.build(quiet.folder)["remarks"] == []
    assert "Remarks" not in page(quiet).text
