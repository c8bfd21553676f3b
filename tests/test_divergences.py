"""Distillation's divergences: TRL's own GKD and ULD losses; where TRL has none, enumeration and numbers by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from ottava.errors import DataError, RecipeError
from ottava.trainer.divergences import Chunk, align, alm, divergence, gkd
from tests.test_losses import with_gradient

BOUND = {torch.float64: 1e-12, torch.float32: 1e-6}
N, T, V = 8, 6, 11


def logits(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def replies(seed: int, width: int, start: int = 0) -> Tensor:
    """Masks of replies that begin at `start`, of 1 to width - start tokens."""
    lengths = torch.randint(1, width - start + 1, (N, 1), generator=torch.Generator().manual_seed(seed))
    places = torch.arange(width)
    return (places >= start) & (places < start + lengths)


# GKD.


@pytest.mark.parametrize("dtype", BOUND, ids=["float64", "float32"])
@pytest.mark.parametrize("temperature", [1.0, 1.5])
@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1])
def test_gkd_equals_trl(beta: float, temperature: float, dtype: torch.dtype) -> None:
    trainer = pytest.importorskip("trl.experimental.gkd.gkd_trainer").GKDTrainer
    student, teacher, mask = logits(0, N, T, V, dtype=dtype), logits(1, N, T, V, dtype=dtype), replies(2, T)
    labels = torch.where(mask, 1, -100)
    tokens = int(mask.sum())
    ours, gradient = with_gradient(lambda z: gkd(z, teacher, mask, tokens, beta=beta, temperature=temperature), student)
    theirs, expected = with_gradient(
        lambda z: trainer.generalized_jsd_loss(z, teacher, labels, beta=beta, temperature=temperature), student
    )
    assert abs(float(ours - theirs)) <= BOUND[dtype]
    assert float((gradient - expected).abs().max()) <= BOUND[dtype]
    assert float(ours) > 0.05


def test_gkd_directions_by_hand() -> None:
    """T = (3/4, 1/4), S = (1/2, 1/2)."""
    student, teacher = torch.zeros(1, 1, 2).double(), torch.tensor([[[3.0, 1.0]]]).double().log()
    mask = torch.ones(1, 1, dtype=torch.bool)
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    assert float(gkd(student, teacher, mask, 1, beta=0)) == pytest.approx(forward)
    assert float(gkd(student, teacher, mask, 1, beta=1)) == pytest.approx(reverse)
    m = (0.25 * 0.75 + 0.75 * 0.5, 0.25 * 0.25 + 0.75 * 0.5)
    mixed = 0.25 * (0.75 * math.log(0.75 / m[0]) + 0.25 * math.log(0.25 / m[1]))
    mixed += 0.75 * (0.5 * math.log(0.5 / m[0]) + 0.5 * math.log(0.5 / m[1]))
    assert float(gkd(student, teacher, mask, 1, beta=0.25)) == pytest.approx(mixed)


@pytest.mark.parametrize("beta", [0, 0.5, 1])
@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_gkd_of_shards_adds(beta: float, shards: int) -> None:
    student, teacher, mask = logits(0, N, T, V), logits(1, N, T, V), replies(2, T)
    tokens = int(mask.sum())
    whole, gradient = with_gradient(lambda z: gkd(z, teacher, mask, tokens, beta=beta), student)
    parts = []
    for v in range(shards):
        own = slice(v * N // shards, (v + 1) * N // shards)
        parts.append(with_gradient(lambda z, s=own: gkd(z, teacher[s], mask[s], tokens, beta=beta), student[own]))
    assert abs(float(whole) - sum(float(loss) for loss, _ in parts)) <= 1e-12
    assert float((torch.cat([part for _, part in parts]) - gradient).abs().max()) <= 1e-12


def test_gkd_of_bad_input() -> None:
    """Padding is not looked at; ids without probability cost what they must; empty shards are zeros with a graph."""
    student, teacher, mask = logits(0, N, T, V), logits(1, N, T, V), replies(2, T)
    clean, gradient = with_gradient(lambda z: gkd(z, teacher, mask, 9, beta=0.5), student)
    hole = ~mask.unsqueeze(2)
    dirty, slope = with_gradient(
        lambda z: gkd(z, teacher.masked_fill(hole, math.nan), mask, 9, beta=0.5), student.masked_fill(hole, math.nan)
    )
    assert torch.equal(clean, dirty)
    assert torch.equal(gradient, slope)
    banned = teacher.clone()
    banned[..., 3] = -math.inf
    for beta, finite in ((0, True), (0.5, True), (1, False)):
        loss, slope = with_gradient(lambda z, beta=beta: gkd(z, banned, mask, 9, beta=beta), student)
        assert bool(loss.isfinite()) is finite
        assert bool(slope.isfinite().all()) is finite
    empty, slope = with_gradient(lambda z: gkd(z, teacher, torch.zeros_like(mask), 0), student)
    assert float(empty) == 0
    assert not slope.any()
    with pytest.raises(DataError, match="cut both"):
        gkd(student, teacher[..., :-1], mask, 9)
    for wrong in ({"beta": 1.1}, {"beta": math.nan}, {"temperature": 0.0}):
        with pytest.raises(RecipeError):
            gkd(student, teacher, mask, 9, **wrong)


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_a_divergence_is_zero_of_equals_and_positive_else(seed: int, beta: float) -> None:
    student, teacher = logits(seed, V), logits(seed + 1, V)
    assert abs(float(divergence(student, student + 7.0, beta))) <= 1e-14
    assert float(divergence(student, teacher, beta)) > 0


@pytest.mark.parametrize("shards", [2, 8])
def test_alm_of_shards_adds(shards: int) -> None:
    student, teacher = logits(0, N, 9, V), logits(1, N, 8, V + 2)
    texts = [b"abcdefgh"[:n] for n in (8, 7, 3, 8, 1, 8, 5, 8)]
    chunks = [align([text[i : i + 1] for i in range(len(text))], [text[:2], text[2:]]) for text in texts]
    total = sum(map(len, chunks))
    live, fixed = -student[..., 0].abs(), -teacher[..., 0].abs()
    cut = [slice(v * N // shards, (v + 1) * N // shards) for v in range(shards)]
    assert float(alm(live, fixed, chunks, total)) == pytest.approx(
        sum(float(alm(live[s], fixed[s], chunks[s], total)) for s in cut), abs=1e-12
    )


# Alignment and ALM.


def spans(chunks: tuple[Chunk, ...]) -> list[tuple[int, int, int, int]]:
    return [(c.student.start, c.student.stop, c.teacher.start, c.teacher.stop) for c in chunks]


def cut_at(text: bytes, cuts: list[int]) -> list[bytes]:
    """Tokens of a text; equal cuts give tokens without bytes."""
    edges = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


Cuts = st.lists(st.integers(0, 12), max_size=8)


@given(st.binary(min_size=1, max_size=12), Cuts, Cuts)
def test_align(text: bytes, ours: list[int], theirs: list[int]) -> None:
    student, teacher = cut_at(text, ours), cut_at(text, theirs)
    chunks = align(student, teacher)
    # in order and without a gap, on both sides
    for part, tokens in (("student", student), ("teacher", teacher)):
        slices = [getattr(chunk, part) for chunk in chunks]
        edges = [0, *(s.stop for s in slices)]
        assert [s.start for s in slices] == edges[:-1]
        assert all(s.start < s.stop for s in slices)
        assert b"".join(tokens[: edges[-1]]) == text, "the rest has no bytes"
    for chunk in chunks:
        assert b"".join(student[chunk.student]) == b"".join(teacher[chunk.teacher])
    # as small as can be: no agreement strictly inside a chunk
    assume(all(student) and all(teacher))
    both = set(itertools.accumulate(map(len, student))) & set(itertools.accumulate(map(len, teacher)))
    assert len(chunks) == len(both)


@given(st.binary(min_size=1, max_size=12), Cuts)
def test_align_of_equal_tokens_is_one_by_one(text: bytes, cuts: list[int]) -> None:
    tokens = cut_at(text, cuts)
    assert spans(align(tokens, tokens)) == [(i, i + 1, i, i + 1) for i in range(len(tokens))]


@given(st.binary(min_size=1, max_size=12), Cuts, Cuts, st.integers(0, 12))
def test_align_of_a_reply_cut_off(text: bytes, ours: list[int], theirs: list[int], end: int) -> None:
    """What only one side has is in no chunk; what both have is as if the other had ended there."""
    student, teacher = cut_at(text, ours), [token for token in cut_at(text[:end], theirs) if token]
    chunks = align(student, teacher)
    covered = b"".join(b"".join(teacher[chunk.teacher]) for chunk in chunks)
    assert text.startswith(covered)
    assert len(covered) <= end
    boundaries = {0, *itertools.accumulate(map(len, student))} & {0, *itertools.accumulate(map(len, teacher))}
    assert len(covered) == max(boundaries)


def test_align_by_hand() -> None:
    assert spans(align([b"12", b"+", b"3"], [b"1", b"2+", b"3"])) == [(0, 2, 0, 2), (2, 3, 2, 3)]
    assert spans(align([b"ab", b""], [b"a", b"b", b""])) == [(0, 1, 0, 2), (1, 2, 2, 3)]  # both say the end
    assert spans(align([b"ab", b""], [b"a", b"b"])) == [(0, 1, 0, 2)]  # one does
    assert spans(align([b"\xc3", b"\xa9"], ["é".encode()])) == [(0, 2, 0, 1)]  # a character cut in two
    assert align([], [b"a"]) == align([b"a"], []) == ()
    with pytest.raises(DataError, match="byte 2"):
        align([b"ab", b"c"], [b"abd"])


def coin(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def test_alm_by_hand() -> None:
    """Two tokens of .5 and .8 beside one of .3, then .9 beside .6; with a temperature, of the roots."""
    student = torch.tensor([[0.5, 0.8, 0.9, 0.123]]).double().log()
    teacher = torch.tensor([[0.3, 0.6]]).double().log()
    chunks = [align([b"a", b"b", b"c", b"d"], [b"ab", b"c"])]
    assert len(chunks[0]) == 2
    assert float(alm(student, teacher, chunks, 2)) == pytest.approx((coin(0.3, 0.4) + coin(0.6, 0.9)) / 2)
    roots = coin(0.3**0.25, 0.4**0.25) + coin(0.6**0.25, 0.9**0.25)
    assert float(alm(student, teacher, chunks, 2, temperature=4)) == pytest.approx(roots / 2)
    gradient = with_gradient(lambda x: alm(x, teacher, chunks, 2), student)[1]
    assert gradient[0].tolist() == pytest.approx([0.05 / 0.6, 0.05 / 0.6, 0.15 / 0.1, 0])  # (q - p) / (1 - q) / 2
    with pytest.raises(RecipeError):
        alm(student, teacher, chunks, 2, temperature=0)


def test_alm_in_the_limit_of_large_temperatures() -> None:
    student, teacher = -logits(0, 3, 4).abs() - 0.01, -logits(1, 3, 4).abs() - 0.01
    letters = [bytes([letter]) for letter in b"abcd"]
    loss = 1e5 * alm(student, teacher, [align(letters, letters)] * 3, 12, temperature=1e5)
    a, b = -teacher, -student
    assert float(loss) == pytest.approx(float((b - a + a * (a / b).log()).mean()), rel=1e-4)


@given(st.lists(st.floats(-30, 0), min_size=4, max_size=4), st.sampled_from([torch.float32, torch.float64]))
def test_alm_stays_finite_up_to_certainty(values: list[float], dtype: torch.dtype) -> None:
    """Zero of equals, never negative, and a finite gradient even where a likelihood is 1."""
    chunks = [align([b"a", b"b"], [b"a", b"b"])]
    student, teacher = torch.tensor([values[:2]], dtype=dtype), torch.tensor([values[2:]], dtype=dtype)
    loss, gradient = with_gradient(lambda x: alm(x, teacher, chunks, 2), student)
    assert float(loss) >= -1e-6
    assert gradient.isfinite().all()
    assert abs(float(alm(student, student, chunks, 2))) <= 1e-6


def test_alm_of_nothing() -> None:
    live = torch.zeros(2, 3, requires_grad=True)
    nothing = alm(live, live.detach(), [(), ()], 0)
    assert nothing.item() == 0
    assert not torch.autograd.grad(nothing, live)[0].any()
