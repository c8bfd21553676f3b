"""Statistics against SciPy, against enumeration, and against numbers worked out by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats

from ottava.errors import DataError
from ottava.tasks.statistics import mcnemar, mean_interval, paired, paired_interval, pass_at_k, t_interval, wilson

pairs = st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(0, 300)).map(lambda x: (x[0], x[1], sum(x)))


def test_pass_at_k_is_the_share_of_draws_with_a_right_answer() -> None:
    for n, correct, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if correct <= n and k <= n:
            draws = [any(i < correct for i in chosen) for chosen in itertools.combinations(range(n), k)]
            assert pass_at_k(n, correct, k) == pytest.approx(sum(draws) / len(draws), abs=1e-15)


@given(st.integers(0, 100).map(lambda x: x / 100), st.integers(1, 12), st.data())
def test_pass_at_k_has_no_bias(p: float, k: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(k, 16))
    mean = sum(stats.binom.pmf(c, n, p) * pass_at_k(n, c, k) for c in range(n + 1))
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-9)


def test_pass_at_k_from_too_few_answers() -> None:
    assert pass_at_k(10_000, 1, 5000) == pytest.approx(0.5)
    for n, k in ((4, 5), (4, 0), (0, 1)):
        with pytest.raises(DataError):
            pass_at_k(n, 0, k)


@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_is_the_binomial_test(gained: int, lost: int) -> None:
    if gained + lost == 0:
        assert mcnemar(0, 0) == 1
    else:
        assert mcnemar(gained, lost) == pytest.approx(stats.binomtest(gained, gained + lost).pvalue, rel=1e-6)
        assert mcnemar(gained, lost) == mcnemar(lost, gained)


def test_mcnemar_of_very_many_pairs() -> None:
    assert mcnemar(30_000, 30_000) == 1
    assert mcnemar(20_000, 0) == 0.0
    assert mcnemar(30_300, 29_700) == pytest.approx(stats.binomtest(30_300, 60_000).pvalue, rel=1e-6)


def brute_score(gained: int, lost: int, n: int, d: float) -> float:
    """The score with the nuisance parameter found by maximising the likelihood of the table numerically."""

    def negative(q: float) -> float:
        cells = ((gained, q + d), (lost, q), (n - gained - lost, 1 - 2 * q - d))
        return -sum(count * math.log(max(p, 1e-300)) for count, p in cells if count)

    low, high = max(0.0, -d), (1 - d) / 2
    q = optimize.minimize_scalar(negative, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    return (gained - lost - n * d) / math.sqrt(n * (2 * q + d * (1 - d)))


@given(st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(1, 60)))
def test_the_paired_interval_inverts_the_score_test(cells: tuple[int, int, int]) -> None:
    gained, lost, same = cells
    n = gained + lost + same
    low, high = paired_interval(gained, lost, n)
    assert -1 <= low <= (gained - lost) / n <= high <= 1
    assert brute_score(gained, lost, n, low) == pytest.approx(1.959964, abs=2e-3)
    assert brute_score(gained, lost, n, high) == pytest.approx(-1.959964, abs=2e-3)


@given(pairs)
def test_the_paired_interval_turns_round_with_its_pairs(cells: tuple[int, int, int]) -> None:
    gained, lost, n = cells
    if n:
        low, high = paired_interval(gained, lost, n)
        assert paired_interval(lost, gained, n) == pytest.approx((-high, -low), abs=1e-9)


def test_the_paired_interval_where_nothing_changed() -> None:
    z2 = 1.959963984540054**2
    low, high = paired_interval(0, 0, 600)  # by hand: n d^2 / (d (1 - d)) = z^2
    assert high == pytest.approx(z2 / (600 + z2), abs=1e-9)
    assert low == pytest.approx(-high, abs=1e-9)
    assert paired_interval(0, 0, 0) == (-1, 1)


@pytest.mark.parametrize(("up", "down"), [(0.1, 0.02), (0.03, 0.0), (0.2, 0.2)])
def test_the_paired_interval_covers(up: float, down: float) -> None:
    rng = np.random.default_rng(11)
    tables = rng.multinomial(150, [up, down, 1 - up - down], size=1500)
    inside = 0
    for gained, lost, _ in tables.tolist():
        low, high = paired_interval(gained, lost, 150)
        inside += low <= up - down <= high
    assert 0.93 <= inside / 1500 <= 0.99  # 95%, give or take; three standard errors are 1.7%


def test_paired_models() -> None:
    before = [True, True, False, False, False, True]
    after = [True, False, True, True, True, True]
    found = paired(before, after)
    assert (found.n, found.before, found.after, found.gained, found.lost) == (6, 3, 5, 3, 1)
    assert found.difference == pytest.approx(1 / 3)
    assert (found.low, found.high) == paired_interval(3, 1, 6)
    assert found.p == stats.binomtest(3, 4).pvalue
    for a, b in (([], []), ([True], [True, False])):
        with pytest.raises(DataError, match="cannot be paired"):
            paired(a, b)


@given(st.lists(st.integers(-(10**9), 10**9).map(lambda x: x / 1000), min_size=2, max_size=30))
def test_t_interval_is_scipys(values: list[float]) -> None:
    error = stats.sem(values)
    low, high = t_interval(values)
    if np.ptp(values) == 0:
        assert low == pytest.approx(values[0])
        assert high == pytest.approx(values[0])
    else:
        expected = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=error)
        assert (low, high) == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_t_interval_of_ten_by_the_table() -> None:
    low, high = t_interval(range(1, 11))
    half = 2.262157 * math.sqrt(55 / 6 / 10)  # t of 9 degrees of freedom; the variance of 1..10 is 55/6
    assert (low, high) == pytest.approx((5.5 - half, 5.5 + half), abs=1e-5)
    for bad in ([], [1.0], [1.0, math.nan], [1.0, math.inf]):
        with pytest.raises(DataError):
            t_interval(bad)


@given(st.integers(0, 60), st.integers(0, 60))
def test_the_interval_of_a_mean_of_right_and_wrong_is_wilsons(right: int, wrong: int) -> None:
    found = mean_interval([1.0] * right + [0.0] * wrong)
    assert found == pytest.approx(wilson(right, right + wrong), abs=1e-12)


@given(st.lists(st.integers(0, 8), min_size=1, max_size=50))
def test_the_interval_of_a_mean_lies_between_that_of_problems_and_that_of_answers(correct: list[int]) -> None:
    low, high = mean_interval([c / 8 for c in correct], 8)
    total, n = sum(correct), len(correct)
    assert low <= total / (8 * n) <= high
    narrow = wilson(total, 8 * n)
    assert high - low >= narrow[1] - narrow[0] - 1e-12
    if total % 8 == 0:
        wide = wilson(total // 8, n)
        assert high - low <= wide[1] - wide[0] + 1e-12


@pytest.mark.parametrize(("a", "b"), [(0.3, 0.2), (2.0, 1.0), (0.1, 2.0)])
def test_the_interval_of_a_mean_holds_what_it_promises(a: float, b: float) -> None:
    """Problems of unequal difficulty, 8 answers each: the mean is inside in 95 of 100 worlds; Wilson's over all answers
    takes them for independent, and is wrong far more often."""
    rng = np.random.default_rng(5)
    inside = naive = 0
    for _ in range(600):
        correct = rng.binomial(8, rng.beta(a, b, 60))
        low, high = mean_interval((correct / 8).tolist(), 8)
        inside += low <= a / (a + b) <= high
        low, high = wilson(int(correct.sum()), 8 * 60)
        naive += low <= a / (a + b) <= high
    assert inside / 600 > 0.92
    assert naive / 600 < 0.9


def test_the_interval_of_no_mean() -> None:
    assert mean_interval([]) == (0.0, 1.0)
    assert mean_interval([1.0] * 20, 8) == wilson(20, 20)  # eight answers each are no proof of a sure thing
    assert mean_interval([0.5] * 20, 8) == pytest.approx(wilson(80, 160))
