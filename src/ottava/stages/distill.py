"""Students learn from the teacher's verified traces, each beside its control.

The control is the same student from the same first weights, with as many examples in as many steps, on the label
artifact's cold-start traces instead of the teacher's. Both see the same problems with answers. What a student has over
its control, it has from the teacher. A student may have a tokenizer of its own: traces are text.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ottava.artifact import Artifact, write_json
from ottava.checkpoint.source import OF_ITS_WEIGHTS
from ottava.context import Context
from ottava.labels import harvest
from ottava.models.chat import write_tiny
from ottava.recipe import Frozen, Name
from ottava.supervisor import loop
from ottava.supervisor import proof as proofs
from ottava.tasks.statistics import paired
from ottava.trainer.rl_spec import OnPolicySpec
from ottava.trainer.spec import Dense, FineTuning, Harvest, TrainSpec
from ottava.trainer.supervised import Fault, Positive, Supervised

VERSION = "1"
INPUTS = ("@model", "label")
CARE = frozenset(loop.CARE - {"drift"})
ARMS = ("student", "control")


class Student(Frozen):
    """One student. stands_for: the published model whose place it has in the story."""

    name: Name
    shape: Dense
    tokenizer: Annotated[
        Literal["characters", "pairs"] | None,
        Field(description="how its own tokenizer cuts the task's text; without it, the teacher's tokenizer"),
    ] = None
    stands_for: str = ""


SIX = (
    Student(name="qwen-xs", shape=Dense(family="qwen3", hidden=32, width=96), stands_for="R1-Distill-Qwen-1.5B"),
    Student(name="qwen-s", shape=Dense(family="qwen3", hidden=48, width=128), stands_for="R1-Distill-Qwen-7B"),
    Student(name="llama-m", shape=Dense(family="llama", hidden=56, width=144), stands_for="R1-Distill-Llama-8B"),
    Student(name="qwen-m", shape=Dense(family="qwen3", hidden=64, width=160), stands_for="R1-Distill-Qwen-14B"),
    Student(name="qwen-l", shape=Dense(family="qwen3", hidden=72, width=176), stands_for="R1-Distill-Qwen-32B"),
    Student(name="llama-l", shape=Dense(family="llama", hidden=80, width=192), stands_for="R1-Distill-Llama-70B"),
)
"""R1's six students in miniature: its families, in the order of their sizes."""


class Spec(FineTuning):
    """Distillation: a harvest, and how every student and every control is trained on it."""

    steps: Positive = 500
    harvest: Harvest = Harvest()
    students: Annotated[tuple[Student, ...], Field(min_length=1)] = SIX
    on_policy: Annotated[
        OnPolicySpec | None, Field(description="and then on its own replies, by the teacher's word at every id")
    ] = None
    min_kept: Annotated[float, Field(ge=0, description="the verdict is no where the best student keeps less of the "
                                     "teacher's thinking accuracy")] = 0.0  # fmt: skip

    @field_validator("students")
    @classmethod
    def _distinct(cls, students: tuple[Student, ...]) -> tuple[Student, ...]:
        if len({student.name for student in students}) < len(students):
            raise ValueError("two students have the same name")
        return students

    @model_validator(mode="after")
    def _whole(self) -> Spec:
        if self.lora is not None or self.go_no_go is not None:
            raise ValueError("students are trained whole and without a baseline: leave lora and go_no_go out")
        return self

    @model_validator(mode="after")
    def _comparable(self) -> Spec:
        own = next((student for student in self.students if student.tokenizer is not None), None)
        if own is not None and self.on_policy is not None and self.on_policy.divergence.kind == "gkd":
            raise ValueError(
                f"the student {own.name!r} has a tokenizer of its own ({own.tokenizer}), and on_policy.divergence "
                "compares the two id by id: set on_policy.divergence to {kind: alm} or {kind: uld}, or take its "
                "tokenizer out"
            )
        return self

    def training(self, student: Student) -> TrainSpec:
        """How one student, or its control, is trained."""
        own = {name: getattr(self, name) for name in FineTuning.model_fields}
        return TrainSpec(**{**own, "shape": student.shape, "fault": None, "go_no_go": None})


def run(spec: Spec, inputs: Mapping[str, Artifact], ctx: Context) -> Artifact:
    """Harvest, then train and evaluate each student and its control."""
    label, teacher = inputs["label"], inputs["model"]
    traces = ctx.out / "traces"
    ctx.progress(0.0, "asking the teacher")
    counts = harvest.collect(spec.harvest, teacher, label, ctx, traces)
    reached = teacher.json("evaluation.json")
    rows = []
    for number, student in enumerate(spec.students):
        found = {}
        for arm, data in zip(ARMS, (traces, label.path), strict=True):
            ctx.progress(
                0.1 + 0.9 * (2 * number + (arm == "control")) / (2 * len(spec.students)), _called(student, arm)
            )
            found[arm] = _learn(spec, student, arm, data, inputs, ctx)
        if spec.on_policy is not None:
            found["on_policy"] = _go_on(spec.on_policy, student, inputs, ctx)
        rows.append(_row(student, found, reached["thinking"]["value"]))
    write_json(ctx.out / "students.json", rows)
    summary = {"steps": spec.steps, "teacher": reached["thinking"]["value"], "traces": counts, "students": rows}
    best = max(row["kept"] for row in rows)
    reason = f"the best student keeps {best:.1%} of the teacher, and min_kept is {spec.min_kept:.1%}"
    good = best >= spec.min_kept
    return ctx.commit({**summary, **({} if good else {"reason": reason})}, verdict=good)


def _learn(
    spec: Spec, student: Student, arm: str, data: Path, inputs: Mapping[str, Artifact], ctx: Context
) -> dict[str, Any]:
    """Train one model under supervision, export and evaluate it."""
    label = inputs["label"]
    training = spec.training(student)
    teacher = inputs["model"].digest if arm == "student" else None
    base = {
        "spec": training.model_dump(mode="json"), "seed": ctx.seed, "data": str(data),
        "chat": str(_chat(student, inputs, ctx)),
        "content": [label.digest, teacher, spec.harvest.model_dump(mode="json")],
    }  # fmt: skip
    first = student is spec.students[0] and arm == "student"
    return _trained(training, base, student, arm, label, ctx, spec.fault if first else None)


def _go_on(spec: OnPolicySpec, student: Student, inputs: Mapping[str, Artifact], ctx: Context) -> dict[str, Any]:
    """The student goes on from where it is, on its own replies."""
    label, teacher = inputs["label"], inputs["model"]
    base = {
        "spec": spec.model_dump(mode="json"), "seed": ctx.seed, "data": str(label.path), "objective": "on_policy",
        "chat": str(_chat(student, inputs, ctx)), "start_model": str(_folder(ctx, student, "student")),
        "teacher": str(teacher.file("model")), "content": [label.digest, teacher.digest],
    }  # fmt: skip
    return _trained(spec, base, student, "on-policy", label, ctx, spec.fault)


def _trained(
    training: Supervised,
    base: Mapping[str, Any],
    student: Student,
    arm: str,
    label: Artifact,
    ctx: Context,
    fault: Fault | None,
) -> dict[str, Any]:
    model = _folder(ctx, student, arm)
    model.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(base["chat"], model, ignore=shutil.ignore_patterns(*OF_ITS_WEIGHTS))
    final, last = proofs.through(ctx, training, base, _called(student, arm), fault)
    exported = proofs.exported(ctx, base, final, last, model)
    accuracy = proofs.evaluate(ctx, model, label, last)
    write_json(model.parent / f"{arm}.json", accuracy)
    return {**accuracy, "parameters": exported["parameters"], "pool": last.name}


def _chat(student: Student, inputs: Mapping[str, Artifact], ctx: Context) -> Path:
    """A folder with the student's tokenizer and template: its own, or its teacher's."""
    if student.tokenizer is None:
        return inputs["model"].file("model")
    folder = ctx.work / "tokenizers" / student.tokenizer
    write_tiny(folder, inputs["label"].json("vocabulary.json"), student.tokenizer)
    return folder


def _folder(ctx: Context, student: Student, arm: str) -> Path:
    return ctx.out / "students" / student.name / arm


def _row(student: Student, found: Mapping[str, Mapping[str, Any]], teacher: float) -> dict[str, Any]:
    """What students.json says of a student. low, high: the paired 95% interval of student minus control."""
    own, control = (found[arm]["thinking"] for arm in ARMS)
    both = paired(control["right"], own["right"])
    return {
        "name": student.name,
        "arch": student.shape.config(0)["architectures"][0],
        "stands_for": student.stands_for,
        "tokenizer": student.tokenizer,
        "params": found["student"]["parameters"],
        "pool": found["student"]["pool"],
        "thinking": own["value"],
        "control": control["value"],
        "low": both.low,
        "high": both.high,
        "kept": round(own["value"] / teacher, 4) if teacher else 0.0,
        "n": both.n,
        "on_policy": found["on_policy"]["thinking"]["value"] if "on_policy" in found else None,
        "direct": found["student"]["direct"]["value"],
        "control_direct": found["control"]["direct"]["value"],
    }


def _called(student: Student, arm: str) -> str:
    return f"{arm}:{student.name}"
