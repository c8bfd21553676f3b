"""The supervisor against real processes that really die, and decide() against every case."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ottava import journal
from ottava.errors import (
    Busy,
    CheckpointError,
    DataError,
    PlatformError,
    PoolMissing,
    RecipeError,
    ResourceError,
    TrainingFailed,
)
from ottava.journal import Journal
from ottava.platforms.cpu import OTHER_KERNELS
from ottava.recipe import Pool
from ottava.supervisor import observe, store
from ottava.supervisor.attempt import Attempt, Stretch, alone
from ottava.supervisor.decide import (
    DETERMINISTIC,
    KINDS,
    Exclude,
    Failure,
    FallBack,
    RollBack,
    Situation,
    Standing,
    Start,
    Stop,
    decide,
)
from ottava.supervisor.local import LocalLauncher
from ottava.supervisor.loop import WORKER, Run, replay, supervise, window
from ottava.supervisor.record import Segment
from ottava.supervisor.store import handoff_file, kept_file
from ottava.trainer import snapshot
from ottava.trainer.spec import TrainSpec
from ottava.trainer.supervised import Fault

from .conftest import PLATFORM

pytestmark = pytest.mark.device

# ---------------------------------------------------------------- decide


def failure(pool: str = "a", kind: Any = "killed", step: int = 5, message: str = "m", chips: Any = ()) -> Failure:
    return Failure(pool, kind, step, message, chips)


def situation(restarts: int, chips: int = 4, pools: str = "abc") -> Situation:
    return Situation(tuple(Standing(name, tuple(range(chips))) for name in pools), restarts, 8)


def play(start: Situation, failures: list[Failure]) -> tuple[Any, ...]:
    """The actions after the last of them."""
    actions: tuple[Any, ...] = ()
    for item in failures:
        start, actions = decide(start, item)
    return actions


ALL = (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("restarts", "failures", "actions"),
    [
        (0, [failure()], (FallBack("a", "b", ALL),)),
        (1, [failure()], (Start("a", ALL),)),
        (1, [failure(), failure()], (FallBack("a", "b", ALL),)),
        (0, [failure(), failure("b")], (FallBack("b", "c", ALL),)),
        (1, [failure(), failure(), failure("b")], (Start("b", ALL),)),
        (0, [failure(), failure("b"), failure("c", message="x")],
         (Stop("no pool is left after 'c' failed at step 5: x"),)),
        (5, [failure(kind="error")], (Start("a", ALL),)),
        (5, [failure(kind="error"), failure(kind="error")], (Stop("the same error came back at step 5: m"),)),
        (0, [failure(kind="error"), failure("b", kind="error")], (Stop("the same error came back at step 5: m"),)),
        (5, [failure(kind="error"), failure(kind="error", step=6)], (Start("a", ALL),)),
        (5, [failure(), failure()], (Start("a", ALL),)),
        (5, [failure(kind="hang"), failure(kind="hang")], (Start("a", ALL),)),
        # the blamed chip changes places, and leaves at its second strike
        (5, [failure(chips=(1,))], (Start("a", (0, 2, 3, 1)),)),
        (5, [failure(chips=(1,)), failure(kind="hang", chips=(1,))], (Exclude("a", (1,)), Start("a", (0, 2)))),
        # numbers that go wrong on the same chip although it has other shards now are the chip's, else the recipe's
        (5, [failure(kind="nan", chips=(2,)), failure(kind="nan", chips=(2,))],
         (Exclude("a", (2,)), Start("a", (0, 1)))),
        (5, [failure(kind="nan", chips=(2,)), failure(kind="nan", chips=(3,))],
         (Stop("the same nan came back at step 5: m"),)),
        # wrong bits are not given a second chance
        (5, [failure(kind="corrupt", chips=(3,))], (Exclude("a", (3,)), Start("a", (0, 1)))),
        (5, [failure(kind="gradient", chips=(0,))], (RollBack(0), Exclude("a", (0,)), Start("a", (1, 2)))),
        (5, [failure(kind="corrupt")], (Start("a", ALL),)),
        (5, [failure(kind="node", chips=(2, 3))], (Exclude("a", (2, 3)), Start("a", (0, 1)))),
        (5, [failure(kind="node", chips=ALL)], (Exclude("a", ALL), FallBack("a", "b", ALL))),
        (5, [failure(kind="disk")], (Stop("no state can be made durable: m"),)),
    ],
)  # fmt: skip
def test_decide(restarts: int, failures: list[Failure], actions: object) -> None:
    assert play(situation(restarts), failures) == actions


kinds = st.sampled_from(sorted(KINDS))


class Deciding(RuleBasedStateMachine):
    """Whatever comes in whatever order: a run always knows what to do, and always ends."""

    @initialize(restarts=st.integers(0, 3), chips=st.sampled_from([1, 2, 4]), shards=st.sampled_from([1, 2, 8]))
    def begin(self, restarts: int, chips: int, shards: int) -> None:
        pools = tuple(Standing(name, tuple(range(chips))) for name in "ab")
        self.now = Situation(pools, restarts, shards)
        self.count, self.ended = 0, False

    @precondition(lambda self: not self.ended)
    @rule(kind=kinds, step=st.integers(0, 3), word=st.sampled_from("xy"), blamed=st.sets(st.integers(0, 3)))
    def fail(self, kind: str, step: int, word: str, blamed: set[int]) -> None:
        before = self.now
        chips = tuple(sorted(blamed & set(before.pool.chips)))
        item = Failure(before.pool.name, kind, step, word, chips)
        self.now, actions = decide(before, item)
        self.count += 1
        assert decide(before, item) == (self.now, actions), "pure"
        last = actions[-1]
        assert isinstance(last, Start | FallBack | Stop)
        assert not any(isinstance(action, Start | FallBack | Stop) for action in actions[:-1])
        self.ended = isinstance(last, Stop)
        if not isinstance(last, Stop):
            target = last.pool if isinstance(last, Start) else last.target
            assert target == self.now.pool.name
            assert last.chips, "somebody must work"
            assert len(last.chips) & (len(last.chips) - 1) == 0
            assert len(last.chips) <= self.now.shards
            assert set(last.chips) <= set(self.now.pool.chips)
        if isinstance(last, FallBack):
            assert self.now.at > before.at, "never back to a pool that was left"
        for action in actions:
            if isinstance(action, Exclude):
                assert not set(action.chips) & set(self.now.pools[before.at].chips)
                assert set(action.chips) <= set(chips), "nobody leaves who was not blamed"
        if kind == "gradient":
            assert actions[0] == RollBack(before.audited) or isinstance(last, Stop)
        told = [f for f in before.history if (f.kind, f.step, f.message) == (kind, step, word)]
        if kind in DETERMINISTIC and told and not chips:
            assert self.ended, "the same deterministic failure twice is a bug"

    @precondition(lambda self: self.ended)
    @rule()
    def start_again(self) -> None:
        """Asked again after a stop, a run has all its chances anew."""
        pools = tuple(Standing(pool.name, ALL[:2]) for pool in self.now.pools)
        self.now, self.count, self.ended = Situation(pools, self.now.restarts, self.now.shards), 0, False

    @invariant()
    def bounded(self) -> None:
        if hasattr(self, "now"):
            assert self.count <= len(self.now.pools) * (self.now.restarts + 1)


TestDeciding = Deciding.TestCase


# ---------------------------------------------------------------- processes


def double(args: dict[str, Any]) -> dict[str, Any]:
    return {"value": 2 * args["value"], "rank": os.environ["RANK"], "world": os.environ["WORLD_SIZE"]}


def refuse(args: dict[str, Any]) -> dict[str, Any]:
    raise DataError("bad", where="there", fix="mend it")


def die(args: dict[str, Any]) -> dict[str, Any]:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
    return {}


def crash(args: dict[str, Any]) -> dict[str, Any]:
    raise RuntimeError("boom")


def full(args: dict[str, Any]) -> dict[str, Any]:
    with open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")
    return {}


def test_call(launcher: Any, tmp_path: Path) -> None:
    results = launcher.call("tests.test_supervisor:double", {"value": 4}, workers=4, logs=tmp_path)
    assert results == [{"value": 8, "rank": str(rank), "world": "4"} for rank in range(4)]


def test_errors_cross_the_process(launcher: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        launcher.call("tests.test_supervisor:refuse", {}, logs=tmp_path)
    assert error.value.render() == "error: bad\n  where: there\n  mend:  mend it"
    with pytest.raises(PlatformError, match="status 70: RuntimeError: boom"):
        launcher.call("tests.test_supervisor:crash", {}, logs=tmp_path)
    with pytest.raises(PlatformError, match=r"status 70: .*nothing_there"):
        launcher.call("tests.test_supervisor:nothing_there", {}, logs=tmp_path)
    with pytest.raises(Exception, match="disk full"):
        launcher.call("tests.test_supervisor:full", {}, logs=tmp_path)


def test_one_death_ends_the_call(launcher: Any, tmp_path: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(PlatformError, match="killed by SIGKILL"):
        launcher.call("tests.test_supervisor:die", {}, workers=2, logs=tmp_path)
    assert time.monotonic() - begun < 50


ORPHANS = """
import sys, time
from pathlib import Path
from ottava.supervisor.local import LocalLauncher
with LocalLauncher() as launcher:
    pids = [launcher.spawn("time:sleep", 600, pool=None, logs=Path(sys.argv[1])).pid for _ in range(2)]
    print(*pids, flush=True)
    time.sleep(600)
"""


def sleep_long(args: dict[str, Any]) -> dict[str, Any]:
    time.sleep(600)
    return {}


def test_workers_die_with_their_owner(tmp_path: Path) -> None:
    script = ORPHANS.replace('"time:sleep", 600', '"tests.test_supervisor:sleep_long", {}')
    owner = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pids = [int(pid) for pid in owner.stdout.readline().split()]
    assert len(pids) == 2
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    deadline = time.monotonic() + 60
    while any(_running(pid) for pid in pids):
        assert time.monotonic() < deadline, "a worker outlived its owner"
        time.sleep(0.05)


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # it was gone before it was opened, or while it was read
        return False


# ---------------------------------------------------------------- runs


def make(dataset: Path, folder: Path, launcher: Any, pools: tuple[Pool, ...], **more: Any) -> Run:
    spec = TrainSpec.model_validate(
        {
            "steps": 40, "batch": 2, "direct": {"begin": 0.3, "batch": 2}, "checkpoint_every": 10, "hang_s": 60.0,
            "drift": {"window": 4}, "restarts": 0, **more,
        }
    )  # fmt: skip
    base = {"spec": spec.model_dump(mode="json"), "seed": 3, "data": str(dataset), "chat": str(dataset / "chat")}
    return Run("main", spec, pools, base, folder / "main", Journal(folder / "j"), launcher, folder / "logs")


PLAIN = (Pool(name="a", platform=PLATFORM, workers=2), Pool(name="b", platform=PLATFORM, workers=1))


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, launcher: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    final, segments = supervise(make(dataset, tmp_path_factory.mktemp("u"), launcher, PLAIN))
    assert segments == [Segment("a", 0, 40)]
    return final.digest


@pytest.mark.parametrize("kind", ["sigkill", "sigstop"])
@pytest.mark.parametrize("restarts", [0, 1])
def test_a_fault_costs_no_step_and_no_bit(
    dataset: Path, launcher: Any, tmp_path: Path, undisturbed: str, kind: Any, restarts: int
) -> None:
    """Both pools are of one class here, so the faulted run must end in the undisturbed run's very bytes."""
    run = make(dataset, tmp_path, launcher, PLAIN, restarts=restarts)
    final, segments = supervise(run, [Fault(pool="a", at_step=17, rank=1, kind=kind)])
    assert final.digest == undisturbed
    state = journal.fold(journal.read(run.journal.path))
    assert [f["kind"] for f in state.faults] == ["killed" if kind == "sigkill" else "hang"]
    steps = [s["step"] for s in state.steps]
    assert len(steps) == len(set(steps)), "a step was done twice"
    assert len(set(range(1, 41)) - set(steps)) <= 1  # the one that was kept but not yet reported
    if restarts:
        assert segments == [Segment("a", 0, 40, failures=1)]
        return
    assert [s.pool for s in segments] == ["a", "b"]
    assert (segments[0].lost, state.fallbacks[0]["lost_steps"]) == (0, 0)
    at = segments[1].start
    assert at == 17, "the fault is at a known step, so the same command gives the same weights"
    handoff = snapshot.load(handoff_file(run.folder, at))
    arrived = [j["digest"] for j in state.joins if (j["pool"], j["step"]) == ("b", at)]
    assert arrived == [handoff.digest]
    assert snapshot.load(kept_file(run.folder, at + 4)).step == at + 4
    again = replay(replace(run, phase="replay", folder=tmp_path / "replay"), segments)
    assert again.digest == final.digest


def test_a_run_with_one_pool_outlives_its_first_fault(
    dataset: Path, launcher: Any, tmp_path: Path, undisturbed: str
) -> None:
    """With the care that a recipe has where it says nothing."""
    run = replace(make(dataset, tmp_path, launcher, PLAIN, restarts=TrainSpec().restarts), pools=PLAIN[:1])
    final, segments = supervise(run, [Fault(pool="a", at_step=17, rank=1)])
    assert final.digest == undisturbed
    assert segments == [Segment("a", 0, 40, failures=1)]


def test_a_supervisor_that_is_called_again_goes_on(
    dataset: Path, launcher: Any, tmp_path: Path, undisturbed: str
) -> None:
    run = make(dataset, tmp_path, launcher, PLAIN)

    class Stopped(Exception):
        pass

    for stop_at in (3, 18, 31):

        def interrupt(step: int, at: int = stop_at) -> None:
            if step >= at:
                raise Stopped

        with pytest.raises(Stopped):
            supervise(replace(run, progress=interrupt))
    final, _ = supervise(run)
    assert final.digest == undisturbed


def test_a_damaged_snapshot_is_passed_over(dataset: Path, launcher: Any, tmp_path: Path, undisturbed: str) -> None:
    """Every snapshot torn: the run goes back to its last checkpoint and still ends in the same bytes."""
    run = make(dataset, tmp_path, launcher, PLAIN)

    class Stopped(Exception):
        pass

    def interrupt(step: int) -> None:
        if step >= 25:
            raise Stopped

    with pytest.raises(Stopped):
        supervise(replace(run, progress=interrupt))
    for path in run.folder.glob("memory/*/*/*.snap"):
        data = bytearray(path.read_bytes())
        for position in range(600, len(data), len(data) // 7):
            data[position] ^= 0xFF
        path.write_bytes(data)
    found, rejected = store.newest(run.folder, run.id, lambda epoch, step: True)
    assert len(rejected) >= 2
    assert found is not None
    assert found.step == 20
    assert supervise(run)[0].digest == undisturbed


def test_a_replay_on_other_pools_is_told_apart(dataset: Path, launcher: Any, tmp_path: Path, undisturbed: str) -> None:
    """The oracle can fail: another schedule of pools ends in other bytes, where the classes differ."""
    pools = (Pool(name="a", platform=PLATFORM, workers=2, env=OTHER_KERNELS), Pool(name="b", platform=PLATFORM))
    run = make(dataset, tmp_path, launcher, pools)
    final, segments = supervise(run, [Fault(pool="a", at_step=17)])
    if final.digest == undisturbed:
        pytest.skip("both pools are of one numerics class on this machine")
    other = [replace(segments[0], end=segments[0].end - 1), replace(segments[1], start=segments[1].start - 1)]  # type: ignore[operator]
    again = replay(replace(run, phase="replay", folder=tmp_path / "replay"), other)
    assert again.digest != final.digest


def test_a_real_death_near_the_end_and_a_second_fallback(
    dataset: Path, launcher: Any, tmp_path: Path, undisturbed: str
) -> None:
    """Nobody planned the second death: a worker of the second pool is killed two steps before the end."""
    run = make(dataset, tmp_path, launcher, (*PLAIN, Pool(name="c", platform=PLATFORM, workers=2)))
    killed: list[int] = []

    def kill(step: int) -> None:
        joins = journal.fold(journal.read(run.journal.path)).joins
        if step >= 36 and not killed and joins[-1]["pool"] == "b":
            killed.append(step)
            os.kill(joins[-1]["pid"], signal.SIGKILL)

    final, segments = supervise(replace(run, progress=kill), [Fault(pool="a", at_step=17)])
    assert final.digest == undisturbed
    assert [s.pool for s in segments] == ["a", "b", "c"]
    assert all(s.lost == 0 for s in segments)
    last = segments[-1].start
    assert last >= killed[0]
    joins = journal.fold(journal.read(run.journal.path)).joins
    for segment in segments[1:]:
        handoff = snapshot.load(handoff_file(run.folder, segment.start))
        arrived = {j["digest"] for j in joins if (j["pool"], j["step"]) == (segment.pool, segment.start)}
        assert arrived == {handoff.digest}
    span = window(run.spec, last)
    assert 0 < span <= 4
    assert snapshot.load(kept_file(run.folder, last + span)).step == last + span


def test_a_stop_is_remembered(dataset: Path, launcher: Any, tmp_path: Path, undisturbed: str) -> None:
    """The injected fault comes once: asked again after a stop, the run goes on and ends as it should."""
    run = make(dataset, tmp_path, launcher, PLAIN[:1])
    with pytest.raises(TrainingFailed):
        supervise(run, [Fault(pool="a", at_step=17)])
    assert supervise(run, [Fault(pool="a", at_step=17)])[0].digest == undisturbed


def test_no_pool_left(dataset: Path, launcher: Any, tmp_path: Path) -> None:
    run = make(dataset, tmp_path, launcher, PLAIN[:1])
    with pytest.raises(TrainingFailed, match="no pool is left after 'a' failed at step"):
        supervise(run, [Fault(pool="a", at_step=5)])


def test_a_bug_does_not_burn_the_other_pool(dataset: Path, launcher: Any, tmp_path: Path) -> None:
    """A learning rate that explodes fails at the same step twice: the run stops on the pool where it is."""
    run = make(dataset, tmp_path, launcher, PLAIN, restarts=3, optimiser={"muon": 100.0, "adam": 100.0})
    with pytest.raises(TrainingFailed, match=r"the same spike came back at step"):
        supervise(run)
    assert {j["pool"] for j in journal.fold(journal.read(run.journal.path)).joins} == {"a"}


class Ended:
    """A process that ended with a status, and what it said."""

    node = None

    def __init__(self, status: int | None, error: Exception | None = None):
        self.status, self.error, self.pid, self.log = status, error, 0, Path()

    def wait(self, timeout: float | None = None) -> int | None:
        return self.status

    def alive(self) -> bool:
        return self.status is None

    def result(self) -> dict[str, Any]:
        raise self.error or AssertionError


class Silence:
    """A hub that hears nothing."""

    def hear(self, timeout: float) -> list[dict[str, Any]]:
        time.sleep(timeout)
        return []


def attempt_of(run: Run, group: list[Any]) -> Attempt:
    stretch = Stretch(PLAIN[0], (0, 1), WORKER, {})
    return Attempt(run, Silence(), stretch, group, 1, run.record())  # type: ignore[arg-type]


LOST_PEER = PlatformError("a worker died with status 70: connection closed by peer")


@pytest.mark.parametrize(
    ("group", "kind", "message"),
    [
        ([Ended(70, LOST_PEER), Ended(-9)], "killed", "a worker was killed by SIGKILL"),
        ([Ended(-9), Ended(70, LOST_PEER)], "killed", "a worker was killed by SIGKILL"),
        ([Ended(None), Ended(-15)], "killed", "a worker was killed by SIGTERM"),
        ([Ended(None), Ended(-11)], "crash", "a worker was killed by SIGSEGV"),
        ([Ended(70, LOST_PEER), Ended(1, TrainingFailed("not finite"))], "error", "not finite"),
        ([Ended(70, LOST_PEER), Ended(None)], "error", LOST_PEER.what),
    ],
)
def test_the_cause_is_named_not_its_consequence(
    dataset: Path, tmp_path: Path, group: list[Any], kind: str, message: str
) -> None:
    """A killed worker breaks its peers' exchange: that is one death, not an error that may come back."""
    run = make(dataset, tmp_path, None, PLAIN)
    found = attempt_of(run, group)._dead()
    assert (found.kind, found.message) == (kind, message)


def test_an_exchange_that_broke_by_itself_is_no_error_of_a_program(dataset: Path, tmp_path: Path) -> None:
    """A link that stays broken says the same at the same step: that is no bug, and another pool may go on."""
    run = make(dataset, tmp_path, None, PLAIN)
    found = attempt_of(run, [Ended(70, LOST_PEER), Ended(70, LOST_PEER)])
    found.alarms = [{"rank": rank, "kind": "peer", "message": "EI0006", "ranks": [rank]} for rank in range(2)]
    failure = found._dead()
    assert (failure.kind, failure.chips) == ("collective", ())
    assert failure.message.endswith("none of them died: EI0006")


def test_a_full_disk_is_no_pool_s_fault(dataset: Path, tmp_path: Path) -> None:
    run = make(dataset, tmp_path, None, PLAIN)
    group: list[Any] = [Ended(70, LOST_PEER), Ended(2, ResourceError("disk full"))]
    with pytest.raises(ResourceError, match="disk full"):
        attempt_of(run, group)._dead()


def test_what_a_worker_found_comes_before_how_it_ended(dataset: Path, tmp_path: Path) -> None:
    """A state that changed in memory is a chip's fault, though the worker ends with what is otherwise the user's."""
    run = make(dataset, tmp_path, None, PLAIN)
    found = attempt_of(run, [Ended(None), Ended(2, CheckpointError("written to between two tensors"))])
    found.alarms = [{"rank": 1, "kind": "corrupt", "message": "between two tensors", "ranks": [1]}]
    assert (found._dead().kind, found._dead().chips) == ("corrupt", (1,))


def test_a_state_of_another_run_is_passed_over(dataset: Path, launcher: Any, tmp_path: Path, undisturbed: str) -> None:
    other = make(dataset, tmp_path / "other", launcher, PLAIN, steps=16)
    supervise(other)
    run = make(dataset, tmp_path / "run", launcher, PLAIN)
    shutil.copytree(other.folder / "memory", run.folder / "memory")
    final, _ = supervise(run)
    assert final.digest == undisturbed
    rejected = [e["message"] for e in journal.read(run.journal.path) if e["event"] == "train.rejected"]
    assert rejected
    assert set(rejected) == {"the state is of another run"}


def test_a_run_whose_pool_was_taken_away_is_not_gone_on_with(dataset: Path, launcher: Any, tmp_path: Path) -> None:
    run = make(dataset, tmp_path, launcher, PLAIN, steps=16)
    supervise(run, [Fault(pool="a", at_step=6, rank=1, kind="sigkill")])
    with pytest.raises(RecipeError, match="on the pool 'a'"):
        supervise(replace(run, pools=PLAIN[1:]))


def test_the_number_of_a_dead_process_may_come_again() -> None:
    ours, theirs = socket.socketpair()
    launcher = LocalLauncher()
    launcher._control, launcher._ready = ours, True
    for message in ({"id": 0, "pid": 5}, {"exit": 5, "status": 70}, {"id": 1, "pid": 5}):
        theirs.sendall(json.dumps(message).encode() + b"\n")
        launcher._pump(1.0)
    assert launcher.status(5) is None
    theirs.sendall(b'{"exit":5,"status":0}\n')
    assert launcher.status(5, wait=1.0) == 0


def leave_others(args: Any) -> dict[str, Any]:
    """Start a process in this worker's session and one in its own, write down their numbers, and stay."""
    import subprocess

    found = [subprocess.Popen(["sleep", "600"], start_new_session=new).pid for new in (False, True)]
    Path(args["pids"]).write_text(" ".join(map(str, found)))
    if args["stay"]:
        time.sleep(600)
    return {}


@pytest.mark.parametrize("stay", [True, False])
def test_nothing_that_a_worker_started_outlives_it(tmp_path: Path, stay: bool) -> None:
    with LocalLauncher() as launcher:
        args = {"pids": str(tmp_path / "pids"), "stay": stay}
        worker = launcher.spawn("tests.test_supervisor:leave_others", args, pool=None, logs=tmp_path)
        deadline = time.monotonic() + 60
        while len((tmp_path / "pids").read_text().split() if (tmp_path / "pids").exists() else []) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        if stay:
            worker.kill()
        worker.wait()
        pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        while any(map(_running, pids)):
            assert time.monotonic() < deadline, "what a worker started outlived it"
            time.sleep(0.01)


def test_a_worker_that_the_system_killed_for_memory(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter([3, 3, 4])
    monkeypatch.setattr("ottava.supervisor.attempt.oom_kills", lambda: next(counts))
    run = make(dataset, tmp_path, None, PLAIN)
    first = attempt_of(run, [Ended(None), Ended(-9)])
    assert first._dead().kind == "killed", "nobody was killed for memory since the start"
    first.oom_kills = 3
    found = first._dead()
    assert (found.kind, found.chips) == ("memory", (1,))


def test_what_runs_out_is_said_once(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[dict[str, float]] = [{}, {"memory": 0.04}, {"memory": 0.03, "disk": 0.001}, {}, {"memory": 0.02}]
    run = make(dataset, tmp_path, None, PLAIN)
    watching = attempt_of(run, [Ended(None)])
    for now in left:
        monkeypatch.setattr("ottava.supervisor.attempt.headroom", lambda _, now=now: now)
        watching.looked = 0.0
        watching._look_at_machine()
    told = [(e["what"], e["left"]) for e in journal.read(run.journal.path) if e["event"] == "train.low"]
    assert told == [("memory", 0.04), ("disk", 0.001), ("memory", 0.02)]


def test_headroom_is_that_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe, "memory", lambda: (49, 1000))
    monkeypatch.setattr(observe, "disks", lambda paths: {str(path): (10, 1000) for path in paths})
    assert observe.headroom(tmp_path) == {"memory": 0.049}
    monkeypatch.setattr(observe, "disks", lambda paths: {str(path): (9, 1000) for path in paths})
    assert observe.headroom(tmp_path) == {"memory": 0.049, "disk": 0.009}
    monkeypatch.undo()
    assert set(observe.headroom(tmp_path)) <= {"memory", "disk"}


def test_two_supervisors_on_one_run(dataset: Path, launcher: Any, tmp_path: Path) -> None:
    run = make(dataset, tmp_path, launcher, PLAIN)
    with alone(run.folder), pytest.raises(Busy, match="another supervisor"):
        supervise(run)
    assert not run.journal.path.read_text()


def test_states_of_another_recipe_are_refused(dataset: Path, launcher: Any, tmp_path: Path) -> None:
    supervise(make(dataset, tmp_path, launcher, PLAIN, steps=12))
    other = make(dataset, tmp_path, launcher, PLAIN, steps=14)
    with pytest.raises(CheckpointError, match="of another run"):
        supervise(other)


def test_a_disk_that_becomes_read_only(dataset: Path, launcher: Any, tmp_path: Path) -> None:
    """States that cannot be made durable stop the run with the right words; when the disk is mended it goes on."""
    run = make(dataset, tmp_path, launcher, PLAIN, checkpoint_every=2, restarts=1)
    durable = store.durable(run.folder)
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(durable)], capture_output=True).returncode:
        pytest.skip("this process may not mount a disk")
    try:

        def make_read_only(step: int) -> None:
            if step >= 8:  # it is refused while a file is being written: then at a later step
                subprocess.run(["mount", "-o", "remount,ro", str(durable)], capture_output=True)

        with pytest.raises(TrainingFailed, match="no state can be made durable"):
            supervise(replace(run, progress=make_read_only))
        subprocess.run(["mount", "-o", "remount,rw", str(durable)], check=True)
        final, segments = supervise(run)
        assert segments == [Segment("a", 0, 40, failures=1)]
        assert final.step == 40
    finally:
        subprocess.run(["umount", str(durable)], check=True)


def test_a_full_disk_stops_the_run_and_burns_no_pool(dataset: Path, launcher: Any, tmp_path: Path) -> None:
    """The whole folder is full, journal and logs too: one message with a place, and no failure of the pool's."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this process may not mount a disk")
    try:
        run = make(dataset, disk, launcher, PLAIN, checkpoint_every=2)
        undisturbed = supervise(make(dataset, tmp_path / "u", launcher, PLAIN, checkpoint_every=2))[0].digest

        def fill(step: int) -> None:
            if step >= 8:
                with suppress(OSError), (disk / "filler").open("ab") as file:
                    for size in (1 << 20, 1 << 12, 1):
                        with suppress(OSError):
                            while True:
                                file.write(b"x" * size)
                                file.flush()

        with pytest.raises((OSError, ResourceError), match=r"No space left|disk"):
            supervise(replace(run, progress=fill))
        (disk / "filler").unlink()
        final, segments = supervise(run)
        assert [(segment.pool, segment.failures) for segment in segments] == [("a", 0)]
        assert final.digest == undisturbed
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_two_launchers_share_a_warm_process(launcher: Any, tmp_path: Path) -> None:
    """Workers of the second die when it goes, those of the first live on."""
    mine = launcher.spawn("tests.test_supervisor:sleep_long", {}, pool=None, logs=tmp_path)
    with LocalLauncher(launcher.address) as other:
        assert other.call("tests.test_supervisor:double", {"value": 4}, logs=tmp_path)[0]["value"] == 8
        theirs = other.spawn("tests.test_supervisor:sleep_long", {}, pool=None, logs=tmp_path)
        other.signal(mine.pid, signal.SIGKILL)  # nobody kills what is not theirs
        assert theirs.alive()
    deadline = time.monotonic() + 60
    while _running(theirs.pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert mine.alive()
    mine.kill()
    assert mine.wait() == -signal.SIGKILL


def test_a_pool_that_is_gone_at_the_end_costs_its_own_accuracy_alone(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from ottava.supervisor.proof import evaluations

    def call(target: str, args: Any, pool: Pool) -> list[dict[str, Any]]:
        if pool.name == "a":
            raise PoolMissing("no node of the cluster has it", where="pool a")
        return [{"thinking": 1.0}]

    places = {"pool": PLAIN[0], "fallback": PLAIN[1:], "out": tmp_path}
    ctx: Any = SimpleNamespace(call=call, journal=Journal(tmp_path / "j"), **places)
    label: Any = SimpleNamespace(path=tmp_path, manifest={"spec": {"task": "chains"}})
    assert evaluations(ctx, tmp_path, label, PLAIN[1]) == {"thinking": 1.0}
    told = json.loads((tmp_path / "evaluation.json").read_text())
    assert told == {"thinking": 1.0, "pool": "b", "pools": {"b": {"thinking": 1.0}}}
    assert [e["pool"] for e in journal.read(tmp_path / "j")] == ["a"]
    with pytest.raises(PoolMissing):
        evaluations(ctx, tmp_path, label, PLAIN[0])
