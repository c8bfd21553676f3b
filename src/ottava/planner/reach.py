"""Questions to a pool, asked so that an accident is not taken for an answer.

What plan and qualify publish is kept for good. So only a platform that says itself that it is not here counts as
missing; a worker that ends without an answer, because it or a peer was killed, is asked once more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ottava import platforms
from ottava.context import Context
from ottava.errors import LauncherGone, PlatformError
from ottava.recipe import Pool

PRESENCE = "ottava.planner.reach:presence"


def presence(args: Mapping[str, Any]) -> dict[str, Any]:
    """{"missing": why the platform called args["platform"] cannot be used here, or None}. Runs in a worker."""
    try:
        platforms.get(args["platform"]).require()
    except PlatformError as error:
        return {"missing": error.what}
    return {"missing": None}


def missing(ctx: Context, pool: Pool) -> str | None:
    """Why a pool's platform cannot be used on this machine; None where it can. Raises as `ask` does."""
    reason: str | None = ask(ctx, pool, PRESENCE, {"platform": pool.platform}, workers=1)[0]["missing"]
    return reason


def ask(
    ctx: Context, pool: Pool, target: str, args: Mapping[str, Any], workers: int | None = None
) -> list[dict[str, Any]]:
    """`ctx.call` on a pool, by default on all its workers, and a second time where the first had no answer.

    Raises the second PlatformError; LauncherGone, ResourceError and every other error at once.
    """
    count = pool.workers if workers is None else workers
    try:
        return ctx.call(target, args, pool=pool, workers=count)
    except LauncherGone:
        raise
    except PlatformError:
        return ctx.call(target, args, pool=pool, workers=count)
