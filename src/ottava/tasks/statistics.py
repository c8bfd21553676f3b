"""An accuracy without its interval says little: every accuracy in Ottava carries this one."""

from __future__ import annotations

import math

_Z95 = 1.959963984540054  # the 97.5% point of the normal distribution


def wilson(correct: int, n: int) -> tuple[float, float]:
    """The 95% interval of a share of `correct` in `n`; (0, 1) where n is 0.

    Source: E. B. Wilson, J. Am. Stat. Assoc. 22 (1927) 209; the score interval, without continuity correction.
    """
    assert 0 <= correct <= n, (correct, n)
    if n == 0:
        return 0.0, 1.0
    share, z2 = correct / n, _Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    low = 0.0 if correct == 0 else centre - half
    high = 1.0 if correct == n else centre + half
    return low, high
