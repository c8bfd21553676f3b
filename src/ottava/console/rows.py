"""A claim as a row of the report: what is claimed, how it is known, how sure that is, and how to look again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Content = Mapping[str, Any]
LEVELS = ("proven", "measured", "rehearsal", "extrapolated")


def row(level: str, claim: str, how: str, holds: bool | None = None, check: str | None = None) -> dict[str, Any]:
    """A claim. holds: None where there is nothing to fail; check: a command for the run's folder, or None."""
    assert level in LEVELS, level
    return {"claim": claim, "how": how, "level": level, "holds": holds, "check": check}


def artifact(content: Content, stage: str) -> str:
    """Where a stage's artifact lies in the run's folder; empty where there is none."""
    return next((str(found["artifact"]) for found in content["stages"] if found["name"] == stage), "")


def model(content: Content) -> str | None:
    """Where the model so far lies in the run's folder."""
    return content["model"] and f"{artifact(content, content['model']['stage'])}/model"
