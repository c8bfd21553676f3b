"""A tensor that differs, taken apart, and the question whether a prediction is what the faulty file holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from ottava.fp8.spec import BLOCK
from ottava.verify.side import Form, Side, same

Prediction = Callable[[int], Tensor | None]
Hypotheses = Iterator[Prediction]

PARTS = (2, 3, 4, 6, 8, 16)
"""Into how many tensor-parallel shards a tensor may have been cut."""


@dataclass
class Case:
    """A tensor that differs: `good` is taken to be sound, `bad` faulty. bands: those whose hashes differ."""

    good: Side
    bad: Side
    bands: list[int]

    @cached_property
    def form(self) -> Form | None:
        """Codes and scales of the sound side."""
        return self.good.form(self.bad)

    @cached_property
    def forms(self) -> list[Form]:
        """The sound side's form at each size of block in which the fault may have happened."""
        if self.form is None:
            return []
        fine = self.form.fine(self.good.rows, self.good.columns)
        only_coarse = self.bad.coded and self.bad.weight.block[0] == BLOCK
        found = [self.form.coarse(), None if only_coarse else fine]
        return [form for form in found if form is not None] or [self.form]

    def fits(self, predict: Prediction) -> bool:
        """Whether a prediction is what the faulty file holds, in every band."""
        rest = [band for band in range(self.bad.bands) if band not in set(self.bands)]
        for band in [*self.bands, *rest]:
            made, found = predict(band), self.bad.values(band)
            if made is None or made.shape != found.shape:
                return False
            if not same(self.bad.held(made), found):
                return False
        return True
