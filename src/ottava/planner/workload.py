"""What is to be computed, on what, how: the question that `predict` answers.

The names in files are short, as in fleets/published_runs.json (`n`, `seq`, `gbs`, `L`, `h`); in code they are words.
Both are accepted in files.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator

from ottava.planner.quantity import Count, Number, Positive, plain
from ottava.recipe import Frozen

Share = Annotated[float, BeforeValidator(plain), Field(ge=0, le=1)]
Precision = Literal["bf16", "fp16", "fp8", "mxfp8", "int8"]
Recompute = Literal["none", "selective", "full"]
Kind = Literal["train", "rl", "distill", "serve"]


class Named(Frozen):
    """A part of a workload whose keys in files may be short or words."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)


class Latent(Named):
    """Multi-head latent attention (arXiv 2405.04434, section 2.1): ranks of queries and keys, widths of a head."""

    query_rank: Count = Field(alias="q")
    key_rank: Count = Field(alias="kv")
    plain: Count = Field(alias="nope")
    rotary: Count = Field(alias="rope")
    value: Count = Field(alias="v")


class Experts(Named):
    """A mixture of experts: how many, how many a token meets, how many all tokens meet, their width, and how many
    layers before them are dense."""

    count: Count = Field(alias="E")
    chosen: Count = Field(alias="k")
    shared: Number = Field(0, alias="sh")
    width: Count = Field(alias="ffn")
    dense: Number = 0

    @model_validator(mode="after")
    def _possible(self) -> Experts:
        if self.chosen > self.count:
            raise ValueError(f"a token cannot meet {self.chosen} of {self.count} experts")
        return self


class Model(Named):
    """A decoder's shape. window: (tokens, share of the layers that see no further); depth_heads: layers that predict a
    second token (multi-token prediction), each with the head once more."""

    layers: Count = Field(alias="L")
    hidden: Count = Field(alias="h")
    heads: Count
    kv_heads: Count = Field(alias="kv")
    head_width: Count = Field(alias="hd")
    width: Number = Field(alias="ffn")
    gated: bool = Field(alias="glu")
    vocabulary: Count = Field(alias="vocab")
    tied: bool = False
    latent: Latent | None = Field(None, alias="mla")
    experts: Experts | None = Field(None, alias="moe")
    depth_heads: Number = Field(0, alias="mtp")
    window: tuple[Count, Share] | None = Field(None, alias="swa")

    @model_validator(mode="after")
    def _possible(self) -> Model:
        if self.experts is not None and self.experts.dense > self.layers:
            raise ValueError(f"{self.experts.dense} dense layers in a model of {self.layers}")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} keys evenly")
        return self

    @property
    def sparse_layers(self) -> int:
        """Layers with experts."""
        return 0 if self.experts is None else self.layers - self.experts.dense

    @property
    def qk_width(self) -> int:
        """Width of a head's query."""
        return self.head_width if self.latent is None else self.latent.plain + self.latent.rotary

    @property
    def value_width(self) -> int:
        """Width of a head's value."""
        return self.head_width if self.latent is None else self.latent.value

    def attention_parameters(self) -> int:
        """Of one layer's attention."""
        h, one = self.hidden, self.latent
        if one is None:
            return h * self.head_width * (2 * self.heads + 2 * self.kv_heads)
        queries = h * one.query_rank + one.query_rank * self.heads * self.qk_width
        keys = h * (one.key_rank + one.rotary) + one.key_rank * self.heads * (one.plain + one.value)
        return queries + keys + self.heads * one.value * h

    def mlp_parameters(self, width: int) -> int:
        """Of one MLP of this width."""
        return (3 if self.gated else 2) * self.hidden * width

    def expert_parameters(self) -> int:
        """Of all routed experts of all layers."""
        one = self.experts
        return 0 if one is None else self.sparse_layers * one.count * self.mlp_parameters(one.width)

    def parameters(self) -> int:
        """All of them, with embedding and head, without biases and norms."""
        shared = 0 if self.experts is None else self.experts.shared * self.mlp_parameters(self.experts.width)
        dense = self.layers - self.sparse_layers
        layers = self.layers * self.attention_parameters() + dense * self.mlp_parameters(self.width)
        tables = self.hidden * self.vocabulary * (1 if self.tied else 2)
        return layers + self.sparse_layers * shared + self.expert_parameters() + tables + self._depth()[0]

    def active(self) -> int:
        """Those that a token passes in training: the head once, the embedding not."""
        one = self.experts
        met = 0 if one is None else (one.chosen + one.shared) * self.mlp_parameters(one.width)
        dense = self.layers - self.sparse_layers
        layers = self.layers * self.attention_parameters() + dense * self.mlp_parameters(self.width)
        return layers + self.sparse_layers * met + self.hidden * self.vocabulary + self._depth()[1]

    def _depth(self) -> tuple[int, int]:
        """Parameters that multi-token prediction adds: all, and those that a token passes (its head is the model's)."""
        one, h = self.experts, self.hidden
        held = (
            self.mlp_parameters(self.width)
            if one is None
            else self.mlp_parameters(one.width) * (one.count + one.shared)
        )
        met = (
            self.mlp_parameters(self.width)
            if one is None
            else self.mlp_parameters(one.width) * (one.chosen + one.shared)
        )
        layer = self.attention_parameters() + 2 * h * h
        return self.depth_heads * (layer + held), self.depth_heads * (layer + met + h * self.vocabulary)

    def attended(self, sequence: int) -> float:
        """Positions that a token attends to, the mean over positions and layers (causal)."""
        whole = sequence / 2
        if self.window is None:
            return whole
        size, share = self.window
        local = whole if size >= sequence else size - size * size / (2 * sequence)
        return share * local + (1 - share) * whole

    def attention_flops(self, sequence: int) -> float:
        """Forward FLOPs of a token in scores and their products with values, over all layers."""
        return 2 * self.layers * self.heads * (self.qk_width + self.value_width) * self.attended(sequence)

    def flops_per_token(self, sequence: int) -> float:
        """Training FLOPs of a token (forward once, backward twice; causal attention; no recomputation)."""
        return 3 * (2 * self.active() + self.attention_flops(sequence))


class Layout(Named):
    """How the chips share the work. virtual: pipeline stages a chip holds; -1 stands for a schedule without a bubble of
    note (DualPipe, zero-bubble); micro: sequences in a micro-batch. Data parallelism is what is left of the chips."""

    tensor: Count = Field(1, alias="tp")
    pipeline: Count = Field(1, alias="pp")
    virtual: Annotated[int, BeforeValidator(plain)] = Field(1, alias="vpp")
    expert: Count = Field(1, alias="ep")
    context: Count = Field(1, alias="cp")
    micro: Count = Field(1, alias="mbs")

    @field_validator("virtual")
    @classmethod
    def _some(cls, value: int) -> int:
        if value == 0 or value < -1:
            raise ValueError("1 or more, or -1 for a schedule almost without a bubble")
        return value

    @property
    def size(self) -> int:
        """Chips that hold one copy of the model without its experts."""
        return self.tensor * self.pipeline * self.context


class Rollout(Named):
    """The side of reinforcement or distillation that generates. tokens_per_s_per_chip: measured; without it the
    published profiles are searched. length: generated tokens of a reply; prompt: before it."""

    chip: str
    chips: Count = Field(alias="n")
    length: Count
    prompt: Count = 1
    precision: Precision = "bf16"
    tokens_per_s_per_chip: Positive | None = None
    model: Model | None = None
    overlapped: bool = False


class Workload(Named):
    """Work on chips of one kind. batch: sequences an optimiser step sees, over all chips; scope: one step, or a whole
    run with its interruptions; network_gbps: of the cluster, per chip, where it is not the chip's usual one; site: the
    cluster or publication whose other runs the calibration may know. Of serving: phase, context (tokens in the cache),
    batch_per_chip, expert, and measured: tokens/s and chip of one's own profile of the same work.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, protected_namespaces=())

    id: str
    kind: Kind = "train"
    model: Model
    model_name: str | None = None
    site: str | None = None
    chip: str
    chips: Count = Field(1, alias="n")
    network_gbps: Positive | None = Field(None, alias="net_gbps")
    sequence: Count = Field(4096, alias="seq")
    batch: Count = Field(1, alias="gbs")
    layout: Layout | None = Field(None, alias="parallel")
    precision: Precision = "bf16"
    recompute: Recompute = "none"
    stack: str = "megatron"
    scope: Literal["step", "run"] = "step"
    flash: bool = Field(True, alias="flash_attention")
    overlap: bool = Field(False, alias="overlap_ep")
    balanced: bool = Field(False, alias="balanced_experts")
    tokens: Positive | None = None
    rollout: Rollout | None = None
    phase: Literal["prefill", "decode"] | None = None
    context: Count | None = Field(None, alias="kv")
    batch_per_chip: Positive | None = None
    expert: Count | None = Field(None, alias="ep")
    measured: Positive | None = None

    @model_validator(mode="before")
    @classmethod
    def _unset(cls, data: Any) -> Any:
        if isinstance(data, dict):  # null in a file says: not known
            return {key: value for key, value in data.items() if value is not None}
        return data
