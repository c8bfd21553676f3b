"""Rehearses faults on a recipe before the real run: many small runs, each disturbed by the faults of its seed.

Every run is a supervisor in a process of its own with real workers that really die. What a run must end in is known:
the bytes of the same schedule of pools without a fault. The pools are CPU processes (a rehearsal): the first has four
workers on two machines that are folders here, the second two workers of another instruction set.
"""

from __future__ import annotations

import glob
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from ottava import journal
from ottava.context import Launcher, Process
from ottava.errors import OttavaError
from ottava.journal import Journal
from ottava.platforms.cpu import OTHER_KERNELS
from ottava.recipe import Pool
from ottava.supervisor import outcome
from ottava.supervisor.launch import launcher_for
from ottava.supervisor.local import LocalLauncher
from ottava.supervisor.loop import Run, replay, supervise
from ottava.supervisor.outcome import Outcome
from ottava.supervisor.record import Segment
from ottava.supervisor.scenario import CHIPS, EVERY, FIRST, NODES, SECOND, SHARE, UPDATES, WINDOW, Act, Scenario
from ottava.trainer import records
from ottava.trainer.rl_spec import ReinforceSpec
from ottava.trainer.start import spec_of
from ottava.trainer.supervised import Fault, Supervised

Trained = TypeVar("Trained", bound=Supervised)
STEPS = 24
LEAST_HANG_S = 1.0
CLUSTER_HANG_S = 3.0  # a cluster on one machine has processes of its own, with which workers take turns
TIMEOUT_S = 180.0  # for one run; nothing may take so long
SMALL_DISK = 24 << 20  # bytes
DURABLE = Path("main", "durable")  # in a run's folder
POOLS = (
    Pool(name=FIRST, workers=CHIPS, nodes=NODES, stands_for="one vendor's chips"),
    Pool(name=SECOND, workers=CHIPS // 2, env=OTHER_KERNELS, stands_for="another vendor's chips"),
)


@dataclass(frozen=True)
class Drill:
    """Where drills run and on what. base: seed, data and chat of every run; launcher: starts the supervisors; ray: the
    address of the Ray cluster that starts their workers, None: the supervisors' own machine does."""

    spec: Supervised
    base: Mapping[str, Any]
    folder: Path
    launcher: LocalLauncher
    ray: str | None = None
    oracles: dict[str, dict[str, Any]] = field(default_factory=dict)

    def args(self, scenario: Scenario, folder: Path, faults: Sequence[Fault] = ()) -> dict[str, Any]:
        """What `carry` is given."""
        least = {} if self.ray is None else {"hang_least_s": CLUSTER_HANG_S}
        spec = self.spec.model_copy(update={"restarts": scenario.restarts, **least}).model_dump(mode="json")
        spec["audit"]["seed"] = scenario.seed  # every run is audited at other steps
        plain = [fault.model_dump(mode="json") for fault in faults]
        who = {"server": self.launcher.address, "ray": self.ray}
        return {"base": {**self.base, "spec": spec}, **who, "folder": str(folder), "faults": plain}


def spec_for(spec: Trained, steps: int = STEPS) -> Trained:
    """A recipe's section made small and watchful: `steps` steps, durable states and audits often."""
    changes: dict[str, Any] = {
        "steps": steps, "fault": None, "virtual_shards": CHIPS, "checkpoint_every": EVERY, "hang_s": 20.0,
        "leave_stragglers": True,
        "hang_least_s": LEAST_HANG_S, "audit": {"share": SHARE}, "spike": {**spec.spike.model_dump(), "window": WINDOW},
        "drift": {**spec.drift.model_dump(), "window": 2}, "go_no_go": None,
        "grid_from": 0.0 if spec.precision == "fp8" else 0.75,
    }  # fmt: skip
    if isinstance(spec, ReinforceSpec):
        few = {"prompts": 4, "group": 4, "updates": UPDATES, "minibatches": 1, "max_new": 24}
        changes |= {"grid_from": spec.grid_from, "rollout": {**spec.rollout.model_dump(), **few}, "lengths": (2, 3)}
        if spec.curriculum is not None:
            both = {"stretches": [{"until": 1, "levels": {2: 1, 3: 1}}]}
            changes |= {"lengths": (), "curriculum": {**spec.curriculum.model_dump(), **both}}
    return type(spec).model_validate({**spec.model_dump(), **changes})


def carry(args: Mapping[str, Any]) -> dict[str, Any]:
    """One supervisor in its own process: to the end, or to a stop that raises."""
    with launcher_for(args["ray"], POOLS, args["server"])() as launcher:
        faults = [Fault.model_validate(fault) for fault in args["faults"]]
        final, segments = supervise(_run(args, launcher, "main"), faults)
    return {"digest": final.digest, "segments": [asdict(segment) for segment in segments]}


def undisturbed(args: Mapping[str, Any]) -> dict[str, Any]:
    """The same schedule of pools without a fault. args: as `carry`, and segments."""
    with launcher_for(args["ray"], POOLS, args["server"])() as launcher:
        final = replay(_run(args, launcher, "oracle"), [Segment(**segment) for segment in args["segments"]])
    return {"digest": final.digest}


def _run(args: Mapping[str, Any], launcher: Launcher, phase: str) -> Run:
    folder = Path(args["folder"])
    base = args["base"]
    return Run(
        phase, spec_of(base), POOLS, base, folder / phase, Journal(folder / "journal.jsonl"), launcher, folder / "logs"
    )


def rehearse(drill: Drill, scenario: Scenario) -> Outcome:
    """Run one scenario and judge it. Its folder is removed if nothing is wrong."""
    folder = drill.folder / f"{scenario.name}-{scenario.seed}"
    _unmount(folder / DURABLE)  # what a killed drill left
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    stage = Stage(drill, scenario, folder)
    begun = time.monotonic()
    try:
        ended, result, reason = stage.play()
    finally:
        stage.clear()
    found = judge(stage, ended, result, reason, time.monotonic() - begun)
    if not found.wrong:
        shutil.rmtree(folder)
    return found


class Stage:
    """One run and what is done to it from outside. faults: those that workers commit, as they are handed out;
    disk: mounted or injected, where the scenario wants a small disk."""

    def __init__(self, drill: Drill, scenario: Scenario, folder: Path):
        self.drill, self.scenario, self.folder = drill, scenario, folder
        self.durable, self.journal = folder / DURABLE, folder / "journal.jsonl"
        self.main = self.durable.parent
        self.todo, self.faults = list(scenario.acts), list(scenario.faults)
        self.slow: int | None = None
        self.process: Process | None = None
        self.disk: str | None = None
        if scenario.instead:
            self.disk = "mounted" if _mount(self.durable) else "injected"
        if self.disk == "injected":  # a disk that others use is never filled
            self.todo, self.faults = [], list(scenario.instead)

    def play(self) -> tuple[str, dict[str, Any] | None, str]:
        """(how it ended, the result, why it stopped)."""
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            if self.process is None:
                args = self.drill.args(self.scenario, self.folder, self.faults)
                target = "ottava.supervisor.drill:carry"
                self.process = self.drill.launcher.spawn(target, args, pool=None, logs=self.folder / "logs")
            status = self.process.wait(0.005)
            if status is None:
                self._act()
            elif status == -signal.SIGKILL:
                self.process = None  # it was killed: whoever supervises starts it again
            else:
                return self._ended(self.process)
        return "stuck", None, f"no end within {TIMEOUT_S:g} s"

    def clear(self) -> None:
        """Leave nothing behind."""
        if self.process is not None and self.process.alive():
            self.process.kill()
            self.process.wait()
        _unmount(self.durable)

    def _ended(self, process: Process) -> tuple[str, dict[str, Any] | None, str]:
        try:
            return "finished", process.result(), ""
        except OttavaError as error:
            return "stopped", None, error.what

    def _act(self) -> None:
        if not self.todo and self.slow is None:
            return
        events = list(journal.read(self.journal))
        done = max((int(e["step"]) for e in events if e["event"] == "train.step"), default=0)
        if self.slow is not None:
            self._crawl(events)
        struck = not self.faults or any(e["event"] == "train.injected" for e in events)
        while self.todo and done >= self.todo[0].at_step and (struck or self.todo[0].kind != "wreck"):
            getattr(self, "_" + self.todo[0].kind)(self.todo.pop(0), events)

    def _tell(self, act: Act) -> None:
        Journal(self.journal).append("train.injected", phase="drill", kind=act.kind, step=act.at_step, chip=act.chip)

    def _supervisor(self, act: Act, events: Sequence[Mapping[str, Any]]) -> None:
        """The supervisor dies; `play` starts another one."""
        assert self.process is not None
        self._tell(act)
        self.process.kill()
        self.process.wait()
        pids = [int(e["pid"]) for e in events if e["event"] == "train.join"]
        if not _gone_within(pids, 2.0):
            Journal(self.journal).append("drill.outlived", phase="drill", pids=pids)

    def _node(self, act: Act, events: Sequence[Mapping[str, Any]]) -> None:
        """All workers of a machine die, and what it kept in memory with them."""
        chips, joins = _present(events)
        self._tell(act)
        for node in {join["node"] for rank, join in joins.items() if chips[rank] == act.chip}:
            for join in joins.values():
                if join["node"] == node:
                    _kill(join["pid"])
            for path in self.main.glob(f"memory/e*/{glob.escape(node)}"):
                shutil.rmtree(path, ignore_errors=True)

    def _slow(self, act: Act, events: Sequence[Mapping[str, Any]]) -> None:
        self._tell(act)
        self.slow = act.chip

    def _crawl(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Let the slow chip's worker run a twentieth of the time."""
        chips, joins = _present(events)
        ranks = [rank for rank, chip in enumerate(chips) if chip == self.slow]
        pool = next((e["pool"] for e in reversed(events) if e["event"] == "train.start"), None)
        if not ranks or ranks[0] not in joins or pool != FIRST:
            return
        with suppress(ProcessLookupError):
            os.kill(joins[ranks[0]]["pid"], signal.SIGSTOP)
            time.sleep(0.3)
            os.kill(joins[ranks[0]]["pid"], signal.SIGCONT)
            time.sleep(0.015)

    def _rollouts(self, act: Act, events: Sequence[Mapping[str, Any]]) -> None:
        """What the newest generation drew is damaged, and a worker dies."""
        chips, joins = _present(events)
        self._tell(act)
        found = records.listed(self.main / "rollouts")
        for path in [path for generation, *_, path in found if generation == found[-1][0]]:
            _spoil(path, act.damage, random.Random(self.scenario.seed))
        for rank, join in joins.items():
            if chips[rank] == act.chip:
                _kill(join["pid"])

    def _fill(self, act: Act, events: Sequence[Mapping[str, Any]]) -> None:
        self._tell(act)
        block = bytes(1 << 16)
        with suppress(OSError), (self.durable / "filler").open("wb", buffering=0) as file:
            for _ in range(SMALL_DISK // len(block)):  # never more, whatever disk this is
                file.write(block)

    def _free(self, act: Act, events: Sequence[Mapping[str, Any]]) -> None:
        (self.durable / "filler").unlink(missing_ok=True)

    def _wreck(self, act: Act, events: Sequence[Mapping[str, Any]]) -> None:
        """Everything dies and all memory is lost, as when the power goes; durable states may be damaged besides."""
        self._supervisor(act, events)
        shutil.rmtree(self.main / "memory", ignore_errors=True)
        if act.damage:
            damage(self.durable, act.damage, self.scenario.seed, act.lost)
        self.faults += self.scenario.later


def _spoil(path: Path, how: str, draw: random.Random) -> None:
    """Flip bits of a file, cut it short, or remove it."""
    data = bytearray(path.read_bytes())
    if how == "flip":
        for _ in range(draw.choice([1, 2, 32])):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
    elif how == "truncate":
        path.write_bytes(data[: draw.randrange(len(data))])
    else:
        path.unlink()


def damage(folder: Path, how: str, seed: int, lost: int = 0) -> None:
    """Remove the `lost` newest durable states and damage the next one: flip bits of a payload, cut it short, swap it
    with that of the state before, edit the manifest, or remove a file."""
    states = sorted(path for path in folder.iterdir() if path.name.startswith("g-"))
    for _ in range(min(lost, len(states))):
        shutil.rmtree(states.pop())
    if not states:
        return
    draw = random.Random(seed)
    payloads = sorted(path for path in states[-1].iterdir() if path.suffix == ".safetensors")
    victim = draw.choice(payloads)
    if how in ("flip", "truncate", "missing"):
        _spoil(victim, how, draw)
    elif how == "swap" and len(states) > 1:
        victim.write_bytes((states[-2] / victim.name).read_bytes())
    elif how == "manifest":
        manifest = json.loads((states[-1] / "manifest.json").read_text())
        manifest["step"] += 1
        (states[-1] / "manifest.json").write_text(json.dumps(manifest))
    else:  # there is none to swap it with
        victim.unlink()


def judge(stage: Stage, ended: str, result: Mapping[str, Any] | None, reason: str, s: float) -> Outcome:
    """What the journal says of a run, beside what it should say."""
    drill, scenario = stage.drill, stage.scenario
    events = [e for e in journal.read(stage.journal) if e["event"].startswith(("train.", "drill."))]
    seen = tuple(str(e["kind"]) for e in events if e["event"] == "train.fault")
    oracle, identical = None, None
    if result is not None:
        oracle = _oracle(drill, scenario, result["segments"])
        identical = result["digest"] == oracle["digest"]
    lost, undone = outcome.lost(events)
    known = (oracle or _oracle(drill, scenario, None))["states"]
    loads = sum(outcome.foreign(e, known, moved=oracle is None) for e in events if e["event"] == "train.join")
    told = {str(e["kind"]) for e in events if e["event"] == "train.injected"}
    struck = bool(told) and told >= {fault.kind for fault in scenario.later}
    detect, recover = outcome.latencies(events)
    pools = tuple(dict.fromkeys(str(e["pool"]) for e in events if e["event"] == "train.start"))
    found = Outcome(
        scenario.name, scenario.seed, ended, seen, identical, detect, recover, lost, undone, loads, struck, round(s, 2),
        pools, reason, outcome.after(events), outcome.goodput(events), stage.disk,
    )  # fmt: skip
    return replace(found, wrong=tuple(outcome.broken(scenario, found, events)))


def _oracle(drill: Drill, scenario: Scenario, segments: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
    """{digest, states: {step: digest}} of a schedule without a fault; that of the first pool alone for None."""
    plain = [
        {"pool": s["pool"], "start": s["start"], "end": s["end"]} for s in segments or () if s["end"] != s["start"]
    ]
    plain = plain or [{"pool": FIRST, "start": 0, "end": drill.spec.steps}]
    key = json.dumps(plain)
    if key not in drill.oracles:
        folder = drill.folder / f"oracle-{len(drill.oracles)}"
        args = {**drill.args(scenario, folder), "segments": plain}
        target = "ottava.supervisor.drill:undisturbed"
        (result,) = drill.launcher.call(target, args, logs=folder / "logs")
        events = list(journal.read(folder / "journal.jsonl"))
        states = {int(e["step"]): e["digest"][:16] for e in events if e["event"] in ("train.step", "train.join")}
        drill.oracles[key] = {"digest": result["digest"], "states": states}
        shutil.rmtree(folder)
    return drill.oracles[key]


def _present(events: Sequence[Mapping[str, Any]]) -> tuple[list[int], dict[int, Mapping[str, Any]]]:
    """The chips of the present start by rank, and what its workers said as far as they joined."""
    start = max((i for i, e in enumerate(events) if e["event"] == "train.start"), default=None)
    if start is None:
        return [], {}
    return list(events[start]["chips"]), {e["rank"]: e for e in events[start:] if e["event"] == "train.join"}


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _gone_within(pids: Sequence[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(_running(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _mount(folder: Path) -> bool:
    """A small disk of its own at `folder`, where this process may make one."""
    folder.mkdir(parents=True)
    return _done("mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "tmpfs", str(folder))


def _unmount(folder: Path) -> None:
    if os.path.ismount(folder):
        _done("umount", "--lazy", str(folder))  # a worker that is dying may still have files open in it


def _done(*command: str) -> bool:
    """Whether a command is there and succeeds."""
    try:
        return subprocess.run(command, check=False, capture_output=True).returncode == 0
    except OSError:
        return False
