"""The recipe's `train` section. Data only; every process of a run reads the same."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ottava.recipe import Frozen
from ottava.trainer.supervised import Fraction, Positive, Supervised

_TINY: dict[str, Any] = {
    "max_position_embeddings": 128,
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


class Curriculum(Frozen):
    """Chains grow from `start` steps to the longest by `open_at`, from when all lengths are drawn alike."""

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


class FineTuning(Supervised):
    """What supervised fine-tuning on both modes needs, whatever the model."""

    curriculum: Curriculum = Curriculum()
    direct: Direct = Direct()
    batch: Annotated[int, Field(ge=1, description="thinking examples per virtual shard")] = 16


class TrainSpec(FineTuning):
    """Supervised fine-tuning on both modes, ending on the grid."""

    shape: Shape | Dense = Shape()
    harvest: Annotated[
        Harvest | None, Field(description="learn from the model so far's own right replies, not from the cold start")
    ] = None
    min_thinking: Annotated[Fraction, Field(description="the verdict is no below this thinking accuracy")] = 0.0
