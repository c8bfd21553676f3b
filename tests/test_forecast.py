"""Forecasts: against Daly's closed form, a second simulation event by event, and coverage where rates are estimated."""

from __future__ import annotations

import datetime
import math
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ottava.errors import RecipeError
from ottava.planner import chips
from ottava.planner import forecast as forecasts
from ottava.planner.forecast import (
    Chips,
    Failures,
    Stage,
    Time,
    daly_interval,
    expected_hours,
    forecast,
    load,
    simulate,
)
from ottava.planner.portfolio import Price

EXAMPLE = Path(__file__).parents[1] / "fleets" / "r2-run.yaml"
CATALOGUE = chips.load(EXAMPLE.with_name("chips.json"))
CITED = {"source": "made up", "date": "2026-11", "certainty": "a test's"}
PRICE = Price(value="2 USD/chip-hour", **CITED)


def walked(draw: random.Random, work: float, mtbf: float, interval: float, checkpoint: float, restart: float) -> float:
    """One run, event by event: second by second of what a worker would do, with no formula."""
    clock, saved = 0.0, 0.0
    failure = draw.expovariate(1 / mtbf)
    pending = 0.0
    while True:
        if clock + pending > failure:
            clock, pending = failure, restart
            failure = clock + draw.expovariate(1 / mtbf)
            continue
        clock, pending = clock + pending, 0.0
        piece = min(interval, work - saved)
        last = saved + piece >= work - 1e-9
        need = piece + (0.0 if last else checkpoint)
        if clock + need > failure:
            clock, pending = failure, restart
            failure = clock + draw.expovariate(1 / mtbf)
            continue
        clock, saved = clock + need, saved + piece
        if last:
            return clock


@pytest.mark.parametrize(
    ("work", "mtbf", "interval", "checkpoint", "restart"),
    [(100, 20, 2, 0.1, 0.3), (60, 5, 0.5, 0.05, 0.5), (40, 200, 8, 0.5, 1), (30, 2, 1, 0.1, 1)],
)
def test_the_mean_is_dalys(work: float, mtbf: float, interval: float, checkpoint: float, restart: float) -> None:
    """Daly counts a checkpoint after the last interval, the simulation none: it lies between with and without."""
    n = 40_000
    rng = np.random.default_rng(5)
    hours = simulate(rng, np.full(n, float(work)), np.full(n, 1 / mtbf), interval, checkpoint, restart).hours
    error = 4 * float(hours.std()) / math.sqrt(n)
    whole = expected_hours(work, interval, checkpoint, restart, mtbf)
    last = expected_hours(interval, interval, checkpoint, restart, mtbf) - expected_hours(
        interval, interval, 0, restart, mtbf
    )
    assert abs(float(hours.mean()) - (whole - last)) < error


def test_the_distribution_is_that_of_single_events() -> None:
    case = (37.3, 6.0, 1.7, 0.2, 0.6)
    draw = random.Random(3)
    one = np.sort([walked(draw, *case) for _ in range(4000)])
    work, mtbf, interval, checkpoint, restart = case
    rng = np.random.default_rng(4)
    other = np.sort(simulate(rng, np.full(4000, work), np.full(4000, 1 / mtbf), interval, checkpoint, restart).hours)
    both = np.concatenate([one, other])
    apart = np.abs(np.searchsorted(one, both, "right") - np.searchsorted(other, both, "right")) / 4000
    assert apart.max() < 1.95 * math.sqrt(2 / 4000)  # Kolmogorov-Smirnov, one in a thousand


@settings(max_examples=40, deadline=None)
@given(st.floats(1, 200), st.floats(0.02, 2), st.floats(0.1, 5), st.floats(0, 0.5), st.floats(0, 2), st.floats(1, 300))
def test_a_run_that_is_stopped_goes_on_where_it_was(
    work: float, rate: float, interval: float, checkpoint: float, restart: float, stop: float
) -> None:
    n = 50
    walk = simulate(np.random.default_rng(0), np.full(n, work), np.full(n, rate), interval, checkpoint, restart, stop)
    assert (walk.hours <= stop + 1e-9).all()
    assert ((walk.done >= 0) & (walk.done <= 1)).all()
    assert (walk.hours[walk.done >= 1] >= work - 1e-9).all()
    assert walk.hours[walk.done < 1] == pytest.approx(stop)
    saved = walk.done[walk.done < 1] * work / interval
    assert np.abs(saved - np.round(saved)).max(initial=0.0) < 1e-6


@settings(max_examples=60, deadline=None)
@given(st.floats(0.001, 1), st.floats(1, 1000))
def test_dalys_interval_is_about_the_best(checkpoint: float, ratio: float) -> None:
    mtbf = checkpoint * (4 + ratio)
    best = min(expected_hours(1, mtbf * math.exp(-x / 20), checkpoint, 0, mtbf) for x in range(-20, 140))
    assert expected_hours(1, daly_interval(checkpoint, mtbf), checkpoint, 0, mtbf) <= best * 1.01


def test_eighty_percent_intervals_hold_eighty_percent() -> None:
    """Each run's true failure rate is drawn; the forecast only sees how many failures a soak had."""
    truth, inside, runs = random.Random(11), 0, 300
    for number in range(runs):
        rate = truth.gammavariate(0.5 + 6, 1 / 3000)  # failures a chip-hour; as sure of it as six in 3,000 hours
        soak = 2000.0
        seen = 0
        clock = truth.expovariate(rate)
        while clock < soak:
            seen, clock = seen + 1, clock + truth.expovariate(rate)
        stage = Stage(name="run", run=_chips(seen + 6, 3000 + soak))
        drawn = forecasts.draw_stage(stage, np.random.default_rng(number), 2000)
        low, high = np.quantile(drawn.hours, [0.1, 0.9])
        interval, checkpoint, restart = forecasts._care(stage.run)  # type: ignore[arg-type]
        actual = walked(truth, 100.0, 1 / (rate * 16), interval, checkpoint, restart)
        inside += bool(low <= actual <= high)
    assert 0.8 * runs - 4 * math.sqrt(runs * 0.16) <= inside <= 0.8 * runs + 4 * math.sqrt(runs * 0.16)


def _chips(seen: int, hours: float, work: float = 100.0, chips: int = 16) -> Chips:
    time = Time(value=f"{work} hours", **CITED)
    failures = Failures(seen=seen, chip_hours=f"{hours} chip-hours", **CITED)
    return Chips(
        chip="H800",
        chips=chips,
        work=time,
        failures=failures,
        checkpoint="60 s",
        restart="10 min",
        usd_per_chip_hour=PRICE,
    )


def test_the_example_names_its_driver_and_prices_its_fallback() -> None:
    run = load(EXAMPLE, CATALOGUE)
    told = forecast(run, 2000, 1)
    assert told["driver"] in {stage.name for stage in run.stages}
    assert sum(row["drives"] for row in told["stages"]) == pytest.approx(1, abs=1e-3)
    assert told["low"] <= told["probability"] <= told["high"]
    assert told["release"]["p10"] <= told["release"]["p50"] <= told["release"]["p90"]
    assert told["fallback"]["without"]["probability"] < told["probability"]
    assert forecast(run, 2000, 1) == told
    assert forecast(run, 2000, 1, datetime.date(2027, 1, 1))["probability"] > told["probability"]


def test_a_release_by_hand() -> None:
    """Two certain stages one after the other and one beside them: the sum of the two, to the day."""
    days = {"a": 3, "b": 4, "c": 5}
    stages = tuple(
        Stage(name=name, after=("a",) if name == "b" else (), time=Time(value=f"{n} days", **CITED))
        for name, n in days.items()
    )
    start = datetime.date(2026, 1, 1)
    run = forecasts.Run(kind="run", name="x", start=start, by=datetime.date(2026, 1, 8), stages=stages)
    told = forecast(run, 100)
    assert told["release"] == dict.fromkeys(("p10", "p50", "p90"), "2026-01-08")
    assert (told["probability"], told["driver"], told["usd"]["p50"]) == (1.0, None, 0.0)
    assert forecast(run, 100, by=datetime.date(2026, 1, 7))["probability"] == 0.0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("value: 6 weeks", "value: 6", "no unit"),
        ("chips: 1536", "chips: -4", "greater than or equal to 1"),
        ("after: [reinforce]", "after: [reinfroce]", "no stage 'reinfroce'"),
        ("after: [train, labels]", "after: [train, release]", "does not stand before"),
        ("restart: 60 min", "restart: 60 parsec", "'parsec'"),
        ("kind: run", "kind: portfolio", "`kind: run`"),
        ("seen: 40", "seen: true", "plain number"),
        ("chips: 1536", 'chips: "1536"', "plain number"),
        ("chips: 1536", "chips: 1536000000000", "less than or equal to"),
        ("chip: 910C", "chip: 910X", "no figures for a chip '910X'"),
        ("seen: 40,", "seen: 400000000,", "no run makes progress"),
        ("chip_hours: 200000 ", "chip_hours: 0 ", "above 0"),
        ("again: 15 %", "again: 150 %", "less than or equal to 1"),
        ("by: 2025-08-31", "by: 2025-02-10", "is not after"),
        (
            'date: "2025-08-14", certainty: guess}\n    again',
            'date: "2025-13", certainty: guess}\n    again',
            "a date is written",
        ),
        ("name: train", "name: labels", "two stages have the name"),
    ],
)
def test_mistakes_are_named_with_their_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = EXAMPLE.read_text()
    assert old in text
    path = tmp_path / "run.yaml"
    path.write_text(text.replace(old, new, 1))
    at = next(
        n for n, (a, b) in enumerate(zip(text.splitlines(), path.read_text().splitlines(), strict=True), 1) if a != b
    )
    with pytest.raises(RecipeError) as caught:
        load(path, CATALOGUE)
    assert message in caught.value.what
    assert caught.value.where is not None
    assert f":{at}:" in caught.value.where
