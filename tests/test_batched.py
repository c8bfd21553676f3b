"""The server's forward pass: Hugging Face's values, and bits that depend on a request's own ids alone."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ottava.checkpoint import safetensors
from ottava.checkpoint.convert import convert
from ottava.engine import session
from ottava.engine.batched import Batched, Part, Turns, runner
from ottava.engine.generate import ThinkBudget
from ottava.engine.session import Engine, Sampling, Token
from ottava.errors import DataError
from ottava.fp8 import rows
from ottava.models.build import from_config
from ottava.models.chat import write_tiny
from ottava.models.load import load
from ottava.models.published import published, stored
from ottava.tasks import chains

from .test_engine import CONFIG, END, ETHINK, VOCABULARY, random_model

pytestmark = pytest.mark.skipif(not rows.levels(), reason="the extension is not built")

DENSE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 156, "intermediate_size": 200, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 24, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": END,
}  # fmt: skip
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": DENSE | {"model_type": "llama", "tie_word_embeddings": True},
    "qwen3": DENSE | {"model_type": "qwen3", "tie_word_embeddings": False},
    "deepseek": CONFIG | {"hidden_size": 96, "n_group": 2, "n_routed_experts": 8, "num_experts_per_tok": 3},
    "deepseek-lora": CONFIG | {"q_lora_rank": 24, "rope_interleave": False, "rope_parameters": YARN},
}  # fmt: skip
CASES = [(family, fp8) for family in CONFIGS for fp8 in (False, True)]
LENGTH = 48


@cache
def folder(family: str, fp8: bool) -> Path:
    """A folder of random weights in BF16, or what `convert` makes of it."""
    made = Path(mkdtemp(prefix="ottava-")) / "model"
    if fp8:
        convert({"source": str(folder(family, False)), "out": str(made)})
        return made
    model = from_config(CONFIGS[family])
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if "embed" in name else 1.5 / parameter.shape[-1] ** 0.5
            parameter.copy_((torch.randn_like(parameter) * scale if parameter.dim() > 1 else parameter).bfloat16())
    made.mkdir()
    write_tiny(made, chains.vocabulary())
    (made / "config.json").write_text(json.dumps({**CONFIGS[family], "architectures": [type(model).__name__]}))
    safetensors.write(made / "model.safetensors", [(name, stored(item)) for name, item in published(model).items()])
    return made


def reference(family: str, fp8: bool, dtype: torch.dtype) -> nn.Module:
    """Hugging Face's model of the folder's exact values."""
    model: Any = load(folder(family, fp8)).to(dtype)
    if dtype == torch.float64 and hasattr(model.config, "n_routed_experts"):
        model.set_experts_implementation("eager")  # the other has no float64
    return model  # type: ignore[no-any-return]


@cache
def ours(family: str, fp8: bool, dtype: torch.dtype) -> Batched:
    found = runner(load(folder(family, fp8), dtype, "fp8"), consume=True)
    assert isinstance(found, Batched)
    return found


def ids(count: int = LENGTH, seed: int = 0) -> list[int]:
    found: list[int] = np.random.default_rng(seed).integers(2, VOCABULARY, count).tolist()
    return found


def cut(model: Batched, asked: list[int], cuts: list[int]) -> Tensor:
    """Logits after each piece, where the ids come in pieces of these lengths."""
    held, out, at = model.open(len(asked)), [], 0
    for count in cuts:
        out.append(model.step([Part(held, asked[at : at + count], True)])[0])
        at += count
    assert at == len(asked)
    return torch.stack(out)


@cache
def one_by_one(family: str, fp8: bool, dtype: torch.dtype) -> Tensor:
    return cut(ours(family, fp8, dtype), ids(), [1] * LENGTH)


@pytest.mark.parametrize(("family", "fp8"), CASES)
def test_values_are_those_of_hugging_face(family: str, fp8: bool) -> None:
    model = reference(family, fp8, torch.float32)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids()])).logits[0]
    found = one_by_one(family, fp8, torch.float32)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize(("family", "fp8"), CASES)
def test_bf16_is_nearer_to_the_truth_than_hugging_face_in_bf16(family: str, fp8: bool) -> None:
    asked = torch.tensor([ids()])
    with torch.no_grad():
        truth = reference(family, fp8, torch.float64)(input_ids=asked).logits[0]
        theirs = load(folder(family, fp8), torch.bfloat16)(input_ids=asked).logits[0].double()
    mine = one_by_one(family, fp8, torch.bfloat16).double()
    off, bound = ((each - truth).abs().median() / truth.abs().mean() for each in (mine, theirs))
    assert 0 < float(off) < float(bound)


def test_what_is_held_in_fp8_counts_as_its_values() -> None:
    held = ours("llama", True, torch.bfloat16)
    exact = runner(load(folder("llama", True), torch.bfloat16))
    assert isinstance(exact, Batched)
    assert all(layer.mlp.down.scales is not None for layer in held._layers)
    assert all(layer.mlp.down.scales is None for layer in exact._layers)
    assert torch.equal(cut(exact, ids(), [20, 28]), cut(held, ids(), [20, 28]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("family", "fp8"), CASES)
@settings(max_examples=12, deadline=None)
@given(st.data())
def test_it_does_not_matter_how_the_ids_are_cut(
    family: str, fp8: bool, dtype: torch.dtype, data: st.DataObject
) -> None:
    ends = sorted(data.draw(st.sets(st.integers(1, LENGTH - 1), max_size=8)) | {LENGTH})
    cuts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    found = cut(ours(family, fp8, dtype), ids(), cuts)
    assert torch.equal(found, one_by_one(family, fp8, dtype)[[end - 1 for end in ends]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("family", "fp8"), CASES)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6), threads=st.integers(1, 2))
def test_it_does_not_matter_who_else_is_asking(
    family: str, fp8: bool, dtype: torch.dtype, seed: int, threads: int
) -> None:
    model, draw = ours(family, fp8, dtype), random.Random(seed)
    expected = one_by_one(family, fp8, dtype)
    held, done = [model.open(LENGTH) for _ in range(20)], [0] * 20
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        while min(done) < LENGTH:
            parts, who = [], []
            for i in draw.sample(range(20), draw.randint(1, 20)):
                count = min(draw.choice([1, 1, 2, 9, 30]), LENGTH - done[i])
                if not count:
                    continue
                asked = ids() if i % 2 == 0 else ids(seed=i)
                wanted = draw.random() < 0.7
                parts.append(Part(held[i], asked[done[i] : done[i] + count], wanted))
                done[i] += count
                who += [i] if wanted else []
            for i, logits in zip(who, model.step(parts) if parts else [], strict=True):
                assert i % 2 or torch.equal(logits, expected[done[i] - 1])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("level", range(rows.BEST + 1))
@pytest.mark.parametrize("family", ["qwen3", "deepseek"])
def test_every_instruction_set_gives_the_same_bits(family: str, level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = one_by_one(family, True, torch.bfloat16)[[19, LENGTH - 1]]
    functions = (rows.norm, rows.silu, rows.sigmoid, rows.attend, rows.Packed.into, rows.Packed.__call__)
    for function in functions:
        monkeypatch.setitem(function.__kwdefaults__, "level", level)
    assert torch.equal(cut(ours(family, True, torch.bfloat16), ids(), [20, LENGTH - 20]), expected)


def test_models_that_the_kernels_do_not_know_take_turns() -> None:
    whole = random_model()
    assert isinstance(runner(whole), Batched)
    whole.get_submodule("lm_head").weight.data[0, 0] += 1e-6  # no BF16 number
    assert isinstance(runner(whole), Turns)
    biased = from_config(CONFIGS["llama"] | {"attention_bias": True})
    assert isinstance(runner(biased), Turns)
    assert isinstance(runner(from_config(CONFIGS["llama"] | {"hidden_act": "gelu"})), Turns)


# ---- the engine


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{'fp8' if case[1] else 'bf16'}")
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    made = Engine.load(folder(*request.param), slots=6, queue=20)
    assert made.invariant
    yield made
    made.close()


def together(engine: Engine, asked: list[tuple[list[int], Sampling]]) -> list[list[Token]]:
    out: list[list[Token]] = [[] for _ in asked]
    threads = [
        threading.Thread(target=lambda i=i, each=each: out[i].extend(engine.stream(*each)))
        for i, each in enumerate(asked)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return out


def test_a_stream_is_taken_up_in_its_middle(engine: Engine) -> None:
    """Tokens, log-probabilities and alternatives, at random places, while others ask."""
    engine.chat = replace(engine.chat, stop_ids=())  # replies of full length
    draw = random.Random(5)
    hows = [
        Sampling(30, top=2), Sampling(30, 1.0, seed=4), Sampling(25, 1.3, 0.8, seed=2**63 + 5),
        Sampling(30, 0.7, seed=1, think=ThinkBudget(ETHINK, 12)), Sampling(30, think=ThinkBudget(ETHINK, 7)),
    ]  # fmt: skip
    asked = [(ids(draw.randint(1, 150), seed), how) for seed, how in enumerate(hows)]
    whole = [list(engine.stream(*each)) for each in asked]
    resumed, expected = [], []
    for (prompt, how), tokens in zip(asked, whole, strict=True):
        for said in {0, len(tokens), *(draw.randint(1, len(tokens)) for _ in range(3))}:
            resumed.append(([*prompt, *(token.id for token in tokens[:said])], replace(how, said=said)))
            expected.append(tokens[said:])
    assert together(engine, resumed) == expected
    ends = [[token.id for token in tokens].index(ETHINK) for tokens in whole[3:]]
    assert ends[0] <= 12
    assert ends[1] <= 7


def test_long_prompts_do_not_keep_others_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "CHUNK", 8)
    engine = Engine.load(folder("llama", True), slots=2)
    order: list[str] = []
    first, done = threading.Event(), threading.Event()

    def short(item: Token | Exception | None) -> None:
        order.append("short" if isinstance(item, Token) else "end")
        first.set()

    def long(item: Token | Exception | None) -> None:
        order.append("long")
        if item is None:
            done.set()

    engine.chat = replace(engine.chat, stop_ids=())
    engine.submit(ids(3), Sampling(400), short)
    first.wait(60)
    engine.submit(ids(400), Sampling(1), long)
    assert done.wait(120)
    engine.close()
    begun = order.index("long")
    assert order[:begun].count("short") >= 400 // 8


def test_a_prompt_can_be_left_in_its_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "ALONE", 1)
    engine = Engine.load(folder("llama", False), slots=1)
    got: list[Token | Exception | None] = []
    job = engine.submit(ids(500), Sampling(5), got.append)
    job.cancel()
    deadline = time.monotonic() + 60
    while engine.load_now and time.monotonic() < deadline:
        time.sleep(0.01)
    engine.close()
    assert got == [None]


def test_what_was_said_must_be_part_of_the_prompt() -> None:
    engine = Engine.load(folder("llama", False))
    for said in (-1, 4, 5):
        with pytest.raises(DataError, match="beginning of a reply"):
            engine.submit([7, 8, 9, 7], Sampling(5, said=said), lambda item: None)
    assert list(engine.stream([7, 8, END], Sampling(5, said=1))) == []
    assert list(engine.stream([7, 8, 9], Sampling(2, said=2))) == []
    assert len(list(engine.stream([7] * 510, Sampling(50, said=400)))) <= 2
    engine.close()
