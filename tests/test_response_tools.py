"""Tools and log-probabilities of /v1/responses: what a chat says of the same, the official client, what is refused."""

from __future__ import annotations

import itertools
import json
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from ottava.engine.session import Engine
from ottava.gateway import chat as chats
from ottava.gateway import responses
from ottava.gateway.app import Gateway
from ottava.gateway.chat import ChatRequest, Message
from ottava.gateway.response_input import Items, ResponseRequest, turns
from ottava.gateway.schema import parse
from ottava.models.chat import Chat
from ottava.models.tools import Call

from .test_api import RESPONSES, good, refused, send, streamed_as_it_is_plain
from .test_constrain import TOOLS
from .test_engine import Scripted, tiny_chat
from .test_gateway import NAME, QUESTION, post
from .test_tools import BY_NAME, CLOCK, FAMILIES, WEATHER
from .test_tools_api import CALLS, USER, GetWeather, Person, listening
from .tool_models import engine

ASKED = {"input": USER[0]["content"]}
LOGPROBS = ["message.output_text.logprobs"]


def flat(tool: dict[str, Any]) -> dict[str, Any]:
    """A chat's tool as responses write it."""
    return {"type": "function", "strict": False, **tool["function"]}


def scripted(chat: Chat, *said: str | int) -> tuple[Gateway, list[list[int]]]:
    """A server whose model says these texts and ids and ends, and the prompts that it got; equal ones in a row once."""
    ids = [i for part in said for i in (chat.encode(part) if isinstance(part, str) else [part])] + [chat.stop]
    seen: list[list[int]] = []

    def script(prompt: list[int]) -> list[int]:  # called once for each step
        if not seen or seen[-1] != prompt:
            seen.append(prompt)
        return ids

    return Gateway(Engine(Scripted(script, context=4096, words=600), chat), NAME), seen


def kinds(answer: dict[str, Any]) -> list[str]:
    return [item["type"] for item in answer["output"]]


# ---- calls in answers


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("special", [False, True])
def test_calls_are_items_and_those_of_a_chat(family: str, special: bool) -> None:
    chat, form = engine(family, special).chat, BY_NAME[family]
    gateway, seen = scripted(chat, "I look.\n" + form.write(CALLS))
    body = {**ASKED, "tools": [flat(WEATHER), flat(CLOCK)], "include": LOGPROBS}
    answer = streamed_as_it_is_plain(gateway, body)
    (choice,) = post(gateway, {"messages": USER, "tools": [WEATHER, CLOCK]}).json()["choices"]
    assert kinds(answer) == ["message", "function_call", "function_call"]
    message, *calls = answer["output"]
    assert message["content"][0]["text"] == choice["message"]["content"] == "I look."
    assert [{key: call[key] for key in ("name", "arguments")} for call in calls] == [
        call["function"] for call in choice["message"]["tool_calls"]
    ]
    assert len({call["call_id"] for call in calls}) == 2
    assert [item["status"] for item in answer["output"]] == ["completed"] * 3
    assert answer["status"] == "completed"
    assert answer["tools"][0]["name"] == "get_weather"
    assert (answer["tool_choice"], answer["parallel_tool_calls"]) == ("auto", True)
    assert len(seen) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reply_of_calls_alone_has_no_message(family: str) -> None:
    chat, form = engine(family).chat, BY_NAME[family]
    body = {**ASKED, "tools": [flat(WEATHER), flat(CLOCK)]}
    assert kinds(streamed_as_it_is_plain(scripted(chat, form.write(CALLS[:1]))[0], body)) == ["function_call"]
    thinking = {**body, "reasoning": {"effort": "high"}}
    thought = scripted(chat, "hm", chat.think_end or 0, form.write(CALLS[:1]))[0]
    assert kinds(streamed_as_it_is_plain(thought, thinking)) == ["reasoning", "function_call"]
    silent = scripted(chat, "hm", chat.think_end or 0)[0]
    assert kinds(streamed_as_it_is_plain(silent, thinking)) == ["reasoning", "message"]
    cut = streamed_as_it_is_plain(scripted(chat, "hm " * 9)[0], {**thinking, "max_output_tokens": 3})
    assert (kinds(cut), cut["status"]) == (["reasoning"], "incomplete")
    assert kinds(streamed_as_it_is_plain(scripted(chat)[0], body)) == ["message"]


def test_text_around_calls_keeps_its_place() -> None:
    chat, form = engine("qwen").chat, BY_NAME["qwen"]
    one, two = form.write(CALLS[:1]), form.write(CALLS[1:])
    gateway, seen = scripted(chat, f"First {one} then {two} done")
    body = {**ASKED, "tools": [flat(WEATHER), flat(CLOCK)]}
    answer = streamed_as_it_is_plain(gateway, body)
    assert kinds(answer) == ["message", "function_call", "message", "function_call", "message"]
    message = post(gateway, {"messages": USER, "tools": [WEATHER, CLOCK]}).json()["choices"][0]["message"]
    texts = [item["content"][0]["text"] for item in answer["output"] if item["type"] == "message"]
    assert "".join(texts) == message["content"]
    # sent back, it is one turn again
    results = [(call["call_id"], "x") for call in answer["output"] if call["type"] == "function_call"]
    items = [
        *USER,
        *answer["output"],
        *({"type": "function_call_output", "call_id": i, "output": o} for i, o in results),
    ]
    good(gateway, RESPONSES, {**body, "input": items})
    tools = [{"role": "tool", "tool_call_id": call["id"], "content": "x"} for call in message["tool_calls"]]
    post(gateway, {"messages": [*USER, message, *tools], "tools": [WEATHER, CLOCK]})
    assert len(seen) == 2


def test_a_reply_that_the_limit_cuts_in_a_call_is_text_and_incomplete() -> None:
    chat, form = engine("qwen").chat, BY_NAME["qwen"]
    gateway, _ = scripted(chat, form.write(CALLS[1:]) + "\n" + form.write(CALLS[:1]))
    first = len(chat.encode(form.write(CALLS[1:])))
    body = {**ASKED, "tools": [flat(WEATHER), flat(CLOCK)], "max_output_tokens": first + 4}
    answer = streamed_as_it_is_plain(gateway, body)
    assert (kinds(answer), answer["status"]) == (["function_call", "message"], "incomplete")
    assert [item["status"] for item in answer["output"]] == ["completed", "incomplete"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize(
    ("choice", "parallel"),
    [("required", False), ("required", True), ({"type": "function", "name": "get_weather"}, True)],
    ids=["one", "some", "named"],
)
def test_calls_that_are_required_are_made(family: str, thinking: bool, choice: Any, parallel: bool) -> None:
    gateway = Gateway(engine(family), NAME)
    tools = [{"type": "function", "name": name, "parameters": schema} for name, schema in TOOLS.items()]
    body = {**ASKED, "tools": tools, "tool_choice": choice, "parallel_tool_calls": parallel, "temperature": 1.0}
    body |= {"max_output_tokens": 200}
    if thinking:
        body["thinking"] = {"type": "enabled", "budget_tokens": 5}
    done = 0
    for seed in range(3):
        answer = streamed_as_it_is_plain(gateway, {**body, "seed": seed})
        assert (answer["tool_choice"], answer["parallel_tool_calls"]) == (choice, parallel)
        if answer["status"] == "incomplete":
            continue
        done += 1
        calls = [item for item in answer["output"] if item["type"] == "function_call"]
        assert kinds(answer) == ["reasoning"] * thinking + ["function_call"] * len(calls)
        assert len(calls) == 1 or (parallel and choice == "required" and len(calls) > 1)
        for call in calls:
            assert choice == "required" or call["name"] == "get_weather"
            jsonschema.validate(json.loads(call["arguments"]), TOOLS[call["name"]])
    assert done


# ---- the same core


CHOICES: list[Any] = [None, "auto", "none", "required", "clock"]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_asked_of_the_engine_is_what_a_chat_asks(family: str) -> None:
    chat = engine(family).chat
    for strict, choice, many, thinking in itertools.product([False, True], CHOICES, [None, False], [None, True]):
        tools = [{**tool, "function": {**tool["function"], "strict": strict}} for tool in (WEATHER, CLOCK)]
        named = {"name": choice} if choice == "clock" else None
        more = {"parallel_tool_calls": many, "seed": 3}
        theirs: dict[str, Any] = {"messages": USER, "tools": tools, **more}
        ours: dict[str, Any] = {**ASKED, "tools": [*map(flat, tools)], **more}
        if choice is not None:
            theirs["tool_choice"] = {"type": "function", "function": named} if named else choice
            ours["tool_choice"] = {"type": "function", **named} if named else choice
        one = chats.terms(parse(ChatRequest, json.dumps(theirs).encode()), chat, thinking)
        other = responses.terms(parse(ResponseRequest, json.dumps(ours).encode()), chat, thinking)
        assert one == other


def test_a_function_is_strict_unless_that_is_denied() -> None:
    chat = engine("qwen").chat
    grammars, said = [], []
    for strict in ({}, {"strict": None}, {"strict": True}, {"strict": False}):
        body = {**ASKED, "tools": [{"type": "function", "name": "f", "parameters": TOOLS["get_weather"], **strict}]}
        request = parse(ResponseRequest, json.dumps(body).encode())
        grammars.append(responses.terms(request, chat, None).sampling.grammar)
        said.append(good(scripted(chat, "x")[0], RESPONSES, body)["tools"][0]["strict"])
    assert said == [True, True, True, False]
    assert grammars[0] == grammars[1] == grammars[2] is not None
    assert grammars[3] is None


# ---- calls and their outputs as input


texts = st.text("ab ", min_size=1, max_size=4)
maybe = st.none() | st.just("") | texts
assistants = st.tuples(maybe, st.lists(texts, max_size=3), st.booleans()).filter(lambda said: any(said[:2]))
conversations = st.lists(texts | assistants, min_size=1, max_size=6)


@given(conversations, st.booleans())
def test_items_are_the_turns_of_a_chat(conversation: list[Any], parts: bool) -> None:
    """Of random conversations written both ways; `Message.plain` is the chat's."""
    items: list[dict[str, Any]] = []
    messages: list[dict[str, Any]] = []
    number = 0
    for turn in conversation:
        if isinstance(turn, str):
            items.append({"role": "user", "content": [{"type": "input_text", "text": turn}] if parts else turn})
            messages.append({"role": "user", "content": turn})
            continue
        text, results, thought = turn
        if messages and messages[-1]["role"] == "assistant":
            continue  # two turns of a model do not follow each other
        items += [{"type": "reasoning", "id": "r", "summary": [], "content": []}] if thought else []
        if text is not None:
            said = [{"type": "output_text", "text": text, "annotations": []}] if parts else text
            items.append({"type": "message", "role": "assistant", "content": said, "status": "completed"})
        calls, answers, outputs = [], [], []
        for result in results:
            number += 1
            name = f"c{number}"
            items.append({"type": "function_call", "call_id": name, "name": "f", "arguments": "{}", "id": "fc"})
            calls.append({"id": name, "type": "function", "function": {"name": "f", "arguments": "{}"}})
            output = [{"type": "input_text", "text": result}] if parts else result
            outputs.append({"type": "function_call_output", "call_id": name, "output": output})
            answers.append({"role": "tool", "tool_call_id": name, "content": result})
        messages.append({"role": "assistant", "content": text, **({"tool_calls": calls} if calls else {})})
        items += outputs
        messages += answers
    read = TypeAdapter(Items).validate_json(json.dumps(items))
    assert turns(read) == [Message.model_validate_json(json.dumps(message)).plain() for message in messages]


def test_the_official_client_calls_and_answers() -> None:
    """The loop of an agent: what the model said is sent back as the client's own objects, with the outputs."""
    tools: Any = [flat(WEATHER), flat(CLOCK)]
    for family in FAMILIES:
        chat = engine(family).chat
        gateway, seen = scripted(chat, "I look.\n" + BY_NAME[family].write(CALLS))
        with listening(gateway) as url, httpx.Client() as plain:
            client = openai.OpenAI(base_url=url, api_key="none", http_client=plain, max_retries=0)
            made = client.responses.create(model=NAME, input=ASKED["input"], tools=tools)
            with client.responses.stream(model=NAME, input=ASKED["input"], tools=tools) as stream:
                events = list(stream)
                final: Any = stream.get_final_response()
            for answer in (made, final):
                calls: Any = [item for item in answer.output if item.type == "function_call"]
                assert [(call.name, call.arguments) for call in calls] == CALLS
                assert answer.output_text == "I look."
                results = [
                    {"type": "function_call_output", "call_id": call.call_id, "output": "cold"} for call in calls
                ]
                for said in (answer.output, [item.model_dump() for item in answer.output]):
                    client.responses.create(model=NAME, input=[*USER, *said, *results], tools=tools)
            deltas = [event for event in events if event.type == "response.function_call_arguments.delta"]
            assert [event.snapshot for event in deltas] == [call.arguments for call in CALLS]
            ids = ["a", "b"]
            calls = [
                {"id": i, "type": "function", "function": call._asdict()} for i, call in zip(ids, CALLS, strict=True)
            ]
            turn = {"role": "assistant", "content": "I look.", "tool_calls": calls}
            outputs = [{"role": "tool", "tool_call_id": i, "content": "cold"} for i in ids]
            wanted = chat.render([*USER, turn, *outputs], False, [WEATHER, CLOCK])
            assert seen[1:] == [wanted]  # all four times
            with pytest.raises(openai.BadRequestError, match="twice"):
                client.responses.create(model=NAME, input="x", tools=[*tools, *tools])


def test_the_official_client_parses_and_streams() -> None:
    with listening(Gateway(engine("qwen"), NAME)) as url, httpx.Client() as plain:
        client = openai.OpenAI(base_url=url, api_key="none", http_client=plain, max_retries=0)
        tool: Any = {"name": "GetWeather", "type": "function", "strict": True,
                     "parameters": openai.pydantic_function_tool(GetWeather)["function"]["parameters"]}  # fmt: skip
        parsed = 0
        for seed in range(3):
            how: Any = {"model": NAME, "input": ASKED["input"], "temperature": 0.7, "max_output_tokens": 400}
            how["extra_body"] = {"seed": seed}
            made = client.responses.create(**how, text={"format": {"type": "text"}})
            assert made.status in ("completed", "incomplete")
            schema: Any = {"type": "json_schema", "name": "p", "schema": Person.model_json_schema(), "strict": True}
            if client.responses.create(**how, text={"format": schema}).status == "completed":
                parsed += 1
                whole = client.responses.parse(**how, text_format=Person)
                assert isinstance(whole.output_parsed, Person)
                with client.responses.stream(**how, text_format=Person) as stream:
                    assert stream.get_final_response().output_parsed == whole.output_parsed
            how |= {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
            called = client.responses.parse(**how)
            with client.responses.stream(**how) as stream:
                assert "response.function_call_arguments.done" in {event.type for event in stream}
                again = stream.get_final_response()
            one, other = called.output[-1], again.output[-1]
            assert one.type == other.type == "function_call"
            assert one.parsed_arguments == other.parsed_arguments == json.loads(one.arguments)
            GetWeather.model_validate_json(one.arguments)
        assert parsed


# ---- log-probabilities


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_log_probabilities_are_those_of_a_chat(thinking: bool, temperature: float) -> None:
    gateway = Gateway(engine("qwen"), NAME)
    more = {"temperature": temperature, "seed": 5}
    more |= {"thinking": {"type": "enabled", "budget_tokens": 4}} if thinking else {}
    for top in (None, 0, 3):
        body = {**ASKED, **more, "include": LOGPROBS, "max_output_tokens": 24}
        answer = streamed_as_it_is_plain(gateway, body if top is None else {**body, "top_logprobs": top})
        asked = {"messages": USER, **more, "logprobs": True, "top_logprobs": top, "max_tokens": 24}
        (choice,) = post(gateway, asked).json()["choices"]
        part = answer["output"][-1]["content"][0]
        assert part["logprobs"] == choice["logprobs"]["content"] != []
        assert answer["top_logprobs"] == (top or 0)
        assert {len(token["top_logprobs"]) for token in part["logprobs"]} == {top or 0}
        spelt = b"".join(bytes(token["bytes"]) for token in part["logprobs"])
        assert spelt.decode(errors="replace") == part["text"]
        client: Any = TypeAdapter(openai.types.responses.ResponseOutputText).validate_python(part)
        assert client.logprobs[0].bytes == part["logprobs"][0]["bytes"]
    silent = good(gateway, RESPONSES, {**ASKED, **more, "max_output_tokens": 24})
    assert silent["output"][-1]["content"][0]["logprobs"] == []


def test_bytes_of_tokens_that_are_words_or_no_tokens() -> None:
    chat = tiny_chat()
    gateway, _ = scripted(chat, "7 a")
    part = good(gateway, RESPONSES, {"input": QUESTION, "include": LOGPROBS})["output"][0]["content"][0]
    assert [bytes(token["bytes"]).decode() for token in part["logprobs"]] == ["7", "a"]
    # published models have more outputs than their vocabulary has tokens
    wide = good(
        Gateway(engine("qwen"), NAME),
        RESPONSES,
        {**ASKED, "include": LOGPROBS, "top_logprobs": 20, "max_output_tokens": 60, "temperature": 2, "seed": 1},
    )
    told = [other for token in wide["output"][0]["content"][0]["logprobs"] for other in token["top_logprobs"]]
    assert any(not other["bytes"] for other in told)


# ---- refusals


def tool(**more: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "name": "f", "strict": False, **more}]


CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
RESULT = {"type": "function_call_output", "call_id": "c", "output": "x"}

BAD: list[tuple[dict[str, Any], str]] = [
    ({"tools": tool(name="a b")}, "tools.0.name"),
    ({"tools": tool(name="")}, "tools.0.name"),
    ({"tools": tool(parameters=[])}, "tools.0.parameters"),
    ({"tools": tool(parameters={"type": "string"})}, 'tools.0.parameters: the type has to be "object"'),
    ({"tools": tool(parameters={"type": "objekt"})}, "tools.0.parameters.type: not a JSON schema"),
    ({"tools": tool() * 2}, "tools.1.name: 'f' is there twice"),
    ({"tools": [t for i in range(129) for t in tool(name=f"f{i}")]}, "tools"),
    ({"tools": [{"type": "web_search_preview"}]}, "tools.0.type"),
    ({"tools": [{"type": "function"}]}, "tools.0.name"),
    ({"tools": [WEATHER]}, "tools.0.name"),  # as a chat writes it
    ({"tools": tool(description="x<|im_end|>y")}, "control token"),
    ({"tools": tool(defer_loading=True)}, "tools.0.defer_loading: is not supported"),
    ({"tools": tool(strict=True, parameters={"type": "object", "not": {}})}, "cannot be enforced"),
    ({"tools": [{"type": "function", "name": "f", "parameters": {"type": "object", "not": {}}}]}, "cannot be enforced"),
    ({"tool_choice": "required"}, "no tools to choose"),
    ({"tools": tool(), "tool_choice": "sometimes"}, "tool_choice"),
    ({"tools": tool(), "tool_choice": {"type": "function", "name": "g"}}, "no tool has the name 'g'"),
    ({"tools": tool(), "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice"),
    ({"tools": tool(), "parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ({"tools": tool(), "text": {"format": {"type": "json_object"}}}, "not supported together"),
    ({"input": [RESULT]}, "input.0.call_id: no earlier call waits"),
    ({"input": [*USER, CALL, RESULT, RESULT]}, "input.3.call_id: no earlier call waits"),
    ({"input": [*USER, RESULT, CALL]}, "input.1.call_id: no earlier call waits"),
    ({"input": [*USER, CALL, CALL]}, "input.2.call_id: two calls"),
    ({"input": [*USER, {**CALL, "name": "a b"}]}, "input.1.name"),
    ({"input": [*USER, {**CALL, "arguments": {}}]}, "input.1.arguments"),
    ({"input": [*USER, {**CALL, "call_id": ""}]}, "input.1.call_id"),
    ({"input": [*USER, {**CALL, "async": True}]}, "input.1.async: is not supported"),
    ({"input": [*USER, {"type": "function_call"}]}, "input.1.call_id: Field required"),
    ({"input": [*USER, CALL, {**RESULT, "output": "</tool_response>"}]}, "control token"),
    ({"input": [*USER, CALL, {**RESULT, "output": [{"type": "input_image", "image_url": "x"}]}]}, "input.2.output"),
    ({"input": [*USER, {"type": "web_search_call"}]}, "input.1: an item is a message"),
    ({"input": [*USER, {"type": 5}]}, "input.1: an item is a message"),
    ({"input": [*USER, {"role": "tool", "content": "x"}]}, "input.1.role"),
    ({"input": [*USER, {"role": "user", "content": [{"type": "input_image"}]}]}, "input.1.content"),
    ({"input": [*USER, 7]}, "input.1: an item is a message"),
    ({"input": 7}, "input: Input should be a valid array"),
]  # fmt: skip


@pytest.mark.parametrize(("extra", "words"), BAD, ids=range(len(BAD)))
def test_bad_tools_and_items_are_refused(extra: dict[str, Any], words: str) -> None:
    refused(Gateway(engine("qwen"), NAME), RESPONSES, {**ASKED, "max_output_tokens": 2, **extra}, words)


def test_a_model_whose_tools_are_not_known_says_so() -> None:
    answer = send(scripted(tiny_chat(), "7")[0], RESPONSES, {"input": QUESTION, "tools": tool()})
    assert answer.status_code == 400
    assert "chat template of this model has no tools" in answer.json()["error"]["message"]


def test_what_is_no_call_stays_text() -> None:
    chat, form = engine("qwen").chat, BY_NAME["qwen"]
    for text in (form.write([Call("nobody", "{}")]), form.write([Call("clock", "[]")])):
        (item,) = streamed_as_it_is_plain(scripted(chat, text)[0], {**ASKED, "tools": [flat(CLOCK)]})["output"]
        assert (item["type"], item["content"][0]["text"]) == ("message", text)
    whole = form.write(CALLS[1:])
    for more in ({}, {"tools": [flat(CLOCK)], "tool_choice": "none"}):
        (item,) = streamed_as_it_is_plain(scripted(chat, whole)[0], {**ASKED, **more})["output"]
        assert item["content"][0]["text"] == whole
