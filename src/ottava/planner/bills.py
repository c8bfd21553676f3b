"""What published runs cost: their hours at a rent (marginal), beside their share of a bought fleet (amortised).

The two answer different questions, and are printed side by side: what one more run costs on chips that are there, and
what it costs to have them. Also the rules on chips by date, with the share of a price that a licence takes.
"""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any, Literal

from pydantic import Field

from ottava import document
from ottava.errors import RecipeError
from ottava.planner.chips import Figure, Provenance, Range, locate
from ottava.planner.workload import Share
from ottava.recipe import Frozen

HOURS_A_YEAR = 8766


class Bill(Frozen):
    """One run: chip hours, on how many chips, at which rent."""

    chip: str
    gpus: Figure
    gpu_hours: Figure
    usd_per_gpu_hour: Figure
    note: str


class Bought(Frozen):
    """Chips of one model that were bought: how many, dollars each."""

    count: Figure
    usd_each: Range


class Owned(Provenance):
    """A fleet that was bought. systems_per_chip: dollars of chips, hosts, network and buildings for each dollar of
    chips; running_usd_per_chip_hour: power and people; years: of depreciation; used: share of the hours that compute.
    """

    chips: dict[str, Bought]
    systems_per_chip: Range
    running_usd_per_chip_hour: Range
    years: Range
    used: Range


class Ledger(Frozen):
    """A file of bills."""

    bills: dict[str, Bill]
    fleet: Owned


class Rule(Frozen):
    """What holds of some chips from a date on, until a later rule of the same kind names them."""

    id: str
    kind: Literal["export", "share", "domestic"]
    chips: Annotated[tuple[str, ...], Field(min_length=1)]
    begins: date = Field(alias="from")
    what: str
    source: str
    certainty: str
    allowed: bool | None = None
    share: Share | None = None
    where: Literal["state-funded", "private"] | None = None


class Rules(Frozen):
    """A file of rules, and what it says of itself."""

    about: str = ""
    rules: tuple[Rule, ...]


def rules(name: str = "rules.json") -> tuple[Rule, ...]:
    """The rules of a file (fleets/rules.json), oldest first. RecipeError where one is wrong or two contradict."""
    file = document.read(locate(name))
    found = file.parse(Rules).rules
    seen: dict[tuple[str, str, str | None, date], str] = {}
    for number, rule in enumerate(found):
        for chip in rule.chips:
            key = (rule.kind, chip, rule.where, rule.begins)
            if key in seen:
                what = f"{rule.id} and {seen[key]} both say from {rule.begins} what holds of {chip} ({rule.kind})"
                raise RecipeError(what, where=file.where(("rules", number)), fix="keep one of them")
            seen[key] = rule.id
    return tuple(sorted(found, key=lambda rule: rule.begins))


def holding(known: tuple[Rule, ...], kind: str, chip: str, on: date, where: str | None = None) -> Rule | None:
    """The rule of a kind that holds of a chip on a day; None where none does yet. where: state-funded or private."""
    fitting = [
        rule
        for rule in known
        if rule.kind == kind and chip in rule.chips and rule.begins <= on and (rule.where in (None, where))
    ]
    return max(fitting, key=lambda rule: rule.begins) if fitting else None


def licence_share(chip: str, on: date, known: tuple[Rule, ...] | None = None) -> float:
    """Share of a chip's price that its export licence takes on a day: 0 where no rule says so."""
    rule = holding(rules() if known is None else known, "share", chip, on)
    return 0.0 if rule is None or rule.share is None else rule.share


def bill(name: str, file: str = "bills.json") -> dict[str, Any]:
    """A bill by name: {name, chip, gpus, gpu_hours, usd_per_gpu_hour, usd_marginal, usd_amortised,
    usd_amortised_range, note, fleet, licence, sources}. Dollars. Raises RecipeError for a name that is not in the file.
    """
    ledger = document.read(locate(file)).parse(Ledger)
    if name not in ledger.bills:
        raise RecipeError(f"no bill {name!r}", where=locate(file), fix=document.suggest(name, ledger.bills))
    one = ledger.bills[name]
    if one.chip not in ledger.fleet.chips:
        raise RecipeError(f"the fleet has no {one.chip}", where=locate(file), fix="add it to the fleet's chips")
    hours, known = one.gpu_hours.value, rules()
    each = {end: _owned_hour(ledger.fleet, one.chip, end) for end in ("low", "mid", "high")}
    chips = ledger.fleet.chips
    shares = [rule for rule in known if rule.kind == "share"]
    return {
        "name": name,
        "chip": one.chip,
        "gpus": round(one.gpus.value),
        "gpu_hours": _round(hours),
        "usd_per_gpu_hour": one.usd_per_gpu_hour.value,
        "usd_marginal": _round(hours * one.usd_per_gpu_hour.value),
        "usd_amortised": _round(hours * each["mid"]),
        "usd_amortised_range": [_round(hours * each["low"]), _round(hours * each["high"])],
        "note": one.note,
        "fleet": {
            "chips": round(sum(bought.count.value for bought in chips.values())),
            "by_chip": {chip: round(bought.count.value) for chip, bought in chips.items()},
            "usd": {end: _round(_price(ledger.fleet, end)) for end in ("low", "mid", "high")},
            "certainty": ledger.fleet.certainty,
        },
        "licence": [
            {"chip": chip, "from": str(rule.begins), "share": rule.share, "what": rule.what, "source": rule.source}
            for rule in shares
            for chip in rule.chips
        ],
        "sources": _sources(one, ledger.fleet),
    }


def _price(fleet: Owned, end: str) -> float:
    """Dollars of the whole fleet with its systems."""
    chips = sum(bought.count.value * getattr(bought.usd_each, end) for bought in fleet.chips.values())
    return float(chips * getattr(fleet.systems_per_chip, end))


def _owned_hour(fleet: Owned, chip: str, end: str) -> float:
    """Dollars of an hour in which an owned chip computes; the dear end pairs a dear chip with few, idle years."""
    other = {"low": "high", "mid": "mid", "high": "low"}[end]
    price = getattr(fleet.chips[chip].usd_each, end) * getattr(fleet.systems_per_chip, end)
    hours = getattr(fleet.years, other) * HOURS_A_YEAR * getattr(fleet.used, other)
    return float(price / hours + getattr(fleet.running_usd_per_chip_hour, end) / getattr(fleet.used, other))


def _round(value: float) -> int:
    return int(value + 0.5)


def _sources(one: Bill, fleet: Owned) -> list[str]:
    """Where each figure is from, with date and certainty."""
    named: list[tuple[str, Provenance]] = [
        ("gpus", one.gpus),
        ("gpu_hours", one.gpu_hours),
        ("usd_per_gpu_hour", one.usd_per_gpu_hour),
    ]
    named += [("fleet", fleet), ("systems", fleet.systems_per_chip), ("running", fleet.running_usd_per_chip_hour)]
    named += [("years", fleet.years), ("used", fleet.used)]
    named += [(f"price of one {chip}", bought.usd_each) for chip, bought in fleet.chips.items()]
    return [f"{name}: {figure.source} ({figure.date}; {figure.certainty})" for name, figure in named]
