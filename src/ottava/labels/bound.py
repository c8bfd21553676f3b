"""How wrong a data set may be, and what may be trained on: its certificate, read and held against a limit.

A folder's `certificate.json` says `error_upper_95` (the bound), `bound` (by which method), `annotator` (who judged) and
`audited` (how many). Whoever asks for a limit is refused where the bound is above it, or where there is none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ottava.errors import DataError

FILE = "certificate.json"


@dataclass(frozen=True)
class Bound:
    """upper: with 95% confidence no larger share of the labels is wrong; method, judged_by: in words; judged:
    labels."""

    upper: float
    method: str
    judged_by: str
    judged: int


def read(folder: Path) -> Bound:
    """The bound of a data set's folder, or of the folder that a file of it is in. Raises DataError where there is
    none."""
    path = (folder if folder.is_dir() else folder.parent) / FILE
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            "this data set has no certificate: nobody knows how wrong its labels are",
            where=path,
            fix="let people judge it (ottava label), or ask for no limit",
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"the certificate cannot be read: {error}", where=path) from None
    return parse(said, path)


def parse(said: Any, where: Path) -> Bound:
    """The bound that a certificate states. Raises DataError where it states none."""
    upper = said.get("error_upper_95") if isinstance(said, dict) else None
    if isinstance(upper, bool) or not isinstance(upper, int | float) or not 0 <= upper <= 1:
        raise DataError(f"'error_upper_95' is {upper!r}; it must be a share from 0 to 1", where=where)
    judged = said.get("audited")
    return Bound(
        float(upper),
        str(said.get("bound", "not said")),
        str(said.get("annotator", "not said")),
        judged if isinstance(judged, int) else 0,
    )


def digest(rows: Iterable[Any]) -> str:
    """The SHA-256 by which a certificate names votes or decisions: of a line of JSON each."""
    sha = hashlib.sha256()
    for row in rows:
        sha.update(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    return sha.hexdigest()


def require(folder: Path, limit: float | None) -> Bound | None:
    """The bound, where a limit is asked for. Raises DataError where it is above, or where there is none."""
    if limit is None:
        return None
    found = read(folder)
    if found.upper > limit:
        raise DataError(
            f"up to {found.upper:.2%} of the labels may be wrong (95% confidence, {found.judged} judged by "
            f"{found.judged_by}), and {limit:.2%} is allowed",
            where=folder,
            fix="let more labels be judged, or better ones be made; or allow more (max_label_error)",
        )
    return found
