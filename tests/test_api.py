"""Completions, responses, several choices: each against another way to the same answer, and the official types."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Iterator
from typing import Any, cast

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from ottava.engine.session import Engine, Reader, Token
from ottava.gateway.app import Gateway
from ottava.gateway.completions import spelled
from ottava.gateway.reply import seed_of
from ottava.models.chat import Detokeniser

from .conform import data_of, described
from .test_chat import _byte_chat as byte_chat
from .test_engine import END, ETHINK, Scripted, random_model, tiny_chat
from .test_gateway import NAME, QUESTION, USER, session, student

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
FRESH = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def send(gateway: Gateway, path: str, body: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()

    async def work(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post(path, content=content, headers={"content-type": "application/json"})

    return cast(httpx.Response, session(gateway, work))


def good(gateway: Gateway, path: str, body: Any) -> dict[str, Any]:
    response = send(gateway, path, body)
    assert response.status_code == 200, response.text
    return cast(dict[str, Any], response.json())


def refused(gateway: Gateway, path: str, body: Any, words: str, status: int = 400) -> dict[str, Any]:
    response = send(gateway, path, body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert words in error["message"]
    return cast(dict[str, Any], error)


@pytest.fixture(scope="module")
def random() -> Iterator[Gateway]:
    """It says END now and then, and </think>."""
    engine = Engine(random_model(), tiny_chat())
    yield Gateway(engine, NAME)
    engine.close()


@pytest.fixture(scope="module")
def taught() -> Iterator[Gateway]:
    engine = Engine(student(), tiny_chat())
    yield Gateway(engine, NAME)
    engine.close()


def idle(engine: Engine) -> None:
    """Wait until the engine's thread has let go of what was cancelled."""
    deadline = time.monotonic() + 120
    while engine.load_now:
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---- several choices


def seed_by_hand(seed: int, index: int) -> int:
    digest = hashlib.sha256(f"{seed} {index}".encode()).hexdigest()
    return seed if index == 0 else int(digest[:16], 16) // 2


@FRESH
@given(st.integers(-(2**63), 2**63 - 1), st.integers(1, 8), st.sampled_from([CHAT, COMPLETIONS]), st.booleans())
def test_each_choice_is_the_answer_to_its_own_seed(
    random: Gateway, seed: int, n: int, path: str, thinking: bool
) -> None:
    body = {"temperature": 1.5, "logprobs": path == CHAT or 2, "max_tokens": 8}
    body |= {"messages": USER} if path == CHAT else {"prompt": QUESTION}
    body |= {"thinking": {"type": "enabled"}} if thinking else {}
    several = good(random, path, {**body, "seed": seed, "n": n})
    assert [choice["index"] for choice in several["choices"]] == list(range(n))
    total = 0
    for index, choice in enumerate(several["choices"]):
        alone = good(random, path, {**body, "seed": seed_by_hand(seed, index)})
        assert choice == {**alone["choices"][0], "index": index}
        assert several["usage"]["prompt_tokens"] == alone["usage"]["prompt_tokens"]
        total += alone["usage"]["completion_tokens"]
    assert several["usage"]["completion_tokens"] == total
    assert len({json.dumps(choice["logprobs"]) for choice in several["choices"]}) == n or thinking


def test_a_seed_of_a_choice_is_one_that_may_be_sent() -> None:
    assert seed_of(None, 3) is None
    assert all(0 <= cast(int, seed_of(s, i)) < 2**63 for s in (0, 7, 2**62) for i in range(8))


def test_without_a_seed_choices_are_fresh(random: Gateway) -> None:
    answer = good(random, CHAT, {"messages": USER, "temperature": 2, "n": 8, "max_tokens": 12})
    said = {choice["message"]["content"] for choice in answer["choices"]}
    assert len(said) > 2  # one seed for all would be one answer; two empty ones may meet by chance


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_choices_of_a_stream_are_those_of_the_plain_answer(random: Gateway, path: str) -> None:
    asked = {"messages": USER} if path == CHAT else {"prompt": [QUESTION, "7 a"], "echo": True}
    body = {**asked, "n": 4, "seed": 5, "temperature": 1.8, "max_tokens": 20, "thinking": {"type": "enabled"}}
    if path == COMPLETIONS:
        del body["thinking"]
    plain = good(random, path, body)
    response = send(random, path, {**body, "stream": True, "stream_options": {"include_usage": True}})
    chunks = data_of(response.text)
    assert chunks[-1]["usage"] == plain["usage"]
    for whole in plain["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == whole["index"]]
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == [whole["finish_reason"]]
        if path == CHAT:
            for key in ("content", "reasoning"):
                assert "".join(c["delta"].get(key, "") for c in mine) == whole["message"][key]
        else:
            assert "".join(c["text"] for c in mine) == whole["text"]


def test_more_jobs_than_the_engine_takes_are_refused_at_once() -> None:
    engine = Engine(student(), tiny_chat(), slots=2, queue=1)
    gateway = Gateway(engine, NAME)
    assert len(good(gateway, CHAT, {"messages": USER, "n": 3})["choices"]) == 3
    assert refused(gateway, CHAT, {"messages": USER, "n": 4}, "3 may be at work")["code"] == "too_many_choices"
    prompts = {"prompt": [QUESTION] * 2, "max_tokens": 2}
    refused(gateway, COMPLETIONS, {**prompts, "n": 2}, "4 choices")
    refused(gateway, COMPLETIONS, {**prompts, "echo": True, "logprobs": 0}, "4 choices")  # prompts to score are jobs
    good(gateway, COMPLETIONS, prompts)
    idle(engine)
    assert gateway.running == 0
    engine.close()


def test_choices_that_do_not_all_fit_leave_nothing_behind() -> None:
    model = student(delay=0.01)
    engine = Engine(model, tiny_chat(), slots=1, queue=3)
    gateway = Gateway(engine, NAME)
    nines = {"messages": [{"role": "user", "content": "1 a +1 ="}], "max_tokens": 20}

    async def work(client: httpx.AsyncClient) -> list[httpx.Response]:
        return await asyncio.gather(*(client.post(CHAT, json={**nines, "n": 3}) for _ in range(3)))

    assert sorted(answer.status_code for answer in session(gateway, work)) == [200, 503, 503]
    idle(engine)
    assert gateway.running == 0
    assert model.steps <= 3 * 20 + 3  # those of the refused ones were never taken
    engine.close()


# ---- completions


def unplaced(choice: dict[str, Any]) -> dict[str, Any]:
    """Without the offsets: of a text they are the tokenizer's, of ids those of the pieces that they are decoded to."""
    return choice | {"logprobs": choice["logprobs"] and {**choice["logprobs"], "text_offset": None}}


def truth(random: Gateway, text: str, reply: list[str]) -> str:
    """The prompt and what follows, decoded at once."""
    chat = random.engine.chat
    ids = [*chat.encode(text), *(chat.encode(word)[0] for word in reply)]
    return str(chat.tokenizer.decode(ids, skip_special_tokens=False))


@FRESH
@given(
    st.lists(st.sampled_from(["7", "a", "+5", "b", "*3", "="]), min_size=1, max_size=5),
    st.booleans(),
    st.sampled_from([None, 0, 3]),
    st.sampled_from([0.0, 1.3]),
    st.integers(1, 12),
)
def test_a_completion_is_its_stream_and_continues_the_text(
    random: Gateway, words: list[str], echo: bool, logprobs: int | None, temperature: float, limit: int
) -> None:
    text = " ".join(words)
    body = {"prompt": text, "echo": echo, "logprobs": logprobs, "temperature": temperature, "seed": 3}
    body |= {"max_tokens": limit}
    plain = good(random, COMPLETIONS, body)
    choice = plain["choices"][0]
    chunks = data_of(send(random, COMPLETIONS, {**body, "stream": True}).text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == choice["text"]
    ids = good(random, COMPLETIONS, {**body, "prompt": random.engine.chat.encode(text)})["choices"][0]
    assert unplaced(ids) == unplaced(choice)  # the same prompt as ids
    if logprobs is None:
        assert choice["logprobs"] is None
        return
    told = choice["logprobs"]
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    for key, values in told.items():
        assert [value for part in parts if part for value in part[key]] == values
    count = len(words) if echo else 0
    said, control = told["tokens"][count:], random.engine.chat.control
    if choice["finish_reason"] == "length" and not control.keys() & set(said):
        assert choice["text"] == truth(random, text, said)[0 if echo else len(text) :]
    assert told["token_logprobs"][: count and 1] == [None][:count]
    for name, value, top in list(zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True))[1:]:
        assert top[name] == value
        assert len(top) in ((1,) if logprobs == 0 else (3, 4))
    assert told["text_offset"] == sorted(told["text_offset"])
    for name, at in zip(told["tokens"], told["text_offset"], strict=True):
        assert name in control or choice["text"][at:].lstrip().startswith(name)


@FRESH
@given(st.integers(0, 99), st.integers(2, 20), st.integers(0, 4))
def test_the_scores_of_an_echoed_prompt_are_those_with_which_it_was_said(
    random: Gateway, seed: int, limit: int, top: int
) -> None:
    """What the model says is sent back as a prompt: each token must have the log-probability it was said with."""
    chat = random.engine.chat
    prompt = chat.encode(QUESTION)
    how = {"logprobs": top, "temperature": 1.0, "seed": seed}
    said = good(random, COMPLETIONS, {"prompt": prompt, "max_tokens": limit, **how})["choices"][0]["logprobs"]
    ids = [*prompt, *(chat.tokenizer.token_to_id(name) for name in said["tokens"])]
    scored = good(random, COMPLETIONS, {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": top})
    told = scored["choices"][0]["logprobs"]
    for key in ("tokens", "token_logprobs", "top_logprobs"):
        assert told[key][len(prompt) :] == said[key]
    assert scored["usage"] | {"completion_tokens_details": None} == {
        "prompt_tokens": len(ids),
        "completion_tokens": 0,
        "total_tokens": len(ids),
        "completion_tokens_details": None,
    }


def test_prompts_of_a_list_are_answered_as_alone(random: Gateway) -> None:
    chat, prompts = random.engine.chat, ["7 a", "7 a +5 b", "b *3 ="]
    body: dict[str, Any] = {"n": 2, "seed": 9, "temperature": 1.2, "echo": True, "logprobs": 1, "max_tokens": 4}
    several = good(random, COMPLETIONS, {**body, "prompt": prompts})
    alone = [good(random, COMPLETIONS, {**body, "prompt": prompt}) for prompt in prompts]
    flat = [choice for answer in alone for choice in answer["choices"]]
    assert several["choices"] == [{**choice, "index": index} for index, choice in enumerate(flat)]
    for key in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert several["usage"][key] == sum(answer["usage"][key] for answer in alone)
    ids = good(random, COMPLETIONS, {**body, "prompt": [chat.encode(prompt) for prompt in prompts]})
    assert [*map(unplaced, ids["choices"])] == [*map(unplaced, several["choices"])]


def test_a_prompt_is_no_turn_and_think_tokens_are_text() -> None:
    seen = []

    def script(prompt: list[int]) -> list[int]:
        seen.append(prompt)
        return [9, ETHINK, 9, 9, END]

    engine = Engine(Scripted(script), tiny_chat())
    gateway, word = Gateway(engine, NAME), tiny_chat().decode([9])
    answer = good(gateway, COMPLETIONS, {"prompt": "<|User|>7 a<|Assistant|><think>", "max_tokens": 9, "logprobs": 0})
    chat = tiny_chat()
    assert seen[0] == [2, *chat.encode("7 a"), 3, 4]
    assert answer["choices"][0]["text"] == f"{word}</think>{word} {word}"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["logprobs"]["tokens"] == [word, "</think>", word, word]
    assert answer["usage"]["completion_tokens"] == 5
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}
    ended = good(gateway, COMPLETIONS, {"prompt": "7 a", "stop": ["</think>"]})["choices"][0]
    assert (ended["text"], ended["finish_reason"]) == (f" {word}", "stop")
    engine.close()


def test_a_mode_makes_a_prompt_a_users_turn(taught: Gateway) -> None:
    on = good(taught, COMPLETIONS, {"prompt": QUESTION, "reasoning_effort": "high"})
    choice = on["choices"][0]
    assert (choice["text"], choice["reasoning"], choice["reasoning_content"]) == ("6", *["7 a +5 2 b *3 6"] * 2)
    assert on["usage"]["completion_tokens_details"] == {"reasoning_tokens": 7}
    off = good(taught, COMPLETIONS, {"prompt": QUESTION, "model": "tiny-direct"})["choices"][0]
    assert (off["text"], off["reasoning"]) == ("6", None)
    asked = {"prompt": QUESTION, "reasoning_effort": "none"}
    assert refused(taught, COMPLETIONS, {**asked, "echo": True}, "echo needs a prompt")["param"] == "echo"
    assert refused(taught, COMPLETIONS, {**asked, "prompt": [9]}, "ids are continued")["param"] == "prompt"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "no tokens"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "7"]}, "prompt"),
        ({"prompt": [10**6]}, "1000000 is no token's id"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": ["7"] * 17}, "prompt"),
        ({"prompt": "7", "max_tokens": 0}, "needs echo"),
        ({"prompt": "7", "best_of": 2}, "best_of"),
        ({"prompt": "7", "suffix": "x"}, "suffix"),
        ({"prompt": "7", "logprobs": True}, "logprobs"),
        ({"prompt": "7", "logprobs": 21}, "logprobs"),
        ({"prompt": "seven"}, "does not know the word 'seven'"),
        ({"prompt": [9] * 513, "max_tokens": 0, "echo": True, "logprobs": 0}, "context"),
        ({"prompt": [9] * 512, "max_tokens": 1}, "context"),
        ({}, "prompt"),
    ],
)
def test_bad_completions(random: Gateway, body: Any, words: str) -> None:
    refused(random, COMPLETIONS, body, words)
    assert random.running == 0


def test_the_whole_context_can_be_scored(random: Gateway) -> None:
    body = {"prompt": [9] * 512, "max_tokens": 0, "echo": True, "logprobs": 0}
    told = good(random, COMPLETIONS, body)["choices"][0]["logprobs"]["token_logprobs"]
    assert (len(told), told.count(None)) == (512, 1)


@given(st.lists(st.integers(0, 40), max_size=30), st.text(max_size=12))
def test_ids_are_spelled_as_they_are_decoded(ids: list[int], text: str) -> None:
    tiny, bytes_ = tiny_chat(), byte_chat()
    for chat, some in ((tiny, [i for i in ids if i < 40]), (bytes_, bytes_.encode(text))):
        spelt, offsets = spelled(chat, some)
        assert spelt == chat.tokenizer.decode(some, skip_special_tokens=False)
        assert len(offsets) == len(some)
        assert offsets == sorted(offsets)


@given(st.text(max_size=10), st.text(min_size=1, max_size=10))
def test_text_behind_a_prompt_goes_on_as_if_it_had_not_been_cut(first: str, second: str) -> None:
    for chat in (byte_chat(), tiny_chat()):
        if chat is not byte_chat():
            first, second = "7 a +5", "b *3 ="
        before, ids = chat.encode(first), chat.encode(second)
        text = Detokeniser(chat, before[-8:])
        assert (
            "".join(text.add(i) for i in ids) + text.end() == chat.decode([*before, *ids])[len(chat.decode(before)) :]
        )


def test_a_raw_reader_keeps_every_token() -> None:
    reader = Reader(tiny_chat(), False, after=[9])
    pieces = [piece for i in (9, 4, 9, 5, 5, 9) for piece in reader.add(Token(i, 0.0))] + reader.end()
    word = tiny_chat().decode([9])
    assert "".join(piece.text for piece in pieces) == f" {word}<think>{word}</think></think>{word}"
    assert [token.id for piece in pieces for token in piece.tokens] == [9, 4, 9, 5, 5, 9]


# ---- responses


EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def test_a_response_has_its_reasoning_and_its_message(taught: Gateway) -> None:
    answer = good(taught, RESPONSES, {"input": QUESTION, "reasoning": {"effort": "high"}, "metadata": {"a": "b"}})
    Response.model_validate(answer)
    assert (answer["status"], answer["metadata"], answer["reasoning"]["effort"]) == ("completed", {"a": "b"}, "high")
    reasoning, message = answer["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "7 a +5 2 b *3 6"}]
    assert message["content"][0]["text"] == "6"
    usage = answer["usage"]
    assert (usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]) == (9, 10, 19)
    assert usage["output_tokens_details"] == {"reasoning_tokens": 7}
    (only,) = good(taught, RESPONSES, {"input": QUESTION})["output"]
    assert only["content"][0]["text"] == "6"


def test_a_response_can_be_sent_back_as_input(taught: Gateway) -> None:
    answer = Response.model_validate(good(taught, RESPONSES, {"input": QUESTION, "reasoning": {"effort": "low"}}))
    items = [{"role": "user", "content": QUESTION}, *(item.model_dump() for item in answer.output)]
    again = good(taught, RESPONSES, {"input": [*items, *items[:1]], "instructions": "7", "max_output_tokens": 1})
    assert again["usage"]["input_tokens"] == 9 + 2 + 9  # as in a chat: content and end, without reasoning
    parts = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": QUESTION}]}]
    assert good(taught, RESPONSES, {"input": parts})["output"][0]["content"][0]["text"] == "6"


@FRESH
@given(
    st.booleans(),
    st.sampled_from([None, 0, 4]),
    st.sampled_from([0.0, 1.4]),
    st.integers(1, 24),
    st.integers(0, 99),
    st.sampled_from([None, 0, 3]),
)
def test_the_events_of_a_response_build_the_plain_answer(
    random: Gateway, thinking: bool, budget: int | None, temperature: float, limit: int, seed: int, top: int | None
) -> None:
    switch = {"type": "enabled" if thinking else "disabled", "budget_tokens": budget if thinking else None}
    body = {"input": QUESTION, "thinking": switch, "temperature": temperature, "seed": seed, "stop": [" *3"]}
    body |= {"max_output_tokens": limit}
    if top is not None:
        body |= {"include": ["message.output_text.logprobs"], "top_logprobs": top}
    streamed_as_it_is_plain(random, body)


def streamed_as_it_is_plain(gateway: Gateway, body: dict[str, Any]) -> dict[str, Any]:
    """The plain answer to a body, once its stream has been put together to the same."""
    plain = good(gateway, RESPONSES, body)
    response = send(gateway, RESPONSES, {**body, "stream": True})
    assert "[DONE]" not in response.text
    names = [line.removeprefix("event: ") for line in response.text.splitlines() if line.startswith("event: ")]
    events = data_of(response.text)
    assert names == [event["type"] for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        EVENTS.validate_python(event)  # strict: every field of the official type, of its kind
    last = events[-1]["response"]
    changing = ("id", "created_at", "output")
    assert {k: v for k, v in last.items() if k not in changing} == {k: v for k, v in plain.items() if k not in changing}
    assert unnamed(last["output"]) == unnamed(plain["output"])
    assert unnamed(built(events)) == unnamed([*map(bare, plain["output"])])
    assert names[-1] == f"response.{plain['status']}"
    assert len({item["id"] for item in last["output"]}) == len(last["output"])
    Response.model_validate(plain)
    return plain


def built(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The output as a client puts it together, with the official order of events held to."""
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    output: list[dict[str, Any]] = []
    stage = "closed"
    for event in events[2:-1]:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert (stage, event["output_index"]) == ("closed", len(output))
            output.append(json.loads(json.dumps(event["item"])))
            stage = "item"
        elif kind == "content_part.added":
            assert stage == "item"
            output[-1]["content"].append(dict(event["part"]))
            stage = "part"
        elif kind.endswith("text.delta"):
            assert stage == "part"
            part = output[-1]["content"][0]
            assert part["type"] == kind.removesuffix(".delta")
            part["text"] += event["delta"]
            if part["type"] == "output_text":
                part["logprobs"] += event["logprobs"]
        elif kind.endswith("text.done"):
            part = output[-1]["content"][0]
            assert (stage, event["text"], event.get("logprobs")) == ("part", part["text"], part.get("logprobs"))
            stage = "said"
        elif kind == "content_part.done":
            part = output[-1]["content"][0]
            assert (stage, bare({"content": [event["part"]]})) == ("said", {"content": [part]})
            stage = "whole"
        elif kind == "function_call_arguments.delta":
            assert stage in ("item", "called")
            output[-1]["arguments"] += event["delta"]
            stage = "called"
        elif kind == "function_call_arguments.done":
            told = (event["name"], event["arguments"])
            assert (stage, *told) == ("called", output[-1]["name"], output[-1]["arguments"])
            stage = "whole"
        else:
            assert (kind, stage) == ("output_item.done", "whole")
            output[-1]["status"] = event["item"]["status"]
            assert bare(event["item"]) == output[-1]
            stage = "closed"
        if kind != "output_item.added" and kind != "output_item.done":
            assert (event["item_id"], event["output_index"]) == (output[-1]["id"], len(output) - 1)
    assert stage == "closed"
    return output


def bare(item: dict[str, Any]) -> dict[str, Any]:
    """An item without the tokens' bytes, which events do not tell."""
    return cast(dict[str, Any], json.loads(json.dumps(item), object_hook=lambda said: _without(said, "bytes")))


def _without(said: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in said.items() if name != key}


def unnamed(output: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in item.items() if key not in ("id", "call_id")} for item in output]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"previous_response_id": "resp_1"}, "keeps nothing"),
        ({"store": True}, "keeps nothing"),
        ({"background": True}, "keeps nothing"),
        ({"conversation": "c"}, "keeps nothing"),
        ({"prompt": {"id": "p"}}, "prompt: is not supported"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type: Input should be 'function'"),
        ({"top_logprobs": 2}, 'top_logprobs needs include: ["message.output_text.logprobs"]'),
        ({"top_logprobs": 21, "include": ["message.output_text.logprobs"]}, "top_logprobs"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format: structured output"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"input": []}, "input"),
        ({"input": [{"type": "reasoning"}]}, "input has no message"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"reasoning": {"effort": "low"}, "thinking": {"type": "disabled"}}, "asks for thinking and"),
        ({"messages": USER}, "messages: unknown field"),
        ({"n": 2}, "n: unknown field"),
    ],
)
def test_bad_responses(random: Gateway, more: dict[str, Any], words: str) -> None:
    refused(random, RESPONSES, {"input": QUESTION, **more}, words)


def test_what_asks_for_nothing_that_is_kept_is_accepted(taught: Gateway) -> None:
    more = {"store": False, "previous_response_id": None, "background": False, "tools": [], "tool_choice": "auto"}
    more |= {"include": ["reasoning.encrypted_content"], "text": {"format": {"type": "text"}, "verbosity": "low"}}
    assert good(taught, RESPONSES, {"input": QUESTION, **more})["store"] is False


def test_a_fault_of_the_model_ends_each_kind_of_stream() -> None:
    from ottava.errors import ResourceError

    def script(prompt: list[int]) -> list[int]:
        raise ResourceError("no memory")

    engine = Engine(Scripted(script), tiny_chat())
    gateway = Gateway(engine, NAME)
    events = data_of(send(gateway, RESPONSES, {"input": QUESTION, "stream": True}).text)
    assert events[-1]["type"] == "response.failed"
    assert events[-1]["response"]["error"]["message"] == "no memory"
    for event in events:
        EVENTS.validate_python(event)
    for more in ({}, {"echo": True, "logprobs": 0}):
        said = data_of(send(gateway, COMPLETIONS, {"prompt": QUESTION, "stream": True, **more}).text)
        assert said[-1]["error"]["message"] == "no memory"
    for path, body in ((RESPONSES, {"input": QUESTION}), (COMPLETIONS, {"prompt": QUESTION})):
        assert send(gateway, path, body).status_code == 503
    assert gateway.running == 0
    engine.close()


# ---- the rest


def test_the_official_types_take_every_answer(random: Gateway) -> None:
    more = {"n": 2, "temperature": 1, "max_tokens": 6}
    ChatCompletion.model_validate(good(random, CHAT, {"messages": USER, **more, "logprobs": True, "top_logprobs": 2}))
    Completion.model_validate(good(random, COMPLETIONS, {"prompt": QUESTION, **more, "logprobs": 2}))


def test_a_model_by_its_name(random: Gateway) -> None:
    async def work(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.get(f"/v1/models/{name}") for name in (NAME, f"{NAME}-thinking", "other", "a/b")]

    answers = session(random, work)
    assert [answer.status_code for answer in answers] == [200, 200, 404, 404]
    assert answers[1].json()["id"] == "tiny-thinking"
    assert answers[2].json()["error"]["code"] == "model_not_found"


def test_the_document_is_served(random: Gateway) -> None:
    async def work(client: httpx.AsyncClient) -> httpx.Response:
        return await client.get("/openapi.json")

    assert session(random, work).json() == described()


def test_the_document_names_every_route_and_status(random: Gateway) -> None:
    routes = {route.path.replace(":path", "") for route in random.app().routes}  # type: ignore[attr-defined]
    assert set(described()["paths"]) == routes
    for path in (CHAT, COMPLETIONS, RESPONSES):
        statuses = set(described()["paths"][path]["post"]["responses"])
        assert statuses == {"200", "400", "401", "404", "408", "413", "415", "429", "500", "503", "504"}


def test_several_choices_count_against_a_key() -> None:
    from ottava.gateway.keys import Turnstile

    engine = Engine(student(), tiny_chat())
    gateway = Gateway(engine, NAME, turnstile=Turnstile(at_once=3, a_minute=5, clock=lambda: 0.0))
    refused(gateway, CHAT, {"messages": USER, "n": 4}, "3 may be at work")
    good(gateway, CHAT, {"messages": USER, "n": 3})
    refused(gateway, CHAT, {"messages": USER, "n": 2}, "requests a minute", status=429)
    assert gateway.turnstile._inside == {}
    engine.close()
