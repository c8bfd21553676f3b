"""Generation against Hugging Face and a plain second implementation; grading against a scripted model."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ottava.checkpoint import safetensors
from ottava.engine.evaluate import answer, evaluate, evaluate_folder, well_formed
from ottava.engine.generate import ThinkBudget, choose, generate, uniform
from ottava.engine.session import Engine, Overdue, QueueFull, Reader, Sampling, Token
from ottava.errors import CheckpointError, DataError, ResourceError
from ottava.models.build import from_config
from ottava.models.chat import Chat, write_tiny
from ottava.models.published import published, stored
from ottava.tasks import Problem, chains
from ottava.tasks.base import row as line_of
from ottava.tasks.base import write_lines
from ottava.tasks.verify import grade

END, THINK, ETHINK = 1, 4, 5
VOCABULARY = 6 + len(chains.vocabulary())
CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": END,
    "tie_word_embeddings": False,
}


def random_model(seed: int = 0, *, quiet: Sequence[int] = ()) -> nn.Module:
    """A DeepseekV3 with random weights. quiet: ids that it never prefers."""
    model = from_config(CONFIG)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.0 if "embed" in name else 1.5 / parameter.shape[-1] ** 0.5)
            parameter.copy_(parameter.bfloat16())
        head: Any = model.get_submodule("lm_head")
        head.weight[list(quiet)] = 0
        # a zero row has logit 0, and the largest of many random logits is above it
    return model.eval()


@pytest.mark.parametrize(
    ("change", "said"),
    [({"hidden_size": "abc"}, "hidden_size"), ({"hidden_size": -8}, "negative dimension"), ({"model_type": "x"}, "x")],
)
def test_a_config_that_describes_no_model_is_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as caught:
        from_config(CONFIG | change, Path("folder/config.json"))
    assert caught.value.where == "folder/config.json"
    assert caught.value.fix


def write_folder(folder: Path, model: nn.Module) -> Path:
    """A BF16 Hugging Face folder of the model with the tiny tokenizer."""
    write_tiny(folder, chains.vocabulary())
    (folder / "config.json").write_text(json.dumps({**CONFIG, "architectures": ["DeepseekV3ForCausalLM"]}))
    safetensors.write(folder / "model.safetensors", [(name, stored(item)) for name, item in published(model).items()])
    return folder


@cache
def tiny_chat() -> Chat:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_tiny(folder, chains.vocabulary())
        return Chat.load(folder)


class Scripted(nn.Module):
    """Stands in for a model: after a prompt it says the ids that `script(prompt)` gives, one a step."""

    def __init__(
        self,
        script: Callable[[list[int]], Sequence[int]],
        *,
        delay: float = 0.0,
        context: int = 512,
        words: int = VOCABULARY,
    ):
        super().__init__()
        from transformers import DeepseekV3Config

        self.config = DeepseekV3Config(**{**CONFIG, "max_position_embeddings": context})
        self.weight = nn.Parameter(torch.zeros(1))
        self.script, self.delay, self.words, self.steps = script, delay, words, 0

    def forward(self, input_ids: Tensor, past_key_values: Any, **_: Any) -> SimpleNamespace:
        time.sleep(self.delay)
        self.steps += 1
        state = past_key_values.__dict__.setdefault("scripted", (input_ids, 0))
        prompts, position = state
        past_key_values.scripted = (prompts, position + 1)
        logits = torch.zeros(len(prompts), 1, self.words)
        for row, prompt in enumerate(prompts.tolist()):
            line = self.script(prompt)
            logits[row, 0, line[position] if position < len(line) else 0] = 9.0
        return SimpleNamespace(logits=logits)


def prompts(count: int, length: int = 7) -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(6, VOCABULARY, (count, length)))


# ---- generation


def test_greedy_equals_hugging_face_generate() -> None:
    seen = set()
    for seed in range(2):
        model, ids = random_model(seed), prompts(6)
        ours = generate(model, ids, 20, stop=END)
        theirs = model.generate(  # type: ignore[operator]
            ids,
            max_new_tokens=20,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=END,
            attention_mask=torch.ones_like(ids),
        )
        assert torch.equal(ours, theirs[:, ids.shape[1] :])
        seen |= set(ours.flatten().tolist())
    assert len(seen) > 20  # the model does not just repeat itself


def test_rows_end_at_their_stop_and_are_padded() -> None:
    lines = {6: [9, 8, END, 9], 7: [9, END, 8, 8], 8: [9, 9, 9, 9, 9]}
    model = Scripted(lambda prompt: lines[prompt[0]])
    ids = torch.tensor([[6], [7], [8]])
    assert generate(model, ids, 5, stop=END).tolist() == [[9, 8, END, 0, 0], [9, END, 0, 0, 0], [9, 9, 9, 9, 9]]
    assert generate(model, ids[:2], 5, stop=END).tolist() == [[9, 8, END], [9, END, 0]]
    assert generate(model, ids[:2], 5, stop=[8, END]).tolist() == [[9, 8], [9, END]]
    assert generate(model, ids, 0, stop=END).shape == (3, 0)


def test_training_mode_is_given_back() -> None:
    model = random_model().train()
    generate(model, prompts(1), 2, stop=END)
    assert model.training


def plain_sampler(model: nn.Module, prompt: list[int], new: int, how: Sampling, row: int) -> list[int]:
    """A second implementation: no cache, no batch, probabilities and draws in plain Python."""
    out: list[int] = []
    while len(out) < new and END not in out:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + out])).logits[0, -1].double().tolist()
        top = max(logits)
        weights = [np.exp((x - top) / how.temperature) for x in logits]
        total = sum(weights)
        order = sorted(range(len(logits)), key=lambda i: -weights[i])
        kept: list[int] = []
        while sum(weights[i] for i in kept) < how.top_p * total and len(kept) < len(order):
            kept.append(order[len(kept)])
        target = plain_uniform(how.seed or 0, row, len(out)) * sum(weights[i] for i in kept)
        for i in kept:
            target -= weights[i]
            if target < 0:
                break
        out.append(i)
    return out


def plain_uniform(seed: int, row: int, position: int) -> float:
    mask = (1 << 64) - 1

    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    return (mix(mix(mix(seed & mask) ^ row) ^ position) >> 11) / 2**53


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (1.5, 0.8), (0.5, 0.3)])
def test_sampling_is_a_function_of_seed_row_and_position(temperature: float, top_p: float) -> None:
    model, ids = random_model(), prompts(4)
    how, new = Sampling(8, temperature, top_p, seed=77), 8
    rows = [3, 0, 1000, 12]
    expected = [plain_sampler(model, ids[i].tolist(), new, how, rows[i]) for i in range(4)]
    together = generate(model, ids, new, stop=END, temperature=temperature, top_p=top_p, seed=77, rows=rows)
    assert [trim(row) for row in together.tolist()] == expected
    for part in ([0], [1, 3], [2, 0, 1]):
        chosen = [rows[i] for i in part]
        some = generate(model, ids[part], new, stop=END, temperature=temperature, top_p=top_p, seed=77, rows=chosen)
        assert [trim(row) for row in some.tolist()] == [expected[i] for i in part]
    other = generate(model, ids, new, stop=END, temperature=1.0, seed=78)
    assert other.tolist() != generate(model, ids, new, stop=END, temperature=1.0, seed=77).tolist()


def trim(row: list[int]) -> list[int]:
    return row[: row.index(END) + 1] if END in row else row


@given(st.integers(-(2**63), 2**64 - 1), st.lists(st.integers(0, 2**40), min_size=1, max_size=5), st.integers(0, 9999))
def test_uniform_equals_the_plain_form(seed: int, rows: list[int], position: int) -> None:
    assert uniform(seed, rows, position).tolist() == [plain_uniform(seed, row, position) for row in rows]


def test_uniform_is_flat_along_every_axis() -> None:
    axes = [
        np.concatenate([uniform(seed, [3], 4) for seed in range(5000)]),
        uniform(3, np.arange(5000), 4),
        np.concatenate([uniform(3, [4], position) for position in range(5000)]),
    ]
    for draws in axes:
        counts, _ = np.histogram(draws, bins=20, range=(0, 1))
        assert ((counts - 250) ** 2 / 250).sum() < 43.8  # chi-square, 19 degrees of freedom, 0.1%
        assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.05


@settings(deadline=None)
@given(st.lists(st.floats(-6, 6), min_size=2, max_size=8), st.floats(0.2, 3), st.floats(0.05, 1))
def test_choices_have_the_right_shares(values: list[float], temperature: float, top_p: float) -> None:
    draws = (np.arange(2000) + 0.5) / 2000
    chosen = choose(torch.tensor([values]).expand(2000, -1), temperature, top_p, draws)
    share = np.bincount(chosen.numpy(), minlength=len(values)) / 2000
    p = np.exp(np.asarray(values, np.float32).astype(float) / temperature)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    before = np.cumsum(p[order]) - p[order]
    kept = order[before < top_p - 1e-12]
    expected = np.zeros(len(values))
    expected[kept] = p[kept] / p[kept].sum()
    edge = np.abs(before - top_p).min() < 1e-9
    assert edge or np.abs(share - expected).max() <= 1 / 2000 + 1e-9


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-9])
def test_the_coldest_temperatures_are_greedy(temperature: float) -> None:
    logits = torch.tensor([[-3.0, 2.0, 1.9], [500.0, -500.0, 0.0]])
    for draw in (0.0, 0.5, 1 - 2**-53):
        assert choose(logits, temperature, 0.9, np.array([draw, draw])).tolist() == [1, 0]


@pytest.mark.parametrize("budget", [0, 1, 2, 7, 30])
def test_the_thinking_budget_is_exact(budget: int) -> None:
    wordy = random_model(quiet=[END, ETHINK])
    out = generate(wordy, prompts(5), 20, stop=END, think=ThinkBudget(ETHINK, budget))
    for row in out.tolist():
        assert row.count(ETHINK) == (1 if budget < 20 else 0)
        assert budget >= 20 or row.index(ETHINK) == budget
    free = generate(wordy, prompts(5), 20, stop=END)
    assert torch.equal(out[:, :budget], free[:, :budget])  # before the end of the budget nothing changes


def test_thinking_that_ends_by_itself_is_left_alone() -> None:
    model = Scripted(lambda prompt: [8, 9, ETHINK, 8, 8, 8, END])
    for budget, expected in ((2, [8, 9, ETHINK, 8, 8, 8, END]), (1, [8, ETHINK, ETHINK, 8, 8, 8, END])):
        assert generate(model, prompts(1), 9, stop=END, think=ThinkBudget(ETHINK, budget)).tolist() == [expected]
    stopped = Scripted(lambda prompt: [8, END])
    assert generate(stopped, prompts(1), 9, stop=END, think=ThinkBudget(ETHINK, 4)).tolist() == [[8, END]]


# ---- evaluation


def problems() -> list[Problem]:
    rng = np.random.default_rng(0)
    return [p for steps in (3, 1, 2) for p in chains.sample(rng, steps, 5, "train")]


def scripted_student(wrong: Collection[str] = (), spoil: Callable[[list[int]], list[int]] = lambda x: x) -> Scripted:
    """A student that reasons as taught, but gives another digit to the problems in `wrong`."""
    chat, by_prompt = tiny_chat(), {}
    for p in problems():
        said = str((int(p.answer) + 1) % 10) if p.id in wrong else p.answer
        for thinking in (True, False):
            prompt = tuple(chat.prompts([p.question], thinking)[0])
            by_prompt[prompt] = spoil(chat.reply(said, chains.trace(p) if thinking else None))
    return Scripted(lambda prompt: by_prompt[tuple(prompt)])


@pytest.mark.parametrize("thinking", [True, False])
def test_evaluation_counts_right_answers_by_steps(thinking: bool) -> None:
    asked = problems()
    wrong = {asked[0].id, asked[1].id, asked[7].id}
    for batch in (1, 4, 256):
        found = evaluate(scripted_student(wrong), tiny_chat(), asked, thinking, partial(grade, chains), batch=batch)
        assert (found["n"], found["correct"], found["value"]) == (15, 12, 0.8)
        assert found["by_steps"] == {
            "1": {"n": 5, "correct": 4},
            "2": {"n": 5, "correct": 5},
            "3": {"n": 5, "correct": 3},
        }
        assert found["low"] == pytest.approx(0.548, abs=5e-4)  # Wilson for 12 of 15
        assert found["high"] == pytest.approx(0.930, abs=5e-4)
        traces = [chains.trace(p) if thinking else None for p in asked]
        said = [str((int(p.answer) + 1) % 10) if p.id in wrong else p.answer for p in asked]
        ids = [tiny_chat().reply(s, t) for s, t in zip(said, traces, strict=True)]
        assert found["digest"] == hashlib.sha256(json.dumps(ids, separators=(",", ":")).encode()).hexdigest()


@pytest.mark.parametrize(
    ("thinking", "spoil"),
    [
        (True, lambda ids: [i for i in ids if i != ETHINK]),
        (True, lambda ids: [*ids[:-2], ETHINK, *ids[-2:]]),
        (True, lambda ids: ids[:-1]),
        (True, lambda ids: [*ids[:-1], 3, END]),
        (True, lambda ids: [*ids[:-1], ids[-2], END]),
        (False, lambda ids: [ETHINK, *ids]),
        (False, lambda ids: [THINK, *ids]),
        (False, lambda ids: ids[:-1]),
        (False, lambda ids: [2, *ids]),
    ],
)
def test_ill_formed_answers_do_not_count(thinking: bool, spoil: Callable[[list[int]], list[int]]) -> None:
    model = scripted_student(spoil=spoil)
    assert evaluate(model, tiny_chat(), problems(), thinking, partial(grade, chains))["correct"] == 0


def test_a_think_token_of_its_own_at_the_front_is_well_formed() -> None:
    chat = tiny_chat()
    assert well_formed(chat, [THINK, 9, ETHINK, 9, END], True)
    assert not well_formed(chat, [9, THINK, ETHINK, 9, END], True)
    assert not well_formed(chat, [], True)
    assert not well_formed(chat, [9, END, 9], False)


def test_an_evaluation_without_problems_is_refused() -> None:
    with pytest.raises(DataError):
        answer(random_model(), tiny_chat(), [], True)


def test_a_folder_is_evaluated_as_its_model(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", random_model(5))
    for name, steps in (("test", 2), ("test_one_step", 1)):
        write_lines(tmp_path / f"{name}.jsonl", [line_of("chains", p) for p in problems() if p.steps == steps])
    args = {"model": str(folder), "data": str(tmp_path), "task": "chains"}
    found = evaluate_folder(args)
    assert set(found) == {"thinking", "direct", "direct_one_step", "answers_digest"}
    assert (found["thinking"]["by_steps"].keys(), found["direct_one_step"]["n"]) == ({"2"}, 5)
    assert json.loads(json.dumps(found)) == found == evaluate_folder(args)
    write_folder(folder, random_model(6))
    assert evaluate_folder(args)["answers_digest"] != found["answers_digest"]


# ---- sessions


def run_all(engine: Engine, asked: list[tuple[list[int], Sampling]]) -> list[list[Token]]:
    """All requests at once, each from a thread of its own."""
    out: list[list[Token]] = [[] for _ in asked]

    def work(i: int) -> None:
        out[i] = list(engine.stream(*asked[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return out


def test_neighbours_do_not_change_an_answer() -> None:
    model = random_model()
    ids = [row[: 3 + i] for i, row in enumerate(prompts(5).tolist())]
    hows = [Sampling(15), Sampling(9, 1.0, seed=4), Sampling(20, 1.3, 0.7, seed=5), Sampling(3), Sampling(12)]
    engine = Engine(model, tiny_chat(), slots=3, queue=8)
    alone = [list(engine.stream(*each)) for each in zip(ids, hows, strict=True)]
    together = run_all(engine, list(zip(ids, hows, strict=True)))
    engine.close()
    assert together == alone
    for row, how, tokens in zip(ids, hows, alone, strict=True):
        batch = generate(
            model,
            torch.tensor([row]),
            how.max_new,
            stop=END,
            temperature=how.temperature,
            top_p=how.top_p,
            seed=how.seed,
        )
        assert [token.id for token in tokens] == batch[0].tolist()


def test_log_probabilities_are_those_of_the_model() -> None:
    model, ids = random_model(), prompts(1)[0].tolist()
    engine = Engine(model, tiny_chat())
    tokens = list(engine.stream(ids, Sampling(8, 1.0, seed=3, top=3)))
    engine.close()
    whole = torch.tensor([ids + [token.id for token in tokens]])
    with torch.no_grad():
        logprobs = torch.log_softmax(model(input_ids=whole).logits[0, len(ids) - 1 : -1], -1)
    for row, token in zip(logprobs, tokens, strict=True):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
        assert [i for i, _ in token.top] == row.topk(3).indices.tolist()
        assert [p for _, p in token.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


def test_a_fresh_seed_each_time_unless_one_is_given() -> None:
    engine = Engine(random_model(), tiny_chat())
    how, ids = Sampling(20, 2.0), prompts(1)[0].tolist()

    def said(sampling: Sampling) -> list[int]:
        return [token.id for token in engine.stream(ids, sampling)]

    assert said(replace(how, seed=1)) == said(replace(how, seed=1))
    assert said(how) != said(how)
    engine.close()


@pytest.mark.parametrize("budget", [0, 3])
def test_sessions_keep_the_thinking_budget(budget: int) -> None:
    engine = Engine(random_model(quiet=[END, ETHINK]), tiny_chat())
    ids = [token.id for token in engine.stream([2, 8, 3, 4], Sampling(9, think=ThinkBudget(ETHINK, budget)))]
    engine.close()
    assert (ids.index(ETHINK), ids.count(ETHINK), len(ids)) == (budget, 1, 9)


def test_leaving_a_stream_stops_the_generation() -> None:
    model = Scripted(lambda prompt: [9] * 400, delay=0.002)
    engine = Engine(model, tiny_chat())
    stream = engine.stream([8], Sampling(400))
    next(stream)
    stream.close()
    deadline = time.monotonic() + 120
    while engine.load_now and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.load_now == 0
    assert model.steps < 100
    assert [token.id for token in engine.stream([8], Sampling(2))] == [9, 9]
    engine.close()


def test_admission_is_bounded_and_room_is_given_back() -> None:
    hold = threading.Event()

    def script(prompt: list[int]) -> list[int]:
        hold.wait(10)
        return [9, END]

    engine = Engine(Scripted(script), tiny_chat(), slots=1, queue=2)
    done: list[Token | Exception | None] = []
    jobs = [engine.submit([8], Sampling(5), done.append) for _ in range(3)]
    with pytest.raises(QueueFull):
        engine.submit([8], Sampling(5), done.append)
    jobs[2].cancel()
    engine.submit([8], Sampling(5), done.append)
    hold.set()
    deadline = time.monotonic() + 120
    while done.count(None) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    engine.close()
    assert [item.id for item in done if isinstance(item, Token)] == [9, END] * 3


def test_who_waits_too_long_is_sent_away() -> None:
    """The reply that holds the slot goes on until the test ends it, so nothing depends on how fast that is."""
    engine = Engine(Scripted(lambda _: [9] * 9, context=1 << 40), tiny_chat(), slots=1, queue=2, queue_s=0.05)
    held = engine.submit([8], Sampling(1 << 40), lambda _: None)
    arrived: SimpleQueue[Token | Exception | None] = SimpleQueue()
    for _ in range(2):
        engine.submit([8], Sampling(1), arrived.put)
    assert [type(arrived.get(timeout=120)) for _ in range(2)] == [Overdue] * 2
    assert engine.load_now == 1
    held.cancel()
    while engine.load_now:
        time.sleep(0.01)
    engine.queue_s = 0.0  # who need not wait never waits too long
    assert len(list(engine.stream([8], Sampling(2)))) == 2
    engine.close()


def test_prompts_must_fit_the_context() -> None:
    engine = Engine(Scripted(lambda prompt: [9] * 99, context=10), tiny_chat())
    assert len(list(engine.stream([8] * 7, Sampling(50)))) == 3
    for ids in ([], [8] * 10):
        with pytest.raises(DataError):
            list(engine.stream(ids, Sampling(5)))
    engine.close()


def test_a_fault_reaches_its_request_and_no_other() -> None:
    def script(prompt: list[int]) -> list[int]:
        if prompt == [7]:
            raise FloatingPointError("bad luck")
        return [9, END]

    engine = Engine(Scripted(script), tiny_chat())
    with pytest.raises(FloatingPointError):
        list(engine.stream([7], Sampling(5)))
    assert [token.id for token in engine.stream([8], Sampling(5))] == [9, END]
    engine.close()
    with pytest.raises(ResourceError):
        list(engine.stream([8], Sampling(5)))


# ---- reading a reply


def read(ids: Sequence[int], thinking: bool, stop: Sequence[str] = ()) -> tuple[str, str, Reader, list[str]]:
    reader = Reader(tiny_chat(), thinking, stop)
    pieces = []
    for i in ids:
        pieces += reader.add(Token(i, -1.0))
        if reader.finish == "stop":
            break
    pieces += reader.end()
    text = {part: "".join(p.text for p in pieces if p.part == part) for part in ("reasoning", "content")}
    return text["reasoning"], text["content"], reader, [p.text for p in pieces]


@given(st.lists(st.integers(6, VOCABULARY - 1)), st.lists(st.integers(6, VOCABULARY - 1)), st.booleans(), st.booleans())
def test_a_reply_is_read_as_it_is_split(before: list[int], after: list[int], thinking: bool, ends: bool) -> None:
    chat = tiny_chat()
    ids = [*([*before, ETHINK] if thinking else []), *after, *([END] if ends else [])]
    reasoning, content, reader, _ = read(ids, thinking)
    assert (reasoning if thinking else None, content) == chat.split(ids, thinking)
    assert reader.finish == ("stop" if ends else "length")
    assert (reader.total, reader.reasoning) == (len(ids), len(before) if thinking else 0)


words = st.lists(st.sampled_from(["1", "2", "a", "b", "+1"]), min_size=1, max_size=8).map(" ".join)


@given(words, st.lists(words.map(lambda w: w[:5]).filter(str.strip), max_size=3))
def test_stop_texts_end_the_content_and_never_show(text: str, stops: list[str]) -> None:
    ids = tiny_chat().encode(text)
    _, content, reader, pieces = read(ids, False, stops)
    first = min((len(text[: text.find(s) + len(s)]) for s in stops if s in text), default=None)
    if first is None:
        assert (content, reader.finish) == (text, "length")
    else:
        assert reader.finish == "stop"
        assert text.startswith(content)
        assert not any(stop in content for stop in stops)
        assert any(text.startswith(content + stop) for stop in stops)
    assert "".join(pieces) == content


def test_stop_texts_do_not_end_the_reasoning() -> None:
    ids = tiny_chat().reply("1 2 3", "1 2 a")
    reasoning, content, reader, _ = read(ids, True, ["2"])
    assert (reasoning, content, reader.finish) == ("1 2 a", "1 ", "stop")
