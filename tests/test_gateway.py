"""The server answers as the model does, decides the mode once, and nothing a client sends breaks it."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ottava.artifact import Artifact, file_digest
from ottava.context import Context
from ottava.engine.session import Engine, Sampling
from ottava.errors import DataError, PlatformError, ResourceError
from ottava.gateway import modes, schema
from ottava.gateway.app import Gateway
from ottava.gateway.chat import ChatRequest
from ottava.gateway.client import KEY, ask
from ottava.gateway.schema import ApiError
from ottava.gateway.server import serve
from ottava.journal import Journal
from ottava.models.chat import Chat
from ottava.recipe import Fleet, Pool
from ottava.stages import serve as stage
from ottava.supervisor.local import LocalLauncher, LocalProcess
from ottava.tasks import Problem, chains
from ottava.tasks.base import row, write_lines

from . import conform
from .test_engine import END, ETHINK, Scripted, random_model, tiny_chat, write_folder

QUESTION = "7 a +5 b *3 ="
PROBLEM = Problem("p", 2, QUESTION, "6")
URL = "/v1/chat/completions"
USER = [{"role": "user", "content": QUESTION}]
NAME = "tiny"


# ---- the mode switch


EFFORTS: dict[Any, bool | None] = {
    None: None,
    **dict.fromkeys(("none", "minimal"), False),
    **dict.fromkeys(("low", "medium", "high", "xhigh", "max"), True),
}
FORMS: dict[str, dict[Any, bool | None]] = {
    "thinking": {None: None, "enabled": True, "disabled": False},
    "reasoning_effort": dict(EFFORTS),
    "reasoning": dict(EFFORTS),
    "kwargs.thinking": {None: None, True: True, False: False},
    "kwargs.enable_thinking": {None: None, True: True, False: False},
    "model": {None: None, "tiny": None, "tiny-thinking": True, "tiny-direct": False},
}


def request_of(values: dict[str, Any]) -> dict[str, Any]:
    body: dict[str, Any] = {"messages": USER}
    if values["thinking"] is not None:
        body["thinking"] = {"type": values["thinking"]}
    if values["reasoning"] is not None:
        body["reasoning"] = {"effort": values["reasoning"]}
    kwargs = {k.split(".")[1]: values[k] for k in values if k.startswith("kwargs") and values[k] is not None}
    if kwargs:
        body["chat_template_kwargs"] = kwargs
    return body | {k: values[k] for k in ("reasoning_effort", "model") if values[k] is not None}


def test_the_mode_switch_truth_table() -> None:
    seen = 0
    for combination in itertools.product(*FORMS.values()):
        values = dict(zip(FORMS, combination, strict=True))
        votes = {FORMS[form][value] for form, value in values.items()} - {None}
        asked = modes.wishes(schema.parse(ChatRequest, json.dumps(request_of(values)).encode()), NAME)
        assert len(asked) == sum(FORMS[form][value] is not None for form, value in values.items())
        for switch in (True, False):
            if len(votes) == 2 or (votes == {True} and not switch):
                with pytest.raises(modes.Conflict):
                    modes.decide(asked, switch)
            else:
                assert modes.decide(asked, switch) is (votes == {True})
        seen += 1
    assert seen == 3 * 8 * 8 * 3 * 3 * 4


def test_a_conflict_names_both_forms() -> None:
    body = {"messages": USER, "thinking": {"type": "enabled"}, "chat_template_kwargs": {"enable_thinking": False}}
    with pytest.raises(modes.Conflict) as caught:
        modes.decide(modes.wishes(schema.parse(ChatRequest, json.dumps(body).encode()), NAME), True)
    assert "thinking.type='enabled'" in str(caught.value)
    assert "chat_template_kwargs.enable_thinking=false" in str(caught.value)


def test_names_with_a_suffix_exist_only_where_there_is_a_switch() -> None:
    assert modes.served_names("m", True) == ["m", "m-thinking", "m-direct"]
    assert modes.served_names("m", False) == ["m"]


# ---- the application, in process


def student(delay: float = 0.0) -> Scripted:
    """Answers QUESTION as taught; any other prompt with nines."""
    chat = tiny_chat()
    lines = {
        tuple(chat.prompts([QUESTION], True)[0]): chat.reply("6", chains.trace(PROBLEM)),
        tuple(chat.prompts([QUESTION], False)[0]): chat.reply("6"),
    }
    return Scripted(lambda prompt: lines.get(tuple(prompt), [9] * 400), delay=delay)


Session = Callable[[httpx.AsyncClient], Awaitable[Any]]


def session(gateway: Gateway, work: Session) -> Any:
    """Run `work` with a client of the application; exceptions inside it are raised here."""

    async def main() -> Any:
        transport = httpx.ASGITransport(gateway.app())
        hooks = {"response": [conform.hook]}  # every answer is held against the OpenAPI document
        async with httpx.AsyncClient(transport=transport, base_url="http://server", event_hooks=hooks) as client:
            return await work(client)

    return asyncio.run(main())


def post(gateway: Gateway, body: Any, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()

    async def work(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post(URL, content=content, headers={"content-type": "application/json", **headers})

    return cast(httpx.Response, session(gateway, work))


def streamed(gateway: Gateway, body: dict[str, Any]) -> dict[str, Any]:
    """A streamed answer put together again, in the shape of a plain one."""
    response = post(gateway, {**body, "stream": True, "stream_options": {"include_usage": True}})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    message: dict[str, Any] = {"role": None, "content": "", "refusal": None, "reasoning": None}
    finish, logprobs = None, []
    for chunk in chunks[:-1]:
        assert chunk["object"] == "chat.completion.chunk"
        (choice,) = chunk["choices"]
        delta = choice["delta"]
        assert delta.get("reasoning") == delta.get("reasoning_content")
        message["role"] = message["role"] or delta["role"]
        message["content"] += delta.get("content", "")
        if "reasoning" in delta:
            message["reasoning"] = (message["reasoning"] or "") + delta["reasoning"]
        finish = choice["finish_reason"] or finish
        logprobs += (choice["logprobs"] or {"content": []})["content"]
    assert chunks[-1]["choices"] == []
    message["reasoning_content"] = message["reasoning"]
    return {"message": message, "finish_reason": finish, "usage": chunks[-1]["usage"], "logprobs": logprobs}


@pytest.fixture(scope="module")
def taught() -> Iterator[Gateway]:
    engine = Engine(student(), tiny_chat())
    yield Gateway(engine, NAME)
    engine.close()


@pytest.fixture(scope="module")
def random() -> Iterator[Gateway]:
    engine = Engine(random_model(), tiny_chat())
    yield Gateway(engine, NAME, max_body=20_000)
    engine.close()


def test_thinking_and_direct_answers(taught: Gateway) -> None:
    answer = post(taught, {"messages": USER, "thinking": {"type": "enabled"}}).json()
    (choice,) = answer["choices"]
    trace = "7 a +5 2 b *3 6"
    assert choice["message"] == {
        "role": "assistant",
        "content": "6",
        "refusal": None,
        "reasoning": trace,
        "reasoning_content": trace,
    }
    assert (choice["finish_reason"], answer["object"], answer["model"]) == ("stop", "chat.completion", NAME)
    assert answer["usage"] == {
        "prompt_tokens": 9,
        "completion_tokens": 10,
        "total_tokens": 19,
        "completion_tokens_details": {"reasoning_tokens": 7},
    }
    direct = post(taught, {"messages": USER}).json()
    message = direct["choices"][0]["message"]
    assert (message["content"], message["reasoning"], message["reasoning_content"]) == ("6", None, None)
    assert direct["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0


def test_an_answer_can_be_sent_back_as_a_turn(taught: Gateway) -> None:
    message = post(taught, {"messages": USER, "thinking": {"type": "enabled"}}).json()["choices"][0]["message"]
    again = post(taught, {"messages": [*USER, message, *USER], "max_tokens": 1})
    assert again.json()["usage"]["prompt_tokens"] == 9 + 2 + 9  # content and end; the reasoning is left out
    parts = [{"role": "user", "content": [{"type": "text", "text": "7 a +5 "}, {"type": "text", "text": "b *3 ="}]}]
    assert post(taught, {"messages": parts}).json()["choices"][0]["message"]["content"] == "6"


def test_length_stop_texts_and_budget(taught: Gateway) -> None:
    on = {"messages": USER, "reasoning_effort": "high"}
    cut = post(taught, {**on, "max_completion_tokens": 4}).json()["choices"][0]
    assert (cut["finish_reason"], cut["message"]["content"], cut["message"]["reasoning"]) == ("length", "", "7 a +5 2")
    none = post(taught, {**on, "thinking": {"type": "enabled", "budget_tokens": 2}, "max_tokens": 5}).json()
    assert none["choices"][0]["message"]["reasoning"] == "7 a"
    assert none["usage"]["completion_tokens_details"]["reasoning_tokens"] == 2
    nines = {"messages": [{"role": "user", "content": "1 a +1 ="}], "max_tokens": 30}
    word = tiny_chat().decode([9])
    whole = post(taught, nines).json()["choices"][0]["message"]["content"]
    assert whole == " ".join([word] * 30)
    ended = post(taught, {**nines, "stop": [f"{word} {word} {word}"]}).json()
    assert (ended["choices"][0]["finish_reason"], ended["choices"][0]["message"]["content"]) == ("stop", "")
    assert ended["usage"]["completion_tokens"] == 3


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([None, "enabled", "disabled"]),
    st.sampled_from([None, 0, 3]),
    st.floats(0, 2),
    st.floats(0.1, 1),
    st.integers(-5, 5),
    st.lists(st.sampled_from(["1", "2 ", "a", " +", "3 *"]), max_size=2),
    st.integers(1, 12),
    st.sampled_from([None, 0, 2]),
)
def test_a_stream_is_the_plain_answer(
    random: Gateway,
    switch: str | None,
    budget: int | None,
    temperature: float,
    top_p: float,
    seed: int,
    stop: list[str],
    limit: int,
    top: int | None,
) -> None:
    body: dict[str, Any] = {"messages": USER, "temperature": temperature, "top_p": top_p, "seed": seed}
    body |= {"stop": stop, "max_tokens": limit, "logprobs": top is not None, "top_logprobs": top}
    if switch:
        body["thinking"] = {"type": switch, "budget_tokens": budget if switch == "enabled" else None}
    plain = post(random, body).json()
    again = streamed(random, body)
    (choice,) = plain["choices"]
    assert again["message"] == choice["message"]
    assert (again["finish_reason"], again["usage"]) == (choice["finish_reason"], plain["usage"])
    assert again["logprobs"] == (choice["logprobs"] or {"content": []})["content"]


BAD: list[tuple[Any, int, str]] = [
    ({"messages": USER, "temprature": 1}, 400, "did you mean 'temperature'"),
    ({"messages": USER, "temperature": "1"}, 400, "temperature"),
    ({"messages": USER, "temperature": 3}, 400, "temperature"),
    ({"messages": USER, "temperature": True}, 400, "temperature"),
    ({"messages": USER, "n": 9}, 400, "n: "),
    ({"messages": USER, "n": 10**400}, 400, "n: "),
    ({"messages": USER, "seed": 2**63}, 400, "seed"),
    ({"messages": USER, "max_tokens": 0}, 400, "max_tokens"),
    ({"messages": USER, "max_tokens": 5, "max_completion_tokens": 6}, 400, "differ"),
    ({"messages": USER, "top_logprobs": 2}, 400, "needs logprobs"),
    ({"messages": USER, "tools": [{"type": "function"}]}, 400, "tools.0.function"),
    ({"messages": USER, "stop": ["a"] * 5}, 400, "stop"),
    ({"messages": USER, "stop": ""}, 400, "stop"),
    ({"messages": USER, "reasoning_effort": "extreme"}, 400, "reasoning_effort"),
    ({"messages": USER, "thinking": {"type": "maybe"}}, 400, "thinking.type"),
    ({"messages": USER, "thinking": True}, 400, "thinking"),
    ({"messages": USER, "thinking": {"type": "disabled", "budget_tokens": 4}}, 400, "budget_tokens needs thinking"),
    ({"messages": USER, "chat_template_kwargs": {"tokenize": True}}, 400, "chat_template_kwargs.tokenize: unknown"),
    ({"messages": USER, "chat_template_kwargs": {"thinking": "yes"}}, 400, "chat_template_kwargs.thinking"),
    ({"messages": USER, "chat_template": "{{ 1 }}"}, 400, "unknown field"),
    ({"messages": USER, "reasoning_effort": "none", "model": "tiny-thinking"}, 400, "model='tiny-thinking' asks for"),
    ({"messages": USER, "model": "gpt-5"}, 404, "served: tiny, tiny-thinking, tiny-direct"),
    ({"messages": USER, "response_format": {"type": "json_object"}}, 400, "this model's tokenizer"),
    ({"messages": []}, 400, "messages"),
    ({}, 400, "messages"),
    ([], 400, "object"),
    ({"messages": [{"role": "user"}]}, 400, "needs content"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "role"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "needs the tool_call_id"),
    ({"messages": [{"role": "user", "content": "seven"}]}, 400, "does not know the word 'seven'"),
    ({"messages": [{"role": "user", "content": "7 <|end|> 6"}]}, 400, "control token"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "1 " * 600}]}, 400, "context"),
    (b"", 400, "JSON"),
    (b"{", 400, "JSON"),
    (b"\xff\xfe{}", 400, "JSON"),
    (b'{"messages": [{"role": "user", "content": "\xe2\x82"}]}', 400, "JSON"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "JSON"),
    (b'{"messages": [], "temperature": NaN}', 400, ""),
    (b"[" * 9000, 400, "JSON"),
    (b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}", 400, "JSON"),
    (b'{"seed": ' + b"9" * 15000 + b"}", 400, ""),
    (b'{"messages": "' + b"x" * 30_000 + b'"}', 413, "larger than 20000 bytes"),
]


@pytest.mark.parametrize(("body", "status", "words"), BAD)
def test_bad_requests_are_refused_in_the_shape_of_openai(random: Gateway, body: Any, status: int, words: str) -> None:
    response = post(random, body)
    assert (response.status_code, set(response.json())) == (status, {"error"})
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]
    assert "pydantic" not in error["message"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**20) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
texts = st.text(max_size=10) | st.sampled_from([QUESTION, "7 a +5 ="])
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool", "x"]), "content": texts | json_values},
        optional={"tool_calls": json_values, "reasoning": texts, "name": json_values},
    ),
    max_size=3,
)
fields = st.sampled_from([*ChatRequest.model_fields, "x"])


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.booleans(), messages | json_values, st.dictionaries(fields, json_values, max_size=4))
def test_no_json_is_a_server_fault(random: Gateway, good: bool, said: Any, more: dict[str, Any]) -> None:
    body = {"messages": USER if good else said, "max_tokens": 2} | more
    if body.get("max_tokens") != 2:
        body["max_completion_tokens"] = 2  # differs or is refused: never a long answer
    assert post(random, body).status_code in (200, 400, 404)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60))
def test_no_bytes_are_a_server_fault(random: Gateway, body: bytes) -> None:
    assert post(random, body).status_code == 400


def test_other_paths_methods_and_types(taught: Gateway) -> None:
    async def work(client: httpx.AsyncClient) -> list[httpx.Response]:
        await client.post(URL, json={"messages": USER, "thinking": {"type": "enabled"}})  # so that there is something
        return [
            await client.get("/v1/models"),
            await client.get("/health"),
            await client.get("/metrics"),
            await client.get(URL),
            await client.get("/nothing"),
            await client.post(URL, content=b"{}", headers={"content-type": "text/plain"}),
        ]

    listed, health, metrics, method, path, kind = session(taught, work)
    assert [model["id"] for model in listed.json()["data"]] == ["tiny", "tiny-thinking", "tiny-direct"]
    assert (health.status_code, health.json()) == (200, {"status": "ok"})
    assert 'ottava_tokens_total{kind="reasoning"}' in metrics.text
    assert (method.status_code, path.status_code, kind.status_code) == (405, 404, 415)
    for response in (method, path, kind):
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_who_waits_too_long_is_told_so() -> None:
    engine = Engine(Scripted(lambda _: [9] * 9, context=1 << 40), tiny_chat(), slots=1, queue=3, queue_s=0.05)
    held = engine.submit([8], Sampling(1 << 40), lambda _: None)
    gateway = Gateway(engine, NAME)
    refused = post(gateway, {"messages": USER})
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert refused.json()["error"]["code"] == "queue_timeout"
    said = post(gateway, {"messages": USER, "stream": True}).text  # its header was sent before
    assert json.loads(said.splitlines()[-2].removeprefix("data: "))["error"]["code"] == "queue_timeout"
    assert gateway.running == 0
    held.cancel()
    engine.close()


def test_a_full_queue_says_when_to_come_back() -> None:
    engine = Engine(student(delay=0.01), tiny_chat(), slots=1, queue=1)
    gateway = Gateway(engine, NAME)

    async def work(client: httpx.AsyncClient) -> list[httpx.Response]:
        return await asyncio.gather(*(client.post(URL, json={"messages": USER}) for _ in range(5)))

    answers = session(gateway, work)
    codes = sorted(answer.status_code for answer in answers)
    assert codes == [200, 200, 503, 503, 503]
    for answer in answers:
        if answer.status_code == 503:
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["error"]["code"] == "queue_full"
    assert gateway.running == 0
    assert post(gateway, {"messages": USER}).status_code == 200
    gateway.draining = True
    refused = post(gateway, {"messages": USER})
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    engine.close()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("patience", [0.0, 0.15])
def test_a_client_that_leaves_cancels_its_generation(stream: bool, patience: float) -> None:
    model = student(delay=0.005)
    engine = Engine(model, tiny_chat())
    gateway = Gateway(engine, NAME)
    body = {"messages": [{"role": "user", "content": "1 a +1 ="}], "max_tokens": 400, "stream": stream}

    async def main() -> None:
        leaves = time.monotonic() + patience
        sent = iter([{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}])

        async def receive() -> Any:
            for message in sent:
                return message
            if time.monotonic() < leaves:
                await asyncio.sleep(leaves - time.monotonic())
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            await asyncio.sleep(0)

        scope = {
            "type": "http",
            "method": "POST",
            "path": URL,
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        await asyncio.wait_for(gateway.app()(scope, receive, send), 5)

    asyncio.run(main())
    deadline = time.monotonic() + 120
    while engine.load_now and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (engine.load_now, gateway.running) == (0, 0)
    assert model.steps < 150
    assert gateway.metrics.cancelled._value.get() == 1
    engine.close()


def test_a_model_without_a_switch_answers_plainly(tmp_path: Path) -> None:
    from ottava.models.chat import write_tiny

    write_tiny(tmp_path, chains.vocabulary())
    template = "{% for m in messages %}<|User|>{{ m.content }}{% endfor %}<|Assistant|>"
    (tmp_path / "chat_template.jinja").write_text(template)
    engine = Engine(Scripted(lambda prompt: [9, ETHINK, 9, END]), Chat.load(tmp_path))
    gateway = Gateway(engine, NAME)
    message = post(gateway, {"messages": USER, "reasoning_effort": "none"}).json()["choices"][0]["message"]
    assert (message["content"], message["reasoning"]) == (tiny_chat().decode([9, 9]), None)
    refused = post(gateway, {"messages": USER, "reasoning_effort": "low"})
    assert (refused.status_code, "no thinking switch" in refused.text) == (400, True)
    assert post(gateway, {"messages": USER, "model": "tiny-direct"}).status_code == 404
    engine.close()


def test_a_fault_of_the_model_is_told_and_the_server_lives() -> None:
    def script(prompt: list[int]) -> list[int]:
        raise ResourceError("no memory")

    engine = Engine(Scripted(script), tiny_chat())
    gateway = Gateway(engine, NAME)
    response = post(gateway, {"messages": USER, "stream": True})
    error = json.loads(response.text.split("data: ")[-1])["error"]
    assert (error["message"], error["type"]) == ("no memory", "server_error")
    plain = post(gateway, {"messages": USER})
    assert (plain.status_code, plain.json()["error"]["message"]) == (503, "no memory")
    assert gateway.running == 0
    engine.close()


@pytest.mark.parametrize(
    ("more", "field"),
    [({"stop": ""}, "stop"), ({"stop": 5}, "stop"), ({"response_format": {"x": "text"}}, "response_format"),
     ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"), ({"a-b": 1}, "a-b"), ({"str": 1}, "str")],
)  # fmt: skip
def test_errors_name_the_field_as_the_client_wrote_it(more: dict[str, Any], field: str) -> None:
    with pytest.raises(ApiError) as caught:
        schema.parse(ChatRequest, json.dumps({"messages": USER, **more}).encode())
    assert caught.value.param == field
    assert caught.value.message.startswith(f"{field}: ")


@pytest.mark.parametrize("url", ["http://[::bad", "ftp://x", "x", "", "http://", "http://x:99999"])
def test_what_is_no_address_is_said(url: str) -> None:
    with pytest.raises(DataError) as caught:
        next(ask(url, "hi"))
    assert caught.value.what == "not an http(s) address"
    assert caught.value.fix


def test_errors_of_the_schema_never_repeat_the_input() -> None:
    with pytest.raises(ApiError) as caught:
        schema.parse(ChatRequest, json.dumps({"messages": USER, "temperature": "secret"}).encode())
    assert "secret" not in caught.value.message


# ---- the process


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that never ends by itself, with room for replies that last."""
    made = write_folder(tmp_path_factory.mktemp("served") / "model", random_model(quiet=[0, END, 2, 3, 4, ETHINK]))
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16384}))
    return made


def start(launcher: LocalLauncher, model: Path, tmp_path: Path, **more: Any) -> tuple[LocalProcess, str]:
    ready = tmp_path / "ready.json"
    args = {"model": str(model), "name": NAME, "port": 0, "ready": str(ready), **more}
    process = launcher.spawn("ottava.gateway.server:serve", args, pool=None, logs=tmp_path)
    deadline = time.monotonic() + 120
    while not ready.exists():
        assert process.alive(), process.log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    told = json.loads(ready.read_text())
    assert told["pid"] == process.pid
    return process, f"http://127.0.0.1:{told['port']}"


def official(url: str) -> openai.OpenAI:
    http = openai.DefaultHttpxClient(trust_env=False)
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http, timeout=300)


def load_of(url: str) -> float:
    lines = httpx.get(f"{url}/metrics", trust_env=False).text.splitlines()
    return float(next(line for line in lines if line.startswith("ottava_load")).split()[1])


def test_the_official_client_and_a_drain(launcher: LocalLauncher, folder: Path, tmp_path: Path) -> None:
    process, url = start(launcher, folder, tmp_path, announce=True)
    loaded, listens = process.log.read_text().rsplit("\n", 2)[:2]
    assert listens == f"tiny listens on {url} (Ctrl-C stops it)"
    assert re.fullmatch(r"model: loading\nmodel: ready after \d+\.\d s", loaded)
    client = official(url)
    request: dict[str, Any] = {"model": NAME, "messages": USER, "max_tokens": 20, "temperature": 0}
    on = {"thinking": {"type": "enabled", "budget_tokens": 5}}
    message = client.chat.completions.create(**request, extra_body=on).choices[0].message
    reasoning = cast(Any, message).reasoning
    assert (len(reasoning.split()), len(str(message.content).split())) == (5, 14)
    deltas = [c.choices[0].delta for c in client.chat.completions.create(**request, extra_body=on, stream=True)]
    assert "".join(delta.content or "" for delta in deltas) == message.content
    assert "".join(getattr(delta, "reasoning", None) or "" for delta in deltas) == reasoning
    assert len(deltas) > 10
    direct = client.chat.completions.create(**request, reasoning_effort="none").choices[0].message
    assert cast(Any, direct).reasoning is None
    assert next(ask(url, QUESTION, False))[0] == "content"
    assert next(ask(url, QUESTION, True))[0] == "reasoning"
    with pytest.raises(DataError) as caught:
        list(ask(url, "seven"))
    assert caught.value.what == "the model does not know the word 'seven'"
    assert str(caught.value.fix).startswith("it knows: ")
    with pytest.raises(openai.BadRequestError, match="asks for thinking and"):
        client.chat.completions.create(
            **request, reasoning_effort="high", extra_body={"thinking": {"type": "disabled"}}
        )

    with (
        httpx.Client(trust_env=False) as other,
        other.stream("POST", f"{url}{URL}", json={**request, "max_tokens": 16000, "stream": True}) as response,
    ):
        next(response.iter_text())  # and away
    deadline = time.monotonic() + 120
    while load_of(url) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert load_of(url) == 0

    stream = client.chat.completions.create(**{**request, "max_tokens": 2000}, stream=True)
    words, finish = [], None
    for number, chunk in enumerate(stream):
        if number == 3:
            os.kill(process.pid, signal.SIGTERM)
            time.sleep(0.05)
            refused = httpx.post(f"{url}{URL}", json=request, trust_env=False)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert httpx.get(f"{url}/health", trust_env=False).json() == {"status": "draining"}
        words.append(chunk.choices[0].delta.content or "")
        finish = chunk.choices[0].finish_reason or finish
    assert (finish, len("".join(words).split())) == ("length", 2000)
    assert process.wait(10) == 0
    assert process.result()["drained"] is True
    with pytest.raises(ResourceError, match="no server answers"):
        list(ask(url, QUESTION))


def test_a_drain_has_an_end(launcher: LocalLauncher, folder: Path, tmp_path: Path) -> None:
    process, url = start(launcher, folder, tmp_path, drain_s=0.1)
    body = {"messages": USER, "max_tokens": 16000, "stream": True}
    with httpx.Client(trust_env=False) as client:
        streams = [client.send(client.build_request("POST", f"{url}{URL}", json=body), stream=True) for _ in range(4)]
        process.terminate()
        with pytest.raises(httpx.RemoteProtocolError):  # noqa: PT012
            for stream in streams:
                for _ in stream.iter_bytes():
                    pass
    assert process.wait(20) == 0
    assert process.result()["drained"] is False


def test_a_port_in_use_is_found_before_the_model_is_loaded(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ResourceError, match="port in use") as caught:
            serve({"model": str(tmp_path / "missing"), "port": taken.getsockname()[1]})
    assert "--port 0" in str(caught.value.fix)


# ---- the stage


def artifact_of(folder: Path, stage_name: str) -> Artifact:
    files = {p.relative_to(folder).as_posix(): {"sha256": file_digest(p)} for p in folder.rglob("*") if p.is_file()}
    return Artifact(folder, {"stage": stage_name, "digest": "0", "summary": {}, "files": files})


def context_of(tmp_path: Path, launcher: LocalLauncher) -> Context:
    pool = Pool(name="here")
    for name in ("out", "work"):
        (tmp_path / name).mkdir()
    return Context(
        stage="serve",
        seed=0,
        recipe_name=NAME,
        fleet=Fleet(name="one", pools=(pool,)),
        pool=pool,
        fallback=(),
        stages={},
        out=tmp_path / "out",
        work=tmp_path / "work",
        journal=Journal(tmp_path / "journal.jsonl"),
        launcher=launcher,
        destination=tmp_path / "done",
        meta={"stage": "serve"},
    )


def test_the_stage_serves_asks_and_drains(launcher: LocalLauncher, folder: Path, tmp_path: Path) -> None:
    label = tmp_path / "label"
    label.mkdir()
    write_lines(label / "test.jsonl", [row("chains", PROBLEM)])
    inputs = {"convert": artifact_of(folder.parent, "convert"), "label": artifact_of(label, "label")}
    spec = stage.Spec(max_tokens=24, thinking_tokens=6)
    done = stage.run(spec, inputs, context_of(tmp_path, launcher))
    summary = done.summary
    assert summary["model_dir"] == str(folder)
    assert (summary["thinking_ok"], summary["direct_ok"], summary["streamed"], summary["drained"]) == (True,) * 4
    example = summary["example"]
    assert (example["question"], len(example["thinking"]["reasoning"].split())) == (QUESTION, 6)
    assert len(example["direct"]["content"].split()) == 24
    assert summary["correct"] == {"thinking": False, "direct": False}  # random weights
    assert done.manifest["verdict"] is True
    assert done.json("answers.json")["answers"]["direct"]["finish"] == "length"


def test_the_stage_says_no_when_a_mode_has_no_answer(launcher: LocalLauncher, folder: Path, tmp_path: Path) -> None:
    spec = stage.Spec(max_tokens=4, thinking_tokens=50, question=QUESTION)  # all of it is spent on thinking
    done = stage.run(spec, {"convert": artifact_of(folder.parent, "convert")}, context_of(tmp_path, launcher))
    assert (done.summary["thinking_ok"], done.summary["direct_ok"], done.manifest["verdict"]) == (False, True, False)
    assert done.summary["correct"] == {"thinking": None, "direct": None}


def test_without_test_problems_the_expected_words_grade() -> None:
    right = stage._grade(stage.Spec(expect="Paris"), None)
    assert right is not None
    assert [right("It is paris."), right("It is Rome.")] == [True, False]
    assert stage._grade(stage.Spec(), None) is None


def test_the_stage_tells_that_the_server_died(launcher: LocalLauncher, tmp_path: Path) -> None:
    broken = tmp_path / "convert" / "model"
    broken.mkdir(parents=True)
    (broken / "config.json").write_text("{}")
    with pytest.raises(PlatformError, match="server ended with status 2"):
        stage.run(stage.Spec(), {"convert": artifact_of(broken.parent, "convert")}, context_of(tmp_path, launcher))


def test_the_stage_module_is_light() -> None:
    code = "import sys, ottava.stages.serve; print({'torch', 'transformers', 'openai', 'starlette'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize(
    ("finish", "status", "drained"), [("stop", 0, True), ("stop", -15, False), ("stop", None, False), (None, 0, False)]
)
def test_a_drain_is_a_finished_stream_and_status_zero(finish: str | None, status: int | None, drained: bool) -> None:
    chunks = [SimpleNamespace(choices=[]), SimpleNamespace(choices=[SimpleNamespace(finish_reason=finish)])]
    assert stage._drained(client_of(iter(chunks)), {}, process_of(status)) is drained


def test_a_broken_stream_is_no_drain() -> None:
    def broken() -> Iterator[Any]:
        yield SimpleNamespace(choices=[SimpleNamespace(finish_reason="stop")])
        raise ConnectionError

    assert not stage._drained(client_of(broken()), {}, process_of(0))


def client_of(stream: Iterator[Any]) -> Any:
    return SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=lambda **_: stream)))


def process_of(status: int | None) -> Any:
    return SimpleNamespace(terminate=lambda: None, wait=lambda timeout: status)


@pytest.mark.parametrize("broken", ["_stream", "_drained"])
def test_the_stage_says_no_when_the_stream_differs_or_the_drain_fails(
    launcher: LocalLauncher, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    monkeypatch.setattr(stage, broken, lambda *_: False)
    spec = stage.Spec(max_tokens=6, thinking_tokens=2, question=QUESTION)
    done = stage.run(spec, {"convert": artifact_of(folder.parent, "convert")}, context_of(tmp_path, launcher))
    assert (done.summary["streamed"], done.summary["drained"]) == (broken != "_stream", broken != "_drained")
    assert done.manifest["verdict"] is False


def test_the_command_asks_with_the_key_of_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused without it; the address may be OpenAI's base. The key is in no message."""
    seen: list[tuple[str, str | None]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append((request.url.path, request.headers.get("authorization")))
        if seen[-1][1] != "Bearer right-key":
            return httpx.Response(401, json=ApiError(401, "no valid key").body())
        return httpx.Response(200, text='data: {"choices": [{"delta": {"content": "6"}}]}\n\ndata: [DONE]\n\n')

    whole = httpx.Client
    monkeypatch.setattr(httpx, "Client", lambda **how: whole(transport=httpx.MockTransport(answer), **how))
    monkeypatch.delenv(KEY, raising=False)
    with pytest.raises(DataError, match="without a key") as caught:
        list(ask("http://here", QUESTION))
    assert KEY in (caught.value.fix or "")
    for wrong in ("wrong-kéy", "wrong\nkey"):
        monkeypatch.setenv(KEY, wrong)
        with pytest.raises(DataError, match="ASCII") as caught:
            list(ask("http://here", QUESTION))
        assert "wrong" not in caught.value.render()
    monkeypatch.setenv(KEY, " right-key\n")
    assert list(ask("http://here/v1/", QUESTION)) == [("content", "6")]
    assert seen == [("/v1/chat/completions", None), ("/v1/chat/completions", "Bearer right-key")]
