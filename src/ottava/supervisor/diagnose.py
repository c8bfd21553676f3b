"""One folder that says why a run stopped or left a pool: written while its workers still stand where they failed.

    diagnosis/epoch-3-hang/
        README.txt         in plain words: what happened, the likely causes, what to do
        diagnosis.json     the same for programs: causes with their evidence, the action, the ranks, what was seen
        journal.jsonl      the last events
        logs/rank-0.log    the end of each worker's output
        stacks/            where each living worker stands, and what /proc says of it
        environment.json   machine, versions, memory, disks, load, the variables that change what is computed

It appears by rename, complete or not at all, and without secrets (`redact`). A diagnosis never fails and never waits
for long: what cannot be had is noted in it; where not even the folder can be written, the causes are still returned.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ottava.artifact import fsync
from ottava.supervisor import redact, stacks
from ottava.supervisor.causes import Cause, Facts, Seen, causes
from ottava.supervisor.observe import noting, observe

FOLDER = "diagnosis"
EVENTS = 200
LOG_BYTES = 64 << 10
JOURNAL_BYTES = 4 << 20
ENVIRONMENT_S = 5.0  # a broken driver may keep whoever asks it waiting

Value = TypeVar("Value")


@dataclass(frozen=True)
class Diagnosis:
    """causes: best first, at least one; folder: None where it could not be written; notes: what is missing and why."""

    causes: tuple[Cause, ...]
    folder: Path | None
    notes: tuple[str, ...]


@dataclass
class _Bundle:
    """The folder in the making. known: values that must not be in it; notes: what could not be had."""

    path: Path
    known: tuple[str, ...]
    notes: list[str]

    def text(self, name: str, make: Callable[[], str]) -> None:
        """Write a text without secrets, or note why it cannot be had. OSError where the disk refuses."""
        self._put(name, lambda: redact.text(make(), self.known))

    def json(self, name: str, make: Callable[[], Any]) -> None:
        """The same for data: its strings are redacted one by one, so that it stays JSON."""
        self._put(name, lambda: json.dumps(redact.data(make(), self.known), indent=1, allow_nan=False) + "\n")

    def lines(self, name: str, make: Callable[[], list[Any]]) -> None:
        """The same for one piece of data a line."""
        line = partial(json.dumps, separators=(",", ":"), allow_nan=False)
        self._put(name, lambda: "".join(f"{line(redact.data(item, self.known))}\n" for item in make()))

    def _put(self, name: str, make: Callable[[], str]) -> None:
        content = noting(self.notes, name, make, "")
        if not content:
            return
        file = self.path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content.encode(errors="replace"))
        fsync(file)


def diagnose(run_folder: Path, facts: Facts, action: str) -> Diagnosis:
    """Look, conclude, and write `run_folder`/diagnosis/epoch-N-KIND. Call it before the workers are killed.

    action: what the supervisor does now, in words. Never raises; takes as long as its limits above add up to.
    """
    notes: list[str] = []
    found: tuple[Cause, ...] = ()
    part: Path | None = None
    try:
        events = _events(facts.journal, notes)
        seen, missing = observe(facts, run_folder, events)
        notes += missing
        found = tuple(causes(facts, seen))
        part = _scratch(run_folder, facts)
        bundle = _Bundle(part, redact.secrets(), notes)
        _fill(bundle, facts, seen, found, events, action)
        return Diagnosis(found, _publish(part, run_folder / FOLDER / _name(facts)), tuple(notes))
    except Exception as error:  # the run matters more than its diagnosis
        notes.append(f"no bundle was written: {type(error).__name__}: {error}")
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)
        return Diagnosis(found or _unknown(facts), None, tuple(notes))


def _unknown(facts: Facts) -> tuple[Cause, ...]:
    with suppress(Exception):
        return tuple(causes(facts))
    return (Cause("unknown", "possible", (str(facts.message),), "see the workers' logs"),)


def _name(facts: Facts) -> str:
    kind = "".join(c if c.isalnum() or c in "-_" else "-" for c in str(facts.kind))[:40] or "unknown"
    return f"epoch-{facts.epoch}-{kind}"


def _scratch(run_folder: Path, facts: Facts) -> Path:
    """A new folder beside the others; what a killed supervisor left behind goes."""
    home = run_folder / FOLDER
    home.mkdir(parents=True, exist_ok=True)
    for left in home.glob(".*.part"):
        shutil.rmtree(left, ignore_errors=True)
    part = home / f".{_name(facts)}.part"
    part.mkdir()
    return part


def _publish(part: Path, wanted: Path) -> Path:
    """Give the folder its name: the wanted one, or that with a number where a diagnosis has it already."""
    for child in (*part.iterdir(), part):
        if child.is_dir():
            fsync(child)
    number, target = 1, wanted
    while target.exists():
        number += 1
        target = wanted.with_name(f"{wanted.name}-{number}")
    os.rename(part, target)
    with suppress(OSError):  # it is there, and whole
        fsync(target.parent)
    return target


def _fill(
    bundle: _Bundle, facts: Facts, seen: Seen, found: tuple[Cause, ...], events: list[dict[str, Any]], action: str
) -> None:
    standing: dict[str, str] = noting(bundle.notes, "stacks", lambda: stacks.collect(facts, seen, bundle.notes), {})
    for name, text in standing.items():
        bundle.text(f"stacks/{name}", lambda text=text: text)  # type: ignore[misc]
    for rank in facts.ranks:
        bundle.text(f"logs/rank-{rank.rank}.log", lambda rank=rank: _tail(rank.log))  # type: ignore[misc]
    bundle.lines("journal.jsonl", lambda: events[-EVENTS:])
    bundle.json("environment.json", lambda: _environment(bundle, seen))
    bundle.json(
        "diagnosis.json",
        lambda: {
            **{one.name: getattr(facts, one.name) for one in fields(facts)},
            "action": action, "causes": found, "seen": seen, "notes": bundle.notes,
        },
    )  # fmt: skip
    bundle.text("README.txt", lambda: readme(facts, found, action, bundle.notes))


def readme(facts: Facts, found: tuple[Cause, ...], action: str, notes: list[str]) -> str:
    """The diagnosis in plain words."""
    what = f"{facts.kind}: {facts.message}" if facts.message else facts.kind
    out = [
        f"The workers of pool {facts.pool!r} failed after step {facts.step} (epoch {facts.epoch}).",
        f"  what was seen:  {what}",
        f"  what was done:  {action}",
        "",
        "Likely causes, best first:",
    ]
    for number, cause in enumerate(found, 1):
        out += ["", f"{number}. {cause.cause} ({cause.likelihood})", *(f"   - {line}" for line in cause.evidence)]
        out.append(f"   What to do: {cause.todo}.")
    out += [
        "",
        "A consequence is true but follows from something else. `certain` means that the evidence is the cause;",
        "`likely` and `possible` are judgements of a table of rules: check the evidence.",
        "",
        "In this folder: diagnosis.json (all of this for programs), journal.jsonl (the last events), logs/ (the end of",
        "each worker's output), stacks/ (where each living worker stood), environment.json. What looked like a secret",
        "was replaced by " + redact.GONE + "; read the folder before you hand it to others all the same.",
    ]
    return "\n".join([*out, "", "Missing:" if notes else "Nothing is missing.", *(f"  - {note}" for note in notes), ""])


def _events(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The events at the end of a journal; a torn line is no event."""
    out: list[dict[str, Any]] = []
    try:
        lines = _tail(path, JOURNAL_BYTES).splitlines()
    except OSError as error:
        notes.append(f"the journal: {error.strerror}")
        return out
    for line in lines:
        with suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict) and "event" in event:
                out.append(event)
    return out


def _tail(path: Path | None, most: int = LOG_BYTES) -> str:
    """The last `most` bytes of a file, from the beginning of a line."""
    if path is None:
        return ""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - most))
        data = file.read(most)
    if size > most:
        data = data.partition(b"\n")[2]
    return data.decode(errors="replace")


def _environment(bundle: _Bundle, seen: Seen) -> dict[str, Any]:
    from ottava.platforms import doctor

    nothing: dict[str, Any] = {}
    return {
        "doctor": noting(bundle.notes, "the machine's facts", lambda: within(ENVIRONMENT_S, doctor.examine), nothing),
        "memory_bytes": seen.memory and dict(zip(("free", "total"), seen.memory, strict=True)),
        "disk_bytes": {path: {"free": free, "total": total} for path, (free, total) in seen.disks.items()},
        "load": seen.load and dict(zip(("one_minute", "cores"), seen.load, strict=True)),
        "oom_kills_of_the_control_group": seen.oom_kills,
        "kernel": seen.kernel,
        "variables": noting(bundle.notes, "the environment", lambda: redact.environment(os.environ), nothing),
    }


def within(seconds: float, act: Callable[[], Value]) -> Value:
    """What `act` returns, if it does so in time. Raises TimeoutError; the thread that waits is then left behind."""
    out: list[Value] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            out.append(act())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not out:
        raise TimeoutError(f"no answer in {seconds:g} s")
    return out[0]
