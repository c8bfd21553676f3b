"""Why did it fail? A table of rules from what was seen to likely causes and what to do about them; pure.

Each rule looks for its evidence and gives it in words, so a reader can check the conclusion. Likelihoods are words, not
numbers, as nobody has measured them: `certain` (the evidence is the cause), `likely`, `possible`, and `consequence`
(true, but it follows from something else, so it is never the first cause). What comes first in the table comes first
among equals.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ottava.supervisor.decide import BUGS, KINDS
from ottava.supervisor.detect import WAITING

Likelihood = Literal["certain", "likely", "possible", "consequence"]
LIKELIHOODS: tuple[Likelihood, ...] = ("certain", "likely", "possible", "consequence")

ALONE = 75
"""The exit status of a worker that lost its supervisor or its lease."""

LOW_DISK, LOW_MEMORY = 0.01, 0.05  # shares that are as good as nothing
LEAST_DISK = 16 << 20  # bytes


@dataclass(frozen=True)
class RankFacts:
    """One worker, as the supervisor knows it.

    status: exit status (negative: minus the signal), None while it lives. phase, step: the last that it reported.
    silent_s: seconds since its last beat, None where it never spoke. message: its last words. log: its output.
    here: its process is on this machine. stacks: a file to which it was asked to write where it stands.
    """

    rank: int
    chip: str
    pid: int
    status: int | None = None
    phase: str | None = None
    step: int = -1
    silent_s: float | None = None
    message: str = ""
    log: Path | None = None
    here: bool = True
    stacks: Path | None = None


@dataclass(frozen=True)
class Facts:
    """A failure, as the supervisor knows it.

    kind: one of `decide.KINDS`; message: in a detector's or a worker's words; blamed: the ranks that these speak
    against; step: the last that was kept. oom_kills: the counter of `observe.oom_kills` when the workers were started,
    if known.
    """

    pool: str
    epoch: int
    kind: str
    ranks: tuple[RankFacts, ...]
    journal: Path
    step: int = -1
    message: str = ""
    blamed: tuple[int, ...] = ()
    platform: str = "cpu"
    oom_kills: int | None = None


@dataclass(frozen=True)
class Seen:
    """What the machine says at the time. All of it may be missing.

    states, waits: by rank, the letter and the kernel function of /proc ("" where there is no such process). faults:
    by rank, a `platforms.FaultClass` of its words. oom_kills: the counter now. memory, load: free and total bytes; load
    and cores. disks: by path, free and total bytes. kernel: its lines about memory, hardware and these processes.
    repeats: how often this very fault is in the journal.
    """

    states: Mapping[int, str] = field(default_factory=dict)
    waits: Mapping[int, str] = field(default_factory=dict)
    faults: Mapping[int, str] = field(default_factory=dict)
    oom_kills: int | None = None
    memory: tuple[int, int] | None = None
    load: tuple[float, int] | None = None
    disks: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    kernel: tuple[str, ...] = ()
    repeats: int = 0


@dataclass(frozen=True)
class Cause:
    """A likely cause, the lines that speak for it, and what to do."""

    cause: str
    likelihood: Likelihood
    evidence: tuple[str, ...]
    todo: str


Find = Callable[[Facts, Seen], list[str]]


@dataclass(frozen=True)
class Rule:
    """find: the evidence in words, none where the rule does not apply. moot: causes that, once certain, explain it."""

    cause: str
    likelihood: Likelihood
    find: Find
    moot: tuple[str, ...] = ()


TODO = {
    "stopped from outside": "find who sent SIGSTOP or froze the control group (job control, a debugger, a freezer); "
    "`kill -CONT PID` lets a stopped process go on",
    "out of memory": "give the workers more memory or fewer neighbours: a smaller batch, fewer workers a machine, a "
    "higher limit",
    "disk full": "free some space, or move the run's folder; then run the same command again: nothing is lost",
    "a bug": "the same error at the same step is no chip's fault: mend the code or the recipe; the log has the stack",
    "another numerics class": "a pool's workers must be of one chip, one instruction set and one set of libraries",
    "the chip is lost": "take the chip out of the pool and have it tested; its driver's log says more",
    "a chip that got stuck": "nothing where it goes on after a restart; where it comes back on this chip, take it out "
    "of the pool and have it tested",
    "the installation cannot do it": "an operator, a type or a file is missing in the chip's software: see the code in "
    "the message, `ottava doctor --model DIR --chip NAME` and the versions in environment.json",
    "another engine than the learner": "what draws replies does not hold the learner's weights, or computes far from "
    "them: see the tensor that is named, the engine's layout and dtype, and whether it took the last hand-over",
    "replies were lost": "look at the disk that holds the rollouts; the run goes back to the state that drew them",
    "the machine is gone": "look at its power, its network and its console; the run goes on without it",
    "silent corruption": "take the chip out of the pool and test its memory and its arithmetic (`ottava qualify`)",
    "bad numbers from one rank": "if it comes back on this chip with other data, take the chip out; if it comes back "
    "with this data on another chip, look at the data",
    "a crash in native code": "compare the libraries' versions with a machine that works, then test chip and memory; "
    "an illegal instruction means a build for another chip",
    "told to end": "ask the scheduler: preemption, a time limit or an operator; the run can be started again",
    "killed from outside, or by the kernel": "ask who sends SIGKILL: a scheduler, an operator, the kernel for lack of "
    "memory; run `dmesg` as root to see the kernel's kills",
    "waits for storage": "a process in state D waits for a disk or a network file system: look at the mount",
    "one rank hangs": "see where it stands in stacks/; if it is always the same chip, take it out of the pool",
    "something that all workers share": "look at the link between them, the shared storage and the machine; stacks/ "
    "says where each one stands",
    "a slow chip": "look for throttling, a power limit, another job on the chip or a slow link; or take it out",
    "the machine is overloaded": "give the workers cores of their own: more runs here than there are cores",
    "the recipe diverges": "lower the learning rate or the clip norm, or look at the data of this step",
    "a bad batch": "look at the data of this step; if it comes back elsewhere, lower the learning rate",
    "an error in the program": "read the error in the log; if it comes back at the same step it is a bug",
    "a lost peer": "nothing by itself: look for the worker that went first",
    "unknown": "read logs/ and stacks/: no rule fits what was seen; the newest lines usually tell",
}
"""Every cause that can be named, and what to do about it."""

_CRASHES = tuple(getattr(signal, f"SIG{name}") for name in ("SEGV", "BUS", "ILL", "FPE", "ABRT", "SYS"))
_ORDERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU)
_NO_SPACE = re.compile(r"disk full|no space left|quota exceeded|Errno (28|122)\b", re.IGNORECASE)
_PEER = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|closed by peer|broken pipe|lost (its|my|a) peer"
    r"|peer .*(closed|gone)|socket (closed|timeout)|timed out waiting|wait timeout|watchdog caught collective",
    re.IGNORECASE,
)
_HARDWARE = re.compile(r"hardware error|\bmce:|NVRM: Xid|EDAC .*\b[CU]E\b|\bECC\b|fallen off the bus", re.IGNORECASE)
_OOM = re.compile(r"out of memory|oom-kill|killed process", re.IGNORECASE)


def causes(facts: Facts, seen: Seen = Seen()) -> list[Cause]:
    """The likely causes, best first, with their evidence; at least one ("unknown"), and a consequence never first."""
    found: dict[str, tuple[Likelihood, list[str]]] = {}
    for likelihood in LIKELIHOODS:
        certain = {cause for cause, (level, _) in found.items() if level == "certain"}
        for rule in RULES:
            if rule.likelihood != likelihood or certain.intersection(rule.moot):
                continue
            lines = rule.find(facts, seen)
            if lines:
                found.setdefault(rule.cause, (likelihood, []))[1].extend(lines)
    ranked = [Cause(cause, level, tuple(dict.fromkeys(lines)), TODO[cause]) for cause, (level, lines) in found.items()]
    if all(cause.likelihood == "consequence" for cause in ranked):
        said = [f"the failure is of the kind {facts.kind!r}: {facts.message or 'no message'}"]
        ranked.insert(0, Cause("unknown", "possible", tuple(said), TODO["unknown"]))
    return ranked


def signal_of(status: int | None) -> signal.Signals | None:
    """The signal that ended a process: -N, or 128 + N as shells and containers say. None for others."""
    number = 0 if status is None else -status if status < 0 else status - 128
    return signal.Signals(number) if number in set(signal.Signals) else None


def _who(rank: RankFacts) -> str:
    return f"rank {rank.rank} (chip {rank.chip}, process {rank.pid})"


def _at(rank: RankFacts) -> str:
    silent = "it never spoke" if rank.silent_s is None else f"its last beat was {rank.silent_s:.1f} s ago"
    return f"{_who(rank)} is in {rank.phase or 'no known phase'} after step {rank.step}; {silent}"


def _living(facts: Facts) -> list[RankFacts]:
    return [rank for rank in facts.ranks if rank.status is None]


def _ended_by(facts: Facts, signals: Sequence[signal.Signals]) -> list[tuple[RankFacts, str]]:
    ended = [(rank, signal_of(rank.status)) for rank in facts.ranks]
    return [(rank, f"{_who(rank)} was ended by {by.name}") for rank, by in ended if by is not None and by in signals]


def _about(rank: RankFacts, seen: Seen) -> list[str]:
    """The kernel's lines that name a process: `Killed process 7`, `pid=7`, `python[7]: segfault`."""
    named = re.compile(rf"(process |pid[=:] ?){rank.pid}\b|\[{rank.pid}\]")
    return [f"the kernel says: {line}" for line in seen.kernel if named.search(line)]


def _words(facts: Facts, pattern: re.Pattern[str]) -> list[str]:
    """Who said what, where it fits a pattern; the failure's own message where no rank is known to have said it."""
    said = [f"{_who(rank)} says: {rank.message}" for rank in facts.ranks if pattern.search(rank.message)]
    return said or ([f"the failure's message: {facts.message}"] if pattern.search(facts.message) else [])


def _classed(facts: Facts, seen: Seen, fault: str) -> list[str]:
    return [f"{_who(rank)} says: {rank.message}" for rank in facts.ranks if seen.faults.get(rank.rank) == fault]


def _kind(*kinds: str) -> Find:
    assert KINDS.keys() >= set(kinds), kinds
    return lambda facts, seen: [f"{facts.kind}: {facts.message or 'no message'}"] if facts.kind in kinds else []


def _stopped(facts: Facts, seen: Seen) -> list[str]:
    out = []
    for rank in _living(facts):
        state, wait = seen.states.get(rank.rank), seen.waits.get(rank.rank, "")
        if state in ("T", "t"):
            out.append(f"{_who(rank)} is {'stopped' if state == 'T' else 'held by a debugger'} (state {state})")
        elif re.search("refrigerator|freez", wait):
            out.append(f"{_who(rank)} is frozen with its control group ({wait})")
    return out


def _oom_certain(facts: Facts, seen: Seen) -> list[str]:
    killed = _ended_by(facts, (signal.SIGKILL,))
    out = [line for rank, _ in killed for line in _about(rank, seen) if _OOM.search(line)]
    before, now = facts.oom_kills, seen.oom_kills
    if killed and before is not None and now is not None and now > before:
        out.append(f"the kernel killed {now - before} processes of this control group for lack of memory meanwhile")
    return ([line for _, line in killed] if out else []) + out


def _oom_said(facts: Facts, seen: Seen) -> list[str]:
    return _kind("memory")(facts, seen) + _classed(facts, seen, "out_of_memory")


def _oom_likely(facts: Facts, seen: Seen) -> list[str]:
    killed, out = _ended_by(facts, (signal.SIGKILL,)), []
    if seen.memory and seen.memory[0] < LOW_MEMORY * seen.memory[1]:
        out.append(f"{seen.memory[0] / 1e6:.0f} of {seen.memory[1] / 1e6:.0f} MB of memory are free even now")
    if facts.oom_kills is None and seen.oom_kills:
        out.append(
            f"the kernel killed {seen.oom_kills} processes of this control group for lack of memory at some time"
        )
    return [line for _, line in killed] + out if killed and out else []


def _oom_possible(facts: Facts, seen: Seen) -> list[str]:
    lines = [f"the kernel says, of some process: {line}" for line in seen.kernel if _OOM.search(line)]
    return lines if _ended_by(facts, (signal.SIGKILL,)) else []


def _full(seen: Seen) -> list[str]:
    return [
        f"{path} has {free / 1e6:.0f} of {total / 1e6:.0f} MB free"
        for path, (free, total) in seen.disks.items()
        if total and free < max(LOW_DISK * total, min(LEAST_DISK, total / 4))
    ]


def _disk_certain(facts: Facts, seen: Seen) -> list[str]:
    out = _kind("disk")(facts, seen) + _words(facts, _NO_SPACE)
    return out + _full(seen) if out else []


def _disk_likely(facts: Facts, seen: Seen) -> list[str]:
    """Writing into mapped memory whose file has no room ends by SIGBUS."""
    buses = [line for _, line in _ended_by(facts, (signal.SIGBUS,))]
    return buses + _full(seen) if buses and _full(seen) else []


def _again(facts: Facts, seen: Seen) -> list[str]:
    if facts.kind not in BUGS or seen.repeats < 2:
        return []
    return [f"{seen.repeats} times at step {facts.step}, in the same words: {facts.message}", *_errors(facts, seen)]


def _errors(facts: Facts, seen: Seen) -> list[str]:
    """What workers say that is neither a detector's finding nor a consequence of another's end."""
    if facts.kind in KINDS and facts.kind not in ("error", "memory"):
        return []
    consequence = {r.rank for r in facts.ranks if _PEER.search(r.message) or seen.faults.get(r.rank) == "collective"}
    own = [r for r in facts.ranks if r.message and (r.status or 0) > 0 and r.rank not in consequence]
    said = [f"{_who(r)} ended with status {r.status}: {r.message}" for r in own if not signal_of(r.status)]
    alone = facts.kind == "error" and facts.message and not _PEER.search(facts.message)
    return said or ([f"the failure's message: {facts.message}"] if alone and not consequence else [])


def _blamed(*kinds: str) -> Find:
    assert KINDS.keys() >= set(kinds), kinds

    def find(facts: Facts, seen: Seen) -> list[str]:
        if facts.kind not in kinds:
            return []
        against = [f"this speaks against {_who(rank)}" for rank in facts.ranks if rank.rank in facts.blamed]
        return [*_kind(*kinds)(facts, seen), *(against or ["no majority says which rank is right"])]

    return find


def _one_bad(facts: Facts, seen: Seen) -> list[str]:
    some = 0 < len(set(facts.blamed)) < len(facts.ranks)
    return _blamed("nan")(facts, seen) if some else []


def _diverges(times: int) -> Find:
    def find(facts: Facts, seen: Seen) -> list[str]:
        if facts.kind not in ("nan", "spike") or _one_bad(facts, seen) or seen.repeats < times:
            return []
        again = [f"it came {seen.repeats} times at step {facts.step}"] if seen.repeats > 1 else []
        return [f"{facts.kind} on all ranks alike: {facts.message or 'no message'}", *again]

    return find


def _bad_batch(facts: Facts, seen: Seen) -> list[str]:
    return _kind("spike")(facts, seen) if seen.repeats < 2 else []


def _crashed(facts: Facts, seen: Seen) -> list[str]:
    return [text for rank, line in _ended_by(facts, _CRASHES) for text in [line, *_about(rank, seen)]]


def _hardware(facts: Facts, seen: Seen) -> list[str]:
    return [f"the kernel says: {line}" for line in seen.kernel if _HARDWARE.search(line)]


def _killed(facts: Facts, seen: Seen) -> list[str]:
    vanished = [rank for rank in _living(facts) if rank.here and seen.states.get(rank.rank) in ("", "Z", "X")]
    out = [line for _, line in _ended_by(facts, (signal.SIGKILL,))]
    return out + [f"{_who(rank)} has no exit status yet and is no more" for rank in vanished]


def _ordered(facts: Facts, seen: Seen) -> list[str]:
    return [line for _, line in _ended_by(facts, _ORDERS)]


def _storage(facts: Facts, seen: Seen) -> list[str]:
    asleep = [rank for rank in _living(facts) if seen.states.get(rank.rank) == "D"]
    return [f"{_at(rank)}; it sleeps in the kernel (state D) in {seen.waits.get(rank.rank) or '?'}" for rank in asleep]


def _late(facts: Facts) -> list[RankFacts]:
    """The living ranks for which the others wait; none where all wait or none does."""
    living = _living(facts)
    if len(living) < 2:
        return living
    front = max(rank.step for rank in living)
    late = [rank for rank in living if rank.phase not in WAITING or rank.step < front]
    if late:
        return late if len(late) < len(living) else []
    beats = sorted(rank.silent_s for rank in living if rank.silent_s is not None)
    usual = beats[(len(beats) - 1) // 2] if beats else 0.0
    silent = [rank for rank in living if rank.silent_s is None or rank.silent_s > 5 * usual + 1]
    return silent if len(silent) < len(living) else []


def _one_hangs(facts: Facts, seen: Seen) -> list[str]:
    late = _late(facts) if facts.kind in ("hang", "collective") else []
    others = [rank for rank in _living(facts) if rank not in late]
    return [_at(rank) for rank in late] + [f"{_at(rank)}: it waits" for rank in others] if late else []


def _shared(facts: Facts, seen: Seen) -> list[str]:
    if facts.kind not in ("hang", "collective") or _late(facts):
        return []
    return [_at(rank) for rank in _living(facts)]


def _overloaded(facts: Facts, seen: Seen) -> list[str]:
    if facts.kind not in ("hang", "straggler", "collective") or not seen.load or seen.load[0] <= 2 * seen.load[1]:
        return []
    return [f"the load is {seen.load[0]:.1f} on {seen.load[1]} cores"]


def _lost_peer(facts: Facts, seen: Seen) -> list[str]:
    alone = [f"{_who(r)} ended because it lost its supervisor" for r in facts.ranks if r.status == ALONE]
    return _words(facts, _PEER) + _classed(facts, seen, "collective") + alone


def _device(facts: Facts, seen: Seen) -> list[str]:
    return _kind("lost")(facts, seen) + _classed(facts, seen, "device_lost")


def _stuck(facts: Facts, seen: Seen) -> list[str]:
    return _kind("stuck")(facts, seen) + _classed(facts, seen, "device_stuck")


def _unusable(facts: Facts, seen: Seen) -> list[str]:
    return _classed(facts, seen, "unusable")


_EXPLAINED = ("a bug", "out of memory", "disk full", "the chip is lost", "another numerics class", "silent corruption")

RULES: tuple[Rule, ...] = (
    Rule("stopped from outside", "certain", _stopped),
    Rule("out of memory", "certain", _oom_certain),
    Rule("disk full", "certain", _disk_certain),
    Rule("a bug", "certain", _again),
    Rule("out of memory", "certain", _oom_said),
    Rule("the chip is lost", "certain", _device),
    Rule("the installation cannot do it", "certain", _unusable),
    Rule("another numerics class", "certain", _blamed("class")),
    Rule("the machine is gone", "certain", _kind("node")),
    Rule("another engine than the learner", "certain", _kind("mismatch")),
    Rule("replies were lost", "certain", _kind("rollout")),
    Rule("silent corruption", "likely", _blamed("corrupt", "gradient")),
    Rule("a chip that got stuck", "likely", _stuck),
    Rule("bad numbers from one rank", "likely", _one_bad),
    Rule("the recipe diverges", "likely", _diverges(times=2)),
    Rule("disk full", "likely", _disk_likely),
    Rule("out of memory", "likely", _oom_likely),
    Rule("a crash in native code", "likely", _crashed),
    Rule("the chip is lost", "likely", _hardware),
    Rule("killed from outside, or by the kernel", "likely", _killed, ("out of memory", "the machine is gone")),
    Rule("told to end", "likely", _ordered),
    Rule("waits for storage", "likely", _storage),
    Rule("one rank hangs", "likely", _one_hangs, ("stopped from outside",)),
    Rule("something that all workers share", "likely", _shared, ("stopped from outside",)),
    Rule("a slow chip", "likely", _blamed("straggler"), ("stopped from outside",)),
    Rule("an error in the program", "likely", _errors, _EXPLAINED),
    Rule("a bad batch", "possible", _bad_batch),
    Rule("the recipe diverges", "possible", _diverges(times=0)),
    Rule("out of memory", "possible", _oom_possible),
    Rule("the machine is overloaded", "possible", _overloaded),
    Rule("a lost peer", "consequence", _lost_peer),
)
