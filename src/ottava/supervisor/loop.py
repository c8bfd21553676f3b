"""The supervisor's loop: start a pool's workers, watch them, decide on a failure, move the run.

What must not be lost is in files: the steps in the workers' snapshots, the pools that the run went
through in `segments.json`. Killed and started again, it goes on; only the count of failures towards a
pool's restarts begins anew, as a new start is a new chance.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from signal import Signals
from typing import Any

from ottava import journal
from ottava.artifact import write_json
from ottava.context import Launcher, Process
from ottava.errors import CheckpointError, DataError, OttavaError, PlatformError, ResourceError, TrainingFailed
from ottava.journal import Journal
from ottava.recipe import Pool
from ottava.supervisor.decide import Failure, FallBack, Stop, decide
from ottava.supervisor.local import rendezvous
from ottava.trainer import snapshot
from ottava.trainer.snapshot import Snapshot
from ottava.trainer.spec import Fault, TrainSpec

WORKER = "ottava.trainer.worker:run"
NOT_THE_POOLS = (ResourceError, DataError, CheckpointError)
SETTLE = 0.3  # seconds for the deaths of one failure to become known
GRACE = 60.0  # seconds that workers may take to reach their first step


@dataclass(frozen=True)
class Run:
    """A run to supervise. phase: its name in the journal; base: what every worker is given.

    folder: snapshots and segments; pools: in order of preference; progress: told of every step.
    """

    phase: str
    spec: TrainSpec
    pools: Sequence[Pool]
    base: Mapping[str, Any]
    folder: Path
    journal: Journal
    launcher: Launcher
    logs: Path
    progress: Callable[[int], None] = lambda step: None

    @property
    def names(self) -> list[str]:
        return [pool.name for pool in self.pools]


@dataclass(frozen=True)
class Segment:
    """A stretch of a run on one pool: from the state after `start` steps to `end` steps (None: not yet).

    failures: those after which the run started again on this pool; lost: steps that were reported on it
    and not found again when the run left it.
    """

    pool: str
    start: int
    end: int | None = None
    failures: int = 0
    lost: int = 0


def supervise(run: Run, fault: Fault | None) -> tuple[Snapshot, list[Segment]]:
    """Carry a run to its last step through whatever happens; its final state and the pools it went through.

    Raises TrainingFailed where no pool is left or a deterministic error came back.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    segments = _segments(run)
    failures: list[Failure] = []
    while True:
        found = snapshot.newest(run.folder)
        if found is not None and found.step >= run.spec.steps:
            return found, _close(run, segments, found.step)
        pool = next(p for p in run.pools if p.name == segments[-1].pool)
        armed = fault is not None and fault.pool == pool.name and segments[-1].failures == 0
        stretch = Stretch(pool, run.spec.steps, _handoff(run, segments), _keep(run, segments), fault if armed else None)
        failure = attempt(run, stretch, len(failures))
        if failure is None:
            continue
        failures.append(failure)
        action = decide(run.names, run.spec.restarts, failures)
        if not isinstance(action, FallBack):  # remembered first, so that an injected fault comes once
            segments = [*segments[:-1], replace(segments[-1], failures=segments[-1].failures + 1)]
            _write_segments(run, segments)
        if isinstance(action, Stop):
            raise TrainingFailed(
                action.reason, where=f"pool {pool.name}", fix="see the workers' logs in the run's folder"
            )
        if isinstance(action, FallBack):
            segments = _fall_back(run, segments, action)


def replay(run: Run, segments: Sequence[Segment]) -> Snapshot:
    """Run the same schedule of pools again with no fault in it; the final state, to be compared."""
    run.folder.mkdir(parents=True, exist_ok=True)
    failures = 0
    while True:
        found = snapshot.newest(run.folder)
        done = 0 if found is None else found.step
        if found is not None and done >= run.spec.steps:
            return found
        segment = next(s for s in segments if s.end is not None and done < s.end)
        pool = next(p for p in run.pools if p.name == segment.pool)
        assert segment.end is not None
        failure = attempt(run, Stretch(pool, segment.end), failures)
        if failure is not None:
            failures += 1
            if failures > 2:
                raise TrainingFailed(f"the replay failed: {failure.message}", where=f"pool {pool.name}")


@dataclass(frozen=True)
class Stretch:
    """One start of a pool's workers: to which step, from which file (None: the run's folder), what to keep."""

    pool: Pool
    until: int
    start: Path | None = None
    keep: Mapping[str, str] = field(default_factory=dict)
    fault: Fault | None = None


def attempt(run: Run, stretch: Stretch, number: int) -> Failure | None:
    """Start the pool's workers and watch them to the end of the stretch or to a failure; none is left alive."""
    workers = min(stretch.pool.workers, run.spec.virtual_shards)
    args = {
        **run.base, "phase": run.phase, "pool": stretch.pool.name, "attempt": number, "folder": str(run.folder),
        "start": str(stretch.start or run.folder), "until": stretch.until, "keep": dict(stretch.keep),
        "journal": str(run.journal.path),
        "fault": stretch.fault and stretch.fault.model_dump(mode="json"),
    }  # fmt: skip
    tail = Tail(run.journal.path)
    group = [run.launcher.spawn(WORKER, args, pool=stretch.pool, logs=run.logs, env=env) for env in rendezvous(workers)]
    try:
        return _watch(run, stretch.pool, group, tail)
    finally:
        for process in group:
            process.kill()
        for process in group:
            process.wait()


def _watch(run: Run, pool: Pool, group: list[Process], tail: Tail) -> Failure | None:
    step, seen = 0, time.monotonic() + GRACE
    while True:
        for event in tail.events():
            if event["event"] == "train.step" and event["phase"] == run.phase:
                step, seen = event["step"], time.monotonic()
                run.progress(step)
        statuses = [process.wait(0.01) for process in group]
        if all(status == 0 for status in statuses):
            run.progress(step)
            return None
        if any(statuses) or time.monotonic() - seen > run.spec.hang_s:
            return _failure(run, pool, step, tail, _dead(group) if any(statuses) else {})


def _dead(group: list[Process]) -> dict[Process, int]:
    """The workers that ended badly, by status. The first to be seen may only have lost its peer, so wait a little."""
    statuses = [process.wait(SETTLE) for process in group]
    return {process: status for process, status in zip(group, statuses, strict=True) if status}


def _failure(run: Run, pool: Pool, step: int, tail: Tail, bad: Mapping[Process, int]) -> Failure:
    """Name what happened; `step` becomes the last that any worker reported. bad: the dead and their statuses.

    A fault that is no pool's, such as a full disk, is raised: moving the run would not help.
    """
    for event in tail.events():
        if event["event"] == "train.step" and event["phase"] == run.phase:
            step = event["step"]
    errors = [_error(process) for process, status in bad.items() if status > 0]
    signalled = [status for status in bad.values() if status < 0]
    for error in errors:
        if isinstance(error, NOT_THE_POOLS):
            raise error
    if not bad:
        failure = Failure(pool.name, "hang", step, f"no step for {run.spec.hang_s:g} s")
    elif signalled:  # what the others say then is that they lost their peer
        failure = Failure(pool.name, "killed", step, f"a worker was killed by {Signals(-signalled[0]).name}")
    else:
        errors.sort(key=lambda error: isinstance(error, PlatformError))  # a worker's own words before an epitaph
        failure = Failure(pool.name, "error", step, errors[0].what)
    run.journal.append(
        "train.fault", phase=run.phase, pool=pool.name, kind=failure.kind, step=step, message=failure.message
    )
    return failure


def _error(process: Process) -> OttavaError:
    try:
        process.result()
    except OttavaError as error:
        return error
    return OttavaError("no message")


def _fall_back(run: Run, segments: list[Segment], action: FallBack) -> list[Segment]:
    """Make the newest state durable as the hand-off, and open a segment on the next pool."""
    found = snapshot.newest(run.folder)
    step = 0 if found is None else found.step
    lost = max(0, _last_reported(run) - step)
    if found is not None:
        snapshot.save(handoff_file(run.folder, step), found)
    segments = [*segments[:-1], replace(segments[-1], end=step, lost=lost), Segment(action.target, step)]
    _write_segments(run, segments)
    run.journal.append(
        "train.fallback", phase=run.phase, source=action.source, target=action.target, at_step=step,
        lost_steps=lost, digest=None if found is None else found.digest,
    )  # fmt: skip
    return segments


def _last_reported(run: Run) -> int:
    steps = journal.fold(journal.read(run.journal.path)).steps
    return max((event["step"] for event in steps if event["phase"] == run.phase), default=0)


def handoff_file(folder: Path, step: int) -> Path:
    """Where the state that moved between pools after `step` steps is kept."""
    return folder / "handoff" / f"state-{step}"


def kept_file(folder: Path, step: int) -> Path:
    """Where the state after `step` steps is kept for the drift measurement."""
    return folder / "handoff" / f"after-{step}"


def _handoff(run: Run, segments: list[Segment]) -> Path | None:
    """The hand-off's file where the newest state is the hand-off itself; afterwards the snapshots go on."""
    if len(segments) < 2 or segments[-1].start == 0:
        return None
    found = snapshot.newest(run.folder)
    moved = found is not None and found.step > segments[-1].start
    return None if moved else handoff_file(run.folder, segments[-1].start)


def _keep(run: Run, segments: Sequence[Segment]) -> dict[str, str]:
    """The states after the hand-off that the drift measurement needs, and where they are kept."""
    if len(segments) < 2:
        return {}
    at = segments[-1].start + window(run.spec, segments[-1].start)
    return {str(at): str(kept_file(run.folder, at))}


def window(spec: TrainSpec, start: int) -> int:
    """Over how many steps after a move the drift is measured: fewer where the run ends before."""
    return min(spec.drift.window, spec.steps - start)


def _segment_file(run: Run) -> Path:
    return run.folder / "segments.json"


def _segments(run: Run) -> list[Segment]:
    if not _segment_file(run).exists():
        _write_segments(run, [Segment(run.pools[0].name, 0)])
    return [Segment(**entry) for entry in json.loads(_segment_file(run).read_text())]


def _write_segments(run: Run, segments: Sequence[Segment]) -> None:
    handoff_file(run.folder, 0).parent.mkdir(parents=True, exist_ok=True)
    write_json(_segment_file(run), [vars(segment) for segment in segments])


def _close(run: Run, segments: list[Segment], step: int) -> list[Segment]:
    segments = [*segments[:-1], replace(segments[-1], end=step)]
    _write_segments(run, segments)
    return segments


class Tail:
    """The events that are appended to a journal from now on."""

    def __init__(self, path: Path):
        self._file = path.open("rb")
        self._file.seek(0, 2)
        self._rest = b""

    def events(self) -> list[dict[str, Any]]:
        """What came since the last call."""
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        return [json.loads(line) for line in lines if line.startswith(b"{")]
