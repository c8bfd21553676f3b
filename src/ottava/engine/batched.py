"""The forward pass of a server: rows of many requests together, each with exactly the bits it would have alone.

A row is one token of one request. Everything is computed a row at a time or in an order that does not depend on the
other rows (`fp8.rows`), so what a row gives depends on the ids before it alone: not on who else is asking, and not on
whether those ids were read at once, in chunks, or one by one as they were generated. So a stream that broke off can be
asked for again, its prompt and what it had said as the new prompt, and goes on as it would have.

Weights are laid out anew for the kernels: FP8 codes stay codes, all others are BF16. Sums, norms and the residual
stream are float32; what enters a product is rounded to the type of the model, and so is the cache. MLA is computed in
the latent space that it caches (arXiv 2405.04434, section 2.1.2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ottava.engine.bare import FIXED_ROPE
from ottava.engine.generate import step
from ottava.fp8 import rows
from ottava.fp8.linear import Fp8Linear
from ottava.fp8.rows import Packed

FAMILIES = ("deepseek_v3", "llama", "qwen3")


class Part(NamedTuple):
    """The next ids of one request. wanted: whether logits after the last of them are."""

    cache: Any
    ids: Sequence[int]
    wanted: bool


class Runner(Protocol):
    """A model that advances requests. invariant: whether rows keep their bits in any company, cut anyhow.

    numerics: names what fixes the bits of all of them; None: nothing does.
    """

    invariant: bool
    numerics: str | None

    def open(self, length: int) -> Any:
        """An empty cache for a request of at most `length` ids."""

    def step(self, parts: Sequence[Part]) -> Tensor:
        """Logits [wanted parts, V] in order; each part's cache grows by its ids."""


def runner(model: nn.Module, *, consume: bool = False) -> Runner:
    """How to run a model: by rows where the kernels and this file know it, else in turns through Hugging Face.

    consume: the model's own weights may be dropped as they are laid out anew.
    """
    return Batched(model, consume=consume) if _known(model) else Turns(model)


class Turns:
    """Any model of Hugging Face, a request at a time with a cache of its own."""

    invariant = False
    numerics: str | None = None

    def __init__(self, model: nn.Module):
        self._model: Any = model.eval()

    def open(self, length: int) -> DynamicCache:
        """See Runner."""
        return DynamicCache(config=self._model.config)

    @torch.no_grad()
    def step(self, parts: Sequence[Part]) -> Tensor:
        """See Runner."""
        device = next(self._model.parameters()).device
        out = [step(self._model, torch.tensor([list(part.ids)], device=device), part.cache) for part in parts]
        return torch.cat([logits for part, logits in zip(parts, out, strict=True) if part.wanted])


class Cache:
    """What the layers keep of one request: [layers, pieces, length, size]. Memory never written costs nothing."""

    def __init__(self, layers: int, pieces: int, length: int, size: int, dtype: torch.dtype):
        self.filled, self.length = 0, length
        self.held = torch.empty(layers, pieces, length, size, dtype=dtype)


class _Step(NamedTuple):
    """One step, the same for all layers. at: positions, counts: at + 1; caches: addresses [layers, rows]; lengths."""

    rows: int
    at: Tensor
    counts: Tensor
    caches: Tensor
    lengths: Tensor
    cos: Tensor
    sin: Tensor
    dtype: torch.dtype

    def room(self, width: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(self.rows, width, dtype=self.dtype if dtype is None else dtype)


class Batched:
    """DeepSeek-V3, Llama and Qwen3 on the CPU. Not for several threads at once."""

    invariant = True

    @torch.no_grad()
    def __init__(self, model: nn.Module, *, consume: bool = False):
        whole: Any = model
        config, body = whole.config, whole.model
        self.dtype: torch.dtype = body.embed_tokens.weight.dtype
        self.numerics: str | None = f"rows {str(self.dtype).removeprefix('torch.')}"
        positions = torch.arange(int(config.max_position_embeddings))[None]
        cos, sin = body.rotary_emb(torch.zeros(1), positions)
        half = cos.shape[-1] // 2  # the second half repeats the first
        self._cos, self._sin = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
        self._layers = []
        for layer in list(body.layers)[: config.num_hidden_layers]:
            self._layers.append(_Layer(layer, config))
            if consume:
                _drop(layer)
        self._norm = _Norm(body.norm)
        self._head = Packed([whole.lm_head])
        tied = whole.lm_head.weight is body.embed_tokens.weight if isinstance(whole.lm_head, nn.Linear) else False
        self._table = None if tied else body.embed_tokens.weight.detach().bfloat16()
        if consume:
            _drop(whole)

    def open(self, length: int) -> Cache:
        """See Runner."""
        attend = self._layers[0].attend
        return Cache(len(self._layers), attend.pieces, length, attend.size, self.dtype)

    @torch.no_grad()
    def step(self, parts: Sequence[Part]) -> Tensor:
        """See Runner."""
        ids = torch.tensor([i for part in parts for i in part.ids])
        now = self._place(parts)
        hidden = self._head.lines(ids) if self._table is None else self._table[ids].float()
        added: Tensor | None = None
        for number, layer in enumerate(self._layers):
            added = layer(hidden, added, now, now.caches[number])
        for part in parts:
            part.cache.filled += len(part.ids)
        ends = torch.tensor([len(part.ids) for part in parts]).cumsum(0) - 1
        last = ends[torch.tensor([part.wanted for part in parts])]
        hidden, x = hidden[last], torch.empty(len(last), hidden.shape[1], dtype=self.dtype)
        if len(last):
            self._norm(hidden, x, len(last), None if added is None else added[last])
        return self._head(x)

    def _place(self, parts: Sequence[Part]) -> _Step:
        at, lines = [], []
        for part in parts:
            cache: Cache = part.cache
            assert cache.filled + len(part.ids) <= cache.length, "the cache is full"
            at.append(torch.arange(cache.filled, cache.filled + len(part.ids)))
            lines.append(torch.arange(len(self._layers)) * cache.held[0].nbytes + cache.held.data_ptr())
        counts = torch.tensor([len(part.ids) for part in parts])
        caches = torch.stack(lines).repeat_interleave(counts, 0).T.contiguous()
        lengths = torch.tensor([part.cache.length for part in parts]).repeat_interleave(counts)
        where = torch.cat(at)
        return _Step(len(where), where, where + 1, caches, lengths, self._cos, self._sin, self.dtype)


class _Norm:
    def __init__(self, module: Any):
        self.weight, self.epsilon = module.weight.detach().float().contiguous(), float(module.variance_epsilon)

    def __call__(self, x: Tensor, out: Tensor, count: int, add: Tensor | None = None, heads: int = 1) -> None:
        rows.norm(x, self.weight, self.epsilon, out, count, add=add, heads=heads)


class _Layer:
    def __init__(self, layer: Any, config: Any):
        self.before, self.after = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)
        latent = config.model_type == "deepseek_v3"
        self.attend = _Latent(layer.self_attn, config) if latent else _Grouped(layer.self_attn)
        self.mlp = _Experts(layer.mlp) if hasattr(layer.mlp, "gate") else _Gated(layer.mlp)

    def __call__(self, hidden: Tensor, added: Tensor | None, now: _Step, caches: Tensor) -> Tensor:
        """hidden += added and the attention; returns what the rest of the layer adds."""
        x = now.room(hidden.shape[1])
        self.before(hidden, x, now.rows, added)
        self.after(hidden, x, now.rows, self.attend(x, now, caches))
        return self.mlp(x)


class _Grouped:
    """Grouped-query attention. The cache has a piece for each head's keys, then one for each head's values."""

    def __init__(self, a: Any):
        self.dim, self.group, self.scale = int(a.head_dim), int(a.num_key_value_groups), float(a.scaling)
        self.heads = a.k_proj.out_features // self.dim
        self.queries = self.heads * self.group
        self.pieces, self.size = 2 * self.heads, self.dim
        self.qkv, self.out = Packed([a.q_proj, a.k_proj, a.v_proj]), Packed([a.o_proj])
        self.norms = (_Norm(a.q_norm), _Norm(a.k_norm)) if hasattr(a, "q_norm") else None

    def __call__(self, x: Tensor, now: _Step, caches: Tensor) -> Tensor:
        y = self.qkv(x)
        new = y[:, self.queries * self.dim :]
        if self.norms is not None:
            self.norms[0](y, y, now.rows, heads=self.queries)
            self.norms[1](new, new, now.rows, heads=self.heads)
        rows.turn(y, now.rows, self.queries + self.heads, self.dim, now.cos, now.sin, now.at, False)
        rows.put(new, now.rows, self.pieces, self.size, caches, now.lengths, now.at, now.dtype == torch.float32)
        out = now.room(self.queries * self.dim)
        rows.attend(
            y, out, caches, now.lengths, now.counts, now.rows, heads=self.heads, group=self.group, width=self.dim,
            value_width=self.dim, values=self.heads, size=self.size, scale=self.scale,
        )  # fmt: skip
        return self.out(out)


class _Latent:
    """Multi-head latent attention. The cache has one piece: the normed latent, then the rotated key."""

    def __init__(self, a: Any, config: Any):
        self.heads, self.nope, self.rope = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
        self.value, self.rank, self.scale = config.v_head_dim, config.kv_lora_rank, float(a.scaling)
        self.pieces, self.size = 1, self.rank + self.rope
        self.interleaved = bool(config.rope_interleave)
        self.query = Packed([a.q_proj if a.q_proj is not None else a.q_b_proj])
        self.query_down = None if a.q_proj is not None else (Packed([a.q_a_proj]), _Norm(a.q_a_layernorm))
        self.down, self.norm = Packed([a.kv_a_proj_with_mqa]), _Norm(a.kv_a_layernorm)
        up = _matrix(a.kv_b_proj).view(self.heads, self.nope + self.value, self.rank)
        self.up_key = [Packed([head[: self.nope].T.contiguous()]) for head in up]
        self.up_value = [Packed([head[self.nope :].contiguous()]) for head in up]
        self.out = Packed([a.o_proj])

    def __call__(self, x: Tensor, now: _Step, caches: Tensor) -> Tensor:
        y, count = self.down(x), now.rows
        self.norm(y, y, count)
        rows.turn(y[:, self.rank :], count, 1, self.rope, now.cos, now.sin, now.at, self.interleaved)
        rows.put(y, count, self.pieces, self.size, caches, now.lengths, now.at, now.dtype == torch.float32)
        if self.query_down is not None:
            low, norm = self.query_down
            inner, x = low(x), now.room(low.outputs)
            norm(inner, x, count)
        q = self.query(x)
        head = self.nope + self.rope
        rows.turn(q[:, self.nope :], count, self.heads, head, now.cos, now.sin, now.at, self.interleaved)
        absorbed, narrow = now.room(self.heads * self.size, torch.float32), q.to(now.dtype)
        for h, up in enumerate(self.up_key):
            up.into(narrow[:, h * head :], absorbed[:, h * self.size :], count)
        absorbed.view(count, self.heads, -1)[..., self.rank :] = q.view(count, self.heads, -1)[..., self.nope :]
        seen, values = now.room(self.heads * self.rank), now.room(self.heads * self.value, torch.float32)
        rows.attend(
            absorbed, seen, caches, now.lengths, now.counts, count, heads=1, group=self.heads, width=self.size,
            value_width=self.rank, values=0, size=self.size, scale=self.scale,
        )  # fmt: skip
        for h, up in enumerate(self.up_value):
            up.into(seen[:, h * self.rank :], values[:, h * self.value :], count)
        return self.out(values.to(now.dtype))


class _Gated:
    """down(silu(gate x) * up x), for nn.Linear layers or the two tensors of a fused expert."""

    def __init__(self, mlp: Any, fused: tuple[Tensor, Tensor] | None = None):
        self.up = Packed([mlp.gate_proj, mlp.up_proj] if fused is None else [fused[0]])
        self.down = Packed([mlp.down_proj if fused is None else fused[1]])

    def __call__(self, x: Tensor) -> Tensor:
        y = self.up(x)
        inner = torch.empty(len(x), self.down.columns, dtype=x.dtype)
        rows.silu(y, inner, len(x), self.down.columns)
        return self.down(inner)


class _Experts:
    """DeepSeek-V3's experts (arXiv 2412.19437, eq. 12 to 16): each computes the rows that chose it."""

    def __init__(self, mlp: Any):
        gate = self._gate = mlp.gate
        self.gate, self.bias = Packed([gate.weight]), gate.e_score_correction_bias.detach().float()
        self.shared = _Gated(mlp.shared_experts)
        both = zip(mlp.experts.gate_up_proj.detach(), mlp.experts.down_proj.detach(), strict=True)
        self.experts = [_Gated(None, each) for each in both]

    def __call__(self, x: Tensor) -> Tensor:
        weights, ids = self._routed(x)
        parts = torch.empty(*ids.shape, self.shared.down.outputs)
        for number in torch.unique(ids).tolist():
            row, choice = (ids == number).nonzero(as_tuple=True)
            parts[row, choice] = self.experts[number](x[row])
        y = self.shared(x)
        for choice in range(ids.shape[1]):  # one after the other: a sum over a dimension may change its order with B
            y += weights[:, choice, None] * parts[:, choice]
        return y

    def _routed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate = self._gate
        scores = rows.sigmoid(self.gate(x))
        preferred = scores + self.bias
        if gate.num_group > 1:  # only the best groups are open
            grouped = preferred.view(len(x), gate.num_group, -1)
            pair = grouped.sort(dim=-1, descending=True, stable=True)[0]
            best = (pair[..., 0] + pair[..., 1]).sort(dim=-1, descending=True, stable=True)[1][:, : gate.topk_group]
            shut = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, False)
            preferred = grouped.masked_fill(shut[..., None], -math.inf).flatten(1)
        ids = preferred.sort(dim=-1, descending=True, stable=True)[1][:, : gate.top_k]
        weights = scores.gather(1, ids)
        if gate.norm_topk_prob:
            total = weights[:, :1] + 1e-20
            for choice in range(1, ids.shape[1]):
                total = total + weights[:, choice, None]
            weights = weights / total
        return weights * gate.routed_scaling_factor, ids


def _known(model: nn.Module) -> bool:
    """Whether `Batched` computes this model: its family, rotary embedding, plain layers, weights that BF16 holds."""
    whole: Any = model
    config: Any = getattr(whole, "config", None)
    family = getattr(config, "model_type", None)
    if not rows.levels() or family not in FAMILIES:
        return False
    if not hasattr(getattr(whole, "model", None), "layers") or config.hidden_act not in ("silu", "swish"):
        return False
    if (config.rope_parameters or {}).get("rope_type", "default") not in FIXED_ROPE:
        return False
    if any(getattr(layer.self_attn, "sliding_window", None) is not None for layer in whole.model.layers):
        return False
    if whole.model.embed_tokens.weight.dtype not in (torch.float32, torch.bfloat16):
        return False
    return all(_plain(module) for module in _leaves(model)) and all(_exact(p) for p in model.parameters())


def _leaves(model: nn.Module) -> Iterator[nn.Module]:
    yield from (module for module in model.modules() if not list(module.children()))


def _plain(module: nn.Module) -> bool:
    """A matrix without a bias and with an even number of columns on the CPU, or no matrix."""
    if any(t.device.type != "cpu" for t in (*module.parameters(), *module.buffers())):
        return False
    if isinstance(module, (nn.Linear, Fp8Linear)):
        return type(module) in (nn.Linear, Fp8Linear) and module.bias is None and module.in_features % 2 == 0
    return True


def _exact(weight: Tensor) -> bool:
    """Whether the kernels hold it: vectors stay float32, matrices become BF16."""
    if weight.dim() < 2 or weight.dtype == torch.bfloat16:
        return True
    return all(torch.equal(part.bfloat16().to(part.dtype), part) for part in torch.split(weight.detach(), 1024))


def _matrix(layer: Any) -> Tensor:
    weight = layer.dequantised(torch.bfloat16) if isinstance(layer, Fp8Linear) else layer.weight.detach().bfloat16()
    return weight


def _drop(module: nn.Module) -> None:
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = torch.empty(0, dtype=tensor.dtype)
