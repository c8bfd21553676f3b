"""What a virtual shard adds to a step: the one thing in which kinds of training differ.

Everything else (the state, the fixed sum, optimisers, checks, supervision) is the same for all of them. An objective
holds nothing that a restart could lose: what it returns is a function of the model, the step and the shard.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn


class Objective(Protocol):
    """columns: names of the sums over shards that travel with the gradient; the first is the loss that is judged.

    drawn: whether that loss is how far the model is from another one on its own draws, and not a surprise at what it
    was given: then single losses cannot be compared (`guard.check_drawn`).
    """

    drawn: bool = False

    @property
    def columns(self) -> tuple[str, ...]: ...

    def begins(self, step: int) -> bool:
        """Whether what a step needs takes longer than a step to prepare. The same for all workers."""
        return False

    def gate(self, model: nn.Module) -> Mapping[str, Any] | None:
        """Before the first step of a start, on its forward weights: what is to be told of it. Raises Alarm."""
        return None

    def prepare(
        self, model: nn.Module, step: int, shards: range, policy: Callable[[], str]
    ) -> Mapping[str, Any] | None:
        """Have at hand what the shards of a step need; what the other workers must know of it, as JSON, or None.

        All workers return None in the same steps. policy: the digest of the state that the step begins from.
        """
        return None

    def settle(self, step: int, facts: Sequence[Mapping[str, Any]]) -> None:
        """Take what all workers said of a step, by rank."""
        return None

    def canonical(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """As `loss`, of a shard that needs nothing prepared: by it numerics classes are told apart."""
        return self.loss(model, 0, 0)

    def loss(self, model: nn.Module, step: int, number: int) -> tuple[Tensor, Tensor]:
        """Of virtual shard `number` in a step: its part of the loss, to be differentiated, and of the columns [C].

        The parts of all shards add up to those of the whole step.
        """

    def told(self, step: int, sums: Mapping[str, float]) -> dict[str, float]:
        """What is said of a step, from the columns' sums over all shards."""

    def kind(self, step: int) -> Hashable:
        """Losses of steps of one kind are compared with each other."""

    def most(self, sums: Mapping[str, float], words: int) -> float:
        """What the loss of a sound step is hardly above: guessing among so many words. sums: the step's columns."""
        return math.log(words)

    def balances(self, step: int) -> bool:
        """Whether the routers' bias, where it is not frozen, moves at the end of a step."""
        return True
