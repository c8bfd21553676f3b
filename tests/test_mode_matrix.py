"""The mode matrix: every form of the thinking switch x mode x template family x streaming or not x endpoint.

Servers are real processes, asked over a socket by the official client. What is right is said by another way: the prompt
as Transformers renders it goes to the same server as ids, to be continued without a template, and the test parts the
text at `</think>` itself. So the matrix holds for any kind of server that continues ids: `KINDS` names them, each with
what `ottava.gateway.server.serve` is given for it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import pytest
from transformers import AutoTokenizer

from ottava.supervisor.local import LocalLauncher

from . import conform
from .test_engine import END, random_model, write_folder
from .test_gateway import NAME, QUESTION, USER, start

KINDS: dict[str, dict[str, Any]] = {"embedded": {}, "replicas": {"replicas": 1}}
SLOW = ("replicas",)

QWEN3 = """\
{%- for m in messages -%}
{{ '<|User|>' if m.role == 'user' else '<|Assistant|>' }}{{ m.content }}{{ '<|end|>' if m.role == 'assistant' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|Assistant|>
{%- if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif -%}
{%- endif -%}
"""
"""Like Qwen3's: thinks where nothing is said, leaves <think> to the model, and reads `enable_thinking`."""

SWITCHLESS = "{% for m in messages %}<|User|>{{ m.content }}{% endfor %}<|Assistant|>"


class Family(NamedTuple):
    """A template, the key that it reads, and the seed of a model that ends its thinking within LIMIT ids."""

    key: str
    template: str | None
    seed: int


FAMILIES = {"deepseek": Family("thinking", None, 12), "qwen3": Family("enable_thinking", QWEN3, 9)}
LIMIT = 24

EFFORTS = {True: ("low", "medium", "high", "xhigh", "max"), False: ("none", "minimal")}
FORMS: dict[str, list[tuple[bool, dict[str, Any]]]] = {
    "thinking.type": [(True, {"thinking": {"type": "enabled"}}), (False, {"thinking": {"type": "disabled"}})],
    "reasoning_effort": [(on, {"reasoning_effort": effort}) for on in EFFORTS for effort in EFFORTS[on]],
    "reasoning.effort": [(on, {"reasoning": {"effort": effort}}) for on in EFFORTS for effort in EFFORTS[on]],
    "chat_template_kwargs.thinking": [(on, {"chat_template_kwargs": {"thinking": on}}) for on in (True, False)],
    "chat_template_kwargs.enable_thinking": [
        (on, {"chat_template_kwargs": {"enable_thinking": on}}) for on in (True, False)
    ],
    "model name": [(True, {"model": f"{NAME}-thinking"}), (False, {"model": f"{NAME}-direct"})],
}
CELLS = [(form, on, more) for form, ways in FORMS.items() for on, more in ways]


@dataclass(frozen=True)
class Said:
    """What a client reads of an answer, whatever the endpoint. reasoning None: there was none."""

    reasoning: str | None
    content: str
    prompt: int
    total: int
    thought: int


@dataclass(frozen=True)
class Served:
    """A server of one family's model, and what is right in each mode."""

    url: str
    client: openai.OpenAI
    right: dict[bool, Said]


def folder_of(family: Family, place: Path) -> Path:
    folder = write_folder(place, random_model(family.seed, quiet=[0, END, 2, 3, 4]))
    if family.template is not None:
        (folder / "chat_template.jinja").write_text(family.template)
    return folder


def right(url: str, folder: Path, family: Family, thinking: bool) -> Said:
    """The answer by way of ids."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(
        USER, add_generation_prompt=True, tokenize=True, return_dict=False, **{family.key: thinking}
    )
    body = {"prompt": ids, "max_tokens": LIMIT, "logprobs": 0}
    answer = httpx.post(f"{url}/v1/completions", json=body, trust_env=False).json()
    text, tokens = answer["choices"][0]["text"], answer["choices"][0]["logprobs"]["tokens"]
    assert len(tokens) == LIMIT
    if not thinking:
        return Said(None, text, len(ids), LIMIT, 0)
    reasoning, _, content = text.partition("</think>")
    assert reasoning.split()
    assert content.split()
    return Said(reasoning, content, len(ids), LIMIT, tokens.index("</think>"))


CASES = [
    pytest.param((kind, family), id=f"{kind}-{family}", marks=[pytest.mark.slow] if kind in SLOW else [])
    for kind in KINDS
    for family in FAMILIES
]


@pytest.fixture(scope="module", params=CASES)
def served(
    request: pytest.FixtureRequest, launcher: LocalLauncher, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    kind, name = request.param
    place, family = tmp_path_factory.mktemp(f"{kind}-{name}"), FAMILIES[name]
    folder = folder_of(family, place / "model")
    process, url = start(launcher, folder, place, **KINDS[kind])
    http = openai.DefaultHttpxClient(trust_env=False, event_hooks={"response": [conform.plain_hook]})
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http, timeout=300)
    found = {thinking: right(url, folder, family, thinking) for thinking in (True, False)}
    assert found[True].prompt != found[False].prompt or found[True].content != found[False].content
    yield Served(url, client, found)
    process.terminate()
    assert process.wait(60) == 0


# ---- how each endpoint is asked and read


def chat(client: openai.OpenAI, more: dict[str, Any]) -> Said:
    model = more.get("model", NAME)
    answer = client.chat.completions.create(model=model, messages=USER, max_tokens=LIMIT, extra_body=more)  # type: ignore[call-overload]
    message = answer.choices[0].message
    assert message.reasoning == message.reasoning_content
    return Said(message.reasoning, message.content, *counts(answer.usage))


def chat_stream(client: openai.OpenAI, more: dict[str, Any]) -> Said:
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": LIMIT}
    chunks = list(
        client.chat.completions.create(model=more.get("model", NAME), messages=USER, extra_body=more, **options)  # type: ignore[call-overload]
    )
    deltas = [choice.delta.model_dump(exclude_unset=True) for chunk in chunks for choice in chunk.choices]
    for delta in deltas:
        assert delta.get("reasoning") == delta.get("reasoning_content")
    return Said(joined(deltas, "reasoning"), joined(deltas, "content") or "", *counts(chunks[-1].usage))


def completion(client: openai.OpenAI, more: dict[str, Any]) -> Said:
    model = more.get("model", NAME)
    answer = client.completions.create(model=model, prompt=QUESTION, max_tokens=LIMIT, extra_body=more)
    choice: Any = answer.choices[0]
    assert choice.reasoning == choice.reasoning_content
    return Said(choice.reasoning, choice.text, *counts(answer.usage))


def completion_stream(client: openai.OpenAI, more: dict[str, Any]) -> Said:
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": LIMIT}
    chunks = list(client.completions.create(model=more.get("model", NAME), prompt=QUESTION, extra_body=more, **options))
    deltas = [choice.model_dump(exclude_unset=True) for chunk in chunks for choice in chunk.choices]
    return Said(joined(deltas, "reasoning"), joined(deltas, "text") or "", *counts(chunks[-1].usage))


def response(client: openai.OpenAI, more: dict[str, Any]) -> Said:
    model = more.get("model", NAME)
    return said(client.responses.create(model=model, input=QUESTION, max_output_tokens=LIMIT, extra_body=more))


def response_stream(client: openai.OpenAI, more: dict[str, Any]) -> Said:
    options: dict[str, Any] = {"input": QUESTION, "max_output_tokens": LIMIT, "extra_body": more}
    with client.responses.stream(model=more.get("model", NAME), **options) as stream:
        events: list[Any] = list(stream)
    found = said(events[-1].response)
    for kind, whole in (("reasoning_text", found.reasoning or ""), ("output_text", found.content)):
        assert "".join(event.delta for event in events if event.type == f"response.{kind}.delta") == whole
    return found


def said(answer: Any) -> Said:
    reasoning = [part.text for item in answer.output if item.type == "reasoning" for part in item.content]
    usage = answer.usage
    thought = usage.output_tokens_details.reasoning_tokens
    return Said("".join(reasoning) if reasoning else None, answer.output_text, usage.input_tokens, usage.output_tokens,
                thought)  # fmt: skip


def joined(deltas: list[dict[str, Any]], key: str) -> str | None:
    found = [delta[key] for delta in deltas if key in delta]
    return "".join(found) if found else None


def counts(usage: Any) -> tuple[int, int, int]:
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    return usage.prompt_tokens, usage.completion_tokens, usage.completion_tokens_details.reasoning_tokens


ENDPOINTS: dict[str, Callable[[openai.OpenAI, dict[str, Any]], Said]] = {
    "chat": chat,
    "chat, streamed": chat_stream,
    "completions": completion,
    "completions, streamed": completion_stream,
    "responses": response,
    "responses, streamed": response_stream,
}


# ---- the matrix


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_every_form_decides_the_mode(served: Served, endpoint: str) -> None:
    seen = 0
    for form, on, more in CELLS:
        assert ENDPOINTS[endpoint](served.client, more) == served.right[on], (form, more)
        seen += 1
    assert seen == 22


@pytest.mark.parametrize("endpoint", ["chat", "chat, streamed", "responses", "responses, streamed"])
def test_direct_where_nobody_asks(served: Served, endpoint: str) -> None:
    """Also of a template that thinks where nothing is said."""
    assert ENDPOINTS[endpoint](served.client, {}) == served.right[False]


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_forms_that_agree_are_one_wish(served: Served, endpoint: str) -> None:
    for on in (True, False):
        together: dict[str, Any] = {}
        for ways in FORMS.values():
            more = next(more for wish, more in ways if wish is on)
            for key, value in more.items():
                together[key] = (
                    {**together[key], **value} if key == "chat_template_kwargs" and key in together else value
                )
        assert ENDPOINTS[endpoint](served.client, together) == served.right[on]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/chat/completions", {"messages": USER}),
        ("/v1/completions", {"prompt": QUESTION}),
        ("/v1/responses", {"input": QUESTION}),
    ],
)
def test_forms_that_differ_are_refused(served: Served, path: str, asked: dict[str, Any], stream: bool) -> None:
    seen = 0
    hooks = {"response": [conform.plain_hook]}
    with httpx.Client(trust_env=False, base_url=served.url, event_hooks=hooks) as client:
        for (form, on, one), (another, off, other) in itertools.product(CELLS, CELLS):
            if not on or off or form == another:
                continue
            more = {**one, **other}
            if "chat_template_kwargs" in one and "chat_template_kwargs" in other:
                more = {"chat_template_kwargs": {**one["chat_template_kwargs"], **other["chat_template_kwargs"]}}
            answer = client.post(path, json={**asked, **more, "stream": stream})
            assert answer.status_code == 400, more
            error = answer.json()["error"]
            assert error["code"] == "thinking_conflict"
            assert "asks for thinking and" in error["message"]
            seen += 1
    assert seen == 14 * 8 - (1 * 1 + 5 * 2 + 5 * 2 + 1 * 1 + 1 * 1 + 1 * 1)  # a form has one value


@pytest.mark.parametrize("endpoint", ["chat", "responses"])
def test_the_official_client_raises_what_is_refused(served: Served, endpoint: str) -> None:
    more = {"reasoning_effort": "high", "thinking": {"type": "disabled"}}
    with pytest.raises(openai.BadRequestError, match="asks for thinking and") as caught:
        ENDPOINTS[endpoint](served.client, more)
    assert caught.value.code == "thinking_conflict"


@pytest.mark.parametrize("thinking", [True, False])
def test_the_helper_of_the_official_client_ends_with_the_plain_response(served: Served, thinking: bool) -> None:
    word = served.right[thinking].content.split()[2]  # a text that ends the content, as this model never does
    more = {"thinking": {"type": "enabled" if thinking else "disabled"}, "stop": [f" {word}"]}
    options: dict[str, Any] = {"model": NAME, "input": QUESTION, "max_output_tokens": LIMIT, "extra_body": more}
    plain = served.client.responses.create(**options)
    with served.client.responses.stream(**options) as stream:
        final = stream.get_final_response()
    assert final.status == plain.status == "completed"
    assert said(final) == said(plain)
    assert said(final).content == served.right[thinking].content.split(f" {word}")[0]


def test_a_model_without_a_switch_is_direct_in_every_form(launcher: LocalLauncher, tmp_path: Path) -> None:
    folder = folder_of(Family("", SWITCHLESS, 12), tmp_path / "model")
    process, url = start(launcher, folder, tmp_path)
    with httpx.Client(trust_env=False, base_url=url, event_hooks={"response": [conform.plain_hook]}) as client:
        for path, asked in (
            ("/v1/chat/completions", {"messages": USER}),
            ("/v1/completions", {"prompt": QUESTION}),
            ("/v1/responses", {"input": QUESTION}),
        ):
            for form, on, more in CELLS:
                answer = client.post(path, json={**asked, **more})
                assert answer.status_code == (404 if form == "model name" else 400 if on else 200), (path, more)
                if answer.status_code == 200:
                    assert "reasoning_text" not in json.dumps(answer.json())
                elif on and form != "model name":
                    assert "no thinking switch" in answer.text
    process.terminate()
    assert process.wait(60) == 0
