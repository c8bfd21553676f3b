"""Files of work to predict, and of published runs: rows in the shape of fleets/published_runs.json.

A file is a list of rows, or a mapping with the rows under `rows`, `train`, `serve`, `rl` or `distill`, and shapes of
models under `arch`. A row names one of them, or one of published_runs.json, or holds its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from ottava import document
from ottava.document import Document, Key
from ottava.errors import RecipeError
from ottava.planner.chips import locate
from ottava.planner.workload import Model, Workload

PUBLISHED = "published_runs.json"
TARGET = "tokens_per_s_per_chip"
WORK = frozenset(
    name for known, field in Workload.model_fields.items() for name in (known, field.alias) if name is not None
)
ABOUT = frozenset({
    TARGET, "arch", "certainty", "certainty_n", "certainty_par", "cost_usd", "days", "detail", "flops_per_token_causal",
    "flops_per_token_noncausal", "gpu_hours", "mfu_causal", "mfu_reported", "mfu_reported_causal",
    "mfu_reported_noncausal", "net_note", "note", "params_active_b", "params_total_b", "provenance", "s_per_step",
    "source", "tflops_hw_reported", "tflops_reported", "trap", "use_for_error", "holdout", "profile",
})  # fmt: skip
"""Keys that describe a row and are no part of the work: targets, sources, and figures derived from targets."""

SIZES = (("n", "chips"), ("seq", "sequence"), ("gbs", "batch"))
"""What training cannot be predicted without, in both spellings."""


@dataclass(frozen=True)
class Row:
    """One row. work: None where it has no shape of a model (`missing` says what is); ignored: keys nobody knows;
    actual: its published tokens/s and chip, at which no training prediction looks; about: the row as it stands; where:
    its place."""

    id: str
    work: Workload | None
    missing: str | None
    ignored: tuple[str, ...]
    actual: float | None
    about: Mapping[str, Any]
    where: str


def read(path: Path) -> list[Row]:
    """All rows of a file, in order. Raises RecipeError with file, line and column where one is wrong."""
    file = document.read(path, listed="rows")
    shapes = _shapes(file)
    sections = [name for name in ("rows", "train", "serve", "rl", "distill") if name in file.data]
    if not sections:
        raise RecipeError("the file has no rows", where=path, fix="write a list of rows, as in published_runs.json")
    found: list[Row] = []
    for section in sections:
        rows = file.data[section]
        if not isinstance(rows, list):
            raise RecipeError(f"{section} is no list of rows", where=file.where((section,)), fix="write a list")
        found += [_row(file, (section, number), shapes) for number in range(len(rows))]
    if not found and not file.data.get("qualify"):
        raise RecipeError("the file has no rows", where=path, fix="write a list of rows, as in published_runs.json")
    twice = {row.id for row in found if [other.id for other in found].count(row.id) > 1}
    if twice:
        again = [row for row in found if row.id in twice][1]
        raise RecipeError(f"the id {again.id!r} stands twice", where=again.where, fix="give each row its own id")
    return found


class Examined(BaseModel):
    """What `ottava qualify` measured on a cluster of one's own, as far as a prediction learns from it. chip: None of a
    rehearsal; matmul_efficiency: of the BF16 peak that large matrix products reached, None where it is not known."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    id: str
    chip: str | None
    site: str
    matmul_efficiency: Annotated[float, Field(gt=0, lt=1.2)] | None


def examined(path: Path) -> list[tuple[Examined, str]]:
    """The rows under `qualify` of a file, and their places. Raises RecipeError where one is wrong or says nothing."""
    file = document.read(path, listed="rows")
    found = []
    for number in range(len(file.data.get("qualify") or ())):
        at: Key = ("qualify", number)
        row = file.parse(Examined, at)
        if row.chip is None or row.matmul_efficiency is None:
            what = f"{row.id} says nothing of a chip: it is a rehearsal, or the chip's peak is not known"
            raise RecipeError(what, where=file.where(at), fix="take the row out, or examine a pool of accelerators")
        found.append((row, file.where(at)))
    return found


def published() -> Path:
    """The data file of published runs."""
    return locate(PUBLISHED)


def _shapes(file: Document) -> dict[str, Model]:
    """The shapes that the file itself gives."""
    named = file.data.get("arch") or {}
    if not isinstance(named, dict):
        raise RecipeError("arch is no mapping of names to shapes", where=file.where(("arch",)))
    return {name: file.parse(Model, ("arch", name)) for name in named}


_KNOWN: dict[str, Model] = {}


def known_shapes() -> dict[str, Model]:
    """The shapes of published_runs.json."""
    if not _KNOWN:
        _KNOWN.update(_shapes(document.read(published())))
    return _KNOWN


def _row(file: Document, at: Key, shapes: dict[str, Model]) -> Row:
    """One row, checked."""
    raw = file.get(at)
    if not isinstance(raw, dict):
        raise RecipeError(f"a row is a mapping, found {raw!r}", where=file.where(at))
    about = dict(raw)
    name = str(about.get("id") or f"{at[0]}-{at[1]}")
    actual = about.get(TARGET)
    actual = float(actual) if isinstance(actual, int | float) and actual > 0 else None
    ignored = tuple(sorted(key for key in about if key not in WORK | ABOUT))
    if "model" not in about and "arch" not in about:
        return Row(name, None, "no shape of a model is given", ignored, actual, about, file.where(at))
    work = {key: value for key, value in about.items() if key in WORK} | {"id": name}
    if at[0] in ("serve", "rl", "distill"):
        work.setdefault("kind", at[0])
    missing = [both for both in SIZES if not any(about.get(key) is not None for key in both)]
    if missing and work.get("kind", "train") != "serve":
        what = f"{name}: {missing[0][0]} ({missing[0][1]}) is not given"
        raise RecipeError(what, where=file.where(at), fix="a speed depends on it: add it")
    if "arch" in about and "model" not in about:
        work["model"], given = _model(file, (*at, "arch"), shapes)
        work.setdefault("model_name", given)
    work.setdefault("site", site_of(str(about.get("source") or "")))
    raw.clear()
    raw.update(work)  # what is left is what a workload has, at the places where it stood
    return Row(name, file.parse(Workload, at), None, ignored, actual, about, file.where(at))


def _model(file: Document, at: Key, shapes: dict[str, Model]) -> tuple[Any, str | None]:
    """The shape a row names or holds, and its name."""
    given = file.get(at)
    if isinstance(given, dict):
        return file.parse(Model, at), None
    if not isinstance(given, str):
        raise RecipeError(f"arch is no name and no shape of a model, found {given!r}", where=file.where(at))
    known = shapes if given in shapes else known_shapes()
    if given not in known:
        fix = document.suggest(str(given), {**known, **shapes})
        raise RecipeError(
            f"no shape of a model {given!r} is known", where=file.where(at), fix=f"{fix}; or put it in arch"
        )
    return known[given], str(given)


def site_of(source: str) -> str | None:
    """A name for where a row is from: the paper or the repository that its source begins with, or None."""
    found = re.search(r"arXiv (\d{4}\.\d{4,5})|github(?:\.com)?[ /]([\w.-]+/[\w.-]+)", source)
    return next((part for part in found.groups() if part), None) if found else None
