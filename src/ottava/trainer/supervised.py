"""What every supervised run is, whatever it learns: steps and shards, optimisers, and how it is looked after."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ottava import recipe
from ottava.checkpoint.names import Precision
from ottava.document import suggest
from ottava.recipe import Frozen

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0, le=100)]

Phase = Literal[
    "join", "load", "rollout", "forward", "reduce", "update", "snapshot", "kept", "look",
    "save:payload", "save:fsync:payload", "save:manifest", "save:fsync:manifest", "save:fsync:folder", "save:rename",
    "save:fsync:root",
]  # fmt: skip
"""What a worker does, in order: it tells its supervisor, and a fault may strike there. save: of a durable state."""

FaultKind = Literal[
    "sigkill", "sigstop", "sleep", "error", "nan", "spike", "flip", "gradient", "memory", "clock", "full"
]
"""Faults that a worker commits against itself; `supervisor.drill` has others that come from outside."""


class Fault(Frozen):
    """A fault to inject: the run must survive it, or stop with the right words. It comes once, unless it is sticky.

    at_step: strikes in the step that follows this many kept ones, or right after the last of them (phase kept); a fault
    in join or load strikes at the first start from there on, one in a save at the first save. rank: the chip, by its
    number in the pool. pool: None means whichever runs then. bits: how many are flipped. seconds: how long it sleeps,
    or how far its clock jumps. sticky: it stays with the chip, step after step.
    """

    pool: str | None = None
    at_step: Annotated[int, Field(ge=0)] = 1
    rank: Annotated[int, Field(ge=0)] = 0
    kind: FaultKind = "sigkill"
    phase: Phase = "kept"
    target: Literal["weights", "momentum", "first", "second", "bias"] = "weights"
    bits: Positive = 1
    seconds: float = 3600.0
    sticky: bool = False


class Audit(Frozen):
    """Sampled recomputation against silent corruption. share: of the steps on which every worker's gradient is
    computed again by another worker, bit for bit; 0 turns it off. seed: which steps, beside the run's own seed."""

    share: Fraction = 0.02
    seed: Annotated[int, Field(ge=0)] = 0


class Spike(Frozen):
    """A loss this many nats above that of guessing is a spike; so is one this many nats, and this many spreads, above
    the median of the last `window` of its kind (chains of the same length)."""

    nats: Annotated[float, Field(gt=0)] = 2.0
    spreads: Annotated[float, Field(gt=0)] = 8.0
    window: Annotated[int, Field(ge=4)] = 16


class Drift(Frozen):
    """How the fallback's drift is judged: steps after the hand-off, and perturbed replicas for the envelope."""

    window: Positive = 24
    replicas: Annotated[int, Field(ge=3)] = 5


class GoNoGo(Frozen):
    """Checkpoints at which the run is held against a baseline by a sequential test (`verify.sequential`).

    The score of an example is the mean cross-entropy of its reply's tokens, in nats, at most `bound`; an example is a
    test problem with the task's own trace. The run is to be no worse than the baseline by more than `margin`.
    """

    baseline: Annotated[
        str, Field(min_length=1, description="a model's folder in any layout, a stage's artifact, or a run's folder")
    ]
    every: Annotated[Positive | None, Field(description="look after every so many steps")] = None
    at: Annotated[tuple[Positive, ...], Field(description="or after these steps")] = ()
    examples: Annotated[int, Field(ge=1, le=4096, description="held-out examples of a look")] = 100
    margin: Annotated[float, Field(ge=0, description="nats per token of the reply")] = 0.1
    alpha: Annotated[
        float, Field(gt=0, lt=1, description="largest probability of stopping a run that never was beyond the margin")
    ] = 0.05
    bound: Annotated[float, Field(gt=0, description="nats per token; a higher loss counts as this")] = 4.0
    reused: Annotated[bool, Field(description="the looks share their examples instead of having new ones")] = False
    on_stop: Literal["stop", "warn"] = "stop"

    @model_validator(mode="after")
    def _consistent(self) -> GoNoGo:
        if (self.every is None) == (not self.at):
            raise ValueError("say when to look: either `every` so many steps, or `at` which steps")
        if list(self.at) != sorted(set(self.at)):
            raise ValueError("`at` names steps in ascending order, each once")
        if self.margin >= self.bound:
            raise ValueError(f"the margin ({self.margin:g}) must be below the bound of the loss ({self.bound:g})")
        return self


class Optimiser(Frozen):
    """Muon for matrices, AdamW for the rest. Rates are peaks; warm-up in steps, decay from a share of the run.

    matrices: adam where AdamW is to update them too, as small changes of a trained model need.
    """

    matrices: Literal["muon", "adam"] = "muon"
    muon: Rate = 0.02
    muon_momentum: float = 0.95
    muon_decay: float = 1.0
    adam: Rate = 3e-3
    embedding: Rate = 2.1e-2
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0
    warmup: Positive = 20
    decay_from: Fraction = 0.6
    floor: Fraction = 0.02
    router_bias: Annotated[float, Field(ge=0, description="step of the router's correction bias")] = 1e-3


class Lora(Frozen):
    """Adapters of low rank on some matrices of the model that comes in; everything else stays as it is.

    targets: the last part of the layers' names. The adapted matrix is W + alpha / rank * B A.
    """

    rank: Positive = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("q_proj", "v_proj")


class Supervised(recipe.Spec):
    """A stage that trains under the supervisor. Sections of kinds of training add what they learn from."""

    optimiser: Optimiser = Optimiser()
    lora: Annotated[Lora | None, Field(description="train adapters instead of the model's own weights")] = None
    steps: Positive = 900
    virtual_shards: Annotated[int, Field(ge=1, description="slices of the global batch; a power of two")] = 2
    grid_from: Annotated[
        float, Field(ge=0, le=1, description="share of the run from which weights lie on the grid")
    ] = 0.85
    precision: Annotated[
        Precision,
        Field(description="of forward and backward passes; fp8 is on the grid from the first step (grid_from: 0)"),
    ] = "float32"
    fault: Fault | None = None
    audit: Audit = Audit()
    spike: Spike = Spike()
    restarts: Annotated[int, Field(ge=0, description="restarts on one pool before the run falls back")] = 2
    hang_s: Annotated[
        float, Field(gt=0, description="seconds without a step that count as a hang while step times are unknown")
    ] = 60.0
    hang_least_s: Annotated[
        float, Field(gt=0, description="later 3 times the 99th percentile of the steps' times, but no less than this")
    ] = 10.0
    leave_stragglers: Annotated[
        bool, Field(description="go on without a worker that is far slower than the others; else only say so")
    ] = False
    checkpoint_every: Positive = 100
    drift: Drift = Drift()
    go_no_go: GoNoGo | None = None

    def misfit(self, fleet: recipe.Fleet) -> tuple[tuple[str, ...], str, str] | None:
        if self.fault is None:
            return None
        names = [pool.name for pool in fleet.pools]
        if self.fault.pool not in (None, *names):
            what = f"the fault is planned on the pool {self.fault.pool!r}, which the fleet has not"
            return ("fault", "pool"), what, suggest(self.fault.pool or "", names)
        most = max(pool.workers for pool in fleet.pools if self.fault.pool in (None, pool.name))
        if self.fault.rank >= most:
            what = f"the fault is planned on rank {self.fault.rank}, and no such worker will be there"
            return ("fault", "rank"), what, f"ranks are 0 to {min(most, self.virtual_shards) - 1}"
        return None

    @property
    def looks(self) -> tuple[int, ...]:
        """The steps after which the run is held against its baseline, ascending."""
        if self.go_no_go is None:
            return ()
        every = self.go_no_go.every
        return self.go_no_go.at if every is None else tuple(range(every, self.steps + 1, every))

    @model_validator(mode="before")
    @classmethod
    def _from_the_first_step(cls, said: Any) -> Any:
        on_grid = isinstance(said, dict) and said.get("precision") == "fp8"
        return {"grid_from": 0.0, **said} if on_grid else said

    @model_validator(mode="after")
    def _consistent(self) -> Supervised:
        if self.precision == "fp8" and self.grid_from > 0:
            raise ValueError("precision: fp8 multiplies the grid's codes from the first step: leave grid_from out")
        if self.precision != "float32" and self.lora is not None:
            raise ValueError("adapters (lora) are trained in float32: leave precision out")
        if self.virtual_shards & (self.virtual_shards - 1):
            raise ValueError("virtual_shards must be a power of two")
        if self.lora is not None and self.grid_from < 1:
            raise ValueError("adapters are not trained on the grid: set grid_from: 1; conversion rounds their sum")
        if self.fault is not None and self.fault.at_step + self.drift.window >= self.steps:
            raise ValueError("fault.at_step + drift.window must lie before the last step")
        if self.go_no_go is not None and (not self.looks or self.looks[-1] > self.steps):
            raise ValueError(f"go_no_go looks after the last step, which is {self.steps}")
        return self
