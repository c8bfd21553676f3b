"""Walks a recipe's stages, each where the plan put it, and skips what its key says is done.

A run is a folder: `journal.jsonl`, `artifacts/STAGE-KEY/`, `work/STAGE/`. Stopped at any moment it
goes on where it was: finished stages are found by their keys, a stage in the middle finds its own
work folder. Nothing else remembers anything.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from ottava import artifact, stages
from ottava.artifact import Artifact, digest_of, write_json
from ottava.context import Context, Launcher
from ottava.errors import ArtifactError, DataError, OttavaError, RecipeError, Verdict, from_os_error
from ottava.journal import Journal
from ottava.recipe import Pool, Recipe, Spec
from ottava.supervisor.memory import Watch
from ottava.tasks import content

NOT_KEYED = {"budget_s", "pool"}  # they say when and where, not what


class Reporter(Protocol):
    """Told of a run's progress; draws bars or nothing."""

    def start(self, stage: str, pool: str, budget_s: float) -> None: ...
    def progress(self, stage: str, fraction: float, message: str) -> None: ...
    def done(self, stage: str, seconds: float, cached: bool, summary: Mapping[str, Any]) -> None: ...
    def failed(self, stage: str, message: str) -> None: ...
    def note(self, stage: str, message: str) -> None: ...


@dataclass(frozen=True)
class Placement:
    """Where a stage runs: its pool and, in order, those it may fall back to."""

    pool: Pool
    fallback: tuple[Pool, ...]


def run(
    recipe: Recipe,
    folder: Path,
    launcher: Callable[[], Any],
    reporter: Reporter,
    *,
    only: str | None = None,
    until: str | None = None,
) -> dict[str, Artifact]:
    """Carry out a recipe's stages in `folder`; the artifacts by stage.

    launcher: makes the context manager that starts processes. only: just this stage, its inputs must
    be there; until: stop after this one. Raises OttavaError; Verdict where a stage says no.
    """
    names = _selected(recipe, only, until)
    _complete(recipe)
    artifact.make_folder(folder)
    with locked(folder), launcher() as processes, Watch() as memory:
        journal = Journal(folder / "journal.jsonl")
        _remember(recipe, folder)
        journal.append("run.start", recipe=recipe.name, digest=recipe.digest, stages=list(recipe.stages))
        walk = Walk(recipe, folder, journal, processes, reporter)
        for name in recipe.stages:
            if name in names:
                walk.stage(name)
            elif only is not None:
                walk.find(name)
        journal.append("run.end", peak_memory_mb=memory.peak_mb and round(memory.peak_mb))
        return walk.done


def one_stage(recipe: Recipe, name: str, folder: Path, launcher: Callable[[], Any]) -> Artifact:
    """Do a single stage that needs no other, in a folder of its own; its artifact, or the one that is there already."""
    alone = replace(recipe, stages={name: recipe.stages[name]})
    return run(alone, folder, launcher, Quiet())[name]


class Quiet:
    """A reporter that draws nothing."""

    def start(self, stage: str, pool: str, budget_s: float) -> None:
        pass

    def progress(self, stage: str, fraction: float, message: str) -> None:
        pass

    def done(self, stage: str, seconds: float, cached: bool, summary: Mapping[str, Any]) -> None:
        pass

    def failed(self, stage: str, message: str) -> None:
        pass

    def note(self, stage: str, message: str) -> None:
        pass


@dataclass
class Walk:
    """One pass over a recipe's stages."""

    recipe: Recipe
    folder: Path
    journal: Journal
    launcher: Launcher
    reporter: Reporter

    def __post_init__(self) -> None:
        self.done: dict[str, Artifact] = {}

    def stage(self, name: str) -> None:
        """Do one stage, or find it done."""
        place = self._place(name)
        key, destination = self._address(name, place)
        found = self._existing(destination)
        begun = time.monotonic()
        if found is None:
            found = self._do(name, place, key, destination)
        else:
            self._take(name, found)
            self.reporter.done(name, time.monotonic() - begun, True, found.summary)
        self.done[name] = found
        if found.manifest.get("verdict") is False:
            raise Verdict(f"the stage {name!r} says no: {_reason(found)}", where=found.path)

    def find(self, name: str) -> None:
        """Take a stage's artifact if it is there."""
        try:
            _, destination = self._address(name, self._place(name))
        except ArtifactError:
            return
        if (found := self._existing(destination)) is not None:
            self._take(name, found)

    def _take(self, name: str, found: Artifact) -> None:
        """Use an artifact of an earlier run."""
        self.done[name] = found
        self.journal.append("stage.cached", stage=name, pool=found.manifest["pool"], artifact=found.path.name)

    def _do(self, name: str, place: Placement, key: str, destination: Path) -> Artifact:
        module, spec = stages.load(name), self.recipe.stages[name]
        work = self.folder / "work" / name
        begun_for = self._begun(name, key)
        self._prepare(name, work, begun_for)
        self.journal.append("stage.start", stage=name, pool=place.pool.name, key=key, work=begun_for)
        self.reporter.start(name, place.pool.name, spec.budget_s)
        begun = time.monotonic()
        before = _spent(work)
        inputs, outside = self._inputs(name), dict(spec.outside())
        judged = next((a.json(content.RECORD) for a in inputs.values() if content.RECORD in a.manifest["files"]), None)
        meta = {
            "stage": name, "key": key, "version": module.VERSION,
            "inputs": {n: a.digest for n, a in inputs.items()}, "spec": spec.model_dump(mode="json"),
            "recipe": self.recipe.name, "seed": self.recipe.seed, **({"outside": outside} if outside else {}),
            **({} if judged is None else {"task": judged}),
        }  # fmt: skip

        def unchanged() -> None:
            if judged is not None:
                content.require_same(judged)
            if spec.outside() != outside:
                what = f"what the stage {name!r} names outside the recipe was edited while it ran"
                raise DataError(what, where=name, fix="run the same command again: it is done anew")

        ctx = Context(
            name, self.recipe.seed, self.recipe.name, self.recipe.fleet, place.pool, place.fallback,
            self.recipe.stages, work / "out", work / "work", self.journal, self.launcher, destination, meta,
            lambda fraction, message: self.reporter.progress(name, fraction, message), unchanged,
        )  # fmt: skip
        try:
            unchanged()
            result = module.run(spec, inputs, ctx)
        except KeyboardInterrupt:
            self._ended(name, work, before, begun, "interrupted", "stopped by the user")
            raise
        except OSError as error:
            mended = from_os_error(error, f"running the stage {name!r}", self.folder)
            self._ended(name, work, before, begun, "failed", mended.what)
            raise mended from error
        except BaseException as error:
            message = error.what if isinstance(error, OttavaError) else repr(error)
            self._ended(name, work, before, begun, "failed", message)
            raise
        seconds = time.monotonic() - begun
        self.journal.append("stage.done", stage=name, seconds=round(seconds, 3), artifact=destination.name)
        self.reporter.done(name, before + seconds, False, result.summary)
        shutil.rmtree(work)
        return result

    def _ended(self, name: str, work: Path, before: float, begun: float, how: str, message: str) -> None:
        seconds = time.monotonic() - begun
        _write_spent(work, before + seconds)
        self.journal.append(f"stage.{how}", stage=name, seconds=round(seconds, 3), message=message)
        if how == "failed":
            self.reporter.failed(name, message)

    def _begun(self, name: str, key: str) -> str:
        """The key that work must have been begun for, to be gone on with.

        A stage whose `CARE` names fields of its section goes on whatever these say, and on other pools.
        """
        care = stages.care(name)
        return key if care is None else self._key(name, None, NOT_KEYED | care)

    def _prepare(self, name: str, work: Path, key: str) -> None:
        """Work that was begun for another key is put aside where it may be worth something; scratch is never kept."""
        mark = work / "key"
        if work.exists() and (not mark.exists() or mark.read_text() != key):
            if stages.care(name) is not None and any((work / "work").glob("*")):
                aside = next(p for n in itertools.count(1) if not (p := work.with_name(f"{name}-aside-{n}")).exists())
                work.rename(aside)
                self.journal.append("stage.aside", stage=name, folder=str(aside))
                self.reporter.note(name, f"asked for something else, it begins anew; the states so far are in {aside}")
            else:
                shutil.rmtree(work)
        shutil.rmtree(work / "out", ignore_errors=True)
        (work / "out").mkdir(parents=True)
        (work / "work").mkdir(exist_ok=True)
        if not mark.exists():
            with artifact.replacing(mark) as part:
                part.write_text(key)

    def _existing(self, destination: Path) -> Artifact | None:
        return artifact.load(destination) if destination.exists() else None

    def _address(self, name: str, place: Placement) -> tuple[str, Path]:
        """The key of a stage, and its artifact's folder."""
        key = self._key(name, place, NOT_KEYED)
        return key, self.folder / "artifacts" / f"{name}-{key[:12]}"

    def _key(self, name: str, place: Placement | None, left_out: set[str]) -> str:
        """A digest of what a stage is asked, of what, by which version and, with a place, on which pools."""
        spec: Spec = self.recipe.stages[name]
        told: dict[str, Any] = {
            "stage": name, "version": stages.load(name).VERSION, "seed": self.recipe.seed,
            "spec": spec.model_dump(mode="json", exclude=left_out),
            "inputs": {n: a.digest for n, a in self._inputs(name).items()},
        }  # fmt: skip
        if outside := spec.outside():
            told["outside"] = dict(outside)
        if place is not None:
            told["pools"] = [pool.model_dump(mode="json") for pool in (place.pool, *place.fallback)]
        if name in ("plan", "qualify"):  # they look at the whole recipe
            told["recipe"] = self.recipe.digest
        return digest_of(told)

    def _inputs(self, name: str) -> dict[str, Artifact]:
        inputs = {}
        for wanted in stages.load(name).INPUTS:
            stage, called = stages.resolve(wanted, name, list(self.recipe.stages))
            if stage in self.done:
                inputs[called] = self.done[stage]
            elif not wanted.startswith("?"):
                raise self._lacking(name, str(stage))
        return inputs

    def _lacking(self, name: str, stage: str) -> ArtifactError:
        """Why a stage has not what it needs: nobody made it, or what is there does not fit, by its own cause."""
        first, why = self._cause(stage)
        needs = f"the stage {name!r} needs the artifact of {stage!r}"
        if why is None:
            fix = f"run without --only first, or --only {first}"
            what = f"{needs}, which is not there"
            return ArtifactError(what if first == stage else f"{what}, as {first!r} is not", where=self.folder, fix=fix)
        whose = "the one that is there" if first == stage else f"that of {first!r} which is there"
        what = f"{needs}, and {whose} was made {why}"
        fix = f"take that back, or make the stages from {first!r} on anew: run without --only"
        return ArtifactError(what, where=self.folder, fix=fix)

    def _cause(self, stage: str) -> tuple[str, str | None]:
        """The earliest stage for whose sake `stage` has no artifact that fits, and how its newest was made otherwise;
        None where it has none at all."""
        for wanted in stages.load(stage).INPUTS:
            before, _ = stages.resolve(wanted, stage, list(self.recipe.stages))
            if before is not None and before not in self.done:
                first, why = self._cause(before)
                if why is not None or not wanted.startswith("?"):
                    return first, why
        names = (self.folder / "artifacts").glob(f"{stage}-*")
        there = [path for path in names if re.fullmatch(rf"{re.escape(stage)}-[0-9a-f]+", path.name)]
        if not there:
            return stage, None
        made = artifact.load(max(there, key=lambda path: path.stat().st_mtime)).manifest
        why = self._otherwise(stage, made)
        looks = [name for name in ("plan", "qualify") if name in self.recipe.stages and name not in self.done]
        if why is None and looks and stage != looks[0]:
            return looks[0], "for the recipe as it was: it looks at the whole of it, and says which pools stages are on"
        return stage, why or "for another fleet"

    def _otherwise(self, stage: str, made: Mapping[str, Any]) -> str | None:
        """What a stage's artifact was made with that is not so now; None where that is not of the stage itself."""
        asked = json.loads(json.dumps(self.recipe.stages[stage].model_dump(mode="json")))
        keys = sorted({*asked, *made["spec"]} - NOT_KEYED)
        differ = [f"{stage}.{key}" for key in keys if asked.get(key) != made["spec"].get(key)]
        if differ:
            return f"with another {', '.join(differ)}"
        if made["seed"] != self.recipe.seed:
            return f"with the seed {made['seed']}, not {self.recipe.seed}"
        if made["version"] != stages.load(stage).VERSION:
            return "by another version of the stage"
        if made.get("outside", {}) != self.recipe.stages[stage].outside():
            return "before what it names outside the recipe was edited"
        inputs = {called: found.digest for called, found in self._inputs(stage).items()}
        return None if made["inputs"] == inputs else "from something else than is there now"

    def _place(self, name: str) -> Placement:
        """The recipe's word, else the plan's, else the fleet's order; pools that failed to qualify are left out."""
        fleet, spec = self.recipe.fleet, self.recipe.stages[name]
        order = list(fleet.pools)
        if name not in ("plan", "qualify"):
            order = [fleet.pool(pool) for pool in self._planned(name)] or order
            if spec.pool is not None:
                order.sort(key=lambda pool: pool.name != spec.pool)
            if "qualify" in self.done:
                passed = self.done["qualify"].summary["passed"]
                order = [pool for pool in order if pool.name in passed]
        if not order:
            raise Verdict(f"no qualified pool is left for the stage {name!r}", where=self.folder)
        return Placement(order[0], tuple(order[1:]))

    def _planned(self, name: str) -> list[str]:
        if "plan" not in self.done:
            return []
        rows = {row["name"]: row for row in self.done["plan"].json("plan.json")["stages"]}
        return [rows[name]["pool"], *rows[name]["fallback"]] if name in rows else []


def _selected(recipe: Recipe, only: str | None, until: str | None) -> list[str]:
    names = list(recipe.stages)
    for option, value in (("--only", only), ("--until", until)):
        if value is not None and value not in names:
            raise RecipeError(f"{option} names no stage of the recipe: {value!r}", fix=f"it has: {', '.join(names)}")
    if only is not None:
        return [only]
    return names if until is None else names[: names.index(until) + 1]


def _complete(recipe: Recipe) -> None:
    """Every stage's required inputs must be stages of the recipe."""
    for name in recipe.stages:
        for wanted in stages.load(name).INPUTS:
            if not wanted.startswith("?") and stages.resolve(wanted, name, list(recipe.stages))[0] is None:
                missing = stages.SO_FAR.get(wanted, repr(wanted))
                raise RecipeError(
                    f"the stage {name!r} needs {missing}, which the recipe does not have",
                    where=recipe.path,
                    fix=f"add {missing} to its stages, or leave {name!r} out",
                )


def _remember(recipe: Recipe, folder: Path) -> None:
    """Keep what was asked beside the journal, for the report."""
    content = {
        "name": recipe.name,
        "description": recipe.description,
        "seed": recipe.seed,
        "digest": recipe.digest,
        "fleet": recipe.fleet.model_dump(mode="json"),
        "stages": {name: spec.model_dump(mode="json") for name, spec in recipe.stages.items()},
    }
    write_json(folder / "run.json", content)


def _reason(found: Artifact) -> str:
    summary = found.summary
    return str(summary.get("reason") or "; ".join(summary.get("reasons") or ()) or json.dumps(summary)[:300])


def _spent(work: Path) -> float:
    try:
        return float((work / "seconds").read_text())
    except (FileNotFoundError, ValueError):
        return 0.0


def _write_spent(work: Path, seconds: float) -> None:
    try:
        (work / "seconds").write_text(f"{seconds:.3f}")
    except OSError:
        return  # a full disk must not hide the error that is being reported


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder for this process. Raises Busy where another has it."""
    with artifact.held(
        folder, "another process is at work in this run's folder", "wait for it or choose another --out"
    ):
        yield
