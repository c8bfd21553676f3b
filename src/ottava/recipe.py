"""What to make and what there is to make it on: recipes and fleets, frozen once read.

A recipe names its stages and its fleet; each stage file defines the Spec that its section must
satisfy. Recipes are checked whole before anything runs.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from ottava.artifact import digest_of
from ottava.document import Document, read, suggest
from ottava.errors import RecipeError


def _plain_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError("a name has letters, digits, '.', '_' and '-' only, and begins with a letter or digit")
    return name


Name = Annotated[str, AfterValidator(_plain_name)]  # it may become the name of a folder


class Frozen(BaseModel):
    """The base of everything read from a file: immutable, finite, and unknown keys are mistakes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)


class Spec(Frozen):
    """The base of every stage's section. budget_s: wall seconds the stage may take on the reference machine."""

    budget_s: Annotated[float, Field(gt=0, description="wall seconds planned for this stage")] = 60.0
    pool: Annotated[str | None, Field(description="overrides where the plan puts the stage")] = None

    def misfit(self, fleet: Fleet) -> tuple[tuple[str, ...], str, str] | None:
        """What this section asks of a fleet that it has not: (the field, what is wrong, how to mend it); or None."""
        return None

    def unmet(self, name: str, stages: Mapping[str, Spec]) -> tuple[tuple[str, ...], str, str] | None:
        """What this section, of the stage `name`, asks of the recipe's other stages that they do not give: as misfit.
        stages: all of the recipe's, in order. That a stage is not there at all is not said here."""
        return None

    def outside(self) -> Mapping[str, str]:
        """Digests of what the section names that lies outside the recipe and may be edited: part of the stage's key
        where there is any."""
        return {}


def earlier(name: str, stages: Mapping[str, Spec]) -> dict[str, Spec]:
    """The sections that stand before the stage `name` in a recipe."""
    names = list(stages)
    return {before: stages[before] for before in names[: names.index(name)]}


def unused(said: Any, keys: Mapping[str, str], section: str, place: tuple[str | int, ...] = ()) -> Any:
    """`said` as it is, where it has none of these keys, which would be ignored; else a mistake, with its place.

    said: what a field is given, before it is checked; keys: why each has no effect here, and what to do; place: where
    in the field it stands. Raises ValidationError, as the validator of a section.
    """
    for key in said if isinstance(said, dict) else ():
        if key in keys:
            what = PydanticCustomError("value_error", "it would be ignored: {why}", {"why": keys[key]})
            details = InitErrorDetails(type=what, loc=(*place, key), input=said)
            raise ValidationError.from_exception_data(section, [details])
    return said


class Sourced(Frozen):
    """A figure with where it is from and when it was read."""

    value: float
    source: str
    date: str


class Pool(Frozen):
    """Workers of one kind. env is set in each of its processes; stands_for names the chip a rehearsal imitates.

    nodes: the machines that the workers lie on, in equal parts; in a rehearsal, folders that stand for their memory.
    """

    name: Name
    platform: str = "cpu"
    workers: Annotated[int, Field(ge=1)] = 1
    nodes: Annotated[int, Field(ge=1)] = 1
    stands_for: str | None = None
    chip: str | None = None
    env: dict[str, str] = {}
    usd_per_worker_hour: Sourced | None = None

    @property
    def rehearsal(self) -> bool:
        """True where a process stands in for a chip that is not there."""
        return self.stands_for is not None

    @model_validator(mode="after")
    def _power_of_two(self) -> Pool:
        if self.workers & (self.workers - 1):
            raise ValueError("workers must be a power of two: gradients are summed in a binary tree")
        return self


class Fleet(Frozen):
    """Pools, in the order in which a run prefers them when the plan does not say."""

    name: str
    description: str = ""
    pools: Annotated[tuple[Pool, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _distinct(self) -> Fleet:
        names = [pool.name for pool in self.pools]
        if len(set(names)) != len(names):
            raise ValueError("two pools have the same name")
        return self

    def pool(self, name: str) -> Pool:
        """The pool called `name`; RecipeError where there is none."""
        for pool in self.pools:
            if pool.name == name:
                return pool
        raise RecipeError(
            f"the fleet {self.name!r} has no pool {name!r}", fix=suggest(name, [p.name for p in self.pools])
        )


class _Head(Frozen):
    name: Name
    description: str = ""
    seed: Annotated[int, Field(ge=0)] = 0
    fleet: str
    stages: dict[str, Any] = {}


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: its stages' specs in the order they run, and its fleet."""

    path: Path
    name: str
    description: str
    seed: int
    fleet: Fleet
    stages: Mapping[str, Spec]
    digest: str


def load_fleet(path: Path, platforms: Collection[str] | None = None) -> Fleet:
    """Read and check a fleet file. platforms: those that its pools may name; None: any."""
    document = read(path)
    fleet = document.parse(Fleet)
    for index, pool in enumerate(fleet.pools):
        if platforms is not None and pool.platform not in platforms:
            raise RecipeError(
                f"unknown platform {pool.platform!r}",
                where=document.where(("pools", index, "platform")),
                fix=suggest(pool.platform, platforms),
            )
    return fleet


def load_recipe(
    path: Path | str,
    specs: Mapping[str, type[Spec]],
    sets: Sequence[str] = (),
    platforms: Collection[str] | None = None,
) -> Recipe:
    """Read a recipe and its fleet, and check all of both.

    specs: the Spec of every known stage, in the order in which stages run. sets: `a.b=c`
    assignments; a first part that names a stage may leave out `stages.`. platforms: those that the
    fleet's pools may name; None: any. Raises RecipeError.
    """
    document = read(path)
    for assignment in sets:
        head = assignment.split("=", 1)[0].split(".", 1)[0]
        known = [*_Head.model_fields, *specs]
        if head and head not in known:
            raise RecipeError(f"unknown key {head!r}", where=f"--set {assignment}", fix=suggest(head, known))
        document.set(assignment, ("stages",) if head in specs else ())
    head_model = document.parse(_Head)
    _check_stage_names(document, head_model.stages, specs)
    stages = {name: document.parse(specs[name], ("stages", name)) for name in specs if name in head_model.stages}
    fleet_path = _find_fleet(document, head_model.fleet, Path(path))
    fleet = load_fleet(fleet_path, platforms)
    for name, spec in stages.items():
        if spec.pool is not None and spec.pool not in [p.name for p in fleet.pools]:
            raise RecipeError(
                f"the fleet {fleet.name!r} has no pool {spec.pool!r}",
                where=document.where(("stages", name, "pool")),
                fix=suggest(spec.pool, [p.name for p in fleet.pools]),
            )
        wrong = spec.misfit(fleet) or spec.unmet(name, stages)
        if wrong is not None:
            place, what, fix = wrong
            raise RecipeError(what, where=document.where(("stages", name, *place)), fix=fix)
    content = {
        "head": head_model.model_dump(exclude={"stages"}),
        "stages": {name: spec.model_dump(mode="json") for name, spec in stages.items()},
        "fleet": fleet.model_dump(mode="json"),
    }
    return Recipe(
        Path(path), head_model.name, head_model.description, head_model.seed, fleet, stages, digest_of(content)
    )


def _check_stage_names(document: Document, stages: Mapping[str, Any], specs: Mapping[str, type[Spec]]) -> None:
    if not stages:
        raise RecipeError("the recipe has no stages", where=document.where(()), fix=f"known: {', '.join(specs)}")
    for name in stages:
        if name not in specs:
            raise RecipeError(
                f"unknown stage {name!r}",
                where=document.where(("stages", name), key=True),
                fix=suggest(name, list(specs)),
            )


def _find_fleet(document: Document, name: str, recipe: Path) -> Path:
    """A fleet is looked for beside the recipe, in ../fleets, and in the working folder."""
    places = [recipe.parent / name, recipe.parent.parent / "fleets" / name, Path(name), Path("fleets") / name]
    for place in places:
        for candidate in (place, place.with_name(place.name + ".yaml")):
            if candidate.is_file():
                return candidate
    fix = "name a file: beside the recipe, in ../fleets from there, in the working folder, or in fleets/ of that"
    raise RecipeError(f"no such fleet {name!r}", where=document.where(("fleet",)), fix=fix)
