"""What a report tells of students with a start, asked otherwise than their controls, or on their own replies."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from ottava.console import dots, report
from ottava.console.history import Point
from ottava.console.words import points
from ottava.stages import distill
from tests.test_report import Made, claims, page
from tests.test_report_reasoning import STAGES, STUDENTS, TEACHER, TRACES, _known

__all__ = ["_known"]  # the fixture of the figures of made-up runs

START = "models/thinker"
LOSSES = [2.0, 1.5, 1.75, 0.5]
GAIN = {"before": 0.42, "after": 0.70, "low": 0.21, "high": 0.35, "n": 600}
OWN = {"before": 0.70, "after": 0.78, "low": 0.05, "high": 0.11, "n": 600, "kept": 0.7813}
BEGAN = {
    **STUDENTS[3], "name": "began", "thinking": 0.70, "control": 0.55, "control_thinking": 0.61, "low": 0.1,
    "high": 0.2, "mode": "thinking", "control_mode": "direct", "start": START, "before": GAIN, "on_policy": OWN,
}  # fmt: skip
FRESH = {**STUDENTS[0], "mode": "thinking", "control_mode": "direct", "control_thinking": 0.33}


@pytest.fixture
def told(tmp_path: Path) -> Made:
    """A run whose student of two, which began from a model, went on on its own replies; a replaced step among them."""
    made = Made(tmp_path / "run", STAGES[:5])
    made.asked["stages"]["distill"]["on_policy"] = {"divergence": {"kind": "gkd", "beta": 1.0}}
    made.start()
    for name in STAGES[:4]:
        made.begin(name)
        made.commit(name, _summary(name))
        made.done(name)
    made.begin("distill")
    made.event("train.step", phase="student:began", pool="ascend", step=1, loss=9.0)
    made.event("train.step", phase="on-policy:began", pool="ascend", step=2, loss=77.0)  # taken again after a fault
    for step, loss in enumerate(LOSSES, 1):
        made.event("train.step", phase="on-policy:began", pool="ascend", step=step, loss=loss)
    made.commit("distill", {"steps": 60, "teacher": TEACHER, "traces": TRACES, "students": [BEGAN, FRESH]})
    made.done("distill")
    return made


def _summary(name: str) -> Any:
    from tests.test_report import SUMMARIES

    return SUMMARIES[name]


def test_the_object_says_modes_starts_and_own_replies(told: Made) -> None:
    first, second = report.build(told.folder)["students"]
    assert (first["mode"], first["control_mode"], first["start"]) == ("thinking", "direct", START)
    assert (second["start"], second["before"], second["on_policy"]) == (None, None, None)
    assert (first["control_thinking"], first["before"]) == (0.61, GAIN)
    own = first["on_policy"]
    assert {key: own[key] for key in OWN} == OWN
    assert own["losses"] == [[number, loss] for number, loss in enumerate(LOSSES, 1)]
    assert (own["unit"], own["divergence"]["beta"]) == ("nats an id", 1.0)


def test_a_claim_beside_a_control_says_how_both_were_asked_and_from_where(told: Made) -> None:
    content = report.build(told.folder)
    (beside,) = claims(content, "than their controls")
    assert beside["claim"] == "1 of 2 students solve more thinking than their controls answering directly, and 1 less"
    assert f"(began from {START} and qwen-xs from random weights)" in beside["how"]
    assert "asked directly" in beside["how"]
    assert "asked with thinking on, controls solve: began's 61.0% and qwen-xs's 33.0%" in beside["how"]
    (own,) = claims(content, "On its own replies")
    assert own["claim"] == f"On its own replies began went on from 70.0% thinking to 78.0%: {points(0.08)} points " \
        "(95%: +5.0 to +11.0)"  # fmt: skip
    assert "78.1% of the teacher's 99.8% on the same problems in the same mode" in own["how"]
    assert "2 -> 0.5 nats an id" in own["how"]
    (story,) = (said for said in content["verdict"] if "students keep" in said)
    how = "thinking, than their controls, which had no teacher and were asked directly"
    assert f"; 1 solve more and 1 less, {how}" in story


def test_students_and_controls_asked_alike_are_told_as_before(tmp_path: Path) -> None:
    made = Made(tmp_path / "run", STAGES[:5])
    made.start()
    for name in STAGES[:5]:
        made.begin(name)
        made.commit(name, _summary(name))
        made.done(name)
    content = report.build(made.folder)
    (beside,) = claims(content, "than their controls")
    assert "more thinking than their controls, and" in beside["claim"]
    assert "all from random weights" in beside["how"]
    assert "of the modes" not in beside["how"]
    assert "asked directly" not in " ".join(content["verdict"])


def test_the_terminal_says_before_modes_and_own_replies(told: Made) -> None:
    said = re.sub(r"\s+", " ", report.text(report.build(told.folder)))
    assert "students asked with thinking on, controls directly" in said
    assert f"began before 42.0%, +28.0 [+21.0, +35.0]; from {START}" in said
    assert "on its own replies 70.0% -> 78.0%, +8.0 [+5.0, +11.0], 78.1% of the teacher's; loss 2 -> 0.5" in said


def test_the_page_says_them_too(told: Made) -> None:
    reader = page(told)
    said = " ".join(reader.text.split())
    for part in ("Students are asked with thinking on, controls directly", "Control, direct", "42.0%", START,
                 "On their own replies", "78.1%", "+5.0 to +11.0", "step of began", "nats an id"):  # fmt: skip
        assert part in said, part
    labels = [a.get("aria-label", "") for name, a in reader.elements if name == "svg"]
    assert sum("Divergence of began from its teacher over 4 steps: from 2 to 0.5" in label for label in labels) == 3


@pytest.mark.parametrize("losses", [LOSSES, [0.0, 0.0], [-1e-9, 3.0, 1e-9]])
def test_the_curve_is_drawn_where_its_axis_says(losses: list[float]) -> None:
    told = [Point(step, loss, None, "a", False) for step, loss in enumerate(losses, 1)]
    svg = str(dots.divergence(told, ["a"], "x", "nats an id", 620, 220))
    (line,) = re.findall(r'd="([^"]*)"[^>]*class="line p0"|points="([^"]*)"[^>]*class="line p0"', svg)
    numbers = [float(value) for value in re.findall(r"-?[\d.]+", "".join(line))]
    ys = numbers[1::2]
    assert len(ys) == len(losses)
    span = max(max(losses), 1e-9) - min(0.0, *losses)
    expected = [(max(max(losses), 1e-9) - loss) / span for loss in losses]
    top, bottom = 34, 220 - 44
    assert ys == pytest.approx([top + share * (bottom - top) for share in expected], abs=0.11)


def test_what_is_kept_is_of_the_same_problems_and_the_same_teacher() -> None:
    """The row of a student that went on: by hand from what was right, one by one."""

    def found(right: list[int], **more: Any) -> dict[str, Any]:
        value = {"value": sum(right) / len(right), "right": right}
        return {"thinking": value, "direct": {"value": 0.0, "right": [0] * len(right)}, "parameters": 9, "pool": "a",
                **more}  # fmt: skip

    evaluated = {
        "student": found([1] * 6 + [0] * 4), "control": found([1, 0] * 5), "on_policy": found([1] * 8 + [0] * 2)
    }  # fmt: skip
    row = distill._row(distill.SIX[0], evaluated, 0.95, ("thinking", "thinking"))
    assert (row["kept"], row["on_policy"]["kept"]) == (round(0.6 / 0.95, 4), round(0.8 / 0.95, 4))
    assert (row["on_policy"]["before"], row["on_policy"]["after"], row["on_policy"]["n"]) == (0.6, 0.8, 10)
    assert row["on_policy"]["low"] < 0.2 < row["on_policy"]["high"]
    assert "control_thinking" not in row
    row = distill._row(distill.SIX[0], evaluated, 0.95, ("thinking", "direct"))
    assert (row["control"], row["control_thinking"], row["control_mode"]) == (0.0, 0.5, "direct")
