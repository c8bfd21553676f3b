"""How long fusing 100,000 votes takes: our Dawid-Skene beside crowd-kit's, in turn in one process.

crowd-kit wants 45 other packages, so it has a folder of its own (`make .venv-crowd/installed`).
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import throughput
from ottava.labels.people import Votes, dawid_skene

FOLDER = Path(__file__).parents[2] / ".venv-crowd"
ITEMS, PEOPLE, CLASSES, EACH = 20_000, 40, 4, 5


def crowd_kit() -> Any:
    """crowd-kit's DawidSkene, or ImportError."""
    if FOLDER.is_dir() and str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))  # behind everything else: ours are the numpy and pandas
    from crowdkit.aggregation import DawidSkene

    return DawidSkene


def votes() -> tuple[Votes, Any]:
    """(100,000 votes of people right 60% to 95% of the time, the truth [items])."""
    rng = np.random.default_rng(1)
    truth, right = rng.integers(CLASSES, size=ITEMS), rng.uniform(0.6, 0.95, PEOPLE)
    people = rng.random((ITEMS, PEOPLE)).argsort(1)[:, :EACH].reshape(-1)
    items = np.repeat(np.arange(ITEMS), EACH)
    wrong = (truth[items] + rng.integers(1, CLASSES, len(items))) % CLASSES
    return Votes(items, people, np.where(rng.random(len(items)) < right[people], truth[items], wrong)), truth


def fusion(pairs: int = 5) -> dict[str, Any]:
    """ours and baseline: seconds; ratio: how many times faster ours is. Both stop where nothing moves any more."""
    import pandas

    given, truth = votes()
    frame = pandas.DataFrame({"task": given.items, "worker": given.people, "label": given.labels})
    theirs = crowd_kit()
    right: dict[str, float] = {}

    def ours() -> float:
        begun = time.process_time()
        believed, _ = dawid_skene(given, ITEMS, PEOPLE, CLASSES)
        seconds = time.process_time() - begun
        right["right"] = float((believed.argmax(1) == truth).mean())
        return seconds

    def baseline() -> float:
        begun = time.process_time()
        labels = theirs(n_iter=100).fit_predict(frame)
        seconds = time.process_time() - begun
        right["right_crowd_kit"] = float((labels.sort_index().to_numpy() == truth).mean())
        return seconds

    return throughput("fusion of 100,000 votes", ours, baseline, pairs) | right
