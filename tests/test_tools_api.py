"""Tools and structured output over HTTP: OpenAI's shapes, its own client's helpers, and what is refused."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import jsonschema
import pytest
import uvicorn
from pydantic import BaseModel

from ottava.engine.session import Engine
from ottava.gateway.app import Gateway
from ottava.models.chat import Chat
from ottava.models.tools import Call

from .test_constrain import PERSON, TOOLS
from .test_engine import Scripted
from .test_gateway import NAME, post, session
from .test_tools import BY_NAME, CALLED, CLOCK, FAMILIES, WEATHER
from .tool_models import engine

USER = [{"role": "user", "content": "Weather?"}]
CALLS = [Call("get_weather", '{"city": "Ås 🧠"}'), Call("clock", "{}")]
STRICT = [
    {"type": "function", "function": {"name": name, "parameters": schema, "strict": True}}
    for name, schema in TOOLS.items()
]


def scripted(chat: Chat, text: str) -> Gateway:
    """A server whose model says this text and ends."""
    ids = [*chat.encode(text), chat.stop]
    return Gateway(Engine(Scripted(lambda _: ids, context=4096, words=600), chat), NAME)


def events(gateway: Gateway, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = post(gateway, {**body, "stream": True})
    assert answer.status_code == 200, answer.text
    lines = answer.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


# ---- calls in answers


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("special", [False, True])
def test_calls_are_answered_and_streamed_in_the_shape_of_openai(family: str, special: bool) -> None:
    chat, form = engine(family, special).chat, BY_NAME[family]
    gateway = scripted(chat, "I look.\n" + form.write(CALLS))
    body = {"messages": USER, "tools": [WEATHER, CLOCK], "logprobs": True}
    (choice,) = post(gateway, body).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("I look.", "tool_calls")
    calls = choice["message"]["tool_calls"]
    assert [call["function"] for call in calls] == [call._asdict() for call in CALLS]
    assert len({call["id"] for call in calls}) == 2
    assert {call["type"] for call in calls} == {"function"}
    said = events(gateway, body)
    deltas = [chunk["choices"][0]["delta"] for chunk in said]
    assert "".join(delta.get("content", "") for delta in deltas) == "I look."
    whole = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [call["index"] for call in whole] == [0, 1]
    assert [call["function"] for call in whole] == [call["function"] for call in calls]
    assert said[-1]["choices"][0]["finish_reason"] == "tool_calls"
    told = [t for chunk in said for t in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert told == choice["logprobs"]["content"]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_no_call_stays_content(family: str) -> None:
    chat, form = engine(family).chat, BY_NAME[family]
    good = form.write(CALLS[:1])
    for text in (
        form.write([Call("nobody", "{}")]),
        form.write([Call("clock", "[]")]),
        good.replace(form.end, form.end[:-1]),
    ):
        (choice,) = post(scripted(chat, text), {"messages": USER, "tools": [WEATHER, CLOCK]}).json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")
        assert "tool_calls" not in choice["message"]
    unasked = [{"messages": USER}, {"messages": USER, "tools": [WEATHER], "tool_choice": "none"}]
    for body in unasked:  # nobody offered tools: text is text
        (choice,) = post(scripted(chat, good), body).json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (good, "stop")


def test_an_answer_with_calls_can_be_sent_back() -> None:
    chat = engine("qwen").chat
    gateway = scripted(chat, BY_NAME["qwen"].write(CALLS))
    tools = [WEATHER, CLOCK]
    message = post(gateway, {"messages": USER, "tools": tools}).json()["choices"][0]["message"]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "x"} for call in message["tool_calls"]]
    again = post(gateway, {"messages": [*USER, message, *results], "tools": tools}).json()
    plain = {"role": "assistant", "content": None, "tool_calls": message["tool_calls"]}
    prompt = chat.render([*USER, plain, *results], False, tools)
    assert again["usage"]["prompt_tokens"] == len(prompt)


# ---- choices, formats


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize(
    ("choice", "parallel"),
    [
        ("required", False),
        ("required", True),
        ({"type": "function", "function": {"name": "get_weather"}}, True),
    ],
    ids=["one", "some", "named"],
)
def test_calls_that_are_required_are_made(family: str, thinking: bool, choice: Any, parallel: bool) -> None:
    gateway = Gateway(engine(family), NAME)
    body = {"messages": USER, "tools": STRICT, "tool_choice": choice, "parallel_tool_calls": parallel}
    body |= {"temperature": 1.0, "max_tokens": 200}
    if thinking:
        body["thinking"] = {"type": "enabled", "budget_tokens": 5}
    for seed in range(3):
        (said,) = post(gateway, {**body, "seed": seed}).json()["choices"]
        if said["finish_reason"] == "length":
            continue
        assert said["message"]["content"] == ""
        assert said["finish_reason"] == "tool_calls"
        calls = [call["function"] for call in said["message"]["tool_calls"]]
        assert len(calls) == 1 or (parallel and choice == "required")
        for call in calls:
            assert choice == "required" or call["name"] == "get_weather"
            jsonschema.validate(json.loads(call["arguments"]), TOOLS[call["name"]])


def test_content_is_json_where_that_is_asked_for() -> None:
    gateway = Gateway(engine("qwen"), NAME)
    named = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    for thinking in ("enabled", "disabled"):
        for seed in range(4):
            body = {"messages": USER, "response_format": named, "temperature": 1.2, "seed": seed, "max_tokens": 300}
            body["thinking"] = {"type": thinking} | ({"budget_tokens": 4} if thinking == "enabled" else {})
            (said,) = post(gateway, body).json()["choices"]
            assert said["finish_reason"] == "stop"
            jsonschema.validate(json.loads(said["message"]["content"]), PERSON)
            joined = "".join(c["choices"][0]["delta"].get("content", "") for c in events(gateway, body))
            assert joined == said["message"]["content"]
    cut = post(gateway, {"messages": USER, "response_format": {"type": "json_object"}, "max_tokens": 1}).json()
    assert (cut["choices"][0]["message"]["content"], cut["choices"][0]["finish_reason"]) == ("{", "length")
    free = {"messages": USER, "response_format": {"type": "text"}, "max_tokens": 1}
    assert post(gateway, free).status_code == 200


def test_the_text_of_a_response_is_json_where_that_is_asked_for() -> None:
    gateway = Gateway(engine("qwen"), NAME)
    named = {"type": "json_schema", "name": "person", "schema": PERSON, "strict": True}
    body = {"input": "Who?", "temperature": 1.2, "seed": 1, "max_output_tokens": 300}

    async def ask(client: httpx.AsyncClient) -> list[Any]:
        made = []
        for form in (named, {"type": "json_object"}, {"type": "text"}, {"type": "json_schema", "name": "x"}):
            made.append(await client.post("/v1/responses", json={**body, "text": {"format": form}}))
        return made

    whole, some, free, bad = session(gateway, ask)
    assert whole.json()["text"]["format"] == named
    jsonschema.validate(json.loads(whole.json()["output"][-1]["content"][0]["text"]), PERSON)
    assert some.json()["output"][-1]["content"][0]["text"].startswith("{")
    assert [answer.status_code for answer in (whole, some, free, bad)] == [200, 200, 200, 400]


# ---- refusals


def tool(**function: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", **function}}]


def schema(said: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": said}}


def deep(levels: int) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": deep(levels - 1)}} if levels else {"type": "object"}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"tools": tool(name="a b")}, "tools.0.function.name"),
    ({"tools": tool(name="x" * 65)}, "tools.0.function.name"),
    ({"tools": tool(name="")}, "tools.0.function.name"),
    ({"tools": tool(parameters=[])}, "tools.0.function.parameters"),
    ({"tools": tool(parameters={"type": "string"})}, 'has to be "object"'),
    ({"tools": tool(parameters={"type": "objekt"})}, "not a JSON schema"),
    ({"tools": tool(parameters={"type": {"type": []}})}, "not a JSON schema"),
    ({"tools": tool(parameters={"type": "object", "properties": {"a": {"pattern": 3}}})}, "not a JSON schema"),
    ({"response_format": schema({"type": "string", "pattern": "("})}, "cannot be enforced"),
    ({"response_format": schema({"type": "string", "pattern": "a{9999999999}"})}, "cannot be enforced"),
    ({"tools": tool(parameters=deep(80)), "tool_choice": "required"}, "cannot be enforced"),
    ({"tools": tool(parameters={"type": "object", "x": "y" * 70_000})}, "characters"),
    ({"tools": [{**t, "function": {**t["function"], "name": f"f{i}"}} for i in range(8)
                for t in tool(parameters={"type": "object", "x": "y" * 10_000})]}, "more than 65536"),
    ({"tools": tool() * 2}, "twice"),
    ({"tools": [t for i in range(129) for t in tool(name=f"f{i}")]}, "tools"),
    ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
    ({"tools": [{"type": "function"}]}, "tools.0.function"),
    ({"tools": "all"}, "tools"),
    ({"tools": tool(description="x<|im_end|>y")}, "control token"),
    ({"tools": tool(parameters={"type": "object", "properties": {"</tool_call>": {}}})}, "control token"),
    ({"tool_choice": "required"}, "no tools to choose"),
    ({"tools": tool(), "tool_choice": "sometimes"}, "tool_choice"),
    ({"tools": tool(), "tool_choice": {"type": "function", "function": {"name": "g"}}}, "no tool has the name 'g'"),
    ({"tools": tool(parameters={"type": "object", "not": {}}), "tool_choice": "required"}, "cannot be enforced"),
    ({"tools": tool(), "parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ({"tools": tool(), "response_format": {"type": "json_object"}}, "not supported together"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": schema([])}, "response_format"),
    ({"response_format": schema({"type": 3})}, "not a JSON schema"),
    ({"response_format": schema({"not": {"type": "object"}})}, "cannot be enforced"),
    ({"response_format": schema({"$ref": "https://127.0.0.1:9/x"})}, "cannot be enforced"),
    ({"response_format": schema(deep(90))}, "cannot be enforced"),
    ({"response_format": schema({"enum": ["x" * 70_000]})}, "characters"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "tool_call_id"),
    ({"messages": [{"role": "user", "content": "x", "tool_call_id": "c"}]}, "tool_call_id"),
    ({"messages": [{**USER[0], "tool_calls": CALLED[2]["tool_calls"]}]}, "has no tool_calls"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a", "type": "function"}]}]}, "tool_calls.0.function"),
    ({"messages": [*USER, {"role": "tool", "tool_call_id": "c", "content": "</tool_response>"}]}, "control token"),
]  # fmt: skip


@pytest.mark.parametrize(("extra", "words"), BAD, ids=range(len(BAD)))
def test_bad_tools_and_formats_are_refused(extra: dict[str, Any], words: str) -> None:
    answer = post(Gateway(engine("qwen"), NAME), {"messages": USER, "max_tokens": 2, **extra})
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]["message"]


def test_a_model_without_tools_says_so() -> None:
    chat = engine("qwen").chat
    source = "{% for m in messages %}{{ m.content }}{% endfor %}"
    blind = replace(chat, template=chat.template.environment.from_string(source))
    for messages in (USER, CALLED):
        answer = post(scripted(blind, "x"), {"messages": messages, "tools": [WEATHER]})
        assert answer.status_code == 400
        assert "chat template of this model has no tools" in answer.json()["error"]["message"]


def test_a_schema_that_becomes_too_much_in_the_middle_is_the_clients_mistake() -> None:
    gateway = Gateway(engine("qwen"), NAME)
    classes = schema({"type": "string", "pattern": "^(\\p{L}{1,500}|\\w{1,500}){1,50}$"})
    statuses = set()
    for seed in range(6):
        body = {"messages": USER, "response_format": classes, "temperature": 1.0, "seed": seed, "max_tokens": 80}
        answer = post(gateway, body)
        statuses.add(answer.status_code)
        if answer.status_code == 400:
            assert '"error"' in post(gateway, {**body, "stream": True}).text
    assert statuses <= {200, 400}
    assert post(gateway, {"messages": USER, "max_tokens": 2}).status_code == 200


# ---- the official client


@contextmanager
def listening(gateway: Gateway) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(gateway.app(), port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join()


class Person(BaseModel):
    name: str
    good: bool


class GetWeather(BaseModel):
    """The weather somewhere."""

    cold: bool
    count: int | None


def test_the_official_client_parses_and_streams() -> None:
    import openai

    with listening(Gateway(engine("qwen"), NAME)) as url, httpx.Client() as plain:
        client = openai.OpenAI(base_url=url, api_key="none", http_client=plain, max_retries=0)
        messages: Any = USER
        for seed in range(3):
            how: Any = {"model": NAME, "messages": messages, "seed": seed, "temperature": 0.7, "max_tokens": 400}
            try:
                made = client.chat.completions.parse(**how, response_format=Person)
                assert isinstance(made.choices[0].message.parsed, Person)
                with client.chat.completions.stream(**how, response_format=Person) as stream:
                    kinds = {event.type for event in stream}
                    final = stream.get_final_completion()
                assert "content.done" in kinds
                assert final.choices[0].message.parsed == made.choices[0].message.parsed
            except openai.LengthFinishReasonError:
                pass
            tools: Any = [openai.pydantic_function_tool(GetWeather)]
            called = client.chat.completions.parse(
                **how, tools=tools, tool_choice="required", parallel_tool_calls=False
            )
            (call,) = called.choices[0].message.tool_calls or []
            assert isinstance(call.function.parsed_arguments, GetWeather)
            with client.chat.completions.stream(
                **how, tools=tools, tool_choice="required", parallel_tool_calls=False
            ) as stream:
                kinds = {event.type for event in stream}
                final = stream.get_final_completion()
            assert "tool_calls.function.arguments.done" in kinds
            (again,) = final.choices[0].message.tool_calls or []
            assert again.function.parsed_arguments == call.function.parsed_arguments
            assert final.choices[0].finish_reason == "tool_calls"
            turn: Any = final.choices[0].message.model_dump()
            result = {"role": "tool", "tool_call_id": again.id, "content": "cold"}
            last = client.chat.completions.create(
                model=NAME, messages=[*messages, turn, result], tools=tools, max_tokens=3
            )
            assert last.usage is not None
        with pytest.raises(openai.BadRequestError, match="twice"):
            client.chat.completions.create(model=NAME, messages=messages, tools=[*tools, *tools])
