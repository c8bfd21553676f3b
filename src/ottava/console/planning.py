"""What `ottava plan`, `dossier`, `forecast` and `pick` do around the planner: read, call, write pages, say it in
text."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ottava.artifact import make_folder, replacing, write_json
from ottava.console import dossier as dossiers
from ottava.console import plans
from ottava.console.charts import tag
from ottava.console.page import WIDTHS
from ottava.console.plans import money
from ottava.console.words import columns
from ottava.errors import RecipeError, from_os_error
from ottava.planner import chips as catalogues
from ottava.planner import dossier as making
from ottava.planner import forecast as forecasts
from ottava.planner import pick as picking
from ottava.planner import place, portfolio, quantity, sensitivity, students, ways
from ottava.planner.instance import Chosen
from ottava.planner.ways import Problem

Content = Mapping[str, Any]
EACH_POINT_S = 5.0


def _catalogue() -> catalogues.Catalogue:
    return catalogues.load(catalogues.locate("chips.json"))


def plan(
    jobs: Path, fleet: Path, *, seconds: float, workers: int = 0, out: Path | None = None, points: int = 5
) -> dict[str, Any]:
    """`ottava plan`: the plan; with `out`, plan.json and plan.html in that folder. Raises OttavaError."""
    problem = ways.build(portfolio.load(jobs, fleet, _catalogue()))
    result = place.plan(problem, seconds=seconds, workers=workers)
    if out is not None:
        make_folder(out)
        write_json(out / "plan.json", result)
        _write(out / "plan.html", _plan_page(problem, result, points, seconds, workers))
    return result


def schedule_of(problem: Problem, result: Content) -> list[Chosen | None]:
    """The schedule that a plan's assignments tell."""
    rows = {row["task"]: row for row in result["assignments"]}
    found: list[Chosen | None] = []
    for piece in problem.pieces:
        row = rows.get(piece.name)
        if row is None:
            found.append(None)
            continue
        pairs = [(way.pool.name, way.chips) for way in piece.ways]
        option = pairs.index((row["pool"], row["chips"]))
        found.append(Chosen(option, round(row["start_h"] / problem.asked.portfolio.grid)))
    return found


def _plan_page(problem: Problem, result: Content, points: int, seconds: float, workers: int) -> Content:
    start = problem.asked.portfolio.start
    page: dict[str, Any] = {"title": f"{result['portfolio']} on {result['fleet']}", "verdict": _plan_verdict(result)}
    if not result["assignments"]:
        rows = [[one["constraint"], one["kind"], _amount(one), one["reason"]] for one in result["relaxations"]]
        part = {"title": "What would have to give way", "lede": [], "chart": None, "rows": rows}
        return page | {"figures": [], "sections": [part | {"head": ["Constraint", "Kind", "Cost", "How"]}]}
    schedule = schedule_of(problem, result)
    spread = sensitivity.spread(problem, schedule)
    page["figures"] = [
        ("Cost", money(result["usd"]), f"P10 {money(spread['p10'])}, P90 {money(spread['p90'])}"),
        ("Ends", result["end"], f"from {result['start']}"),
        ("Proven gap", f"{result['gap']:.2%}", f"in {result['seconds']:.1f} s"),
        ("Left out", str(len(result["left_out"])), f"of {len(problem.pieces)} tasks"),
    ]
    rows = result["assignments"]
    page["sections"] = [
        _section(
            "By pool", lambda width: plans.by_pool(rows, start, width), "A bar is a job on a pool; the table says why."
        ),
        _table(
            "Decisions",
            ["Task", "Pool", "Chips", "From", "Until", "Cost", "MWh", "Why"],
            [_decision(row) for row in rows],
            "MWh: of the chips alone, at the power they are rated for; hosts, network and cooling are not in it.",
        ),
    ]
    if result["left_out"]:
        left = [[row["task"], money(row["usd"]), row["reason"]] for row in result["left_out"]]
        page["sections"].append(_table("Left out", ["Task", "Price of it", "Why"], left))
    page["sections"] += _curves(problem, schedule, start, points, min(seconds, EACH_POINT_S), workers)
    return page


def _curves(
    problem: Problem, schedule: list[Chosen | None], start: datetime.date, points: int, seconds: float, workers: int
) -> list[Content]:
    grid, found = problem.asked.portfolio.grid, []
    curve = sensitivity.pareto(problem, schedule, points=points, seconds=seconds, workers=workers) if points else []
    if len(curve) > 1:
        lede = (
            "The cheapest plan found for each end, with the gap that was proven; whiskers from P10 to P90 of the cost."
        )
        found.append(_section("Cost against time", lambda width: plans.frontier(curve, start, grid, width), lede))
    causes = sensitivity.tornado(problem, schedule)
    rows: list[dict[str, Any]] = [
        {
            "name": cause.name, "low": cause.low, "high": cause.high, "usd_low": cause.usd_low, "usd_high":
            cause.usd_high,
            "days": " or ".join(_day(start, grid * end) for end in sorted({cause.end_low, cause.end_high})),
        }
        for cause in causes[:12]
    ]  # fmt: skip
    if rows:
        middle = sum(way.usd.value for _, way, _ in sensitivity.chosen(problem, schedule))
        lede = "One input at its two ends, the others in the middle, the plan kept as it is."
        found.append(_section("What the cost depends on", lambda width: plans.tornado(rows, middle, width), lede))
        ends = [
            [row["name"], row["low"], row["high"], money(row["usd_low"]), money(row["usd_high"]), row["days"]]
            for row in rows
        ]
        head = ["Input", "Low", "High", "Cost at low", "Cost at high", "The last job ends"]
        found.append(_table("The same in numbers", head, ends))
    return found


def _day(start: datetime.date, hours: float) -> str:
    return (start + datetime.timedelta(hours=hours)).isoformat()


def _decision(row: Content) -> list[str]:
    cost = f"{money(row['usd'])} ({money(row['usd_low'])} to {money(row['usd_high'])})"
    return [
        row["task"],
        row["pool"],
        f"{row['chips']:,}",
        row["start"],
        row["end"],
        cost,
        _megawatt_hours(row["kwh"]),
        row["reason"],
    ]


def _section(title: str, draw: Callable[[int], Markup], *lede: str) -> Content:
    chart = Markup("").join(tag("div", draw(width), class_=f"chart {name}") for name, width in WIDTHS.items())
    return {"title": title, "lede": lede, "chart": chart, "head": [], "rows": []}


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], *lede: str) -> Content:
    return {"title": title, "lede": lede, "chart": None, "head": head, "rows": rows}


def _plan_verdict(result: Content) -> list[str]:
    if result["status"] == "infeasible":
        return ["There is no plan: the constraints cannot all be met.", "What would have to give way is below."]
    if not result["assignments"]:
        return ["No plan was found in the time given, and none was excluded."]
    gap = "proven to be the best" if result["status"] == "optimal" else f"at most {result['gap']:.1%} from the best"
    left = len(result["left_out"])
    told = [f"{f'All but {left}' if left else 'All'} tasks are placed for {money(result['usd'])}, {gap}."]
    told.append("Times and prices are as certain as their sources, which each decision names.")
    return told


def plan_text(result: Content, *, why: bool = False) -> str:
    """For the terminal: a line a task, and with `why` the reasons below them."""
    lines, rows = [" ".join(_plan_verdict(result)[:1])], result["assignments"]
    if rows:
        head = ["from", "until", "task", "chips", "chip", "pool", "cost", "MWh"]
        cells = [
            [
                row["start"], row["end"], row["task"], f"{row['chips']:,}", row["chip"], row["pool"],
                money(row["usd"]), _megawatt_hours(row["kwh"]),
            ]
            for row in rows
        ]  # fmt: skip
        total = ["", result["end"], "in all", "", "", "", money(result["usd"]), _megawatt_hours(result["kwh"])]
        lines += ["", *columns([head, *cells, total], right=(3, 6, 7)), ""]
    if why:
        lines += [*(f"{row['task']}: {row['reason']}" for row in rows), ""]
    for row in result.get("left_out", ()):
        lines.append(f"left out: {row['task']}; {row['reason']}")
    if result["relaxations"]:
        lines.append("the fewest constraints that would have to give way:")
    lines += [f"  {one['reason']}{_cost(one)}" for one in result["relaxations"]]
    for other in result.get("alternatives", ()):
        enough = {True: "is enough", False: "is not enough", None: "was not decided in time"}[other["enough"]]
        lines.append(f"giving up {other['kind']} alone {enough}" + (": " if other["relaxations"] else ""))
        lines += [f"  {one['reason']}{_cost(one)}" for one in other["relaxations"]]
    if result["assignments"]:
        lines.append(f"status {result['status']}, proven gap {result['gap']:.2%}, {result['seconds']:.1f} s")
        lines += [] if why else ["the reason for each line: --why, --json, or plan.html of --out"]
    return "\n".join(lines)


def _megawatt_hours(kwh: float | None) -> str:
    """Three digits, at the rated power of the chips."""
    return "not known" if kwh is None else f"{kwh / 1000:,.0f}" if kwh >= 1e5 else f"{kwh / 1000:.3g}"


def _amount(one: Content) -> str:
    return "no price" if one["usd"] is None else money(one["usd"])


def _cost(one: Content) -> str:
    return "" if one["usd"] is None else f" ({money(one['usd'])})"


def dossier(
    path: Path, *, out: Path | None = None, evidence: Sequence[Path] = (), seconds: float = 10.0
) -> tuple[dict[str, Any], str]:
    """`ottava dossier`: (its content, its Markdown); with `out`, dossier.md and dossier.html in that folder."""
    content = making.make(making.read_plan(path), _catalogue(), seconds=seconds, evidence=evidence)
    title, told, parts = dossiers.title(content), dossiers.verdict(content), dossiers.sections(content)
    text = dossiers.markdown(title, told, parts)
    if out is not None:
        make_folder(out)
        page = {"title": title, "verdict": told, "figures": [], "sections": [{**part, "chart": None} for part in parts]}
        _text(out / "dossier.md", text)
        _write(out / "dossier.html", page)
    return content, text


def forecast(path: Path, *, by: str | None, draws: int, seed: int, out: Path | None = None) -> dict[str, Any]:
    """`ottava forecast`: the forecast; with `out`, forecast.html in that folder."""
    run = forecasts.load(path, _catalogue())
    try:
        wanted = None if by is None else datetime.date.fromisoformat(by)
    except ValueError:
        raise RecipeError(f"{by!r} is no date", where="--by", fix="write it as 2025-08-31") from None
    if wanted is not None:
        forecasts.check_date(run, wanted, "--by")
    result = forecasts.forecast(run, draws, seed, wanted)
    if out is not None:
        make_folder(out)
        days = forecasts.histogram(run, draws, seed)
        until = wanted or run.by
        rows = [
            [
                row["name"], f"{row['planned_h'] / 24:,.1f}",
                " / ".join(f"{h / 24:,.1f}" for h in row["hours"].values()),
                money(row["usd"]["p50"]), f"{row['failures']:,.1f}", f"{row['drives']:.0%}", f"{row['slip_days']:,.1f}",
            ]
            for row in result["stages"]
        ]  # fmt: skip
        head = [
            "Stage",
            "Planned days",
            "P10 / P50 / P90 days",
            "Cost",
            "Failures",
            "Drives late releases",
            "Days it costs them",
        ]
        chart = _section("Release by day", lambda width: plans.releases(days, run.start, until, width), run.description)
        told = forecast_text(result).splitlines()
        page = {
            "title": f"Forecast of {run.name}",
            "verdict": told[:3],
            "figures": [],
            "sections": [chart, _table("Stages", head, rows)],
        }
        _write(out / "forecast.html", page)
    return result


def forecast_text(result: Content) -> str:
    """For the terminal."""
    release, usd = result["release"], result["usd"]
    alone = "" if result["fallback"] is None else ", without the fallback,"
    lines = [
        f"{result['probability']:.1%} to be released by {result['by']} ({result['draws']:,} simulated runs: "
        f"{result['low']:.1%} to {result['high']:.1%})",
        f"release: P10 {release['p10']}, P50 {release['p50']}, P90 {release['p90'] or 'never'}; "
        f"as planned{alone} {result['planned']}",
        f"cost: P10 {money(usd['p10'])}, P50 {money(usd['p50'])}, P90 {money(usd['p90'])}",
    ]
    for row in result["stages"]:
        days = ", ".join(f"{name.upper()} {hours / 24:,.1f}" for name, hours in row["hours"].items())
        saved = (
            f"; failure every {row['mtbf_h']:g} h, checkpoint every {row['interval_h']:.2g} h"
            if "mtbf_h" in row
            else ""
        )
        lines.append(f"  {row['name']}: planned {row['planned_h'] / 24:,.1f} days; {days}{saved}")
    if result["driver"] is not None:
        row = next(row for row in result["stages"] if row["name"] == result["driver"])
        lines.append(f"late releases are late for {result['driver']}: it drives {row['drives']:.0%} of them")
    if result["fallback"] is not None:
        other = result["fallback"]
        lines.append(
            f"the fallback is taken in {other['moves']:.0%} of the runs; without it "
            f"{other['without']['probability']:.1%}, and {money(other['usd_p50'])} against that in the middle"
        )
    return "\n".join(lines)


def pick(
    memory: str | None, speed: str | None, chip: str | None, bandwidth: str | None, chips: int, context: int
) -> dict[str, Any]:
    """`ottava pick`. Raises RecipeError for a number without its unit."""
    work = students.load(catalogues.locate("students.json"))
    return picking.pick(
        work, _catalogue(), speed=_number("--speed", speed, quantity.SPEED), chip=chip,
        memory_gb=_number("--memory", memory, quantity.MEMORY), chips=chips, context=context,
        bandwidth_gbs=_number("--bandwidth", bandwidth, {"GB/s": 1.0, "TB/s": 1e3}),
    )  # fmt: skip


def _number(option: str, text: str | None, units: Mapping[str, float]) -> float | None:
    if text is None:
        return None
    try:
        return quantity.read(text, units)
    except ValueError as error:
        raise RecipeError(f"{error}, found {text!r}", where=option, fix="give a number with its unit") from None


def pick_text(result: Content) -> str:
    """For the terminal: the choice, and the best row of every student."""
    choice = result["choice"]
    if choice is None:
        return f"none: {result['why_not']}"
    lines = [_picked(choice)]
    seen = {choice["student"]}
    for row in result["rows"]:
        if row["student"] not in seen:
            seen.add(row["student"])
            lines.append("  " + _picked(row))
    return "\n".join(lines)


def _picked(row: Content) -> str:
    rent = "" if row["usd_per_hour"] is None else f", ${row['usd_per_hour']:g}/h"
    place_ = f"{row['chips']} x {row['chip']}, {row['layout']}"
    return (
        f"{row['student']} on {place_}: {row['verdict']}, {row['memory_gb']} of {row['of_gb']} GB{rent}; {row['why']}"
    )


def _write(path: Path, page: Content) -> None:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    _text(path, environment.get_template("planning.html").render(page=page))


def _text(path: Path, content: str) -> None:
    try:
        with replacing(path) as part:
            part.write_text(content, encoding="utf-8")
    except OSError as error:
        raise from_os_error(error, f"writing {path.name}") from error
