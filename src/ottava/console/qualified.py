"""How an examination of a pool is shown: a bar while it runs, one table when it is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def qualify_bar(pool: str) -> Iterator[Callable[[float, str], None]]:
    """Progress with time left; where there is no terminal, a line for each part."""
    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn(f"qualify {pool}", markup=False),
        BarColumn(bar_width=28),
        TextColumn("{task.percentage:>3.0f}%"),
    )
    left = (
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[said]}", markup=False),
    )
    with Progress(*columns, *left, console=console, transient=True, disable=not console.is_terminal) as bar:
        task, before = bar.add_task("", total=1.0, said=""), [""]

        def told(share: float, said: str) -> None:
            bar.update(task, completed=share, said=said)
            part = said.partition(":")[0]
            if part != before[0] and part and not console.is_terminal:
                console.print(f"{share:4.0%} {part}", markup=False)
            before[0] = part

        yield told


def table(report: Mapping[str, Any]) -> str:
    """The report of `qualify.command.qualify`, for people."""
    stands = (
        f", a rehearsal: {report['workers']} CPU processes stand for {report['rehearsal']}"
        if report["rehearsal"]
        else ""
    )
    lines = [f"pool {report['pool']} of fleet {report['fleet']} ({report['platform']}{stands})"]
    lines += _chips(report) + _links(report) + _sums(report)
    soak, rates = report["soak"], report["soak"]["per_worker_hour"]
    lines.append(
        f"soak: {soak['failures']} failures in {soak['worker_seconds']:.0f} worker seconds ({soak['rounds']} rounds): "
        f"{rates['low']:.3g} to {rates['high']:.3g} a worker hour (80%)"
    )
    done, run = report["completes"], report["completes"]["run"]
    lines.append(
        f"a run of {run['work_s'] / 3600:.3g} h on {run['workers']} workers with {run['restarts']} restarts completes: "
        f"{done['estimate']:.1%} ({done['low']:.1%} to {done['high']:.1%})"
    )
    lines += [f"FAILED {_whose(f)}: {f['check']}: {f['reason']}" for f in report["findings"]]
    may = ", ".join(map(str, report["may_run"])) or "none"
    lines.append(f"may run: {may} ({len(report['may_run'])} of {report['workers']} workers)")
    return "\n".join(lines)


def _whose(finding: Mapping[str, Any]) -> str:
    return "pool" if finding["chip"] is None else f"worker {finding['chip']}"


def _chips(report: Mapping[str, Any]) -> list[str]:
    names = list(next((c["speed"] for c in report["by_chip"].values() if c["speed"]), {}))
    heads = [f"{name} {'GB/s' if name == 'memory' else 'GFLOP/s'}" for name in names]
    lines = [
        f"{'worker':<8}{'class':<14}{'error/bound f32':>16}{'bf16':>8}{'fp8':>8}" + "".join(f"{h:>18}" for h in heads)
    ]
    failed = {finding["chip"] for finding in report["findings"]}
    for chip, data in report["by_chip"].items():
        ratio = data["matmul_ratio"] or {}
        fp8 = "-" if data["fp8_ratio"] is None else f"{data['fp8_ratio']:.3f}"
        shown = [f"{chip:<8}{data['numerics_class'] or '-':<14}"]
        shown += [f"{ratio['float32']:>16.3f}{ratio['bfloat16']:>8.3f}{fp8:>8}" if ratio else f"{'-':>32}"]
        shown += [f"{_rate(data['speed'], name):>18}" for name in names]
        lines.append("".join(shown) + ("  FAILED" if int(chip) in failed else ""))
    return lines


def _rate(speed: Mapping[str, Any] | None, name: str) -> str:
    return "-" if not speed else f"{speed[name]['rate'] / 1e9:.1f} ({speed[name]['ratio']:.2f}x)"


def _links(report: Mapping[str, Any]) -> list[str]:
    links = report["links"]
    if not links:
        return []
    lines = [f"{'link':<10}{'latency us':>12}{'GB/s':>10}{'times slower':>14}"]
    for link in links:
        name = f"{link['from']}->{link['to']}"
        lines.append(f"{name:<10}{link['latency_s'] * 1e6:>12.0f}{link['bandwidth_gb_s']:>10.2f}{link['ratio']:>14.2f}")
    return lines


def _sums(report: Mapping[str, Any]) -> list[str]:
    figures = report["figures"]
    lines = [
        f"all_reduce of {row['bytes']} bytes: {row['seconds'] * 1e6:.0f} us, {row['gb_s']:.3g} GB/s"
        for row in figures["all_reduce"]
    ]
    if figures["tree"] is not None:
        lines.append(f"tree sum of {figures['tree']['bytes']} bytes: {figures['tree']['seconds'] * 1e6:.0f} us")
    return [f"sizes: {report['sizes']}", *lines] if lines else []
