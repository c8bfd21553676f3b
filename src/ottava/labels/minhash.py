"""Which of many sets are alike, without comparing all pairs: MinHash and banding, in NumPy.

The least of a random hash over a set is the same for two sets with the probability of their Jaccard similarity J
(Broder,
1997). `bands` times `rows` such minima make a signature; two sets are candidates where all rows of one band agree, with
probability 1 - (1 - J^rows)^bands (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, 3.4). A candidate is only a
question: whoever asks compares the sets themselves. The hashes are fixed, so the same sets give the same pairs
anywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Words = NDArray[np.uint64]

CROWDED = 1000
"""Of those that share a key of one band, how many are looked at: a band in which all are alike tells nothing."""
BATCH = 4096
"""Sets whose features are hashed together: bounds the memory."""


@dataclass(frozen=True)
class Bands:
    """How alike two sets must be to be candidates: half of the pairs at about (1 / bands)^(1 / rows) are."""

    bands: int
    rows: int

    def candidate(self, jaccard: float) -> float:
        """The probability that two sets of this similarity are candidates."""
        return float(1 - (1 - jaccard**self.rows) ** self.bands)


def keys(sets: Sequence[Collection[str]], shape: Bands) -> Words:
    """[sets, bands]: one number for each band of each set; equal numbers make candidates. Empty sets match nothing."""
    rng = np.random.default_rng(20_240_229)  # any; but always the same
    a = rng.integers(0, 2**63, shape.bands * shape.rows, np.uint64) * 2 + 1
    b = rng.integers(0, 2**63, shape.bands * shape.rows, np.uint64)
    mix = rng.integers(0, 2**63, (shape.bands, shape.rows), np.uint64) * 2 + 1
    out = np.empty((len(sets), shape.bands), np.uint64)
    known: dict[str, int] = {}
    for begin in range(0, len(sets), BATCH):
        some = sets[begin : begin + BATCH]
        for feature in {feature for features in some for feature in features}:
            if feature not in known:
                known[feature] = int.from_bytes(hashlib.blake2b(feature.encode(), digest_size=8).digest(), "little")
        out[begin : begin + len(some)] = _keys(some, known, a, b, mix, begin)
    return out


def _keys(some: Sequence[Collection[str]], known: dict[str, int], a: Words, b: Words, mix: Words, begin: int) -> Words:
    vocabulary = {feature: k for k, feature in enumerate({f for features in some for f in features})}
    values = np.fromiter((known[feature] for feature in vocabulary), np.uint64, len(vocabulary))
    table = values[:, None] * a + b
    table ^= table >> np.uint64(29)  # a product's high bits are good, its low bits are not
    table *= np.uint64(0x9E3779B97F4A7C15)
    table >>= np.uint64(32)
    out = np.empty((len(some), len(mix)), np.uint64)
    for i, features in enumerate(some):
        if features:
            least = table[[vocabulary[feature] for feature in features]].min(0).reshape(mix.shape)
            out[i] = ((least + np.uint64(1)) * mix).sum(1)
        else:
            out[i] = np.uint64(begin + i) + np.arange(len(mix), dtype=np.uint64) * np.uint64(2**40)
    return out


def similar(ours: Words, theirs: Words) -> Iterator[tuple[int, int]]:
    """(place in ours, place in theirs) of all candidates, each once, sorted."""
    found: set[tuple[int, int]] = set()
    for band in range(ours.shape[1]):
        order = np.argsort(theirs[:, band], kind="stable")
        column = theirs[order, band]
        low, high = (np.searchsorted(column, ours[:, band], side) for side in ("left", "right"))
        for i in np.nonzero(high > low)[0].tolist():
            found.update((i, j) for j in order[low[i] : min(high[i], low[i] + CROWDED)].tolist())
    yield from sorted(found)


def groups(signatures: Words) -> Iterator[NDArray[np.int64]]:
    """Places that share a band's key, two or more, ascending; a pair may come in several groups."""
    for band in range(signatures.shape[1]):
        order = np.argsort(signatures[:, band], kind="stable")
        column = signatures[order, band]
        cuts = np.nonzero(column[1:] != column[:-1])[0] + 1
        for group in np.split(order, cuts):
            if len(group) > 1:
                yield group
