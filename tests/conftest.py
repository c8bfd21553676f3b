"""Shared fixtures: a warm launcher, and a small labelled dataset."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile(
    "ottava",
    deadline=None,  # the machine may be shared
    derandomize="CI" in os.environ,  # elsewhere every run looks at other examples
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ottava")

PLATFORM = os.environ.get("OTTAVA_TEST_PLATFORM", "cpu")
"""Where the tests of the marker `device` compute: the same tests under the same names on every platform."""


@pytest.fixture(autouse=True)
def _unpinned_afterwards() -> Iterator[None]:
    """Pinning the numerics is for whole processes; the other tests of this one must not inherit it."""
    torch = sys.modules.get("torch")
    state = None if torch is None else (torch.get_num_threads(), torch.get_float32_matmul_precision())
    yield
    torch = sys.modules.get("torch")
    if torch is not None and torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(False)
        if state is not None:
            torch.set_num_threads(state[0])
            torch.set_float32_matmul_precision(state[1])


@pytest.fixture(scope="session")
def launcher() -> Iterator[Any]:
    """One warm process server for the whole session; on host memory one that forks workers of NPUs too."""
    from ottava.supervisor.local import LocalLauncher

    if "HOST_CANN_LIBRARIES" in os.environ:
        from .npu.zygote import launcher as forking

        with forking() as processes:
            yield processes
        return
    with LocalLauncher() as processes:
        yield processes


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A label artifact's files and, in `chat/`, the tokenizer; gold traces, so that nothing depends on teachers."""
    import numpy as np

    from ottava.artifact import write_json
    from ottava.models.chat import write_tiny
    from ottava.tasks import chains
    from ottava.tasks.base import row, write_lines

    folder = tmp_path_factory.mktemp("label")
    rng = np.random.default_rng(1)
    cold = [p for n in range(2, 5) for p in chains.sample(rng, n, 20, "train")]
    answers = [p for n in range(1, 5) for p in chains.sample(rng, n, 60, "train")]
    write_lines(folder / "cold_start.jsonl", (row("chains", p, trace=chains.trace(p)) for p in cold))
    write_lines(folder / "answers.jsonl", (row("chains", p) for p in answers))
    for name, lengths in (("test", range(2, 5)), ("test_one_step", range(1, 2))):
        problems = [p for n in lengths for p in chains.sample(rng, n, 10, "test")]
        write_lines(folder / f"{name}.jsonl", (row("chains", p) for p in problems))
    write_json(folder / "vocabulary.json", chains.vocabulary())
    write_tiny(folder / "chat", chains.vocabulary())
    return folder


@pytest.fixture(scope="session")
def begun(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that solves some problems and not others."""
    from ottava.models.chat import write_tiny
    from ottava.tasks import chains
    from ottava.trainer import snapshot
    from ottava.trainer.spec import Direct, TrainSpec
    from ottava.trainer.start import make_trainer
    from ottava.trainer.worker import export

    folder = tmp_path_factory.mktemp("begun")
    its = TrainSpec(steps=160, batch=16, virtual_shards=2, direct=Direct(weight=0.0), grid_from=0.9)
    args = {"spec": its.model_dump(mode="json"), "seed": 3, "data": str(dataset), "chat": str(dataset / "chat")}
    trainer = make_trainer(args)
    while trainer.state.step < its.steps:
        trainer.step(lambda total: total, range(2))
    write_tiny(folder / "model", chains.vocabulary())
    snapshot.save(folder / "state", trainer.state.snapshot())
    export({**args, "state": str(folder / "state"), "model": str(folder / "model"), "latent": str(folder / "latent")})
    return folder / "model"
