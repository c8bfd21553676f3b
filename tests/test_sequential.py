"""Go or no-go against exact probabilities, the formula in fractions, and thousands of simulated runs."""

from __future__ import annotations

import itertools
import json
import math
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ottava import journal
from ottava.errors import DataError
from ottava.journal import Journal
from ottava.verify import sequential
from ottava.verify.sequential import BETS, Look, Rule, Verdict, fresh, judge

ALPHA = 0.05
ACTIONS = ["go", "warn", "stop"]


def look(number: int, scores: Any, ids: Any = None) -> Look:
    """scores: pairs of the run's and the baseline's."""
    run, baseline = zip(*scores, strict=True)
    return Look(100 * number, ids or [f"{number}.{i}" for i in range(len(run))], run, baseline)


def series(parts: Any) -> list[Look]:
    return [look(number, scores) for number, scores in enumerate(parts, 1)]


def of(worse: int, better: int, same: int) -> list[tuple[int, int]]:
    """Right and wrong answers: how many the run alone got wrong, the baseline alone, and both alike."""
    return [(0, 1)] * worse + [(1, 0)] * better + [(1, 1)] * same


def draw(rng: np.random.Generator, shape: tuple[int, ...], differ: float, excess: Any) -> Any:
    """Excesses of right and wrong answers: -1, 0 or 1, with the mean `excess`; a share `differ` is not 0."""
    u = rng.random(shape)
    worse, better = (differ + excess) / 2, (differ - excess) / 2
    return np.where(u < worse, 1.0, np.where(u < worse + better, -1.0, 0.0))


def ever(evidence: Any, alpha: float = ALPHA) -> int:
    """In how many of the runs [runs, looks] the evidence ever sufficed."""
    return int((evidence >= -math.log(alpha)).any(-1).sum())


def at_most(runs: int, alpha: float = ALPHA) -> int:
    """How many of `runs` may stop by chance, where each does with probability alpha, in 999 of 1000 cases."""
    return int(stats.binom.ppf(0.999, runs, alpha))


# ---------------------------------------------------------------- the error rate


@pytest.mark.parametrize(("looks", "examples"), [(1500, 1), (60, 25), (8, 400)])
@pytest.mark.parametrize("margin", [0.0, 0.1])
def test_a_run_at_the_margin_is_seldom_stopped(looks: int, examples: int, margin: float) -> None:
    """Watched after every look, down to every single example, by someone who stops as soon as it is allowed."""
    rng, runs = np.random.default_rng(7), 2000
    wealth = [sequential._wealth(draw(rng, (runs, examples), 0.3, margin), 1.0, margin) for _ in range(looks)]
    evidence = sequential._evidence(np.stack(wealth, 1), reused=False)
    assert 0 < ever(evidence) <= at_most(runs)


def test_an_adversary_cannot_force_a_stop() -> None:
    """Each checkpoint's quality answers the evidence so far: as bad as allowed while it is high, else far better."""
    rng, runs, margin = np.random.default_rng(11), 1500, 0.05
    wealth: list[Any] = []
    evidence = np.zeros((runs, 1))
    for _ in range(60):
        excess = np.where(evidence[:, -1] > -0.5, margin, -0.2)[:, None]
        wealth.append(sequential._wealth(draw(rng, (runs, 20), 0.4, excess), 1.0, margin))
        evidence = sequential._evidence(np.stack(wealth, 1), reused=False)
    assert 0 < ever(evidence) <= at_most(runs)


def test_shared_examples_must_not_be_taken_for_new_ones() -> None:
    """The same examples and an equally good model at all looks: multiplying would stop far too many runs."""
    rng, runs, looks = np.random.default_rng(5), 2000, 40
    once = sequential._wealth(draw(rng, (runs, 50), 0.3, 0.0), 1.0, 0.0)
    wealth = np.repeat(once[:, None], looks, 1)
    assert ever(sequential._evidence(wealth, reused=True)) <= at_most(runs)
    assert ever(sequential._evidence(wealth, reused=False)) > 3 * at_most(runs), "the test cannot fail"


def test_power() -> None:
    """A lasting loss is found whenever it begins: 3 points beyond the margin in a few looks of 200 examples."""
    rng, runs, looks, margin = np.random.default_rng(3), 400, 20, 0.02

    def stopped_at(excesses: list[float]) -> Any:
        wealth = [sequential._wealth(draw(rng, (runs, 200), 0.12, e), 1.0, margin) for e in excesses]
        enough = sequential._evidence(np.stack(wealth, 1), reused=False) >= -math.log(ALPHA)
        assert enough.any(1).mean() > 0.95
        return enough.argmax(1) + 1

    assert np.median(stopped_at([0.05] * looks)) <= 8
    late = stopped_at([-0.05] * 10 + [0.10] * 10)
    assert np.median(late) <= 14
    assert (late <= 10).mean() <= ALPHA


def test_a_small_loss_is_found_in_many_examples() -> None:
    """Large bets lose on it: 4 in 1000."""
    assert judge([look(1, of(1920, 1680, 56_400))], Rule(0.0)).action == "stop"


def every_run(looks: int, examples: int, worse: float, better: float) -> tuple[Any, Any]:
    """All runs of so few examples: their excesses [runs, looks, examples], and the probability of each."""
    values, chances = (-1.0, 0.0, 1.0), (better, 1 - better - worse, worse)
    runs = np.array(list(itertools.product(range(3), repeat=looks * examples)))
    return np.array(values)[runs].reshape(-1, looks, examples), np.array(chances)[runs].prod(1)


@pytest.mark.parametrize("margin", [0.0, 0.25])
def test_exact_probabilities(margin: float) -> None:
    """Every possible run of four looks of two examples: the evidence is 1 on average, and stops are rare enough."""
    x, chance = every_run(4, 2, worse=margin + 0.2, better=0.2)
    wealth = sequential._wealth(x, 1.0, margin)
    new, shared = (np.exp(sequential._evidence(wealth, reused)) for reused in (False, True))
    np.testing.assert_allclose(chance @ new, 1.0, rtol=1e-12)
    np.testing.assert_allclose(chance @ shared, [1 - 1 / (k + 1) for k in range(1, 5)], rtol=1e-12)
    for alpha in (0.3, 0.5, 0.7, 0.9):
        stopped = float(chance @ (new >= 1 / alpha).any(1))
        assert stopped <= alpha
        assert (stopped > 0) == (new.max() >= 1 / alpha)
    x, chance = every_run(4, 2, worse=margin + 0.1, better=0.2)  # better than the margin
    assert (np.diff(chance @ np.exp(sequential._evidence(sequential._wealth(x, 1.0, margin), False))) < 0).all()


@pytest.mark.parametrize("alpha", [0.05, 0.4])
def test_exact_coverage(alpha: float) -> None:
    """The interval of one look of 12 examples misses with probability alpha w_1 at most, whatever the true mean."""
    rule, n = Rule(0.0, alpha), 12
    verdicts = [judge([look(1, of(k, 0, n - k))], rule) for k in range(n + 1)]
    for p in np.linspace(0, 1, 41):
        chance = stats.binom.pmf(range(n + 1), n, p)
        missed = sum(c for c, v in zip(chance, verdicts, strict=True) if not v.low <= p <= v.high)
        assert missed <= alpha / 2
    assert all(v.high - v.low < 1.5 for v in verdicts), "an interval that says nothing always covers"


def test_intervals_cover_at_all_looks() -> None:
    rng, runs, missed = np.random.default_rng(13), 150, 0
    for _ in range(runs):
        excesses = draw(rng, (5, 100), 0.4, 0.1)
        looks = series([[(0.5 - x / 2, 0.5 + x / 2) for x in part] for part in excesses])
        verdicts = [judge(looks[:k], Rule(0.0, 0.2)) for k in range(1, 6)]
        missed += any(not v.low <= 0.1 <= v.high for v in verdicts)
    assert missed <= at_most(runs, 0.2)


# ---------------------------------------------------------------- the formula


def formula(looks: list[Look], rule: Rule) -> Fraction:
    """M in fractions, as the module states it."""
    margin, total = Fraction(rule.margin) / Fraction(rule.bound), Fraction(0)
    sign = 1 if rule.better == "lower" else -1
    for share in BETS:
        wealth = []
        for one in looks:
            product = Fraction(1)
            for run, baseline in zip(one.run, one.baseline, strict=True):
                run, baseline = min(run, rule.bound), min(baseline, rule.bound)
                x = sign * (Fraction(run) - Fraction(baseline)) / Fraction(rule.bound)
                product *= 1 + Fraction(share) / (1 + margin) * (x - margin)
            wealth.append(product)
        for j in range(len(looks)):
            kept = [wealth[j]] if rule.reused else wealth[j:]
            total += Fraction(1, (j + 1) * (j + 2)) * math.prod(kept) / len(BETS)
    return total if rule.reused else total + Fraction(1, len(looks) + 1)


scores = st.floats(0, 2, width=32)
pairs = st.lists(st.tuples(scores, scores), min_size=1, max_size=6)
rules = st.builds(
    Rule,
    margin=st.floats(0, 1.9),
    alpha=st.floats(0.001, 0.999),
    bound=st.just(2.0),
    better=st.sampled_from(["higher", "lower"]),
    reused=st.booleans(),
)


@given(st.lists(pairs, min_size=1, max_size=4).map(series), rules)
def test_the_evidence_is_the_formula(looks: list[Look], rule: Rule) -> None:
    assert judge(looks, rule).evidence == pytest.approx(math.log(formula(looks, rule)), rel=1e-9, abs=1e-9)


@given(pairs, st.floats(0.01, 0.9))
def test_the_interval_is_where_no_bet_pays(scores: Any, alpha: float) -> None:
    """Just inside, both tests at alpha w_1 / 2 are silent; just outside, the one of its side speaks."""
    found = judge([look(1, scores)], Rule(0.0, alpha, 2.0))
    x = np.array([(baseline - run) / 2 for run, baseline in scores])

    def pays(values: Any, mean: float) -> bool:
        parts = [np.prod([1 + bet / (1 + mean) * (v - mean) for v in values]) for bet in BETS]
        return bool(np.mean(parts) >= 4 / alpha)

    for values, bound in ((x, found.low / 2), (-x, -found.high / 2)):
        assert not pays(values, bound + 1e-9)
        assert bound <= -1 + 1e-9 or pays(values, bound - 1e-9)
    assert found.low <= found.excess <= found.high


# ---------------------------------------------------------------- properties


@given(st.lists(pairs, min_size=1, max_size=4), rules, st.data())
def test_worse_scores_never_help(parts: Any, rule: Rule, data: Any) -> None:
    before = judge(series(parts), rule)
    k = data.draw(st.integers(0, len(parts) - 1))
    i = data.draw(st.integers(0, len(parts[k]) - 1))
    run, baseline = parts[k][i]
    worse = data.draw(st.floats(0, run) if rule.better == "higher" else st.floats(run, 2))
    changed = [[*part] for part in parts]
    changed[k][i] = (worse, baseline)
    after = judge(series(changed), rule)
    assert after.evidence >= before.evidence - 1e-12
    assert ACTIONS.index(after.action) >= ACTIONS.index(before.action)
    assert before.proven or not after.proven


@given(st.lists(pairs, min_size=1, max_size=3), rules, st.floats(0, 1.9), st.floats(0.001, 0.999))
def test_a_kinder_rule_is_kinder(parts: Any, rule: Rule, margin: float, alpha: float) -> None:
    kinder = Rule(max(margin, rule.margin), min(alpha, rule.alpha), 2.0, rule.better, rule.reused)
    strict, kind = judge(series(parts), rule), judge(series(parts), kinder)
    assert kind.evidence <= strict.evidence + 1e-12
    assert kind.action != "stop" or strict.action == "stop"
    assert kind.low <= strict.low + 1e-9
    assert kind.high >= strict.high - 1e-9


@given(st.lists(pairs, min_size=1, max_size=3), rules, st.randoms())
def test_the_order_of_examples_does_not_matter(parts: Any, rule: Rule, random: Any) -> None:
    """To the last bit: a verdict can be compared by its digest."""
    mixed = [random.sample(part, len(part)) for part in parts]
    assert judge(series(mixed), rule) == judge(series(parts), rule)


def test_the_order_of_looks_matters() -> None:
    """A run that has become bad is not one that was bad and has recovered."""
    parts = [of(0, 5, 45), of(25, 0, 25), of(28, 0, 22)]
    assert judge(series(parts), Rule(0.05)).action == "stop"
    assert judge(series(parts[::-1]), Rule(0.05)).action == "warn"


@given(pairs, st.floats(0.01, 0.9))
def test_run_and_baseline_in_each_other_s_place(scores: Any, alpha: float) -> None:
    rule = Rule(0.0, alpha, 2.0)
    one, other = judge([look(1, scores)], rule), judge([look(1, [pair[::-1] for pair in scores])], rule)
    assert (one.low, one.excess, one.high) == pytest.approx((-other.high, -other.excess, -other.low))


@given(pairs, st.floats(0.01, 0.9), st.floats(0.001, 1000))
def test_units_do_not_matter(scores: Any, alpha: float, unit: float) -> None:
    one = judge([look(1, scores)], Rule(0.1, alpha, 2.0))
    other = judge(
        [look(1, [(unit * a, unit * b) for a, b in scores])], Rule(0.1 * unit, alpha, 2.0 * unit * (1 + 1e-15))
    )
    assert other.evidence == pytest.approx(one.evidence, abs=1e-6)
    assert other.excess == pytest.approx(unit * one.excess, abs=1e-6 * unit)


def test_many_examples() -> None:
    """Evidence beyond the range of floats, for and against: no overflow, no infinity."""
    for worse, better, action in ((200_000, 0, "stop"), (0, 200_000, "go")):
        verdict = judge([look(1, of(worse, better, 0))], Rule(0.01))
        assert verdict.action == action
        assert all(map(math.isfinite, (verdict.evidence, verdict.low, verdict.high)))


# ---------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("parts", "rule", "action", "proven", "words"),
    [
        ([of(40, 5, 155)], Rule(0.02), "stop", False, "0.175 worse .* beyond the margin; a run .* probability 0.05 at"),
        ([of(9, 3, 188)], Rule(0.02), "warn", False, "0.03 worse .* beyond the margin, which chance may explain"),
        ([of(3, 3, 194)], Rule(0.02), "go", False, "as good as its baseline .* not shown to be within"),
        ([of(3, 3, 1994)], Rule(0.02), "go", True, "no worse than the margin allows"),
        ([of(3, 9, 188)], Rule(0.02), "go", False, "0.03 better"),
        ([of(3, 3, 194)], Rule(0.0), "go", False, "as good as its baseline"),
        ([of(0, 1, 0)], Rule(0.0), "go", False, "1 better"),
        ([of(50, 0, 0), of(0, 0, 1)], Rule(0.2), "warn", False, "within the margin, but earlier looks were not"),
        ([of(50, 0, 0), of(0, 0, 500)], Rule(0.2, reused=True), "go", True, "no worse than the margin allows"),
        ([of(9, 3, 188)] * 12, Rule(0.0), "stop", False, "0.03 worse"),
        ([of(9, 3, 188)] * 12, Rule(0.0, reused=True), "warn", False, "0.03 worse"),
    ],
)
def test_verdicts(parts: Any, rule: Rule, action: str, proven: bool, words: str) -> None:
    verdict = judge(series(parts), rule)
    assert (verdict.action, verdict.proven, verdict.look) == (action, proven, len(parts))
    assert verdict.examples == len(parts[-1])
    assert re.search(words, verdict.reason), verdict.reason


def test_a_loss_is_clipped() -> None:
    """A run whose loss explodes on half of the examples is as bad there as the bound says, and no worse."""
    losses = [(math.inf, 1.0), (1.0, 1.0)] * 40
    verdict = judge([look(1, losses)], Rule(0.1, bound=5.0, better="lower"))
    assert (verdict.action, verdict.excess) == ("stop", 2.0)
    clipped = [(min(run, 5.0), baseline) for run, baseline in losses]
    assert judge([look(1, clipped)], Rule(0.1, bound=5.0, better="lower")) == verdict


def test_the_verdict_is_an_event(tmp_path: Path) -> None:
    verdict = judge(series([of(9, 3, 188)]), Rule(0.02))
    log = Journal(tmp_path / "j")
    log.append("train.verdict", **verdict.event())
    (event,) = journal.read(log.path)
    assert event["action"] == "warn"
    assert set(vars(verdict)) <= set(event)
    assert json.dumps(verdict.event(), allow_nan=False)
    assert Verdict(**verdict.event()).reason == verdict.reason


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"margin": -0.1}, "margin must lie in"),
        ({"margin": 1.0}, "margin must lie in"),
        ({"margin": math.nan}, "margin must lie in"),
        ({"margin": 0.1, "alpha": 0.0}, "alpha is a probability"),
        ({"margin": 0.1, "alpha": 1.0}, "alpha is a probability"),
        ({"margin": 0.1, "alpha": math.nan}, "alpha is a probability"),
        ({"margin": 0.1, "bound": 0.0}, "bound of the scores"),
        ({"margin": 0.1, "bound": math.inf}, "bound of the scores"),
        ({"margin": 0.1, "better": "best"}, "'higher' or 'lower'"),
    ],
)
def test_rules_that_make_no_sense(numbers: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        Rule(**numbers)


@pytest.mark.parametrize(
    ("looks", "rule", "words"),
    [
        ([], Rule(0.1), "no look"),
        ([Look(1, [], [], [])], Rule(0.1), "at least one example"),
        ([Look(1, ["a", "b"], [1.0], [1.0, 0.0])], Rule(0.1), "2 ids, 1 scores of the run, 2 of the baseline"),
        ([Look(1, ["a", "a"], [1.0, 1.0], [1.0, 0.0])], Rule(0.1), "twice in one look"),
        ([Look(1, ["a", "a"], [1.0, 1.0], [1.0, 0.0])], Rule(0.1, reused=True), "twice in one look"),
        ([Look(1, ["a"], [1.0], [1.0]), Look(2, ["a"], [1.0], [1.0])], Rule(0.1), "'a' was used by an earlier look"),
        ([Look(1, ["a"], [math.nan], [1.0])], Rule(0.1), "the run's score of example 'a' is nan"),
        ([Look(1, ["a"], [1.0], [math.nan])], Rule(0.1, better="lower"), "the baseline's score of example 'a' is nan"),
        ([Look(1, ["a"], [97.5], [1.0])], Rule(0.1), r"97.5, and not in \[0, 1\]"),
        ([Look(1, ["a"], [-0.5], [1.0])], Rule(0.1, better="lower"), "-0.5, and not 0 or more"),
        ([Look(1, ["a"], [None], [1.0])], Rule(0.1), "None, and not in"),  # type: ignore[list-item]
    ],
)
def test_looks_that_cannot_be_judged(looks: Any, rule: Rule, words: str) -> None:
    with pytest.raises(DataError, match=words):
        judge(looks, rule)


def test_shared_examples_are_allowed_where_the_rule_says_so() -> None:
    looks = [Look(k, ["a", "b"], [1, 0], [1, 1]) for k in range(3)]
    assert judge(looks, Rule(0.1, reused=True)).look == 3


@given(st.sets(st.text(max_size=4), min_size=1, max_size=40), st.integers(1, 10), st.integers(0, 5), st.randoms())
def test_fresh_examples(ids: set[str], size: int, seed: int, random: Any) -> None:
    looks = len(ids) // size
    drawn = [fresh(random.sample(sorted(ids), len(ids)), size, seed, number) for number in range(looks)]
    assert all(len(part) == size for part in drawn)
    assert len(set().union(*drawn)) == size * looks
    assert set().union(*drawn) <= ids
    with pytest.raises(DataError, match="used up"):
        fresh(ids, size, seed, looks)


def test_fresh_examples_depend_on_the_seed() -> None:
    ids = [f"p{i}" for i in range(100)]
    assert fresh(ids, 20, 1, 0) == fresh(ids, 20, 1, 0) != fresh(ids, 20, 2, 0)
    for size, number in ((0, 0), (5, -1)):
        with pytest.raises(DataError):
            fresh(ids, size, 1, number)
