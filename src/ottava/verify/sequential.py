"""Go or no-go: is the run still no worse than its baseline? Asked as often as one likes, at a stated error rate.

At a *look* the run's checkpoint and the baseline's are scored on the same held-out examples. The *excess* of an
example is by how much the run is worse on it; d_k is the mean excess of the checkpoint of look k over the distribution
that the held-out examples were drawn from.

    stop   claims: at some look so far d_k was above the margin. A run in which d_k <= margin at every look is stopped
           with probability at most alpha, however many looks there are and whenever they come.
    go     proven: with probability at least 1 - alpha the intervals of all looks hold their d_k at once; this one
           lies below the margin. Not proven: nothing speaks against the run, but it is not shown either.
    warn   the estimate is beyond the margin, but chance may explain it.

The test bets against the run (Waudby-Smith, Ramdas, J. R. Stat. Soc. B 86 (2024) 1, arXiv 2010.09686). With x the
excess over the bound, in [-1, 1], and m the margin over the bound, the wealth of a bet b is the product of
1 + b (x - m) over examples: where the mean is at most m, no bet grows on average. The bets are b = 2^-j / (1 + m),
j = 1..8, with equal parts of the money. As a run may turn bad at any look, a share w_j = 1 / (j (j + 1)) is first put
down at look j, so that good looks before do not use it up (e-processes with several starts are added up: Shin, Ramdas,
Rinaldo, arXiv 2203.03532):

    M_K = mean over b of sum over j <= K of w_j W_j(b) ... W_K(b)  +  1 / (K + 1)          W_k: wealth of look k alone

On new examples M is a nonnegative supermartingale that starts at 1, so it ever reaches 1 / alpha with probability at
most alpha (Ville). The model changes between looks; this does no harm, because each look's examples are new to it.

What must hold. Held-out examples are drawn alike and independently, and never trained on; the baseline was not chosen
by its score on them. By default **each look has examples of its own** (`fresh` gives them): verdicts may then influence
the run in any way. Where the same set is **used again** (`reused`), looks depend on each other and wealth must not be
multiplied over looks. Then M_K = sum over j <= K of w_j * mean over b of W_j(b), which is valid under any dependence
(Vovk, Wang, Ann. Statist. 49 (2021) 1736) but slower to see a small lasting loss, and the run must not be influenced
by verdicts except by being stopped. The interval of look k uses that look alone, at level alpha w_k.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

from ottava.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

Action = Literal["go", "warn", "stop"]

BETS = tuple(2.0**-j for j in range(1, 9))
"""As shares of the largest bet: half of it finds large losses in few examples, 1/256 small ones in many."""


@dataclass(frozen=True)
class Rule:
    """When to stop. Raises DataError where a number makes no sense.

    margin: how much worse than the baseline the run may be on average, in units of the score, 0 <= margin < bound.
    alpha: the largest probability of stopping a run that never was. bound: scores lie in [0, bound]. better: which
    end is good; where `lower` (a loss), scores above the bound are taken for the bound, and d_k is that of the
    clipped loss. reused: the looks share held-out examples.
    """

    margin: float
    alpha: float = 0.05
    bound: float = 1.0
    better: Literal["higher", "lower"] = "higher"
    reused: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.bound) and self.bound > 0):
            raise DataError(f"the bound of the scores must be a number above 0: {self.bound}")
        if not 0 <= self.margin < self.bound:
            raise DataError(f"the margin must lie in [0, {self.bound:g}), the range of the scores: {self.margin}")
        if not 0 < self.alpha < 1:
            raise DataError(f"alpha is a probability between 0 and 1: {self.alpha}")
        if self.better not in ("higher", "lower"):
            raise DataError(f"better is 'higher' or 'lower': {self.better!r}")


@dataclass(frozen=True)
class Look:
    """One comparison. step: the run's, a label; ids: of the held-out examples; run, baseline: their scores, alike."""

    step: int
    ids: Sequence[str]
    run: Sequence[float]
    baseline: Sequence[float]


@dataclass(frozen=True)
class Verdict:
    """What the looks so far say of the last one. Numbers are in units of the score; evidence is ln M.

    excess: by how much the run is worse on this look's examples; low, high: the interval of its mean; proven: high is
    no more than the margin.
    """

    action: Action
    look: int
    step: int
    examples: int
    excess: float
    low: float
    high: float
    proven: bool
    evidence: float
    reason: str

    def event(self) -> dict[str, Any]:
        """The verdict for the journal."""
        rounded = {name: round(getattr(self, name), 6) for name in ("excess", "low", "high", "evidence")}
        return {**vars(self), **rounded}


def judge(looks: Sequence[Look], rule: Rule) -> Verdict:
    """The verdict on the last of `looks`; all of the run's looks are wanted, in order of time.

    Pure: a run that is started again judges the same looks alike. Raises DataError where there is no look, a look has
    no example, scores are missing or outside of their range, or an example is used twice against the rule.
    """
    _check(looks, rule)
    excesses = [_excess(look, rule) / rule.bound for look in looks]
    margin = rule.margin / rule.bound
    path = _evidence(_stack(_wealth(*_counted(x), margin) for x in excesses), rule.reused)
    evidence, last = float(path[-1]), excesses[-1]
    level = math.log(2.0 / rule.alpha) + math.log(len(looks) * (len(looks) + 1.0))
    low, mean, high = _lower(last, level), math.fsum(last) / len(last), -_lower(-last, level)
    proven, beyond, shown = high <= margin, mean > margin, evidence >= -math.log(rule.alpha)
    action: Action = "stop" if beyond and shown else "go" if proven else "warn" if beyond or shown else "go"
    low, mean, high = (rule.bound * value for value in (low, mean, high))
    said = f"{_apart(mean)} on {len(last)} held-out examples ({low:+.4g} to {high:+.4g}; allowed {rule.margin:g})"
    return Verdict(
        action, len(looks), looks[-1].step, len(last), mean, low, high, proven, evidence,
        f"{said}: {_why(action, proven, beyond, rule)}",
    )  # fmt: skip


def fresh(ids: Iterable[str], size: int, seed: int, look: int) -> list[str]:
    """The `size` examples of look 0, 1, 2, ...: looks never share one. Raises DataError where none are left.

    The order is that of SHA-256 over seed and id: the same on every machine and whatever the order of `ids`, which
    must be the same set at every look.
    """
    order = sorted(set(ids), key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    if size < 1 or look < 0:
        raise DataError(f"there is no look {look} of {size} examples")
    if (look + 1) * size > len(order):
        raise DataError(
            f"the held-out examples are used up: {len(order)} are enough for {len(order) // size} looks of {size}",
            fix="hold more examples out, look less often or at fewer, or let looks share examples (reused)",
        )
    return order[look * size : (look + 1) * size]


def _check(looks: Sequence[Look], rule: Rule) -> None:
    if not looks:
        raise DataError("there is no look to judge")
    used: set[str] = set()
    for number, look in enumerate(looks, 1):
        where = f"look {number}, step {look.step}"
        own = set(look.ids)
        if not look.ids:
            raise DataError("a look needs at least one example", where=where)
        if not len(look.ids) == len(look.run) == len(look.baseline):
            counts = f"{len(look.ids)} ids, {len(look.run)} scores of the run, {len(look.baseline)} of the baseline"
            raise DataError(f"every example needs both scores: {counts}", where=where)
        if len(own) < len(look.ids):
            raise DataError("an example stands twice in one look", where=where)
        if not rule.reused and used & own:
            raise DataError(
                f"example {min(used & own)!r} was used by an earlier look, which would make the error rate a lie",
                where=where,
                fix="draw new examples for each look (`fresh`), or say that looks share them (reused)",
            )
        used |= own
        _check_scores(look, rule, where)


def _check_scores(look: Look, rule: Rule, where: str) -> None:
    for side, scores in (("run", look.run), ("baseline", look.baseline)):
        for name, score in zip(look.ids, scores, strict=True):
            top = math.inf if rule.better == "lower" else rule.bound
            if not (isinstance(score, Real) and 0 <= score <= top):  # NaN is refused too
                allowed = "0 or more" if rule.better == "lower" else f"in [0, {rule.bound:g}]"
                raise DataError(f"the {side}'s score of example {name!r} is {score}, and not {allowed}", where=where)


def _excess(look: Look, rule: Rule) -> Floats:
    """By how much the run is worse, [examples], in [-bound, bound]."""
    import numpy as np

    run, baseline = (np.minimum(np.asarray(s, np.float64), rule.bound) for s in (look.run, look.baseline))
    return run - baseline if rule.better == "lower" else baseline - run


def _counted(x: Floats) -> tuple[Floats, Floats]:
    """The distinct values in order and how often each comes: few for right and wrong, and no order of examples."""
    import numpy as np

    values, counts = np.unique(x, return_counts=True)
    return values, counts.astype(np.float64)


def _stack(rows: Iterable[Floats]) -> Floats:
    import numpy as np

    return np.stack(list(rows))


def _wealth(x: Floats, counts: Floats | float, margin: float) -> Floats:
    """The logarithm of what each bet makes of a look: [..., examples] in [-1, 1] to [..., bets]."""
    import numpy as np

    gain = (x - margin) / (1 + margin)  # at least -1: no bet loses more than half of its money at one example
    return np.stack([(counts * np.log1p(bet * gain)).sum(-1) for bet in BETS], -1)


def _evidence(wealth: Floats, reused: bool) -> Floats:
    """ln M after every look: [..., looks, bets] to [..., looks]."""
    import numpy as np

    out, put_down = [], np.full(wealth.shape[:-2] + wealth.shape[-1:], -math.inf)
    for number in range(1, wealth.shape[-2] + 1):
        now, share = wealth[..., number - 1, :], -math.log(number * (number + 1.0))
        if reused:
            put_down = np.logaddexp(put_down, share + now)
            out.append(_mean(put_down))
        else:
            put_down = np.logaddexp(put_down, share) + now
            out.append(np.logaddexp(_mean(put_down), -math.log(number + 1.0)))
    return np.stack(out, -1)


def _mean(logarithms: Floats) -> Floats:
    """The logarithm of the mean over bets."""
    import numpy as np

    mean: Floats = np.logaddexp.reduce(logarithms, -1) - math.log(len(BETS))
    return mean


def _lower(x: Floats, level: float) -> float:
    """The lower bound of the mean of x in [-1, 1]: every smaller mean makes the bets worth more than exp(level).

    Wealth falls as the assumed mean grows and is at most 1 at the sample's own, so bisection finds it.
    """
    values, counts = _counted(x)
    low, high = -1.0, math.fsum(x) / len(x)
    while low < (middle := (low + high) / 2) < high and high - low > 1e-12:
        if float(_mean(_wealth(values, counts, middle))) >= level:
            low = middle
        else:
            high = middle
    return low


def _apart(excess: float) -> str:
    if excess == 0:
        return "the run is as good as its baseline"
    return f"the run is {abs(excess):.4g} {'worse' if excess > 0 else 'better'} than its baseline"


def _why(action: Action, proven: bool, beyond: bool, rule: Rule) -> str:
    if action == "stop":
        return f"beyond the margin; a run that never was is stopped with probability {rule.alpha:g} at most"
    if proven:
        return "no worse than the margin allows"
    if action == "go":
        return "nothing speaks against it, but it is not shown to be within the margin"
    return "beyond the margin, which chance may explain" if beyond else "within the margin, but earlier looks were not"
