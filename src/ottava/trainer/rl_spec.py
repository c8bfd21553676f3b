"""The recipe's `reinforce` section."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ottava.recipe import Frozen, Spec, earlier
from ottava.tasks.choose import Schedule
from ottava.trainer import coming
from ottava.trainer.supervised import Drift, Fraction, Optimiser, Positive, Rate, Supervised

Loss = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo"]
Mode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]

PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dr_grpo": {"scaling": "none"},
    "dapo": {"clip_high": 0.28, "resample": 3, "overlong": 0.2},
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": {"cap": 5.0},
}
"""What each algorithm was published with; a recipe's own words come before it. Where ours differs, it says so.

grpo: TRL's defaults; DeepSeekMath (arXiv 2402.03300) had a KL term with beta .04 and R1 (2501.12948) one with .001.
dr_grpo: 2503.20783, sec. 3.2, which changes the scaling and the averaging and no other number; beta 0 as there.
dapo: 2503.14476, sec. 4.1: clip .2 and .28; a cache of 4,096 in 20,480 tokens is the share .2. The paper draws until no
group is flat, verl's recipe stops the run after 10 rounds without, and here what is flat after `resample` further ones
stays in. Filtering of overlong replies is off, as in verl's reproduction; TRL's documentation turns it on.
gspo: 2507.18071, sec. 5.1: 3e-4 and 4e-4, of four updates to a generation (rollout.minibatches: 4); beta 0.
cispo: MiniMax-M1 (2506.13585) tells no cap; 5 is ScaleRL's (2510.13786), which also scales by the batch (scaling:
batch, as TRL's documentation has it); here the scaling is the group's, as in MiniMax-M1.
How a loss is averaged over tokens is part of the loss: `trainer.losses`.
"""


class CorrectionSpec(Frozen):
    """How a reply counts that came from an engine which is not the learner: w = exp(l_old - l_sampler).

    token_truncate: w clamped to [low, high] (TIS, verl #2953); token_mask: w, or 0 outside (IcePop); sequence_*: the
    same with the product over the reply's tokens (sequence_mask with high = 3 is TRL's default). counted: whether
    tokens with w = 0 stay in the mask, and so in what the loss is divided by, as in TRL; otherwise they are no part
    of the reply any more (slime #657), and `losses.Scale` has to be taken from the new mask.
    """

    mode: Mode = "sequence_mask"
    low: Annotated[float, Field(ge=0, le=1)] = 0.0
    high: Annotated[float, Field(ge=1)] = 3.0
    counted: Annotated[bool, Field(description="rejected ids stay in what the loss is divided by")] = True


class PolicySpec(Frozen):
    """Which loss (`trainer.losses`), and its numbers. What is not said has the loss's own defaults (PRESETS).

    clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high] (not cispo). cap: cispo's bound on the
    ratio itself. two_sided: a bound > 1 + clip_high on the ratio where A < 0 (INTELLECT-2, arXiv 2505.07291; TRL's
    delta), or none.
    """

    loss: Loss = "grpo"
    clip_low: Annotated[float, Field(ge=0, le=1)] = 0.2
    clip_high: Annotated[float, Field(ge=0)] = 0.2
    cap: Annotated[float, Field(gt=0)] = 5.0
    two_sided: float | None = None
    beta: Annotated[float, Field(ge=0, description="weight of the KL to the model that came in")] = 0.0
    unbiased: Annotated[bool, Field(description="DeepSeek-V3.2's estimate of that KL instead of Schulman's k3")] = True
    off_policy_delta: Annotated[
        float | None, Field(ge=0, description="replies not to be made likelier that drifted by more nats an id: out")
    ] = None
    scaling: Annotated[
        Literal["group", "batch", "none"], Field(description="what a reward's distance from its group's mean is over")
    ] = "group"
    resample: Annotated[
        int, Field(ge=0, description="rounds of further draws in place of groups whose verdicts are all equal")
    ] = 0
    overlong: Annotated[
        Fraction, Field(description="over this last share of max_new a reward falls, by 0.5 at the end: DAPO's 1 of 2")
    ] = 0.0
    filter_overlong: Annotated[bool, Field(description="nobody learns from replies that were cut off")] = False
    keep_mask: Annotated[bool, Field(description="with top_p, the learner renormalises over the ids kept then")] = True
    keep_routing: Annotated[bool, Field(description="ids go to the experts that the engine sent them to")] = False
    correction: CorrectionSpec | None = None

    @model_validator(mode="before")
    @classmethod
    def _published(cls, said: Any) -> Any:
        return {**PRESETS.get(str(said.get("loss")), {}), **said} if isinstance(said, dict) else said

    @model_validator(mode="after")
    def _two_sided(self) -> PolicySpec:
        if self.two_sided is not None and (self.loss == "cispo" or self.two_sided <= 1 + self.clip_high):
            raise ValueError(
                f"two_sided bounds the ratio beyond clip_high: more than {1 + self.clip_high:g}, not cispo"
            )
        return self


class EngineSpec(Frozen):
    """An engine of its own that draws the replies: see `engine.remote`."""

    url: Annotated[str, Field(pattern="^https?://", description="without /v1")]
    folder: Annotated[str, Field(min_length=1, description="where weights are handed over, seen by both sides")]
    layout: Literal["bf16", "e8m0"] = "bf16"
    dtype: Annotated[Literal["float32", "bfloat16"], Field(description="what the engine computes in")] = "bfloat16"


class RolloutSpec(Frozen):
    """What a generation draws. prompts: of each virtual shard; group: replies to each."""

    prompts: Positive = 16
    group: Annotated[int, Field(ge=2)] = 8
    temperature: Annotated[float, Field(gt=0)] = 1.5
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new: Positive = 48
    updates: Annotated[int, Field(ge=1, description="passes over a generation's replies")] = 2
    minibatches: Annotated[int, Field(ge=1, description="parts of a pass, one update each")] = 1
    engine: Annotated[EngineSpec | None, Field(description="who draws, where it is not the learner itself")] = None


class PolicyOptimiser(Optimiser):
    """AdamW for everything, at a small constant rate; routers are frozen.

    router_bias above 0 is an ablation: it then moves between generations, by the loads of the last update's replies.
    """

    matrices: Literal["muon", "adam"] = "adam"
    adam: Rate = 5e-4
    embedding: Rate = 5e-4
    warmup: Positive = 1
    decay_from: Fraction = 1.0
    router_bias: Annotated[float, Field(ge=0, description="step of the router's correction bias; 0: frozen")] = 0.0


class Divergence(Frozen):
    """How far a student's distribution is from its teacher's: see `trainer.divergences`.

    gkd needs one vocabulary; uld and alm compare what two tokenizers make of one text.
    """

    kind: Literal["gkd", "uld", "alm"] = "gkd"
    beta: Annotated[
        float, Field(ge=0, le=1, description="1: KL(student, teacher); 0: KL(teacher, student); between: both to a mix")
    ] = 1.0
    temperature: Annotated[float, Field(gt=0)] = 1.0

    @model_validator(mode="after")
    def _its_own(self) -> Divergence:
        if self.kind != "gkd" and self.beta != 1.0:
            raise ValueError(f"beta is gkd's; {self.kind} has none")
        return self


class ReinforceSpec(Supervised):
    """Reinforcement from verified answers. steps: updates; a generation of rollouts serves `every` of them."""

    optimiser: PolicyOptimiser = PolicyOptimiser()
    steps: Positive = 300
    grid_from: Annotated[float, Field(ge=0, le=1)] = 0.0
    policy: PolicySpec = PolicySpec()
    rollout: RolloutSpec = RolloutSpec()
    mode: Annotated[
        Literal["thinking", "direct"],
        Field(description="how the questions are asked; direct is all that a model without a thinking switch knows"),
    ] = "thinking"
    lengths: Annotated[tuple[Positive, ...], Field(description="levels that are asked, all alike; none: all")] = ()
    curriculum: Annotated[
        Schedule | None,
        Field(
            description="which questions are asked when, and which more; without it, all of a level alike",
            exclude_if=lambda said: said is None,  # runs without one keep their names
        ),
    ] = None
    drift: Drift = Drift(window=8)
    min_thinking: Annotated[Fraction, Field(description="the verdict is no below this accuracy in `mode`")] = 0.0

    @property
    def every(self) -> int:
        """Updates of one generation."""
        return self.rollout.updates * self.rollout.minibatches

    @property
    def levels(self) -> tuple[int, ...]:
        """The levels that are asked at any time; none: all that there are."""
        return self.curriculum.asked if self.curriculum is not None and self.curriculum.stretches else self.lengths

    @model_validator(mode="after")
    def _whole(self) -> ReinforceSpec:
        if self.rollout.prompts % self.rollout.minibatches:
            raise ValueError("rollout.minibatches must divide rollout.prompts")
        if self.rollout.engine is not None and (self.rollout.top_p < 1 or self.grid_from > 0):
            raise ValueError("rollout.engine needs rollout.top_p: 1 (kept ids are not told) and grid_from: 0")
        if self.rollout.engine is not None and self.policy.keep_routing:
            raise ValueError("policy.keep_routing needs routes, and rollout.engine tells none: leave one of them out")
        return self

    def without(self, there: Sequence[int]) -> tuple[str, str, str] | None:
        """Whether a level is asked that is none of those that are there: (the field, what is wrong, how to mend it)."""
        missing = next((level for level in self.levels if level not in there), None)
        if missing is None:
            return None
        field = "lengths" if self.lengths else "curriculum.stretches"
        what = f"there are no problems of {missing} steps to ask; there are those of {', '.join(map(str, there))}"
        return field, what, f"ask for other levels in {field}, or let the stage with the problems make such ones"

    def unmet(self, name: str, stages: Mapping[str, Spec]) -> tuple[tuple[str, ...], str, str] | None:
        before = earlier(name, stages)
        return self.unfit(before, coming.so_far(before))

    def unfit(self, before: Mapping[str, Spec], config: coming.Config | None) -> coming.Unmet | None:
        """As `unmet`, for a model with this config, where that is known before it is there. Whether replies fit
        behind their questions is seen where the stage starts (`trainer.asking`)."""
        given = before.get("problems") or before.get("label")
        missing = None if given is None else self.without(getattr(given, "levels", self.levels))
        if missing is not None:
            field, what, fix = missing
            return tuple(field.split(".")), what, fix
        return coming.too_long(self.rollout.max_new, config, ("rollout", "max_new")) or coming.unadaptable(
            self.lora, config
        )

    @model_validator(mode="after")
    def _asked_at_some_time(self) -> ReinforceSpec:
        stretches = () if self.curriculum is None else self.curriculum.stretches
        if stretches and self.lengths:
            raise ValueError("curriculum.stretches say which levels are asked: leave lengths out (lengths: [])")
        begun, earlier = [step / self.steps for step in range(0, self.steps, self.every)], 0.0
        for stretch in stretches:
            if not any(earlier <= done < stretch.until for done in begun):
                what = f"no generation begins in the stretch until {stretch.until:g} of the curriculum"
                raise ValueError(f"{what}: {self.steps} steps have {len(begun)} generations")
            earlier = stretch.until
        return self


class OnPolicySpec(ReinforceSpec):
    """Distillation on the student's own replies. Verdicts are told and teach nothing; the teacher does, at every id."""

    divergence: Divergence = Divergence()
