"""The same forward pass as Hugging Face's, written for generating many rows at once.

Rollouts are most of what reinforcement computes, and a cache of full keys and values is most of what they wait for.
So DeepSeek-V3's attention is computed in the latent space that it caches (the "absorbed" form of DeepSeek-V2,
arXiv 2405.04434, section 2.1.2), grouped queries share their key head's product, and few experts are one matrix.

The weights are the model's own parameters, read anew at each `start`: there is no copy that could be stale, and no
two weights are multiplied in advance, because a product of two matrices on the grid is not on the grid. Layers that
multiply FP8 codes (`models.precision`) do so here too, but for the latent's, whose product with kv_b is absorbed.

A row's column in the cache is its position. Prompts of unequal length are padded on the right: what the padding left
in a column is overwritten before a row ever looks at it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ottava.fp8.training import ScaledLinear

FEW_EXPERTS = 16
"""Up to so many experts, computing all of them for every token is faster than sorting tokens by expert."""

FIXED_ROPE = ("default", "linear", "yarn", "llama3")  # their frequencies do not change with the length


class Decoder(Protocol):
    """A model and its cache, advancing a batch of rows. `ragged`: whether prompts may differ in length."""

    ragged: bool

    def start(self, rows: int, width: int) -> None:
        """Begin a new batch with an empty cache: so many rows, each of at most `width` positions."""

    def step(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits [B, V] after the last id of each row; the cache grows by the ids [B, T].

        lengths: how many of a row's T ids are its own (int64 [B]; the rest is padding); None: all.
        """

    def logits(self, ids: Tensor) -> Tensor:
        """As a step of right-padded rows, but logits [B, T, V] after every id; the batch ends with it."""

    def select(self, rows: Tensor) -> None:
        """Go on with these rows of the batch (int64): others are left out, some may be repeated."""

    def routes(self) -> Tensor | None:
        """The experts chosen for the ids of the last step, int64 [B, T, expert layers, k]; None without experts."""


def decoder(model: nn.Module) -> Bare | None:
    """The decoder of a DeepSeek-V3, Llama or Qwen3 model; None for others, and for variants it does not compute.

    Those are: frequencies that change with the length, sliding windows, an MLA whose kv_b_proj is no plain matrix
    (FP8 kernels, adapters), a model inside another. Adapters on other projections are used as they are.
    """
    config: Any = getattr(model, "config", None)
    family = getattr(config, "model_type", None)
    if family not in ("deepseek_v3", "llama", "qwen3") or not hasattr(getattr(model, "model", None), "layers"):
        return None
    if (config.rope_parameters or {}).get("rope_type", "default") not in FIXED_ROPE:
        return None
    layers = _layers(model)
    if family == "deepseek_v3":
        if any(type(layer.self_attn.kv_b_proj) not in (nn.Linear, ScaledLinear) for layer in layers):
            return None
        return Bare(model, [_Latent(layer.self_attn, config) for layer in layers])
    if any(getattr(layer.self_attn, "sliding_window", None) is not None for layer in layers):
        return None
    return Bare(model, [_Grouped(layer.self_attn) for layer in layers])


class Bare:
    """The Decoder of the families above. One batch at a time; not for several threads."""

    ragged = True

    def __init__(self, model: nn.Module, attentions: Sequence[_Latent | _Grouped]):
        self._model: Any = model
        self._attentions = attentions
        self._layers = _layers(model)
        self._lengths = torch.zeros(0, dtype=torch.int64)
        self._even = True  # all rows have the same length
        self._end = 0  # the length of the longest row
        self._routes: list[Tensor] = []
        self._tables = (torch.zeros(0), torch.zeros(0))

    @torch.no_grad()
    def start(self, rows: int, width: int) -> None:
        body = self._model.model
        weight: Tensor = body.embed_tokens.weight
        for attention in self._attentions:
            attention.start(rows, width, weight)
        cos, sin = body.rotary_emb(weight, torch.arange(width, device=weight.device)[None])
        half = cos.shape[-1] // 2  # the second half repeats the first
        self._tables = (cos[0, :, None, :half], sin[0, :, None, :half])
        self._lengths = torch.zeros(rows, dtype=torch.int64, device=weight.device)
        self._even, self._end = True, 0

    @torch.no_grad()
    def step(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        hidden = self._run(ids, lengths)
        last = hidden[:, -1] if lengths is None else hidden[torch.arange(len(ids)), lengths - 1]
        return self._head(last)

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        return self._head(self._run(ids, None))

    def routes(self) -> Tensor | None:
        return torch.stack(self._routes, 2) if self._routes else None

    @torch.no_grad()
    def select(self, rows: Tensor) -> None:
        for attention in self._attentions:
            attention.select(rows)
        self._lengths = self._lengths[rows]
        if not self._even:
            self._end = int(self._lengths.max())
            self._even = bool((self._lengths == self._end).all())

    def _head(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._model.lm_head(_norm(hidden, self._model.model.norm))
        return logits

    def _run(self, ids: Tensor, lengths: Tensor | None) -> Tensor:
        """The last layer's output [B, T, hidden]."""
        body = self._model.model
        place, self._routes = self._place(ids), []
        hidden: Tensor = body.embed_tokens(ids)
        for layer, attend in zip(self._layers, self._attentions, strict=True):
            hidden = hidden + attend(_norm(hidden, layer.input_layernorm), place)
            inner = _norm(hidden, layer.post_attention_layernorm)
            hidden = hidden + (self._experts(layer.mlp, inner) if hasattr(layer.mlp, "gate") else layer.mlp(inner))
        self._grow(ids.shape[1], lengths)
        return hidden

    def _place(self, ids: Tensor) -> _Place:
        """Where the ids of this step stand, the same for all layers."""
        rows, new = ids.shape
        end, device = self._end + new, ids.device
        attention = self._attentions[0]
        columns = torch.arange(end, device=device)
        if self._even:
            span = slice(self._end, end)
            cos, sin = (table[span] for table in self._tables)
            if new == 1:
                return _Place((slice(None), span), end, cos, sin, None)
            hidden = columns[None, None] > columns[None, span, None]  # [1, T, end]
            return _Place((slice(None), span), end, cos, sin, attention.mask(hidden, cos.dtype))
        positions = self._lengths[:, None] + torch.arange(new, device=device)
        cos, sin = (table[positions] for table in self._tables)
        index = (torch.arange(rows, device=device)[:, None], positions)
        return _Place(index, end, cos, sin, attention.mask(columns > positions[..., None], cos.dtype))

    def _grow(self, new: int, lengths: Tensor | None) -> None:
        if lengths is None:
            self._lengths = self._lengths + new
            self._end += new
            return
        self._lengths = self._lengths + lengths
        self._end = int(self._lengths.max())
        self._even = bool((self._lengths == self._end).all())

    def _experts(self, mlp: Any, x: Tensor) -> Tensor:
        rows, new, width = x.shape
        flat = x.reshape(rows * new, width)
        weights, ids = _routed(mlp.gate, flat)
        self._routes.append(ids.view(rows, new, -1))
        experts = mlp.experts
        if experts.num_experts <= FEW_EXPERTS and not hasattr(experts, "prepared"):
            shares = weights.new_zeros(len(flat), experts.num_experts).scatter_(1, ids, weights)
            y = _all_experts(experts, flat, shares.to(flat.dtype))
        else:
            y = experts(flat, ids, weights)
        summed: Tensor = y + mlp.shared_experts(flat)
        return summed.view(rows, new, width)


@dataclass(frozen=True)
class _Place:
    """index: where the cache takes the new positions. end: columns in use. cos, sin: [T or B, T, 1, half].

    mask: added to the scores [batch or 1, T * queries, end]; None: nothing is hidden.
    """

    index: tuple[slice | Tensor, slice | Tensor]
    end: int
    cos: Tensor
    sin: Tensor
    mask: Tensor | None


class _Latent:
    """Multi-head latent attention over one cached tensor: the normed latent [R], then the rotated key [rope].

    It lies columns last, [rows, R + rope, width]: products of many small matrices are faster so on a CPU.
    """

    def __init__(self, module: Any, config: Any):
        self.module = module
        self.heads, self.nope, self.rope = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
        self.value, self.rank = config.v_head_dim, config.kv_lora_rank
        self.interleaved = bool(config.rope_interleave)

    def start(self, rows: int, width: int, like: Tensor) -> None:
        self.cache = like.new_zeros(rows, self.rank + self.rope, width)
        whole = self.module.kv_b_proj.weight.view(self.heads, self.nope + self.value, self.rank)
        self.up_key, self.up_value = whole[:, : self.nope], whole[:, self.nope :].mT

    def select(self, rows: Tensor) -> None:
        self.cache = self.cache[rows]

    def mask(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        return _mask(hidden, 1, self.heads, dtype)

    def __call__(self, x: Tensor, place: _Place) -> Tensor:
        a = self.module
        rows, new = x.shape[:2]
        q = a.q_proj(x) if a.q_proj is not None else a.q_b_proj(_norm(a.q_a_proj(x), a.q_a_layernorm))
        q = q.view(rows, new, self.heads, self.nope + self.rope)
        latent, key = a.kv_a_proj_with_mqa(x).split([self.rank, self.rope], -1)
        turned = _rotate(torch.cat([q[..., self.nope :], key[:, :, None]], 2), place, self.interleaved)
        self.cache[:, : self.rank].mT[place.index] = _norm(latent, a.kv_a_layernorm)
        self.cache[:, self.rank :].mT[place.index] = turned[:, :, -1]
        cached = self.cache[..., : place.end]
        flat = q[..., : self.nope].reshape(rows * new, self.heads, self.nope).transpose(0, 1)
        absorbed = torch.bmm(flat, self.up_key).transpose(0, 1).view(rows, new, self.heads, self.rank)
        query = torch.cat([absorbed, turned[:, :, :-1]], -1).view(rows, new * self.heads, self.rank + self.rope)
        y = _attend(query, cached, cached[:, : self.rank].mT, place.mask, a.scaling)
        y = torch.bmm(y.view(rows * new, self.heads, self.rank).transpose(0, 1), self.up_value)
        out: Tensor = a.o_proj(y.transpose(0, 1).reshape(rows, new, self.heads * self.value))
        return out


class _Grouped:
    """Grouped-query attention: the queries that share a key head are rows of one product."""

    def __init__(self, module: Any):
        self.module, self.dim, self.group = module, module.head_dim, module.num_key_value_groups

    def start(self, rows: int, width: int, like: Tensor) -> None:
        self.heads = self.module.k_proj.out_features // self.dim
        self.keys = like.new_zeros(rows, self.heads, self.dim, width)  # columns last, as above
        self.values = like.new_zeros(rows, self.heads, width, self.dim)

    def select(self, rows: Tensor) -> None:
        self.keys, self.values = self.keys[rows], self.values[rows]

    def mask(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        return _mask(hidden, self.heads, self.group, dtype)

    def __call__(self, x: Tensor, place: _Place) -> Tensor:
        a = self.module
        rows, new = x.shape[:2]
        shape = (rows, new, -1, self.dim)
        q, k = a.q_proj(x).view(shape), a.k_proj(x).view(shape)
        if hasattr(a, "q_norm"):
            q, k = _norm(q, a.q_norm), _norm(k, a.k_norm)
        turned = _rotate(torch.cat([q, k], 2), place, False)
        self.keys.permute(0, 3, 1, 2)[place.index] = turned[:, :, -self.heads :]
        self.values.transpose(1, 2)[place.index] = a.v_proj(x).view(shape)
        q = turned[:, :, : -self.heads].view(rows, new, self.heads, self.group, self.dim).transpose(1, 2)
        keys, values = self.keys[..., : place.end].flatten(0, 1), self.values[:, :, : place.end].flatten(0, 1)
        y = _attend(q.reshape(len(keys), new * self.group, self.dim), keys, values, place.mask, a.scaling)
        y = y.view(rows, self.heads, new, self.group, self.dim).transpose(1, 2)
        out: Tensor = a.o_proj(y.reshape(rows, new, self.heads * self.group * self.dim))
        return out


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(query keys * scale + mask) values: [N, Q, C], [N, C, L], [N, L, Cv] -> [N, Q, Cv]."""
    scores = torch.bmm(query, keys).mul_(scale)
    if mask is not None:
        scores += mask
    return torch.bmm(scores.softmax(-1, dtype=_wide(query.dtype)).to(query.dtype), values)


def _mask(hidden: Tensor, heads: int, group: int, dtype: torch.dtype) -> Tensor:
    """[n, T, L], true where a position is hidden -> [n * heads, T * group, L] to be added; n = 1 serves all rows."""
    rows, new, end = hidden.shape
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -math.inf)
    mask = mask[:, None, :, None].expand(rows, heads if rows > 1 else 1, new, group if new > 1 else 1, end)
    return mask.reshape(mask.shape[0] * mask.shape[1], -1, end)


def _rotate(x: Tensor, place: _Place, interleaved: bool) -> Tensor:
    """Rotary embedding of [B, T, heads, dim]; the pairs are neighbours or half of `dim` apart, the result is halves."""
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    return torch.cat([a * place.cos - b * place.sin, b * place.cos + a * place.sin], -1)


def _norm(x: Tensor, norm: Any) -> Tensor:
    """The root-mean-square norm: float32 or wider inside, as the family's own module."""
    normed: Tensor = norm.weight * F.rms_norm(x.to(_wide(x.dtype)), x.shape[-1:], None, norm.variance_epsilon).to(
        x.dtype
    )
    return normed


def _routed(gate: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and ids [N, k] of the experts of each row of x, as DeepSeek-V3's gate (arXiv 2412.19437, eq. 12 to 16).

    Hooks of the gate, by which a trainer counts its own tokens, see nothing of it.
    """
    wide = _wide(x.dtype)
    scores = F.linear(x.to(wide), gate.weight.to(wide)).sigmoid()
    preferred = scores + gate.e_score_correction_bias
    if gate.num_group > 1:  # only the best groups are open
        grouped = preferred.view(len(x), gate.num_group, -1)
        best = grouped.topk(2, -1)[0].sum(-1).topk(gate.topk_group, -1, sorted=False)[1]
        shut = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, False)
        preferred = grouped.masked_fill(shut[..., None], -math.inf).flatten(1)
    ids = preferred.topk(gate.top_k, -1, sorted=False)[1]
    weights = scores.gather(1, ids)
    if gate.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * gate.routed_scaling_factor, ids


def _all_experts(experts: Any, x: Tensor, shares: Tensor) -> Tensor:
    """The experts' sum for rows x [N, D] with a share [N, E] each, zero for those not chosen."""
    count, twice, width = experts.gate_up_proj.shape
    inner = F.linear(x, experts.gate_up_proj.view(count * twice, width)).view(len(x), count, twice)
    gate, up = inner.chunk(2, -1)
    inner = experts.act_fn(gate).mul_(up).mul_(shares[..., None])
    return torch.bmm(inner.transpose(0, 1), experts.down_proj.mT).sum(0)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _layers(model: Any) -> list[Any]:
    layers: Iterable[Any] = model.model.layers
    return list(layers)[: model.config.num_hidden_layers]
