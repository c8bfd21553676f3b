"""Students learn from the teacher's verified traces, each beside its control.

The control is the same student from the same first weights, with as many examples in as many steps, on the label
artifact's cold-start traces instead of the teacher's. Both see the same problems with answers. Where nobody has traces
(`problems`, or mode: direct) the control learns the answers alone, of all problems, and is asked directly: that is what
one would do without a teacher. What a student has over its control, it has from the teacher.

A student may have a tokenizer of its own: traces are text. One that begins from a published model keeps that model's,
and is evaluated before its first step too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, computed_field, field_validator, model_validator

from ottava import recipe
from ottava.artifact import Artifact, write_json
from ottava.checkpoint import source
from ottava.checkpoint.layouts import read_config
from ottava.checkpoint.source import OF_ITS_WEIGHTS
from ottava.context import Context
from ottava.errors import OttavaError, RecipeError
from ottava.labels import harvest
from ottava.models.chat import Chat, read_tokenizer, write_tiny
from ottava.recipe import Frozen, Name
from ottava.supervisor import loop
from ottava.supervisor import proof as proofs
from ottava.tasks.statistics import paired
from ottava.trainer import asking, coming, verdicts
from ottava.trainer.rl_spec import OnPolicySpec
from ottava.trainer.spec import CONTEXT, Dense, FineTuning, Harvest, TrainSpec
from ottava.trainer.supervised import Fault, Positive, Supervised

VERSION = "1"
INPUTS = ("@model", "@label")
CARE = frozenset(loop.CARE - {"drift"})
ARMS = ("student", "control")
COLD_START = "cold_start.jsonl"

Mode = Literal["thinking", "direct"]


class Student(Frozen):
    """One student. stands_for: the published model whose place it has in the story."""

    name: Name
    shape: Annotated[Dense | None, Field(description="of one that begins from random weights")] = None
    start: Annotated[
        str | None, Field(description="or the model that it begins from: a Hugging Face folder, or package:NAME")
    ] = None
    tokenizer: Annotated[
        Literal["characters", "pairs"] | None,
        Field(description="how its own tokenizer cuts the task's text; without it, the teacher's tokenizer"),
    ] = None
    stands_for: str = ""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def start_content(self) -> str | None:
        """Part of the stage's key: another content of the folder or package is another model."""
        return None if self.start is None else source.content_of(self.start)

    @field_validator("start")
    @classmethod
    def _named(cls, start: str | None) -> str | None:
        return None if start is None else source.written(start)

    @model_validator(mode="after")
    def _one_beginning(self) -> Student:
        if (self.shape is None) == (self.start is None):
            raise ValueError("a student has either a shape (random weights) or a start (a model that is there)")
        if self.start is not None and self.tokenizer is not None:
            raise ValueError("a student with a start keeps that model's tokenizer: leave tokenizer out")
        return self


SIX = (
    Student(name="qwen-xs", shape=Dense(family="qwen3", hidden=32, width=96), stands_for="R1-Distill-Qwen-1.5B"),
    Student(name="qwen-s", shape=Dense(family="qwen3", hidden=48, width=128), stands_for="R1-Distill-Qwen-7B"),
    Student(name="llama-m", shape=Dense(family="llama", hidden=56, width=144), stands_for="R1-Distill-Llama-8B"),
    Student(name="qwen-m", shape=Dense(family="qwen3", hidden=64, width=160), stands_for="R1-Distill-Qwen-14B"),
    Student(name="qwen-l", shape=Dense(family="qwen3", hidden=72, width=176), stands_for="R1-Distill-Qwen-32B"),
    Student(name="llama-l", shape=Dense(family="llama", hidden=80, width=192), stands_for="R1-Distill-Llama-70B"),
)
"""R1's six students in miniature: its families, in the order of their sizes."""


IGNORED = {
    "policy": "a student learns from its teacher's distribution (divergence), and not from rewards; leave it out",
    "min_thinking": "the verdict is distillation's; say min_kept, beside on_policy",
    "go_no_go": "students have no baseline; leave it out",
    "budget_s": "it is the whole stage's; say it beside on_policy",
    "pool": "it is the whole stage's; say it beside on_policy",
}
"""Keys that on-policy distillation shares with reinforcement and makes no use of."""


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

    @field_validator("on_policy", mode="before")
    @classmethod
    def _of_its_own(cls, said: Any) -> Any:
        return recipe.unused(said, IGNORED, "on_policy")

    @model_validator(mode="after")
    def _whole(self) -> Spec:
        fresh = any(student.start is None for student in self.students)
        if (self.lora is not None and fresh) or self.go_no_go is not None:
            raise ValueError(
                "students are trained without a baseline, and from random weights whole: leave lora and go_no_go out"
            )
        if self.on_policy is not None and self.on_policy.mode != self.mode:
            raise ValueError(f"on_policy.mode is {self.on_policy.mode}, and mode is {self.mode}: set both alike")
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

    def training(self, student: Student, alone: bool = False) -> TrainSpec:
        """How one student, or its control, is trained. alone: on the answers alone."""
        own = {name: getattr(self, name) for name in FineTuning.model_fields}
        own |= {"shape": student.shape} if student.shape is not None else {}
        own |= {"mode": "direct"} if alone else {}
        return TrainSpec(**{**own, "fault": None, "go_no_go": None})

    def unmet(self, name: str, stages: Mapping[str, recipe.Spec]) -> tuple[tuple[str, ...], str, str] | None:
        for student in self.students:
            found = self._unable(student, "problems" in stages)
            if found is not None:
                return ("students",), f"the student {student.name!r} {found[0]}", found[1]
        before = recipe.earlier(name, stages)
        teacher = coming.so_far(before)
        wrong = coming.too_long(self.limit, teacher)
        for student in self.students:
            config = self._known(student, teacher)
            unfit = None if self.on_policy is None else self.on_policy.unfit(before, config)
            wrong = (
                wrong
                or coming.too_long(self.limit, config)
                or coming.unadaptable(self.lora, config)
                or (unfit and (("on_policy", *unfit[0]), *unfit[1:]))
            )
        return wrong

    def _known(self, student: Student, teacher: coming.Config | None) -> coming.Config | None:
        """What is known of a student's config: its start's, or its shape's with the context of whose words it has."""
        if student.shape is None:
            return coming.of_source(str(student.start))
        context = CONTEXT if student.tokenizer is not None else coming.context_of(teacher)
        return {**student.shape.config(0), "max_position_embeddings": context}

    def _unable(self, student: Student, answers_alone: bool) -> tuple[str, str] | None:
        """What is wrong with a student, and how to mend it."""
        if student.tokenizer is not None and answers_alone:
            what = (
                f"has the tokenizer {student.tokenizer!r}, whose words come from a `label` stage, not from `problems`"
            )
            return what, "leave tokenizer out: it has its teacher's then"
        if student.start is None:
            return None
        package = source.package_of(student.start)
        if package is not None:
            missing = student.start_content is None
            return (f"begins from the package {package}, which is not installed", "install it") if missing else None
        try:
            chat = Chat.load(source.folder_of(student.start, "its start"))
        except OttavaError as error:
            what = f"begins from {student.start}, which cannot be asked: {error.what}"
            return what, error.fix or "name a Hugging Face folder with weights, tokenizer and chat template"
        if self.mode == "thinking" and not chat.thinks:
            return f"begins from {student.start}, which has no thinking switch", "set distill.mode: direct"
        return None


def run(spec: Spec, inputs: Mapping[str, Artifact], ctx: Context) -> Artifact:
    """Harvest, then train and evaluate each student and its control."""
    label, teacher = inputs["label"], inputs["model"]
    _same_ids(spec, inputs, ctx)
    _able(spec, inputs, ctx)
    traces = ctx.out / "traces"
    ctx.progress(0.0, "asking the teacher")
    reached = _reached(spec, teacher, label, ctx)
    counts = harvest.collect(spec.harvest, teacher, label, ctx, traces, spec)
    rows = []
    for number, student in enumerate(spec.students):
        found = {}
        if student.start is not None:
            found["before"] = _before(spec, student, inputs, ctx)
        for arm, data in zip(ARMS, (traces, label.path), strict=True):
            ctx.progress(
                0.1 + 0.9 * (2 * number + (arm == "control")) / (2 * len(spec.students)), _called(student, arm)
            )
            found[arm] = _learn(spec, student, arm, data, inputs, ctx)
        if spec.on_policy is not None:
            found["on_policy"] = _go_on(spec.on_policy, spec.limit, student, inputs, ctx)
        rows.append(_row(student, found, reached, (spec.mode, control_mode(spec.mode, label))))
    write_json(ctx.out / "students.json", rows)
    summary = {"steps": spec.steps, "teacher": reached, "traces": counts, "students": rows}
    summary |= verdicts.said(verdicts.of_harvest(counts), *_ungraded(ctx.out))
    if spec.mode != "thinking":
        summary["mode"] = spec.mode
    best = max((row["on_policy"] or row)["kept"] for row in rows)  # of the models that come out
    reason = f"the best student keeps {best:.1%} of the teacher, and min_kept is {spec.min_kept:.1%}"
    good = best >= spec.min_kept
    return ctx.commit({**summary, **({} if good else {"reason": reason})}, verdict=good)


def control_mode(mode: Mode, label: Artifact) -> Mode:
    """How controls learn and are asked, of students in `mode`: thinking only where there are traces that no teacher
    wrote."""
    return "thinking" if mode == "thinking" and COLD_START in label.manifest["files"] else "direct"


def _reached(spec: Spec, teacher: Artifact, label: Artifact, ctx: Context) -> float:
    """The teacher's accuracy in the mode that is taught, with replies as long as its students may give."""
    if "evaluation.json" in teacher.manifest["files"]:
        known = teacher.json("evaluation.json")
        if known.get("max_new") == spec.limit and spec.mode in known:
            return float(known[spec.mode]["value"])
    found = proofs.evaluate(ctx, teacher.file("model"), label, ctx.pool, spec.limit)
    write_json(ctx.out / "teacher.json", {**found, "pool": ctx.pool.name})
    return float(found[spec.mode]["value"])


def _before(spec: Spec, student: Student, inputs: Mapping[str, Artifact], ctx: Context) -> dict[str, Any]:
    """The accuracy of the model that a student begins from."""
    found = proofs.evaluate(ctx, _begin(student, ctx), inputs["label"], ctx.pool, spec.limit)
    folder = _folder(ctx, student, "before").parent
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "before.json", found)
    return found


def _same_ids(spec: Spec, inputs: Mapping[str, Artifact], ctx: Context) -> None:
    """Raise RecipeError where ids are to be compared between two vocabularies that differ."""
    if spec.on_policy is None or spec.on_policy.divergence.kind != "gkd":
        return
    its = read_tokenizer(inputs["model"].file("model") / "tokenizer.json").get_vocab()
    for student in spec.students:
        folder = None if student.start is None else _begin(student, ctx)
        if folder is not None and read_tokenizer(folder / "tokenizer.json").get_vocab() != its:
            raise RecipeError(
                f"the student {student.name!r} has another vocabulary than its teacher, and on_policy.divergence "
                "compares the two id by id",
                where=f"{ctx.stage}.on_policy.divergence",
                fix="set it to {kind: alm} or {kind: uld}",
            )


def _able(spec: Spec, inputs: Mapping[str, Artifact], ctx: Context) -> None:
    """See that the teacher and every student can be asked, and adapted. Those who read alike are looked at once."""
    label, teacher = inputs["label"].path, inputs["model"].file("model")
    asking.check_replies(spec, label, teacher, coming.context_of(read_config(teacher)), ctx.stage)
    readers = {student.start or student.tokenizer: student for student in spec.students}
    for student in readers.values():
        chat = _chat(student, inputs, ctx)
        config = {"max_position_embeddings": CONTEXT} if student.tokenizer else read_config(chat)
        if student.start is not None:
            coming.require(coming.unadaptable(spec.lora, config), ctx.stage)
            asking.check_replies(spec, label, chat, coming.context_of(config), ctx.stage)
        if spec.on_policy is not None:
            asking.check(spec.on_policy, label, chat, coming.context_of(config), f"{ctx.stage}.on_policy")


def _learn(
    spec: Spec, student: Student, arm: str, data: Path, inputs: Mapping[str, Artifact], ctx: Context
) -> dict[str, Any]:
    """Train one model under supervision, export and evaluate it."""
    label = inputs["label"]
    training = spec.training(student, arm == "control" and control_mode(spec.mode, label) == "direct")
    teacher = inputs["model"].digest if arm == "student" else None
    base: dict[str, Any] = {
        "spec": training.model_dump(mode="json"), "seed": ctx.seed, "data": str(data),
        "chat": str(_chat(student, inputs, ctx)),
        "content": [label.digest, teacher, spec.harvest.model_dump(mode="json")],
    }  # fmt: skip
    if student.start is not None:
        base |= {"start_model": base["chat"], "content": [*base["content"], student.start, student.start_content]}
    first = student is spec.students[0] and arm == "student"
    return _trained(training, base, student, arm, label, ctx, spec.fault if first else None, training.limit)


def _go_on(
    spec: OnPolicySpec, limit: int | None, student: Student, inputs: Mapping[str, Artifact], ctx: Context
) -> dict[str, Any]:
    """The student goes on from where it is, on its own replies."""
    label, teacher = inputs["label"], inputs["model"]
    base = {
        "spec": spec.model_dump(mode="json"), "seed": ctx.seed, "data": str(label.path), "objective": "on_policy",
        "chat": str(_chat(student, inputs, ctx)), "start_model": str(_folder(ctx, student, "student")),
        "teacher": str(teacher.file("model")), "content": [label.digest, teacher.digest],
    }  # fmt: skip
    return _trained(spec, base, student, "on-policy", label, ctx, spec.fault, limit)


def _trained(
    training: Supervised,
    base: Mapping[str, Any],
    student: Student,
    arm: str,
    label: Artifact,
    ctx: Context,
    fault: Fault | None,
    limit: int | None,
) -> dict[str, Any]:
    model = _folder(ctx, student, arm)
    model.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(base["chat"], model, ignore=shutil.ignore_patterns(*OF_ITS_WEIGHTS))
    final, last = proofs.through(ctx, training, base, _called(student, arm), fault)
    exported = proofs.exported(ctx, base, final, last, model)
    accuracy = proofs.evaluate(ctx, model, label, last, limit)
    write_json(model.parent / f"{arm}.json", {**accuracy, **({} if limit is None else {"max_new": limit})})
    config = read_config(model)
    arch = next(iter(config.get("architectures") or ()), config.get("model_type"))
    return {**accuracy, "parameters": exported["parameters"], "pool": last.name, "arch": arch}


def _begin(student: Student, ctx: Context) -> Path:
    """The folder of the model that a student begins from, copied or unpacked once."""
    assert student.start is not None
    folder = ctx.work / "starts" / student.name
    if not folder.exists():
        part = folder.with_name(f"{student.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.parent.mkdir(parents=True, exist_ok=True)
        source.bring(student.start, part, ctx, f"the start of {student.name!r}")
        part.rename(folder)
    return folder


def _chat(student: Student, inputs: Mapping[str, Artifact], ctx: Context) -> Path:
    """A folder with the student's tokenizer and template: its own, or its teacher's."""
    if student.start is not None:
        return _begin(student, ctx)
    if student.tokenizer is None:
        return inputs["model"].file("model")
    folder = ctx.work / "tokenizers" / student.tokenizer
    write_tiny(folder, inputs["label"].json("vocabulary.json"), student.tokenizer)
    return folder


def _folder(ctx: Context, student: Student, arm: str) -> Path:
    return ctx.out / "students" / student.name / arm


def _row(
    student: Student,
    found: Mapping[str, Mapping[str, Any]],
    teacher: float,
    modes: tuple[Mode, Mode] = ("thinking", "thinking"),
) -> dict[str, Any]:
    """What students.json says of a student. low, high: the paired 95% interval of student minus control; modes: how
    the student and its control are asked."""
    own, control = (found[arm][mode] for arm, mode in zip(ARMS, modes, strict=True))
    both = paired(control["right"], own["right"])
    thinks = modes[0] == "thinking"
    return {
        "name": student.name,
        "arch": student.shape.config(0)["architectures"][0] if student.shape else found["student"]["arch"],
        "stands_for": student.stands_for,
        "tokenizer": student.tokenizer,
        "params": found["student"]["parameters"],
        "pool": found["student"]["pool"],
        "thinking": own["value"] if thinks else None,
        "control": control["value"],
        "low": both.low,
        "high": both.high,
        "kept": _kept(own, teacher),
        "n": both.n,
        "on_policy": _went_on(own, found["on_policy"][modes[0]], teacher) if "on_policy" in found else None,
        "direct": found["student"]["direct"]["value"],
        "control_direct": found["control"]["direct"]["value"],
        **({} if modes == ("thinking", "thinking") else {"mode": modes[0], "control_mode": modes[1]}),
        **({"control_thinking": found["control"]["thinking"]["value"]} if _also_thinks(found, modes) else {}),
        **({} if "before" not in found else _since(student, found["before"][modes[0]], own)),
    }


def _kept(own: Mapping[str, Any], teacher: float) -> float:
    """The share of the teacher's accuracy, on the same problems in the same mode with as long a reply."""
    return round(own["value"] / teacher, 4) if teacher else 0.0


def _went_on(before: Mapping[str, Any], after: Mapping[str, Any], teacher: float) -> dict[str, Any]:
    """What a student's own replies brought: its accuracy before and after, the paired interval, and what it keeps."""
    return {**proofs.gain(before, after), "kept": _kept(after, teacher)}


def _also_thinks(found: Mapping[str, Mapping[str, Any]], modes: tuple[Mode, Mode]) -> bool:
    """Whether a control that is asked directly was asked with thinking on as well, as its student is."""
    return modes == ("thinking", "direct") and "thinking" in found["control"]


def _ungraded(out: Path) -> Iterator[list[str]]:
    """What is to be said of the evaluations: the teacher's, and every student's."""
    for path in [*out.glob("teacher.json"), *sorted(out.glob("students/*/*.json"))]:
        whose = "the teacher" if path.name == "teacher.json" else f"{path.parent.name}, {path.stem}"
        yield verdicts.of_evaluation(json.loads(path.read_text()), whose)


def _since(student: Student, before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Of a student that began from a model that was there: what that solved, and the paired interval of the gain."""
    return {"start": student.start, "before": proofs.gain(before, after)}


def _called(student: Student, arm: str) -> str:
    return f"{arm}:{student.name}"
