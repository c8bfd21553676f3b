"""Progress on stderr: a bar with time left where there is a terminal, one line a stage elsewhere."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from ottava.console.students import KEEPS, keeping
from ottava.console.words import bracket, columns, points

BYTES = "bytes"


class _Amount(ProgressColumn):
    """How much is done of how much, in the task's unit; of bytes, with their speed."""

    def render(self, task: Task) -> Text:
        unit, total = task.fields["unit"], task.total
        if unit != BYTES:
            return Text(f"{task.completed:.0f}/{'?' if total is None else f'{total:.0f}'} {unit}")
        speed = task.finished_speed or task.speed
        text = f"{decimal(int(task.completed))}/{'?' if total is None else decimal(int(total))}"
        return Text(text + (f" {decimal(int(speed))}/s" if speed else ""))


@contextmanager
def work_bar(*parts: tuple[str, str]) -> Iterator[list[Callable[[int, int], None]]]:
    """Progress with time left through the parts of a work, each (doing, unit); unit: BYTES, or what is counted.

    Gives a function of (done, total) for each part, which any thread may call. The part that was told of last is shown.
    """
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=28), _Amount(), TextColumn("left"))
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        tasks = [bar.add_task(doing, total=None, unit=unit, visible=not n) for n, (doing, unit) in enumerate(parts)]

        def told(number: int, done: int, total: int) -> None:
            for other, task in enumerate(tasks):
                if bar.tasks[other].visible != (other == number):
                    bar.reset(task, visible=other == number, total=None)  # its time begins now
            bar.update(tasks[number], completed=done, total=total)

        yield [partial(told, number) for number in range(len(parts))]


@contextmanager
def drill_bar() -> Iterator[Callable[[int, int, Any], None]]:
    """Progress in runs, with time left; where there is no terminal, one line a run."""
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("drill"), BarColumn(bar_width=28), TextColumn("{task.completed}/{task.total} runs"))
    left = (TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[said]}"))
    with Progress(*columns, *left, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None, said="")

        def show(done: int, total: int, outcome: Any) -> None:
            said = "" if outcome is None else _drill_line(outcome)
            bar.update(task, completed=done, total=total, said=said)
            if outcome is not None and (outcome.wrong or not console.is_terminal):
                console.print(f"{done}/{total} {said}", markup=False)

        yield show


def _drill_line(outcome: Any) -> str:
    seen = ", ".join(outcome.seen) or "nothing"
    wrong = f": WRONG: {'; '.join(outcome.wrong)}" if outcome.wrong else ""
    return f"{outcome.name} {outcome.seed} {outcome.ended}, saw {seen}{wrong}"


DRILL_COLUMNS = {
    "runs": "runs", "finished": "finished", "diagnosed": "stopped rightly", "bit_identical": "same bits",
    "lost_steps_max": "lost", "corrupt_loads": "corrupt loads", "detect_p50_s": "seen, s", "mttr_p50_s": "next step, s",
    "goodput_p50": "goodput",
}  # fmt: skip


def drill_table(result: Mapping[str, Any]) -> str:
    """A campaign as a table: one line a class of fault, and the whole."""
    lines = [f"{'fault':<12}" + "".join(f"{head:>16}" for head in DRILL_COLUMNS.values())]
    for name, figures in (*result["by_fault"].items(), ("all", result)):
        values = ("-" if figures[column] is None else figures[column] for column in DRILL_COLUMNS)
        lines.append(f"{name:<12}" + "".join(f"{value!s:>16}" for value in values))
    broken = result["broken"]
    lines.append(f"{broken} runs broke a guarantee" if broken else "no guarantee was broken")
    return "\n".join(lines)


class Terminal:
    """Draws a run's progress. Use as a context manager, so that the bar is taken away at the end."""

    def __init__(self, stages: list[str], quiet: bool = False):
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self._stages = stages
        self._bars = Progress(
            TextColumn("{task.fields[stage]:>9}", style="bold"),
            BarColumn(bar_width=28),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[message]}", style="dim"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task: TaskID | None = None
        self._begun = time.monotonic()

    def __enter__(self) -> Terminal:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def start(self, stage: str, pool: str, budget_s: float) -> None:
        self._clear()
        self._task = self._bars.add_task("", total=1.0, stage=stage, message=f"on {pool}, planned {budget_s:.0f} s")
        if not self.console.is_terminal:
            self.console.print(f"{self._number(stage)} {stage:<8} on {pool} ...")

    def progress(self, stage: str, fraction: float, message: str) -> None:
        if self._task is not None:
            self._bars.update(self._task, completed=fraction, message=message)

    def done(self, stage: str, seconds: float, cached: bool, summary: Mapping[str, Any]) -> None:
        self._clear()
        took = "  done before" if cached else f"{seconds:9.1f} s  "
        self.console.print(f"{self._number(stage)} [bold]{stage:<8}[/] [green]ok[/] {took}", end=" ")
        self.console.print(headline(stage, summary), style="dim", markup=False)
        for remark in summary.get("remarks", ()):
            self.console.print(f"{self._number(stage)} {stage:<8} {remark}", style="yellow", markup=False)

    def failed(self, stage: str, message: str) -> None:
        self._clear()
        self.console.print(f"{self._number(stage)} [bold]{stage:<8}[/] [red]failed[/]")

    def note(self, stage: str, message: str) -> None:
        self.console.print(f"{self._number(stage)} {stage:<8} {message}", markup=False)

    def _number(self, stage: str) -> str:
        return f"{self._stages.index(stage) + 1}/{len(self._stages)}"

    def _clear(self) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None


def headline(stage: str, summary: Mapping[str, Any]) -> str:
    """What a stage's summary comes to, in a line; empty for a stage without one."""
    writer = HEADLINES.get(stage.partition("-")[0])
    return writer(summary) if writer else ""


def percent(entry: Mapping[str, Any]) -> str:
    """An accuracy with its interval and size."""
    return f"{entry['value']:.1%} [{entry['low']:.1%}, {entry['high']:.1%}], n {entry['n']}"


def _train(summary: Mapping[str, Any]) -> str:
    mode, entry = next(iter(summary["accuracy"].items()))  # thinking, where the model can
    thinking = f"{mode} {percent(entry)}"
    if (gain := summary.get("gain")) is not None:
        thinking = f"{gain['mode']} {gain['before']:.1%} -> {gain['after']:.1%} {bracket(gain)}, n {gain['n']}"
    fallback = summary["fallback"]
    if summary["fault_happened"] is False:
        return f"{thinking}; the planned fault did not happen"
    if fallback is None:
        return thinking
    moved = f"{fallback['from']} -> {fallback['to']} at step {fallback['at_step']}"
    return f"{thinking}; {moved}, {fallback['lost_steps']} steps lost"


def _reinforce(summary: Mapping[str, Any]) -> str:
    gain = summary["reinforce"]
    by = f"{points(gain['after'] - gain['before'])} points {bracket(gain)}, n {gain['n']}"
    return f"{gain['mode']} {gain['before']:.1%} -> {gain['after']:.1%} ({by})"


def _distill(summary: Mapping[str, Any]) -> str:
    students, traces = summary["students"], summary["traces"]
    kept = f"{keeping(students, summary['teacher'])} of {len(students)} students keep {KEEPS:.0%} of the teacher"
    if not traces["checked"]:
        return kept
    right, respelt = (traces[name] / traces["checked"] for name in ("steps_right", "steps_respelt"))
    return f"{kept}; steps right in {right:.0%} of its traces, respelt in {respelt:.0%}"


def _serve(summary: Mapping[str, Any]) -> str:
    example = summary["example"]
    thinking = example.get("thinking") or {}
    answer = thinking.get("content") or example["direct"]["content"]
    return f"asked {example['question']!r}, answered {answer!r}"


HEADLINES = {
    "plan": lambda s: f"at most {s['makespan_s']:.0f} s" + "".join(f"; without {pool}" for pool in s["unavailable"]),
    "qualify": lambda s: f"passed: {', '.join(s['passed'])}",
    "label": lambda s: f"{s['cold_start']} traces, error of labels < {s['error_upper_95']:.1%} (95%)",
    "train": _train,
    "reinforce": _reinforce,
    "distill": _distill,
    "convert": lambda s: f"{s['label']}, digest {s['digest'][:12]}",
    "verify": lambda s: f"{len(s['layouts'])} layouts, {'equal' if s['digest_equal'] else 'NOT equal'}",
    "serve": _serve,
}


def listed(result: Mapping[str, Any]) -> str:
    """A result, one line a key."""
    return "\n".join(f"{key:>16}  {_said(value)}" for key, value in result.items())


def ties_table(found: Mapping[str, Any]) -> str:
    """What ties a code base to CUDA, worst first, each with its first places."""
    lines = [f"{found['files']} files, read and not run (level {found['level']})"]
    for finding in found["findings"]:
        lines.append(f"{finding['verdict']:>8}  {finding['kind']} ({finding['count']}): {finding['on_ascend']}")
        lines += [f"{'':>10}{place['file']}:{place['line']}  {place['text']}" for place in finding["places"]]
    return "\n".join(lines if found["findings"] else [*lines, "nothing was found that is tied to CUDA"])


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def comparison(result: Mapping[str, Any]) -> str:
    """What `verify.weights.compare` found, one line a key; of a cause, what it means and whether it is proven."""
    first = result["first_bad"]
    lines = {key: value for key, value in result.items() if key != "first_bad"}
    if first is None:
        return listed(lines)
    from ottava.verify.causes import CAUSES

    lines |= {key: first[key] for key in ("tensor", "block")}
    lines["cause"] = f"{first['cause']} ({CAUSES.get(first['cause'], 'as the reader found it')})"
    lines["certain"] = "yes" if first["certain"] else "no: nothing proves this cause"
    lines["faulty"] = first["faulty"] or "neither looks the worse"
    files = [f"{letter}: {file or 'not there'}" for letter, file in first["files"].items()]
    lines["where"] = first["where"] or "; ".join(files)
    return listed(lines)


def students_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What `planner.students.plan` found, one line a student and chip."""

    def span(estimate: Mapping[str, Any], unit: str) -> str:
        low, high = f"{estimate['low']:,.0f}", estimate["high"]
        return f">= {low} {unit}" if high is None else f"{low} to {high:,.0f} {unit}"

    lines = [["student", "parameters", "state", "served in FP8", "chip", "chips", "time", "cost"]]
    for row in rows:
        usd = span(row["usd"], "USD")
        lines.append([
            row["name"], f"{row['parameters'] / 1e9:.2f} B", f"{row['memory_gb']:,.0f} GB",
            f"{row['served_gb']:.1f} GB", row["chip"], str(row["chips"]), span(row["hours"], "h"), usd,
        ])  # fmt: skip
    return "\n".join(
        [*columns(lines), "", "Extrapolated from published runs; >= where a model is smaller than any of them."]
    )


def targets_table(found: Mapping[str, Any]) -> str:
    """What `checkpoint.targets.examine` found, one line a chip: exact, lossy with the blocks affected, or no."""
    forms = list(dict.fromkeys(form for chip in found.values() for form in chip["layouts"]))
    lines = [["chip", "take", *forms, "evidence"]]
    for name, chip in found.items():
        cells = [_target(chip["layouts"].get(form)) for form in forms]
        lines.append([name, chip["recommended"] or "none", *cells, chip["evidence"]])
    notes = [
        "exact: every value, on the chip. What an engine makes of the shapes: ottava convert --for ENGINE tells.",
        *_refused([chip["layouts"] for chip in found.values()]),
        "? recalled, not read in a source. --json gives reason, source and date of every entry.",
    ]
    return "\n".join([*columns(lines), "", *notes])


def _refused(answers: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """The line about engines that are known to refuse or misread this model, where there are any."""
    forms: dict[str, dict[str, None]] = {}
    for form, entry in (item for said in answers for item in said.items()):
        if entry["refused_by"]:
            forms.setdefault(", ".join(entry["refused_by"]), {})[form] = None
    if forms:
        told = "; ".join(f"{' and '.join(names)} by {engines}" for engines, names in forms.items())
        yield f"Known to be refused or misread, of this model: {told}."


def _target(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return ""
    sure = "" if "recalled" not in str(entry["certainty"]) else "?"
    if entry["serves"] == "lossily":
        return f"lossy{sure} {entry['blocks_affected']}/{entry['blocks']}"
    return {"exactly": "exact", "no": "no"}[entry["serves"]] + sure
