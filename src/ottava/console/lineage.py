"""From a line of a data set to the training steps that learnt from it, and back.

A line leads to its sources, its votes and its certificate by what stands beside it in the label artifact. Which lines a
step learnt from was never written down, and need not be: a batch is a pure function of (spec, seed, step, shard), and
the run's artifacts hold all of these. So the trainer's own draw (`trainer.data.draw`) is asked again, over the numbers
of the lines instead of their tokens. What reinforcement asked was chosen by what it had learnt: that is read from its
records. There are no epochs: every step draws with replacement.

Steps are numbered as in the journal: the first one is 1. The replay that proves a run saw the same lines in the same
steps, and is not told of.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from ottava import artifact, journal, stages
from ottava.artifact import Artifact
from ottava.console import source
from ottava.console.source import Source
from ottava.errors import ArtifactError, DataError, OttavaError
from ottava.labels.traces import VOTES
from ottava.stages import distill
from ottava.tasks.base import read_lines
from ottava.trainer import data, grpo
from ottava.trainer.rl_spec import ReinforceSpec
from ottava.trainer.spec import FineTuning, TrainSpec

SETS = ("cold_start.jsonl", "answers.jsonl", "test.jsonl", "test_one_step.jsonl")
NOT_TRACED = {
    "distill": "what its students asked themselves (on_policy) is not kept",
    "compare": "its trials draw parts of the data of their own, and keep no record of them",
}


class Use(NamedTuple):
    """One example of one step. mode: thinking, direct, or asked (by reinforcement); shard: the virtual shard, place: in
    its batch, from 0; pool: where the step was made, None where the run does not say; file: the data set's, by its path
    in the run; line: its number, from 1."""

    stage: str
    step: int
    mode: str
    shard: int
    place: int
    pool: str | None
    file: str
    line: int


@dataclass(frozen=True)
class Trained:
    """A stage that learnt from lines. label: whose; steps: so many are done; uses: of one step."""

    stage: str
    label: Artifact
    steps: int
    uses: Callable[[int], Iterator[Use]]


class Lineage:
    """A run's, read once."""

    def __init__(self, run: Path, stage: str | None = None):
        """stage: of this one alone. Raises OttavaError where `run` is no run's folder or the stage cannot be traced."""
        self._its = source.read(run)
        self._runs, self._untraced = _stages(self._its, stage)
        self._rows: dict[Path, list[dict[str, Any]]] = {}

    def line(self, name: str) -> dict[str, Any]:
        """Where the line `name` (its id) is from, and every step that learnt from it. Raises DataError where there is
        no such line."""
        run = self._its.folder
        labels = {one.label.digest: one.label for one in self._runs} or {
            a.digest: a for a in _labels(self._its).values()
        }
        found = [
            {"file": _named(run, label.path / file), "number": number, **_provenance(label, file, row)}
            for label in labels.values()
            for file in SETS
            for number, row in enumerate(self._lines(label.path / file), 1)
            if row["id"] == name
        ]
        if not found:
            where = ", ".join(_named(run, label.path) for label in labels.values()) or run
            raise DataError(f"no line has the id {name!r}", where=where, fix="name an id of its .jsonl files")
        uses = (use for one in self._runs for step in range(1, one.steps + 1) for use in one.uses(step))
        return {
            "run": str(run), "line": name, "found": found,
            "seen": [use._asdict() for use in uses if self._row(use)["id"] == name],
            "steps_done": {one.stage: one.steps for one in self._runs}, "not_traced": self._untraced,
            "certificates": {_named(run, label.path): _certificate(label) for label in labels.values()},
        }  # fmt: skip

    def step(self, number: int) -> dict[str, Any]:
        """The lines that a step learnt from, with where they are from. Raises DataError where that step was not done,
        or several stages have it."""
        run, names = self._its.folder, ", ".join(one.stage for one in self._runs)
        if len(self._runs) != 1:
            what = (
                f"several stages have a step {number}: {names}" if names else "no stage of this run learnt from lines"
            )
            raise DataError(what, where=run, fix="--stage NAME" if names else "run the recipe to its `train` stage")
        (one,) = self._runs
        if not 1 <= number <= one.steps:
            what = f"{one.stage} has done {one.steps} steps, and {number} is none of them"
            raise DataError(what, where=run, fix=f"--step 1 to {one.steps}" if one.steps else "wait for its first")
        lines = []
        for use in one.uses(number):
            row, path = self._row(use), run / use.file
            of = one.label if path.parent == one.label.path else None
            lines.append({"id": row["id"], **use._asdict(), **_provenance(of, path.name, row)})
        return {
            "run": str(run), "stage": one.stage, "step": number, "lines": lines, "not_traced": self._untraced,
            "certificate": _certificate(one.label), "data": _of(one.label),
        }  # fmt: skip

    def _row(self, use: Use) -> dict[str, Any]:
        return self._lines(self._its.folder / use.file)[use.line - 1]

    def _lines(self, path: Path) -> list[dict[str, Any]]:
        """A data set's lines; none where there is no such file."""
        if path not in self._rows:
            self._rows[path] = read_lines(path) if path.exists() else []
        return self._rows[path]


# ---- which stages learnt, and from what


def _stages(its: Source, asked: str | None) -> tuple[list[Trained], dict[str, str]]:
    """Those that can be traced, in order, and why the others cannot."""
    names = list(its.asked["stages"])
    if asked is not None and asked.partition("/")[0] not in names:
        raise DataError(f"the run has no stage {asked!r}", where=its.folder, fix=f"it has {', '.join(names)}")
    found: list[Trained] = []
    untraced: dict[str, str] = {}
    for name in names:
        kind = name.partition("-")[0]
        if name in its.altered:
            untraced[name] = f"its artifact is not as it was written: {its.altered[name]}"
        elif kind in _TRACED:
            try:
                found += _TRACED[kind](its, name)
            except _Unmade as unmade:
                untraced[name] = str(unmade)
            except ValidationError:
                untraced[name] = "another version made it, with fields that this one does not know"
        if kind in NOT_TRACED and name in its.artifacts and (kind != "distill" or _on_policy(its.artifacts[name])):
            untraced[name] = NOT_TRACED[kind]
    if asked is None:
        return found, untraced
    chosen = [one for one in found if one.stage == asked or one.stage.partition("/")[0] == asked]
    if not chosen:
        why = untraced.get(asked, "it learns from no lines")
        raise DataError(f"{asked} cannot be traced: {why}", where=its.folder)
    return chosen, untraced


class _Unmade(Exception):
    """Why a stage has no steps to tell of."""


def _train(its: Source, name: str) -> list[Trained]:
    """Supervised fine-tuning, finished or at work."""
    done = its.artifacts.get(name)
    if done is not None:
        spec, seed, label = TrainSpec.model_validate(done.manifest["spec"]), done.manifest["seed"], _label(its, done)
        pools, steps = _pools(done.json("proof.json")["segments"]), spec.steps
        traces = done.path / "traces"
    else:
        state = its.history.state.stages.get(name)
        if state is None or state.status not in ("running", "interrupted", "failed"):
            raise _Unmade("it was not begun")
        spec, seed = TrainSpec.model_validate(its.asked["stages"][name]), its.asked["seed"]
        label = _labels(its)[str(stages.resolve("@label", name, list(its.asked["stages"]))[0])]
        phase = "main" if name == "train" else name
        events = journal.standing(journal.read(its.folder / "journal.jsonl"), "train.step", phase)
        pools, steps = {int(e["step"]): str(e["pool"]) for e in events}, len(events)
        traces = its.folder / "work" / name / "out" / "traces"
    folder = label.path if spec.harvest is None else traces
    return [Trained(name, label, steps, _drawn(its.folder, name, spec, int(seed), folder, pools))]


def _distill(its: Source, name: str) -> list[Trained]:
    """Its students, who all draw alike, and their controls."""
    done = its.artifacts.get(name)
    if done is None:
        raise _Unmade("it is not done")
    said, seed, label = done.manifest["spec"], int(done.manifest["seed"]), _label(its, done)
    own = {name: said[name] for name in FineTuning.model_fields}  # what a student is does not change what it draws
    arms = ((done.path / "traces", said["mode"]), (label.path, distill.control_mode(said["mode"], label)))
    found = []
    for arm, (folder, mode) in zip(distill.ARMS, arms, strict=True):
        spec, called = TrainSpec.model_validate({**own, "mode": mode, "fault": None}), f"{name}/{arm}"
        found.append(Trained(called, label, spec.steps, _drawn(its.folder, called, spec, seed, folder, {})))
    return found


def _reinforce(its: Source, name: str) -> list[Trained]:
    done = its.artifacts.get(name)
    if done is None:
        raise _Unmade("it is not done, and what it asks is put together at its end")
    spec, label = ReinforceSpec.model_validate(done.manifest["spec"]), _label(its, done)
    pools, path = _pools(done.json("proof.json")["segments"]), label.path / "answers.jsonl"
    numbers: dict[str, int] = {}
    for number, row in enumerate(read_lines(path), 1):
        numbers.setdefault(row["question"], number)
    by_step: dict[int, list[Use]] = {}
    for at, shard, place, question in grpo.asked(done.path / "rollouts", spec):
        use = Use(name, at, "asked", shard, place, pools.get(at), _named(its.folder, path), numbers[question])
        by_step.setdefault(at, []).append(use)
    return [Trained(name, label, spec.steps, lambda step: iter(by_step.get(step, ())))]


_TRACED: Mapping[str, Callable[[Source, str], list[Trained]]] = {
    "train": _train, "distill": _distill, "reinforce": _reinforce,
}  # fmt: skip


def _drawn(
    run: Path, stage: str, spec: TrainSpec, seed: int, folder: Path, pools: Mapping[int, str]
) -> Callable[[int], Iterator[Use]]:
    """What a step of supervised fine-tuning learns from, by the trainer's own draw."""
    numbers, (thinking, direct) = data.numbered(folder, spec.mode), data.files(folder, spec.mode)

    def uses(step: int) -> Iterator[Use]:
        draws = data.draw(numbers, spec, seed, step - 1)  # step N is made from the state after N - 1 steps
        for shard in range(spec.virtual_shards):
            batch = data.share(draws, shard)
            parts = [(spec.mode, thinking or direct, batch.thinking), ("direct", direct, batch.direct)]
            for mode, path, examples in parts:
                for place, number in enumerate([] if examples is None else examples.tokens[:, 0].tolist()):
                    yield Use(stage, step, mode, shard, place, pools.get(step), _named(run, path), number)

    return uses


def _pools(segments: list[dict[str, Any]]) -> dict[int, str]:
    """The pool of each step, from a proof's segments."""
    return {step: one["pool"] for one in segments for step in range(one["start"] + 1, (one["end"] or 0) + 1)}


def _on_policy(done: Artifact) -> bool:
    return done.manifest["spec"].get("on_policy") is not None


def _labels(its: Source) -> dict[str, Artifact]:
    """The artifacts with problems, by stage."""
    return {name: found for name, found in its.artifacts.items() if getattr(stages.load(name), "LABEL", False)}


def _label(its: Source, done: Artifact) -> Artifact:
    """The data set that a stage was given. Raises ArtifactError where it is gone."""
    digest = done.manifest["inputs"]["label"]
    for found in (*its.artifacts.values(), *_others(its.folder)):
        if found.digest == digest:
            return found
    what = f"the data set that {done.stage} learnt from is not in the run any more"
    raise ArtifactError(what, where=its.folder / "artifacts", fix="put it back, or run the recipe again")


def _others(run: Path) -> Iterator[Artifact]:
    """Artifacts with problems that the present recipe made no use of."""
    for path in sorted([*run.glob("artifacts/label-*"), *run.glob("artifacts/problems-*")]):
        try:
            yield artifact.load(path)
        except OttavaError:
            continue


# ---- where a line is from


def _provenance(label: Artifact | None, file: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """What stands with a line. label: the data set whose file it is of; None: a teacher's replies."""
    held = {} if label is None else {"votes": _votes(label, row), "found_wrong": _wrong(label, file, row)}
    return {
        "content_sha256": hashlib.sha256(artifact.canonical(row)).hexdigest(), "task": row.get("task"),
        "question": row.get("question"), "answer": row.get("answer"), "trace": row.get("trace"),
        "reply": row.get("reply"), "sources": row.get("sources"), "evidence": row.get("evidence"),
        **held,
    }  # fmt: skip


def _votes(label: Artifact, row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """What machines and people said of a line's trace, and of others of its problem; None where it is not kept."""
    if VOTES not in label.manifest["files"] or "trace" not in row:
        return None
    judged = map(json.loads, (label.path / VOTES).read_text(encoding="utf-8").splitlines())
    said = [one for one in judged if one["id"] == row["id"]]
    return [{**one, "delivered": one["trace"] == row["trace"]} for one in said]


def _wrong(label: Artifact, file: str, row: Mapping[str, Any]) -> bool | None:
    """Whether the audit found this very line wrong; None where it is no trace."""
    found = _certificate(label)
    return None if found is None or file != SETS[0] else row["id"] in found.get("wrong", ())


def _certificate(label: Artifact) -> dict[str, Any] | None:
    if "certificate.json" not in label.manifest["files"]:
        return None
    found: dict[str, Any] = label.json("certificate.json")
    return found


def _of(label: Artifact) -> dict[str, Any]:
    return {"artifact": label.path.name, "digest": label.digest, "seed": label.manifest["seed"]}


def _named(run: Path, path: Path) -> str:
    return path.relative_to(run).as_posix()


# ---- for people


def told(found: Mapping[str, Any]) -> str:
    """Either answer in words."""
    return "\n".join(_told_line(found) if "line" in found else _told_step(found))


def _told_line(found: Mapping[str, Any]) -> Iterator[str]:
    for one in found["found"]:
        yield f"{found['line']}  {one['file']}:{one['number']}  sha256 {one['content_sha256'][:16]}"
        yield from _told_of(one)
    for where, its in found["certificates"].items():
        yield f"  certificate of {where}: {_bound(its)}"
    yield f"  learnt from {len(found['seen'])} times, in " + (
        ", ".join(f"{name} ({steps} steps)" for name, steps in found["steps_done"].items()) or "no stage"
    )
    for use in found["seen"]:
        where = f" on {use['pool']}" if use["pool"] else ""
        yield (
            f"    {use['stage']} step {use['step']}  {use['mode']}  shard {use['shard']} place {use['place']}{where}  "
            f"{use['file']}:{use['line']}"
        )
    yield from _told_untraced(found)


def _told_step(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"{found['stage']} step {found['step']}: {len(found['lines'])} examples of {found['data']['artifact']}"
    yield f"  certificate: {_bound(found['certificate'])}"
    for one in found["lines"]:
        yield f"  shard {one['shard']} place {one['place']}  {one['mode']}  {one['id']}  {one['file']}:{one['line']}"
        yield from (f"  {line}" for line in _told_of(one))
    yield from _told_untraced(found)


def _told_of(one: Mapping[str, Any]) -> Iterator[str]:
    if one["sources"]:
        yield f"  from {', '.join(one['sources'])}: {json.dumps(one['evidence'], ensure_ascii=False)}"
    for item in one.get("votes") or ():
        said = ", ".join(f"{vote['who']} {vote['says']}" for vote in item["votes"]) or "nobody was asked"
        which = "this trace" if item["delivered"] else "another trace"
        yield f"  {which}: {item['decision']}; verifier {item['verifier']}; {said}"
    if one.get("found_wrong"):
        yield "  the audit found it wrong"


def _told_untraced(found: Mapping[str, Any]) -> Iterator[str]:
    for name, why in found["not_traced"].items():
        yield f"  {name} is not traced: {why}"


def _bound(certificate: Mapping[str, Any] | None) -> str:
    if certificate is None:
        return "none"
    return f"at most {certificate['error_upper_95']:.2%} wrong at 95%, judged by {certificate['annotator']}"
