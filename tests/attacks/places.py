"""Tensors in the wrong order, the wrong place or the wrong file."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.attacks.folders import LAYOUTS, Coded, Model, Plain, Written, bf16, from_bf16, written
from tests.attacks.plant import (
    DOWN,
    EMBED,
    EXPERT,
    GATE,
    HEAD,
    NORM,
    OUT,
    UP,
    Impossible,
    K,
    Q,
    V,
    add,
    codes,
    gone,
    put,
    quantise,
    stored,
    swap,
    values,
    weight,
)

add("codes transposed", "llama", K, "transposed pack", codes(K, lambda c: c.T))
add("codes in column-major order", "llama", Q, "transposed pack", codes(Q, lambda c: c.T.reshape(c.shape)))
add("codes read in column-major order", "llama", OUT, "transposed pack", codes(OUT, lambda c: c.reshape(c.T.shape).T))
add(
    "a weight transposed with its scales",
    "llama",
    K,
    "transposed pack",
    lambda m, y: written(put(m, **{K: Coded(weight(m, K).codes.T.copy(), weight(m, K).factors.T.copy())}), y),
)
add(
    "embeddings transposed",
    "llama",
    EMBED,
    "transposed pack",
    values(EMBED, lambda v: v.T.reshape(v.shape)),
    layouts=("bf16",),
)
add(
    "rows permuted",
    "llama",
    EMBED,
    "rows permuted",
    lambda m, y: written(put(m, **{EMBED: Plain(m[EMBED].values[np.random.default_rng(1).permutation(200)])}), y),
)
add(
    "rows of codes permuted",
    "llama",
    Q,
    "rows permuted",
    codes(Q, lambda c: c[np.random.default_rng(1).permutation(576)]),
    layouts=LAYOUTS[:2],
)
add(
    "shards of rows in the wrong order",
    "llama",
    Q,
    "shards in the wrong order",
    codes(Q, lambda c: np.concatenate([c[288:], c[:288]])),
)
add(
    "three shards of columns",
    "llama",
    OUT,
    "shards in the wrong order",
    codes(OUT, lambda c: np.concatenate([c[:, 384:], c[:, :384]], 1)),
)
add(
    "heads interleaved",
    "llama",
    EMBED,
    "shards in the wrong order",
    lambda m, y: written(
        put(m, **{EMBED: Plain(m[EMBED].values.reshape(2, 100, 192).swapaxes(0, 1).reshape(200, 192))}), y
    ),
)


def _resplit(names: tuple[str, ...], cut: int) -> Callable[[Model, str], Written]:
    """The tensors joined row by row and cut again `cut` rows too late (codes; or values where there are no codes)."""

    def plant(model: Model, layout: str) -> Written:
        out = dict(model)
        joined = np.concatenate([weight(model, name).codes for name in names])
        together = np.concatenate([weight(model, name).values for name in names])
        at = cut
        for name in names:
            rows = len(weight(model, name).codes)
            index = np.arange(at, at + rows) % len(joined)
            moved = Coded(joined[index], weight(model, name).factors)
            out[name] = Plain(from_bf16(bf16(together[index]))) if layout == "bf16" else moved
            at += rows
        return written(out, layout)

    return plant


add("gate and up cut 16 rows late", "llama", GATE, "wrong fused split", _resplit((GATE, UP), 16))
add("q, k and v cut at the wrong row", "llama", K, "wrong fused split", _resplit((Q, K, V), 64))
add("gate and up swapped", "llama", GATE, "tensors swapped", swap((GATE, UP)))
add("embeddings and head swapped", "llama", HEAD, "tensors swapped", swap((HEAD, EMBED)))
add(
    "an expert's gate and up swapped",
    "qwen3_moe",
    EXPERT.format(1, "gate"),
    "tensors swapped",
    swap((EXPERT.format(1, "gate"), EXPERT.format(1, "up"))),
)


def _interleaved(model: Model, layout: str) -> Written:
    """Gate and up rows were stored in turns and were read as two halves."""
    if layout != "bf16":
        raise Impossible
    turns = np.stack([model[GATE].values, model[UP].values], 1).reshape(640, 192)
    halves = {GATE: turns[:320], UP: turns[320:]}
    return written(put(model, **{n: Plain(from_bf16(bf16(v))) for n, v in halves.items()}), layout)


add("gate and up in turns", "llama", GATE, "wrong fused split", _interleaved)
add(
    "an expert of zeros",
    "qwen3_moe",
    EXPERT.format(1, "down"),
    "zeroed expert",
    codes(EXPERT.format(1, "down"), np.zeros_like),
    sure=True,
)
add("a tensor of zeros", "llama", UP, "zeroed tensor", codes(UP, np.zeros_like), sure=True)


def _hole(out: Written, _: str) -> None:
    data = out.stored[Q].data.copy()
    data.reshape(-1)[60000:80000] = 0
    out.stored[Q].data = data


add("a hole in the file", "llama", Q, "zero-filled region", stored(_hole), sure=True)

# Between tensors.

add(
    "two experts swapped",
    "qwen3_moe",
    EXPERT.format(0, "down"),
    "experts permuted",
    swap(*((EXPERT.format(0, p), EXPERT.format(2, p)) for p in ("gate", "up", "down"))),
)


def _rotated(model: Model, layout: str) -> Written:
    out = dict(model)
    for part in ("gate", "up", "down"):
        for i in range(3):
            out[EXPERT.format(i, part)] = model[EXPERT.format((i + 1) % 3, part)]
    return written(out, layout)


add("experts rotated", "qwen3_moe", EXPERT.format(0, "down"), "experts permuted", _rotated)
add(
    "an expert is another's copy",
    "qwen3_moe",
    EXPERT.format(2, "up"),
    "expert is another's copy",
    swap((EXPERT.format(2, "up"), EXPERT.format(0, "up")), copy=True),
    sure=True,
)
add(
    "two layers' norms swapped",
    "llama",
    "model.layers.0.input_layernorm.weight",
    "tensors swapped",
    swap(("model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight")),
)
add(
    "two layers' weights swapped",
    "llama",
    "model.layers.0.self_attn.o_proj.weight",
    "tensors swapped",
    swap(("model.layers.0.self_attn.o_proj.weight", "model.layers.1.self_attn.o_proj.weight")),
)
add(
    "a layer copied",
    "llama",
    "model.layers.1.mlp.down_proj.weight",
    "copy of another tensor",
    swap(("model.layers.1.mlp.down_proj.weight", "model.layers.0.mlp.down_proj.weight"), copy=True),
    sure=True,
)
add("the head is the embeddings", "llama", HEAD, "tied head forgotten", swap((HEAD, EMBED), copy=True), sure=True)


def _tied(model: Model) -> Model:
    return put(model, **{HEAD: model[EMBED]})


add("a tied head left out", "llama", HEAD, "tied head forgotten", gone(HEAD), source=_tied)


def _again(model: Model, rate: float, only: Callable[[str], bool]) -> Model:
    """Another version of some tensors."""
    out: Model = {}
    rng = np.random.default_rng(9)
    for name, found in model.items():
        if not only(name):
            out[name] = found
            continue
        moved = found.values * (1 + rate * rng.normal(size=found.values.shape))
        out[name] = (
            Coded(*quantise(moved, "464")) if isinstance(found, Coded) else Plain(from_bf16(bf16(moved)), found.dtype)
        )
    return out


add("a tensor of an earlier step", "llama", Q, "stale tensor", lambda m, y: written(_again(m, 0.1, Q.__eq__), y))
add(
    "all linear weights of an earlier step",
    "llama",
    DOWN,
    "stale tensor",
    lambda m, y: written(_again(m, 0.1, lambda n: n.endswith("_proj.weight")), y),
)
add(  # rounding leaves norms alone
    "linear weights and a norm of the step before",
    "llama",
    DOWN,
    "stale tensor",
    lambda m, y: written(_again(m, 0.05, lambda n: n.endswith(("_proj.weight", NORM))), y),
)
add(  # whoever rounds otherwise rounds more than one
    "a tensor of the step before",
    "llama",
    Q,
    "stale tensor",
    lambda m, y: written(_again(m, 0.05, Q.__eq__), y),
)
add(
    "a file of an earlier step",
    "llama",
    "model.layers.1.input_layernorm.weight",
    "stale shard",
    lambda m, y: written(_again(m, 0.1, lambda n: n.startswith("model.layers.1.")), y, 3),
    shards=3,
)
