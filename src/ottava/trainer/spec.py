"""The recipe's `train` section. Data only; every process of a run reads the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ottava.recipe import Frozen, Spec, earlier
from ottava.trainer import coming
from ottava.trainer.supervised import Fraction, Positive, Supervised

CONTEXT = 128
"""Ids that a tiny model holds."""

_TINY: dict[str, Any] = {
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "dtype": "bfloat16",
}
"""What every tiny model's config.json ends with: the ids are those of `models.chat.write_tiny`."""


class Shape(Frozen):
    """A DeepSeek-V3 architecture: MLA attention, first layer dense, then experts with one shared."""

    hidden: Positive = 64
    layers: Annotated[int, Field(ge=2)] = 2
    heads: Positive = 4
    dense_width: Positive = 192
    expert_width: Positive = 32
    experts: Annotated[int, Field(ge=2)] = 8
    active_experts: Positive = 2
    latent_rank: Positive = 32
    nope_dim: Positive = 16
    rope_dim: Positive = 16
    value_dim: Positive = 16

    @model_validator(mode="after")
    def _whole(self) -> Shape:
        if self.active_experts > self.experts:
            raise ValueError(f"{self.active_experts} active experts of {self.experts}")
        return self

    def config(self, vocabulary: int) -> dict[str, Any]:
        """The content of `config.json` for a vocabulary of so many ids."""
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "vocab_size": vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.dense_width,
            "moe_intermediate_size": self.expert_width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "n_routed_experts": self.experts,
            "n_shared_experts": 1,
            "num_experts_per_tok": self.active_experts,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
            "q_lora_rank": None,
            "kv_lora_rank": self.latent_rank,
            "qk_nope_head_dim": self.nope_dim,
            "qk_rope_head_dim": self.rope_dim,
            "v_head_dim": self.value_dim,
            **_TINY,
        }


class Dense(Frozen):
    """A dense architecture with grouped-query attention, as students have it: Qwen3's or Llama's."""

    family: Literal["qwen3", "llama"]
    hidden: Positive
    width: Annotated[int, Field(ge=1, description="of the feed-forward layers")]
    layers: Positive = 2
    heads: Positive = 4
    kv_heads: Positive = 2

    @model_validator(mode="after")
    def _whole(self) -> Dense:
        if self.hidden % (2 * self.heads) or self.heads % self.kv_heads:
            raise ValueError("hidden must be a multiple of twice the heads, and heads one of kv_heads")
        return self

    def config(self, vocabulary: int) -> dict[str, Any]:
        """The content of `config.json` for a vocabulary of so many ids."""
        return {
            "architectures": [{"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}[self.family]],
            "model_type": self.family,
            "vocab_size": vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "attention_bias": False,
            **_TINY,
        }


class Opening(Frozen):
    """`train.curriculum`: chains grow from `start` steps to the longest by `open_at`, from when all lengths are drawn
    alike. What `reinforce.curriculum` is, which questions are asked when, is another thing: `tasks.choose.Schedule`."""

    start: Positive = 3
    open_at: Fraction = 0.6


class Direct(Frozen):
    """Answers without reasoning, mixed in from a share of the run on."""

    batch: Annotated[int, Field(ge=1, description="per virtual shard")] = 8
    weight: Annotated[float, Field(ge=0)] = 0.5
    begin: Fraction = 0.5
    one_step: Fraction = 0.8


class Harvest(Frozen):
    """What a teacher is asked: `asks` problems with answers; of each the first right one of `samples` replies is kept.
    temperature 0: greedy."""

    asks: Positive = 4800
    samples: Positive = 1
    temperature: Annotated[float, Field(ge=0)] = 0.0


REPLY = 48
"""Ids that a direct reply may have where the recipe does not say: as `rollout.max_new`."""

GIVERS = frozenset({"label", "problems"})
"""Stages that give problems."""

MAKERS = frozenset({"start", "train", "reinforce"})
"""Stages that make a model, as recipes name them (a number after a dash is another round)."""


class FineTuning(Supervised):
    """What supervised fine-tuning needs, whatever the model."""

    curriculum: Opening = Opening()
    direct: Direct = Direct()
    batch: Annotated[int, Field(ge=1, description="thinking examples per virtual shard")] = 16
    mode: Annotated[
        Literal["thinking", "direct"],
        Field(description="direct: replies are learnt and asked without thinking, as all that some models know"),
    ] = "thinking"
    max_new: Annotated[
        Positive | None,
        Field(
            description="ids of a reply, harvested or evaluated; without it 48 directly, else by the prompt's length"
        ),
    ] = None

    @property
    def limit(self) -> int | None:
        """Ids of a reply; None: as `engine.evaluate` says."""
        return self.max_new or (REPLY if self.mode == "direct" else None)

    @model_validator(mode="after")
    def _known_of_traces(self) -> FineTuning:
        if self.mode == "direct" and self.go_no_go is not None:
            raise ValueError("go_no_go compares the losses of thinking traces: leave it out with mode: direct")
        return self


class TrainSpec(FineTuning):
    """Supervised fine-tuning, on both modes or on direct replies alone, ending on the grid."""

    shape: Shape | Dense = Shape()
    harvest: Annotated[
        Harvest | None, Field(description="learn from the model so far's own right replies, not from the cold start")
    ] = None
    min_thinking: Annotated[Fraction, Field(description="the verdict is no below this accuracy in `mode`")] = 0.0
    max_label_error: Annotated[
        float | None,
        Field(
            gt=0,
            le=1,
            description="what the data set's certificate must bound the share of wrong labels by; else none is wanted",
            exclude_if=lambda limit: limit is None,  # so that recipes of before keep their digests
        ),
    ] = None

    def unmet(self, name: str, stages: Mapping[str, Spec]) -> tuple[tuple[str, ...], str, str] | None:
        before = earlier(name, stages)
        made = [other for other in before if other.partition("-")[0] in MAKERS]
        if self.harvest is not None and not made:
            what = "there is no model before this stage whose replies could be harvested"
            return ("harvest",), what, "put it into a later round (train-2), or leave harvest out"
        came = "start" in before if self.harvest is not None else bool(made)
        if self.lora is not None and not came:
            return ("lora",), "adapters need a model to begin from", "add a `start` stage, or leave lora out"
        config = coming.so_far(before) if came else self.shape.config(0)
        return (
            self._uncertain(before)
            or (self._unknown(came) if "problems" in stages else None)
            or coming.unadaptable(self.lora, config)
            or coming.too_long(self.limit, config)
        )

    def _uncertain(self, before: Mapping[str, Spec]) -> tuple[tuple[str, ...], str, str] | None:
        """What no data set of this recipe could show of its labels."""
        if self.max_label_error is None:
            return None
        given = [spec for name, spec in before.items() if name.partition("-")[0] in GIVERS]
        audit = getattr(given[-1], "audit", None) if given else None
        if not isinstance(audit, int):
            what = "`problems` gives no certificate, so that nobody could say how wrong its answers are"
            return ("max_label_error",), what, "let a `label` stage give the problems, or leave max_label_error out"
        best = 1 - 0.05 ** (1 / audit)  # Clopper and Pearson's bound where none of them is wrong
        if getattr(given[-1], "policy", "audit") == "audit" and best > self.max_label_error:
            what = f"an audit of {audit} labels cannot show an error under {best:.1%}, even if all are right"
            return ("max_label_error",), what, "raise label.audit, or allow more"
        return None

    def _unknown(self, came: bool) -> tuple[tuple[str, ...], str, str] | None:
        """What is asked of the stage `problems`, which gives neither traces nor a vocabulary."""
        if not came:
            what = "`problems` gives no vocabulary, so a fresh model would have no tokenizer"
            return (), what, "add a `start` stage, or let a `label` stage give the problems"
        if self.harvest is None and self.mode == "thinking":
            what = "`problems` gives answers and no traces, so there is no thinking to learn from"
            return (), what, (
                "set `harvest` (the model's own right replies), or mode: direct (the answers alone), or let a `label` "
                "stage give the problems"
            )  # fmt: skip
        return None
