"""Which algorithm to reinforce with: a table of several, at equal replies, over seeds, and the default that follows.

Each seed has its own cold start (its part of the label artifact's traces, its own first weights) and its own fresh
test problems. All algorithms begin from that one model and are evaluated on that one test, so they are compared in
pairs. Equal replies: as many are drawn by every algorithm, and each that is learnt from is learnt from as often.
Dynamic sampling draws replies that nobody learns from; with `equal: rows` it pays for them with updates. What a run
takes of CPU time is no more equal for that, and is told (`cpu_s`).

Every algorithm is searched alike before: as many trials, on seeds that the table does not have (below `DEV`).
The rule by which the default follows was written before any number was there: `RULE`.

    algorithms.json   the table      search.json   what was tried before, and chosen      trials.jsonl   every trial
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from ottava import recipe, tasks
from ottava.artifact import Artifact, digest_of, write_json
from ottava.context import Context
from ottava.document import Part
from ottava.errors import DataError
from ottava.labels.hygiene import normals, require_disjoint
from ottava.models.chat import write_tiny
from ottava.recipe import Frozen, Name
from ottava.supervisor import loop
from ottava.tasks.base import generator, problem_of, read_lines, row, write_lines
from ottava.tasks.statistics import t_interval
from ottava.trainer import asking, verdicts
from ottava.trainer.rl_spec import ReinforceSpec
from ottava.trainer.spec import CONTEXT, TrainSpec
from ottava.trainer.supervised import Positive
from ottava.trainer.trials import RESULT, TRIAL

VERSION = "1"
INPUTS = ("label",)
CARE = frozenset({"budget_s", "pool", "seeds", "arms", "search", "reinforce", "equal"})
"""A trial is known by what it is asked: those of an interrupted comparison serve one with other arms or seeds."""

DEV = 1000
MORE = 0.05
RULE = (
    "The default is the baseline, unless for another algorithm the interval of its paired differences to the baseline "
    "over seeds lies above 0, at 95% for all algorithms together (Bonferroni); of several such, the one with the "
    f"highest mean gain. One that drew over {MORE:.0%} more replies than the baseline was given more and "
    "cannot be the default."
)


_UNSUPERVISED = (
    "fault", "audit", "spike", "restarts", "hang_s", "hang_least_s", "leave_stragglers", "checkpoint_every", "drift",
    "go_no_go",
)  # fmt: skip
_WHOLE = "it is the whole stage's; say it beside arms"
_NONE_OF_IT = {
    **dict.fromkeys(_UNSUPERVISED, "a trial has no supervisor: one that is cut off is done again; leave it out"),
    "budget_s": _WHOLE, "pool": _WHOLE,
    "min_thinking": "the table has no verdict; leave it out",
}  # fmt: skip
"""Keys of a trial's section that nothing would read, and why."""

_NOT_BY_STARTS = {
    **_NONE_OF_IT,
    "harvest": "a cold start learns from the label artifact's traces; leave it out",
    "lora": "a cold start begins from random weights; say lora in reinforce, for adapters on what it made",
    "max_new": "replies are evaluated as long as their questions allow; leave it out",
    "max_label_error": "it is the train stage's to refuse a data set; leave it out",
}


Change = Annotated[dict[str, Any], Part(ReinforceSpec)]


class Arm(Frozen):
    """One algorithm. change: to the `reinforce` section; tries: further changes that the search tries, each alone."""

    name: Name
    change: Annotated[Change, Field(default_factory=dict)]
    tries: Annotated[tuple[Change, ...], Field(min_length=1)] = ({},)

    @field_validator("change", mode="before")
    @classmethod
    def _heard(cls, said: Any) -> Any:
        return recipe.unused(said, _NONE_OF_IT, "change")

    @field_validator("tries", mode="before")
    @classmethod
    def _each_heard(cls, said: Any) -> Any:
        for index, one in enumerate(said if isinstance(said, list | tuple) else ()):
            recipe.unused(one, _NONE_OF_IT, "tries", (index,))
        return said


ARMS = tuple(Arm(name=loss, change={"policy": {"loss": loss}}) for loss in ("grpo", "dr_grpo", "dapo", "gspo", "cispo"))


class Search(Frozen):
    """What every algorithm is given before the table: each of its tries at each of these learning rates."""

    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=DEV)], ...], Field(min_length=1)] = (1, 2)
    rates: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (3e-4, 6e-4, 1.2e-3)


class Spec(recipe.Spec):
    """Algorithms, seeds, and what all of them have in common."""

    seeds: Annotated[tuple[Annotated[int, Field(ge=DEV)], ...], Field(min_length=2)] = (1001, 1002, 1003, 1004, 1005)
    cold_start: Annotated[int, Field(ge=1, description="of the label artifact's traces, those of one seed")] = 150
    test_per_length: Annotated[Positive, Field(description="fresh test problems of each number of steps, a seed")] = 200
    train: Annotated[TrainSpec, Field(description="how the cold start is learnt")] = TrainSpec()
    reinforce: Annotated[ReinforceSpec, Field(description="what all algorithms have in common")] = ReinforceSpec()
    arms: Annotated[tuple[Arm, ...], Field(min_length=1)] = ARMS
    baseline: Name = "grpo"
    equal: Annotated[
        Literal["rows", "updates"], Field(description="rows: a run ends when its replies are drawn; updates: its steps")
    ] = "rows"
    search: Search | None = None

    @field_validator("train", mode="before")
    @classmethod
    def _of_starts(cls, said: Any) -> Any:
        return recipe.unused(said, _NOT_BY_STARTS, "train")

    @field_validator("reinforce", mode="before")
    @classmethod
    def _of_all(cls, said: Any) -> Any:
        return recipe.unused(said, _NONE_OF_IT, "reinforce")

    @model_validator(mode="after")
    def _consistent(self) -> Spec:
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names) or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("two algorithms have the same name, or a seed is there twice")
        if self.baseline not in names:
            raise ValueError(f"the baseline {self.baseline!r} is none of {', '.join(names)}")
        if "loss" in self.reinforce.policy.model_fields_set:
            raise ValueError("`reinforce` says what all algorithms have in common: the loss is said in `arms`")
        if self.search is not None and len({len(arm.tries) for arm in self.arms}) > 1:
            raise ValueError("every algorithm is to be searched alike: give each as many tries")
        for number, arm in enumerate(self.arms):
            for change in [merged(arm.change, one) for one in arm.tries]:  # all, whether they will be tried or not
                try:
                    self.asked(change)
                except ValidationError as error:
                    raise _placed(error, arm, number) from None
        return self

    def unmet(self, name: str, stages: Mapping[str, recipe.Spec]) -> tuple[tuple[str, ...], str, str] | None:
        before = recipe.earlier(name, stages)
        there = getattr(before.get("label"), "cold_start", self.cold_start)
        if self.cold_start > there:
            what = f"a seed's cold start is to have {self.cold_start} traces, and the stage 'label' makes {there}"
            return ("cold_start",), what, "raise label.cold_start, or lower compare.cold_start"
        asked = [self.asked(change) for arm in self.arms for change in self.changes(arm)]
        model = self.train.shape.config(0)
        found = next(filter(None, (one.unfit(before, model) for one in asked)), None)
        return found and (("reinforce", *found[0]), *found[1:])

    def changes(self, arm: Arm) -> list[dict[str, Any]]:
        """What an algorithm changes in each trial of its search; the first where nothing is searched."""
        if self.search is None:
            return [merged(arm.change, arm.tries[0])]
        rates = [{"optimiser": {"adam": rate, "embedding": rate}} for rate in self.search.rates]
        return [merged(merged(arm.change, one), rate) for one in arm.tries for rate in rates]

    def asked(self, change: Mapping[str, Any]) -> ReinforceSpec:
        """The whole section of a changed run. What the changes leave open has the algorithm's own defaults."""
        return ReinforceSpec.model_validate(merged(self.reinforce.model_dump(exclude_unset=True), change))


def _placed(error: ValidationError, arm: Arm, number: int) -> ValidationError:
    """What is wrong with an algorithm's changed section, with its place among the changes as the recipe has them."""
    first = error.errors()[0]
    loc = tuple(part for part in first["loc"] if not str(part).startswith("function-"))
    places = [((("tries", index)), one) for index, one in enumerate(arm.tries)] + [(("change",), arm.change)]
    place = next((place for place, said in places if loc and _has(said, loc)), ("change",))
    kind: Any = first["type"]
    if kind != "extra_forbidden":
        kind = PydanticCustomError("value_error", "{said}", {"said": f"of {arm.name!r}: {first['msg']}"})
    details = InitErrorDetails(type=kind, loc=("arms", number, *place, *loc), input=first["input"])
    return ValidationError.from_exception_data("compare", [details])


def _has(said: Any, loc: Sequence[str | int]) -> bool:
    """Whether something stands at a place inside a mapping."""
    for part in loc:
        if not isinstance(said, Mapping) or part not in said:
            return False
        said = said[part]
    return True


def merged(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with what `change` says, section by section."""
    both = {**base, **change}
    inner = {name for name in base.keys() & change.keys() if isinstance(base[name], Mapping)}
    return both | {name: merged(base[name], change[name]) for name in inner if isinstance(change[name], Mapping)}


def run(spec: Spec, inputs: Mapping[str, Artifact], ctx: Context) -> Artifact:
    """Cold starts, the search, the table."""
    label = inputs["label"]
    dev = () if spec.search is None else spec.search.seeds
    chat = ctx.work / "chat"
    write_tiny(chat, label.json("vocabulary.json"))
    asks = {(one.levels, one.mode, one.rollout.max_new): one for one in (spec.asked(arm.change) for arm in spec.arms)}
    for asked in asks.values():  # arms that ask alike are looked at once
        asking.check(asked, label.path, chat, CONTEXT, "compare.reinforce")
    starts = {seed: _start(spec, label, ctx, seed) for seed in (*dev, *spec.seeds)}
    _carry_out(ctx, list(starts.values()), (0.0, 0.25), "cold starts")
    arms = {arm.name: spec.changes(arm) for arm in spec.arms}
    tried = {name: [[_trial(spec, ctx, starts[s], c) for s in dev] for c in arms[name]] for name in arms}
    _carry_out(ctx, [one for rows in tried.values() for row in rows for one in row], (0.25, 0.6), "the search")
    search = {name: _chosen(arms[name], tried[name]) for name in arms}
    final = {name: [_trial(spec, ctx, starts[s], search[name]["chosen"]) for s in spec.seeds] for name in arms}
    _carry_out(ctx, [one for row in final.values() for one in row], (0.6, 1.0), "the table")
    found = {name: [_figures(folder) for folder in row] for name, row in final.items()}
    rows = [{**row, "change": search[row["name"]]["chosen"]} for row in table(spec.baseline, found)]
    _write(ctx, rows, search, starts, {"search": _flat(tried), "table": final})
    summary = {
        "algorithms": rows, "baseline": spec.baseline, "seeds": list(spec.seeds), "equal": spec.equal, "rule": RULE,
        "not_shown": [row["name"] for row in rows if row["name"] != spec.baseline and not _shown(row)],
        **_remarks(starts, final),
    }  # fmt: skip
    return ctx.commit(summary)


# ------------------------------------------------------------ the table


def table(baseline: str, found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of the table, and by RULE the default. found: by algorithm, a trial's figures for each seed in order.

    gain: the mean over seeds of after - before, low and high its 95% t-interval. difference: of the gain to the
    baseline's, seed by seed, with its interval at 95% for all algorithms together; None for the baseline itself.
    Raises DataError for fewer than two seeds.
    """
    gains = {name: [one["after"] - one["before"] for one in trials] for name, trials in found.items()}
    confidence = 1 - 0.05 / max(1, len(found) - 1)
    rows: list[dict[str, Any]] = []
    for name, trials in found.items():
        differences = [own - other for own, other in zip(gains[name], gains[baseline], strict=True)]
        between = (None, None) if name == baseline else t_interval(differences, confidence)
        low, high = t_interval(gains[name])
        rows.append({
            "name": name, "gain": math.fsum(gains[name]) / len(trials), "low": low, "high": high, "seeds": len(trials),
            **{key: math.fsum(one[key] for one in trials) / len(trials) for key in MEANS},
            "difference": None if name == baseline else math.fsum(differences) / len(trials),
            "difference_low": between[0], "difference_high": between[1],
            "stopped": sum(one["stopped"] is not None for one in trials),
        })  # fmt: skip
    most = (1 + MORE) * next(row["rows"] for row in rows if row["name"] == baseline)
    better = [row for row in rows if row["name"] != baseline and row["difference_low"] > 0 and row["rows"] <= most]
    default = max(better, key=lambda row: row["gain"])["name"] if better else baseline
    return [{**row, "default": row["name"] == default} for row in rows]


MEANS = ("before", "after", "updates", "rows", "ids", "cpu_s")
"""Of a trial; a row of the table has their means over seeds. rows, ids: replies that were drawn, and their ids."""


def _remarks(starts: Mapping[int, Path], final: Mapping[str, Sequence[Path]]) -> dict[str, list[str]]:
    """What is to be said of the table's trials: replies without a verdict, and runs in which nothing was learnt."""
    said = [verdicts.of_evaluation(_json(folder / RESULT), f"the start of seed {s}") for s, folder in starts.items()]
    for name, folders in final.items():
        results = [_json(folder / RESULT) for folder in folders]
        said += [verdicts.of_evaluation(result, f"{name}, seed {_json(folder / TRIAL)['seed']}")
                 for result, folder in zip(results, folders, strict=True)]  # fmt: skip
        learnt = Counter(remark for result in results for remark in result.get("remarks", ()))
        said += [[f"{name}, {count} of {len(results)} seeds: {remark}" for remark, count in learnt.items()]]
    return verdicts.said(*said)


def _shown(row: Mapping[str, Any]) -> bool:
    """Whether an algorithm was told from the baseline, for better or worse."""
    return bool(row["difference_low"] > 0 or row["difference_high"] < 0)


def _chosen(changes: Sequence[dict[str, Any]], tried: Sequence[Sequence[Path]]) -> dict[str, Any]:
    """The change with the highest mean gain over the dev seeds, the first of equal ones; and all that was tried."""
    trials: list[dict[str, Any]] = []
    for change, folders in zip(changes, tried, strict=True):
        gains = [one["after"] - one["before"] for one in map(_figures, folders)]
        trials.append({"change": change, "gains": gains, "gain": statistics.fmean(gains) if gains else None})
    if not tried[0]:
        return {"chosen": changes[0], "trials": []}
    return {"chosen": max(trials, key=lambda trial: trial["gain"])["change"], "trials": trials}


def _figures(folder: Path) -> dict[str, Any]:
    """What the table needs of a trial."""
    result, start = _json(folder / RESULT), _json(Path(_json(folder / TRIAL)["start"]) / RESULT)
    before, after = start["thinking"]["value"], result["thinking"]["value"]
    own = {name: result[name] for name in (*MEANS, "stopped") if name in result}
    return {**own, "before": before, "after": after}


# ------------------------------------------------------------ trials


def _start(spec: Spec, label: Artifact, ctx: Context, seed: int) -> Path:
    """The folder of a seed's cold start, with its data."""
    training = spec.train.model_dump(mode="json", exclude=loop.CARE)
    content = [VERSION, "start", label.digest, seed, spec.cold_start, spec.test_per_length, training, _where(ctx)]
    folder = ctx.work / "starts" / digest_of(content)[:16]
    if not (folder / TRIAL).exists():
        data = folder / "data"
        shutil.rmtree(data, ignore_errors=True)
        data.mkdir(parents=True)
        _data(spec, label, seed, data)
        write_tiny(data / "chat", label.json("vocabulary.json"))
        asked = {
            "kind": "start", "seed": seed, "spec": spec.train.model_dump(mode="json"), "data": str(data),
            "chat": str(data / "chat"), "task": label.manifest["spec"]["task"],
        }  # fmt: skip
        write_json(folder / TRIAL, asked)
    return folder


def _data(spec: Spec, label: Artifact, seed: int, data: Path) -> None:
    """A seed's traces, as many of every length, all answers, and fresh test problems. Raises DataError."""
    task = tasks.get(label.manifest["spec"]["task"])
    by_steps: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    for line in read_lines(label.file("cold_start.jsonl")):
        by_steps[int(line["steps"])].append(line)
    cold: list[dict[str, Any]] = []
    for done, (steps, lines) in enumerate(sorted(by_steps.items())):
        share = -(-(spec.cold_start - len(cold)) // (len(by_steps) - done))
        order = generator(seed, "compare", "cold start", steps).permutation(len(lines))
        cold += [lines[i] for i in order[:share]]
    if len(cold) < spec.cold_start:
        raise DataError(
            f"a seed's cold start is to have {spec.cold_start} traces, and there are {len(cold)}",
            where=label.path, fix="raise label.cold_start, or lower compare.cold_start",
        )  # fmt: skip
    test = [
        problem for steps in sorted(by_steps)
        for problem in task.sample(generator(seed, "compare", "test", steps), steps, spec.test_per_length, "test")
    ]  # fmt: skip
    answers = [problem_of(line) for line in read_lines(label.file("answers.jsonl"))]
    require_disjoint([*map(problem_of, cold), *answers], test, normals(task))
    write_lines(data / "cold_start.jsonl", cold)
    write_lines(data / "test.jsonl", (row(task.NAME, problem) for problem in test))
    shutil.copyfile(label.file("answers.jsonl"), data / "answers.jsonl")


def _trial(spec: Spec, ctx: Context, start: Path, change: Mapping[str, Any]) -> Path:
    """The folder of one run from a start. Two algorithms that ask the same share it."""
    begun, asked = _json(start / TRIAL), spec.asked(change)
    how = asked.rollout
    generations = asked.steps // asked.every
    rows = generations * asked.virtual_shards * how.prompts * how.group if spec.equal == "rows" else None
    content = [VERSION, start.name, asked.model_dump(mode="json", exclude=loop.CARE), rows, _where(ctx)]
    folder = ctx.work / "trials" / digest_of(content)[:16]
    if not (folder / TRIAL).exists():
        folder.mkdir(parents=True, exist_ok=True)
        model = str(start / "model")
        own = {"kind": "arm", "objective": "grpo", "spec": asked.model_dump(mode="json"), "rows": rows}
        write_json(folder / TRIAL, {**begun, **own, "start": str(start), "start_model": model, "chat": model})
    return folder


def _where(ctx: Context) -> Any:
    """What the numerics of a trial depend on, beside what it is asked."""
    return [ctx.pool.platform, ctx.pool.env]


def _carry_out(ctx: Context, folders: Sequence[Path], span: tuple[float, float], what: str) -> None:
    """Have all these trials done, by the pool's workers side by side."""
    wanted = list(dict.fromkeys(folders))
    left = [folder for folder in wanted if not (folder / RESULT).exists()]
    args = {"trials": list(map(str, left)), "platform": ctx.pool.platform}
    places = ctx.launcher.rendezvous(ctx.pool, min(ctx.pool.workers, len(left))) if left else []
    processes = [ctx.spawn("ottava.trainer.trials:work", args, env=env) for env in places]
    try:
        going, told = list(processes), -1
        while going:
            for process in [process for process in going if not process.alive()]:
                process.result()  # raises what it raised
                going.remove(process)
            done = sum((folder / RESULT).exists() for folder in wanted)
            if done != told:
                ctx.progress(span[0] + (span[1] - span[0]) * done / len(wanted), f"{what}: {done} of {len(wanted)}")
                told = done
            time.sleep(0.1)
    finally:
        for process in processes:
            if process.alive():
                process.kill()


def _flat(tried: Mapping[str, Sequence[Sequence[Path]]]) -> dict[str, list[Path]]:
    return {name: [folder for row in rows for folder in row] for name, rows in tried.items()}


def _write(
    ctx: Context,
    rows: Sequence[Mapping[str, Any]],
    search: Mapping[str, Any],
    starts: Mapping[int, Path],
    trials: Mapping[str, Mapping[str, Sequence[Path]]],
) -> None:
    write_json(ctx.out / "algorithms.json", {"rule": RULE, "algorithms": list(rows)})
    write_json(ctx.out / "search.json", search)
    seeds = {str(folder): seed for seed, folder in starts.items()}
    lines = [{"part": "start", "seed": seed, **_json(folder / RESULT)} for seed, folder in starts.items()]
    for part, its in trials.items():
        for name, folders in its.items():
            for folder in folders:
                asked = _json(folder / TRIAL)
                own = {"part": part, "name": name, "seed": seeds[asked["start"]], "spec": asked["spec"]}
                lines.append({**own, **_json(folder / RESULT)})
    write_lines(ctx.out / "trials.jsonl", lines)


def _json(path: Path) -> Any:
    """A JSON file, read."""
    return json.loads(path.read_text())
