"""Drills with the vendor's own codes: a code comes out of the device, the run is classified and goes on on cores.

The pool of cores stands for CUDA. After the code the run must be in its class, have lost no step, and end in the bytes
of the run that nothing disturbed. That these are equal at all is due to the stand-in, where the CPU computes: it shows
that the state came over whole, not that an NPU and a GPU round alike.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ottava import journal
from ottava.journal import Journal
from ottava.platforms import FaultClass
from ottava.platforms.ascend import codes
from ottava.platforms.npu import Npu
from ottava.recipe import Pool
from ottava.supervisor.local import LocalLauncher
from ottava.supervisor.loop import Run, supervise
from ottava.trainer.spec import TrainSpec

from .zygote import ORDER

STEPS, AT = 4, 2
SILENT = ((207000, "boundary"),)
"""What torch_npu itself lets pass with a warning where it waits for a stream."""

KINDS = {
    FaultClass.TRANSIENT: "error", FaultClass.NUMERIC: "error", FaultClass.BUG: "error",
    FaultClass.OUT_OF_MEMORY: "memory", FaultClass.COLLECTIVE: "collective",
    FaultClass.DEVICE_STUCK: "stuck", FaultClass.DEVICE_LOST: "lost", FaultClass.UNUSABLE: "pool",
}  # fmt: skip
"""What the supervisor calls a fault of each class."""


def drill(dataset: Path, folder: Path, launcher: LocalLauncher, ranks: int, order: str, patience: int = 60) -> Run:
    """patience: seconds that a rank waits for its peers. Only where an exchange breaks is it waited for to the end;
    elsewhere a busy machine must not break one."""
    spec = TrainSpec.model_validate(
        {
            "steps": STEPS,
            "batch": 1,
            "virtual_shards": 4,
            "direct": {"begin": 0.5, "batch": 1},
            "checkpoint_every": 50,
            "restarts": 0,
            "hang_s": 240.0,
        }
    )
    pools = (
        Pool(name="npu", platform="npu", workers=ranks, env={ORDER: order, "HCCL_EXEC_TIMEOUT": str(patience)}),
        Pool(name="cpu", workers=1),
    )
    base = {"spec": spec.model_dump(mode="json"), "seed": 3, "data": str(dataset), "chat": str(dataset / "chat")}
    return Run("main", spec, pools, base, folder / "main", Journal(folder / "j"), launcher, folder / "logs")


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, launcher: LocalLauncher, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest at the end of the same run on cores, which no code ever met."""
    run = drill(dataset, tmp_path_factory.mktemp("u"), launcher, 2, "")
    return supervise(replace(run, pools=run.pools[1:]))[0].digest


@pytest.fixture(autouse=True)
def _forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Npu, "forks", True)  # see zygote.py


DRILLS = [
    (code, place, ranks)
    for code in codes.TABLE
    for place in (("boundary", "collective") if code > 24 else ("launch",))  # HCCL's own come out of its calls
    for ranks in (2, 4)
    if (code, place) not in SILENT
]
FAULTS = [drill for drill in DRILLS if codes.TABLE[drill[0]] is not FaultClass.BUG]


def some(drills: list[tuple[int, str, int]]) -> list[tuple[int, str, int]]:
    """Each of ACL's codes that is no bug once, places and group sizes in turn; of the bugs and of HCCL's some."""
    chosen: dict[int, tuple[int, str, int]] = {}
    for code in dict.fromkeys(code for code, _, _ in FAULTS if code > 24 or code in (9, 21)):
        its = [drill for drill in drills if drill[0] == code]
        chosen[code] = its[len(chosen) % len(its)]
    bugs = [drill for drill in drills if drill[0] in (107002, 507042, 100000)]
    return [*chosen.values(), *bugs[::5]]


OFTEN = some(DRILLS)


@pytest.mark.parametrize(
    ("code", "place", "ranks"),
    [pytest.param(*drill, marks=() if drill in OFTEN else pytest.mark.slow) for drill in DRILLS],
)
def test_a_code_costs_no_step_and_no_bit(
    dataset: Path, tmp_path: Path, launcher: LocalLauncher, undisturbed: str, code: int, place: str, ranks: int
) -> None:
    # of a call that its task queue makes, torch_npu tells no number
    fault_class = FaultClass.COLLECTIVE if place == "launch" else codes.TABLE[code]
    patience = 8 if fault_class is FaultClass.COLLECTIVE else 60
    run = drill(dataset, tmp_path, launcher, ranks, f"code={code} place={place} step={AT} rank={ranks - 1}", patience)
    final, segments = supervise(run)
    state = journal.fold(journal.read(run.journal.path))
    kept = AT if place == "boundary" else AT - 1
    assert [(s.pool, s.start, s.lost) for s in segments] == [("npu", 0, 0), ("cpu", kept, 0)]
    (fault,) = state.faults
    assert fault["kind"] == KINDS[fault_class], fault["message"]
    if fault_class is not FaultClass.COLLECTIVE:  # of a broken exchange nobody is the first to know
        assert codes.number(fault["message"]) == code
        assert fault["chips"] == (list(range(ranks)) if fault["kind"] == "pool" else [ranks - 1])
    assert [step["step"] for step in state.steps] == list(range(1, STEPS + 1)), "a step was lost, or done twice"
    assert final.digest == undisturbed
