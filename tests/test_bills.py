"""What published runs cost, to the dollar, and which rule holds on which day."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import pytest

from ottava import cli
from ottava.errors import RecipeError
from ottava.planner import bills, chips

RULES = bills.rules()


@pytest.mark.parametrize(
    ("name", "usd", "hours", "gpus"),
    [("deepseek-v3", 5_576_000, 2_788_000, 2048), ("deepseek-r1-rl", 294_000, 147_000, 512)],
)
def test_golden_bills(name: str, usd: int, hours: int, gpus: int, capsys: pytest.CaptureFixture[str]) -> None:
    """arXiv 2412.19437, table 1; Nature 2025, supplement."""
    cli.app(["cost", name, "--json"], standalone_mode=False)
    bill = json.loads(capsys.readouterr().out)
    assert (bill["usd_marginal"], bill["gpu_hours"], bill["gpus"]) == (usd, hours, gpus)
    low, high = bill["usd_amortised_range"]
    assert low < bill["usd_amortised"] < high
    assert bill["sources"]


def test_the_fleet_is_the_reported_one() -> None:
    fleet = bills.bill("deepseek-v3")["fleet"]
    assert fleet["by_chip"] == {"H800": 10_000, "H100": 10_000, "H20": 30_000}
    assert fleet["usd"]["mid"] == (10_000 * 31_000 + 10_000 * 30_000 + 30_000 * 13_000) * 1.5


def test_amortised_hours_pay_for_the_chip() -> None:
    """All hours that a chip computes in its life, at the amortised rate, are its price and its running: by hand."""
    bill = bills.bill("deepseek-r1-rl")
    life = 4 * 8766
    paid = 31_000 * 1.5 + 0.2 * life
    assert bill["usd_amortised"] == pytest.approx(paid / (life * 0.7) * 147_000, abs=1)


@pytest.mark.parametrize(
    ("chip", "day", "share"),
    [
        ("H20", date(2025, 8, 10), 0.0), ("H20", date(2025, 8, 11), 0.15), ("H20", date(2026, 5, 1), 0.15),
        ("H200", date(2025, 12, 7), 0.0), ("H200", date(2025, 12, 8), 0.25), ("910B3", date(2026, 1, 1), 0.0),
    ],
)  # fmt: skip
def test_the_licence_share_goes_by_the_day(chip: str, day: date, share: float) -> None:
    assert bills.licence_share(chip, day, RULES) == share


def test_the_rule_of_the_day_holds() -> None:
    def export(chip: str, day: date) -> bool | None:
        rule = bills.holding(RULES, "export", chip, day)
        return None if rule is None else rule.allowed

    assert export("H800", date(2023, 6, 1))
    assert export("H800", date(2023, 11, 1)) is False
    assert export("H20", date(2025, 5, 1)) is False
    assert export("H20", date(2025, 9, 1))
    assert export("910B3", date(2025, 9, 1)) is None
    state = bills.holding(RULES, "domestic", "H20", date(2026, 2, 1), "state-funded")
    assert state is not None
    assert state.allowed is False


def test_rules_name_chips_that_have_figures() -> None:
    known = chips.load(chips.locate("chips.json")).chips
    assert {chip for rule in RULES for chip in rule.chips} <= set(known)
    assert all(rule.source and rule.certainty for rule in RULES)


def test_contradictory_rules_are_refused_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    rule = '{id: %s, kind: export, chips: [H20], from: "2025-01-01", allowed: %s, what: w, source: s, certainty: c}'
    path.write_text("rules:\n  - " + rule % ("one", "true") + "\n  - " + rule % ("two", "false") + "\n")
    with pytest.raises(RecipeError, match="two and one both say") as caught:
        bills.rules(str(path))
    assert str(caught.value.where).startswith(f"{path}:3:")


def test_an_unknown_bill_is_named() -> None:
    with pytest.raises(RecipeError, match="did you mean 'deepseek-v3'"):
        bills.bill("deepseek-v4")
