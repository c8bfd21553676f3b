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
import statistics
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ottava import journal
from ottava.context import Launcher, Process
from ottava.errors import OttavaError
from ottava.journal import Journal
from ottava.recipe import Pool
from ottava.supervisor.launch import launcher_for
from ottava.supervisor.local import LocalLauncher
from ottava.supervisor.loop import Run, replay, supervise
from ottava.supervisor.record import Segment
from ottava.supervisor.scenario import CHIPS, EVERY, FIRST, NODES, ONCE, SECOND, WINDOW, Act, Scenario
from ottava.trainer.spec import Fault, TrainSpec

STEPS = 24
SHARE = 0.25  # of the steps that are audited, in a drill
LEAST_HANG_S = 1.0
TIMEOUT_S = 180.0  # for one run; nothing may take so long
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
POOLS = (
    Pool(name=FIRST, workers=CHIPS, nodes=NODES, stands_for="one vendor's chips"),
    Pool(name=SECOND, workers=CHIPS // 2, env=AVX2, stands_for="another vendor's chips"),
)


@dataclass(frozen=True)
class Outcome:
    """What became of one run. ended: finished | stopped | stuck; detect_s, recover_s: from the fault to its detection
    and to the next step; lost: steps that were reported and done again; undone: those an audit took back;
    corrupt_loads: workers that began from bytes that the undisturbed run never had; after: steps from a wrong gradient
    to the audit that found it, 0 in the same step; goodput: share of the time from the first start to the last step
    that went into steps that count; wrong: why a guarantee broke."""

    name: str
    seed: int
    ended: str
    seen: tuple[str, ...]
    identical: bool | None
    detect_s: float | None
    recover_s: float | None
    lost: int
    undone: int
    corrupt_loads: int
    struck: bool
    seconds: float
    pools: tuple[str, ...]
    reason: str = ""
    after: int | None = None
    goodput: float | None = None
    wrong: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Drill:
    """Where drills run and on what. base: seed, data and chat of every run; launcher: starts the supervisors; ray: the
    address of the Ray cluster that starts their workers, None: the supervisors' own machine does."""

    spec: TrainSpec
    base: Mapping[str, Any]
    folder: Path
    launcher: LocalLauncher
    ray: str | None = None
    oracles: dict[str, dict[str, Any]] = field(default_factory=dict)

    def args(self, scenario: Scenario, folder: Path) -> dict[str, Any]:
        """What `carry` is given."""
        spec = self.spec.model_copy(update={"restarts": scenario.restarts}).model_dump(mode="json")
        spec["audit"]["seed"] = scenario.seed  # every run is audited at other steps
        faults = [fault.model_dump(mode="json") for fault in scenario.faults]
        who = {"server": self.launcher.address, "ray": self.ray}
        return {**self.base, **who, "spec": spec, "folder": str(folder), "faults": faults}


def spec_for(spec: TrainSpec, steps: int = STEPS) -> TrainSpec:
    """A recipe's train section made small and watchful: `steps` steps, durable states and audits often."""
    changes: dict[str, Any] = {
        "steps": steps, "fault": None, "virtual_shards": CHIPS, "checkpoint_every": EVERY, "hang_s": 20.0,
        "leave_stragglers": True,
        "hang_least_s": LEAST_HANG_S, "audit": {"share": SHARE}, "spike": {**spec.spike.model_dump(), "window": WINDOW},
        "drift": {**spec.drift.model_dump(), "window": 2}, "grid_from": 0.75, "go_no_go": None,
    }  # fmt: skip
    return TrainSpec.model_validate({**spec.model_dump(), **changes})


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
    base = {name: args[name] for name in ("spec", "seed", "data", "chat")}
    spec = TrainSpec.model_validate(args["spec"])
    return Run(phase, spec, POOLS, base, folder / phase, Journal(folder / "journal.jsonl"), launcher, folder / "logs")


def rehearse(drill: Drill, scenario: Scenario) -> Outcome:
    """Run one scenario and judge it. Its folder is removed if nothing is wrong."""
    folder = drill.folder / f"{scenario.name}-{scenario.seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    stage = Stage(drill, scenario, folder)
    begun = time.monotonic()
    try:
        ended, result, reason = stage.play()
    finally:
        stage.clear()
    outcome = judge(drill, scenario, folder, ended, result, reason, time.monotonic() - begun)
    if not outcome.wrong:
        shutil.rmtree(folder)
    return outcome


class Stage:
    """One run and what is done to it from outside."""

    def __init__(self, drill: Drill, scenario: Scenario, folder: Path):
        self.drill, self.scenario, self.folder = drill, scenario, folder
        self.main, self.journal = folder / "main", folder / "journal.jsonl"
        self.todo = list(scenario.acts)
        self.slow: int | None = None
        self.mounted = scenario.small_disk and _mount(self.main / "durable")
        self.process: Process | None = None

    def play(self) -> tuple[str, dict[str, Any] | None, str]:
        """(how it ended, the result, why it stopped)."""
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            if self.process is None:
                args = self.drill.args(self.scenario, self.folder)
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
        if self.mounted:
            subprocess.run(["umount", str(self.main / "durable")], check=False, capture_output=True)

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
        struck = not self.scenario.faults or any(e["event"] == "train.injected" for e in events)
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
        gone = _gone_within(pids, 2.0)
        if not gone:
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

    def _fill(self, act: Act, events: Sequence[Mapping[str, Any]]) -> None:
        self._tell(act)
        with suppress(OSError), (self.main / "durable" / "filler").open("wb", buffering=0) as file:
            while file.write(bytes(1 << 16)):
                pass

    def _free(self, act: Act, events: Sequence[Mapping[str, Any]]) -> None:
        (self.main / "durable" / "filler").unlink(missing_ok=True)

    def _wreck(self, act: Act, events: Sequence[Mapping[str, Any]]) -> None:
        """Everything dies and all memory is lost, as when the power goes; durable states may be damaged besides."""
        assert self.process is not None
        self._tell(act)
        self.process.kill()
        self.process.wait()
        _gone_within([int(e["pid"]) for e in events if e["event"] == "train.join"], 2.0)
        shutil.rmtree(self.main / "memory", ignore_errors=True)
        if act.damage:
            damage(self.main / "durable", act.damage, self.scenario.seed)


def damage(folder: Path, how: str, seed: int) -> None:
    """Damage the newest durable state: flip bits of a payload, cut it short, swap it with that of the state before,
    edit the manifest, or remove a file."""
    states = sorted(path for path in folder.iterdir() if path.name.startswith("g-"))
    if not states:
        return
    draw = random.Random(seed)
    payloads = sorted(path for path in states[-1].iterdir() if path.suffix == ".safetensors")
    victim = draw.choice(payloads)
    data = bytearray(victim.read_bytes())
    if how == "flip":
        for _ in range(draw.choice([1, 2, 32])):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        victim.write_bytes(data)
    elif how == "truncate":
        victim.write_bytes(data[: draw.randrange(len(data))])
    elif how == "swap" and len(states) > 1:
        victim.write_bytes((states[-2] / victim.name).read_bytes())
    elif how == "manifest":
        manifest = json.loads((states[-1] / "manifest.json").read_text())
        manifest["step"] += 1
        (states[-1] / "manifest.json").write_text(json.dumps(manifest))
    else:
        victim.unlink()


def judge(
    drill: Drill, scenario: Scenario, folder: Path, ended: str, result: Mapping[str, Any] | None, reason: str, s: float
) -> Outcome:
    """What the journal says of a run, beside what it should say."""
    events = [e for e in journal.read(folder / "journal.jsonl") if e["event"].startswith(("train.", "drill."))]
    seen = tuple(str(e["kind"]) for e in events if e["event"] == "train.fault")
    oracle, identical = None, None
    if result is not None:
        oracle = _oracle(drill, scenario, result["segments"])
        identical = result["digest"] == oracle["digest"]
    lost, undone = _lost(events)
    known = (oracle or _oracle(drill, scenario, None))["states"]
    loads = sum(_foreign(e, known, moved=oracle is None) for e in events if e["event"] == "train.join")
    struck = any(e["event"] == "train.injected" for e in events)
    detect, recover = _latencies(events)
    pools = tuple(dict.fromkeys(str(e["pool"]) for e in events if e["event"] == "train.start"))
    found = Outcome(
        scenario.name, scenario.seed, ended, seen, identical, detect, recover, lost, undone, loads, struck, round(s, 2),
        pools, reason, _after(events), _goodput(events),
    )  # fmt: skip
    return Outcome(**{**asdict(found), "wrong": tuple(_broken(scenario, found, events))})


def _broken(scenario: Scenario, found: Outcome, events: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """The guarantees that a run broke."""
    unseen = scenario.binomial and not found.seen
    if found.ended == "stuck":
        yield f"it did not end: {found.reason}"
    if found.identical is False and not unseen:
        yield "it ended in other bytes than the same schedule without a fault"
    if found.corrupt_loads:
        yield f"{found.corrupt_loads} workers began from a state that never was"
    if scenario.lost is not None and found.lost > scenario.lost:
        yield f"{found.lost} steps were lost, and at most {scenario.lost} may be"
    strangers = set(found.seen) - scenario.kinds
    if strangers:
        yield f"it was called {', '.join(sorted(strangers))}, and is {' or '.join(sorted(scenario.kinds)) or 'nothing'}"
    if found.ended == "stopped" and not found.seen:
        yield f"it stopped without a diagnosis: {found.reason}"
    if not found.struck:
        yield "the fault never struck"
    if any(e["event"] == "drill.outlived" for e in events):
        yield "a worker outlived its supervisor by two seconds"


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


def _foreign(join: Mapping[str, Any], known: Mapping[int, str], moved: bool) -> bool:
    """Whether a worker began from other bytes than the undisturbed run had there. moved: the oracle knows the first
    pool alone."""
    if moved and join["pool"] != FIRST:
        return False
    return bool(known.get(int(join["step"])) != join["digest"][:16])


def _lost(events: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """The most steps that were lost at once, and the most that were taken back by an audit."""
    reported = lost = undone = 0
    back = False
    for event in events:
        if event["event"] == "train.step":
            reported = int(event["step"])
        elif event["event"] == "train.rollback":
            back = True
        elif event["event"] == "train.start" and event["phase"] == "main":
            gap = max(0, reported - int(event["step"]))
            lost, undone = (lost, max(undone, gap)) if back else (max(lost, gap), undone)
            reported, back = int(event["step"]), False
    return lost, undone


def _after(events: Sequence[Mapping[str, Any]]) -> int | None:
    """Steps that a wrong gradient passed for right before an audit found it."""
    struck = next((int(e["step"]) for e in events if e["event"] == "train.injected" and e["kind"] == "gradient"), None)
    seen = next((int(e["step"]) for e in events if e["event"] == "train.fault" and e["kind"] == "gradient"), None)
    return None if struck is None or seen is None else seen - struck


def _goodput(events: Sequence[Mapping[str, Any]]) -> float | None:
    """The share of a run's time that went into steps that count."""
    began = next((float(e["t"]) for e in events if e["event"] == "train.start"), None)
    steps = {int(e["step"]): e for e in events if e["event"] == "train.step"}
    if began is None or not steps:
        return None
    spent = max(float(e["t"]) for e in steps.values()) - began
    return round(sum(float(e["seconds"]) for e in steps.values()) / spent, 4) if spent > 0 else None


def _latencies(events: Sequence[Mapping[str, Any]]) -> tuple[float | None, float | None]:
    """Seconds from the first fault to its detection, and to the next step."""
    struck = next((float(e["t"]) for e in events if e["event"] == "train.injected"), None)
    if struck is None:
        return None, None
    seen = next((float(e["t"]) for e in events if e["event"] == "train.fault" and e["t"] >= struck), None)
    starts = [float(e["t"]) for e in events if e["event"] == "train.start" and e["t"] >= struck]
    first = next((float(e["t"]) for e in events if e["event"] == "train.step" and starts and e["t"] > starts[0]), None)
    return (None if seen is None else round(seen - struck, 3), None if first is None else round(first - struck, 3))


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
    size = f"size={SMALL_DISK}"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], check=False, capture_output=True)
    return done.returncode == 0


SMALL_DISK = 24 << 20


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What a campaign shows: the whole, and by class."""
    groups = {name: [o for o in outcomes if o.name == name] for name in dict.fromkeys(o.name for o in outcomes)}
    by_fault = {name: _figures(found) for name, found in groups.items()}
    whole = _figures(outcomes)
    if ONCE in groups:
        by_fault[ONCE] |= _audited(groups[ONCE])
        whole["broken"] += not by_fault[ONCE]["inside"]
    return {**whole, "by_fault": by_fault}


def _audited(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Gradients that were wrong once: how many an audit found, and where 99% of such counts lie."""
    from scipy.stats import binom

    found = sum(o.after is not None for o in outcomes)
    low, high = (int(x) for x in binom.interval(0.99, len(outcomes), SHARE))
    return {"found": found, "share": SHARE, "interval": [low, high], "inside": low <= found <= high}


def _figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    finished = [o for o in outcomes if o.ended == "finished"]
    return {
        "runs": len(outcomes),
        "finished": len(finished),
        "diagnosed": sum(o.ended == "stopped" and not o.wrong for o in outcomes),
        "bit_identical": sum(o.identical is True for o in finished),
        "lost_steps_max": max((o.lost for o in outcomes), default=0),
        "undone_steps_max": max((o.undone for o in outcomes), default=0),
        "found_after_max": max((o.after for o in outcomes if o.after is not None), default=None),
        "corrupt_loads": sum(o.corrupt_loads for o in outcomes),
        "detect_p50_s": _median(o.detect_s for o in outcomes),
        "mttr_p50_s": _median(o.recover_s for o in outcomes),
        "goodput_p50": _median(o.goodput for o in outcomes),
        "broken": sum(bool(o.wrong) for o in outcomes),
    }


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(statistics.median(known), 3) if known else None
